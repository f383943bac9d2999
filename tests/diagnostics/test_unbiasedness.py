"""Evidence estimates: biased ones are seen, unbiased ones pass, noisy ones are not judged.

False-alarm rates are simulated from log-normal estimates, whose mean is known. Bounds on counts of
false alarms hold with a probability of at least 1 - 10^-6; seeds are fixed.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from ppl_toolkit import engine, executables
from ppl_toolkit.diagnostics import unbiasedness as module
from ppl_toolkit.diagnostics.unbiasedness import Evidences, compared, unbiasedness
from ppl_toolkit.inference import SMC, RandomWalk, population, smc
from ppl_toolkit.program import Program

LEVEL = 1e-4
ONE = Evidences(np.zeros(1), "given")


def location_scale(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    s = numpyro.sample("s", dist.HalfNormal(1))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(a, s), obs=y)


def dice(y):
    with numpyro.plate("n", len(y)):
        k = numpyro.sample("k", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        numpyro.sample("y", dist.Normal(1.0 * k, 1), obs=y)


def memberships(y):
    """A continuous site beside discrete ones."""
    shift = numpyro.sample("shift", dist.Normal(0, 2))
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(shift * z, 1), obs=y)


Y = np.array([0.3, -0.5, 1.2, 0.1, -1.0, 0.7])
PROGRAM = Program(location_scale, (Y,))
FINITE = Program(dice, (np.array([0.3, 1.0, 2.0]),))
MIXED = Program(memberships, (Y,))

# -- mistakes that the draws do not show, or hardly ------------------------------------------------


def last_weights_count_a_batch_twice(patch):
    right = smc.log_weights

    def wrong(generations, point):
        like = generations.particles.log_likelihood
        again = jnp.where(point >= like.shape[1], like[:, 0], 0.0)
        return right(generations, point) + again

    patch.setattr(smc, "log_weights", wrong)


def sum_of_weights_for_their_mean(patch):
    right = population.Population.reweighted

    def wrong(self, factors):
        new = right(self, factors)
        return new._replace(log_evidence=new.log_evidence + jnp.log(1.0 * factors.shape[0]))

    patch.setattr(population.Population, "reweighted", wrong)


def weights_outlive_resampling(patch):
    """Resampled particles are weighed as if they came from the prior still."""
    right = smc._replaced

    def wrong(*args):
        new = right(*args)
        return new._replace(born=0.0 * new.born)

    patch.setattr(smc, "_replaced", wrong)


MISTAKES = {
    "a batch twice": (last_weights_count_a_batch_twice, {"batches": 3}),
    "sum for mean": (sum_of_weights_for_their_mean, {}),
    "weights not reset": (weights_outlive_resampling, {"resampling": "multinomial"}),
}
RIGHT = {
    "tempering": (PROGRAM, {"kernel": RandomWalk()}),
    "gradients": (PROGRAM, {}),
    "batches, multinomial": (PROGRAM, {"batches": 3, "resampling": "multinomial"}),
    "waste-free": (PROGRAM, {"waste_free": 8}),
    "discrete": (FINITE, {}),
    "mixed": (MIXED, {}),
}


@pytest.fixture
def mistaken(monkeypatch):
    """Makes mistakes in freshly compiled programs, which are kept nowhere."""
    monkeypatch.setenv("PPL_CACHE_DIR", "off")

    def forget():
        executables.clear()
        engine._structures.clear()

    def make(mistake):
        forget()
        mistake(monkeypatch)

    yield make
    forget()


# -- the statistic ---------------------------------------------------------------------------------


def log_normals(rng, spread, count):
    return spread * rng.normal(size=count) - spread**2 / 2


def alarms(spread, tries, level, seed):
    rng = np.random.default_rng(seed)
    found = [compared(Evidences(log_normals(rng, spread, 500), ""), ONE) for _ in range(tries)]
    return sum(f.p_value < level for f in found), sum(bool(f.problem) for f in found)


def test_the_transformation_and_its_inverse():
    for skewness in (-0.15, 0.0, 0.05, 0.2):
        for t in (-5.0, -1.0, 0.0, 2.0, 6.0):
            there = module._transformed(t, skewness)
            assert module._inverse(there, skewness) == pytest.approx(t, abs=1e-9)


def test_the_interval_ends_where_the_test_begins_to_reject():
    estimates = Evidences(log_normals(np.random.default_rng(0), 0.5, 500), "")
    found = compared(estimates, ONE)
    for end in found.interval(LEVEL):
        there = compared(estimates, Evidences(np.log([end]), "given"))
        assert there.p_value == pytest.approx(LEVEL, rel=1e-6)


def test_skewed_estimates_raise_no_more_alarms_than_said():
    tries, level = 4000, 0.01
    for spread in (0.1, 0.6):
        found, _ = alarms(spread, tries, level, seed=1)
        assert found <= stats.binom.isf(1e-6, tries, level)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.1, 0.5, 0.8])
def test_alarms_at_the_level_of_check(spread):
    tries = 100_000
    found, noisy = alarms(spread, tries, LEVEL, seed=2)
    assert found <= stats.binom.isf(1e-6, tries, LEVEL)
    assert noisy < 0.3 * tries


def test_noisy_estimates_are_not_judged():
    found = compared(Evidences(log_normals(np.random.default_rng(0), 3.0, 500), ""), ONE)
    assert "too noisy" in found.problem
    assert found.p_value == 1.0


def test_a_noisy_reference_widens_the_error():
    rng = np.random.default_rng(0)
    estimates, reference = (Evidences(log_normals(rng, s, 500), "") for s in (0.1, 0.5))
    alone, both = compared(estimates, ONE), compared(estimates, reference)
    assert both.error > 4 * alone.error
    assert both.p_value > 1e-3


def test_estimates_far_too_large_do_not_overflow():
    found = compared(Evidences(np.full(100, 2000.0) + np.linspace(0, 0.1, 100), ""), ONE)
    assert found.p_value == 0.0


# -- samplers --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tempering", "discrete"])
def test_right_samplers_pass(name):
    program, options = RIGHT[name]
    found = unbiasedness(program, SMC(particles=64, **options), seed=0, runs=200)
    assert found.p_value > LEVEL, str(found)
    assert not found.problem
    assert found.stages >= 3
    assert ("by enumeration" in str(found)) == (name == "discrete")


@pytest.mark.parametrize("name", ["a batch twice"])
@pytest.mark.slow
def test_mistakes_are_seen(name, mistaken):
    mistake, options = MISTAKES[name]
    mistaken(mistake)
    found = unbiasedness(FINITE, SMC(particles=64, **options), seed=0, runs=200)
    assert found.p_value < LEVEL


@pytest.mark.slow
def test_an_evidence_that_is_given_is_believed():
    method = SMC(particles=64, powers=(0.2, 0.5, 1.0), moves=2)
    right = unbiasedness(FINITE, method, seed=0, runs=200)
    assert (right.stages, right.moves) == (3, 2)
    off = unbiasedness(FINITE, method, 0, right.log_evidence + 0.5, runs=200)
    assert off.p_value < LEVEL
    assert off.ratio == pytest.approx(right.ratio * np.exp(-0.5))


@pytest.mark.slow
def test_what_cannot_be_tested_is_said():
    equal = Program(location_scale, (np.zeros(5),))  # no bound on the likelihood
    found = unbiasedness(equal, SMC(particles=64, kernel=RandomWalk()), seed=0)
    assert "effective sample size of" in found.problem
    assert "could not be tested" in str(found)
    found = unbiasedness(PROGRAM, SMC(particles=64, kernel=RandomWalk(), generations=4), seed=0)
    assert "consistent, not unbiased" in found.problem
    found = unbiasedness(PROGRAM, SMC(particles=64, kernel=RandomWalk(), warmup=1), seed=0)
    assert "of the way from the prior" in found.problem


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_seen_on_nineteen_of_twenty_seeds(name, mistaken):
    mistake, options = MISTAKES[name]
    mistaken(mistake)
    method = SMC(particles=64, **options)
    assert sum(unbiasedness(PROGRAM, method, seed).p_value < LEVEL for seed in range(20)) >= 19


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_samplers_pass_on_all_twenty_seeds(name):
    """A false alarm in any of them has a probability of at most 20 x 10^-4."""
    program, options = RIGHT[name]
    for seed in range(20):
        found = unbiasedness(program, SMC(particles=64, **options), seed)
        assert found.p_value >= LEVEL, str(found)
        assert not found.problem
