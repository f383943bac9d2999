"""The parts of one stage of an SMC sampler: where to go, the weights there, the moves there.

A sampler follows the path of laws p(x) prod_b L_b(x)^clip(s - b, 0, 1), s from 0 (the prior) to B
(the posterior), L_b the likelihood of batch b of the data. One batch is tempering by powers of the
likelihood; with more, batch after batch comes in, none of them twice.

Its particles are in *generations*: generation g was moved by a kernel that leaves the law at s_g
invariant, and the evidence there was estimated as Z_g. At s a particle has the weight

    w(x) = L_s(x) / [ (1 / t) sum_g L_{s_g}(x) / Z_g ],

the sum over the t generations that are kept, and Z_s is estimated by the mean weight. With one
generation that is the textbook's sampler, w(x) = Z_g L_s(x) / L_{s_g}(x); with more it is
persistent sampling (Karamanis and Seljak 2025, Statistics and Computing 35).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from ppl_toolkit.inference.kernel import Info, Kernel
from ppl_toolkit.inference.population import effective_size
from ppl_toolkit.inference.randomness import enumerating, over, repeated

__all__ = [
    "Generations",
    "Moved",
    "Particles",
    "chains_of_moves",
    "chains_variance",
    "log_weights",
    "moves_of",
    "next_point",
    "tempered_likelihood",
    "until_moved",
]

_HALVINGS = 50
_GROWTH = 0.02


class Particles(NamedTuple):
    """Positions by site (K, ...), their log prior densities (K,), and log likelihoods (K, B)."""

    position: dict[str, Any]
    log_prior: Float[Array, " K"]
    log_likelihood: Float[Array, "K B"]


class Generations(NamedTuple):
    """Particles of the last G generations, one after the other.

    Attributes:
        particles: K = G N of them.
        born: the point s_g of the path where each generation was moved, (G,).
        log_evidence: log Z_g, (G,); infinite where there is no generation yet.
    """

    particles: Particles
    born: Float[Array, " G"]
    log_evidence: Float[Array, " G"]


def tempered_likelihood(point: Any, log_likelihood: Float[Array, "*K B"]) -> Float[Array, "*K"]:
    """Log L_s: the sum of batch b's log likelihood times clip(s - b, 0, 1)."""
    powers = jnp.clip(point - jnp.arange(log_likelihood.shape[-1]), 0.0, 1.0)
    return jnp.sum(jnp.where(powers > 0, powers * log_likelihood, 0.0), -1)


def log_weights(generations: Generations, point: Any) -> Float[Array, " K"]:
    """Log w at the point s; their mean over the generations' particles estimates the evidence.

    The particles of generations that are not there yet have weight zero, and the others carry
    their share, so that the mean is over all K.
    """
    cloud, born, evidence = generations
    there = jnp.isfinite(evidence)
    mixture = logsumexp(
        jnp.stack(
            [
                tempered_likelihood(born[g], cloud.log_likelihood) - evidence[g]
                for g in range(born.shape[0])
            ]
        ),
        0,
    )
    alive = jnp.repeat(there, cloud.log_prior.shape[0] // born.shape[0])
    weights = tempered_likelihood(point, cloud.log_likelihood) - mixture
    # (1/K) sum = (1/(t N)) sum * t / G, and the mixture lacks its 1 / t: what remains is G.
    return jnp.where(alive, weights + jnp.log(float(born.shape[0])), -jnp.inf)


def next_point(generations: Generations, point: Any, least: Any) -> Any:
    """The first point of the path where the effective sample size is down to ``least``; else B.

    Particles that the whole data give no weight to do not count: ``least`` shrinks by their share.
    Cost: O(K B) for each of B ends of batches, and 50 halvings.
    """
    cloud = generations.particles
    batches = cloud.log_likelihood.shape[1]
    now = log_weights(generations, point)
    possible = jnp.isfinite(log_weights(generations, batches))
    full, alive = effective_size(now), effective_size(jnp.where(possible, now, -jnp.inf))
    least = least * alive / jnp.maximum(full, 1.0)

    def size(s: Any) -> Any:
        return effective_size(log_weights(generations, s))

    ends = jnp.arange(1, batches + 1).astype(now.dtype)
    sizes = lax.map(size, ends)
    short = (ends > point) & (sizes < least)
    which = jnp.argmax(short)
    low = jnp.maximum(point, ends[which] - 1.0)

    def halved(_: Any, interval: tuple) -> tuple:
        low, high = interval
        middle = 0.5 * (low + high)
        enough = size(middle) >= least
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    _, found = lax.fori_loop(0, _HALVINGS, halved, (low, ends[which]))
    return jnp.where(jnp.any(short), found, float(batches))


# -- moves -------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """What the moves of a stage gave.

    Attributes:
        position: by site, (N, ...).
        acceptance: mean over particles and moves; NaN if the kernel does not accept.
        step_size: mean; NaN if it has none.
        moves: of every particle.
    """

    position: dict[str, Any]
    acceptance: Float[Array, ""]
    step_size: Float[Array, ""]
    moves: Int[Array, ""]


def _mean_of(info: Info, name: str) -> Any:
    """The mean over particles of a statistic, whatever part of a composed kernel it comes from."""
    values = [jnp.mean(value) for key, value in info.items() if key.split(".")[0] == name]
    return sum(values) / len(values) if values else jnp.asarray(jnp.nan)


class _Herd(NamedTuple):
    """Many particles moved by one kernel: what it has learned is kept once for all of them."""

    step: Callable[[Any, Any], tuple[Any, Any]]  # (key, own parts of the states) -> ...
    own: Any
    position: Callable[[Any], Any]


def _herd(kernel: Kernel, learned: Any, positions: Mapping[str, Any]) -> _Herd:
    one = jax.tree.map(lambda x: x[0], dict(positions))
    refreshed = over(lambda x: kernel.refresh(learned, x), dict(positions))
    leaves, tree = jax.tree.flatten(refreshed)
    fixed = jax.tree.leaves(learned)
    shared = [False] * len(leaves) if enumerating() else _kept_by_steps(kernel, learned, one)
    own = [leaf for leaf, is_shared in zip(leaves, shared, strict=True) if not is_shared]

    def whole(own: list[Any]) -> Any:
        rest = iter(own)
        both = zip(fixed, shared, strict=True)
        return jax.tree.unflatten(
            tree, [old if is_shared else next(rest) for old, is_shared in both]
        )

    def step(keys: Any, own: list[Any]) -> tuple[list[Any], Info]:
        def moved(key: Any, own: list[Any]) -> tuple[list[Any], Info]:
            state, info = kernel.step(key, whole(own))
            both = zip(jax.tree.leaves(state), shared, strict=True)
            return [leaf for leaf, is_shared in both if not is_shared], info

        return over(moved, keys, own)

    return _Herd(step, own, lambda own: dict(whole(own).position))


def _kept_by_steps(kernel: Kernel, learned: Any, position: Any) -> list[bool]:
    """Which leaves of a kernel's state neither a refresh nor a step ever changes."""
    count = len(jax.tree.leaves(learned))
    key = random.key(0)
    kept = [True] * count
    for function, argument in (
        (lambda s, x: kernel.refresh(s, x), position),
        (lambda s, k: kernel.step(k, s)[0], key),
    ):
        jaxpr = jax.make_jaxpr(function)(learned, argument).jaxpr
        pairs = zip(jaxpr.invars[:count], jaxpr.outvars, strict=True)
        kept = [old and before is after for old, (before, after) in zip(kept, pairs, strict=True)]
    return kept


def _distance(new: Mapping[str, Any], old: Mapping[str, Any], spread: Mapping[str, Any]) -> Any:
    """Mean over particles of the squared distance, in standard deviations of the cloud.

    A discrete element counts one where it has changed.
    """
    total: Any = 0.0
    for name, x in new.items():
        real = jnp.issubdtype(x.dtype, jnp.floating)
        change = (x - old[name]) / spread[name] if real else 1.0 * (x != old[name])
        total = total + jnp.sum(change.reshape(x.shape[0], -1) ** 2, 1)
    return jnp.mean(total)


def moves_of(
    key: Any,
    kernel: Kernel,
    learned: Any,
    positions: Mapping[str, Any],
    count: int | None,
    most: int,
) -> Moved:
    """Moves of all particles.

    Args:
        key: random key.
        kernel: bound to the law to leave invariant.
        learned: a state of it, for what it has learned.
        positions: by site, (N, ...).
        count: moves per particle; None: until the mean squared distance from the start grows by
            less than a fiftieth per move, or ``most`` moves are made.
        most: see ``count``.
    """
    herd = _herd(kernel, learned, positions)
    size = jax.tree.leaves(dict(positions))[0].shape[0]

    def move(i: Any, own: Any) -> tuple[Any, Any]:
        own, info = herd.step(random.split(random.fold_in(key, i), size), own)
        now = jnp.stack([_mean_of(info, "acceptance_rate"), _mean_of(info, "step_size")])
        return own, now

    own, means, done = until_moved(move, herd.own, herd.position, positions, count, most)
    return Moved(herd.position(own), means[0], means[1], done)


def until_moved(
    move: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    position: Callable[[Any], Mapping[str, Any]],
    starts: Mapping[str, Any],
    count: int | None,
    most: int,
    growth: float = _GROWTH,
) -> tuple[Any, Any, Any]:
    """Moves of a cloud: so many, or until more of them would take it hardly further.

    Args:
        move: (number of the move, state) -> new state, two statistics.
        state: of the cloud, any pytree.
        position: state -> positions by site, (N, ...).
        starts: the first of these.
        count: moves; None: until the mean squared distance from the start grows by less than
            ``growth`` per move, or ``most`` moves are made.

    Returns:
        The last state, the means of the statistics over the moves (2,), and the number of these.
    """

    def moved(i: Any, state: Any, sums: Any) -> tuple[Any, Any]:
        state, now = move(i, state)
        return state, sums + now

    zero = jnp.zeros(2)
    if count is not None:
        state, sums = repeated(count, lambda i, carry: moved(i, *carry), (state, zero))
        return state, sums / max(count, 1), jnp.asarray(count, jnp.int32)

    spread = {name: jnp.where((sd := jnp.std(x, 0)) > 0, sd, 1.0) for name, x in starts.items()}

    def again(carry: tuple) -> tuple:
        i, state, sums, far, _ = carry
        state, sums = moved(i, state, sums)
        now = _distance(position(state), starts, spread)
        return i + 1, state, sums, now, now > (1.0 + growth) * far

    start = (jnp.zeros((), jnp.int32), state, zero, jnp.asarray(0.0), jnp.asarray(True))
    done, state, sums, _, _ = lax.while_loop(lambda c: (c[0] < most) & c[4], again, start)
    return state, sums / jnp.maximum(done, 1), done


def chains_of_moves(
    key: Any, kernel: Kernel, learned: Any, positions: Mapping[str, Any], length: int
) -> Moved:
    """Chains of ``length`` states from M starts; all M P states count (waste-free).

    Returns:
        Positions (M P, ...), the states of a chain one after the other.
    """
    herd = _herd(kernel, learned, positions)
    size = jax.tree.leaves(dict(positions))[0].shape[0]

    def move(own: Any, i: Any) -> tuple[Any, tuple]:
        own, info = herd.step(random.split(random.fold_in(key, i), size), own)
        means = jnp.stack([_mean_of(info, "acceptance_rate"), _mean_of(info, "step_size")])
        return own, (herd.position(own), means)

    _, (later, means) = lax.scan(move, herd.own, jnp.arange(length - 1))

    def joined(first: Any, rest: Any) -> Any:
        every = jnp.swapaxes(jnp.concatenate([first[None], rest]), 0, 1)
        return every.reshape(size * length, *first.shape[1:])

    position = jax.tree.map(joined, dict(positions), later)
    mean = jnp.mean(means, 0)
    return Moved(position, mean[0], mean[1], jnp.asarray(length - 1, jnp.int32))


def chains_variance(log_weights: Float[Array, " N"], length: int) -> Float[Array, ""]:
    """Relative variance of the mean weight of M independent chains of P states.

    The autocovariances are pooled over the chains, and summed in pairs while the pairs are positive
    (Geyer's initial sequence). Source: Dau and Chopin (2022), JRSS B 84, section 4.
    """
    weights = jnp.exp(log_weights - logsumexp(log_weights)) * log_weights.shape[0]
    x = (weights - 1.0).reshape(-1, length)  # the mean weight is one

    def autocovariance(lag: Any) -> Any:
        later = jnp.roll(x, -lag, 1)
        pairs = jnp.where(jnp.arange(length) < length - lag, x * later, 0.0)
        return jnp.sum(pairs) / (x.shape[0] * (length - lag))

    gamma = lax.map(autocovariance, jnp.arange(length - length % 2))
    pairs = gamma[0::2] + gamma[1::2]
    positive = jnp.cumprod(pairs > 0)
    total = jnp.maximum(2.0 * jnp.sum(pairs * positive) - gamma[0], 0.0)
    return total / log_weights.shape[0]
