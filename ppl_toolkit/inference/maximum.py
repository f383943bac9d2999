"""The mode of the posterior density, and type-II maximum likelihood.

Both are the end of L-BFGS on the unconstrained space, from several starting points, inside the
compiled program (`climbing`). Densities are those of the parameters on their own spaces: without
the Jacobian of the unconstrained coordinates, so that the mode does not depend on these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.climbing import highest
from ppl_toolkit.inference.step_sizes import require_count
from ppl_toolkit.program import Program
from ppl_toolkit.replay import at_unconstrained, log_det_name

__all__ = ["MAP", "Type2ML"]

_FLAT = 1e-4  # of a relative gradient


@dataclasses.dataclass(frozen=True)
class _Objective:
    """Log p(y | theta), or log p(y, theta), at an unconstrained vector: a function of a program."""

    prior: bool

    def example(self, program: Program) -> Any:
        return jax.ShapeDtypeStruct((program.size,), program.precision)

    def __call__(self, program: Program, flat: Any, data: Sequence[Any]) -> Any:
        scores, _ = program.scores(data, at_unconstrained(program.unravel(flat)))
        latent = [site.name for site in program.continuous]
        without = {log_det_name(name) for name in latent} | (set() if self.prior else set(latent))
        return sum((jnp.sum(s) for n, s in scores.items() if n not in without), start=0.0)


class Best(NamedTuple):
    """The best maximum that a chain has found.

    Attributes:
        position: unconstrained, (D,).
        value: of the objective there; minus infinity if none was found.
        gradient_norm: there.
        given: a position to start from, (D,), and whether there is one.
    """

    position: Any
    value: Any
    gradient_norm: Any
    given: tuple[Any, Any]


def _steep(xp: Any, best: Best) -> Any:
    """Whether the function still rises: by its relative gradient |g| (1 + |x|) / (1 + |value|).

    Args:
        xp: numpy or jax.numpy.
        best: of one chain, or of several.
    """
    size = 1.0 + xp.linalg.norm(best.position, axis=-1)
    return best.gradient_norm * size >= _FLAT * (1.0 + xp.abs(best.value))


class Settings(NamedTuple):
    """Arguments of the compiled program."""

    radius: Any


@dataclasses.dataclass(frozen=True)
class _Maximum:
    """What `MAP` and `Type2ML` share.

    A chain is a search of its own: L-BFGS from ``starts`` points, uniform in (-radius, radius) on
    the unconstrained space (the first is the given one, if there is one). Its draw, the only one,
    in the group ``maximum``, is the best point it ended at. Chains that differ tell of local
    maxima.

    Args:
        starts: of every chain.
        steps: of L-BFGS from every start, at most.
        init_radius: of the starting points.

    Raises:
        OptionError: an option is not a positive number.

    Cost: some 20 to 100 gradients for every start of a few parameters; O(D) numbers.
    Statistics: ``objective``, ``gradient_norm``, ``converged``.
    """

    starts: int = 4
    steps: int = 200
    init_radius: float = 2.0

    group: ClassVar[str] = "maximum"
    draws: ClassVar[int] = 1
    one_law: ClassVar[bool] = False
    warmup: ClassVar[int] = 0
    refit_warmup: ClassVar[int] = 0
    prior: ClassVar[bool] = True
    failure: ClassVar[str] = (
        "none of the starting points has a finite density and gradient. Give one: "
        "init={site: value}."
    )

    def __post_init__(self) -> None:
        require_count("starts", self.starts)
        require_count("steps", self.steps)
        if not self.init_radius > 0.0:
            raise OptionError(f"init_radius must be positive; got {self.init_radius!r}.")

    @property
    def needs(self) -> tuple[Any, ...]:
        return ("constrain", _Objective(self.prior))

    def check(self, program: Program) -> None:
        program.require_gradients(type(self).__name__)

    def statics(self) -> tuple:
        return (self.prior, self.starts, self.steps)

    def settings(self, program: Program, warmup: int) -> Settings:
        return Settings(np.asarray(self.init_radius, program.precision))

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> Best:
        flat, given = start
        return Best(flat, jnp.asarray(-jnp.inf, flat.dtype), jnp.zeros((), flat.dtype),
                    (flat, jnp.asarray(given)))  # fmt: skip

    def refresh(self, state: Best, target: Any, settings: Settings) -> Best:
        """Another search, from where the last one ended."""
        nothing = jnp.full_like(state.value, -jnp.inf)
        given = (state.position, jnp.isfinite(state.value))
        return state._replace(value=nothing, given=given)

    def step(
        self, key: Any, index: Any, state: Best, target: Any, settings: Settings
    ) -> tuple[Best, Any, dict[str, Any]]:
        top = highest(
            target.functions[_Objective(self.prior)], key, self.starts, state.given,
            settings.radius, self.steps,
        )  # fmt: skip
        new = Best(top.position, top.value, jnp.linalg.norm(top.gradient), state.given)
        best = jax.tree.map(lambda a, b: jnp.where(top.value > state.value, a, b), new, state)
        info = {
            "objective": best.value,
            "gradient_norm": best.gradient_norm,
            "converged": ~_steep(jnp, best),
        }
        return best, best.position, info

    def values(self, draw: Any, target: Any) -> dict[str, Any]:
        return target.constrain(draw)

    def failed(self, state: Best) -> Any:
        return np.zeros(np.shape(state.value), bool)

    def problem(self, state: Best) -> str:
        """Said if a search found nothing, or stopped before the top."""
        value, norm = np.asarray(state.value), np.asarray(state.gradient_norm)
        if not np.all(np.isfinite(value)):
            return f"chains {np.flatnonzero(~np.isfinite(value)).tolist()}: {self.failure}"
        if np.all(_steep(np, state)):
            return (
                f"no search came to a maximum in {self.steps} steps: the smallest gradient has "
                f"norm {norm.min():.2g}. Take more steps, or look for a direction along which the "
                "density rises for ever."
            )
        return ""


@dataclasses.dataclass(frozen=True)
class MAP(_Maximum):
    """The mode of the posterior density: the largest p(y | theta) p(theta).

    The density is that of the parameters as the model is written.
    """

    __doc__ = (__doc__ or "") + (_Maximum.__doc__ or "").split("\n", 1)[1]

    def attributes(self) -> dict[str, str]:
        """What is maximised."""
        return {"objective": "log posterior density, of the parameters on their own spaces"}


@dataclasses.dataclass(frozen=True)
class Type2ML(_Maximum):
    """Type-II maximum likelihood: the parameters with the largest evidence p(y | theta).

    For programs that integrate their functions out, such as Gaussian processes, whose priors of the
    parameters then do not count. A program may name sites without a maximum (`without_maximum`), as
    scale mixtures do: no law of the scale has a larger evidence than a point at its best value, so
    that a law with free parameters collapses to it. Such programs are refused.
    """

    __doc__ = (__doc__ or "") + (_Maximum.__doc__ or "").split("\n", 1)[1]
    prior: ClassVar[bool] = False

    def check(self, program: Program) -> None:
        super().check(program)
        flat = getattr(program.model, "without_maximum", ())
        if names := [site.name for site in program.latent if site.name in flat]:
            raise MethodError(
                f"the evidence has no maximum in {names}: it rises for ever as the law of the "
                "scale shrinks to a point. Fix the law (law=InverseGamma(2.0, 2.0)), or let its "
                "prior count: method='map'."
            )

    def attributes(self) -> dict[str, str]:
        """What is maximised."""
        return {"objective": "log evidence; priors of the parameters do not count"}
