"""Modes and type-II maximum likelihood against closed forms."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError, OptionError, SamplingError
from ppl_toolkit.inference import MAP, Type2ML

Y = np.random.default_rng(0).normal(2.0, 1.5, 30)


def normal(y):
    """Flat in the mean, and a law of the standard deviation that a Jacobian would move."""
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    s = numpyro.sample("s", dist.LogNormal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m, s), obs=y)


def test_the_likelihoods_maximum_is_that_of_the_normal():
    """Mean and standard deviation: no prior, and no Jacobian of log s."""
    found = quiet(normal, Y, method="type2ml", chains=2)["maximum"]
    np.testing.assert_allclose(found["m"], np.mean(Y), rtol=1e-5)
    np.testing.assert_allclose(found["s"], np.std(Y), rtol=1e-5)


def test_the_mode_is_that_of_the_density_as_written():
    from scipy import optimize, stats

    def loss(x):
        m, s = x
        prior = stats.norm(0, 2).logpdf(m) + stats.lognorm(1).logpdf(s)
        return -prior - stats.norm(m, s).logpdf(Y).sum()

    exact = optimize.minimize(
        loss, [2.0, 1.5], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
    ).x
    tree = quiet(normal, Y, method="map", chains=2)
    np.testing.assert_allclose(tree["maximum"]["m"], exact[0], rtol=1e-5)
    np.testing.assert_allclose(tree["maximum"]["s"], exact[1], rtol=1e-5)
    np.testing.assert_allclose(tree["sample_stats_maximum"]["objective"], -loss(exact), rtol=1e-9)
    assert "own spaces" in tree.attrs["objective"]
    compilations.clear()
    quiet(normal, Y + 1, method="map", chains=2, seed=3)
    assert not compilations


def two_peaks(y):
    m = numpyro.sample("m", dist.Normal(0.0, 4.0))
    numpyro.sample("y", dist.Normal(abs(m), 0.3), obs=y)
    numpyro.factor("tilt", 0.05 * m)


@pytest.mark.slow
def test_many_starts_find_the_higher_peak():
    found = quiet(two_peaks, np.full(4, 2.0), method=MAP(starts=8), chains=4)["maximum"]["m"]
    assert np.all(found > 1.5)


def test_a_given_start_is_used():
    lower = quiet(two_peaks, np.full(4, 2.0), method=MAP(starts=1), chains=2, init={"m": -1.9})[
        "maximum"
    ]["m"]
    assert np.all(lower < -1.5)


def rising(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.factor("slope", 3.0 * m)
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def test_a_density_that_rises_for_ever_is_told():
    with pytest.raises(SamplingError, match="rises for ever"):
        quiet(rising, Y, method=Type2ML(steps=5), chains=2)


def counts(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def test_refusals():
    with pytest.raises(MethodError):
        ppl.infer(counts, Y, method="map", progress=False)
    for option in ({"starts": 0}, {"steps": -1}, {"init_radius": 0.0}):
        with pytest.raises(OptionError):
            MAP(**option)
