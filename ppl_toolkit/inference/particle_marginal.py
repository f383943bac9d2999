"""Particle marginal Metropolis-Hastings: parameters by the evidence that a filter estimates.

The estimate that was accepted is kept with its parameters until the next acceptance, and with it a
path of that filter: the chain of parameters and paths then leaves their exact joint posterior
invariant, whatever the number of particles.

Source: Andrieu, Doucet and Holenstein (2010), JRSS B 72; Deligiannidis, Doucet and Pitt (2018),
JRSS B 80, for correlated estimates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit import positions
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.begun import Begun
from ppl_toolkit.inference.correlated_filter import CorrelatedEstimate, correlated
from ppl_toolkit.inference.inner_filter import drawn_path
from ppl_toolkit.inference.kernel import SAMPLING, Info, Kernel, Placed, Spec, Stage
from ppl_toolkit.inference.mcmc import MCMC
from ppl_toolkit.inference.particle_filter import Filter, follow
from ppl_toolkit.inference.proposals import Bootstrap, Proposal, require_proposal
from ppl_toolkit.inference.random_walk import RandomWalk, Walk
from ppl_toolkit.inference.state_space import StateSpace, state_space
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.inference.tuned_particles import tuned_particles
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import key_shape

__all__ = ["PMMH", "ParticleMarginal"]


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """(position, key) -> log prior of the static sites + log Z_hat, and a path: of a program."""

    space: StateSpace
    options: Filter

    def example(self, program: Program) -> Any:
        return positions.shapes(program), key_shape()

    def __call__(self, program: Program, given: tuple[Position, Any], data: Sequence[Any]) -> Any:
        position, key = given
        key_filter, key_path = random.split(key)
        series = self.space.at(program, position, data)
        last, initial, history = follow(
            key_filter, series, self.options, lambda _, history, __: history
        )
        path = drawn_path(
            key_path, self.space, program, position, data, series, initial, history,
            last.log_weights,
        )  # fmt: skip
        return series.log_prior + last.log_evidence, path


class _Kept(NamedTuple):
    """The state of the walk, with the estimate; and the normal variates it was made from, if so."""

    walk: Walk
    variates: Any


@dataclasses.dataclass(frozen=True, repr=False)
class ParticleMarginal(Spec):
    """Moves the parameters of a model with a `scan` by the evidence that a filter estimates.

    A Gaussian random walk on all static sites, adapted in warm-up as `RandomWalk`; with every
    accepted step comes a path of the latents. A chain begins at one of 16 draws of the parameters
    from the prior, taken by the evidence that a filter estimates.

    Args:
        particles: N; the number of steps T, but at least 64, if None. The estimates should have a
            standard deviation of the log of 1 to 1.7 at likely parameters; N grows like T. "tuned":
            the power of two that comes nearest to 1.3, found by filters at likely parameters before
            the run, see `tuned_particles`.
        proposal, resampling, ess: see `ParticleFilter`.
        target_acceptance: mean acceptance probability aimed at in warm-up.
        correlation: rho. Above zero, the filter is a function of normal variates z, and is proposed
            with rho z + sqrt(1 - rho^2) N(0, I): the errors of the two estimates cancel, and N need
            only grow like sqrt(T). With ``Bootstrap()``, systematic resampling at every step, and
            latents that are functions of normal variates: they have a quantile function (``icdf``)
            or finitely many values, or are Gaussian. It gains where a step has one latent number
            or few, and 1 - rho is about N / T; paths are renewed in 1 / (1 - rho) acceptances.

    Cost: a filter of N T steps of the model per step; memory N T for its history.
    """

    particles: int | str | None = None
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    resampling: str = "systematic"
    ess: float = 0.5
    target_acceptance: float = 0.15
    correlation: float = 0.0
    space: StateSpace | None = None
    estimate: Any = None

    alone: ClassVar[bool] = True
    tempers: ClassVar[bool] = False
    tunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        count = self.particles
        if count not in (None, "tuned") and (
            isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 2
        ):
            raise OptionError(f"particles must be an integer >= 2, or 'tuned'; got {count!r}.")
        require_proposal(self.proposal)
        rho = self.correlation
        if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0.0 <= rho < 1.0:
            raise OptionError(f"correlation must lie in [0, 1); got {rho!r}.")
        if rho:
            self._check_correlated()
        _ = self._walk

    def _check_correlated(self) -> None:
        if type(self.proposal) is not Bootstrap or self.resampling != "systematic":
            raise OptionError(
                "correlation= serves proposal=Bootstrap() and resampling='systematic' only; use "
                "correlation=0 with others."
            )
        if self.particles == "tuned":
            raise OptionError(
                "particles='tuned' is for correlation=0: correlated estimates may be far noisier."
            )

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
        space.require_real_parameters(program, "the random walk moves real numbers")
        count = self._count(program, space)
        if self.correlation:
            estimate: Any = CorrelatedEstimate.of(program, space, count)
        else:
            estimate = _Estimate(space, self._filter(count))
        return dataclasses.replace(self, space=space, estimate=estimate)

    def _filter(self, count: int) -> Filter:
        return Filter(count, self.proposal, self.resampling, self.ess)

    def _count(self, program: Program, space: StateSpace) -> int:
        if self.particles == "tuned":
            return tuned_particles(program, space, self._filter)
        return int(self.particles or max(64, space.length))

    @property
    def functions(self) -> tuple[Any, ...]:
        return (self.estimate, self._begun)

    @property
    def _begun(self) -> Begun:
        assert self.space is not None
        count = self.estimate.particles if self.correlation else self.estimate.options.particles
        return Begun(self.space, self._filter(count))

    def beginning(self, target: Target, position: Position, key: Any) -> Position:
        """Parameters from the prior that a filter finds likely."""
        return target.call(self._begun, position, key)

    def _fresh(self, key: Any) -> Any:
        """Normal variates, if the estimates are to be correlated."""
        return self.estimate.variates(key) if self.correlation else ()

    def _near(self, key: Any, variates: Any) -> Any:
        return correlated(key, variates, self.correlation) if self.correlation else ()

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        assert self.space is not None
        names = self.space.static

        def parted(position: Position) -> tuple[dict[str, Any], dict[str, Any]]:
            static = {name: position[name] for name in names}
            return static, {n: x for n, x in position.items() if n not in static}

        def estimated(position: Position, variates: Any, key: Any) -> tuple[Any, Any]:
            more = (variates, key) if self.correlation else key
            return target.call(self.estimate, position, more)

        def init(position: Position, key: Any) -> Placed:
            key_variates, key_filter = random.split(key)
            static, _ = parted(position)
            variates = self._fresh(key_variates)
            log_z, path = estimated(position, variates, key_filter)
            return Placed({**static, **path}, _Kept(self._walk.begin(static, log_z), variates))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            key_walk, key_variates, key_filter = random.split(key, 3)
            static, path = parted(state.position)
            near = self._near(key_variates, state.kept.variates)

            def evaluate(proposed: Position) -> tuple[Any, Any]:
                log_z, new_path = estimated({**path, **proposed}, near, key_filter)
                return log_z, (new_path, near)

            moved, walk, (path, variates), info = self._walk.walk(
                key_walk, static, state.kept.walk, (path, state.kept.variates), evaluate, stage
            )
            info |= {"log_estimate": walk.log_density, "particles": self._particles}
            return Placed({**moved, **path}, _Kept(walk, variates)), info

        def refresh(state: Placed, position: Position) -> Placed:
            static, _ = parted(position)  # other data: the estimate begins anew
            walk, variates = state.kept
            log_z, path = estimated(position, variates, random.key(0))
            return Placed({**static, **path}, _Kept(walk._replace(log_density=log_z), variates))

        return Kernel(init, step, refresh)

    @property
    def _particles(self) -> Any:
        own = self.estimate
        return jnp.asarray(own.particles if self.correlation else own.options.particles, jnp.int32)

    def moves(self, space: Space) -> frozenset[str]:
        return frozenset(space)


@dataclasses.dataclass(frozen=True)
class PMMH(MCMC):
    """Particle marginal Metropolis-Hastings, `ParticleMarginal` as a method.

    Args:
        particles, proposal, resampling, ess, target_acceptance, correlation: see
            `ParticleMarginal`.
        warmup, init_radius: see `MCMC`.

    The statistic ``particles`` of the result is N.

    Source: Andrieu, Doucet and Holenstein (2010), JRSS B 72.
    """

    kernel: Any = None
    particles: int | str | None = None
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    resampling: str = "systematic"
    ess: float = 0.5
    target_acceptance: float = 0.15
    correlation: float = 0.0

    def __post_init__(self) -> None:
        own = ParticleMarginal(
            self.particles, self.proposal, self.resampling, self.ess, self.target_acceptance,
            self.correlation,
        )  # fmt: skip
        object.__setattr__(self, "kernel", own)
        super().__post_init__()

    def on(self, program: Program) -> MCMC:
        return MCMC(self.kernel.on(program), self.warmup, self.init_radius)
