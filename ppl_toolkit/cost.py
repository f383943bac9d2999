"""About how much work a jaxpr is, before it is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ppl_toolkit.linearity import PRODUCT, size

__all__ = ["operations"]

_TURNS = 10  # of a loop that ends when it is done
_CUBIC = frozenset({"cholesky", "eigh", "lu", "qr", "householder_product", "svd", "schur", "eig"})


def operations(jaxpr: Any) -> float:
    """The number of numbers it computes, those of loops once a turn.

    Sums count what they add up, products of matrices a fraction of their multiplications,
    factorisations of n by n matrices n^3. Of branches the dearest counts; a loop without a known
    length counts as ten turns.

    Args:
        jaxpr: open or closed.
    """
    return sum(_of(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    inner = [operations(part) for part in _inner(parameters)]
    if name == "scan":
        return parameters["length"] * sum(inner)
    if name == "while":
        return _TURNS * sum(inner)
    if name == "cond":
        return max(inner)
    if inner:
        return sum(inner)
    outputs = sum(size(v) for v in equation.outvars)
    shapes = [v.aval.shape for v in equation.invars]
    if name == "dot_general":
        contracted = parameters["dimension_numbers"][0][0]
        return PRODUCT * outputs * math.prod(shapes[0][axis] for axis in contracted)
    if name in _CUBIC or name == "triangular_solve":
        return outputs * shapes[0][-1]
    if name.startswith("reduce"):
        return math.prod(shapes[0])
    return outputs


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs within an equation."""
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield part
