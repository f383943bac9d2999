"""Scale mixtures of the Gaussian processes of infinitely wide networks.

    fitted = fit(mlp(3), X, y, noise=0.05, law=BurrXII(2.0, 2.0))
    fitted.log_evidence, fitted.scale.mean
    fitted.predict(X_new).interval(0.9)
    fitted.with_law(InverseGamma(2.0, 2.0))     # the same Cholesky factor

sigma^2 ~ law, and y | sigma^2 ~ N(0, sigma^2 (K + noise I)). An inverse gamma law makes this a
Student-t process; the posterior mean is that of the Gaussian process with the same kernel, so that
a heavy tail does not make the mean robust against outliers; what the data scale is the width of the
predictions. After n data a Student-t has 2 alpha + n degrees of freedom: for n far beyond 100 it is
a Gaussian whose scale fits the data.

Sources: Shah, Wilson, Ghahramani (2014); Lee, Yun, Yang, Lee (2022).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import random
from numpy.typing import NDArray
from numpyro import distributions as dist

from ppl_toolkit.errors import DataError, InferenceWarning, OptionError
from ppl_toolkit.models.conditioning import Conditioned, condition
from ppl_toolkit.models.evaluation import (
    checked_inputs,
    checked_new_inputs,
    checked_of,
    in_float64,
    scaled_targets,
)
from ppl_toolkit.models.fixed_noise import fit_fixed_noise
from ppl_toolkit.models.layers import Layer, check_order
from ppl_toolkit.models.network_process import NetworkProcess
from ppl_toolkit.models.predictive import Predictive
from ppl_toolkit.models.scale_laws import (
    BurrXII,
    GeneralizedInverseGaussian,
    of_standard_deviation,
)
from ppl_toolkit.models.scale_mixture_laws import (
    ScaleMixtureNormal,
    ScaleMixtureProcess,
    StudentTProcess,
)
from ppl_toolkit.models.scale_mixture_plots import (
    plot_calibration,
    plot_predictions,
    plot_scale,
)
from ppl_toolkit.models.scale_mixture_regression import scale_mixture_regression
from ppl_toolkit.models.scale_quadrature import (
    importance,
    log_marginal,
    posterior_law,
    single_law,
)
from ppl_toolkit.models.scale_tables import Atoms, Tabulated

__all__ = [
    "Atoms",
    "BurrXII",
    "Fitted",
    "GeneralizedInverseGaussian",
    "NetworkProcess",
    "Predictive",
    "ScaleMixtureNormal",
    "ScaleMixtureProcess",
    "StudentTProcess",
    "Tabulated",
    "fit",
    "fit_fixed_noise",
    "importance",
    "log_marginal",
    "of_standard_deviation",
    "plot_calibration",
    "plot_predictions",
    "plot_scale",
    "posterior_law",
    "scale_mixture_regression",
]

_JITTERS = tuple(10.0**k for k in range(-12, -3))  # relative to the mean of the diagonal


def fit(
    network: Layer,
    X: Any,  # noqa: N803
    y: Any,
    *,
    noise: float,
    law: dist.Distribution | None = None,
) -> Fitted:
    """Condition a scale mixture on data, with one Cholesky factorisation.

    Args:
        network: layers with a readout of weight 1 and without bias, such as ``mlp(3)``.
        X: inputs (n, d), or images (n, height, width, channels).
        y: targets (n,), centred, with a standard deviation near 1.
        noise: variance of the noise in units of sigma^2, 0 or more.
        law: of sigma^2: any NumPyro distribution of a positive number, InverseGamma(2, 2) if None.
            ``dist.Delta(s2)`` is a Gaussian process with this scale.

    Returns:
        Evidence, posterior of sigma^2, predictions, leave-one-out.

    Raises:
        DataError: X or y cannot be used, or the kernel's matrix is not positive definite, even with
            1e-4 of its mean diagonal added. What was added is `Fitted.jitter`, with a warning.
        OptionError: the noise is negative.

    Complexity: n^3 / 3 operations, n^2 numbers.
    """
    check_order(network)
    law = single_law(dist.InverseGamma(2.0, 2.0) if law is None else law)
    X = np.asarray(checked_inputs(X, "X"))
    targets = scaled_targets(y, len(X))
    if not np.ndim(noise) == 0 or not np.isfinite(noise) or noise < 0:
        raise OptionError(f"noise must be a number, at least 0; got {noise!r:.60}.")
    found = in_float64(condition, law, network, X, targets, float(noise))
    if np.all(np.isfinite(found.root)):
        return Fitted(found, 0.0)
    scale = float(np.mean(network.variances(X).nngp))
    for jitter in (scale * relative for relative in _JITTERS):
        found = in_float64(condition, law, network, X, targets, float(noise) + jitter)
        if np.all(np.isfinite(found.root)):
            warnings.warn(
                f"the kernel's matrix was not positive definite with noise={noise:g}: "
                f"{_duplicates(X)}{jitter:.3g} was added to the noise (see jitter). "
                "A larger noise, or dropping repeated rows, avoids this.",
                InferenceWarning,
                stacklevel=2,
            )
            return Fitted(found, jitter)
    raise DataError(
        f"the kernel's matrix is not positive definite with noise={noise:g}, even with "
        f"{_JITTERS[-1] * scale:.3g} more: {_duplicates(X)}use a larger noise, or standardise the "
        "inputs."
    )


def _duplicates(X: Any) -> str:  # noqa: N803
    rows = np.asarray(X).reshape(len(X), -1)
    count = len(rows) - len(np.unique(rows, axis=0))
    return f"{count} of {len(rows)} rows of X repeat others; " if count else ""


class Fitted:
    """A scale mixture given data; see `fit`.

    Attributes:
        conditioned: the factor and what belongs to it, NumPy arrays.
        jitter: what was added to the noise to make the matrix positive definite, 0 if nothing.
    """

    def __init__(self, conditioned: Conditioned, jitter: float) -> None:
        self.conditioned, self.jitter = conditioned, jitter

    @property
    def log_evidence(self) -> float:
        """The log density of the targets."""
        return float(in_float64(_log_evidence, self.conditioned))

    @property
    def profiled_log_evidence(self) -> float:
        """The log density at the best sigma^2 = q / n: no law of sigma^2 has a larger evidence.

        How much of a law's evidence is about tails, and how much about the scale: the difference
        to `log_evidence` is what the law costs.
        """
        return self.with_law(dist.Delta(self.profiled_scale)).log_evidence

    @property
    def profiled_scale(self) -> float:
        """The most likely sigma^2, q / n."""
        return float(self.conditioned.y @ self.conditioned.solved / len(self.conditioned.y))

    @property
    def scale(self) -> Predictive:
        """The law of sigma^2 given the data."""
        return Predictive(in_float64(_scale, self.conditioned))

    def with_law(self, law: dist.Distribution) -> Fitted:
        """The same data and kernel under another law of sigma^2; no new factorisation."""
        return Fitted(self.conditioned._replace(prior=single_law(law)), self.jitter)

    def compare(self, laws: Mapping[str, dist.Distribution]) -> pd.DataFrame:
        """Log evidence, posterior mean of sigma^2 and exact elpd of every law, best first."""
        rows = {}
        for name, law in laws.items():
            other = self.with_law(law)
            scores = other.leave_one_out_log_densities()
            rows[name] = {
                "log_evidence": other.log_evidence,
                "scale_mean": float(np.mean(other.scale.law.mean)),
                "elpd_loo": float(scores.sum()),
                "se": float(np.sqrt(len(scores)) * scores.std(ddof=1)),
            }
        return pd.DataFrame.from_dict(rows, orient="index").sort_values(
            "log_evidence", ascending=False
        )

    def predict(self, X_new: Any, of: str = "y") -> Predictive:  # noqa: N803
        """The law at every new input by itself.

        Args:
            X_new: inputs (m, d).
            of: "y" for targets, noise included, or "f" for the function without it.
        """
        return Predictive(
            in_float64(_marginals, self.conditioned, self._inputs(X_new), of=checked_of(of))
        )

    def sample(
        self,
        X_new: Any,  # noqa: N803
        draws: int = 1,
        of: str = "y",
        seed: int = 0,
    ) -> NDArray[np.float64]:
        """Joint draws (draws, m) at new inputs: every draw has one sigma^2 for all of them."""
        key = np.uint32(seed)
        return in_float64(
            _joint_sample,
            self.conditioned,
            self._inputs(X_new),
            key,
            of=checked_of(of),
            draws=draws,
        )

    def joint_log_density(self, X_new: Any, y_new: Any) -> float:  # noqa: N803
        """The joint log density of new targets."""
        X_new = self._inputs(X_new)
        targets = scaled_targets(y_new, len(X_new))
        return float(in_float64(_joint_log_density, self.conditioned, X_new, targets))

    def leave_one_out(self) -> Predictive:
        """The law of every target given all others, exactly."""
        return Predictive(in_float64(_left_out, self.conditioned))

    def leave_one_out_log_densities(self) -> NDArray[np.float64]:
        """Log p(y_i | all others), exactly, (n,); their sum is the elpd."""
        return in_float64(_left_out_log_densities, self.conditioned)

    def _inputs(self, X_new: Any) -> Any:  # noqa: N803
        return checked_new_inputs(X_new, self.conditioned.x)

    def __repr__(self) -> str:
        c = self.conditioned
        return f"Fitted({type(c.prior).__name__}, n={len(c.y)}, noise={float(c.noise):.3g})"


def _log_evidence(c: Conditioned) -> Any:
    return c.log_evidence


def _scale(c: Conditioned) -> Any:
    return c.scale


def _marginals(c: Conditioned, x_new: Any, *, of: str) -> Any:
    return c.marginals(x_new, of)


def _joint_sample(c: Conditioned, x_new: Any, seed: Any, *, of: str, draws: int) -> Any:
    return c.joint(x_new, of).sample(random.key(seed), (draws,))


def _joint_log_density(c: Conditioned, x_new: Any, y_new: Any) -> Any:
    return c.joint(x_new).log_prob(jnp.asarray(y_new))


def _left_out(c: Conditioned) -> Any:
    return c.left_out()


def _left_out_log_densities(c: Conditioned) -> Any:
    return c.left_out_log_densities()
