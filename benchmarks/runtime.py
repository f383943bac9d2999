"""How chains are best spread over a CPU, and what making an executable costs.

    python benchmarks/runtime.py [--rounds 5] [--draws 1000]

The draws of NUTS after a warm-up by the package, by the same program of one chain, over four chains
in every way XLA offers, in one process, in turns, with the same keys; then through the package's
own loop. JAX sees two host devices here, which only the mapping over devices uses.
"""

import argparse
import concurrent.futures
import os
import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["PPL_CACHE_DIR"] = "off"

import jax
import jax.numpy as jnp
import numpy as np
from examples import EXAMPLES, new_data
from jax import lax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import Cost, cost_of, machine, show_table
from peers import CHAINS, Data

from ppl_toolkit import NUTS, Program, executables
from ppl_toolkit.engine import Engine
from ppl_toolkit.runner import MemorySink, Run

SEED = 1
WORDS = np.array([0, SEED], np.uint32)


class Chain:
    """The draws of one chain after warm-up: a function of seed, number, state and data.

    Its step is the package's; how steps follow each other, and chains run beside each other, not.
    """

    def __init__(self, model: Callable, data: Data, draws: int) -> None:
        self.program = Program(model, data.args, data.kwargs)
        self.method, self.draws = NUTS(), draws
        self.engine = Engine(self.program, self.method, 1, jax.local_devices()[:1])
        with self.program.context():
            self.settings = self.method.settings(self.program, draws)

    def warmed(self) -> Any:
        """The states of four chains after warm-up by the package."""
        self.engine.compile("init", "advance")
        run = Run(self.engine, CHAINS, SEED, self.settings, 1)
        run.start(np.zeros((CHAINS, self.program.size)), np.zeros(CHAINS, bool))
        run.chunks(MemorySink(), _Silent(), start=0, warmup=self.draws, total=self.draws)
        return run.state()

    def __call__(self, seed: Any, chain: Any, state: Any, data: Any) -> dict[str, Any]:
        engine, consts = self.engine, self.engine.consts

        def step(state: Any, index: Any) -> tuple[Any, dict[str, Any]]:
            state, draw, _ = engine._step(consts, data, self.settings, seed, chain, state, index)
            return state, engine._values(consts, data, draw)

        indices = jnp.arange(self.draws, 2 * self.draws, dtype=jnp.int32)
        return lax.scan(step, state, indices)[1]


Way = Callable[[], dict[str, np.ndarray]]


def ways_of(chain: Chain, states: Any) -> dict[str, Way]:
    """Ways to run the program over four chains, compiled; each gives (chain, draw, ...) arrays."""
    data, seed = chain.engine.data, WORDS
    numbers = np.arange(CHAINS, dtype=np.uint32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("device",))

    def mapped(seed: Any, numbers: Any, states: Any, data: Any) -> Any:
        return lax.map(lambda own: chain(seed, *own, data), (numbers, states))

    def lock_step(seed: Any, numbers: Any, states: Any, data: Any) -> Any:
        return jax.vmap(chain, (None, 0, 0, None))(seed, numbers, states, data)

    whole, split = PartitionSpec(), PartitionSpec("device")
    sharded = jax.shard_map(
        mapped, mesh=mesh, in_specs=(whole, split, split, whole), out_specs=split, check_vma=False
    )

    def compiled(function: Callable, *args: Any) -> Callable:
        with chain.program.context():
            return jax.jit(function).lower(*args).compile()

    def on_host(call: Callable, *args: Any) -> dict[str, np.ndarray]:
        with chain.program.context():
            return {k: np.asarray(v) for k, v in call(*args).items()}

    one = [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(CHAINS)]
    single = compiled(chain, seed, numbers[0], one[0], data)
    given = seed, numbers, states, data
    calls = {
        "vmap over 4 chains": compiled(lock_step, *given),
        "lax.map over 4 chains": compiled(mapped, *given),
    }
    with chain.program.context():
        shardings = tuple(NamedSharding(mesh, part) for part in (whole, split, split, whole))
        placed = jax.device_put(given, shardings)
    parted = compiled(sharded, *placed)

    def threads() -> dict[str, np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            parts = list(
                pool.map(lambda i: on_host(single, seed, numbers[i], one[i], data), numbers)
            )
        return {k: np.stack([part[k] for part in parts]) for k in parts[0]}

    return {
        **{k: lambda call=call: on_host(call, *given) for k, call in calls.items()},
        "2 threads, one executable": threads,
        "shard_map over 2 devices": lambda: on_host(parted, *placed),
    }


class _Silent:
    def update(self, iteration: int, stats: Any) -> None:
        """Progress that nobody looks at."""


def ways_of_package(chain: Chain, states: Any) -> dict[str, Way]:
    """The package's own loop: chunks, host copies and all, but no labels and no findings."""

    def way(lanes: int, threads: int) -> Way:
        engine = Engine(chain.program, chain.method, lanes, jax.local_devices()[:1])
        engine.compile("advance")

        def run() -> dict[str, np.ndarray]:
            sink, draws = MemorySink(), chain.draws
            run = Run(engine, CHAINS, SEED, chain.settings, threads)
            run.restore(states, fresh_data=False)
            run.chunks(sink, _Silent(), start=draws, warmup=draws, total=2 * draws)
            return sink.block().values

        return run

    return {
        "the package, 4 lanes": way(4, 1),
        "the package, 1 lane, 1 thread": way(1, 1),
        "the package, 1 lane, 2 threads": way(1, 2),
    }


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[k], b[k]) for k in a)


def spread(model: Callable, data: Data, rounds: int, draws: int) -> list[list[Any]]:
    """Rows: CPU and wall seconds of every way, and whether its draws are those of lax.map."""
    chain = Chain(model, data, draws)
    states = chain.warmed()
    ways = {**ways_of(chain, states), **ways_of_package(chain, states)}
    results = {name: way() for name, way in ways.items()}
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            costs[name].append(cost_of(way)[0])
    reference = results["lax.map over 4 chains"]
    return [
        [
            name,
            median(cost.cpu for cost in costs[name]),
            median(cost.wall for cost in costs[name]),
            "yes" if same(results[name], reference) else "no",
        ]
        for name in ways
    ]


def making(model: Callable, data: Data, draws: int) -> list[list[Any]]:
    """Rows: CPU seconds and size of every step from a model to an executable."""
    chain = Chain(model, data, draws)
    cost, _ = cost_of(lambda: Program(model, data.args, data.kwargs))
    rows = [["read the model (Program)", cost.cpu, None]]
    state = jax.tree.map(lambda leaf: leaf[0], chain.warmed())
    arguments = WORDS, np.uint32(0), state, chain.engine.data
    with chain.program.context():
        jitted = jax.jit(chain)
        cost, traced = cost_of(lambda: jitted.trace(*arguments))
        rows.append(["trace the draws of a chain", cost.cpu, None])
        cost, lowered = cost_of(traced.lower)
        rows.append(["lower it", cost.cpu, len(lowered.as_text())])
        cost, compiled = cost_of(lowered.compile)
        rows.append(["compile it (XLA)", cost.cpu, None])
        cost, (payload, ins, outs) = cost_of(lambda: serialize_executable.serialize(compiled))
        rows.append(["serialise it", cost.cpu, len(payload)])
        cost, _ = cost_of(lambda: serialize_executable.deserialize_and_load(payload, ins, outs))
        rows.append(["load it", cost.cpu, None])

    def engine() -> None:
        program = Program(model, data.args, data.kwargs)
        Engine(program, NUTS(), 1, jax.local_devices()[:1]).compile("init", "advance")

    executables.clear()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PPL_CACHE_DIR"] = directory
        for label in ("nothing kept", "kept on disk", "kept in the process"):
            cost, _ = cost_of(engine)
            rows.append([f"the package's two programs, {label}", cost.cpu, None])
            if label == "nothing kept":
                rows[-1][2] = executables.cache_info().bytes
                executables.clear()
    os.environ["PPL_CACHE_DIR"] = "off"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1000, help="of warm-up, and as many to keep")
    options = parser.parse_args()
    print(machine("ppl_toolkit", "jax", "numpyro"))
    size = f"4 chains x {options.draws} draws, medians of {options.rounds} rounds"
    for name, (model, data) in EXAMPLES.items():
        show_table(
            f"From a model to an executable: {name}",
            ("step", "CPU s", "bytes"),
            making(model, new_data(data), options.draws),
        )
        show_table(
            f"Ways to run four chains: {name} ({size})",
            ("way", "CPU s", "wall s", "draws as by lax.map"),
            spread(model, data, options.rounds, options.draws),
        )


if __name__ == "__main__":
    main()
