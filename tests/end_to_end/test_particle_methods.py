"""Particle methods through `infer`: one model function, every method."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet
from linear_series import series_from_start as model
from linear_series import simulated_from_start as simulated
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.errors import MethodError, OptionError, SiteError
from ppl_toolkit.inference import (
    PMMH,
    Adapted,
    Bootstrap,
    LaplaceProposal,
    ParticleFilter,
    ParticleGibbs,
)


def gaussian(y, lags):
    """Means, covariance of x_1, ..., x_T given y and log p(y), of x_t = lags . x + N(0, 1/4)."""
    size = len(y)
    root = np.zeros((size, size))
    for t in range(size):
        for lag, a in enumerate(lags, start=1):
            if t >= lag:
                root[t] += a * root[t - lag]
        root[t, t] += 0.5
    prior = root @ root.T
    seen = prior + 0.49 * np.eye(size)
    gain = np.linalg.solve(seen, prior).T
    log_z = -0.5 * (y @ np.linalg.solve(seen, y) + np.linalg.slogdet(2 * np.pi * seen)[1])
    return gain @ y, prior - gain @ prior, log_z


def known(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def two_lags(y):
    def step(window, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * window[0] + 0.3 * window[1], 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return (x, window[0]), None

    scan(step, (0.0, 0.0), y)


def three_states(y):
    def step(z, y_t):
        z = numpyro.sample("z", dist.Categorical((0.1 + 0.7 * jnp.eye(3))[z]))
        numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y_t)
        return z, None

    scan(step, 0, y)


Y = simulated(20)


def within(tree, site, mean, sd, allowed=4.5):
    """|z| of every mean below 4.5, sds within 4.5 of their standard errors."""
    draws = tree["posterior"][site].values
    flat = draws.reshape(draws.shape[0], draws.shape[1], -1)
    mcse, mcse_sd = convergence.mcse(flat), convergence.mcse(flat, "sd")
    assert np.all(np.abs(flat.mean((0, 1)) - mean) <= allowed * mcse)
    assert np.all(np.abs(flat.std((0, 1)) - sd) <= allowed * mcse_sd)


@pytest.mark.slow
@pytest.mark.parametrize("moves", [0, 8])
def test_filter_and_smoothed_paths_are_those_of_the_gaussian(moves):
    mean, cov, log_z = gaussian(Y, [0.8])
    tree = quiet(known, Y, method=ParticleFilter(2000, moves=moves), draws=250, seed=1)
    x = tree["posterior"]["x"].values.reshape(-1, 20)
    assert np.max(np.abs(x.mean(0) - mean)) < 0.08
    assert np.max(np.abs(x.std(0) - np.sqrt(np.diag(cov)))) < 0.06
    logs = tree["sample_stats"]["log_evidence"].values[:, 0]
    error = float(tree["filtering"]["log_evidence_sd"].mean())
    assert 0.01 < error < 0.2
    assert np.all(np.abs(logs - log_z) < 4.5 * error)
    last_mean = gaussian(Y, [0.8])[0][-1]  # at the end filtering and smoothing are one
    assert np.all(np.abs(tree["filtering"]["x_mean"].values[:, -1] - last_mean) < 0.1)


@pytest.mark.slow
def test_particle_gibbs_agrees_with_nuts():
    y = simulated(40)
    nuts = quiet(model, y, method="nuts", seed=1)
    table = ppl.summary(nuts, ["phi", "q"])
    for method in (
        ParticleGibbs(),
        ParticleGibbs(particles=16, proposal=LaplaceProposal(newton=1)),
    ):
        tree = quiet(model, y, method=method, draws=1000, warmup=500, seed=2)
        found = ppl.summary(tree, ["phi", "q"])
        assert (found["r_hat"] < 1.03).all()
        assert ((found["mean"] - table["mean"]).abs() < 0.15 * table["sd"]).all()
        assert ((found["sd"] / table["sd"] - 1).abs() < 0.15).all()
        assert float(tree["sample_stats"]["renewed.conditional_smc"].mean()) > 0.8


@pytest.mark.slow
def test_particle_marginal_agrees_with_nuts():
    y = simulated(40)
    table = ppl.summary(quiet(model, y, method="nuts", seed=1), ["phi", "q", "x_0"])
    tree = quiet(model, y, method=PMMH(particles=80), draws=4000, seed=2)
    found = ppl.summary(tree, ["phi", "q", "x_0"])
    assert ((found["mean"] - table["mean"]).abs() < 0.15 * table["sd"]).all()
    assert ((found["sd"] / table["sd"] - 1).abs() < 0.15).all()
    assert 0.05 < float(tree["sample_stats"]["acceptance_rate"].mean()) < 0.35


def backwards(y):
    """From the last observation to the first."""

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    numpyro.sample("unused", dist.Normal(0.0, 1.0))
    scan(step, 0.0, y, reverse=True)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(ParticleFilter(2000, {"unused": 0.0}), marks=pytest.mark.slow, id="filter"),
        pytest.param(ParticleGibbs(particles=32), marks=pytest.mark.slow, id="gibbs"),
        pytest.param(PMMH(particles=64), marks=pytest.mark.slow, id="marginal"),
    ],
)
def test_scans_that_run_backwards(method):
    mean, cov, _ = gaussian(Y[::-1], [0.8])
    tree = quiet(backwards, Y, method=method, draws=1000, seed=1)
    x = tree["posterior"]["x"].values.reshape(-1, 20)[:, ::-1]
    assert np.max(np.abs(x.mean(0) - mean)) < 0.12
    assert np.max(np.abs(x.std(0) - np.sqrt(np.diag(cov)))) < 0.1


@pytest.mark.slow
def test_series_that_remember_two_steps_are_replayed():
    mean, cov, _ = gaussian(Y, [0.5, 0.3])
    tree = quiet(two_lags, Y, method=ParticleGibbs(particles=32), draws=1500, warmup=50, seed=1)
    within(tree, "x", mean, np.sqrt(np.diag(cov)))


@pytest.mark.parametrize(
    ("way", "proposal"),
    [
        ("mask", Bootstrap()),
        pytest.param("obs_mask", LaplaceProposal(1), marks=pytest.mark.slow),
        pytest.param("mask", LaplaceProposal(1), marks=pytest.mark.slow),
        pytest.param("obs_mask", Bootstrap(), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_missing_observations_are_passed_over(way, proposal):
    """Masked in the model's own way; the evidence is that of the others, 16 filters."""

    def with_holes(y, seen):
        def step(x, inputs):
            y_t, here = inputs
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            if way == "mask":
                with numpyro.handlers.mask(mask=here):
                    numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            else:
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t, obs_mask=here)
            return x, None

        scan(step, 0.0, (y, seen))

    seen = np.arange(20) % 3 != 1
    root = np.zeros((20, 20))
    for t in range(20):
        root[t] = 0.8 * root[t - 1] if t else 0.0
        root[t, t] += 0.5
    cov = (root @ root.T + 0.49 * np.eye(20))[np.ix_(seen, seen)]
    own = Y[seen]
    exact = -0.5 * (own @ np.linalg.solve(cov, own) + np.linalg.slogdet(2 * np.pi * cov)[1])
    method = ParticleFilter(300, proposal=proposal)
    tree = quiet(with_holes, np.where(seen, Y, 99.0), seen, method=method, draws=1, chains=16)
    ratio = np.exp(tree["sample_stats"]["log_evidence"].values[:, 0] - exact)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std(ddof=1) / 4 < 0.6


@pytest.mark.slow
def test_paths_are_not_joined_to_pasts_after_which_they_cannot_be():
    """There the law of the next step has impossible parameters, and its density is NaN."""

    def stays_positive(y):
        def step(total, y_t):
            total = total + numpyro.sample("x", dist.Normal(0.0, 1.0))
            numpyro.factor("room", jnp.log(total))  # NaN below zero
            numpyro.sample("y", dist.Normal(total, 1.0), obs=y_t)
            return total, None

        scan(step, 0.5, y)

    y = np.full(10, 0.3)
    tree = quiet(stays_positive, y, method=ParticleGibbs(particles=16, warmup=0), draws=200)
    assert np.isfinite(tree["sample_stats"]["lp"]).all()
    assert (np.cumsum(tree["posterior"]["x"].values, 2) > -0.5).all()


@pytest.mark.slow
def test_discrete_latents_follow_the_forward_backward_law():
    y = np.array([0.3, 1.9, 2.2, 4.1, 3.2, 0.1, 0.8, 2.5])
    moves = 0.1 + 0.7 * np.eye(3)
    likelihood = np.exp(-0.5 * (y[:, None] - 2.0 * np.arange(3)) ** 2)
    forward, backward = np.zeros((8, 3)), np.ones((8, 3))
    law = moves[0]
    for t in range(8):
        forward[t] = law * likelihood[t]
        law = forward[t] @ moves
    for t in range(6, -1, -1):
        backward[t] = moves @ (likelihood[t + 1] * backward[t + 1])
    wanted = forward * backward / np.sum(forward * backward, axis=1, keepdims=True)
    log_z = np.log(forward[-1].sum()) - 4 * np.log(2 * np.pi)
    tree = quiet(three_states, y, method=ParticleGibbs(particles=16), draws=2000, warmup=50, seed=1)
    z = tree["posterior"]["z"].values.reshape(-1, 8)
    found = np.stack([(z == k).mean(0) for k in range(3)], axis=1)
    assert np.max(np.abs(found - wanted)) < 0.03
    filtered = quiet(three_states, y, method=ParticleFilter(500, proposal=Adapted()), draws=100)
    logs = filtered["sample_stats"]["log_evidence"].values[:, 0]
    assert np.all(np.abs(logs - log_z) < 0.15)


@pytest.mark.parametrize(
    ("method", "other"),
    [
        pytest.param(
            ParticleGibbs(particles=16), ParticleGibbs(particles=16), marks=pytest.mark.slow
        ),
        (
            ParticleFilter(50, {"phi": 0.5, "q": 0.4}),
            ParticleFilter(50, {"phi": 0.6, "q": 0.3}),
        ),
    ],
    ids=["gibbs", "filter"],
)
def test_new_data_and_parameters_compile_nothing(method, other):
    quiet(model, Y, method=method, draws=20, warmup=20)
    compilations.clear()
    quiet(model, simulated(20, seed=1), method=other, draws=20, warmup=20)
    assert not compilations


def test_what_a_filter_cannot_serve_is_said_before_anything_runs():
    with pytest.raises(MethodError, match=r"values of the parameters \['phi', 'q'\]"):
        ppl.infer(model, Y, method=ParticleFilter())
    with pytest.raises(SiteError, match=r"names \['x'\]"):
        ppl.infer(known, Y, method=ParticleFilter(given={"x": 0.3}))
    with pytest.raises(SiteError, match=r"given\['q'\] has shape \(2,\)"):
        ppl.infer(model, Y, method=ParticleFilter(given={"phi": 0.5, "q": np.ones(2)}))
    with pytest.raises(MethodError, match="Adapted looks at all values"):
        ppl.infer(known, Y, method=ParticleFilter(proposal=Adapted()))
    with pytest.raises(MethodError, match=r"latents \['z'\] are discrete"):
        ppl.infer(three_states, Y, method=ParticleGibbs(proposal=LaplaceProposal()))
    for wrong in ({"particles": 1}, {"ess": 0.0}, {"moves": -1}, {"proposal": 3}):
        with pytest.raises(OptionError):
            ParticleFilter(**wrong)
    with pytest.raises(OptionError, match="particles must be"):
        ParticleGibbs(particles=1)
