"""Of which few numbers a variable of a jaxpr is a linear function, and parts of jaxprs.

Read backwards from the variable through operations that are linear in all that is not data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["PRODUCT", "Linearity", "carry_out", "evaluate", "inlined", "read", "size"]

PRODUCT = 0.2  # time of a multiplication and addition in a matrix product, of one by itself

# Linear in all of their operands together.
_LINEAR = frozenset({
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy",
    "cumsum", "neg", "pad", "reduce_sum", "reshape", "rev", "slice", "squeeze", "sub", "transpose",
})  # fmt: skip
# Linear in each of them while the others are fixed.
_BILINEAR = frozenset({"dot_general", "mul"})
# Linear in the operands with these numbers while the others are fixed.
_PARTLY = {"div": (0,), "gather": (0,), "dynamic_slice": (0,), "select_n": (1, 2, 3, 4)}


def size(variable: Any) -> int:
    """The number of elements of a variable."""
    return math.prod(variable.aval.shape)


class Linearity:
    """What depends how on the first input of a jaxpr.

    Args:
        jaxpr: without inner jitted functions, see `inlined`.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.made_by = {v: equation for equation in jaxpr.eqns for v in equation.outvars}
        self.order = [*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)]
        self.free = {jaxpr.invars[0]}
        for equation in jaxpr.eqns:
            if any(self.depends(v) for v in equation.invars):
                self.free.update(equation.outvars)

    def depends(self, atom: Any) -> bool:
        """Whether a variable or literal depends on the first input."""
        return not hasattr(atom, "val") and atom in self.free

    def roots(self, variable: Any) -> tuple[Any, ...]:
        """The variables that one is linear in: those with the fewest elements in all."""
        found = self._roots(variable, {})
        return tuple(v for v in self.order if v in found)

    def _roots(self, variable: Any, known: dict[Any, frozenset]) -> frozenset:
        if variable not in known:
            known[variable] = frozenset([variable])
            operands = self._linear_in(variable)
            deeper = frozenset[Any]().union(*(self._roots(v, known) for v in operands))
            if operands and sum(map(size, deeper)) < size(variable):
                known[variable] = deeper
        return known[variable]

    def _linear_in(self, variable: Any) -> list[Any]:
        """The free operands of the operation that made a variable, if it is linear in them."""
        equation = self.made_by.get(variable)
        if equation is None or not jnp.issubdtype(variable.aval.dtype, jnp.floating):
            return []
        name, free = equation.primitive.name, [self.depends(v) for v in equation.invars]
        numbers = [i for i, flag in enumerate(free) if flag]
        linear = (
            name in _LINEAR
            or (name in _BILINEAR and len(numbers) == 1)
            or (name in _PARTLY and all(i in _PARTLY[name] for i in numbers))
        )
        operands = [equation.invars[i] for i in numbers]
        floating = all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in operands)
        return operands if linear and floating else []

    def cost(self, variable: Any, roots: Sequence[Any]) -> float:
        """Operations on single numbers, or as long as these, from the roots to a variable."""
        cost, stack, seen = 0.0, [variable], set(roots)
        while stack:
            v = stack.pop()
            if hasattr(v, "val") or v in seen or not self.depends(v):
                continue
            seen.add(v)
            equation = self.made_by[v]
            each = 1.0
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                each = PRODUCT * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            cost += each * size(v)
            stack += equation.invars
        return cost


def inlined(function: Any, *example: Any) -> Any:
    """The function with the bodies of inner jitted functions in their place."""
    closed = jax.make_jaxpr(function)(*example)

    def run(jaxpr: Any, consts: Sequence[Any], *inputs: Any) -> list[Any]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        for equation in jaxpr.eqns:
            carry_out(equation, values, run)
        return [read(values, v) for v in jaxpr.outvars]

    return lambda *args: run(closed.jaxpr, closed.consts, *jax.tree.leaves(args))


def read(values: Mapping[Any, Any], atom: Any) -> Any:
    """The value of a variable, or that of a literal."""
    return atom.val if hasattr(atom, "val") else values[atom]


def carry_out(equation: Any, values: dict[Any, Any], inner: Any = None) -> None:
    """Compute what an equation gives; ``inner`` runs the bodies of jitted functions."""
    operands = [read(values, v) for v in equation.invars]
    primitive = equation.primitive
    if inner is not None and primitive.name in ("jit", "pjit"):
        body = equation.params["jaxpr"]
        found = inner(body.jaxpr, body.consts, *operands)
    else:
        parameters, functions = primitive.get_bind_params(equation.params), []
        if isinstance(parameters, tuple):  # before JAX 0.12
            functions, parameters = parameters
        found = primitive.bind(*functions, *operands, **parameters)
        found = found if primitive.multiple_results else [found]
    values.update(zip(equation.outvars, found, strict=True))


def evaluate(
    closed: Any,
    wanted: Sequence[Any],
    inputs: Sequence[Any],
    given: Mapping[Any, Any] | None = None,
) -> list[Any]:
    """The values of some variables of a jaxpr, others perhaps ``given``; no more is computed."""
    jaxpr, given = closed.jaxpr, given or {}
    needed = {v for v in wanted if not hasattr(v, "val")} - given.keys()
    equations = []
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            equations.append(equation)
            needed |= {v for v in equation.invars if not hasattr(v, "val")} - given.keys()
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))
    values |= given
    for equation in reversed(equations):
        carry_out(equation, values)
    return [read(values, v) for v in wanted]
