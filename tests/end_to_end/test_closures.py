"""Arrays and rules hidden in helper functions: no model may run with those of another."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, others_slow

import ppl_toolkit as ppl
from ppl_toolkit.errors import DataBakedWarning, InferenceWarning

Y = np.random.default_rng(0).normal(1.0, 1.0, 20)


def infer(model, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        warnings.simplefilter("ignore", DataBakedWarning)
        return ppl.infer(model, *args, draws=200, warmup=100, chains=2, progress=False)


def jitted(w):
    return jax.jit(lambda x: x + w)


def scanned(w):
    def add(x):
        return jax.lax.scan(lambda c, w_i: (c, x + w_i), 0.0, w)[1]

    return jax.jit(add)


def custom_jvp(w):
    @jax.custom_jvp
    def add(x):
        return x + w

    add.defjvp(lambda primals, tangents: (add(*primals), tangents[0] * jnp.ones_like(w)))
    return add


def custom_vjp(w):
    @jax.custom_vjp
    def add(x):
        return x + w

    add.defvjp(lambda x: (x + w, None), lambda _, g: (jnp.sum(g),))
    return add


@pytest.mark.parametrize("make", others_slow([jitted, scanned, custom_jvp, custom_vjp], custom_jvp))
def test_arrays_closed_over_by_inner_functions_are_not_shared(make):
    """y = mu + w + noise: the mean of mu is that of y - w, whatever ran before. 5 sigma."""

    def model_with(shift):
        add = make(np.full(20, shift))

        def model(y):
            mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
            with numpyro.plate("row", y.shape[0]):
                numpyro.sample("y", dist.Normal(add(mu), 1.0), obs=y)

        return model

    hashes = set()
    for shift in (5.0, 0.0):
        tree = infer(model_with(shift), Y)
        expected = (Y - shift).sum() / (20 + 1 / 100)
        assert abs(float(tree["posterior"]["mu"].mean()) - expected) < 5 * 20**-0.5 / np.sqrt(60)
        drawn = ppl.predict(tree, model_with(shift), Y)["posterior_predictive"]["y"]
        assert abs(float(drawn.mean()) - Y.mean()) < 0.2
        hashes.add((tree.attrs["model_hash"], tree.attrs["data_hash"]))
    assert len(hashes) == 2


def test_derivative_rules_are_not_shared():
    """The same function with another rule: the sampler must use its own."""

    def model_with(slope):
        @jax.custom_jvp
        def same(x):
            return 1.0 * x

        same.defjvp(lambda primals, tangents: (same(*primals), slope * tangents[0]))

        def model(y):
            mu = same(numpyro.sample("mu", dist.Normal(0.0, 10.0)))
            numpyro.sample("y", dist.Normal(mu, 1.0).expand([20]).to_event(1), obs=y)

        return model

    rates = [
        float(infer(model_with(slope), Y)["sample_stats"]["step_size"].mean())
        for slope in (1.0, -0.3, 1.0)
    ]
    assert rates[0] == rates[2] != rates[1]


def test_library_functions_with_rules_of_their_own_compile_once():
    """relu, softplus and logsumexp carry rules; a second call must not compile again."""

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
        mean = jax.nn.relu(w[0] * x) + jax.nn.softplus(w[1] * x) + jax.nn.logsumexp(w)
        with numpyro.plate("row", 20):
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x = np.linspace(-1, 1, 20)
    infer(model, x, Y)
    compilations.clear()
    infer(model, 2 * x, Y + 1)
    assert compilations == []
