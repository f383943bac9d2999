"""One function object, by NUTS and by every particle method: the same posterior."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.inference import (
    PMMH,
    PPG,
    SMC2,
    OnlineFilter,
    ParticleFilter,
    ParticleGibbs,
    ScoreAscent,
)


def linear(y):
    phi = numpyro.sample("phi", dist.Uniform(0.0, 1.0))
    q = numpyro.sample("q", dist.LogNormal(-0.7, 0.4))
    start = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, q))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, start, y)


def volatility(y):
    phi = numpyro.sample("phi", dist.Beta(20.0, 2.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.2, 0.4))
    start = numpyro.sample("x_0", dist.Normal(0.0, sigma / jnp.sqrt(1.0 - phi**2)))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, sigma))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, None

    scan(step, start, y)


def remembering(y):
    """`volatility` with a carry that remembers two steps: ancestors are sampled by replaying."""
    phi = numpyro.sample("phi", dist.Beta(20.0, 2.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.2, 0.4))
    start = numpyro.sample("x_0", dist.Normal(0.0, sigma / jnp.sqrt(1.0 - phi**2)))

    def step(window, y_t):
        x = numpyro.sample("x", dist.Normal(phi * window[0] + 0.0 * window[1], sigma))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return (x, window[0]), None

    scan(step, (start, start), y)


def series(model, size, seed):
    rng = np.random.default_rng(seed)
    x, y = 0.0, []
    for _ in range(size):
        if model is linear:
            x = 0.8 * x + 0.5 * rng.normal()
            y.append(x + 0.7 * rng.normal())
        else:
            x = 0.95 * x + 0.3 * rng.normal()
            y.append(np.exp(x / 2) * rng.normal())
    return np.array(y)


METHODS = {
    "ppg": (PPG(functional=lambda x, new, t: {"sum": new["x"]}, particles=32), 4000, 1000),
    "gibbs": (ParticleGibbs(particles=32), 4000, 1000),
    "pmmh": (PMMH(particles=100), 12000, 2000),
    "smc2": (SMC2(particles=1024, inner=100), 1024, None),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "scale"), [(linear, "q"), (volatility, "sigma")])
def test_every_method_has_the_posterior_of_nuts(model, scale):
    """Means within 0.15 sd and sds within 15%, on 60 steps."""
    y = series(model, 60, 7)
    names = ["phi", scale, "x_0"]
    nuts = quiet(model, y, method="nuts", draws=4000, seed=1)
    table = ppl.summary(nuts, names)
    for name, (method, draws, warmup) in METHODS.items():
        warm = {} if warmup is None else {"warmup": warmup}
        tree = quiet(model, y, method=method, draws=draws, seed=2, **warm)
        found = ppl.summary(tree, names)
        assert ((found["mean"] - table["mean"]).abs() < 0.15 * table["sd"]).all(), name
        assert ((found["sd"] / table["sd"] - 1).abs() < 0.15).all(), name
        if name == "ppg":
            paths = nuts["posterior"]["x"].values.sum(2)
            smoothed = ppl.smoothed(tree)
            error = np.hypot(smoothed["sum_se"].item(), convergence.mcse(paths, "mean"))
            assert abs(smoothed["sum"].item() - paths.mean()) < 4.5 * error
    given = {"phi": float(table["mean"]["phi"]), scale: float(table["mean"][scale])}
    filtered = quiet(model, y, method=ParticleFilter(1000, given=given), draws=50)
    online = OnlineFilter(model, y, method=ParticleFilter(1000, given=given)).start()
    logs = filtered["sample_stats"]["log_evidence"].values[:, 0]
    assert abs(online.log_evidence - logs.mean()) < 5 * max(logs.std(), 0.1)
    best = quiet(model, y, method=ScoreAscent(particles=32, objective="posterior"))
    sd = table["sd"][["phi", scale]]
    mode = best["estimate"].dataset.mean("chain")
    for name in ("phi", scale):  # the mode lies within two standard deviations of the mean
        assert abs(float(mode[name]) - table["mean"][name]) < 2 * sd[name]


@pytest.mark.slow
def test_ancestors_sampled_by_replaying_have_the_posterior_of_nuts():
    y = series(volatility, 60, 7)
    names = ["phi", "sigma", "x_0"]
    table = ppl.summary(quiet(volatility, y, method="nuts", draws=4000, seed=1), names)
    tree = quiet(remembering, y, method=ParticleGibbs(particles=32), draws=4000, seed=3)
    found = ppl.summary(tree, names)
    assert ((found["mean"] - table["mean"]).abs() < 0.15 * table["sd"]).all()
    assert ((found["sd"] / table["sd"] - 1).abs() < 0.15).all()


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["bootstrap", "laplace"])
def test_particle_gibbs_is_calibrated(proposal):
    """200 data sets of 12 steps; refused at family level 1e-3."""
    from ppl_toolkit.inference import LaplaceProposal

    options = {} if proposal == "bootstrap" else {"proposal": LaplaceProposal(newton=1)}
    found = ppl.calibrate(
        linear, np.zeros(12), method=ParticleGibbs(particles=8, **options), replications=200,
        seed=11, progress=False,
    )  # fmt: skip
    assert min(found.adjusted.values()) > 1e-3
