"""Labels of dimensions: what the user gives, what a result carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_toolkit.errors import DataError
from ppl_toolkit.program import Program

if TYPE_CHECKING:
    import xarray

__all__ = ["check_coords", "coords_of", "label_dimensions", "label_of_each"]


def check_coords(program: Program, coords: Any) -> dict[str, np.ndarray]:
    """The user's labels of dimensions, and the rows that subsampled plates see.

    Raises:
        DataError: no site has such a dimension, or the labels do not fit it.
    """
    if not isinstance(coords, Mapping):
        raise DataError(
            f"coords must be a dictionary of labels by dimension; got {type(coords).__name__}."
        )
    sizes, subsampled = program.dimensions, program.subsampled
    labels = {dim: index for dim, (_, index) in subsampled.items() if dim in sizes}
    for dim, values in coords.items():
        if dim not in sizes:
            raise DataError(
                f"coords names dimension {dim!r}, which no site has; there are {sorted(sizes)}. "
                "Plates give dimensions their names; dims= names event dimensions."
            )
        given = _labels(dim, values)
        if dim in subsampled and len(given) == subsampled[dim][0]:
            given = given[subsampled[dim][1]]
        labels[dim] = label_of_each(dim, given, sizes[dim])
    return labels


def label_of_each(dim: str, values: Any, size: int) -> np.ndarray:
    """Labels of a dimension of this size.

    Raises:
        DataError: they are no labels, or too many or too few.
    """
    given = _labels(dim, values)
    if len(given) != size:
        raise DataError(f"coords[{dim!r}] has {len(given)} labels, but the dimension has {size}.")
    return given


def _labels(dim: str, values: Any) -> np.ndarray:
    """Labels as an array that files can hold: numbers, times or strings."""
    try:
        array = np.asarray(values if hasattr(values, "__len__") else list(values))
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1:
        raise DataError(
            f"coords[{dim!r}] must be a sequence with one label per element; got "
            f"{type(values).__name__} of shape {array.shape}."
        )
    if array.dtype.kind in "iufbUmM":
        return array
    return np.array([str(value) for value in array])


def coords_of(tree: xarray.DataTree, program: Program) -> dict[str, np.ndarray]:
    """Coordinates of a result that still have the length this program gives them."""
    sizes = program.dimensions
    found: dict[str, np.ndarray] = {}
    for name, group in tree.children.items():
        if name.startswith("predictions"):
            continue
        for dim, values in group.dataset.coords.items():
            if sizes.get(str(dim)) == values.size:
                found[str(dim)] = np.asarray(values)
    return found


def label_dimensions(sizes: Mapping[str, int], coords: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A coordinate for every dimension: the user's, or 0, 1, 2, ..."""
    labels = {}
    for dim, size in sizes.items():
        values = np.asarray(coords.get(dim, np.arange(size)))
        if values.shape != (size,):
            raise DataError(
                f"coords[{dim!r}] has {values.size} labels, but dimension {dim!r} has {size}."
            )
        labels[dim] = values
    return labels
