"""Delayed rejection: a second proposal where the first was rejected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.auxiliary import draw, score
from ppl_toolkit.inference.kernel import SAMPLING, Info, Kernel, Placed, Spec, Stage
from ppl_toolkit.inference.randomness import accept
from ppl_toolkit.inference.target import Target
from ppl_toolkit.positions import Position

__all__ = ["DelayedRejection"]


def _log_complement(log_ratio: Any) -> Any:
    """log(1 - min(1, exp(log_ratio)))."""
    return jnp.log(-jnp.expm1(jnp.minimum(0.0, log_ratio)))


@dataclasses.dataclass(frozen=True, repr=False)
class DelayedRejection(Spec):
    """Metropolis–Hastings with a second try.

    Args:
        first: NumPyro program of (position, target) that draws new values y of some sites under
            their names.
        second: program of (position, rejected position, target) that draws z where y was rejected.

    z is accepted with probability min(1, r2), r2 = pi(z) q1(y | z) q2(x | z, y) (1 - a1(z, y)) /
    (pi(x) q1(y | x) q2(z | x, y) (1 - a1(x, y))), a1 the first acceptance probability.

    Cost: two evaluations of the log density a step, and six of proposal densities.
    Source: Tierney and Mira (1999), Statistics in Medicine 18.
    """

    first: Callable[[Position, Target], Any]
    second: Callable[[Position, Position, Target], Any]

    def __post_init__(self) -> None:
        for what in ("first", "second"):
            if not callable(getattr(self, what)):
                raise OptionError(f"{what} must be a function; got {getattr(self, what)!r:.60}.")

    @property
    def label(self) -> str:
        return "delayed_rejection"

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        def put(position: Position, values: Mapping[str, Any]) -> dict[str, Any]:
            return {**position, **{k: v.astype(position[k].dtype) for k, v in values.items()}}

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            keys = random.split(key, 4)
            x, log_pi_x = dict(state.position), state.kept
            y_values, log_q1_xy = draw(self.first, keys[0], x, target)
            y = put(x, y_values)
            moved = tuple(y_values)

            def part(position: Position) -> dict[str, Any]:
                return {name: position[name] for name in moved}

            log_pi_y = target.log_density(y)
            log_a1_xy = log_pi_y + score(self.first, part(x), y, target) - log_pi_x - log_q1_xy
            accepted_y = accept(keys[1], log_a1_xy)

            z_values, log_q2_xz = draw(self.second, keys[2], x, y, target)
            z = put(x, z_values)
            log_pi_z = target.log_density(z)
            log_q1_zy = score(self.first, part(y), z, target)
            log_a1_zy = log_pi_y + score(self.first, part(z), y, target) - log_pi_z - log_q1_zy
            log_r2 = (
                log_pi_z + log_q1_zy + score(self.second, part(x), z, y, target)
                + _log_complement(log_a1_zy)
                - log_pi_x - log_q1_xy - log_q2_xz - _log_complement(log_a1_xy)
            )  # fmt: skip
            accepted_z = accept(keys[3], jnp.where(accepted_y, -jnp.inf, log_r2))

            def choose(new_y: Any, new_z: Any, old: Any) -> Any:
                return jnp.where(accepted_y, new_y, jnp.where(accepted_z, new_z, old))

            new = jax.tree.map(
                choose, Placed(y, log_pi_y), Placed(z, log_pi_z), Placed(x, log_pi_x)
            )
            return new, {"accepted": accepted_y | accepted_z, "accepted_first": accepted_y}

        def init(position: Position, key: Any = None) -> Placed:
            return Placed(position, target.log_density(position))

        return Kernel(init, step, lambda state, position: init(position))
