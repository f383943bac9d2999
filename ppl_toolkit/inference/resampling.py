"""Resampling: ancestors drawn in proportion to their weights.

Every scheme is a function (key, weights (N,) that sum to one, M) -> ancestors (M,): particle i has
M W_i children on average. M = N as a rule.
Sources: Douc, Cappé and Moulines (2005) for multinomial, residual, stratified and systematic;
Gerber, Chopin and Whiteley (2019) for SSP; Del Moral (2004) for killing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax, random
from jaxtyping import Array, Float, Int

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.randomness import categorical, continuous, enumerating, over

__all__ = ["SCHEMES", "inverse_cdf", "resample", "running_sum", "scheme_named"]

Weights = Float[Array, " N"]
Ancestors = Int[Array, " M"]
Scheme = Callable[[Any, Weights, int], Ancestors]


def _in_blocks(op: Callable[[Any, Any], Any], start: Any, x: Any) -> Any:
    """Start op x_0, (start op x_0) op x_1, ... for N numbers, in about sqrt(N) blocks.

    All blocks move on together, one number at a time. On CPUs that is quicker than XLA's own
    running sums, which go over every number 16 times, and than a tree, which takes longer to
    compile. For ``op`` that does not decrease, the result does not either, whatever the rounding.
    """
    width = math.isqrt(x.shape[0] - 1) + 1
    short = -x.shape[0] % width
    start = jnp.asarray(start, x.dtype)
    blocks = jnp.pad(x, (0, short)).reshape(-1, width)

    def step(total: Any, new: Any) -> tuple[Any, Any]:
        total = op(total, new)
        return total, total

    totals, inside = lax.scan(step, jnp.broadcast_to(start, blocks.shape[:1]), blocks.T)
    _, before = lax.scan(lambda total, new: (op(total, new), total), start, totals)
    return op(before[:, None], inside.T).reshape(-1)[: x.shape[0]]


def running_sum(x: Float[Array, " N"]) -> Float[Array, " N"]:
    """Sums of the first 1, ..., N numbers."""
    in_blocks = functools.partial(_in_blocks, jnp.add, 0)
    return lax.platform_dependent(x, cpu=in_blocks, default=jnp.cumsum)


def _running_max(x: Int[Array, " N"]) -> Int[Array, " N"]:
    """Maxima of the first 1, ..., N numbers, which are not negative."""
    in_blocks = functools.partial(_in_blocks, jnp.maximum, 0)
    return lax.platform_dependent(x, cpu=in_blocks, default=lax.cummax)


def inverse_cdf(weights: Weights, uniforms: Float[Array, " M"]) -> Ancestors:
    """The particles whose share of (0, 1) the ``uniforms`` fall into: the inverse of the CDF.

    A particle without weight is never taken, whatever the rounding.
    """
    cumulative = running_sum(weights)
    last = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
    found = jnp.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    return jnp.minimum(found, last).astype(jnp.int32)


def _by_strata(weights: Weights, shifts: Any, count: int) -> Ancestors:
    """`inverse_cdf` at the points (i + shift_i) / M, one in each of M strata: O(N + M), no search.

    Args:
        weights: (N,).
        shifts: in [0, 1), (M,), or one for all strata.
        count: M.

    Below M C lie the points 0, ..., floor(M C) - 1, and the next one if its shift is below the
    fraction of M C. So each particle knows where its points begin, from the sum C of the weights
    before it; the ancestor of a point is the last particle, of those with weight, that begins at or
    before it.
    """
    cumulative = running_sum(weights)
    before = jnp.concatenate([jnp.zeros(1, cumulative.dtype), cumulative[:-1]])
    ends = jnp.minimum(before * (count / cumulative[-1]), count)
    if jnp.ndim(shifts) == 0:
        begins = jnp.ceil(ends - shifts).astype(jnp.int32)
    else:
        points = jnp.floor(ends).astype(jnp.int32)
        begins = points + (shifts[jnp.minimum(points, count - 1)] < ends - points)
    numbers = jnp.arange(weights.shape[0], dtype=jnp.int32)
    latest = jnp.zeros(count, jnp.int32).at[jnp.where(weights > 0, begins, count)]
    return _running_max(latest.max(numbers, mode="drop"))


def _multinomial(key: Any, weights: Weights, count: int) -> Ancestors:
    """Independent draws: O(M log N)."""
    if enumerating():
        return over(lambda k: categorical(k, jnp.log(weights)), random.split(key, count))
    return inverse_cdf(weights, random.uniform(key, (count,), weights.dtype))


def _stratified(key: Any, weights: Weights, count: int) -> Ancestors:
    """One uniform in each of M strata."""
    continuous("stratified resampling")
    return _by_strata(weights, random.uniform(key, (count,), weights.dtype), count)


def _systematic(key: Any, weights: Weights, count: int) -> Ancestors:
    """The same uniform in each of M strata: counts are floor or ceil of M W."""
    continuous("systematic resampling")
    return _by_strata(weights, random.uniform(key, (), weights.dtype), count)


def _whole_and_rest(weights: Weights, count: int) -> tuple[Int[Array, " N"], Weights]:
    """The integer and the fractional parts of M W."""
    expected = count * weights / jnp.sum(weights)
    whole = jnp.floor(expected)
    return whole.astype(jnp.int32), expected - whole


def _repeated(counts: Int[Array, " N"], count: int) -> Ancestors:
    """Every particle as often as ``counts`` says."""
    numbers = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.repeat(numbers, counts, total_repeat_length=count)


def _residual(key: Any, weights: Weights, count: int) -> Ancestors:
    """floor(M W) copies, and independent draws for the rest."""
    whole, rest = _whole_and_rest(weights, count)
    total = jnp.sum(rest)
    left = jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), weights)
    drawn = _multinomial(key, left, count)
    return jnp.where(jnp.arange(count) < jnp.sum(whole), _repeated(whole, count), drawn)


def _ssp(key: Any, weights: Weights, count: int) -> Ancestors:
    """Counts floor or ceil of M W, rounded pair by pair: O(N), one particle after the other.

    The fractions p, q of the particle still open and of the next one become (p + q, 0) or
    (0, p + q), or where p + q >= 1 (1, p + q - 1) or (p + q - 1, 1), with the same means.
    """
    continuous("SSP resampling")
    whole, rest = _whole_and_rest(weights, count)
    numbers = jnp.arange(weights.shape[0], dtype=jnp.int32)
    uniforms = random.uniform(key, weights.shape, weights.dtype)

    def pair(unsettled: tuple[Any, Any], step: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        (a, p), (b, q, u) = unsettled, step
        total = p + q
        full = total >= 1
        chance = jnp.where(full, 1 - q, p) / jnp.maximum(jnp.where(full, 2 - total, total), 1e-300)
        first = (u < chance) | (total == 0)  # a gets the one, or all there is
        left = jnp.where(full, total - 1, total)
        a_stays = first ^ full
        settled = jnp.where(a_stays, b, a)
        return (jnp.where(a_stays, a, b), left), (settled, full.astype(jnp.int32))

    first, others = (numbers[0], rest[0]), (numbers[1:], rest[1:], uniforms[1:])
    (last, _), closed = lax.scan(pair, first, others)
    counts = whole.at[closed[0]].add(closed[1])
    missing = count - jnp.sum(counts, dtype=counts.dtype)  # the last one's fraction is 0 or 1
    counts = counts.at[last].add(missing)
    return _repeated(counts, count)


def _killing(key: Any, weights: Weights, count: int) -> Ancestors:
    """Particle i stays with probability W_i / max W; else an independent draw takes its place."""
    continuous("killing")
    if count != weights.shape[0]:
        raise OptionError("resampling='killing' cannot change the number of particles.")
    key_stay, key_draw = random.split(key)
    stays = random.uniform(key_stay, weights.shape, weights.dtype) * jnp.max(weights) < weights
    return jnp.where(stays, jnp.arange(count), _multinomial(key_draw, weights, count))


SCHEMES: dict[str, Scheme] = {
    "multinomial": _multinomial,
    "stratified": _stratified,
    "systematic": _systematic,
    "residual": _residual,
    "ssp": _ssp,
    "killing": _killing,
}


def scheme_named(name: Any) -> Scheme:
    """A scheme by its name.

    Raises:
        OptionError: there is none of this name.
    """
    if name not in SCHEMES:
        raise OptionError(f"resampling must be one of {list(SCHEMES)}; got {name!r:.60}.")
    return SCHEMES[name]


def resample(
    key: Any, log_weights: Weights, scheme: str = "systematic", count: int | None = None
) -> Ancestors:
    """Ancestors (M,) such that particle i has M W_i children on average.

    Args:
        key: random key.
        log_weights: logs of weights, up to a constant, (N,); NaN counts as weight zero. Where all
            weights are zero, ancestor i is particle i (modulo N).
        scheme: "multinomial", "stratified", "systematic", "residual", "ssp" (Srinivasan sampling
            process) or "killing".
        count: M; N if None.

    Cost: O(N); O(N log N) for those with independent draws ("multinomial", "residual", "killing").
        "ssp" goes through one particle after the other.

    Raises:
        OptionError: there is no such scheme.
    """
    draw = scheme_named(scheme)
    size = log_weights.shape[0]
    count = size if count is None else count
    clean = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    highest = jnp.max(clean)
    alive = jnp.isfinite(highest)
    weights = jnp.where(alive, jnp.exp(clean - jnp.where(alive, highest, 0.0)), 1.0)
    ancestors = draw(key, weights / jnp.sum(weights), count)
    return jnp.where(alive, ancestors, jnp.arange(count) % size).astype(jnp.int32)
