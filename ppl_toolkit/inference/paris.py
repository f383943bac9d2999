"""Smoothing: what the whole series says of the past.

Given the particles of a filter, the ancestor of particle i at t is j with probability

    lambda_t(j | i) ~ W_{t-1}^j m_t(c_{t-1}^j, x_t^i) g_t(c_{t-1}^j, x_t^i),

where g_t is left out if it does not depend on the carry. Paths drawn backwards with these weights
(`backward_paths`) and expectations of additive functionals carried forwards (`advance_sums`) have
the law that the particles give to the smoothing problem.

Sources: Godsill, Doucet and West (2004), JASA 99, for backward sampling; Olsson and Westerborn
(2017), Bernoulli 23, for PaRIS; Dau and Chopin (2023) for the independent Metropolis-Hastings
chain over ancestors, and why rejection must have an end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from ppl_toolkit.inference.additive import first_sums
from ppl_toolkit.inference.particle_filter import (
    Filter,
    History,
    advance,
    first_population,
    take,
)
from ppl_toolkit.inference.population import Population, normalised
from ppl_toolkit.inference.randomness import categorical, enumerating, over, scanned
from ppl_toolkit.inference.resampling import inverse_cdf
from ppl_toolkit.inference.state_space import Series

__all__ = [
    "REJECTION",
    "Functional",
    "advance_sums",
    "backward_paths",
    "expectation",
    "genealogy",
    "log_joining",
    "paris",
]

REJECTION = "rejection"  # in place of a number of moves
_ROUNDS = 16  # of rejection, before all weights are computed
_AT_ONCE = 64  # particles for which they are

Functional = Callable[[Any, dict[str, Any], Any], Any]


def log_joining(series: Series, carry: Any, t: Any, latents: Any) -> Any:
    """Log m_t + log g_t of one particle's latents after another's carry; without a constant g."""
    step = series.replay(carry, t, latents)
    return step.log_transition + (step.log_observation if series.mixed else 0.0)


def ancestor_weights(series: Series, history: History, t: Any, latents: Any) -> Any:
    """Log lambda_t(. | latents) over the particles before the step, up to a constant, (N,)."""
    joined = jax.vmap(lambda c: log_joining(series, c, t, latents))(history.before)
    return history.log_weights + joined


def advance_sums(
    key: Any,
    series: Series,
    history: History,
    t: Any,
    sums: Any,
    functional: Functional,
    draws: int | None = 2,
    moves: int | str = 4,
) -> Any:
    """tau_t^i from tau_{t-1}^j: expectations of an additive functional given the last particle.

    Args:
        history: of step t.
        sums: tau_{t-1}, arrays (N, ...) in a pytree.
        functional: (carry before the step, its latents, t) -> h_t, of the structure of one sum.
        draws: ancestors J drawn per particle (PaRIS; at least 2 for a variance of order T); None
            for the exact sum over all particles.
        moves: steps of the independent Metropolis-Hastings chain over ancestors, from the one the
            filter drew; 0 for exact draws; "rejection" for exact draws by rejection, for steps
            with one latent of a law whose mode is known.

    Cost: O(N draws moves), or O(N^2) for exact draws and sums. By rejection, 16 rounds and O(N) for
    each particle left, which are few: O(N (log N)^(d/2)) in all for Gaussian-like laws.
    """

    def increment(j: Any, latents: Any) -> Any:
        own = functional(take(history.before, j), latents, t)
        return jax.tree.map(jnp.add, take(sums, j), own)

    def exactly(latents: Any) -> Any:
        shares = jnp.exp(normalised(ancestor_weights(series, history, t, latents))[0])
        every = jax.vmap(lambda j: increment(j, latents))(jnp.arange(shares.shape[0]))
        return jax.tree.map(lambda x: jnp.tensordot(shares, x, 1), every)

    if draws is None:
        return jax.vmap(exactly)(history.latents)
    ancestors = drawn_ancestors(key, series, history, t, history.latents, history.ancestors,
                                draws, moves)  # fmt: skip

    def mean(js: Any, latents: Any) -> Any:
        several = jax.vmap(lambda j: increment(j, latents))(js)
        return jax.tree.map(lambda x: jnp.mean(x, 0), several)

    return jax.vmap(mean)(ancestors, history.latents)


def paris(
    key: Any,
    series: Series,
    options: Filter,
    functional: Functional,
    start: Callable[[dict[str, Any]], Any],
    draws: int | None = 2,
    moves: int | str = 4,
) -> tuple[Population, Any]:
    """A filter that carries expectations of an additive functional along.

    Args:
        functional: h_t, see `advance_sums`.
        start: initial sites of one particle -> h_0, of the structure of one sum.
        draws, moves: see `advance_sums`.

    Returns:
        The last population of carries, and the estimate of E[h_0 + sum_t h_t | y].

    Cost: O(T) times that of `advance_sums`; memory O(N).
    """
    key_start, key_steps = random.split(key)
    first, initial = first_population(key_start, series, options.particles)

    def step(state: tuple[Population, Any], t: Any) -> tuple[tuple[Population, Any], None]:
        population, sums = state
        key_step, key_sums = random.split(random.fold_in(key_steps, t))
        new, history, _ = advance(key_step, series, population, t, options)
        sums = advance_sums(key_sums, series, history, t, sums, functional, draws, moves)
        return (new, sums), None

    sums = first_sums(start, initial, options.particles)
    (last, sums), _ = scanned(step, (first, sums), series.length)
    return last, expectation(last, sums)


def expectation(population: Population, values: Any) -> Any:
    """Weighted means of arrays (N, ...)."""
    shares = jnp.exp(population.log_weights)
    return jax.tree.map(lambda x: jnp.tensordot(shares, x, 1), values)


def drawn_ancestors(
    key: Any, series: Series, history: History, t: Any, latents: Any, first: Any, draws: int,
    moves: int | str,
) -> Any:  # fmt: skip
    """Ancestors (M, draws) of M particles, from lambda_t or from a chain that leaves it invariant.

    Args:
        latents: of the M particles, arrays (M, ...).
        first: where the chains begin: ancestors (M,) with which the particles were made.
    """
    count = first.shape[0]
    if moves == REJECTION and not enumerating():
        return _by_rejection(key, series, history, t, latents, count, draws)
    if moves in (0, REJECTION):
        keys = random.split(key, (count, draws))

        def exact(keys: Any, latents: Any) -> Any:
            weights = ancestor_weights(series, history, t, latents)
            if enumerating():
                return over(lambda k: categorical(k, weights), keys)
            uniforms = jax.vmap(lambda k: random.uniform(k, (), weights.dtype))(keys)
            return inverse_cdf(jnp.exp(normalised(weights)[0]), uniforms)

        return over(exact, keys, latents)

    def joined(carries: Any, latents: Any) -> Any:
        return jax.vmap(lambda c: log_joining(series, c, t, latents))(carries)

    key_proposed, key_accept = random.split(key)
    shares = jnp.exp(normalised(history.log_weights)[0])
    moves = int(moves)
    size = count * draws * moves  # drawn in one row: quicker than in the shape of the chains
    uniforms = [random.uniform(k, (size,), shares.dtype) for k in (key_proposed, key_accept)]
    proposed = inverse_cdf(shares, uniforms[0]).reshape(count, -1)
    every = jnp.concatenate([first[:, None], proposed], axis=1)
    now, *others = jnp.split(jax.vmap(joined)(take(history.before, every), latents), [1], axis=1)
    chains = (proposed, others[0], jnp.log(uniforms[1]).reshape(count, -1))
    j, now = (jnp.broadcast_to(x, (count, draws)) for x in (first[:, None], now))
    for new, log_new, log_u in zip(*(_by_moves(x, moves) for x in chains), strict=True):
        accepted = log_u < log_new - now
        j, now = jnp.where(accepted, new, j), jnp.where(accepted, log_new, now)
    return j


def _by_rejection(
    key: Any, series: Series, history: History, t: Any, latents: Any, count: int, draws: int
) -> Any:
    """Exact draws from lambda_t, ancestors (M, draws).

    A particle j drawn by its weight is taken with probability m_t(x | c_j) / max m_t. Those that
    are still without an ancestor after some rounds get theirs from all weights, 64 at a time. (With
    no such end, the number of rounds would have an infinite mean: x was drawn from the mixture of
    the m_t(. | c_j) itself.)
    """
    lanes = count * draws
    row = jnp.arange(lanes) // draws
    shares = jnp.exp(normalised(history.log_weights)[0])
    peaks = jax.vmap(lambda c: series.log_peak(c, t))(history.before)
    bound = jnp.max(jnp.where(shares > 0, peaks, -jnp.inf))
    key_rounds, key_rest = random.split(key)

    def one_round(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        number, j, done = state
        u, v = random.uniform(random.fold_in(key_rounds, number), (2, lanes), shares.dtype)
        proposed = inverse_cdf(shares, u).astype(j.dtype)
        density = jax.vmap(lambda c, x: log_joining(series, c, t, x))(
            take(history.before, proposed), take(latents, row)
        )
        taken = ~done & (jnp.log(v) < density - bound)
        return number + 1, jnp.where(taken, proposed, j), done | taken

    def rest(state: tuple[Any, Any]) -> tuple[Any, Any]:
        j, done = state
        here = jnp.nonzero(~done, size=min(_AT_ONCE, lanes), fill_value=lanes)[0]

        def exactly(lane: Any) -> Any:
            weights = ancestor_weights(series, history, t, take(latents, row[lane]))
            u = random.uniform(random.fold_in(key_rest, lane), (1,), shares.dtype)
            return inverse_cdf(jnp.exp(normalised(weights)[0]), u)[0].astype(j.dtype)

        drawn = jax.vmap(exactly)(here)
        return j.at[here].set(drawn, mode="drop"), done.at[here].set(True, mode="drop")

    begin = (jnp.zeros((), jnp.int32), jnp.zeros(lanes, jnp.int32), jnp.zeros(lanes, bool))
    _, j, done = lax.while_loop(
        lambda s: (s[0] < _ROUNDS) & ~jnp.all(s[2]), one_round, begin
    )  # fmt: skip
    j, _ = lax.while_loop(lambda s: ~jnp.all(s[1]), rest, (j, done))
    return j.reshape(count, draws)


def _by_moves(x: Any, moves: int) -> Any:
    """Arrays (M, draws) of every move, of those of all chains together."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, moves), -1, 0)


def backward_paths(
    key: Any,
    series: Series,
    initial: Any,
    history: History,
    log_weights: Any,
    count: int,
    moves: int | str = 0,
) -> tuple[Any, Any]:
    """Paths drawn backwards from the last particles.

    Args:
        initial: initial sites of the particles at the start, arrays (N, ...).
        history: of all steps, arrays (T, N, ...).
        log_weights: of the last particles, (N,).
        count: number of paths M.
        moves: as in `advance_sums`; a chain begins at the filter's own ancestor.

    Returns:
        Initial sites, arrays (M, ...), and latents of the steps, arrays (T, M, ...).

    Cost: O(M N T), or O(M moves T).
    """
    key_last, key_path = random.split(key)
    last = over(lambda k: categorical(k, log_weights), random.split(key_last, count))
    last = last.astype(history.ancestors.dtype)

    def back(chosen: Any, t: Any) -> tuple[Any, Any]:
        here = take(history, t)
        latents = take(here.latents, chosen)
        before = drawn_ancestors(random.fold_in(key_path, t), series, here, t, latents,
                                 here.ancestors[chosen], 1, moves)[:, 0]  # fmt: skip
        return before, latents

    first, latents = backwards(back, last, series.length)
    return take(initial, first), latents


def genealogy(
    key: Any, series: Series, initial: Any, history: History, log_weights: Any, count: int
) -> tuple[Any, Any]:
    """Paths along the ancestors that the filter drew; arguments and result as `backward_paths`.

    Cost: O(M T). Early steps of long series have few ancestors left.
    """
    last = over(lambda k: categorical(k, log_weights), random.split(key, count))

    def back(chosen: Any, t: Any) -> tuple[Any, Any]:
        here = take(history, t)
        return here.ancestors[chosen], take(here.latents, chosen)

    first, latents = backwards(back, last.astype(history.ancestors.dtype), series.length)
    return take(initial, first), latents


def backwards(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, count: int) -> Any:
    """`scanned` for t = count - 1, ..., 0; outputs are in the order of time."""
    carry, outputs = scanned(lambda c, i: body(c, count - 1 - i), carry, count)
    return carry, jax.tree.map(lambda x: x[::-1], outputs)
