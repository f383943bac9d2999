"""Which parts of a model are there only sometimes, and which site says so.

A *masked plate* has ``size`` slots, of which the first k are active; k is an integer site. A *case*
is a block of sites that is active while a site has one of its values. The contexts that make them
(`ppl_toolkit.inference.masked_plate`, `case`) mark the messages of their sites; here they are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppl_toolkit.errors import ModelError
from ppl_toolkit.sites import finite_support, is_improper

__all__ = [
    "Cases",
    "Layout",
    "Mark",
    "Plate",
    "active_elements",
    "in_order",
    "mark_of",
    "read_layout",
]

_KEY = "active_if"  # of the mark, among the `infer` options of a site's message


class Mark(NamedTuple):
    """What a context says of the sites inside.

    Attributes:
        context: "masked_plate" or "case".
        name: of the plate, "" for cases.
        size: number of slots, or the number of the case.
        number: the value of the site that decides: k, or the current case.
        active: which elements are there, broadcasts to the batch shape of the sites.
        dim: of the plate's batch dimension, counted from the right (negative).
        order: how slots are ordered; see `Plate`.
    """

    context: str
    name: str
    size: int
    number: Any
    active: Any
    dim: int
    order: str

    def put(self, message: dict) -> None:
        """Mark a site, and mask its log probability.

        Raises:
            ModelError: it is marked already.
        """
        if (other := mark_of(message)) is not None:
            raise ModelError(
                f"site {message['name']!r} lies inside a {other.context} and a {self.context}; "
                "such contexts cannot be nested."
            )
        message["infer"] = {**(message.get("infer") or {}), _KEY: self}
        if message["type"] == "sample":
            message["fn"] = message["fn"].mask(self.active)


def mark_of(message: Mapping[str, Any]) -> Mark | None:
    """The mark of a site, None for sites that are always there."""
    return (message.get("infer") or {}).get(_KEY)


def active_elements(message: Mapping[str, Any], value: Any) -> Any:
    """Which elements of a marked site's ``value`` are there; broadcasts to its shape.

    The value may be on the site's own space or on the real one: events differ, batches do not.
    """
    active = jnp.asarray(_mark(message).active)
    batch = len(message["fn"].batch_shape) if message["type"] == "sample" else jnp.ndim(value)
    if active.ndim > batch or active.shape != jnp.shape(value)[batch - active.ndim : batch][:1] + (
        1,
    ) * (active.ndim - 1):
        return jnp.ones((), bool)  # a deterministic site that has no element for every slot
    return active.reshape(active.shape + (1,) * (jnp.ndim(value) - batch))


def _mark(message: Mapping[str, Any]) -> Mark:
    mark = mark_of(message)
    assert mark is not None
    return mark


class Plate(NamedTuple):
    """A masked plate of a program.

    Attributes:
        name, size: of the plate.
        number: the site of the number of active slots, latent or given.
        order: "" if slots are exchangeable; "index" if slot i + 1 needs slot i (nested models);
            else the site whose values increase from active slot to active slot.
        axes: the latent sites over the plate, and the axis of their values that counts slots.
    """

    name: str
    size: int
    number: str
    order: str
    axes: tuple[tuple[str, int], ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The latent sites over the plate."""
        return tuple(name for name, _ in self.axes)


class Cases(NamedTuple):
    """Blocks of sites of which one is active.

    Attributes:
        number: the site that says which, latent or given.
        sites: the latent sites inside, and the number of the case of each.
    """

    number: str
    sites: tuple[tuple[str, int], ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """The masked plates and the cases of a program."""

    plates: tuple[Plate, ...] = ()
    cases: tuple[Cases, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The latent sites that are there only sometimes, in alphabetical order."""
        inside = [name for plate in self.plates for name in plate.sites]
        inside += [name for cases in self.cases for name, _ in cases.sites]
        return tuple(sorted(inside))

    def __bool__(self) -> bool:
        return bool(self.plates or self.cases)


def in_order(layout: Layout, position: Mapping[str, Any]) -> dict[str, Any]:
    """The position with the active slots of every plate in the order it asks for.

    Where the position does not say how many are active, all slots are put in order.
    """
    position = dict(position)
    for plate in layout.plates:
        if plate.order not in ("", "index"):
            k, x = position.get(plate.number, plate.size), position[plate.order]
            rank = jnp.argsort(jnp.where(jnp.arange(plate.size) < k, x, jnp.inf), stable=True)
            position |= {name: jnp.take(position[name], rank, axis) for name, axis in plate.axes}
    return position


def read_layout(trace: Mapping[str, Mapping[str, Any]]) -> Layout:
    """The layout of a model from one abstract trace of it.

    Raises:
        ModelError: the number of a plate or case is no integer site with values that fit, or a site
            inside cannot be inactive.
    """
    marked = {name: m for name, m in trace.items() if mark_of(m) is not None}
    plates: dict[str, Plate] = {}
    cases: dict[str, Cases] = {}
    for name, message in marked.items():
        mark = _mark(message)
        number = _number_site(mark, trace)
        values = _values(trace[number], mark)
        if mark.context == "masked_plate":
            if values[0] < 0 or values[-1] > mark.size:
                raise ModelError(
                    f"masked_plate {mark.name!r} has {mark.size} slots, but site {number!r} takes "
                    f"the values {values[0]} to {values[-1]}; give it size={values[-1]}."
                )
            known = plates.get(mark.name) or Plate(mark.name, mark.size, number, mark.order, ())
            if _is_latent(message):
                _require_can_rest(name, message)
                axis = len(message["fn"].batch_shape) + mark.dim
                known = known._replace(axes=(*known.axes, (name, axis)))
            plates[mark.name] = known
        else:
            if mark.size not in values:
                raise ModelError(
                    f"case {mark.size} can never be: site {number!r} takes the values "
                    f"{values.tolist()}."
                )
            block = cases.get(number) or Cases(number, ())
            if _is_latent(message):
                _require_can_rest(name, message)
                block = block._replace(sites=(*block.sites, (name, mark.size)))
            cases[number] = block
    for plate in plates.values():
        _require_order(plate, trace)
    return Layout(tuple(plates.values()), tuple(cases.values()))


def _is_latent(message: Mapping[str, Any]) -> bool:
    return message["type"] == "sample" and not message["is_observed"]


def _number_site(mark: Mark, trace: Mapping[str, Mapping[str, Any]]) -> str:
    """The site whose value was given to the context; it may be conditioned on."""
    what = f"masked_plate {mark.name!r}" if mark.name else "case"
    for name, message in trace.items():
        if message["type"] == "sample" and message["value"] is mark.number:
            if not jnp.issubdtype(jnp.result_type(message["value"]), jnp.integer):
                raise ModelError(
                    f"{what} needs a whole number, but site {name!r} is of type "
                    f"{jnp.result_type(message['value'])}; give it a discrete distribution."
                )
            if jnp.shape(message["value"]):
                raise ModelError(
                    f"{what} needs one number, but site {name!r} has shape "
                    f"{jnp.shape(message['value'])}; sample it outside of plates."
                )
            if mark_of(message) is not None:
                raise ModelError(f"{what}: site {name!r} must not itself be inside such a context.")
            return name
    raise ModelError(
        f"{what} must be given the value of a sample site as it is, so that moves know what to "
        f"change: k = numpyro.sample('k', ...), with the offset in its distribution, such as "
        "DiscreteUniform(1, 10)."
    )


def _values(message: Mapping[str, Any], mark: Mark) -> np.ndarray:
    """The values of the deciding site, in increasing order."""
    try:
        with jax.ensure_compile_time_eval():
            levels = finite_support(message["fn"])
            values = None if levels is None else np.sort(np.asarray(levels))
    except (TypeError, ValueError, jax.errors.JAXTypeError):
        values = None
    if values is None:
        most = mark.size
        raise ModelError(
            f"site {message['name']!r} decides what is active, so it needs finitely many values "
            f"that are known before the data: it has {type(message['fn']).__name__}. For a "
            f"distribution truncated at {most}: dist.Categorical(logits=...) of {most + 1} log "
            "probabilities."
        )
    if not np.array_equal(values, np.arange(values[0], values[0] + len(values))):
        raise ModelError(
            f"site {message['name']!r} has the values {values.tolist()}, which are no run of whole "
            "numbers."
        )
    return values


def _require_can_rest(name: str, message: Mapping[str, Any]) -> None:
    """Refuse sites whose inactive elements would have no law."""
    fn = message["fn"].base_dist
    if is_improper(fn):
        raise ModelError(
            f"site {name!r} has a flat (improper) prior and is there only sometimes, so that the "
            "number of its elements has no posterior. Give it a proper prior."
        )
    if fn.is_discrete and finite_support(fn) is None:
        raise ModelError(
            f"site {name!r} is there only sometimes, and has infinitely many discrete values or "
            "a joint support; truncate its distribution (dist.Categorical)."
        )


def _require_order(plate: Plate, trace: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an order by something that is no increasing number per slot."""
    if plate.order in ("", "index"):
        return
    if plate.order not in plate.sites:
        raise ModelError(
            f"masked_plate {plate.name!r} is to be ordered by {plate.order!r}, which is none of "
            f"its latent sites {list(plate.sites)}."
        )
    message = trace[plate.order]
    shape, fn = jnp.shape(message["value"]), message["fn"]
    if len(shape) != 1 or fn.is_discrete or "LessThan" in type(fn.support).__name__:
        raise ModelError(
            f"site {plate.order!r} cannot order masked_plate {plate.name!r}: it must have one real "
            f"number per slot, not bounded from above alone; it has shape {shape} and support "
            f"{fn.support}."
        )
