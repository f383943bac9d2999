"""Particle filters: a population that follows a series, step by step.

With W the weights of the particles at t and eta a look-ahead (one if there is none), a step draws
ancestors a with probabilities V ~ W eta, moves them by a proposal q, and weighs them by

    base_i m_t g_t / q_t,   base_i = sum_j W_j eta_j / (N eta_{a_i})   (W_i, if nothing is drawn).

The evidence is multiplied by the sum of these weights, which keeps it unbiased for every unbiased
resampling scheme.

Sources: Gordon, Salmond and Smith (1993); Pitt and Shephard (1999), JASA 94, for look-ahead;
Chopin and Papaspiliopoulos (2020), An Introduction to Sequential Monte Carlo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.population import Population, normalised, size_of_shares
from ppl_toolkit.inference.proposals import Bootstrap, Proposal
from ppl_toolkit.inference.randomness import numbered, over, scanned
from ppl_toolkit.inference.resampling import resample
from ppl_toolkit.inference.state_space import Series, Step

__all__ = ["Filter", "History", "first_population", "follow", "require_particles", "take"]


class History(NamedTuple):
    """What smoothing needs of one step, for N particles.

    Attributes:
        before: carries before the step, of the particles that ancestors are drawn from, (N, ...).
        log_weights: of these, (N,).
        ancestors: (N,).
        latents: of the step, by site, (N, ...).
    """

    before: Any
    log_weights: Any
    ancestors: Any
    latents: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Filter:
    """How a series is filtered.

    Attributes:
        particles: N.
        proposal: how they are moved.
        resampling: a scheme of `ppl_toolkit.inference.resampling`.
        ess: they are resampled where the effective sample size falls to this share of N; always
            if one.
    """

    particles: int
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    resampling: str = "systematic"
    ess: float = 0.5

    def due(self, size: Any) -> Any:
        """Whether particles with this effective sample size are resampled."""
        if self.ess >= 1.0:
            return jnp.ones(jnp.shape(size), bool)
        return size <= self.ess * self.particles


def require_particles(count: Any) -> None:
    """Refuse what is no number of particles.

    Raises:
        OptionError: it is no integer of two or more.
    """
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 2:
        raise OptionError(f"particles must be an integer >= 2; got {count!r}.")


def take(tree: Any, index: Any) -> Any:
    """``x[index]`` for every array of a pytree."""
    return jax.tree.map(lambda x: x[index], tree)


def first_population(key: Any, series: Series, particles: int) -> tuple[Population, Any]:
    """Carries at the start, weighed by what is observed before the first step; initial sites."""
    starts = over(series.start, random.split(key, particles))
    return weighed(Population.of(starts.carry), starts), starts.latents


def weighed(population: Population, steps: Step) -> Population:
    return population.reweighted(steps.log_observation + steps.correction)


def looked_ahead(series: Series, carry: Any, t: Any, proposal: Proposal) -> Any:
    """Log eta of all particles, (N,)."""
    if not proposal.looks_ahead:
        return jnp.zeros(jax.tree.leaves(carry)[0].shape[0])
    return over(lambda c: proposal.look_ahead(series, c, t), carry)


def ancestors_of(
    key: Any, population: Population, ahead: Any, options: Filter
) -> tuple[Any, Any, Any, Any]:
    """Ancestors, their carries, the log of their base weights (one on average), and the ESS."""
    count, carry = options.particles, population.particles
    shares = population.log_weights
    if options.proposal.looks_ahead:
        chances, mean = normalised(shares + ahead)
    else:  # the weights sum to one, or are all zero
        chances = shares
        mean = jnp.where(jnp.max(shares) > -jnp.inf, -jnp.log(float(count)), -jnp.inf)
    size = size_of_shares(chances)

    def drawn() -> tuple[Any, Any, Any]:
        found = resample(key, chances, options.resampling)
        return found, take(carry, found), mean - ahead[found]

    if options.ess >= 1.0:
        return *drawn(), size
    stay = (jnp.arange(count, dtype=jnp.int32), carry, shares)
    return *lax.cond(options.due(size), drawn, lambda: stay), size


def advance(
    key: Any, series: Series, population: Population, t: Any, options: Filter
) -> tuple[Population, History, Any]:
    """One step of the filter: the population of carries, its history, and the ESS before it."""
    key_ancestors, key_move = random.split(key)
    carry, proposal = population.particles, options.proposal
    ahead = looked_ahead(series, carry, t, proposal)
    ancestors, chosen, base, size = ancestors_of(key_ancestors, population, ahead, options)
    keys = numbered(key_move, options.particles)
    steps = over(lambda k, c: proposal.draw(k, series, c, t), keys, chosen)
    moved = Population(steps.carry, base, population.log_evidence)
    return (
        weighed(moved, steps),
        History(carry, population.log_weights, ancestors, steps.latents),
        size,
    )


def follow(
    key: Any, series: Series, options: Filter, watch: Callable[[Population, History, Any], Any]
) -> tuple[Population, Any, Any]:
    """Filter a whole series.

    Args:
        key: random key.
        series: the model, its static parameters given.
        options: of the filter.
        watch: (population of carries, history of the step, ESS) -> what is kept of every step.

    Returns:
        The last population, the initial sites of the particles at the start, and what was kept,
        stacked over the steps.

    Cost: O(N T); memory O(N) beside what is kept.
    """
    first, initial = first_population(random.fold_in(key, 0), series, options.particles)

    def step(population: Population, t: Any) -> tuple[Population, Any]:
        new, history, size = advance(random.fold_in(key, t + 1), series, population, t, options)
        return new, watch(new, history, size)

    last, kept = scanned(step, first, series.length)
    return last, initial, kept
