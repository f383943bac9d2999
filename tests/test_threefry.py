"""Keys whose hash is written out: the same bits as JAX's own."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet
from jax import random
from numpyro.contrib.control_flow import scan

from ppl_toolkit import convergence
from ppl_toolkit.inference import MCMC, ParticleFilter, involutive
from ppl_toolkit.threefry import serves, usual, written_out


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def both(seed):
    key = random.key(seed)
    return key, written_out(random.key_data(key))


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (0,)])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_bits(shape, width):
    for seed in (0, 2**40 + 3):
        ours, wanted = (random.bits(key, shape, f"uint{width}") for key in both(seed))
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("law", [random.normal, random.uniform, random.exponential])
def test_draws_of_many_keys_alone_and_batched(law):
    key, own = both(1)
    split, own_split = random.split(key, 5), random.split(own, 5)
    np.testing.assert_array_equal(random.key_data(split), random.key_data(own_split))
    batched = jax.jit(jax.vmap(lambda k: law(random.fold_in(k, 2), (3,))))
    np.testing.assert_array_equal(batched(split), batched(own_split))
    np.testing.assert_array_equal(batched(split)[4], law(random.fold_in(own_split[4], 2), (3,)))


@pytest.mark.parametrize("number", [0, 7, 2**32 - 1, np.int32(-3), np.uint32(2**31), True])
def test_folds(number):
    for seed in (0, 2**40 + 3):
        key, own = both(seed)
        folded, own_folded = random.fold_in(key, number), random.fold_in(own, number)
        np.testing.assert_array_equal(random.key_data(folded), random.key_data(own_folded))


@pytest.mark.parametrize("shape", [(), 1, 5, (2, 3), (0,)])
def test_splits(shape):
    for seed in (0, 2**40 + 3):
        split, own_split = (random.split(key, shape) for key in both(seed))
        np.testing.assert_array_equal(random.key_data(split), random.key_data(own_split))


def test_both_kinds_of_threefry_are_served_and_no_other():
    key, own = both(0)
    assert serves(key)
    assert serves(own)
    assert not serves(random.key(0, impl="rbg"))
    assert usual(random.key_data(own)) == key


def test_laws_that_refuse_such_keys_get_those_of_jax():
    """Poisson numbers of births, seen with an error: the filter finds them."""

    def model(y):
        def step(total, y_t):
            births = numpyro.sample("births", dist.Poisson(3.0))
            numpyro.sample("y", dist.Normal(total + births, 0.1), obs=y_t)
            return total + births, None

        scan(step, 0.0, y)

    births = np.array([2.0, 5.0, 1.0, 4.0])
    tree = quiet(model, np.cumsum(births), method=ParticleFilter(500), draws=50)
    found = tree["posterior"]["births"].values.reshape(-1, 4)
    assert np.mean(found == births) > 0.99


def test_kernels_that_draw_poisson_variates_get_keys_of_jax():
    """Steps of Poisson length up or down; 4 x 4000 draws, the mean within 4.5 standard errors."""

    def model():
        numpyro.sample("x", dist.Normal(2.0, 1.0))

    def choices(position, target):
        numpyro.sample("length", dist.Poisson(2.0))
        numpyro.sample("up", dist.Bernoulli(0.5))

    def walk(x, v, target):
        moved = x["x"] + 0.7 * (2 * v["up"] - 1) * v["length"]
        return {**x, "x": moved}, {**v, "up": 1 - v["up"]}

    tree = quiet(model, method=MCMC(involutive(choices, walk)), draws=4000, seed=1)
    x = tree["posterior"]["x"].values
    assert abs(x.mean() - 2.0) < 4.5 * convergence.mcse(x)
    assert abs(x.std() - 1.0) < 4.5 * convergence.mcse(x, "sd")
