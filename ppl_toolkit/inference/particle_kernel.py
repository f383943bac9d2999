"""Particle Gibbs as a kernel: the latents of a series, given everything else.

Source: Andrieu, Doucet and Holenstein (2010), JRSS B 72; Whiteley (2010) for backward sampling;
Lindsten, Jordan and Schön (2014), JMLR 15, for ancestor sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit import positions
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.hmc import NUTS
from ppl_toolkit.inference.kernel import (
    SAMPLING,
    Info,
    Kernel,
    Placed,
    Spec,
    Stage,
    block,
    cycle,
)
from ppl_toolkit.inference.mcmc import MCMC
from ppl_toolkit.inference.particle_filter import Filter
from ppl_toolkit.inference.particle_gibbs import Path, sweep
from ppl_toolkit.inference.proposals import Bootstrap, Proposal, require_proposal
from ppl_toolkit.inference.state_space import StateSpace, state_space
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program

__all__ = ["ConditionalSMC", "ParticleGibbs"]

_LEAST, _MOST = 16, 256  # particles, if they are not given


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """(position, key) -> the latents of the series after a conditional sweep, unconstrained.

    A function of a program, traced once: it runs the model's own steps.
    """

    space: StateSpace
    options: Filter
    replays: int

    def example(self, program: Program) -> Any:
        return positions.shapes(program), jax.eval_shape(lambda: random.key(0))

    def __call__(self, program: Program, given: tuple[Position, Any], data: Sequence[Any]) -> Any:
        position, key = given
        space, series = self.space, self.space.at(program, position, data)
        values = positions.own_values(program, position, data)
        path = Path(
            {name: values[name] for name in space.initial},
            space.in_order({name: values[name] for name in space.latents}, series),
        )
        new, _ = sweep(key, series, path, self.options, replays=self.replays)
        new_values = {**values, **new.initial, **new.latents}
        moved = positions.position_of(program, new_values, data)
        return {name: moved[name] for name in (*space.initial, *space.latents)}


@dataclasses.dataclass(frozen=True, repr=False)
class ConditionalSMC(Spec):
    """Moves the latents of a `scan`, all at once, by a conditional particle filter.

    The latents of before are one of the particles; a new path is drawn backwards from all of them.
    Given the parameters this leaves the law of the latents invariant for every number of particles
    N >= 2, and mixes well at all times if N grows like the number of steps T.

    Where the carry remembers more than one step (see `state_space`), paths cannot be joined by the
    density of a step; then the ancestor of the path of before is drawn, step by step, by replaying
    as many steps of it as the carry remembers.

    Args:
        particles: N; T / 2, but at least 16 and at most 256, if None.
        proposal: how particles are moved: `Bootstrap()`, `Guided(...)`, `Laplace()`, `Adapted()`.

    Cost: O(N T) steps of the model; O(N T p) where the carry remembers p steps, O(N T^2) where it
    remembers all. Statistic ``renewed``: the share of times at which the path is a new one.
    """

    particles: int | None = None
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    space: StateSpace | None = None

    tempers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        count = self.particles
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 2
        ):
            raise OptionError(f"particles must be an integer >= 2; got {count!r}.")
        require_proposal(self.proposal)

    @property
    def label(self) -> str:
        return "conditional_smc"

    def on(self, program: Program) -> ConditionalSMC:
        """The kernel for the series of a program.

        Raises:
            MethodError: particles cannot follow it, or not with this proposal.
        """
        space = state_space(program)
        self.proposal.check(space, program)
        return dataclasses.replace(self, space=space)

    @property
    def _sites(self) -> tuple[str, ...]:
        assert self.space is not None
        return (*self.space.initial, *self.space.latents)

    @property
    def functions(self) -> tuple[Any, ...]:
        return (self._sweep,)

    @property
    def _sweep(self) -> _Sweep:
        space = self.space
        assert space is not None
        count = self.particles or int(np.clip(space.length // 2, _LEAST, _MOST))
        memory = space.length if space.memory is None else space.memory
        return _Sweep(space, Filter(count, self.proposal), memory if memory > 1 else 0)

    def moves(self, space: Space) -> frozenset[str]:
        return frozenset(self._sites)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        def init(position: Position, key: Any) -> Placed:
            return Placed(position, ())

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            old = state.position
            new = target.call(self._sweep, old, key)
            same = [
                jnp.reshape(new[name] == old[name], (new[name].shape[0], -1)).all(axis=1)
                for name in self.space.latents  # type: ignore[union-attr]
            ]
            renewed = 1.0 - jnp.mean(jnp.stack(same).all(axis=0))
            return Placed({**old, **new}, ()), {"renewed": renewed}

        return Kernel(init, step, lambda state, position: init(position, None))


@dataclasses.dataclass(frozen=True)
class ParticleGibbs(MCMC):
    """The posterior of a model with a `scan`: latents by particles, parameters by any kernel.

    A cycle of `ConditionalSMC` for what is inside the scan (and what only starts it), and of
    another kernel for all other sites given those.

    Args:
        kernel: for the parameters; `NUTS()` by default.
        particles, proposal: see `ConditionalSMC`.
        warmup, init_radius: see `MCMC`.

    Source: Andrieu, Doucet and Holenstein (2010), JRSS B 72.
    """

    kernel: Any = dataclasses.field(default_factory=NUTS)
    particles: int | None = None
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._latents  # checks the options

    @property
    def _latents(self) -> ConditionalSMC:
        return ConditionalSMC(self.particles, self.proposal)

    def on(self, program: Program) -> MCMC:
        latents = self._latents.on(program)
        assert latents.space is not None
        static = latents.space.static
        kernel = self.kernel.on(program)
        whole = cycle([latents, block(kernel, static)]) if static else latents
        return MCMC(whole, self.warmup, self.init_radius)
