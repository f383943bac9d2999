"""Nodes for integrals over the whole line, of peaked integrands with tails of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

__all__ = ["Grid", "farthest"]

_TRIES = 64


def farthest() -> float:
    """The largest |u| whose exponential is a number in the precision of the run."""
    return 0.98 * math.log(float(jnp.finfo(jnp.result_type(float)).max))


class Grid(NamedTuple):
    """Nodes for an integral over u: equidistant in v, with u = centre + width sinh(v).

    Around the centre they are equidistant in u, further out ever wider apart: tails that decay
    like exp(-|u|), as power laws of sigma^2 = e^u do, cost few nodes, and integrands analytic in a
    strip remain so.

    Attributes:
        centre, width: in u, (*batch).
        first, step: of v, (*batch).
    """

    centre: Any
    width: Any
    first: Any
    step: Any

    @classmethod
    def around(cls, log_integrand: Callable[[Any], Any], mode: Any, sd: Any, count: int) -> Grid:
        """The grid of ``count`` nodes from where to where an integrand is not negligible.

        On each side it goes out from the mode by growing steps, until the integrand is and remains
        below eps e^-9 of its value at the mode. All distances are tried at once: that costs less
        than a loop.

        Args:
            log_integrand: elementwise in u, (..., *batch).
            mode: its mode, (*batch).
            sd: (-(log integrand)'')^(-1/2) at the mode, (*batch).
            count: of nodes.
        """
        limit, width = farthest(), 2.0 * sd
        drop = 9.0 - math.log(float(jnp.finfo(jnp.result_type(float)).eps))  # 45 in float64
        rank = jnp.arange(_TRIES).reshape(_TRIES, *(1,) * jnp.ndim(mode))
        least = jnp.minimum(width, 3.0)  # a plateau may end well within its standard deviation
        growth = jnp.log(2.0 * limit / least) / (_TRIES - 1)  # 20 % a try, for sd = 0.005
        reach = least * jnp.exp(rank * growth)
        heights = log_integrand(jnp.clip(mode + jnp.stack([-reach, reach]), -limit, limit))
        counted = jnp.isfinite(heights) & (heights > log_integrand(mode) - drop)
        beyond = jnp.max(jnp.where(counted, rank + 1, 0), axis=1)  # one past the last that counts
        room = jnp.stack([limit + mode, limit - mode])
        out = jnp.minimum(least * jnp.exp(beyond * growth), room)
        left, right = jnp.arcsinh(out / width)
        return cls(mode, width, -left, (left + right) / (count - 1))

    def at(self, position: Any) -> Any:
        """The u at a number of steps from the first node."""
        return self.centre + self.width * jnp.sinh(self.first + position * self.step)

    def position(self, u: Any) -> Any:
        """The inverse of ``at``."""
        return (jnp.arcsinh((u - self.centre) / self.width) - self.first) / self.step

    def log_spacing(self, position: Any) -> Any:
        """The log of du by d position: the weights of the trapezoid rule."""
        return jnp.log(self.step * self.width * jnp.cosh(self.first + position * self.step))

    def ranks(self, count: int) -> Any:
        """0, ..., count - 1 along a new first axis."""
        return jnp.arange(count).reshape(count, *(1,) * jnp.ndim(self.first))
