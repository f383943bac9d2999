"""ChEES and MAMS through `infer`, against exact posteriors and by what a run promises."""

import functools
import json
import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, others_slow, quiet, quietly
from models import EFFECTS, ERRORS, conjugate, eight_schools, eight_schools_centred
from scipy import stats
from scipy.integrate import quad

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.engine import Engine
from ppl_toolkit.errors import (
    InitializationError,
    MethodError,
    OptionError,
    SiteError,
)
from ppl_toolkit.front_door import _default_superchains
from ppl_toolkit.inference import MAMS, MCMC, NUTS, ChEES, RandomWalk
from ppl_toolkit.program import Program

METHODS = {"chees": ChEES(), "mams": MAMS()}
BOTH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
Y = np.random.default_rng(0).normal(1.0, 1.0, size=12)
SHORT = {"chains": 8, "warmup": 40, "draws": 20}


def pair(y):
    """Two independent conjugate means: exact, and of two dimensions."""
    m = numpyro.sample("m", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m[0] + m[1], 1.0), obs=y)


def normal(scales):
    numpyro.sample("x", dist.Normal(0.0, scales).to_event(1))


@functools.cache
def schools(name):
    return quiet(eight_schools, ERRORS, y=EFFECTS, method=METHODS[name], seed=3)


# -- exact posteriors ---------------------------------------------------------------------------
# Bounds of 4 standard errors: a right sampler fails one of them once in 16 000 numbers. Seeds are
# fixed.


def worst(tree, name, mean, sd):
    table = ppl.summary(tree, name)
    shifts = (table["mean"] - mean) / table["mcse_mean"], (table["sd"] - sd) / table["mcse_sd"]
    return float(np.max(np.abs(shifts)))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("metric", ["auto", "diagonal", "low rank"])
def test_ten_dimensions_of_condition_a_thousand(method, metric):
    """Scales from 0.03 to 32, the axes turned: every mean and every variance."""
    root = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0]
    root = root if metric != "diagonal" else np.eye(10)
    covariance = (root * np.logspace(-1.5, 1.5, 10) ** 2) @ root.T
    model = functools.partial(gaussian, np.linalg.cholesky(covariance))
    options = {"draws": 400} if metric == "low rank" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the matrix is baked in
        tree = quiet(model, method=type(method)(metric=metric), seed=1, **options)
    x = tree["posterior"]["x"].values
    numbers = convergence.convergence(np.stack([x, x**2]).transpose(1, 2, 0, 3))
    truth = np.stack([np.zeros(10), np.diag(covariance)])
    assert np.abs((numbers["mean"] - truth) / numbers["mcse_mean"]).max() < 4
    assert not tree["sample_stats"]["diverging"].any()
    if metric != "low rank":  # which ten directions at once are too many for
        assert ppl.findings(tree) == []
        assert numbers["ess_bulk"].min() > 0.15 * x[..., 0].size


def gaussian(root):
    numpyro.sample("x", dist.MultivariateNormal(np.zeros(10), scale_tril=root))


def schools_by_quadrature():
    """Means and standard deviations of mu and tau, theta integrated out; mu in closed form."""

    def moments(tau):
        precision = 1.0 / (ERRORS**2 + tau**2)
        total = 1.0 / 25.0 + precision.sum()
        mean = (precision * EFFECTS).sum() / total
        log_weight = (
            0.5 * np.log(precision).sum() - 0.5 * np.log(total)
            - 0.5 * ((precision * EFFECTS**2).sum() - total * mean**2) - np.log1p((tau / 5.0) ** 2)
        )  # fmt: skip
        return np.exp(log_weight + 40.0), mean, 1.0 / total

    def integral(function):
        return quad(lambda tau: moments(tau)[0] * function(tau), 0.0, np.inf, limit=200)[0]

    mass = integral(lambda tau: 1.0)
    mu = integral(lambda tau: moments(tau)[1]) / mass
    mu_square = integral(lambda tau: moments(tau)[1] ** 2 + moments(tau)[2]) / mass
    tau, tau_square = integral(lambda tau: tau) / mass, integral(lambda tau: tau**2) / mass
    return {"mu": (mu, np.sqrt(mu_square - mu**2)), "tau": (tau, np.sqrt(tau_square - tau**2))}


@pytest.mark.parametrize("name", METHODS)
def test_eight_schools_by_quadrature(name):
    tree = schools(name)
    for site, (mean, sd) in schools_by_quadrature().items():
        assert worst(tree, site, mean, sd) < 4
    np.testing.assert_allclose(schools_by_quadrature()["mu"][0], 4.4, atol=0.05)
    assert ppl.findings(tree) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_both_precisions_find_constrained_laws(name, precision):
    """The Gamma posterior of a positive site, beside a normal one."""
    waits = np.array([0.4, 1.3, 0.2, 2.2], precision)

    def model(waits):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("other", dist.Normal(1.0, 2.0))
        numpyro.sample("waits", dist.Exponential(rate), obs=waits)

    tree = quiet(model, waits, method=name, precision=precision, seed=2)
    laws = {"rate": stats.gamma(6, scale=1 / (1 + waits.sum())), "other": stats.norm(1, 2)}
    for name, law in laws.items():
        assert worst(tree, name, law.mean(), law.std()) < 4
        thinned = tree["posterior"][name].values[:, ::8].ravel()
        assert stats.kstest(thinned, law.cdf).pvalue > 1e-4
    assert tree["posterior"]["rate"].dtype == precision
    assert ppl.findings(tree) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_discrete_sites_are_summed_out(method):
    """The weight of two known components and the scale of another site, by quadrature."""
    y = np.array([-1.0, 0.5, 2.2, 3.0, 2.6])

    def model(y):
        w = numpyro.sample("w", dist.Beta(2.0, 2.0))
        numpyro.sample("other", dist.Normal(1.0, 2.0))
        with numpyro.plate("row", y.shape[0]):
            z = numpyro.sample("z", dist.Bernoulli(w))
            numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)

    tree = quiet(model, y, method=method, seed=6)

    def density(w):
        likelihood = (1 - w) * stats.norm.pdf(y) + w * stats.norm.pdf(y, 2.0)
        return w * (1 - w) * np.prod(likelihood)

    mass, first, second = (quad(lambda w, k=k: w**k * density(w), 0, 1)[0] for k in range(3))
    mean = first / mass
    assert worst(tree, "w", mean, np.sqrt(second / mass - mean**2)) < 4
    assert worst(tree, "other", 1.0, 2.0) < 4


@pytest.mark.slow
def test_sufficient_statistics_are_used():
    """Normal regression with known errors: the compiled program sees statistics of the rows."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(60, 2))
    y = x @ [1.0, -2.0] + rng.normal(size=60)

    def regression(x, y):
        b = numpyro.sample("b", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        with numpyro.plate("row", x.shape[0]):
            numpyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    engine = Engine(Program(regression, (x, y), {}), MAMS(), 8, jax.devices()[:1])
    assert engine.reduced is not None
    tree = quiet(regression, x, y, method="mams", seed=4)
    covariance = np.linalg.inv(x.T @ x + np.eye(2) / 9.0)
    assert worst(tree, "b", covariance @ x.T @ y, np.sqrt(np.diag(covariance))) < 4


@pytest.mark.slow
def test_a_bare_log_density():
    tree = quiet(lambda x: -0.5 * (x**2).sum(), init=np.zeros(3), method="chees")
    assert tree["posterior"]["x"].shape == (64, 128, 3)
    assert worst(tree, "x", 0.0, 1.0) < 4


# -- what warm-up learns, and what statistics say -----------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_statistics_are_those_of_the_draws(name):
    tree = schools(name)
    told = tree["sample_stats"]
    shared = ("step_size", "trajectory_length", "n_steps")
    for statistic in shared:
        values = told[statistic].values
        np.testing.assert_array_equal(values, np.broadcast_to(values[:1], values.shape))
    assert np.unique(told["step_size"]).size == np.unique(told["trajectory_length"]).size == 1
    share = told["n_steps"].values[0] * told["step_size"].values[0]
    longest = told["trajectory_length"].values[0, 0]
    assert np.all(share < longest + told["step_size"].values[0])
    assert np.unique(told["n_steps"]).size > 1  # trajectories differ in length
    assert tree.attrs["n_gradient_evaluations"] == int(told["n_steps"].sum())
    rate = told["acceptance_rate"].values
    if name == "mams":
        assert abs(rate.mean() - 0.9) < 0.03
    else:
        harmonic = 1 / np.mean(1 / np.maximum(rate, 0.05), 0)
        assert abs(harmonic.mean() - 0.651) < 0.12


def test_gradients_are_counted_as_they_are_made():
    """A callback in the derivative counts those of a run; four more are made at its start."""
    seen = []

    @jax.custom_vjp
    def density(x):
        return -0.5 * (x**2).sum()

    def backward(x, cotangent):
        jax.debug.callback(lambda _: seen.append(1), x[0])
        return (-x * cotangent,)

    density.defvjp(lambda x: (density(x), x), backward)
    tree = quiet(
        lambda x: density(x), init=np.zeros(2), method="mams", chains=4, warmup=20, draws=10
    )
    told = tree.attrs["n_gradient_evaluations"] + tree.attrs["n_gradient_evaluations_warmup"]
    assert len(seen) == told + 4


@pytest.mark.slow
def test_the_length_of_a_normal_target_is_that_of_the_criterion():
    """Of standard normal laws ChEES is highest at a longest trajectory of 2.25 (tan 2T = 2T), far
    from the next peak at 5.45; coarse steps shift it downwards."""
    tree = quiet(normal, np.full(10, 0.3), method=ChEES(target_acceptance=0.95), seed=1, warmup=400)
    assert 1.5 < float(tree["sample_stats"]["trajectory_length"][0, 0]) < 3.0


@pytest.mark.slow
def test_a_funnel_is_found_out():
    tree = quiet(eight_schools_centred, ERRORS, y=EFFECTS, method="chees", seed=0)
    found = {f.kind: f for f in ppl.findings(tree)}
    assert found.keys() & {"divergences", "r_hat", "bfmi", "ess"}
    if "divergences" in found:
        assert "of 64 chains" in found["divergences"].message


# -- what a run promises ------------------------------------------------------------------------


def same(one, other, sites=("m",)):
    for name in sites:
        np.testing.assert_array_equal(one["posterior"][name], other["posterior"][name])


@pytest.mark.parametrize("method", others_slow(METHODS, "mams"))
def test_draws_do_not_depend_on_how_a_run_is_cut_up(method, tmp_path):
    whole = quiet(pair, Y, method=method, **SHORT)
    for chunk in (1, 7):
        same(whole, quiet(pair, Y, method=method, chunk=chunk, **SHORT))
    store = tmp_path / "run.zarr"
    part = quiet(pair, Y, method=method, store=store, **{**SHORT, "draws": 12})
    saved = ppl.load(ppl.save(part.load(), tmp_path / "part.nc"))
    same(whole, quietly(ppl.extend, saved, pair, Y, draws=8))
    same(whole, quiet(pair, Y, resume=store, draws=20))
    assert saved.attrs["lanes"] == 8


@pytest.mark.parametrize("method", others_slow(METHODS, "mams"))
def test_new_data_a_seed_and_more_draws_compile_nothing(method):
    quiet(pair, Y, method=method, **SHORT)
    compilations.clear()
    quiet(pair, Y + 1.0, method=method, seed=5, **{**SHORT, "draws": 33, "warmup": 50})
    assert compilations == []


def test_until_ends_a_run():
    tree = quiet(pair, Y, method="chees", until=ppl.Goal(ess=500), warmup=60, chains=8)
    assert tree.attrs["goal_missing"] == ""
    table = ppl.summary(tree)
    assert min(table["ess_bulk"].min(), table["ess_tail"].min()) >= 500
    with pytest.raises(OptionError, match="decides itself how far it goes"):
        ppl.infer(pair, Y, method="map", until=ppl.Goal(ess=500))


@pytest.mark.parametrize("method", others_slow(METHODS, "chees"))
def test_a_refit_takes_over_what_was_learned(method):
    """Superchains begin where the first of their chains ended; the metric stays."""
    first = quiet(pair, Y, method=method, warmup=100, chains=8, draws=60)
    assert first.attrs["superchains"] == 4
    again = quiet(pair, Y + 2.0, method=method, init=first, warmup=0, chains=8, draws=60)
    old, new = first["sampler_state"], again["sampler_state"]
    np.testing.assert_array_equal(old["metric.factor"], new["metric.factor"])
    step = float(again["sample_stats"]["step_size"][0, 0])
    np.testing.assert_allclose(step, np.exp(old["averaging.log_average"][0]), rtol=1e-12)


def test_results_of_other_methods():
    """NUTS knows all that it needs of an ensemble's state, but not the other way round: then, and
    where there are other chains, those begin at draws and are warmed up in full."""
    many = quiet(pair, Y, method="mams", warmup=60, chains=8, draws=20)
    nuts = quiet(pair, Y, method="nuts", init=many, chains=8, draws=20)
    assert nuts.attrs["warmup"] == NUTS.refit_warmup
    assert quiet(pair, Y, method="chees", init=many, chains=8, warmup=20, draws=20)
    for method, chains in ((ChEES(), 8), (NUTS(), 6), (NUTS(metric="low rank"), 8)):
        tree = quiet(pair, Y, method=method, init=nuts, chains=chains, draws=1)
        assert tree["posterior"].sizes["chain"] == chains
        assert tree.attrs["warmup"] == method.warmup


def test_chains_begin_at_the_last_draws_of_another_result():
    """Without warm-up and with steps of no length they stay there; superchains share starts."""
    first = quiet(pair, Y, method="slice", chains=4, warmup=50, draws=20)
    last = first["posterior"]["m"].values[:, -1]
    options = {"init": first, "warmup": 0, "draws": 1}
    still = MCMC(RandomWalk(scale=1e-12))
    tree = quiet(pair, Y, method=still, chains=4, **options)
    np.testing.assert_allclose(tree["posterior"]["m"].values[:, 0], last, atol=1e-9)
    tree = quiet(pair, Y, method=still, chains=8, superchains=4, **options)
    shared = np.repeat(last, 2, axis=0)
    np.testing.assert_allclose(tree["posterior"]["m"].values[:, 0], shared, atol=1e-9)


def test_many_data_sets_have_the_draws_of_each_alone():
    data = np.stack([Y, Y + 1.0, Y - 2.0])
    both = quietly(ppl.infer_batch, pair, y=data, over="y", method="chees", seed=[4, 5, 6], **SHORT)
    for number, row in enumerate(data):
        own = quiet(pair, row, method="chees", seed=4 + number, **SHORT)
        one = ppl.one_of(both, number)
        same(one, own)
        assert one.attrs["superchains"] == own.attrs["superchains"] == 4
        nested = float(ppl.summary(own)["r_hat"].max())
        np.testing.assert_allclose(both["diagnostics"]["r_hat"][number], nested, rtol=1e-12)


# -- superchains --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_nested_r_hat_is_what_is_shown(name):
    tree = schools(name)
    assert tree["posterior"].sizes["chain"] == 64
    assert tree["posterior"].sizes["draw"] == 128
    assert tree.attrs["superchains"] == 16
    tau = tree["posterior"]["tau"].values
    nested = convergence.rhat_nested(tau, np.repeat(np.arange(16), 4))
    assert float(ppl.summary(tree, "tau")["r_hat"].iloc[0]) == nested
    assert nested < convergence.rhat(tau)
    text = ppl.report(tree)
    assert "64 chains of 128 draws, 16 superchains" in text
    assert "r_hat is nested: it compares 16 superchains, of 4 chains" in text
    assert "Verdict: nothing looks wrong." in text
    some = tree.isel(chain=slice(0, 10))  # parts of superchains are no superchains
    expected = convergence.rhat(tau[:10])
    assert float(ppl.summary(some, "tau")["r_hat"].iloc[0]) == expected


def test_the_page_says_so(tmp_path):
    ppl.report(schools("mams"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ">nested R-hat</th>" in page
    assert "superchains=16," in page
    assert "marks nested R-hat above 1.01 or ESS below 1600" in page


def test_numbers_of_superchains():
    """Up to sixteen, two chains or more in each; none where chains cannot be parted."""
    for chains, groups in ((64, 16), (32, 16), (48, 16), (20, 10), (8, 4), (7, 0), (4, 0)):
        assert _default_superchains(ChEES(), chains) == groups
        assert _default_superchains(NUTS(), chains) == 0


def first_points(**options):
    tree = quiet(pair, Y, method="chees", warmup=0, draws=1, **options)
    # One short trajectory moves little: what began together is still near.
    return tree, tree["posterior"]["m"].values[:, 0]


def test_superchains_begin_at_the_values_they_are_given():
    values = np.array([[-30.0, 0.0], [-10.0, 5.0], [10.0, -5.0], [30.0, 0.0]])
    for method, options in (("chees", {}), (NUTS(), {"superchains": 4})):
        tree = quiet(
            pair, Y, method=method, chains=8, init={"m": values}, warmup=0, draws=1, **options
        )
        assert tree.attrs["superchains"] == 4
        m = tree["posterior"]["m"].values[:, 0]
        assert np.abs(m - np.repeat(values, 2, 0)).max() < 5.0
    last = quiet(pair, Y, draws=30)["posterior"]["m"][:, -1].values  # of four chains of NUTS
    again = quiet(pair, Y, method="chees", chains=8, init={"m": last}, warmup=20, draws=20)
    assert again.attrs["superchains"] == 4


def test_chains_with_starts_of_their_own_are_no_superchains():
    values = np.linspace(-40.0, 40.0, 16).reshape(8, 2)
    tree, m = first_points(chains=8, init={"m": values})
    assert tree.attrs["superchains"] == 0
    assert np.abs(m - values).max() < 5.0
    with pytest.raises(SiteError, match=r"\(4, 2\) with one value per superchain"):
        quiet(pair, Y, method="chees", chains=8, superchains=4, init={"m": values})


# -- what is refused ----------------------------------------------------------------------------


REFUSED = {
    "some lanes": ({"lanes": 4}, OptionError, "advance together, in as many lanes"),
    "devices": ({"devices": jax.devices() * 2}, OptionError, "on one device; got 2"),
    "one chain": ({"chains": 1}, OptionError, "needs chains=2 or more"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_calls_that_are_refused(what):
    options, error, text = REFUSED[what]
    compilations.clear()
    with pytest.raises(error, match=text):
        ppl.infer(pair, Y, method="mams", **options)
    assert compilations == []
    assert quiet(pair, Y, method="mams", chains=4, lanes=4, warmup=0, draws=2)


def test_methods_that_cannot_serve_a_model_say_so():
    with pytest.raises(MethodError, match="two dimensions or more"):
        ppl.infer(conjugate, Y, method="mams")

    def counts(y):
        k = numpyro.sample("k", dist.Poisson(3.0))
        numpyro.sample("y", dist.Normal(k + numpyro.sample("e", dist.Normal()), 1.0), obs=y)

    with pytest.raises(MethodError, match="ChEES"):
        ppl.infer(counts, Y, method="chees")
    with pytest.raises(MethodError, match="adapts its chains together, and cannot run one alone"):
        ppl.calibrate(pair, Y, method="chees", replications=20)
    for option in ({"target_acceptance": 1.0}, {"metric": "round"}, {"max_steps": 0},
                   {"warmup": -1}, {"init_radius": -1.0}):  # fmt: skip
        for method in (ChEES, MAMS):
            with pytest.raises(OptionError, match=next(iter(option))):
                method(**option)


def test_no_start_and_stuck_chains_are_reported():
    def nowhere(x):
        return (x * np.nan).sum()

    with pytest.raises(InitializationError, match="chain 0 found no finite log density"):
        ppl.infer(nowhere, init=np.zeros(2), method="chees", progress=False)

    def peaks(x):  # one of them so narrow that no chain gets out of it by steps for the other
        narrow = 1e4 - 5e7 * ((x - 30.0) ** 2).sum()
        return jax.numpy.maximum(-0.5 * (x**2).sum(), narrow)

    starts = np.zeros((4, 2))
    starts[1] = 30.0
    chains = {"chains": 8, "init": {"x": starts}}
    tree = quiet(as_model(peaks), method="mams", warmup=60, draws=60, **chains)
    assert np.abs(tree["posterior"]["x"]).max() < 8.0  # they went on from where the others were
    tree = quiet(as_model(peaks), method="mams", warmup=0, draws=60, **chains)
    found = {f.kind: f for f in ppl.findings(tree)}
    assert "chains [2, 3] stood still" in found["stuck"].message
    assert "MAMS(target_acceptance=0.95)" in found["divergences"].remedy


def as_model(density):
    def model():
        flat = dist.ImproperUniform(dist.constraints.real_vector, (), (2,))
        numpyro.factor("target", density(numpyro.sample("x", flat)))

    return model


def test_options_are_kept_with_the_run():
    tree = quiet(pair, Y, method=ChEES(max_steps=7, target_acceptance=0.7), **SHORT)
    assert json.loads(tree.attrs["method_options"])["max_steps"] == 7
    assert int(tree["sample_stats"]["n_steps"].max()) <= 7
