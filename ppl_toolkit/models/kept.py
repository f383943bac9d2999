"""Compiled programs of functions of trees that hold distributions, found again in every process.

The text of a NumPyro distribution has its address in it, and its leaves are in the order of a set
of strings, another one in every process: under such names no executable would be found again on
disk. So leaves go in and out of programs in the order of the names of their fields.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

from ppl_toolkit import executables

__all__ = ["by_kept_program", "clear"]

_MOST_PROGRAMS = 64


class _Program(NamedTuple):
    """A compiled program, and the structure of what it returns."""

    call: Callable
    out: Any


_programs: OrderedDict[Any, _Program] = OrderedDict()
_guard = threading.Lock()


def by_kept_program(function: Callable, *args: Any, **static: Any) -> Any:
    """``function(*args, **static)`` by a kept executable, in the precision that is active.

    A second call with the same function, options, shapes and structure does not trace again.

    Args:
        function: of trees of arrays; the same object every time, to be found without tracing.
        *args: trees of NumPy arrays and numbers.
        **static: options.

    Returns:
        A tree of NumPy arrays.
    """
    leaves, tree = jax.tree.flatten(args)
    given = [np.asarray(leaves[i]) for i in _order(tree)]
    key = (
        function,
        tuple(static.items()),
        tree,
        tuple((x.shape, x.dtype.str) for x in given),
        str(jnp.result_type(float)),
    )
    try:
        hash(key)
    except TypeError:  # the structure of a law that cannot be hashed
        program = _made(function, static, tree, given)
    else:
        program = _found(key, lambda: _made(function, static, tree, given))
    return _unordered(program.out, [np.asarray(leaf) for leaf in program.call(*given)])


def clear() -> None:
    """Forget the programs of this process (the files stay)."""
    with _guard:
        _programs.clear()


def _found(key: Any, make: Callable[[], _Program]) -> _Program:
    with _guard:
        if key in _programs:
            _programs.move_to_end(key)
            return _programs[key]
    made = make()
    with _guard:
        _programs[key] = made
        while len(_programs) > _MOST_PROGRAMS:
            _programs.popitem(last=False)
    return made


def _made(function: Callable, static: dict[str, Any], tree: Any, given: list[Any]) -> _Program:
    trees: list[Any] = []

    def flat(*ordered: Any) -> list[Any]:
        found, out = jax.tree.flatten(function(*_unordered(tree, ordered), **static))
        trees.append(out)
        return [found[i] for i in _order(out)]

    return _Program(executables.kept(flat, *given), trees[-1])


def _order(tree: Any) -> list[int]:
    """The leaves of a tree, by the names of the fields of its distributions."""

    def named(node: Any) -> Any:
        if not isinstance(node, dist.Distribution):
            return node
        fields = type(node).gather_pytree_data_fields()
        return {name: _with_laws(named, node.__dict__.get(name)) for name in fields}

    return jax.tree.leaves(_with_laws(named, tree.unflatten(range(tree.num_leaves))))


def _with_laws(function: Callable, tree: Any) -> Any:
    return jax.tree.map(function, tree, is_leaf=lambda node: isinstance(node, dist.Distribution))


def _unordered(tree: Any, ordered: Sequence[Any]) -> Any:
    places: Any = np.argsort(_order(tree)) if tree.num_leaves else []
    return tree.unflatten([ordered[i] for i in places])
