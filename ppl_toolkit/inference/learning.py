"""The options of methods whose warm-up learns a step size and a metric, and what they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.scaling import MOST_DENSE
from ppl_toolkit.inference.step_sizes import require_radius, require_warmup
from ppl_toolkit.inference.warm_up import Plan

__all__ = ["METRICS", "Learning", "Settings"]

METRICS = ("diagonal", "dense", "low rank")


class Settings(NamedTuple):
    """Options that are arguments of the compiled program.

    Attributes:
        target_acceptance: of the step size.
        radius: of the random starts.
        phase, until: how warm-up begins.
    """

    target_acceptance: Float[Any, ""]
    radius: Float[Any, ""]
    phase: Int[Any, ""]
    until: Int[Any, ""]


class Learning:
    """What such methods share; a dataclass with these fields makes it one.

    Attributes:
        target_acceptance: of the step size.
        metric: "auto", or one of `METRICS`.
        warmup: iterations.
        init_radius: of the random starts.
    """

    target_acceptance: float
    metric: str
    warmup: int
    init_radius: float

    def __post_init__(self) -> None:
        if callable(self.target_acceptance):
            name = type(self).__name__
            raise OptionError(f"{name}(...) takes options; the model goes to infer(model, ...).")
        target = self.target_acceptance
        if not (isinstance(target, int | float | np.number) and 0.0 < target < 1.0):
            raise OptionError(f"target_acceptance must lie between 0 and 1; got {target!r:.60}.")
        if not (isinstance(self.metric, str) and self.metric in ("auto", *METRICS)):
            raise OptionError(
                f"metric must be 'auto' or one of {METRICS}; got {self.metric!r:.60}."
            )
        require_warmup(self.warmup)
        require_radius(self.init_radius)

    def check(self, program: Any) -> None:
        """Refuse programs without a continuous latent site, or with discrete ones."""
        program.require_gradients(type(self).__name__)

    def settings(self, program: Any, warmup: int) -> Settings:
        """The options that are arguments of the compiled program."""
        dtype, first = program.precision, Plan.of(warmup).first
        return Settings(
            np.asarray(self.target_acceptance, dtype),
            np.asarray(self.init_radius, dtype),
            *(np.asarray(number, np.int32) for number in first),
        )

    def kind(self, dim: int) -> str:
        """The type of the metric of so many dimensions."""
        if self.metric != "auto":
            return self.metric
        return "dense" if dim <= MOST_DENSE else "low rank"
