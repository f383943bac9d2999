"""Particle marginal Metropolis-Hastings: correlated estimates, and the number of particles.

Seeds are fixed. Where a bound is statistical, its false-alarm rate over seeds is said.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet
from jax import random
from linear_series import exact, log_likelihood, series, simulated
from numpyro.contrib.control_flow import scan
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import PMMH, LaplaceProposal
from ppl_toolkit.inference.correlated_filter import (
    CorrelatedEstimate,
    correlated,
    from_normals,
    sorted_filter,
)
from ppl_toolkit.inference.particle_filter import Filter, follow
from ppl_toolkit.inference.state_space import state_space
from ppl_toolkit.inference.tuned_particles import tuned_particles
from ppl_toolkit.program import Program


def at(phi, q):
    """The unconstrained position of parameters of the series."""
    return {"phi": jnp.log((1 + phi) / (1 - phi)), "q": jnp.log(q)}


Y = simulated(25)


def agrees(tree, wanted, names, most=0.15):
    """Means within 0.15 sd, or what is given, sds within that share: 4.5 standard errors at least.

    The standard errors are asserted: at most one in 1000 seeds fails.
    """
    table = ppl.summary(tree, names)
    assert (table["mcse_mean"] < most / 4.5 * table["sd"]).all()
    for name in names:
        mean, sd = wanted[name]
        x = tree["posterior"][name].values
        x = x.reshape(-1, *x.shape[2:])
        if np.any(np.abs(x.mean(0) - mean) > most * sd) or np.any(np.abs(x.std(0) / sd - 1) > most):
            return False
    return True


# -- filters that are functions of normal variates -------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    program = Program(series, (Y,))
    with program.context():
        yield (
            program,
            state_space(program),
            CorrelatedEstimate.of(program, state_space(program), 16),
        )


def pairs(linear, correlation, count, seed=1):
    """log Z_hat at a likely point, and near it from variates near the first ones, (2, count)."""
    program, space, estimate = linear

    def log_z(position, variates):
        return sorted_filter(space.at(program, position, program.data), variates)[0].log_evidence

    @jax.jit
    @jax.vmap
    def both(key):
        first, second = random.split(key)
        old = estimate.variates(first)
        new = correlated(second, old, correlation)
        return log_z(at(0.76, 0.62), old), log_z(at(0.79, 0.7), new)

    return np.array(both(random.split(random.key(seed), count)))


def test_correlated_estimates_are_unbiased_and_their_errors_cancel(linear):
    """|z| <= 4.5 for the means: wrongly fails with probability 1e-5."""
    change = log_likelihood(Y, 0.79, 0.7) - log_likelihood(Y, 0.76, 0.62)
    spread = {}
    for rho in (0.0, 0.99):
        old, new = pairs(linear, rho, 2000)
        for logs, (phi, q) in ((old, (0.76, 0.62)), (new, (0.79, 0.7))):
            ratio = np.exp(logs - log_likelihood(Y, phi, q))
            assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / np.sqrt(ratio.size)
        spread[rho] = (new - old - change).std()
    print(f"sd of the change of log Zhat: {spread[0.0]:.2f}, correlated {spread[0.99]:.2f}")
    assert spread[0.0] > 1.5
    assert spread[0.99] < 0.6
    assert abs(old.std() / new.std() - 1.0) < 0.25  # of the same law


LAWS = [
    (dist.Normal(1.0, 2.0), stats.norm(1, 2)),
    (dist.Normal().expand((3,)).to_event(1), stats.norm()),
    (dist.LogNormal(0.5, 0.3), stats.lognorm(0.3, scale=np.exp(0.5))),
    (dist.Exponential(2.0), stats.expon(scale=0.5)),
    (dist.Uniform(-1.0, 3.0), stats.uniform(-1, 4)),
    (dist.HalfNormal(2.0), stats.halfnorm(scale=2)),
    (dist.TruncatedNormal(0.0, 1.0, low=0.5), stats.truncnorm(0.5, np.inf)),
    (dist.Laplace(1.0, 2.0), stats.laplace(1, 2)),
    (dist.Cauchy(1.0, 2.0), stats.cauchy(1, 2)),
    (dist.Normal(0.0, 1.0).mask(False), stats.norm()),
]


@pytest.mark.parametrize(("fn", "law"), LAWS, ids=lambda x: type(x).__name__)
def test_quantiles(fn, law):
    with jax.enable_x64(True):
        grid = np.linspace(0.01, 0.99, 41)
        shape, function = from_normals(fn, "x")
        found = np.array([function(jnp.full(shape, stats.norm.ppf(u))) for u in grid])
        assert found.shape[1:] == fn.shape()
        wanted = law.ppf(grid).reshape(-1, *[1] * len(fn.shape()))
        np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), rtol=1e-5)


def test_gaussian_vectors_and_finite_laws():
    with jax.enable_x64(True):
        root = jnp.array([[1.0, 0.0], [0.6, 0.5]])
        shape, function = from_normals(dist.MultivariateNormal(jnp.ones(2), scale_tril=root), "x")
        assert shape == (2,)
        z = random.normal(random.key(0), (3, 2))
        np.testing.assert_allclose(function(z), 1.0 + z @ root.T, rtol=1e-12)
        shape, function = from_normals(dist.Categorical(jnp.array([0.2, 0.5, 0.3])), "z")
        uniforms = np.array([0.1, 0.19, 0.21, 0.69, 0.71, 0.999])
        found = [int(function(jnp.asarray(stats.norm.ppf(u)))) for u in uniforms]
        assert shape == ()
        assert found == [0, 0, 1, 1, 2, 2]


# -- as a method -----------------------------------------------------------------------------------

METHOD = PMMH(particles=12, correlation=0.9)


@pytest.fixture(scope="module")
def correlated_run():
    return quiet(series, Y, method=METHOD, draws=8000, seed=1)


@pytest.mark.slow
def test_correlated_chains_have_the_posterior_of_quadrature(correlated_run):
    _, wanted = exact(Y)
    assert agrees(correlated_run, wanted, ["phi", "q"])
    assert agrees(correlated_run, wanted, ["x"], 0.25)
    assert (correlated_run["sample_stats"]["particles"].values == 12).all()


@pytest.mark.slow
def test_new_data_compile_nothing(correlated_run):
    compilations.clear()
    tree = quiet(series, simulated(25, seed=3), method=METHOD, draws=50, warmup=50)
    assert not compilations
    assert not np.array_equal(
        tree["posterior"]["phi"].values, correlated_run["posterior"]["phi"].values[:, :50]
    )


def spread_at_likely_parameters(y, count):
    """Standard deviation of log Z_hat of plain filters at the posterior mean."""
    program = Program(series, (y,))
    _, wanted = exact(y)
    with program.context():
        space = state_space(program)
        own = space.at(program, at(wanted["phi"][0], wanted["q"][0]), program.data)
        keys = random.split(random.key(7), 400)
        run = jax.vmap(lambda k: follow(k, own, Filter(count), lambda *_: None)[0].log_evidence)
        return float(np.std(jax.jit(run)(keys)))


@pytest.mark.slow
def test_tuned_particles():
    """400 filters measure the spread within 4%."""
    program = Program(series, (Y,))
    count = tuned_particles(program, state_space(program), Filter)
    assert 0.8 < spread_at_likely_parameters(Y, count) < 2.0
    compilations.clear()
    assert tuned_particles(program, state_space(program), Filter) == count
    again = Program(series, (Y + 1e-6,))
    assert tuned_particles(again, state_space(again), Filter) == count
    assert not compilations


@pytest.mark.slow
@pytest.mark.parametrize("length", [100, 300])
def test_tuned_particles_of_longer_series(length):
    y = simulated(length)
    program = Program(series, (y,))
    count = tuned_particles(program, state_space(program), Filter)
    assert 0.8 < spread_at_likely_parameters(y, count) < 2.0


@pytest.mark.slow
def test_tuned_particles_run():
    _, wanted = exact(Y)
    tree = quiet(series, Y, method=PMMH(particles="tuned"), draws=10_000, seed=1)
    assert agrees(tree, wanted, ["phi", "q"])
    assert np.unique(tree["sample_stats"]["particles"].values).size == 1


@pytest.mark.slow
def test_finite_latents_and_initial_sites():
    """Two hidden states; the posterior of the chance to stay by the forward recursion."""
    y = np.array([0.3, 1.9, 2.2, 4.1, 3.2, 0.1, 0.8, 2.5])

    def model(y):
        stay = numpyro.sample("stay", dist.Beta(2.0, 2.0))
        z_0 = numpyro.sample("z_0", dist.Bernoulli(0.5))

        def step(z, y_t):
            p = jnp.where(z == 1, stay, 1 - stay)
            z = numpyro.sample("z", dist.Bernoulli(p))
            numpyro.sample("y", dist.Normal(3.0 * z, 1.0), obs=y_t)
            return z, None

        scan(step, z_0, y)

    nodes, weights = np.polynomial.legendre.leggauss(200)
    stay, weights = 0.5 * (nodes + 1), weights.copy()
    law = np.full((2, 200), 0.5)
    for y_t in y:
        law = np.stack([stay * law[0] + (1 - stay) * law[1], stay * law[1] + (1 - stay) * law[0]])
        law *= stats.norm.pdf(y_t, np.array([0.0, 3.0]), 1.0)[:, None]
    w = weights * stats.beta(2, 2).pdf(stay) * law.sum(0)
    w /= w.sum()
    mean = w @ stay
    tree = quiet(model, y, method=PMMH(particles=16, correlation=0.9), draws=4000, seed=1)
    assert agrees(tree, {"stay": (mean, np.sqrt(w @ (stay - mean) ** 2))}, ["stay"])


# -- what it cannot serve --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"particles": 1}, {"particles": "many"}, {"correlation": 1.0}, {"correlation": -0.1},
        {"correlation": True}, {"correlation": 0.9, "proposal": LaplaceProposal()},
        {"correlation": 0.9, "resampling": "killing"},
        {"correlation": 0.9, "particles": "tuned"},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(OptionError, match=r"correlation|particles"):
        PMMH(**options)


def directions(y):
    concentration = numpyro.sample("k", dist.Exponential(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.VonMises(x, concentration))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def test_latents_without_quantiles_are_refused():
    with pytest.raises(MethodError, match=r"site 'x' with its VonMises\. Use correlation=0"):
        ppl.infer(directions, Y, method=PMMH(correlation=0.9))


def impossible(y):
    q = numpyro.sample("q", dist.HalfNormal(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, q))
        numpyro.factor("never", -jnp.inf)
        return x, None

    scan(step, 0.0, y)


@pytest.mark.slow
def test_tuning_without_a_likelihood_is_said():
    with pytest.raises(MethodError, match="particles='tuned' cannot measure"):
        ppl.infer(impossible, Y, method=PMMH(particles="tuned"))
