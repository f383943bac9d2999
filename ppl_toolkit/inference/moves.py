"""One of several involutive moves per step, with one evaluation of the density for all of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.auxiliary import draw
from ppl_toolkit.inference.involution import Involutive, Trial, log_determinant
from ppl_toolkit.inference.kernel import SAMPLING, Info, Kernel, Spec, Stage
from ppl_toolkit.inference.randomness import switch
from ppl_toolkit.inference.slots import choice, element, with_element
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.layout import Plate
from ppl_toolkit.positions import Position

__all__ = ["Move", "Moves", "Walk"]

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Counted(Involutive):
    """An involution whose statistics say which move was tried."""

    number: Callable[[Values], Any] = lambda v: jnp.zeros((), jnp.int32)

    def statistics(self, v: Values) -> Info:
        return {"move": jnp.asarray(self.number(v), jnp.int32)}


class Move(Spec):
    """A move between dimensions (or not), given by an auxiliary program and an involution.

    Only moves that take functions of the user's are tried before a run.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what it does: ("birth", "death"), say."""
        return (self.label,)

    def number(self, v: Values) -> Any:
        """Which of its ``names`` an auxiliary draw stands for."""
        return jnp.zeros((), jnp.int32)

    @abc.abstractmethod
    def auxiliary(self, position: Position, target: Target) -> None:
        """NumPyro program that draws v."""

    @abc.abstractmethod
    def involution(
        self, position: Position, v: Values, target: Target
    ) -> tuple[Position, dict[str, Any]]:
        """F(x, v), its own inverse."""

    def log_det(self, position: Position, v: Values, target: Target) -> Any:
        """Log |det df|."""
        return 0.0

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        return self._involutive().bind(target, stage)

    def trials(self, target: Target, position: Position, key: Any) -> dict[str, Any]:
        """As for any involution, but without the density: compiled once for every part."""
        own = self._involutive()
        v, _ = draw(self.auxiliary, key, position, target)
        new, new_v, log_det = own.image(position, v, target)
        back, back_v, back_log_det = own.image(new, new_v, target)
        exact = log_determinant(lambda x, v: self.involution(x, v, target), position, v)
        dets = [jnp.asarray(d, jnp.result_type(float)) for d in (log_det, back_log_det, exact)]
        z, fz = ({**x, **{f"auxiliary {n}": y for n, y in u.items()}}
                 for x, u in ((position, v), (back, back_v)))  # fmt: skip
        return {self.label: Trial(z, fz, jnp.zeros(()), *dets)}

    def _involutive(self) -> _Counted:
        return _Counted(self.auxiliary, self.involution, self.log_det, self.label, self.number)


@dataclasses.dataclass(frozen=True)
class Moves(Move):
    """One of several moves per step, drawn with constant probabilities.

    Against a `mixture` of the same moves the density is evaluated, and compiled, once for all of
    them, and results say in ``sample_stats`` which move was tried and whether it was accepted.

    Args:
        choices: moves such as `BirthDeath`, `SplitMerge`, `Switch`, `Walk`.
        weights: their probabilities, up to a factor; equal if None.

    Cost per step: one log density, and the auxiliary programs of all parts (those of the parts not
    taken are drawn and ignored).
    """

    choices: tuple[Move, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        parts = tuple(self.choices)
        if not parts or not all(isinstance(part, Move) for part in parts):
            raise OptionError(
                "Moves takes moves such as BirthDeath(plate) or Walk(site, 0.5); got "
                f"{parts!r:.80}."
            )
        weights = np.ones(len(parts)) if self.weights is None else np.asarray(self.weights, float)
        if weights.shape != (len(parts),) or not (np.isfinite(weights) & (weights > 0)).all():
            raise OptionError(
                f"{len(parts)} moves need as many positive weights; got {self.weights!r:.80}."
            )
        object.__setattr__(self, "choices", parts)
        object.__setattr__(self, "weights", tuple((weights / weights.sum()).tolist()))

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.choices

    @property
    def names(self) -> tuple[str, ...]:
        names = [name for part in self.choices for name in part.names]
        return tuple(
            name if names.count(name) == 1 else f"{name} {names[:i].count(name) + 1}"
            for i, name in enumerate(names)
        )

    def number(self, v: Values) -> Any:
        first = np.cumsum([0, *(len(part.names) for part in self.choices)])
        each = [part.number(self._own(v, i)) + first[i] for i, part in enumerate(self.choices)]
        return jnp.stack(each)[v["part"]]

    def require(self, space: Space) -> None:
        for part in self.choices:
            part.require(space)

    def moves(self, space: Space) -> frozenset[str]:
        return frozenset().union(*(part.moves(space) for part in self.choices))

    def trials(self, target: Target, position: Position, key: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i, part in enumerate(self.choices):
            if not part.needs_trial:
                continue
            own = part.trials(target, position, key)
            found |= {f"{label}, part {i} of Moves": trial for label, trial in own.items()}
        return found

    def _own(self, v: Values, i: int) -> dict[str, Any]:
        """The auxiliary values of one part."""
        return {k.removeprefix(f"{i}/"): x for k, x in v.items() if k.startswith(f"{i}/")}

    def auxiliary(self, position: Position, target: Target) -> None:
        part = numpyro.sample("part", dist.Categorical(jnp.asarray(self.weights)))
        for i, move in enumerate(self.choices):
            with handlers.scope(prefix=str(i)), handlers.mask(mask=part == i):
                move.auxiliary(position, target)

    def _taken(self, function: Callable[[int, Move], Callable], v: Values, *args: Any) -> Any:
        branches = [function(i, move) for i, move in enumerate(self.choices)]
        return switch(v["part"], branches, *args)

    def involution(
        self, position: Position, v: Values, target: Target
    ) -> tuple[Position, dict[str, Any]]:
        def image(i: int, move: Move) -> Callable:
            def branch(position: Position, v: Values) -> tuple[Position, Values]:
                new, own = move.involution(position, self._own(v, i), target)
                return dict(new), {**v, **{f"{i}/{name}": x for name, x in own.items()}}

            return branch

        return self._taken(image, v, dict(position), dict(v))

    def log_det(self, position: Position, v: Values, target: Target) -> Any:
        def log_det(i: int, move: Move) -> Callable:
            return lambda position, v: jnp.asarray(
                move.log_det(position, self._own(v, i), target), jnp.result_type(float)
            )

        return self._taken(log_det, v, dict(position), dict(v))


@dataclasses.dataclass(frozen=True)
class Walk(Move):
    """Random-walk Metropolis on one site; on one active element, if it lies over a masked plate.

    Args:
        site: a continuous latent site.
        scale: standard deviation of the steps, on the real space.

    Cost: one log density.
    """

    site: str
    scale: float

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, int | float) and 0 < self.scale < float("inf")):
            raise OptionError(f"scale must be a positive number; got {self.scale!r}.")

    @property
    def label(self) -> str:
        return f"walk_{self.site}"

    def require(self, space: Space) -> None:
        if self.site not in space:
            raise MethodError(f"Walk names {self.site!r}; the latent sites are {sorted(space)}.")
        if space[self.site].discrete:
            raise MethodError(f"Walk moves real numbers, but site {self.site!r} is discrete.")
        within = space[self.site].within
        if isinstance(within, Plate) and within.number not in space:
            raise MethodError(
                f"Walk moves one active element of {self.site!r}, but its block leaves out "
                f"{within.number!r}, which says which are active."
            )

    def moves(self, space: Space) -> frozenset[str]:
        return frozenset({self.site})

    def _plate(self, target: Target) -> Plate | None:
        """The plate of the site, with this site alone."""
        for plate in target.layout.plates:
            for name, axis in plate.axes:
                if name == self.site:
                    return plate._replace(axes=((name, axis),))
        return None

    def auxiliary(self, position: Position, target: Target) -> None:
        plate, x = self._plate(target), position[self.site]
        if plate is not None:
            count = jnp.maximum(position[plate.number], 1)  # with none, an inactive one is moved
            numpyro.sample("slot", uniform_below(count, plate.size))
            x = element(position, plate, 0)[self.site]
        numpyro.sample("step", dist.Normal(jnp.zeros_like(x), self.scale).to_event(x.ndim))

    def involution(
        self, position: Position, v: Values, target: Target
    ) -> tuple[Position, dict[str, Any]]:
        plate, back = self._plate(target), {**v, "step": -v["step"]}
        if plate is None:
            return {**position, self.site: position[self.site] + v["step"]}, back
        old = element(position, plate, v["slot"])[self.site]
        return with_element(position, plate, v["slot"], {self.site: old + v["step"]}), back


def uniform_below(count: Any, size: int) -> Any:
    """Uniform on 0, ..., count - 1, of ``size`` numbers."""
    return choice(jnp.where(jnp.arange(size) < count, 0.0, -jnp.inf))


def moves_of(specs: Sequence[Any]) -> tuple[str, ...]:
    """The names of the moves of the one `Move` among specs and their parts; none if not one."""
    found = [spec for spec in specs if isinstance(spec, Move)]
    rest = [part for spec in specs if not isinstance(spec, Move) for part in spec.parts]
    if rest:
        inner = moves_of(rest)
        return found[0].names if len(found) == 1 and not inner else inner if not found else ()
    return found[0].names if len(found) == 1 else ()
