"""A scale mixture given data: posterior of the scale, predictions, leave-one-out, from one factor.

sigma^2 ~ H and y | sigma^2 ~ N(0, sigma^2 (K + noise I)). The noise is scaled together with the
function: ``noise`` is a variance in units of sigma^2, here and everywhere but in `fixed_noise`.

Sources: Shah, Wilson, Ghahramani (2014) for the inverse gamma law (Student-t processes); Lee, Yun,
Yang, Lee (2022), Scale mixtures of neural network Gaussian processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float

from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.evaluation import own_variances
from ppl_toolkit.models.scale_mixture_laws import ScaleMixtureNormal, ScaleMixtureProcess
from ppl_toolkit.models.scale_quadrature import log_marginal, posterior_law
from ppl_toolkit.models.statistics import Statistics, factor

__all__ = ["Conditioned", "condition", "log_evidence"]

_LOG_2PI = float(np.log(2 * np.pi))


def log_evidence(law: Any, statistics: Statistics, *, nodes: int = 129) -> Float[Array, ""]:
    """The log density of the targets under the law of sigma^2.

    Args:
        law: H, a NumPyro distribution of a positive number.
        statistics: what the kernel says of the data; the same for all laws.
        nodes: of the quadrature where there is no closed form.
    """
    q, log_determinant, size = statistics
    gaussian = -0.5 * (size * _LOG_2PI + log_determinant)
    return gaussian + log_marginal(law, q, float(size), nodes)


class Conditioned(NamedTuple):
    """A scale mixture given targets y at inputs x.

    Attributes:
        prior: H, the law of sigma^2.
        network, x, noise: the kernel, as for `condition`.
        y: targets (n,).
        root: the lower Cholesky factor of Kt = K + noise I, (n, n).
        solved: v = Kt^-1 y, (n,).
    """

    prior: Any
    network: Any
    x: Float[Array, "n ..."]
    noise: Float[Array, ""]
    y: Float[Array, " n"]
    root: Float[Array, "n n"]
    solved: Float[Array, " n"]

    @property
    def statistics(self) -> Statistics:
        """Quadratic form, log determinant and number of the targets."""
        log_determinant = 2 * jnp.log(jnp.diagonal(self.root)).sum()
        return Statistics(self.y @ self.solved, log_determinant, len(self.y))

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """The log density of the targets."""
        return log_evidence(self.prior, self.statistics)

    @property
    def scale(self) -> Any:
        """The law of sigma^2 given the targets."""
        return posterior_law(self.prior, self.statistics.quadratic, float(len(self.y)))

    def marginals(self, x_new: Any, of: str = "y") -> ScaleMixtureNormal:
        """The law of every single target (``of="y"``) or function value ("f") at new inputs.

        Complexity: n^2 m for m inputs.
        """
        loc, half = self._at(x_new)
        variance = own_variances(self.network, x_new) - (half**2).sum(0)
        variance = jnp.maximum(variance, 0) + (self.noise if of == "y" else 0)
        return ScaleMixtureNormal(self.scale, loc, jnp.sqrt(variance))

    def joint(self, x_new: Any, of: str = "y") -> ScaleMixtureProcess:
        """The joint law of all targets, or function values, at new inputs.

        Complexity: n^2 m + n m^2 + m^3 for m inputs.
        """
        loc, half = self._at(x_new)
        covariance = kernel_matrices(self.network, x_new, ntk=False).nngp - half.T @ half
        # Function values are known exactly where inputs coincide and there is no noise.
        rounding = jnp.finfo(loc.dtype).eps * 10 * len(loc) * jnp.diagonal(covariance).max()
        extra = self.noise if of == "y" else 0
        root = lax.linalg.cholesky(covariance + (extra + rounding) * jnp.eye(len(loc)))
        return ScaleMixtureProcess(self.scale, root, loc)

    def _at(self, x_new: Any) -> tuple[Any, Any]:
        """m* = K* v, and L^-1 K*^T, of shape (n, m)."""
        across = kernel_matrices(self.network, x_new, self.x, ntk=False).nngp
        return across @ self.solved, solve_triangular(self.root, across.T, lower=True)

    def left_out(self) -> ScaleMixtureNormal:
        """The law of every target given all others, exactly.

        With P = Kt^-1: location y_i - v_i / P_ii, scale 1 / sqrt(P_ii), and sigma^2 given n - 1
        data of quadratic form q - v_i^2 / P_ii.

        Complexity: n^3 for P, and one integral over the scale for every target.
        """
        precision, q = self._precision()
        law = posterior_law(self.prior, q, len(self.y) - 1.0)
        return ScaleMixtureNormal(law, self.y - self.solved / precision, 1 / jnp.sqrt(precision))

    def left_out_log_densities(self) -> Float[Array, " n"]:
        """Log p(y_i | all others) for every target, exactly: differences of evidences."""
        precision, q = self._precision()
        whole = log_marginal(self.prior, self.statistics.quadratic, float(len(self.y)))
        others = log_marginal(self.prior, q, len(self.y) - 1.0)
        return 0.5 * (jnp.log(precision) - _LOG_2PI) + whole - others

    def _precision(self) -> tuple[Any, Any]:
        """The diagonal of P, and the quadratic forms without each target."""
        inverse_root = solve_triangular(self.root, jnp.eye(len(self.y)), lower=True)
        precision = (inverse_root**2).sum(0)
        # A sum of squares of the others: rounding may leave less than nothing of it.
        rest = self.statistics.quadratic - self.solved**2 / precision
        return precision, jnp.maximum(rest, jnp.finfo(rest.dtype).tiny)


def condition(prior: Any, network: Any, x: Any, y: Any, noise: Any) -> Conditioned:
    """A scale mixture of Gaussian processes given data; traceable.

    Args:
        prior: H, the law of sigma^2.
        network: a layer, with a readout of weight 1 and without bias (see `mlp`).
        x: inputs (n, d), or images.
        y: targets (n,).
        noise: variance of the noise in units of sigma^2.
    """
    dtype = jnp.result_type(x, y, float)
    x, y, noise = (jnp.asarray(a, dtype) for a in (x, y, noise))
    root = factor(network, x, noise)
    return Conditioned(prior, network, x, noise, y, root, cho_solve((root, True), y))
