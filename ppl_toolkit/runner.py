"""The one loop that runs every method: units, chunks, threads, devices, progress, checkpoints.

A *unit* is one compiled program over a fixed number of lanes (chains in lock step; one lane on
CPU). It advances its chains by a number of iterations that is an argument of the program, so that
the same executable serves every chunk length: draws cannot depend on how a run is cut up. Units
are spread over threads that call the same executable, or over devices.

Keys: iteration t of chain c uses fold_in(fold_in(seed, c), t), and nothing else.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from ppl_toolkit import executables
from ppl_toolkit.goals import Judge
from ppl_toolkit.program import Program
from ppl_toolkit.sufficient import reduced
from ppl_toolkit.tracing import Traced

__all__ = [
    "Block",
    "DataSet",
    "Engine",
    "Finished",
    "MemorySink",
    "Outcome",
    "Progress",
    "Run",
    "Sink",
    "Timing",
    "each_data_set",
    "run_data_sets",
]

_BUFFER_BYTES = 8 * 2**20  # of the draws one call of a compiled program returns
_MOST_ROWS = 1024
_CHUNK_BYTES = 32 * 2**20  # of the draws of a chunk, all chains, unless its length is given
_INIT_INDEX = 0xFFFFFFFF
_CHUNK_SECONDS = 0.5


class Block(NamedTuple):
    """The draws of one chunk: arrays of shape (chain, draw, ...) by name.

    Attributes:
        values: sites; in warm-up what chains are pooled by, where the method does so.
        stats: statistics of the sampler.
    """

    values: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]


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


class _Structure(NamedTuple):
    """Shapes and types of a state, and of what one iteration gives."""

    state: Any
    draw: Any
    stats: Any
    values: Any


_structures: dict[Any, _Structure] = {}


class Engine:
    """The compiled functions of a method on a program.

    Args:
        program: the program; only its shapes and its text matter for what is compiled.
        method: the method.
        lanes: chains per unit.
        devices: where units run.
    """

    def __init__(self, program: Program, method: Any, lanes: int, devices: Sequence[Any]) -> None:
        if hasattr(method, "on"):  # its kernels may depend on what sites there are
            method = method.on(program)
        self.program, self.method, self.lanes = program, method, lanes
        self.devices = tuple(devices)
        self.traced = {name: program.traced(name) for name in method.needs}
        self.reduced = reduced(program) if "log_density" in method.needs else None
        if self.reduced is not None:
            self.traced["log_density"] = self.reduced.traced
        self.consts = [traced.consts for traced in self.traced.values()]
        with program.context():
            self.settings = method.settings(program, 0)
            self.data = self.given(program.data)
            inputs = (self.consts, self.data, self.settings)
            seed = jax.ShapeDtypeStruct((2,), np.uint32)
            chains = jax.ShapeDtypeStruct((lanes,), np.uint32)
            position = jax.ShapeDtypeStruct((lanes, program.size), program.precision)
            given = jax.ShapeDtypeStruct((lanes,), np.bool_)
            self._avals: dict[str, tuple] = {"init": (*inputs, seed, chains, position, given)}
            texts = tuple(traced.text() for traced in self.traced.values())
            shapes = str(jax.tree.map(lambda x: (np.shape(x), str(jnp.result_type(x))), inputs))
            self._key = (
                type(method), method.statics(), lanes, program.precision, texts, shapes,
            )  # fmt: skip
            index = jax.ShapeDtypeStruct((), np.int32)
            self._pieces: dict[str, Traced] = {}
            self._name = _name(method, self._key)
            if self._key not in _structures and self._name:
                known = executables.recall(f"structure {self._name}", self.devices[0])
                if known is not None:
                    _structures[self._key] = known
            if self._key not in _structures:
                state = self._traced_once("init", *self._avals["init"])
                _, draw, stats = self._traced_once("step", *inputs, seed, chains, state, index)
                values = self._traced_once("values", *inputs[:2], draw)
                _structures[self._key] = _Structure(state, draw, stats, values)
                if self._name:
                    executables.remember(
                        f"structure {self._name}", self.devices[0], _structures[self._key]
                    )
            self.structure = structure = _structures[self._key]
            given_leaves = jax.tree.leaves(structure[1:])
            self.row_bytes = max(1, sum(8 * math.prod(leaf.shape) for leaf in given_leaves))
            self.rows = int(np.clip(_BUFFER_BYTES // self.row_bytes, 1, _MOST_ROWS))
            self._avals["advance"] = (
                *inputs, seed, chains, structure.state, index, index, np.bool_(True),
            )  # fmt: skip
            self._avals["refresh"] = (*inputs, structure.state)
        self.pools = hasattr(method, "pool")

    def given(self, data: Sequence[Any]) -> tuple[Any, ...]:
        """What programs take for ``data``: these, and statistics of them."""
        if self.reduced is None:
            return tuple(data)
        with self.program.context():
            return (*data, *self.reduced.statistics(data))

    # -- the functions that are compiled ----------------------------------------------------

    def _traced_once(self, name: str, *avals: Any) -> Any:
        """The shapes that `_init`, `_step` or `_values` gives; its trace is kept for compiling."""
        traced = self._pieces[name] = Traced.of(getattr(self, f"_{name}"), *avals)
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in traced.jaxpr.outvars]
        return jax.tree.unflatten(traced.out_tree, shapes)

    def _piece(self, name: str) -> Callable:
        """The function as it was traced, if it was in this engine."""
        traced = self._pieces.get(name)
        if traced is None:
            return getattr(self, f"_{name}")
        return lambda *args: traced(traced.consts, *args)

    def _target(self, consts: Any, data: Any) -> SimpleNamespace:
        count = len(self.program.data)

        def bind(traced: Traced, values: Any) -> Callable:
            reduced = self.reduced is not None and traced is self.reduced.traced
            return lambda x: traced(values, x, data if reduced else data[:count])

        named: dict[str, Callable] = {}
        functions: dict[Any, Callable] = {}
        for number, (name, traced) in enumerate(self.traced.items()):
            own = bind(traced, consts[number])
            if isinstance(name, str):
                named[name] = own
            else:
                functions[name] = own
        return SimpleNamespace(**named, functions=functions)

    def _over_lanes(self, function: Callable, *args: Any) -> Any:
        """``function`` on every lane; with one lane without any batching."""
        if self.lanes == 1:
            one = function(*jax.tree.map(lambda x: x[0], args))
            return jax.tree.map(lambda x: jnp.asarray(x)[None], one)
        return jax.vmap(function)(*args)

    def _init(
        self, consts: Any, data: Any, settings: Any, seed: Any, starts: Any, positions: Any,
        given: Any,
    ) -> Any:  # fmt: skip
        target = self._target(consts, data)

        def one(start: Any, position: Any, is_given: Any) -> Any:
            key = random.fold_in(_chain_key(seed, start), np.uint32(_INIT_INDEX))
            return self.method.init(key, (position, is_given), target, settings)

        return self._over_lanes(one, starts, positions, given)

    def _refresh(self, consts: Any, data: Any, settings: Any, states: Any) -> Any:
        target = self._target(consts, data)
        return self._over_lanes(lambda s: self.method.refresh(s, target, settings), states)

    def _step(
        self, consts: Any, data: Any, settings: Any, seed: Any, chains: Any, states: Any,
        index: Any,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        target = self._target(consts, data)

        def one(chain: Any, state: Any) -> Any:
            key = random.fold_in(_chain_key(seed, chain), index)
            return self.method.step(key, index, state, target, settings)

        return self._over_lanes(one, chains, states)

    def _values(self, consts: Any, data: Any, draws: Any) -> dict[str, Any]:
        target = self._target(consts, data)
        return self._over_lanes(lambda draw: self.method.values(draw, target), draws)

    def _advance(
        self, consts: Any, data: Any, settings: Any, seed: Any, chains: Any, states: Any,
        index: Any, count: Any, collect: Any,
    ) -> tuple[Any, Any, Any, Any]:  # fmt: skip
        """Run ``count`` <= rows iterations from iteration ``index`` on.

        Returns:
            The states; the values by site, the statistics and, of methods that pool their chains,
            the draws, all in buffers (lane, row, ...) of which the first ``count`` rows hold.
        """
        step = functools.partial(self._piece("step"), consts, data, settings, seed, chains)
        value = functools.partial(self._piece("values"), consts, data)

        def buffers(structure: Any) -> Any:
            return jax.tree.map(lambda s: jnp.zeros((self.rows, *s.shape), s.dtype), structure)

        def put(buffer: Any, row: Any, new: Any) -> Any:
            return jax.tree.map(
                lambda b, x: lax.dynamic_update_index_in_dim(b, x, row, 0), buffer, new
            )

        def iterate(carry: tuple) -> tuple:
            row, states, draws, stats = carry
            states, draw, stat = step(states, index + row)
            return row + 1, states, put(draws, row, draw), put(stats, row, stat)

        _, draw, stat, values = self.structure
        zero = jnp.zeros((), jnp.int32)
        _, states, draws, stats = lax.while_loop(
            lambda c: c[0] < count, iterate, (zero, states, buffers(draw), buffers(stat))
        )

        def evaluate(carry: tuple) -> tuple:
            row, values = carry
            draw = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, row, 0, False), draws)
            return row + 1, put(values, row, value(draw))

        _, values = lax.while_loop(
            lambda c: (c[0] < count) & collect, evaluate, (zero, buffers(values))
        )
        rows_second = functools.partial(jax.tree.map, lambda x: jnp.moveaxis(x, 0, 1))
        pooled = rows_second(draws) if self.pools else ()
        return states, rows_second(values), rows_second(stats), pooled

    def pooled_at(self, state: Any, warmup: int) -> int:
        """The iteration after which chains are pooled next, or warm-up ends."""
        return self.method.pooled_at(state) or warmup if self.pools else warmup

    def after(self, state: Any, index: int, warmup: int) -> int:
        """The iteration that follows ``index``: the first draw if warm-up is over early."""
        return warmup if self.pools and self.method.pooled_at(state) == 0 else index

    def pool(self, state: Any, segment: Sequence[Block], index: int, warmup: int) -> Any:
        """The state of all chains after a segment of warm-up, by the method."""
        block = _joined(segment, 1)
        drawn = jax.tree.unflatten(jax.tree.structure(self.structure.draw), block.values.values())
        return self.method.pool(state, drawn, block.stats, index, warmup)

    def no_draws(self, chains: int) -> Block:
        """A block of the right shapes and types with no draws in it."""

        def empty(like: Any) -> np.ndarray:
            return np.zeros((chains, 0, *like.shape[1:]), like.dtype)

        parts = (self.structure.values, self.structure.stats)
        return Block(*(jax.tree.map(empty, part) for part in parts))

    # -- executables ------------------------------------------------------------------------

    def function(self, name: str, device: Any) -> Callable:
        """The executable of `_init`, `_advance` or `_refresh` on ``device``."""

        def build() -> jax.stages.Lowered:
            sharding = jax.sharding.SingleDeviceSharding(device)
            avals = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding),
                self._avals[name],
            )
            return jax.jit(self._piece(name)).lower(*avals)

        quick = name == "init" and getattr(self.method, "brief_start", False)
        executable, _ = executables.compiled(
            (name, device, *self._key), build, device, quick,
            f"{name} {quick} {self._name}" if self._name else "",
        )  # fmt: skip
        return executable.call

    def compile(self, *names: str) -> None:
        """Make the executables now (XLA compiles one per thread)."""

        def make(name: str) -> None:
            with self.program.context():
                for device in self.devices:
                    self.function(name, device)

        pool = concurrent.futures.ThreadPoolExecutor(len(names))
        try:
            list(pool.map(make, names))
        finally:  # Ctrl-C does not wait for XLA
            pool.shutdown(wait=False, cancel_futures=True)


def _name(method: Any, key: tuple) -> str:
    """A text that tells engines apart in all processes; "" for methods that bring other code."""
    kind, statics, *rest = key
    plain = all(isinstance(x, str | int | float | bool | None) for x in jax.tree.leaves(statics))
    if not plain or not kind.__module__.startswith("ppl_toolkit."):
        return ""
    return repr((kind.__module__, kind.__qualname__, statics, *rest))


def _chain_key(seed: Any, chain: Any) -> Any:
    return random.fold_in(random.wrap_key_data(seed), chain)


def _inputs(consts: Any, data: Any, settings: Any, seed: int, device: Any) -> tuple:
    """What all chains of a run on a device take in, there."""
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.device_put((consts, data, settings, words), device)


def _groups(chains: int, lanes: int) -> list[range]:
    """The chains of every unit of a run."""
    return [range(first, min(first + lanes, chains)) for first in range(0, chains, lanes)]


def _state_of(units: Sequence[_Unit]) -> Any:
    """The states of all chains of a run, on the host."""
    parts = [unit.host_state() for unit in units]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


class _Unit:
    """Some chains that run in lock step on one device: their inputs and their state.

    Args:
        engine: compiled functions.
        chains: which chains of the run these are.
        inputs: what all of them share, see `_inputs`.
        device: where they run.
        first: number of the run's first chain, by which the chains have their keys.
    """

    def __init__(
        self, engine: Engine, chains: Sequence[int], inputs: tuple, device: Any, first: int = 0
    ) -> None:
        self.engine, self.chains, self.device = engine, tuple(chains), device
        numbers = self._filled(np.array(chains, np.uint32) + np.uint32(first))
        self.inputs = (*inputs, numbers)
        self.state: Any = None  # on the device, or NumPy arrays on their way to it

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        """One row per lane from one row per chain of this unit."""
        return np.concatenate([rows, np.repeat(rows[-1:], self.engine.lanes - len(rows), 0)])

    def _padded(self, x: np.ndarray) -> np.ndarray:
        """One row per lane from one row per chain of the whole run."""
        return self._filled(np.asarray(x)[list(self.chains)])

    def init(
        self, positions: np.ndarray, given: np.ndarray, starts: np.ndarray | None = None
    ) -> None:
        """The first states; ``starts`` are numbers that chains may share, else the chains'."""
        call = self.engine.function("init", self.device)
        *inputs, chains = self.inputs
        keys = chains if starts is None else self._padded(starts).astype(np.uint32)
        self.state = call(*inputs, keys, self._padded(positions), self._padded(given))

    def use(self, data: Any) -> None:
        """Go on with other data of the same shapes (`refresh` renews the state's caches)."""
        consts, _, *rest = self.inputs
        self.inputs = (consts, jax.device_put(self.engine.given(data), self.device), *rest)

    def restore(self, states: Any) -> None:
        """The state from that of all chains of the run."""
        self.state = jax.tree.map(self._padded, states)

    def refresh(self) -> None:
        call = self.engine.function("refresh", self.device)
        self.state = call(*self.inputs[:3], self.state)

    def host_state(self) -> Any:
        return jax.tree.map(lambda x: np.array(np.asarray(x)[: len(self.chains)]), self.state)

    def advance(self, index: int, count: int, collect: bool) -> list[Block]:
        """Run ``count`` iterations; blocks of at most ``rows`` draws, padding lanes dropped."""
        call = self.engine.function("advance", self.device)
        blocks, lanes = [], len(self.chains)
        while count:
            rows = min(count, self.engine.rows)
            self.state, values, stats, draws = call(
                *self.inputs, self.state, np.int32(index), np.int32(rows), np.bool_(collect)
            )
            if not collect:
                values = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(draws))}

            def take(x: Any, rows: int = rows) -> np.ndarray:
                return np.array(np.asarray(x)[:lanes, :rows])

            blocks.append(
                Block(
                    {k: take(v) for k, v in values.items()},
                    {k: take(v) for k, v in stats.items()},
                )
            )
            index, count = index + rows, count - rows
        return blocks

    def warm(self, warmup: int) -> None:
        """All of the warm-up of a run of this unit alone."""
        _warm([self], warmup)


def _joined(blocks: Sequence[Block], axis: int) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        *(
            {k: np.concatenate([part[k] for part in parts], axis) for k in parts[0]}
            for parts in ([b.values for b in blocks], [b.stats for b in blocks])
        )
    )


class _GivenUpError(Exception):
    """A run without chunks was given up, after Ctrl-C."""


def _advanced(
    units: Sequence[_Unit], index: int, count: int, collect: bool, stopped: Callable[[], bool]
) -> Block:
    """The draws of all units, one unit after the other."""
    if stopped():
        raise _GivenUpError
    return _joined([_joined(unit.advance(index, count, collect), 1) for unit in units], 0)


def _warm(units: Sequence[_Unit], warmup: int, stopped: Callable[[], bool] = lambda: False) -> int:
    """All of a warm-up of all chains of a run, segment by segment.

    Returns:
        Gradient evaluations, or the like.
    """
    engine, index, steps = units[0].engine, 0, 0
    while index < warmup:
        end = engine.pooled_at(units[0].state, warmup)
        segment = _advanced(units, index, end - index, False, stopped)
        steps += int(np.sum(segment.stats.get("n_steps", 0)))
        if engine.pools:
            state = engine.pool(_state_of(units), [segment], end, warmup)
            for unit in units:
                unit.restore(state)
            end = engine.after(state, end, warmup)
        index = end
    return steps


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
                _inputs(engine.consts, engine.data, settings, seed, device) for device in devices
            ]
            self.units = [
                _Unit(engine, group, inputs[i % len(devices)], devices[i % len(devices)])
                for i, group in enumerate(_groups(chains, engine.lanes))
            ]
        on_cpu = devices[0].platform == "cpu"
        default = len(os.sched_getaffinity(0)) if on_cpu else len(devices)
        self.threads = max(1, min(threads or default, len(self.units)))
        self._running: list[concurrent.futures.Future] = []

    def _each(self, pool: concurrent.futures.Executor, work: Callable[[_Unit], Any]) -> list[Any]:
        """``work`` on every unit, in threads that enter the precision context."""

        def task(unit: _Unit) -> Any:
            with self.engine.program.context():
                return work(unit)

        self._running = [pool.submit(task, unit) for unit in self.units]
        return [future.result() for future in self._running]

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
        with _workers(self.threads) as pool:
            self._each(pool, lambda unit: unit.init(positions, given, starts))

    def restore(self, states: Any, fresh_data: bool) -> None:
        """Go on from the states of an earlier run; ``fresh_data`` renews their caches."""
        with self.engine.program.context():
            for unit in self.units:
                unit.restore(states)
                if fresh_data:
                    unit.refresh()

    def state(self) -> Any:
        return _state_of(self.units)

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
        with _workers(self.threads) as pool, _Interrupts() as stop:
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
                    block = _joined([_joined(blocks, 1) for blocks in parts], 0)
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

    Yields:
        The number of a data set and what came of it, an exception if it failed, in the order in
        which they are done.

    Raises:
        KeyboardInterrupt: at the end of what was finished, if Ctrl-C came before all was.
    """
    program, device = engine.program, engine.devices[0]
    groups = _groups(chains, engine.lanes)
    origins, given = np.zeros((chains, program.size), program.precision), np.zeros(chains, bool)
    with program.context():
        consts = jax.device_put(engine.consts, device)

    def work(number: int) -> Finished | Exception:
        own = data_sets[number]
        try:
            if stop.requested:
                raise _GivenUpError
            with program.context():
                inputs = _inputs(consts, engine.given(own.data), own.settings, own.seed, device)
                units = [_Unit(engine, group, inputs, device, own.first) for group in groups]
                for unit in units:
                    unit.init(origins, given)
                started(number, _state_of(units))
                return _from_start_to_end(units, warmup, draws, lambda: stop.requested)
        except Exception as problem:
            return problem

    cores = len(os.sched_getaffinity(0)) if device.platform == "cpu" else 1
    with _Interrupts() as stop, _workers(threads or cores) as pool:
        left = {pool.submit(work, number): number for number in range(len(data_sets))}
        given_up = False
        try:
            for future in concurrent.futures.as_completed(left):
                number, outcome = left.pop(future), future.result()
                if isinstance(outcome, _GivenUpError):
                    given_up = True
                else:
                    yield number, outcome
        finally:  # nobody waits for the others
            stop.requested = True
    if given_up:
        raise KeyboardInterrupt


def _from_start_to_end(
    units: Sequence[_Unit], warmup: int, draws: int, stopped: Callable[[], bool]
) -> Finished:
    """All iterations of the chains of one data set, one unit after the other."""
    begin, last, rows = time.perf_counter(), warmup + draws, units[0].engine.rows
    steps = _warm(units, warmup, stopped)
    middle = time.perf_counter()
    parts = [
        _advanced(units, first, min(rows, last - first), True, stopped)
        for first in range(warmup, last, rows)
    ]
    timing = Timing(middle - begin, time.perf_counter() - middle)
    return Finished(_joined(parts, 1), _state_of(units), timing, steps)


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


@contextlib.contextmanager
def _workers(count: int) -> Iterator[concurrent.futures.Executor]:
    """Threads for the units, among which the matrix library (BLAS) starts none of its own.

    Its threads would wait for each other in busy loops where cores are short, for longer than a
    small factorisation takes; and its sums would depend on their number.
    """
    from threadpoolctl import threadpool_limits

    with (
        threadpool_limits(limits=1, user_api="blas"),
        concurrent.futures.ThreadPoolExecutor(count) as pool,
    ):
        yield pool


def _advance_work(index: int, count: int, collect: bool) -> Callable[[_Unit], list[Block]]:
    return lambda unit: unit.advance(index, count, collect)


class _Interrupts:
    """Turns the first Ctrl-C of a run into a request to stop; the second one interrupts.

    Signals reach the main thread only; elsewhere this does nothing.
    """

    requested = False

    def __enter__(self) -> _Interrupts:
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


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
        return _joined(self.blocks, 1)
