"""Scale mixtures whose noise keeps its own variance: y | sigma^2 ~ N(0, sigma^2 K + noise I).

Here the data enter through more than two numbers, but one eigendecomposition K = Q diag(l) Q^T
serves every sigma^2: with u = Q^T y and c_i = sigma^2 l_i + noise,

    log p(y | sigma^2) = -1/2 sum_i [ log 2 pi c_i + u_i^2 / c_i ],

n operations at every node of the quadrature over sigma^2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float
from numpyro import distributions as dist

from ppl_toolkit.errors import OptionError
from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.evaluation import (
    checked_inputs,
    checked_new_inputs,
    checked_of,
    in_float64,
    own_variances,
    scaled_targets,
)
from ppl_toolkit.models.layers import Layer, check_order
from ppl_toolkit.models.location_scale import LocationScaleMixture
from ppl_toolkit.models.predictive import Predictive
from ppl_toolkit.models.scale_quadrature import by_trapezoid, single_law
from ppl_toolkit.models.scale_tables import Atoms, Tabulated

__all__ = ["FixedNoise", "fit_fixed_noise"]

_NODES = 129
_LOG_2PI = float(np.log(2 * np.pi))


class FixedNoise(NamedTuple):
    """A scale mixture with noise of its own variance, given data; traceable.

    Attributes:
        law: H, of sigma^2.
        network, x: the kernel.
        noise: variance of the noise, in units of y^2.
        vectors, values: Q (n, n) and l (n,).
        rotated: u = Q^T y, (n,).
    """

    law: Any
    network: Any
    x: Float[Array, "n ..."]
    noise: Float[Array, ""]
    vectors: Float[Array, "n n"]
    values: Float[Array, " n"]
    rotated: Float[Array, " n"]

    @classmethod
    def of(cls, law: Any, network: Any, x: Any, y: Any, noise: Any) -> FixedNoise:
        """One eigendecomposition: some 10 n^3 operations."""
        dtype = jnp.result_type(x, y, float)
        x, y, noise = (jnp.asarray(a, dtype) for a in (x, y, noise))
        values, vectors = jnp.linalg.eigh(kernel_matrices(network, x, ntk=False).nngp)
        return cls(law, network, x, noise, vectors, jnp.maximum(values, 0), vectors.T @ y)

    def log_likelihood(self, s2: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """Log p(y | sigma^2) at every s2."""
        return _log_likelihood((self.values, self.rotated, self.noise), s2)

    def _terms(self) -> tuple[Any, Any]:
        """The law of sigma^2 given the data, and the logs of the terms of the evidence."""
        if isinstance(self.law, dist.Delta | Atoms):
            points = jnp.atleast_1d(self.law.v) if isinstance(self.law, dist.Delta) else None
            values = self.law.values if points is None else points
            prior = self.law.log_probs if points is None else jnp.zeros_like(values)
            terms = prior + self.log_likelihood(values)
            return Atoms(values, terms), terms
        parameters = (self.values, self.rotated, self.noise)
        likeliest = jnp.mean(self.rotated**2) / (jnp.mean(self.values) + self.noise)
        grid, terms = by_trapezoid(self.law, _log_likelihood, parameters, likeliest, (), _NODES)
        return Tabulated(grid, terms, self.law.support), terms

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """The log density of the targets."""
        return logsumexp(self._terms()[1])

    @property
    def scale(self) -> Any:
        """The law of sigma^2 given the targets."""
        return self._terms()[0]

    def marginals(self, x_new: Any, of: str = "y") -> LocationScaleMixture:
        """The law of every new target ("y") or function value ("f").

        Mean and width both depend on sigma^2.

        Complexity: n^2 m for m inputs, and n m K for K nodes.
        """
        law = self.scale
        s2, log_weights = law.atoms if isinstance(law, Tabulated) else (law.values, law.log_probs)
        across = kernel_matrices(self.network, x_new, self.x, ntk=False).nngp @ self.vectors
        gain = s2 / (s2 * self.values[:, None] + self.noise)  # (n, K)
        means = across @ (gain * self.rotated[:, None])
        explained = (across**2) @ gain
        variance = own_variances(self.network, x_new)[:, None] - explained
        extra = self.noise / s2 if of == "y" else 0
        return LocationScaleMixture(law, s2, log_weights, means, jnp.maximum(variance, 0) + extra)


def _log_likelihood(parameters: tuple, s2: Any) -> Any:
    values, rotated, noise = parameters
    total = jnp.asarray(s2)[..., None] * values + noise
    return -0.5 * jnp.sum(_LOG_2PI + jnp.log(total) + rotated**2 / total, axis=-1)


class FittedFixedNoise:
    """What `fit_fixed_noise` returns.

    Attributes:
        conditioned: the eigendecomposition and what belongs to it, NumPy arrays.
    """

    def __init__(self, conditioned: FixedNoise) -> None:
        self.conditioned = conditioned

    @property
    def log_evidence(self) -> float:
        """The log density of the targets."""
        return float(in_float64(_evidence, self.conditioned))

    @property
    def scale(self) -> Predictive:
        """The law of sigma^2 given the targets."""
        return Predictive(in_float64(_scale, self.conditioned))

    def with_law(self, law: dist.Distribution) -> FittedFixedNoise:
        """The same data and kernel under another law of sigma^2; no new decomposition."""
        return FittedFixedNoise(self.conditioned._replace(law=single_law(law)))

    def with_noise(self, noise: float) -> FittedFixedNoise:
        """The same data and kernel with another noise; no new decomposition."""
        return FittedFixedNoise(self.conditioned._replace(noise=_checked_noise(noise)))

    def predict(self, X_new: Any, of: str = "y") -> Predictive:  # noqa: N803
        """The law at every new input by itself: of targets ("y"), or of the function ("f")."""
        x_new = checked_new_inputs(X_new, self.conditioned.x)
        return Predictive(in_float64(_marginals, self.conditioned, x_new, of=checked_of(of)))


def fit_fixed_noise(
    network: Layer,
    X: Any,  # noqa: N803
    y: Any,
    *,
    noise: float,
    law: dist.Distribution | None = None,
) -> FittedFixedNoise:
    """Condition a scale mixture whose noise is not scaled with the function.

    Args:
        network: layers with a readout of weight 1 and without bias, such as ``mlp(3)``.
        X: inputs (n, d), or images.
        y: targets (n,), centred.
        noise: variance of the noise, in units of y^2; positive.
        law: of sigma^2, of the function alone; InverseGamma(2, 2) if None.

    Raises:
        DataError, OptionError: the data, the noise or the law cannot be used.

    Complexity: some 10 n^3 operations, once for all laws and all noises; n for every node.
    """
    check_order(network)
    law = single_law(dist.InverseGamma(2.0, 2.0) if law is None else law)
    X = np.asarray(checked_inputs(X, "X"))
    targets = scaled_targets(y, len(X))
    return FittedFixedNoise(
        in_float64(FixedNoise.of, law, network, X, targets, _checked_noise(noise))
    )


def _checked_noise(noise: Any) -> Any:
    if np.ndim(noise) or not np.isfinite(noise) or noise <= 0:
        raise OptionError(f"noise must be a positive number; got {noise!r:.60}.")
    return np.float64(noise)


def _evidence(c: FixedNoise) -> Any:
    return c.log_evidence


def _scale(c: FixedNoise) -> Any:
    return c.scale


def _marginals(c: FixedNoise, x_new: Any, *, of: str) -> Any:
    return c.marginals(x_new, of)
