"""Warm-up: dual averaging of the step size, running (co)variances, and the window schedule.

The schedule is data: a warm-up of another length runs in the same compiled program.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

__all__ = ["DualAveraging", "LowRank", "Metric", "Moments", "Schedule", "schedule"]

_MAX_WINDOWS = 24
_LEAST_WARMUP = 20


class DualAveraging(NamedTuple):
    """Nesterov's dual averaging of log step size (Hoffman and Gelman 2014, section 3.2).

    Attributes:
        log_step: log of the step size to use next.
        log_average: log of the averaged step size, used after warm-up.
        error: running mean of target - acceptance.
        updates: number of updates since the last restart.
        centre: the value log_step is shrunk towards, log(10 eps_0).
    """

    log_step: Float[Array, ""]
    log_average: Float[Array, ""]
    error: Float[Array, ""]
    updates: Float[Array, ""]
    centre: Float[Array, ""]

    @classmethod
    def start(cls, log_step: Float[Array, ""]) -> DualAveraging:
        zero = jnp.zeros_like(log_step)
        return cls(log_step, log_step, zero, zero, log_step + np.log(10.0))

    def update(
        self,
        acceptance: Float[Array, ""],
        target: Float[Array, ""],
        gamma: float = 0.05,
        t0: float = 10.0,
        kappa: float = 0.75,
    ) -> DualAveraging:
        """One step of averaging, with the acceptance statistic of one transition."""
        t = self.updates + 1.0
        weight = 1.0 / (t + t0)
        error = (1.0 - weight) * self.error + weight * (target - acceptance)
        log_step = self.centre - jnp.sqrt(t) / gamma * error
        decay = t**-kappa
        log_average = decay * log_step + (1.0 - decay) * self.log_average
        return DualAveraging(log_step, log_average, error, t, self.centre)


class Moments(NamedTuple):
    """Welford's running mean and sum of squares: (D,) for a diagonal, (D, D) for a dense metric."""

    draws: Float[Array, ""]
    mean: Float[Array, " D"]
    squares: Float[Array, " D"] | Float[Array, "D D"]

    @classmethod
    def start(cls, like: Float[Array, " D"], dense: bool) -> Moments:
        zeros = jnp.zeros_like(like)
        squares = jnp.zeros(like.shape * 2, like.dtype) if dense else zeros
        return cls(jnp.zeros((), like.dtype), zeros, squares)

    def update(self, x: Float[Array, " D"]) -> Moments:
        count = self.draws + 1.0
        before = x - self.mean
        mean = self.mean + before / count
        after = x - mean
        product = before * after if self.squares.ndim == 1 else jnp.outer(after, before)
        return Moments(count, mean, self.squares + product)

    def regularised(self) -> Float[Array, " D"] | Float[Array, "D D"]:
        """The (co)variance shrunk towards 1e-3 with the weight of five draws, as Stan does."""
        n = self.draws
        covariance = self.squares / jnp.maximum(n - 1.0, 1.0)
        unit = 1.0 if self.squares.ndim == 1 else jnp.eye(self.mean.shape[0], dtype=n.dtype)
        return n / (n + 5.0) * covariance + 1e-3 * (5.0 / (n + 5.0)) * unit


class Metric(NamedTuple):
    """Coordinates z of a chain in which momenta are N(0, I): x = x_0 + L z.

    The inverse mass matrix is L L^T.

    Attributes:
        factor: L, lower triangular (D, D), or its diagonal (D,).
    """

    factor: Float[Any, " D"] | Float[Any, "D D"]

    @classmethod
    def of(cls, inverse: Float[Array, " D"] | Float[Array, "D D"]) -> Metric:
        """By the inverse mass matrix, or its diagonal."""
        return cls(jnp.sqrt(inverse) if inverse.ndim == 1 else jnp.linalg.cholesky(inverse))

    @classmethod
    def identity(cls, like: Float[Array, " D"], dense: bool) -> Metric:
        ones = jnp.ones_like(like)
        return cls(jnp.diag(ones) if dense else ones)

    def velocity(self, momentum: Float[Array, " D"]) -> Float[Array, " D"]:
        """Of a position whose coordinates move with ``momentum``."""
        return self.factor * momentum if self.factor.ndim == 1 else self.factor @ momentum

    def force(self, gradient: Float[Array, " D"]) -> Float[Array, " D"]:
        """The gradient with respect to z."""
        return self.factor * gradient if self.factor.ndim == 1 else gradient @ self.factor

    def coordinates(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The z of x = L z."""
        if self.factor.ndim == 1:
            return x / self.factor
        return jnp.linalg.solve(self.factor, x[..., None])[..., 0]

    def scales(self) -> Float[Array, " D"]:
        """The length by which every element of x changes with a unit of z."""
        if self.factor.ndim == 1:
            return self.factor
        return jnp.sqrt(jnp.sum(self.factor**2, 1))


class LowRank(NamedTuple):
    """Coordinates x = x_0 + S (I + U diag(a) U^T) z: scales, and a few directions stretched.

    Attributes:
        scale: the diagonal of S, (D,).
        directions: the rows of U^T, orthonormal or zero, (K, D).
        stretch: a, (K,): by how much the lengths along the directions exceed one.
    """

    scale: Float[Any, " D"]
    directions: Float[Any, "K D"]
    stretch: Float[Any, " K"]

    def _stretched(self, z: Float[Array, " D"]) -> Float[Array, " D"]:
        along = self.stretch * jnp.sum(self.directions * z, 1)
        return z + jnp.sum(along[:, None] * self.directions, 0)

    def coordinates(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The z of x = S (I + U diag(a) U^T) z."""
        z = x / self.scale
        shrink = 1.0 / (1.0 + self.stretch) - 1.0
        return z + (z @ self.directions.T * shrink) @ self.directions

    def velocity(self, momentum: Float[Array, " D"]) -> Float[Array, " D"]:
        """Of a position whose coordinates move with ``momentum``."""
        return self.scale * self._stretched(momentum)

    def force(self, gradient: Float[Array, " D"]) -> Float[Array, " D"]:
        """The gradient with respect to z."""
        return self._stretched(self.scale * gradient)


class Schedule(NamedTuple):
    """When to adapt what, as arrays (the iteration index counts from 0).

    Attributes:
        warmup: number of warm-up iterations.
        first, last: draws enter the metric's moments for first <= index < last.
        ends: iterations at whose end the metric is renewed, padded with -1.
    """

    warmup: Int[Any, ""]
    first: Int[Any, ""]
    last: Int[Any, ""]
    ends: Int[Any, " W"]

    def collects(self, index: Int[Array, ""]) -> Bool[Array, ""]:
        return (index >= self.first) & (index < self.last)

    def renews(self, index: Int[Array, ""]) -> Bool[Array, ""]:
        return jnp.any(self.ends == index)


def schedule(warmup: int) -> Schedule:
    """Stan's windows: 75 fast, doubling slow windows from 25, 50 fast; scaled when short.

    Source: Stan Reference Manual, 'Automatic parameter tuning'.
    """
    start, base, stop = 75, 25, 50
    if warmup < start + base + stop:
        start, stop = int(0.15 * warmup), int(0.1 * warmup)
        base = warmup - start - stop
    ends, begin, width = [], start, base
    while begin < warmup - stop and width > 0:
        end = begin + width
        if end + 2 * width > warmup - stop:
            end = warmup - stop
        ends.append(end - 1)
        begin, width = end, 2 * width
    if warmup < _LEAST_WARMUP:  # too short to learn a metric
        first, last, ends = warmup, warmup, []
    else:
        first, last = start, warmup - stop
    padded = np.full(_MAX_WINDOWS, -1)
    padded[: len(ends)] = ends
    return Schedule(np.asarray(warmup), np.asarray(first), np.asarray(last), padded)
