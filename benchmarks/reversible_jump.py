"""Reversible jump: compile time, steps per second, and the error of p(k | y) against exact values.

    python benchmarks/reversible_jump.py [--seconds 20] [--rounds 3]

Coal-mining disasters (an unknown number of change points, exact by quadrature) with several
kernels, and a hierarchy under two laws of its inactive elements. "Compile" is CPU seconds of the
first call, everything included: checks of the involutions, tracing, XLA; no cache on disk.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import median

os.environ["PPL_CACHE_DIR"] = "off"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "inference"))

import numpy as np
import numpyro
import numpyro.distributions as dist
from coal import EXACT, change_points, days
from measure import cost_of, machine, show_table

import ppl_toolkit as ppl
from ppl_toolkit.inference import (
    MCMC,
    NUTS,
    BirthDeath,
    Moves,
    StepSplit,
    Walk,
    block,
    cycle,
    masked_plate,
    repeat,
)

STEPS = 20  # per draw
WALKS = (Walk("rate", 0.5), Walk("first_rate", 0.3), Walk("at", 0.4))
SPLIT = StepSplit("step", "at", "rate", "first_rate")


def kernels() -> dict[str, tuple]:
    """Kernel, steps per draw, order of the slots."""
    split = Moves((SPLIT, *WALKS), (0.5, 0.2, 0.05, 0.25))
    birth = Moves((BirthDeath("step"), *WALKS), (0.5, 0.2, 0.05, 0.25))
    inner = block(NUTS(target_acceptance=0.9), ["rate", "first_rate"])
    jumps = Moves((SPLIT, WALKS[2]))
    return {
        "height split, ordered": (repeat(split, STEPS), STEPS, "at"),
        "height split, exchangeable": (repeat(split, STEPS), STEPS, None),
        "birth from the prior": (repeat(birth, STEPS), STEPS, "at"),
        "height split + NUTS on rates": (cycle([repeat(jumps, STEPS), inner]), STEPS, "at"),
    }


def coal(seconds: float) -> list[list]:
    rows, exact = [], np.array(EXACT["year"][:6])
    for name, (kernel, steps, order) in kernels().items():

        def run(draws: int, seed: int, kernel=kernel, order=order):
            return ppl.infer(
                change_points, days(), order=order, method=MCMC(kernel, warmup=300), draws=draws,
                seed=seed, progress=False, threads=1,
            )  # fmt: skip

        first, _ = cost_of(lambda run=run: run(1, 0))
        pilot, _ = cost_of(lambda run=run: run(1000, 1))
        overhead, _ = cost_of(lambda run=run: run(1, 2))
        rate = 4 * 1000 * steps / max(pilot.cpu - overhead.cpu, 1e-3)
        draws = max(1000, int(seconds * rate / (4 * steps)))
        spent, found = cost_of(lambda run=run, draws=draws: run(draws, 3))
        k = found["posterior"]["k"].values
        error = max(abs((k == i + 1).mean() - p) for i, p in enumerate(exact))
        ess = float(ppl.summary(found, "k")["ess_bulk"].iloc[0])
        rows.append(
            [name, first.cpu, 1e6 / rate, draws * 4 * steps, spent.cpu, ess / spent.cpu, error]
        )
    return rows


def children_and_parent(y, own_law):
    """A hierarchy with up to 10 groups, and how inactive groups are held."""
    import jax.numpy as jnp

    k = numpyro.sample("k", dist.DiscreteUniform(1, 10))
    log_spread = numpyro.sample("log_spread", dist.Normal(0.0, 1.0))
    active = jnp.arange(10) < k
    if own_law:  # every group keeps its own prior, be it there or not
        with numpyro.plate("group", 10):
            x = numpyro.sample("x", dist.Normal(0.0, jnp.exp(log_spread)))
    else:
        with masked_plate("group", 10, k):
            x = numpyro.sample("x", dist.Normal(0.0, jnp.exp(log_spread)))
    total = jnp.sum(jnp.where(active, x, 0.0))
    numpyro.sample("y", dist.Normal(total, 0.5), obs=y)


def inactive(rounds: int) -> list[list]:
    """N(0, 1) or their own law for what is not there: mixing of the parent under NUTS."""
    from ppl_toolkit.inference import MetropolisedGibbs

    rows = []
    inner = block(NUTS(target_acceptance=0.95), ["x", "log_spread"])
    for name, own in (("N(0, 1)", False), ("their own prior", True)):
        jump = block(MetropolisedGibbs(), ["k"]) if own else repeat(BirthDeath("group"), 10)
        method = MCMC(cycle([jump, inner]), warmup=500)
        got, each = [], []
        for seed in range(rounds):
            found = ppl.infer(children_and_parent, 2.0, own, method=method, draws=3000, seed=seed,
                              progress=False)  # fmt: skip
            table = ppl.summary(found, ["k", "log_spread"])
            got.append(table["ess_bulk"].to_numpy())
            each.append(found["sample_stats"]["n_steps"].values.mean())
        ess = np.median(got, axis=0)
        rows.append([name, float(ess[0]), float(ess[1]), float(median(each))])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of sampling per kernel")
    parser.add_argument("--rounds", type=int, default=3, help="seeds of the hierarchy")
    options = parser.parse_args()
    print(machine("jax", "numpyro"))
    show_table(
        "Coal-mining disasters: 4 chains one after the other",
        ["kernel", "compile CPU s", "us / step", "steps", "CPU s", "ESS of k / CPU s",
         "max error of p(k), k = 1..6"],
        coal(options.seconds),
    )  # fmt: skip
    show_table(
        "A parent of up to 10 groups: the law of those that are not there (12,000 draws)",
        ["law", "ESS of k", "ESS of the parent", "leapfrog steps / draw"],
        inactive(options.rounds),
    )


if __name__ == "__main__":
    import warnings

    from ppl_toolkit.errors import InferenceWarning

    warnings.simplefilter("ignore", InferenceWarning)
    main()
