"""Elliptical slice sampling: sites with a Gaussian prior, without gradients or step sizes.

Let f ~ N(m, C) a priori. With v another draw from that prior, the ellipse

    f(a) = m + (f - m) cos a + (v - m) sin a

goes through f, and all its points are prior draws: under the prior the new angle is as good as the
old one. So a point of the ellipse is drawn uniformly among those whose likelihood is above a level
drawn below the present one, by shrinking an interval of angles towards zero.

Source: Murray, Adams and MacKay (2010), AISTATS, as blackjax has it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import random

from ppl_toolkit import positions
from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.gaussian_prior import GaussianDraws, GaussianSites, gaussian_sites
from ppl_toolkit.inference.kernel import SAMPLING, Info, Kernel, Placed, Spec, Stage
from ppl_toolkit.inference.mcmc import MCMC
from ppl_toolkit.inference.randomness import continuous
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program

__all__ = ["EllipticalSlice"]


@dataclasses.dataclass(frozen=True)
class _Terms:
    """(position, ()) -> `positions.log_terms`: a function of a program."""

    def example(self, program: Program) -> Any:
        return positions.shapes(program), ()

    def __call__(self, program: Program, given: tuple[Position, Any], data: Any) -> Any:
        return positions.log_terms(program, given[0], data)


@dataclasses.dataclass(frozen=True)
class EllipticalSlice(Spec):
    """Elliptical slice sampling of sites whose prior is Gaussian given all other sites.

    For latent functions, random effects and fields with any likelihood, one with steps too; moves
    all its sites at once, as far as the likelihood lets them. Nothing has to be tuned. Alone it
    serves models all of whose sites are Gaussian; else it is a piece beside other kernels::

        cycle([block(EllipticalSlice(), ["f"]), block(NUTS(), ["scale", "length"])])

    The mean and covariance may depend on sites outside of the block, and whatever else depends on
    the block's sites counts as likelihood. It mixes slowly where many data say much more than the
    prior does.

    Args:
        warmup: default number of warm-up iterations.
        init_radius: where no prior draw has a likelihood, a chain begins uniformly in
            (-radius, radius).
        sites: read off the model.

    Cost per iteration: one draw from the prior (a Cholesky factor of a dense covariance), and some
    five evaluations of the likelihood, in which the prior of the sites is not computed.
    Statistics: ``n_evaluations`` of the likelihood; ``n_steps`` of gradients is zero.
    Source: Murray, Adams and MacKay (2010), Elliptical slice sampling, AISTATS.
    """

    warmup: int = 500
    init_radius: float = 2.0
    sites: GaussianSites | None = dataclasses.field(default=None, repr=False)

    refit_warmup: ClassVar[int] = 200
    brief_start: ClassVar[bool] = True
    tempers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        MCMC(self, self.warmup, self.init_radius)  # checks the options

    # -- as a kernel ---------------------------------------------------------------------------

    @property
    def label(self) -> str:
        return "elliptical_slice"

    def on(self, program: Program) -> EllipticalSlice:
        """The kernel for a program's sites."""
        return dataclasses.replace(self, sites=gaussian_sites(program))

    def require(self, space: Space) -> None:
        self._known.require(type(self).__name__, space)

    @property
    def _known(self) -> GaussianSites:
        if self.sites is None:
            raise MethodError(
                "EllipticalSlice reads the priors off the model: run it in infer(...) or MCMC(...)."
            )
        return self.sites

    @property
    def _draws(self) -> GaussianDraws:
        return GaussianDraws(self._known.names)

    @property
    def functions(self) -> tuple[Any, ...]:
        return (self._draws, _Terms())

    def beginning(self, target: Target, position: Position, key: Any) -> Position:
        """A draw from the prior given the other sites, if its density is not zero."""
        laws = target.call(self._draws, position, key)
        drawn = {name: laws[name][1] for name in position}
        possible = jnp.isfinite(target.log_density(drawn))
        return {name: jnp.where(possible, drawn[name], x) for name, x in position.items()}

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        """The kernel on positions that have its sites alone."""

        def init(position: Position, key: Any = None) -> Placed:
            return Placed(dict(position), ())

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            continuous(type(self).__name__)
            from blackjax.mcmc import elliptical_slice as blackjax

            old, (key_prior, key_angle) = state.position, random.split(key)
            laws = target.call(self._draws, old, key_prior)
            mean = {name: laws[name][0] for name in old}
            draw = {name: laws[name][1] - mean[name] for name in old}

            def placed(deviation: Position) -> dict[str, Any]:
                return {name: mean[name] + x for name, x in deviation.items()}

            deviation = {name: x - mean[name] for name, x in old.items()}

            def log_likelihood(other: Position) -> Any:
                """Of all that depends on these sites but their own prior."""
                priors, rest = target.call(_Terms(), placed(other), ())
                value = rest + sum(x for name, x in priors.items() if name not in old)
                return jnp.where(jnp.isnan(value), -jnp.inf, value)

            def on_ellipse(other: Position) -> Any:
                """The same; the present point is on its slice, however the level was rounded.

                Without that the interval of angles could shrink for ever.
                """
                here = jnp.stack([jnp.all(x == deviation[name]) for name, x in other.items()])
                return jnp.where(jnp.all(here), jnp.inf, log_likelihood(other))

            here = jnp.nextafter(log_likelihood(deviation), -jnp.inf)  # levels are below it
            step = blackjax.elliptical_proposal(on_ellipse, lambda *_: draw, 0.0)
            new, info = step(key_angle, blackjax.EllipSliceState(deviation, here))
            evaluations = jnp.asarray(info.subiter + 1, jnp.int32)
            found = {"n_steps": jnp.zeros((), jnp.int32), "n_evaluations": evaluations}
            return Placed(placed(new.position), ()), found

        return Kernel(init, step, lambda state, position: init(position))

    # -- as a method: all sites, by their names --------------------------------------------------

    @property
    def _alone(self) -> MCMC:
        return MCMC(self, self.warmup, self.init_radius)

    @property
    def needs(self) -> tuple[Any, ...]:
        """The functions of the program that it uses."""
        return self._alone.needs

    def check(self, program: Program) -> None:
        """Refuse programs with sites whose prior is not Gaussian."""
        self._alone.check(program)

    def statics(self) -> tuple:
        return self._alone.statics()

    def settings(self, program: Program, warmup: int) -> Any:
        return self._alone.settings(program, warmup)

    def init(self, key: Any, start: Any, target: Any, settings: Any) -> Any:
        return self._alone.init(key, start, target, settings)

    def refresh(self, state: Any, target: Any, settings: Any) -> Any:
        return self._alone.refresh(state, target, settings)

    def step(
        self, key: Any, index: Any, state: Any, target: Any, settings: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        return self._alone.step(key, index, state, target, settings)

    def values(self, draw: Any, target: Any) -> dict[str, Any]:
        return self._alone.values(draw, target)

    def failed(self, state: Any) -> Any:
        return self._alone.failed(state)
