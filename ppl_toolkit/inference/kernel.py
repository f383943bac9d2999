"""Kernels, and the combinators that make kernels of kernels.

A `Kernel` leaves a target invariant. What a person composes is a *spec*, a small immutable
description: ``cycle([block(NUTS(), ["mu"]), block(Gibbs(), ["z"])])``. It becomes a kernel when it
is bound to a target, inside the compiled program, so that the target's data stay arguments.

Cycles, and mixtures with constant weights, of kernels that leave a target invariant leave it
invariant; reversibility survives mixtures and palindromic cycles (Tierney 1994). A kernel on some
sites given the others leaves the joint target invariant if it leaves their conditional invariant.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit.errors import MethodError, OptionError, SiteError
from ppl_toolkit.inference.adaptation import Schedule, schedule
from ppl_toolkit.inference.randomness import categorical, repeated, shapes_of, switch
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.positions import Position

__all__ = [
    "SAMPLING",
    "Block",
    "Cloud",
    "Cycle",
    "Info",
    "Kernel",
    "Mixture",
    "Placed",
    "Repeat",
    "Spec",
    "Stage",
    "Tempered",
    "block",
    "cycle",
    "labels",
    "mixture",
    "repeat",
    "require_continuous",
    "require_exact",
    "require_spec",
    "require_tempering",
    "tempered",
]

Info = dict[str, Any]


class Cloud(NamedTuple):
    """What a population tells its kernels: they tune themselves to it between stages.

    Attributes:
        positions: of the particles, arrays (N, ...) by site.
        weights: normalised, (N,).
        acceptance: mean acceptance statistic of the last moves; NaN before the first.
    """

    positions: Position
    weights: Any
    acceptance: Any


def _unmoved(state: Any, cloud: Cloud) -> Any:
    return state


class Kernel(NamedTuple):
    """A Markov kernel bound to its target. States have a ``position``.

    Attributes:
        init: (position, key) -> state.
        step: (key, state) -> (state, information).
        refresh: (state, position) -> the state moved there: what it keeps of the target (densities,
            gradients) is renewed, what it has learned (step sizes) stays.
        tune: (state, cloud) -> the state with step sizes and scales learned from a population.
    """

    init: Callable[[Position, Any], Any]
    step: Callable[[Any, Any], tuple[Any, Info]]
    refresh: Callable[[Any, Position], Any]
    tune: Callable[[Any, Cloud], Any] = _unmoved


class Stage(NamedTuple):
    """Where in a run a step is taken: kernels adapt while ``index`` is in the warm-up."""

    index: Any
    schedule: Schedule

    @property
    def warming(self) -> Any:
        return self.index < self.schedule.warmup


SAMPLING = Stage(np.int32(0), schedule(0))


class Placed(NamedTuple):
    """A position, and what a kernel keeps beside it."""

    position: Position
    kept: Any


class Spec(abc.ABC):
    """A description of a kernel.

    Attributes:
        reversible: whether the kernel is reversible, if its parts are.
        label: short name for statistics and messages.
        tried: whether it has `trials` of its own.
        alone: whether no other kernel may move its sites.
        relaxes: whether it evaluates the model at real values of discrete sites.
        tunes: whether it learns step sizes or scales in warm-up.
        redraws: whether it draws the rows of subsampled plates anew at every step.
        tempers: whether it can follow a target whose likelihood has another power.
    """

    reversible: ClassVar[bool] = True
    tried: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    relaxes: ClassVar[bool] = False
    tunes: ClassVar[bool] = False
    redraws: ClassVar[bool] = False
    tempers: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return type(self).__name__.lower()

    def require(self, space: Space) -> None:
        """Refuse sites this kernel cannot move.

        Raises:
            MethodError: says which and why.
        """
        for part in self.parts:
            part.require(space)

    def moves(self, space: Space) -> frozenset[str]:
        """The sites that the kernel may change: those of its parts, or all if it has none."""
        own = [part.moves(space) for part in self.parts]
        return frozenset().union(*own) if own else frozenset(space)

    def on(self, program: Any) -> Any:
        """The kernel for a program: this one, unless a part must know the program's sites."""
        own = self.parts
        parts = tuple(part.on(program) for part in own)
        if all(new is old for new, old in zip(parts, own, strict=True)):
            return self
        several = {"kernels": parts} if hasattr(self, "kernels") else {"kernel": parts[0]}
        return dataclasses.replace(self, **several)  # type: ignore[type-var]

    def beginning(self, target: Target, position: Position, key: Any) -> Position:
        """Where a chain may better begin than at a random position; that position, mostly."""
        for number, part in enumerate(self.parts):
            position = part.beginning(target, position, random.fold_in(key, number))
        return position

    @property
    def functions(self) -> tuple[Any, ...]:
        """Functions of a program that the kernel calls beside its density: see `Target.call`."""
        found = [function for part in self.parts for function in part.functions]
        return tuple(dict.fromkeys(found))

    @abc.abstractmethod
    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        """The kernel that leaves the target invariant."""

    def trials(self, target: Target, position: Position, key: Any) -> dict[str, Any]:
        """What involutions among the parts do at one position, by label: see `involution.judge`."""
        found: dict[str, Any] = {}
        for part in self.parts:
            found |= part.trials(target, position, key)
        return found

    def alternatives(self) -> tuple[Any, ...]:
        """Smaller kernels, each of which must leave the target invariant if this one is made well.

        They act on the sites that this one acts on.
        """
        return self.parts

    def __repr__(self) -> str:
        """The options; functions by their names, so that it is the same in every process."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        shown = {
            name: getattr(value, "__qualname__", repr(value)) if callable(value) else repr(value)
            for name, value in options.items()
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"

    @property
    def needs_trial(self) -> bool:
        """Whether this kernel or one of its parts has something to try."""
        return self.tried or any(part.needs_trial for part in self.parts)

    @property
    def adapts(self) -> bool:
        """Whether this kernel or one of its parts learns in warm-up."""
        return self.tunes or any(part.adapts for part in self.parts)

    @property
    def needs_relaxation(self) -> bool:
        """Whether this kernel or one of its parts evaluates the model at such values."""
        return self.relaxes or any(part.needs_relaxation for part in self.parts)

    @property
    def needs_minibatches(self) -> bool:
        """Whether this kernel or one of its parts draws rows anew."""
        return self.redraws or any(part.needs_minibatches for part in self.parts)

    @property
    def needs_whole(self) -> bool:
        """Whether this kernel or one of its parts evaluates the model on all rows."""
        return any(part.needs_whole for part in self.parts) if self.parts else True

    @property
    def parts(self) -> tuple[Any, ...]:
        """The specs this one is made of."""
        own = getattr(self, "kernels", None)
        if own is None:
            own = (self.kernel,) if hasattr(self, "kernel") else ()
        return tuple(own)


def require_spec(spec: Any) -> Any:
    """A spec: as it is, or made from its class.

    Raises:
        OptionError: it is none.
    """
    made = spec() if isinstance(spec, type) else spec
    if not callable(getattr(made, "bind", None)):
        raise OptionError(
            f"a kernel is needed, such as NUTS() or Gibbs(); got {spec!r:.80}. Kernels of blackjax "
            "become ours by lift(...)."
        )
    return made


def require_specs(specs: Iterable[Any]) -> tuple[Any, ...]:
    made = tuple(require_spec(spec) for spec in specs)
    if not made:
        raise OptionError("there are no kernels to compose; give at least one.")
    if len(made) > 1 and (lonely := [spec.label for spec in made if spec.alone]):
        raise OptionError(
            f"{lonely[0]} keeps an estimate that belongs to its position, so no other kernel may "
            "move it: run it alone, with a proposal for all sites."
        )
    powers = {getattr(spec, "power", 1.0) for spec in made}
    if len(powers) > 1:
        raise OptionError(
            f"these kernels leave different targets invariant (likelihood to the powers "
            f"{sorted(powers)}), so their composition leaves none invariant."
        )
    return made


def require_tempering(label: str, kernel: Any) -> None:
    """Refuse kernels that leave the posterior invariant, and no law with a tempered likelihood.

    Raises:
        MethodError: names what needs others.
    """
    if not kernel.tempers:
        raise MethodError(
            f"{label} gives its kernels likelihoods to other powers, but {kernel.label} runs the "
            "model itself, and follows the posterior alone. Run it in MCMC(...)."
        )
    for part in kernel.parts:
        require_tempering(label, part)


def require_exact(label: str, kernel: Any) -> None:
    """Refuse kernels that leave their target invariant only up to a bias.

    Raises:
        MethodError: names what needs better ones.
    """
    require_tempering(label, kernel)
    if kernel.needs_minibatches:
        raise MethodError(
            f"{label} needs kernels that leave every one of its targets invariant, and "
            f"{kernel.label} has a part that follows gradients of minibatches, which does so only "
            "up to a bias. Use HMC or NUTS, or run it alone: MCMC(...)."
        )


def labels(specs: Sequence[Any]) -> list[str]:
    """A different name for every part."""
    names = [spec.label for spec in specs]
    return [
        name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


_TOTALS = {"n_steps": jnp.add, "n_evaluations": jnp.add, "diverging": jnp.logical_or,
           "reached_max_treedepth": jnp.logical_or}  # fmt: skip


def _joined(labels: Sequence[str], infos: Sequence[Info]) -> Info:
    """Statistics of the parts under their names, and the totals that reports look for."""
    found: Info = {}
    for label, info in zip(labels, infos, strict=True):
        for name, value in info.items():
            if name in _TOTALS:
                found[name] = _TOTALS[name](found[name], value) if name in found else value
            else:
                found[f"{name}.{label}"] = value
    return found


# -- one after the other ------------------------------------------------------------------------


class Parts(NamedTuple):
    """A position, and the states of the parts of a composition."""

    position: Position
    parts: tuple[Any, ...]


class _Several(Spec):
    """What compositions of several kernels share."""

    kernels: tuple[Any, ...]

    @property
    def power(self) -> Any:
        return getattr(self.kernels[0], "power", 1.0)


@dataclasses.dataclass(frozen=True)
class Cycle(_Several):
    """Kernels one after the other."""

    kernels: tuple[Any, ...]
    palindromic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", require_specs(self.kernels))

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        return (self.palindromic or len(self.kernels) == 1) and all(
            spec.reversible for spec in self.kernels
        )

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        kernels = [spec.bind(target, stage) for spec in self.kernels]
        names = labels(self.kernels)
        order = [*range(len(kernels))]
        order += order[::-1] if self.palindromic else []

        def step(key: Any, state: Parts) -> tuple[Parts, Info]:
            position, parts = state.position, list(state.parts)
            infos: dict[int, Info] = {}
            fresh = -1  # the part that knows the current position
            for turn, i in enumerate(order):
                if i != fresh and len(kernels) > 1:
                    parts[i] = kernels[i].refresh(parts[i], position)
                parts[i], infos[i] = kernels[i].step(random.fold_in(key, turn), parts[i])
                position, fresh = parts[i].position, i
            return Parts(position, tuple(parts)), _joined(names, [infos[i] for i in sorted(infos)])

        return Kernel(_init_parts(kernels), step, _refresh_parts(kernels), _tune_parts(kernels))


def cycle(kernels: Iterable[Any], palindromic: bool = False) -> Cycle:
    """Kernels one after the other; palindromic: forth and back, which keeps reversibility.

    Raises:
        OptionError: there are none, or they leave different targets invariant.
    """
    return Cycle(tuple(kernels), palindromic)


def _init_parts(kernels: Sequence[Kernel]) -> Callable:
    def init(position: Position, key: Any) -> Parts:
        keys = [random.fold_in(key, i) for i in range(len(kernels))]
        return Parts(
            position, tuple(k.init(position, own) for k, own in zip(kernels, keys, strict=True))
        )

    return init


def _refresh_parts(kernels: Sequence[Kernel]) -> Callable:
    def refresh(state: Parts, position: Position) -> Parts:
        parts = (k.refresh(part, position) for k, part in zip(kernels, state.parts, strict=True))
        return Parts(position, tuple(parts))

    return refresh


def _tune_parts(kernels: Sequence[Kernel]) -> Callable:
    def tune(state: Parts, cloud: Cloud) -> Parts:
        parts = (k.tune(part, cloud) for k, part in zip(kernels, state.parts, strict=True))
        return state._replace(parts=tuple(parts))

    return tune


# -- one of them --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mixture(_Several):
    """One of several kernels, drawn with constant probabilities."""

    kernels: tuple[Any, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", require_specs(self.kernels))
        constant = not callable(self.weights)
        weights = np.asarray(self.weights if constant else (), float)
        if weights.shape != (len(self.kernels),):
            raise OptionError(
                f"a mixture of {len(self.kernels)} kernels needs as many constant weights; got "
                f"{self.weights!r:.80}. Weights that depend on the state belong into the ratio of "
                "an involutive kernel."
            )
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise OptionError(f"weights must be non-negative numbers; got {self.weights!r:.80}.")
        object.__setattr__(self, "weights", tuple((weights / weights.sum()).tolist()))

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        return all(spec.reversible for spec in self.kernels)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        kernels = [spec.bind(target, stage) for spec in self.kernels]
        names = labels(self.kernels)

        def step(key: Any, state: Parts) -> tuple[Parts, Info]:
            key_which, key_step = random.split(key)
            which = categorical(key_which, jnp.log(jnp.asarray(self.weights)))

            def take(i: int) -> Callable:
                def branch(key: Any, state: Parts) -> tuple[Parts, Info]:
                    part = kernels[i].refresh(state.parts[i], state.position)
                    part, info = kernels[i].step(key, part)
                    parts = (*state.parts[:i], part, *state.parts[i + 1 :])
                    return Parts(part.position, parts), info

                return branch

            branches = [take(i) for i in range(len(kernels))]
            shapes = [shapes_of(branch, key_step, state)[1] for branch in branches]

            def padded(i: int) -> Callable:
                """A branch that also gives the (empty) statistics of the others."""

                def branch(key: Any, state: Parts) -> tuple[Parts, Info]:
                    new, info = branches[i](key, state)
                    infos = [info if j == i else _nothing(shapes[j]) for j in range(len(shapes))]
                    return new, _joined(names, infos)

                return branch

            state, info = switch(which, [padded(i) for i in range(len(kernels))], key_step, state)
            return state, {**info, "kernel": which}

        return Kernel(_init_parts(kernels), step, _refresh_parts(kernels), _tune_parts(kernels))


def _nothing(shapes: Info) -> Info:
    """Statistics of a kernel that was not taken: NaN, or zero where there is none."""

    def empty(like: Any) -> Any:
        value = jnp.nan if jnp.issubdtype(like.dtype, jnp.floating) else 0
        return jnp.full(like.shape, value, like.dtype)

    return jax.tree.map(empty, shapes)


def mixture(kernels: Iterable[Any], weights: Sequence[float] | None = None) -> Mixture:
    """One of several kernels per step, with constant probabilities (equal ones if None).

    Raises:
        OptionError: there are none, they leave different targets invariant, or the weights are no
            constants.
    """
    made = tuple(kernels)
    return Mixture(made, (1.0,) * len(made) if weights is None else weights)  # type: ignore[arg-type]


# -- several times ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Repeat(Spec):
    """A kernel several times per step; the statistics are of the last time, counts of all."""

    kernel: Any
    times: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", require_spec(self.kernel))
        if isinstance(self.times, bool) or not isinstance(self.times, int) or self.times < 1:
            raise OptionError(f"times must be an integer >= 1; got {self.times!r}.")

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        return self.kernel.reversible

    @property
    def label(self) -> str:
        return self.kernel.label

    @property
    def power(self) -> Any:
        return getattr(self.kernel, "power", 1.0)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        kernel = self.kernel.bind(target, stage)

        def step(key: Any, state: Any) -> tuple[Any, Info]:
            def again(i: Any, carry: tuple[Any, Info]) -> tuple[Any, Info]:
                state, before = carry
                state, info = kernel.step(random.fold_in(key, i), state)
                totals = {k: _TOTALS[k](before[k], info[k]) for k in info if k in _TOTALS}
                return state, {**info, **totals}

            first = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), shapes_of(kernel.step, key, state)[1]
            )
            return repeated(self.times, again, (state, first))

        return kernel._replace(step=step)


def repeat(kernel: Any, times: int) -> Repeat:
    """A kernel ``times`` times per step."""
    return Repeat(kernel, times)


# -- some sites given the others ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block(Spec):
    """A kernel on some sites, given the others."""

    kernel: Any
    sites: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", require_spec(self.kernel))
        sites = (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)
        if not sites or not all(isinstance(name, str) for name in sites):
            raise OptionError(f"sites must be names of latent sites; got {self.sites!r}.")
        object.__setattr__(self, "sites", sites)

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        return self.kernel.reversible

    @property
    def label(self) -> str:
        return f"{self.kernel.label}_{'_'.join(self.sites)}"

    @property
    def power(self) -> Any:
        return getattr(self.kernel, "power", 1.0)

    def require(self, space: Space) -> None:
        unknown = [name for name in self.sites if name not in space]
        if unknown:
            raise SiteError(f"block names {unknown}; the latent sites here are {sorted(space)}.")
        self.kernel.require({name: space[name] for name in self.sites})

    def moves(self, space: Space) -> frozenset[str]:
        return self.kernel.moves({name: space[name] for name in self.sites})

    def alternatives(self) -> tuple[Any, ...]:
        return tuple(Block(part, self.sites) for part in self.kernel.alternatives())

    def beginning(self, target: Target, position: Position, key: Any) -> Position:
        own = {name: position[name] for name in self.sites}
        rest = {name: value for name, value in position.items() if name not in own}
        begun = self.kernel.beginning(target.given(rest), own, random.fold_in(key, 0))
        return position if begun is own else {**position, **begun}

    def trials(self, target: Target, position: Position, key: Any) -> dict[str, Any]:
        own = {name: position[name] for name in self.sites}
        rest = {name: value for name, value in position.items() if name not in own}
        return self.kernel.trials(target.given(rest), own, key)

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        def split(position: Position) -> tuple[Position, Kernel]:
            """The block's own part of a position, and its kernel given the rest."""
            own = {name: position[name] for name in self.sites}
            rest = {name: value for name, value in position.items() if name not in own}
            return own, self.kernel.bind(target.given(rest), stage)

        def init(position: Position, key: Any) -> Placed:
            own, kernel = split(position)
            return Placed(position, kernel.init(own, key))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            _, kernel = split(state.position)
            inner, info = kernel.step(key, state.kept)
            moved: Mapping[str, Any] = {**state.position, **inner.position}
            return Placed(moved, inner), {k: v for k, v in info.items() if k != "lp"}

        def refresh(state: Placed, position: Position) -> Placed:
            own, kernel = split(position)
            return Placed(position, kernel.refresh(state.kept, own))

        def tune(state: Placed, cloud: Cloud) -> Placed:
            _, kernel = split(state.position)
            own = {name: cloud.positions[name] for name in self.sites}
            return state._replace(kept=kernel.tune(state.kept, cloud._replace(positions=own)))

        return Kernel(init, step, refresh, tune)


def block(kernel: Any, sites: str | Sequence[str]) -> Block:
    """A kernel on some latent sites, given the current values of the others.

    Raises:
        OptionError: ``sites`` are no names.
    """
    return Block(kernel, sites)  # type: ignore[arg-type]


# -- another power of the likelihood -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tempered(Spec):
    """A kernel for the prior times a power of the likelihood."""

    kernel: Any
    power: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", require_spec(self.kernel))
        require_tempering("tempered(...)", self.kernel)
        if not (isinstance(self.power, int | float) and 0 <= self.power < float("inf")):
            raise OptionError(f"power must be a number >= 0; got {self.power!r}.")

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        return self.kernel.reversible

    @property
    def label(self) -> str:
        return self.kernel.label

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        return self.kernel.bind(target.tempered(self.power), stage)

    def alternatives(self) -> tuple[Any, ...]:
        return tuple(Tempered(part, self.power) for part in self.kernel.alternatives())


def tempered(kernel: Any, power: float) -> Tempered:
    """A kernel for the prior times ``likelihood ** power``: a generalised posterior."""
    return Tempered(kernel, power)


def require_continuous(label: str, space: Space) -> None:
    """Refuse discrete sites under a kernel that uses gradients or real-valued moves."""
    discrete = [name for name, kind in space.items() if kind.discrete]
    if discrete:
        raise MethodError(
            f"{label} moves real numbers, but sites {discrete} are discrete. Compose it: "
            f"cycle([block({label}(), [continuous sites]), block(Gibbs(), {discrete})])."
        )
