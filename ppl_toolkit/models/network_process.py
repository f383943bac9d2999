"""A scale mixture of the Gaussian processes of an infinitely wide network, as a NumPyro law."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from ppl_toolkit.errors import DataError
from ppl_toolkit.models.conditioning import Conditioned, condition, log_evidence
from ppl_toolkit.models.evaluation import checked_inputs, own_variances
from ppl_toolkit.models.layers import Layer, check_order
from ppl_toolkit.models.scale_mixture_laws import ScaleMixtureProcess
from ppl_toolkit.models.scale_quadrature import checked_law, mean_of
from ppl_toolkit.models.statistics import factor, statistics

__all__ = ["NetworkProcess"]


class NetworkProcess(dist.Distribution):
    """Targets at inputs x: N(0, sigma^2 (K + noise I)) with one sigma^2 from ``law``.

    Like `ScaleMixtureProcess`, but it knows its kernel: a density needs half of the matrix, its
    derivative no tape of the layers, and it can be conditioned.

    Args:
        law: of sigma^2, any NumPyro distribution of a positive number.
        network: a layer, with a readout of weight 1 and without bias (`mlp` has such a one).
        x: inputs (n, d), or images (n, height, width, channels).
        noise: variance of the noise in units of sigma^2, 0 or more.

    Complexity: n^3 / 3 operations and n^2 numbers for a density, some 2 n^3 more for its gradient.

    Raises:
        DataError: ``law`` is not a law of one positive number, or x cannot be used.
        ModelError: the layers do not fit together.
    """

    arg_constraints = {"noise": constraints.nonnegative}  # noqa: RUF012
    support = constraints.real_vector
    pytree_data_fields = ("law", "network", "x", "noise")

    def __init__(
        self, law: Any, network: Layer, x: Any, noise: Any, *, validate_args: bool | None = None
    ) -> None:
        self.law, self.network = checked_law(law), network
        if law.batch_shape or jnp.ndim(noise):
            raise DataError(
                f"a process has one law of sigma^2 and one noise; got batch shapes "
                f"{law.batch_shape} and {jnp.shape(noise)}."
            )
        check_order(network)
        self.x, self.noise = jnp.asarray(checked_inputs(x, "x")), noise
        super().__init__((), (len(self.x),), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return self.law.has_rsample

    @validate_sample
    def log_prob(self, value: Any) -> Any:
        if jnp.ndim(value) > 1:
            return jax.vmap(self.log_prob)(value)
        return log_evidence(self.law, statistics(self.network, self.x, value, self.noise))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self._factored().sample(key, sample_shape)

    @property
    def mean(self) -> Any:
        return jnp.zeros(self.event_shape, self.x.dtype)

    @property
    def variance(self) -> Any:
        """E[sigma^2] (K_ii + noise); infinite where E[sigma^2] is."""
        return mean_of(self.law) * (own_variances(self.network, self.x) + self.noise)

    def conditioned(self, y: Float[Array, " n"]) -> Conditioned:
        """The process given its targets: posterior of sigma^2, predictions, leave-one-out."""
        return condition(self.law, self.network, self.x, y, self.noise)

    def left_out_log_densities(self, value: Float[Array, " n"]) -> Float[Array, " n"]:
        """Log p(y_i | all others), which takes the place of the log likelihood of one target."""
        return self.conditioned(value).left_out_log_densities()

    def _factored(self) -> ScaleMixtureProcess:
        return ScaleMixtureProcess(self.law, factor(self.network, self.x, self.noise))
