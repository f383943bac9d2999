"""What warm-up learns, and what it costs, by whole runs."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet

import ppl_toolkit as ppl

RNG = np.random.default_rng(0)
X = np.stack([RNG.normal(20.0, 1.0, 100), RNG.normal(100.0, 15.0, 100)], axis=1)  # uncentred
Y = 3.0 + X @ [2.0, 0.1] + RNG.normal(size=100)


def line(x, y=None):
    level = numpyro.sample("level", dist.Normal(0.0, 100.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(5.0))
    numpyro.sample("y", dist.Normal(level + x @ slopes, noise), obs=y)


def least_ess(tree):
    return float(ppl.summary(tree)["ess_bulk"].min())


def test_correlation_is_learned_from_few_gradients():
    """One sixth of the gradients of the diagonal metric, for more effective draws."""
    found = quiet(line, X, y=Y, seed=1)
    plain = quiet(line, X, y=Y, seed=1, method=ppl.NUTS(metric="diagonal"), draws=300)
    assert found.attrs["n_gradient_evaluations_warmup"] < 25_000
    per_draw = [tree.attrs["n_gradient_evaluations"] / tree["posterior"].sizes["draw"]
                for tree in (found, plain)]  # fmt: skip
    assert per_draw[0] < per_draw[1] / 6
    assert least_ess(found) > 2000
    assert found.attrs["iteration"] == found.attrs["warmup"] + 1000
    acceptance = float(found["sample_stats"]["acceptance_rate"].mean())
    assert 0.74 < acceptance < 0.9
    steps = found["sample_stats"]["step_size"].values
    first = found.attrs["warmup"]  # draws are counted with the warm-up
    careful = (first + np.arange(steps.shape[1])) % 16 == 15
    assert len(np.unique(steps[:, ~careful])) == 1  # the same for all chains
    np.testing.assert_allclose(steps[:, careful], 0.5 * steps[0, ~careful][0], rtol=1e-14)


def test_a_chain_that_starts_far_away_arrives():
    start = {
        "level": np.array([3.0, 3.0, 3.0, 1e5]),
        "slopes": np.tile([2.0, 0.1], (4, 1)),
        "noise": np.ones(4),
    }
    found = quiet(line, X, y=Y, seed=2, init=start)
    assert float(ppl.summary(found)["r_hat"].max()) < 1.02


def test_one_chain_is_enough():
    found = quiet(line, X, y=Y, seed=3, chains=1)
    assert least_ess(found) > 400
    assert found.attrs["n_gradient_evaluations_warmup"] < 25_000


@pytest.mark.parametrize("warmup", [1, 5, 19, 20, 60])
def test_short_warm_ups_are_kept_to(warmup):
    found = quiet(line, X, y=Y, seed=4, warmup=warmup, draws=5)
    assert found.attrs["iteration"] == warmup + 5
    assert np.isfinite(found["posterior"]["slopes"]).all()


def test_a_stretched_direction_of_many():
    dim, long = 60, np.zeros(60)
    long[[3, 40]] = 0.6, -0.8
    precision = np.eye(dim) - (1.0 - 1.0 / 400.0) * np.outer(long, long)

    def density(x, precision):
        return -0.5 * x @ precision @ x

    found = quiet(density, precision, init=np.zeros(dim), seed=5)
    state = found["sampler_state"].dataset
    stretch = next(np.asarray(v) for name, v in state.items() if str(name).endswith("stretch"))
    assert stretch.shape[1] == 8
    assert np.abs(stretch).max() > 2.0  # the scales of its elements do the rest
    draws = np.asarray(found["posterior"]["x"]).reshape(-1, dim)
    along = draws @ long
    spread = np.std(along.reshape(4, -1), axis=1)
    assert np.abs(along.std() / 20.0 - 1.0) < 0.1
    assert spread.max() / spread.min() < 1.4
    assert found["sample_stats"]["n_steps"].mean() < 40


def test_two_peaks_stay_two_peaks():
    """Chains in peaks of one height are not moved to one of them."""

    def peaks():
        x = numpyro.sample("x", dist.Normal(0.0, 100.0))
        log_density = jnp.logaddexp(-0.5 * (x - 20.0) ** 2, -0.5 * (x + 20.0) ** 2)
        numpyro.factor("peaks", log_density)

    found = quiet(peaks, init={"x": np.array([-20.0, 20.0, -20.0, 20.0])}, seed=6)
    signs = np.sign(np.asarray(found["posterior"]["x"]))
    np.testing.assert_array_equal(signs.mean(1), [-1.0, 1.0, -1.0, 1.0])
