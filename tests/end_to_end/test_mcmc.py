"""Composed kernels through `infer`: right, restartable, compiled once, refused if need be."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet, quietly
from jax.scipy.special import logsumexp
from models import EFFECTS, ERRORS, eight_schools

import ppl_toolkit as ppl
from ppl_toolkit.errors import CheckpointError, MethodError, OptionError, SiteError
from ppl_toolkit.inference import (
    MCMC,
    NUTS,
    Gibbs,
    GibbsWithGradients,
    LocallyBalanced,
    MetropolisedGibbs,
    ParallelTempering,
    block,
    cycle,
    mixture,
    repeat,
    tempered,
)
from ppl_toolkit.inference.involution import random_walk

rng = np.random.default_rng(0)
Y = np.concatenate([rng.normal(-2, 1, 12), rng.normal(3, 1, 18)])


def mixed(y):
    """Two normal components with priors that tell them apart."""
    w = numpyro.sample("w", dist.Beta(2, 2))
    first = numpyro.sample("first", dist.Normal(-2, 0.5))
    second = numpyro.sample("second", dist.Normal(3, 0.5))
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(w))
        numpyro.sample("y", dist.Normal(first * (1 - z) + second * z, 1), obs=y)


APART = {"first": -2.0, "second": 3.0}  # else names may be swapped for long


def spec(discrete):
    return cycle([block(discrete, "z"), block(NUTS(), ["w", "first", "second"])])


@pytest.fixture(scope="module")
def exact():
    """With z summed out; 4000 draws of NUTS."""
    return quiet(mixed, Y, seed=5)["posterior"]


class TestDiscreteSitesBesideContinuousOnes:
    @pytest.mark.parametrize(
        "discrete",
        [
            Gibbs(),
            MetropolisedGibbs(),
            repeat(LocallyBalanced(), 10),
            repeat(GibbsWithGradients(), 10),
        ],
        ids=lambda kernel: kernel.label,
    )
    @pytest.mark.slow
    def test_the_posterior_is_that_of_the_sum(self, discrete, exact):
        """Means of three sites within 4 standard errors of their difference: 2e-4 a kernel."""
        found = quiet(mixed, Y, method=MCMC(spec(discrete)), seed=1, init=APART)["posterior"]
        for site in ("w", "first", "second"):
            assert ppl.convergence.rhat(np.asarray(found[site])) < 1.05
            parts = [np.asarray(draws[site]) for draws in (found, exact)]
            errors = [ppl.convergence.mcse(x) for x in parts]
            gap = abs(parts[0].mean() - parts[1].mean())
            assert gap < 4 * np.hypot(*errors), site
        assert found["z"].shape == (4, 1000, 30)
        assert found["z"].dtype.kind == "i"

    def test_chains_begin_where_they_are_told(self):
        """Site by site, whatever the order of their names: z is drawn first, given the others."""
        method = MCMC(cycle([block(Gibbs(), "z"), block(NUTS(), ["w", "first", "second"])]))
        start = {"w": 0.6, "first": -2.0, "second": np.array([3.0, 3.1, 3.2, 3.3])}
        begun = quiet(mixed, Y, method=method, init=start, draws=1, warmup=0)["posterior"]
        odds = np.log(0.6 / 0.4) - 0.5 * (Y - 3.0) ** 2 + 0.5 * (Y + 2.0) ** 2
        clear = np.abs(odds) > 12.0  # a wrong z has a probability below 1e-5
        assert clear.sum() > 10
        assert np.all(np.asarray(begun["z"])[..., clear] == (odds > 0.0)[clear])

    def test_predictions_use_the_draws_of_z(self):
        tree = quiet(mixed, Y, method=MCMC(spec(Gibbs())), seed=1, draws=200, init=APART)
        predicted = ppl.predict(tree, mixed, Y)["posterior_predictive"]["y"]
        z = tree["posterior"]["z"]
        # Given z the prediction is normal around one of two means five apart.
        assert abs(float(predicted.where(z == 1).mean()) - 3) < 0.6
        assert abs(float(predicted.where(z == 0).mean()) + 2) < 0.6
        scored = ppl.log_likelihood(tree, mixed, Y)["log_likelihood"]["y"]
        means = tree["posterior"]["first"] * (1 - z) + tree["posterior"]["second"] * z
        wanted = -0.5 * (Y - np.asarray(means.transpose("chain", "draw", ...))) ** 2
        wanted -= 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(scored, wanted, rtol=1e-12)


KERNELS = {
    "NUTS and Gibbs": (mixed, (Y,), spec(Gibbs())),
    "mixture": (
        eight_schools, (ERRORS, EFFECTS), mixture([NUTS(), random_walk(0.3)], [0.7, 0.3]),
    ),
    "parallel tempering": (
        eight_schools, (ERRORS, EFFECTS), ParallelTempering(NUTS(), [1.0, 0.5, 0.1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "NUTS and Gibbs" else [pytest.mark.slow]) for n in KERNELS],
)
def test_chunks_extensions_and_resumptions_give_the_same_draws(name, tmp_path):
    model, args, kernel = KERNELS[name]
    options = {"method": MCMC(kernel), "warmup": 30, "chains": 2, "seed": 3}
    whole = quiet(model, *args, draws=30, chunk=7, **options)
    store = tmp_path / "run.zarr"
    part = quiet(model, *args, draws=20, store=store, threads=1, **options)
    saved = ppl.load(ppl.save(part.load(), tmp_path / "part.nc"))
    for again in (
        quietly(ppl.extend, saved, model, *args, draws=10, method=MCMC(kernel)),
        quiet(model, *args, draws=30, resume=store, method=MCMC(kernel)),
    ):
        for site, values in whole["posterior"].data_vars.items():
            np.testing.assert_array_equal(again["posterior"][site], values)


def test_a_stored_composition_must_be_passed_again(tmp_path):
    store = tmp_path / "run.zarr"
    options = {"method": MCMC(spec(Gibbs())), "warmup": 5, "chains": 1}
    tree = quiet(mixed, Y, draws=5, store=store, **options)
    for again in (
        lambda: ppl.infer(mixed, Y, draws=9, resume=store),
        lambda: ppl.extend(tree, mixed, Y, draws=3),
    ):
        with pytest.raises(CheckpointError, match="pass the same method again"):
            again()
    with pytest.raises(CheckpointError, match="cannot go on"):
        ppl.infer(mixed, Y, draws=9, resume=store, method=MCMC(spec(MetropolisedGibbs())))


def test_new_data_of_the_same_shape_compile_nothing():
    method = MCMC(spec(Gibbs()))
    options = {"method": method, "draws": 20, "warmup": 20, "chains": 1}
    quiet(mixed, Y, **options)

    compilations.clear()
    quiet(mixed, Y + 0.5, seed=9, **{**options, "draws": 30})
    assert not compilations


@pytest.mark.slow
def test_modes_ten_standard_deviations_apart():
    """Parallel tempering visits both; the share of draws in one is 0.7 to within 4 errors."""

    def modes():
        x = numpyro.sample("x", dist.Normal(0, 10))
        two = dist.Normal(np.array([-5.0, 5.0]), 0.5).log_prob(x) + np.log([0.3, 0.7])
        numpyro.factor("likelihood", logsumexp(two))

    powers = [1.0, 0.4, 0.15, 0.05, 0.01]
    tree = quiet(modes, method=MCMC(ParallelTempering(NUTS(), powers)), draws=2000, seed=2)
    right = np.asarray(tree["posterior"]["x"] > 0, float)
    # the prior is wide but not flat: both modes are equally far from its mean
    assert abs(right.mean() - 0.7) < 4 * ppl.convergence.mcse(right)
    assert ppl.convergence.ess(right) > 200
    assert float(tree["sample_stats"]["round_trips"][:, -1].min()) > 20


def test_a_power_of_the_likelihood():
    """Normal mean: the posterior to power b has precision 1 / 4 + b n."""

    def mean(y):
        m = numpyro.sample("m", dist.Normal(0, 2))
        with numpyro.plate("n", len(y)):
            numpyro.sample("y", dist.Normal(m, 1), obs=y)

    y = np.array([0.4, 1.2, 2.0])
    draws = quiet(mean, y, method=MCMC(tempered(NUTS(), 0.3)), seed=4)["posterior"]["m"]
    precision = 0.25 + 0.3 * 3
    wanted = 0.3 * y.sum() / precision
    assert abs(float(draws.mean()) - wanted) < 4 * ppl.convergence.mcse(np.asarray(draws))
    sd = ppl.convergence.mcse(np.asarray(draws), "sd")
    assert abs(float(draws.std()) - precision**-0.5) < 4 * sd


def indexed(y):
    mu = numpyro.sample("mu", dist.Normal(0, 5).expand([2]).to_event(1))
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("y", dist.Normal(mu[z], 1), obs=y)


def test_gradients_need_a_model_that_takes_real_values():
    kernel = cycle([block(NUTS(), "mu"), block(GibbsWithGradients(), "z")])
    with pytest.raises(MethodError, match=r"real values there.*Use Gibbs"):
        ppl.infer(indexed, Y, method=MCMC(kernel))


BAD = {
    "a site nobody moves": (block(NUTS(), ["w"]), MethodError, r"moves the latent sites \['first'"),
    "gradients of a discrete site": (NUTS(), MethodError, r"sites \['z'\] are discrete"),
    "Gibbs on a continuous site": (Gibbs(), MethodError, "are continuous"),
    "an unknown site": (block(NUTS(), "q"), SiteError, r"block names \['q'\]"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused_before_any_compilation(what):
    kernel, error, message = BAD[what]
    with pytest.raises(error, match=message):
        ppl.infer(mixed, Y, method=MCMC(kernel))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MCMC(3), "a kernel is needed"),
        (lambda: MCMC(NUTS(), warmup=-1), "warmup"),
        (lambda: MCMC(NUTS(), init_radius=-1.0), "init_radius"),
    ],
)
def test_options(make, message):
    with pytest.raises(OptionError, match=message):
        make()
