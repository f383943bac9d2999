"""Angles of pairs of Gaussians: arctangents that vectorise, and arc-cosines safe at zero.

XLA's own ``atan2`` is a scalar function on CPUs, which would take most of the time of an arc-cosine
kernel. This one is a polynomial that the compiler vectorises.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["angle", "arctan2", "sine"]

# (atan(t) - t) / t^3 as a polynomial in t^2, |t| <= tan(pi/8): interpolated at the 11 Chebyshev
# nodes of [0, tan(pi/8)^2]; off by at most 5e-18 of atan(t).
_COEFFICIENTS = (
    -0.3333333333333333,
    0.19999999999995516,
    -0.14285714284665682,
    0.11111111015187018,
    -0.0909090457530649,
    0.07692183125376892,
    -0.06664510525508936,
    0.05858140904866328,
    -0.050854078345894844,
    0.03923044778479309,
    -0.019175404711104935,
)
_EIGHTH = math.tan(math.pi / 8)


@jax.custom_jvp
def arctan2(y: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The angle of the point (x, y), in (-pi, pi]; zero at the origin.

    Within three units in the last place of the C library's, but for the sign of zero. Where its
    derivative does not exist, at the origin, it is taken to be zero.
    """
    across, up = jnp.abs(x), jnp.abs(y)
    small, large = jnp.minimum(across, up), jnp.maximum(across, up)
    # atan(small / large), beyond tan(pi/8) by pi/4 - atan((large - small) / (large + small)).
    far = small > _EIGHTH * large
    over = jnp.where(far, small - large, small)
    under = jnp.where(far, small + large, large)
    t = over / jnp.where(under == 0, 1, under)
    z = t * t
    polynomial = jnp.full_like(z, _COEFFICIENTS[-1])
    for coefficient in _COEFFICIENTS[-2::-1]:
        polynomial = polynomial * z + coefficient
    found = t + t * z * polynomial + jnp.where(far, math.pi / 4, 0)
    found = jnp.where(up > across, math.pi / 2 - found, found)
    found = jnp.where(x < 0, math.pi - found, found)
    return jnp.where(y < 0, -found, found)


@arctan2.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (y, x), (dy, dx) = primals, tangents
    square = x * x + y * y
    return arctan2(y, x), (x * dy - y * dx) / jnp.where(square == 0, 1, square)


@jax.custom_jvp
def sine(
    s: Float[Array, "..."], q1: Float[Array, "..."], q2: Float[Array, "..."]
) -> Float[Array, "..."]:
    """sqrt(q1 q2 - s^2): the standard deviations' product times the sine of the angle.

    Zero where rounding makes the difference negative; its derivative is zero there.
    """
    return jnp.sqrt(jnp.maximum(q1 * q2 - s * s, 0))


@sine.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (s, q1, q2), (ds, dq1, dq2) = primals, tangents
    r = sine(s, q1, q2)
    change = (q2 * dq1 + q1 * dq2) / 2 - s * ds
    return r, jnp.where(r > 0, change / jnp.where(r > 0, r, 1), 0)


def angle(
    s: Float[Array, "..."], q1: Float[Array, "..."], q2: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The angle in [0, pi] between two Gaussians of covariance s and variances q1, q2.

    Its derivative is infinite where they coincide, and taken to be zero there.
    """
    return arctan2(sine(s, q1, q2), s)
