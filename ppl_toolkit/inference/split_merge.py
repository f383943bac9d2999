"""Moves that divide an element of a masked plate in two, or make two of them one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro import handlers

from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.involution import log_determinant
from ppl_toolkit.inference.moves import uniform_below
from ppl_toolkit.inference.reversible_jump import Jump, chosen, orders, prefixed
from ppl_toolkit.inference.slots import (
    arranged,
    choice,
    element,
    moved,
    own_law,
    plate_of,
    require_plate,
    swapped,
    with_element,
)
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.layout import Plate
from ppl_toolkit.positions import Position

__all__ = ["SplitMerge", "StepSplit", "moment_split"]

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SplitMerge(Jump):
    """Divides an element of a masked plate in two, or merges two.

    All values are on the real space: logarithms, for positive sites. The determinant is that of
    the local map (parent, u) -> (left, right) of 2 d numbers, by automatic differentiation.

    Args:
        plate: the masked plate, with continuous sites; d numbers per slot.
        split: (parent, u) -> (left, right), values by site.
        merge: (left, right) -> (parent, u), its inverse.
        auxiliary_law: NumPyro program without arguments that draws u, d numbers in all.
        pairs: (position, plate) -> log weights (size, size) of the pairs (left, right) to merge, of
            which inactive ones are left out; equal if None. Splits into pairs that would never be
            merged are refused by themselves.
        up: probability of a split as a function of k; one half if None.
        kind: names of the two moves.

    Cost: one log density, 2 d evaluations of the map, O(d^3).
    """

    plate: str
    split: Callable[[Values, Values], tuple[Values, Values]]
    merge: Callable[[Values, Values], tuple[Values, Values]]
    auxiliary_law: Callable[[], Any]
    pairs: Callable[[Position, Plate], Any] | None = None
    up: Callable[[Any], Any] | None = None
    kind: tuple[str, str] = ("split", "merge")

    tried: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"{self.kind[0]}_{self.kind[1]}_{self.plate}"

    @property
    def names(self) -> tuple[str, ...]:
        return self.kind

    def require(self, space: Space) -> None:
        plate = require_plate(type(self).__name__, self.plate, space)
        if discrete := [name for name in plate.sites if space[name].discrete]:
            raise MethodError(
                f"SplitMerge divides real numbers, but sites {discrete} of masked plate "
                f"{plate.name!r} are discrete; sum them out of the model."
            )
        if plate.order == "index":
            raise MethodError(
                f"the slots of masked plate {plate.name!r} are ordered by their index, so that "
                "only the last one can come or go: use BirthDeath."
            )

    def _log_pairs(self, position: Position, plate: Plate) -> Any:
        """Log weights (size, size) of ordered pairs of active slots to merge."""
        k, slots = position[plate.number], jnp.arange(plate.size)
        left, right = slots[:, None], slots[None, :]
        there = (left != right) & (left < k) & (right < k)
        if plate.order:
            there &= right == left + 1
        weights = 0.0 if self.pairs is None else self.pairs(position, plate)
        return jnp.where(there, weights, -jnp.inf)

    def auxiliary(self, position: Position, target: Target) -> None:
        plate = plate_of(target, self.plate)
        k, slots = position[plate.number], jnp.arange(plate.size)
        up = self.sample_up(k, target.support(plate.number))
        parent, place = slots[:, None] < k, slots[None, :] <= k
        if plate.order:
            place &= slots[None, :] == slots[:, None] + 1
        split = jnp.where(parent & place, 0.0, -jnp.inf)
        pairs = jnp.where(up == 1, split, self._log_pairs(position, plate)).reshape(-1)
        possible = jnp.any(pairs > -jnp.inf)
        numpyro.sample("pair", choice(jnp.where(possible, pairs, 0.0)))
        numpyro.factor("possible", jnp.where(possible, 0.0, -jnp.inf))
        with handlers.mask(mask=up == 1), handlers.scope(prefix="u"):
            self.auxiliary_law()
        self.sample_rest(position, target, plate, up)

    def _slots(self, position: Position, v: Values, plate: Plate) -> tuple[Any, Any, Any, Any]:
        """Whether it is a split, its last slot, and the slots of the pair."""
        k, up = position[plate.number], v["up"] == 1
        first, second = jnp.divmod(v["pair"], plate.size)
        return up, jnp.where(up, k, k - 1), first, second

    def _local(
        self, position: Position, v: Values, plate: Plate
    ) -> tuple[Values, Values, Values, Values]:
        """The parent, u, left and right of a move, computed from what there is."""
        up, _, first, second = self._slots(position, v, plate)
        here, there = element(position, plate, first), element(position, plate, second)
        u = {name.removeprefix("u/"): x for name, x in v.items() if name.startswith("u/")}
        merged, u_merged = self.merge(here, there)
        parent, u = chosen(up, here, merged), chosen(up, u, u_merged)
        left, right = self.split(parent, u)
        return parent, u, left, right

    def involution(
        self, position: Position, v: Values, target: Target
    ) -> tuple[Position, dict[str, Any]]:
        plate = plate_of(target, self.plate)
        size, as_is = plate.size, jnp.arange(plate.size)
        up, last, first, second = self._slots(position, v, plate)
        parent, u, left, right = self._local(position, v, plate)
        rest = {name: v[f"rest/{name}"] for name in plate.sites}
        u_old = {name.removeprefix("u/"): x for name, x in v.items() if name.startswith("u/")}
        if plate.order:
            to_last, to_own = moved(size, second, last), moved(size, last, second)
            keeper = left_at = first
        else:
            to_last = to_own = swapped(size, second, last)
            keeper = jnp.where(first == last, second, first)  # parent's slot, the other being last
            left_at = jnp.where(first == second, last, first)  # where a split's left ends up
        # split: the parent becomes left, right comes last, and then to its own place
        x = arranged(position, plate, jnp.where(up, as_is, to_last))
        old = element(x, plate, last)
        x = with_element(x, plate, jnp.where(up, first, keeper), chosen(up, left, parent))
        x = with_element(x, plate, last, chosen(up, right, rest))
        x = arranged(x, plate, jnp.where(up, to_own, as_is))
        k = position[plate.number]
        x[plate.number] = k + jnp.where(up, 1, -1).astype(k.dtype)
        chosen_first = jnp.where(up, left_at, keeper)
        # the numbers that say nothing go along, so that f is its own inverse
        flat_rest, unravel_rest = ravel_pytree(rest)
        flat_u, unravel_u = ravel_pytree(u_old)
        back = {
            "up": 1 - v["up"],
            "pair": chosen_first * size + second,
            **prefixed("u", chosen(up, unravel_u(flat_rest), u)),
            **prefixed("rest", chosen(up, old, unravel_rest(flat_u))),
        }
        return x, {name: jnp.asarray(value, v[name].dtype) for name, value in back.items()}

    def log_det(self, position: Position, v: Values, target: Target) -> Any:
        plate = plate_of(target, self.plate)
        parent, u, *_ = self._local(position, v, plate)
        z, unravel = ravel_pytree((parent, u))

        def local(z: Any) -> Any:
            return ravel_pytree(self.split(*unravel(z)))[0]

        log_det = log_determinant(lambda x, _: ({"z": local(x["z"])}, {}), {"z": z}, {})
        return jnp.where(v["up"] == 1, log_det, -log_det)


def moment_split(
    plate: str, weight: str, mean: str, scale: str, *, variance: bool = False
) -> SplitMerge:
    """Splits of a component of a normal mixture that keep its weight, mean and variance.

    With u1, u2 ~ Beta(2, 2), u3 ~ Beta(1, 1), weight w, mean m and variance s^2,

        w1 = w u1,  m1 = m - u2 s sqrt(w2 / w1),  s1^2 = u3 (1 - u2^2) s^2 w / w1,
        w2 = w (1 - u1),  m2 = m + u2 s sqrt(w1 / w2),  s2^2 = (1 - u3) (1 - u2^2) s^2 w / w2;

    pairs that are neighbours in their means are merged.

    Args:
        plate: the masked plate.
        weight: positive site of the components' weights, up to a common factor (so that the model
            divides by their sum: Gamma(a, 1) weights are Dirichlet(a) proportions).
        mean: real site.
        scale: positive site of the standard deviations, or of the variances.
        variance: which of them.

    Source: Richardson and Green (1997), JRSS B 59.
    """
    factor = 1.0 if variance else 2.0  # log s^2 is so many times the value of the site

    def auxiliary() -> None:
        numpyro.sample("u1", dist.Beta(2.0, 2.0))
        numpyro.sample("u2", dist.Beta(2.0, 2.0))
        numpyro.sample("u3", dist.Uniform(0.0, 1.0))

    def split(parent: Values, u: Values) -> tuple[Values, Values]:
        log_w, m, log_s2 = parent[weight], parent[mean], factor * parent[scale]
        log_1, log_2 = jnp.log(u["u1"]), jnp.log1p(-u["u1"])
        shift, rest = u["u2"] * jnp.exp(0.5 * log_s2), jnp.log1p(-(u["u2"] ** 2))
        left = {
            weight: log_w + log_1,
            mean: m - shift * jnp.exp(0.5 * (log_2 - log_1)),
            scale: (jnp.log(u["u3"]) + rest + log_s2 - log_1) / factor,
        }
        right = {
            weight: log_w + log_2,
            mean: m + shift * jnp.exp(0.5 * (log_1 - log_2)),
            scale: (jnp.log1p(-u["u3"]) + rest + log_s2 - log_2) / factor,
        }
        return left, right

    def merge(left: Values, right: Values) -> tuple[Values, Values]:
        log_w = jnp.logaddexp(left[weight], right[weight])
        u1 = jnp.exp(left[weight] - log_w)
        m = u1 * left[mean] + (1 - u1) * right[mean]
        s2_1, s2_2 = jnp.exp(factor * left[scale]), jnp.exp(factor * right[scale])
        between = u1 * (1 - u1) * (right[mean] - left[mean]) ** 2
        within = u1 * s2_1 + (1 - u1) * s2_2
        u2 = jnp.sqrt(between / (between + within)) * jnp.sign(right[mean] - left[mean])
        parent = {weight: log_w, mean: m, scale: jnp.log(between + within) / factor}
        return parent, {"u1": u1, "u2": u2, "u3": u1 * s2_1 / within}

    def neighbours(position: Position, plate: Plate) -> Any:
        there = jnp.arange(plate.size) < position[plate.number]
        m = jnp.where(there, position[mean], jnp.inf)
        between = (m[:, None, None] < m[None, None, :]) & (m[None, None, :] < m[None, :, None])
        adjacent = (m[:, None] < m[None, :]) & ~jnp.any(between, -1)
        return jnp.where(adjacent, 0.0, -jnp.inf)

    return SplitMerge(plate, split, merge, auxiliary, neighbours)


@dataclasses.dataclass(frozen=True)
class StepSplit(Jump):
    """Adds a step to a step function, keeping its mean where the step comes, or removes one.

    A new step at s* divides the segment it falls into in the shares w1 and w2. With l ~ Logistic,
    the heights (on the real space: logarithms, for positive ones) become

        h1 = h - w2 l,  h2 = h + w1 l,  so that  w1 h1 + w2 h2 = h,

    which has determinant one; exp(l) = (1 - u) / u with u ~ U(0, 1).

    Args:
        plate: a masked plate of steps, with the two sites that follow.
        at: where the steps are: a site whose support is an interval, all of which the function is
            defined on.
        height: the height right of each step.
        base: the site (not over the plate) of the height left of the first step.
        proposal: NumPyro program of (position, target) that draws ``at`` on the real space; the
            model's own law of it if None.
        up: probability of a new step as a function of k; one half if None.

    Cost: one log density. Source: Green (1995), Biometrika 82, section 4.
    """

    plate: str
    at: str
    height: str
    base: str
    proposal: Callable[[Position, Target], Any] | None = None
    up: Callable[[Any], Any] | None = None

    @property
    def label(self) -> str:
        return f"step_split_{self.plate}"

    @property
    def names(self) -> tuple[str, ...]:
        return ("birth", "death")

    def require(self, space: Space) -> None:
        plate = require_plate(type(self).__name__, self.plate, space)
        if set(plate.sites) != {self.at, self.height}:
            raise MethodError(
                f"StepSplit moves the sites {[self.at, self.height]}, but masked plate "
                f"{plate.name!r} has {list(plate.sites)}."
            )
        if "Interval" not in space[self.at].support or space[self.at].discrete:
            raise MethodError(
                f"StepSplit needs site {self.at!r} to lie in an interval, as by dist.Uniform; its "
                f"support is {space[self.at].support}."
            )
        if self.base not in space or space[self.base].within is not None:
            raise MethodError(
                f"StepSplit needs a latent site {self.base!r} outside of the masked plate: the "
                f"height left of the first step. The latent sites are {sorted(space)}."
            )
        if plate.order == "index":
            raise MethodError(f"the steps of {plate.name!r} have no place by their index.")

    def moves(self, space: Space) -> frozenset[str]:
        return super().moves(space) | {self.base}

    def auxiliary(self, position: Position, target: Target) -> None:
        plate = plate_of(target, self.plate)
        k = position[plate.number]
        up = self.sample_up(k, target.support(plate.number))
        places = jnp.where(up, 1, k) if plate.order else k + up
        numpyro.sample("slot", uniform_below(places, plate.size))
        with handlers.mask(mask=up == 1):
            if self.proposal is None:
                axis = dict(plate.axes)[self.at]
                first = jnp.minimum(k, plate.size - 1)
                own_law(position, target, {self.at: axis}, first, "born")
            else:
                with handlers.scope(prefix="born"):
                    self.proposal(position, target)
            numpyro.sample("log_ratio", dist.Logistic(0.0, 1.0))
        self.sample_rest(position, target, plate, up)

    def involution(
        self, position: Position, v: Values, target: Target
    ) -> tuple[Position, dict[str, Any]]:
        plate = plate_of(target, self.plate)
        k, up = position[plate.number], v["up"] == 1
        last = jnp.where(up, k, k - 1)
        born = {self.at: v[f"born/{self.at}"]}
        rest = {name: v[f"rest/{name}"] for name in plate.sites}
        to_last, to_own, slot = orders(plate, position, v["slot"], last, up, born)
        x = arranged(position, plate, to_last)
        old = element(x, plate, last)

        # the segment that s* lies in, among the steps without it
        here = jax.nn.sigmoid(jnp.where(up, born[self.at], old[self.at]))
        steps, others = jax.nn.sigmoid(x[self.at]), jnp.arange(plate.size) < last
        left, right = others & (steps < here), others & (steps >= here)
        begin = jnp.max(jnp.where(left, steps, 0.0), initial=0.0)
        end = jnp.min(jnp.where(right, steps, 1.0), initial=1.0)
        share = (here - begin) / (end - begin)
        owner = jnp.argmax(jnp.where(left, steps, -1.0))
        based = ~jnp.any(left)

        h = jnp.where(based, x[self.base], x[self.height][owner])
        log_ratio = jnp.where(up, v["log_ratio"], old[self.height] - h)
        # up: h is the segment's height; down: it is h1, and h = h1 + w2 l
        h = h + jnp.where(up, -1.0, 1.0) * (1.0 - share) * log_ratio
        new = {self.at: born[self.at], self.height: h + log_ratio}
        x[self.base] = jnp.where(based, h, x[self.base])
        x[self.height] = x[self.height].at[owner].set(jnp.where(based, x[self.height][owner], h))
        x = with_element(x, plate, last, chosen(up, new, rest))
        x = arranged(x, plate, to_own)
        x[plate.number] = k + jnp.where(up, 1, -1).astype(k.dtype)
        back = {
            "up": 1 - v["up"],
            "slot": slot,
            f"born/{self.at}": jnp.where(up, rest[self.at], old[self.at]),
            "log_ratio": jnp.where(up, rest[self.height], log_ratio),
            f"rest/{self.at}": jnp.where(up, old[self.at], born[self.at]),
            f"rest/{self.height}": jnp.where(up, old[self.height], v["log_ratio"]),
        }
        return x, {name: jnp.asarray(value, v[name].dtype) for name, value in back.items()}
