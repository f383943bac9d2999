"""Control variates for gradients of minibatches: a point whose whole gradient is known.

Source: Baker, Fearnhead, Fox and Nemeth (2019), Statistics and Computing 29.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ppl_toolkit.inference.adaptation import Moments
from ppl_toolkit.inference.kernel import Stage

__all__ = ["Anchor", "Score", "estimate"]

Vector = Float[Array, " D"]
Scalar = Float[Array, ""]
Score = Callable[[Vector], tuple[Scalar, Vector]]  # log density and gradient


class Anchor(NamedTuple):
    """A point whose gradient over all the data is known.

    Attributes:
        position: the point.
        log_density, gradient: there, of the whole target.
        moments: of positions of the warm-up, whose mean is the next anchor.
    """

    position: Vector
    log_density: Scalar
    gradient: Vector
    moments: Moments

    @classmethod
    def at(cls, position: Vector, whole: Score) -> Anchor:
        return cls(position, *whole(position), Moments.start(position, dense=False))

    def update(self, x: Vector, stage: Stage, whole: Score) -> Anchor:
        """The anchor after an iteration of the warm-up that ended at x."""
        plan = stage.schedule
        moments = jax.tree.map(
            lambda new, old: jnp.where(plan.collects(stage.index), new, old),
            self.moments.update(x),
            self.moments,
        )
        return lax.cond(
            plan.renews(stage.index),
            lambda: Anchor.at(moments.mean, whole),
            lambda: self._replace(moments=moments),
        )


def estimate(batch: Score, anchor: Anchor | None, x: Vector) -> tuple[Scalar, Vector]:
    """Unbiased estimates of the log density and its gradient at x.

    With an anchor z: grad log p(z) + [grad log p_B(x) - grad log p_B(z)], B the minibatch.
    """
    value, gradient = batch(x)
    if anchor is None:
        return value, gradient
    value_z, gradient_z = batch(anchor.position)
    return value + (anchor.log_density - value_z), gradient + (anchor.gradient - gradient_z)
