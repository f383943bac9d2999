"""The numbers behind the pictures of a report: plain functions of arrays.

Draws have shape (chain, draw, ...), or (chain, draw) where one scalar is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.special import ndtri

from ppl_toolkit import convergence

if TYPE_CHECKING:
    import xarray

__all__ = [
    "MOST_PREDICTIONS",
    "auc",
    "autocorrelation",
    "central",
    "chain_efficiency",
    "contraction",
    "data_kind",
    "density",
    "ess_evolution",
    "finite",
    "flat_predictions",
    "pit",
    "rank_band",
    "rank_counts",
    "weighted_pit",
]

_Array = NDArray[np.float64]

MOST_PREDICTIONS = 1 << 24  # numbers held in memory at once
_HEAVY = 50.0
_REACH = 8.0
_PIT_SEED = 0


def finite(values: ArrayLike) -> _Array:
    """The finite values, flat."""
    flat = np.asarray(values, dtype=float).ravel()
    return flat[np.isfinite(flat)]


def central(values: ArrayLike) -> tuple[float, float]:
    """The range of the finite values, but no further than eight times the quartiles' distance.

    Tails of a Cauchy law would leave all else in one cell of a picture. (0, 0) without values.
    """
    x = finite(values)
    if not x.size:
        return 0.0, 0.0
    low, first, third, high = np.quantile(x, [0.0, 0.25, 0.75, 1.0])
    reach = _REACH * (third - first)
    if reach > 0:
        low, high = max(low, first - reach), min(high, third + reach)
    return float(low), float(high)


# -- mixing -------------------------------------------------------------------------------------


def rank_counts(draws: ArrayLike, bins: int = 20) -> NDArray[np.intp]:
    """How many draws of each chain fall into equal parts of the pooled ranks.

    Args:
        draws: shape (chain, draw).
        bins: number of parts.

    Returns:
        Counts, shape (chain, bins). Ties are told apart by chain and draw in turn, so that a
        discrete scalar of chains that agree gives flat counts.
    """
    x = np.asarray(draws, dtype=float)
    chains, count = x.shape
    # Draw by draw, chain by chain: ties then alternate between the chains.
    order = np.argsort(x.T.ravel(), kind="stable")
    rank = np.empty(x.size, dtype=np.intp)
    rank[order] = np.arange(x.size)
    part = (rank * bins // max(x.size, 1)).reshape(count, chains)
    return np.stack([np.bincount(part[:, c], minlength=bins) for c in range(chains)])


def rank_band(
    chains: int, draws: int, bins: int, efficiency: float = 1.0, joint: float = 0.95
) -> tuple[float, float]:
    """Limits that all rank counts of chains with one law keep, with probability ``joint``.

    A chain's count in a part of the pooled ranks is hypergeometric for independent draws; the
    level is divided among all counts (Bonferroni). Draws that are worth fewer independent ones
    stray further, by the square root of their relative efficiency.
    """
    size = chains * draws
    tail = (1 - joint) / (2 * chains * bins)
    from scipy import stats  # takes as long to import as all else here

    law = stats.hypergeom(size, max(size // bins, 1), draws)
    mean = draws / bins
    wider = 1 / np.sqrt(min(max(efficiency, 1e-3), 1.0))
    low, high = law.ppf(tail), law.ppf(1 - tail)
    return max(0.0, mean + (low - mean) * wider), min(draws, mean + (high - mean) * wider)


def chain_efficiency(draws: ArrayLike) -> float:
    """Effective over actual draws within chains, whether or not the chains agree."""
    x = np.asarray(draws, dtype=float)
    each = [float(convergence.ess(chain[None])) for chain in x]
    good = [value for value in each if np.isfinite(value)]
    return sum(good) / (len(good) * x.shape[1]) if good else 1.0


def autocorrelation(draws: ArrayLike, lags: int = 60) -> _Array:
    """Autocorrelation by chain at lags 0, 1, ..., shape (chain, lags); NaN for constants."""
    x = np.asarray(draws, dtype=float)
    count = x.shape[1]
    lags = min(lags, count)
    # Divided first, so that squares of huge draws do not overflow.
    with np.errstate(all="ignore"):
        scaled = x / np.abs(x).max(axis=1, keepdims=True)
    centred = scaled - scaled.mean(axis=1, keepdims=True)
    spectrum = fft.rfft(centred, n=fft.next_fast_len(count + lags, real=True))
    size = 2 * (spectrum.shape[1] - 1)
    covariance = fft.irfft(np.abs(spectrum) ** 2, n=size)[:, :lags]
    with np.errstate(all="ignore"):
        ratio: _Array = covariance / covariance[:, :1]
    ratio[np.ptp(x, axis=1) == 0] = np.nan
    return ratio


def ess_evolution(draws: ArrayLike, parts: int = 10) -> tuple[_Array, _Array, _Array]:
    """Bulk and tail ESS of the first draws, as they grow.

    Returns:
        (numbers of draws per chain, bulk ESS, tail ESS), shapes (k,), (k, ...), (k, ...).
    """
    x = np.asarray(draws, dtype=float)
    counts = np.unique(np.linspace(0, x.shape[1], parts + 1).astype(int)[1:])
    counts = counts[counts >= 4]
    numbers = [convergence.ranked(x[:, :n]) for n in counts]
    bulk, tail = (
        np.array([n[key] for n in numbers]).reshape(len(counts), *x.shape[2:])
        for key in ("ess_bulk", "ess_tail")
    )
    return counts.astype(float), bulk, tail


# -- divergences --------------------------------------------------------------------------------


def auc(values: ArrayLike, flags: ArrayLike) -> _Array:
    """How well each scalar separates flagged draws from the others.

    Args:
        values: shape (draw, scalar).
        flags: shape (draw,).

    Returns:
        The chance that a flagged draw has the larger value (a tie counts one half), shape
        (scalar,): 1/2 where the scalar tells nothing, 0 or 1 where it tells all. NaN without
        draws of both kinds, and for a scalar with NaN draws.

    Source: the Mann-Whitney statistic; Hanley and McNeil (1982), Radiology 143.
    """
    x, flagged = np.asarray(values, dtype=float), np.asarray(flags, dtype=bool)
    n, rest = int(flagged.sum()), int((~flagged).sum())
    if not n or not rest:
        return np.full(x.shape[1], np.nan)
    from scipy.stats import rankdata

    ranks = rankdata(x, axis=0)
    area: _Array = (ranks[flagged].sum(axis=0) - n * (n + 1) / 2) / (n * rest)
    return np.where(np.isnan(x).any(axis=0), np.nan, area)


# -- posterior ----------------------------------------------------------------------------------


class Contraction(NamedTuple):
    """What the data did to a prior, by scalar.

    Attributes:
        contraction: 1 - Var(posterior) / Var(prior).
        z: (posterior mean - prior mean) / prior standard deviation.
        robust: whether medians and interquartile ranges stand in for means and deviations,
            because the prior's tails are so heavy that its sample variance means nothing.
    """

    contraction: _Array
    z: _Array
    robust: NDArray[np.bool_]


def contraction(posterior: ArrayLike, prior: ArrayLike) -> Contraction:
    """Contraction and shift from prior to posterior.

    Args:
        posterior, prior: draws, shapes (draw, scalar); the numbers of draws may differ.
    """
    post, pre = np.asarray(posterior, dtype=float), np.asarray(prior, dtype=float)
    with np.errstate(all="ignore"):
        plain = 1 - post.var(axis=0, ddof=1) / pre.var(axis=0, ddof=1)
        shift = (post.mean(axis=0) - pre.mean(axis=0)) / pre.std(axis=0, ddof=1)
        q = np.nanquantile(pre, [0.25, 0.5, 0.75], axis=0)
        p = np.nanquantile(post, [0.25, 0.5, 0.75], axis=0)
        spread = q[2] - q[0]
        heavy = np.abs(pre - q[1]).max(axis=0) > _HEAVY * spread
        heavy &= spread > 0
        by_quartiles = 1 - ((p[2] - p[0]) / spread) ** 2
        scale = spread / (2 * ndtri(0.75))
        return Contraction(
            np.where(heavy, by_quartiles, plain),
            np.where(heavy, (p[1] - q[1]) / scale, shift),
            heavy,
        )


def density(
    values: ArrayLike, points: int = 128, within: tuple[float, float] | None = None
) -> tuple[_Array, _Array]:
    """A Gaussian kernel density estimate with Silverman's bandwidth.

    Args:
        values: draws; those that are not finite are left out.
        points: length of the answer.
        within: estimate the density here only.

    Returns:
        (points, density); empty where there is no spread. Where many draws lie close to the
        smallest or largest one, that is taken for a bound, and the density is reflected there.
    """
    x = finite(values)
    if x.size < 2 or not np.ptp(x) > 0:
        return np.zeros(0), np.zeros(0)
    quartiles = float(np.subtract(*np.quantile(x, [0.75, 0.25])))
    with np.errstate(over="ignore"):
        sd = float(x.std())
    width = 0.9 * min(sd, quartiles / 1.34 if quartiles > 0 else sd) * x.size**-0.2
    low, high = float(x.min()), float(x.max())
    low -= 0.0 if _piled_up(x - low, width) else 3 * width
    high += 0.0 if _piled_up(high - x, width) else 3 * width
    inner = central(x)
    low, high = max(low, inner[0] - 3 * width), min(high, inner[1] + 3 * width)
    if within is not None:
        low, high = max(low, within[0]), min(high, within[1])
    if not (np.isfinite(low) and np.isfinite(high) and low < high and width > 0):
        return np.zeros(0), np.zeros(0)
    fine = 4 * points
    counts, edges = np.histogram(x, fine, (low, high))
    step = edges[1] - edges[0]
    cells = int(min(max(np.ceil(4 * width / step), 1), fine - 1))
    kernel = np.exp(-0.5 * (np.arange(-cells, cells + 1) * step / max(width, step)) ** 2)
    padded = np.pad(counts.astype(float), cells, mode="symmetric")
    smooth = np.convolve(padded, kernel / kernel.sum(), mode="valid") / (x.size * step)
    keep = np.linspace(0, fine - 1, points).astype(int)
    return ((edges[:-1] + edges[1:]) / 2)[keep], smooth[keep]


def _piled_up(distances: _Array, width: float) -> bool:
    """Whether draws lie as densely at an end (distance 0) as a little further in."""
    first, second = (distances < width).sum(), (distances < 2 * width).sum()
    return bool(first >= 10 and first > 0.5 * (second - first))


# -- prediction ---------------------------------------------------------------------------------


def data_kind(observed: ArrayLike, predicted: ArrayLike) -> str:
    """Whether data are "binary", "count" or "continuous", by their values and predictions.

    Measured data may happen to be whole numbers; predictions from a continuous law are not.
    """
    parts = [finite(observed), finite(predicted)]
    both = np.concatenate(parts)
    if not both.size or not np.array_equal(both, np.round(both)):
        return "continuous"
    if np.isin(both, (0, 1)).all():
        return "binary"
    return "count"


def flat_predictions(drawn: xarray.DataArray, like: xarray.DataArray) -> _Array | None:
    """Predictions as (draw, observation), thinned to what memory bears; None if shapes differ."""
    own = [d for d in drawn.dims if d not in ("chain", "draw")]
    if [drawn.sizes[d] for d in own] != list(like.shape):
        return None
    step = max(1, -(-drawn.size // MOST_PREDICTIONS))
    some = drawn.transpose("chain", "draw", ...)[:, ::step]
    return np.asarray(some, dtype=float).reshape(some.shape[0] * some.shape[1], -1)


def pit(observed: ArrayLike, predicted: ArrayLike) -> _Array:
    """Probability integral transforms: where observations lie among their predictions.

    Args:
        observed: shape (n,).
        predicted: shape (draw, n).

    Returns:
        The share of predictions below each observation, plus a random share (of a fixed seed) of
        those equal to it: uniform on (0, 1) if the data follow the predictions. Shape (n,).
    """
    y, drawn = np.asarray(observed, dtype=float), np.asarray(predicted, dtype=float)
    weights = np.full(drawn.shape, 1 / max(len(drawn), 1))
    return weighted_pit(y, drawn, weights)


def weighted_pit(observed: ArrayLike, predicted: ArrayLike, weights: ArrayLike) -> _Array:
    """`pit` with weights of the draws, shape (draw, n), that sum to one over draws.

    With leave-one-out weights: LOO-PIT, which does not use an observation twice.
    """
    y, drawn = np.asarray(observed, dtype=float), np.asarray(predicted, dtype=float)
    w = np.asarray(weights, dtype=float)
    below, equal = (w * (drawn < y)).sum(axis=0), (w * (drawn == y)).sum(axis=0)
    share = np.random.default_rng(_PIT_SEED).uniform(size=y.shape)
    return np.where(np.isnan(y), np.nan, np.clip(below + share * equal, 0.0, 1.0))
