"""Particle filtering and smoothing as a method: the latents of a series with known parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit.errors import MethodError, OptionError, SiteError
from ppl_toolkit.inference.additive import (
    Additive,
    as_additive,
    require_ancestors,
    require_bound,
    require_moves,
)
from ppl_toolkit.inference.paris import advance_sums, backward_paths, expectation, genealogy
from ppl_toolkit.inference.particle_filter import (
    Filter,
    History,
    advance,
    first_population,
    require_particles,
    take,
)
from ppl_toolkit.inference.population import Population, effective_size, relative_variance
from ppl_toolkit.inference.proposals import Bootstrap, Proposal, require_proposal
from ppl_toolkit.inference.randomness import scanned
from ppl_toolkit.inference.resampling import scheme_named
from ppl_toolkit.inference.state_space import Series, StateSpace, state_space
from ppl_toolkit.program import Program
from ppl_toolkit.starts import positions_of
from ppl_toolkit.tracing import key_shape

__all__ = ["ParticleFilter"]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Settings(NamedTuple):
    """Arguments of the compiled program: values of the static sites, by name."""

    given: dict[str, Any]


class Filtered(NamedTuple):
    """A filtered series.

    Attributes:
        history: of all steps, arrays (T, N, ...).
        initial: the initial sites of the particles at the start, arrays (N, ...).
        log_weights: of the last particles, (N,).
        log_evidence: log Z_hat.
        variance: of Z_hat / Z, estimated from the lineages.
        summaries: of the filtering laws, by site and statistic, (T, ...).
        ess: effective sample size before each step's resampling, (T,).
        increments: of the log evidence, (T,).
        ancestors_left: different ancestors at each step that the last particles have, (T,).
        smoothed: expectations of the functional's sums up to every time given the data up to it,
            by name, (T, ...).
        started: whether some particle has a positive weight.
    """

    history: History
    initial: dict[str, Any]
    log_weights: Any
    log_evidence: Any
    variance: Any
    summaries: dict[str, dict[str, Any]]
    ess: Any
    increments: Any
    ancestors_left: Any
    smoothed: dict[str, Any]
    started: Any


class Moved(NamedTuple):
    """A filter after one more step.

    Attributes:
        population: of carries.
        history: of the step.
        ess: before the step's resampling.
        sums: of the functional, given each particle, arrays (N, ...) by name.
        summaries: of the step's latents.
    """

    population: Population
    history: History
    ess: Any
    sums: dict[str, Any]
    summaries: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """(key, static values) -> `Filtered`: a function of a program."""

    space: StateSpace
    options: Filter
    functional: Additive | None
    ancestors: int | None
    moves: int | str

    def example(self, program: Program) -> Any:
        sites = (program.sites[name] for name in self.space.static)
        given = {site.name: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in sites}
        return key_shape(), given

    def __call__(self, program: Program, more: tuple[Any, Any], data: Sequence[Any]) -> Filtered:
        key, given = more
        series = self.space.given(program, given, data)

        count = self.options.particles
        first, initial = first_population(random.fold_in(key, 0), series, count)
        sums = self.first_sums(series, initial)

        def step(state: tuple[Population, Any], t: Any) -> tuple[tuple[Population, Any], Any]:
            new = self.moved(random.fold_in(key, t + 1), series, *state, t)
            kept = (
                new.history,
                new.summaries,
                new.ess,
                new.population.log_evidence,
                expectation(new.population, new.sums),
            )
            return (new.population, new.sums), kept

        (last, _), kept = scanned(step, (first, sums), series.length)
        history, laws, size, evidence, smoothed = kept
        drawn = self.options.due(size)
        eves, _ = jax.lax.scan(
            lambda eves, a: (eves[a], None), jnp.arange(count), history.ancestors
        )
        before = jnp.concatenate([jnp.zeros(1, evidence.dtype), evidence[:-1]])
        return Filtered(
            history,
            initial,
            last.log_weights,
            last.log_evidence,
            relative_variance(last.log_weights, eves, jnp.sum(drawn)),
            laws,
            size,
            evidence - before,
            _lineages(history.ancestors),
            smoothed,
            jnp.isfinite(last.log_evidence) & (effective_size(last.log_weights) > 0),
        )

    def moved(self, key: Any, series: Series, population: Population, sums: Any, t: Any) -> Moved:
        """One step of the filter, with its sums."""
        key_step, key_sums = random.split(key)
        new, history, size = advance(key_step, series, population, t, self.options)
        if self.functional is not None:
            sums = advance_sums(
                key_sums, series, history, t, sums, self.functional.increment, self.ancestors,
                self.moves,
            )  # fmt: skip
        return Moved(new, history, size, sums, summaries(new, history.latents))

    def first_sums(self, series: Series, initial: Any) -> dict[str, Any]:
        """The sums before the first step; none without a functional."""
        if self.functional is None:
            return {}
        return self.functional.first(series, initial, self.options.particles)


def summaries(population: Population, latents: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`summary` of every latent of a step, by name."""
    shares = jnp.exp(population.log_weights)
    return {name: summary(shares, x) for name, x in latents.items()}


def summary(shares: Any, x: Any) -> dict[str, Any]:
    """Weighted mean, standard deviation and quantiles of N values, arrays (N, ...)."""
    x = jnp.asarray(x, jnp.result_type(float))
    mean = jnp.tensordot(shares, x, 1)
    variance = jnp.tensordot(shares, (x - mean) ** 2, 1)
    order = jnp.argsort(x, axis=0)
    ranked = jnp.take_along_axis(x, order, 0)
    below = jnp.cumsum(shares[order], 0)
    levels = jnp.asarray(_QUANTILES)
    levels = levels.reshape(-1, *[1] * x.ndim) * below[-1]
    place = jnp.minimum(jnp.sum(below[None] < levels, axis=1), x.shape[0] - 1)
    return {
        "mean": mean,
        "sd": jnp.sqrt(variance),
        "quantiles": jnp.take_along_axis(ranked, place, 0),
    }


def _lineages(ancestors: Any) -> Any:
    """How many particles of each step have descendants among the last ones, (T,)."""
    count = ancestors.shape[1]

    def back(alive: Any, a: Any) -> tuple[Any, Any]:
        left = jnp.sum(jnp.zeros(count, jnp.int32).at[alive].set(1))
        return a[alive], left

    _, left = jax.lax.scan(back, jnp.arange(count, dtype=ancestors.dtype), ancestors, reverse=True)
    return left


@dataclasses.dataclass(frozen=True)
class _Complete:
    """Values of the latent sites -> latent and deterministic sites: a function of a program."""

    def example(self, program: Program) -> Any:
        return {s.name: jax.ShapeDtypeStruct(s.shape, s.dtype) for s in program.latent}

    def __call__(self, program: Program, values: Mapping[str, Any], data: Sequence[Any]) -> Any:
        return program.complete(values, data)


@dataclasses.dataclass(frozen=True)
class _Path:
    """(key, static values, `Filtered`) -> a path of the latents: a function of a program."""

    run: Run
    moves: int | str

    def example(self, program: Program) -> Any:
        with program.context():
            key, given = self.run.example(program)
            filtered = jax.eval_shape(
                lambda *more: self.run(program, more, program.data), key, given
            )
        return key, given, filtered

    def __call__(self, program: Program, more: Any, data: Sequence[Any]) -> dict[str, Any]:
        key, given, filtered = more
        space = self.run.space
        series = space.given(program, given, data)
        known = (series, filtered.initial, filtered.history, filtered.log_weights, 1)
        backward = space.memory is not None and space.memory <= 1
        paths = (
            backward_paths(key, *known, moves=self.moves) if backward else genealogy(key, *known)
        )
        initial, latents = take(paths[0], 0), jax.tree.map(lambda x: x[:, 0], paths[1])
        return {**given, **initial, **latents}


@dataclasses.dataclass(frozen=True)
class ParticleFilter:
    """Filters a model with a `scan`, and draws paths of its latents given all the data.

    The parameters must be given; `ParticleGibbs` learns them. A chain is an independent run of the
    filter; its draws are paths, drawn backwards (along the ancestors, where the carry remembers
    more than one step). The group ``filtering`` of the result has means, standard deviations and
    quantiles of the filtering laws at every time, the effective sample size and the increments of
    the log evidence; ``log_evidence`` comes with every draw.

    Args:
        particles: N.
        given: values of the static sites, by name; see `state_space`.
        proposal: how particles are moved: `Bootstrap()`, `Guided(...)`, `LaplaceProposal()`,
            `Adapted()`.
        resampling: "systematic", "multinomial", "stratified", "residual", "ssp" or "killing".
        ess: particles are resampled where the effective sample size falls to this share of N.
        moves: steps of a Metropolis-Hastings chain for every ancestor of a path or of sums; 0:
            exact draws; "rejection": exact draws by rejection.
        functional: an additive functional, as in `PPG`: expectations of its sums up to every time,
            given the data up to it, are carried along (PaRIS). They are in the group
            ``smoothing``; `smoothed` reads off the last ones.
        ancestors: drawn for these sums per particle and step, at least 2; None: the exact sum over
            all particles.

    Cost: O(N T) for the filter, O(moves T) for a path, O(N T) for an exact one; memory O(N T). Sums
    take O(N T ancestors moves), or O(N^2 T) without moves.
    Source: Olsson and Westerborn (2017), Bernoulli 23, for the sums.
    """

    particles: int = 1000
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    resampling: str = "systematic"
    ess: float = 0.5
    moves: int | str = 0
    functional: Any = None
    ancestors: int | None = 2
    warmup: int = 0
    space: StateSpace | None = None

    refit_warmup: ClassVar[int] = 0
    takes_start: ClassVar[bool] = False
    failure: ClassVar[str] = (
        "no particle has a finite weight: the data are impossible, or far from all that the model "
        "predicts. Check their scale, or take more particles, or a proposal that looks at the data."
    )

    def __post_init__(self) -> None:
        require_particles(self.particles)
        require_moves("moves", self.moves)
        if not 0.0 < self.ess <= 1.0:
            raise OptionError(f"ess must lie in (0, 1]; got {self.ess!r}.")
        require_proposal(self.proposal)
        scheme_named(self.resampling)
        if self.functional is not None:
            object.__setattr__(self, "functional", as_additive(self.functional))
            require_ancestors(self.ancestors)

    def on(self, program: Program) -> ParticleFilter:
        return dataclasses.replace(self, space=state_space(program))

    def check(self, program: Program) -> None:
        """Refuse programs without a scan, and static sites without a value."""
        space = state_space(program)
        self.proposal.check(space, program)
        require_bound(space, program, self.moves)
        if self.functional is not None:
            space.require_backward("The smoothing of a functional")
            self.functional.check(space, program)
        if missing := [name for name in space.static if name not in self.given]:
            raise MethodError(
                f"ParticleFilter needs the values of the parameters {missing}: "
                f"ParticleFilter(given={{{missing[0]!r}: ...}}). ParticleGibbs() learns them."
            )
        if unknown := sorted(set(self.given) - set(space.static)):
            raise SiteError(
                f"given= names {unknown}; the parameters outside the scan are {list(space.static)}."
            )
        if real := {n: x for n, x in self.given.items() if not program.sites[n].discrete}:
            positions_of(program, real, 1, 0, "given")  # refuses what is no value of these sites

    @property
    def options(self) -> Filter:
        """How the series is filtered."""
        return Filter(self.particles, self.proposal, self.resampling, self.ess)

    @property
    def run(self) -> Run:
        assert self.space is not None
        return Run(self.space, self.options, self.functional, self.ancestors, self.moves)

    @property
    def _path(self) -> _Path:
        return _Path(self.run, self.moves)

    @property
    def needs(self) -> tuple[Any, ...]:
        return (self.run, self._path, _Complete())

    def statics(self) -> tuple:
        return (self.run, self.moves)

    def settings(self, program: Program, warmup: int) -> Settings:
        return Settings({n: np.asarray(x, program.sites[n].dtype) for n, x in self.given.items()})

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> Filtered:
        return target.functions[self.run]((key, settings.given))

    def refresh(self, state: Filtered, target: Any, settings: Settings) -> Filtered:
        return state

    def step(
        self, key: Any, index: Any, state: Filtered, target: Any, settings: Settings
    ) -> tuple[Filtered, Any, dict[str, Any]]:
        path = target.functions[self._path]((key, settings.given, state))
        return state, path, {"log_evidence": state.log_evidence}

    def values(self, draw: Mapping[str, Any], target: Any) -> dict[str, Any]:
        return target.functions[_Complete()](dict(draw))

    def failed(self, state: Filtered) -> Any:
        return ~np.asarray(state.started)

    def groups(self, state: Filtered) -> dict[str, dict[str, tuple[tuple[str, ...], Any]]]:
        """The filtering laws, and how the filter fared, over time."""
        found: dict[str, tuple[tuple[str, ...], Any]] = {}
        for name, statistics in state.summaries.items():
            for statistic, x in statistics.items():
                inner = ("quantile",) if statistic == "quantiles" else ()
                rest = np.ndim(x) - 2 - len(inner)
                dims = ("chain", "time", *inner, *(f"{name}_dim_{i + 1}" for i in range(rest)))
                found[f"{name}_{statistic}"] = (dims, np.asarray(x))
        for name in ("ess", "ancestors_left"):
            found[name] = (("chain", "time"), np.asarray(getattr(state, name)))
        found["log_evidence_increment"] = (("chain", "time"), np.asarray(state.increments))
        sd = np.sqrt(np.maximum(np.asarray(state.variance), 0.0))
        found["log_evidence_sd"] = (("chain",), sd)
        groups = {"filtering": {**found, "particles": ((), self.particles)}}
        if state.smoothed:
            groups["smoothing"] = {
                name: (("chain", "time", *(f"{name}_dim_{i}" for i in range(np.ndim(x) - 2))),
                       np.asarray(x))
                for name, x in state.smoothed.items()
            }  # fmt: skip
        return groups
