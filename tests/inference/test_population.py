"""Resampling is unbiased and has the counts its scheme promises; weights add up.

Seeds are fixed. Where a bound is statistical, its false-alarm rate over seeds is said.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from ppl_toolkit.diagnostics.transitions import enumerated
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.population import (
    Population,
    effective_size,
    normalised,
    relative_variance,
)
from ppl_toolkit.inference.resampling import SCHEMES, inverse_cdf, resample, scheme_named

WEIGHTS = np.array([0.4, 0.05, 0.05, 0.05, 0.15, 0.3])
REPLICAS = 20_000
# Variances of the children of particles 0 and 4, from 20000 replicas of other code.
VARIANCES = {
    "multinomial": (1.46, 0.78), "killing": (0.95, 0.63), "residual": (0.35, 0.63),
    "stratified": (0.24, 0.37), "systematic": (0.24, 0.09), "ssp": (0.24, 0.09),
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def counts(scheme, weights, replicas=REPLICAS, seed=0, count=None):
    """Children of every particle, (replica, N)."""
    size = len(weights)

    def one(key):
        ancestors = resample(key, jnp.log(weights), scheme, count)
        return jnp.zeros(size, int).at[ancestors].add(1)

    return np.asarray(jax.jit(jax.vmap(one))(random.split(random.key(seed), replicas)))


def test_multinomial_is_unbiased_exactly():
    """Over all 6^3 outcomes: E #{A = i} = M W_i to 1e-14."""
    found = enumerated(lambda key: resample(key, jnp.log(WEIGHTS), "multinomial", 3))
    children = (found.values[:, :, None] == np.arange(6)).sum(1)
    assert len(found.values) == 6**3
    np.testing.assert_allclose(found.probabilities @ children, 3 * WEIGHTS, atol=1e-14)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_children_on_average(scheme):
    """Means within 5 standard errors (36 comparisons: false alarms 2e-5), and their variances."""
    found = counts(scheme, WEIGHTS)
    assert (found.sum(1) == 6).all()
    errors = found.std(0) / np.sqrt(REPLICAS)
    assert (np.abs(found.mean(0) - 6 * WEIGHTS) < 5 * errors + 1e-12).all()
    np.testing.assert_allclose(found.var(0)[[0, 4]], VARIANCES[scheme], atol=0.04)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial", "residual", "ssp"])
@pytest.mark.parametrize("count", [3, 11])
def test_another_number_of_children(scheme, count):
    """As above, false alarms 6e-5."""
    found = counts(scheme, WEIGHTS, count=count)
    assert (found.sum(1) == count).all()
    errors = found.std(0) / np.sqrt(REPLICAS)
    assert (np.abs(found.mean(0) - count * WEIGHTS) < 5 * errors + 1e-12).all()


@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
def test_floor_or_ceil(scheme):
    weights = np.random.default_rng(3).dirichlet(np.full(50, 0.3))
    found = counts(scheme, weights, 2000)
    assert (np.abs(found - 50 * weights) < 1 + 1e-9).all()


def test_residual_keeps_the_whole_parts():
    weights = np.random.default_rng(3).dirichlet(np.full(50, 0.3))
    assert (counts("residual", weights, 2000) >= np.floor(50 * weights)).all()


def test_stratified_deviates_by_less_than_two():
    weights = np.random.default_rng(4).dirichlet(np.full(50, 0.3))
    assert (np.abs(counts("stratified", weights, 2000) - 50 * weights) < 2).all()


def test_systematic_exactly():
    """Children as a function of the one uniform: their integral over a fine grid is N W."""
    grid = (np.arange(10_000) + 0.5) / 10_000
    points = (np.arange(6) + grid[:, None]) / 6
    ancestors = jax.vmap(lambda u: inverse_cdf(jnp.asarray(WEIGHTS), u))(points)
    children = (np.asarray(ancestors)[:, :, None] == np.arange(6)).sum(1)
    np.testing.assert_allclose(children.mean(0), 6 * WEIGHTS, atol=2e-4)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual", "ssp", "killing"])
def test_equal_weights_change_nothing(scheme):
    found = resample(random.key(0), jnp.full(64, -3.0), scheme)
    np.testing.assert_array_equal(np.sort(found), np.arange(64))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_weight_no_children(scheme, dtype):
    """Zeros and NaN at both ends and in the middle, in many replicas."""
    weights = np.array([0.0, 0.3, np.nan, 0.0, 0.7, 0.0], dtype)
    found = counts(scheme, weights, 5000)
    assert (found.sum(1) == 6).all()
    assert (found[:, [0, 2, 3, 5]] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_dead_population_stays(scheme, value):
    found = resample(random.key(0), jnp.full(5, value), scheme)
    np.testing.assert_array_equal(found, np.arange(5))


def test_unknown_scheme():
    with pytest.raises(OptionError, match="systematic"):
        scheme_named("sorted")


# -- weights -------------------------------------------------------------------------------------


def test_shift_of_the_weights():
    """A factor c moves the evidence by exactly log c, and leaves the weights alone."""
    factors = jnp.asarray([0.3, -2.0, 1.1, -jnp.inf])
    start = Population.of({"x": jnp.arange(4.0)})
    one, other = start.reweighted(factors), start.reweighted(factors - 1000.0)
    np.testing.assert_allclose(other.log_weights, one.log_weights, atol=1e-12)
    np.testing.assert_allclose(other.log_evidence, one.log_evidence - 1000.0, atol=1e-9)
    np.testing.assert_allclose(one.log_evidence, np.log(np.exp(factors).mean()), atol=1e-15)


def test_reweighting_in_two_steps_is_one():
    a, b = np.random.default_rng(0).normal(size=(2, 9))
    start = Population.of({"x": jnp.arange(9.0)})
    twice, once = start.reweighted(a).reweighted(b), start.reweighted(a + b)
    np.testing.assert_allclose(twice.log_weights, once.log_weights, atol=1e-14)
    np.testing.assert_allclose(twice.log_evidence, once.log_evidence, atol=1e-14)


def test_resampling_keeps_the_evidence():
    population = Population.of({"x": jnp.arange(4.0)}).reweighted(jnp.asarray([0.0, 1, 2, -9]))
    resampled = population.resampled(random.key(0))
    assert resampled.log_evidence == population.log_evidence
    assert resampled.effective_size == pytest.approx(4.0)
    assert set(np.asarray(resampled.particles["x"])) <= set(range(4))


def test_nan_weighs_nothing():
    population = Population.of({"x": jnp.arange(2.0)}).reweighted(jnp.asarray([jnp.nan, 0.0]))
    np.testing.assert_array_equal(np.exp(population.log_weights), [0.0, 1.0])
    np.testing.assert_allclose(population.log_evidence, np.log(0.5), atol=1e-15)


def test_all_dead():
    shares, mean = normalised(jnp.full(3, -jnp.inf))
    assert np.isneginf(shares).all()
    assert np.isneginf(mean)
    assert effective_size(jnp.full(3, -jnp.inf)) == 0


def test_effective_size():
    assert effective_size(jnp.zeros(7)) == pytest.approx(7)
    assert effective_size(jnp.asarray([0.0, -jnp.inf, -jnp.inf])) == pytest.approx(1)
    assert effective_size(jnp.log(WEIGHTS)) == pytest.approx(1 / (WEIGHTS**2).sum())


def test_no_weights_no_variance():
    """Lee and Whiteley's estimate averages to zero where nothing is ever weighted.

    1000 runs of ten multinomial resamplings; 5 standard errors: false alarms 6e-7.
    """

    def run(key):
        def again(eves, key):
            return eves[resample(key, jnp.zeros(200), "multinomial")], None

        eves, _ = jax.lax.scan(again, jnp.arange(200), random.split(key, 10))
        return relative_variance(jnp.zeros(200), eves, 10)

    found = jax.jit(jax.vmap(run))(random.split(random.key(0), 1000))
    assert abs(found.mean()) < 5 * found.std() / np.sqrt(1000)


def test_variance_of_one_mean():
    """Without resampling it is the textbook's estimate, sample variance / N."""
    log_weights = np.random.default_rng(0).normal(size=300)
    w = np.exp(log_weights)
    expected = w.var(ddof=1) / 300 / w.mean() ** 2
    assert relative_variance(jnp.asarray(log_weights), jnp.arange(300), 0) == pytest.approx(
        expected, rel=1e-10
    )
