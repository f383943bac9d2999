"""Any composed kernel as a method of `infer`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.adaptation import Schedule, schedule
from ppl_toolkit.inference.first_point import first_finite
from ppl_toolkit.inference.kernel import Info, Kernel, Stage, require_spec
from ppl_toolkit.inference.moves import moves_of
from ppl_toolkit.inference.rehearsal import try_out
from ppl_toolkit.inference.step_sizes import require_radius, require_warmup
from ppl_toolkit.inference.target import Space, Target, space_of
from ppl_toolkit.layout import Layout, in_order
from ppl_toolkit.positions import Position
from ppl_toolkit.starts import held

__all__ = ["MCMC", "Settings"]

_TRIES = 100  # starting points drawn before giving up
_BIASED = (
    "stochastic gradients, nothing rejected: the draws follow the posterior up to a bias that "
    "shrinks with the step size"
)


class Settings(NamedTuple):
    """Options that are arguments of the compiled program.

    Attributes:
        radius: of random starts.
        schedule: of the warm-up.
        layout: of the masked plates.
        order: where in a flat position the elements of all sites are, by the sites' names.
        given: values of sites that stay as they are.
    """

    radius: Any
    schedule: Schedule
    layout: Layout
    order: Any
    given: dict[str, Any] = {}  # noqa: RUF012 (never changed)


class _Chain(NamedTuple):
    """The state of the kernel, and whether its chain began at a finite density."""

    kernel: Any
    started: Any


def _jumps(info: Info) -> Info:
    """Statistics in which the only kernel with moves has them under their plain names."""
    tails = [name.removeprefix("move") for name in info if name.split(".")[0] == "move"]
    if len(tails) != 1:
        return info
    return info | {name: info[name + tails[0]] for name in ("move", "accepted")}


def _require_relaxation(program: Any) -> None:
    """Refuse models that cannot be evaluated at real values of their discrete sites."""
    try:
        program.traced("relaxed_log_parts")
    except Exception as error:
        names = [site.name for site in program.discrete]
        raise MethodError(
            f"gradients with respect to the discrete sites {names} need a model that accepts real "
            "values there (such as Bernoulli sites in arithmetic, not as indices); this one raised "
            f"{type(error).__name__}: {str(error).splitlines()[0]}. Use Gibbs or LocallyBalanced."
        ) from None


def _require(kernel: Any, program: Any) -> Space:
    space = space_of(program)
    if not space:
        raise MethodError("the model has no latent site to infer.")
    kernel.require(space)
    if kernel.needs_relaxation:
        _require_relaxation(program)
    if kernel.needs_minibatches:
        program.require_minibatches(kernel.label, kernel.needs_whole)
    return space


@dataclasses.dataclass(frozen=True)
class MCMC:
    """Markov chain Monte Carlo with a kernel composed of pieces.

    Every latent site must be moved by some part of the kernel. Parts that adapt (the step sizes and
    metrics of HMC and NUTS, say) do so in warm-up, and are fixed afterwards.

    Args:
        kernel: such as ``cycle([block(NUTS(), ["mu", "sigma"]), block(Gibbs(), ["z"])])``.
        warmup: default number of warm-up iterations.
        init_radius: continuous sites start uniformly in (-radius, radius), unconstrained; discrete
            ones at a draw from the prior.
        given: values of sites that stay as they are, by name; no part of the kernel may move them.

    Source: the algebra of Tierney (1994), Annals of Statistics 22.
    """

    kernel: Any
    warmup: int = 1000
    init_radius: float = 2.0
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    refit_warmup: ClassVar[int] = 200
    brief_start: ClassVar[bool] = True  # `init` is made quickly rather than to run fast

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", require_spec(self.kernel))
        require_warmup(self.warmup)
        require_radius(self.init_radius)

    @property
    def needs(self) -> tuple[Any, ...]:
        """The functions of the program that the kernel uses."""
        needs = ["log_parts", "values_at", "levels", "start_position", "own_draws", "own_scores"]
        if self.kernel.needs_relaxation:
            needs.append("relaxed_log_parts")
        if self.minibatches:
            needs += ["rows", "log_parts_of_rows"]
            needs += ["whole_log_parts"] if self.kernel.needs_whole else []
        return (*needs, *self.kernel.functions)

    def on(self, program: Any) -> MCMC:
        """The method for a program, whose kernel may depend on what sites there are."""
        kernel = self.kernel.on(program)
        return self if kernel is self.kernel else dataclasses.replace(self, kernel=kernel)

    @property
    def minibatches(self) -> bool:
        """Whether some kernel draws the rows of subsampled plates anew at every step."""
        return self.kernel.needs_minibatches

    def check(self, program: Any) -> None:
        """Refuse programs with sites that the kernel cannot move, or leaves alone."""
        kernel = self.on(program).kernel
        space = _require(kernel, program)
        moved = kernel.moves(space)
        if still := sorted(set(space) - moved - set(self.given)):
            raise MethodError(
                f"no part of the kernel moves the latent sites {still}; add a block for them to "
                "the cycle."
            )
        if both := sorted(moved & set(self.given)):
            raise MethodError(
                f"given= holds the sites {both}, but the kernel moves them. Leave them out, or use "
                "blocks for the other sites."
            )
        held(program, self.given)
        try_out(kernel, program)

    def check_kernel(self, program: Any) -> None:
        """The same, but for a kernel that may leave sites alone."""
        kernel = self.on(program).kernel
        _require(kernel, program)
        try_out(kernel, program)

    def attributes(self) -> dict[str, str]:
        """What results say of the method: names of the moves that ``move`` counts, if any.

        And of kernels that are never rejected, that they are not exact.
        """
        names = moves_of([self.kernel])
        found = {"moves": json.dumps(names)} if names else {}
        return found | ({"approximation": _BIASED} if self.minibatches else {})

    def statics(self) -> tuple:
        return (self.kernel,)

    def settings(self, program: Any, warmup: int) -> Settings:
        radius = np.asarray(self.init_radius, program.precision)
        own = sorted(program.continuous, key=lambda site: site.name)
        places = [site.offset + np.arange(site.unconstrained_size) for site in own]
        order = np.concatenate([np.zeros(0, int), *places])
        given = held(program, self.given)
        return Settings(radius, schedule(warmup), program.layout, order, given)

    def _bound(self, target: Any, position: Position, stage: Stage, layout: Layout) -> Kernel:
        return self.kernel.bind(self._target(target, position, layout), stage)

    def _target(self, target: Any, position: Position, layout: Layout) -> Target:
        own = (target.own_draws, target.own_scores)
        relaxed = getattr(target, "relaxed_log_parts", None)
        parts = getattr(target, "whole_log_parts", target.log_parts)
        minibatches = (target.rows, target.log_parts_of_rows) if self.minibatches else None
        return Target(
            parts, target.levels(position), layout=layout, own=own, relaxed=relaxed,
            minibatches=minibatches, functions=target.functions,
        )  # fmt: skip

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> _Chain:
        """A point of finite density, from at most 100 draws, and the kernel's state there."""
        flat, given = start
        key_position, key_kernel = random.split(key)

        def draw(number: Any) -> dict[str, Any]:
            key_prior, key_radius = random.split(random.fold_in(key_position, number))
            position = target.start_position(key_prior)
            real = [n for n in sorted(position) if jnp.issubdtype(position[n].dtype, jnp.floating)]
            sizes = [position[name].size for name in real]
            uniform = random.uniform(key_radius, flat.shape, flat.dtype, -1.0, 1.0)
            parts = jnp.split(
                jnp.where(given, flat[settings.order], settings.radius * uniform),
                np.cumsum(sizes)[:-1],
            )
            parts = parts[: len(real)]  # jnp.split gives one part of no sites
            fresh = {n: p.reshape(position[n].shape) for n, p in zip(real, parts, strict=True)}
            return in_order(settings.layout, {**position, **fresh, **settings.given})

        def finite(position: Position) -> Any:
            return jnp.isfinite(sum(target.log_parts(position)))

        position, found = first_finite(draw, finite, _TRIES)
        bare = self._target(target, position, settings.layout)
        begun = self.kernel.beginning(bare, position, random.fold_in(key_position, _TRIES))
        if begun is not position:
            position = {n: jnp.where(given, x, begun[n]) for n, x in position.items()}
        stage = Stage(jnp.zeros((), jnp.int32), settings.schedule)
        kernel = self.kernel.bind(bare, stage)
        return _Chain(kernel.init(position, key_kernel), found)

    def refresh(self, state: _Chain, target: Any, settings: Settings) -> _Chain:
        position = state.kernel.position
        stage = Stage(jnp.zeros((), jnp.int32), settings.schedule)
        kernel = self._bound(target, position, stage, settings.layout)
        return state._replace(kernel=kernel.refresh(state.kernel, position))

    def step(
        self, key: Any, index: Any, state: _Chain, target: Any, settings: Settings
    ) -> tuple[_Chain, Position, dict[str, Any]]:
        stage = Stage(index, settings.schedule)
        kernel = self._bound(target, state.kernel.position, stage, settings.layout)
        moved, info = kernel.step(key, state.kernel)
        stats = _jumps(info)
        if not self.minibatches:  # else it would cost more than all the rest
            stats = stats | {"lp": sum(target.log_parts(moved.position))}
        return state._replace(kernel=moved), moved.position, stats

    def values(self, draw: Position, target: Any) -> dict[str, Any]:
        return target.values_at(draw)

    def failed(self, state: _Chain) -> Any:
        return ~np.asarray(state.started)
