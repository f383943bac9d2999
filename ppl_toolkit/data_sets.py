"""The arguments of a model for many data sets of one shape: which of them vary, and how.

An argument that varies has one entry per data set: an array has them along its first axis, a list
or tuple in its places, a dictionary (or named tuple) in each of its values. All other arguments are
shared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppl_toolkit.arguments import Arguments, names_and_defaults
from ppl_toolkit.errors import DataError, OptionError
from ppl_toolkit.program import Program

__all__ = ["DataSets", "numbered"]

_LABELLED = ("pandas", "xarray", "polars", "jax", "jaxlib")  # indexed by labels, or by programs


class DataSets(NamedTuple):
    """A model's arguments for many data sets.

    Attributes:
        args, kwargs: the arguments as they were given.
        varied: those that vary, by name, ready to be indexed.
        places: where each of them stands: a number in ``args``, or a name in ``kwargs``.
        size: how many data sets there are.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    varied: Mapping[str, Any]
    places: Mapping[str, int | str]
    size: int

    @classmethod
    def of(
        cls, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], over: Any
    ) -> DataSets:
        """Find the arguments that ``over`` names, and count their entries.

        Raises:
            OptionError: ``over`` does not name arguments that have entries.
            DataError: there are no data sets, or not as many in all arguments.
            ModelError: the arguments do not fit the model.
        """
        positional, _ = names_and_defaults(model, args, kwargs)
        known: dict[str, int | str] = dict(zip(positional[: len(args)], range(len(args))))  # noqa: B905
        known |= {name: name for name in kwargs}
        names = [over] if isinstance(over, str) else over
        if not isinstance(names, list | tuple | set | frozenset) or not names:
            raise OptionError(
                "over= names the arguments that have one entry per data set, such as over='y' or "
                f"over=['x', 'y']; got {over!r:.60}."
            )
        if unknown := [name for name in names if name not in known]:
            raise OptionError(
                f"over= names {unknown}; the arguments that were given are {list(known)}."
            )
        places = {name: known[name] for name in known if name in names}
        varied = {
            name: _indexable(args[place] if isinstance(place, int) else kwargs[place])
            for name, place in places.items()
        }
        counts = {part: n for name, value in varied.items() for part, n in _counts(name, value)}
        if len(set(counts.values())) > 1:
            raise DataError(
                f"the arguments that vary have different numbers of data sets: {counts}. "
                "Leave those that all data sets share out of over=."
            )
        if not any(counts.values()):
            raise DataError(f"there are no data sets: {list(counts)} have no entries.")
        return cls(tuple(args), dict(kwargs), varied, places, next(iter(counts.values())))

    def call(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for one data set: those that vary by their entry."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, place in self.places.items():
            entry = _entry(self.varied[name], number)
            if isinstance(place, int):
                args[place] = entry
            else:
                kwargs[place] = entry
        return tuple(args), kwargs

    def arrays(self, program: Program) -> tuple[list[tuple[np.ndarray, ...]], list[int]]:
        """What stands for ``program.arguments.arrays``, by data set.

        Args:
            program: the model on the first data set.

        Returns:
            The arrays (those that are shared are the same objects), and the numbers of those that
            vary.

        Raises:
            DataError: a data set has other shapes, types or settings than the first.
        """
        first = self._part(0, program.precision)
        numbers = [program.arguments.names.index(name) for name in first.names]
        found = [program.arguments.arrays]
        for number in range(1, self.size):
            with numbered(number):
                own = self._part(number, program.precision)
                _require_alike(own, first)
            arrays = list(program.arguments.arrays)
            for place, array in zip(numbers, own.arrays, strict=True):
                arrays[place] = array
            found.append(tuple(arrays))
        return found, numbers

    def _part(self, number: int, precision: str) -> Arguments:
        """The arguments that vary, of one data set."""
        entries = {name: _entry(value, number) for name, value in self.varied.items()}
        return Arguments.of(_anything, (), entries, precision)


@contextlib.contextmanager
def numbered(number: int) -> Iterator[None]:
    """Errors about data say which data set they are about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data set {number}: {error}") from None


def _anything(**arguments: Any) -> None:
    """A model whose arguments have the names they are given."""


def _indexable(value: Any) -> Any:
    """The same, with NumPy arrays in place of arrays that are indexed in another way."""
    if isinstance(value, Mapping):
        return {key: _indexable(part) for key, part in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*map(_indexable, value))
    if type(value).__module__.split(".")[0] in _LABELLED:
        return np.asarray(value)
    return value


def _counts(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """The number of data sets in every part of an argument, by a name for it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _counts(f"{name}[{key!r}]", part)
    elif hasattr(value, "_fields"):
        for key, part in zip(value._fields, value, strict=True):
            yield from _counts(f"{name}.{key}", part)
    elif isinstance(value, list | tuple) or np.ndim(value):
        yield name, len(value)
    else:
        raise OptionError(
            f"over= names {name!r}, which is {value!r:.40}: it has no entries, one per data set. "
            "Give an array whose first axis counts the data sets, or a list of arrays."
        )


def _entry(value: Any, number: int) -> Any:
    """What one data set has of an argument that vary."""
    if isinstance(value, Mapping):
        return {key: _entry(part, number) for key, part in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(_entry(part, number) for part in value))
    entry = value[number]
    return np.asarray(entry) if isinstance(entry, int) else entry  # differs, so it is an array


def _require_alike(own: Arguments, first: Arguments) -> None:
    """Refuse a data set that would need a compiled program of its own."""
    if own.names != first.names or own.treedef != first.treedef:
        raise DataError(
            f"its arrays are {list(own.names)}, but those of data set 0 are {list(first.names)}."
        )
    for name, array, like in zip(own.names, own.arrays, first.arrays, strict=True):
        if array.shape != like.shape:
            raise DataError(
                f"argument {name!r} has shape {array.shape}, but {like.shape} in data set 0. One "
                "program needs one shape: fill up shorter data and mask what is not there "
                "(numpyro.handlers.mask), or fit the data sets one by one."
            )
        if array.dtype != like.dtype:
            raise DataError(
                f"argument {name!r} has type {array.dtype}, but {like.dtype} in data set 0. Give "
                "all of them one type: np.asarray(..., dtype=float)."
            )
    for setting, like in zip(own.leaves, first.leaves, strict=True):
        if not _same(setting, like):
            raise DataError(
                f"its {_described(setting)} differs from the {_described(like)} of data set 0: "
                "what is no array is part of the compiled program, and cannot vary. Pass numbers: "
                "a dictionary of a table's columns, the codes of labels."
            )


def _same(setting: Any, like: Any) -> bool:
    """Whether two things that are no arrays are known to be equal."""
    if setting is like:
        return True
    if type(setting) is not type(like):
        return False
    if isinstance(setting, np.ndarray):  # of strings, say
        return np.array_equal(setting, like)
    equal = setting.equals(like) if hasattr(setting, "equals") else setting == like
    return isinstance(equal, bool | np.bool_) and bool(equal)


def _described(setting: Any) -> str:
    plain = isinstance(setting, str | bool | int | None)
    return f"{setting!r:.60}" if plain else type(setting).__name__
