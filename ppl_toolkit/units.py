"""Chains that one call of a compiled program advances, and what is done with several such units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ppl_toolkit.engine import Block, Engine, joined

__all__ = ["GivenUpError", "Unit", "advanced", "grouped", "shared_inputs", "state_of", "warm"]


class Unit:
    """Some chains that one call advances on one device: their inputs and their state.

    Args:
        engine: compiled functions.
        chains: which chains of the run these are, one after the other.
        inputs: what all of them share, see `shared_inputs`.
        device: where they run.
        first: number of the run's first chain, by which the chains have their keys.
    """

    def __init__(
        self, engine: Engine, chains: Sequence[int], inputs: tuple, device: Any, first: int = 0
    ) -> None:
        self.engine, self.chains, self.device = engine, tuple(chains), device
        self.inputs = (*inputs, np.int32(len(chains)))
        self.numbers = self._filled(np.array(chains, np.uint32) + np.uint32(first))
        self.state: Any = None  # on the device, or NumPy arrays on their way to it

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        """As many rows as a call takes from one row per chain of this unit."""
        empty = self.engine.room - len(rows)
        return np.concatenate([rows, np.repeat(rows[-1:], empty, 0)]) if empty else rows

    def _padded(self, x: np.ndarray) -> np.ndarray:
        """As many rows as a call takes from one row per chain of the whole run."""
        return self._filled(np.asarray(x)[self.chains[0] : self.chains[-1] + 1])

    def init(
        self, positions: np.ndarray, given: np.ndarray, starts: np.ndarray | None = None
    ) -> None:
        """The first states; ``starts`` are numbers that chains may share, else the chains'."""
        call = self.engine.function("init", self.device)
        keys = self.numbers if starts is None else self._padded(starts).astype(np.uint32)
        self.state = call(*self.inputs, keys, self._padded(positions), self._padded(given))

    def use(self, data: Any) -> None:
        """Go on with other data of the same shapes (`refresh` renews the state's caches)."""
        consts, _, *rest = self.inputs
        self.inputs = (consts, jax.device_put(self.engine.given(data), self.device), *rest)

    def restore(self, states: Any) -> None:
        """The state from that of all chains of the run."""
        self.state = jax.tree.map(self._padded, states)

    def refresh(self) -> None:
        call = self.engine.function("refresh", self.device)
        consts, data, settings, _, active = self.inputs
        self.state = call(consts, data, settings, active, self.state)

    def host_state(self) -> Any:
        return jax.tree.map(lambda x: np.array(np.asarray(x)[: len(self.chains)]), self.state)

    def advance(self, index: int, count: int, collect: bool) -> list[Block]:
        """Run ``count`` iterations; blocks of at most ``rows`` draws of these chains."""
        call = self.engine.function("advance", self.device)
        blocks, chains = [], len(self.chains)
        while count:
            rows = min(count, self.engine.rows)
            self.state, *given = call(
                *self.inputs, self.numbers, self.state, np.int32(index), np.int32(rows),
                np.bool_(collect),
            )  # fmt: skip
            given = jax.tree.map(np.asarray, given)
            blocks.append(self.engine.block(given, chains, rows, collect))
            index, count = index + rows, count - rows
        return blocks

    def warm(self, warmup: int) -> None:
        """All of the warm-up of a run of this unit alone."""
        warm([self], warmup)


def shared_inputs(consts: Any, data: Any, settings: Any, seed: int, device: Any) -> tuple:
    """What all chains of a run on a device take in, there."""
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.device_put((consts, data, settings, words), device)


def grouped(chains: int, engine: Engine, threads: int = 1) -> list[range]:
    """The chains of every unit of a run: such that all threads have some, if chains are alone."""
    size = min(engine.room, -(-chains // threads)) if engine.in_turn else engine.room
    return [range(first, min(first + size, chains)) for first in range(0, chains, size)]


def state_of(units: Sequence[Unit]) -> Any:
    """The states of all chains of a run, on the host."""
    parts = [unit.host_state() for unit in units]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


class GivenUpError(Exception):
    """A run without chunks was given up, after Ctrl-C."""


def advanced(
    units: Sequence[Unit], index: int, count: int, collect: bool, stopped: Callable[[], bool]
) -> Block:
    """The draws of all units, one unit after the other."""
    if stopped():
        raise GivenUpError
    return joined([joined(unit.advance(index, count, collect), 1) for unit in units], 0)


def warm(units: Sequence[Unit], warmup: int, stopped: Callable[[], bool] = lambda: False) -> int:
    """All of a warm-up of all chains of a run, segment by segment.

    Returns:
        Gradient evaluations, or the like.
    """
    engine, index, steps = units[0].engine, 0, 0
    while index < warmup:
        end = engine.pooled_at(units[0].state, warmup)
        segment = advanced(units, index, end - index, False, stopped)
        steps += int(np.sum(segment.stats.get("n_steps", 0)))
        if engine.pools:
            state = engine.pool(state_of(units), [segment], end, warmup)
            for unit in units:
                unit.restore(state)
            end = engine.after(state, end, warmup)
        index = end
    return steps
