"""Resampling: ancestors drawn in proportion to their weights.

Every scheme is a function (key, weights (N,) that sum to one, M) -> ancestors (M,): particle i has
M W_i children on average. M = N as a rule.
Sources: Douc, Cappé and Moulines (2005) for multinomial, residual, stratified and systematic;
Gerber, Chopin and Whiteley (2019) for SSP; Del Moral (2004) for killing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax, random
from jaxtyping import Array, Float, Int

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.randomness import categorical, continuous, enumerating, over

__all__ = ["SCHEMES", "inverse_cdf", "resample", "scheme_named"]

Weights = Float[Array, " N"]
Ancestors = Int[Array, " M"]
Scheme = Callable[[Any, Weights, int], Ancestors]


def inverse_cdf(weights: Weights, uniforms: Float[Array, " M"]) -> Ancestors:
    """The particles whose share of (0, 1) the ``uniforms`` fall into: the inverse of the CDF.

    A particle without weight is never taken, whatever the rounding.
    """
    cumulative = jnp.cumsum(weights)
    last = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
    found = jnp.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    return jnp.minimum(found, last).astype(jnp.int32)


def _multinomial(key: Any, weights: Weights, count: int) -> Ancestors:
    """Independent draws: O(M log N)."""
    if enumerating():
        return over(lambda k: categorical(k, jnp.log(weights)), random.split(key, count))
    return inverse_cdf(weights, random.uniform(key, (count,), weights.dtype))


def _stratified(key: Any, weights: Weights, count: int) -> Ancestors:
    """One uniform in each of M strata."""
    continuous("stratified resampling")
    shifts = random.uniform(key, (count,), weights.dtype)
    return inverse_cdf(weights, (jnp.arange(count) + shifts) / count)


def _systematic(key: Any, weights: Weights, count: int) -> Ancestors:
    """The same uniform in each of M strata: counts are floor or ceil of M W."""
    continuous("systematic resampling")
    shift = random.uniform(key, (), weights.dtype)
    return inverse_cdf(weights, (jnp.arange(count) + shift) / count)


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

    Cost: O(N log N); "ssp" is O(N), but one particle after the other.

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
