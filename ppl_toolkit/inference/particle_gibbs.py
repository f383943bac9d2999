"""Particle Gibbs: a path of the series is moved by a filter that must keep it.

A conditional sweep runs a filter whose particle 0 is the path of before, and then draws a new path.
It leaves the smoothing law invariant for every number of particles N >= 2. The sums that PaRIS
carries along such a sweep have, if the path of before follows the smoothing law, exactly its
expectations as their own; averaged over sweeps after the first k_0 they are the estimate of PaRIS
particle Gibbs.

Sources: Andrieu, Doucet and Holenstein (2010), JRSS B 72; Lindsten, Jordan and Schön (2014), JMLR
15, for ancestor sampling; Cardoso et al. (2023), ICML, for PaRIS particle Gibbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.scipy.special import logsumexp

from ppl_toolkit.inference.additive import first_sums
from ppl_toolkit.inference.paris import (
    Functional,
    advance_sums,
    backward_paths,
    expectation,
    genealogy,
)
from ppl_toolkit.inference.particle_filter import (
    Filter,
    History,
    looked_ahead,
    take,
    weighed,
)
from ppl_toolkit.inference.population import Population, normalised
from ppl_toolkit.inference.randomness import categorical, over, scanned
from ppl_toolkit.inference.resampling import resample
from ppl_toolkit.inference.state_space import Series, Step

__all__ = ["Path", "conditional_step", "renewed", "start_at_path", "sweep", "usual_particles"]


def usual_particles(length: int) -> int:
    """N of conditional sweeps over T steps, if it is not given: T / 2, within 16 and 256."""
    return int(np.clip(length // 2, 16, 256))


def renewed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
    """The share of times at which a path is a new one; latents are arrays (T, ...) by name."""
    if not new:
        return jnp.ones(())
    same = [jnp.reshape(x == old[n], (x.shape[0], -1)).all(axis=1) for n, x in new.items()]
    return 1.0 - jnp.mean(jnp.stack(same).all(axis=0))


class Path(NamedTuple):
    """One path of the latents.

    Attributes:
        initial: the initial sites, by name.
        latents: the latents of the steps, arrays (T, ...), by name.
    """

    initial: dict[str, Any]
    latents: dict[str, Any]


def _with_first(first: Any, others: Any) -> Any:
    """The particles, the one that is kept in front."""
    return jax.tree.map(
        lambda one, rest: jnp.concatenate([jnp.asarray(one, rest.dtype)[None], rest]), first, others
    )


def start_at_path(
    key: Any, series: Series, path: Path, particles: int
) -> tuple[Population, dict[str, Any]]:
    """Particles at the start, of which the first is the path's; initial sites."""
    kept = series.start_at(path.initial)
    others = over(series.start, random.split(key, particles - 1))
    starts = _with_first(kept, others)
    return weighed(Population.of(starts.carry), starts), starts.latents


def conditional_step(
    key: Any,
    series: Series,
    population: Population,
    t: Any,
    path: Path,
    options: Filter,
    replays: int = 0,
) -> tuple[Population, History]:
    """One step of a conditional sweep: particle 0 follows the path.

    Args:
        options: of the filter; ancestors are drawn independently and at every step.
        replays: the ancestor of particle 0 is drawn by replaying that many steps of the path from
            every particle; 0: it is particle 0.
    """
    key_ancestors, key_move, key_kept = random.split(key, 3)
    count, carry, proposal = options.particles, population.particles, options.proposal
    shares, ahead = population.log_weights, looked_ahead(series, carry, t, proposal)
    others = resample(key_ancestors, normalised(shares + ahead)[0], "multinomial", count - 1)
    parent = jnp.zeros((), others.dtype)
    if replays:
        follows = replayed(series, carry, t, path, replays)
        parent = categorical(key_kept, shares + follows).astype(others.dtype)
    ancestors = jnp.concatenate([parent[None], others])
    base = logsumexp(shares + ahead) - ahead[ancestors] - jnp.log(float(count))
    kept = proposal.at(series, take(carry, parent), t, take(path.latents, t))
    moved = over(
        lambda k, c: proposal.draw(k, series, c, t),
        random.split(key_move, count - 1),
        take(carry, others),
    )
    steps: Step = _with_first(kept, moved)
    new = weighed(Population(steps.carry, base, population.log_evidence), steps)
    return new, History(carry, shares, ancestors, steps.latents)


def replayed(series: Series, carry: Any, t: Any, path: Path, replays: int) -> Any:
    """Log density of the path's next steps after every particle, (N,)."""

    def further(state: tuple[Any, Any], d: Any) -> tuple[tuple[Any, Any], None]:
        carry, total = state
        time = jnp.minimum(t + d, series.length - 1)
        there = t + d < series.length
        latents = take(path.latents, time)
        steps = over(lambda c: series.replay(c, time, latents), carry)
        gained = steps.log_transition + steps.log_observation
        carry = jax.tree.map(lambda new, old: jnp.where(there, new, old), steps.carry, carry)
        return (carry, total + jnp.where(there, gained, 0.0)), None

    count = jax.tree.leaves(carry)[0].shape[0]
    return scanned(further, (carry, jnp.zeros(count)), replays)[0][1]


def sweep(
    key: Any,
    series: Series,
    path: Path,
    options: Filter,
    functional: Functional | None = None,
    start: Any = None,
    draws: int | None = 2,
    moves: int | str = 0,
    replays: int = 0,
    paths: int | None = None,
) -> tuple[Path, Any]:
    """A conditional sweep, and what PaRIS sums along it.

    Args:
        functional: h_t, see `advance_sums`; None for no sums.
        start: initial sites of one particle -> h_0; of the structure of one sum.
        draws, moves: as in `advance_sums`.
        replays: 0: the new path is drawn backwards; else along the ancestors, those of the path of
            before having been drawn by replaying so many of its steps.
        paths: number M of paths drawn from the particles, independently; each of them may follow
            the path of before. None for one.

    Returns:
        The new path, arrays (M, ...) and (M, T, ...) if ``paths`` is given, and the estimate of
        E[h | y] (None without functional).
    """
    key_start, key_steps, key_back = random.split(key, 3)
    first, initial = start_at_path(key_start, series, path, options.particles)
    sums = None if functional is None else first_sums(start, initial, options.particles)

    def step(state: tuple[Population, Any], t: Any) -> tuple[tuple[Population, Any], History]:
        population, sums = state
        key_step, key_sums = random.split(random.fold_in(key_steps, t))
        new, history = conditional_step(key_step, series, population, t, path, options, replays)
        if functional is not None:
            sums = advance_sums(key_sums, series, history, t, sums, functional, draws, moves)
        return (new, sums), history

    (last, sums), history = scanned(step, (first, sums), series.length)
    draw = genealogy if replays else backward_paths
    drawn = draw(key_back, series, initial, history, last.log_weights, paths or 1)
    several = Path(drawn[0], jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), drawn[1]))
    own = several if paths else take(several, 0)
    return own, None if functional is None else expectation(last, sums)
