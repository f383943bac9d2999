"""Keys whose hash is written out: the same bits as JAX's own."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet
from jax import random
from numpyro.contrib.control_flow import scan

from ppl_toolkit.inference import ParticleFilter
from ppl_toolkit.threefry import serves, written_out


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


def test_other_generators_are_left_alone():
    assert serves(random.key(0))
    assert not serves(random.key(0, impl="rbg"))
    assert not serves(both(0)[1])


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
