"""Step sizes that change along a run, and what options of step sizes may be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ppl_toolkit.errors import OptionError

__all__ = [
    "Cyclical",
    "PolynomialDecay",
    "require_count",
    "require_positive",
    "require_radius",
    "require_step_size",
    "require_warmup",
]


@dataclasses.dataclass(frozen=True)
class PolynomialDecay:
    """Step sizes a (b + t)^-gamma for the steps t = 0, 1, ... of a run, warm-up included.

    Where they go to zero, so does the bias of `SGLD`, and the draws of later steps say less and
    less that is new. Decay over the warm-up, with a large b, is a mild alternative.

    Args:
        scale: a.
        offset: b.
        power: gamma in [0, 1]; averages converge fastest with 1/3 (Teh et al. 2016, JMLR 17).

    Raises:
        OptionError: a number out of its range.

    Source: Welling and Teh (2011), ICML.
    """

    scale: float
    offset: float = 1.0
    power: float = 1.0 / 3.0

    def __post_init__(self) -> None:
        require_positive("scale", self.scale)
        require_positive("offset", self.offset)
        if not 0.0 <= self.power <= 1.0:
            raise OptionError(f"power must lie between 0 and 1; got {self.power!r}.")

    def __call__(self, t: Any) -> Any:
        return self.scale * (self.offset + t) ** -self.power


@dataclasses.dataclass(frozen=True)
class Cyclical:
    """Step sizes that fall from ``step_size`` to zero along a half cosine, again and again.

    The first share of every cycle explores: no noise is added, so that the large steps descend to
    a mode, a new one perhaps. Only the rest samples, and only states of the rest become draws: the
    iteration that begins a cycle runs through its exploration first.

    Args:
        step_size: at the beginning of each cycle.
        length: steps of a cycle.
        exploration: share of them that explores, in [0, 1).

    Raises:
        OptionError: a number out of its range, or no step of a cycle is left to sample.

    Source: Zhang et al. (2020), Cyclical stochastic gradient MCMC for Bayesian deep learning, ICLR.
    """

    step_size: float
    length: int
    exploration: float = 0.5

    def __post_init__(self) -> None:
        require_positive("step_size", self.step_size)
        require_count("length", self.length)
        if not 0.0 <= self.exploration * self.length <= self.length - 1:
            raise OptionError(
                f"exploration must be a share in [0, 1) that leaves a step of {self.length} to "
                f"sample; got {self.exploration!r}."
            )

    def __call__(self, t: Any) -> Any:
        return 0.5 * self.step_size * (1.0 + jnp.cos(jnp.pi * (t % self.length) / self.length))

    def explores(self, t: Any) -> Any:
        """Whether step t adds no noise and makes no draw."""
        return t % self.length < self.exploration * self.length


def require_positive(name: str, value: Any) -> None:
    """Refuse what is no positive, finite number."""
    if not isinstance(value, int | float | np.number) or not 0.0 < value < math.inf:
        raise OptionError(f"{name} must be a positive number; got {value!r:.60}.")


def require_count(name: str, value: Any) -> None:
    """Refuse what is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be an integer >= 1; got {value!r:.60}.")


def require_warmup(value: Any) -> None:
    """Refuse what is no number of warm-up iterations."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OptionError(f"warmup must be an integer >= 0; got {value!r:.60}.")


def require_radius(value: Any) -> None:
    """Refuse what is no radius of random starts."""
    if not value >= 0.0:
        raise OptionError(f"init_radius must be >= 0; got {value!r:.60}.")


def require_step_size(method: str, step_size: Any, advice: str) -> None:
    """Refuse what is neither a positive number nor a function that begins with one.

    Args:
        method: what messages call the kernel.
        step_size: the option.
        advice: said if there is none.
    """
    if step_size is None:
        raise OptionError(
            f"{method} needs a step size, such as {method}(step_size=0.01): none suits all "
            f"posteriors. {advice}"
        )
    if not callable(step_size):
        return require_positive("step_size", step_size)
    try:
        first = float(step_size(np.int32(0)))
    except Exception as error:
        raise OptionError(
            "step_size must be a number or a function of the number of the step; "
            f"{step_size!r:.60} raised {type(error).__name__}: {error}"
        ) from None
    if not 0.0 < first < math.inf:
        raise OptionError(f"step_size must be positive; {step_size!r:.60} begins with {first}.")
