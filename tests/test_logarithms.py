"""Logarithms of exponentials are left out: the same numbers, and right where those overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet

from ppl_toolkit.logarithms import without_logs_of_exps
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import Traced, inner_jaxprs

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))
COUNTS = RNG.poisson(np.exp(X @ np.array([0.3, -0.2, 0.5])))


def log_linear(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Poisson(jnp.exp(x @ b)), obs=y)


def names(jaxpr):
    inner = [getattr(part, "jaxpr", part) for part in inner_jaxprs(jaxpr)]
    return [e.primitive.name for e in jaxpr.eqns] + [n for part in inner for n in names(part)]


def simplified(function, x):
    traced = Traced.of(function, x)
    return traced, without_logs_of_exps(traced, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.log(jnp.exp(x)),
        lambda x: jnp.log(jnp.exp(x).reshape(6, 10).T),
        lambda x: jnp.log(jnp.broadcast_to(jnp.exp(x)[:, None], (60, 2))) * jnp.arange(2.0),
        lambda x: jnp.log(jnp.exp(jnp.log(jnp.exp(x)))),
        lambda x: jnp.exp(x) + jnp.log(jnp.exp(x)),  # the exponential is used elsewhere too
    ],
    ids=["plain", "rearranged", "broadcast", "twice", "kept"],
)
def test_the_same_numbers_without_logarithms(function):
    x = X[:, 0].astype(np.float32)
    traced, simpler = simplified(function, x)
    assert "log" not in names(simpler.jaxpr)
    np.testing.assert_allclose(simpler((), x), traced((), x), rtol=1e-5, atol=1e-6)
    weights = np.cos(np.arange(np.size(traced((), x)))).reshape(np.shape(traced((), x)))
    ours, theirs = (
        jax.grad(lambda z, f=f: jnp.sum(weights * f((), z)))(x) for f in (simpler, traced)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.log(jnp.exp(x) + 1.0),
        lambda x: jnp.log(2.0 * jnp.exp(x)),
        lambda x: jnp.log(jnp.exp(x).astype(jnp.float16)),  # a rounding that was asked for
        lambda x: jnp.log(jnp.exp(x[:5])),
        lambda x: jnp.log(x**2),
    ],
    ids=["sum", "product", "rounded", "few", "no exponential"],
)
def test_others_stay(function):
    traced, simpler = simplified(function, X[:, 0].astype(np.float32))
    assert simpler is traced


def test_counts_with_log_linear_means():
    program = Program(log_linear, (X,), {"y": COUNTS})
    with program.context():
        traced = program.traced("log_density")
        assert not any(
            e.primitive.name == "log" and e.outvars[0].aval.size == 60 for e in traced.jaxpr.eqns
        )
        for b in (np.zeros(3), np.array([0.3, -1.2, 2.0])):

            def theirs(b):
                return (
                    dist.Poisson(jnp.exp(X @ b)).log_prob(COUNTS).sum()
                    + dist.Normal(0.0, 1.0).log_prob(b).sum()
                )

            expected = jax.value_and_grad(theirs)(b)
            found = jax.value_and_grad(lambda x: traced(traced.consts, x, program.data))(b)
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-11, atol=1e-11)


def test_rates_that_vanish_keep_a_gradient():
    x = np.abs(X)
    program = Program(log_linear, (x,), {"y": COUNTS})
    with program.context():
        traced = program.traced("log_density")
        low = np.array([-300.0, 0.0, 0.0])  # some of the rates are zero to rounding
        value, gradient = jax.value_and_grad(lambda x: traced(traced.consts, x, program.data))(low)
    eta = x @ low
    assert np.exp(eta).min() < 1e-150
    assert np.isfinite(value)
    expected = x.T @ (COUNTS - np.exp(eta)) - low
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


def test_through_infer_against_newton():
    """The posterior is nearly normal: its mode and curvature bound mean and deviations."""
    tree = quiet(log_linear, X, y=COUNTS, seed=1)
    b = np.zeros(3)
    for _ in range(30):
        rate = np.exp(X @ b)
        curvature = (X * rate[:, None]).T @ X + np.eye(3)
        b = b + np.linalg.solve(curvature, X.T @ (COUNTS - rate) - b)
    sd = np.sqrt(np.diag(np.linalg.inv(curvature)))
    draws = tree["posterior"]["b"].values.reshape(-1, 3)
    assert np.all(np.abs(draws.mean(0) - b) < 0.2 * sd)  # skewness, and 0.02 of Monte Carlo error
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.1)
