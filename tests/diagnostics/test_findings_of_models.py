"""Every finding through `infer`: a run that must have it, and one that must not.

Twenty seeds each. The models are chosen so that what they must show is far on its side of the
threshold; the chance of a wrong answer in any of the twenty runs is said beside each pair.
"""

import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import EFFECTS, ERRORS, conjugate, eight_schools_centred

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.checks import check_findings
from ppl_toolkit.diagnostics.leave_one_out import khat_finding
from ppl_toolkit.diagnostics.sensitivity import sensitivity_findings
from ppl_toolkit.errors import InferenceWarning
from ppl_toolkit.inference import HMC, MCMC, NUTS, RandomWalk

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SEEDS = 20
Y = np.random.default_rng(8).normal(size=20)


def correlated(scale):
    """A site of that scale, and one that follows it closely."""
    a = numpyro.sample("a", dist.Normal(0, scale))
    numpyro.sample("b", dist.Normal(a, 1))


def wall(height):
    """A normal density that falls by ``height`` at 0.5, which no gradient foretells."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("wall", jnp.where(x > 0.5, -height, 0.0))


def narrow(scale):
    numpyro.sample("x", dist.Normal(0, scale).expand([5]).to_event(1))


def modes(distance):
    mixture = dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.5, 0.5])), dist.Normal(jnp.array([-1.0, 1.0]) * distance, 1)
    )
    numpyro.sample("x", mixture)


def funnel(depth):
    """Neal's, with a standard deviation of ``depth`` in its log scale."""
    v = numpyro.sample("v", dist.Normal(0, depth))
    numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([9]).to_event(1))


def log_normal(sigma):
    numpyro.deterministic("y", jnp.exp(sigma * numpyro.sample("x", dist.Normal(0, 1))))


def logarithm(shift):
    x = numpyro.sample("x", dist.Beta(2, 2))
    numpyro.deterministic("log", jnp.log(x - shift))


def with_parameter(y, learn):
    w = numpyro.param("w", 0.5) if not learn else numpyro.sample("w", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(w + numpyro.sample("x", dist.Normal(0, 1)), 1), obs=y)


def subsampled(y, size):
    x = numpyro.sample("x", dist.Normal(0, 1))
    with numpyro.plate("rows", len(y), subsample_size=size):
        numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, 0))


class Case(NamedTuple):
    """Runs (model, arguments, options) that have a finding, and that have it not."""

    has: tuple
    has_not: tuple


def case(model, bad, good, bad_options=None, good_options=None):
    """Two runs of one model that differ in arguments, options or both."""
    return Case((model, bad, bad_options or {}), (model, good, good_options or {}))


ONE_STEP = HMC(steps=1, metric="diagonal")
WALK = MCMC(RandomWalk())
TWO_MODES = {"init": {"x": np.array([-20.0, 20.0, -20.0, 20.0])}}
SHARED = {"chains": 64, "superchains": 8, "draws": 30}

# The comments say what a wrong answer would take; none is as likely as one in 10^4 runs.
CASES = {
    # Every second trajectory meets a wall of height 10^6, and no step is short enough for it.
    "divergences": case(wall, (1e6,), (0.0,)),
    # Trajectories of two steps at most, where four to sixteen are needed.
    "tree_depth": case(correlated, (1.0,), (1.0,), {"method": NUTS(max_depth=1)}),
    # In a funnel the energy moves slowly; in a normal posterior its changes are half of it.
    "bfmi": case(funnel, (3.0,), (0.1,)),
    # Single small steps from near the origin would need ten thousand draws to cross 100, unless
    # the metric knows the direction, or trajectories are long.
    "r_hat": case(correlated, (8.0,), (8.0,), {"method": ONE_STEP}),
    # Before warm-up a random walk steps a thousand times too far, and all proposals are refused.
    "stuck": case(narrow, (1e-3,), (1e-3,), {"method": WALK, "warmup": 0}, {"method": WALK}),
    # Started in modes 40 standard deviations apart; modes two apart are one region.
    "multimodal": case(modes, (20.0,), (1.0,), TWO_MODES),
    # A random walk of 1000 steps against trajectories across the posterior.
    "ess": case(correlated, (3.0,), (3.0,), {"method": ONE_STEP}),
    # The standard deviation of a log-normal variable with sigma 4 is made by a few draws.
    "mcse": case(log_normal, (4.0,), (0.1,)),
    "few_draws": case(correlated, (1.0,), (1.0,), {"draws": 20}, {"draws": 200}),
    "not_finite": case(logarithm, (2.0,), (0.0,)),
    "parameters": case(with_parameter, (Y, False), (Y, True)),
    "subsample": case(subsampled, (Y, 10), (Y, 20)),
    "precision": case(conjugate, (Y.astype(np.float32),), (Y,)),
}


def kinds(model, args, options, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        result = ppl.infer(model, *args, seed=seed, progress=False, **options)
    return {found.kind for found in ppl.findings(result)}


@pytest.mark.parametrize("kind", CASES)
def test_a_model_has_it_and_a_model_has_not(kind):
    has, has_not = CASES[kind]
    hits = [kind in kinds(*has, seed) for seed in range(SEEDS)]
    false = [kind in kinds(*has_not, seed) for seed in range(SEEDS)]
    assert (sum(hits), sum(false)) == (SEEDS, 0)


def test_the_centred_eight_schools():
    """The funnel is found out by energies and effective draws at every seed. Divergences are in
    nine of ten runs: fewer than 14 of twenty has probability 0.003."""
    found = [kinds(eight_schools_centred, (ERRORS, EFFECTS), {}, seed) for seed in range(SEEDS)]
    assert all({"bfmi", "ess"} <= run for run in found)
    assert sum("divergences" in run for run in found) >= 14


def test_superchains_in_different_modes():
    """Of eight starts all lie on one side of zero once in 128 runs: seeds without that."""
    apart = [kinds(modes, (20.0,), SHARED, seed) for seed in range(SEEDS)]
    assert all({"multimodal", "r_hat"} & found for found in apart)
    together = [kinds(conjugate, (Y,), SHARED, seed) for seed in range(SEEDS)]
    assert not any({"multimodal", "r_hat"} & found for found in together)


def outliers(y):
    m = numpyro.sample("m", dist.Normal(0, 10))
    s = numpyro.sample("s", dist.HalfNormal(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(m, s), obs=y)


def counts(y):
    rate = numpyro.sample("rate", dist.Gamma(1, 0.1))
    with numpyro.plate("row", 200):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def fitted(model, y, seed):
    return ppl.infer(model, y, seed=seed, progress=False)


def test_khat():
    """An observation forty standard deviations away makes the posterior; among forty normal ones
    none does (k below 0.3)."""
    far = np.append(Y, 40.0)
    for seed in range(SEEDS):
        assert khat_finding(ppl.loo(fitted(outliers, far, seed), outliers, far)).kind == "khat"
        assert khat_finding(ppl.loo(fitted(outliers, Y, seed), outliers, Y)) is None


def test_conflict_and_weak_data():
    """Prior 0 +- 2; four observations of 16 +- 1/2, none but one with error 1 against 0 +- 2, and
    200 near zero."""
    near = np.random.default_rng(0).normal(0.3, 1.0, 200)
    for seed in range(SEEDS):
        for y, wanted in ((np.full(4, 16.0), ["conflict"]), (near, [])):
            table = ppl.sensitivity(fitted(conjugate, y, seed), conjugate, y)
            assert [found.kind for found in sensitivity_findings(table)] == wanted


def test_predictive():
    """Counts of variance ten times their mean under a Poisson model, and under their own."""
    rng = np.random.default_rng(1)
    over = rng.poisson(rng.gamma(0.5, 10, 200)).astype(float)
    plain = rng.poisson(5.0, 200).astype(float)
    for seed in range(SEEDS):
        for y, wanted in ((over, True), (plain, False)):
            table = ppl.check_posterior(fitted(counts, y, seed), counts, y, seed=seed)
            assert any(found.kind == "predictive" for found in check_findings(table)) == wanted
