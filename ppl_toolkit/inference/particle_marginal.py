"""Particle marginal Metropolis-Hastings: parameters by the evidence that a filter estimates.

The estimate that was accepted is kept with its parameters until the next acceptance, and with it a
path of that filter: the chain of parameters and paths then leaves their exact joint posterior
invariant, whatever the number of particles.

Source: Andrieu, Doucet and Holenstein (2010), JRSS B 72.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax import random

from ppl_toolkit import positions
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.kernel import SAMPLING, Info, Kernel, Placed, Spec, Stage
from ppl_toolkit.inference.mcmc import MCMC
from ppl_toolkit.inference.paris import genealogy
from ppl_toolkit.inference.particle_filter import Filter, follow, take
from ppl_toolkit.inference.proposals import Bootstrap, Proposal, require_proposal
from ppl_toolkit.inference.random_walk import RandomWalk
from ppl_toolkit.inference.state_space import StateSpace, state_space
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program

__all__ = ["PMMH", "ParticleMarginal"]


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """(position, key) -> log prior of the static sites + log Z_hat, and a path: of a program."""

    space: StateSpace
    options: Filter

    def example(self, program: Program) -> Any:
        return positions.shapes(program), jax.eval_shape(lambda: random.key(0))

    def __call__(self, program: Program, given: tuple[Position, Any], data: Sequence[Any]) -> Any:
        position, key = given
        key_filter, key_path = random.split(key)
        series = self.space.at(program, position, data)
        last, initial, history = follow(
            key_filter, series, self.options, lambda _, history, __: history
        )
        drawn = genealogy(key_path, series, initial, history, last.log_weights, 1)
        latents = {name: x[:, 0] for name, x in drawn[1].items()}
        values = positions.own_values(program, position, data)
        moved = positions.position_of(program, {**values, **take(drawn[0], 0), **latents}, data)
        path = {name: moved[name] for name in (*self.space.initial, *self.space.latents)}
        return series.log_prior + last.log_evidence, path


@dataclasses.dataclass(frozen=True, repr=False)
class ParticleMarginal(Spec):
    """Moves the parameters of a model with a `scan` by the evidence that a filter estimates.

    A Gaussian random walk on all static sites, adapted in warm-up as `RandomWalk`; with every
    accepted step comes a path of the latents.

    Args:
        particles: N; the number of steps T, but at least 64, if None. The estimates should have a
            standard deviation of the log of 1 to 1.7 at likely parameters; N grows like T.
        proposal, resampling, ess: see `ParticleFilter`.
        target_acceptance: mean acceptance probability aimed at in warm-up.

    Cost: a filter of N T steps of the model per step.
    """

    particles: int | None = None
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    resampling: str = "systematic"
    ess: float = 0.5
    target_acceptance: float = 0.15
    space: StateSpace | None = None

    alone: ClassVar[bool] = True
    tempers: ClassVar[bool] = False
    tunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        count = self.particles
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 2
        ):
            raise OptionError(f"particles must be an integer >= 2; got {count!r}.")
        require_proposal(self.proposal)
        _ = self._walk

    @property
    def label(self) -> str:
        return "particle_marginal"

    @property
    def _walk(self) -> RandomWalk:
        return RandomWalk(target_acceptance=self.target_acceptance)

    def on(self, program: Program) -> ParticleMarginal:
        """The kernel for the series of a program.

        Raises:
            MethodError: particles cannot follow it, there are no parameters, or discrete ones.
        """
        space = state_space(program)
        self.proposal.check(space, program)
        if not space.static:
            raise MethodError(
                f"{space.name} has no parameters outside its scan; use ParticleFilter."
            )
        if discrete := [n for n in space.static if program.sites[n].discrete]:
            raise MethodError(
                f"the random walk moves real parameters, but {discrete} are discrete. Use "
                "ParticleGibbs with a kernel for them, such as Gibbs()."
            )
        return dataclasses.replace(self, space=space)

    @property
    def _estimate(self) -> _Estimate:
        assert self.space is not None
        count = self.particles or max(64, self.space.length)
        return _Estimate(self.space, Filter(count, self.proposal, self.resampling, self.ess))

    @property
    def functions(self) -> tuple[Any, ...]:
        return (self._estimate,)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        assert self.space is not None
        names = self.space.static

        def parted(position: Position) -> tuple[dict[str, Any], dict[str, Any]]:
            static = {name: position[name] for name in names}
            return static, {n: x for n, x in position.items() if n not in static}

        def init(position: Position, key: Any) -> Placed:
            static, _ = parted(position)
            log_z, path = target.call(self._estimate, position, key)
            return Placed({**static, **path}, self._walk.begin(static, log_z))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            key_walk, key_filter = random.split(key)
            static, path = parted(state.position)

            def evaluate(proposed: Position) -> tuple[Any, Any]:
                return target.call(self._estimate, {**path, **proposed}, key_filter)

            moved, walk, path, info = self._walk.walk(
                key_walk, static, state.kept, path, evaluate, stage
            )
            info |= {"log_estimate": walk.log_density}
            return Placed({**moved, **path}, walk), info

        def refresh(state: Placed, position: Position) -> Placed:
            static, _ = parted(position)  # other data: the estimate begins anew
            log_z, path = target.call(self._estimate, position, random.key(0))
            return Placed({**static, **path}, state.kept._replace(log_density=log_z))

        return Kernel(init, step, refresh)

    def moves(self, space: Space) -> frozenset[str]:
        return frozenset(space)


@dataclasses.dataclass(frozen=True)
class PMMH(MCMC):
    """Particle marginal Metropolis-Hastings, `ParticleMarginal` as a method.

    Args:
        particles, proposal, resampling, ess, target_acceptance: see `ParticleMarginal`.
        warmup, init_radius: see `MCMC`.

    Source: Andrieu, Doucet and Holenstein (2010), JRSS B 72.
    """

    kernel: Any = None
    particles: int | None = None
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    resampling: str = "systematic"
    ess: float = 0.5
    target_acceptance: float = 0.15

    def __post_init__(self) -> None:
        own = ParticleMarginal(
            self.particles, self.proposal, self.resampling, self.ess, self.target_acceptance
        )
        object.__setattr__(self, "kernel", own)
        super().__post_init__()

    def on(self, program: Program) -> MCMC:
        return MCMC(self.kernel.on(program), self.warmup, self.init_radius)
