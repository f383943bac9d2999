"""A model's arguments, split into array data and static values.

Array leaves (NumPy and JAX arrays, NumPy scalars, Python floats) travel as *arguments* of the
compiled program: new values of the same shape and type compile nothing. Python ints, bools,
strings, None and any other object are static: they are seen by the model as they are. Defaults
that are left out count as if they had been passed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ppl_toolkit.errors import DataError, ModelError, OptionError

__all__ = ["Arguments", "names_and_defaults", "with_data"]

_NUMERIC_KINDS = "fiubc"
_FRAMES = ("pandas", "xarray", "polars")
_LABELLED = ("Series", "Index", "RangeIndex", "DatetimeIndex", "DataArray")


def _package(leaf: Any) -> str:
    return type(leaf).__module__.split(".")[0]


def _unlabelled(leaf: Any) -> Any:
    """A labelled array of numbers (pandas Series, xarray DataArray, ...) as a plain one."""
    if _package(leaf) in _FRAMES and type(leaf).__name__ in _LABELLED:
        array = np.asarray(leaf)
        return array if array.dtype.kind in _NUMERIC_KINDS else leaf
    return leaf


def with_data(
    model: Callable, kwargs: Mapping[str, Any], data: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The model's keyword arguments: ``kwargs``, and those given by ``data={name: value}``.

    A model that has a parameter ``data`` of its own gets it as it is, unless it is a dictionary
    whose keys are parameters of the model.

    Raises:
        OptionError: ``data`` is not a dictionary, and the model has no such parameter.
    """
    if data is None:
        return dict(kwargs)
    try:
        parameters: Mapping[str, Any] = inspect.signature(model).parameters
    except (TypeError, ValueError):
        parameters = {}
    named = isinstance(data, Mapping) and set(data) <= set(parameters)
    if "data" in parameters and not named:
        return {**kwargs, "data": data}
    if not isinstance(data, Mapping):
        raise OptionError(
            f"data= takes a dictionary of the model's arguments by name; got "
            f"{type(data).__name__}. Pass arrays by position: infer(model, y)."
        )
    return {**kwargs, **data}


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in _NUMERIC_KINDS
    return isinstance(leaf, float)


def _as_numpy(leaf: Any, name: str, precision: str) -> np.ndarray:
    # A copy: the caller may change the array, and JAX may remember it by its identity in another
    # precision (a NumPyro run in float32 that was jitted whole leaves such a trace).
    array = np.array(leaf)
    if array.dtype.kind == "f":
        return np.asarray(array, dtype=precision)
    if array.dtype.kind == "c":
        raise DataError(f"{name} is complex ({array.dtype}); pass real and imaginary parts.")
    if precision == "float32" and array.dtype.itemsize == 8 and array.dtype.kind in "iu":
        return array.astype(array.dtype.kind + "4")
    return array


class Arguments(NamedTuple):
    """The arguments of one model call.

    Attributes:
        arrays: the array leaves, as NumPy arrays in the run's precision.
        names: a readable name for each of them, such as ``"sigma"`` or ``"data['x']"``.
        leaves: all leaves of ``(args, kwargs)``, with None where an array goes.
        slots: for each leaf, the index into ``arrays``, or -1 for a static leaf.
        treedef: the structure of ``(args, kwargs)``.
        narrowed: names of float32 arrays that a float64 run widened.
        opaque: names of data containers (data frames, ...) that stay static.
    """

    arrays: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    slots: tuple[int, ...]
    treedef: Any
    narrowed: tuple[str, ...]
    opaque: tuple[str, ...]

    @classmethod
    def of(
        cls, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], precision: str
    ) -> Arguments:
        """Split ``args`` and ``kwargs``.

        Raises:
            ModelError: the model cannot be called with these arguments.
            DataError: an argument is an array of objects or complex numbers.
        """
        bound, defaults = names_and_defaults(model, args, kwargs)
        paths, treedef = jax.tree_util.tree_flatten_with_path((tuple(args), {**defaults, **kwargs}))
        arrays: list[np.ndarray] = []
        names: list[str] = []
        leaves: list[Any] = []
        slots: list[int] = []
        narrowed: list[str] = []
        opaque: list[str] = []
        for path, leaf in paths:
            name = _name(path, bound)
            leaf = _unlabelled(leaf)
            if isinstance(leaf, jax.core.Tracer):
                raise DataError(
                    f"argument {name} is a tracer of JAX: this call was made inside jit, vmap or "
                    "grad, but it compiles programs of its own. Call it outside."
                )
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "O":
                raise DataError(
                    f"argument {name} is an array of Python objects (dtype object, shape "
                    f"{leaf.shape}); pass numbers: np.asarray({name}, dtype=float)."
                )
            if _is_array(leaf):
                slots.append(len(arrays))
                names.append(name)
                arrays.append(_as_numpy(leaf, f"argument {name}", precision))
                leaves.append(None)
                if precision == "float64" and getattr(leaf, "dtype", None) == np.float32:
                    narrowed.append(name)
            else:
                if _package(leaf) in _FRAMES:
                    opaque.append(name)
                slots.append(-1)
                leaves.append(leaf)
        return cls(
            tuple(arrays),
            tuple(names),
            tuple(leaves),
            tuple(slots),
            treedef,
            tuple(narrowed),
            tuple(opaque),
        )

    def rebuild(self, arrays: Sequence[Any]) -> tuple[tuple, dict]:
        """The model's ``(args, kwargs)`` with ``arrays`` in the places of the array leaves."""
        leaves = [
            leaf if slot < 0 else arrays[slot]
            for leaf, slot in zip(self.leaves, self.slots, strict=True)
        ]
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


def names_and_defaults(
    model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """Names of the positional arguments, and array defaults that were left out.

    Raises:
        ModelError: the arguments do not fit; the message quotes the signature.
    """
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return [], {}
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(model, "__name__", type(model).__name__)
        raise ModelError(
            f"the model cannot be called with these arguments: {error}. "
            f"Its signature is {name}{signature}; pass its arguments after the model: "
            "infer(model, *args, **kwargs)."
        ) from None
    names: list[str] = []
    defaults: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(len(args) - len(names))]
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and parameter.name not in bound.arguments and _is_array(parameter.default):
            defaults[parameter.name] = parameter.default
    return names, defaults


def _name(path: tuple, positional: list[str]) -> str:
    which, first, *rest = path
    if which.idx == 0:
        root = positional[first.idx] if first.idx < len(positional) else f"args[{first.idx}]"
    else:
        root = str(first.key)
    return root + jax.tree_util.keystr(tuple(rest))
