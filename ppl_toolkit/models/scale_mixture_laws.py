"""Scale mixtures of Gaussians as distributions: sigma^2 ~ H, f | sigma^2 ~ N(loc, sigma^2 C).

One sigma is shared by all coordinates of a vector, which makes its distribution elliptical: an
inverse gamma law of sigma^2 gives Student's t.
Sources: Shah, Wilson and Ghahramani (2014) for Student-t processes; Gneiting and Raftery (2007) for
the continuous ranked probability score, Jordan, Krüger and Lerch (2019) for its closed forms.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.special import betainc, gammaln, logsumexp, ndtr, ndtri
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from ppl_toolkit.errors import DataError
from ppl_toolkit.models.scale_quadrature import atoms_of, checked_law, log_marginal, mean_of
from ppl_toolkit.models.scale_tables import Tabulated

__all__ = [
    "ScaleMixtureNormal",
    "ScaleMixtureProcess",
    "StudentTProcess",
    "student_t_cdf",
    "student_t_icdf",
]

_LOG_2PI = math.log(2.0 * math.pi)
_LEGENDRE = np.polynomial.legendre.leggauss(48)


def _quadratic(scale_tril: Any, residual: Any) -> Any:
    """|L^-1 r|^2 for L (*batch, n, n) and r (..., n)."""
    n = scale_tril.shape[-1]
    if scale_tril.ndim == 2:  # one factor: all residuals are columns of one system
        columns = jnp.swapaxes(residual.reshape(-1, n), 0, 1)
        solved = lax.linalg.triangular_solve(scale_tril, columns, left_side=True, lower=True)
        return jnp.sum(solved**2, axis=0).reshape(residual.shape[:-1])
    batch = lax.broadcast_shapes(scale_tril.shape[:-2], residual.shape[:-1])
    wide = jnp.broadcast_to(scale_tril, (*batch, n, n))
    column = jnp.broadcast_to(residual, (*batch, n))[..., None]
    solved = lax.linalg.triangular_solve(wide, column, left_side=True, lower=True)
    return jnp.sum(solved[..., 0] ** 2, axis=-1)


class ScaleMixtureProcess(dist.Distribution):
    """A vector of n numbers with one sigma: N(loc, sigma^2 L L') with sigma^2 from ``law``.

    Args:
        law: of sigma^2, any NumPyro distribution of a positive number, (*batch).
        scale_tril: L, lower triangular with positive diagonal, (*batch, n, n).
        loc: (*batch, n), or a number.

    Shapes of batches broadcast, as for NumPyro's MultivariateNormal. ``mean`` is ``loc``, the
    centre of symmetry, which is no mean where E[sigma] is infinite (for an inverse gamma law it is
    then infinite, as for NumPyro's MultivariateStudentT). Cost of a density: O(n^2), and the
    integral over sigma^2, which does not depend on n.

    Raises:
        DataError: ``law`` is not a law of a positive number.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}  # noqa: RUF012
    support = constraints.real_vector
    pytree_data_fields = ("law", "loc", "scale_tril")

    def __init__(
        self, law: Any, scale_tril: Any, loc: Any = 0.0, *, validate_args: bool | None = None
    ) -> None:
        self.law = checked_law(law)
        self._placed(law.batch_shape, scale_tril, loc, validate_args)

    def _placed(
        self, batch: tuple[int, ...], scale_tril: Any, loc: Any, validate_args: bool | None
    ) -> None:
        n = jnp.shape(scale_tril)[-1] if jnp.ndim(scale_tril) >= 2 else 0
        if not n or jnp.shape(scale_tril)[-2] != n or jnp.shape(loc)[-1:] not in ((), (1,), (n,)):
            seen = f"{jnp.shape(scale_tril)} and {jnp.shape(loc)}"
            raise DataError(
                f"scale_tril must have shape (..., n, n) and loc (..., n) or (); got {seen}."
            )
        self.scale_tril = jnp.asarray(scale_tril)
        self.loc = jnp.broadcast_to(loc, (*jnp.shape(loc)[:-1], n))
        batch = lax.broadcast_shapes(batch, self.scale_tril.shape[:-2], self.loc.shape[:-1])
        dist.Distribution.__init__(self, batch, (n,), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return self.law.has_rsample

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        key_scale, key_normal = random.split(key)
        s2 = self.law.expand(self.batch_shape).sample(key_scale, sample_shape)
        normal = random.normal(key_normal, self.shape(sample_shape))
        spread = jnp.einsum("...ij,...j->...i", self.scale_tril, normal)
        return self.loc + jnp.sqrt(s2)[..., None] * spread

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        (n,) = self.event_shape
        q = _quadratic(self.scale_tril, value - self.loc)
        half_log_det = jnp.sum(jnp.log(jnp.diagonal(self.scale_tril, axis1=-2, axis2=-1)), axis=-1)
        return log_marginal(self.law, q, n) - half_log_det - 0.5 * n * _LOG_2PI

    @property
    def mean(self) -> Any:
        loc = self.loc
        if isinstance(self.law, dist.InverseGamma):
            loc = jnp.where(jnp.asarray(self.law.concentration)[..., None] <= 0.5, jnp.inf, loc)
        return jnp.broadcast_to(loc, self.shape())

    @property
    def variance(self) -> Any:
        """E[sigma^2] times the diagonal of L L'; infinite where E[sigma^2] is."""
        diagonal = jnp.sum(self.scale_tril**2, axis=-1)
        variance = mean_of(self.law)[..., None] * diagonal
        if isinstance(self.law, dist.InverseGamma):
            variance = jnp.where(
                jnp.asarray(self.law.concentration)[..., None] <= 0.5, jnp.nan, variance
            )
        return jnp.broadcast_to(variance, self.shape())


class StudentTProcess(ScaleMixtureProcess):
    """`ScaleMixtureProcess` with an inverse gamma law: multivariate t in closed form.

    It has 2 alpha degrees of freedom and the scale matrix (beta / alpha) L L'.

    Args:
        alpha: positive, (*batch).
        beta: positive, (*batch).
        scale_tril: L, (*batch, n, n).
        loc: (*batch, n), or a number.
    """

    arg_constraints = {  # noqa: RUF012
        "alpha": constraints.positive,
        "beta": constraints.positive,
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
    }
    pytree_data_fields = ("alpha", "beta", "law")
    reparametrized_params = ["alpha", "beta", "loc", "scale_tril"]  # noqa: RUF012

    def __init__(
        self,
        alpha: Any,
        beta: Any,
        scale_tril: Any,
        loc: Any = 0.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.alpha, self.beta = alpha, beta
        self.law = dist.InverseGamma(alpha, beta)
        self._placed(self.law.batch_shape, scale_tril, loc, validate_args)


def _t_log_density(z: Any, nu: Any) -> Any:
    log_constant = gammaln(0.5 * (nu + 1.0)) - gammaln(0.5 * nu) - 0.5 * jnp.log(nu * math.pi)
    return log_constant - 0.5 * (nu + 1.0) * jnp.log1p(z * z / nu)


@jax.custom_jvp
def _t_cdf(z: Any, nu: Any) -> Any:
    square = z * z
    core = square < 0.4  # each form of the tail where its argument, and it, keep their digits
    a, b = jnp.where(core, 0.5, 0.5 * nu), jnp.where(core, 0.5 * nu, 0.5)
    half = 0.5 * betainc(a, b, jnp.where(core, square, nu) / (nu + square))
    lower = jnp.where(core, 0.5 - half, half)
    return jnp.where(z < 0, lower, 1.0 - lower)


def _t_cdf_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    """The rule dF = f dz + (integral of df / dnu from 0 to z) dnu: JAX has none for nu.

    The integral goes over w = asinh(x), by Gauss-Legendre, in which heavy tails are short.
    """
    (z, nu), (dz, dnu) = primals, tangents
    change = jnp.zeros_like(z)
    if type(dz) is not jax.custom_derivatives.SymbolicZero:
        change = change + jnp.exp(_t_log_density(z, nu)) * dz
    if type(dnu) is not jax.custom_derivatives.SymbolicZero:
        nodes, weights = (jnp.asarray(x, z.dtype) for x in _LEGENDRE)
        half = 0.5 * jnp.arcsinh(z)
        w = half[..., None] * (1.0 + nodes)
        x, wide = jnp.sinh(w), nu[..., None]
        density, slope = jax.jvp(lambda v: _t_log_density(x, v), (wide,), (jnp.ones_like(wide),))
        integral = half * jnp.sum(weights * jnp.exp(density) * slope * jnp.cosh(w), axis=-1)
        change = change + integral * dnu
    return _t_cdf(z, nu), change


_t_cdf.defjvp(_t_cdf_jvp, symbolic_zeros=True)


def _together(*values: Any) -> tuple[Any, ...]:
    # Times one: else jit of vmap of a custom derivative fails on constants that are NumPy arrays.
    dtype = jnp.result_type(float)
    return tuple(jnp.broadcast_arrays(*(1.0 * jnp.asarray(x, dtype) for x in values)))


def student_t_cdf(z: Any, nu: Any) -> Any:
    """CDF of Student's t with ``nu`` degrees of freedom; differentiable in both.

    NumPyro's is not differentiable in the degrees of freedom, and off by 1e-9 around zero. The
    derivative in ``nu`` is good to 1e-8.
    """
    return _t_cdf(*_together(z, nu))


def student_t_icdf(p: Any, nu: Any) -> Any:
    """Quantiles of Student's t with ``nu`` degrees of freedom; once differentiable in both.

    In w = asinh(-z) the log CDF is concave, so that Newton's iterations from beyond the root go
    there without overshooting. Cost: some 10 evaluations of the CDF.
    """
    p, nu = _together(p, nu)
    fixed, order = lax.stop_gradient((p, nu))
    tail = jnp.minimum(fixed, 1.0 - fixed)
    tiny = jnp.finfo(p.dtype).tiny
    log_tail = jnp.log(jnp.maximum(tail, tiny))
    # Beyond the root: F(-z) <= c z^-nu, the limit of the density integrated.
    log_constant = _t_log_density(jnp.zeros_like(order), order) + 0.5 * (order - 1.0) * jnp.log(
        order
    )
    far = (log_constant - log_tail) / order
    # With many degrees of freedom that is far off: a bit beyond Gaver and Kafadar's (1984) value.
    many = jnp.maximum(order, 4.0)
    g = (many - 1.5) / (many - 1.0) ** 2
    kafadar = 0.5 * jnp.log(many * jnp.expm1(g * ndtri(jnp.maximum(tail, tiny)) ** 2) + 1e-3)
    far = jnp.where(order > 4.0, jnp.minimum(far, kafadar + 0.2), far)
    close = math.sqrt(float(jnp.finfo(p.dtype).eps))  # convergence is quadratic
    huge = 0.45 * math.log(float(jnp.finfo(p.dtype).max))  # z^2 overflows; the start is exact there
    # asinh(e^far), without overflow of e^far
    start = jnp.where(far > 20.0, far + math.log(2.0), jnp.arcsinh(jnp.exp(jnp.minimum(far, 20.0))))

    def turn(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        w, _, count = state
        z = jnp.sinh(w)
        below = jnp.maximum(_t_cdf(-z, order), tiny)
        slope = -jnp.exp(_t_log_density(z, order) - jnp.log(below)) * jnp.cosh(w)
        move = (log_tail - jnp.log(below)) / slope
        move = jnp.where(jnp.isfinite(move), jnp.clip(move, -0.5 * w - 1e-3, 2.0), -0.5 * w)
        new = jnp.where(w > huge, w, jnp.maximum(w + move, 0.0))
        return new, jnp.any(jnp.abs(new - w) > close * (1.0 + w)), count + 1

    w, _, _ = lax.while_loop(lambda s: s[1] & (s[2] < 40), turn, (start, jnp.array(True), 0))
    z = jnp.where(tail == 0, jnp.inf, jnp.sinh(w)) * jnp.sign(fixed - 0.5)
    return jnp.where(jnp.isinf(z), z, _implicit(_t_cdf, z, p, nu))


def _implicit(cdf: Any, z: Any, p: Any, *parameters: Any) -> Any:
    """z, with the derivatives of the solution of cdf(z, *parameters) = p."""
    z = lax.stop_gradient(jnp.where(jnp.isfinite(z), z, 0.0))
    held = lax.stop_gradient(parameters)
    _, density = jax.jvp(lambda x: cdf(x, *held), (z,), (jnp.ones_like(z),))
    gap = p - cdf(z, *parameters)
    gap = gap - lax.stop_gradient(gap)  # zero, but for its derivatives
    return z + gap / lax.stop_gradient(jnp.maximum(density, jnp.finfo(z.dtype).tiny))


def _normal_absolute(m: Any, s: Any) -> Any:
    """E|X| for X ~ N(m, s^2)."""
    z = m / s
    return m * (2.0 * ndtr(z) - 1.0) + 2.0 * s * jnp.exp(-0.5 * (z * z + _LOG_2PI))


class ScaleMixtureNormal(dist.Distribution):
    """Independent numbers, each N(loc, sigma^2 scale^2) with its own sigma^2 from ``law``.

    The marginals of `ScaleMixtureProcess`. Student's t in closed form for an inverse gamma law of
    sigma^2; for Atoms, Delta and Tabulated a finite mixture, and for other laws one over the nodes
    of a quadrature (densities: one of their own). Bisection finds quantiles of finite mixtures.

    Args:
        law: of sigma^2, (*batch).
        loc: (*batch).
        scale: positive, (*batch).

    Cost: that of an incomplete beta function for a CDF of Student's t; K normal CDFs for a
    mixture of K, 64 times that for a quantile.

    Raises:
        DataError: ``law`` is not a law of a positive number.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.real
    pytree_data_fields = ("law", "loc", "scale", "_atoms")

    def __init__(
        self, law: Any, loc: Any = 0.0, scale: Any = 1.0, *, validate_args: bool | None = None
    ) -> None:
        self.law = checked_law(law)
        batch = lax.broadcast_shapes(law.batch_shape, jnp.shape(loc), jnp.shape(scale))
        self.loc, self.scale = jnp.broadcast_to(loc, batch), jnp.broadcast_to(scale, batch)
        # Once, rather than in every method: a compiled program would repeat the quadrature.
        self._atoms: Any = None if isinstance(law, dist.InverseGamma) else atoms_of(law)
        super().__init__(batch_shape=batch, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return self.law.has_rsample

    @property
    def _student(self) -> tuple[Any, Any] | None:
        """Degrees of freedom and scale, if this is Student's t."""
        if not isinstance(self.law, dist.InverseGamma):
            return None
        alpha, beta = self.law.concentration, self.law.rate
        return 2.0 * alpha, self.scale * jnp.sqrt(beta / alpha)

    def _mixture(self) -> tuple[Any, Any]:
        """Standard deviations at ``scale`` = 1 and weights of the normals, (*law batch, K)."""
        values, log_weights = self._atoms
        return jnp.sqrt(values), jnp.exp(log_weights)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        key_scale, key_normal = random.split(key)
        s2 = self.law.expand(self.batch_shape).sample(key_scale, sample_shape)
        normal = random.normal(key_normal, self.shape(sample_shape))
        return self.loc + self.scale * jnp.sqrt(s2) * normal

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        z = (value - self.loc) / self.scale
        constant = jnp.log(self.scale) + 0.5 * _LOG_2PI
        if isinstance(self.law, Tabulated):  # its nodes are more accurate than its density
            values, log_weights = self.law.atoms
            terms = log_weights - 0.5 * (jnp.log(values) + z[..., None] ** 2 / values)
            return logsumexp(terms, axis=-1) - constant
        return log_marginal(self.law, z * z, 1.0) - constant

    def cdf(self, value: Any) -> Any:
        student = self._student
        if student:
            nu, s = student
            return student_t_cdf((value - self.loc) / s, nu)
        return _mixture_cdf((value - self.loc) / self.scale, *self._mixture())

    def icdf(self, q: Any) -> Any:
        student = self._student
        if student:
            nu, s = student
            return self.loc + s * student_t_icdf(q, nu)
        return self.loc + self.scale * _mixture_icdf(q, *self._mixture())

    @property
    def mean(self) -> Any:
        """``loc``, the centre of symmetry; infinite for Student's t without a mean."""
        student = self._student
        loc = self.loc if student is None else jnp.where(student[0] <= 1.0, jnp.inf, self.loc)
        return jnp.broadcast_to(loc, self.batch_shape)

    @property
    def variance(self) -> Any:
        variance = mean_of(self.law) * self.scale**2
        student = self._student
        if student:
            variance = jnp.where(student[0] <= 1.0, jnp.nan, variance)
        return jnp.broadcast_to(variance, self.batch_shape)

    def crps(self, value: Any) -> Any:
        """Continuous ranked probability score, E|X - y| - E|X - X'| / 2: smaller is better.

        NaN for Student's t with at most one degree of freedom. Cost for a mixture of K: K^2 once,
        K for every value.
        """
        student = self._student
        if student:
            nu, s = student
            z = (value - self.loc) / s
            exists = nu > 1.0
            nu = jnp.where(exists, nu, 2.0)
            # B(1/2, nu - 1/2) / B(1/2, nu/2)^2; JAX's betaln is off by 1e-7
            halves = 2.0 * (gammaln(0.5 * (nu + 1.0)) - gammaln(0.5 * nu))
            ratio = jnp.exp(gammaln(nu - 0.5) - gammaln(nu) + halves) / math.sqrt(math.pi)
            density = jnp.exp(_t_log_density(z, nu))
            near = z * (2.0 * student_t_cdf(z, nu) - 1.0)
            near = near + 2.0 * density * (nu + z * z) / (nu - 1.0)
            apart = 2.0 * jnp.sqrt(nu) / (nu - 1.0) * ratio
            return jnp.where(exists, s * (near - apart), jnp.nan)
        sd, weights = self._mixture()
        z = (value - self.loc) / self.scale
        near = jnp.sum(weights * _normal_absolute(z[..., None], sd), axis=-1)
        both = jnp.sqrt(sd[..., :, None] ** 2 + sd[..., None, :] ** 2)  # sd of X - X'
        apart = math.sqrt(2.0 / math.pi) * jnp.einsum("...i,...ij,...j", weights, both, weights)
        return self.scale * (near - 0.5 * apart)

    def expected_improvement(self, best: Any) -> Any:
        """E[max(best - X, 0)], for minimisation; infinite for t with at most one degree of freedom.

        Source: Tracey and Wolpert (2018) for Student's t.
        """
        student = self._student
        if student:
            nu, s = student
            z = (best - self.loc) / s
            exists = nu > 1.0
            nu = jnp.where(exists, nu, 2.0)
            spread = (nu + z * z) / (nu - 1.0) * jnp.exp(_t_log_density(z, nu))
            return jnp.where(exists, s * (z * student_t_cdf(z, nu) + spread), jnp.inf)
        sd, weights = self._mixture()
        z = ((best - self.loc) / self.scale)[..., None]
        density = jnp.exp(-0.5 * ((z / sd) ** 2 + _LOG_2PI))
        return self.scale * jnp.sum(weights * (z * ndtr(z / sd) + sd * density), axis=-1)


def _mixture_cdf(z: Any, sd: Any, weights: Any) -> Any:
    return jnp.sum(weights * ndtr(z[..., None] / sd), axis=-1)


def _mixture_icdf(p: Any, sd: Any, weights: Any) -> Any:
    """Quantiles of a mixture of N(0, sd_k^2), to rounding errors.

    In the tail of p the quantile is tau times the normal one, with tau between the smallest and
    the largest sd: bisection in log tau.
    """
    p = jnp.asarray(p, jnp.result_type(float))
    shape = lax.broadcast_shapes(p.shape, sd.shape[:-1])
    p = jnp.broadcast_to(p, shape)
    fixed, sd0, w0 = lax.stop_gradient((p, sd, weights))
    tail = jnp.minimum(fixed, 1.0 - fixed)
    normal = ndtri(tail)
    finite = jnp.where(jnp.isfinite(normal), normal, 0.0)

    def halved(_: int, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = ends
        middle = 0.5 * (low + high)
        short = _mixture_cdf(finite * jnp.exp(middle), sd0, w0) > tail
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    log_sd = jnp.log(sd0)
    start = tuple(jnp.broadcast_to(f(log_sd, axis=-1), shape) for f in (jnp.min, jnp.max))
    low, high = lax.fori_loop(0, 64, halved, start)
    z = normal * jnp.exp(0.5 * (low + high)) * jnp.where(fixed > 0.5, -1.0, 1.0)
    return jnp.where(jnp.isinf(z), z, _implicit(_mixture_cdf, z, p, sd, weights))
