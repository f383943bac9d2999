"""Kernels of other libraries as pieces of ours.

Whatever has blackjax's protocol fits: ``init(position) -> state`` and ``step(key, state) -> (state,
info)``, states with a ``position``. Nothing is imported here. The other way needs no function: a
bound kernel has ``init(position, key)`` and ``step(key, state)`` itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.kernel import (
    SAMPLING,
    Info,
    Kernel,
    Placed,
    Spec,
    Stage,
    require_continuous,
)
from ppl_toolkit.inference.randomness import continuous
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.positions import Position

__all__ = ["Lifted", "lift"]

# What statistics of blackjax are called here.
_NAMES = {
    "acceptance_rate": "acceptance_rate",
    "is_accepted": "accepted",
    "is_divergent": "diverging",
    "num_integration_steps": "n_steps",
    "energy": "energy",
}


@dataclasses.dataclass(frozen=True, repr=False)
class Lifted(Spec):
    """A kernel made by ``build(log_density)``; see `lift`."""

    build: Callable[[Callable[[Position], Any]], Any]
    name: str = "lifted"

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise OptionError(
                f"lift takes a function of the log density, such as lambda log_density: "
                f"blackjax.mala(log_density, 0.1); got {self.build!r:.60}."
            )

    @property
    def label(self) -> str:
        return self.name

    def require(self, space: Space) -> None:
        require_continuous(self.name, space)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        algorithm = self.build(target.log_density)

        def init(position: Position, key: Any = None) -> Placed:
            return Placed(position, algorithm.init(dict(position)))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            continuous(self.name)
            new, info = algorithm.step(key, state.kept)
            found = {
                ours: jnp.asarray(getattr(info, theirs))
                for theirs, ours in _NAMES.items()
                if hasattr(info, theirs)
            }
            return Placed(new.position, new), found

        return Kernel(init, step, lambda state, position: init(position))


def lift(build: Callable, name: str = "lifted") -> Lifted:
    """A kernel of blackjax, or of its protocol, as a piece of a composition.

    Args:
        build: log density of a position -> an algorithm with ``init`` and ``step``, such as
            ``lambda log_density: blackjax.mala(log_density, 0.1)``. Its options are fixed: it does
            not adapt in warm-up.
        name: what statistics call the kernel.

    Raises:
        OptionError: ``build`` is no function.
    """
    return Lifted(build, name)
