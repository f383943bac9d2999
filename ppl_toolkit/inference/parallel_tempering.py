"""Parallel tempering: replicas at powers of the likelihood that exchange their positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.kernel import (
    SAMPLING,
    Info,
    Kernel,
    Spec,
    Stage,
    require_exact,
    require_spec,
)
from ppl_toolkit.inference.randomness import accept, over
from ppl_toolkit.inference.target import Target
from ppl_toolkit.positions import Position

__all__ = ["ParallelTempering"]


class Replicas(NamedTuple):
    """The replicas, coldest (power 1) first.

    Attributes:
        position: of the coldest replica.
        states: of the kernels, arrays (R, ...).
        swaps: rounds of exchanges so far; its parity decides which pairs are next.
        walkers: which of the R walkers sits at every power.
        heading: by walker, +1 since it last sat at the hottest power, -1 since the coldest, 0
            before either.
        trips: round trips (coldest to hottest and back) of all walkers.
    """

    position: Position
    states: Any
    swaps: Any
    walkers: Any
    heading: Any
    trips: Any


@dataclasses.dataclass(frozen=True)
class ParallelTempering(Spec):
    """A kernel on replicas with likelihoods to several powers, and exchanges between neighbours.

    Exchanges alternate between even and odd pairs (a non-reversible scheme: walkers keep their
    direction). Replicas i and j are exchanged with probability min(1, exp((b_i - b_j)
    (l(x_j) - l(x_i)))), b the powers and l the log likelihood.

    Args:
        kernel: applied to every replica, tuned to its own power.
        powers: decreasing from 1.

    Cost: R steps of the kernel. Round trips between the coldest and the hottest replica are
    counted in the statistics: none in a long run means that the powers are too far apart.
    Source: Syed, Bouchard-Côté, Deligiannidis, Doucet (2022), JRSS B 84.
    """

    kernel: Any
    powers: Sequence[float]

    reversible: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", require_spec(self.kernel))
        require_exact("ParallelTempering", self.kernel)
        powers = np.asarray(self.powers, float)
        falling = powers.ndim == 1 and powers.size > 1 and bool((np.diff(powers) < 0).all())
        if not (falling and powers[0] == 1.0 and powers[-1] >= 0):
            raise OptionError(
                f"powers must fall from 1.0 to 0 or above, two or more; got {self.powers!r:.80}."
            )
        object.__setattr__(self, "powers", tuple(powers.tolist()))

    @property
    def label(self) -> str:
        return "parallel_tempering"

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        powers = jnp.asarray(self.powers)
        count = len(self.powers)

        def at(power: Any) -> Kernel:
            return self.kernel.bind(target.tempered(power), stage)

        def exchanged(key: Any, positions: Position, swaps: Any) -> tuple[Any, Any]:
            """The replica whose position each power gets, and which pairs were exchanged."""
            likelihoods = over(target.log_likelihood, positions)
            order, pairs = jnp.arange(count), jnp.zeros(count - 1, bool)
            for i in range(count - 1):  # pairs of one parity do not touch each other
                gain = likelihoods[i + 1] - likelihoods[i]
                ratio = jnp.where(i % 2 == swaps % 2, (powers[i] - powers[i + 1]) * gain, -jnp.inf)
                exchange = accept(random.fold_in(key, i), ratio)
                swapped = order.at[i].set(i + 1).at[i + 1].set(i)
                order = jnp.where(exchange, swapped, order)
                pairs = pairs.at[i].set(exchange)
            return order, pairs

        def step(key: Any, state: Replicas) -> tuple[Replicas, Info]:
            key_steps, key_swaps = random.split(key)
            keys = random.split(key_steps, count)
            states, infos = over(lambda b, k, s: at(b).step(k, s), powers, keys, state.states)
            order, pairs = exchanged(key_swaps, states.position, state.swaps)
            positions = jax.tree.map(lambda x: x[order], states.position)
            states = over(lambda b, s, x: at(b).refresh(s, x), powers, states, positions)
            walkers = state.walkers[order]
            heading, trips = _round_trips(walkers, state.heading)
            coldest = jax.tree.map(lambda x: x[0], positions)
            new = Replicas(coldest, states, state.swaps + 1, walkers, heading, state.trips + trips)
            parity = jnp.arange(count - 1) % 2 == state.swaps % 2
            info = {name: value[0] for name, value in infos.items() if name != "lp"}
            info["swap_rate"] = jnp.sum(pairs & parity) / jnp.maximum(jnp.sum(parity), 1)
            info["round_trips"] = new.trips
            return new, info

        def init(position: Position, key: Any) -> Replicas:
            keys = random.split(key, count)
            states = over(lambda b, k: at(b).init(position, k), powers, keys)
            zero = jnp.zeros((), jnp.int32)
            return Replicas(
                position, states, zero, jnp.arange(count), jnp.zeros(count, jnp.int32), zero
            )

        def refresh(state: Replicas, position: Position) -> Replicas:
            positions = jax.tree.map(
                lambda all_, new: all_.at[0].set(new), state.states.position, dict(position)
            )
            states = over(lambda b, s, x: at(b).refresh(s, x), powers, state.states, positions)
            return state._replace(position=position, states=states)

        return Kernel(init, step, refresh)


def _round_trips(walkers: Any, heading: Any) -> tuple[Any, Any]:
    """The walkers' headings, and how many came back to the coldest power from the hottest."""
    coldest, hottest = walkers[0], walkers[-1]
    back = heading[coldest] == 1
    return heading.at[coldest].set(-1).at[hottest].set(1), back.astype(jnp.int32)
