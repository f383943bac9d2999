"""The posteriors of `validate` by sequential Monte Carlo: a part of `make validate DATA=path`.

Four independent runs of 512 particles are the chains; seeds 0 and 1. Sites with flat priors begin
at the reference law, `SMC(reference=10.0)`. Bars:

- means: within 4 combined Monte Carlo standard errors, 4.5 for at most 2% of the scalars;
- standard deviations: within 4 standard errors of the difference plus 5%.

The centred eight schools, a funnel, are shown beside their bars: no bar is on them. Prints a row
per run; exits with 1 if a bar is missed.
"""

import argparse
import sys
import time

import numpy as np
import posteriordb
from validate import CENTRED, compared, sample

from ppl_toolkit.diagnostics.evidence import combined
from ppl_toolkit.inference import SMC

SEEDS = (0, 1)


PARTICLES = 512
REFERENCE = 10.0  # scale of the law that flat sites begin with


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of posteriordb JSON files")
    posteriors = posteriordb.load(parser.parse_args().data)
    print(
        f"{'posterior':28} seed  CPU s  max|z|  sd excess  stages  moves  min ESS  log evidence",
        flush=True,
    )
    rows = []
    for name, posterior in posteriors.items():
        for seed in SEEDS:
            begin = time.process_time()
            tree = sample(posterior, SMC(PARTICLES, reference=REFERENCE), seed)
            row = compared(posterior, seed, tree, time.process_time() - begin)
            stages = tree["smc"].dataset
            moves = stages["n_moves"].sum("stage").mean().item()
            evidence = combined(tree["sample_stats"]["log_evidence"].values[:, 0])
            rows.append(row)
            print(
                f"{name:28} {seed:4d} {row.seconds:6.1f} {row.z.max():7.2f} "
                f"{row.sd_excess.max():10.2f} {stages.sizes['stage']:7d} {moves:6.0f} "
                f"{row.ess:8.0f}  {evidence.log:.2f} +- {evidence.se:.2f}",
                flush=True,
            )
    judged = [row for row in rows if row.name != CENTRED]
    z = np.concatenate([row.z for row in judged])
    worst = max(row.sd_excess.max() for row in judged)
    held = {
        f"means: worst |z| {z.max():.2f}, {np.mean(z > 4):.1%} of {z.size} above 4": bool(
            z.max() <= 4.5 and np.mean(z > 4) <= 0.02
        ),
        f"standard deviations: worst excess {worst:.2f} standard errors over 5%": worst <= 4,
    }
    print()
    for text, good in held.items():
        print(f"{'held  ' if good else 'MISSED'} {text}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
