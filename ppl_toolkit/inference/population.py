"""Weighted populations: particles, their weights, and the evidence they estimate.

A population is *properly weighted* for an unnormalised law with total mass Z if its evidence is an
unbiased estimate of Z, and its evidence times the weighted mean of any function one of the integral
of that function. Reweighting, unbiased resampling and moves by invariant kernels preserve that
(Naesseth, Lindsten and Schön 2015; Ścibior et al. 2018).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from ppl_toolkit.inference.resampling import resample

__all__ = ["Population", "effective_size", "normalised", "relative_variance", "size_of_shares"]


def normalised(
    log_weights: Float[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, ""]]:
    """Log weights that sum to one, and the log of the mean weight.

    NaN counts as weight zero. Where all weights are zero, all log weights are minus infinity.
    """
    clean = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    total = logsumexp(clean)
    alive = jnp.isfinite(total)
    shares = jnp.where(alive, clean - jnp.where(alive, total, 0.0), -jnp.inf)
    return shares, total - jnp.log(jnp.asarray(clean.shape[0], clean.dtype))


def effective_size(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """(sum w)^2 / sum w^2: between 1 and N, and 0 if all weights are zero."""
    return size_of_shares(normalised(log_weights)[0])


def size_of_shares(shares: Float[Array, " N"]) -> Float[Array, ""]:
    """`effective_size` of log weights that sum to one."""
    squares = jnp.sum(jnp.exp(2.0 * shares))
    return jnp.where(squares > 0, 1.0 / jnp.where(squares > 0, squares, 1.0), 0.0)


class Population(NamedTuple):
    """A weighted population of N particles.

    Attributes:
        particles: a pytree of arrays (N, ...).
        log_weights: log weights that sum to one, (N,).
        log_evidence: log of the estimate of the total mass, in the widest type of the run.
    """

    particles: Any
    log_weights: Float[Array, " N"]
    log_evidence: Float[Array, ""]

    @classmethod
    def of(cls, particles: Any, log_evidence: Any = 0.0) -> Population:
        """Equally weighted particles."""
        count = jax.tree.leaves(particles)[0].shape[0]
        wide = jnp.result_type(float)  # float64, unless the run is in float32
        even = jnp.full(count, -jnp.log(float(count)), wide)
        return cls(particles, even, jnp.asarray(log_evidence, wide))

    def reweighted(self, log_factors: Float[Array, " N"]) -> Population:
        """Every weight times its factor; the evidence times the mean factor."""
        shares, mean = normalised(self.log_weights + log_factors)
        count = jnp.asarray(shares.shape[0], mean.dtype)
        return Population(self.particles, shares, self.log_evidence + mean + jnp.log(count))

    def resampled(self, key: Any, scheme: str = "systematic") -> Population:
        """Equally weighted particles with the same expectations."""
        chosen = resample(key, self.log_weights, scheme)
        taken = jax.tree.map(lambda x: x[chosen], self.particles)
        return Population.of(taken, self.log_evidence)

    @property
    def effective_size(self) -> Float[Array, ""]:
        return effective_size(self.log_weights)


def relative_variance(
    log_weights: Float[Array, " N"], eves: Any, resamplings: Any
) -> Float[Array, ""]:
    """Variance of the evidence over its squared mean, estimated from one run.

    Args:
        log_weights: before the coming resampling, (N,).
        eves: the number of the first ancestor of every particle, (N,).
        resamplings: how often the population has been resampled.

    Cost: O(N). Exact on average for multinomial resampling, an upper estimate for schemes with less
    noise. Source: Lee and Whiteley (2018), Biometrika 105, equation (10).
    """
    shares, _ = normalised(log_weights)
    count = shares.shape[0]
    families = jnp.zeros(count, shares.dtype).at[eves].add(jnp.exp(shares))
    same = jnp.sum(families**2)
    return 1.0 - (count / (count - 1.0)) ** (resamplings + 1.0) * (1.0 - same)
