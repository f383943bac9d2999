"""MAMS: the Metropolis-adjusted microcanonical sampler, with many chains that learn together."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.ensemble import Ensemble
from ppl_toolkit.inference.trajectory import Flight, Gradient, Point, Scalar, isokinetic

__all__ = ["MAMS"]


@dataclasses.dataclass(frozen=True)
class MAMS(Ensemble):
    """Trajectories of constant speed, accepted or rejected so that nothing is approximate.

    The momentum keeps its length, and forces turn it: where the density falls steeply, such
    trajectories are bent rather than thrown. Its direction is drawn anew at every transition. The
    rest is as in `ChEES`: many chains in lock step, which learn a step size (by their mean
    acceptance), the longest trajectory and a metric together.

    Args:
        target_acceptance: mean acceptance that warm-up tunes the step size to.
        metric: as of `NUTS`, learned from all chains.
        max_steps: the most steps of a trajectory, one gradient each.
        warmup: default number of warm-up iterations, at most: they end once the metric is as good
            as it gets and the chains agree.
        init_radius: starts are uniform in (-radius, radius) on the unconstrained space.

    Raises:
        MethodError: (when it runs) the model has one dimension, in which nothing can turn.

    Defaults of a run: 64 chains of 128 draws, in 16 superchains.

    Source: Robnik, Cohn-Gordon and Seljak (2025), Metropolis adjusted microcanonical Hamiltonian
    Monte Carlo; the length by the ChEES criterion is not part of it.
    """

    target_acceptance: float = 0.9

    def check(self, program: Any) -> None:
        super().check(program)
        if program.size < 2:
            raise MethodError(
                "MAMS turns momenta of constant length, which needs two dimensions or more; this "
                "model has one. Use ChEES() or NUTS()."
            )

    def flight(
        self, key: Any, point: Point, gradient: Gradient, metric: Any, step: Scalar, steps: Any
    ) -> Flight:
        return isokinetic(key, point, gradient, metric, step, steps)

    def mean_acceptance(self, acceptance: Float[Array, " C"]) -> Scalar:
        return jnp.mean(acceptance)

    def speed(self, dim: int) -> float:
        return dim**-0.5
