"""The law of one or many numbers as a person reads it: NumPy in, float64 NumPy out."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import random
from numpy.typing import NDArray
from numpyro import distributions as dist

from ppl_toolkit.errors import DataError, OptionError
from ppl_toolkit.models.evaluation import in_float64

__all__ = ["Predictive"]


class Predictive:
    """The law of a number, or of every number of an array by itself.

    Attributes:
        law: the NumPyro distribution, for use inside of models.
    """

    def __init__(self, law: Any) -> None:
        self.law = law

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.law.batch_shape)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The means.

        Raises:
            DataError: they do not exist: a Student-t of at most one degree of freedom has none.
        """
        found = in_float64(_mean, self.law)
        if not np.all(np.isfinite(found)):
            raise DataError(
                "this law has no mean: its tails are too heavy (a Student-t needs more than one "
                "degree of freedom; twice the shape alpha of an inverse gamma law of sigma^2, plus "
                "the number of data). Its median is quantile(0.5)."
            )
        return found

    @property
    def variance(self) -> NDArray[np.float64]:
        """The variances; infinite where the tails are too heavy."""
        return in_float64(_variance, self.law)

    @property
    def std(self) -> NDArray[np.float64]:
        """The standard deviations; infinite where the tails are too heavy."""
        return np.sqrt(self.variance)

    def log_density(self, value: Any) -> NDArray[np.float64]:
        """Log densities at values that broadcast against the law's shape."""
        return in_float64(_log_density, self.law, self._values(value))

    def cdf(self, value: Any) -> NDArray[np.float64]:
        """Probabilities of at most ``value``."""
        return in_float64(_cdf, self.law, self._values(value))

    def quantile(self, probability: Any) -> NDArray[np.float64]:
        """Quantiles; several probabilities (k,) give an array (k, *shape).

        Raises:
            OptionError: a probability outside (0, 1).
        """
        p = np.asarray(probability, dtype=float)
        if p.size == 0 or not np.all((p > 0) & (p < 1)):
            raise OptionError(f"probabilities must lie between 0 and 1; got {probability!r:.60}.")
        return in_float64(_quantile, self.law, p.reshape(p.shape + (1,) * len(self.shape)))

    def interval(self, mass: float = 0.9) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The central interval that holds ``mass``: lower and upper ends."""
        if not 0 < mass < 1:
            raise OptionError(f"mass must lie between 0 and 1; got {mass!r}.")
        low, high = self.quantile([(1 - mass) / 2, (1 + mass) / 2])
        return low, high

    def sample(self, draws: int = 1, seed: int = 0) -> NDArray[np.float64]:
        """Independent draws of every number by itself, (draws, *shape)."""
        return in_float64(_sample, self.law, np.uint32(seed), draws=draws)

    def crps(self, value: Any) -> NDArray[np.float64]:
        """Continuous ranked probability scores of what was seen; smaller is better."""
        return in_float64(_crps, self.law, self._values(value))

    def expected_improvement(self, best: float) -> NDArray[np.float64]:
        """E[max(best - value, 0)]: what a minimisation may gain at each point."""
        return in_float64(_improvement, self.law, np.float64(best))

    def _values(self, value: Any) -> NDArray[np.float64]:
        try:
            values = np.asarray(value, dtype=float)
            np.broadcast_shapes(values.shape, self.shape)
        except (TypeError, ValueError):
            raise DataError(
                f"values must be numbers that fit to predictions of shape {self.shape}; got "
                f"{value!r:.60}."
            ) from None
        return values

    def __repr__(self) -> str:
        return f"Predictive({type(self.law).__name__}, shape={self.shape})"


def _mean(law: Any) -> Any:
    # NumPyro's laws may say infinite or NaN, or give the centre of symmetry, where there is none.
    mean = law.mean
    dof = _degrees_of_freedom(law)
    return mean if dof is None else jnp.where(dof > 1, mean, jnp.nan)


def _degrees_of_freedom(law: Any) -> Any:
    mixing = getattr(law, "law", None)
    return 2 * mixing.concentration if isinstance(mixing, dist.InverseGamma) else None


def _variance(law: Any) -> Any:
    return law.variance


def _log_density(law: Any, value: Any) -> Any:
    return law.log_prob(value)


def _cdf(law: Any, value: Any) -> Any:
    return law.cdf(value)


def _quantile(law: Any, p: Any) -> Any:
    return law.icdf(p)


def _sample(law: Any, seed: Any, *, draws: int) -> Any:
    return law.sample(random.key(seed), (draws,))


def _crps(law: Any, value: Any) -> Any:
    return law.crps(value)


def _improvement(law: Any, best: Any) -> Any:
    return law.expected_improvement(best)
