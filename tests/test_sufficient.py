"""Likelihoods of normal observations by sufficient statistics equal those by all observations."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet
from numpyro.infer.reparam import LocScaleReparam

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.engine import Engine
from ppl_toolkit.linearity import PRODUCT, Linearity, inlined
from ppl_toolkit.program import Program
from ppl_toolkit.sufficient import reduced

RNG = np.random.default_rng(0)
N = 200
X = RNG.normal(size=(N, 3)) + 5.0
Y = X @ [1.0, -2.0, 0.5] + RNG.normal(size=N)
GROUP = RNG.integers(0, 4, N)


def regression(x, y=None):
    a = numpyro.sample("a", dist.Normal(0.0, 10.0))
    b = numpyro.sample("b", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(a + x @ b, sigma), obs=y)


def by_elements(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = b[0] + (x[:, 0] - x[:, 0].mean()) * b[1] / 2.0 - b[2] * jnp.log(x[:, 1] ** 2)
    numpyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y)


def groups(group, x, y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("group", 4):
        alpha = numpyro.sample("alpha", dist.Normal(mu, tau))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", group.shape[0]):
        numpyro.sample("y", dist.Normal(alpha[group] + slope * x[:, 0], sigma), obs=y)


def known_errors(x, error, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ jnp.exp(b), error), obs=y)


def constant(y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def singular(x, y=None):
    return regression(jnp.concatenate([x, x[:, :1]], 1), y)


def two_sites(x, y, z):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    numpyro.sample("y", dist.Normal(x @ b, sigma), obs=y)
    numpyro.sample("z", dist.Normal(jnp.sin(x @ b), sigma), obs=z)


def where(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    mean = jnp.where(x[:, 0] > 5.0, b[0], b[1])
    numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


centred = numpyro.handlers.reparam(groups, config={"alpha": LocScaleReparam(0)})
ERRORS = RNG.uniform(0.5, 2.0, N)
REDUCIBLE = {
    "regression": (regression, (X, Y), (4, 4 + 1)),
    "by elements": (by_elements, (X, Y), (3, 4)),
    "groups": (groups, (GROUP, X, Y), (5, 6)),
    "groups, non-centred": (centred, (GROUP, X, Y), (5, 6)),
    "known errors": (known_errors, (X, ERRORS, Y), (3, 4)),
    "a constant": (constant, (Y,), (1, 2)),
    "dependent columns": (singular, (X, Y), (5, 6)),
    "beside a curved mean": (two_sites, (X, Y, Y), (3, 4)),
    "cases": (where, (X, Y), (2, 3)),
}


def both(program, position):
    """Value and gradient: by all observations, and by statistics."""
    found, full = reduced(program), program.traced("log_density")
    with program.context():
        data = (*program.data, *found.statistics(program.data))
        plain = jax.value_and_grad(lambda u: full(full.consts, u, program.data))(position)
        short = jax.value_and_grad(lambda u: found.traced(found.traced.consts, u, data))(position)
        return jax.tree.map(np.asarray, (plain, short))


@pytest.mark.parametrize("name", REDUCIBLE)
def test_equal_to_all_observations(name):
    model, args, (parameters, columns) = REDUCIBLE[name]
    program = Program(model, args)
    with program.context():
        triangle, constant = reduced(program).statistics(program.data)
    assert triangle.shape == (columns, columns)
    assert constant.shape == ()
    assert parameters == columns - 1
    for position in np.random.default_rng(1).normal(size=(3, program.size)):
        plain, short = both(program, position)
        for a, b in zip(plain, short, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11 * np.max(np.abs(a)))


def test_nothing_is_lost_to_cancellation():
    """The regressors lie far from zero and nearly on a line: X'X has condition number 1e17."""
    year = np.arange(N) + 1e5
    program = Program(regression, (np.stack([year, year**2 / 1e5, X[:, 0]], 1), 1e3 + Y))
    best, *_ = np.linalg.lstsq(np.column_stack([np.ones(N), *program.data[0].T]), 1e3 + Y)
    position = np.append(best, 0.0)
    plain, short = both(program, position)
    np.testing.assert_allclose(short[0], plain[0], rtol=1e-9)


def curved(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(jnp.sin(b * x[:, 0]), 1.0), obs=y)


def products(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[0]]).to_event(1))
    numpyro.sample("y", dist.Normal(w, 1.0), obs=y)


def several_sigmas(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(b * x[:, 0], jnp.where(x[:, 1] > 5.0, *sigma)), obs=y)


def masked(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.handlers.mask(mask=x[:, 1] > 5.0):
        numpyro.sample("y", dist.Normal(b * x[:, 0], 1.0), obs=y)


def scaled(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.handlers.scale(scale=2.0):
        numpyro.sample("y", dist.Normal(b * x[:, 0], 1.0), obs=y)


def robust(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.StudentT(4.0, b * x[:, 0], 1.0), obs=y)


@pytest.mark.parametrize("model", [curved, products, several_sigmas, masked, scaled, robust])
def test_others_stay_as_they_are(model):
    assert reduced(Program(model, (X, Y))) is None


def test_a_few_observations_stay():
    assert reduced(Program(regression, (X[:20], Y[:20]))) is None


def roots_of(function, *args):
    closed = jax.make_jaxpr(inlined(function, *args))(*args)
    linearity = Linearity(closed.jaxpr)
    (out,) = closed.jaxpr.outvars
    return [v.aval.shape for v in linearity.roots(out)], linearity, out


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda u, x: x @ u, [(3,)]),
        (lambda u, x: x @ jnp.exp(u), [(3,)]),
        (lambda u, x: u[0] * x[:, 0] + u[1], [(1,), (1,)]),
        (lambda u, x: u[0] * u[1] * x[:, 0], [()]),
        (lambda u, x: jnp.take(u, jnp.arange(200) % 3), [(3,)]),
        (lambda u, x: (x @ u) ** 2, [(200,)]),
        (lambda u, x: jnp.cumsum(x @ u) / (1.0 + x[:, 1] ** 2), [(3,)]),
        (lambda u, x: x[:, 0] / u[0], [(200,)]),
        (lambda u, x: (x @ u) * (x[:, ::-1] @ u), [(200,)]),
        (lambda u, x: jnp.where(x[:, 0] > u[0], u[1], 0.0), [(200,)]),
        (lambda u, x: jnp.linalg.norm(u) * x[:, 0], [()]),
    ],
)
def test_roots(function, shapes):
    with jax.enable_x64(True):
        found, *_ = roots_of(function, np.ones(3), X)
    assert [int(np.prod(s)) for s in found] == [int(np.prod(s)) for s in shapes]


def test_cost_counts_what_is_done():
    with jax.enable_x64(True):
        _, linearity, out = roots_of(lambda u, x: x @ u + 1.0, np.ones(3), X)
        assert linearity.cost(out, linearity.roots(out)) == 200 * 3 * PRODUCT + 200


def test_posterior_and_new_data_without_compilation():
    """Through `infer`: the exact posterior mean; other data of the same shapes compile nothing."""

    def known(x, y=None):
        b = numpyro.sample("b", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    compiled = []
    for data in (Y, Y[::-1].copy() + 1.0):
        before = len(compilations)
        posterior = quiet(known, X, data, draws=500, seed=1)
        compiled.append(len(compilations) - before)
        precision = X.T @ X + np.eye(3) / 100.0
        exact = np.linalg.solve(precision, X.T @ data)
        draws = posterior["posterior"]["b"]
        error = draws.mean(("chain", "draw")) - exact
        mcse = convergence.mcse(draws.values)
        assert np.all(np.abs(error.values) < 4.5 * mcse)  # fails once in 50,000 runs
        lp = posterior["sample_stats"]["lp"].values[0, -1]
        last = draws.values[0, -1]
        expected = np.sum(dist.Normal(X @ last, 1.0).log_prob(data))
        expected += np.sum(dist.Normal(0.0, 10.0).log_prob(last))
        np.testing.assert_allclose(lp, expected, rtol=1e-5)
    assert compiled[1] == 0


def test_engines_take_statistics_of_their_own_data():
    program = Program(regression, (X, Y))
    engine = Engine(program, ppl.NUTS(), 1, jax.devices()[:1])
    assert [np.shape(x) for x in engine.data[2:]] == [(5, 5), ()]
    other = engine.given((X, Y + 1.0))
    assert not np.allclose(other[2], engine.data[2])
