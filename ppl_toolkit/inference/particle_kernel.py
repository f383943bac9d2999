"""Particle Gibbs as a kernel: the latents of a series, given everything else.

Source: Andrieu, Doucet and Holenstein (2010), JRSS B 72; Whiteley (2010) for backward sampling;
Lindsten, Jordan and Schön (2014), JMLR 15, for ancestor sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from ppl_toolkit import positions
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.additive import (
    Additive,
    as_additive,
    require_ancestors,
    require_bound,
    require_moves,
)
from ppl_toolkit.inference.begun import Begun
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
from ppl_toolkit.inference.particle_filter import Filter, require_particles
from ppl_toolkit.inference.particle_gibbs import Path, renewed, sweep, usual_particles
from ppl_toolkit.inference.proposals import Bootstrap, Proposal, require_proposal
from ppl_toolkit.inference.state_space import StateSpace, state_space
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import key_shape

__all__ = ["PPG", "SMOOTHED", "ConditionalSMC", "ParticleGibbs"]

SMOOTHED = "smoothed."  # the statistics that are sums of functionals


def _moved(
    space: StateSpace, program: Program, values: dict[str, Any], path: Path, data: Sequence[Any]
) -> dict[str, Any]:
    """The latents of a path on the real space, beside values of the other sites."""
    there = positions.position_of(program, {**values, **path.initial, **path.latents}, data)
    return {name: there[name] for name in (*space.initial, *space.latents)}


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """(position, key) -> the latents of the series after a conditional sweep, and its sums.

    A function of a program, traced once: it runs the model's own steps.
    """

    space: StateSpace
    options: Filter
    replays: int
    functional: Additive | None = None
    draws: int | None = 2
    moves: int | str = 0

    def example(self, program: Program) -> Any:
        return positions.shapes(program), key_shape()

    def __call__(self, program: Program, given: tuple[Position, Any], data: Sequence[Any]) -> Any:
        position, key = given
        space, series = self.space, self.space.at(program, position, data)
        values = positions.own_values(program, position, data)
        path = Path(
            {name: values[name] for name in space.initial},
            space.in_order({name: values[name] for name in space.latents}, series),
        )
        sums = self.functional
        new, found = sweep(
            key,
            series,
            path,
            self.options,
            functional=None if sums is None else sums.increment,
            start=None if sums is None else sums.begin(series),
            draws=self.draws,
            moves=self.moves,
            replays=self.replays,
        )
        return _moved(space, program, values, new, data), found or {}


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
        proposal: how particles are moved: `Bootstrap()`, `Guided(...)`, `LaplaceProposal()`,
            `Adapted()`.
        functional: see `PPG`; None: no sums are carried along.
        ancestors: drawn for the sums per particle and step; None: the sum over all particles.
        ancestor_moves: steps of a Metropolis-Hastings chain for every ancestor of the sums; 0:
            exact draws; "rejection": exact draws by rejection.
        held: parameters that stay as they are when a chain begins.

    Cost: O(N T) steps of the model; O(N T p) where the carry remembers p steps, O(N T^2) where it
    remembers all. Sums cost O(N T ancestors) with such a
    chain, or O(N^2 T) without. Statistic
    ``renewed``: the share of times at which the path is a new one.
    """

    particles: int | None = None
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    functional: Any = None
    ancestors: int | None = 2
    ancestor_moves: int | str = 0
    held: tuple[str, ...] = ()
    space: StateSpace | None = None

    tempers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.particles is not None:
            require_particles(self.particles)
        require_proposal(self.proposal)
        if self.functional is not None:
            object.__setattr__(self, "functional", as_additive(self.functional))
        require_ancestors(self.ancestors)
        require_moves("ancestor_moves", self.ancestor_moves)

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
        if self.functional is not None:
            space.require_backward("The sum of a functional along a sweep")
            self.functional.check(space, program)
            require_bound(space, program, self.ancestor_moves)
        return dataclasses.replace(self, space=space)

    @property
    def _sites(self) -> tuple[str, ...]:
        assert self.space is not None
        return (*self.space.initial, *self.space.latents)

    @property
    def functions(self) -> tuple[Any, ...]:
        return (self._sweep, self._begun)

    @property
    def _options(self) -> Filter:
        assert self.space is not None
        return Filter(self.particles or usual_particles(self.space.length), self.proposal)

    @property
    def _begun(self) -> Begun:
        assert self.space is not None
        return Begun(self.space, self._options, self.held)

    @property
    def _sweep(self) -> _Sweep:
        space = self.space
        assert space is not None
        return _Sweep(
            space,
            self._options,
            space.replays,
            self.functional,
            self.ancestors,
            self.ancestor_moves,
        )

    def beginning(self, target: Target, position: Position, key: Any) -> Position:
        """Parameters from the prior that a filter finds likely, and a path of that filter."""
        return target.call(self._begun, position, key)

    def moves(self, space: Space) -> frozenset[str]:
        return frozenset(self._sites)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        def init(position: Position, key: Any) -> Placed:
            return Placed(position, ())

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            old = state.position
            new, sums = target.call(self._sweep, old, key)
            names = self.space.latents  # type: ignore[union-attr]
            share = renewed({n: old[n] for n in names}, {n: new[n] for n in names})
            info = {"renewed": share, **{f"{SMOOTHED}{n}": x for n, x in sums.items()}}
            return Placed({**old, **new}, ()), info

        return Kernel(init, step, lambda state, position: init(position, None))


@dataclasses.dataclass(frozen=True)
class ParticleGibbs(MCMC):
    """The posterior of a model with a `scan`: latents by particles, parameters by any kernel.

    A cycle of `ConditionalSMC` for what is inside the scan (and what only starts it), and of
    another kernel for all other sites given those. A chain begins at one of 16 draws of the
    parameters from the prior, taken by the evidence a filter estimates, with a path of that filter.

    Args:
        kernel: for the parameters; `NUTS()` by default.
        particles, proposal: see `ConditionalSMC`.
        warmup, init_radius: see `MCMC`.
        given: values of parameters that are known, by name.

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
        latents = dataclasses.replace(self._latents, held=tuple(self.given)).on(program)
        assert latents.space is not None
        static = tuple(name for name in latents.space.static if name not in self.given)
        kernel = self.kernel.on(program)
        whole = cycle([latents, block(kernel, static)]) if static else latents
        return MCMC(whole, self.warmup, self.init_radius, self.given)


@dataclasses.dataclass(frozen=True)
class PPG(ParticleGibbs):
    """PaRIS particle Gibbs: expectations of additive functionals given the data.

    Particle Gibbs whose sweeps carry sums h_0(x_0) + sum_t h_t(c_{t-1}, x_t) along. If the path
    that a sweep begins with follows the smoothing law, the expectation of its sums is exactly that
    of the functional, for every number of particles; so the bias falls geometrically with the
    number of sweeps. `smoothed` reads the estimates off a result, and leaves out the sweeps that
    the correlation from sweep to sweep tells it to.

    Args:
        functional: (carry before the step, latents of the step by name, number of the step) -> h_t,
            a number or an array, or several by name; or `Additive`, with h_0.
        kernel, particles, proposal, init_radius, given: see `ParticleGibbs`.
        ancestors: drawn per particle and step, at least 2; None: the exact sum over all.
        ancestor_moves: steps of a Metropolis-Hastings chain for every ancestor; 0: exact draws;
            "rejection": exact draws by rejection.
        warmup: sweeps before the first draw; none by default if all parameters are given, since
            `smoothed` drops those it must.

    Cost: that of `ParticleGibbs`, and O(N^2) densities of a step per step, or O(N ancestors).
    Source: Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), ICML.
    """

    functional: Any = None
    ancestors: int | None = 2
    ancestor_moves: int | str = 0
    warmup: int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.functional is None:
            raise OptionError(
                "PPG needs the functional to average: "
                'PPG(functional=lambda carry, latents, t: {"sum": latents["x"]}).'
            )
        if self.warmup is None:
            object.__setattr__(self, "warmup", 0 if self.given else MCMC.warmup)
        super().__post_init__()

    @property
    def _latents(self) -> ConditionalSMC:
        return ConditionalSMC(
            self.particles,
            self.proposal,
            as_additive(self.functional),
            self.ancestors,
            self.ancestor_moves,
        )
