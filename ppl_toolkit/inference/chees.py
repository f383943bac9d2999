"""ChEES-HMC: Hamiltonian Monte Carlo with many chains that learn one trajectory length."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppl_toolkit.inference.ensemble import Ensemble
from ppl_toolkit.inference.trajectory import Flight, Gradient, Point, Scalar, hamiltonian

__all__ = ["ChEES"]

_LEAST_ACCEPTANCE = 0.05  # a chain counts for, so that one of many cannot stop the others


@dataclasses.dataclass(frozen=True)
class ChEES(Ensemble):
    """HMC with many short chains in lock step, for models whose gradients vectorise well.

    A transition takes a share of the longest trajectory, the same for all chains, which runs
    through a Halton sequence. In warm-up the chains learn together: the step size, by the harmonic
    mean of their acceptance; the longest trajectory, which maximises the change of squared
    distances from the centre (ChEES); the metric.

    Args:
        target_acceptance: harmonic mean of the chains' acceptance that warm-up tunes the step size
            to.
        metric: as of `NUTS`, learned from all chains.
        max_steps: the most leapfrog steps of a trajectory.
        warmup: default number of warm-up iterations, at most: they end once the metric is as good
            as it gets and the chains agree.
        init_radius: starts are uniform in (-radius, radius) on the unconstrained space.

    Defaults of a run: 64 chains of 128 draws, in 16 superchains.

    Source: Hoffman, Radul and Sountsov (2021), AISTATS; metrics are not part of it.
    """

    target_acceptance: float = 0.651

    def flight(
        self, key: Any, point: Point, gradient: Gradient, metric: Any, step: Scalar, steps: Any
    ) -> Flight:
        return hamiltonian(key, point, gradient, metric, step, steps)

    def mean_acceptance(self, acceptance: Float[Array, " C"]) -> Scalar:
        return 1.0 / jnp.mean(1.0 / jnp.maximum(acceptance, _LEAST_ACCEPTANCE))

    def speed(self, dim: int) -> float:
        return 1.0
