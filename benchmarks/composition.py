"""Composable inference: reversible jumps, SMC beside blackjax, calibration beside NumPyro.

    python benchmarks/composition.py [--rounds 3] [--parts jumps,inactive,smc,calibration]

All take turns in one process, round by round; figures are medians over rounds, ratios are taken
within a round first. CPU seconds count all threads. Cold is a first call, compilation included,
with nothing kept on disk.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ["PPL_CACHE_DIR"] = "off"

import jax
import numpy as np
import reversible_jump
import smc
from coal import EXACT
from examples import EXAMPLES
from measure import Work, cost_of, in_turns, machine, show_table
from numpyro.infer import MCMC, NUTS

import ppl_toolkit as ppl

CHAINS = 4
JUMP_DRAWS = 2000
PARTICLES, RUNS = 1024, 8
DATA_SETS, SEPARATE = 500, 20  # NumPyro runs on so many of them


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of the ratio in a round."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


# -- reversible jumps ---------------------------------------------------------------------------


def jump_rows(rounds: int) -> list[list[Any]]:
    runs = reversible_jump.runs()
    cold = {name: cost_of(lambda run=run: run(1, 0))[0].cpu for name, (run, _) in runs.items()}
    # One draw costs what is no sampling: warm-up, labels, findings.
    works: dict[str, Work] = {}
    for name, (run, _) in runs.items():
        works[name] = lambda turn, run=run: run(JUMP_DRAWS, turn)
        works[f"{name}: one draw"] = lambda turn, run=run: run(1, turn)
    costs, given = in_turns(rounds, works)
    seconds = {
        name: [a.cpu - b.cpu for a, b in zip(costs[name], costs[f"{name}: one draw"], strict=True)]
        for name in runs
    }
    first, *_ = runs
    rows = []
    for name, (_, steps) in runs.items():
        count = CHAINS * JUMP_DRAWS * steps
        k = np.concatenate([tree["posterior"]["k"].values.ravel() for tree in given[name]])
        error = max(abs((k == i + 1).mean() - p) for i, p in enumerate(EXACT["year"][:6]))
        ess = [float(ppl.summary(tree, "k")["ess_bulk"].iloc[0]) for tree in given[name]]
        speed = [count / spent for spent in seconds[name]]
        rows.append(
            [name, cold[name], f"{median(speed):,.0f}", ratio(seconds[name], seconds[first]),
             median(e / s for e, s in zip(ess, seconds[name], strict=True)),
             f"{rounds * count:,}", error]
        )  # fmt: skip
    return rows


# -- populations --------------------------------------------------------------------------------


def smc_rows(rounds: int) -> list[list[Any]]:
    rows = []
    for title, problem in smc.problems().items():
        engines = {name: make(problem, PARTICLES) for name, make in smc.ENGINES.items()}
        cold = {name: cost_of(lambda run=run: run(0, 1))[0].cpu for name, run in engines.items()}
        works = {
            name: lambda turn, run=run: run(1000 * turn, RUNS) for name, run in engines.items()
        }
        for name in works:  # runs of another number of chains share the program
            works[name](0)
        costs, given = in_turns(rounds, works)
        cpu = {name: [c.cpu / RUNS for c in own] for name, own in costs.items()}
        wall = {name: [c.wall / RUNS for c in own] for name, own in costs.items()}
        for name in engines:
            errors = np.concatenate(given[name]) - problem.exact
            error = float(np.sqrt(np.mean(errors**2)))
            rows.append(
                [f"{title}: {name}", cold[name], 1000 * median(cpu[name]),
                 1000 * median(wall[name]), ratio(cpu[name], cpu["blackjax"]),
                 ratio(wall[name], wall["blackjax"]), error]
            )  # fmt: skip
    return rows


# -- calibration --------------------------------------------------------------------------------


def calibration_rows(rounds: int) -> list[list[Any]]:
    """All data sets in one program; NumPyro runs as many iterations on a few such data sets."""
    model, data = EXAMPLES["eight schools"]
    (sigma,) = data.args
    each_round = -(-SEPARATE // rounds)

    def calibrated(turn: int, count: int = DATA_SETS) -> Any:
        return ppl.calibrate(
            model, sigma, **data.kwargs, replications=count, seed=turn, thinning=3, progress=False
        )

    def fresh() -> MCMC:
        return MCMC(
            NUTS(model), num_warmup=500, num_samples=297, thinning=3, num_chains=1,
            progress_bar=False, jit_model_args=True,
        )  # fmt: skip

    def draws(mcmc: MCMC, seed: Any, y: Any) -> Any:
        mcmc.run(jax.random.key(seed), sigma, y=y)
        return mcmc.get_samples()

    def separately(way: Callable) -> Work:
        def work(turn: int) -> None:
            for i in range(each_round):
                rng = np.random.default_rng([turn, i])
                theta = rng.normal(5 * rng.normal(), abs(5 * rng.standard_cauchy()), 8)
                with jax.enable_x64(True):
                    y = rng.normal(theta, sigma)
                    jax.block_until_ready(way(np.uint32(each_round * turn + i), y))

        return work

    one, jitted = fresh(), jax.jit(lambda seed, y: draws(fresh(), seed, y))
    ours = f"ppl.calibrate, all {DATA_SETS}"
    works: dict[str, Work] = {
        ours: calibrated,
        "NumPyro, a new MCMC object each": separately(lambda *of: draws(fresh(), *of)),
        "NumPyro, one MCMC object": separately(lambda *of: draws(one, *of)),
        "NumPyro, whole run jitted by hand": separately(jitted),
    }
    calibrated(0, 20)
    with jax.enable_x64(True):
        jax.block_until_ready(jitted(np.uint32(0), np.zeros(8)))
    costs, _ = in_turns(rounds, works)
    share = {name: 1.0 if name == ours else DATA_SETS / each_round for name in works}
    cpu = {name: [share[name] * c.cpu for c in own] for name, own in costs.items()}
    wall = {name: [share[name] * c.wall for c in own] for name, own in costs.items()}
    return [
        [name, median(cpu[name]), median(wall[name]), ratio(cpu[ours], cpu[name]),
         "all" if name == ours else f"{rounds * each_round}, extrapolated"]
        for name in works
    ]  # fmt: skip


PARTS: dict[str, tuple[str, list[str], Callable[[int], list[list[Any]]]]] = {
    "jumps": (
        "Reversible jumps: coal-mining disasters, four chains one after the other",
        ["kernel", "cold CPU s", "steps / CPU s", "speed / first", "ESS of k / CPU s", "steps",
         "largest error of p(k), k = 1..6"],
        jump_rows,
    ),
    "inactive": (
        "A parent of up to 10 groups: the law of those that are not there (12,000 draws)",
        ["law", "ESS of k", "ESS of the parent", "leapfrog steps / draw"],
        reversible_jump.inactive_rows,
    ),
    "smc": (
        f"SMC, {PARTICLES} particles ({4 * PARTICLES} waste-free), {RUNS} runs a round",
        ["model: sampler", "cold CPU s", "CPU ms", "wall ms", "blackjax / this, CPU",
         "blackjax / this, wall", "error of log Z"],
        smc_rows,
    ),
    "calibration": (
        f"Calibration of NUTS: eight schools, {DATA_SETS} data sets, 500 + 297 iterations each",
        ["way", "CPU s", "wall s", "CPU / ours", "measured"],
        calibration_rows,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("ppl_toolkit", "jax", "numpyro", "blackjax"))
    load = os.getloadavg()[0]
    print(f"load of the machine at the start: {load:.1f}; rounds: {options.rounds}")
    for part in options.parts.split(","):
        title, header, rows = PARTS[part]
        show_table(title, header, rows(options.rounds))


if __name__ == "__main__":
    main()
