"""Trajectories of Hamiltonian and of isokinetic dynamics, and the test that accepts their ends.

Both dynamics move x by the velocity L u, where x = L z are the metric's coordinates. Hamiltonian
momenta u are normal; isokinetic ones have length one, so that z moves with speed one, and follow
u' = (I - u u^T) f / (D - 1) with f the gradient with respect to z, which leaves p(x) times the
uniform law of u invariant.

Sources: Neal (2011), MCMC using Hamiltonian dynamics; Robnik, De Luca, Silverstein and Seljak
(2023), Microcanonical Hamiltonian Monte Carlo, JMLR 24; Robnik, Cohn-Gordon and Seljak (2025),
Metropolis adjusted microcanonical Hamiltonian Monte Carlo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jaxtyping import Array, Bool, Float, Int

from ppl_toolkit.inference.adaptation import LowRank, Metric

__all__ = [
    "MOST_ENERGY_ERROR",
    "Flight",
    "Gradient",
    "Phase",
    "Point",
    "Scalar",
    "Vector",
    "bend",
    "energy_of",
    "first_point",
    "hamiltonian",
    "isokinetic",
    "kick",
    "leapfrog",
    "metropolis",
    "where",
]

MOST_ENERGY_ERROR = 1000.0  # of trajectories that do not diverge
_INITIAL_TRIES = 200

Gradient = Callable[[Any], tuple[Any, Any]]
Vector = Float[Array, " D"]
Scalar = Float[Array, ""]


class Point(NamedTuple):
    """A position with its log density and gradient, so that no point is evaluated twice."""

    position: Vector
    log_density: Scalar
    gradient: Vector


class Phase(NamedTuple):
    """A point with a momentum, the derivative of the metric's coordinates z in time."""

    point: Point
    momentum: Vector


class Flight(NamedTuple):
    """Where a trajectory ended.

    Attributes:
        end: the point, and the momentum there.
        error: minus the log of the ratio that the end is accepted by; +inf where it is none, or
            infinite: a chain would never leave such a place.
        energies: to be reported if the chain stays, and if it goes.
    """

    end: Phase
    error: Scalar
    energies: tuple[Scalar, Scalar]


def where(condition: Any, new: Any, old: Any) -> Any:
    """One of two pytrees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


class _Search(NamedTuple):
    """The search for a first point, one gradient a turn."""

    tries: Int[Array, ""]
    found: Bool[Array, ""]
    point: Point


def first_point(key: Any, start: Any, gradient: Gradient, radius: Scalar) -> Point:
    """A point with finite density and gradient; a log density of -inf if none was found.

    Args:
        key: of the search.
        start: position (D,) to start from, and whether it is given (else uniform draws in
            (-radius, radius) are tried).
        gradient: of the log density, with its value.
        radius: of the random starts.
    """
    position, given = start
    dtype, shape = position.dtype, position.shape

    def turn(s: _Search) -> _Search:
        draw = random.uniform(random.fold_in(key, s.tries), shape, dtype, -1.0, 1.0)
        probe = jnp.where(given, position, radius * draw)
        log_density, grad = gradient(probe)
        finite = jnp.isfinite(log_density) & jnp.all(jnp.isfinite(grad))
        new = Point(probe, log_density, grad)
        return _Search(s.tries + 1, finite, where(finite, new, s.point))

    nowhere = Point(position, jnp.asarray(-jnp.inf, dtype), jnp.zeros_like(position))
    return lax.while_loop(
        lambda s: ~s.found & (s.tries < jnp.where(given, 1, _INITIAL_TRIES)),
        turn,
        _Search(jnp.zeros((), jnp.int32), jnp.asarray(False), nowhere),
    ).point


def _refused(error: Scalar) -> Scalar:
    return jnp.where(jnp.isfinite(error), error, jnp.inf)


# -- Hamiltonian dynamics -----------------------------------------------------------------------


def leapfrog(gradient: Gradient, metric: Metric | LowRank, step: Scalar, z: Phase) -> Phase:
    """One leapfrog step of length ``step`` (negative steps run backwards): one gradient."""
    half = z.momentum + 0.5 * step * metric.force(z.point.gradient)
    position = z.point.position + step * metric.velocity(half)
    log_density, grad = gradient(position)
    return Phase(Point(position, log_density, grad), half + 0.5 * step * metric.force(grad))


def energy_of(z: Phase) -> Scalar:
    """The Hamiltonian; +inf where it is not a number."""
    energy = 0.5 * jnp.dot(z.momentum, z.momentum) - z.point.log_density
    return jnp.where(jnp.isnan(energy), jnp.inf, energy)


def hamiltonian(
    key: Any, point: Point, gradient: Gradient, metric: Metric | LowRank, step: Scalar, steps: Any
) -> Flight:
    """``steps`` leapfrog steps with a new momentum."""
    noise = random.normal(key, point.position.shape, point.position.dtype)
    start = Phase(point, noise)
    end = lax.fori_loop(0, steps, lambda _, z: leapfrog(gradient, metric, step, z), start)
    before, after = energy_of(start), energy_of(end)
    return Flight(end, _refused(after - before), (before, after))


# -- isokinetic dynamics ------------------------------------------------------------------------


def kick(momentum: Vector, force: Vector, step: Scalar) -> tuple[Vector, Scalar]:
    """The momentum, of length one, under a constant force; minus the log of its Jacobian.

    With e the direction of the force f and d = step |f| / (D - 1), the solution of
    u' = (I - u u^T) f / (D - 1) is (u + e (sinh d + e.u (cosh d - 1))) / (cosh d + e.u sinh d),
    and its Jacobian the denominator to the power -(D - 1). All is multiplied by exp(-|d|), so that
    nothing overflows. D is at least 2.
    """
    last = momentum.shape[0] - 1
    norm = jnp.linalg.norm(force)
    direction = jnp.sign(step) * force / jnp.where(norm > 0.0, norm, 1.0)
    turn = jnp.abs(step) * norm / last
    along = jnp.dot(direction, momentum)
    decay, rest = jnp.exp(-turn), -jnp.expm1(-turn)
    turned = decay * momentum + 0.5 * rest * (1.0 + decay + along * rest) * direction
    # log(cosh d + e.u sinh d), without cancellation where d is small
    growth = turn + jnp.log1p(0.5 * jnp.expm1(-2.0 * turn) * (1.0 - along))
    return turned / jnp.linalg.norm(turned), last * growth


def bend(
    gradient: Gradient, metric: Metric | LowRank, step: Scalar, z: Phase
) -> tuple[Phase, Scalar]:
    """One isokinetic step, kick, drift and kick: one gradient; minus the log of its Jacobian."""
    half, first = kick(z.momentum, metric.force(z.point.gradient), 0.5 * step)
    position = z.point.position + step * metric.velocity(half)
    log_density, grad = gradient(position)
    momentum, second = kick(half, metric.force(grad), 0.5 * step)
    return Phase(Point(position, log_density, grad), momentum), first + second


def isokinetic(
    key: Any, point: Point, gradient: Gradient, metric: Metric | LowRank, step: Scalar, steps: Any
) -> Flight:
    """``steps`` isokinetic steps with a new momentum."""
    noise = random.normal(key, point.position.shape, point.position.dtype)
    start = Phase(point, noise / jnp.linalg.norm(noise))

    def move(_: Any, carry: tuple[Phase, Scalar]) -> tuple[Phase, Scalar]:
        z, work = bend(gradient, metric, step, carry[0])
        return z, carry[1] + work

    end, work = lax.fori_loop(0, steps, move, (start, jnp.zeros_like(point.log_density)))
    error = point.log_density - end.point.log_density + work
    return Flight(end, _refused(error), (-point.log_density, -end.point.log_density))


# -- the test -----------------------------------------------------------------------------------


def metropolis(key: Any, point: Point, flight: Flight) -> tuple[Point, dict[str, Any]]:
    """Go to the end of a trajectory, or stay; with the statistics of the choice."""
    error, (before, after) = flight.error, flight.energies
    accepted = jnp.log(random.uniform(key, (), point.position.dtype)) < -error
    stats = {
        "acceptance_rate": jnp.minimum(1.0, jnp.exp(-error)),
        "diverging": ~(error < MOST_ENERGY_ERROR),
        "energy": jnp.where(accepted, after, before),
        "energy_error": jnp.where(accepted, error, 0.0),
    }
    return where(accepted, flight.end.point, point), stats
