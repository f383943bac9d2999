"""Hamiltonian Monte Carlo and the No-U-Turn sampler on one flat vector.

Sources: Neal (2011) for HMC; Hoffman and Gelman (2014) for NUTS and dual averaging; Betancourt
(2017) for multinomial weights and the generalised U-turn criterion; Phan, Pradhan and Jankowiak
(2019) for building the tree without recursion.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Int

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference import warm_up
from ppl_toolkit.inference.adaptation import DualAveraging, LowRank, Metric, Moments
from ppl_toolkit.inference.kernel import (
    SAMPLING,
    Cloud,
    Kernel,
    Placed,
    Spec,
    Stage,
    require_continuous,
)
from ppl_toolkit.inference.learning import Learning, Settings
from ppl_toolkit.inference.randomness import continuous
from ppl_toolkit.inference.scaling import RANK
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.inference.trajectory import (
    MOST_ENERGY_ERROR,
    Gradient,
    Phase,
    Point,
    Scalar,
    Vector,
    energy_of,
    first_point,
    hamiltonian,
    leapfrog,
    metropolis,
    where,
)
from ppl_toolkit.inference.tuning import cloud_covariance, next_log_step
from ppl_toolkit.inference.warm_up import EARLY, METRIC, OVER, STEP, TRIAL
from ppl_toolkit.positions import Position

__all__ = [
    "HMC",
    "NUTS",
    "Draw",
    "HMCState",
    "hmc_transition",
    "metric_of_scales",
    "nuts_transition",
]

_FIRST_STEP = 0.1
_CAREFUL = 16  # every so many draws steps are half as long, so that no chain stays for long where
# the curvature is larger than elsewhere
_EARLY_DEPTH = 6  # of trajectories while nothing is known of the scales


class HMCState(NamedTuple):
    """The state of one chain.

    Attributes:
        point: current position, its log density and gradient.
        averaging: the step size and its adaptation.
        metric: the coordinates in use.
        phase: what warm-up learns at present, see `warm_up`.
        until: the iteration after which chains are pooled; 0 once warm-up is over.
    """

    point: Point
    averaging: DualAveraging
    metric: Metric | LowRank
    phase: Int[Array, ""]
    until: Int[Array, ""]


class Draw(NamedTuple):
    """What an iteration gives: warm-up learns from gradients as well."""

    position: Vector
    gradient: Vector


class _Composed(NamedTuple):
    """The state of a chain in a composition, which adapts on its own."""

    chain: HMCState
    moments: Moments


def hmc_transition(
    key: Any, point: Point, gradient: Gradient, metric: Metric | LowRank, step: Scalar, steps: int
) -> tuple[Point, dict[str, Any]]:
    """One transition of HMC with ``steps`` leapfrog steps and a Metropolis test."""
    key_momentum, key_accept = random.split(key)
    flight = hamiltonian(key_momentum, point, gradient, metric, step, steps)
    end, stats = metropolis(key_accept, point, flight)
    return end, {**stats, "n_steps": jnp.asarray(steps, jnp.int32)}


class _Leaves(NamedTuple):
    """A run of consecutive leapfrog points and the point chosen among them."""

    chosen: Point
    energy: Scalar  # of the chosen point
    log_weight: Scalar  # log sum of exp(-energy error)
    momentum_sum: Vector
    turning: Bool[Array, ""]
    diverging: Bool[Array, ""]
    acceptance: Scalar  # sum over the points of min(1, exp(-energy error))
    size: Int[Array, ""]
    worst: Scalar  # energy error of largest size


def _turning(left: Vector, right: Vector, total: Vector) -> Bool[Array, ""]:
    """The generalised U-turn criterion, with the end points counted half (trapezoid)."""
    span = total - 0.5 * (left + right)
    return (jnp.dot(left, span) <= 0.0) | (jnp.dot(right, span) <= 0.0)


def _uniform(key: Any, number: Any, dtype: Any) -> Scalar:
    """A number in (0, 1] for each key and ``number``, by one block of the generator.

    It is the folded key itself, which serves for nothing else.
    """
    high, low = random.key_data(random.fold_in(key, number))
    if dtype == jnp.float32:
        return ((high >> 8) + 1).astype(dtype) * 2.0**-24
    words = high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)
    return ((words >> 11) + 1).astype(dtype) * 2.0**-53


def _subtree(
    key: Any,
    before: Int[Array, ""],
    gradient: Gradient,
    metric: Metric | LowRank,
    step: Scalar,
    start: Phase,
    energy_0: Scalar,
    size: Int[Array, ""],
    max_depth: int,
) -> tuple[_Leaves, Phase]:
    """Extend the trajectory from ``start`` by up to ``size`` = 2^depth leaves.

    Point n of the run closes the binary subtrees that end there; each is checked against the
    momentum and momentum sum kept at its first point. Two arrays of ``max_depth`` rows hold
    all that is ever needed. The multinomial choice is by exponential jumps: a point that was
    chosen when the total weight was W stays until the total passes W / u with u uniform, so
    that random numbers are drawn only at replacements. Those of point n have the number
    ``before`` + n of the key.
    """
    dtype, dim = start.momentum.dtype, start.momentum.shape[0]
    zero = jnp.zeros((), dtype)
    empty = _Leaves(
        start.point, zero, zero - jnp.inf, jnp.zeros(dim, dtype), jnp.asarray(False),
        jnp.asarray(False), zero, jnp.zeros((), jnp.int32), zero,
    )  # fmt: skip
    rows = jnp.zeros((max_depth + 1, dim), dtype)  # the last takes what nobody reads

    def proceed(carry: tuple) -> Bool[Array, ""]:
        leaves = carry[0]
        return (leaves.size < size) & ~leaves.turning & ~leaves.diverging

    def grow(carry: tuple) -> tuple:
        leaves, z, bar, momenta, sums = carry
        n = leaves.size
        z = leapfrog(gradient, metric, step, z)
        energy = energy_of(z)
        error = energy - energy_0
        log_weight = jnp.logaddexp(leaves.log_weight, -error)
        chosen_now = log_weight > bar
        bar = lax.cond(
            chosen_now,
            lambda: log_weight - jnp.log(_uniform(key, before + n, dtype)),
            lambda: bar,
        )
        total = leaves.momentum_sum + z.momentum
        depth = lax.population_count(n >> 1)
        closed = lax.population_count(n ^ (n + 1)) - 1  # subtrees that end at point n

        first_of_some = n % 2 == 0
        row = jnp.where(first_of_some, depth, max_depth)
        momenta = lax.dynamic_update_index_in_dim(momenta, z.momentum, row, 0)
        sums = lax.dynamic_update_index_in_dim(sums, total, row, 0)

        def check() -> Bool[Array, ""]:
            def turn(carry: tuple) -> tuple:
                row, _ = carry
                first = momenta[row]
                return row - 1, _turning(first, z.momentum, total - sums[row] + first)

            return lax.while_loop(
                lambda c: (c[0] > depth - closed) & ~c[1], turn, (depth, jnp.asarray(False))
            )[1]

        turned = lax.cond(first_of_some, lambda: jnp.asarray(False), check)
        grown = _Leaves(
            chosen=where(chosen_now, z.point, leaves.chosen),
            energy=jnp.where(chosen_now, energy, leaves.energy),
            log_weight=log_weight,
            momentum_sum=total,
            turning=turned,
            diverging=~(error < MOST_ENERGY_ERROR),
            acceptance=leaves.acceptance + jnp.minimum(1.0, jnp.exp(-error)),
            size=n + 1,
            worst=jnp.where(jnp.abs(error) > jnp.abs(leaves.worst), error, leaves.worst),
        )
        return grown, z, bar, momenta, sums

    leaves, end, *_ = lax.while_loop(proceed, grow, (empty, start, zero - jnp.inf, rows, rows))
    return leaves, end


def nuts_transition(
    key: Any,
    point: Point,
    gradient: Gradient,
    metric: Metric | LowRank,
    step: Scalar,
    max_depth: int,
    depth_limit: Any = None,
) -> tuple[Point, dict[str, Any]]:
    """One transition of NUTS: double the trajectory until it turns, diverges or is 2^max_depth.

    Multinomial sampling inside subtrees, biased progressive sampling between them.
    ``depth_limit`` is a number of doublings as data, max_depth at most.
    Cost: one gradient per leapfrog step; memory O(max_depth D).
    """
    key_momentum, key_doubling, key_leaf = random.split(key, 3)
    dtype = point.position.dtype
    limit = max_depth if depth_limit is None else depth_limit
    noise = random.normal(key_momentum, point.position.shape, dtype)
    start = Phase(point, noise)
    energy_0 = energy_of(start)
    # The first binary digit of a number is the way of a doubling, the others are as uniform.
    digits = 2.0 * random.uniform(key_doubling, (max_depth,), dtype)
    forwards, log_uniforms = digits >= 1.0, jnp.log(digits % 1.0)
    zero = jnp.zeros((), dtype)
    tree = _Leaves(
        point, energy_0, zero, start.momentum, jnp.asarray(False), jnp.asarray(False), zero,
        jnp.zeros((), jnp.int32), zero,
    )  # fmt: skip

    def proceed(carry: tuple) -> Bool[Array, ""]:
        depth, tree = carry[0], carry[1]
        return (depth < limit) & ~tree.turning & ~tree.diverging

    def double(carry: tuple) -> tuple:
        depth, tree, left, right = carry
        forward = forwards[depth]
        subtree, end = _subtree(
            key_leaf,
            tree.size,
            gradient,
            metric,
            jnp.where(forward, step, -step),
            where(forward, right, left),
            energy_0,
            jnp.left_shift(jnp.ones((), jnp.int32), depth),
            max_depth,
        )
        left = where(forward, left, end)
        right = where(forward, end, right)
        whole = ~subtree.turning & ~subtree.diverging
        moved = whole & (log_uniforms[depth] < subtree.log_weight - tree.log_weight)
        total = tree.momentum_sum + subtree.momentum_sum
        merged = _Leaves(
            chosen=where(moved, subtree.chosen, tree.chosen),
            energy=jnp.where(moved, subtree.energy, tree.energy),
            log_weight=jnp.logaddexp(tree.log_weight, subtree.log_weight),
            momentum_sum=total,
            turning=subtree.turning | _turning(left.momentum, right.momentum, total),
            diverging=subtree.diverging,
            acceptance=tree.acceptance + subtree.acceptance,
            size=tree.size + subtree.size,
            worst=jnp.where(
                jnp.abs(subtree.worst) > jnp.abs(tree.worst), subtree.worst, tree.worst
            ),
        )
        return depth + 1, merged, left, right

    depth, tree, _, _ = lax.while_loop(
        proceed, double, (jnp.zeros((), jnp.int32), tree, start, start)
    )
    stats = {
        "acceptance_rate": tree.acceptance / tree.size,
        "n_steps": tree.size,
        "tree_depth": depth,
        "reached_max_treedepth": (depth == limit) & ~tree.turning & ~tree.diverging,
        "diverging": tree.diverging,
        "energy": tree.energy,
        "energy_error": tree.energy - energy_0,
        "max_energy_error": tree.worst,
    }
    return tree.chosen, stats


@dataclasses.dataclass(frozen=True)
class _Hamiltonian(Learning, Spec):
    """What HMC and NUTS share: the start, the warm-up, the bookkeeping of a chain."""

    target_acceptance: float = 0.8
    metric: str = "auto"
    warmup: int = 1000
    init_radius: float = 2.0

    needs: ClassVar[tuple[str, ...]] = ("log_density", "constrain")
    refit_warmup: ClassVar[int] = 200
    tunes: ClassVar[bool] = True
    brief_start: ClassVar[bool] = True  # `init` runs once: it is made quickly

    def statics(self) -> tuple:
        """The options that are part of the compiled program."""
        return (self.metric,)

    @abc.abstractmethod
    def transition(
        self,
        key: Any,
        point: Point,
        gradient: Gradient,
        metric: Metric | LowRank,
        step: Scalar,
        early: Any,
    ) -> tuple[Point, dict[str, Any]]:
        """One transition: the new point, and its statistics.

        ``early``: whether nothing is known of the scales, so that long trajectories do not pay.
        """

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> HMCState:
        """Find a point with finite density and gradient.

        Args:
            key: the chain's key for its start.
            start: position (D,) to start from, and whether it is given (else uniform draws in
                (-radius, radius) are tried).
        """
        point = first_point(key, start, jax.value_and_grad(target.log_density), settings.radius)
        dtype, shape = point.position.dtype, point.position.shape
        size = jnp.abs(point.gradient)
        scale = jnp.clip(lax.rsqrt(jnp.where(size > 0.0, size, 1.0)), 1e-5, 1e5)
        return HMCState(
            point,
            DualAveraging.start(jnp.asarray(np.log(_FIRST_STEP), dtype)),
            metric_of_scales(self.kind(shape[0]), scale),
            jnp.asarray(settings.phase),
            jnp.asarray(settings.until),
        )

    def refresh(self, state: HMCState, target: Any, settings: Settings) -> HMCState:
        """The state on new data: position, metric and step size stay, the caches are renewed."""
        position = state.point.position
        log_density, grad = jax.value_and_grad(target.log_density)(position)
        log_step = state.averaging.log_average
        return state._replace(
            point=Point(position, log_density, grad),
            averaging=DualAveraging.start(log_step)._replace(centre=log_step),
            phase=jnp.asarray(settings.phase),
            until=jnp.asarray(settings.until),
        )

    def pooled_at(self, state: HMCState) -> int:
        """The iteration after which warm-up pools the chains; 0 once it is over."""
        return int(np.asarray(state.until).max())

    def pool(
        self, state: HMCState, drawn: Draw, stats: dict[str, Any], index: int, warmup: int
    ) -> HMCState:
        """The chains' states, after what they learned of each other: see `warm_up.pooled`."""
        kind = self.kind(state.point.position.shape[-1])
        return warm_up.pooled(kind, self.target_acceptance, state, drawn, stats, index, warmup)

    def failed(self, state: HMCState) -> Any:
        """Whether no starting point was found (per chain)."""
        return ~np.isfinite(np.asarray(state.point.log_density))

    def position(self, state: HMCState) -> Any:
        return state.point.position

    def moved(self, state: HMCState, position: Any) -> HMCState:
        """The state at another position; `refresh` renews its caches."""
        return state._replace(point=state.point._replace(position=position))

    def step(
        self, key: Any, index: Any, state: HMCState, target: Any, settings: Settings
    ) -> tuple[HMCState, Draw, dict[str, Any]]:
        """One transition; the step size adapts to it while it is learned."""
        averaging, phase = state.averaging, state.phase
        adapts = phase < TRIAL
        careful = (phase == OVER) & (index % _CAREFUL == _CAREFUL - 1)
        fixed = averaging.log_average - np.log(2.0) * careful
        step = jnp.exp(jnp.where(adapts, averaging.log_step, fixed))
        early = (phase == METRIC) & (index < EARLY)
        gradient = jax.value_and_grad(target.log_density)
        point, stats = self.transition(key, state.point, gradient, state.metric, step, early)
        renewed = averaging.update(stats["acceptance_rate"], settings.target_acceptance)
        stats = {"lp": point.log_density, "step_size": step, **stats}
        state = state._replace(point=point, averaging=where(adapts, renewed, averaging))
        return state, Draw(point.position, point.gradient), stats

    def values(self, draw: Draw, target: Any) -> dict[str, Any]:
        """Constrained and deterministic sites of one draw."""
        return target.constrain(draw.position)

    # -- as a part of a composition ----------------------------------------------------------

    def require(self, space: Space) -> None:
        """Refuse discrete sites."""
        require_continuous(type(self).__name__, space)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        """The kernel on positions; it adapts while the stage is warm-up."""

        def flat(position: Position) -> tuple[Vector, Callable, Any]:
            vector, unravel = ravel_pytree(dict(position))
            own = SimpleNamespace(log_density=lambda x: target.log_density(unravel(x)))
            return vector, unravel, own

        def settings(dtype: Any) -> Settings:
            return Settings(
                jnp.asarray(self.target_acceptance, dtype),
                jnp.asarray(self.init_radius, dtype),
                jnp.where(stage.warming, STEP, OVER).astype(jnp.int32),
                jnp.zeros((), jnp.int32),
            )

        dense = self.metric == "dense"  # every chain adapts by itself: the diagonal unless asked

        def init(position: Position, key: Any) -> Placed:
            vector, _, own = flat(position)
            start = vector, jnp.asarray(True)
            chain = self.init(key, start, own, settings(vector.dtype))
            chain = chain._replace(metric=Metric.identity(vector, dense))
            return Placed(position, _Composed(chain, Moments.start(vector, dense)))

        def step(key: Any, state: Placed) -> tuple[Placed, dict[str, Any]]:
            continuous(type(self).__name__)
            vector, unravel, own = flat(state.position)
            given = settings(vector.dtype)
            chain, moments = state.kept
            chain = chain._replace(phase=given.phase)
            chain, new, stats = self.step(key, stage.index, chain, own, given)
            if not isinstance(stage.warming, np.bool_) or stage.warming:  # else over for good
                chain, moments = lax.cond(
                    stage.warming,
                    lambda: _windowed(chain, moments, stage),
                    lambda: (chain, moments),
                )
            return Placed(unravel(new.position), _Composed(chain, moments)), stats

        def refresh(state: Placed, position: Position) -> Placed:
            vector, _, own = flat(position)
            point = Point(vector, *jax.value_and_grad(own.log_density)(vector))
            chain = state.kept.chain._replace(point=point)
            return Placed(position, state.kept._replace(chain=chain))

        def tune(state: Placed, cloud: Cloud) -> Placed:
            """Metric: the cloud's (co)variance. Step size: by the acceptance of the last moves."""
            covariance = cloud_covariance(cloud)
            standard = -0.25 * np.log(covariance.shape[0])  # right for a standard normal target
            chain = state.kept.chain
            log_step = next_log_step(
                jnp.where(jnp.isnan(cloud.acceptance), standard, chain.averaging.log_average),
                cloud.acceptance,
                self.target_acceptance,
            )
            inverse = covariance if dense else jnp.diagonal(covariance)
            chain = chain._replace(
                averaging=DualAveraging.start(log_step), metric=Metric.of(inverse)
            )
            return state._replace(kept=state.kept._replace(chain=chain))

        return Kernel(init, step, refresh, tune)


def metric_of_scales(kind: str, scale: Vector) -> Metric | LowRank:
    """A metric of a type with scales (D,) alone."""
    if kind == "low rank":
        dim = scale.shape[0]
        return LowRank(scale, jnp.zeros((RANK, dim), scale.dtype), jnp.zeros(RANK, scale.dtype))
    return Metric(jnp.diag(scale) if kind == "dense" else scale)


def _windowed(chain: HMCState, moments: Moments, stage: Stage) -> tuple[HMCState, Moments]:
    """One iteration of a warm-up in windows, without other chains: Stan's."""
    plan, position = stage.schedule, chain.point.position
    metric: Any = chain.metric
    gathered = where(plan.collects(stage.index), moments.update(position), moments)

    def renew() -> tuple[HMCState, Moments]:
        new = Metric.of(gathered.regularised())
        # A step stable under the old metric is stable under the new one up to the largest change of
        # scale; dual averaging then starts from there.
        change = jnp.max(jnp.log(metric.scales()) - jnp.log(new.scales()))
        averaging = DualAveraging.start(chain.averaging.log_average + change)
        renewed = chain._replace(averaging=averaging, metric=new)
        return renewed, Moments.start(position, moments.squares.ndim == 2)

    return lax.cond(plan.renews(stage.index), renew, lambda: (chain, gathered))


@dataclasses.dataclass(frozen=True)
class HMC(_Hamiltonian):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

    Args:
        steps: leapfrog steps per transition (the cost: one gradient each).
        jitter: every transition scales its step size by a uniform number in 1 -+ jitter, since
            trajectories of one length can run in circles on a Gaussian target.
        target_acceptance: mean acceptance that warm-up tunes the step size to.
        metric: "diagonal", "dense" or "low rank" (scales, and a few directions stretched), learned
            in warm-up; "auto" is dense up to 40 dimensions, low rank above. All can become
            diagonal, and do unless the draws speak for more.
        warmup: default number of warm-up iterations, at most: they end once the metric is as good
            as it gets and the chains agree.
        init_radius: starts are uniform in (-radius, radius) on the unconstrained space.

    Every sixteenth draw takes steps half as long, as those of `NUTS` do.

    Source: Neal (2011), MCMC using Hamiltonian dynamics.
    """

    steps: int = 16
    jitter: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.jitter < 1.0:
            raise OptionError(f"jitter must lie in [0, 1); got {self.jitter}.")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"steps must be an integer >= 1; got {self.steps!r}.")

    def statics(self) -> tuple:
        return (self.metric, self.steps, self.jitter)

    def transition(
        self,
        key: Any,
        point: Point,
        gradient: Gradient,
        metric: Metric | LowRank,
        step: Scalar,
        early: Any,
    ) -> tuple[Point, dict[str, Any]]:
        key, key_jitter = random.split(key)
        stretch = random.uniform(key_jitter, (), step.dtype, 1.0 - self.jitter, 1.0 + self.jitter)
        return hmc_transition(key, point, gradient, metric, stretch * step, self.steps)


@dataclasses.dataclass(frozen=True)
class NUTS(_Hamiltonian):
    """The No-U-Turn sampler: the default for models with continuous latent sites.

    Args:
        target_acceptance: mean acceptance that warm-up tunes the step size to; nearer to 1
            takes smaller steps, which cures most divergences. Where trajectories meet places of
            much larger curvature while the step size is tried, it is shortened, to a quarter of
            the refusals at the least.
        max_depth: trajectories have at most 2^max_depth leapfrog steps.
        metric: "diagonal", "dense" (cost O(D^2) per step) or "low rank" (scales, and a few
            directions stretched: O(D)), learned in warm-up; "auto" is dense up to 40 dimensions,
            low rank above. All can become diagonal, and do unless the draws speak for more.
        warmup: default number of warm-up iterations, at most: they end once the metric is as good
            as it gets and the chains agree.
        init_radius: starts are uniform in (-radius, radius) on the unconstrained space.

    Every sixteenth draw takes steps half as long, so that a chain that comes to a place of much
    larger curvature gets away from it.

    Source: Hoffman and Gelman (2014); Betancourt (2017).
    """

    max_depth: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.max_depth, int) or not 1 <= self.max_depth <= 20:
            raise OptionError(f"max_depth must be an integer in 1..20; got {self.max_depth!r}.")

    def statics(self) -> tuple:
        return (self.metric, self.max_depth)

    def transition(
        self,
        key: Any,
        point: Point,
        gradient: Gradient,
        metric: Metric | LowRank,
        step: Scalar,
        early: Any,
    ) -> tuple[Point, dict[str, Any]]:
        limit = jnp.where(early, min(_EARLY_DEPTH, self.max_depth), self.max_depth)
        return nuts_transition(key, point, gradient, metric, step, self.max_depth, limit)
