"""Stochastic-gradient methods through `infer`: right, restartable, compiled once, refused."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, others_slow, quiet, quietly

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import MCMC, NUTS, Cyclical, Gibbs, block, cycle

rng = np.random.default_rng(3)
N = 400
X = rng.normal(size=(N, 2)) @ np.array([[1.0, 0.4], [0.0, 0.9]])
Y = X @ np.array([0.8, -0.5]) + rng.normal(size=N)
COVARIANCE = np.linalg.inv(X.T @ X + np.eye(2) / 4)
MEAN, SD = COVARIANCE @ X.T @ Y, np.sqrt(np.diag(COVARIANCE))


def regression(x, y, batch):
    w = numpyro.sample("w", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("row", len(y), subsample_size=batch) as row:
        numpyro.deterministic("centre", x[row] @ w)
        numpyro.sample("y", dist.Normal(x[row] @ w, 1), obs=y[row])


METHODS = {
    "sgld": (ppl.SGLD(2e-4, steps=10, warmup=200), 0.1),
    "sgld, control variates": (ppl.SGLD(1e-3, steps=5, warmup=200, control_variates=True), 0.15),
    "sghmc": (ppl.SGHMC(6e-3, friction=0.2, steps=10, warmup=300), 0.1),
    "sghmc, scale-adapted": (
        ppl.SGHMC(1e-2, friction=0.2, steps=10, warmup=300, scale_adapted=True), 0.15,
    ),
    "sgnht": (ppl.SGNHT(1e-2, steps=10, warmup=300), 0.1),
    "sgld, cyclical": (ppl.SGLD(Cyclical(6e-4, 200, 0.5), steps=10, warmup=100), 0.1),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_regression_by_minibatches(name):
    """The exact posterior: the mean within 4 standard errors and a tenth of its standard deviation
    (minibatches of a tenth of the data), the standard deviation within the share given."""
    method, bias = METHODS[name]
    tree = quiet(regression, X, Y, 40, method=method, draws=1500, seed=1)
    draws = np.asarray(tree["posterior"]["w"])
    for i in range(2):
        error = 4 * ppl.convergence.mcse(draws[..., i])
        assert abs(draws[..., i].mean() - MEAN[i]) < error + 0.1 * SD[i]
        error = 4 * ppl.convergence.mcse(draws[..., i], "sd")
        assert abs(draws[..., i].std() - SD[i]) < error + bias * SD[i]
    assert not tree["sample_stats"]["diverging"].any()
    assert "nothing rejected" in tree.attrs["approximation"]


def hierarchical(x, y, batch):
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    on = numpyro.sample("on", dist.Bernoulli(0.5))
    w = numpyro.sample("w", dist.Normal(0, tau).expand([2]).to_event(1))
    with numpyro.plate("row", len(y), subsample_size=batch) as row:
        numpyro.sample("y", dist.Normal(x[row] @ w + 0.12 * on, 1), obs=y[row])


@pytest.mark.slow
def test_other_kernels_of_a_cycle_see_all_rows():
    """The same posterior as with whole gradients: means within 4 standard errors (three numbers:
    2e-4) and a tenth of a standard deviation. Minibatches of a twentieth would move the
    probability of ``on`` to the prior's if Gibbs saw them alone."""
    shift = Y + 0.12

    def kernel(method):
        blocks = [block(method, "w"), block(NUTS(), "tau"), block(Gibbs(), "on")]
        return MCMC(cycle(blocks), warmup=300)

    noisy = ppl.SGLD(2e-4, steps=20, control_variates=True)
    options = {"draws": 1000, "seed": 2}
    found = quiet(hierarchical, X, shift, 20, method=kernel(noisy), **options)
    wanted = quiet(hierarchical, X, shift, None, method=kernel(NUTS()), **options)
    for site in ("on", "tau", "w"):
        draws = [np.asarray(tree["posterior"][site], float) for tree in (found, wanted)]
        draws = [x[..., 0] if x.ndim == 3 else x for x in draws]
        error = 4 * np.hypot(*[ppl.convergence.mcse(x) for x in draws])
        assert abs(draws[0].mean() - draws[1].mean()) < error + 0.1 * draws[1].std(), site
    assert "subsampled_plates" not in found.attrs
    assert "lp" not in found["sample_stats"]


def test_results_are_of_all_the_data():
    tree = quiet(regression, X, Y, 40, method=ppl.SGLD(2e-4, warmup=20), draws=30)
    assert tree.attrs["minibatched_plates"] == "row"
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    assert tree["posterior"]["centre"].shape == (4, 30, 40)  # what the model computes row by row
    tree = ppl.predict(ppl.log_likelihood(tree, regression, X, Y, 40), regression, X, Y, 40)
    w = np.asarray(tree["posterior"]["w"])
    wanted = -0.5 * (Y - w @ X.T) ** 2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], wanted, rtol=1e-10)
    assert tree["posterior_predictive"]["y"].shape == (4, 30, N)
    assert "Approximate: stochastic gradients" in ppl.report(tree)
    assert not [found for found in ppl.findings(tree) if found.kind == "subsample"]


KERNELS = {
    "scale-adapted": ppl.SGHMC(
        Cyclical(1e-2, 9, 0.4), steps=2, scale_adapted=True, control_variates=True
    ),
    "thermostat": ppl.SGNHT(5e-3, steps=2),
    "in a cycle": MCMC(cycle([block(ppl.SGLD(1e-3, control_variates=True), "w")])),
}


@pytest.mark.parametrize("name", others_slow(KERNELS, "in a cycle"))
def test_chunks_extensions_and_resumptions_give_the_same_draws(name, tmp_path):
    model, args, method = regression, (X, Y, 40), KERNELS[name]
    options = {"method": method, "warmup": 30, "chains": 2, "seed": 3}
    whole = quiet(model, *args, draws=30, chunk=7, **options)
    store = tmp_path / "run.zarr"
    part = quiet(model, *args, draws=20, store=store, threads=1, **options)
    saved = ppl.load(ppl.save(part.load(), tmp_path / "part.nc"))
    for again in (
        quietly(ppl.extend, saved, model, *args, draws=10, method=method),
        quiet(model, *args, draws=30, resume=store, method=method),
    ):
        for group in ("posterior", "sample_stats"):
            for site, values in whole[group].data_vars.items():
                np.testing.assert_array_equal(again[group][site], values)


def test_a_stored_run_with_plain_options_goes_on_by_itself():
    options = {"method": ppl.SGLD(1e-3), "warmup": 10, "chains": 1}
    tree = quiet(regression, X, Y, 40, draws=10, **options)
    more = quietly(ppl.extend, tree, regression, X, Y, 40, draws=5)
    assert more.attrs["method"] == "SGLD"
    assert more["posterior"].sizes["draw"] == 15


def test_new_data_of_the_same_shape_and_new_step_sizes_compile_nothing():
    options = {"method": ppl.SGHMC(1e-2, control_variates=True), "warmup": 20, "chains": 1}
    quiet(regression, X, Y, 40, draws=20, **options)
    compilations.clear()
    program = ppl.Program(regression, (X, Y + 0.5, 40))
    assert program.whole.sites["y"].shape == (N,)
    options["method"] = ppl.SGHMC(2e-3, friction=0.3, control_variates=True)
    tree = quiet(regression, X, Y + 0.5, 40, draws=30, seed=9, **options)
    assert set(np.unique(tree["sample_stats"]["step_size"])) == {2e-3}
    refit = quiet(regression, X, Y + 1.0, 40, draws=30, init=tree, **options)
    assert refit["posterior"].sizes["draw"] == 30
    assert len(compilations) <= 1  # the refresh of the refit


# -- what is refused ------------------------------------------------------------------------------


def effects(y):
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    with numpyro.plate("row", len(y), subsample_size=5) as row:
        z = numpyro.sample("z", dist.Normal(0, tau))
        numpyro.sample("y", dist.Normal(z, 1), obs=y[row])


def written_out(y):
    m = numpyro.sample("m", dist.Normal(0, 1))
    with numpyro.plate("row", len(y), subsample_size=5) as row:
        numpyro.sample("y", dist.Normal(m * np.ones(5), 1), obs=y[row])


def switched(y):
    on = numpyro.sample("on", dist.Bernoulli(0.5))
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(m + on, 1), obs=y)


REFUSED = {
    "latent sites that see new rows": (
        effects, ppl.SGLD(0.01), r"\['z'\] are latent inside such a plate.*z\[rows\]",
    ),
    "the same, in a cycle": (
        effects, MCMC(cycle([block(ppl.SGLD(0.01), "tau"), block(NUTS(), "z")])), r"\['z'\]",
    ),
    "control variates of a model that cannot see all": (
        written_out, ppl.SGLD(0.01, control_variates=True), "all rows of.*row.*no batch size",
    ),
    "other kernels of such a model": (
        written_out, MCMC(cycle([ppl.SGLD(0.01), NUTS()])), "kernels beside it",
    ),
    "discrete sites": (switched, ppl.SGHMC(0.01), r"sites \['on'\] are discrete. Compose it"),
    "a block that is forgotten": (
        switched, MCMC(block(ppl.SGLD(0.01), "m")), r"moves the latent sites \['on'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_any_compilation(what):
    model, method, message = REFUSED[what]
    with pytest.raises(MethodError, match=message):
        ppl.infer(model, Y[:12], method=method)


def test_a_batch_size_that_is_written_out_is_no_harm_to_plain_gradients():
    tree = quiet(written_out, Y[:12], method=ppl.SGLD(0.01, warmup=10), draws=20)
    assert np.isfinite(tree["posterior"]["m"]).all()


def test_a_name_is_not_enough():
    with pytest.raises(OptionError, match="SGLD needs a step size"):
        ppl.infer(regression, X, Y, 40, method="sgld")


def test_divergences_and_heat_are_found():
    tree = quiet(regression, X, Y, 40, method=ppl.SGLD(2.0, warmup=10), draws=200)
    kinds = {found.kind: found for found in ppl.findings(tree)}
    assert kinds["divergences"].severity == "error"
    assert "step_size" in kinds["divergences"].remedy
    assert np.isfinite(tree["posterior"]["w"]).all()
    tree = quiet(regression, X, Y, 40, method=ppl.SGHMC(3e-2, warmup=50), draws=200)
    assert {found.kind for found in ppl.findings(tree)} >= {"hot"}


@pytest.mark.slow
def test_the_checks_find_the_bias():
    """Steps of a third of the variance: 1 / (1 - e a / 4), variances 9% too large; and smaller
    ones pass."""

    def mean(y):
        m = numpyro.sample("m", dist.Normal(0, 2))
        numpyro.sample("y", dist.Normal(m, 1), obs=y)

    assert ppl.check(mean, Y[:3], method=ppl.SGLD(0.8)).guilty == ["sgld"]
    assert ppl.check(mean, Y[:3], method=ppl.SGLD(0.002))
