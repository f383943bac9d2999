"""Kernels of infinitely wide networks beside neural-tangents, and what follows them.

    python benchmarks/infinite_width.py [--rounds 5] [--parts speed,precision,memory,evidence]

The peer is optional, and comes in an environment of its own:

    pip install -e ".[bench]"
    pip install --no-deps neural-tangents==0.6.5 frozendict     # it asks for TensorFlow: not needed

Both take turns in one process, round by round; figures are medians over rounds, ratios are taken
within a round first. CPU seconds count all threads. Data are arguments of jitted functions. Cold is
a first call, compilation included. BLAS has one thread unless OPENBLAS_NUM_THREADS says otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["PPL_CACHE_DIR"] = "off"
# Threads of BLAS that wait for a core another process has took 40 times as long for a Cholesky.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from measure import Cost, Work, cost_of, counted_compilations, in_turns, machine, show_table
from neural_tangents_peer import kernel_function, stax
from numpyro import distributions as dist

from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.infinite_width import mlp
from ppl_toolkit.models.scale_laws import (
    BurrXII,
    GeneralizedInverseGaussian,
    of_standard_deviation,
)
from ppl_toolkit.models.scale_quadrature import log_marginal
from ppl_toolkit.models.statistics import statistics

DEPTH, FEATURES, W, B = 3, 20, 1.4, 0.3
SIZES, PRECISIONS = (2000, 5000), ("float64", "float32")
MEMORY_ROWS, EVIDENCE_ROWS = 10_000, 1000
INSTALL = "pip install --no-deps neural-tangents==0.6.5 frozendict"


def inputs(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((n, FEATURES)), rng.standard_normal(n)


def network(w: Any = W, b: Any = B) -> Any:
    return mlp(DEPTH, weight_std=w, bias_std=b)


# -- kernels and their derivatives ---------------------------------------------------------------


def ours(w: Any, b: Any, x: Any, ntk: bool) -> Any:
    found = kernel_matrices(network(w, b), x, ntk=ntk)
    return found if ntk else found.nngp


def theirs(w: Any, b: Any, x: Any, ntk: bool) -> Any:
    return kernel_function(network(w, b))(x, None, ("nngp", "ntk") if ntk else "nngp")


def tasks(kernels: Callable) -> dict[str, Callable]:
    """Of (w, b), inputs and a symmetric matrix."""

    def weighted(parameters: Any, x: Any, weights: Any) -> Any:
        return (kernels(*parameters, x, False) * weights).sum()

    return {
        "NNGP": lambda parameters, x, _: kernels(*parameters, x, False),
        "NNGP and NTK": lambda parameters, x, _: kernels(*parameters, x, True),
        "gradient by (w, b)": jax.grad(weighted),
    }


def speed_rows(rounds: int, there: bool) -> list[list[Any]]:
    rows = []
    engines = {"ours": ours, **({"neural-tangents": theirs} if there else {})}
    for precision in PRECISIONS:
        for n in SIZES:
            x, _ = inputs(n)
            half = np.random.default_rng(2).standard_normal((n, n))
            with jax.enable_x64(precision == "float64"):
                args = jax.tree.map(
                    lambda leaf, p=precision: jnp.asarray(leaf, p), ((W, B), x, half + half.T)
                )
                del half
                for task in tasks(ours):
                    programs = {name: jax.jit(tasks(k)[task]) for name, k in engines.items()}
                    rows += rows_of(f"{precision}, n = {n}: {task}", programs, args, rounds)
    return rows


def rows_of(title: str, programs: dict, args: tuple, rounds: int) -> list[list[Any]]:
    works: dict[str, Work] = {}
    cold, compiling, values = {}, {}, {}
    for name, program in programs.items():
        works[name] = lambda _, program=program: done(program(*args))
        with counted_compilations() as seconds:
            cold[name] = cost_of(lambda program=program: jax.block_until_ready(program(*args)))
        compiling[name] = sum(seconds)
        values[name] = jax.tree.leaves(cold[name][1])
    difference = None
    if len(values) == 2:
        pairs = zip(*values.values(), strict=True)
        difference = max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)
    walls = {name: cost.wall for name, (cost, _) in cold.items()}
    del values, cold
    costs, _ = in_turns(rounds, works)
    return [
        [f"{title}: {name}", walls[name], compiling[name], median(c.cpu for c in own),
         median(c.wall for c in own), *ratios(costs.get("neural-tangents"), own), difference]
        for name, own in costs.items()
    ]  # fmt: skip


def done(result: Any) -> None:
    """Wait for it, and let go of it."""
    jax.block_until_ready(result)


def ratios(theirs: list[Cost] | None, ours: list[Cost]) -> list[float | None]:
    """Medians over rounds of theirs / ours in a round: CPU, wall clock."""
    if theirs is None:
        return [None, None]
    pairs = list(zip(theirs, ours, strict=True))
    return [median(a.cpu / b.cpu for a, b in pairs), median(a.wall / b.wall for a, b in pairs)]


# -- precision -----------------------------------------------------------------------------------


def precision_rows(_: int, there: bool) -> list[list[Any]]:
    """Kernels of 500 inputs, the last ten of them duplicates, against ours in float64."""
    x = inputs(490)[0]
    x = np.concatenate([x, x[:10]])
    rows = []
    for precision in PRECISIONS:
        single = x.astype(precision)
        exact = network().variances(single.astype(float), ntk=True)
        reference = network().kernels(single.astype(float))
        for name, kernels in {"ours": ours, "neural-tangents": theirs}.items():
            if name == "neural-tangents" and not there:
                continue
            with jax.enable_x64(precision == "float64"):
                k, t = jax.jit(lambda x, kernels=kernels: kernels(W, B, x, True))(single)
                k, t = np.asarray(k, float), np.asarray(t, float)
            apart = ~np.eye(len(x), dtype=bool)
            apart[:10, -10:] &= ~np.eye(10, dtype=bool)
            apart[-10:, :10] &= ~np.eye(10, dtype=bool)
            own = (np.abs(np.diag(a) / b - 1).max() for a, b in zip((k, t), exact, strict=True))
            pairs = zip((k, t), reference, strict=True)
            others = (np.abs(a / b - 1)[apart].max() for a, b in pairs)
            alike = np.abs(np.diag(t[:10, -10:]) / exact.ntk[:10] - 1).max()
            rows.append([f"{precision}: {name}", *own, *others, alike])
    return rows


# -- memory --------------------------------------------------------------------------------------


def memory_of(task: str) -> None:
    """Prints the peak resident memory of this process, before and after the task, and seconds."""

    def peak() -> float:  # getrusage would count this process's parent, before its exec
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20

    jax.config.update("jax_enable_x64", True)
    x, y = inputs(MEMORY_ROWS)

    def both(parameters: Any, x: Any, y: Any, noise: Any) -> Any:
        return statistics(network(*parameters), x, y, noise)[:2]

    def weighted(*args: Any) -> Any:
        quadratic, log_determinant = both(*args)
        return quadratic + log_determinant

    gradient = jax.value_and_grad(weighted, argnums=(0, 1, 3))
    program = jax.jit(both if task == "value" else gradient)
    args = jax.tree.map(jnp.asarray, ((W, B), x, y, 0.1))
    before = peak()
    cost, _ = cost_of(lambda: jax.block_until_ready(program(*args)))
    print(json.dumps([before, peak(), cost.cpu, cost.wall]))


def memory_rows(_: int, __: bool) -> list[list[Any]]:
    rows = []
    for task in ("value", "value and gradient"):
        command = [sys.executable, __file__, "--memory-of", task]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append([task, *json.loads(output.splitlines()[-1])])
    return rows


# -- evidences -----------------------------------------------------------------------------------

LAWS: dict[str, Callable[[], dist.Distribution]] = {
    "InverseGamma(2, 2)": lambda: dist.InverseGamma(2.0, 2.0),
    "BurrXII(2, 2)": lambda: BurrXII(2.0, 2.0),
    "sigma ~ HalfCauchy(1)": lambda: of_standard_deviation(dist.HalfCauchy(1.0)),
    "sigma ~ half-t(4)": lambda: of_standard_deviation(dist.FoldedDistribution(dist.StudentT(4.0))),
    "LogNormal(0, 1)": lambda: dist.LogNormal(0.0, 1.0),
    "Gamma(2, 2)": lambda: dist.Gamma(2.0, 2.0),
    "Exponential(1)": lambda: dist.Exponential(1.0),
    "GIG(0.5, 1, 1)": lambda: GeneralizedInverseGaussian(0.5, 1.0, 1.0),
    "Pareto(0.1, 1)": lambda: dist.Pareto(0.1, 1.0),
    "point mass at 1": lambda: dist.Delta(1.0),
}


def evidence_rows(rounds: int, _: bool) -> list[list[Any]]:
    """All in float64; the statistics are those of inputs with targets of the network's own law."""
    x, y = inputs(EVIDENCE_ROWS)
    with jax.enable_x64(True):
        noisy = jax.jit(
            lambda x: kernel_matrices(network(), x, ntk=False).nngp + 0.1 * jnp.eye(len(x))
        )(x)
        noisy = jax.block_until_ready(noisy)
        y = jnp.linalg.cholesky(noisy) @ y
        own = jax.jit(lambda x, y: statistics(network(), x, y, 0.1)[:2])
        q, log_determinant = own(x, y)
        cholesky = jax.jit(lambda k: jax.lax.linalg.cholesky(k, symmetrize_input=False))

        def evidence(law: Any, q: Any, log_determinant: Any) -> Any:
            constant = EVIDENCE_ROWS * jnp.log(2 * jnp.pi) + log_determinant
            return log_marginal(law, q, EVIDENCE_ROWS) - constant / 2

        one = jax.jit(evidence)
        laws = {name: make() for name, make in LAWS.items()}
        every = jax.jit(lambda laws, *args: {n: evidence(law, *args) for n, law in laws.items()})
        works: dict[str, Work] = {"one Cholesky": lambda _: repeated(lambda: cholesky(noisy), 5)}
        works["kernel, Cholesky and solve"] = lambda _: repeated(lambda: own(x, y), 5)
        for name, law in laws.items():
            call = lambda law=law: one(law, q, log_determinant)  # noqa: E731
            works[name] = lambda _, call=call: repeated(call, 50)
        works["all ten, one program"] = lambda _: repeated(
            lambda: every(laws, q, log_determinant), 50
        )
        for work in works.values():
            work(0)
        costs, given = in_turns(rounds, works)
    costs["ten Cholesky factorisations"] = together([costs["one Cholesky"]] * 10)
    costs["all ten, one after the other"] = together([costs[name] for name in LAWS])
    times = {name: 5 if "Cholesky" in name else 50 for name in costs}
    mine = {n: [Cost(c.cpu / times[n], c.wall / times[n]) for c in own] for n, own in costs.items()}
    rows = []
    for name, cost in mine.items():
        part = [100 * a.cpu / b.cpu for a, b in zip(cost, mine["one Cholesky"], strict=True)]
        wall = [100 * a.wall / b.wall for a, b in zip(cost, mine["one Cholesky"], strict=True)]
        value = f"{float(given[name][0]):.3f}" if name in LAWS else None
        rows.append([name, 1000 * median(c.cpu for c in cost), 1000 * median(c.wall for c in cost),
                     median(part), median(wall), value])  # fmt: skip
    return rows


def together(costs: list[list[Cost]]) -> list[Cost]:
    """Sums, round by round."""
    return [
        Cost(sum(c.cpu for c in turn), sum(c.wall for c in turn))
        for turn in zip(*costs, strict=True)
    ]


def repeated(call: Callable[[], Any], times: int) -> Any:
    for _ in range(times):
        result = jax.block_until_ready(call())
    return result


PARTS: dict[str, tuple[str, list[str], Callable[[int, bool], list[list[Any]]]]] = {
    "speed": (
        f"Kernels: {DEPTH} layers of ReLU, {FEATURES} features",
        ["task: engine", "cold wall s", "of it XLA s", "CPU s", "wall s", "peer / this, CPU",
         "wall", "largest difference"],
        speed_rows,
    ),
    "precision": (
        "Largest relative errors, 500 inputs of which 10 are duplicates",
        ["engine", "diagonal of NNGP", "of NTK", "others of NNGP", "of NTK", "NTK of duplicates"],
        precision_rows,
    ),
    "memory": (
        f"Statistics (kernel, Cholesky, solve) of {MEMORY_ROWS:,} inputs, float64, a process each",
        ["task", "peak before, GB", "peak, GB", "cold CPU s", "wall s"],
        memory_rows,
    ),
    "evidence": (
        f"Evidences of ten laws of the scale, {EVIDENCE_ROWS:,} data, float64",
        ["what", "CPU ms", "wall ms", "% of a Cholesky, CPU", "wall", "log evidence"],
        evidence_rows,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory_of:
        memory_of(options.memory_of)
        return
    there = stax() is not None
    print(machine("ppl_toolkit", "jax", "numpy", *(["neural-tangents"] if there else [])))
    if not there:
        print(f"without neural-tangents, which is not installed: {INSTALL}")
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}; rounds: {options.rounds}")
    for part in options.parts.split(","):
        title, header, rows = PARTS[part]
        show_table(title, header, rows(options.rounds, there))


if __name__ == "__main__":
    main()
