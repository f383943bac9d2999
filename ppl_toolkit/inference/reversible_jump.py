"""Moves between models of different dimension, on arrays of fixed size.

`BirthDeath` adds or removes one element of a masked plate; `Switch` goes from one case of a model
to another. (`split_merge` has moves that divide an element in two.) All are involutions on the
positions of `masked_plate` and `case`, where elements that are not there hold values of their own:
the new values of an element change places with those it rests with, so that dimensions match and
the determinant is one. Which move is tried, and where, is drawn in the auxiliary program, so that
the probability of the reverse move is part of the ratio.

Sources: Green (1995), Biometrika 82; Carlin and Chib (1995), JRSS B 57.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.primitives import Messenger

from ppl_toolkit.errors import MethodError, OptionError, SiteError
from ppl_toolkit.inference.moves import Move, uniform_below
from ppl_toolkit.inference.slots import (
    arranged,
    choice,
    element,
    moved,
    own_law,
    plate_of,
    require_plate,
    resting_law,
    swapped,
    with_element,
)
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.layout import Cases, Plate
from ppl_toolkit.positions import Position

__all__ = ["BirthDeath", "Jump", "Switch"]

Values = Mapping[str, Any]
Proposal = Callable[[Position, Target], Any]


class Jump(Move):
    """What moves that change the number of active elements of a masked plate share."""

    plate: str
    up: Callable[[Any], Any] | None

    def require(self, space: Space) -> None:
        require_plate(type(self).__name__, self.plate, space)

    def moves(self, space: Space) -> frozenset[str]:
        plate = require_plate(type(self).__name__, self.plate, space)
        return frozenset({plate.number, *plate.sites})

    def number(self, v: Values) -> Any:
        return 1 - v["up"]

    def sample_up(self, k: Any, levels: Any) -> Any:
        """Draw whether an element is added: b_k = P(up | k), d_k = 1 - b_k."""
        b = 0.5 if self.up is None else self.up(k)
        b = jnp.where(k <= levels[0], 1.0, jnp.where(k >= levels[-1], 0.0, b))
        return numpyro.sample("up", choice(jnp.log(jnp.stack([1.0 - b, b]))))

    def sample_rest(self, position: Position, target: Target, plate: Plate, up: Any) -> None:
        """Draw what the slot of a removed element will hold."""
        with handlers.mask(mask=up == 0):
            for name, like in element(position, plate, 0).items():
                levels = target.support(name) if name in target.levels else None
                numpyro.sample(f"rest/{name}", resting_law(like, levels))


@dataclasses.dataclass(frozen=True)
class BirthDeath(Jump):
    """Adds an element to a masked plate, or removes one.

    New elements are drawn from the model's own law of the sites over the plate, given all else, or
    from ``proposal``. A step up from k to k + 1 is accepted with probability min(1, r),

        log r = log p(k + 1, x, x_new) - log p(k, x) - log q(x_new) + log d_{k+1} - log b_k,

    for exchangeable slots: the new element comes to one of k + 1 places, from which it would be
    taken with the same probability. For ordered slots there is only one place to put it, and
    - log(k + 1) joins the ratio (p then has a factor k! more). Ordered "index", it is always the
    last slot that comes and goes.

    Args:
        plate: the masked plate.
        proposal: NumPyro program of (position, target) that draws one element: a value for every
            site over the plate, on the real space if continuous.
        up: b_k, the probability of a birth as a function of k; one half if None. The ends of k's
            support are seen to.

    Cost: one log density, and the laws of the new element.
    """

    plate: str
    proposal: Proposal | None = None
    up: Callable[[Any], Any] | None = None

    @property
    def label(self) -> str:
        return f"birth_death_{self.plate}"

    @property
    def names(self) -> tuple[str, ...]:
        return ("birth", "death")

    def auxiliary(self, position: Position, target: Target) -> None:
        plate = plate_of(target, self.plate)
        k = position[plate.number]
        up = self.sample_up(k, target.support(plate.number))
        places = {"": k + up, "index": 1}.get(plate.order, jnp.where(up, 1, k))
        numpyro.sample("slot", uniform_below(places, plate.size))
        with handlers.mask(mask=up == 1):
            if self.proposal is None:
                first = jnp.minimum(k, plate.size - 1)
                own_law(position, target, dict(plate.axes), first, "born")
            else:
                with handlers.scope(prefix="born"):
                    self.proposal(position, target)
        self.sample_rest(position, target, plate, up)

    def involution(
        self, position: Position, v: Values, target: Target
    ) -> tuple[Position, dict[str, Any]]:
        plate = plate_of(target, self.plate)
        k, up = position[plate.number], v["up"] == 1
        last = jnp.where(up, k, k - 1)  # the slot that comes or goes
        born = {name: v[f"born/{name}"] for name in plate.sites}
        rest = {name: v[f"rest/{name}"] for name in plate.sites}
        # A death first brings its slot to the last place; a birth ends by taking it to its own.
        to_last, to_own, slot = orders(plate, position, v["slot"], last, up, born)
        x = arranged(position, plate, to_last)
        old = element(x, plate, last)
        x = with_element(x, plate, last, chosen(up, born, rest))
        x = arranged(x, plate, to_own)
        x[plate.number] = k + jnp.where(up, 1, -1).astype(k.dtype)
        back = {"up": 1 - v["up"], "slot": slot}
        back |= prefixed("born", chosen(up, rest, old)) | prefixed("rest", chosen(up, old, born))
        return x, {name: jnp.asarray(value, v[name].dtype) for name, value in back.items()}


def orders(
    plate: Plate, position: Position, slot: Any, last: Any, up: Any, born: Values
) -> tuple[Any, Any, Any]:
    """The orders of slots before and after the last one is exchanged, and the reverse's slot.

    Args:
        slot: as drawn: the place of a birth among exchangeable slots, or the slot of a death.
        last: the slot that is exchanged.
    """
    as_is = jnp.arange(plate.size)
    if plate.order == "":
        order = swapped(plate.size, slot, last)
        return jnp.where(up, as_is, order), jnp.where(up, order, as_is), slot
    if plate.order == "index":
        return as_is, as_is, slot
    before = position[plate.order] < born[plate.order]
    rank = jnp.sum(before & (as_is < last))
    to_last = jnp.where(up, as_is, moved(plate.size, slot, last))
    to_own = jnp.where(up, moved(plate.size, last, rank), as_is)
    return to_last, to_own, jnp.where(up, rank, 0)


def chosen(up: Any, one: Values, other: Values) -> dict[str, Any]:
    return {name: jnp.where(up, one[name], other[name]) for name in one}


def prefixed(prefix: str, values: Values) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


# -- between named models --------------------------------------------------------------------------


class _MaskEach(Messenger):
    """Masks the sites of an auxiliary program one by one."""

    def __init__(self, masks: Mapping[str, Any]) -> None:
        super().__init__()
        self.masks = masks

    def process_message(self, message: dict) -> None:
        if message["type"] == "sample":
            message["fn"] = message["fn"].mask(self.masks[message["name"]])


@dataclasses.dataclass(frozen=True)
class Switch(Move):
    """Goes from one case of a model to another; see `case`.

    The sites of the new case are drawn from the model's own law or from ``proposal``, and those of
    the old one are put to rest. Good proposals, such as a normal approximation of every case's
    posterior, are what makes a difference here.

    Args:
        site: the integer site that says which case is active.
        names: what results call the cases, in the order of the values of the site; numbers if
            empty.
        proposal: NumPyro program of (position, target) that draws the sites of all cases, on the
            real space; only those of the case entered are used.

    Cost: one log density, and the laws of all cases.
    """

    site: str
    cases: tuple[str, ...] = ()
    proposal: Proposal | None = None

    @property
    def label(self) -> str:
        return f"switch_{self.site}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"to {name}" for name in self.cases) or (self.label,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", tuple(self.cases))

    def _cases(self, space: Space) -> Cases:
        within = space[self.site].within if self.site in space else None
        if not isinstance(within, Cases) or within.number != self.site:
            known = sorted({k.within.number for k in space.values() if isinstance(k.within, Cases)})
            raise SiteError(
                f"Switch is for site {self.site!r}, but no `case` depends on it; "
                f"sites that decide on cases: {known}."
            )
        return within

    def require(self, space: Space) -> None:
        cases = self._cases(space)
        if missing := [name for name, _ in cases.sites if name not in space]:
            raise MethodError(
                f"Switch moves all sites of the cases together, but its block leaves out {missing}."
            )
        count = space[self.site].cardinality
        if self.cases and len(self.cases) != count:
            raise OptionError(
                f"site {self.site!r} has {count} values, but there are {len(self.cases)} names: "
                f"{list(self.cases)}."
            )

    def moves(self, space: Space) -> frozenset[str]:
        return frozenset({self.site, *(name for name, _ in self._cases(space).sites)})

    def number(self, v: Values) -> Any:
        return v["to"] if self.cases else jnp.zeros((), jnp.int32)

    def _layout(self, target: Target) -> dict[str, int]:
        return dict(next(c for c in target.layout.cases if c.number == self.site).sites)

    def auxiliary(self, position: Position, target: Target) -> None:
        cases, levels = self._layout(target), target.support(self.site)
        now = position[self.site]
        others = jnp.where(levels == now, -jnp.inf, 0.0)
        to = numpyro.sample("to", choice(others))
        entered = {f"born/{name}": levels[to] == case for name, case in cases.items()}
        with _MaskEach(entered):
            if self.proposal is None:
                own_law(position, target, dict.fromkeys(cases), 0, "born")
            else:
                with handlers.scope(prefix="born"):
                    self.proposal(position, target)
        with _MaskEach({f"rest/{name}": now == case for name, case in cases.items()}):
            for name in cases:
                support = target.support(name) if name in target.levels else None
                numpyro.sample(f"rest/{name}", resting_law(position[name], support))

    def involution(
        self, position: Position, v: Values, target: Target
    ) -> tuple[Position, dict[str, Any]]:
        levels, now = target.support(self.site), position[self.site]
        to = levels[v["to"]].astype(now.dtype)
        new = {**position, self.site: to}
        back = {**v, "to": jnp.argmax(levels == now).astype(v["to"].dtype)}
        for name, case in self._layout(target).items():
            x, born, rest = position[name], v[f"born/{name}"], v[f"rest/{name}"]
            enters, leaves = to == case, now == case

            def pick(
                entering: Any, leaving: Any, still: Any, enters: Any = enters, leaves: Any = leaves
            ) -> Any:
                value = jnp.where(enters, entering, jnp.where(leaves, leaving, still))
                return value.astype(still.dtype)

            new[name] = pick(born, rest, x)
            back[f"born/{name}"] = pick(rest, x, born)
            back[f"rest/{name}"] = pick(x, born, rest)
        return new, back
