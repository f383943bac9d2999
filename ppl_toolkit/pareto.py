"""Importance weights whose largest are smoothed by a generalised Pareto distribution (PSIS).

The fit takes its array module, since results are judged on the host in NumPy (`psis`), and weights
inside a compiled program (`inference.importance`).

Sources: Vehtari, Simpson, Gelman, Yao, Gabry (2024), JMLR 25(72); the fit is that of Zhang and
Stephens (2009), Technometrics 51(3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ppl_toolkit.errors import DataError, OptionError

__all__ = ["ALIKE", "FEWEST", "fit", "khat", "psis", "quantile", "reliable", "tail_length"]

_Array = NDArray[np.float64]

FEWEST = 25
"""Draws with a tail that is long enough to fit."""

ALIKE = 1e-3
"""Log weights of a tail that differ by less are the same."""

_MAX_ELEMENTS = 1 << 17  # of one work array (1 MiB): few calls, yet mostly within the cache


def tail_length(size: int, r_eff: float = 1.0) -> int:
    """How many of the largest weights of ``size`` draws are fitted."""
    return int(3.0 * np.sqrt(size / r_eff)) if size * r_eff > 225 else size // 5


def reliable(size: int) -> float:
    """The largest k at which estimates from so many draws can be relied on."""
    return min(1.0 - 1.0 / np.log10(size), 0.7)


def psis(log_weights: ArrayLike, r_eff: float = 1.0) -> tuple[Any, Any]:
    """Pareto-smoothed importance weights.

    The largest weights are replaced by the expected order statistics of a generalised Pareto
    distribution fitted to them. Its shape k tells how far the weights can be trusted: up to
    min(1 - 1/log10(S), 0.7) the estimates are reliable.

    Args:
        log_weights: unnormalised log weights of S draws, shape (..., S). For leave-one-out
            cross-validation these are minus the pointwise log likelihoods.
        r_eff: relative efficiency ESS/S of the draws.

    Returns:
        (Smoothed log weights that sum to one on the natural scale, shape (..., S); k, shape
        (...)). The weights are left unsmoothed where there is no distribution to fit: where the
        whole tail is one value, or its first quartile equals its minimum. k is NaN there. A row
        with NaN or +inf is NaN. (ArviZ raises ValueError on a tail of one value, whichever row
        it is in.)

    Raises:
        DataError: fewer than 25 draws, whose tail is too short to fit.
        OptionError: `r_eff` is not positive.

    Complexity: per row a sort and 30 + sqrt(T) evaluations of the likelihood of T tail draws,
    T = 3 sqrt(S / r_eff).
    """
    raw = np.asarray(log_weights, dtype=np.float64)
    size = raw.shape[-1] if raw.ndim else 0
    if not r_eff > 0:
        raise OptionError(f"r_eff is {r_eff}; give the positive ratio ESS / number of draws.")
    tail = tail_length(size, r_eff)
    if tail < 5:
        raise DataError(
            f"psis needs at least {FEWEST} draws on the last axis; got shape {raw.shape}."
        )
    rows = raw.reshape(-1, size)
    smoothed = np.empty(rows.shape)
    shape = np.empty(len(rows))
    step = max(1, _MAX_ELEMENTS // max(size, tail * _grid_size(tail)))
    with np.errstate(all="ignore"):
        for begin in range(0, len(rows), step):
            some = slice(begin, begin + step)
            smoothed[some], shape[some] = _smooth(rows[some], tail)
    return smoothed.reshape(raw.shape), shape.reshape(raw.shape[:-1])[()]


def khat(log_weights: ArrayLike) -> float:
    """The shape k of the tail of importance weights, never NaN.

    Args:
        log_weights: of S draws, 25 or more; NaN counts as weight zero.

    Returns:
        k of `psis`; but zero where the largest weights are all alike, and infinity where there is
        no tail to fit for other reasons (most weights are zero, or one is infinite).
    """
    raw = np.asarray(log_weights, float)
    clean = np.where(np.isnan(raw), -np.inf, raw)
    top = clean.max()
    if not np.isfinite(top):
        return float("inf")
    if top - np.sort(clean)[-tail_length(clean.size) - 1] < ALIKE:
        return 0.0
    found = float(psis(clean)[1])
    return float("inf") if np.isnan(found) else found


def _smooth(log_weights: _Array, tail: int) -> tuple[_Array, _Array]:
    """Smooths and normalises rows of log weights: (log weights, k)."""
    out = log_weights - log_weights.max(axis=1, keepdims=True)
    # numpy.argsort itself, since tied weights are told apart by its order (as in ArviZ).
    order = np.argsort(out, axis=1)[:, -tail - 1 :]
    largest = np.take_along_axis(out, order, axis=1)
    cutoff = np.exp(largest[:, :1])
    k, sigma = fit(np.exp(largest[:, 1:]) - cutoff)
    flat_tail = largest[:, -1] - largest[:, 1] < np.finfo(np.float64).tiny
    k = np.where(flat_tail | np.isnan(out).any(axis=1), np.nan, k)
    fitted = np.isfinite(k)
    prob = np.arange(0.5, tail) / tail
    quantiles = cutoff + quantile(prob, k[:, None], sigma[:, None])
    smooth = np.minimum(np.log(quantiles), 0.0)  # no weight may exceed the largest raw one
    smooth = np.where(fitted[:, None], smooth, largest[:, 1:])
    np.put_along_axis(out, order[:, 1:], smooth, axis=1)
    top = out.max(axis=1, keepdims=True)
    out -= top + np.log(np.exp(out - top).sum(axis=1, keepdims=True))
    return out, k


def _grid_size(count: int) -> int:
    return 30 + int(np.sqrt(count))


def fit(x: Any, xp: Any = np) -> tuple[Any, Any]:
    """Shape k and scale sigma of a generalised Pareto distribution, per ascending row.

    The posterior mean of b = -k / sigma over a grid under the profile likelihood, with k shrunk
    towards 1/2 with the weight of ten observations.

    Args:
        x: exceedances, (row, T).
        xp: numpy or jax.numpy.

    Returns:
        k and sigma, (row,); k is NaN where the first quartile is no larger than the minimum.
    """
    count = x.shape[1]
    grid = _grid_size(count)
    quartile, top = x[:, int(count / 4 + 0.5) - 1], x[:, -1]
    nodes = 1.0 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    b = nodes / (3.0 * quartile[:, None]) + 1.0 / top[:, None]
    k = xp.log1p(-b[..., None] * x[:, None, :]).mean(axis=-1)
    profile = count * (xp.log(-b / k) - k - 1.0)
    weights = xp.exp(profile - profile.max(axis=1, keepdims=True))
    weights = weights / weights.sum(axis=1, keepdims=True)
    weights = xp.where(weights < 10 * np.finfo(np.float64).eps, 0.0, weights)
    weights = weights / weights.sum(axis=1, keepdims=True)
    mean_b = (b * weights).sum(axis=1)
    shape = xp.log1p(-mean_b[:, None] * x).mean(axis=1)
    sigma = -shape / mean_b
    shape = (count * shape + 10 * 0.5) / (count + 10)
    shape = xp.where(xp.isnan(shape), np.inf, shape)
    # A quartile no larger than the minimum: nothing like a Pareto distribution.
    return xp.where(quartile <= x[:, 0], np.nan, shape), sigma


def quantile(prob: Any, k: Any, sigma: Any, xp: Any = np) -> Any:
    """Quantiles of the generalised Pareto distribution with location 0; NaN unless sigma > 0."""
    exponential = -np.log1p(-prob)  # the limit k -> 0
    general = xp.expm1(k * exponential) / xp.where(k == 0, 1.0, k)
    return xp.where(sigma > 0, sigma * xp.where(k == 0, exponential, general), np.nan)
