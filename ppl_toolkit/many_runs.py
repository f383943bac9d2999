"""Whole runs on each of many data sets, by one engine."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ppl_toolkit.engine import Block, Engine, joined
from ppl_toolkit.runner import Timing
from ppl_toolkit.starts import start_numbers
from ppl_toolkit.threads import Interrupts, workers
from ppl_toolkit.units import (
    GivenUpError,
    Unit,
    advanced,
    grouped,
    shared_inputs,
    state_of,
    warm,
)

__all__ = ["DataSet", "Finished", "each_data_set", "run_data_sets"]


class DataSet(NamedTuple):
    """One of many data sets, and what the chains on it differ by.

    Attributes:
        data: what stands for the data of the engine's program.
        settings: the method's settings for it.
        seed: of its chains.
        first: number of its first chain; chain c has the keys of chain first + c of the seed.
    """

    data: Sequence[Any]
    settings: Any
    seed: int
    first: int = 0


class Finished(NamedTuple):
    """The whole run on one data set.

    Attributes:
        block: its draws, (chain, draw, ...).
        state: the states of its chains at the end, NumPy arrays with a leading chain axis.
        timing: seconds of warm-up and of sampling.
        warmup_steps: gradient evaluations (or the like) in warm-up, over its chains.
    """

    block: Block
    state: Any
    timing: Timing
    warmup_steps: int


def each_data_set(
    engine: Engine,
    data_sets: Sequence[DataSet],
    chains: int,
    warmup: int,
    draws: int,
    threads: int | None = None,
    started: Callable[[int, Any], None] = lambda number, state: None,
    superchains: int = 0,
) -> Iterator[tuple[int, Finished | Exception]]:
    """Chains on each of many data sets, by the engine's compiled programs.

    The chains of one data set learn from each other in warm-up, as those of a `Run`; data sets do
    not. Each data set is one task of one thread: draws depend on no other data set.

    Args:
        engine: of a program whose data have the shapes of all ``data_sets``.
        data_sets: data and seeds.
        chains, warmup, draws: of every data set.
        threads: data sets worked on at a time; the number of cores if None.
        started: told the number of a data set and the first states of its chains; what it raises
            is what came of this data set.
        superchains: groups of chains that share their starts, 0 if none do.

    Yields:
        The number of a data set and what came of it, an exception if it failed, in the order in
        which they are done.

    Raises:
        KeyboardInterrupt: at the end of what was finished, if Ctrl-C came before all was.
    """
    program, device = engine.program, engine.devices[0]
    groups = grouped(chains, engine)
    origins, given = np.zeros((chains, program.size), program.precision), np.zeros(chains, bool)
    starts = start_numbers(chains, superchains)
    with program.context():
        consts = jax.device_put(engine.consts, device)

    def work(number: int) -> Finished | Exception:
        own = data_sets[number]
        try:
            if stop.requested:
                raise GivenUpError
            with program.context():
                inputs = shared_inputs(
                    consts, engine.given(own.data), own.settings, own.seed, device
                )
                units = [Unit(engine, group, inputs, device, own.first) for group in groups]
                for unit in units:
                    unit.init(origins, given, starts + np.uint32(own.first))
                started(number, state_of(units))
                return _from_start_to_end(units, warmup, draws, lambda: stop.requested)
        except Exception as problem:
            return problem

    cores = len(os.sched_getaffinity(0)) if device.platform == "cpu" else 1
    with Interrupts() as stop, workers(threads or cores) as pool:
        left = {pool.submit(work, number): number for number in range(len(data_sets))}
        given_up = False
        try:
            for future in concurrent.futures.as_completed(left):
                number, outcome = left.pop(future), future.result()
                if isinstance(outcome, GivenUpError):
                    given_up = True
                else:
                    yield number, outcome
        finally:  # nobody waits for the others
            stop.requested = True
    if given_up:
        raise KeyboardInterrupt


def _from_start_to_end(
    units: Sequence[Unit], warmup: int, draws: int, stopped: Callable[[], bool]
) -> Finished:
    """All iterations of the chains of one data set, one unit after the other."""
    begin, last, rows = time.perf_counter(), warmup + draws, units[0].engine.rows
    steps = warm(units, warmup, stopped)
    middle = time.perf_counter()
    parts = [
        advanced(units, first, min(rows, last - first), True, stopped)
        for first in range(warmup, last, rows)
    ]
    timing = Timing(middle - begin, time.perf_counter() - middle)
    return Finished(joined(parts, 1), state_of(units), timing, steps)


def run_data_sets(
    engine: Engine,
    data_sets: Sequence[Any],
    seed: int,
    warmup: int,
    draws: int,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Block]:
    """One chain on each of many data sets, by the engine's one compiled program.

    Args:
        engine: of a program whose data have the shapes of all ``data_sets``; one lane.
        data_sets: what stands for ``program.data``, once for every data set.
        seed: chain i, on data set i, uses the keys of chain i of this seed.
        warmup, draws: iterations of every chain.
        threads: data sets worked on at a time; the number of cores if None.
        progress: told after every data set how many are done.

    Returns:
        The draws on every data set, (1, draw, ...) by site.

    Raises:
        KeyboardInterrupt: Ctrl-C came before the end.
    """
    with engine.program.context():
        settings = engine.method.settings(engine.program, warmup)
    each = [DataSet(data, settings, seed, number) for number, data in enumerate(data_sets)]
    blocks: dict[int, Block] = {}
    for number, outcome in each_data_set(engine, each, 1, warmup, draws, threads):
        if isinstance(outcome, Exception):
            raise outcome
        blocks[number] = outcome.block
        progress(len(blocks))
    return [blocks[number] for number in range(len(data_sets))]
