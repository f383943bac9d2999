"""Independent draws from the prior."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

__all__ = ["Prior"]


@dataclasses.dataclass(frozen=True)
class Prior:
    """Draws all latent and deterministic sites from the prior, ignoring the data.

    The draws are independent; there is no warm-up. They land in the `prior` group.
    """

    needs: ClassVar[tuple[str, ...]] = ("prior",)
    group: ClassVar[str] = "prior"
    takes_start: ClassVar[bool] = False
    refit_warmup: ClassVar[int] = 0
    warmup: int = dataclasses.field(default=0, init=False)

    def check(self, program: Any) -> None:
        """Refuse improper priors."""
        program.require_proper()

    def statics(self) -> tuple:
        return ()

    def settings(self, program: Any, warmup: int) -> tuple:
        return ()

    def init(self, key: Any, start: Any, target: Any, settings: Any) -> Any:
        return jnp.zeros((), jnp.int32)

    def refresh(self, state: Any, target: Any, settings: Any) -> Any:
        return state

    def step(
        self, key: Any, index: Any, state: Any, target: Any, settings: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        return state + 1, target.prior(key), {}

    def values(self, draw: Any, target: Any) -> dict[str, Any]:
        return draw

    def failed(self, state: Any) -> Any:
        return np.zeros(np.shape(state), bool)
