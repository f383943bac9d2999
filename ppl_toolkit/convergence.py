"""Convergence diagnostics: split R-hat, effective sample size, Monte Carlo errors, BFMI.

Everything here runs on the host in float64 NumPy, on all scalars of an array at once: the
functions take draws of shape ``(chain, draw, ...)`` and return one number per trailing element.
They may run between two chunks of a sampler, so nothing is compiled and nothing heavy imported.
The numbers are those of ``arviz_stats`` 1.3, edge cases included, up to rounding:

- a NaN among the draws of a scalar makes every diagnostic of that scalar NaN (and of no other);
- infinite draws are draws like any other to the rank-based numbers (R-hat, bulk, tail and
  quantile ESS); whatever needs a mean is NaN;
- a constant scalar has an ESS equal to its number of draws, and an R-hat of NaN;
- fewer than four draws give NaN; one chain gives an R-hat of NaN;
- of an odd number of draws, the middle one belongs to neither half of the split chain.

One convention differs: tail ESS looks at the 5% and 95% quantiles, as Stan and Vehtari et al.
(2021) do, while ``arviz.summary`` 1.3 looks at 11% and 89%. Pass ``(0.11, 0.89)`` to get those.

Notation: C chains of n draws become M = 2C half-chains of N = floor(n/2) draws, S = M N.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.special import betaincinv, ndtri

from ppl_toolkit.errors import DataError, OptionError
from ppl_toolkit.pareto import psis

__all__ = ["bfmi", "bulk", "convergence", "ess", "mcse", "psis", "ranked", "rhat", "rhat_nested"]

_Array = NDArray[np.float64]
_Index = NDArray[np.intp]
_Mask = NDArray[np.bool_]
_RHat = Callable[[_Array, _Array, int], _Array]  # of means, variances and length of chains

_TAIL = (0.05, 0.95)
_MIN_DRAWS = 4
_MAX_SCALARS = 256
_MAX_ELEMENTS = 1 << 17  # of one work array (1 MiB): few calls, yet mostly within the cache
_CONSTANT = 1e-15  # a sequence with a smaller range counts as constant


# --- public functions --------------------------------------------------------------------------


def rhat(x: ArrayLike) -> Any:
    """Rank-normalised split R-hat.

    The larger of two split R-hats: of the normal scores of the draws (do the chains agree on
    location?) and of those of their distances from the median (do they agree on scale?).

    Args:
        x: draws, shape (chain, draw, ...).

    Returns:
        R-hat, of the trailing shape. NaN for one chain, for fewer than four draws, and for a
        scalar with constant or NaN draws.

    Complexity: one sort per scalar, O(S log S).

    Source: Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), Bayesian Analysis 16(2).
    """
    draws = _draws(x)
    if draws.shape[0] < 2:
        return _per_scalar(draws, _undefined)
    return _per_scalar(draws, lambda block: _ranked_rhat(_Split.of(block), _split_rhat))


def rhat_nested(x: ArrayLike, superchains: ArrayLike) -> Any:
    """Rank-normalised split nested R-hat, for many short chains.

    Chains that began at the same point form a superchain; the superchains are compared with each
    other, so that chains need not be long enough to be compared one by one.

    Args:
        x: draws, shape (chain, draw, ...).
        superchains: a label for every chain, shape (chain,); as many chains under each label.

    Returns:
        Nested R-hat, of the trailing shape; NaN as for `rhat`, and for a single superchain.

    Raises:
        OptionError: the labels do not fit the chains, or the superchains differ in size.

    Complexity: as `rhat`.

    Source: Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman (2024), Nested R-hat,
    Bayesian Analysis.
    """
    draws = _draws(x)
    labels = np.asarray(superchains)
    if labels.shape != draws.shape[:1]:
        raise OptionError(
            f"superchains has shape {labels.shape}, but there are {draws.shape[0]} chains; "
            "give one label per chain, such as [0, 0, 1, 1]."
        )
    _, counts = np.unique(labels, return_counts=True)
    if np.unique(counts).size > 1:
        raise OptionError(
            f"the superchains hold {counts.tolist()} chains; give every superchain as many."
        )
    if draws.shape[0] < 2:
        return _per_scalar(draws, _undefined)
    # Both halves of a chain stay in its superchain; equal labels become neighbours.
    by_superchain = np.argsort(np.repeat(labels, 2), kind="stable")

    def nested(means: _Array, variances: _Array) -> _Array:
        shape = (len(means), len(counts), -1)
        means = means[:, by_superchain].reshape(shape)
        variances = variances[:, by_superchain].reshape(shape)
        # B of eq. 6; W of eq. 7, the mean over superchains of between- and within-chain variance
        between = _variance(means.mean(axis=-1))
        within = (_variance(means) + variances.mean(axis=-1)).mean(axis=-1)
        return np.sqrt(1.0 + between / within)

    return _per_scalar(
        draws, lambda block: _ranked_rhat(_Split.of(block), lambda m, v, _: nested(m, v))
    )


def ess(x: ArrayLike, method: str = "bulk", prob: float | Sequence[float] | None = None) -> Any:
    """Effective sample size.

    Args:
        x: draws, shape (chain, draw, ...).
        method: what is to be estimated.

            - "bulk": the centre of the distribution (ESS of the normal scores of the draws);
            - "tail": the smaller ESS of two quantiles;
            - "mean", "sd": the mean; the standard deviation (ESS of the squared deviations);
            - "quantile": one quantile (ESS of the indicator of lying at or below it).
        prob: for "quantile" the probability; for "tail" two of them, by default (0.05, 0.95)
            (one number p stands for p and 1 - p). ArviZ 1.3 would take (0.11, 0.89).

    Returns:
        ESS, of the trailing shape; at most S log10(S). NaN for fewer than four draws or NaN
        draws; S for constant draws.

    Raises:
        OptionError: unknown method, or a missing, superfluous or impossible `prob`.

    Complexity: O(S log S): an FFT per half-chain, and a sort for bulk, tail and quantile.

    Source: Vehtari et al. (2021); truncation by the initial positive and monotone sequences of
    Geyer (1992), Statistical Science 7(4).
    """
    draws = _draws(x)
    kernel: Callable[[_Array], _Array]
    if method in ("bulk", "mean", "sd") and prob is not None:
        raise OptionError(f"ess(method={method!r}) takes no prob; leave it out.")
    if method == "bulk":

        def kernel(block: _Array) -> _Array:
            split = _Split.of(block)
            scores = _in_place(_normal_scores(split.ordered), split.order)
            return split.unless_nan(_autocorrelated(split.shaped(scores), split.constant).ess)

    elif method == "tail":
        low, high = _pair(prob)

        def kernel(block: _Array) -> _Array:
            split = _Split.of(block)
            return np.minimum(split.quantile_ess(low), split.quantile_ess(high))

    elif method == "quantile":
        at = _probability(prob)

        def kernel(block: _Array) -> _Array:
            return _Split.of(block).quantile_ess(at)

    elif method == "mean":

        def kernel(block: _Array) -> _Array:
            return _plain_ess(block)

    elif method == "sd":

        def kernel(block: _Array) -> _Array:
            return _plain_ess(_moments(block).squares)

    else:
        raise OptionError(f"ess has no method {method!r}; choose bulk, tail, mean, sd or quantile.")
    return _per_scalar(draws, kernel)


def mcse(x: ArrayLike, method: str = "mean", prob: float | None = None) -> Any:
    """Monte Carlo standard error of an estimate made from the draws.

    Args:
        x: draws, shape (chain, draw, ...).
        method: the estimate: "mean", "sd" or "quantile".
        prob: the probability, for "quantile".

    Returns:
        The standard error in the units of the draws, of the trailing shape. For a quantile, half
        the width of its central 68% interval. NaN for fewer than four draws or NaN draws; of
        constant draws, 0 for the mean and NaN for the standard deviation.

    Raises:
        OptionError: unknown method, or a missing, superfluous or impossible `prob`.

    Complexity: as `ess`.

    Source: Vehtari et al. (2021), section 4.
    """
    draws = _draws(x)
    kernel: Callable[[_Array], _Array]
    if method in ("mean", "sd") and prob is not None:
        raise OptionError(f"mcse(method={method!r}) takes no prob; leave it out.")
    if method == "mean":

        def kernel(block: _Array) -> _Array:
            return _mcse_mean(_moments(block), _plain_ess(block))

    elif method == "sd":

        def kernel(block: _Array) -> _Array:
            moments = _moments(block)
            return _mcse_sd(moments, _plain_ess(moments.squares))

    elif method == "quantile":
        at = _probability(prob)

        def kernel(block: _Array) -> _Array:
            split = _Split.of(block)
            return _mcse_quantile(split.everything, split.quantile_ess(at), at)

    else:
        raise OptionError(f"mcse has no method {method!r}; choose mean, sd or quantile.")
    return _per_scalar(draws, kernel)


def convergence(
    x: ArrayLike,
    tail_prob: float | Sequence[float] = _TAIL,
    quantiles: Sequence[float] = (),
) -> dict[str, Any]:
    """All the usual diagnostics in one pass over the draws.

    Equal to calling `rhat`, `ess` and `mcse` in turn, but each scalar is sorted once and each
    derived sequence transformed once.

    Args:
        x: draws, shape (chain, draw, ...).
        tail_prob: the two quantiles of the tail ESS; ArviZ 1.3 uses (0.11, 0.89).
        quantiles: probabilities of quantiles to return as well, under the keys "quantile_0", ...:
            they come with the sorting.

    Returns:
        Arrays of the trailing shape under the keys mean, sd (the standard deviation of the draws
        themselves, with divisor S - 1, as ``arviz.summary`` has it), mcse_mean, mcse_sd, ess_bulk,
        ess_tail and r_hat. Mean and sd need one draw, the others four.

    Raises:
        OptionError: impossible `tail_prob`.

    Complexity: per scalar one sort and five FFTs of all half-chains, O(S log S); work space of a
    few MiB, whatever the number of scalars.

    Source: Vehtari et al. (2021); Geyer (1992).
    """
    draws = _draws(x)
    low, high = _pair(tail_prob)
    own = ("mean", "sd", "mcse_mean", "mcse_sd", "ess_bulk", "ess_tail", "r_hat")
    probabilities = [_probability(prob) for prob in quantiles]
    names = (*own, *(f"quantile_{i}" for i in range(len(probabilities))))

    def kernel(block: _Array) -> tuple[_Array, ...]:
        moments = _moments(block)
        size = block[0].size
        sd = np.sqrt(moments.variance * size / max(size - 1, 1))
        if block.shape[-1] < _MIN_DRAWS:
            cuts = [np.quantile(block, prob, axis=(1, 2)) for prob in probabilities]
            return (moments.mean, sd, *(_undefined(block) for _ in own[2:]), *cuts)
        split = _Split.of(block)
        mean = _autocorrelated(split.halves, split.narrow)
        squares = _halves(moments.squares)
        square = _autocorrelated(squares, _narrow(squares))
        return (
            moments.mean,
            sd,
            _mcse_mean(moments, mean.ess),
            _mcse_sd(moments, square.ess),
            *_ranked(split, low, high),
            *(split.unless_nan(_quantile(split.everything, prob)) for prob in probabilities),
        )

    values = _over_blocks(draws, kernel, len(names))
    return dict(zip(names, values, strict=True))


def ranked(x: ArrayLike, tail_prob: float | Sequence[float] = _TAIL) -> dict[str, Any]:
    """The diagnostics by ranks alone: ess_bulk, ess_tail and r_hat of `convergence`.

    What an alarm needs, at three fifths of the cost; arguments and edge cases are the same.
    """
    draws = _draws(x)
    low, high = _pair(tail_prob)
    names = ("ess_bulk", "ess_tail", "r_hat")

    def kernel(block: _Array) -> tuple[_Array, ...]:
        if block.shape[-1] < _MIN_DRAWS:
            return tuple(_undefined(block) for _ in names)
        return _ranked(_Split.of(block), low, high)

    return dict(zip(names, _over_blocks(draws, kernel, len(names)), strict=True))


def bulk(x: ArrayLike) -> dict[str, Any]:
    """ess_bulk and r_hat of `convergence` alone: are there draws of one law, how many?

    At half the cost of `ranked`; edge cases are the same.
    """
    names = ("ess_bulk", "r_hat")

    def kernel(block: _Array) -> tuple[_Array, ...]:
        if block.shape[-1] < _MIN_DRAWS:
            return tuple(_undefined(block) for _ in names)
        return _bulk(_Split.of(block))

    return dict(zip(names, _over_blocks(_draws(x), kernel, len(names)), strict=True))


def bfmi(energy: ArrayLike) -> Any:
    """Bayesian fraction of missing information, per chain.

    The mean square change of the energy from draw to draw, over its variance. Below about 0.3
    the momentum resampling of HMC is too timid for the tails of the target.

    Args:
        energy: Hamiltonian at every draw, shape (chain, draw, ...).

    Returns:
        Shape (chain, ...). NaN for fewer than two draws, and for constant or NaN energies.

    Complexity: O(S).

    Source: Betancourt (2016), arXiv:1604.00695.
    """
    draws = _draws(energy)
    if draws.shape[1] < 2:
        return np.full((draws.shape[0], *draws.shape[2:]), np.nan)
    with np.errstate(all="ignore"):
        return np.square(np.diff(draws, axis=1)).mean(axis=1) / draws.var(axis=1, ddof=1)


# --- from arrays of any shape to blocks of scalars and back -----------------------------------


def _draws(x: ArrayLike) -> _Array:
    draws = np.asarray(x)
    if draws.dtype.kind not in "fiub" or draws.ndim < 2:
        raise DataError(
            f"draws must be real numbers of shape (chain, draw, ...); got {draws.dtype} of "
            f"shape {draws.shape}."
        )
    return draws


def _blocks(draws: NDArray[Any]) -> Iterator[tuple[slice, _Array]]:
    """Yields (which scalars, their draws as a contiguous (scalar, chain, draw) array)."""
    flat = draws.reshape(*draws.shape[:2], -1)
    step = min(_MAX_SCALARS, max(1, _MAX_ELEMENTS // max(1, flat.shape[0] * flat.shape[1])))
    for begin in range(0, flat.shape[2], step):
        some = slice(begin, begin + step)
        yield some, np.ascontiguousarray(np.moveaxis(flat[..., some], 2, 0), dtype=np.float64)


def _over_blocks(
    draws: NDArray[Any], kernel: Callable[[_Array], tuple[_Array, ...]], outputs: int
) -> list[Any]:
    shape = draws.shape[2:]
    out = np.full((outputs, int(np.prod(shape))), np.nan)
    _keep_freed_memory()
    if draws.shape[0] and draws.shape[1]:
        with np.errstate(all="ignore"):  # NaN is an answer here
            for some, block in _blocks(draws):
                for row, values in zip(out, kernel(block), strict=True):
                    row[some] = values
    return [row.reshape(shape)[()] for row in out]


@functools.cache
def _keep_freed_memory() -> None:
    """Makes work arrays cheap.

    The allocator of Linux (glibc) hands large freed blocks back to the system, so that each work
    array of each block of scalars would be paged in afresh, at half the total cost; it does so
    for sizes above the largest block ever freed (up to 32 MiB). This one is never touched.
    """
    np.empty(31 << 20, dtype=np.uint8)


def _per_scalar(draws: NDArray[Any], kernel: Callable[[_Array], _Array]) -> Any:
    if draws.shape[1] < _MIN_DRAWS:
        kernel = _undefined
    return _over_blocks(draws, lambda block: (kernel(block),), 1)[0]


def _undefined(block: _Array) -> _Array:
    return np.full(len(block), np.nan)


def _probability(prob: Any) -> float:
    if not (isinstance(prob, int | float | np.number) and 0 < prob < 1):
        raise OptionError(f"prob is {prob!r}; give the probability of a quantile, such as 0.9.")
    return float(prob)


def _pair(prob: float | Sequence[float] | None) -> tuple[float, float]:
    if prob is None:
        return _TAIL
    pair = (prob, 1 - prob) if isinstance(prob, int | float) else tuple(prob)
    if len(pair) != 2:
        raise OptionError(f"prob is {prob!r}; give two probabilities, such as (0.05, 0.95).")
    low, high = sorted(_probability(p) for p in pair)
    return low, high


# --- moments -----------------------------------------------------------------------------------


class _Moments(NamedTuple):
    """Mean, variance (divisor S), fourth central moment, and the squared deviations themselves."""

    mean: _Array
    variance: _Array
    fourth: _Array
    squares: _Array


def _moments(block: _Array) -> _Moments:
    flat = block.reshape(len(block), -1)
    # Rounding can push a mean past the extremes, which would give constant draws a variance.
    mean = np.clip(flat.mean(axis=1), flat.min(axis=1), flat.max(axis=1))
    squares = np.subtract(flat, mean[:, None])
    np.multiply(squares, squares, out=squares)
    fourth = _sum_of_squares(squares) / flat.shape[1]
    return _Moments(mean, squares.mean(axis=1), fourth, squares.reshape(block.shape))


def _variance(values: _Array) -> _Array:
    """Along the last axis, with divisor one less than its length."""
    count = values.shape[-1]
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    variance: _Array = _sum_of_squares(values - values.mean(axis=-1, keepdims=True)) / (count - 1)
    return variance


def _sum_of_squares(values: _Array) -> _Array:
    total: _Array = np.einsum("...i,...i->...", values, values)
    return total


def _mcse_mean(moments: _Moments, effective: _Array) -> _Array:
    size = moments.squares[0].size
    error: _Array = np.sqrt(moments.variance * (size / (size - 1)) / effective)
    return error


def _mcse_sd(moments: _Moments, effective: _Array) -> _Array:
    # The delta method: Var(sd) = Var(mean of squared deviations) / (4 sd^2).
    v = moments.variance
    return np.sqrt((moments.fourth - v**2) / effective / v / 4)


def _mcse_quantile(ordered: _Array, effective: _Array, prob: float) -> _Array:
    # The quantile's rank has a beta distribution; take its interval of +-1 standard deviation.
    size = ordered.shape[1]
    edges = np.array([[0.1586553], [0.8413447]])
    rank = betaincinv(effective * prob + 1, effective * (1 - prob) + 1, edges) * size - 1
    low = np.floor(np.fmax(rank[0], 0)).astype(np.intp)
    high = np.ceil(np.fmin(rank[1], size - 1)).astype(np.intp)
    rows = np.arange(len(ordered))
    return np.where(
        np.isnan(ordered[:, -1]), np.nan, (ordered[rows, high] - ordered[rows, low]) / 2
    )


# --- split chains, ranks, quantiles -----------------------------------------------------------


def _halves(block: _Array) -> _Array:
    """(scalar, C, n) -> (scalar, 2C, n // 2): both halves of every chain, without the middle."""
    scalars, chains, draws = block.shape
    half = draws // 2
    if draws % 2:
        block = np.concatenate([block[..., :half], block[..., -half:]], axis=-1)
    return block.reshape(scalars, 2 * chains, half)


class _Split(NamedTuple):
    """Half-chains with what sorting tells of them; rows are scalars.

    Attributes:
        halves: shape (scalar, M, N).
        order: positions of the draws in ascending order (in the flattened block), (scalar, S).
        ordered: the draws in that order; NaN comes last.
        everything: all draws in ascending order, middle ones included, shape (scalar, C n).
    """

    halves: _Array
    order: _Index
    ordered: _Array
    everything: _Array

    @classmethod
    def of(cls, block: _Array) -> _Split:
        halves = _halves(block)
        flat = halves.reshape(len(block), -1)
        order, ordered = _argsort(flat)
        odd = block.shape[-1] % 2
        everything = np.sort(block.reshape(len(block), -1), axis=1) if odd else ordered
        return cls(halves, order, ordered, everything)

    @property
    def constant(self) -> _Mask:
        return np.equal(self.ordered[:, -1], self.ordered[:, 0])

    @property
    def narrow(self) -> _Mask:
        """Whether the draws themselves count as constant (their ranks may not)."""
        return self.ordered[:, -1] - self.ordered[:, 0] < _CONSTANT

    def shaped(self, values: _Array) -> _Array:
        return values.reshape(self.halves.shape)

    def unless_nan(self, values: _Array) -> _Array:
        return np.where(np.isnan(self.everything[:, -1]), np.nan, values)

    def quantile_ess(self, prob: float) -> _Array:
        cut = _quantile(self.everything, prob)
        below = (self.halves <= cut[:, None, None]).astype(np.float64)
        constant = ~((self.ordered[:, 0] <= cut) & (self.ordered[:, -1] > cut))
        return self.unless_nan(_autocorrelated(below, constant).ess)


def _argsort(rows: _Array) -> tuple[_Index, _Array]:
    """Sorts every row: (positions in ascending order, the values in that order).

    The positions are those in the flattened array.
    """
    low = rows.min(axis=1, keepdims=True)
    scale = np.float64(2**32 - 1) / (rows.max(axis=1, keepdims=True) - low)
    # Two passes of radix sort on a 32-bit grid are faster than one sort by comparison ...
    grid = ((rows - low) * scale).astype(np.uint32)
    order = _stable_argsort(grid.astype(np.uint16))
    upper = (grid >> 16).astype(np.uint16).ravel().take(order)
    order = order.ravel().take(_stable_argsort(upper))
    ordered = rows.ravel().take(order)
    # ... and wrong only where unequal draws share a cell, or where there is no such grid.
    wrong = np.flatnonzero(~(ordered[:, 1:] >= ordered[:, :-1]).all(axis=1))
    if wrong.size:
        order[wrong] = np.argsort(rows[wrong], axis=1) + wrong[:, None] * rows.shape[1]
        ordered[wrong] = rows.ravel().take(order[wrong])
    return order, ordered


def _stable_argsort(rows: NDArray[Any]) -> _Index:
    order = np.argsort(rows, axis=1, kind="stable")
    order += np.arange(0, rows.size, rows.shape[1])[:, None]
    return order


def _in_place(values: _Array, order: _Index) -> _Array:
    """Takes values in ascending order back to where the draws were."""
    out = np.empty(values.size)
    out[order.ravel()] = values.ravel()
    return out.reshape(values.shape)


@functools.lru_cache(maxsize=8)
def _score_table(size: int) -> _Array:
    """Normal scores of the ranks 1, 3/2, 2, ..., `size`; ties have half-integer ranks.

    Blom's offset: the score of rank r is the normal quantile at (r - 3/8) / (size + 1/4).
    """
    ranks = np.arange(2, 2 * size + 1) / 2
    table: _Array = ndtri((ranks - 0.375) / (size + 0.25))
    table.flags.writeable = False
    return table


def _normal_scores(ordered: _Array) -> _Array:
    """Normal scores of rows in ascending order; equal values share their average rank."""
    size = ordered.shape[1]
    table = _score_table(size)
    scores = np.empty(ordered.shape)
    scores[:] = table[::2]
    # A tie of r values shows as r - 1 consecutive positions, none of them the last of a row.
    equal = np.zeros(ordered.shape, dtype=bool)
    np.equal(ordered[:, 1:], ordered[:, :-1], out=equal[:, :-1])
    position = np.flatnonzero(equal)
    if position.size:
        first = np.flatnonzero(np.diff(position, prepend=-2) != 1)
        last = np.append(first[1:], position.size) - 1
        rank = (position[first] + position[last] + 1) - 2 * (position[first] // size) * size
        tied = np.repeat(table[rank], last - first + 1)
        flat = scores.ravel()
        flat[position] = tied
        flat[position + 1] = tied
    return scores


def _quantile(ordered: _Array, prob: float) -> _Array:
    """Linear interpolation between order statistics (type 7), of ascending rows."""
    where = (ordered.shape[1] - 1) * prob
    below = int(where)
    weight = where - below
    a, b = ordered[:, below], ordered[:, min(below + 1, ordered.shape[1] - 1)]
    # Interpolating from the nearer end makes the result exact at both.
    value: _Array = b - (b - a) * (1 - weight) if weight >= 0.5 else a + (b - a) * weight
    return value


# --- R-hat -------------------------------------------------------------------------------------


def _split_rhat(means: _Array, variances: _Array, length: int) -> _Array:
    """R-hat from the means and variances of chains of that length, shapes (scalar, M)."""
    return np.sqrt((length - 1) / length + _variance(means) / variances.mean(axis=-1))


def _ranked_rhat(split: _Split, formula: _RHat) -> _Array:
    scores = split.shaped(_in_place(_normal_scores(split.ordered), split.order))
    centre = formula(scores.mean(axis=-1), _variance(scores), scores.shape[-1])
    return split.unless_nan(_worse(centre, _folded_rhat(split, formula)))


def _ranked(split: _Split, low: float, high: float) -> tuple[_Array, _Array, _Array]:
    """Bulk ESS, tail ESS and R-hat."""
    effective, r_hat = _bulk(split)
    tail = np.minimum(split.quantile_ess(low), split.quantile_ess(high))
    return effective, tail, r_hat


def _bulk(split: _Split) -> tuple[_Array, _Array]:
    """Bulk ESS and R-hat."""
    scores = split.shaped(_in_place(_normal_scores(split.ordered), split.order))
    bulk = _autocorrelated(scores, split.constant)
    chains = scores.shape[1] // 2
    if chains < 2:
        r_hat = np.full(len(scores), np.nan)
    else:
        centre = _split_rhat(bulk.means, bulk.variances, scores.shape[-1])
        r_hat = _worse(centre, _folded_rhat(split, _split_rhat))
    return split.unless_nan(bulk.ess), split.unless_nan(r_hat)


def _worse(centre: _Array, folded: _Array) -> _Array:
    # Draws with two equally frequent values have no folded R-hat (NaN).
    return np.where(folded > centre, folded, centre)


def _folded_rhat(split: _Split, formula: _RHat) -> _Array:
    """R-hat of the distances from the median."""
    ordered, order = split.ordered, split.order
    half = ordered.shape[1] // 2
    median = (ordered[:, half - 1] + ordered[:, half])[:, None] / 2
    # Going outwards from the median, distances ascend on either side: merge two sorted runs.
    distance = np.empty(ordered.shape)
    np.subtract(median, ordered[:, half - 1 :: -1], out=distance[:, :half])
    np.subtract(ordered[:, half:], median, out=distance[:, half:])
    outwards = np.concatenate([order[:, half - 1 :: -1], order[:, half:]], axis=1)
    merged = _stable_argsort(distance)
    scores = _normal_scores(distance.ravel().take(merged))
    scores = split.shaped(_in_place(scores, outwards.ravel().take(merged)))
    r_hat = formula(scores.mean(axis=-1), _variance(scores), scores.shape[-1])
    return np.where(np.isfinite(median[:, 0]), r_hat, np.nan)


# --- effective sample size ---------------------------------------------------------------------


class _Autocorrelated(NamedTuple):
    """ESS of a sequence; means and variances of its half-chains, shape (scalar, M)."""

    ess: _Array
    means: _Array
    variances: _Array


def _narrow(values: _Array) -> _Mask:
    """Whether the values of a scalar count as constant."""
    flat = values.reshape(len(values), -1)
    return flat.max(axis=1) - flat.min(axis=1) < _CONSTANT


def _plain_ess(block: _Array) -> _Array:
    halves = _halves(block)
    effective = _autocorrelated(halves, _narrow(halves)).ess
    return np.where(np.isnan(block).any(axis=(1, 2)), np.nan, effective)


def _autocorrelated(sequence: _Array, constant: _Mask) -> _Autocorrelated:
    """ESS of a sequence per scalar.

    Args:
        sequence: shape (scalar, M, N).
        constant: whether a scalar's sequence is constant, shape (scalar,).
    """
    scalars, chains, length = sequence.shape
    means = sequence.mean(axis=-1)
    # Autocorrelations usually fade long before lag N, and fewer lags need a shorter transform.
    # Those that do not are done again at full length.
    full = 2 * max((length - 1) // 2, 1)
    lags = min(full, 2 * max(length // 8, 8))
    centred = _room(scalars, chains, length, lags)
    np.subtract(sequence, means[..., None], out=centred[..., :length])
    variances = _sum_of_squares(centred[..., :length]) / (length - 1)
    within, between = variances.mean(axis=-1), _variance(means)
    tau, complete = _geyer(_autocovariance(centred, length, lags), within, between, length)
    if lags < full and not complete.all():
        todo = np.flatnonzero(~complete)
        longer = _room(len(todo), chains, length, full)
        longer[..., :length] = centred[todo, :, :length]
        covariance = _autocovariance(longer, length, full)
        tau[todo], _ = _geyer(covariance, within[todo], between[todo], length)
    size = chains * length
    effective = size / np.maximum(tau, 1 / np.log10(size))
    return _Autocorrelated(np.where(constant, size, effective), means, variances)


def _room(scalars: int, chains: int, length: int, lags: int) -> _Array:
    """Zeros for sequences of that length and enough padding for so many lags."""
    return np.zeros((scalars, chains, fft.next_fast_len(length + lags, real=True)))


def _autocovariance(padded: _Array, length: int, lags: int) -> _Array:
    """Autocovariance at lags 0, 1, ..., lags - 1 with divisor N, averaged over half-chains.

    Args:
        padded: centred sequences, zero from `length` on, shape (scalar, M, longer).

    Returns:
        Shape (scalar, lags).
    """
    scalars, chains, width = padded.shape
    spectrum = fft.rfft(padded).view(np.float64)
    power = np.einsum("smf,smf->sf", spectrum, spectrum).reshape(scalars, -1, 2).sum(axis=-1)
    covariance: _Array = fft.irfft(power, n=width)[:, :lags] / (length * chains)
    return covariance


def _geyer(
    covariance: _Array, within: _Array, between: _Array, length: int
) -> tuple[_Array, _Mask]:
    """Integrated autocorrelation time by Geyer's initial monotone sequence.

    Args:
        covariance: mean autocovariances, shape (scalar, lags), an even number of lags.
        within, between: W, and the variance of the means of the half-chains, shape (scalar,).
        length: N.

    Returns:
        (tau, whether the sequence ended within these lags), shapes (scalar,).
    """
    w = within[:, None]
    v = w * ((length - 1) / length) + between[:, None]
    rho = 1.0 - (w - covariance) / v
    rho[:, 0] = 1.0
    # P_k = rho_2k + rho_2k+1: positive and decreasing for a reversible chain, so the first that
    # is not positive is noise, and so is any increase before it.
    pairs = rho[:, 0::2] + rho[:, 1::2]
    ended = ~(pairs > 0)
    ended_somewhere = ended.any(axis=1)
    stop = np.where(ended_somewhere, ended.argmax(axis=1), pairs.shape[1] - 1)
    decreasing = np.minimum.accumulate(pairs, axis=1)
    decreasing[np.arange(pairs.shape[1]) >= stop[:, None]] = 0.0
    # One more even lag, unless it is negative in a pair that is, too.
    rows = np.arange(len(rho))
    even = rho[rows, 2 * stop]
    even = np.where((even > 0) | (pairs[rows, stop] >= 0), even, 0.0)
    tau = -1.0 + 2.0 * decreasing.sum(axis=1) + even
    return np.where(np.isnan(pairs[:, 0]), np.nan, tau), ended_somewhere
