"""How particles are moved, and what they look ahead to.

`Bootstrap` draws from the model; `Auxiliary` does, too, but looks ahead. `Guided` takes a program
of the user's, `LaplaceProposal` a Gaussian found from two derivatives of log m_t + log g_t, and
`Adapted` all values of finite latents: then the proposal is p(x_t | c_{t-1}, y_t) and the
look-ahead p(y_t | c_{t-1}), exactly.

Sources: Doucet, Godsill and Andrieu (2000), Statistics and Computing 10; Pitt and Shephard (1999),
JASA 94.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp

from ppl_toolkit.errors import MethodError, OptionError, PPLError
from ppl_toolkit.inference.auxiliary import draw, score
from ppl_toolkit.inference.randomness import categorical, continuous
from ppl_toolkit.inference.state_space import Series, StateSpace, Step
from ppl_toolkit.positions import start_position
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import key_shape, user_line

__all__ = [
    "Adapted",
    "Auxiliary",
    "Bootstrap",
    "Guided",
    "LaplaceProposal",
    "Proposal",
    "require_proposal",
]


def require_proposal(proposal: Any) -> None:
    """Refuse what is none.

    Raises:
        OptionError: names those there are.
    """
    if not isinstance(proposal, Proposal):
        raise OptionError(
            "proposal must be Bootstrap(), Auxiliary(), Guided(...), LaplaceProposal() or "
            f"Adapted(); got {proposal!r:.60}."
        )


class Proposal(abc.ABC):
    """How particles are moved. Immutable; compares by its options.

    A proposal may look ahead, too: then ancestors are drawn with probabilities ~ W eta.
    """

    looks_ahead: bool = False

    def check(self, space: StateSpace, program: Program) -> None:  # noqa: B027 (most serve all)
        """Refuse models that it cannot serve.

        Args:
            space: the time axis of the model.
            program: the model and its data.

        Raises:
            MethodError: says why.
        """

    @abc.abstractmethod
    def draw(self, key: Any, series: Series, carry: Any, t: Any) -> Step:
        """A step whose correction is log m_t - log q_t."""

    @abc.abstractmethod
    def at(self, series: Series, carry: Any, t: Any, latents: Any) -> Step:
        """The same for given latents."""

    def look_ahead(self, series: Series, carry: Any, t: Any) -> Any:
        """Log eta_t of one particle."""
        return jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class Bootstrap(Proposal):
    """Draws from the model: weights are log g_t."""

    def draw(self, key: Any, series: Series, carry: Any, t: Any) -> Step:
        return series.step(key, carry, t)

    def at(self, series: Series, carry: Any, t: Any, latents: Any) -> Step:
        return series.replay(carry, t, latents)


@dataclasses.dataclass(frozen=True)
class Auxiliary(Bootstrap):
    """Draws from the model, of ancestors that look likely: the auxiliary particle filter.

    Ancestors are drawn with probabilities ~ W eta, where eta is g_t at the mean of m_t. Where the
    observations of a step depend on nothing but the carry before it, this looks ahead perfectly.
    Helps where the observation is more informative than the step is noisy; `LaplaceProposal` looks
    ahead better, at a higher price.

    Args:
        power: eta is raised to it; below one, weights are bounded more easily.

    Cost: one step of the model more per particle.
    Source: Pitt and Shephard (1999), JASA 94.
    """

    power: float = 1.0

    looks_ahead = True

    def __post_init__(self) -> None:
        if not 0.0 < self.power <= 1.0:
            raise OptionError(f"power must lie in (0, 1]; got {self.power!r}.")

    def check(self, space: StateSpace, program: Program) -> None:
        if discrete := [n for n in space.latents if program.sites[n].discrete]:
            raise MethodError(
                f"Auxiliary looks ahead at the mean of a step's latents, but {discrete} are "
                "discrete. Use Adapted() for finite ones, or Bootstrap()."
            )

    def look_ahead(self, series: Series, carry: Any, t: Any) -> Any:
        step, _ = series.replay_real(carry, t, series.middle(carry, t))
        return self.power * step.log_observation


@dataclasses.dataclass(frozen=True)
class Guided(Proposal):
    """Draws from a program.

    Args:
        program: NumPyro program of (carry, x), the arguments of the function that is scanned; it
            draws the latents of a step under their names.
        ahead: (carry, x) -> log eta, an approximation of log p(y_t | carry); None for none.
    """

    program: Callable[[Any, Any], Any]
    ahead: Callable[[Any, Any], Any] | None = None

    def check(self, space: StateSpace, program: Program) -> None:
        def trial(key: Any) -> Any:
            series = space.at(program, start_position(program, key, program.data), program.data)
            carry = series.start(key).carry
            drawn = draw(self.program, key, carry, series.x(0))[0]
            return drawn, series.step(key, carry, 0).latents

        try:
            with program.context():
                drawn, wanted = jax.eval_shape(trial, key_shape())
        except PPLError:
            raise
        except Exception as error:
            raise MethodError(
                f"the proposal raised {type(error).__name__} at {user_line(error)}: {error}. It is "
                "called with the carry and x, as the function that is scanned."
            ) from None
        found = {name: x.shape for name, x in drawn.items()}
        if found != {name: x.shape for name, x in wanted.items()}:
            raise MethodError(
                f"the proposal draws {found}, but the latents of a step are "
                f"{ {name: x.shape for name, x in wanted.items()} }: it must draw the same sites."
            )

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        return self.ahead is not None

    def draw(self, key: Any, series: Series, carry: Any, t: Any) -> Step:
        values, log_q = draw(self.program, key, carry, series.x(t))
        return _corrected(series, carry, t, values, log_q)

    def at(self, series: Series, carry: Any, t: Any, latents: Any) -> Step:
        log_q = score(self.program, latents, carry, series.x(t))
        return _corrected(series, carry, t, latents, log_q)

    def look_ahead(self, series: Series, carry: Any, t: Any) -> Any:
        assert self.ahead is not None
        return self.ahead(carry, series.x(t))


def _corrected(series: Series, carry: Any, t: Any, values: Any, log_q: Any) -> Step:
    step = series.replay(carry, t, values)
    return step._replace(correction=step.log_transition - log_q)


@dataclasses.dataclass(frozen=True)
class Adapted(Proposal):
    """All values of finite latents: the fully adapted filter. Weights are equal.

    Cost: one step of the model for every joint value of a step's latents.
    """

    looks_ahead = True

    def check(self, space: StateSpace, program: Program) -> None:
        own = [program.sites[name] for name in space.latents]
        if rest := [s.name for s in own if not s.cardinality or len(s.shape) > 1]:
            raise MethodError(
                f"Adapted looks at all values of a step's latents, but {rest} are no numbers with "
                "finitely many values. Use LaplaceProposal() or Bootstrap()."
            )

    def _each(self, series: Series, carry: Any, t: Any) -> tuple[Any, Any]:
        """All joint values of a step's latents, and log m_t + log g_t of each."""
        levels = series.levels(carry, t)
        grid = jnp.meshgrid(*levels.values(), indexing="ij")
        values = {name: jnp.ravel(x) for name, x in zip(levels, grid, strict=True)}
        steps = jax.vmap(lambda v: series.replay(carry, t, v))(values)
        return values, steps.log_transition + steps.log_observation

    def draw(self, key: Any, series: Series, carry: Any, t: Any) -> Step:
        values, joint = self._each(series, carry, t)
        chosen = categorical(key, joint)
        latents = {name: x[chosen] for name, x in values.items()}
        return _corrected(series, carry, t, latents, joint[chosen] - logsumexp(joint))

    def at(self, series: Series, carry: Any, t: Any, latents: Any) -> Step:
        step = series.replay(carry, t, latents)
        log_q = step.log_transition + step.log_observation - self.look_ahead(series, carry, t)
        return step._replace(correction=step.log_transition - log_q)

    def look_ahead(self, series: Series, carry: Any, t: Any) -> Any:
        return logsumexp(self._each(series, carry, t)[1])


@dataclasses.dataclass(frozen=True)
class LaplaceProposal(Proposal):
    """A Gaussian at the mode of log m_t + log g_t, by Newton steps on the real space.

    Exact for linear-Gaussian steps (with ``wider=1`` and ``from_model=0``). Where the curvature is
    not that of a maximum, the model is drawn from.

    Args:
        newton: Newton steps from the mean of m_t.
        wider: factor of the Gaussian's standard deviations.
        from_model: share of draws from the model itself, which keeps weights bounded where log g_t
            is; above zero.

    Cost: ``newton`` gradients and Hessians of a step per particle, and O(d^3) for d latents.
    """

    newton: int = 2
    wider: float = 1.1
    from_model: float = 0.1

    looks_ahead = True

    def check(self, space: StateSpace, program: Program) -> None:
        if rest := [n for n in space.latents if program.sites[n].discrete]:
            raise MethodError(
                f"LaplaceProposal needs derivatives, but the latents {rest} are discrete. Use "
                "Adapted() for finite ones, or Bootstrap()."
            )

    def _gaussian(self, series: Series, carry: Any, t: Any) -> _Gaussian:
        start, unravel = ravel_pytree(series.middle(carry, t))

        def log_joint(u: Any) -> Any:
            step, log_det = series.replay_real(carry, t, unravel(u))
            return step.log_transition + step.log_observation + log_det

        def newton(_: Any, u: Any) -> Any:
            step = jnp.linalg.solve(-jax.hessian(log_joint)(u), jax.grad(log_joint)(u))
            return jnp.where(jnp.all(jnp.isfinite(step)), u + step, u)

        mean = jax.lax.fori_loop(0, self.newton, newton, start)
        root = jnp.linalg.cholesky(-jax.hessian(log_joint)(mean))  # NaN where it is no maximum
        height = log_joint(mean)
        sound = jnp.all(jnp.isfinite(root)) & jnp.isfinite(height)
        size = start.shape[0]
        half_log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
        area = height + 0.5 * size * jnp.log(2 * jnp.pi) - half_log_det
        return _Gaussian(
            mean, jnp.where(sound, root, jnp.eye(size)), jnp.where(sound, half_log_det, 0.0),
            sound, jnp.where(sound, area, -jnp.inf), unravel,
        )  # fmt: skip

    def _share(self, gaussian: _Gaussian) -> Any:
        return jnp.where(gaussian.sound, self.from_model, 1.0)

    def _step(self, series: Series, carry: Any, t: Any, u: Any, gaussian: _Gaussian) -> Step:
        """Log q is that of the mixture, on the model's own space."""
        step, log_det = series.replay_real(carry, t, gaussian.unravel(u))
        z = gaussian.root.T @ (u - gaussian.mean) / self.wider
        log_normal = gaussian.half_log_det - 0.5 * z @ z
        log_normal -= u.shape[0] * (0.5 * jnp.log(2 * jnp.pi) + jnp.log(self.wider))
        share = self._share(gaussian)
        log_q = jnp.logaddexp(
            jnp.log(share) + step.log_transition, jnp.log1p(-share) + log_normal - log_det
        )
        return step._replace(correction=step.log_transition - log_q)

    def draw(self, key: Any, series: Series, carry: Any, t: Any) -> Step:
        continuous("LaplaceProposal")
        key_model, key_which, key_normal = random.split(key, 3)
        gaussian = self._gaussian(series, carry, t)
        own, _ = ravel_pytree(series.real(carry, t, series.step(key_model, carry, t).latents))
        z = random.normal(key_normal, own.shape, own.dtype)
        other = gaussian.mean + self.wider * jax.scipy.linalg.solve_triangular(
            gaussian.root.T, z, lower=False
        )
        from_model = random.uniform(key_which) < self._share(gaussian)
        return self._step(series, carry, t, jnp.where(from_model, own, other), gaussian)

    def at(self, series: Series, carry: Any, t: Any, latents: Any) -> Step:
        u, _ = ravel_pytree(series.real(carry, t, latents))
        return self._step(series, carry, t, u, self._gaussian(series, carry, t))

    def look_ahead(self, series: Series, carry: Any, t: Any) -> Any:
        """Zero where there is no Gaussian: such particles are drawn by their weights."""
        gaussian = self._gaussian(series, carry, t)
        return jnp.where(gaussian.sound, gaussian.log_area, 0.0)


class _Gaussian(NamedTuple):
    """N(mean, (root root^T)^-1), and the log of the integral of the joint density near it."""

    mean: Any
    root: Any
    half_log_det: Any
    sound: Any
    log_area: Any
    unravel: Callable[[Any], Any]
