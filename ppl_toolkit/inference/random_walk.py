"""Random-walk Metropolis with the covariance of the target, learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.adaptation import DualAveraging, Moments
from ppl_toolkit.inference.kernel import (
    SAMPLING,
    Cloud,
    Info,
    Kernel,
    Placed,
    Spec,
    Stage,
    require_continuous,
)
from ppl_toolkit.inference.randomness import accept, continuous
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.inference.tuning import cloud_covariance, next_log_step
from ppl_toolkit.positions import Position

__all__ = ["RandomWalk"]

_GAMMA = 0.5  # of dual averaging: one proposal says less of the acceptance than a trajectory does
_BEST_SCALE = 2.38  # over sqrt(D): optimal for Gaussian targets of high dimension


class Walk(NamedTuple):
    """What a random walk keeps.

    Attributes:
        log_density: at the position.
        averaging: the step size and its adaptation.
        root: Cholesky factor of the covariance of the proposals, for a step size of one.
        moments: what the next covariance is made of.
    """

    log_density: Float[Array, ""]
    averaging: DualAveraging
    root: Float[Array, "D D"]
    moments: Moments


@dataclasses.dataclass(frozen=True)
class RandomWalk(Spec):
    """Gaussian random-walk Metropolis on all its sites at once; needs no gradients.

    The proposal is N(x, s^2 C): C is the covariance of the draws of the warm-up (or of the
    population, in SMC), s starts at ``scale`` and is tuned to the target acceptance.

    Args:
        scale: first step size; 2.38 / sqrt(D) if None.
        target_acceptance: mean acceptance probability aimed at.

    Cost: one log density and O(D^2) per step. Source: Roberts, Gelman and Gilks (1997) for scale
    and acceptance; Haario, Saksman and Tamminen (2001) for the covariance.
    """

    scale: float | None = None
    target_acceptance: float = 0.234

    tunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale is not None and not 0.0 < self.scale < float("inf"):
            raise OptionError(f"scale must be a positive number; got {self.scale!r}.")
        if not 0.0 < self.target_acceptance < 1.0:
            raise OptionError(
                f"target_acceptance must lie between 0 and 1; got {self.target_acceptance}."
            )

    @property
    def label(self) -> str:
        return "random_walk"

    def require(self, space: Space) -> None:
        require_continuous(type(self).__name__, space)

    def _first(self, size: int) -> float:
        return float(np.log(self.scale or _BEST_SCALE / np.sqrt(max(size, 1))))

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        """The kernel on positions; it adapts while the stage is warm-up."""

        def init(position: Position, key: Any) -> Placed:
            return Placed(dict(position), self.begin(position, target.log_density(position)))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            continuous(type(self).__name__)

            def evaluate(position: Position) -> tuple[Any, Any]:
                return target.log_density(position), ()

            position, walk, _, info = self.walk(
                key, state.position, state.kept, (), evaluate, stage
            )
            return Placed(position, walk), info

        def refresh(state: Placed, position: Position) -> Placed:
            walk = state.kept._replace(log_density=target.log_density(position))
            return Placed(dict(position), walk)

        def tune(state: Placed, cloud: Cloud) -> Placed:
            walk = state.kept
            log_step = next_log_step(
                walk.averaging.log_average, cloud.acceptance, self.target_acceptance
            )
            averaging = DualAveraging.start(log_step)
            root = jnp.linalg.cholesky(cloud_covariance(cloud))
            return state._replace(kept=walk._replace(averaging=averaging, root=root))

        return Kernel(init, step, refresh, tune)

    def begin(self, position: Position, log_density: Any) -> Walk:
        """What a walk keeps at its start."""
        x, _ = ravel_pytree(dict(position))
        first = jnp.full((), self._first(x.size), x.dtype)
        averaging = DualAveraging.start(first)._replace(centre=first)
        root = jnp.eye(x.size, dtype=x.dtype)
        return Walk(log_density, averaging, root, Moments.start(x, dense=True))

    def walk(
        self,
        key: Any,
        position: Position,
        walk: Walk,
        beside: Any,
        evaluate: Callable[[Position], tuple[Any, Any]],
        stage: Stage,
    ) -> tuple[Position, Walk, Any, Info]:
        """One transition.

        Args:
            beside: a pytree that belongs to the position, kept or replaced with it.
            evaluate: position -> its log density (an estimate of it, say) and what is beside it.
        """
        key_noise, key_accept = random.split(key)
        x, unravel = ravel_pytree(dict(position))
        log_step = jnp.where(stage.warming, walk.averaging.log_step, walk.averaging.log_average)
        noise = random.normal(key_noise, x.shape, x.dtype)
        y = x + jnp.exp(log_step) * (walk.root @ noise)
        log_density, new = evaluate(unravel(y))
        log_ratio = log_density - walk.log_density
        log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
        accepted = accept(key_accept, log_ratio)
        x = jnp.where(accepted, y, x)
        beside = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, beside)
        rate = jnp.minimum(1.0, jnp.exp(log_ratio))
        moved = walk._replace(log_density=jnp.where(accepted, log_density, walk.log_density))
        if not isinstance(stage.warming, np.bool_) or stage.warming:
            moved = lax.cond(
                stage.warming, lambda: self._adapted(moved, x, rate, stage), lambda: moved
            )
        info = {"acceptance_rate": rate, "step_size": jnp.exp(log_step)}
        return unravel(x), moved, beside, info

    def _adapted(self, walk: Walk, x: Any, rate: Any, stage: Stage) -> Walk:
        """One step of the warm-up: the step size at every one, the covariance in windows."""
        plan = stage.schedule
        target = jnp.asarray(self.target_acceptance, rate.dtype)
        averaging = walk.averaging.update(rate, target, gamma=_GAMMA)
        gathered = jax.tree.map(
            lambda new, old: jnp.where(plan.collects(stage.index), new, old),
            walk.moments.update(x),
            walk.moments,
        )

        def renewed() -> Walk:
            first = jnp.full((), self._first(x.size), x.dtype)
            return walk._replace(
                averaging=DualAveraging.start(first)._replace(centre=first),
                root=jnp.linalg.cholesky(gathered.regularised()),
                moments=Moments.start(x, dense=True),
            )

        kept = walk._replace(averaging=averaging, moments=gathered)
        return lax.cond(plan.renews(stage.index), renewed, lambda: kept)
