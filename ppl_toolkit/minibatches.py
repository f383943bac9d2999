"""The rows of subsampled plates: those of the data, newly drawn ones, or all of them.

The data of a program fix the rows that its subsampled plates see (``subsample_size=`` of NumPyro).
Methods that draw them anew at every step evaluate the program at rows of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Int

from ppl_toolkit.positions import Position, log_parts

if TYPE_CHECKING:
    from ppl_toolkit.program import Program

__all__ = ["log_parts_of_rows", "rows", "subset", "whole_log_parts"]


def subset(key: Any, size: int, count: int) -> Int[Array, " count"]:
    """``count`` of the numbers 0 to ``size`` - 1: every subset is equally likely.

    Floyd's algorithm, its steps j = size - count, ..., size - 1 taken at once: step j inserts t_j,
    uniform in 0..j, or j itself if t_j is there already. It is if an earlier step drew it, or if it
    is one of the steps that inserted itself; the latter makes chains t_j = i, t_i = h, ..., which
    are followed by doubling.

    Cost: O(count log count), whatever the size. Source: Bentley and Floyd (1987), A sample of
    brilliance, Communications of the ACM 30.
    """
    first = size - count
    steps = jnp.arange(first, size)
    drawn = random.randint(key, (count,), 0, steps + 1)
    order = jnp.argsort(drawn, stable=True)
    ranked = drawn[order]
    again = jnp.concatenate([jnp.zeros(1, bool), ranked[1:] == ranked[:-1]])
    there = jnp.zeros(count, bool).at[order].set(again)
    link = jnp.where(drawn >= first, drawn - first, jnp.arange(count))
    for _ in range((count - 1).bit_length()):
        there, link = there | (there[link] & (link != jnp.arange(count))), link[link]
    return jnp.where(there, steps, drawn)


def rows(program: Program, key: Any, data: Sequence[Any]) -> dict[str, Any]:
    """New rows for every subsampled plate, by plate, without replacement."""
    return {
        name: subset(random.fold_in(key, number), size, len(index))
        for number, (name, (size, index)) in enumerate(program.subsampled.items())
    }


def log_parts_of_rows(
    program: Program, given: tuple[Position, Mapping[str, Any]], data: Sequence[Any]
) -> tuple[Any, Any]:
    """`log_parts` where the subsampled plates see the rows that are given with the position.

    The log likelihood, scaled up as NumPyro's plates do, is an unbiased estimate of that of all
    rows if these are drawn by `rows`.
    """
    position, chosen = given
    arrays = data[: len(program.arguments.arrays)]
    return log_parts(program, position, (*arrays, *(chosen[name] for name in program.subsampled)))


def whole_log_parts(program: Program, position: Position, data: Sequence[Any]) -> tuple[Any, Any]:
    """`log_parts` where all plates see all their rows."""
    return log_parts(program.whole, position, data[: len(program.arguments.arrays)])
