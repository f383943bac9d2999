"""Filters that go on: the same as all at once, and what they cannot go on with."""

import pickle

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit.errors import DataError, MethodError, ModelError
from ppl_toolkit.inference import OnlineFilter, ParticleFilter


def model(y, scale=0.7):
    phi = numpyro.sample("phi", dist.Uniform(-1, 1))
    start = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, 0.5))
        numpyro.sample("y", dist.Normal(x, scale), obs=y_t)
        return x, None

    scan(step, start, y)


Y = np.random.default_rng(0).normal(size=30)
METHOD = ParticleFilter(500, given={"phi": 0.8})
SUMS = ParticleFilter(
    500, given={"phi": 0.8}, functional=lambda x, new, t: {"all": new["x"]}, moves=4
)


def kalman(y, phi=0.8, q=0.5, r=0.7):
    m, v, total = 0.0, 1.0, 0.0
    for value in y:
        m, v = phi * m, phi**2 * v + q**2
        s = v + r**2
        total -= 0.5 * (np.log(2 * np.pi * s) + (value - m) ** 2 / s)
        m, v = m + v / s * (value - m), v - v**2 / s
    return m, v**0.5, total


def test_blocks_are_the_same_as_all_at_once():
    whole = OnlineFilter(model, Y, method=SUMS).start(seed=3)
    online = OnlineFilter(model, Y[:10], method=SUMS)
    state = pickle.loads(pickle.dumps(online.start(seed=3)))
    for y_t in Y[10:]:
        state = online.update(state, y_t)
    assert state.time == whole.time == 30
    assert state.log_evidence == pytest.approx(whole.log_evidence, rel=1e-12)
    for name in ("mean", "sd", "quantiles"):
        np.testing.assert_allclose(state.summaries["x"][name], whole.summaries["x"][name], 1e-9)
    np.testing.assert_allclose(state.smoothed["all"], whole.smoothed["all"], 1e-9)
    np.testing.assert_allclose(state.log_evidence_sd, whole.log_evidence_sd, 1e-9)


@pytest.mark.slow
def test_it_follows_the_kalman_filter():
    """20 seeds: means of 20 estimates within 4.5 of their standard errors (once in 10^5 each)."""
    online = OnlineFilter(model, Y, method=METHOD)
    states = [online.start(seed) for seed in range(20)]
    mean, sd, log_z = kalman(Y)
    found = np.array([s.summaries["x"]["mean"] for s in states])
    assert abs(found.mean() - mean) < 4.5 * found.std(ddof=1) / 20**0.5 < 0.1
    assert np.mean([s.summaries["x"]["sd"] for s in states]) == pytest.approx(sd, rel=0.05)
    ratios = np.exp([s.log_evidence - log_z for s in states])
    assert abs(ratios.mean() - 1) < 4.5 * ratios.std(ddof=1) / 20**0.5
    told = np.mean([s.log_evidence_sd for s in states])
    assert told == pytest.approx(ratios.std(ddof=1), rel=0.6)  # 20 seeds tell it to 16%


@pytest.mark.slow
def test_further_blocks_of_a_length_compile_nothing():
    online = OnlineFilter(model, Y[:4], method=METHOD)
    state = online.update(online.start(), Y[4])
    state = online.update(state, Y[5:7])  # another length
    compilations.clear()
    for y_t in Y[7:10]:
        state = online.update(state, y_t)
    assert online.update(state, Y[10:12]).time == 12
    assert not compilations


def counts(y):
    def step(x, inputs):
        t, y_t = inputs
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5 + t))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, (jnp.arange(len(y)), y))


def centred(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y - jnp.mean(y))


def looks_around(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x + y[0], 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def indexed(y):
    def step(state, _):
        x, t = state
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y[t])
        return (x, t + 1), None

    scan(step, (0.0, 0), None, length=y.shape[0])


def of_length(y, length):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y, length=length)


@pytest.mark.parametrize(
    ("series", "args", "words"),
    [
        (counts, (Y,), "not cut like"),
        (centred, (Y,), "not cut like"),
        (looks_around, (Y,), "sees more"),
        (indexed, (Y,), "sees more"),
        (of_length, (Y, 30), "two steps of its data alone"),
        (centred, (Y[:2],), "three or more"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(series, args, words):
    with pytest.raises(MethodError, match=words):
        OnlineFilter(series, *args, method=ParticleFilter(10))


def test_new_data_that_are_wrong_are_refused_and_nothing_is_lost():
    online = OnlineFilter(model, Y[:4], method=METHOD)
    state = online.start()
    with pytest.raises(DataError, match="non-finite"):
        online.update(state, np.nan)
    with pytest.raises(DataError, match="shape"):
        online.update(state, np.zeros((2, 2)))
    with pytest.raises(ModelError, match="cannot be called"):
        online.update(state)
    with pytest.raises(DataError, match="no particle"):
        online.update(state, 1e200)
    assert online.update(state, 0.5).time == 5
    assert ppl.OnlineFilter is OnlineFilter


def test_other_arguments_stay():
    """An argument without an axis of time, and one that is left out at first."""
    online = OnlineFilter(model, Y[:4], np.asarray(0.7), method=METHOD)
    other = OnlineFilter(model, Y[:4], method=METHOD)
    one = online.update(online.start(), Y[4], np.asarray(0.7))
    assert one.log_evidence == pytest.approx(other.update(other.start(), Y[4]).log_evidence)
