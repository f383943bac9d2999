"""Activations of infinitely wide layers in closed form.

For Gaussians u, v of covariance s and variances q1, q2, an activation phi maps the covariance of
units to F = E[phi(u) phi(v)], and multiplies the tangent kernel by Fdot = E[phi'(u) phi'(v)], which
is the derivative of F by s (Price 1958).

Sources: Cho, Saul (2009) for the arc-cosines; Williams (1997) for erf; Tsuchida, Pearce, van der
Heide, Roosta, Gallagher (2021) for GELU; Rahimi, Recht (2007) for sine and cosine features.
"""

from __future__ import annotations

import abc
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ppl_toolkit.models.angles import angle, arctan2, sine
from ppl_toolkit.models.covariances import Covariances, Variances
from ppl_toolkit.models.layers import SingleLayer, layer

__all__ = [
    "GELU",
    "RBF",
    "Abs",
    "Activation",
    "Cos",
    "Erf",
    "Identity",
    "LeakyReLU",
    "ReLU",
    "Rectifier",
    "Sign",
    "Sin",
    "Step",
]


class Activation(SingleLayer):
    """An elementwise function phi of Gaussian units, known by its expectations."""

    takes_gaussian: ClassVar[bool] = True
    gives_gaussian: ClassVar[bool] = False

    @abc.abstractmethod
    def expectations(self, s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
        """F and Fdot for arrays that broadcast."""

    def own(self, q: Any) -> tuple[Any, Any]:
        """F and Fdot of a unit with itself: s = q1 = q2 = q."""
        return self.expectations(q, q, q)

    def pairs(self, state: Covariances) -> tuple[Any, Any]:
        f, slope = self.expectations(state.nngp, *state.variances)
        return f, None if state.ntk is None else state.ntk * slope

    def diagonal(self, state: Variances) -> Variances:
        f, slope = self.own(state.single)
        if state.joint:
            q, same = state.single, state.same_position
            at_pairs = self.expectations(state.nngp, q[..., None, None], q[:, None, None])
            f, slope = (
                jnp.where(same, one[..., None, None], pair)
                for one, pair in zip((f, slope), at_pairs, strict=True)
            )
        return Variances(f, None if state.ntk is None else state.ntk * slope)


@layer()
class Rectifier(Activation):
    """phi(x) = a min(x, 0) + c max(x, 0); `ReLU`, `LeakyReLU`, `Abs`, `Identity` are cases.

    With r = sqrt(q1 q2 - s^2) and theta = atan2(r, s):
    Fdot = (a^2 + c^2) / 2 - (a - c)^2 theta / (2 pi) and F = (a - c)^2 r / (2 pi) + Fdot s.
    """

    below: float = 0.0
    above: float = 1.0

    def expectations(self, s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
        gap, mean = self._weights()
        return _rectified(gap, mean, s, q1, q2), _rectified_slope(gap, mean, s, q1, q2)

    def own(self, q: Any) -> tuple[Any, Any]:
        _, mean = self._weights()
        return mean * q, jnp.full_like(q, mean)

    def _weights(self) -> tuple[float, float]:
        return (self.below - self.above) ** 2 / (2 * np.pi), (self.below**2 + self.above**2) / 2


def ReLU() -> Rectifier:  # noqa: N802
    """Gives max(x, 0)."""
    return Rectifier(0.0, 1.0)


def LeakyReLU(slope: float = 0.01) -> Rectifier:  # noqa: N802
    """Gives x above zero, ``slope * x`` below."""
    return Rectifier(float(slope), 1.0)


def Abs() -> Rectifier:  # noqa: N802
    """The absolute value."""
    return Rectifier(-1.0, 1.0)


def Identity() -> Rectifier:  # noqa: N802
    """x: a deep linear network."""
    return Rectifier(1.0, 1.0)


def _rectified_slope(gap: float, mean: float, s: Any, q1: Any, q2: Any) -> Any:
    return mean - gap * angle(s, q1, q2) if gap else jnp.full_like(s, mean)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rectified(gap: float, mean: float, s: Any, q1: Any, q2: Any) -> Any:
    """F of a rectifier. Every term of its derivative is finite where inputs coincide, r = 0."""
    return gap * sine(s, q1, q2) + _rectified_slope(gap, mean, s, q1, q2) * s


@_rectified.defjvp
def _(gap: float, mean: float, primals: tuple, tangents: tuple) -> tuple:
    (s, q1, q2), (ds, dq1, dq2) = primals, tangents
    r, slope = sine(s, q1, q2), _rectified_slope(gap, mean, s, q1, q2)
    relative = dq1 / jnp.where(q1 == 0, 1, q1) + dq2 / jnp.where(q2 == 0, 1, q2)
    return gap * r + slope * s, slope * ds + gap / 2 * r * relative


@layer()
class Step(Activation):
    """1 above zero and 0 below: F = (pi - theta) / (2 pi). Its tangent kernel is zero."""

    def expectations(self, s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
        return 0.5 - angle(s, q1, q2) / (2 * np.pi), jnp.zeros_like(s)

    def own(self, q: Any) -> tuple[Any, Any]:
        return jnp.full_like(q, 0.5), jnp.zeros_like(q)


@layer()
class Sign(Activation):
    """The sign: F = 1 - 2 theta / pi. Its tangent kernel is zero."""

    def expectations(self, s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
        return 1 - angle(s, q1, q2) * (2 / np.pi), jnp.zeros_like(s)

    def own(self, q: Any) -> tuple[Any, Any]:
        return jnp.ones_like(q), jnp.zeros_like(q)


@layer("amplitude", "frequency", "offset")
class Erf(Activation):
    """a erf(b x) + c, a sigmoid.

    For a = b = 1, c = 0 and Dp = 1 + 2 (q1 + q2) + 4 (q1 q2 - s^2):
    F = (2 / pi) atan2(2 s, sqrt(Dp)), Fdot = (4 / pi) / sqrt(Dp).
    """

    amplitude: Any = 1.0
    frequency: Any = 1.0
    offset: Any = 0.0

    def expectations(self, s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
        power = self.frequency**2
        s, q1, q2 = power * s, power * q1, power * q2
        # Not clamped: rounding may make the difference negative, and Dp is 1 at least.
        root = jnp.sqrt(1 + 2 * (q1 + q2) + 4 * (q1 * q2 - s * s))
        return self._scaled((2 / np.pi) * arctan2(2 * s, root), (4 / np.pi) / root)

    def own(self, q: Any) -> tuple[Any, Any]:
        q = self.frequency**2 * q
        root = jnp.sqrt(1 + 4 * q)
        return self._scaled((2 / np.pi) * arctan2(2 * q, root), (4 / np.pi) / root)

    def _scaled(self, f: Any, slope: Any) -> tuple[Any, Any]:
        square = self.amplitude**2
        return square * f + self.offset**2, square * self.frequency**2 * slope


@layer()
class GELU(Activation):
    """x Phi(x), with the normal distribution function Phi.

    With P = q1 q2, R = (1 + q1)(1 + q2), Dp = 1 + q1 + q2 + P - s^2 and A = atan2(s, sqrt(Dp)):
    F = s / 4 + s A / (2 pi) + (s^2 + P Dp) / (2 pi R sqrt(Dp)).
    """

    def expectations(self, s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
        product, ones = q1 * q2, (1 + q1) * (1 + q2)
        return self._from(s, product, ones, 1 + q1 + q2 + (product - s * s))

    def own(self, q: Any) -> tuple[Any, Any]:
        return self._from(q, q * q, (1 + q) ** 2, 1 + 2 * q)

    def _from(self, s: Any, product: Any, ones: Any, dp: Any) -> tuple[Any, Any]:
        root = jnp.sqrt(dp)
        quarter = 0.25 + arctan2(s, root) / (2 * np.pi)
        f = quarter * s + (s * s + product * dp) / (2 * np.pi * ones * root)
        slope = quarter + s / (2 * np.pi * root) * (1 / dp + (1 - product) / ones + 1)
        return f, slope


@layer("amplitude", "frequency", "phase")
class Sin(Activation):
    """a sin(b x + c).

    With h = (q1 + q2) / 2, s1 = exp(b^2 (s - h)) and s2 = cos(2 c) exp(-b^2 (s + h)):
    F = a^2 (s1 - s2) / 2, Fdot = a^2 b^2 (s1 + s2) / 2.
    """

    amplitude: Any = 1.0
    frequency: Any = 1.0
    phase: Any = 0.0

    def expectations(self, s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
        power, mean = self.frequency**2, (q1 + q2) / 2
        near = jnp.exp(power * (s - mean))
        far = jnp.cos(2 * self.phase) * jnp.exp(-power * (s + mean))
        half = self.amplitude**2 / 2
        return half * (near - far), half * power * (near + far)


def Cos(amplitude: Any = 1.0, frequency: Any = 1.0, phase: Any = 0.0) -> Sin:  # noqa: N802
    """Gives a cos(b x + c)."""
    return Sin(amplitude, frequency, phase + np.pi / 2)


def RBF(gamma: Any = 1.0) -> Sin:  # noqa: N802
    """The activation sqrt(2) sin(sqrt(2 gamma) x + pi / 4): F = exp(-gamma (q1 + q2 - 2 s)).

    After one `Dense` layer this is the squared exponential (radial basis function) kernel.
    """
    return Sin(np.sqrt(2), (2 * gamma) ** 0.5, np.pi / 4)
