"""Laws of a squared scale: what sigma^2 of a scale mixture may be drawn from.

A scale mixture is sigma^2 ~ H, f | sigma^2 ~ N(loc, sigma^2 C). Any NumPyro distribution on the
positive reals can be H; here are those that NumPyro lacks. All are ordinary distributions, for
sample sites too.
Sources: Burr (1942); Jørgensen (1982) for the generalised inverse Gaussian; Devroye (1986), chapter
VII, and Hörmann and Leydold (2014) for rejection from a log-concave density.
"""

from __future__ import annotations

import functools
import math
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
from numpyro.distributions.util import promote_shapes, validate_sample

from ppl_toolkit.errors import DataError

__all__ = [
    "Atoms",
    "BurrXII",
    "GeneralizedInverseGaussian",
    "Grid",
    "Tabulated",
    "farthest",
    "gig_log_normalizer",
    "of_standard_deviation",
]

_GIG_NODES = 257
_TRIES = 64


def farthest() -> float:
    """The largest |u| whose exponential is a number in the precision of the run."""
    return 0.98 * math.log(float(jnp.finfo(jnp.result_type(float)).max))


class Grid(NamedTuple):
    """Nodes for an integral over u: equidistant in v, with u = centre + width sinh(v).

    Around the centre they are equidistant in u, further out ever wider apart: tails that decay
    like exp(-|u|), as power laws of sigma^2 = e^u do, cost few nodes, and integrands analytic in a
    strip remain so.

    Attributes:
        centre, width: in u, (*batch).
        first, step: of v, (*batch).
    """

    centre: Any
    width: Any
    first: Any
    step: Any

    @classmethod
    def around(cls, log_integrand: Callable[[Any], Any], mode: Any, sd: Any, count: int) -> Grid:
        """The grid of ``count`` nodes from where to where an integrand is not negligible.

        On each side it goes out from the mode by growing steps, until the integrand is and remains
        below eps e^-9 of its value at the mode. All distances are tried at once: that costs less
        than a loop.

        Args:
            log_integrand: elementwise in u, (..., *batch).
            mode: its mode, (*batch).
            sd: (-(log integrand)'')^(-1/2) at the mode, (*batch).
            count: of nodes.
        """
        limit, width = farthest(), 2.0 * sd
        drop = 9.0 - math.log(float(jnp.finfo(jnp.result_type(float)).eps))  # 45 in float64
        rank = jnp.arange(_TRIES).reshape(_TRIES, *(1,) * jnp.ndim(mode))
        least = jnp.minimum(width, 3.0)  # a plateau may end well within its standard deviation
        growth = jnp.log(2.0 * limit / least) / (_TRIES - 1)  # 20 % a try, for sd = 0.005
        reach = least * jnp.exp(rank * growth)
        heights = log_integrand(jnp.clip(mode + jnp.stack([-reach, reach]), -limit, limit))
        counted = jnp.isfinite(heights) & (heights > log_integrand(mode) - drop)
        beyond = jnp.max(jnp.where(counted, rank + 1, 0), axis=1)  # one past the last that counts
        room = jnp.stack([limit + mode, limit - mode])
        out = jnp.minimum(least * jnp.exp(beyond * growth), room)
        left, right = jnp.arcsinh(out / width)
        return cls(mode, width, -left, (left + right) / (count - 1))

    def at(self, position: Any) -> Any:
        """The u at a number of steps from the first node."""
        return self.centre + self.width * jnp.sinh(self.first + position * self.step)

    def position(self, u: Any) -> Any:
        """The inverse of ``at``."""
        return (jnp.arcsinh((u - self.centre) / self.width) - self.first) / self.step

    def log_spacing(self, position: Any) -> Any:
        """The log of du by d position: the weights of the trapezoid rule."""
        return jnp.log(self.step * self.width * jnp.cosh(self.first + position * self.step))

    def ranks(self, count: int) -> Any:
        """0, ..., count - 1 along a new first axis."""
        return jnp.arange(count).reshape(count, *(1,) * jnp.ndim(self.first))


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


class Atoms(dist.Distribution):
    """A law on finitely many positive values.

    As for NumPyro's Delta, ``log_prob`` is the log mass of a value, and minus infinity between the
    values: such a site can be drawn and observed, but gradient-based methods cannot move it.

    Args:
        values: positive, (*batch, K).
        log_probs: logs of weights, up to a constant; minus infinity allowed, (*batch, K).
    """

    arg_constraints = {  # noqa: RUF012
        "values": constraints.independent(constraints.positive, 1),
        "log_probs": constraints.independent(constraints.less_than_eq(0.0), 1),
    }
    support = constraints.positive

    def __init__(self, values: Any, log_probs: Any, *, validate_args: bool | None = None) -> None:
        if jnp.ndim(values) == 0 or jnp.ndim(log_probs) == 0:
            seen = f"{jnp.shape(values)} and {jnp.shape(log_probs)}"
            raise DataError(f"Atoms needs values and log_probs of shape (..., K); got {seen}.")
        shape = lax.broadcast_shapes(jnp.shape(values), jnp.shape(log_probs))
        self.values: Any
        self.log_probs: Any
        if isinstance(values, jax.Array) or isinstance(log_probs, jax.Array):
            self.values = jnp.broadcast_to(jnp.asarray(values, jnp.result_type(float)), shape)
            log_probs = jnp.broadcast_to(log_probs, shape)
            self.log_probs = jnp.minimum(log_probs - logsumexp(log_probs, -1, keepdims=True), 0.0)
        else:  # in double precision, whatever precision is active
            self.values = np.broadcast_to(np.asarray(values, np.float64), shape)
            log_probs = np.broadcast_to(np.asarray(log_probs, np.float64), shape)
            total = np.logaddexp.reduce(log_probs, -1, keepdims=True)
            self.log_probs = np.minimum(log_probs - total, 0.0)
        super().__init__(batch_shape=shape[:-1], validate_args=validate_args)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        chosen = random.categorical(key, self.log_probs, shape=sample_shape + self.batch_shape)
        return _picked(self.values, chosen)

    def _log_mass(self, chosen: Any) -> Any:
        return logsumexp(jnp.where(chosen, self.log_probs, -jnp.inf), axis=-1)

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        return self._log_mass(jnp.asarray(value)[..., None] == self.values)

    def cdf(self, value: Any) -> Any:
        return jnp.exp(self._log_mass(jnp.asarray(value)[..., None] >= self.values))

    @property
    def mean(self) -> Any:
        return jnp.sum(jnp.exp(self.log_probs) * self.values, axis=-1)

    @property
    def variance(self) -> Any:
        return jnp.sum(jnp.exp(self.log_probs) * (self.values - self.mean[..., None]) ** 2, axis=-1)


def _picked(table: Any, index: Any) -> Any:
    """table[..., index], for a table (*batch, K) and an index (..., *batch)."""
    if table.ndim == 1:
        return table[index]
    wide = jnp.broadcast_to(table, index.shape + table.shape[-1:])
    return jnp.take_along_axis(wide, index[..., None], axis=-1)[..., 0]


class Tabulated(dist.Distribution):
    """A continuous law known at nodes: what quadrature makes of a posterior.

    The nodes are equidistant in the coordinate v of a `Grid`, u = centre + width sinh(v), with
    sigma^2 = T(u) and T NumPyro's bijection to the support. A weight is the density of v times the
    step; with 129 nodes on a bell a step is h = 0.07 of its standard deviations at the mode.

    Args:
        grid: where the nodes are, (*batch).
        log_weights: up to a constant, (*batch, N), N >= 4.
        support: of sigma^2.

    Accuracy: ``atoms`` integrates smooth functions to rounding errors. ``log_prob`` (interpolated
    by cubics) is good to about 1e-5, ``cdf`` to 2e-6. A draw is a node and a uniform shift of half
    a step in v to either side: its CDF is off by h^2 / 24 times the slope of the density of v,
    about 5e-5, and its variance by h^2 / 12 = 0.04 %.
    ``mean`` and ``variance`` are infinite where their integrands rise at the last node.
    """

    arg_constraints = {"log_weights": constraints.independent(constraints.less_than_eq(0.0), 1)}  # noqa: RUF012
    pytree_data_fields = ("grid", "log_weights", "_support")

    def __init__(
        self,
        grid: Grid,
        log_weights: Any,
        support: Any = constraints.positive,
        *,
        validate_args: bool | None = None,
    ) -> None:
        shape = lax.broadcast_shapes(*map(jnp.shape, grid), jnp.shape(log_weights)[:-1])
        self.grid = Grid(*(jnp.broadcast_to(x, shape) for x in grid))
        log_weights = jnp.broadcast_to(log_weights, shape + jnp.shape(log_weights)[-1:])
        self.log_weights = jnp.minimum(log_weights - logsumexp(log_weights, -1, keepdims=True), 0.0)
        self._support = support
        super().__init__(batch_shape=shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return self._support

    @property
    def atoms(self) -> tuple[Float[Array, "*batch N"], Float[Array, "*batch N"]]:
        """The nodes' values of sigma^2, and their normalised log weights."""
        rank = self.grid.ranks(self.log_weights.shape[-1])
        values = biject_to(self._support)(self.grid.at(rank))
        return jnp.moveaxis(values, 0, -1), self.log_weights

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        key_node, key_shift = random.split(key)
        shape = sample_shape + self.batch_shape
        node = random.categorical(key_node, self.log_weights, shape=shape)
        shift = random.uniform(key_shift, shape, minval=-0.5, maxval=0.5)
        return biject_to(self._support)(self.grid.at(node + shift))

    def _node(self, position: Any) -> Any:
        count = self.log_weights.shape[-1]
        return jnp.clip(jnp.floor(lax.stop_gradient(position)), 0, count - 2).astype(jnp.int32)

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        """By the cubic through four nodes; linear in u beyond the ends, as power tails are."""
        transform, last = biject_to(self._support), self.log_weights.shape[-1] - 1
        u = transform.inv(value)
        position = self.grid.position(u)
        inside = jnp.clip(position, 0, last)
        node = jnp.clip(self._node(position), 1, last - 2)
        t = inside - node
        a, b, c, d = (_picked(self.log_weights, node + k) for k in (-1, 0, 1, 2))
        outer = ((t + 1.0) * t * (t - 1.0) * d - t * (t - 1.0) * (t - 2.0) * a) / 6.0
        inner = ((t + 1.0) * (t - 1.0) * (t - 2.0) * b - (t + 1.0) * t * (t - 2.0) * c) / 2.0
        log_density = outer + inner - self.grid.log_spacing(inside)

        near = jnp.where(position < inside, 0, last - 1)  # the first of the two nodes at an end
        low, high = (_picked(self.log_weights, near + k) for k in (0, 1))
        rise = high - low - self.grid.log_spacing(near + 1) + self.grid.log_spacing(near)
        slope = rise / (self.grid.at(near + 1) - self.grid.at(near))
        log_density = log_density + jnp.where(
            position == inside, 0.0, slope * (u - self.grid.at(inside))
        )
        return log_density - transform.log_abs_det_jacobian(u, value)

    def _cumulative(self) -> tuple[Any, Any]:
        """CDF at the nodes, and the masses of a step by the density there."""
        w = jnp.exp(self.log_weights)
        slope = jnp.asarray(jnp.gradient(w, axis=-1))
        below = jnp.cumsum(w, axis=-1) - 0.5 * w - slope / 12.0  # Euler-Maclaurin
        return jnp.clip(below, 0.0, 1.0), w

    def _cdf_at(self, node: Any, t: Any) -> Any:
        """Hermite's cubic through two values and slopes of the CDF."""
        below, w = self._cumulative()
        f0, f1, d0, d1 = (_picked(table, node + k) for table in (below, w) for k in (0, 1))
        rise = t * t * (3.0 - 2.0 * t)
        return f0 + (f1 - f0) * rise + t * (1.0 - t) * (d0 * (1.0 - t) - d1 * t)

    def cdf(self, value: Any) -> Any:
        position = self.grid.position(biject_to(self._support).inv(value))
        node = self._node(position)
        return self._cdf_at(node, jnp.clip(position - node, 0.0, 1.0))

    def icdf(self, q: Any) -> Any:
        """By bisection over the nodes, then inside a step; O(N) an element."""
        below, w = self._cumulative()
        q = jnp.asarray(q)
        count = below.shape[-1]
        node = jnp.clip(jnp.sum(below <= q[..., None], axis=-1) - 1, 0, count - 2)

        def halved(_: int, ends: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = ends
            middle = 0.5 * (low + high)
            short = self._cdf_at(node, middle) < q
            return jnp.where(short, middle, low), jnp.where(short, high, middle)

        start = (jnp.zeros(node.shape, w.dtype), jnp.ones(node.shape, w.dtype))
        low, high = lax.fori_loop(0, 54, halved, start)
        return biject_to(self._support)(self.grid.at(node + 0.5 * (low + high)))

    def _expected(self, values: Any) -> Any:
        """Expectation of positive values at the nodes; infinite where the terms rise at the end."""
        terms = self.log_weights + jnp.log(values)
        diverges = terms[..., -1] > terms[..., -2]
        return jnp.where(diverges, jnp.inf, jnp.exp(logsumexp(terms, axis=-1)))

    @property
    def mean(self) -> Any:
        return self._expected(self.atoms[0])

    @property
    def variance(self) -> Any:
        values, log_weights = self.atoms
        centre = jnp.where(jnp.isinf(self.mean), 0.0, self.mean)[..., None]
        central = jnp.sum(jnp.exp(log_weights) * (values - centre) ** 2, axis=-1)
        return jnp.where(jnp.isinf(self._expected(values**2)), jnp.inf, central)


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
