"""The one loop that runs every method: units, chunks, threads, devices, progress, checkpoints.

A *unit* is some chains that one call of a compiled program advances, in lock step or one after the
other (on CPU). The number of iterations is an argument of the program, so that the same executable
serves every chunk length: draws cannot depend on how a run is cut up. Units are spread over threads
that call the same executable, or over devices.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from ppl_toolkit.engine import Block, Engine, joined
from ppl_toolkit.goals import Judge
from ppl_toolkit.threads import Interrupts, workers
from ppl_toolkit.units import Unit, grouped, shared_inputs, state_of

__all__ = ["MemorySink", "Outcome", "Progress", "Run", "Sink", "Timing"]

_CHUNK_BYTES = 32 * 2**20  # of the draws of a chunk, all chains, unless its length is given
_CHUNK_SECONDS = 0.5


class Sink(Protocol):
    """Where chunks go: memory, or a store on disk."""

    def open(self, empty: Block) -> None:
        """Take a block without draws, whose arrays have the shapes of those to come."""

    def append(self, block: Block) -> None:
        """Take the draws of one chunk."""

    def commit(self, state: Callable[[], Any], iteration: int, warmup_steps: int) -> None:
        """Make everything appended so far, and the sampler's state, durable."""

    def rollback(self) -> None:
        """Drop what was appended since the last commit."""


class Progress(Protocol):
    """What is told of a run while it goes on."""

    def update(self, iteration: int, stats: Mapping[str, np.ndarray]) -> None:
        """A chunk ended at ``iteration``; ``stats`` are its statistics (chain, draw)."""


class Timing(NamedTuple):
    """Seconds of wall clock time."""

    warmup: float
    sampling: float


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        iteration: the next iteration; warm-up included.
        state: the states of all chains, NumPy arrays with a leading chain axis.
        interrupted: whether it was stopped by Ctrl-C.
        error: the exception that ended it early, if any.
        timing: seconds of warm-up and of sampling.
        warmup_steps: gradient evaluations (or the like) in warm-up, over all chains.
    """

    iteration: int
    state: Any
    interrupted: bool
    error: BaseException | None
    timing: Timing
    warmup_steps: int


class Run:
    """One run of a method: its units on their devices and threads.

    Args:
        engine: compiled functions.
        chains: number of chains.
        seed: an integer in [0, 2^64).
        settings: the method's settings for this run.
        threads: how many units run at a time.
    """

    def __init__(
        self, engine: Engine, chains: int, seed: int, settings: Any, threads: int | None = None
    ) -> None:
        self.engine, self.chains = engine, chains
        devices = engine.devices
        with engine.program.context():
            inputs = [
                shared_inputs(engine.consts, engine.data, settings, seed, device)
                for device in devices
            ]
            on_cpu = devices[0].platform == "cpu"
            threads = threads or (len(os.sched_getaffinity(0)) if on_cpu else len(devices))
            self.units = [
                Unit(engine, group, inputs[i % len(devices)], devices[i % len(devices)])
                for i, group in enumerate(grouped(chains, engine, threads))
            ]
        self.threads = max(1, min(threads, len(self.units)))
        self._running: list[concurrent.futures.Future] = []

    def _each(self, pool: concurrent.futures.Executor, work: Callable[[Unit], Any]) -> list[Any]:
        """``work`` on every unit, in this thread and those of the pool, in the run's precision."""
        results: list[Any] = [None] * len(self.units)
        numbers = itertools.count()

        def task() -> None:
            with self.engine.program.context():
                while (number := next(numbers)) < len(self.units):
                    results[number] = work(self.units[number])

        self._running = [pool.submit(task) for _ in range(self.threads - 1)]
        task()
        for future in self._running:
            future.result()
        return results

    def start(
        self, positions: np.ndarray, given: np.ndarray, starts: np.ndarray | None = None
    ) -> None:
        """Find the first states.

        Args:
            positions: (chain, D) starting points; zeros where none is given.
            given: (chain,) whether a chain's position is given.
            starts: (chain,) number of the start; chains that share one start at the same point.
                Every chain has its own if None.
        """
        with workers(self.threads - 1) as pool:
            self._each(pool, lambda unit: unit.init(positions, given, starts))

    def restore(self, states: Any, fresh_data: bool) -> None:
        """Go on from the states of an earlier run; ``fresh_data`` renews their caches."""
        with self.engine.program.context():
            for unit in self.units:
                unit.restore(states)
                if fresh_data:
                    unit.refresh()

    def state(self) -> Any:
        return state_of(self.units)

    def chunks(
        self,
        sink: Sink,
        progress: Progress,
        *,
        start: int,
        warmup: int,
        total: int,
        warmup_steps: int = 0,
        chunk: int | None = None,
        judge: Judge | None = None,
    ) -> Outcome:
        """Run iterations ``start`` to ``total``, the first ``warmup`` of them being warm-up.

        Between chunks (about half a second each, unless ``chunk`` fixes their length) draws go
        to ``sink``, the state is committed and ``progress`` told. Ctrl-C ends the run after the
        current chunk; an exception, or a second Ctrl-C, ends it without that chunk. What was drawn
        before stays, with the state that belongs to it.

        Where the method pools its chains, warm-up is committed segment by segment, and may end
        early: the iterations left out are never run, so that draws have the same keys. A ``judge``
        is shown the draws, and ends the run when its goal is reached.
        """
        iteration, length = start, chunk or 16
        most = max(1, _CHUNK_BYTES // (self.engine.row_bytes * self.chains))
        seconds = {"warmup": 0.0, "sampling": 0.0}
        steps, error = warmup_steps, None
        segment: list[Block] = []
        begun = iteration, steps, [unit.state for unit in self.units]
        if judge is not None and judge.done():
            total = iteration
        with workers(self.threads - 1) as pool, Interrupts() as stop:
            while iteration < total and not stop.requested:
                collect = iteration >= warmup
                end = total if judge is None else min(total, warmup + judge.next)
                if not collect:
                    end = self.engine.pooled_at(self.units[0].state, warmup)
                count = min(length, end - iteration)
                begin = time.perf_counter()
                states = [unit.state for unit in self.units]
                try:
                    parts = self._each(pool, _advance_work(iteration, count, collect))
                    drawn = time.perf_counter() - begin
                    block = joined([joined(blocks, 1) for blocks in parts], 0)
                    done, then = steps, iteration + count
                    if collect:
                        sink.append(block)
                        if judge is not None:
                            judge.add(block.values)
                            total = then if judge.done() else total
                    else:
                        done += int(np.sum(block.stats.get("n_steps", 0)))
                        then = self._pooled(segment, block, then, end, warmup)
                    if not segment:
                        sink.commit(self.state, then, done)
                except (Exception, KeyboardInterrupt) as problem:
                    concurrent.futures.wait(self._running)  # units still under way change states
                    for unit, state in zip(self.units, states, strict=True):
                        unit.state = state
                    if isinstance(problem, KeyboardInterrupt):
                        stop.requested = True
                    else:
                        error = problem
                    sink.rollback()
                    break
                iteration, steps = then, done
                if not segment:
                    begun = iteration, steps, [unit.state for unit in self.units]
                elapsed = time.perf_counter() - begin
                seconds["sampling" if collect else "warmup"] += elapsed
                with contextlib.suppress(Exception):  # a closed stream must not cost the draws
                    progress.update(iteration, block.stats)
                if chunk is None:  # what is done between chunks, on a slow disk say, stays small
                    aim = max(_CHUNK_SECONDS, 4.0 * (elapsed - drawn))
                    ideal = int(count * aim / max(drawn, 1e-6))
                    length = min(int(np.clip(ideal, max(length // 4, 1), 4 * length)), most)
        if segment:  # of which nothing was pooled
            iteration, steps, states = begun
            for unit, state in zip(self.units, states, strict=True):
                unit.state = state
            with contextlib.suppress(Exception):  # it may be the disk that failed
                sink.commit(self.state, iteration, steps)
        return Outcome(
            iteration,
            self.state(),
            stop.requested,
            error,
            Timing(seconds["warmup"], seconds["sampling"]),
            steps,
        )

    def _pooled(self, segment: list[Block], block: Block, index: int, end: int, warmup: int) -> int:
        """Add a chunk of warm-up to its segment; pool the chains at its end.

        Returns:
            The iteration to go on with.
        """
        if not self.engine.pools:
            return index
        segment.append(block)
        if index < end:
            return index
        state = self.engine.pool(self.state(), segment, index, warmup)
        for unit in self.units:
            unit.restore(state)
        segment.clear()
        return self.engine.after(state, index, warmup)


def _advance_work(index: int, count: int, collect: bool) -> Callable[[Unit], list[Block]]:
    return lambda unit: unit.advance(index, count, collect)


class MemorySink:
    """Keeps the blocks of a run in memory."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._committed = 0

    def open(self, empty: Block) -> None:
        self.blocks, self._committed = [empty], 1

    def append(self, block: Block) -> None:
        self.blocks.append(block)

    def commit(self, state: Callable[[], Any], iteration: int, warmup_steps: int) -> None:
        self._committed = len(self.blocks)

    def rollback(self) -> None:
        del self.blocks[self._committed :]

    def block(self) -> Block:
        """All draws so far, (chain, draw, ...)."""
        return joined(self.blocks, 1)
