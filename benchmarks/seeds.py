"""Every posterior from many seeds: does a chain ever stay behind?

    python benchmarks/seeds.py DATA [--posteriordb CLONE] [--seeds 100] [--models a,b]

4 chains of 1000 draws, default settings, random starts. A chain is *stuck* if it refuses nearly all
of its moves (fewer than one draw in twenty differs from the one before), or if its mean of any
scalar lies further from the mean of the other chains than their standard deviation, with split
R-hat above 1.2: it explores another place, or none. The centred eight schools, from which NUTS
cannot draw rightly, are left out. Prints a row per posterior; exits with 1 if a chain was stuck.
"""

import argparse
import sys
import time

import numpy as np
from posteriordb import Posterior, load
from posteriordb_clone import load_clone
from validate import CENTRED, sample

from ppl_toolkit import convergence

LEAST_MOVES = 0.05
MOST_R_HAT = 1.2


def stuck(draws: np.ndarray) -> tuple[np.ndarray, float]:
    """Which chains of draws (chain, draw, scalar) are stuck, and the largest R-hat."""
    still = np.mean(np.any(np.diff(draws, axis=1) != 0.0, axis=2), axis=1) < LEAST_MOVES
    r_hat = convergence.rhat(draws)
    means = draws.mean(1)
    others = (means.sum(0) - means) / (len(means) - 1)
    apart = np.abs(means - others) > np.median(draws.std(1), axis=0)
    return still | np.any(apart & (r_hat > MOST_R_HAT), axis=1), float(np.max(r_hat))


def row(posterior: Posterior, seeds: int) -> tuple[int, str]:
    """Stuck chains of all runs on a posterior, and what is printed of them."""
    begin, found, r_hats, diverged, where = time.process_time(), 0, [], [], []
    for seed in range(seeds):
        tree = sample(posterior, "nuts", seed)
        values = {str(k): np.asarray(v) for k, v in tree["posterior"].data_vars.items()}
        draws = np.stack(list(posterior.scalars(values).values()), axis=-1).astype(float)
        chains, r_hat = stuck(draws)
        if chains.any():
            found += int(chains.sum())
            where.append(seed)
        r_hats.append(r_hat)
        diverged.append(int(tree["sample_stats"]["diverging"].sum()))
    r_hat, count = np.array(r_hats), np.array(diverged)
    return found, (
        f"{posterior.name:28} {seeds:5d} {found:6d} {np.max(r_hat):10.3f} "
        f"{np.mean(r_hat > 1.01):13.0%} {np.mean(count > 0):10.0%} {np.max(count):8d} "
        f"{time.process_time() - begin:7.0f}" + (f"  stuck: seeds {where}" if where else "")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of posteriordb JSON files")
    parser.add_argument("--posteriordb", help="clone of stan-dev/posteriordb, for four more")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--models", help="names, with commas between them")
    given = parser.parse_args()
    posteriors = load(given.data) | (load_clone(given.posteriordb) if given.posteriordb else {})
    names = given.models.split(",") if given.models else [n for n in posteriors if n != CENTRED]
    print(
        f"{'posterior':28} seeds  stuck  max R-hat  R-hat > 1.01  diverging  at most   CPU s",
        flush=True,
    )
    total = 0
    for name in names:
        found, text = row(posteriors[name], given.seeds)
        total += found
        print(text, flush=True)
    print(f"\n{'held  ' if not total else 'MISSED'} stuck chains: {total}")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
