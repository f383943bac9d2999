"""SVI: normal posteriors, what independent laws lose, guides of all kinds, minibatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import compilations, others_slow, quiet
from jax import random
from numpyro.infer import autoguide
from scipy import stats
from test_laplace import NOISE, PRIOR, X, Y, exact, regression

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import SVI
from ppl_toolkit.inference.guides import NAMES, guide_of


def parameters(tree, name):
    return tree["sampler_state"][f"law.parameters.{name}"].values


@pytest.fixture(scope="module")
def full():
    return quiet(regression, X, Y, method=SVI(steps=2000))


def test_a_full_law_learns_a_normal_posterior(full):
    """The mean to 0.05 standard deviations, standard deviations to 5%, correlations to 0.05."""
    mean, covariance, evidence = exact()
    sd = np.sqrt(np.diag(covariance))
    draws = full["sampler_state"]["pool.positions"].values  # draws of q
    for own in draws:
        assert np.abs((own.mean(axis=0) - mean) / sd).max() < 0.05 + 4.5 / np.sqrt(1000)
        assert np.abs(own.std(axis=0) / sd - 1).max() < 0.05 + 4.5 / np.sqrt(2000)
        gap = np.corrcoef(own.T) - covariance / np.outer(sd, sd)
        assert np.abs(gap).max() < 0.05 + 4.5 / np.sqrt(1000)
    group = full["approximation"]
    assert np.all(group["khat"] < 0.5)
    np.testing.assert_allclose(group["log_evidence"], evidence, atol=0.01)
    bound = group["elbo"].values[:, -20:].mean(axis=1)
    assert np.all(bound < evidence + 0.02)
    assert np.all(bound > evidence - 0.1)
    assert ppl.findings(full) == []


def test_new_data_rates_and_seeds_compile_nothing(full):
    compilations.clear()
    method = SVI(steps=1500, optimizer=0.04)
    quiet(regression, X, Y[::-1].copy(), method=method, seed=5)
    assert not compilations


@pytest.mark.slow
def test_independent_laws_lose_what_theory_says():
    """Variances are 1 / A_ii, A the precision; means are right."""
    mean, covariance, _ = exact()
    precision = np.linalg.inv(covariance)
    expected = 1 / np.sqrt(np.diag(precision))
    assert (expected / np.sqrt(np.diag(covariance))).min() < 0.7  # it is a loss
    tree = quiet(regression, X, Y, method=SVI(guide="normal", steps=2000))
    origin = tree["sampler_state"]["law.origin"].values
    found = origin + parameters(tree, "auto_loc")
    np.testing.assert_allclose((found - mean) / expected, 0.0, atol=0.1)
    spread = np.log1p(np.exp(parameters(tree, "auto_scale")))  # NumPyro's softplus
    np.testing.assert_allclose(spread, np.broadcast_to(expected, (4, 4)), rtol=0.06)
    assert tree.attrs["khat"] > 0.5
    assert ppl.findings(tree)[0].kind == "approximation"


def scaled(y):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    s = numpyro.sample("s", dist.Gamma(3.0, 1.0))
    numpyro.sample("y", dist.Normal(m, s), obs=y)


def written(y):
    """A guide as NumPyro's users write it, on the sites' own spaces."""
    loc = numpyro.param("loc", 0.0)
    spread = numpyro.param("spread", 0.1, constraint=dist.constraints.positive)
    numpyro.sample("m", dist.Normal(loc, spread))
    shape = numpyro.param("shape", 5.0, constraint=dist.constraints.positive)
    numpyro.sample("s", dist.Gamma(shape, numpyro.param("rate", 5.0)))


@pytest.mark.slow
def test_a_guide_that_is_a_function_draws_the_models_sites():
    """Log q on the unconstrained space against SciPy; weights that say that q is nearly right."""
    y = np.random.default_rng(0).normal(1.0, 1.5, 25)
    tree = quiet(scaled, y, method=SVI(guide=written, steps=1500), chains=2)
    assert tree.attrs["khat"] < 0.7
    assert tree["approximation"]["weight_ess"].min() > 600
    draws = tree["posterior"].dataset
    law = {name: parameters(tree, name)[0] for name in ("loc", "spread", "shape", "rate")}
    gamma = stats.gamma(np.exp(law["shape"]), scale=1 / law["rate"])
    m, s = draws["m"].values[0], draws["s"].values[0]
    log_q = stats.norm(law["loc"], np.exp(law["spread"])).logpdf(m) + gamma.logpdf(s) + np.log(s)
    pool = tree["sample_stats"].dataset.isel(chain=0)
    np.testing.assert_allclose(pool["lp"] - pool["log_weight"], log_q, atol=1e-8)


# --- families -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", others_slow(["normal", "multivariate_normal", "low rank", "iaf"], "low rank")
)
def test_densities_of_automatic_guides_are_those_of_their_draws(name):
    """By the change of variables from the noise, or by the moments where the law is normal."""
    with jax.enable_x64(True):
        guide, origin = guide_of(name), jnp.array([1.0, -2.0, 0.5])
        begin = jax.jit(lambda key: guide.start(key, origin, None))(random.key(0))
        begin = jax.tree.map(
            lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), begin
        )
        keys = random.split(random.key(1), 4000)
        draw = jax.jit(jax.vmap(lambda key: guide.draw(key, begin, origin, None)))
        x, log_q = map(np.asarray, draw(keys))
        assert x.shape == (4000, 3)
        # Importance weights of a law that covers it have mean one: 4.5 standard errors.
        wide = stats.multivariate_normal(x.mean(axis=0), 1.0 * np.cov(x.T))
        ratio = np.exp(wide.logpdf(x) - log_q)
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / np.sqrt(4000) + 1e-6
        if name != "iaf":  # normal: its own moments give its density
            assert np.abs(wide.logpdf(x) - log_q).max() < 0.8


@pytest.mark.parametrize(
    "guide",
    [
        autoguide.AutoNormal,
        functools.partial(autoguide.AutoLowRankMultivariateNormal, rank=1),
        autoguide.AutoBNAFNormal,
    ],
)
def test_classes_of_automatic_guides_serve(guide):
    with jax.enable_x64(True):
        made, origin = guide_of(guide), jnp.zeros(3)
        shape = jax.eval_shape(
            lambda key: made.draw(key, made.start(key, origin, None), origin, None), random.key(0)
        )
        assert [s.shape for s in shape] == [(3,), ()]


def elsewhere(y):
    numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("other", dist.Normal(0.0, 1.0))


def without_bounds(y):
    numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("s", dist.Normal(numpyro.param("q", 0.0), 1.0))


@pytest.mark.parametrize(
    ("guide", "error", "words"),
    [
        (without_bounds, MethodError, "'s' from all real numbers.*support Positive"),
        ("gaussian", OptionError, "multivariate_normal"),
        (autoguide.AutoDelta, OptionError, "MAP"),
        (autoguide.AutoGuideList, OptionError, "AutoGuideList"),
        (autoguide.AutoNormal(scaled), OptionError, "pass the class"),
        (17, OptionError, "function"),
        (elsewhere, MethodError, r"lacks \['s'\] and has \['other'\]"),
        (lambda z: None, MethodError, "lacks"),
        (lambda: None, MethodError, "does not run"),
    ],
)
def test_guides_that_do_not_serve_are_refused_before_anything_compiles(guide, error, words):
    compilations.clear()
    with pytest.raises(error, match=words):
        ppl.infer(scaled, np.ones(4), method=SVI(guide=guide), progress=False)
    assert not compilations


def one(y):
    numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def test_flows_of_one_dimension_are_refused():
    with pytest.raises(MethodError, match="1 unconstrained dimension"):
        ppl.infer(one, np.ones(4), method=SVI(guide="iaf"), progress=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"particles": 2.0}, "particles"),
        ({"optimizer": -0.1}, "optimizer"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"optimizer": optax.adam}, "optimizer"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(OptionError, match=words):
        SVI(**options)


def test_names_are_forgiving():
    assert guide_of("Low_Rank").label == guide_of("low rank").label
    assert set(NAMES) == {"normal", "multivariate_normal", "low rank", "iaf", "bnaf"}


# --- longer -------------------------------------------------------------------------------------


def subsampled(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, PRIOR).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("row", x.shape[0], subsample_size=10) as rows:
        numpyro.sample("y", dist.Normal(x[rows] @ b, NOISE), obs=y[rows])


@pytest.mark.slow
def test_minibatches_learn_the_posterior_of_all_rows():
    mean, covariance, evidence = exact()
    sd = np.sqrt(np.diag(covariance))
    tree = quiet(subsampled, X, Y, method=SVI(steps=4000))
    assert "subsample" not in [finding.kind for finding in ppl.findings(tree)]
    draws = tree["posterior"]["b"].values.reshape(-1, 4)
    assert np.abs((draws.mean(axis=0) - mean) / sd).max() < 0.25
    assert tree.attrs["khat"] < 0.7
    np.testing.assert_allclose(tree["approximation"]["log_evidence"], evidence, atol=0.2)


def local(x, y):
    with numpyro.plate("row", x.shape[0], subsample_size=10) as rows:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, NOISE), obs=y[rows])


def test_latents_of_subsampled_plates_are_refused():
    with pytest.raises(MethodError, match=r"sites \['z'\] are latent inside"):
        ppl.infer(local, X, Y, method="svi", progress=False)
    with pytest.raises(MethodError, match="see all rows"):
        ppl.infer(subsampled, X, Y, method=SVI(guide=written), progress=False)


@pytest.mark.slow
def test_flows_and_optimisers_of_optax():
    """A flow bends where normal laws cannot: the bound is closer to the evidence."""
    y = np.random.default_rng(0).normal(1.0, 1.5, 6)
    falling = optax.adam(optax.cosine_decay_schedule(0.03, 3000), b2=0.95)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), falling)
    flow = quiet(scaled, y, method=SVI(guide="iaf", optimizer=optimizer), chains=2)
    normal = quiet(scaled, y, method=SVI(), chains=2)

    def gap(tree):
        group = tree["approximation"]
        return (group["log_evidence"] - group["elbo"][:, -20:].mean("stretch")).values

    assert np.all(gap(flow) < gap(normal))


@pytest.mark.slow
def test_a_bound_that_still_rises_is_told():
    tree = quiet(regression, X, 50.0 * Y, method=SVI(steps=300, optimizer=0.02))
    assert "elbo" in [finding.kind for finding in ppl.findings(tree)]
