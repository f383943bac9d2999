"""What travels through the layers of an infinitely wide network: covariances of its units."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

__all__ = ["Covariances", "Kernels", "Variances", "covariances_of", "variances_of"]


class Kernels(NamedTuple):
    """The two kernels of an infinitely wide network.

    Attributes:
        nngp: covariance of the network's output over its random weights.
        ntk: neural tangent kernel, the inner product of the output's gradients; None where it was
            not asked for.
    """

    nngp: Any
    ntk: Any = None


class Variances(NamedTuple):
    """The units of a layer at single inputs.

    Attributes:
        nngp: their variance q, shape (n, *positions).
        ntk: the tangent kernel of an input with itself, the same shape, or None.
    """

    nngp: Float[Array, "n *positions"]
    ntk: Float[Array, "n *positions"] | None


class Covariances(NamedTuple):
    """The units of a layer at pairs of inputs, n1 on the left and n2 on the right.

    Attributes:
        nngp: their covariance, shape (n1, n2, *positions).
        ntk: the tangent kernel so far, the same shape, or None.
        left, right: the variances q1 (n1, *positions) and q2 (n2, *positions).
    """

    nngp: Float[Array, "n1 n2 *positions"]
    ntk: Float[Array, "n1 n2 *positions"] | None
    left: Float[Array, "n1 *positions"]
    right: Float[Array, "n2 *positions"]

    @property
    def variances(self) -> tuple[Array, Array]:
        """q1 and q2 with axes that broadcast against `nngp`."""
        return self.left[:, None], self.right[None, :]


def variances_of(x: Float[Array, "n *shape"], *, ntk: bool) -> Variances:
    """The inputs' own variances: mean squares over features (vectors) or channels (images)."""
    q = jnp.mean(x * x, axis=-1)
    return Variances(q, jnp.zeros_like(q) if ntk else None)


def covariances_of(
    x1: Float[Array, "n1 *shape"], x2: Float[Array, "n2 *shape"], *, ntk: bool
) -> Covariances:
    """x . x' / d of vectors (n, d), or over the channels of images (n, height, width, channels)."""
    positions = tuple(range(1, x1.ndim - 1))
    last = x1.ndim - 1
    # Batched over positions, which come first in the product of dot_general.
    product = lax.dot_general(
        x1, x2, (((last,), (last,)), (positions, positions)), precision=lax.Precision.HIGHEST
    )
    s = jnp.moveaxis(product, (-2, -1), (0, 1)) / x1.shape[-1]
    return Covariances(
        s,
        jnp.zeros_like(s) if ntk else None,
        variances_of(x1, ntk=False).nngp,
        variances_of(x2, ntk=False).nngp,
    )
