"""The points of nested sampling: how new ones are drawn, and what all of them are worth.

Sources: see `nested_sampling`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

from ppl_toolkit.inference.kernel import Cloud
from ppl_toolkit.inference.tuning import cloud_covariance
from ppl_toolkit.positions import Position

__all__ = [
    "NEAR",
    "Weighted",
    "insertion_ranks",
    "near_start",
    "point_maker",
    "replacement",
    "shape",
    "weighted",
]

NEAR = 0.01  # of the other points, that lie nearest to a new one


# -- new points ---------------------------------------------------------------------------------


def point_maker(log_parts: Callable[[Position], tuple[Any, Any]]) -> Callable:
    """(position, likelihood it was born above) -> blackjax's state of a point.

    A point where a density is not finite has no likelihood. The last bits of the others are rounded
    off: programs differ in them, by which a plateau would fall into several.
    """
    from blackjax.ns.base import StateWithLogLikelihood

    def point(position: Position, loglikelihood_birth: Any = jnp.nan) -> Any:
        prior, likelihood = log_parts(position)
        possible = jnp.isfinite(prior) & jnp.isfinite(likelihood)
        kind = jnp.finfo(likelihood.dtype)
        likelihood = lax.reduce_precision(likelihood, kind.nexp, kind.nmant - kind.nmant // 4)
        return StateWithLogLikelihood(
            dict(position),
            jnp.where(jnp.isfinite(prior), prior, -jnp.inf),
            jnp.where(possible, likelihood, -jnp.inf),
            jnp.full_like(likelihood, loglikelihood_birth),
        )

    return point


def shape(key: Any, state: Any, info: Any, params: Any = None) -> dict[str, Any]:
    """The factor of the live points' covariance, by which directions are drawn (for blackjax)."""
    size = state.particles.loglikelihood.shape[0]
    even = jnp.full(size, 1.0 / size, state.particles.logdensity.dtype)
    covariance = cloud_covariance(Cloud(state.particles.position, even, jnp.nan))
    return {"covariance_factor": jnp.linalg.cholesky(covariance)}


def replacement(point: Callable, steps: int, count: int) -> Callable:
    """An iteration of blackjax's nested slice sampling: ``count`` points die and are replaced.

    It also says where every new point started: the information of an update is (about its slices,
    positions before them), arrays (count, steps, ...).
    """
    from blackjax.mcmc.slice import build_kernel as slices
    from blackjax.mcmc.slice import stepping_out
    from blackjax.ns.from_mcmc import build_kernel
    from blackjax.ns.nss import covariance_proposal, slice_constrained_step

    step = slice_constrained_step(point, slices(stepping_out), covariance_proposal)

    def recorded(key: Any, state: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
        new, info = step(key, state, *args, **options)
        return new, (info, state.position)

    return build_kernel(recorded, steps, shape, count)


# -- are they draws as they should be? ------------------------------------------------------------


def insertion_ranks(
    key: Any, likelihood: Float[Array, " N"], new: Int[Array, " K"], contour: Any
) -> Float[Array, " K"]:
    """Where new points come in among the others, one after the other: uniform in (0, 1).

    Draws as they should be have independent ranks. Ties are broken at random, and the rank among
    m others is spread over an interval of length 1 / (m + 1). The others are those above the
    ``contour``, as the new ones are; those on it are left from a plateau.
    """
    count, size = new.shape[0], likelihood.shape[0]
    turn = jnp.zeros(size, jnp.int32).at[new].set(jnp.arange(1, count + 1, dtype=jnp.int32))
    own = jnp.arange(1, count + 1)[:, None]
    there = (turn[None, :] < own) & (likelihood[None, :] > contour)
    value = likelihood[new][:, None]
    below = jnp.sum(there & (likelihood[None, :] < value), 1)
    equal = jnp.sum(there & (likelihood[None, :] == value), 1) + 1
    uniform = random.uniform(key, (count,), jnp.result_type(float))
    return (below + uniform * equal) / (jnp.sum(there, 1) + 1)


def near_start(
    position: Position, new: Int[Array, " K"], start: Position, factor: Float[Array, "D D"]
) -> Bool[Array, " K"]:
    """Whether new points have stayed near: few others are nearer to them than where they started.

    Ranks of likelihoods do not show that: a copy of a live point has the rank of a live point. The
    points that lived on are compared, in standard deviations of all. Independent draws from one
    mode are near at one start in a hundred; from k modes, at k.

    Args:
        position: of all points, (N, ...) by site.
        new: which of them are new.
        start: where these started, (K, ...).
        factor: L, of the points' covariance.

    Cost: O(K N D).
    """

    def standardised(x: Position) -> Float[Array, "M D"]:
        flat = jax.vmap(lambda one: ravel_pytree(one)[0])(dict(x))
        return solve_triangular(factor, flat.T, lower=True).T

    others, before = standardised(position), standardised(start)
    after = others[new]
    lived = jnp.ones(others.shape[0], bool).at[new].set(False)
    moved = jnp.sum((after - before) ** 2, 1)
    distance = jnp.sum((after[:, None] - others[None]) ** 2, 2)
    nearer = jnp.sum(lived & (distance < moved[:, None]), 1)
    return nearer < NEAR * (others.shape[0] - new.shape[0])


# -- volumes and weights ------------------------------------------------------------------------


class Weighted(NamedTuple):
    """All points of a run that is over, dead ones first, with what they are worth.

    Attributes:
        log_volume: log X_i, the share of the prior that is left when a point has died, (M,).
        log_weight: posterior weights, which sum to one, (M,).
        log_evidence: log Z.
        log_evidence_sd: its standard deviation, by that of the volumes: 1 / n_i of each log ratio.
        information: of the posterior about the prior, in nats.
        ess: effective number of the points.
    """

    log_volume: Float[Array, " M"]
    log_weight: Float[Array, " M"]
    log_evidence: Float[Array, ""]
    log_evidence_sd: Float[Array, ""]
    information: Float[Array, ""]
    ess: Float[Array, ""]


def weighted(dead: Any, live: Any, died: Any) -> Weighted:
    """Volumes and weights of the points of a run.

    Args:
        dead: points that died, of which the first ``died`` count; their ``loglikelihood`` and
            ``loglikelihood_birth``, the highest of those that had died when they came in (NaN for
            the first points), (C,).
        live: the points that are left, (N,), which die one by one.
        died: how many died before.

    Returns:
        For all C + N points, in the order in which they are given.
    """
    room, size = dead.loglikelihood.shape[0], live.loglikelihood.shape[0]
    there = jnp.concatenate([jnp.arange(room) < died, jnp.ones(size, bool)])
    wide = jnp.result_type(float)
    deaths = jnp.concatenate([dead.loglikelihood, live.loglikelihood]).astype(wide)
    births = jnp.concatenate([dead.loglikelihood_birth, live.loglikelihood_birth]).astype(wide)
    order = jnp.argsort(jnp.where(there, deaths, jnp.inf), stable=True)
    place = jnp.zeros(room + size, order.dtype).at[order].set(jnp.arange(room + size))
    later = jnp.sort(jnp.where(there & ~jnp.isnan(births), births, jnp.inf))

    # When point i dies, N and all born below its likelihood have come, and i others have gone.
    likelihood, counts = deaths[order], there[order]
    come = size + jnp.searchsorted(later, likelihood, side="left")
    n = jnp.maximum(come - jnp.arange(room + size), 1).astype(wide)
    log_volume = jnp.cumsum(jnp.where(counts, jnp.log1p(-1.0 / n), 0.0))
    before = jnp.concatenate([jnp.zeros(1, wide), log_volume[:-1]])
    log_mass = jnp.where(counts, before - jnp.log(n) + likelihood, -jnp.inf)
    log_evidence = logsumexp(log_mass)
    log_weight = log_mass - log_evidence
    share = jnp.exp(log_weight)
    # d log Z / d log X_i: shell i grows by what all that lies beyond loses.
    beyond = jnp.cumsum(share[::-1])[::-1] - share
    slope = beyond - jnp.exp(log_volume + likelihood - log_evidence)
    variance = jnp.sum(jnp.where(counts, (slope / n) ** 2, 0.0))
    gained = jnp.where(share > 0, share * (likelihood - log_evidence), 0.0)
    return Weighted(
        jnp.where(counts, log_volume, jnp.nan)[place], log_weight[place], log_evidence,
        jnp.sqrt(variance), jnp.sum(gained), 1.0 / jnp.sum(share**2),
    )  # fmt: skip
