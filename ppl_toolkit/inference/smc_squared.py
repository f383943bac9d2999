"""SMC^2: the data of a series come in one by one, for a cloud of parameters with filters inside.

Every particle theta_i of the outer cloud has a filter of N_x particles of its own, whose estimate
Zhat_t(theta_i) of the likelihood of y_{1:t} is unbiased. A new datum multiplies its weight by
Zhat_t / Zhat_{t-1}. Where the weights have become uneven, the cloud is resampled and moved by
particle marginal Metropolis-Hastings: a filter is run on y_{1:t} for a proposed theta, and accepted
or not against the estimate that was stored (and is never made again). On the space of parameters
and of all the randomness of the filters this is an SMC sampler for

    p(theta) Zhat_t(theta) prod(laws of the filters' draws),

whose marginal law of theta is the posterior given y_{1:t}, whatever N_x is, and whose total mass is
p(y_{1:t}).

Sources: Chopin, Jacob and Papaspiliopoulos (2013), JRSS B 75; section 3.6 there for the exchange of
filters for larger ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Bool, Float, Int, UInt32

from ppl_toolkit import positions
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.inner_filter import InnerFilter, fresh_words
from ppl_toolkit.inference.kernel import SAMPLING, Cloud
from ppl_toolkit.inference.particle_filter import Filter
from ppl_toolkit.inference.population import (
    Population,
    effective_size,
    normalised,
    relative_variance,
)
from ppl_toolkit.inference.proposals import Bootstrap, Proposal, require_proposal
from ppl_toolkit.inference.random_walk import RandomWalk
from ppl_toolkit.inference.randomness import over
from ppl_toolkit.inference.resampling import resample, scheme_named
from ppl_toolkit.inference.smc import within_supports
from ppl_toolkit.inference.smc_stage import until_moved
from ppl_toolkit.inference.state_space import StateSpace, state_space
from ppl_toolkit.inference.tuning import cloud_covariance
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program

__all__ = ["SMC2", "Outer", "SMC2State"]

_RECORDED = 512  # stages whose records are kept
_RECORDS = (
    "reached", "ess", "log_evidence", "log_evidence_sd", "acceptance_rate", "n_moves", "n_unique",
    "inner_particles",
)  # fmt: skip
_LEAST_INNER = 100
_GROWTH = 0.1  # of the distance from the start, below which a cloud is moved no more


class Settings(NamedTuple):
    """Options that are arguments of the compiled program."""

    warmup: Any
    ess: Any
    exchange: Any
    shapes: dict[str, Any]


class Outer(NamedTuple):
    """Parameters with their filters.

    Attributes:
        position: of the static sites, (N, ...), unconstrained.
        log_prior: of these, (N,).
        inner: the particles of the filters, arrays (N, M, ...), of which N_x <= M are there; their
            log evidence is log Zhat, (N,).
        words: what the filters draw from, see `inner_filter`, (N, T + 1, 2).
    """

    position: dict[str, Any]
    log_prior: Float[Array, " N"]
    inner: Population
    words: UInt32[Array, "N T1 2"]


class SMC2State(NamedTuple):
    """One run of the sampler.

    Attributes:
        outer: the cloud.
        log_weights: of its particles, which sum to one, (N,).
        time: how many steps of the series are taken in.
        level: N_x has been doubled so often.
        exchanging: whether the filters are still those of the level before.
        arrived: whether the cloud has been moved given all data.
        stages: how many stages were taken.
        resampled: how often the cloud has been.
        log_evidence: log of the estimate of p(y_{1:t}).
        increments: of it, by time, (T + 1,).
        variance: of the evidence, relative; by the lineages.
        eves: the first ancestor of every particle, (N,).
        records: of the stages, (S,) by name.
        origin: words of the key of the first particles.
        started: whether any of these had a positive likelihood.
    """

    outer: Outer
    log_weights: Float[Array, " N"]
    time: Int[Array, ""]
    level: Int[Array, ""]
    exchanging: Bool[Array, ""]
    arrived: Bool[Array, ""]
    stages: Int[Array, ""]
    resampled: Int[Array, ""]
    log_evidence: Float[Array, ""]
    increments: Float[Array, " T1"]
    variance: Float[Array, ""]
    eves: Int[Array, " N"]
    records: dict[str, Float[Array, " S"]]
    origin: Any
    started: Any


@dataclasses.dataclass(frozen=True)
class SMC2:
    """Parameters and latents of a model with a `scan`, and the evidence, as the data come in.

    A chain is one independent run; its draws are its particles: parameters, each with a path of the
    filter that gave its estimate. After ``particles`` draws the particles are moved on. The log
    evidence comes with every draw (it is the same for all of a chain).

    The group ``smc`` of the result has what happened stage by stage (``reached``: the step of the
    series), and by time ``log_evidence_increment``, log p(y_t | y_{1:t-1}); its first entry is of
    what is observed before the first step.

    The static sites (see `state_space`) must be continuous, with proper priors.

    Args:
        particles: N, of the parameters.
        inner: N_x, of every filter at the beginning; half the number of steps T, but at least 100,
            if None.
        doublings: how often N_x may double: where the moves' acceptance is below ``exchange``, all
            filters are exchanged for twice as large ones, and weighted by the ratio of their
            estimates. Shapes are fixed in a compiled program, so it holds the code of the filter
            once for every size, and takes as much longer to compile; only the code of the size in
            use runs.
        exchange: see ``doublings``.
        ess: a stage ends where the effective sample size is down to this share of N.
        proposal: how the filters' particles are moved, see `ParticleFilter`. They are resampled
            where their effective sample size falls to half.
        resampling: scheme of both clouds.
        moves: of every particle per stage. None: until the mean squared distance from the start
            grows by less than a tenth per move, and at most ``max_moves``.
        max_moves: see ``moves``.
        warmup: most stages.

    The proposals of the moves are Gaussian, with the covariance of the weighted cloud times
    2.38^2 / D. The evidence is an unbiased estimate up to that adaptation (a bias of order 1 / N),
    and unbiased without moves.

    Cost: N N_x T steps of the model to take in the data, and N N_x t for every move at time t; the
    number of stages grows like log T. Every draw runs its filter once more, N_x T. Memory: a step's
    latents of N N_x 2^doublings particles, two words for each of N T keys, and the history of one
    filter, N_x T latents, while a path is drawn: nothing else is kept of the filters' pasts, since
    a filter that is run again with its own keys is the same (``replay_error``, among the
    statistics, is the difference of its log Z_hat).
    Source: Chopin, Jacob and Papaspiliopoulos (2013), JRSS B 75.
    """

    particles: int = 512
    inner: int | None = None
    doublings: int = 1
    exchange: float = 0.1
    ess: float = 0.5
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    resampling: str = "systematic"
    moves: int | None = None
    max_moves: int = 20
    warmup: int = 100
    space: StateSpace | None = None

    refit_warmup: ClassVar[int] = 100
    one_law: ClassVar[bool] = False
    takes_start: ClassVar[bool] = False
    brief_start: ClassVar[bool] = True  # `init` runs once: it is made quickly
    failure: ClassVar[str] = (
        "no particle has a finite weight at the start: what is observed before the first step is "
        "impossible under the prior. Check its scale."
    )

    def __post_init__(self) -> None:
        least = {"particles": 2, "doublings": 0, "max_moves": 1, "warmup": 1}
        counts = {name: getattr(self, name) for name in least}
        for name, lowest in (("inner", 2), ("moves", 0)):
            if getattr(self, name) is not None:
                counts[name], least[name] = getattr(self, name), lowest
        for name, value in counts.items():
            wrong = isinstance(value, bool) or not isinstance(value, int | np.integer)
            if wrong or value < least[name]:
                raise OptionError(f"{name} must be an integer >= {least[name]}; got {value!r}.")
        if not 0.0 < self.ess < 1.0:
            raise OptionError(f"ess must lie between 0 and 1; got {self.ess!r}.")
        if not 0.0 <= self.exchange < 1.0:
            raise OptionError(f"exchange must lie in [0, 1); got {self.exchange!r}.")
        require_proposal(self.proposal)
        scheme_named(self.resampling)

    def on(self, program: Program) -> SMC2:
        return dataclasses.replace(self, space=state_space(program))

    def check(self, program: Program) -> None:
        """Refuse programs without a scan, and parameters that no random walk can move.

        Raises:
            MethodError: says what is wrong, and what serves.
        """
        space = state_space(program)
        self.proposal.check(space, program)
        space.require_real_parameters(program, "the random walk moves real numbers")
        if flat := [name for name in space.static if not program.sites[name].proper]:
            raise MethodError(
                f"SMC2 begins with draws from the prior, and sites {flat} have flat (improper) "
                "ones. Give them proper priors, or use PMMH."
            )

    @property
    def draws(self) -> int:
        """Default number of draws: every particle once."""
        return int(self.particles)

    @property
    def sizes(self) -> tuple[int, ...]:
        """N_x by level."""
        assert self.space is not None
        first = int(self.inner or max(_LEAST_INNER, self.space.length // 2))
        return tuple(first * 2**level for level in range(self.doublings + 1))

    @property
    def filters(self) -> tuple[InnerFilter, ...]:
        """The filters by level."""
        assert self.space is not None
        return tuple(
            InnerFilter(self.space, Filter(size, self.proposal, self.resampling))
            for size in self.sizes
        )

    @property
    def needs(self) -> tuple[Any, ...]:
        own = (function for inner in self.filters for function in inner.functions)
        return (*own, "log_parts", "prior_position", "values_at")

    def statics(self) -> tuple:
        return (self.particles, self.filters, self.resampling, self.moves, self.max_moves)

    def settings(self, program: Program, warmup: int) -> Settings:
        least = np.asarray(self.ess * self.particles, float)
        shapes = positions.shapes(program)
        zeros = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        return Settings(np.asarray(warmup), least, np.asarray(self.exchange, float), zeros)

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> SMC2State:
        """Draws from the prior, with filters at the start."""
        return first_state(self, key, target)

    def refresh(self, state: SMC2State, target: Any, settings: Settings) -> SMC2State:
        """A new run on other data, from the same prior draws."""
        return first_state(self, random.wrap_key_data(state.origin), target)

    def step(
        self, key: Any, index: Any, state: SMC2State, target: Any, settings: Settings
    ) -> tuple[SMC2State, Position, dict[str, Any]]:
        """A stage while there are data to come; then one particle after the other."""
        number = index - settings.warmup
        key_stage, key_path = random.split(key)
        due = jnp.where(number < 0, ~state.arrived, (number > 0) & (number % self.particles == 0))
        state = self._at_level(
            due,
            state.level,
            lambda level, state: stage(self, level, key_stage, state, target, settings),
            state,
        )
        row = jnp.maximum(number, 0) % self.particles
        chosen = jax.tree.map(lambda x: x[row], state.outer)

        def drawn(level: int, _: Any) -> tuple[Any, dict[str, Any]]:
            filter_ = self.filters[level]
            return filter_.path(target, chosen.position, chosen.words, key_path)

        nothing = (chosen.inner.log_evidence, settings.shapes)
        again, draw = self._at_level(number >= 0, state.level, drawn, nothing)
        stats = {
            "lp": jnp.where(number >= 0, sum(target.log_parts(draw)), jnp.nan),
            "log_estimate": chosen.log_prior + chosen.inner.log_evidence,
            "replay_error": again - chosen.inner.log_evidence,
            "log_evidence": state.log_evidence,
        }
        return state, draw, stats

    def _at_level(
        self, due: Any, level: Any, function: Callable[[int, Any], Any], carry: Any
    ) -> Any:
        """``function(level, carry)`` if it is due, else ``carry``.

        Loops of no or one turn: unlike branches they copy nothing that stays, and among chains in
        lock step those of a size run that no chain has are left out.
        """
        for own in range(len(self.sizes)):

            def once(turn: tuple[Any, Any], own: int = own) -> tuple[Any, Any]:
                return _like(function(own, turn[0]), turn[0]), jnp.asarray(False)

            first = (jax.tree.map(jnp.asarray, carry), due & (level == own))
            carry, _ = lax.while_loop(lambda turn: turn[1], once, first)
        return carry

    def values(self, draw: Position, target: Any) -> dict[str, Any]:
        return target.values_at(draw)

    def failed(self, state: SMC2State) -> Any:
        return ~np.asarray(state.started)

    def groups(self, state: SMC2State) -> dict[str, dict[str, tuple[tuple[str, ...], Any]]]:
        """What happened stage by stage, and the evidence by time, for the group ``smc``."""
        taken = int(np.clip(np.max(state.stages), 0, _RECORDED))
        found: dict[str, tuple[tuple[str, ...], Any]] = {
            name: (("chain", "stage"), np.asarray(x)[:, :taken])
            for name, x in state.records.items()
        }
        found["log_evidence_increment"] = (("chain", "time"), np.asarray(state.increments))
        return {"smc": {**found, "particles": ((), self.particles)}}

    def problem(self, state: SMC2State) -> str | None:
        """Why the draws are not from the posterior, if they are not."""
        time, stages = np.asarray(state.time), np.asarray(state.stages)
        dead = np.flatnonzero(~np.isfinite(np.asarray(state.log_evidence)))
        behind = np.flatnonzero(~np.asarray(state.arrived))
        if dead.size:
            lost = np.asarray(state.increments)[dead[0]]
            return (
                f"in chain {dead[0]} no particle can explain the data of step "
                f"{int(np.flatnonzero(~np.isfinite(lost))[0])}: they are impossible, or far from "
                "all that the model predicts. Check their scale, or take more particles, or a "
                "proposal that looks at the data."
            )
        if behind.size:
            chain = int(behind[0])
            return (
                f"chain {chain} had only come to step {int(time[chain])} of "
                f"{np.asarray(state.increments).shape[1] - 1} after {int(stages[chain])} stages. "
                "Allow more of them (warmup=), or take more particles."
            )
        return None


# -- the algorithm ------------------------------------------------------------------------------


def _like(new: Any, old: Any) -> Any:
    """The same in the types that a loop began with."""
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), new, old)


def _held(inner: Population, size: int) -> Population:
    """The particles that are there, of filters with room for more."""
    return inner._replace(
        particles=jax.tree.map(lambda x: x[:, :size], inner.particles),
        log_weights=inner.log_weights[:, :size],
    )


def _stored(inner: Population, most: int) -> Population:
    """Filters with room for ``most`` particles; those that are not there weigh nothing."""

    def padded(x: Any, value: Any) -> Any:
        rest = [(0, 0), (0, most - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, rest, constant_values=value)

    return Population(
        jax.tree.map(lambda x: padded(x, 0), inner.particles),
        padded(inner.log_weights, -jnp.inf),
        inner.log_evidence,
    )


def first_state(method: SMC2, key: Any, target: Any) -> SMC2State:
    """N draws from the prior, with filters at the start."""
    assert method.space is not None
    size, length = method.particles, method.space.length
    key_particles, key_words = random.split(key)
    drawn = over(lambda k: dict(target.prior_position(k)), random.split(key_particles, size))
    static, inside = within_supports({name: drawn[name] for name in method.space.static})
    words = fresh_words(key_words, size)
    log_prior, inner = over(lambda x, w: method.filters[0].start(target, x, w), static, words)
    wide = jnp.result_type(float)
    population = Population.of(static).reweighted(
        jnp.where(inside & jnp.isfinite(log_prior), inner.log_evidence, -jnp.inf)
    )
    zero, nan = jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, wide)
    return SMC2State(
        outer=Outer(
            static,
            log_prior,
            _stored(inner, method.sizes[-1]),
            jnp.zeros((size, length + 1, 2), jnp.uint32).at[:, 0].set(words),
        ),
        log_weights=population.log_weights,
        time=zero,
        level=zero,
        exchanging=jnp.asarray(False),
        arrived=jnp.asarray(False),
        stages=zero,
        resampled=zero,
        log_evidence=population.log_evidence,
        increments=jnp.full(length + 1, jnp.nan, wide).at[0].set(population.log_evidence),
        variance=jnp.zeros((), wide),
        eves=jnp.arange(size, dtype=jnp.int32),
        records={name: jnp.full(_RECORDED, nan) for name in _RECORDS},
        origin=random.key_data(key),
        started=jnp.isfinite(population.log_evidence),
    )


def stage(
    method: SMC2, level: int, key: Any, state: SMC2State, target: Any, settings: Settings
) -> SMC2State:
    """Exchange if that is due, take in data, resample, move; after the last data move only.

    Args:
        level: of the filters, which is that of the state.
    """
    assert method.space is not None
    keys = random.split(key, 4)
    filter_, length = method.filters[level], method.space.length
    arrived = state.arrived
    state = state._replace(outer=state.outer._replace(
        inner=_held(state.outer.inner, method.sizes[level])
    ))  # fmt: skip
    if level > 0:
        state = lax.cond(
            state.exchanging, lambda: exchanged(keys[0], filter_, state, target), lambda: state
        )
    state = lax.while_loop(
        lambda s: (s.time < length) & (effective_size(s.log_weights) >= settings.ess),
        lambda s: taken_in(keys[1], filter_, s, target),
        state,
    )
    size = effective_size(state.log_weights)
    variance = _variance(method, state)
    root = proposal_root(state)
    state, distinct = lax.cond(
        arrived,
        lambda: (state, method.particles),
        lambda: resampled(method, keys[2], state),
    )
    outer, acceptance, moves = moved(method, keys[3], filter_, state, root, target)
    weak = ~arrived & (acceptance < settings.exchange) & (level < method.doublings)
    record = {
        "reached": state.time,
        "ess": size,
        "log_evidence": state.log_evidence,
        "log_evidence_sd": jnp.sqrt(jnp.maximum(variance, 0.0)),
        "acceptance_rate": acceptance,
        "n_moves": moves,
        "n_unique": distinct,
        "inner_particles": method.sizes[level],
    }
    place = jnp.where(arrived, _RECORDED, state.stages)  # nowhere, after the last stage
    return state._replace(
        outer=outer._replace(inner=_stored(outer.inner, method.sizes[-1])),
        level=state.level + weak,
        exchanging=weak,
        arrived=arrived | ((state.time == length) & ~weak),
        stages=state.stages + ~arrived,
        variance=jnp.where(arrived, state.variance, variance),
        records={
            name: state.records[name].at[place].set(value, mode="drop")
            for name, value in record.items()
        },
    )


def _variance(method: SMC2, state: SMC2State) -> Any:
    """Relative variance of the evidence, by the lineages.

    Resamplings of less noise than multinomial ones spread the lineages less than the estimate takes
    off for them; nothing is taken off then, which makes it an upper estimate.
    """
    noisy = method.resampling == "multinomial"
    return relative_variance(state.log_weights, state.eves, state.resampled if noisy else 0)


def reweighted(state: SMC2State, log_factors: Any) -> SMC2State:
    """The weights times factors; the evidence, and its increment at this time, times their mean."""
    own = Population(state.outer.position, state.log_weights, state.log_evidence)
    new = own.reweighted(log_factors)
    increments = state.increments.at[state.time].add(new.log_evidence - state.log_evidence)
    return state._replace(
        log_weights=new.log_weights, log_evidence=new.log_evidence, increments=increments
    )


def taken_in(key: Any, filter_: InnerFilter, state: SMC2State, target: Any) -> SMC2State:
    """The data of one more step: every filter takes it, every weight its estimate's increment."""
    outer, t = state.outer, state.time
    words = fresh_words(random.fold_in(key, t), outer.log_prior.shape[0])
    inner = over(
        lambda x, cloud, w: filter_.step(target, x, cloud, w, t), outer.position, outer.inner, words
    )
    increment = inner.log_evidence - outer.inner.log_evidence
    outer = outer._replace(inner=inner, words=outer.words.at[:, t + 1].set(words))
    increments = state.increments.at[t + 1].set(0.0)
    return reweighted(state._replace(outer=outer, time=t + 1, increments=increments), increment)


def rerun(
    key: Any, filter_: InnerFilter, position: Position, state: SMC2State, target: Any
) -> Outer:
    """Parameters with a new filter on the data until now, from new words."""
    words = fresh_words(key, state.outer.words.shape[1])
    log_prior, inner = filter_.run(target, position, words, state.time)
    return Outer(dict(position), log_prior, inner, words)


def exchanged(key: Any, filter_: InnerFilter, state: SMC2State, target: Any) -> SMC2State:
    """New filters, of another size, for all parameters: weights times Zhat_new / Zhat_old."""
    old = state.outer
    keys = random.split(key, old.log_prior.shape[0])
    new = over(lambda k, x: rerun(k, filter_, x, state, target), keys, old.position)
    ratio = new.inner.log_evidence - old.inner.log_evidence
    return reweighted(state._replace(outer=new), ratio)


def resampled(method: SMC2, key: Any, state: SMC2State) -> tuple[SMC2State, Any]:
    """Equally weighted particles, and how many different ones."""
    ancestors = resample(key, state.log_weights, method.resampling)
    distinct = jnp.sum(jnp.zeros(method.particles, jnp.int32).at[ancestors].set(1))
    even, _ = normalised(jnp.zeros_like(state.log_weights))
    outer = jax.tree.map(lambda x: x[ancestors], state.outer)
    new = state._replace(
        outer=outer, log_weights=even, eves=state.eves[ancestors], resampled=state.resampled + 1
    )
    return new, distinct


def proposal_root(state: SMC2State) -> Float[Array, "D D"]:
    """Cholesky factor of the weighted cloud's covariance."""
    weights = jnp.exp(state.log_weights)
    cloud = Cloud(state.outer.position, weights, jnp.nan)
    return jnp.linalg.cholesky(cloud_covariance(cloud))


def moved(
    method: SMC2, key: Any, filter_: InnerFilter, state: SMC2State, root: Any, target: Any
) -> tuple[Outer, Any, Any]:
    """The particles after some particle marginal moves, the mean acceptance, and how many moves."""

    def one(key: Any, old: Outer) -> tuple[Outer, Any]:
        """The stored estimate is not made again: it belongs to the point."""
        key_walk, key_filter = random.split(key)
        log_density = old.log_prior + old.inner.log_evidence
        walk = _WALK.begin(old.position, log_density)._replace(root=root)

        def evaluate(position: Position) -> tuple[Any, Outer]:
            new = rerun(key_filter, filter_, position, state, target)
            return new.log_prior + new.inner.log_evidence, new

        *_, new, info = _WALK.walk(key_walk, old.position, walk, old, evaluate, SAMPLING)
        return new, info["acceptance_rate"]

    def move(i: Any, outer: Outer) -> tuple[Outer, Any]:
        keys = random.split(random.fold_in(key, i), method.particles)
        outer, rates = over(one, keys, outer)
        return outer, jnp.mean(rates)

    outer, means, moves = until_moved(
        move, state.outer, lambda o: o.position, state.outer.position, method.moves,
        method.max_moves, _GROWTH,
    )  # fmt: skip
    return outer, means[0], moves


_WALK = RandomWalk()
