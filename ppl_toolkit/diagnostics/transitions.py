"""Exact transition matrices of kernels on finite spaces."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.randomness import Paths

__all__ = ["Enumerated", "enumerated", "transition_matrix"]

_MOST_WORK = 2**28  # transitions, states times paths, before it is refused
_BATCH = 2**14  # of them evaluated at a time


class Enumerated(NamedTuple):
    """All outcomes of a random function.

    Attributes:
        values: its values, arrays (path, ...).
        probabilities: of the paths, (path,).
    """

    values: Any
    probabilities: np.ndarray


def _sizes(function: Callable, *args: Any) -> list[int]:
    """The number of outcomes of every finite choice that ``function`` makes."""
    with Paths() as paths:
        jax.eval_shape(function, *args)
    return paths.sizes


def _paths(sizes: Sequence[int]) -> np.ndarray:
    """Every path through choices of these sizes, shape (path, m)."""
    count = math.prod(sizes)
    if count > _MOST_WORK:
        raise MethodError(
            f"there are {count:,} paths through the {len(sizes)} choices of this kernel, too many "
            "to enumerate; try a smaller model."
        )
    numbers = np.unravel_index(np.arange(count), sizes) if sizes else ()
    return np.stack(numbers, axis=-1) if sizes else np.zeros((1, 0), int)


def _batches(rows: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in batches of one shape, so that one program serves all; how many count of each."""
    size = math.ceil(len(rows) / math.ceil(len(rows) / most))
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        yield np.concatenate([some, np.repeat(some[-1:], size - len(some), 0)]), len(some)


def enumerated(function: Callable[..., Any], *args: Any) -> Enumerated:
    """All outcomes of ``function(key, *args)``, whose finite choices go through `randomness`.

    Args:
        function: hashable; it is compiled once for all ``args`` of the same shapes.
        *args: arrays, in any pytree.

    Raises:
        MethodError: it draws real numbers, or there are too many paths.

    Complexity: one evaluation per path.
    """
    paths = _paths(_sizes(functools.partial(function, jax.random.key(0)), *args))
    along = jax.vmap(functools.partial(_along, function), (0, None))
    found = [
        jax.tree.map(lambda x, n=count: np.asarray(x)[:n], along(some, args))
        for some, count in _batches(paths, _BATCH)
    ]
    return Enumerated(*jax.tree.map(lambda *parts: np.concatenate(parts), *found))


@functools.partial(jax.jit, static_argnums=0)
def _along(function: Callable, path: Any, args: Any) -> tuple[Any, Any]:
    """The outcome of one path, and its probability; compiled once for a function."""
    with Paths(path) as taken:
        value = function(jax.random.key(0), *args)
    return value, jnp.asarray(taken.probability)


def transition_matrix(
    step: Callable[[Any, Any], Any], states: Any, number: Callable[[Any], Any] | None = None
) -> np.ndarray:
    """P[i, j]: the exact probability of state j after one step from state i.

    Args:
        step: (key, state) -> state, whose finite choices go through `randomness`.
        states: all n states, arrays (n, ...) in any pytree.
        number: state -> its number; found by comparison with all states if None.

    Returns:
        Shape (n, n), float64. Rows sum to less than one where steps lead out of ``states``.

    Raises:
        MethodError: the step draws real numbers, or n times the number of paths is above 2^28.

    Complexity: n times the number of paths evaluations of the step; a comparison with all states
    for each unless ``number`` is given.
    """
    count = jax.tree.leaves(states)[0].shape[0]
    key = jax.random.key(0)
    first = jax.tree.map(lambda x: x[0], states)
    paths = _paths(_sizes(functools.partial(step, key), first))
    if count * len(paths) > _MOST_WORK:
        raise MethodError(
            f"{count:,} states with {len(paths):,} paths each are too many to enumerate; try a "
            "smaller model."
        )

    def equal(a: Any, b: Any) -> Any:
        flags = [jnp.all(x == y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
        return functools.reduce(jnp.logical_and, flags)

    def own_number(state: Any) -> Any:
        same = jax.vmap(lambda other: equal(state, other))(states)
        return jnp.where(jnp.any(same), jnp.argmax(same), count)

    @jax.jit
    def along(state: Any, path: Any) -> tuple[Any, Any]:
        with Paths(path) as taken:
            new = step(key, state)
        return (number or own_number)(new), jnp.asarray(taken.probability, float)

    matrix = np.zeros((count, count))
    many = jax.vmap(jax.vmap(along, (None, 0)), (0, None))
    for numbers, kept in _batches(np.arange(count), max(1, _BATCH // len(paths))):
        rows = jax.tree.map(lambda x, n=numbers: x[n], states)
        sums = np.zeros((kept, count + 1), np.longdouble)  # so that many paths round once
        for some, n in _batches(paths, _BATCH):
            targets, probabilities = (np.asarray(x)[:kept, :n] for x in many(rows, some))
            np.add.at(sums, (np.arange(kept)[:, None], targets), probabilities)
        matrix[numbers[:kept]] = sums[:, :count]
    return matrix
