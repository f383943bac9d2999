"""Predictions of models with discrete sites and with series."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet
from numpyro.contrib.control_flow import scan
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError, SiteError

# --- discrete sites that were summed out --------------------------------------------------------

Y = np.array([-0.2, 1.1, 3.3, 2.0])
WEIGHT = 0.3


def mixture(y=None, rows=4):
    """A mixture of two known components, so that the law of every label is known."""
    m = numpyro.sample("m", dist.Normal(0.0, 1e-3))  # all but known
    with numpyro.plate("row", rows):
        z = numpyro.sample("z", dist.Bernoulli(WEIGHT))
        numpyro.sample("y", dist.Normal(m + 3.0 * z, 1.0), obs=y)


@pytest.fixture(scope="module")
def mixed():
    return quiet(mixture, Y, draws=1000, seed=1)


def test_labels_are_drawn_given_the_data(mixed):
    """Replicated data of a row come from its own component: mean 3 p(z = 1 | y). 4 sigma."""
    y = np.asarray(ppl.predict(mixed, mixture, Y, seed=2)["posterior_predictive"]["y"])
    one, zero = WEIGHT * stats.norm.pdf(Y, 3.0), (1 - WEIGHT) * stats.norm.pdf(Y)
    p = one / (one + zero)
    sd = np.sqrt(1 + 9 * p * (1 - p))
    draws = y.shape[0] * y.shape[1]
    assert (np.abs(y.mean(axis=(0, 1)) - 3 * p) < 4 * sd / np.sqrt(draws)).all()


def test_labels_of_new_rows_come_from_the_model(mixed):
    for how in ({"rows": 6}, {"rows": 6, "resample": ["z"]}):
        tree = ppl.predict(mixed, mixture, seed=3, **how)
        y, z = (np.asarray(tree["predictions"][name]) for name in ("y", "z"))
        draws = y.shape[0] * y.shape[1]
        assert y.shape[2] == 6
        bound = 4 * np.sqrt(WEIGHT * (1 - WEIGHT) / draws)
        assert (np.abs(z.mean(axis=(0, 1)) - WEIGHT) < bound).all()
        assert abs((y - 3 * z).std() - 1) < 4 / np.sqrt(2 * y.size)


def test_labels_can_be_drawn_from_the_model_for_the_same_data(mixed):
    tree = ppl.predict(mixed, mixture, Y, resample="z", seed=4)
    z = np.asarray(tree["predictions"]["z"])
    bound = 4 * np.sqrt(WEIGHT * (1 - WEIGHT) / z[..., 0].size)
    assert (np.abs(z.mean(axis=(0, 1)) - WEIGHT) < bound).all()


def test_labels_of_a_chain_are_refused_with_the_way_out():
    """funsor cannot sample backwards through a scan."""

    def chain(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0).expand([2]).to_event(1))

        def step(z, y_t):
            z = numpyro.sample("z", dist.Bernoulli(jnp.where(z == 1, 0.8, 0.2)))
            numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y_t)
            return z, None

        scan(step, 0, y)

    tree = quiet(chain, Y, draws=20, warmup=20)
    with pytest.raises(MethodError, match=r"(?s)'z'.*resample=\['z'\]"):
        ppl.predict(tree, chain, Y)
    drawn = ppl.predict(tree, chain, Y, resample=["z"])["predictions"]
    assert drawn["y"].shape == (4, 20, 4)


# --- series -------------------------------------------------------------------------------------

STEP, NOISE = 0.5, 0.1
PATH = np.linspace(0.0, 10.0, 30)


def walk(length, y=None):
    """A random walk seen with little noise."""

    def step(x, t):
        x = numpyro.sample("x", dist.Normal(x, STEP))
        numpyro.sample("y", dist.Normal(x, NOISE))
        return x, None

    with numpyro.handlers.condition(data={} if y is None else {"y": y}):
        scan(step, 0.0, jnp.arange(length))


def test_a_series_is_continued_from_where_it_ended():
    """Forecast of a random walk: mean the last state, variance k STEP^2 + NOISE^2. 4 sigma."""
    tree = quiet(walk, 30, y=PATH, seed=1)
    ahead = ppl.predict(tree, walk, 35, seed=2)["predictions"]
    x = np.asarray(tree["posterior"]["x"])
    assert ahead["x"].shape == (4, 1000, 35)
    np.testing.assert_array_equal(ahead["x"][..., :30], x)
    steps = np.diff(np.asarray(ahead["x"])[..., 29:], axis=-1)
    draws = steps[..., 0].size
    assert (np.abs(steps.mean(axis=(0, 1))) < 4 * STEP / np.sqrt(draws)).all()
    assert (np.abs(steps.std(axis=(0, 1)) - STEP) < 4 * STEP / np.sqrt(2 * draws)).all()
    residual = np.asarray(ahead["y"]) - np.asarray(ahead["x"])
    assert abs(residual.std() - NOISE) < 4 * NOISE / np.sqrt(2 * residual.size)


def test_a_shorter_series_is_refused():
    tree = quiet(walk, 30, y=PATH, draws=20, warmup=20)
    with pytest.raises(SiteError, match=r"\(30,\).*\(20,\)"):
        ppl.predict(tree, walk, 20)


# --- labels -------------------------------------------------------------------------------------


def rows(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def test_new_rows_do_not_take_the_labels_of_the_old_ones():
    x = np.arange(4.0)
    days = np.array(["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04"], "datetime64[ns]")
    tree = quiet(rows, x, y=x, coords={"row": days}, draws=20, warmup=20)
    same = ppl.predict(tree, rows, x, y=x)["posterior_predictive"]
    np.testing.assert_array_equal(same["row"], days)
    new = ppl.predict(tree, rows, x + 100)["predictions"]
    assert list(new["row"].values) == [0, 1, 2, 3]


def test_a_static_argument_that_changes_the_model_makes_predictions():
    def offset(high, x):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(m + (100.0 if high else 0.0), 1.0), obs=x)

    tree = quiet(offset, False, np.zeros(3), draws=20, warmup=20)
    assert "posterior_predictive" in ppl.predict(tree, offset, False, np.zeros(3)).children
    assert "predictions" in ppl.predict(tree, offset, True, np.zeros(3)).children
