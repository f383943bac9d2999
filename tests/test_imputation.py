"""Missing observations by ``obs_mask=``: every element has a law, and all else keeps its own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow, quiet
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to
from numpyro.infer.util import potential_energy
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit import NUTS, SMC, Laplace
from ppl_toolkit.program import Program

N = 12
SEEN = np.arange(N) % 3 != 1
RNG = np.random.default_rng(5)

LAWS = {
    "normal": lambda a: dist.Normal(a, 2.0),
    "positive": lambda a: dist.Gamma(2.0, jnp.exp(a)),
    "unit interval": lambda a: dist.Beta(2.0, jnp.exp(a)),
    "bound that moves": lambda a: dist.TruncatedNormal(a, 2.0, low=a - 90.0),
    "vectors": lambda a: dist.MultivariateNormal(a * jnp.ones(3), jnp.eye(3)),
    "simplices": lambda a: dist.Dirichlet(jnp.exp(a) * jnp.ones(3)),
    "masked already": lambda a: dist.Normal(a, 2.0).mask(np.arange(N) % 2 == 0),
}


def program_of(law):
    def model(y, seen):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", N):
            numpyro.sample("y", law(a), obs=y, obs_mask=seen)

    fn = law(0.5)
    y = fn.sample(jax.random.key(0), (N,) if not fn.batch_shape else ())
    return Program(model, (np.array(y, float), SEEN))


@pytest.mark.parametrize("name", others_slow(LAWS, "normal", "unit interval", "masked already"))
def test_observed_elements_are_standard_normal_on_the_real_space(name):
    """The density is NumPyro's times theirs, to 1e-11, for values far out, too."""
    program = program_of(LAWS[name])
    missing = ~SEEN & ((np.arange(N) % 2 == 0) | (name != "masked already"))
    with program.context():
        value_and_grad = jax.jit(jax.value_and_grad(program.log_density))
        numpyro_potential = jax.jit(
            lambda z: potential_energy(program.model, program.arguments.arrays, {}, z)
        )
        for scale in (1.0, 5.0):
            position = scale * RNG.normal(size=program.size)
            z = program.unravel(position)
            theirs = -numpyro_potential(z)
            resting = stats.norm.logpdf(np.asarray(z["y_unobserved"]))[~missing].sum()
            ours, gradient = value_and_grad(position, program.data)
            np.testing.assert_allclose(ours, theirs + resting, rtol=1e-11)
            of_site = np.asarray(program.unravel(gradient)["y_unobserved"])
            np.testing.assert_allclose(
                of_site[~missing], -np.asarray(z["y_unobserved"])[~missing], rtol=1e-8, atol=1e-9
            )


@pytest.mark.parametrize("name", others_slow(LAWS, "unit interval"))
def test_draws_follow_these_laws(name):
    """Kolmogorov and Smirnov on 400 draws of an observed and a missing element, level 1e-4 each."""
    program = program_of(LAWS[name])

    def draw(key):
        trace = program.trace(program.data, key=key)
        transform = biject_to(trace["y_unobserved"]["fn"].support)
        alone = LAWS[name](trace["a"]["value"]).sample(jax.random.fold_in(key, 9))
        z = transform.inv(trace["y_unobserved"]["value"])
        return z[0], z[4], transform.inv(alone[4] if name == "masked already" else alone)

    with program.context():
        keys = jax.random.split(jax.random.key(1), 400)
        observed, missing, own = map(np.asarray, jax.jit(jax.vmap(draw))(keys))
    assert stats.kstest(observed.ravel(), "norm").pvalue > 1e-4
    assert stats.ks_2samp(missing.ravel(), own.ravel()).pvalue > 1e-4


def labels(y, seen):
    p = numpyro.sample("p", dist.Beta(2.0, 3.0))
    with numpyro.plate("row", N):
        numpyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=seen)


def test_missing_labels_are_summed_out_without_a_trace():
    """The density with missing labels summed out is that of the observed ones alone."""
    y = (RNG.random(N) < 0.4).astype(int)
    program = Program(labels, (y, SEEN))
    with program.context():
        found = jax.jit(program.log_density)(np.array([0.3]), program.data)
    p = 1 / (1 + np.exp(-0.3))
    exact = stats.beta.logpdf(p, 2, 3) + np.log(p * (1 - p))
    exact += stats.bernoulli.logpmf(y[SEEN], p).sum()
    np.testing.assert_allclose(found, exact, rtol=1e-12)


def test_counts_that_are_observed_keep_their_own_law():
    """They have infinitely many values, so none is uniform."""

    def counts(y, seen):
        with numpyro.plate("row", N):
            numpyro.sample("y", dist.Poisson(2.0), obs=y, obs_mask=seen)

    program = Program(counts, (np.arange(N), SEEN))
    values = {"y_unobserved": np.arange(N)[::-1]}
    with program.context():
        terms = program.log_terms(values, program.data)
    exact = stats.poisson.logpmf(values["y_unobserved"], 2.0)
    np.testing.assert_allclose(terms["y_unobserved"], exact, rtol=1e-12)


def line(x, y, seen):
    """y = b x + noise: conjugate."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(b * x, 0.5), obs=y, obs_mask=seen)


X = np.linspace(-1.0, 2.0, N)
Y = np.where(SEEN, 0.8 * X + 0.5 * RNG.normal(size=N), np.nan)
PRECISION = 1 + 4 * np.sum(X[SEEN] ** 2)
MEAN = 4 * np.sum((X * Y)[SEEN]) / PRECISION


def test_nuts_imputes_the_missing_ones_and_keeps_the_posterior():
    """Means within 4.5 standard errors, deviations within 6%; trees stay short; NaN is allowed."""
    tree = quiet(line, X, Y, SEEN, method=NUTS(), draws=2000, seed=1)
    table = ppl.summary(tree)
    assert tree["sample_stats"]["n_steps"].values.mean() < 10  # 1023 without these laws
    posterior = tree["posterior"]
    b = np.asarray(posterior["b"])
    assert abs(b.mean() - MEAN) < 4.5 * table.loc["b", "mcse_mean"]
    np.testing.assert_allclose(b.std(), PRECISION**-0.5, rtol=0.06)
    y = np.asarray(posterior["y"])
    assert (y[..., SEEN] == Y[SEEN]).all()
    for i in np.flatnonzero(~SEEN):
        sd = np.sqrt(0.25 + X[i] ** 2 / PRECISION)
        assert abs(y[..., i].mean() - MEAN * X[i]) < 4.5 * table.loc[f"y[{i}]", "mcse_mean"]
        np.testing.assert_allclose(y[..., i].std(), sd, rtol=0.06)
    assert table["r_hat"].dropna().max() < 1.01


def test_evidences_are_those_of_what_is_observed():
    """Laplace's is exact on this model; that of SMC within 4.5 standard errors of 16 runs."""
    x, y = X[SEEN], Y[SEEN]
    cov = 0.25 * np.eye(len(x)) + np.outer(x, x)
    exact = stats.multivariate_normal.logpdf(y, np.zeros(len(x)), cov)
    tree = quiet(line, X, Y, SEEN, method=Laplace(), draws=10)
    np.testing.assert_allclose(tree["sample_stats"]["log_evidence"], exact, rtol=1e-9)
    tree = quiet(line, X, Y, SEEN, method=SMC(particles=100), chains=16, seed=3)
    ratio = np.exp(np.asarray(tree["sample_stats"]["log_evidence"]).mean(-1) - exact)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std(ddof=1) / 4 < 0.5


@pytest.mark.slow
def test_observed_steps_of_a_series_are_standard_normal():
    """Within 0.1 of mean 0, 5% of deviation 1; trees stay short."""

    def walk(y, seen):
        def step(x, inputs):
            y_t, here = inputs
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t, obs_mask=here)
            return x, None

        scan(step, 0.0, (y, seen))

    tree = quiet(walk, np.nan_to_num(Y), SEEN, seed=1)
    assert tree["sample_stats"]["n_steps"].values.mean() < 20
    free = np.asarray(tree["posterior"]["y_unobserved"])[..., SEEN]
    assert abs(free.mean()) < 0.1
    np.testing.assert_allclose(free.std(), 1.0, rtol=0.05)


@pytest.mark.parametrize("way", ["obs_mask", "mask"])
def test_checks_look_at_what_is_observed_alone(way):
    """Hidden observations are NaN in the result, and no statistic counts them."""

    def constant(y, seen):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", N):
            if way == "obs_mask":
                numpyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=seen)
            else:
                numpyro.sample("y", dist.Normal(mean, 1.0).mask(seen), obs=y)

    y = np.where(SEEN, 0.0, 1000).astype(int)
    tree = quiet(constant, y, SEEN, draws=50, warmup=100, seed=2)
    site = "y_observed" if way == "obs_mask" else "y"
    np.testing.assert_array_equal(tree["observed_data"][site], np.where(SEEN, 0.0, np.nan))
    table = ppl.check_posterior(tree, constant, y, SEEN)
    assert table.loc[(site, "max"), "observed"] == 0.0
    assert ppl.loo(tree, constant, y, SEEN).n == SEEN.sum()
