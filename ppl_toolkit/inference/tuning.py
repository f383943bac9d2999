"""How kernels tune themselves to a population, between its stages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ppl_toolkit.inference.kernel import Cloud

__all__ = ["cloud_covariance", "next_log_step"]

_GAIN = 2.0  # of the log step size, per unit of acceptance


def cloud_covariance(cloud: Cloud) -> Float[Array, "D D"]:
    """Weighted covariance of a cloud's flat positions.

    The correlations are shrunk towards zero with the weight of D particles, so that the covariance
    has an inverse however small the cloud is. Cost: O(N D^2).
    """
    x = jax.vmap(lambda position: ravel_pytree(position)[0])(dict(cloud.positions))
    centred = x - cloud.weights @ x
    covariance = centred.T @ (cloud.weights[:, None] * centred)
    size, effective = x.shape[1], 1.0 / jnp.sum(cloud.weights**2)
    shrink = size / (size + effective)
    variances = jnp.maximum(jnp.diagonal(covariance), jnp.finfo(x.dtype).tiny ** 0.5)
    return jnp.where(jnp.eye(size, dtype=bool), jnp.diag(variances), (1.0 - shrink) * covariance)


def next_log_step(
    log_step: Float[Array, ""], acceptance: Float[Array, ""], target: float
) -> Float[Array, ""]:
    """The log step size after moves with this mean acceptance; as it was before the first ones."""
    error = jnp.where(jnp.isnan(acceptance), 0.0, acceptance - target)
    return log_step + (_GAIN * error).astype(log_step.dtype)
