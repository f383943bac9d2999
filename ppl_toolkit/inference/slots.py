"""The slots of a masked plate in a position: one slot's values, and slots in another order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import constraints

from ppl_toolkit.errors import MethodError, SiteError
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.layout import Plate
from ppl_toolkit.positions import Position

__all__ = [
    "arranged",
    "choice",
    "element",
    "moved",
    "own_law",
    "plate_of",
    "require_plate",
    "resting_law",
    "swapped",
    "with_element",
]


def plate_of(target: Target, name: str) -> Plate:
    """The masked plate called ``name``."""
    return next(plate for plate in target.layout.plates if plate.name == name)


def require_plate(label: str, name: str, space: Space) -> Plate:
    """The plate, all of whose sites are there.

    Raises:
        SiteError: there is no such plate.
        MethodError: a block leaves out some of its sites, or slots hold several discrete values.
    """
    plates = {k.within.name: k.within for k in space.values() if isinstance(k.within, Plate)}
    if name not in plates:
        raise SiteError(
            f"{label} is for masked plate {name!r}; "
            + (f"the masked plates here are {sorted(plates)}." if plates else "there are none: "
               f"write `with masked_plate({name!r}, size, k):` in the model.")
        )  # fmt: skip
    plate = plates[name]
    if missing := [site for site in (plate.number, *plate.sites) if site not in space]:
        raise MethodError(
            f"{label} moves all sites of masked plate {name!r} together, but its block leaves out "
            f"{missing}."
        )
    return plate


# -- arrays --------------------------------------------------------------------------------------


def element(position: Position, plate: Plate, slot: Any) -> dict[str, Any]:
    """The values of one slot, by site; the axis of the slots is gone."""
    return {
        name: lax.dynamic_index_in_dim(position[name], slot, axis, keepdims=False)
        for name, axis in plate.axes
    }


def with_element(
    position: Position, plate: Plate, slot: Any, values: Mapping[str, Any]
) -> dict[str, Any]:
    """The position with other values in one slot, for the sites that have some."""
    new = dict(position)
    for name, axis in plate.axes:
        if name in values:
            value = jnp.asarray(values[name], new[name].dtype)
            new[name] = lax.dynamic_update_index_in_dim(new[name], value, slot, axis)
    return new


def arranged(position: Position, plate: Plate, order: Any) -> dict[str, Any]:
    """The position whose slot i is what slot ``order[i]`` was."""
    new = {name: jnp.take(position[name], order, axis) for name, axis in plate.axes}
    return {**position, **new}


def swapped(size: int, i: Any, j: Any) -> Any:
    """The order of slots in which i and j are exchanged."""
    slots = jnp.arange(size)
    return jnp.where(slots == i, j, jnp.where(slots == j, i, slots))


def moved(size: int, source: Any, to: Any) -> Any:
    """The order of slots in which ``source`` comes to ``to``, and those between shift by one."""
    slots = jnp.arange(size)
    order = jnp.where((source <= slots) & (slots < to), slots + 1, slots)
    order = jnp.where((to < slots) & (slots <= source), slots - 1, order)
    return jnp.where(slots == to, source, order)


# -- laws ----------------------------------------------------------------------------------------


def choice(log_weights: Any) -> Any:
    """An index with probabilities in proportion to weights, some of which may be zero."""
    return dist.Categorical(logits=log_weights, validate_args=False)


class _Finite(dist.Distribution):
    """A law on finitely many given values."""

    has_enumerate_support = True
    support = constraints.nonnegative_integer

    def __init__(self, levels: Any, log_weights: Any) -> None:
        self.levels, self.log_p = levels, jax.nn.log_softmax(log_weights)
        super().__init__()

    def log_prob(self, value: Any) -> Any:
        same = jnp.expand_dims(value, -1) == self.levels
        return jnp.max(jnp.where(same, self.log_p, -jnp.inf), -1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.levels[jax.random.categorical(key, self.log_p, shape=sample_shape)]

    def enumerate_support(self, expand: bool = True) -> Any:
        return self.levels


class _Own(dist.Distribution):
    """The model's own law of one site of a new element."""

    support = constraints.real

    def __init__(self, draw: Callable[[Any], Any], score: Callable[[Any], Any], like: Any) -> None:
        self.draw, self.score = draw, score
        super().__init__(event_shape=jnp.shape(like))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.draw(key)

    def log_prob(self, value: Any) -> Any:
        return self.score(value)


def resting_law(like: Any, levels: Any | None) -> Any:
    """The law of an element that is not there: N(0, 1), or uniform on ``levels``."""
    if levels is not None:
        if jnp.ndim(like):
            return _Finite(levels, jnp.zeros(levels.shape[0])).expand(like.shape).to_event()
        return _Finite(levels, jnp.zeros(levels.shape[0]))
    return dist.Normal(jnp.zeros_like(like), 1.0).to_event(jnp.ndim(like))


def own_law(
    position: Position,
    target: Target,
    sites: Mapping[str, int | None],
    slot: Any,
    name: str,
) -> None:
    """Draw new values of some sites from the model's own law, one site after the other.

    The law of a site is that given all else in the position and the new values of sites before.

    Args:
        sites: and the axis of the slots; None for a site that is new as a whole.
        slot: the slot that is new.
        name: prefix of the auxiliary sites.

    Raises:
        MethodError: the target is no program's, so there is no such law.
    """
    if target.own is None:
        raise MethodError(
            "this target does not say how its elements are drawn; give the move a proposal."
        )
    draws, scores = target.own

    def part(array: Any, axis: int | None) -> Any:
        return (
            array if axis is None else lax.dynamic_index_in_dim(array, slot, axis, keepdims=False)
        )

    def with_value(position: Position, site: str, axis: int | None, value: Any) -> dict[str, Any]:
        array = position[site]
        value = jnp.asarray(value, array.dtype)
        if axis is not None:
            value = lax.dynamic_update_index_in_dim(array, value, slot, axis)
        return {**position, site: value}

    here = dict(position)
    for site, axis in sites.items():

        def score(value: Any, site: str = site, axis: int | None = axis, here: Any = here) -> Any:
            return jnp.sum(part(scores(with_value(here, site, axis, value))[site], axis))

        def draw(key: Any, site: str = site, axis: int | None = axis, here: Any = here) -> Any:
            return part(draws((key, here))[site], axis)

        like = part(here[site], axis)
        if site in target.levels and not jnp.ndim(like):
            levels = target.support(site).astype(like.dtype)
            law: Any = _Finite(levels, jax.vmap(score)(levels))
        else:
            law = _Own(draw, score, like)
        here = with_value(here, site, axis, numpyro.sample(f"{name}/{site}", law))
