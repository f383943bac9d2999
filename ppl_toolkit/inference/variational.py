"""Stochastic variational inference: a law of a family, learned along gradients of its bound.

Source: Hoffman, Blei, Wang, Paisley (2013), JMLR 14; Kucukelbir, Tran, Ranganath, Gelman, Blei
(2017), Automatic differentiation variational inference, JMLR 18; Kingma and Ba (2015) for Adam.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int

from ppl_toolkit import minibatches
from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.ascent import Adam, ascended, require_optimizer
from ppl_toolkit.inference.climbing import start_within
from ppl_toolkit.inference.guides import Guide, guide_of
from ppl_toolkit.inference.importance import Approximated, Approximation, Learned, Settings
from ppl_toolkit.inference.step_sizes import require_count, require_positive
from ppl_toolkit.program import Program

__all__ = ["SVI"]

_STRETCHES = 200  # of the warm-up, whose mean bounds are kept

Vector = Float[Array, " D"]
Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class _OfRows:
    """Log p of a flat vector where subsampled plates see given rows: a function of a program."""

    def example(self, program: Program) -> Any:
        rows = {plate: index for plate, (_, index) in program.subsampled.items()}
        return jax.ShapeDtypeStruct((program.size,), program.precision), rows

    def __call__(
        self, program: Program, given: tuple[Vector, Mapping[str, Any]], data: Sequence[Any]
    ) -> Scalar:
        flat, rows = given
        return sum(minibatches.log_parts_of_rows(program, (program.unravel(flat), rows), data))


@dataclasses.dataclass(frozen=True)
class _OfAll:
    """The same where they see all their rows."""

    def example(self, program: Program) -> Any:
        return jax.ShapeDtypeStruct((program.size,), program.precision)

    def __call__(self, program: Program, flat: Vector, data: Sequence[Any]) -> Scalar:
        return sum(minibatches.whole_log_parts(program, program.unravel(flat), data))


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """An optimiser whose steps are multiplied by a number."""

    optimizer: Any
    factor: Any

    def update(self, gradient: Any, state: Any, x: Any) -> tuple[Any, Any]:
        change, state = self.optimizer.update(gradient, state, x)
        return jax.tree.map(lambda c: jnp.asarray(self.factor * c, c.dtype), change), state


class Fit(NamedTuple):
    """What is learned.

    Attributes:
        parameters: of the guide, unconstrained.
        origin: the point that the law began at, (D,).
        optimizer: its state.
        elbo, looks: sums of the bound's estimates along every stretch of the warm-up, and how many
            there were, (200,).
        taken, skipped: steps, and those that were not finite.
    """

    parameters: dict[str, Any]
    origin: Vector
    optimizer: Any
    elbo: Float[Array, " S"]
    looks: Int[Array, " S"]
    taken: Int[Array, ""]
    skipped: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVI(Approximated):
    """Stochastic variational inference: the law of a family with the largest bound (ELBO).

    The bound is E_q[log p - log q] on the unconstrained space, p the unnormalised posterior; its
    gradient is estimated by draws of q that move with the parameters. Warm-up iterations are the
    steps of learning. Discrete sites are summed out, as for NUTS. Plates with ``subsample_size=``
    see new rows at every step; the importance weights at the end are by all rows.

    Laws that leave out correlations ("normal") have variances that are too small: on a normal
    posterior of precision A, 1 / A_ii instead of (A^-1)_ii. k-hat tells.

    Args:
        guide: the family: "multivariate_normal", "normal" (independent), "low rank", "iaf", "bnaf"
            (flows), one of NumPyro's automatic guides as a class or a `functools.partial` of that,
            or a function of the model's arguments that draws its sites (a guide as NumPyro has it).
        steps: of learning; the default number of warm-up iterations.
        particles: draws behind every gradient.
        optimizer: a rate of `Adam` to begin with, which falls to zero along half a cosine; or one
            of optax's (made once and passed again: a new one compiles anew), or `Adam(...)`.
        resample: whether draws are resampled by importance weights.
        pool_size: draws of q that are weighed together, and the default number of draws.
        init_radius: chains begin at points uniform in (-radius, radius), with a narrow law.

    Raises:
        OptionError: an option out of its range; a guide that is none.
        MethodError (from `infer`): the guide does not serve the model.
        SamplingError (from `infer`): most steps were not finite.

    Cost: ``particles`` gradients a step, and what a draw of the guide costs: O(D) for "normal",
    O(D^2) for "multivariate_normal"; then a density per draw. The bound is kept by stretches of the
    warm-up, as ``elbo`` in the group ``approximation``.

    Source: Kucukelbir et al. (2017); the guides are NumPyro's.
    """

    guide: Any = "multivariate_normal"
    steps: int = 3000
    particles: int = 8
    optimizer: Any = 0.05
    minibatched: bool = dataclasses.field(default=False, init=False, repr=False)

    refit_warmup: ClassVar[int] = 1000
    minibatches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("steps", self.steps)
        require_count("particles", self.particles)
        if isinstance(self.optimizer, int | float | np.number):
            require_positive("optimizer", self.optimizer)
            object.__setattr__(self, "optimizer", float(self.optimizer))
        else:
            require_optimizer(self.optimizer)
        guide_of(self.guide)

    @property
    def warmup(self) -> int:
        return self.steps

    @property
    def said(self) -> str:  # type: ignore[override]
        return f"the law that SVI learned of the family {self._guide.label}"

    @property
    def _guide(self) -> Guide:
        return guide_of(self.guide)

    @property
    def _rate(self) -> float | None:
        return self.optimizer if isinstance(self.optimizer, float) else None

    @property
    def _optimizer(self) -> Any:
        return self.optimizer if self._rate is None else Adam(1.0)

    def on(self, program: Program) -> SVI:
        method = copy.copy(self)  # ``minibatched`` is no option
        object.__setattr__(method, "minibatched", bool(program.subsampled))
        return method

    @property
    def needs(self) -> tuple[Any, ...]:
        densities = ("rows", _OfRows(), _OfAll()) if self.minibatched else ("log_density",)
        return (*densities, "constrain", *self._guide.needs)

    def check(self, program: Program) -> None:
        """Refuse what NUTS refuses, and guides that do not serve the program."""
        super().check(program)
        if program.subsampled:
            if program.discrete:
                raise MethodError(
                    "SVI sums discrete sites out where plates see all their rows; leave "
                    "subsample_size= out."
                )
            program.require_minibatches("SVI", whole=True)
        self._guide.require(program)

    def statics(self) -> tuple:
        optimizer = None if self._rate is not None else self.optimizer
        return (
            self.resample, self.pool_size, self.guide, self.particles, optimizer, self.minibatched,
        )  # fmt: skip

    def settings(self, program: Program, warmup: int) -> Settings:
        rate = () if self._rate is None else np.asarray(self._rate, program.precision)
        return super().settings(program, warmup)._replace(rate=rate)

    def density(self, target: Any) -> Callable[[Vector], Scalar]:
        return target.functions[_OfAll()] if self.minibatched else target.log_density

    def blank(self, key: Any, position: Vector, target: Any) -> Fit:
        return self._fresh(self._guide.start(key, position, target), position)

    def _fresh(self, parameters: Any, origin: Vector) -> Fit:
        none = jnp.zeros((), jnp.int32)
        blank = jnp.zeros(_STRETCHES, origin.dtype)
        state = self._optimizer.init(parameters)
        looks = jnp.zeros(_STRETCHES, jnp.int32)
        return Fit(parameters, origin, state, blank, looks, none, none)

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> Approximation:
        """A narrow law where the density is finite, or at the given start."""
        position, given = start
        key_start, key_rest = random.split(key)
        drawn = start_within(self.density(target), key_start, position, settings.radius)
        return super().init(key_rest, (jnp.where(given, position, drawn), given), target, settings)

    def renewed(self, state: Approximation) -> tuple[Any, tuple[Vector, Any]]:
        law: Fit = state.law
        return self._fresh(law.parameters, law.origin), state.given

    def centre(self, law: Fit) -> Vector:
        return law.origin

    def learned(
        self, key: Any, index: Any, state: Approximation, target: Any, settings: Settings
    ) -> Learned:
        """One step while there is warm-up."""
        law: Fit = state.law
        guide = self._guide
        key_rows, key_draws = random.split(key)
        if self.minibatched:
            rows, of_rows = target.rows(key_rows), target.functions[_OfRows()]
            density = lambda x: of_rows((x, rows))  # noqa: E731
        else:
            density = target.log_density

        def term(parameters: Any, number: Any) -> Scalar:
            own = random.fold_in(key_draws, number)
            x, log_q = guide.draw(own, parameters, law.origin, target)
            return density(x) - log_q

        def bound(parameters: Any) -> Scalar:
            numbers = jnp.arange(self.particles, dtype=jnp.int32)
            return jnp.mean(jax.vmap(term, (None, 0))(parameters, numbers))

        def learn() -> Learned:
            elbo, gradient = jax.value_and_grad(bound)(law.parameters)
            optimizer, share = self._optimizer, index / jnp.maximum(settings.warmup, 1)
            if self._rate is not None:
                falling = 0.5 * (1.0 + jnp.cos(jnp.pi * share))
                optimizer = _Scaled(optimizer, settings.rate * falling)
            parameters, kept, fine = ascended(optimizer, gradient, law.optimizer, law.parameters)
            counts = jnp.isfinite(elbo)
            stretch = index * _STRETCHES // jnp.maximum(settings.warmup, 1)
            fit = Fit(
                parameters, law.origin, kept,
                law.elbo.at[stretch].add(jnp.where(counts, elbo, 0.0)),
                law.looks.at[stretch].add(counts.astype(jnp.int32)),
                law.taken + 1, law.skipped + (~fine).astype(jnp.int32),
            )  # fmt: skip
            return Learned(fit, jnp.asarray(self.particles, jnp.int32))

        rest = Learned(law, jnp.zeros((), jnp.int32))
        return lax.cond(index < settings.warmup, learn, lambda: rest)

    def drawn(self, key: Any, number: Any, law: Fit, target: Any) -> tuple[Vector, Scalar]:
        return self._guide.draw(key, law.parameters, law.origin, target)

    def told(self, law: Fit) -> dict[str, tuple[tuple[str, ...], Any]]:
        """The bound along the warm-up: its means, and the step in the middle of each."""
        there = (law.looks > 0).all(axis=0)
        looks, sums = law.looks[:, there], law.elbo[:, there]
        ends = np.cumsum(looks, axis=1)
        return {
            "elbo": (("chain", "stretch"), sums / looks),
            "elbo_step": (("chain", "stretch"), ends - 0.5 * looks),
        }

    def problem(self, state: Approximation) -> str:
        """Said if most steps were not finite."""
        skipped, taken = np.asarray(state.law.skipped), np.asarray(state.law.taken)
        if not np.any(bad := 2 * skipped > taken):
            return ""
        return (
            f"chains {np.flatnonzero(bad).tolist()}: most steps were not finite. Start where the "
            "density is (init='prior', or the result of Pathfinder), or take a smaller rate: "
            "optimizer=0.01."
        )
