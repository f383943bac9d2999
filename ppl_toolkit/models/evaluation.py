"""Kernels of inputs that a person holds: checked, compiled once per shape, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ppl_toolkit.errors import DataError, OptionError
from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.covariances import Kernels, per_position, variances_of
from ppl_toolkit.models.kept import by_kept_program

__all__ = [
    "checked_inputs",
    "checked_new_inputs",
    "checked_of",
    "checked_targets",
    "evaluated",
    "evaluated_variances",
    "in_float64",
    "own_variances",
    "scaled_targets",
]


def evaluated(network: Any, x1: Any, x2: Any, *, ntk: bool, block: int) -> Kernels:
    """`Layer.kernels`."""
    if not isinstance(block, int) or block < 1:
        raise OptionError(f"block must be a positive number of rows; got {block!r}.")
    x1 = checked_inputs(x1, "x1")
    if x2 is not None:
        x2 = checked_inputs(x2, "x2")
        if x1.shape[1:] != x2.shape[1:]:
            raise DataError(
                f"an input of x1 has shape {x1.shape[1:]} and one of x2 {x2.shape[1:]}; "
                "they must have the same features."
            )
    return in_float64(kernel_matrices, network, x1, x2, ntk=ntk, block=block)


def evaluated_variances(network: Any, x: Any, *, ntk: bool) -> Kernels:
    """`Layer.variances`."""
    return in_float64(_both_variances, network, checked_inputs(x, "x"), ntk=ntk)


def _both_variances(network: Any, x: Any, *, ntk: bool) -> Kernels:
    x = jnp.asarray(x, jnp.result_type(x, float))
    found = Kernels(*network.diagonal(variances_of(x, ntk=ntk, joint=network.joint)))
    if found.nngp.ndim != 1:
        raise per_position()
    return found


def own_variances(network: Any, x: Any) -> Any:
    """The diagonal of the Gaussian-process kernel; traceable."""
    return network.diagonal(variances_of(x, ntk=False, joint=network.joint)).nngp


def checked_inputs(x: Any, name: str) -> Any:
    """Inputs as they are, if they can be used; NumPy's where they are lists or tables.

    Raises:
        DataError: they are no array (n, features) or (n, height, width, channels) of finite real
            numbers whose fourth powers are finite. Values of traced arrays are not known, and not
            checked.
    """
    x = _as_real(x, name)
    if x.ndim not in (2, 4) or 0 in x.shape:
        raise DataError(
            f"{name} must have shape (n, features), or (n, height, width, channels) for images, "
            f"and must not be empty; got {x.shape}."
            + (" For a single feature say x[:, None]." if x.ndim == 1 else "")
        )
    if not isinstance(x, jax.core.Tracer):
        bad = np.flatnonzero(~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(axis=1))
        if bad.size:
            raise DataError(
                f"{name} has values that are not finite in {bad.size} of {len(x)} rows, first in "
                f"row {bad[0]}: drop these rows, or fill them in."
            )
        dtype = jnp.result_type(x, float) if isinstance(x, jax.Array) else x.dtype
        largest = np.abs(np.asarray(x)).max()
        if largest > 0.1 * float(jnp.finfo(dtype).max) ** 0.25:
            raise DataError(
                f"{name} has values up to {largest:.1e}, and kernels take fourth powers, which are "
                f"beyond the numbers of {dtype}: standardise the features."
            )
    return x


def _as_real(values: Any, name: str) -> Any:
    """JAX arrays as they are, others as NumPy's in float64; no imaginary part is dropped."""
    try:
        array = values if isinstance(values, jax.Array) else np.asarray(values)
        if not np.iscomplexobj(array):
            return array if isinstance(array, jax.Array) else array.astype(float, copy=False)
    except (TypeError, ValueError):  # words, rows of different lengths
        pass
    raise DataError(f"{name} must be an array of real numbers; got {values!r:.80}.")


def checked_new_inputs(x_new: Any, x: Any) -> Any:
    """NumPy inputs like those of the data x.

    Raises:
        DataError: they cannot be used, or have other features.
    """
    x_new = np.asarray(checked_inputs(x_new, "X_new"))
    if x_new.shape[1:] != x.shape[1:]:
        raise DataError(
            f"an input of X_new has shape {x_new.shape[1:]}; those of the data have {x.shape[1:]}."
        )
    return x_new


def checked_of(of: str) -> str:
    """What is predicted: "y" or "f"."""
    if of not in ("y", "f"):
        raise OptionError(f"of must be 'y' (targets) or 'f' (the function); got {of!r}.")
    return of


def checked_targets(y: Any, n: int) -> Any:
    """Targets (n,): JAX's as they are, others as NumPy's numbers.

    Raises:
        DataError: they are no finite numbers, one for every input.
    """
    y = _as_real(y, "y")
    if y.shape != (n,):
        raise DataError(f"y must have one target for every input, shape ({n},); got {y.shape}.")
    if not isinstance(y, jax.core.Tracer):
        bad = np.flatnonzero(~np.isfinite(np.asarray(y)))
        if bad.size:
            raise DataError(
                f"y has {bad.size} of {n} values that are not finite, first in row {bad[0]}: "
                "drop these rows, or fill them in."
            )
    return y


def scaled_targets(y: Any, n: int) -> NDArray[np.float64]:
    """NumPy targets (n,) from which a scale can be learned.

    Raises:
        DataError: as `checked_targets`, or all are zero.
    """
    targets = np.asarray(checked_targets(y, n))
    if not targets.any():
        raise DataError("all targets are 0, which says nothing of a scale.")
    return targets


def in_float64(function: Callable, *args: Any, **static: Any) -> Any:
    """``function(*args, **static)``: traced as it is where any argument is a JAX array or a tracer.

    Otherwise it is compiled and run in float64, and what comes back are NumPy arrays. The program
    is kept, in this process (without tracing again, for the same function, shapes and structure)
    and across processes.

    Args:
        function: of arrays and pytrees of numbers.
        *args: the pytrees.
        **static: its options.
    """
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(args)):
        return function(*args, **static)
    with jax.enable_x64(True):
        return by_kept_program(function, *jax.tree.map(_as_number, args), **static)


def _as_number(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array if array.dtype.kind in "biu" else array.astype(np.float64)
