"""The approximating law of sparse variational inference for scale mixtures, and parts of its bound.

C functions of an input are independent Gaussian processes given one squared scale sigma^2. With
inducing inputs they are linear in whitened coefficients v_c = sigma w_c, up to a rest: with A, r
the `Pieces` of the kernel,

    v_c | sigma^2 ~ N(0, sigma^2 I),    f_ic | v, sigma^2 ~ N(A_i v_c, sigma^2 r_i).

The approximating law is q(sigma^2) = InverseGamma(a, b),

    q(v_c | sigma^2) = N(m_c + sigma k_c, sigma^2 S_c).

Lee et al. have k = 0: right where the data tell v whatever the scale, as targets with noise
proportional to sigma do, and then the posterior is in the family. Labels tell the direction of v
and little of its length, which grows with sigma. With k = 0 and M C coefficients of a given length,
q(sigma^2) would be as narrow as if these had been observed.

The bound on the evidence is

    E_q[log p(y | f)] - KL(q(sigma^2) | p(sigma^2)) - E KL(q(v | sigma^2) | p(v | sigma^2)),

of which the likelihood sees the `Moments` alone.

Sources: Titsias (2009), AISTATS; Hensman, Matthews, Ghahramani (2015), AISTATS; Lee, Yun, Yang, Lee
(2022), ICLR; Khan and Lin (2017) and Salimbeni, Eleftheriadis, Hensman (2018), AISTATS, for natural
gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.special import digamma, gammaln
from jaxtyping import Array, Float, Int

__all__ = [
    "Coefficients",
    "Expected",
    "InverseGammaScale",
    "Moments",
    "Pieces",
    "PointScale",
    "drawn",
    "expected_log_softmax",
    "moments",
    "natural_step",
]


class Pieces(NamedTuple):
    """What the kernel says of some inputs, and their labels.

    Attributes:
        basis: A, rows of (L^-1 K_ZX)^T with L L^T = K_ZZ, (B, M).
        residual: r, what the inducing inputs leave open of the kernel's diagonal, (B,).
        labels: integers, (B,); None if there are none.
    """

    basis: Float[Array, "B M"]
    residual: Float[Array, " B"]
    labels: Int[Array, " B"] | None


class InverseGammaScale(NamedTuple):
    """The law InverseGamma(a, b) of sigma^2.

    Attributes:
        log_shape: log a.
        log_ratio: log(b / a): data determine it well, whatever a is.
    """

    log_shape: Any
    log_ratio: Any

    @classmethod
    def of(cls, a: Any, b: Any) -> InverseGammaScale:
        return cls(jnp.log(a), jnp.log(b) - jnp.log(a))

    @property
    def shape(self) -> Any:
        return jnp.exp(self.log_shape)

    @property
    def rate(self) -> Any:
        return jnp.exp(self.log_shape + self.log_ratio)

    @property
    def log(self) -> Any:
        """E[log sigma^2] = log b - digamma(a)."""
        return self.log_shape + self.log_ratio - digamma(self.shape)

    @property
    def inverses(self) -> tuple[Any, Any]:
        """E[1 / sigma] = Gamma(a + 1/2) / (Gamma(a) sqrt(b)) and E[1 / sigma^2] = a / b."""
        a = self.shape
        root = jnp.exp(gammaln(a + 0.5) - gammaln(a) - 0.5 * jnp.log(self.rate))
        return root, jnp.exp(-self.log_ratio)

    def means(self, by_fixed: Any, by_scaled: Any) -> tuple[Any, Any]:
        """The m and k at which these derivatives are those of the divergence."""
        one, two = self.inverses
        determinant = two - one**2
        return (by_fixed - one * by_scaled) / determinant, (
            two * by_scaled - one * by_fixed
        ) / determinant

    def draw(self, key: Any, count: int) -> Float[Array, " S"]:
        """Differentiable by a and b (implicitly: Figurnov, Mohamed, Mnih 2018)."""
        return self.rate / random.gamma(key, jnp.broadcast_to(self.shape, (count,)))

    def divergence(self, prior: InverseGammaScale) -> Any:
        """KL(self | prior)."""
        a, b, alpha, beta = self.shape, self.rate, prior.shape, prior.rate
        return (
            (a - alpha) * digamma(a) - gammaln(a) + gammaln(alpha)
            + alpha * jnp.log(b / beta) + (beta - b) * a / b
        )  # fmt: skip


class PointScale(NamedTuple):
    """A known sigma^2: Gaussian processes. There k is zero."""

    value: Any

    @property
    def log(self) -> Any:
        return jnp.log(self.value)

    @property
    def inverses(self) -> tuple[Any, Any]:
        return self.value**-0.5, 1.0 / self.value

    def means(self, by_fixed: Any, by_scaled: Any) -> tuple[Any, Any]:
        return self.value * by_fixed, jnp.zeros_like(by_scaled)

    def draw(self, key: Any, count: int) -> Float[Array, " S"]:
        return jnp.broadcast_to(self.value, (count,))

    def divergence(self, prior: PointScale) -> Any:
        return jnp.zeros(())


class Coefficients(NamedTuple):
    """The law q(v_c | sigma^2) = N(m_c + sigma k_c, sigma^2 S_c).

    Attributes:
        fixed: m, (C, M).
        scaled: k, (C, M).
        precision: S^-1, (C, M, M).
        root: its lower Cholesky factor, (C, M, M).
    """

    fixed: Float[Array, "C M"]
    scaled: Float[Array, "C M"]
    precision: Float[Array, "C M M"]
    root: Float[Array, "C M M"]

    @classmethod
    def of(cls, fixed: Any, scaled: Any, precision: Any) -> Coefficients:
        return cls(fixed, scaled, precision, lax.linalg.cholesky(precision))

    def divergence(self, scale: Any) -> Any:
        """E KL(q | prior) given sigma^2, over q(sigma^2).

        1/2 sum_c (tr S_c - M - log |S_c| + E|m_c / sigma + k_c|^2). Complexity: C M^3 / 3.
        """
        eye = jnp.eye(self.fixed.shape[1], dtype=self.fixed.dtype)
        inverse_root = solve_triangular(
            self.root, jnp.broadcast_to(eye, self.root.shape), lower=True
        )
        log_determinant = -2.0 * jnp.log(jnp.diagonal(self.root, axis1=1, axis2=2)).sum()
        one, two = scale.inverses
        m, k = self.fixed, self.scaled
        square = (two * m**2 + 2.0 * one * m * k + k**2).sum()
        return 0.5 * ((inverse_root**2).sum() - m.size - log_determinant + square)


class Moments(NamedTuple):
    """Of f_ic given sigma^2 ~ N(fixed + sigma scaled, sigma^2 variance), each (B, C)."""

    fixed: Float[Array, "B C"]
    scaled: Float[Array, "B C"]
    variance: Float[Array, "B C"]


def moments(q: Coefficients, pieces: Pieces) -> Moments:
    """Of the latent functions at some inputs. Complexity: B C M^2."""
    classes, m = q.fixed.shape
    across = jnp.broadcast_to(pieces.basis.T, (classes, m, len(pieces.basis)))
    half = solve_triangular(q.root, across, lower=True)
    variance = pieces.residual[:, None] + (half**2).sum(1).T
    return Moments(pieces.basis @ q.fixed.T, pieces.basis @ q.scaled.T, variance)


class Expected(NamedTuple):
    """The expectation of a log likelihood over draws of sigma^2 and f, and its derivatives.

    Attributes:
        value: summed over the inputs.
        by_moments: by the moments, each (B, C).
        by_sigma2: by the draws of sigma^2, (S,).
    """

    value: Any
    by_moments: Moments
    by_sigma2: Any

    def linear(self, known: Moments, sigma2: Any) -> Any:
        """``value``, with these derivatives for whoever differentiates."""
        total = lax.stop_gradient(self.value)
        slopes = *self.by_moments, self.by_sigma2
        for slope, x in zip(slopes, (*known, sigma2), strict=True):
            total += (lax.stop_gradient(slope) * (x - lax.stop_gradient(x))).sum()
        return total


def expected_log_softmax(
    known: Moments,
    labels: Int[Array, " B"],
    sigma2: Float[Array, " S"],
    noise: Float[Array, "S B C"],
) -> Expected:
    """Of log softmax(f_i)[y_i], f = fixed + sigma (scaled + sqrt(variance) noise), by S draws.

    One sigma^2 a draw, for all classes and inputs. The derivatives by variances are those of the
    heat equation: with v = sigma^2 variance, dE[l]/dv_c = E[d^2 l / d f_c^2] / 2, and the latter,
    -p_c (1 - p_c), is never positive and has less noise than a path (Opper, Archambeau 2009).
    """
    draws = len(sigma2)
    s2 = sigma2[:, None, None]
    s = jnp.sqrt(s2)
    log_p = jax.nn.log_softmax(known.fixed + s * (known.scaled + jnp.sqrt(known.variance) * noise))
    p = jnp.exp(log_p)
    hit = labels[:, None] == jnp.arange(p.shape[-1])
    slope, curvature = hit - p, -p * (1.0 - p)
    by_moments = Moments(slope.mean(0), (s * slope).mean(0), 0.5 * (s2 * curvature).mean(0))
    by_sigma2 = 0.5 * (known.scaled / s * slope + known.variance * curvature).sum((1, 2)) / draws
    return Expected(jnp.where(hit, log_p, 0.0).sum() / draws, by_moments, by_sigma2)


def natural_step(
    q: Coefficients, basis: Any, by_moments: Moments, scale: Any, rate: Any
) -> Coefficients:
    """A natural gradient step of the bound, at a given q(sigma^2).

    S^-1 <- (1 - rho) S^-1 + rho (I - 2 A^T diag(dE/dvariance) A), and with the new S

    (m, k) <- (m, k) + rho S (F^-1 g - (m, k)),    F = [[E sigma^-2, E sigma^-1], [E sigma^-1, 1]],

    g = A^T (dE/dfixed, dE/dscaled). With a Gaussian likelihood and rate 1 it arrives at the
    posterior. S^-1 stays positive definite where likelihoods are log-concave, dE/dvariance < 0.

    Args:
        q: from where.
        basis: A, (B, M).
        by_moments: derivatives of the expected log likelihood of all data.
        scale: q(sigma^2).
        rate: rho, in (0, 1].

    Complexity: C (B M^2 + M^3).
    """
    weighted = jnp.swapaxes(by_moments.variance, 0, 1)[:, :, None] * basis
    eye = jnp.eye(basis.shape[1], dtype=basis.dtype)
    wanted = eye - 2.0 * jnp.swapaxes(weighted, 1, 2) @ basis
    precision = (1.0 - rate) * q.precision + rate * wanted
    new = Coefficients.of(q.fixed, q.scaled, precision)
    m, k = scale.means(by_moments.fixed.T @ basis, by_moments.scaled.T @ basis)
    gap = jnp.stack([m - q.fixed, k - q.scaled], axis=-1)
    step = rate * jax.vmap(lambda root, x: cho_solve((root, True), x))(new.root, gap)
    return new._replace(fixed=q.fixed + step[..., 0], scaled=q.scaled + step[..., 1])


def drawn(key: Any, scale: Any, q: Coefficients) -> tuple[Any, Float[Array, "M C"]]:
    """A draw of sigma^2 and of w = v / sigma; one sigma^2 for all of them. Complexity: C M^2."""
    key_scale, key_noise = random.split(key)
    sigma2 = scale.draw(key_scale, 1)[0]
    noise = random.normal(key_noise, q.fixed.shape, q.fixed.dtype)
    spread = jax.vmap(lambda root, z: solve_triangular(root, z, lower=True, trans=1))
    return sigma2, (q.fixed / jnp.sqrt(sigma2) + q.scaled + spread(q.root, noise)).T
