"""Diagnostics beside ArviZ: summaries, the page, leave-one-out.

    python benchmarks/diagnostics.py [--rounds 5] [--many 100000]

Both sides take turns in one process on the same draws; medians over rounds are shown. What takes
minutes (very many observations) runs once.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ["PPL_CACHE_DIR"] = "off"

import arviz as az
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray
from measure import cost_of, machine, show_table
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit.convergence import convergence
from ppl_toolkit.diagnostics import diagnose

CHAINS, DRAWS = 4, 1000
ARVIZ_TAIL = (0.11, 0.89)  # its tail ESS looks at these quantiles, ours at 5% and 95%

Work = Callable[[], Any]


def in_turns(rounds: int, works: Mapping[str, Work]) -> tuple[dict[str, list[float]], dict]:
    """CPU seconds of each piece of work in every round, and what each gives."""
    given = {name: work() for name, work in works.items()}  # imports and caches
    costs: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            costs[name].append(cost_of(work)[0].cpu)
    return costs, given


def times_faster(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of the ratio in a round."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


# -- summaries ----------------------------------------------------------------------------------


def summary_rows(rounds: int) -> list[list[Any]]:
    """1000 autocorrelated scalars; the numbers of ArviZ's table against ours."""
    x = np.random.default_rng(0).normal(size=(CHAINS, DRAWS, 1000))
    for t in range(1, DRAWS):
        x[:, t] += 0.5 * x[:, t - 1]
    tree = az.from_dict({"posterior": {"x": x}})
    costs, given = in_turns(
        rounds,
        {
            "ppl_toolkit.convergence": lambda: convergence(x, ARVIZ_TAIL),
            "ppl.summary": lambda: ppl.summary(tree),
            "az.summary": lambda: az.summary(tree, round_to="none"),
        },
    )
    theirs = given.pop("az.summary")
    rows = []
    for name, ours in given.items():
        # The tail ESS of ppl.summary is another number.
        shared = [k for k in theirs if k in ours and (k, name) != ("ess_tail", "ppl.summary")]
        differences = [np.max(np.abs(np.asarray(ours[k]) / theirs[k] - 1)) for k in shared]
        faster = times_faster(costs[name], costs["az.summary"])
        rows.append([name, median(costs[name]), faster, f"{max(differences):.1e}", len(shared)])
    return [*rows, ["az.summary", median(costs["az.summary"]), None, None, None]]


# -- findings and the page ----------------------------------------------------------------------


def groups(y: np.ndarray) -> None:
    """100 parameters: 98 means with a common law. y has shape (98, observations)."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    with numpyro.plate("group", y.shape[0], dim=-2):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        with numpyro.plate("row", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def report_rows(rounds: int) -> list[list[Any]]:
    """What a person waits for after a run of 100 parameters: CPU seconds, bytes of the page."""
    rng = np.random.default_rng(1)
    y = rng.normal(rng.normal(size=(98, 1)), 1.0, (98, 3))
    run = ppl.infer(groups, y, draws=DRAWS, chains=CHAINS, seed=1, progress=False)
    full = ppl.predict(ppl.log_likelihood(run, groups, y), groups, y)
    prior = ppl.infer(groups, y, method="prior", draws=DRAWS, chains=CHAINS, progress=False)
    full["prior"] = xarray.DataTree(prior["prior"].to_dataset())
    with tempfile.TemporaryDirectory() as folder:
        bare_page, full_page = Path(folder, "bare.html"), Path(folder, "full.html")
        costs, _ = in_turns(
            rounds,
            {
                "findings, computed anew": lambda: diagnose(run),
                "ppl.report, text": lambda: ppl.report(run),
                "ppl.report, page": lambda: ppl.report(run, bare_page),
                "ppl.report, page with prior, prediction and LOO": lambda: ppl.report(
                    full, full_page
                ),
            },
        )
        sizes = [None, None, bare_page.stat().st_size, full_page.stat().st_size]
    return [
        [name, median(seconds), size]
        for (name, seconds), size in zip(costs.items(), sizes, strict=True)
    ]


# -- leave-one-out ------------------------------------------------------------------------------


def loo_rows(rounds: int) -> list[list[Any]]:
    """1000 observations, each with an effect of its own, so that k covers its range."""
    rng = np.random.default_rng(2)
    spread = np.linspace(0.1, 1.0, 1000)
    theta = spread * rng.normal(size=(CHAINS, DRAWS, 1000))
    ll = stats.norm.logpdf(rng.normal(size=1000), theta, 1.0)
    posterior = {"m": rng.normal(size=(CHAINS, DRAWS))}
    tree = az.from_dict({"posterior": posterior, "log_likelihood": {"y": ll}})
    costs, given = in_turns(
        rounds, {"ppl.loo": lambda: ppl.loo(tree), "az.loo": lambda: az.loo(tree)}
    )
    ours, theirs = given.values()
    faster = times_faster(costs["ppl.loo"], costs["az.loo"])
    differences = [
        abs(ours.elpd - theirs.elpd),
        float(np.abs(ours.elpd_i - theirs.elpd_i).max()),
        float(np.abs(ours.pareto_k - theirs.pareto_k).max()),
    ]
    reach = f"{float(ours.pareto_k.min()):.2f} to {float(ours.pareto_k.max()):.2f}"
    return [
        ["ppl.loo", median(costs["ppl.loo"]), faster, *(f"{x:.1e}" for x in differences), reach],
        ["az.loo", median(costs["az.loo"]), *[None] * 5],
    ]


def mean_of(y: np.ndarray) -> None:
    """A normal mean."""
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def many_observations(count: int) -> dict[str, float]:
    """Leave-one-out from the model in blocks (run in a fresh process)."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB, on Linux

    y = np.random.default_rng(3).normal(size=count)
    tree = ppl.infer(mean_of, y, draws=DRAWS, chains=CHAINS, seed=1, progress=False)
    before = peak()
    cost, found = cost_of(lambda: ppl.loo(tree, mean_of, y))
    precision = 1 / 4 + count - 1
    exact = stats.norm.logpdf(y, (y.sum() - y) / precision, np.sqrt(1 + 1 / precision)).sum()
    error = abs(found.elpd / exact - 1)
    return {"cpu": cost.cpu, "before": before, "peak": peak(), "error": error}


def many_rows(count: int) -> list[list[Any]]:
    done = subprocess.run(
        [sys.executable, __file__, "--job", str(count)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    whole = 8 * count * CHAINS * DRAWS / 2**20
    return [[
        f"ppl.loo, {count:,} observations", found["cpu"], f"{found['before']:.0f}",
        f"{found['peak']:.0f}", f"{whole:.0f}", f"{found['error']:.1e}",
    ]]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, default=100_000, help="observations of the large run")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.job:
        print(json.dumps(many_observations(options.job)))
        return
    print(machine("ppl_toolkit", "jax", "numpyro", "arviz-stats"))
    # A process starts with the peak of its parent as its own, so this comes before all else.
    many = many_rows(options.many)
    show_table(
        f"Summaries: 1000 scalars x {CHAINS} x {DRAWS} (medians of {options.rounds} rounds)",
        ("call", "CPU s", "times faster", "largest relative difference", "numbers per scalar"),
        summary_rows(options.rounds),
    )
    show_table(
        f"After a run: 100 parameters x {CHAINS} x {DRAWS} (medians of {options.rounds} rounds)",
        ("call", "CPU s", "bytes"),
        report_rows(options.rounds),
    )
    show_table(
        f"Leave-one-out: 1000 observations x {CHAINS * DRAWS} draws, log likelihoods stored "
        f"(medians of {options.rounds} rounds)",
        ("call", "CPU s", "times faster", "difference of elpd", "of any elpd_i", "of any k",
         "k"),
        loo_rows(options.rounds),
    )  # fmt: skip
    show_table(
        f"Leave-one-out from the model in blocks, {CHAINS * DRAWS} draws (once)",
        ("call", "CPU s", "peak before, MiB", "peak, MiB", "all log likelihoods, MiB",
         "elpd / exact - 1"),
        many,
    )  # fmt: skip


if __name__ == "__main__":
    main()
