"""Simultaneous bands for the empirical distribution function of uniform ranks, and exact p-values.

Under uniformity the counts of N ranks at or below the points z_1 < ... < z_K form a Markov chain:
given r ranks up to z_i, the number up to z_{i+1} is r plus a binomial number of the N - r others.
The chance that all counts stay within pointwise binomial bands follows by a forward recursion, and
the pointwise level that gives a joint one by bisection.

Source: Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its
applications in goodness-of-fit evaluation and multiple sample comparison, Statistics and Computing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from ppl_toolkit.errors import DataError

__all__ = ["Band", "band", "coverage", "p_value", "pointwise_level"]

_Array = NDArray[np.float64]

_NEGLIGIBLE = 1e-9  # p-values below this are given by an upper bound


class Band(NamedTuple):
    """A simultaneous band for counts of ranks.

    Attributes:
        points: the points z_i in (0, 1], shape (K,).
        low, high: the counts at or below z_i stay in low..high, jointly, shape (K,).
    """

    points: _Array
    low: _Array
    high: _Array


def coverage(level: float, size: int, points: ArrayLike) -> float:
    """Chance that the counts of ``size`` uniform ranks stay within the pointwise bands.

    Args:
        level: pointwise level: each band leaves out at most level / 2 on either side.
        size: number of ranks N.
        points: increasing, in (0, 1], shape (K,).

    Complexity: O(K N^2) at worst, O(K N w) with bands of width w.
    """
    z = np.asarray(points, dtype=float)
    return _inside(*_bounds(level, size, z), size, z)


def _bounds(level: float, size: int, z: _Array) -> tuple[_Array, _Array]:
    return stats.binom.ppf(level / 2, size, z), stats.binom.ppf(1 - level / 2, size, z)


def _inside(low: _Array, high: _Array, size: int, z: _Array) -> float:
    """Chance that every count lies in low..high."""
    counts = np.zeros(1, dtype=int)
    chance = np.ones(1)
    before = 0.0
    for point, least, most in zip(z, low.astype(int), high.astype(int), strict=True):
        reached = np.arange(least, most + 1)
        share = min((point - before) / (1.0 - before), 1.0) if before < 1 else 0.0
        step = stats.binom.pmf(reached[:, None] - counts, size - counts, share)
        chance, counts, before = step @ chance, reached, point
    return float(chance.sum())


@functools.lru_cache(maxsize=64)
def _pointwise(size: int, points: tuple[float, ...], joint: float) -> float:
    z = np.asarray(points)

    def excess(log_level: float) -> float:
        return coverage(np.exp(log_level), size, z) - joint

    # Coverage falls in steps as the level grows; the root is where it passes the joint one.
    low, high = np.log((1 - joint) / (4 * z.size)), np.log(1 - joint)
    if excess(high) >= 0:  # few ranks: their counts hardly vary
        return float(np.exp(high))
    return float(np.exp(optimize.bisect(excess, low, high, xtol=1e-3)))


def pointwise_level(size: int, points: ArrayLike, joint: float = 0.95) -> float:
    """The pointwise level whose bands hold jointly with probability ``joint``."""
    return _pointwise(size, tuple(np.asarray(points, dtype=float)), joint)


def band(size: int, points: ArrayLike, joint: float = 0.95) -> Band:
    """The simultaneous band of counts of ``size`` uniform ranks.

    Args:
        size: number of ranks N.
        points: increasing, in (0, 1], shape (K,).
        joint: probability that all counts lie in it.
    """
    z = np.asarray(points, dtype=float)
    return Band(z, *_bounds(pointwise_level(size, z, joint), size, z))


def p_value(counts: ArrayLike, size: int, points: ArrayLike) -> float:
    """Exact p-value of uniformity: the chance of a count at least as extreme anywhere.

    Below 1e-9 an upper bound of it.

    Args:
        counts: ranks at or below each point, shape (K,).
        size: number of ranks N.
        points: increasing, in (0, 1], shape (K,).

    Raises:
        DataError: shapes differ.
    """
    seen, z = np.asarray(counts), np.asarray(points, dtype=float)
    if seen.shape != z.shape:
        raise DataError(f"counts have shape {seen.shape}, points {z.shape}; they must agree.")
    tails = np.minimum(stats.binom.cdf(seen, size, z), stats.binom.sf(seen - 1, size, z))
    worst = float(np.min(tails[z < 1], initial=0.5))
    bound = 2.0 * z.size * worst  # by Boole's inequality
    if bound < _NEGLIGIBLE:
        return bound
    # Counts whose smaller tail exceeds the worst one seen are the less extreme ones.
    every = np.arange(size + 1)
    low, high = np.zeros(z.size), np.full(z.size, float(size))
    for i, point in enumerate(z):
        if point < 1:
            left, right = (
                stats.binom.cdf(every, size, point),
                stats.binom.sf(every - 1, size, point),
            )
            inside = every[np.minimum(left, right) > worst * (1 + 1e-12)]
            low[i], high[i] = (inside[0], inside[-1]) if inside.size else (1, 0)
    return 1.0 - _inside(low, high, size, z)
