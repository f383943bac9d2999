"""Positions of kernels that move sites apart: a dictionary of all latent sites.

A *position* has an unconstrained array for every continuous latent site, and a value for every
discrete one. The flat vector of `Program.log_density` has the continuous sites alone.

Elements that are not there (of masked plates and cases) or not used (of missing observations) have
values too, in positions: N(0, 1) ones on the real space, and uniform ones among finitely many.
These laws count as prior.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import random
from jax.scipy.special import gammaln
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost

from ppl_toolkit.imputation import unused_elements
from ppl_toolkit.layout import Plate, active_elements, in_order
from ppl_toolkit.replay import at_unconstrained, log_det_name, with_improper_sites
from ppl_toolkit.resting import resting_draw, resting_log_prob
from ppl_toolkit.sites import finite_support

if TYPE_CHECKING:
    from ppl_toolkit.program import Program

__all__ = [
    "Position",
    "levels",
    "log_jacobian",
    "log_law_of_rest",
    "log_parts",
    "log_rows",
    "log_terms",
    "own_draws",
    "own_scores",
    "own_values",
    "position_of",
    "prior_position",
    "relaxed_log_parts",
    "relaxed_shapes",
    "shapes",
    "start_position",
    "trace_at",
    "values_at",
]

Position = Mapping[str, Any]


def shapes(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every site of a position."""
    return {
        site.name: jax.ShapeDtypeStruct(site.shape, site.dtype)
        if site.discrete
        else jax.ShapeDtypeStruct(site.unconstrained_shape, program.precision)
        for site in program.latent
    }


def log_parts(program: Program, position: Position, data: Sequence[Any]) -> tuple[Any, Any]:
    """Log prior density of a position, Jacobians included, and its log likelihood.

    Their sum is the log joint density. Factors (`numpyro.factor`) count as likelihood.
    """
    scores, trace = program.scores(data, *_put(program, position))
    of_prior = {site.name for site in program.latent}
    of_prior |= {log_det_name(name) for name in of_prior}
    prior = sum((jnp.sum(s) for name, s in scores.items() if name in of_prior), start=0.0)
    prior += log_law_of_rest(program, position, trace)
    like = sum((jnp.sum(s) for name, s in scores.items() if name not in of_prior), start=0.0)
    return jnp.asarray(prior, program.precision), jnp.asarray(like, program.precision)


def log_terms(program: Program, position: Position, data: Sequence[Any]) -> tuple[Any, Any]:
    """Log prior density of each latent site, Jacobians included, and the log of all else.

    Their sum is the log joint density. A term that is left out is not computed in a compiled
    program.
    """
    scores, trace = program.scores(data, *_put(program, position))
    of_prior = {}
    for site in program.latent:
        own = (scores.pop(name, 0.0) for name in (site.name, log_det_name(site.name)))
        of_prior[site.name] = jnp.asarray(sum(jnp.sum(score) for score in own), program.precision)
    rest = sum((jnp.sum(score) for score in scores.values()), start=0.0)
    rest += log_law_of_rest(program, position, trace)
    return of_prior, jnp.asarray(rest, program.precision)


def trace_at(program: Program, position: Position, data: Sequence[Any]) -> dict[str, Any]:
    """The messages of all sites at a position."""
    return program.trace(data, *_put(program, position))


def log_jacobian(
    program: Program, position: Position, data: Sequence[Any], sites: Sequence[str]
) -> Any:
    """Log Jacobian of the transforms of some sites."""
    scores, _ = program.scores(data, *_put(program, position))
    own = (scores[log_det_name(name)] for name in sites if log_det_name(name) in scores)
    return sum((jnp.sum(score) for score in own), start=jnp.zeros((), program.precision))


def log_rows(program: Program, position: Position, data: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Log prior density of a position, log factors, and its log likelihood row by row, (R,).

    A row is one entry of the first dimension of the observed sites; sites that share the dimension
    (by its name) share its rows, and a site without dimensions is one row. Factors
    (`numpyro.factor`) belong to no row.
    """
    scores, trace = program.scores(data, *_put(program, position))
    rows: dict[Any, Any] = {}
    for site in program.observed:
        score = scores.pop(site.name)
        by_row = jnp.sum(score.reshape(score.shape[0], -1), 1) if score.ndim else score[None]
        key = (site.dims[0] if score.ndim else site.name, by_row.shape[0])
        rows[key] = rows.get(key, 0.0) + by_row
    of_prior = {site.name for site in program.latent}
    of_prior |= {log_det_name(name) for name in of_prior}
    prior = sum((jnp.sum(s) for name, s in scores.items() if name in of_prior), start=0.0)
    prior += log_law_of_rest(program, position, trace)
    factors = sum((jnp.sum(s) for name, s in scores.items() if name not in of_prior), start=0.0)
    joined = jnp.concatenate([*rows.values(), jnp.zeros(0)])
    parts = (prior, factors, joined)
    return tuple(jnp.asarray(part, program.precision) for part in parts)  # type: ignore[return-value]


def relaxed_log_parts(program: Program, position: Position, data: Sequence[Any]) -> tuple[Any, Any]:
    """`log_parts` where discrete sites have real values, for gradients with respect to them."""
    return log_parts(program, position, data)


def relaxed_shapes(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every site of a position whose discrete sites have real values."""
    return {
        name: jax.ShapeDtypeStruct(like.shape, program.precision)
        for name, like in shapes(program).items()
    }


def values_at(program: Program, position: Position, data: Sequence[Any]) -> dict[str, Any]:
    """Latent and deterministic sites, on their own spaces, at a position."""
    return program.site_values(program.trace(data, *_put(program, position)))


def own_values(program: Program, position: Position, data: Sequence[Any]) -> dict[str, Any]:
    """The latent sites on their own spaces, at a position, whatever is there."""
    trace = program.trace(data, *_put(program, position))
    return {site.name: trace[site.name]["value"] for site in program.latent}


def position_of(program: Program, values: Mapping[str, Any], data: Sequence[Any]) -> dict[str, Any]:
    """The position of values of all latent sites on their own spaces."""
    trace = program.trace(data, functools.partial(handlers.substitute, data=dict(values)))
    return {
        site.name: values[site.name]
        if site.discrete
        else biject_to(trace[site.name]["fn"].support).inv(values[site.name])
        for site in program.latent
    }


def prior_position(program: Program, key: Any, data: Sequence[Any]) -> dict[str, Any]:
    """The position of one draw from the prior."""
    program.require_proper()
    return _position_of(program, program.trace(data, key=key), key)


def start_position(program: Program, key: Any, data: Sequence[Any]) -> dict[str, Any]:
    """A draw from the prior, with sites of improper priors at zero (unconstrained)."""
    return _position_of(program, program.trace(data, with_improper_sites, key=key), key)


def _position_of(program: Program, trace: Mapping[str, Any], key: Any) -> dict[str, Any]:
    position = {
        site.name: trace[site.name]["value"]
        if site.discrete
        else biject_to(trace[site.name]["fn"].support).inv(trace[site.name]["value"])
        for site in program.latent
    }
    for number, name in enumerate(program.resting):
        u, own_key = position[name], random.fold_in(key, number)
        drawn = resting_draw(own_key, trace[name]["fn"], u)
        position[name] = jnp.where(_resting(program, trace, name, u), drawn, u)
    numbers = {plate.number: trace[plate.number]["value"] for plate in program.layout.plates}
    arranged = in_order(program.layout, {**numbers, **position})
    return {name: arranged[name] for name in position}


# -- elements that are there only sometimes --------------------------------------------------------


def log_law_of_rest(program: Program, position: Position, trace: Mapping[str, Any]) -> Any:
    """The log density of what is not there or not used, and of the order of what is there.

    Args:
        position: of the continuous sites at least.
        trace: at this position.
    """
    total = jnp.zeros((), program.precision)
    for name in program.resting:
        x = position.get(name, trace[name]["value"])
        each = resting_log_prob(trace[name]["fn"], x)
        total += jnp.sum(jnp.where(_resting(program, trace, name, x), each, 0.0))
    for plate in program.layout.plates:
        if plate.order not in ("", "index"):
            total += _log_order(plate, trace[plate.number]["value"], position)
    return total


def _resting(program: Program, trace: Mapping[str, Any], name: str, value: Any) -> Any:
    """Which elements of a site's value are not there, or not used; broadcasts to its shape."""
    absent = unused = jnp.zeros((), bool)
    if name in program.layout.sites:
        absent = ~active_elements(trace[name], value)
    if name in program.imputed:
        unused = unused_elements(trace, name, value)
    return absent | unused


def _log_order(plate: Plate, k: Any, position: Position) -> Any:
    """Log k! if the k active slots are in order, else minus infinity."""
    x = position[plate.order]
    falls = (x[1:] <= x[:-1]) & (jnp.arange(1, plate.size) < k)
    return jnp.where(jnp.any(falls), -jnp.inf, gammaln(k + 1.0))


def own_draws(program: Program, given: tuple[Any, Position], data: Sequence[Any]) -> dict[str, Any]:
    """Draws of each site of masked plates and cases from its own law given all else.

    Args:
        given: a key, and a position.

    Returns:
        By site, of the shapes of the position; all elements are drawn, be they there or not.
    """
    key, position = given
    if not program.layout:
        return {}
    trace = program.trace(data, *_put(program, position))
    drawn = {}
    for number, name in enumerate(program.layout.sites):
        fn, own_key = trace[name]["fn"].base_dist, random.fold_in(key, number)
        value = fn.sample(own_key)
        drawn[name] = u = value if fn.is_discrete else biject_to(fn.support).inv(value)
        if name in program.imputed:
            resting = resting_draw(random.fold_in(own_key, 0), fn, u)
            drawn[name] = jnp.where(unused_elements(trace, name, u), resting, u)
    return drawn


def own_scores(program: Program, position: Position, data: Sequence[Any]) -> dict[str, Any]:
    """Log density of each element of the sites of masked plates and cases, as if all were there.

    Returns:
        By site, of the batch shape of its distribution; Jacobians are included.
    """
    if not program.layout:
        return {}
    trace = program.trace(data, *_put(program, position))
    scores = {}
    for name in program.layout.sites:
        fn, u, x = trace[name]["fn"].base_dist, position[name], trace[name]["value"]
        scores[name] = fn.log_prob(x)
        if not fn.is_discrete:
            log_det = biject_to(fn.support).log_abs_det_jacobian(u, x)
            scores[name] += sum_rightmost(log_det, jnp.ndim(log_det) - len(fn.batch_shape))
        if name in program.imputed:
            resting = resting_log_prob(fn, u)
            resting = sum_rightmost(resting, jnp.ndim(resting) - len(fn.batch_shape))
            unused = unused_elements(trace, name, resting)
            scores[name] = jnp.where(unused, resting, scores[name])
    return scores


def levels(program: Program, position: Position, data: Sequence[Any]) -> dict[str, Any]:
    """The values that an element of each finite discrete site can take, arrays (K,)."""
    trace = program.trace(data, *_put(program, position))
    return {
        site.name: finite_support(trace[site.name]["fn"])
        for site in program.discrete
        if site.cardinality
    }


def _put(program: Program, position: Position) -> tuple[Callable, Callable]:
    """Handlers that put a position at its sites."""
    discrete = {site.name: position[site.name] for site in program.discrete}
    continuous = {site.name: position[site.name] for site in program.continuous}
    return (
        functools.partial(handlers.substitute, data=discrete),
        at_unconstrained(continuous),
    )
