"""Laws of a squared scale: what sigma^2 of a scale mixture may be drawn from.

A scale mixture is sigma^2 ~ H, f | sigma^2 ~ N(loc, sigma^2 C). Any NumPyro distribution on the
positive reals can be H; here are those that NumPyro lacks. All are ordinary distributions, for
sample sites too.
Sources: Burr (1942); Jørgensen (1982) for the generalised inverse Gaussian; Devroye (1986), chapter
VII, and Hörmann and Leydold (2014) for rejection from a log-concave density.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.scipy.special import gammaln, logsumexp
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import promote_shapes, validate_sample

from ppl_toolkit.errors import DataError
from ppl_toolkit.models.sinh_grid import Grid

__all__ = [
    "BurrXII",
    "GeneralizedInverseGaussian",
    "gig_log_normalizer",
    "of_standard_deviation",
]

_GIG_NODES = 257


class BurrXII(dist.Distribution):
    """Burr's law XII, density c d x^(c - 1) (1 + x^c)^(-d - 1).

    Under it a scale mixture has tails like |f|^(-2 c d).

    Args:
        c: positive, (*batch).
        d: positive, (*batch).
    """

    arg_constraints = {"c": constraints.positive, "d": constraints.positive}  # noqa: RUF012
    support = constraints.positive
    reparametrized_params = ["c", "d"]  # noqa: RUF012

    def __init__(self, c: Any, d: Any, *, validate_args: bool | None = None) -> None:
        self.c, self.d = promote_shapes(c, d)
        batch_shape = lax.broadcast_shapes(jnp.shape(c), jnp.shape(d))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    def _survival_exponent(self, value: Any) -> Any:
        """The log of 1 + x^c."""
        return jax.nn.softplus(self.c * jnp.log(value))

    def _at(self, hazard: Any) -> Any:
        """The x with -log(1 - F(x)) = ``hazard``: x^c = exp(hazard / d) - 1, without overflow."""
        y = hazard / self.d
        return jnp.exp((y + jnp.log(-jnp.expm1(-y))) / self.c)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self._at(random.exponential(key, sample_shape + self.batch_shape))

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        log_cd = jnp.log(self.c) + jnp.log(self.d)
        spread = (self.d + 1.0) * self._survival_exponent(value)
        return log_cd + (self.c - 1.0) * jnp.log(value) - spread

    def cdf(self, value: Any) -> Any:
        return -jnp.expm1(-self.d * self._survival_exponent(value))

    def icdf(self, q: Any) -> Any:
        return self._at(-jnp.log1p(-q))

    def _moment(self, k: int) -> Any:
        """The moment E[x^k] = d B(d - k / c, 1 + k / c) for c d > k."""
        exists = self.c * self.d > k
        c = jnp.where(exists, self.c, (k + 1.0) / self.d)
        # of gamma functions, as JAX's betaln is off by 1e-7
        log_value = gammaln(self.d - k / c) + gammaln(1.0 + k / c) - gammaln(self.d)
        return jnp.broadcast_to(jnp.where(exists, jnp.exp(log_value), jnp.inf), self.batch_shape)

    @property
    def mean(self) -> Any:
        return self._moment(1)

    @property
    def variance(self) -> Any:
        return _variance(self._moment(1), self._moment(2))


def _variance(first: Any, second: Any) -> Any:
    """From the first two moments; infinite where the second one is, as in NumPyro."""
    return jnp.where(
        jnp.isinf(second), jnp.inf, second - jnp.where(jnp.isinf(first), 0.0, first) ** 2
    )


@jax.jit
def gig_log_normalizer(p: Any, chi: Any, psi: Any) -> Any:
    """The log of the integral of x^(p - 1) exp(-(chi / x + psi x) / 2) over x > 0.

    With chi and psi positive it is log(2 K_p(sqrt(chi psi))) + (p / 2) log(chi / psi), here by the
    trapezoid rule on a `Grid` of t = log x: the integrand decays doubly exponentially, and the
    error falls geometrically in the number of nodes. Limits: chi = 0 with p > 0 (a gamma law) and
    psi = 0 with p < 0 (an inverse gamma law), where the derivative with respect to the zero is
    taken to be zero; infinite where the integral is.

    Args:
        p: any real order, (*batch).
        chi: not negative, (*batch).
        psi: not negative, (*batch).

    Cost: some 1000 exponentials an element.
    """
    p, chi, psi = jnp.broadcast_arrays(
        *(jnp.asarray(x, jnp.result_type(float)) for x in (p, chi, psi))
    )
    inside = (chi > 0) & (psi > 0)
    a, b = jnp.where(chi > 0, chi, 1.0), jnp.where(psi > 0, psi, 1.0)

    def log_integrand(p: Any, a: Any, b: Any, t: Any) -> Any:
        return p * t - 0.5 * (a * jnp.exp(-t) + b * jnp.exp(t))

    fixed = lax.stop_gradient((p, a, b))
    mode, curvature = _gig_mode(*fixed)
    frozen = functools.partial(log_integrand, *fixed)
    grid = Grid.around(frozen, mode, lax.rsqrt(curvature), _GIG_NODES)
    rank = grid.ranks(_GIG_NODES)
    generic = logsumexp(log_integrand(p, a, b, grid.at(rank)) + grid.log_spacing(rank), axis=0)

    order = jnp.where(psi > 0, p, -p)  # of the gamma function in the limits
    rate = 0.5 * jnp.where(psi > 0, b, a)
    exists = (order > 0) & ((chi > 0) | (psi > 0))
    positive = jnp.where(exists, order, 1.0)
    limit = jnp.where(exists, gammaln(positive) - positive * jnp.log(rate), jnp.inf)
    return jnp.where(inside, generic, limit)


def _gig_mode(p: Any, chi: Any, psi: Any) -> tuple[Any, Any]:
    """Mode of t = log x, and minus the second derivative of the log density of t there.

    The root x of psi x^2 - 2 p x - chi, without cancellation, and (chi / x + psi x) / 2.
    """
    w = jnp.sqrt(p * p + chi * psi)
    up = w + jnp.abs(p)
    mode = jnp.where(p >= 0, jnp.log(up) - jnp.log(psi), jnp.log(chi) - jnp.log(up))
    return mode, w


class GeneralizedInverseGaussian(dist.Distribution):
    """The law with density proportional to x^(p - 1) exp(-(chi / x + psi x) / 2).

    The family of laws of sigma^2 that Gaussian data lead back into: gamma laws (chi = 0), inverse
    gamma laws (psi = 0) and inverse Gaussian laws (p = -1/2) are in it.

    Args:
        p: real; positive where chi = 0 and negative where psi = 0, (*batch).
        chi: not negative, (*batch).
        psi: not negative, (*batch).

    Draws are exact, and not differentiable. Cost of a density: that of `gig_log_normalizer`.
    """

    arg_constraints = {  # noqa: RUF012
        "p": constraints.real,
        "chi": constraints.nonnegative,
        "psi": constraints.nonnegative,
    }
    support = constraints.positive

    def __init__(self, p: Any, chi: Any, psi: Any, *, validate_args: bool | None = None) -> None:
        self.p, self.chi, self.psi = promote_shapes(p, chi, psi)
        batch_shape = lax.broadcast_shapes(jnp.shape(p), jnp.shape(chi), jnp.shape(psi))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        exponent = 0.5 * (self.chi / value + self.psi * value)
        normalizer = gig_log_normalizer(self.p, self.chi, self.psi)
        return (self.p - 1.0) * jnp.log(value) - exponent - normalizer

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Rejection from an envelope of the log-concave density of t = log x.

        At the distance s from the mode, log density falls by A (e^-s - 1 + s) + B (e^s - 1 - s),
        with A = chi / (2 x), B = psi x / 2 at the mode. The envelope is constant around the mode
        and follows the tangents at the two points where that fall is one: three quarters of the
        proposals, or more, are taken.
        """
        shape = sample_shape + self.batch_shape
        mode, _ = _gig_mode(self.p, self.chi, self.psi)
        a, b = 0.5 * self.chi * jnp.exp(-mode), 0.5 * self.psi * jnp.exp(mode)

        def fall(s: Any) -> Any:
            down = jnp.where(a > 0, a * (jnp.expm1(-s) + s), 0.0)
            return down + jnp.where(b > 0, b * (jnp.expm1(s) - s), 0.0)

        def halved(_: int, ends: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = ends
            middle = 0.5 * (low + high)
            short = fall(side * jnp.exp(middle)) < 1.0
            return jnp.where(short, middle, low), jnp.where(short, high, middle)

        # Both sides at once; tangents anywhere make an envelope, so that the search may be rough.
        side = jnp.array([-1.0, 1.0]).reshape(2, *(1,) * len(self.batch_shape))
        lowest = jnp.broadcast_to(-40.0, (2, *self.batch_shape))
        low, high = lax.fori_loop(0, 24, halved, (lowest, lowest + 46.0))
        s = jnp.exp(0.5 * (low + high))
        slope = jnp.abs(a * -jnp.expm1(-side * s) + b * jnp.expm1(side * s))
        corner = s - fall(side * s) / slope  # where the tangent reaches the height of the mode
        tail = (
            1.0 / slope
        )  # the masses below the tangents; between the corners it is their distance
        total = jnp.sum(corner + tail, axis=0)

        def turn(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            key, s, found = state
            key, key_where, key_tail, key_height = random.split(key, 4)
            at = random.uniform(key_where, shape) * total
            far = random.exponential(key_tail, shape)
            height = random.exponential(key_height, shape)
            outside = at >= corner[0] + corner[1]
            leftmost = outside & (at < corner[0] + corner[1] + tail[0])
            beyond = jnp.where(leftmost, -corner[0] - far * tail[0], corner[1] + far * tail[1])
            new = jnp.where(outside, beyond, at - corner[0])
            taken = fall(new) <= height + jnp.where(outside, far, 0.0)
            return key, jnp.where(found, s, new), found | taken

        start = (key, jnp.zeros(shape, total.dtype), jnp.zeros(shape, bool))
        _, s, _ = lax.while_loop(lambda state: ~jnp.all(state[2]), turn, start)
        return jnp.exp(mode + s)

    def _moment(self, k: int) -> Any:
        normalizer = gig_log_normalizer(self.p, self.chi, self.psi)
        return jnp.exp(gig_log_normalizer(self.p + k, self.chi, self.psi) - normalizer)

    @property
    def mean(self) -> Any:
        return self._moment(1)

    @property
    def variance(self) -> Any:
        return _variance(self._moment(1), self._moment(2))


class _SquareOf(dist.Distribution):
    """The law of s^2 where s follows ``base``; p(s^2) = p(s) / (2 s).

    NumPyro's PowerTransform would do, but TransformedDistribution drops the density of folded
    distributions (half-t) and has no moments.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.positive
    pytree_data_fields = ("base",)

    def __init__(self, base: Any, *, validate_args: bool | None = None) -> None:
        self.base = base
        super().__init__(batch_shape=base.batch_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return self.base.has_rsample

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.base.sample(key, sample_shape) ** 2

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        s = jnp.sqrt(value)
        return self.base.log_prob(s) - jnp.log(2.0 * s)

    def cdf(self, value: Any) -> Any:
        return self.base.cdf(jnp.sqrt(value))

    def icdf(self, q: Any) -> Any:
        return self.base.icdf(q) ** 2

    @property
    def mean(self) -> Any:
        first, spread = self.base.mean, self.base.variance
        return jnp.where(jnp.isfinite(spread), spread + first**2, jnp.inf)


def of_standard_deviation(law: Any) -> dist.Distribution:
    """The law of sigma^2, from a law of sigma on the positive reals.

    Args:
        law: say ``HalfCauchy``, ``HalfNormal`` or, for a half-t, ``FoldedDistribution(StudentT)``.

    Raises:
        DataError: ``law`` is no NumPyro distribution of one positive number.
    """
    if not isinstance(law, dist.Distribution) or law.event_shape:
        raise DataError(
            f"of_standard_deviation needs a NumPyro distribution of one number, such as "
            f"HalfCauchy(1.0); got {law!r:.80}."
        )
    if law.support not in (constraints.positive, constraints.nonnegative):
        raise DataError(
            f"A standard deviation is positive, but this law has support {law.support!r:.60}; "
            "fold or transform it first, say with FoldedDistribution."
        )
    return _SquareOf(law)
