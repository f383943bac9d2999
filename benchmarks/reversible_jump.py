"""Reversible jumps on the coal-mining disasters, exact by quadrature, for `composition.py`."""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "inference"))

import numpy as np
import numpyro
import numpyro.distributions as dist
from coal import change_points, days

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

__all__ = ["inactive_rows", "runs"]

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


def runs() -> dict[str, tuple[Callable[[int, int], Any], int]]:
    """By kernel: (draws, seed) -> a run of four chains one after the other, and steps per draw."""

    def runner(kernel: Any, order: str | None) -> Callable[[int, int], Any]:
        return lambda draws, seed: ppl.infer(
            change_points, days(), order=order, method=MCMC(kernel, warmup=300), draws=draws,
            seed=seed, progress=False, threads=1,
        )  # fmt: skip

    return {
        name: (runner(kernel, order), steps) for name, (kernel, steps, order) in kernels().items()
    }


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


def inactive_rows(rounds: int) -> list[list]:
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
