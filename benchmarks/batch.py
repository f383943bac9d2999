"""Many data sets: `ppl.infer_batch` beside calls of `infer` and of NumPyro, one by one.

    python benchmarks/batch.py [--rounds 3] [--data-sets 500]

Eight schools, non-centred, data simulated from the prior; 4 chains x (1000 + 1000) for each. The
ways take turns in one process; figures are medians over rounds. Single runs are timed on some of
the data sets and extrapolated. CPU seconds count all threads, and compiling.
"""

import argparse
import functools
import os
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ["PPL_CACHE_DIR"] = "off"

import jax
import numpy as np
from examples import EXAMPLES
from measure import cost_inside, cost_of, counted_compilations, machine, show_table
from numpyro.infer import MCMC, NUTS
from peers import CHAINS, numpyro_jitted, numpyro_object, ours

import ppl_toolkit as ppl
from ppl_toolkit import batch, engine, executables, units

WARMUP = DRAWS = 1000
SINGLE = {"infer": 50, "numpyro": 20}  # so many in all rounds together


def simulated(count: int) -> np.ndarray:
    """Estimates in eight schools, drawn from the prior, (data set, school)."""
    rng = np.random.default_rng(2024)
    _, data = EXAMPLES["eight schools"]
    mu, tau = 5.0 * rng.normal(size=(count, 1)), np.abs(5.0 * rng.standard_cauchy((count, 1)))
    theta = mu + tau * rng.normal(size=(count, 8))
    return theta + data.args[0] * rng.normal(size=(count, 8))


def numpyro_fresh(*args: Any) -> Callable:
    """NumPyro as its documentation shows it: an MCMC object for every data set."""
    model, _, warmup, draws = args

    def sample(seed: int, data: Any) -> dict[str, np.ndarray]:
        with jax.enable_x64(True):
            mcmc = MCMC(
                NUTS(model), num_warmup=warmup, num_samples=draws, num_chains=CHAINS,
                progress_bar=False,
            )  # fmt: skip
            mcmc.run(jax.random.key(seed), *data.args, **data.kwargs)
            return jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain=True))

    return sample


def rows(rounds: int, count: int) -> list[list[Any]]:
    model, data = EXAMPLES["eight schools"]
    (sigma,), y = data.args, simulated(count)
    every = f"ppl.infer_batch, all {count}"

    def all_of_them(seed: int) -> Any:
        return ppl.infer_batch(model, sigma, y=y, over="y", seed=seed, progress=False)

    singles = {
        "ppl.infer": ours(model, data, WARMUP, DRAWS),
        "NumPyro, a new MCMC object each": numpyro_fresh(model, data, WARMUP, DRAWS),
        "NumPyro, one MCMC object": numpyro_object(model, data, WARMUP, DRAWS),
        "NumPyro, whole run jitted by hand": numpyro_jitted(model, data, WARMUP, DRAWS),
    }
    each = {name: -(-SINGLE["infer" if "ppl" in name else "numpyro"] // rounds) for name in singles}
    for sample in singles.values():  # warm
        sample(0, data)
    costs: dict[str, list] = {every: [], **{name: [] for name in singles}}
    made: dict[str, list[int]] = {name: [] for name in costs}
    for turn in range(rounds):
        executables.clear()  # the first call of all: its two programs are compiled in it
        with counted_compilations() as compiled:
            costs[every].append(cost_of(lambda turn=turn: all_of_them(turn))[0])
        made[every].append(len(compiled))
        for name, sample in singles.items():
            numbers = range(turn * each[name], (turn + 1) * each[name])
            with counted_compilations() as compiled:
                for number in numbers:
                    own = data.with_arrays([sigma, y[number % count]])
                    cost, _ = cost_of(functools.partial(sample, number, own))
                    costs[name].append(cost)
            made[name].append(len(compiled) // each[name])
    share = {name: 1 if name == every else count for name in costs}
    cpu = {name: share[name] * _middle(own, "cpu", name == every) for name, own in costs.items()}
    wall = {name: share[name] * _middle(own, "wall", name == every) for name, own in costs.items()}
    return [
        [name, cpu[name], wall[name], 1000 * cpu[name] / count, cpu[name] / cpu[every],
         f"{median(made[name]):.0f}" + ("" if name == every else " each"),
         "all" if name == every else f"{rounds * each[name]}, extrapolated"]
        for name in costs
    ]  # fmt: skip


def _middle(costs: list, what: str, whole: bool) -> float:
    """The median of whole runs; the mean of single ones, whose data sets differ."""
    values = [getattr(cost, what) for cost in costs]
    return median(values) if whole else float(np.mean(values))


def parts(count: int) -> list[list[Any]]:
    """Where the CPU time goes, with one thread."""
    model, data = EXAMPLES["eight schools"]
    (sigma,), y = data.args, simulated(count)

    def run() -> Any:
        return ppl.infer_batch(model, sigma, y=y, over="y", threads=1, progress=False)

    run()
    with (
        cost_inside(units.Unit, "advance") as advanced,
        cost_inside(units.Unit, "init") as begun,
        cost_inside(engine.Engine, "pool") as pooled,
        cost_inside(batch, "judge") as judged,
        cost_inside(batch, "tree_of") as labelled,
    ):
        whole, _ = cost_of(run)
    found = {
        "the compiled program, warm-up and draws": advanced,
        "first states": begun,
        "what chains learn of each other between segments of warm-up": pooled,
        "convergence and findings": judged,
        "labels": labelled,
    }
    spent = {name: 1000 * sum(c.cpu for c in costs) / count for name, costs in found.items()}
    spent["the rest"] = 1000 * whole.cpu / count - sum(spent.values())
    return [[name, ms] for name, ms in spent.items()] + [["all", 1000 * whole.cpu / count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data-sets", type=int, default=500)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("ppl_toolkit", "jax", "numpyro"))
    load = os.getloadavg()[0]
    print(f"load of the machine at the start: {load:.1f}; rounds: {options.rounds}")
    show_table(
        f"{options.data_sets} data sets: eight schools, 4 x (1000 + 1000) each",
        ["way", "CPU s", "wall s", "CPU ms / data set", "CPU / ours", "compilations", "measured"],
        rows(options.rounds, options.data_sets),
    )
    few = min(100, options.data_sets)
    show_table(
        f"Where the time of infer_batch goes ({few} data sets, one thread)",
        ["part", "CPU ms / data set"],
        parts(few),
    )


if __name__ == "__main__":
    main()
