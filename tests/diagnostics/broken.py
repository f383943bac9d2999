"""Samplers that are wrong on purpose, as methods of their own."""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import jax.numpy as jnp
from jax import random

from ppl_toolkit.inference.hmc import HMC, NUTS
from ppl_toolkit.inference.trajectory import hamiltonian, metropolis


@dataclasses.dataclass(frozen=True)
class WrongJacobian(NUTS):
    """Forgets the Jacobian of one transform: a coordinate whose constrained value is exp(u)."""

    coordinate: int = 1

    def statics(self):
        return (*super().statics(), self.coordinate)

    def _without(self, target):
        return SimpleNamespace(
            log_density=lambda x: target.log_density(x) - x[self.coordinate],
            constrain=target.constrain,
        )

    def init(self, key, start, target, settings):
        return super().init(key, start, self._without(target), settings)

    def refresh(self, state, target, settings):
        return super().refresh(state, self._without(target), settings)

    def step(self, key, index, state, target, settings):
        return super().step(key, index, state, self._without(target), settings)


@dataclasses.dataclass(frozen=True)
class HalfStepAccept(HMC):
    """Proposes with one step size and accepts by the energy error of half of it."""

    def transition(self, key, point, gradient, metric, step, early):
        key_momentum, key_accept = random.split(key)

        def flight(step):
            return hamiltonian(key_momentum, point, gradient, metric, step, self.steps)

        proposed = flight(step)._replace(error=flight(0.5 * step).error)
        end, stats = metropolis(key_accept, point, proposed)
        return end, {**stats, "n_steps": jnp.asarray(2 * self.steps, jnp.int32)}


@dataclasses.dataclass(frozen=True)
class IgnoresOne(NUTS):
    """Overlooks the first observation of a site: its score is taken out of the density again."""

    site: str = "y"

    needs: ClassVar[tuple[str, ...]] = ("log_density", "constrain", "log_likelihood")

    def statics(self):
        return (*super().statics(), self.site)

    def _without(self, target):
        def log_density(x):
            return target.log_density(x) - target.log_likelihood(x)[self.site][0]

        return SimpleNamespace(log_density=log_density, constrain=target.constrain)

    def init(self, key, start, target, settings):
        return super().init(key, start, self._without(target), settings)

    def refresh(self, state, target, settings):
        return super().refresh(state, self._without(target), settings)

    def step(self, key, index, state, target, settings):
        return super().step(key, index, state, self._without(target), settings)
