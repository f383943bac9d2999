"""Log probabilities of whole sites equal the sums over their elements."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from ppl_toolkit.fused import sum_log, total_log_prob
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import _has_rules

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 3000])
@pytest.mark.parametrize("largest", [2.0, 3.0, 100.0, 1e30])
def test_sum_of_logarithms(n, largest):
    x = RNG.uniform(0.5, 1.0, n) * largest
    np.testing.assert_allclose(sum_log(x, largest), np.sum(np.log(x)), rtol=1e-13, atol=1e-13)
    full = sum_log(np.full(n, largest), largest)  # the product does not overflow
    np.testing.assert_allclose(full, n * np.log(largest), rtol=1e-13)


def test_single_precision_does_not_overflow():
    x = np.full(1000, 2.0, np.float32)
    assert sum_log(x, 2.0).dtype == np.float32
    np.testing.assert_allclose(sum_log(x, 2.0), 1000 * np.log(2.0), rtol=1e-6)


def test_zero_has_no_logarithm():
    assert sum_log(np.array([1.0, 0.0, 2.0]), 2.0) == -np.inf


def test_derivatives_of_the_sum():
    x = RNG.uniform(1.0, 2.0, 300)
    np.testing.assert_allclose(jax.grad(lambda x: sum_log(x, 2.0))(x), 1.0 / x, rtol=1e-15)
    second = jax.jvp(jax.grad(lambda x: sum_log(x, 2.0)), (x,), (np.ones(300),))[1]
    np.testing.assert_allclose(second, -1.0 / x**2, rtol=1e-14)


def message(fn, value, scale=None):
    return {"fn": fn, "value": value, "scale": scale, "intermediates": []}


def bernoulli(shape=(100,)):
    return dist.Bernoulli(logits=RNG.normal(0.0, 5.0, shape)), RNG.integers(0, 2, shape)


def mixture(n=100, k=3):
    mixing = dist.Categorical(probs=RNG.dirichlet(np.ones(k)))
    fn = dist.MixtureSameFamily(mixing, dist.Normal(RNG.normal(size=k), 0.1 + RNG.random(k)))
    return fn.expand([n]), RNG.normal(0.0, 3.0, n)


def general(n=100):
    mixing = dist.Categorical(probs=np.array([0.3, 0.7]))
    parts = [dist.Normal(0.0, 1.0), dist.StudentT(3.0, 1.0, 2.0)]
    return dist.MixtureGeneral(mixing, parts).expand([n]), RNG.normal(0.0, 50.0, n)


def empty_component(n=100):
    mixing = dist.Categorical(probs=np.array([0.0, 0.4, 0.6]))
    fn = dist.MixtureSameFamily(mixing, dist.Normal(np.arange(3.0), 1.0))
    return fn.expand([n]), RNG.normal(size=n)


def impossible(n=100):
    mixing = dist.Categorical(probs=np.array([0.4, 0.6]))
    parts = dist.Beta(np.array([2.0, 3.0]), 2.0, validate_args=False)
    fn = dist.MixtureSameFamily(mixing, parts, validate_args=False)
    return fn.expand([n + 1]), np.append(RNG.uniform(0.0, 1.0, n), 0.0)


def unchecked(logits):
    return dist.Bernoulli(logits=logits, validate_args=False)


SITES = {
    "logits": bernoulli(),
    "a table": bernoulli((20, 7)),
    "one logit": (dist.Bernoulli(logits=np.array(0.3)).expand([50]), bernoulli((50,))[1]),
    "an event": (bernoulli()[0].to_event(1), bernoulli()[1]),
    "a column": (dist.Bernoulli(logits=RNG.normal(size=(20, 1))), bernoulli((20, 7))[1]),
    "far logits": (dist.Bernoulli(logits=np.repeat([1000.0, -1000.0], 40)), np.repeat([1, 0], 40)),
    "outside the support": (bernoulli()[0], np.repeat([0, 2], 50)),
    "infinite logits": (unchecked(np.repeat([np.inf, -np.inf], 40)), np.repeat([1, 0], 40)),
    "wrong for certain": (unchecked(np.repeat([np.inf, 0.0], 40)), np.zeros(80, int)),
    "counts": (dist.Poisson(np.exp(RNG.normal(size=100))), RNG.poisson(1.0, 100)),
    "one rate": (dist.Poisson(2.5).expand([50]), RNG.poisson(2.0, 50)),
    "no rate": (
        dist.Poisson(np.repeat([0.0, 1.0], 20), validate_args=False), np.repeat([0, 2], 20)
    ),
    "impossible counts": (dist.Poisson(np.ones(40), validate_args=True), np.repeat([-1, 2], 20)),
    "probabilities": (dist.Bernoulli(probs=RNG.random(50)), bernoulli((50,))[1]),
    "masked": (bernoulli()[0].mask(RNG.random(100) < 0.5), bernoulli()[1]),
    "mixture": mixture(),
    "mixture of many": mixture(k=120),
    "mixture, far away": (mixture()[0], np.linspace(-1e6, 1e6, 100)),
    "general mixture": general(),
    "a component without weight": empty_component(),
    "impossible under all": impossible(),
    "few": bernoulli((3,)),
    "one value for several": (bernoulli((50, 3))[0], bernoulli((50, 1))[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("scale", [None, 2.5])
def test_whole_sites(name, scale):
    fn, value = SITES[name]
    total = total_log_prob(message(fn, value, scale))
    assert total.shape == ()
    elements = np.asarray(fn.log_prob(value)) * (scale or 1.0)
    np.testing.assert_allclose(total, np.sum(elements), rtol=1e-13, atol=1e-13)


def test_scales_of_single_elements_are_kept():
    fn, value = SITES["logits"]
    scale = RNG.random(100)
    expected = np.sum(scale * np.asarray(fn.log_prob(value)))
    np.testing.assert_allclose(total_log_prob(message(fn, value, scale)), expected, rtol=1e-13)


def gradients(fn_of, value, at):
    plain = jax.grad(lambda x: jnp.sum(fn_of(x).log_prob(value)))(at)
    fused = jax.grad(lambda x: total_log_prob(message(fn_of(x).expand(value.shape), value)))(at)
    return plain, fused


def test_gradients():
    y = bernoulli()[1]
    design = RNG.normal(size=(100, 3))
    plain, fused = gradients(lambda b: dist.Bernoulli(logits=design @ b), y, np.ones(3))
    np.testing.assert_allclose(fused, plain, rtol=1e-12)

    def normals(parts):
        mixing = dist.Categorical(logits=parts[0])
        return dist.MixtureSameFamily(mixing, dist.Normal(parts[1], jnp.exp(parts[2])))

    plain, fused = gradients(normals, RNG.normal(size=200), RNG.normal(size=(3, 4)))
    np.testing.assert_allclose(fused, plain, rtol=1e-12)
    assert not np.isnan(gradients(
        lambda w: dist.MixtureSameFamily(dist.Categorical(probs=w), dist.Normal(np.arange(2.0), 1)),
        RNG.normal(size=50), np.array([0.0, 1.0]),
    )[1][0])  # fmt: skip


def logistic(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=b * x), obs=y)


def test_the_rule_needs_no_trace_of_derivatives():
    """The text of a program's jaxpr tells the computation: its rule follows from it."""
    program = Program(logistic, (RNG.normal(size=60),), {"y": bernoulli((60,))[1]})
    traced = program.traced("log_density")
    assert "_by_products" in str(traced.jaxpr) or "custom_jvp" in str(traced.jaxpr)
    assert not _has_rules(traced.jaxpr)
