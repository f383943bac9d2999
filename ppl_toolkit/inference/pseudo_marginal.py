"""Pseudo-marginal Metropolis–Hastings: an unbiased estimate in place of the likelihood."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import random

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.auxiliary import draw, score
from ppl_toolkit.inference.kernel import SAMPLING, Info, Kernel, Placed, Spec, Stage
from ppl_toolkit.inference.randomness import accept
from ppl_toolkit.inference.target import Target
from ppl_toolkit.positions import Position

__all__ = ["PseudoMarginal"]


@dataclasses.dataclass(frozen=True, repr=False)
class PseudoMarginal(Spec):
    """Metropolis–Hastings for the model's density times an intractable likelihood.

    The estimate that was accepted is kept with the position until the next acceptance: estimating
    it again at the current position would change the target.

    Args:
        proposal: NumPyro program of (position, target) that draws new values of some sites under
            their names.
        estimator: (key, position) -> log of a non-negative unbiased estimate of the likelihood.

    The kernel must move alone (not in a cycle or mixture), since a move of its sites by others
    would leave the estimate behind.

    Cost: one estimate a step. It mixes well where the variance of the log estimate is about 1 to 3.
    Source: Andrieu and Roberts (2009), Annals of Statistics 37.
    """

    proposal: Callable[[Position, Target], Any]
    estimator: Callable[[Any, Position], Any]

    alone: ClassVar[bool] = True
    tempers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for what in ("proposal", "estimator"):
            if not callable(getattr(self, what)):
                raise OptionError(f"{what} must be a function; got {getattr(self, what)!r:.60}.")

    @property
    def label(self) -> str:
        return "pseudo_marginal"

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        def log_joint(key: Any, position: Position) -> Any:
            return target.log_density(position) + self.estimator(key, position)

        def init(position: Position, key: Any) -> Placed:
            return Placed(position, log_joint(key, position))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            key_proposal, key_estimate, key_accept = random.split(key, 3)
            old = Placed(dict(state.position), state.kept)
            values, log_q = draw(self.proposal, key_proposal, old.position, target)
            position = {
                **old.position,
                **{name: y.astype(old.position[name].dtype) for name, y in values.items()},
            }
            new = Placed(position, log_joint(key_estimate, position))
            back = {name: old.position[name] for name in values}
            ratio = new.kept - old.kept + score(self.proposal, back, position, target) - log_q
            accepted = accept(key_accept, ratio)
            moved = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
            rate = jnp.exp(jnp.minimum(0.0, jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)))
            return moved, {"acceptance_rate": rate, "log_estimate": moved.kept}

        def refresh(state: Placed, position: Position) -> Placed:
            return init(position, random.key(0))  # other data: the chain begins anew

        return Kernel(init, step, refresh)
