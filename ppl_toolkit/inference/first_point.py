"""Where a chain begins: the first of some positions at which its target is finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["first_finite"]


def first_finite(
    draw: Callable[[Any], Any], finite: Callable[[Any], Any], tries: Any
) -> tuple[Any, Any]:
    """The first position that will do.

    Args:
        draw: number of the try (from 0) -> a position, any pytree.
        finite: position -> whether it will do.
        tries: how many are drawn at most.

    Returns:
        The position, the last one drawn if none will do; and whether it will do.
    """

    def again(carry: tuple) -> tuple:
        number, _, _ = carry
        position = draw(number)
        return number + 1, position, finite(position)

    zero = jnp.zeros((), jnp.int32)
    shape = jax.eval_shape(draw, zero)
    nowhere = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    _, position, found = lax.while_loop(
        lambda c: (c[0] < tries) & ~c[2], again, (zero, nowhere, jnp.asarray(False))
    )
    return position, found
