"""Stochastic-gradient samplers beside blackjax's: CPU microseconds a step, and the error of both.

    python benchmarks/stochastic_gradient.py [--rounds 5] [--steps 40000]

The first table is of minibatches alone: a hundred rows without replacement, by our `subset`, by
NumPyro's plates, and by `jax.random.choice`.

The second is a logistic regression with 20 coefficients, a hundred rows at a time of 10,000. Of
blackjax each kernel is one `jax.jit` of a scan over its steps with the data as arguments; the
minibatches, which it leaves to its user, are drawn by our `subset`. Ours is `ppl.infer` as a user
calls it, one chain, all else included: reading the model, labels, diagnostics. Engines take turns,
round by round; figures are medians over rounds after a first one, which compiles.

Variances are relative to those of NUTS on all the data, averaged over the coefficients, from the
last run of each engine, with equal step sizes: x <- x + e/2 g + N(0, e) for Langevin, momentum
steps of length e with friction 0.1 per step. Both packages see the same log density. SGHMC of
blackjax keeps one minibatch for the ten steps of a draw, which saves time and costs accuracy, and
draws its momenta anew before them.
"""

import argparse
import os
import warnings
from typing import Any

os.environ["PPL_CACHE_DIR"] = "off"

import blackjax
import blackjax.sgmcmc.gradients as blackjax_gradients
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from measure import cost_of, machine, show_table
from numpyro.primitives import _subsample_fn

import ppl_toolkit as ppl
from ppl_toolkit.minibatches import subset

ROWS, BATCH, SIZE, FRICTION = 10_000, 100, 20, 0.1
THIN = 10

rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, SIZE))
Y = (rng.random(ROWS) < 1 / (1 + np.exp(-X @ rng.normal(size=SIZE) * 0.3))).astype(int)


def logistic(x, y, batch=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([SIZE]).to_event(1))
    with numpyro.plate("row", y.shape[0], subsample_size=batch) as row:
        numpyro.sample("y", dist.Bernoulli(logits=x[row] @ w), obs=y[row])


def ours(method: Any, steps: int) -> Any:
    def run(seed: int) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ppl.infer(
                logistic, X, Y, BATCH, method=method, draws=steps // THIN, warmup=100, chains=1,
                seed=seed, progress=False,
            )  # fmt: skip
        return tree["posterior"]["w"].values[0]

    return run


def theirs(kernel: str, step_size: float, steps: int) -> Any:
    def log_prior(w):
        return -0.5 * jnp.sum(w**2)

    def log_likelihood(w, row):
        x, y = row
        return y * (x @ w) - jnp.logaddexp(0.0, x @ w)

    gradient = blackjax_gradients.grad_estimator(log_prior, log_likelihood, ROWS)
    friction = FRICTION / step_size  # per unit of its time
    sampler = {
        "SGLD": lambda: blackjax.sgld(gradient),
        "SGHMC": lambda: blackjax.sghmc(gradient, THIN, friction),
        "SGNHT": lambda: blackjax.sgnht(gradient, friction),
    }[kernel]()
    size = step_size / 2 if kernel == "SGLD" else step_size
    inner = 1 if kernel == "SGHMC" else THIN  # it takes ten steps by itself

    @jax.jit
    def run(key, x, y):
        def once(state, key):
            key_rows, key_step = random.split(key)
            index = subset(key_rows, ROWS, BATCH)
            return sampler.step(key_step, state, (x[index], y[index]), size), None

        def draw(state, key):
            state, _ = jax.lax.scan(once, state, random.split(key, inner))
            return state, getattr(state, "position", state)

        start = jnp.zeros(SIZE)
        state = sampler.init(start, key) if kernel == "SGNHT" else start
        return jax.lax.scan(draw, state, random.split(key, 100 + steps // THIN))[1][100:]

    def call(seed: int) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(run(random.key(seed), X, Y))

    return call


def minibatches(rounds: int) -> None:
    """CPU microseconds for one minibatch, by size of the data."""
    ways = {
        "ours": subset,
        "NumPyro's plates": lambda key, n, b: _subsample_fn(n, b, key),
        "jax.random.choice": lambda key, n, b: random.choice(key, n, (b,), replace=False),
    }
    sizes = {1000: 500, 10_000: 200, 1_000_000: 5}  # and how often in one call
    table = []
    for name, way in ways.items():
        row: list[Any] = [name]
        for n, times in sizes.items():

            def many(key, way=way, n=n, times=times):
                def once(number, total):
                    return total + way(random.fold_in(key, number), n, BATCH).sum()

                return jax.lax.fori_loop(0, times, once, 0)

            run = jax.jit(many)
            costs = [
                cost_of(lambda run=run, i=i: run(random.key(i)).block_until_ready())[0].cpu
                for i in range(rounds + 1)
            ]
            row.append(1e6 * float(np.median(costs[1:])) / times)
        table.append(row)
    header = ["way", *(f"of {n:,}, us" for n in sizes)]
    show_table(f"{BATCH} rows without replacement", header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40_000)
    chosen = parser.parse_args()
    print(machine("jax", "numpyro", "blackjax"))
    minibatches(chosen.rounds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = ppl.infer(logistic, X, Y, method="nuts", progress=False)["posterior"]["w"].values
    scale = truth.std((0, 1))
    step = {"SGLD": 0.1 * scale.min() ** 2, "SGHMC": 0.1 * scale.min(), "SGNHT": 0.1 * scale.min()}
    make = {
        "SGLD": lambda e, **o: ppl.SGLD(e, steps=THIN, **o),
        "SGHMC": lambda e, **o: ppl.SGHMC(e, friction=FRICTION, steps=THIN, **o),
        "SGNHT": lambda e, **o: ppl.SGNHT(e, friction=FRICTION, steps=THIN, **o),
    }
    rows = []
    for name, e in step.items():
        engines = {
            "ours": ours(make[name](e), chosen.steps),
            "ours, control variates": ours(make[name](e, control_variates=True), chosen.steps),
            "blackjax": theirs(name, e, chosen.steps),
        }
        costs: dict[str, list[float]] = {engine: [] for engine in engines}
        draws = {}
        for number in range(chosen.rounds + 1):
            for engine, run in engines.items():
                cost, draws[engine] = cost_of(lambda run=run, number=number: run(number))
                costs[engine].append(cost.cpu)
        for engine in engines:
            per_step = [1e6 * c / (chosen.steps + 100 * THIN) for c in costs[engine][1:]]
            ratios = np.array(costs["blackjax"][1:]) / np.array(costs[engine][1:])
            wide = float(np.mean(draws[engine].var(0) / scale**2))
            shift = np.abs(draws[engine].mean(0) - truth.mean((0, 1))) / scale
            rows.append([f"{name}, {engine}", costs[engine][0], float(np.median(per_step)),
                         float(np.median(ratios)), wide, float(shift.max())])  # fmt: skip
    header = ["sampler", "cold s", "us / step", "blackjax / this", "variance", "worst shift, sd"]
    show_table(f"{SIZE} coefficients, {BATCH} of {ROWS:,} rows a step", header, rows)


if __name__ == "__main__":
    main()
