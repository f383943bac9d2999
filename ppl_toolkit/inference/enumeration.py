"""Exact inference by enumeration, for programs whose latent sites are few and finite."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jax import lax, random
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from ppl_toolkit.errors import MethodError, OptionError

__all__ = ["Enumeration", "EnumerationState"]


class EnumerationState(NamedTuple):
    """The normalised log posterior of every configuration, and the log evidence."""

    log_posterior: Float[Array, " configurations"]
    log_evidence: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Enumeration:
    """Scores every joint configuration of the discrete latent sites.

    The log evidence is exact, and the draws are independent draws from the exact posterior.
    Cost: one evaluation of the log joint density per configuration.

    Args:
        max_configurations: refuse larger programs.
    """

    max_configurations: int = 2**20

    needs: ClassVar[tuple[str, ...]] = ("log_configuration", "configuration")
    takes_start: ClassVar[bool] = False
    refit_warmup: ClassVar[int] = 0
    warmup: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.max_configurations < 1:
            raise OptionError(
                f"max_configurations must be positive; got {self.max_configurations}."
            )

    def check(self, program: Any) -> None:
        """Refuse programs with continuous or unbounded latent sites, or too many values."""
        if program.continuous or not program.discrete:
            names = [site.name for site in program.continuous]
            raise MethodError(
                f"enumeration needs finite discrete latent sites only; {names or 'none'} "
                f"{'are continuous' if names else 'are there'}. Use method='nuts'."
            )
        infinite = [site.name for site in program.discrete if not site.cardinality]
        if infinite:
            raise MethodError(
                f"sites {infinite} have infinitely many values, or values that cannot be listed "
                "one by one: not enumerable."
            )
        count = program.configurations
        if count > self.max_configurations:
            raise MethodError(
                f"the discrete sites have {count:,} joint configurations, more than "
                f"max_configurations={self.max_configurations:,}."
            )

    def statics(self) -> tuple:
        return ()

    def settings(self, program: Any, warmup: int) -> tuple:
        # The length of this array makes the number of configurations known to `init`.
        return (np.arange(program.configurations),)

    def init(self, key: Any, start: Any, target: Any, settings: Any) -> EnumerationState:
        batch = min(1024, settings[0].shape[0])
        scores = lax.map(target.log_configuration, settings[0], batch_size=batch)
        evidence = logsumexp(scores)
        return EnumerationState(scores - evidence, evidence)

    def refresh(self, state: EnumerationState, target: Any, settings: Any) -> EnumerationState:
        return self.init(None, None, target, settings)

    def step(
        self, key: Any, index: Any, state: EnumerationState, target: Any, settings: Any
    ) -> tuple[EnumerationState, Any, dict[str, Any]]:
        chosen = random.categorical(key, state.log_posterior)
        lp = state.log_posterior[chosen] + state.log_evidence
        return state, chosen, {"lp": lp, "log_evidence": state.log_evidence}

    def values(self, draw: Any, target: Any) -> dict[str, Any]:
        return target.configuration(draw)

    def failed(self, state: EnumerationState) -> Any:
        return ~np.isfinite(np.asarray(state.log_evidence))
