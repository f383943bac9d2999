"""Sequential Monte Carlo from the prior to the posterior, with the evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int

from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.discrete import Gibbs
from ppl_toolkit.inference.hmc import HMC
from ppl_toolkit.inference.kernel import Cloud, Kernel, block, cycle, require_exact, require_spec
from ppl_toolkit.inference.population import Population, effective_size, relative_variance
from ppl_toolkit.inference.randomness import over
from ppl_toolkit.inference.reference import ReferenceDraw, ReferenceParts
from ppl_toolkit.inference.rehearsal import try_out
from ppl_toolkit.inference.resampling import resample, scheme_named
from ppl_toolkit.inference.reversible_jump import BirthDeath, Switch
from ppl_toolkit.inference.smc_stage import (
    Generations,
    Moved,
    Particles,
    chains_of_moves,
    chains_variance,
    log_weights,
    moves_of,
    next_point,
    tempered_likelihood,
)
from ppl_toolkit.inference.target import Target, space_of
from ppl_toolkit.layout import Layout
from ppl_toolkit.positions import Position

__all__ = ["SMC", "SMCState", "first_state", "stage", "within_supports"]

_RECORDED = 512  # stages whose records are kept
_RECORDS = (
    "temperature", "ess", "log_evidence", "log_evidence_sd", "acceptance_rate", "n_moves",
    "step_size", "n_unique",
)  # fmt: skip


class Settings(NamedTuple):
    """Options that are arguments of the compiled program."""

    warmup: Any
    ess: Any
    powers: Any
    layout: Layout = Layout()


class SMCState(NamedTuple):
    """One run of the sampler.

    Attributes:
        generations: the particles.
        newest: which generation was made last.
        reached: the point of the path it is at, from 0 to the number of batches.
        stages: how many stages were taken.
        log_evidence: its estimate there.
        variance: of the evidence, relative; by the lineages, or a sum over the stages.
        eves: the first ancestor of every particle of the newest generation, (N,).
        learned: a state of the kernel, for its step sizes and scales.
        acceptance: mean acceptance of the last moves.
        records: of the stages, (S,) by name.
        origin: words of the key of the first particles.
        started: whether any of these had a positive likelihood.
    """

    generations: Generations
    newest: Int[Array, ""]
    reached: Float[Array, ""]
    stages: Int[Array, ""]
    log_evidence: Float[Array, ""]
    variance: Float[Array, ""]
    eves: Int[Array, " N"]
    learned: Any
    acceptance: Float[Array, ""]
    records: dict[str, Float[Array, " S"]]
    origin: Any
    started: Any


@dataclasses.dataclass(frozen=True)
class SMC:
    """A sequential Monte Carlo sampler: particles from the prior, step by step to the posterior.

    Every stage reweights the particles, resamples them, and moves them at the new target; the last
    stage is at the posterior, so that its particles are equally weighted. A chain is one
    independent run; its draws are its particles, and after `particles` draws the particles are
    moved on. The log evidence comes with every draw (it is the same for all of a chain), and what
    happened stage by stage in the group ``smc`` of the result.

    Args:
        particles: N.
        kernel: what moves the particles. None: `HMC` with 8 steps of widely varying size and a
            dense metric for continuous sites, `Gibbs` for discrete ones, `BirthDeath` and `Switch`
            for the numbers of masked plates and cases. Any kernel or composition will do that
            moves all sites; step sizes and scales are learned from the particles.
        batches: 1 raises the likelihood from power 0 to 1. With more, the rows of the data come in
            batch after batch (IBIS), and in powers within a batch that says too much at once.
        ess: a stage ends where the effective sample size is down to this share of N.
        resampling: "systematic", "multinomial", "stratified", "residual", "ssp" or "killing".
        moves: of every particle per stage. None: as many as are needed, until the mean squared
            distance from the start grows by less than a fiftieth per move, and at most
            ``max_moves``.
        max_moves: see ``moves``.
        waste_free: P: N / P particles are resampled and moved P - 1 times, and all the states on
            the way are particles; 0: off.
        generations: how many generations of particles are kept and reweighted together (persistent
            sampling); 1: the newest only.
        powers: fixed points of the path in (0, 1], the last one 1. Nothing is adapted then (give
            ``moves`` too), and the evidence is an unbiased estimate. None: adaptive.
        reference: for sites with flat priors, from which nothing can be drawn: the path begins
            with Student's t of this scale (3 degrees of freedom, unconstrained) there, and ends at
            the same posterior. The evidence is the integral under the flat prior. None: refuse.
        warmup: most stages.

    Cost: N log densities (or gradients) per move and stage; the number of stages grows like the
    logarithm of how much narrower the posterior is than the prior, and at most like sqrt(D).
    Sources: Del Moral, Doucet and Jasra (2006); Jasra et al. (2011) for the adaptive path; Chopin
    (2002) for data in batches; Dau and Chopin (2022) for waste-free; Karamanis and Seljak (2025)
    for persistent sampling.
    """

    particles: int = 1024
    kernel: Any = None
    batches: int = 1
    ess: float = 0.5
    resampling: str = "systematic"
    moves: int | None = None
    max_moves: int = 100
    waste_free: int = 0
    generations: int = 1
    powers: Sequence[float] | None = None
    reference: float | None = None
    warmup: int = 100

    refit_warmup: ClassVar[int] = 100
    takes_start: ClassVar[bool] = False
    one_law: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kernel is not None:
            object.__setattr__(self, "kernel", require_spec(self.kernel))
            if getattr(self.kernel, "power", 1.0) != 1.0:
                raise OptionError(
                    "SMC sets the powers of the likelihood itself; give it a kernel that is not "
                    "tempered(...)."
                )
        least = {"particles": 2, "batches": 1, "max_moves": 1, "generations": 1, "warmup": 1}
        counts = {name: getattr(self, name) for name in least}
        if self.moves is not None:
            counts["moves"], least["moves"] = self.moves, 0
        counts["waste_free"], least["waste_free"] = self.waste_free, 0
        for name, value in counts.items():
            wrong = isinstance(value, bool) or not isinstance(value, int | np.integer)
            if wrong or value < least[name]:
                raise OptionError(f"{name} must be an integer >= {least[name]}; got {value!r}.")
        if not 0.0 < self.ess < self.generations:
            raise OptionError(
                f"ess must lie between 0 and {self.generations} (the number of generations kept); "
                f"got {self.ess}."
            )
        if self.reference is not None:
            if not (isinstance(self.reference, int | float) and 0 < self.reference < np.inf):
                raise OptionError(f"reference must be a positive scale; got {self.reference!r}.")
            if self.batches > 1:
                raise OptionError("reference serves batches=1 only.")
        scheme_named(self.resampling)
        changes_size = self.waste_free or self.generations > 1
        if self.resampling == "killing" and changes_size:
            raise OptionError("resampling='killing' serves neither waste_free nor generations.")
        self._check_waste_free()
        self._check_powers()

    def _check_waste_free(self) -> None:
        if not self.waste_free:
            return
        if self.waste_free < 2 or self.particles % self.waste_free:
            raise OptionError(
                f"waste_free={self.waste_free} must be >= 2 and divide particles={self.particles}."
            )
        if self.moves is not None or self.generations > 1:
            raise OptionError("waste_free fixes the moves itself, and keeps one generation.")

    def _check_powers(self) -> None:
        if self.powers is None:
            return
        powers = np.asarray(self.powers, float)
        rising = (
            powers.ndim == 1 and powers.size > 0 and bool((np.diff(powers, prepend=0) > 0).all())
        )
        if not (rising and powers[-1] == 1.0):
            raise OptionError(f"powers must rise from above 0 to 1; got {self.powers!r:.80}.")
        if self.moves is None and not self.waste_free:
            raise OptionError("with fixed powers nothing is adapted: give the number of moves too.")
        object.__setattr__(self, "powers", tuple(powers.tolist()))

    @property
    def needs(self) -> tuple[Any, ...]:
        own: tuple[Any, ...] = ("log_rows" if self.batches > 1 else "log_parts", "prior_position")
        if self.reference is not None:
            own = (ReferenceParts(self.reference), ReferenceDraw(self.reference))
        return (*own, "values_at", "levels", "own_draws", "own_scores")

    @property
    def draws(self) -> int:
        """Default number of draws: every particle once."""
        return int(self.particles)

    def check(self, program: Any) -> None:
        """Refuse improper priors, and sites that the kernel cannot move or leaves alone."""
        space = space_of(program)
        if not space:
            raise MethodError("the model has no latent site to infer.")
        self._require_start(program)
        discrete = {name: kind.discrete for name, kind in space.items()}
        kernel = self.kernel or default_kernel(discrete, program.layout)
        require_exact("SMC", kernel)
        kernel.require(space)
        if kernel.needs_relaxation:
            raise MethodError(
                "SMC serves no kernels with gradients with respect to discrete sites; use Gibbs or "
                "LocallyBalanced."
            )
        if still := sorted(set(space) - kernel.moves(space)):
            raise MethodError(
                f"no part of the kernel moves the latent sites {still}; add a block for them to "
                "the cycle."
            )
        if self.batches > 1:
            rows = program.traced("log_rows").jaxpr.outvars[-1].aval.shape[0]
            if self.batches > rows:
                raise OptionError(
                    f"batches={self.batches}, but the observed sites have {rows} rows."
                )
        try_out(kernel, program)

    def _require_start(self, program: Any) -> None:
        flat = [site.name for site in program.latent if not site.proper]
        if flat and self.reference is None:
            raise MethodError(
                f"SMC begins with draws from the prior, and sites {flat} have flat (improper) "
                "ones. Give them proper priors, or begin elsewhere: SMC(reference=10.0), with "
                "about the scale of what the data will say."
            )

    def statics(self) -> tuple:
        return (
            self.reference, self.particles, self.kernel, self.batches, self.resampling, self.moves,
            self.max_moves, self.waste_free, self.generations,
        )  # fmt: skip

    def settings(self, program: Any, warmup: int) -> Settings:
        powers = np.asarray(self.powers or (), float) * self.batches
        least = np.asarray(self.ess * self.particles, float)
        return Settings(np.asarray(warmup), least, powers, program.layout)

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> SMCState:
        """Draws from the prior, with their likelihoods, and a kernel that has learned nothing."""
        return first_state(self, key, target, settings.layout)

    def refresh(self, state: SMCState, target: Any, settings: Settings) -> SMCState:
        """A new run on other data, from the same prior draws; what the kernel learned stays."""
        new = first_state(self, random.wrap_key_data(state.origin), target, settings.layout)
        return new._replace(learned=state.learned)

    def step(
        self, key: Any, index: Any, state: SMCState, target: Any, settings: Settings
    ) -> tuple[SMCState, Position, dict[str, Any]]:
        """A stage while the posterior is not reached; then one particle after the other."""
        number = index - settings.warmup
        due = jnp.where(
            number < 0,
            state.reached < self.batches,
            (number > 0) & (number % self.particles == 0),
        )
        # A loop of no or one turn: unlike a branch, it passes the particles on without a copy.
        state, _ = lax.while_loop(
            lambda carry: carry[1],
            lambda carry: (stage(self, key, carry[0], target, settings), jnp.asarray(False)),
            (state, due),
        )
        row = state.newest * self.particles + jnp.maximum(number, 0) % self.particles
        cloud: Particles = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, row, 0, False), state.generations.particles
        )
        stats = {
            "lp": cloud.log_prior + jnp.sum(cloud.log_likelihood, -1),
            "log_evidence": state.log_evidence,
            "temperature": state.reached / self.batches,
        }
        return state, cloud.position, stats

    def values(self, draw: Position, target: Any) -> dict[str, Any]:
        return target.values_at(draw)

    def failed(self, state: SMCState) -> Any:
        return ~np.asarray(state.started)

    def groups(self, state: SMCState) -> dict[str, dict[str, tuple[tuple[str, ...], Any]]]:
        """What happened stage by stage, for the group ``smc`` of the result."""
        taken = int(np.clip(np.max(state.stages), 0, _RECORDED))
        records = {name: np.asarray(x)[:, :taken] for name, x in state.records.items()}
        shown = {
            name: (("chain", "stage"), x)
            for name, x in records.items()
            if name not in ("step_size", "log_evidence_sd") or np.isfinite(x).any()
        }
        return {"smc": {**shown, "particles": ((), self.particles)}}

    def problem(self, state: SMCState) -> str | None:
        """Why the draws are not from the posterior, if they are not."""
        reached = np.asarray(state.reached) / self.batches
        behind = np.flatnonzero(reached < 1.0)
        if not behind.size:
            return None
        chain = int(behind[0])
        return (
            f"chain {chain} had only come to {reached[chain]:.3g} of the way from the prior to the "
            f"posterior after {int(np.asarray(state.stages)[chain])} stages. Allow more of them "
            "(warmup=), take more particles, or a kernel that moves further (more moves=)."
        )


def default_kernel(discrete: Mapping[str, bool], layout: Layout = Layout()) -> Any:  # noqa: B008
    """The kernel for sites of these kinds.

    Args:
        discrete: the latent sites, and whether they are.
        layout: their masked plates and cases.

    The step sizes of HMC vary tenfold: one size does not suit all of a target that is no Gaussian,
    and particles that never move where the target is narrow bias the evidence.
    """
    jumps: dict[str, Any] = {cases.number: Switch(cases.number) for cases in layout.cases}
    jumps |= {plate.number: BirthDeath(plate.name) for plate in layout.plates}
    jumps = {name: jump for name, jump in jumps.items() if name in discrete}  # others are given
    whole = sorted(name for name, is_discrete in discrete.items() if is_discrete)
    real = sorted(name for name, is_discrete in discrete.items() if not is_discrete)
    parts: dict[Any, list[str]] = {
        HMC(steps=8, metric="dense", jitter=0.9): real,
        Gibbs(): [name for name in whole if name not in jumps],
    }
    if not jumps and not (real and whole):
        return next(kernel for kernel, sites in parts.items() if sites)
    blocks = [block(kernel, sites) for kernel, sites in parts.items() if sites]
    return cycle([*jumps.values(), *blocks])


# -- the algorithm ------------------------------------------------------------------------------


def _parts(method: SMC, target: Any, position: Position) -> tuple[Any, Any]:
    """Log prior density of a position, and its log likelihood by batch (B,)."""
    if method.batches == 1:
        log_parts = (
            target.log_parts
            if method.reference is None
            else target.functions[ReferenceParts(method.reference)]
        )
        prior, likelihood = log_parts(position)
        return prior, likelihood[None]
    prior, factors, rows = target.log_rows(position)
    number = np.arange(rows.shape[0]) * method.batches // rows.shape[0]
    by_batch = jnp.zeros(method.batches, rows.dtype).at[number].add(rows)
    return prior, by_batch.at[0].add(factors)


def _bound(method: SMC, target: Any, position: Position, point: Any, layout: Layout) -> Kernel:
    """The kernel that leaves the law at a point of the path invariant."""

    def parts(x: Position) -> tuple[Any, Any]:
        prior, likelihood = _parts(method, target, x)
        return prior, tempered_likelihood(point, likelihood)

    kinds = {k: not jnp.issubdtype(x.dtype, jnp.floating) for k, x in position.items()}
    kernel = method.kernel or default_kernel(kinds, layout)
    own = (target.own_draws, target.own_scores) if layout else None
    return kernel.bind(Target(parts, target.levels(position), layout=layout, own=own))


def _scored(method: SMC, target: Any, positions: Position) -> Particles:
    prior, likelihood = over(lambda x: _parts(method, target, x), dict(positions))
    return Particles(dict(positions), prior, jnp.where(jnp.isnan(likelihood), -jnp.inf, likelihood))


def within_supports(positions: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Positions (N, ...) without infinities, and which of them had none before, (N,).

    A draw can round to the edge of its support, which is infinitely far, unconstrained.
    """
    size = jax.tree.leaves(dict(positions))[0].shape[0]
    inside = jnp.ones(size, bool)
    for x in positions.values():
        if jnp.issubdtype(x.dtype, jnp.floating):
            inside &= jnp.all(jnp.isfinite(x.reshape(size, -1)), 1)

    def kept(x: Any) -> Any:
        return jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))

    return {name: kept(x) for name, x in positions.items()}, inside


def first_state(
    method: SMC,
    key: Any,
    target: Any,
    layout: Layout = Layout(),  # noqa: B008
) -> SMCState:
    """N draws from the prior, and one more at which the kernel starts to learn."""
    size, kept = method.particles, method.generations
    key_particles, key_kernel = random.split(key)
    keys = random.split(key_particles, size + 1)
    first = (
        target.prior_position
        if method.reference is None
        else target.functions[ReferenceDraw(method.reference)]
    )
    positions = over(lambda k: dict(first(k)), keys)
    positions, inside = lax.optimization_barrier(within_supports(positions))  # drawn once only
    extra = jax.tree.map(lambda x: x[-1], positions)
    cloud = _scored(method, target, jax.tree.map(lambda x: x[:-1], positions))
    possible = inside[:-1] & jnp.isfinite(cloud.log_prior)
    likelihood = jnp.where(possible[:, None], cloud.log_likelihood, -jnp.inf)
    cloud = cloud._replace(log_likelihood=likelihood)
    wide = jnp.result_type(float)
    nothing = jnp.full(kept, jnp.inf, wide)
    generations = Generations(
        jax.tree.map(lambda x: jnp.concatenate([x] * kept), cloud),
        jnp.zeros(kept, wide),
        nothing.at[0].set(0.0),
    )
    zero = jnp.zeros((), jnp.int32)
    return SMCState(
        generations=generations,
        newest=zero,
        reached=jnp.zeros((), wide),
        stages=zero,
        log_evidence=jnp.zeros((), wide),
        variance=jnp.zeros((), wide),
        eves=jnp.arange(size, dtype=jnp.int32),
        learned=_bound(method, target, extra, 0.0, layout).init(extra, key_kernel),
        acceptance=jnp.full((), jnp.nan, wide),
        records={name: jnp.full(_RECORDED, jnp.nan, wide) for name in _RECORDS},
        origin=random.key_data(key),
        started=jnp.any(jnp.isfinite(jnp.sum(likelihood, 1))),
    )


def stage(method: SMC, key: Any, state: SMCState, target: Any, settings: Settings) -> SMCState:
    """Reweight, resample, move at the new target; at the end of the path move only."""
    key_resample, key_move = random.split(key)
    arrived = state.reached >= method.batches
    point = _next(method, state, settings)
    population = Population.of(state.generations.particles).reweighted(
        log_weights(state.generations, point)
    )
    shares = population.log_weights
    log_evidence = jnp.where(arrived, state.log_evidence, population.log_evidence)

    count = method.particles // (method.waste_free or 1)
    drawn = resample(key_resample, shares, method.resampling, count)
    newest = state.newest * method.particles + jnp.arange(count, dtype=jnp.int32)
    ancestors = drawn if method.waste_free else jnp.where(arrived, newest, drawn)
    starts = jax.tree.map(lambda x: x[ancestors], state.generations.particles.position)

    one = jax.tree.map(lambda x: x[0], starts)
    kernel = _bound(method, target, one, point, settings.layout)
    learned = state.learned
    if method.powers is None:
        everybody = state.generations.particles.position
        learned = kernel.tune(learned, Cloud(everybody, jnp.exp(shares), state.acceptance))
    moved = _moved(method, key_move, kernel, learned, starts)

    new = _scored(method, target, moved.position)
    eves = state.eves if method.waste_free else state.eves[ancestors % method.particles]
    variance = jnp.where(arrived, state.variance, _variance(method, state, shares))
    distinct = jnp.zeros(shares.shape[0], jnp.int32).at[ancestors].max(1)
    record = {
        "temperature": point / method.batches,
        "ess": effective_size(shares),
        "log_evidence": log_evidence,
        "log_evidence_sd": jnp.sqrt(jnp.maximum(variance, 0.0)),
        "acceptance_rate": moved.acceptance,
        "n_moves": moved.moves,
        "step_size": moved.step_size,
        "n_unique": jnp.sum(distinct),
    }
    place = jnp.where(arrived, _RECORDED, state.stages)  # nowhere, after the last stage
    slot = jnp.where(arrived, state.newest, (state.newest + 1) % method.generations)
    return state._replace(
        generations=_replaced(method, state.generations, slot, new, point, log_evidence),
        newest=slot,
        reached=jnp.asarray(point, state.reached.dtype),
        stages=state.stages + jnp.where(arrived, 0, 1),
        log_evidence=log_evidence,
        variance=variance,
        eves=eves,
        learned=learned,
        acceptance=moved.acceptance.astype(state.acceptance.dtype),
        records={
            name: state.records[name].at[place].set(value, mode="drop")
            for name, value in record.items()
        },
    )


def _next(method: SMC, state: SMCState, settings: Settings) -> Any:
    if method.powers is not None:
        return jnp.asarray(settings.powers)[jnp.minimum(state.stages, len(method.powers) - 1)]
    return next_point(state.generations, state.reached, settings.ess)


def _moved(method: SMC, key: Any, kernel: Kernel, learned: Any, starts: Position) -> Moved:
    if method.waste_free:
        return chains_of_moves(key, kernel, learned, starts, method.waste_free)
    return moves_of(key, kernel, learned, starts, method.moves, method.max_moves)


def _variance(method: SMC, state: SMCState, shares: Any) -> Any:
    """Relative variance of the evidence so far."""
    if method.waste_free:
        return state.variance + chains_variance(shares, method.waste_free)
    if method.generations > 1:
        return jnp.full_like(state.variance, jnp.nan)
    return relative_variance(shares, state.eves, state.stages)


def _replaced(
    method: SMC, old: Generations, slot: Any, new: Particles, point: Any, log_evidence: Any
) -> Generations:
    """The generations with a new one in a slot."""
    first = slot * method.particles
    particles = jax.tree.map(
        lambda all_, x: lax.dynamic_update_slice_in_dim(all_, x.astype(all_.dtype), first, 0),
        old.particles,
        new,
    )
    return Generations(
        particles, old.born.at[slot].set(point), old.log_evidence.at[slot].set(log_evidence)
    )
