"""Logarithms of exponentials in a jaxpr, which are what the exponentials were taken of.

Counts with log-linear means, y ~ Poisson(exp(eta)), spend half of their time on them. The result is
the same up to rounding, and right where exp(eta) overflows or vanishes.
"""

from __future__ import annotations

from typing import Any

import jax

from ppl_toolkit.linearity import carry_out, read, size
from ppl_toolkit.tracing import Traced

__all__ = ["without_logs_of_exps"]

_FEW = 32  # elements; with fewer nothing is gained
_SHAPES = frozenset({"broadcast_in_dim", "copy", "reshape", "squeeze", "transpose"})


def without_logs_of_exps(traced: Traced, *example: Any) -> Traced:
    """The function without logarithms of exponentials of large arrays.

    Args:
        traced: a function.
        *example: arguments like those it was traced for.

    Returns:
        Itself, where there is nothing to leave out.
    """
    jaxpr, replaced = traced.jaxpr, []

    def run(*args: Any) -> Any:
        values = dict(zip(jaxpr.constvars, traced.consts, strict=True))
        values |= dict(zip(jaxpr.invars, jax.tree.leaves(args), strict=True))
        logs: dict[Any, Any] = {}  # of variables that are exponentials, in other shapes perhaps
        for equation in jaxpr.eqns:
            name, made = equation.primitive.name, equation.outvars[0]
            source = equation.invars[0] if equation.invars else None
            known = not hasattr(source, "val") and source in logs
            if name == "log" and known and size(made) >= _FEW:
                values[made] = logs[source]
                replaced.append(equation)
                continue
            if name == "exp":
                logs[made] = read(values, source)
            elif known and _same_numbers(equation):
                logs[made] = equation.primitive.bind(logs[source], **equation.params)
            carry_out(equation, values)
        found = [read(values, v) for v in jaxpr.outvars]
        return jax.tree.unflatten(traced.out_tree, found)

    simpler = Traced.of(run, *example)
    return simpler if replaced else traced


def _same_numbers(equation: Any) -> bool:
    """Whether an operation only arranges numbers, or keeps their type."""
    if len(equation.invars) != 1:
        return False
    same_type = equation.outvars[0].aval.dtype == equation.invars[0].aval.dtype
    converts = equation.primitive.name == "convert_element_type"
    return equation.primitive.name in _SHAPES or (converts and same_type)
