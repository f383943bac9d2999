"""The posteriors of `validate` by sequential Monte Carlo: a part of `make validate DATA=path`.

Four independent runs of `SMC()` with its defaults are the chains; seeds 0 and 1. SMC begins with
draws from the prior, so that posteriors with proper priors alone can be had by it; two whose proper
priors are written as flat ones with a factor are written out here. The others must be refused
before anything is compiled. Bars:

- means: within 4 combined Monte Carlo standard errors, 4.5 for at most 2% of the scalars;
- standard deviations: within 4 standard errors of the difference plus 5%;
- all others: a `MethodError` about their improper priors.

The centred eight schools, a funnel, are shown beside their bars: no bar is on them. With the
sampler exact, about one run of this command in 130 fails by chance (120 means). Prints a row per
run; exits with 1 if a bar is missed.
"""

import argparse
import sys
import time

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import posteriordb
from validate import CENTRED, compared, sample

from ppl_toolkit.diagnostics.evidence import combined
from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference import SMC

SEEDS = (0, 1)


def low_dim_gauss_mix(num_observations, y=None):
    """The mixture with ordered means: two draws from their prior, sorted."""
    unordered = numpyro.sample("unordered", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    mu = numpyro.deterministic("mu", jnp.sort(unordered))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    mixing = dist.Categorical(probs=jnp.stack([theta, 1.0 - theta]))
    with numpyro.plate("observation", num_observations):
        numpyro.sample("y", dist.MixtureSameFamily(mixing, dist.Normal(mu, sigma)), obs=y)


def hmm_example(y):
    """The hidden Markov chain, whose means are in order with probability 0.9987 before the data."""
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", dist.Normal(jnp.array([3.0, 10.0]), 1.0).to_event(1))
    numpyro.factor("ordered", jnp.where((mu[0] > 0) & (mu[1] > mu[0]), 0.0, -jnp.inf))
    posteriordb.hidden_markov_likelihood(theta1, theta2, mu, y)


PROPER = {"low_dim_gauss_mix": low_dim_gauss_mix, "hmm_example": hmm_example}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of posteriordb JSON files")
    posteriors = posteriordb.load(parser.parse_args().data)
    print(
        f"{'posterior':28} seed  CPU s  max|z|  sd excess  stages  moves  min ESS  log evidence",
        flush=True,
    )
    rows, refused = [], []
    for name, posterior in posteriors.items():
        posterior = posterior._replace(model=PROPER.get(name, posterior.model))
        for seed in SEEDS:
            begin = time.process_time()
            try:
                tree = sample(posterior, SMC(), seed)
            except MethodError as error:
                refused.append("improper" in str(error))
                print(f"{name:28}    -  refused: {error}", flush=True)
                break
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
        f"improper priors: {sum(refused)} of {len(refused)} refused as such": all(refused),
    }
    print()
    for text, good in held.items():
        print(f"{'held  ' if good else 'MISSED'} {text}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
