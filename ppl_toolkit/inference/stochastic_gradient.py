"""Stochastic-gradient Markov chain Monte Carlo: Langevin, Hamiltonian, thermostat.

Each step costs a gradient of the log density seen through a minibatch: the subsampled plates of
the model (``numpyro.plate(name, size, subsample_size=...)``) see newly drawn rows. Nothing is
accepted or rejected, so that the draws follow the posterior up to a bias that shrinks with the step
size; `SGLD`, `SGHMC` and `SGNHT` say how much it is where it can be computed.

Sources: Welling and Teh (2011), ICML; Chen, Fox and Guestrin (2014), ICML; Ding et al. (2014),
NeurIPS; Springenberg et al. (2016), NeurIPS; Baker et al. (2019), Statistics and Computing 29;
Zhang et al. (2020), ICLR.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.control_variates import Anchor, Score, estimate
from ppl_toolkit.inference.kernel import (
    SAMPLING,
    Info,
    Kernel,
    Placed,
    Spec,
    Stage,
    require_continuous,
)
from ppl_toolkit.inference.mcmc import MCMC
from ppl_toolkit.inference.randomness import continuous
from ppl_toolkit.inference.step_sizes import (
    require_count,
    require_positive,
    require_step_size,
)
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.positions import Position

__all__ = ["SGHMC", "SGLD", "SGNHT"]

Vector = Float[Array, " D"]
Scalar = Float[Array, ""]

_TINY = 1e-10  # beside the root of a second moment


class Push(NamedTuple):
    """What drives a chain at one step.

    Attributes:
        gradient: estimate of that of the log density.
        noise: standard normal, or zero while a cycle explores.
        step: step size.
        heated: whether there is noise.
        warming: whether scales are learned.
        noisy: whether the gradient is of a minibatch, uncorrected.
    """

    gradient: Vector
    noise: Vector
    step: Scalar
    heated: Any
    warming: Any
    noisy: bool


class Walker(NamedTuple):
    """What a chain keeps beside its position.

    Attributes:
        taken: steps so far.
        motion: what the algorithm keeps, such as momenta.
        safe: the last position with a finite gradient.
        anchor: for control variates; None without.
    """

    taken: Int[Array, ""]
    motion: Any
    safe: Vector
    anchor: Anchor | None


class Settings(NamedTuple):
    """Arguments of the compiled program: numbers among the options, and what every run has."""

    numbers: dict[str, Any]
    run: Any


# -- what they share ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class _StochasticGradient(Spec):
    """What the algorithms share: the gradient, the schedule, the loop; each of them adds `move`."""

    step_size: Any = None
    steps: int = 1
    control_variates: bool = False
    warmup: int = 1000
    init_radius: float = 2.0

    advice: ClassVar[str]  # on step sizes to begin with
    redraws: ClassVar[bool] = True
    reversible: ClassVar[bool] = False
    refit_warmup: ClassVar[int] = 200
    brief_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_step_size(type(self).__name__, self.step_size, self.advice)
        require_count("steps", self.steps)
        _ = self._method  # checks the rest

    @abc.abstractmethod
    def rest(self, x: Vector) -> Any:
        """What the algorithm keeps, at the beginning."""

    @abc.abstractmethod
    def move(self, x: Vector, motion: Any, push: Push) -> tuple[Vector, Any]:
        """One step: the new position, and what is kept."""

    def halted(self, motion: Any, x: Vector) -> Any:
        """What is kept when a step left the finite numbers and is taken back."""
        return self.rest(x)

    def statistics(self, motion: Any) -> Info:
        return {}

    @property
    def needs_whole(self) -> bool:
        return self.control_variates

    def require(self, space: Space) -> None:
        """Refuse discrete sites."""
        require_continuous(type(self).__name__, space)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        """The kernel on positions; ``steps`` steps that sample make one transition."""
        schedule = self.step_size if callable(self.step_size) else lambda t: self.step_size
        explores = getattr(self.step_size, "explores", _never)

        def score(seen: Target, unravel: Callable) -> Score:
            return jax.value_and_grad(lambda x: seen.log_density(unravel(x)))

        def init(position: Position, key: Any) -> Placed:
            x, unravel = ravel_pytree(dict(position))
            anchor = Anchor.at(x, score(target, unravel)) if self.control_variates else None
            return Placed(position, Walker(jnp.zeros((), jnp.int32), self.rest(x), x, anchor))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            continuous(type(self).__name__)
            start, unravel = ravel_pytree(dict(state.position))

            def once(carry: tuple) -> tuple:
                number, left, x, walker, info = carry
                key_rows, key_noise = random.split(random.fold_in(key, number))
                batch = target.minibatch(key_rows)
                value, gradient = estimate(score(batch, unravel), walker.anchor, x)
                exploring = explores(walker.taken)
                push = Push(
                    gradient,
                    jnp.where(exploring, 0.0, random.normal(key_noise, x.shape, x.dtype)),
                    jnp.asarray(schedule(walker.taken), x.dtype),
                    ~exploring,
                    stage.warming,
                    batch is not target and not self.control_variates,
                )
                new, motion = self.move(x, walker.motion, push)
                fine = jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))
                fine &= jnp.all(jnp.isfinite(new))
                motion, new, safe = _where(
                    fine,
                    (motion, new, x),
                    (self.halted(walker.motion, x), walker.safe, walker.safe),
                )
                info = {
                    "step_size": push.step,
                    "n_steps": number + 1,
                    "diverging": info["diverging"] | ~fine,
                    "potential_energy": -value.astype(x.dtype),
                }
                walker = walker._replace(taken=walker.taken + 1, motion=motion, safe=safe)
                return number + 1, left - jnp.where(exploring, 0, 1), new, walker, info

            nothing = jnp.zeros((), start.dtype)
            info = {
                "step_size": nothing,
                "n_steps": jnp.zeros((), jnp.int32),
                "diverging": jnp.zeros((), bool),
                "potential_energy": nothing,
            }
            first = (jnp.zeros((), jnp.int32), jnp.asarray(self.steps, jnp.int32))
            _, _, x, walker, info = lax.while_loop(
                lambda c: c[1] > 0, once, (*first, start, state.kept, info)
            )
            if self.control_variates:
                info["n_steps"] = 2 * info["n_steps"]  # gradients
                walker = walker._replace(anchor=renewed(walker.anchor, x, unravel))
            return Placed(unravel(x), walker), info | self.statistics(walker.motion)

        def renewed(anchor: Anchor, x: Vector, unravel: Callable) -> Anchor:
            if isinstance(stage.warming, np.bool_) and not stage.warming:
                return anchor
            update = functools.partial(anchor.update, x, stage, score(target, unravel))
            return lax.cond(stage.warming, update, lambda: anchor)

        def refresh(state: Placed, position: Position) -> Placed:
            x, unravel = ravel_pytree(dict(position))
            walker, anchor = state.kept, state.kept.anchor
            if anchor is not None:
                known = score(target, unravel)(anchor.position)
                anchor = anchor._replace(log_density=known[0], gradient=known[1])
            return Placed(position, walker._replace(safe=x, anchor=anchor))

        return Kernel(init, step, refresh)

    # -- as a method of `infer` ---------------------------------------------------------------

    @property
    def _numbers(self) -> dict[str, Any]:
        """The options that are arguments of the compiled program: others compile nothing anew."""
        options = {name: getattr(self, name, None) for name in ("step_size", "friction")}
        return {name: x for name, x in options.items() if x is not None and not callable(x)}

    def _with(self, numbers: Mapping[str, Any]) -> MCMC:
        """The method with these options, which may be traced."""
        spec = copy.copy(self)
        for name, value in numbers.items():
            object.__setattr__(spec, name, value)
        return MCMC(spec, self.warmup, self.init_radius)

    @property
    def _method(self) -> MCMC:
        return self._with({})

    @property
    def needs(self) -> tuple[str, ...]:
        return self._method.needs

    @property
    def minibatches(self) -> bool:
        return True

    def check(self, program: Any) -> None:
        """Refuse programs with discrete sites, or with sites inside subsampled plates."""
        self._method.check(program)

    def attributes(self) -> dict[str, str]:
        return self._method.attributes()

    def statics(self) -> tuple:
        return self._with(dict.fromkeys(self._numbers)).statics()

    def settings(self, program: Any, warmup: int) -> Settings:
        numbers = {k: np.asarray(x, program.precision) for k, x in self._numbers.items()}
        return Settings(numbers, self._method.settings(program, warmup))

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> Any:
        return self._with(settings.numbers).init(key, start, target, settings.run)

    def refresh(self, state: Any, target: Any, settings: Settings) -> Any:
        return self._with(settings.numbers).refresh(state, target, settings.run)

    def step(
        self, key: Any, index: Any, state: Any, target: Any, settings: Settings
    ) -> tuple[Any, Position, Info]:
        return self._with(settings.numbers).step(key, index, state, target, settings.run)

    def values(self, draw: Position, target: Any) -> dict[str, Any]:
        return self._method.values(draw, target)

    def failed(self, state: Any) -> Any:
        return self._method.failed(state)


def _where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


@dataclasses.dataclass(frozen=True, repr=False)
class SGLD(_StochasticGradient):
    """Stochastic-gradient Langevin dynamics.

    With g an estimate of grad log p(x) and e the step size,

        x <- x + e/2 g + N(0, e).

    On a Gaussian posterior of precision a, with gradients of variance V, the draws have the
    variance (1 + e V / 4) / (a (1 - e a / 4)): the step size must be well below 4 / V, and below
    4 / a for the chain not to run away.

    Args:
        step_size: e, in units of the posterior's variance (of unconstrained sites). A number, or
            a function of the number of the step: `PolynomialDecay`, `Cyclical`, one of optax.
        steps: taken per draw. What lies between is thrown away, so that a draw costs little beside
            the steps to it.
        control_variates: estimate gradients by g(z) + [g_B(x) - g_B(z)], B the minibatch, z an
            anchor whose gradient over all the data is known: the mean of the warm-up so far
            (renewed at the ends of its windows; the start before). Takes two gradients a step, and
            V falls with the squared distance of x and z. Beside other kernels in a `cycle` the
            whole gradient is computed anew at every draw.
        warmup: default number of warm-up iterations.
        init_radius: starts are uniform in (-radius, radius) on the unconstrained space.

    Raises:
        OptionError: the step size is no positive number or function of the step's number.

    Cost: a gradient of the minibatch and O(D) a step. Statistics: ``step_size``, ``n_steps`` (the
    gradients taken), ``potential_energy`` (minus the log density by the last minibatch), and
    ``diverging`` where a step left the finite numbers: it is taken back.

    Source: Welling and Teh (2011); Baker et al. (2019) for control variates.
    """

    advice: ClassVar[str] = "Begin with a tenth of the smallest posterior variance."

    def rest(self, x: Vector) -> Any:
        return ()

    def move(self, x: Vector, motion: Any, push: Push) -> tuple[Vector, Any]:
        e = push.step
        return x + 0.5 * e * push.gradient + jnp.sqrt(e) * push.noise, motion


class Scales(NamedTuple):
    """Running moments of the gradient, per coordinate, over windows of their own lengths.

    Attributes:
        window: tau, the length of the window.
        mean, square: of the gradient.
    """

    window: Vector
    mean: Vector
    square: Vector

    @classmethod
    def start(cls, x: Vector) -> Scales:
        one = jnp.ones_like(x)
        return cls(one, one, one)

    def update(self, g: Vector) -> Scales:
        weight = 1.0 / (self.window + 1.0)
        return Scales(
            self.window + 1.0 - self.window * self.mean**2 / (self.square + _TINY),
            self.mean + weight * (g - self.mean),
            self.square + weight * (g**2 - self.square),
        )

    @property
    def inverse_mass(self) -> Vector:
        return 1.0 / (jnp.sqrt(self.square) + _TINY)


class Moving(NamedTuple):
    """A momentum (as a velocity), and the scales of the coordinates if they are learned."""

    momentum: Vector
    scales: Scales | None


@dataclasses.dataclass(frozen=True, repr=False)
class SGHMC(_StochasticGradient):
    """Stochastic-gradient Hamiltonian Monte Carlo: Langevin dynamics with momentum.

    With g an estimate of grad log p(x), e the step size, alpha the friction, m an inverse mass,

        p <- (1 - alpha) p + e m g + N(0, 2 alpha m),    x <- x + e p.

    On a Gaussian posterior of precision a, with gradients of variance V, the draws have the
    variance T / a with T = (1 + e^2 m V / (2 alpha)) / (1 - e^2 m a / (2 (2 - alpha))). The
    statistic ``kinetic_temperature``, (1 - alpha/2) p^2 / m on average over coordinates, has the
    mean T: the factor by which variances are wrong can be read off.

    Args:
        step_size: e, in units of the posterior's standard deviation (of unconstrained sites). A
            number or a function of the step's number; see `SGLD`.
        friction: alpha, the share of the momentum that is lost at every step, in (0, 1].
        scale_adapted: learn m = 1 / sqrt(E g^2) for each coordinate, from the gradients of the
            warm-up; a step then is in units of m^(-1/2) times a standard deviation. The gradient's
            own noise, which Springenberg et al. take to be all of E g^2, is subtracted: N(0, 2
            alpha m - e^2), except from whole gradients and under control variates.
        steps, control_variates, warmup, init_radius: see `SGLD`.

    Raises:
        OptionError: a step size or friction out of its range.

    Cost and statistics are those of `SGLD`, with ``kinetic_temperature``.

    Source: Chen, Fox and Guestrin (2014); Springenberg et al. (2016) for the scales.
    """

    advice: ClassVar[str] = "Begin with a tenth of the smallest posterior standard deviation."

    friction: float = 0.1
    scale_adapted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_friction(self.friction)

    @property
    def tunes(self) -> bool:  # type: ignore[override]
        return self.scale_adapted

    def rest(self, x: Vector) -> Moving:
        return Moving(jnp.zeros_like(x), Scales.start(x) if self.scale_adapted else None)

    def halted(self, motion: Moving, x: Vector) -> Moving:
        return motion._replace(momentum=jnp.zeros_like(x))

    def move(self, x: Vector, motion: Moving, push: Push) -> tuple[Vector, Moving]:
        e, alpha, g = push.step, self.friction, push.gradient
        scales = motion.scales
        if scales is None:
            m, variance = 1.0, jnp.asarray(2.0 * alpha, x.dtype)
        else:
            scales = _where(push.warming, scales.update(g), scales)
            m = scales.inverse_mass
            of_gradient = e**2 if push.noisy else 0.0
            variance = jnp.maximum(2.0 * alpha * m - of_gradient, _TINY)
        p = (1.0 - alpha) * motion.momentum + e * m * g + jnp.sqrt(variance) * push.noise
        return x + e * p, Moving(p, scales)

    def statistics(self, motion: Moving) -> Info:
        m = 1.0 if motion.scales is None else motion.scales.inverse_mass
        return {"kinetic_temperature": _temperature(motion.momentum, self.friction, m)}


class Thermostat(NamedTuple):
    """A momentum, and the friction that keeps its temperature at one."""

    momentum: Vector
    friction: Scalar


@dataclasses.dataclass(frozen=True, repr=False)
class SGNHT(_StochasticGradient):
    """The stochastic-gradient Nosé–Hoover thermostat: friction that learns the gradient's noise.

    With g an estimate of grad log p(x), e the step size, alpha the friction, D coordinates,

        p <- (1 - xi) p + e g + N(0, 2 alpha),    x <- x + e p,
        xi <- xi + e^2 ((1 - xi/2) |p|^2 / D - 1).

    Noise in the gradients, alike in all coordinates, heats the momentum; the friction xi rises to
    alpha + e^2 V / 2, V the variance of a coordinate's gradient, where the temperature is one again
    (on average over the coordinates); it must stay below 2. The factor 1 - xi/2 is not in the
    paper: with it positions of Gaussian posteriors have the right variance where xi is not small.

    Args:
        step_size: e, in units of the posterior's standard deviation (of unconstrained sites). A
            number or a function of the step's number; see `SGLD`.
        friction: alpha, of the noise that is added, and the first xi; in (0, 1].
        steps, control_variates, warmup, init_radius: see `SGLD`.

    Raises:
        OptionError: a step size or friction out of its range.

    Cost and statistics are those of `SGLD`, with ``kinetic_temperature``, (1 - xi/2) |p|^2 / D, and
    ``friction``, xi.

    Source: Ding et al. (2014), Bayesian sampling using stochastic gradient thermostats.
    """

    advice: ClassVar[str] = "Begin with a tenth of the smallest posterior standard deviation."

    friction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_friction(self.friction)

    def rest(self, x: Vector) -> Thermostat:
        return Thermostat(jnp.zeros_like(x), jnp.asarray(self.friction, x.dtype))

    def move(self, x: Vector, motion: Thermostat, push: Push) -> tuple[Vector, Thermostat]:
        e, xi = push.step, motion.friction
        p = (1.0 - xi) * motion.momentum + e * push.gradient
        p += jnp.sqrt(2.0 * self.friction) * push.noise
        excess = jnp.where(push.heated, _temperature(p, xi) - 1.0, 0.0)
        xi += e**2 * excess
        x = jnp.where(xi < 2.0, x + e * p, jnp.nan)  # more friction would amplify: a divergence
        return x, Thermostat(p, xi)

    def statistics(self, motion: Thermostat) -> Info:
        return {"kinetic_temperature": _temperature(*motion), "friction": motion.friction}


def _temperature(momentum: Vector, friction: Any, inverse_mass: Any = 1.0) -> Scalar:
    """What is one on average where the positions have the right variance."""
    return (1.0 - friction / 2.0) * jnp.mean(momentum**2 / inverse_mass)


def _never(t: Any) -> Any:
    return jnp.zeros((), bool)


def _require_friction(friction: Any) -> None:
    require_positive("friction", friction)
    if friction > 1.0:
        raise OptionError(f"friction must lie in (0, 1]; got {friction!r}.")
