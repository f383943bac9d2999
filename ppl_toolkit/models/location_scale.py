"""Mixtures of normals whose location and width depend on sigma^2, as NumPyro laws."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax, random
from jax.scipy.special import logsumexp, ndtr, ndtri
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from ppl_toolkit.models.scale_quadrature import mean_of

__all__ = ["LocationScaleMixture"]

_LOG_2PI = math.log(2.0 * math.pi)


class LocationScaleMixture(dist.Distribution):
    """Independent numbers N(m(s), s c(s)) with s = sigma^2 from a law: over the nodes of s.

    What `ScaleMixtureNormal` is for a location without s. A finite mixture of normals, exact up to
    the quadrature over s; its quantiles are found by bisection.

    Args:
        law: of s, one; says whether the variance is finite.
        values: nodes of s, (K,), the largest last where the law is continuous.
        log_weights: (K,), normalised.
        locs: m at the nodes, (*batch, K).
        unit_variances: c at the nodes, positive, (*batch, K).

    Cost: K normal densities or CDFs for a number, 64 K CDFs for a quantile.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real
    pytree_data_fields = ("law", "values", "log_weights", "locs", "unit_variances")

    def __init__(
        self,
        law: Any,
        values: Float[Array, " K"],
        log_weights: Float[Array, " K"],
        locs: Float[Array, "*batch K"],
        unit_variances: Float[Array, "*batch K"],
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.law, self.values, self.log_weights = law, values, log_weights
        self.locs, self.unit_variances = locs, unit_variances
        super().__init__(batch_shape=jnp.shape(locs)[:-1], validate_args=validate_args)

    @property
    def _sds(self) -> Any:
        return jnp.sqrt(self.values * self.unit_variances)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        key_node, key_normal = random.split(key)
        shape = self.shape(sample_shape)
        node = random.categorical(key_node, self.log_weights, shape=shape)[..., None]
        loc, sd = (
            jnp.take_along_axis(jnp.broadcast_to(a, (*shape, a.shape[-1])), node, -1)[..., 0]
            for a in (self.locs, self._sds)
        )
        return loc + sd * random.normal(key_normal, shape)

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        sd = self._sds
        z = (jnp.asarray(value)[..., None] - self.locs) / sd
        return logsumexp(self.log_weights - jnp.log(sd) - 0.5 * z * z, axis=-1) - 0.5 * _LOG_2PI

    def cdf(self, value: Any) -> Any:
        return self._tail(value, jnp.zeros((), bool))

    def _tail(self, value: Any, upper: Any) -> Any:
        """P(X <= value), or P(X > value) with all its digits where ``upper``."""
        z = (jnp.asarray(value)[..., None] - self.locs) / self._sds
        return jnp.sum(jnp.exp(self.log_weights) * ndtr(jnp.where(upper[..., None], -z, z)), -1)

    def icdf(self, q: Any) -> Any:
        p = jnp.asarray(q, self.locs.dtype)
        p = jnp.broadcast_to(p, lax.broadcast_shapes(p.shape, self.batch_shape))
        fixed: LocationScaleMixture = lax.stop_gradient(self)
        level = lax.stop_gradient(p)
        upper, tail = level > 0.5, jnp.minimum(level, 1.0 - level)
        normal = jnp.where(upper, -1.0, 1.0) * ndtri(tail)
        z = jnp.where(jnp.isfinite(normal), normal, 0.0)[..., None]
        # A quantile of a mixture lies between those of its parts, which heavy tails put at 1e20:
        # halve in v, x = centre + width sinh(v).
        weights, sd = jnp.exp(fixed.log_weights), fixed._sds
        centre = jnp.sum(weights * fixed.locs, axis=-1)
        width = jnp.exp(jnp.sum(weights * jnp.log(sd), axis=-1))
        ends = jnp.arcsinh((fixed.locs + sd * z - centre[..., None]) / width[..., None])

        def halved(_: int, ends: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = ends
            middle = 0.5 * (low + high)
            beyond = fixed._tail(centre + width * jnp.sinh(middle), upper)
            short = jnp.where(upper, beyond > tail, beyond < tail)
            return jnp.where(short, middle, low), jnp.where(short, high, middle)

        low, high = lax.fori_loop(0, 64, halved, (ends.min(-1), ends.max(-1)))
        x = centre + width * jnp.sinh(0.5 * (low + high))
        density = jnp.exp(fixed.log_prob(x))
        gap = p - self.cdf(x)  # for its derivatives alone: those of the solution of cdf(x) = p
        x = x + (gap - lax.stop_gradient(gap)) / jnp.maximum(density, jnp.finfo(x.dtype).tiny)
        return jnp.where(jnp.isfinite(normal), x, normal)

    @property
    def mean(self) -> Any:
        """E[m(s)], the mean where E[sigma] is finite."""
        return jnp.sum(jnp.exp(self.log_weights) * self.locs, axis=-1)

    @property
    def variance(self) -> Any:
        """E[s c(s)] + Var[m(s)]; infinite where E[s] is."""
        weights, c = jnp.exp(self.log_weights), self.unit_variances
        # c settles for large s: its last value times the law's own mean, which a quadrature would
        # cut short for heavy tails, and a rest that decays.
        settled = c[..., -1]
        rest = jnp.sum(weights * self.values * (c - settled[..., None]), axis=-1)
        spread = jnp.sum(weights * (self.locs - self.mean[..., None]) ** 2, axis=-1)
        return mean_of(self.law) * settled + rest + spread
