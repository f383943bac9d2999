"""Coordinates in which a posterior is nearly standard normal, from draws and gradients (NumPy).

Of a Gaussian with covariance C the gradients of the log density have covariance C^-1. The geometric
mean of Cov(x) and Cov(g)^-1 is then C itself, however few draws there are above D; of other laws it
has the least Fisher divergence from a standard normal among all linear changes of coordinates.

Source: Seyboldt, Carlson and Carpenter, the metrics of nuts-rs and nutpie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ppl_toolkit.inference.adaptation import LowRank, Metric

__all__ = [
    "MOST_DENSE",
    "RANK",
    "best",
    "condition",
    "dense",
    "diagonal",
    "extent",
    "low_rank",
    "stiffness",
]

MOST_DENSE = 40  # dimensions up to which a metric may be dense: two products of D^2 a step
RANK = 8  # directions that a metric of more dimensions may stretch
_PRIOR = 5.0  # draws that the unit matrix counts for
_LEAST, _MOST = 1e-10, 1e10
_CUTOFF = 2.0  # variances nearer to one than this factor stay as they are
_SIMPLER = 1.05  # a diagonal metric is taken unless another is better by more than this

Table = Float[np.ndarray, "N D"]
AnyMetric = Metric | LowRank


def diagonal(x: Table, g: Table) -> Float[np.ndarray, " D"]:
    """Scales (Var x / Var g)^(1/4) of centred draws and gradients."""
    ratio = np.sqrt(np.mean(x**2, 0) / np.maximum(np.mean(g**2, 0), 1e-300))
    return np.sqrt(np.clip(np.where(np.isfinite(ratio), ratio, 1.0), _LEAST**2, _MOST**2))


def _geometric_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The geometric mean of a and b^-1: the matrix m with m b m = a.

    With b = L L', the matrix L' m L has the square L' a L.
    """
    lower = np.linalg.cholesky(b)
    values, vectors = np.linalg.eigh(lower.T @ a @ lower)
    half = np.linalg.solve(lower.T, vectors * np.maximum(values, 0.0) ** 0.25)
    return half @ half.T


def _shrunk(z: np.ndarray) -> np.ndarray:
    n, d = z.shape
    return (z.T @ z + _PRIOR * np.eye(d)) / (n + _PRIOR)


def dense(x: Table, g: Table) -> Metric:
    """By the geometric mean of Cov(x) and Cov(g)^-1, both shrunk towards the diagonal metric."""
    scale = diagonal(x, g)
    variances, directions = np.linalg.eigh(_geometric_mean(_shrunk(x / scale), _shrunk(g * scale)))
    root = (directions * np.sqrt(np.maximum(variances, 1e-20))) @ directions.T
    return Metric(scale[:, None] * root)


def low_rank(x: Table, g: Table, rank: int = RANK) -> LowRank:
    """The diagonal metric, stretched along the few directions in which it is most wrong.

    They are sought among the leading principal directions of draws and of gradients.
    """
    scale = diagonal(x, g)
    z, h = x / scale, g * scale

    def leading(y: np.ndarray) -> np.ndarray:
        return np.linalg.svd(y, full_matrices=False)[2][:rank].T

    among, _ = np.linalg.qr(np.concatenate([leading(z), leading(h)], 1))
    variances, mixing = np.linalg.eigh(_geometric_mean(_shrunk(z @ among), _shrunk(h @ among)))
    order = np.argsort(-np.abs(np.log(variances)))[:rank]
    far = np.maximum(variances[order], 1.0 / variances[order]) > _CUTOFF
    directions, stretch = np.zeros((rank, x.shape[1])), np.zeros(rank)
    directions[: far.sum()] = (among @ mixing[:, order[far]]).T
    stretch[: far.sum()] = np.sqrt(variances[order[far]]) - 1.0
    return LowRank(scale, directions, stretch)


def _standardised(metric: AnyMetric, x: np.ndarray) -> np.ndarray:
    """Rows z of rows x = L z."""
    if isinstance(metric, LowRank):
        z = x / metric.scale
        shrink = 1.0 / (1.0 + metric.stretch) - 1.0
        return z + (z @ metric.directions.T * shrink) @ metric.directions
    if metric.factor.ndim == 1:
        return x / metric.factor
    return np.linalg.solve(metric.factor, x.T).T


def _forces(metric: AnyMetric, g: np.ndarray) -> np.ndarray:
    """The gradients with respect to z, row by row."""
    if isinstance(metric, LowRank):
        h = g * metric.scale
        return h + (h @ metric.directions.T * metric.stretch) @ metric.directions
    return g * metric.factor if metric.factor.ndim == 1 else g @ metric.factor


def _largest(y: np.ndarray) -> float:
    """The largest variance along any direction."""
    smaller = y.T @ y if y.shape[1] <= len(y) else y @ y.T
    return float(np.linalg.eigvalsh(smaller)[-1] / len(y))


def stiffness(metric: AnyMetric, g: Table) -> float:
    """The root of the largest variance of forces: stable steps are shorter than 2 over it."""
    return np.sqrt(_largest(_forces(metric, g)))


def extent(metric: AnyMetric, x: Table) -> float:
    """The root of the largest variance of coordinates z: how far trajectories have to go."""
    return np.sqrt(_largest(_standardised(metric, x)))


def condition(metric: AnyMetric, x: Table, g: Table) -> float:
    """The widest direction in units of the longest stable step; 1 of a Gaussian that is matched."""
    return extent(metric, x) * stiffness(metric, g)


_CANDIDATES = {  # what metrics of a type are made from, the simplest first
    "diagonal": ("diagonal",),
    "dense": ("diagonal", "dense"),
    "low rank": ("diagonal", "low rank"),
}


def _candidate(name: str, x: Table, g: Table) -> AnyMetric:
    if name == "diagonal":
        return Metric(diagonal(x, g))
    return dense(x, g) if name == "dense" else low_rank(x, g)


def _of_type(kind: str, metric: AnyMetric) -> AnyMetric:
    """The metric in the form of its type."""
    if isinstance(metric, LowRank) or metric.factor.ndim == 2 or kind == "diagonal":
        return metric
    if kind == "dense":
        return Metric(np.diag(metric.factor))
    return LowRank(metric.factor, np.zeros((RANK, len(metric.factor))), np.zeros(RANK))


def best(
    kind: str, folds: Sequence[tuple[Table, Table]], current: AnyMetric
) -> tuple[AnyMetric, str, float, float]:
    """The candidate that suits draws best which it was not made of.

    Args:
        kind: "diagonal", "dense" or "low rank": the type of all metrics.
        folds: two halves of centred draws and gradients, best of different chains.
        current: the metric in use, which neither half was used for.

    Returns:
        The metric, made of both halves; its name; its condition and that of the current one, on
        draws they were not made of (geometric means over the halves).
    """
    logs: dict[str, float] = {}
    for own, other in (folds, folds[::-1]):
        for name in _CANDIDATES[kind]:
            suits = condition(_candidate(name, *own), *other)
            logs[name] = logs.get(name, 0.0) + 0.5 * np.log(suits)
    present = np.mean([np.log(condition(current, *fold)) for fold in folds])
    handicaps = {name: 0.0 if name == "diagonal" else np.log(_SIMPLER) for name in logs}
    chosen = min(logs, key=lambda name: logs[name] + handicaps[name])
    both = (np.concatenate(parts) for parts in zip(*folds, strict=True))
    made = _of_type(kind, _candidate(chosen, *both))
    return made, chosen, float(np.exp(logs[chosen])), float(np.exp(present))
