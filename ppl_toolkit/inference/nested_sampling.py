"""Nested sampling: the evidence and the posterior from prior draws above rising likelihoods.

N live points are drawn from the prior. Step by step the k with the lowest likelihoods die, and k
new ones are drawn from the prior above the highest of these, by slice sampling that starts at
others that live. A share k / N of the prior volume X that is left dies with them, so that dead
points come with volumes, and

    Z = sum_i L_i (X_{i-1} - X_i),    X_i = X_{i-1} (1 - 1 / n_i),

where n_i points live when point i dies. With these volumes Z is unbiased (not its logarithm), if
the new points are draws as they should be; points of equal likelihood die together and are replaced
together, which the n_i take into account.

Sources: Skilling (2006), Bayesian Analysis 1; Yallup, Kroupa and Handley (2026), nested slice
sampling, as blackjax has it; Bréhier, Gazeau, Goudenège, Lelièvre and Rousset (2016), Annals of
Applied Probability 26, for unbiasedness; Fowlie, Handley and Su (2021), MNRAS 503, for likelihoods
with plateaus.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int
from scipy import stats

from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.nested_points import (
    Weighted,
    insertion_ranks,
    near_start,
    point_maker,
    replacement,
    shape,
    weighted,
)
from ppl_toolkit.inference.resampling import resample
from ppl_toolkit.inference.smc import within_supports
from ppl_toolkit.inference.step_sizes import require_count
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program

__all__ = ["NestedSampling", "NestedState"]

_LEAST_STEPS, _STEPS = 10, 3  # slices per new point: at least, and per dimension


class NestedState(NamedTuple):
    """One run.

    Attributes:
        live: blackjax's state, with the live points.
        dead: points that have died, (C,), as far as there are any.
        ranks: where the points that replaced them came in, see `insertion_ranks`, (C,).
        near: how many of these stayed near to where they started, see `near_start`.
        iterations: how many were done.
        evaluations: of the likelihood.
        share: of the evidence that the live points hold.
        over: whether it is small enough.
        weighted: all points, once the run is over.
        chosen: N of them, equally weighted, in random order.
        origin: words of the key of the first points.
        started: whether any of these had a positive likelihood.
    """

    live: Any
    dead: Any
    ranks: Float[Array, " C"]
    near: Int[Array, ""]
    iterations: Int[Array, ""]
    evaluations: Float[Array, ""]
    share: Float[Array, ""]
    over: Any
    weighted: Weighted
    chosen: Int[Array, " N"]
    origin: Any
    started: Any


class Settings(NamedTuple):
    """Options that are arguments of the compiled program."""

    warmup: Any
    precision: Any


@dataclasses.dataclass(frozen=True)
class NestedSampling:
    """Nested sampling: log evidence and posterior, from the prior inwards, without gradients.

    Serves several modes, steps in the likelihood, and phase transitions that tempering cannot
    follow; for some twenty unknowns or fewer. A chain is one independent run; the spread of the
    chains' evidences is their error. Draws are the points of the run, resampled to equal weights
    in rounds of ``live``: about as many as they are worth. A run of more draws says nothing new:
    take more live points.

    Args:
        live: points, N. The standard deviation of a log evidence is about sqrt(information / N).
        delete: points that die at a time, and are replaced side by side; N / 10 if None.
        steps: slices from the point that a new one starts at. None: three per dimension, at least
            ten. Too few show in the finding ``nested``.
        precision: a run ends when its live points hold no larger share of the evidence.
        max_iterations: of deleting and replacing, each of which takes a share delete / N of the
            volume: 2000 reach a share exp(-200) of the prior, by default.

    Raises:
        OptionError: an option is out of its range.

    Cost: ``steps`` times about five likelihoods for each of N (information + some sqrt(D))
    points; max_iterations * delete * D numbers.
    Results: ``log_evidence`` among the statistics; in the group ``nested`` what the runs did; in
    ``dead_points`` their points with log likelihoods, volumes and weights.
    """

    live: int = 500
    delete: int | None = None
    steps: int | None = None
    precision: float = 1e-3
    max_iterations: int = 2000

    needs: ClassVar[tuple[str, ...]] = ("log_parts", "prior_position", "values_at")
    takes_start: ClassVar[bool] = False
    one_law: ClassVar[bool] = False
    brief_start: ClassVar[bool] = True  # `init` runs once: it is made quickly
    failure: ClassVar[str] = (
        "none of the draws from the prior has a positive likelihood. Take more live points, or a "
        "prior that is nearer to the data."
    )

    def __post_init__(self) -> None:
        require_count("live", self.live)
        require_count("max_iterations", self.max_iterations)
        for name in ("delete", "steps"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        if self.live < 10 or 2 * self.deleted > self.live:
            raise OptionError(
                f"live={self.live} points, of which {self.deleted} die at a time: take ten points "
                "or more, and let half of them live."
            )
        if not 0.0 < self.precision < 1.0:
            raise OptionError(f"precision is a share between 0 and 1; got {self.precision!r}.")

    @property
    def deleted(self) -> int:
        """How many points die at a time."""
        return self.delete or max(1, self.live // 10)

    @property
    def warmup(self) -> int:
        """Iterations before the first draw, at most; those after the end of a run do nothing."""
        return self.max_iterations

    @property
    def refit_warmup(self) -> int:
        return self.max_iterations

    @property
    def draws(self) -> int:
        return self.live

    def check(self, program: Program) -> None:
        """Refuse improper priors, discrete sites, and too few points for so many dimensions."""
        if not program.latent:
            raise MethodError("the model has no latent site to infer.")
        program.require_proper()
        if program.discrete:
            names = [site.name for site in program.discrete]
            raise MethodError(
                f"NestedSampling moves real numbers, but sites {names} are discrete. SMC() gives "
                "evidences of such models, and Enumeration() exact ones; or sum them out in the "
                "model (numpyro.distributions.MixtureSameFamily)."
            )
        if program.layout:
            raise MethodError(
                "NestedSampling serves models of one dimension, and masked plates or cases change "
                "it. SMC() gives evidences of such models."
            )
        if self.live <= 2 * program.size:
            raise OptionError(
                f"live={self.live} points do not show the shape of {program.size} dimensions: take "
                f"more than {2 * program.size}."
            )

    def statics(self) -> tuple:
        return (self.live, self.deleted, self.steps, self.max_iterations)

    def settings(self, program: Program, warmup: int) -> Settings:
        return Settings(np.asarray(warmup), np.asarray(self.precision))

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> NestedState:
        """N draws from the prior."""
        from blackjax.ns.adaptive import init

        size, room = self.live, self.deleted * self.max_iterations
        drawn = jax.vmap(lambda k: dict(target.prior_position(k)))(random.split(key, size))
        drawn, inside = lax.optimization_barrier(within_supports(drawn))  # drawn once only
        point = jax.vmap(point_maker(target.log_parts))
        live = init(drawn, point, update_inner_kernel_params_fn=shape)
        likelihood = jnp.where(inside, live.particles.loglikelihood, -jnp.inf)
        live = live._replace(particles=live.particles._replace(loglikelihood=likelihood))
        dead = jax.tree.map(lambda x: jnp.zeros((room, *x.shape[1:]), x.dtype), live.particles)
        wide = jnp.result_type(float)
        nothing = jnp.full(room + size, jnp.nan, wide)
        unknown = jnp.full((), jnp.nan, wide)
        zero = jnp.zeros((), jnp.int32)
        return NestedState(
            live=live,
            dead=dead,
            ranks=jnp.full(room, jnp.nan, wide),
            near=zero,
            iterations=zero,
            evaluations=jnp.asarray(float(size), wide),
            share=jnp.ones((), wide),
            over=self._flat(likelihood),
            weighted=Weighted(nothing, nothing, unknown, unknown, unknown, unknown),
            chosen=jnp.zeros(size, jnp.int32),
            origin=random.key_data(key),
            started=jnp.any(jnp.isfinite(likelihood)),
        )

    def _flat(self, likelihood: Any) -> Any:
        """Whether no point is better than those that die next: then the rest is all alike."""
        return jnp.sum(likelihood < jnp.max(likelihood)) < self.deleted

    def refresh(self, state: NestedState, target: Any, settings: Settings) -> NestedState:
        """A new run on other data, from the same prior draws."""
        return self.init(random.wrap_key_data(state.origin), None, target, settings)

    def step(
        self, key: Any, index: Any, state: NestedState, target: Any, settings: Settings
    ) -> tuple[NestedState, Position, dict[str, Any]]:
        """An iteration while the run is not over; then one draw after the other."""
        number = index - settings.warmup
        runs = (number < 0) & ~state.over & (state.iterations < self.max_iterations)
        rounds = (number >= 0) & (number % self.live == 0)

        # Loops of no or one turn: unlike branches, they pass the points on without a copy.
        def once(due: Any, function: Any, state: NestedState) -> NestedState:
            return lax.while_loop(
                lambda carry: carry[1],
                lambda carry: (function(carry[0]), jnp.asarray(False)),
                (state, due),
            )[0]

        state = once(runs, lambda s: self._iterated(key, s, target, settings), state)
        state = once(rounds, lambda s: self._resampled(key, s), state)
        row, room = state.chosen[number % self.live], state.ranks.shape[0]

        def taken(dead: Any, live: Any) -> Any:
            return jnp.where(
                row < room, dead[jnp.minimum(row, room - 1)], live[jnp.maximum(row - room, 0)]
            )

        point = jax.tree.map(taken, state.dead, state.live.particles)
        lp = point.logdensity + point.loglikelihood
        info = {"lp": lp, "log_evidence": state.weighted.log_evidence}
        return state, point.position, info

    def _iterated(
        self, key: Any, state: NestedState, target: Any, settings: Settings
    ) -> NestedState:
        """The worst points die, and others take their places."""
        from blackjax.ns.base import delete_fn

        count, particles = self.deleted, state.live.particles
        dimension = sum(x[0].size for x in particles.position.values())
        steps = self.steps or max(_LEAST_STEPS, _STEPS * dimension)
        key_step, key_ranks = random.split(key)
        dying, _ = delete_fn(state.live, count)
        kernel = replacement(point_maker(target.log_parts), steps, count)
        live, info = kernel(key_step, state.live)
        slices, before = info.update_info
        start = jax.tree.map(lambda x: x[:, 0], before)
        factor = live.inner_kernel_params["covariance_factor"]
        near = near_start(live.particles.position, dying, start, factor)
        likelihood = live.particles.loglikelihood
        contour = jnp.max(particles.loglikelihood[dying])
        of_live, of_dead = live.integrator.logZ_live, live.integrator.logZ
        share = jnp.exp(of_live - jnp.logaddexp(of_live, of_dead))
        # Both ends of an interval are evaluated, and those that it grows and shrinks to.
        evaluations = jnp.sum(2 + slices.num_expansions + slices.num_shrink)
        first = state.iterations * count

        def put(buffer: Any, new: Any) -> Any:
            return lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), first, 0)

        return state._replace(
            live=live,
            dead=jax.tree.map(put, state.dead, info.particles),
            ranks=put(state.ranks, insertion_ranks(key_ranks, likelihood, dying, contour)),
            near=state.near + jnp.sum(near, dtype=jnp.int32),
            iterations=state.iterations + 1,
            evaluations=state.evaluations + evaluations,
            share=share.astype(state.share.dtype),
            over=(share <= settings.precision) | self._flat(likelihood),
        )

    def _resampled(self, key: Any, state: NestedState) -> NestedState:
        """As many draws as there are live points, by systematic resampling of all points."""
        died = state.iterations * self.deleted
        known = weighted(state.dead, state.live.particles, died)
        key_rows, key_order = random.split(key)
        rows = resample(key_rows, known.log_weight, "systematic", self.live)
        return state._replace(weighted=known, chosen=random.permutation(key_order, rows))

    def values(self, draw: Position, target: Any) -> dict[str, Any]:
        return target.values_at(draw)

    # -- what a result says ----------------------------------------------------------------------

    def failed(self, state: NestedState) -> Any:
        return ~np.asarray(state.started)

    def groups(self, state: NestedState) -> dict[str, dict[str, tuple[tuple[str, ...], Any]]]:
        """What the runs did (``nested``), and their points by likelihood (``dead_points``)."""
        known = jax.tree.map(np.asarray, state.weighted)
        if not np.isfinite(known.log_evidence).any():
            return {}
        died = np.asarray(state.iterations) * self.deleted
        ranks = np.asarray(state.ranks)
        of_runs = {
            "log_evidence": known.log_evidence,
            "log_evidence_sd": known.log_evidence_sd,
            "information": known.information,
            "ess": known.ess,
            "n_iterations": np.asarray(state.iterations),
            "n_evaluations": np.asarray(state.evaluations),
            "near_start": np.asarray(state.near) / np.maximum(died, 1),
            "insertion_p": np.array([_uniform_p(r[:n]) for r, n in zip(ranks, died, strict=True)]),
        }
        nested: dict[str, tuple[tuple[str, ...], Any]] = {
            name: (("chain",), value) for name, value in of_runs.items()
        }
        dead, live = state.dead.loglikelihood, state.live.particles.loglikelihood
        columns: dict[str, Any] = {
            "log_likelihood": (np.asarray(dead), np.asarray(live)),
            "log_volume": np.split(known.log_volume, [ranks.shape[1]], axis=1),
            "log_weight": np.split(known.log_weight, [ranks.shape[1]], axis=1),
            "insertion_rank": (ranks, np.full(np.shape(live), np.nan)),
        }
        points = np.full((len(columns), len(died), died.max() + self.live), np.nan)
        for chain, n in enumerate(died):
            table = np.stack([np.append(a[chain, :n], b[chain]) for a, b in columns.values()])
            points[:, chain, : n + self.live] = table[:, np.argsort(table[0], kind="stable")]
        return {
            "nested": {**nested, "live": ((), self.live)},
            "dead_points": {
                name: (("chain", "point"), x) for name, x in zip(columns, points, strict=True)
            },
        }

    def problem(self, state: NestedState) -> str | None:
        """Why the draws are not from the posterior, if they are not."""
        behind = np.flatnonzero(~np.asarray(state.over))
        if not behind.size:
            return None
        chain = int(behind[0])
        return (
            f"chain {chain}: after {int(np.asarray(state.iterations)[chain])} iterations the live "
            f"points still hold {float(np.asarray(state.share)[chain]):.1%} of the evidence. Allow "
            "more of them (max_iterations=, and warmup= where it is given), delete more points at "
            "a time, or give the model a prior that is nearer to the data."
        )


def _uniform_p(ranks: np.ndarray) -> float:
    """P-value of the Kolmogorov-Smirnov test that ranks are uniform."""
    return float(stats.kstest(ranks, "uniform").pvalue) if ranks.size else float("nan")
