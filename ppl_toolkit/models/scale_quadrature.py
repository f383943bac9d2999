"""Integrals over the squared scale of a scale mixture, and its posterior.

Whatever the law H of sigma^2, Gaussian data enter through two numbers: n of them with quadratic
form q at sigma = 1 have the likelihood s2^(-n/2) exp(-q / (2 s2)) in s2 = sigma^2, up to a factor
without s2. Where no closed form exists the trapezoid rule takes over, in a coordinate in which the
integrand is analytic and decays fast: its error falls geometrically in the number of nodes
(Trefethen and Weideman 2014), it draws nothing, and it is differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.special import gammaln, logsumexp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to

from ppl_toolkit.errors import DataError, OptionError
from ppl_toolkit.inference.population import effective_size, normalised
from ppl_toolkit.models.scale_laws import GeneralizedInverseGaussian, gig_log_normalizer
from ppl_toolkit.models.scale_tables import Atoms, Tabulated
from ppl_toolkit.models.sinh_grid import Grid, farthest

__all__ = [
    "ImportanceEstimate",
    "atoms_of",
    "by_trapezoid",
    "checked_law",
    "importance",
    "log_marginal",
    "mean_of",
    "posterior_law",
    "single_law",
]

_POSITIVE = (constraints.positive, constraints.nonnegative, constraints.unit_interval)


def checked_law(law: Any) -> Any:
    """``law``, if it is a law of a positive number.

    Raises:
        DataError: it is no NumPyro distribution, or of several numbers, or not of positive ones.
    """
    if not isinstance(law, dist.Distribution):
        raise DataError(
            "The law of sigma^2 must be a NumPyro distribution, such as InverseGamma(2.0, 2.0); "
            f"got {law!r:.80}."
        )
    name = type(law).__name__
    if law.event_shape:
        raise DataError(
            f"The law of sigma^2 must be of one number, but {name} has event shape "
            f"{law.event_shape}; take a distribution without event dimensions."
        )
    if isinstance(law, dist.Delta):
        positive = _known_nonnegative(law.v)
    else:
        positive = law.support in _POSITIVE or (
            not law.is_discrete and _known_nonnegative(getattr(law.support, "lower_bound", -1.0))
        )
    if not positive:
        raise DataError(
            f"The law of sigma^2 must have positive support, but that of {name} is "
            f"{law.support!r:.60}; take another law, or for a discrete one Atoms."
        )
    return law


def single_law(law: Any) -> Any:
    """A law of one sigma^2, with NumPy parameters.

    Raises:
        DataError: as `checked_law`, or there is a batch of laws.
    """
    law = checked_law(law)
    if law.batch_shape:
        raise DataError(f"law must be one law of sigma^2; got a batch of {law.batch_shape}.")
    return jax.tree.map(np.asarray, law)


def _known_nonnegative(bound: Any) -> bool:
    return isinstance(bound, jax.core.Tracer) or bool(np.all(np.asarray(bound) >= 0))


def _checked_nodes(nodes: Any) -> int:
    if isinstance(nodes, bool) or not isinstance(nodes, int | np.integer) or nodes < 9:
        raise OptionError(
            f"nodes must be a whole number, at least 9 (default 129); got {nodes!r:.40}."
        )
    return int(nodes)


def _log_likelihood(s2: Any, q: Any, n: Any) -> Any:
    return -0.5 * (n * jnp.log(s2) + q / s2)


def _mode(log_integrand: Any, start: Any) -> tuple[Any, Any]:
    """Mode of a function with one, to a twentieth of its width, and that width.

    Newton's steps, of a bounded length, inside the bracket of the signs of slopes seen.
    """
    one = jnp.ones_like(start)

    def slope(u: Any) -> Any:
        return jax.jvp(log_integrand, (u,), (one,))[1]

    def turn(state: tuple[Any, ...]) -> tuple[Any, ...]:
        u, low, high, reach, _, _, count = state
        g, curvature = jax.jvp(slope, (u,), (one,))
        g = jnp.where(jnp.isfinite(g), g, -u)  # overflow: back towards ordinary numbers
        bends = curvature < 0
        sd = jnp.where(bends, lax.rsqrt(jnp.where(bends, -curvature, 1.0)), 1.0)
        settled = bends & (jnp.abs(g) * sd < 0.05)
        low, high = jnp.where(g > 0, u, low), jnp.where(g > 0, high, u)
        newton = jnp.where(bends, jnp.clip(g * sd * sd, -reach, reach), jnp.sign(g) * reach)
        there = jnp.clip(u + newton, -limit, limit)
        # Down an exponential Newton goes by steps of one: halve the bracket, once there is one.
        slow = (jnp.abs(g) * sd > 2.0) & (4.0 * jnp.abs(newton) < high - low)
        wrong = slow | (there <= low) | (there >= high)
        middle = 0.5 * (low + high)
        there = jnp.where(wrong & jnp.isfinite(middle), middle, there)
        return jnp.where(settled, u, there), low, high, 2.0 * reach, sd, jnp.all(settled), count + 1

    limit = farthest()
    state = (start, -jnp.inf * one, jnp.inf * one, 4.0 * one, one, jnp.array(False), 0)
    state = lax.while_loop(lambda s: ~s[5] & (s[6] < 100), turn, state)
    return state[0], state[4]


def by_trapezoid(
    law: Any,
    log_likelihood: Callable[[Any, Any], Any],
    parameters: Any,
    likeliest: Any,
    batch: tuple[int, ...],
    nodes: int,
) -> tuple[Grid, Any]:
    """Nodes for H(d s2) times a likelihood, and the logs of the terms of its integral.

    The coordinate is u with s2 = T(u), T from the real line onto the support. Where the nodes lie
    is not differentiated: the integral does not depend on it.

    Args:
        law: H.
        log_likelihood: ``log_likelihood(parameters, s2)``, elementwise in s2 (..., *batch).
        parameters: arrays by which the terms may be differentiated.
        likeliest: an s2 near the likelihood's maximum, (*batch); anything where there is none.
        batch: shape of the integrals.
        nodes: how many.

    Returns:
        The grid and the terms (nodes, *batch).
    """
    dtype = jnp.result_type(float)

    def log_integrand(law: Any, parameters: Any, u: Any) -> Any:
        transform = biject_to(law.support)
        s2 = transform(u)
        log_density = law.log_prob(s2) + transform.log_abs_det_jacobian(u, s2)
        log_density = jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)  # overflow far out
        return log_density + log_likelihood(parameters, s2)

    fixed = jax.tree.map(lax.stop_gradient, (law, parameters, likeliest))
    frozen = functools.partial(log_integrand, *fixed[:2])
    start = biject_to(fixed[0].support).inv(fixed[2])  # NaN outside the support
    start = jnp.where(jnp.abs(start) < farthest(), start, 0.0).astype(dtype)
    grid = Grid.around(frozen, *_mode(frozen, jnp.broadcast_to(start, batch)), nodes)
    rank = grid.ranks(nodes)
    return grid, log_integrand(law, parameters, grid.at(rank)) + grid.log_spacing(rank)


@functools.partial(jax.jit, static_argnames="nodes")  # the law is an argument: one compilation
def _by_trapezoid(law: Any, q: Any, n: Any, nodes: int) -> tuple[Grid, Any]:
    """`by_trapezoid` with s2^(-n/2) exp(-q / (2 s2)) for the likelihood."""
    dtype = jnp.result_type(float)
    batch = lax.broadcast_shapes(law.batch_shape, jnp.shape(q), jnp.shape(n))
    q, n = (jnp.broadcast_to(jnp.asarray(x, dtype), batch) for x in (q, n))
    informed = (q > 0) & (n > 0)
    best = jnp.where(informed, q / jnp.where(informed, n, 1.0), 1.0)
    return by_trapezoid(law, lambda qn, s2: _log_likelihood(s2, *qn), (q, n), best, batch, nodes)


def log_marginal(law: Any, q: Any, n: Any, nodes: int = 129) -> Float[Array, "*batch"]:
    """The log of the integral of s2^(-n/2) exp(-q / (2 s2)) H(d s2).

    With q = (y - m)' C^-1 (y - m), a scale mixture has log density -(n/2) log(2 pi) - log|C| / 2
    plus this. Shapes broadcast: law's batch shape, q, n.

    Args:
        law: H, of sigma^2. Its density must have one mode after multiplication with the
            likelihood, in the unconstrained coordinate of its support; it should be smooth there.
        q: quadratic form at sigma = 1, not negative.
        n: number of data; any real number, 0 or more.
        nodes: of the quadrature, 9 or more. The error is rounding with 129, and with 65 but
            for n = 0 and laws like Gamma(0.1); with 33 it is up to 2e-7 for n = 1, 1e-9 for n = 10.

    Closed forms: InverseGamma, Delta, Atoms, GeneralizedInverseGaussian; the nodes of a Tabulated
    law serve for up to some 40 times as many data as it was made with. Differentiable twice in q, n
    and the law's parameters. Cost: about 2 ``nodes`` densities of H, whatever n.

    Raises:
        DataError: ``law`` is not a law of a positive number.
        OptionError: ``nodes`` is too small.
    """
    law, nodes = checked_law(law), _checked_nodes(nodes)
    q, n = jnp.asarray(q, jnp.result_type(float)), jnp.asarray(n, jnp.result_type(float))
    if isinstance(law, dist.InverseGamma):
        a, b, half = law.concentration, law.rate, 0.5 * n
        grown = gammaln(a + half) - gammaln(a) - half * jnp.log(b)
        return grown - (a + half) * jnp.log1p(0.5 * q / b)
    if isinstance(law, dist.Delta):
        return _log_likelihood(law.v, q, n) + law.log_density
    if isinstance(law, Atoms | Tabulated):
        values, log_weights = atoms_of(law)
        terms = log_weights + _log_likelihood(values, q[..., None], n[..., None])
        return logsumexp(terms, axis=-1)
    if isinstance(law, GeneralizedInverseGaussian):
        updated = gig_log_normalizer(law.p - 0.5 * n, law.chi + q, law.psi)
        return updated - gig_log_normalizer(law.p, law.chi, law.psi)
    return logsumexp(_by_trapezoid(law, q, n, nodes)[1], axis=0)


def posterior_law(law: Any, q: Any, n: Any, nodes: int = 129) -> dist.Distribution:
    """The law of sigma^2 given n data with quadratic form q.

    InverseGamma, GeneralizedInverseGaussian, Delta and Atoms stay what they are; any other law
    becomes `Tabulated`, differentiable as `log_marginal` is. Arguments and errors are those of
    `log_marginal`.
    """
    law, nodes = checked_law(law), _checked_nodes(nodes)
    q, n = jnp.asarray(q, jnp.result_type(float)), jnp.asarray(n, jnp.result_type(float))
    if isinstance(law, dist.InverseGamma):
        return dist.InverseGamma(law.concentration + 0.5 * n, law.rate + 0.5 * q)
    if isinstance(law, GeneralizedInverseGaussian):
        return GeneralizedInverseGaussian(law.p - 0.5 * n, law.chi + q, law.psi)
    if isinstance(law, dist.Delta):
        batch = lax.broadcast_shapes(jnp.shape(law.v), q.shape, n.shape)
        return dist.Delta(jnp.broadcast_to(law.v, batch))
    if isinstance(law, Atoms):
        likelihood = _log_likelihood(law.values, q[..., None], n[..., None])
        return Atoms(law.values, law.log_probs + likelihood)
    grid, terms = _by_trapezoid(law, q, n, nodes)
    return Tabulated(grid, jnp.moveaxis(terms, 0, -1), law.support)


def atoms_of(
    law: Any, nodes: int = 129
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]]:
    """Values and normalised log weights: a scale mixture as a finite mixture.

    A continuous law becomes the nodes of its quadrature, which integrate smooth functions of
    sigma^2 as `log_marginal` does. Arguments and errors are those of `log_marginal`.
    """
    law = checked_law(law)
    if isinstance(law, Atoms):
        return law.values, law.log_probs
    if isinstance(law, dist.Delta):
        values = jnp.asarray(law.v, jnp.result_type(float))[..., None]
        return values, jnp.zeros_like(values)
    if not isinstance(law, Tabulated):
        grid, terms = _by_trapezoid(law, 0.0, 0.0, _checked_nodes(nodes))
        law = Tabulated(grid, jnp.moveaxis(terms, 0, -1), law.support)
    return law.atoms


def mean_of(law: Any) -> Float[Array, "*batch"]:
    """E[sigma^2]: the law's own where it has one, else from its quadrature."""
    try:
        return jnp.asarray(law.mean)
    except NotImplementedError:  # NumPyro's way to say that it knows no mean of this law
        return jnp.asarray(posterior_law(law, 0.0, 0.0).mean)


class ImportanceEstimate(NamedTuple):
    """What `importance` returns.

    Attributes:
        log_marginal: log of an unbiased estimate of the integral of `log_marginal`.
        posterior: the weighted draws.
        effective_size: (sum w)^2 / sum w^2, of all draws.
    """

    log_marginal: Float[Array, ""]
    posterior: Atoms
    effective_size: Float[Array, ""]


def importance(
    law: Any, q: Any, n: Any, key: Any, draws: int = 1000, proposal: str = "prior"
) -> ImportanceEstimate:
    """`log_marginal` and `posterior_law` by importance sampling.

    The posterior of log sigma^2 is about N(log(q / n), 2 / n), so that draws from the prior have an
    effective size near draws * p(log(q / n)) sqrt(8 pi / n), p the prior density of log sigma^2:
    few, for many data. Quadrature has no such trouble; this is for comparison.

    Args:
        law: H, of one sigma^2 (no batch).
        q: quadratic form at sigma = 1, a scalar.
        n: number of data, a scalar.
        key: random key.
        draws: S.
        proposal: "prior", or "matched": log sigma^2 ~ N(log(q / n), 4 / n).

    Raises:
        DataError: ``law`` is not a law of a positive number, or has a batch shape.
        OptionError: there is no such proposal for this law, or ``draws`` is below 1.
    """
    law = checked_law(law)
    if law.batch_shape or jnp.ndim(q) or jnp.ndim(n):
        seen = f"{law.batch_shape}, {jnp.shape(q)}, {jnp.shape(n)}"
        raise DataError(f"importance takes one law, q and n; got shapes {seen}. Use jax.vmap.")
    if proposal not in ("prior", "matched"):
        raise OptionError(f"proposal must be 'prior' or 'matched'; got {proposal!r:.40}.")
    if proposal == "matched" and isinstance(law, dist.Delta | Atoms):
        raise OptionError("proposal='matched' needs a law with a density; use proposal='prior'.")
    if draws < 1:
        raise OptionError(f"draws must be 1 or more; got {draws!r:.40}.")
    if proposal == "prior":
        s2 = law.sample(key, (draws,))
        log_weights = _log_likelihood(s2, q, n)
    else:
        matched = dist.LogNormal(jnp.log(q / n), jnp.sqrt(4.0 / n))
        s2 = jnp.exp(matched.loc + matched.scale * random.normal(key, (draws,)))
        allowed = law.support(s2)
        inside = jnp.where(allowed, s2, law.support.feasible_like(s2))
        log_ratio = law.log_prob(inside) + _log_likelihood(s2, q, n) - matched.log_prob(s2)
        log_weights = jnp.where(allowed, log_ratio, -jnp.inf)
    shares, log_mean = normalised(log_weights)
    return ImportanceEstimate(log_mean, Atoms(s2, shares), effective_size(log_weights))
