"""What travels through the layers of an infinitely wide network: covariances of its units."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ppl_toolkit.errors import ModelError

__all__ = [
    "Covariances",
    "Kernels",
    "Variances",
    "covariances_of",
    "per_position",
    "variances_of",
]


def per_position() -> ModelError:
    """The error of a network that ends with the positions of an image."""
    return ModelError(
        "the network has an output for every position of an image: put Flatten() or "
        "GlobalAveragePool() before its last Dense layer."
    )


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
        nngp: their variance q, shape (n, *positions); for images whose positions are kept jointly,
            the covariance of all pairs of positions, (n, height, width, height, width).
        ntk: the tangent kernel of an input with itself, the same shape, or None.
    """

    nngp: Float[Array, "n *positions"]
    ntk: Float[Array, "n *positions"] | None

    @property
    def joint(self) -> bool:
        """Whether covariances of pairs of positions are kept."""
        return self.nngp.ndim == 5

    @property
    def same_position(self) -> Array:
        """Which pairs are one position, shape (height, width, height, width)."""
        height, width = self.nngp.shape[1:3]
        return jnp.eye(height * width, dtype=bool).reshape(height, width, height, width)

    @property
    def single(self) -> Array:
        """The variances q at single positions, (n, *positions)."""
        return jnp.einsum("nhwhw->nhw", self.nngp) if self.joint else self.nngp


class Covariances(NamedTuple):
    """The units of a layer at pairs of inputs, n1 on the left and n2 on the right.

    Attributes:
        nngp: their covariance at the same position, shape (n1, n2, *positions), or at all pairs of
            positions, (n1, n2, height, width, height, width).
        ntk: the tangent kernel so far, the same shape, or None.
        left, right: `Variances.nngp` of the inputs on the left and on the right.
    """

    nngp: Float[Array, "n1 n2 *positions"]
    ntk: Float[Array, "n1 n2 *positions"] | None
    left: Float[Array, "n1 *q"]
    right: Float[Array, "n2 *q"]

    @property
    def joint(self) -> bool:
        """Whether covariances of pairs of positions are kept."""
        return self.nngp.ndim == 6

    @property
    def variances(self) -> tuple[Array, Array]:
        """q1 and q2 at single positions, with axes that broadcast against `nngp`."""
        sides = (Variances(q, None).single for q in (self.left, self.right))
        q1, q2 = next(sides)[:, None], next(sides)[None, :]
        return (q1[..., None, None], q2[:, :, None, None]) if self.joint else (q1, q2)


def variances_of(x: Float[Array, "n *shape"], *, ntk: bool, joint: bool = False) -> Variances:
    """The inputs' own variances: mean squares over features (vectors) or channels (images).

    With ``joint``, mean products of all pairs of positions.
    """
    if joint and x.ndim != 4:
        raise ModelError(
            "GlobalAveragePool works on images, inputs of shape (n, height, width, channels); "
            f"these have shape {x.shape}."
        )
    if joint:
        q = jnp.einsum("nhwc,nijc->nhwij", x, x, precision=lax.Precision.HIGHEST) / x.shape[-1]
    else:
        q = jnp.mean(x * x, axis=-1)
    return Variances(q, jnp.zeros_like(q) if ntk else None)


def covariances_of(
    x1: Float[Array, "n1 *shape"], x2: Float[Array, "n2 *shape"], *, ntk: bool, joint: bool = False
) -> Covariances:
    """Mean products over the features of vectors, or the channels of images, of all pairs."""
    own = [variances_of(x, ntk=False, joint=joint).nngp for x in (x1, x2)]
    if x1.ndim == 2:
        pattern = "nc,mc->nm"
    else:
        pattern = "nhwc,mijc->nmhwij" if joint else "nhwc,mhwc->nmhw"
    s = jnp.einsum(pattern, x1, x2, precision=lax.Precision.HIGHEST) / x1.shape[-1]
    return Covariances(s, jnp.zeros_like(s) if ntk else None, *own)
