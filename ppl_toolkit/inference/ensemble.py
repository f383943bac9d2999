"""Many chains in lock step that adapt together: what ChEES and MAMS share.

All chains take trajectories of one length at a time, a share of the longest that goes through a
low-discrepancy sequence, so that no chain waits for another one. In warm-up the chains share

- a step size, by dual averaging of their acceptance;
- the longest trajectory, by stochastic ascent of the ChEES criterion;
- a metric, renewed between segments of warm-up from the draws and gradients of all chains.

Source: Hoffman, Radul and Sountsov (2021), An adaptive-MCMC scheme for setting trajectory lengths
in Hamiltonian Monte Carlo, AISTATS.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int

from ppl_toolkit.inference import scaling, warm_up
from ppl_toolkit.inference.adaptation import DualAveraging, LowRank, Metric
from ppl_toolkit.inference.ascent import Adam, ascended
from ppl_toolkit.inference.hmc import Draw, metric_of_scales
from ppl_toolkit.inference.learning import Learning, Settings
from ppl_toolkit.inference.step_sizes import require_count
from ppl_toolkit.inference.trajectory import (
    Flight,
    Gradient,
    Phase,
    Point,
    Scalar,
    first_point,
    metropolis,
)
from ppl_toolkit.inference.warm_up import EARLY, METRIC, OVER, STEP, Plan

__all__ = ["Ensemble", "EnsembleState", "Length", "chees", "chees_gradient", "halton"]

_FIRST_STEP = 0.1  # in units of a chain's speed
_EARLY_STEPS = 16  # of a trajectory while nothing is known of the scales
_ASCENT = Adam(0.025, memory=(0.0, 0.95))
_FORGETS = 0.5  # log lengths count as t^-0.5 when they are averaged


class Length(NamedTuple):
    """The longest trajectory, and how it is learned.

    Attributes:
        log_length: log of the length to use next.
        log_average: log of the averaged length, used after warm-up.
        updates: number of updates since the last restart.
        moments: of the optimiser.
    """

    log_length: Float[Array, ""]
    log_average: Float[Array, ""]
    updates: Float[Array, ""]
    moments: Any

    @classmethod
    def start(cls, log_length: Float[Array, ""]) -> Length:
        return cls(log_length, log_length, jnp.zeros_like(log_length), _ASCENT.init(log_length))

    def update(self, gradient: Scalar, least: Scalar, most: Scalar) -> Length:
        """One step up the criterion's gradient with respect to the log length, between bounds."""
        log_length, moments, _ = ascended(_ASCENT, gradient, self.moments, self.log_length)
        log_length = jnp.clip(log_length, least, most)
        weight = (self.updates + 1.0) ** -_FORGETS
        log_average = weight * log_length + (1.0 - weight) * self.log_average
        return Length(log_length, log_average, self.updates + 1.0, moments)


class EnsembleState(NamedTuple):
    """The state of every chain; all but the point is the same for all of them.

    Attributes:
        point: current position, its log density and gradient.
        averaging: the step size and its adaptation.
        length: the longest trajectory and its adaptation.
        metric: the coordinates in use.
        phase: what warm-up learns at present, see `warm_up`.
        until: the iteration after which chains are pooled; 0 once warm-up is over.
    """

    point: Point
    averaging: DualAveraging
    length: Length
    metric: Metric | LowRank
    phase: Int[Array, ""]
    until: Int[Array, ""]


def halton(index: Int[Array, ""], dtype: Any) -> Scalar:
    """Element ``index`` (from 0) of the sequence 1/2, 1/4, 3/4, 1/8, 5/8, ... of base two.

    The digits of index + 1 in reverse order behind the point.
    """
    bits = (index + 1).astype(jnp.uint32)
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        low = np.uint32(mask)
        bits = ((bits >> shift) & low) | ((bits & low) << shift)
    bits = (bits >> 16) | (bits << 16)
    return bits.astype(dtype) * np.asarray(2.0**-32, dtype)


def chees(before: Float[Array, "C D"], after: Float[Array, "C D"]) -> Scalar:
    """The criterion: a quarter of the mean square change of squared distances from the centre."""
    change = jnp.sum(after**2, 1) - jnp.sum(before**2, 1)
    return 0.25 * jnp.mean(change**2)


def chees_gradient(
    before: Float[Array, "C D"],
    after: Float[Array, "C D"],
    velocity: Float[Array, "C D"],
    acceptance: Float[Array, " C"],
) -> Scalar:
    """The derivative of the criterion with respect to the time of trajectories.

    Chains count by their acceptance, those that went nowhere finite not at all.

    Args:
        before, after: coordinates z of the chains at the ends of trajectories.
        velocity: dz/dt after them.
        acceptance: probability that the chain goes there.
    """
    fine = jnp.all(jnp.isfinite(after) & jnp.isfinite(velocity), 1)
    weight = jnp.where(fine, acceptance, 0.0)
    after, velocity = (jnp.where(fine[:, None], x, 0.0) for x in (after, velocity))
    total = jnp.sum(weight) + jnp.finfo(after.dtype).tiny
    before = before - jnp.mean(before, 0)
    after = after - weight @ after / total
    change = jnp.sum(after**2, 1) - jnp.sum(before**2, 1)
    return weight @ (change * jnp.sum(after * velocity, 1)) / total


@dataclasses.dataclass(frozen=True)
class Ensemble(Learning):
    """An ensemble of chains: the start, the warm-up, one transition of all chains.

    `flight` is what makes it ChEES-HMC or MAMS.
    """

    target_acceptance: float
    metric: str = "auto"
    max_steps: int = 1000
    warmup: int = 400
    init_radius: float = 2.0

    needs: ClassVar[tuple[str, ...]] = ("log_density", "constrain")
    together: ClassVar[bool] = True
    chains: ClassVar[int] = 64
    superchains: ClassVar[int] = 16
    draws: ClassVar[int] = 128
    refit_warmup: ClassVar[int] = 100
    brief_start: ClassVar[bool] = True  # `init` runs once: it is made quickly

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("max_steps", self.max_steps)

    # -- what the dynamics are --------------------------------------------------------------

    @abc.abstractmethod
    def flight(
        self, key: Any, point: Point, gradient: Gradient, metric: Any, step: Scalar, steps: Any
    ) -> Flight:
        """A trajectory of one chain with a new momentum."""

    @abc.abstractmethod
    def mean_acceptance(self, acceptance: Float[Array, " C"]) -> Scalar:
        """What the step size is tuned by."""

    @abc.abstractmethod
    def speed(self, dim: int) -> float:
        """Of one of the coordinates z, typically."""

    # -- the method -------------------------------------------------------------------------

    def statics(self) -> tuple:
        """The options that are part of the compiled program."""
        return (self.metric, self.max_steps)

    def init(self, keys: Any, start: Any, target: Any, settings: Settings) -> EnsembleState:
        """First points of all chains; scales from their gradients."""
        gradient = jax.value_and_grad(target.log_density)
        points = jax.vmap(lambda key, *own: first_point(key, own, gradient, settings.radius))(
            keys, *start
        )
        dtype, (lanes, dim) = points.position.dtype, points.position.shape
        size = jnp.mean(jnp.abs(points.gradient), 0)
        scale = jnp.clip(lax.rsqrt(jnp.where(size > 0.0, size, 1.0)), 1e-5, 1e5)
        speed = self.speed(dim)
        shared = (
            DualAveraging.start(jnp.asarray(np.log(_FIRST_STEP / speed), dtype)),
            Length.start(jnp.asarray(-np.log(speed), dtype)),
            metric_of_scales(self.kind(dim), scale),
            jnp.asarray(settings.phase),
            jnp.asarray(settings.until),
        )
        return EnsembleState(points, *_for_all(shared, lanes))

    def refresh(self, state: EnsembleState, target: Any, settings: Settings) -> EnsembleState:
        """The state on new data: positions and what was learned stay, the caches are renewed."""
        positions = state.point.position
        points = Point(positions, *jax.vmap(jax.value_and_grad(target.log_density))(positions))
        log_step, log_length = state.averaging.log_average[0], state.length.log_average[0]
        shared = (
            DualAveraging.start(log_step)._replace(centre=log_step),
            Length.start(log_length),
            jnp.asarray(settings.phase),
            jnp.asarray(settings.until),
        )
        averaging, length, phase, until = _for_all(shared, len(positions))
        return EnsembleState(points, averaging, length, state.metric, phase, until)

    def step(
        self, keys: Any, index: Any, state: EnsembleState, target: Any, settings: Settings
    ) -> tuple[EnsembleState, Draw, dict[str, Any]]:
        """One transition of all chains; what they share adapts to it while it is learned."""
        before = state.point
        averaging, length, metric, phase = jax.tree.map(
            lambda x: x[0], (state.averaging, state.length, state.metric, state.phase)
        )
        lanes, dtype = len(before.log_density), before.log_density.dtype
        warming = phase != OVER
        step = jnp.exp(jnp.where(warming, averaging.log_step, averaging.log_average))
        longest = jnp.exp(jnp.where(warming, length.log_length, length.log_average))
        share, early = halton(index, dtype), (phase == METRIC) & (index < EARLY)
        most = jnp.where(early, min(_EARLY_STEPS, self.max_steps), self.max_steps)
        steps = jnp.ceil(jnp.clip(share * longest / step, 1, most)).astype(jnp.int32)
        gradient = jax.value_and_grad(target.log_density)

        def move(key: Any, point: Point) -> tuple[Point, dict[str, Any], Phase]:
            key_momentum, key_accept = random.split(key)
            flight = self.flight(key_momentum, point, gradient, metric, step, steps)
            return *metropolis(key_accept, point, flight), flight.end

        points, stats, ends = jax.vmap(move)(keys, before)
        acceptance = stats["acceptance_rate"]

        def learned() -> tuple[DualAveraging, Length]:
            centre = jnp.mean(before.position, 0)
            first, last = (metric.coordinates(p.position - centre) for p in (before, ends.point))
            weights = jnp.where(stats["diverging"], 0.0, acceptance)
            # with respect to the log of the longest: trajectories take a share of it
            slope = share * longest * chees_gradient(first, last, ends.momentum, weights)
            bounds = jnp.log(step), jnp.log(step * self.max_steps)
            return (
                averaging.update(self.mean_acceptance(acceptance), settings.target_acceptance),
                length.update(slope, *bounds),
            )

        averaging, length = _for_all(lax.cond(warming, learned, lambda: (averaging, length)), lanes)
        told = {"step_size": step, "trajectory_length": longest, "n_steps": steps}
        stats = {"lp": points.log_density, **stats, **_for_all(told, lanes)}
        state = state._replace(point=points, averaging=averaging, length=length)
        return state, Draw(points.position, points.gradient), stats

    def values(self, draw: Draw, target: Any) -> dict[str, Any]:
        """Constrained and deterministic sites of one draw of one chain."""
        return target.constrain(draw.position)

    def pooled_at(self, state: EnsembleState) -> int:
        """The iteration after which warm-up looks at the chains; 0 once it is over."""
        return int(np.max(np.asarray(state.until)))

    def pool(
        self, state: EnsembleState, drawn: Any, stats: dict[str, Any], index: int, warmup: int
    ) -> EnsembleState:
        """The state after a segment of warm-up that ends before iteration ``index`` (NumPy).

        The metric is renewed until it suits the draws and the chains agree; a last stretch settles
        the step size and the length.
        """
        plan, segment = Plan.of(warmup), warm_up.Drawn(drawn.position, drawn.gradient, stats)
        state = warm_up.unstuck(state, segment)
        if int(np.max(state.phase)) != METRIC:
            return warm_up.spread(state, phase=OVER, until=0)
        kind = self.kind(state.point.position.shape[-1])
        metric, log_step, arrived = warm_up.next_metric(kind, state, segment, together=True)
        positions = np.concatenate([x for x, _ in segment.folds(together=True)])
        log_length = self._quarter_turn(metric, positions, float(state.length.log_average[0]))
        moments = jax.tree.map(np.zeros_like, state.length.moments)
        ends = [end for end in plan.ends if end > index]
        last = arrived or not ends
        return warm_up.spread(
            state, metric=metric,
            averaging=warm_up.restarted(log_step, np.log(10.0) if index <= EARLY else np.log(2.0)),
            length=Length(log_length, log_length, 0.0, moments),  # type: ignore[arg-type]
            phase=STEP if last else METRIC, until=index + plan.last if last else ends[0],
        )  # fmt: skip

    def _quarter_turn(self, metric: Any, positions: np.ndarray, otherwise: float) -> float:
        """The log time of a quarter turn along the widest direction of a Gaussian.

        Where the criterion of one has its first maximum; longer trajectories have others.
        """
        try:
            far = scaling.extent(metric, positions) / self.speed(positions.shape[1])
        except np.linalg.LinAlgError:  # too far out to be squared
            return otherwise
        return np.log(0.5 * np.pi * far) if 0.0 < far < np.inf else otherwise

    def failed(self, state: EnsembleState) -> Any:
        """Which chains found no starting point."""
        return ~np.isfinite(np.asarray(state.point.log_density))


def _for_all(shared: Any, lanes: int) -> Any:
    """What all chains share, once for every chain."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (lanes, *jnp.shape(x))), shared)
