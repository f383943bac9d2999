"""Traced functions, and what can be said of the user's code that was traced."""

from __future__ import annotations

import dis
import hashlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jax_core

__all__ = [
    "CONCRETE_VALUE_ERRORS",
    "Traced",
    "as_numpy",
    "closed_over_arrays",
    "dependents",
    "digest",
    "inner_jaxprs",
    "key_shape",
    "label",
    "scan_parts",
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

    @property
    def names(self) -> list[str]:
        """The keys of the dictionary it returns, in the order of its outputs."""
        return sorted(jax.tree_util.tree_unflatten(self.out_tree, range(self.out_tree.num_leaves)))

    def text(self, differentiable: bool = True) -> str:
        """A text that determines the computation up to the values of ``consts``.

        The printed jaxpr leaves out two things: the values of arrays that inner functions under
        jit have closed over, and the derivative rules of functions that have their own (which
        matter only where the computation is differentiated). Rules that JAX has for its functions
        follow from their jaxprs; for others the derivative is traced.
        """
        parts = [str(self.jaxpr), str(self.out_tree), *_constants(self.jaxpr)]
        if differentiable and _has_rules(self.jaxpr):
            parts.append(_derivative(self.jaxpr, self.consts))
        return "".join(parts)


_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")
# Rules that belong to one function of JAX's, whose jaxpr tells it: those of files where all do, and
# of functions that got theirs by `defjvps`, which hides where a rule is from.
_RULES_OF_JAX = re.compile(r"/(jax/_src/(lax/other|scipy/special)|ppl_toolkit/fused)\.py:")
_FUNCTIONS_OF_JAX = re.compile(r"(logit|relu|relu6|log1mexp) at .*/jax/_src/(scipy|nn)/\w+\.py:")


def _constants(jaxpr: Any) -> Iterator[str]:
    """Digests of the arrays that inner functions have closed over."""
    for inner in inner_jaxprs(jaxpr):
        yield from (digest(as_numpy(c)) for c in getattr(inner, "consts", ()))
        yield from _constants(getattr(inner, "jaxpr", inner))


def _has_rules(jaxpr: Any) -> bool:
    """Whether functions are called anywhere that have derivative rules no jaxpr tells."""
    own = any(
        equation.primitive.name in _CUSTOM_RULES and not _is_of_jax(equation)
        for equation in jaxpr.eqns
    )
    return own or any(_has_rules(getattr(j, "jaxpr", j)) for j in inner_jaxprs(jaxpr))


def _is_of_jax(equation: Any) -> bool:
    """Whether the rule is the one that JAX has for its own function."""

    def source(traced: Any) -> str:
        return getattr(getattr(traced, "debug_info", None), "func_src_info", None) or ""

    if _RULES_OF_JAX.search(source(equation.params.get("jvp_jaxpr_fun"))):
        return True
    primal = equation.params["call_jaxpr"]
    primal = getattr(primal, "jaxpr", primal)
    # Another rule, put around JAX's function, would have that one's call within.
    bare = not any(e.primitive.name in _CUSTOM_RULES for e in primal.eqns)
    return bare and _FUNCTIONS_OF_JAX.match(source(primal)) is not None


def inner_jaxprs(jaxpr: Any) -> Iterator[Any]:
    """The jaxprs among the parameters of the equations: of loops, branches, calls."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    yield part


def _derivative(jaxpr: Any, consts: Sequence[Any]) -> str:
    """The jaxpr's derivative as text, which spells the rules out."""
    inexact = [jax.dtypes.issubdtype(v.aval.dtype, np.inexact) for v in jaxpr.invars]

    def derivative(consts: Sequence[Any], *inputs: Any) -> Any:
        function = jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(jaxpr, list(consts)))

        def of_some(*chosen: Any) -> Any:
            given = iter(chosen)
            out = function(*(next(given) if f else x for f, x in zip(inexact, inputs, strict=True)))
            return [x for x in out if jax.dtypes.issubdtype(x.dtype, np.inexact)]

        value, pullback = jax.vjp(of_some, *(x for f, x in zip(inexact, inputs, strict=True) if f))
        return pullback(value)

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]
    closed = jax.make_jaxpr(derivative)(list(consts), *shapes)
    captured = [digest(as_numpy(c)) for c in closed.consts]  # by the rules
    return "".join([str(closed.jaxpr), *captured, *_constants(closed.jaxpr)])


def digest(array: np.ndarray) -> str:
    """SHA-256 of one array: type, shape and bytes."""
    sha = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def as_numpy(constant: Any) -> np.ndarray:
    """A constant of a jaxpr as a NumPy array; random keys by their data."""
    if jax.dtypes.issubdtype(getattr(constant, "dtype", None), jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    return np.asarray(constant)


def key_shape() -> Any:
    """The shape and type of a random key, without making one, which would compile."""
    return jax.eval_shape(lambda: jax.random.key(0))


def scan_parts(equation: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried.

    What is not one of the series has in the body as many axes as outside.
    """
    body = equation.params["jaxpr"].jaxpr

    def whole(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))

    carried = whole(equation.outvars, body.outvars)
    return whole(equation.invars, body.invars) - carried, carried


def dependents(jaxpr: Any, count: int) -> list[bool]:
    """Which outputs of a jaxpr may depend on its first ``count`` inputs."""
    return _spread(jaxpr, [i < count for i in range(len(jaxpr.invars))])


def _spread(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Which outputs may depend on the flagged inputs; loops and calls are looked into."""
    touched = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}

    def hit(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in touched

    for equation in jaxpr.eqns:
        inputs = [hit(v) for v in equation.invars]
        if not any(inputs):
            continue
        if equation.primitive.name in ("jit", "pjit"):
            outputs = _spread(equation.params["jaxpr"].jaxpr, inputs)
        elif equation.primitive.name == "scan":
            first, carried = scan_parts(equation)
            while True:
                outputs = _spread(equation.params["jaxpr"].jaxpr, inputs)
                carry = inputs[first : first + carried]
                if all(was or not now for was, now in zip(carry, outputs, strict=False)):
                    break
                inputs[first : first + carried] = [
                    a or b for a, b in zip(carry, outputs, strict=False)
                ]
        else:
            outputs = [True] * len(equation.outvars)
        touched.update(v for v, flag in zip(equation.outvars, outputs, strict=True) if flag)
    return [hit(v) for v in jaxpr.outvars]


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
    variables = inspect.getclosurevars(function)  # its globals include what attributes are called
    instructions = list(dis.get_instructions(function))
    loaded = {i.argval for i in instructions if i.opname == "LOAD_GLOBAL"}
    own = {name: value for name, value in variables.globals.items() if name in loaded}
    outside = {**own, **variables.nonlocals}
    arrays = {k: v for k, v in outside.items() if isinstance(v, np.ndarray | jax.Array) and v.ndim}
    line = function.__code__.co_firstlineno
    lines: dict[str, int] = {}
    for instruction in instructions:
        line = (instruction.positions and instruction.positions.lineno) or line
        if instruction.argval in arrays and instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            lines.setdefault(instruction.argval, line)
    return [(name, lines.get(name, line), v.shape) for name, v in arrays.items()]
