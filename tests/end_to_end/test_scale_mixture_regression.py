"""The regression program through the front door: draws, leave-one-out, predictions, refusals."""

import functools

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet, quietly
from numpyro.infer.util import log_density

import ppl_toolkit as ppl
from ppl_toolkit.errors import DataError, MethodError, OptionError
from ppl_toolkit.inference import MAP, Type2ML
from ppl_toolkit.models.infinite_width import mlp
from ppl_toolkit.models.scale_mixture import NetworkProcess, fit, scale_mixture_regression

RNG = np.random.default_rng(0)
X = RNG.uniform(-2, 2, (24, 1))
Y = np.sin(2 * X[:, 0]) + 0.2 * RNG.normal(size=24)
X_NEW = np.array([[-1.0], [0.2], [1.5]])
BUILD = functools.partial(mlp, 1)
MODEL = scale_mixture_regression(BUILD)
FIXED = scale_mixture_regression(mlp(1, bias_std=0.3), law=dist.InverseGamma(2.0, 2.0))


@pytest.fixture(scope="module")
def posterior():
    return quiet(MODEL, X, Y, draws=100, warmup=150, chains=2)


def test_the_density_is_the_priors_and_the_evidence():
    values = {"weight_std": 1.3, "bias_std": 0.4, "noise": 0.1, "alpha": 2.5}
    with jax.enable_x64(True):
        found, _ = log_density(MODEL, (X, Y), {}, values)
        prior = float(sum(law.log_prob(values[name]) for name, law in MODEL.priors.items()))
    network = mlp(1, weight_std=1.3, bias_std=0.4)
    evidence = fit(network, X, Y, noise=0.1, law=dist.InverseGamma(2.5, 2.5)).log_evidence
    np.testing.assert_allclose(found, prior + evidence, rtol=1e-10)


def test_new_data_and_seed_compile_nothing(posterior):
    compilations.clear()
    quiet(MODEL, X + 0.1, Y - 0.1, draws=100, warmup=150, chains=2, seed=1)
    assert not compilations


@pytest.mark.slow
def test_leave_one_out_has_exact_densities_of_every_draw(posterior):
    scored = ppl.log_likelihood(posterior, MODEL, X, Y)
    terms = scored["log_likelihood"]["y"]
    assert terms.shape == (2, 100, 24)
    draw = {name: float(v[1, 7]) for name, v in posterior["posterior"].data_vars.items()}
    network = mlp(1, weight_std=draw["weight_std"], bias_std=draw["bias_std"])
    law = dist.InverseGamma(draw["alpha"], draw["alpha"])
    exact = fit(network, X, Y, noise=draw["noise"], law=law).leave_one_out_log_densities()
    np.testing.assert_allclose(terms[1, 7], exact, rtol=0, atol=1e-9)
    found = ppl.loo(posterior, MODEL, X, Y)
    assert found.n == 24
    assert not found.failed
    with pytest.raises(DataError, match="depend on each other"):
        ppl.sensitivity(scored)
    with pytest.raises(OptionError, match="depend on each other"):
        ppl.loo(posterior, MODEL, X, Y, refit=True)


def test_predictions_are_given_the_data(posterior):
    """By draws, against the mixture over draws of exact predictions.

    The mean of 200 x 40 draws, one for every posterior draw and seed; 5 standard errors, in which
    draws of one seed are independent given the posterior: false alarms once in 10^5.
    """
    exact = []
    for chain, draw in ((c, d) for c in range(2) for d in range(0, 100, 20)):
        at = {n: float(v[chain, draw]) for n, v in posterior["posterior"].data_vars.items()}
        network = mlp(1, weight_std=at["weight_std"], bias_std=at["bias_std"])
        law = dist.InverseGamma(at["alpha"], at["alpha"])
        exact.append(fit(network, X, Y, noise=at["noise"], law=law).predict(X_NEW).mean)
    tree = ppl.predict(posterior, MODEL, X, Y, X_new=X_NEW)
    predictions = tree["predictions"]
    assert {"y_new", "f_new", "sigma2"} <= set(predictions.data_vars)
    thinned = predictions["y_new"].values[:, ::20].reshape(-1, 3)
    error = predictions["y_new"].values.reshape(-1, 3).std(0) / np.sqrt(len(thinned))
    assert np.all(np.abs(thinned.mean(0) - np.mean(exact, 0)) < 5 * error)
    assert np.all(predictions["sigma2"] > 0)
    # Without noise the function varies less than the targets.
    assert np.all(predictions["f_new"].std(("chain", "draw")) < predictions["y_new"].std(
        ("chain", "draw")))  # fmt: skip


@pytest.mark.slow
def test_type_two_maximum_likelihood_finds_the_largest_evidence():
    found = quiet(FIXED, X, Y, method="type2ml", chains=2)
    noise = found["maximum"]["noise"].values.ravel()
    np.testing.assert_allclose(noise, noise[0], rtol=1e-4)
    evidence = [
        fit(mlp(1, bias_std=0.3), X, Y, noise=noise[0] * f).log_evidence for f in (0.98, 1.0, 1.02)
    ]
    assert evidence[1] > max(evidence[0], evidence[2])
    objective = found["sample_stats_maximum"]["objective"]
    np.testing.assert_allclose(objective, evidence[1], rtol=1e-8)
    assert found["sample_stats_maximum"]["converged"].all()
    tree = ppl.predict(found, FIXED, X, Y, X_new=X_NEW)
    assert tree["predictions"]["y_new"].shape == (2, 1, 3)


def test_the_collapse_of_the_law_is_refused():
    with pytest.raises(MethodError, match=r"alpha.*method='map'"):
        quiet(MODEL, X, Y, method=Type2ML())


@pytest.mark.slow
def test_a_prior_prevents_the_collapse():
    found = quiet(MODEL, X, Y, method=MAP(starts=2), chains=1)
    assert 0.5 < float(found["maximum"]["alpha"].squeeze()) < 50


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: scale_mixture_regression(3), OptionError, "functools.partial"),
        (lambda: scale_mixture_regression(law="t"), OptionError, "distribution of sigma"),
        (lambda: scale_mixture_regression(law=dist.Normal(0.0, 1.0)), DataError, "positive"),
        (
            lambda: scale_mixture_regression(priors={"nose": dist.Normal(0, 1)}),
            OptionError,
            "nose",
        ),
        (lambda: scale_mixture_regression(priors={"noise": 0.1}), OptionError, "noise"),
    ],
)
def test_bad_programs(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    "data",
    [
        (np.where(np.arange(24)[:, None] == 3, np.nan, X), Y),
        (X[:, 0], Y),
        (X, Y[:5]),
        (X, np.where(np.arange(24) == 3, np.inf, Y)),
        (X[:0], Y[:0]),
    ],
)
def test_bad_data_is_refused_before_any_compilation(data):
    compilations.clear()
    with pytest.raises(ppl.errors.PPLError):
        quiet(FIXED, *data)
    assert not compilations


def test_the_process_draws_with_one_scale():
    """(y^T Kt^-1 y) alpha / (n beta) of draws is F(n, 2 alpha) by a Kolmogorov-Smirnov test.

    A scale of its own for every number would fail it. At a p-value of 1e-4 with a fixed seed.
    """
    from scipy import stats

    with jax.enable_x64(True):
        process = NetworkProcess(dist.InverseGamma(2.0, 2.0), mlp(1), X[:4], 0.1)
        draws = np.asarray(process.sample(jax.random.key(3), (2000,)))
        inverse = np.linalg.inv(np.asarray(mlp(1).nngp(X[:4])) + 0.1 * np.eye(4))
    ratio = np.einsum("si,ij,sj->s", draws, inverse, draws) / 4
    assert stats.kstest(ratio, stats.f(4, 4).cdf).pvalue > 1e-4


def test_the_report_of_a_maximum_reads(tmp_path):
    found = quietly(ppl.infer, FIXED, X, Y, method="type2ml", chains=2)
    text = str(ppl.report(found, tmp_path / "maximum.html"))
    assert "noise" in text
