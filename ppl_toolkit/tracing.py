"""Traced functions, and what can be said of the user's code that was traced."""

from __future__ import annotations

import dis
import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jax_core

__all__ = [
    "CONCRETE_VALUE_ERRORS",
    "Traced",
    "closed_over_arrays",
    "dependents",
    "label",
    "user_line",
]

CONCRETE_VALUE_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class Traced(NamedTuple):
    """A traced function: its jaxpr, and the constants it closed over, as separate values.

    Passing ``consts`` as arguments of a compiled program keeps closed-over arrays out of it:
    the text of the jaxpr is then a sound key for the executable.
    """

    jaxpr: Any
    consts: tuple[Any, ...]
    out_tree: Any

    def __call__(self, consts: Sequence[Any], *args: Any) -> Any:
        closed = jax_core.ClosedJaxpr(self.jaxpr, list(consts))
        flat = jax_core.jaxpr_as_fun(closed)(*jax.tree_util.tree_leaves(args))
        return jax.tree_util.tree_unflatten(self.out_tree, flat)

    @classmethod
    def of(cls, function: Callable, *args: Any) -> Traced:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
        return cls(closed.jaxpr, tuple(closed.consts), jax.tree_util.tree_structure(out))

    def text(self) -> str:
        """A text that determines the computation up to the values of ``consts``."""
        return f"{self.jaxpr}{self.out_tree}"


def dependents(jaxpr: Any, count: int) -> list[bool]:
    """Which outputs of a jaxpr may depend on its first ``count`` inputs."""
    touched = set(jaxpr.invars[:count])
    for equation in jaxpr.eqns:
        if any(v in touched for v in equation.invars if not hasattr(v, "val")):
            touched.update(equation.outvars)
    return [not hasattr(v, "val") and v in touched for v in jaxpr.outvars]


def label(model: Callable) -> str:
    """How messages call a model."""
    return f"model {getattr(model, '__name__', type(model).__name__)!r}"


_LIBRARIES = ("/site-packages/", "/dist-packages/", "/ppl_toolkit/")


def user_line(error: BaseException) -> str:
    """The deepest line of the user's own code in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in _LIBRARIES)]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno} ({(frame.line or '').strip()})"


def closed_over_arrays(model: Any) -> list[tuple[str, int, tuple[int, ...]]]:
    """Arrays that a model function reads from its closure or globals: (name, line, shape)."""
    function = inspect.unwrap(model)
    while not inspect.isfunction(function):
        inner = getattr(function, "func", None) or getattr(function, "fn", None)
        if inner is None:
            return []
        function = inspect.unwrap(inner)
    variables = inspect.getclosurevars(function)
    outside = {**variables.globals, **variables.nonlocals}
    arrays = {k: v for k, v in outside.items() if isinstance(v, np.ndarray | jax.Array) and v.ndim}
    line = function.__code__.co_firstlineno
    lines: dict[str, int] = {}
    for instruction in dis.get_instructions(function):
        line = (instruction.positions and instruction.positions.lineno) or line
        if instruction.argval in arrays and instruction.opname.startswith("LOAD"):
            lines.setdefault(instruction.argval, line)
    return [(name, lines.get(name, line), v.shape) for name, v in arrays.items()]
