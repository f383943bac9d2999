"""Slice sampling along one direction after another; needs no gradients.

A slice of the density is what lies above a level drawn uniformly below the density of the current
point. A new point is uniform on the slice along a line: an interval is stepped out until both ends
are off the slice, and shrunk towards the current point until a point of it is on the slice. Nothing
is rejected, and no step size has to be right: a width of the wrong size costs evaluations.

Source: Neal (2003), Annals of Statistics 31, figures 3 and 5, as blackjax has it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.adaptation import Moments, Schedule, schedule
from ppl_toolkit.inference.first_point import first_finite
from ppl_toolkit.inference.kernel import (
    SAMPLING,
    Cloud,
    Info,
    Kernel,
    Placed,
    Spec,
    Stage,
    require_continuous,
)
from ppl_toolkit.inference.randomness import continuous
from ppl_toolkit.inference.scaling import MOST_DENSE
from ppl_toolkit.inference.step_sizes import (
    require_count,
    require_positive,
    require_radius,
    require_warmup,
)
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.inference.tuning import cloud_covariance
from ppl_toolkit.positions import Position

__all__ = ["Slice"]

_TRIES = 200  # starting points drawn before giving up
_SHRINKS = 200  # of an interval, each to two thirds on average: enough for any width
_LEAST = 1e-20  # of a variance
_DIRECTIONS = ("auto", "coordinates", "covariance")


class Lines(NamedTuple):
    """What slice sampling keeps.

    Attributes:
        log_density: at the position.
        directions: columns as long as the interval that is stepped out, (D, D); or the lengths of
            those along the coordinates, (D,).
        moments: what the next directions are made of.
    """

    log_density: Float[Array, ""]
    directions: Float[Array, "D D"] | Float[Array, " D"]
    moments: Moments


class Chain(NamedTuple):
    """The state of a chain of the method.

    Attributes:
        kernel: that of the kernel, on the flat vector.
        until: the iteration after which chains are pooled; 0 once warm-up is over.
    """

    kernel: Placed
    until: Int[Array, ""]


class Settings(NamedTuple):
    """Options that are arguments of the compiled program.

    Attributes:
        radius: of the random starts.
        schedule: of what chains learn by themselves: widths, at first.
        until: when they are pooled first.
    """

    radius: Any
    schedule: Schedule
    until: Any


@dataclasses.dataclass(frozen=True)
class Slice(Spec):
    """Slice sampling: one direction after the other, in random order, without gradients.

    For densities that have no gradient, or a useless one: steps, kinks, change points, thresholds.
    Works on the unconstrained space, alone or as a piece: ``block(Slice(), ["tau"])``. A draw is a
    sweep over as many directions as there are unknowns. Warm-up learns directions and widths: at
    first from the intervals it finds, then from the covariance of the draws (Cholesky factor,
    correlations shrunk), so that unknowns that depend on each other move together; alone, from the
    draws of all chains, so that intervals reach to where other chains are. They are fixed
    afterwards.

    Args:
        directions: "covariance", or "coordinates" for axes whose widths alone are learned; "auto"
            is the former up to 40 unknowns, the latter above.
        width: of the first interval, in standard deviations.
        max_expansions: an interval grows to so many widths at most.
        warmup: default number of warm-up sweeps.
        init_radius: starts are uniform in (-radius, radius) on the unconstrained space.

    Raises:
        OptionError: an option is out of its range.

    Cost: some five log densities per unknown and sweep, and D of storage (D^2 with "covariance").
    Statistics: ``n_evaluations`` of the density in a sweep; ``n_steps`` of gradients is zero.
    Source: Neal (2003), Slice sampling, Annals of Statistics 31.
    """

    directions: str = "auto"
    width: float = 3.0
    max_expansions: int = 10
    warmup: int = 1000
    init_radius: float = 2.0

    needs: ClassVar[tuple[str, ...]] = ("log_density", "constrain")
    refit_warmup: ClassVar[int] = 200
    tunes: ClassVar[bool] = True
    brief_start: ClassVar[bool] = True  # `init` runs once: it is made quickly

    def __post_init__(self) -> None:
        if self.directions not in _DIRECTIONS:
            raise OptionError(f"directions must be one of {_DIRECTIONS}; got {self.directions!r}.")
        require_positive("width", self.width)
        require_count("max_expansions", self.max_expansions)
        require_warmup(self.warmup)
        require_radius(self.init_radius)

    # -- as a kernel ---------------------------------------------------------------------------

    def require(self, space: Space) -> None:
        require_continuous(type(self).__name__, space)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        """The kernel on positions; it adapts while the stage is warm-up."""

        def init(position: Position, key: Any) -> Placed:
            x, _ = ravel_pytree(dict(position))
            dense = self._dense(x.size)
            directions = jnp.eye(x.size, dtype=x.dtype) if dense else jnp.ones_like(x)
            moments = Moments.start(x, dense)
            return Placed(dict(position), Lines(target.log_density(position), directions, moments))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            continuous(type(self).__name__)
            x, unravel = ravel_pytree(dict(state.position))
            lines: Lines = state.kept
            x, log_density, brackets, evaluations = self._sweep(
                key, x, lines, lambda y: target.log_density(unravel(y))
            )
            lines = lines._replace(log_density=log_density)
            if not isinstance(stage.warming, np.bool_) or stage.warming:  # else over for good
                lines = lax.cond(
                    stage.warming,
                    lambda: self._adapted(lines, x, brackets, stage),
                    lambda: lines,
                )
            info = {"n_steps": jnp.zeros((), jnp.int32), "n_evaluations": evaluations}
            return Placed(unravel(x), lines), info

        def refresh(state: Placed, position: Position) -> Placed:
            lines = state.kept._replace(log_density=target.log_density(position))
            return Placed(dict(position), lines)

        def tune(state: Placed, cloud: Cloud) -> Placed:
            directions = self._of_covariance(cloud_covariance(cloud), state.kept.directions)
            return state._replace(kept=state.kept._replace(directions=directions))

        return Kernel(init, step, refresh, tune)

    def _dense(self, size: int) -> bool:
        if self.directions == "auto":
            return size <= MOST_DENSE
        return self.directions == "covariance"

    def _sweep(self, key: Any, x: Any, lines: Lines, log_density: Any) -> tuple[Any, Any, Any, Any]:
        """One slice along every direction, in random order.

        Returns:
            The new point and its log density; how many widths every interval had; evaluations.
        """
        from blackjax.mcmc import slice as blackjax

        directions = lines.directions

        def along(key: Any, x: Any, log_density: Any, i: Any) -> Any:
            def point(t: Any) -> tuple[Any, Any]:
                if directions.ndim == 1:
                    y = x.at[i].add(t * directions[i])
                else:
                    y = x + t * directions[:, i]
                value = log_density(y)
                # A uniform number can be zero, and the level minus infinity with it.
                return blackjax.SliceState(y, value), jnp.isfinite(value)

            return point

        kernel = blackjax.build_coordinate_kernel(
            interval=blackjax.stepping_out,
            axis_proposal=along,
            max_expansions=self.max_expansions,
            max_shrinkage=_SHRINKS,
        )
        new, info = kernel(key, blackjax.SliceState(x, lines.log_density), log_density)
        brackets = info.bracket_right - info.bracket_left
        evaluations = 2 * x.size + info.num_expansions + info.num_shrink  # both ends, and the rest
        return new.position, new.logdensity, brackets, evaluations.astype(jnp.int32)

    def _adapted(self, lines: Lines, x: Any, brackets: Any, stage: Stage) -> Lines:
        """One step of the warm-up: at first widths alone, then directions, in windows."""
        plan = stage.schedule
        # An interval should have two widths: an end is off the slice, and little was too much.
        by_interval = lines.directions * (0.5 * brackets)
        early = stage.index < plan.first
        directions = jnp.where(early, by_interval, lines.directions)
        collects, updated = plan.collects(stage.index), lines.moments.update(x)
        moments = Moments(
            *(
                jnp.where(collects, new, old)
                for new, old in zip(updated, lines.moments, strict=True)
            )
        )

        def renewed() -> Lines:
            made = moments.regularised()
            if made.ndim == 2:
                made = _decorrelated(made, moments.draws)
            made = self._of_covariance(made, directions)
            return lines._replace(directions=made, moments=Moments.start(x, directions.ndim == 2))

        kept = lines._replace(directions=directions, moments=moments)
        return lax.cond(plan.renews(stage.index), renewed, lambda: kept)

    def _of_covariance(self, covariance: Any, like: Any) -> Any:
        """Directions by a covariance, (D, D), or by variances."""
        if like.ndim == 2:
            return self.width * jnp.linalg.cholesky(covariance)
        return self.width * jnp.sqrt(
            jnp.diagonal(covariance) if covariance.ndim == 2 else covariance
        )

    # -- as a method -----------------------------------------------------------------------------

    def check(self, program: Any) -> None:
        """Refuse programs without continuous latent sites, or whose discrete ones do not sum."""
        program.require_gradients(type(self).__name__)

    def statics(self) -> tuple:
        return (self.directions, self.width, self.max_expansions)

    def settings(self, program: Any, warmup: int) -> Settings:
        plan = schedule(warmup)
        alone = plan._replace(last=plan.first, ends=np.full_like(plan.ends, -1))
        radius = np.asarray(self.init_radius, program.precision)
        return Settings(radius, alone, np.asarray(_next_pooling(warmup, 0), np.int32))

    def _on_vector(self, target: Any, index: Any, settings: Settings) -> Kernel:
        own = Target.of(lambda position: target.log_density(position["x"]))
        return self.bind(own, Stage(index, settings.schedule))

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> Chain:
        """A point of finite density: the given one, or the first of 200 uniform draws."""
        flat, given = start

        def draw(number: Any) -> Any:
            uniform = random.uniform(random.fold_in(key, number), flat.shape, flat.dtype, -1.0, 1.0)
            return jnp.where(given, flat, settings.radius * uniform)

        x, _ = first_finite(
            draw, lambda x: jnp.isfinite(target.log_density(x)), jnp.where(given, 1, _TRIES)
        )
        kernel = self._on_vector(target, np.int32(0), settings)
        return Chain(kernel.init({"x": x}, key), jnp.asarray(settings.until))

    def refresh(self, state: Chain, target: Any, settings: Settings) -> Chain:
        kernel = self._on_vector(target, np.int32(0), settings)
        placed = kernel.refresh(state.kernel, state.kernel.position)
        return Chain(placed, jnp.asarray(settings.until))

    def step(
        self, key: Any, index: Any, state: Chain, target: Any, settings: Settings
    ) -> tuple[Chain, Any, dict[str, Any]]:
        placed, info = self._on_vector(target, index, settings).step(key, state.kernel)
        stats = {"lp": placed.kept.log_density, **info}
        return state._replace(kernel=placed), placed.position["x"], stats

    def pooled_at(self, state: Chain) -> int:
        """The iteration after which warm-up pools the chains; 0 once it is over."""
        return int(np.asarray(state.until).max())

    def pool(
        self, state: Chain, drawn: Any, stats: dict[str, Any], index: int, warmup: int
    ) -> Chain:
        """The chains' states with directions from the draws of all since the last time."""
        plan, lines = schedule(warmup), state.kernel.kept
        if index - 1 in plan.ends:
            first = int(plan.first) - (index - drawn.shape[1])  # draws before are on their way
            x = np.asarray(drawn, float)[:, max(first, 0) :].reshape(-1, drawn.shape[2])
            made = self._of_draws(x, dense=lines.directions.ndim == 3)
            every = np.broadcast_to(made.astype(lines.directions.dtype), lines.directions.shape)
            kept = lines._replace(directions=every.copy())
            state = state._replace(kernel=state.kernel._replace(kept=kept))
        until: Any = np.full_like(state.until, _next_pooling(warmup, index))
        return state._replace(until=until)

    def _of_draws(self, x: np.ndarray, dense: bool) -> np.ndarray:
        """Directions from draws (N, D)."""
        centred = x - x.mean(0)
        if not dense:
            return self.width * np.sqrt(np.maximum(centred.var(0), _LEAST))
        covariance = centred.T @ centred / len(x) + _LEAST * np.eye(x.shape[1])
        return self.width * np.linalg.cholesky(_decorrelated(covariance, len(x)))

    def values(self, draw: Any, target: Any) -> dict[str, Any]:
        """Constrained and deterministic sites of one draw."""
        return target.constrain(draw)

    def failed(self, state: Chain) -> Any:
        """Whether no starting point was found (per chain)."""
        return ~np.isfinite(np.asarray(state.kernel.kept.log_density))


def _next_pooling(warmup: int, index: int) -> int:
    """The iteration after ``index`` by which chains are pooled; 0 if they are no more."""
    return next((int(end) + 1 for end in schedule(warmup).ends if end >= max(index, 0)), 0)


def _decorrelated(covariance: Any, n: Any) -> Any:
    """A covariance of N draws, correlations shrunk towards zero with the weight of D draws.

    Even of few draws it has an inverse then.
    """
    size = covariance.shape[0]
    return covariance * (n + size * np.eye(size)) / (n + size)
