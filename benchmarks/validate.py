"""Thirteen real posteriors against their published reference draws: `make validate DATA=path`.

Every posterior is sampled by the same plain call, 4 chains of 1000 draws, seeds 0, 1 and 2. Held
against the references (Stan, 10 000 draws each):

- means: within 4 combined Monte Carlo standard errors, 4.5 for at most 2% of the scalars;
- standard deviations: within 4 standard errors of the difference plus 5%;
- R-hat: at most 1.01 in all but two runs, never above 1.02;
- the centred eight schools, which NUTS cannot sample, must be found out.

With every sampler exact, about one run of this command in 60 fails by chance (about 300 means,
each beyond 4 standard errors with probability 6e-5). Prints a row per run; exits with 1 if a bar
is missed.
"""

import argparse
import math
import sys
import time
import warnings
from typing import Any, NamedTuple

import numpy as np
import posteriordb
import xarray

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.errors import InferenceWarning

CENTRED = "eight_schools_centered"
SEEDS = (0, 1, 2)


class Row(NamedTuple):
    """One run beside its reference; z and sd excess have one entry per scalar."""

    name: str
    seed: int
    seconds: float
    z: np.ndarray  # differences of means, in combined standard errors
    sd_excess: np.ndarray  # (|difference| - 5%) in standard errors
    r_hat: float
    ess: float
    kinds: tuple[str, ...]  # of the findings


def sample(posterior: posteriordb.Posterior, method: Any, seed: int) -> xarray.DataTree:
    """A plain call of `infer` on one posterior."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return ppl.infer(
            posterior.model,
            *posterior.args,
            method=method,
            seed=seed,
            progress=False,
            **posterior.kwargs,
        )


def run(posterior: posteriordb.Posterior, seed: int) -> Row:
    """Sample one posterior by NUTS and compare it with its reference."""
    begin = time.process_time()
    tree = sample(posterior, "nuts", seed)
    return compared(posterior, seed, tree, time.process_time() - begin)


def compared(
    posterior: posteriordb.Posterior, seed: int, tree: xarray.DataTree, seconds: float
) -> Row:
    """Every scalar of a result beside its reference."""
    draws = {str(k): np.asarray(v) for k, v in tree["posterior"].data_vars.items()}
    z, excess, r_hat, ess = [], [], [], []
    for name, values in posterior.scalars(draws).items():
        ours = {k: float(v) for k, v in convergence.convergence(values).items()}
        reference = posterior.reference[name]
        combined = math.hypot(ours["mcse_mean"], reference["mcse"])
        z.append((ours["mean"] - reference["mean"]) / combined)
        reference_mcse_sd = reference["mcse"] / math.sqrt(2.0)  # sd / sqrt(2 ESS)
        error = math.hypot(ours["mcse_sd"], reference_mcse_sd)
        difference = abs(ours["sd"] - reference["sd"]) - 0.05 * reference["sd"]
        excess.append(difference / error)
        r_hat.append(ours["r_hat"])
        ess.append(min(ours["ess_bulk"], ours["ess_tail"]))
    return Row(
        posterior.name,
        seed,
        seconds,
        np.abs(z),
        np.asarray(excess),
        max(r_hat),
        min(ess),
        tuple(finding.kind for finding in ppl.findings(tree)),
    )


def bars(rows: list[Row], centred: list[Row]) -> dict[str, bool]:
    """Every bar, and whether it was held."""
    z = np.concatenate([row.z for row in rows])
    r_hat = np.array([row.r_hat for row in rows])
    found = [{"divergences", "ess"} <= set(row.kinds) for row in centred]
    return {
        f"means: worst |z| {z.max():.2f}, {np.mean(z > 4):.1%} of {z.size} above 4": bool(
            z.max() <= 4.5 and np.mean(z > 4) <= 0.02
        ),
        f"standard deviations: worst excess {max(row.sd_excess.max() for row in rows):.2f} standard"
        " errors over 5%": all(row.sd_excess.max() <= 4 for row in rows),
        f"R-hat: {np.sum(r_hat <= 1.01)} of {r_hat.size} runs at most 1.01, largest "
        f"{r_hat.max():.4f}": bool(np.sum(r_hat > 1.01) <= 2 and r_hat.max() <= 1.02),
        f"centred eight schools found out: {sum(found)} of {len(found)} runs": all(found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of posteriordb JSON files")
    posteriors = posteriordb.load(parser.parse_args().data)
    print(
        f"{'posterior':28} seed  CPU s  max|z|  sd excess  max R-hat  min ESS  findings", flush=True
    )
    rows = []
    for name, posterior in posteriors.items():
        for seed in SEEDS:
            row = run(posterior, seed)
            rows.append(row)
            print(
                f"{name:28} {seed:4d} {row.seconds:6.1f} {row.z.max():7.2f} "
                f"{row.sd_excess.max():10.2f} {row.r_hat:10.4f} {row.ess:8.0f}  "
                f"{', '.join(row.kinds)}",
                flush=True,
            )
    held = bars([r for r in rows if r.name != CENTRED], [r for r in rows if r.name == CENTRED])
    print()
    for text, good in held.items():
        print(f"{'held  ' if good else 'MISSED'} {text}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
