"""The compiled functions of a method on a program.

A call takes several chains, in lock step (`lanes` of them, always as many) or one after the other:
then each is computed as if it were alone, and there may be fewer of them than there is room for.

Keys: iteration t of chain c uses fold_in(fold_in(seed, c), t), and nothing else.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from ppl_toolkit import executables
from ppl_toolkit.cost import operations
from ppl_toolkit.errors import MethodError
from ppl_toolkit.packing import Packing
from ppl_toolkit.program import Program
from ppl_toolkit.sufficient import reduced
from ppl_toolkit.tracing import Traced

__all__ = ["Block", "Engine", "joined"]

_BUFFER_BYTES = 8 * 2**20  # of the draws one call of a compiled program returns
_MOST_ROWS = 1024
_INIT_INDEX = 0xFFFFFFFF
_IN_TURN = 4  # chains that one call takes one after the other, where a call's price shows:
_SMALL_BYTES, _SMALL_WORK = 2**15, 1e6  # where a state, a draw and an iteration are small


class Block(NamedTuple):
    """The draws of one chunk: arrays of shape (chain, draw, ...) by name.

    Attributes:
        values: sites; in warm-up what chains are pooled by, where the method does so.
        stats: statistics of the sampler.
    """

    values: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]


class _Structure(NamedTuple):
    """Shapes and types of the states of a call's chains, and of what one iteration gives.

    All have a leading axis of as many chains as a call has room for.
    """

    state: Any
    draw: Any
    stats: Any
    values: Any


class _Packed(NamedTuple):
    """The packings of what one iteration gives."""

    draw: Packing
    stats: Packing
    values: Packing


_structures: dict[Any, _Structure] = {}


class Engine:
    """The compiled functions of a method on a program.

    Args:
        program: the program; only its shapes and its text matter for what is compiled.
        method: the method.
        lanes: chains that advance in lock step; with one lane they advance on their own.
        devices: where units run.

    Attributes:
        room: the chains that a call has room for: the lanes, or those that it takes in turn.
    """

    def __init__(self, program: Program, method: Any, lanes: int, devices: Sequence[Any]) -> None:
        if hasattr(method, "on"):  # its kernels may depend on what sites there are
            method = method.on(program)
        self.program, self.method, self.lanes = program, method, lanes
        self.together = getattr(method, "together", False)
        if self.together and lanes == 1:
            raise MethodError(
                f"{type(method).__name__} adapts its chains together, and cannot run one alone. "
                "Let it have two or more by infer(..., chains=), or take NUTS()."
            )
        self.devices = tuple(devices)
        self._calls: dict[Any, Callable] = {}
        self.traced = {name: program.traced(name) for name in method.needs}
        self.reduced = reduced(program) if "log_density" in method.needs else None
        if self.reduced is not None:
            self.traced["log_density"] = self.reduced.traced
        self.consts = [traced.consts for traced in self.traced.values()]
        with program.context():
            self.settings = method.settings(program, 0)
            self.data = self.given(program.data)
            inputs = (self.consts, self.data, self.settings)
            seed, index = _like((2,), np.uint32), _like((), np.int32)
            self.in_turn = lanes == 1
            part = () if self.in_turn else (lanes,)  # of chains that are computed as one

            def starts(*leading: int) -> tuple:
                position = _like((*leading, program.size), program.precision)
                return _like(leading, np.uint32), position, _like(leading, np.bool_)

            texts = tuple(traced.text() for traced in self.traced.values())
            shapes = str(jax.tree.map(lambda x: (np.shape(x), str(jnp.result_type(x))), inputs))
            self._key = (
                type(method), method.statics(), lanes, program.precision, texts, shapes,
            )  # fmt: skip
            self._pieces: dict[str, Traced] = {}
            self._name = _name(method, self._key)
            if self._key not in _structures and self._name:
                known = executables.recall(f"structure {self._name}", self.devices[0])
                if known is not None:
                    _structures[self._key] = known
            if self._key not in _structures:
                state = self._traced_once("init", *inputs, seed, *starts(*part))
                chain, *_ = starts(*part)
                _, draw, stats = self._traced_once("step", *inputs, seed, chain, state, index)
                values = self._traced_once("values", *inputs[:2], draw)
                work = operations(self._pieces["step"].jaxpr)
                _structures[self._key] = self._with_room(
                    _Structure(state, draw, stats, values), work
                )
                if self._name:
                    executables.remember(
                        f"structure {self._name}", self.devices[0], _structures[self._key]
                    )
            self.structure = structure = _structures[self._key]
            self.room = room = jax.tree.leaves(structure)[0].shape[0]
            self.row_bytes = max(1, _bytes(structure[1:]) // room)
            self.rows = int(np.clip(_BUFFER_BYTES // (self.row_bytes * room), 1, _MOST_ROWS))
            chains, *_ = starts(room)
            self._avals: dict[str, tuple] = {
                "init": (*inputs, seed, index, *starts(room)),
                "refresh": (*inputs, index, structure.state),
                "advance": (
                    *inputs, seed, index, chains, structure.state, index, index, np.bool_(True),
                ),
            }  # fmt: skip
        self.pools = hasattr(method, "pool")
        self.packed = _Packed(*(Packing.of(part) for part in structure[1:]))

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

    def _with_room(self, one: _Structure, work: float) -> _Structure:
        """The structure of all chains that a call has room for."""
        if not self.in_turn:
            return one
        small = _bytes(one) <= _SMALL_BYTES and work <= _SMALL_WORK
        room = _IN_TURN if small else 1
        return jax.tree.map(lambda x: _like((room, *x.shape), x.dtype), one)

    def _keyed(self, function: Callable, seed: Any, numbers: Any, index: Any, *args: Any) -> Any:
        """``function`` of the keys of all lanes at an iteration, and of what each of them has.

        Of every lane on its own, unless the method takes them together.
        """

        def key(number: Any) -> Any:
            return random.fold_in(_chain_key(seed, number), index)

        if self.together:
            return function(jax.vmap(key)(numbers), *args)
        return self._over_lanes(lambda number, *own: function(key(number), *own), numbers, *args)

    def _over_lanes(self, function: Callable, *args: Any) -> Any:
        """``function`` on every lane, or of a chain alone."""
        if self.in_turn:
            return jax.tree.map(jnp.asarray, function(*args))
        return jax.vmap(function)(*args)

    def _states(self, function: Callable, active: Any, *args: Any) -> Any:
        """The states that ``function`` gives of all lanes, or of the first chains in turn."""
        if not self.in_turn:
            return function(*args)
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.structure.state)

        def one(chain: Any, states: Any) -> Any:
            return _with(states, (chain,), function(*_at(args, (chain,))))

        return lax.fori_loop(np.int32(0), active, one, blank)

    def _init(
        self, consts: Any, data: Any, settings: Any, seed: Any, starts: Any, positions: Any,
        given: Any,
    ) -> Any:  # fmt: skip
        target = self._target(consts, data)

        def init(key: Any, *start: Any) -> Any:
            return self.method.init(key, start, target, settings)

        return self._keyed(init, seed, starts, np.uint32(_INIT_INDEX), positions, given)

    def _refresh(self, consts: Any, data: Any, settings: Any, states: Any) -> Any:
        target = self._target(consts, data)
        if self.together:
            return self.method.refresh(states, target, settings)
        return self._over_lanes(lambda s: self.method.refresh(s, target, settings), states)

    def _step(
        self, consts: Any, data: Any, settings: Any, seed: Any, chains: Any, states: Any,
        index: Any,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        target = self._target(consts, data)

        def step(key: Any, state: Any) -> Any:
            return self.method.step(key, index, state, target, settings)

        return self._keyed(step, seed, chains, index, states)

    def _values(self, consts: Any, data: Any, draws: Any) -> dict[str, Any]:
        target = self._target(consts, data)
        return self._over_lanes(lambda draw: self.method.values(draw, target), draws)

    def _start(
        self, consts: Any, data: Any, settings: Any, seed: Any, active: Any, *starts: Any
    ) -> Any:
        """The first states of the first ``active`` chains (of all, in lock step)."""
        init = functools.partial(self._piece("init"), consts, data, settings, seed)
        return self._states(init, active, *starts)

    def _renew(self, consts: Any, data: Any, settings: Any, active: Any, states: Any) -> Any:
        """The states with caches for other data."""
        refresh = functools.partial(self._refresh, consts, data, settings)
        return self._states(refresh, active, states)

    def _advance(
        self, consts: Any, data: Any, settings: Any, seed: Any, active: Any, chains: Any,
        states: Any, index: Any, count: Any, collect: Any,
    ) -> tuple[Any, Any, Any, Any]:  # fmt: skip
        """Run ``count`` <= rows iterations of the first ``active`` chains from ``index`` on.

        Returns:
            The states; the values by site, the statistics and, of methods that pool their chains,
            the draws, all packed in buffers (chain, row, size) of which the first ``count`` rows
            hold.
        """
        step = functools.partial(self._piece("step"), consts, data, settings, seed)
        value = functools.partial(self._piece("values"), consts, data)
        packed = self.packed
        part = () if self.in_turn else (self.lanes,)
        parts = self.room if self.in_turn else 1

        def buffers(packing: Packing) -> dict[str, Any]:
            shapes = {t: (parts, self.rows, *part, size) for t, size in packing.sizes.items()}
            return {dtype: jnp.zeros(shape, dtype) for dtype, shape in shapes.items()}

        def put(buffers: dict[str, Any], place: tuple, new: dict[str, Any]) -> dict[str, Any]:
            return {dtype: _with(buffer, place, new[dtype]) for dtype, buffer in buffers.items()}

        def iterations(number: Any, chain: Any, state: Any, *buffers: Any) -> tuple:
            """What follows of one part, written to its place in the buffers."""
            draws, stats, values = buffers

            def iterate(carry: tuple) -> tuple:
                row, state, draws, stats = carry
                state, draw, stat = step(chain, state, index + row)
                draws = put(draws, (number, row), packed.draw.pack(draw))
                return row + 1, state, draws, put(stats, (number, row), packed.stats.pack(stat))

            zero = jnp.zeros((), jnp.int32)
            _, state, draws, stats = lax.while_loop(
                lambda c: c[0] < count, iterate, (zero, state, draws, stats)
            )

            def evaluate(carry: tuple) -> tuple:
                row, values = carry
                new = value(packed.draw.unpack(_at(draws, (number, row))))
                return row + 1, put(values, (number, row), packed.values.pack(new))

            _, values = lax.while_loop(lambda c: (c[0] < count) & collect, evaluate, (zero, values))
            return state, draws, stats, values

        def one(number: Any, carry: tuple) -> tuple:
            states, *buffers = carry
            chain, state = _at((chains, states), (number,))
            state, *buffers = iterations(number, chain, state, *buffers)
            return (_with(states, (number,), state), *buffers)

        begin = (states, buffers(packed.draw), buffers(packed.stats), buffers(packed.values))
        if self.in_turn:
            states, draws, stats, values = lax.fori_loop(np.int32(0), active, one, begin)
        else:
            states, *lots = iterations(np.int32(0), chains, *begin)
            draws, stats, values = jax.tree.map(lambda x: jnp.moveaxis(x[0], 0, 1), lots)
        return states, values, stats, draws if self.pools else ()

    def block(self, given: Any, chains: int, rows: int, collect: bool) -> Block:
        """The first rows of what `_advance` gave, of the first chains."""
        values, stats, draws = given

        def unpacked(packing: Packing, buffers: Any) -> Any:
            return packing.unpack({t: np.array(b[:chains, :rows]) for t, b in buffers.items()})

        if collect:
            values = unpacked(self.packed.values, values)
        else:
            drawn = jax.tree.leaves(unpacked(self.packed.draw, draws)) if self.pools else ()
            values = {str(number): leaf for number, leaf in enumerate(drawn)}
        return Block(values, unpacked(self.packed.stats, stats))

    def pooled_at(self, state: Any, warmup: int) -> int:
        """The iteration after which chains are pooled next, or warm-up ends."""
        return self.method.pooled_at(state) or warmup if self.pools else warmup

    def after(self, state: Any, index: int, warmup: int) -> int:
        """The iteration that follows ``index``: the first draw if warm-up is over early."""
        return warmup if self.pools and self.method.pooled_at(state) == 0 else index

    def pool(self, state: Any, segment: Sequence[Block], index: int, warmup: int) -> Any:
        """The state of all chains after a segment of warm-up, by the method."""
        block = joined(segment, 1)
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
        """The executable of `_start`, `_advance` or `_renew` on ``device``."""
        if (name, device) in self._calls:
            return self._calls[name, device]

        programs: dict[str, Callable] = {
            "init": self._start, "advance": self._advance, "refresh": self._renew,
        }  # fmt: skip

        def build() -> jax.stages.Traced:
            sharding = jax.sharding.SingleDeviceSharding(device)
            avals = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding),
                self._avals[name],
            )
            return jax.jit(programs[name]).trace(*avals)

        quick = name == "init" and getattr(self.method, "brief_start", False)
        executable, _ = executables.compiled(
            (name, device, *self._key), build, device, quick,
            f"{name} {quick} {self._name}" if self._name else "",
        )  # fmt: skip
        self._calls[name, device] = executable.call
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


def _like(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _bytes(structure: Any) -> int:
    """About as many as the arrays take."""
    return sum(8 * math.prod(leaf.shape) for leaf in jax.tree.leaves(structure))


def _at(tree: Any, place: tuple) -> Any:
    """The parts of arrays at the first indices ``place``."""

    def part(x: Any) -> Any:
        shape = x.shape[len(place) :]
        begin = (*place, *(np.int32(0) for _ in shape))
        return lax.dynamic_slice(x, begin, (*(1 for _ in place), *shape)).reshape(shape)

    return jax.tree.map(part, tree)


def _with(tree: Any, place: tuple, new: Any) -> Any:
    """The arrays with other parts at the first indices ``place``."""

    def replaced(x: Any, own: Any) -> Any:
        own = jnp.asarray(own, x.dtype)
        begin = (*place, *(np.int32(0) for _ in own.shape))
        return lax.dynamic_update_slice(x, own.reshape(*(1 for _ in place), *own.shape), begin)

    return jax.tree.map(replaced, tree, new)


def _chain_key(seed: Any, chain: Any) -> Any:
    return random.fold_in(random.wrap_key_data(seed), chain)


def joined(blocks: Sequence[Block], axis: int) -> Block:
    """The draws of several blocks, one after the other along ``axis``."""
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        *(
            {k: np.concatenate([part[k] for part in parts], axis) for k in parts[0]}
            for parts in ([b.values for b in blocks], [b.stats for b in blocks])
        )
    )
