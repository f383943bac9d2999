"""A digest of what a traced function computes, the same in every process.

The printed form of a jaxpr will not do: NumPyro keeps the parameters of a distribution in a set,
so that the outputs of a scan over sample sites come in an order that depends on Python's hash
seed. Here every value is named by the operation it comes from and by the names of that
operation's inputs; order matters only where it means something.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jax_core

from ppl_toolkit.tracing import as_numpy, scan_parts

__all__ = ["fingerprint"]

_ADDRESS = re.compile(r"0x[0-9a-f]+")
_INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


def fingerprint(jaxpr: Any) -> str:
    """SHA-256 of the outputs of ``jaxpr`` as functions of its inputs (names and layout aside).

    Args:
        jaxpr: a jaxpr (`jax.extend.core.Jaxpr`); its constants count by shape and type only.

    Complexity: linear in the number of equations, those inside loops included.
    """
    arguments = [_name("argument", i, v.aval) for i, v in enumerate(jaxpr.invars)]
    constants = [_name("constant", v.aval) for v in jaxpr.constvars]
    return _name(*_outputs(jaxpr, constants, arguments))


def _name(*parts: Any) -> str:
    text = "\0".join(_ADDRESS.sub("", str(part)) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()


def _outputs(jaxpr: Any, constants: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Names of the outputs, given those of the inputs."""
    names = dict(zip(jaxpr.constvars, constants, strict=True))
    names |= zip(jaxpr.invars, arguments, strict=True)

    def read(atom: Any) -> str:
        if isinstance(atom, jax_core.Literal):
            return _name("literal", atom.aval, np.asarray(atom.val).tolist())
        return names[atom]

    for equation in jaxpr.eqns:
        values = _equation(equation, [read(v) for v in equation.invars])
        names |= zip(equation.outvars, values, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _closed(closed: Any, arguments: Sequence[str]) -> list[str]:
    constants = [_name("constant", np.shape(c), as_numpy(c).tolist()) for c in closed.consts]
    return _outputs(closed.jaxpr, constants, arguments)


def _equation(equation: Any, inputs: list[str]) -> list[str]:
    """Names of what an equation computes from inputs of these names."""
    kind, params = equation.primitive.name, equation.params
    if kind in _INLINED and hasattr(params.get("jaxpr"), "consts"):
        return _closed(params["jaxpr"], inputs)
    if kind == "custom_jvp_call":
        return _closed(params["call_jaxpr"], inputs)
    if kind == "scan":
        return _scan(equation, inputs)
    settings = sorted((k, _setting(v)) for k, v in params.items())
    whole = _name(kind, settings, *inputs)
    return [_name(whole, i) for i in range(len(equation.outvars))]


def _scan(equation: Any, inputs: list[str]) -> list[str]:
    """A scan's stacked outputs are named by what the body computes, not by their place."""
    params, body = equation.params, equation.params["jaxpr"]
    first, carries = scan_parts(equation)
    last = first + carries
    fixed = [_name("fixed", x) for x in inputs[:first]]
    carried = [_name("carried", i, x) for i, x in enumerate(inputs[first:last])]
    series = [_name("series", x) for x in inputs[last:]]
    out = _closed(body, [*fixed, *carried, *series])
    whole = _name("scan", params["length"], params["reverse"], *out[:carries])
    ends = [_name(whole, "end", i) for i in range(carries)]
    return ends + [_name(whole, "stacked", x) for x in out[carries:]]


def _setting(value: Any) -> str:
    """A parameter of an equation as text; functions inside it by their own fingerprint."""
    if hasattr(value, "consts") and hasattr(value, "jaxpr"):
        arguments = [_name("argument", i, v.aval) for i, v in enumerate(value.jaxpr.invars)]
        return _name(*_closed(value, arguments))
    if hasattr(value, "eqns"):
        return fingerprint(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(_setting(v) for v in value)})"
    return _ADDRESS.sub("", str(value))
