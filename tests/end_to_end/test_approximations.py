"""Laplace, Pathfinder and SVI as a user meets them: one door, one result, one report."""

import os
import subprocess
import sys

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet, quietly
from models import EFFECTS, ERRORS, die, eight_schools
from scipy import special, stats

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics import approximation
from ppl_toolkit.errors import CheckpointError, DataError, MethodError, OptionError, SamplingError
from ppl_toolkit.inference import SVI, Laplace, ParticleFilter, Pathfinder, method_names

Y = np.array([2, 0, 1, 4, 2, 3, 1, 2])
X = np.linspace(-1.0, 1.0, 8)


def counts(x, y=None):
    """A Poisson regression: nearly normal."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Poisson(numpyro.deterministic("rate", np.e ** (a + b * x))), obs=y)


@pytest.fixture(scope="module")
def fitted():
    return quiet(counts, X, y=Y, method="laplace")


def test_the_result_is_labelled_and_says_what_it_is(fitted):
    assert fitted["posterior"]["rate"].dims == ("chain", "draw", "row")
    assert fitted["posterior"].sizes["draw"] == 1000
    assert {"approximation", "sample_stats", "observed_data", "sampler_state"} <= set(
        fitted.children
    )
    assert "normal law at the mode" in fitted.attrs["approximation"]
    assert fitted.attrs["khat"] < 0.5
    assert {"laplace", "pathfinder", "svi"} <= set(method_names())
    assert ppl.findings(fitted) == []
    table = ppl.summary(fitted, ["a", "b"])
    assert table["r_hat"].max() < 1.01


def test_the_evidence_is_that_of_quadrature(fitted):
    """The sum over a fine grid, which is exact to many digits for smooth integrands."""
    a, b = np.meshgrid(*2 * [np.linspace(-6.0, 6.0, 601)], indexing="ij")
    eta = a[..., None] + b[..., None] * X
    logs = (Y * eta - np.exp(eta) - special.gammaln(Y + 1)).sum(-1)
    logs += stats.norm.logpdf(a) + stats.norm.logpdf(b)
    exact = special.logsumexp(logs) + 2 * np.log(12.0 / 600)
    group = fitted["approximation"]
    logs, errors = group["log_evidence"].values, group["log_evidence_sd"].values
    assert np.all(np.abs(logs - exact) < 4.5 * errors)
    assert np.all(errors < 0.02)
    np.testing.assert_array_equal(fitted["sample_stats"]["log_evidence"][:, -1], logs)


def test_the_report_speaks_of_weights_not_of_chains(fitted, tmp_path):
    path = tmp_path / "page.html"
    text = ppl.report(fitted, path)
    assert "k-hat" in text
    assert "(good)" in text
    assert "ess" not in text
    page = path.read_text()
    assert 'id="approximation"' in page
    assert 'id="importance-weights"' in page
    assert 'id="evidence"' in page
    for section in ("convergence", "sampler"):
        assert f'<section id="{section}"' not in page
    assert "bulk ESS" not in page
    assert "independent draws of a normal law at the mode" in page


def test_what_comes_after_a_run_works(fitted, tmp_path):
    ppl.save(fitted, tmp_path / "run.nc")
    again = ppl.load(tmp_path / "run.nc")
    np.testing.assert_array_equal(again["posterior"]["a"], fitted["posterior"]["a"])
    assert [f.kind for f in ppl.findings(again)] == []
    assert approximation.weights_of(again).khat == fitted.attrs["khat"]
    predicted = ppl.predict(fitted, counts, X)["predictions"]["y"]
    assert predicted.sizes["row"] == 8
    assert ppl.loo(fitted, counts, X, y=Y).elpd < 0


def test_stored_runs_go_on(fitted, tmp_path):
    """A run that is cut off and resumed has the draws of the whole one; other data are refused."""
    path = tmp_path / "run.zarr"
    quiet(counts, X, y=Y, method="laplace", draws=400, store=path)
    whole = quietly(ppl.infer, counts, X, y=Y, resume=path, draws=1000)
    np.testing.assert_array_equal(whole["posterior"]["b"], fitted["posterior"]["b"])
    with pytest.raises(CheckpointError, match="data"):
        ppl.extend(fitted, counts, X, y=Y + 1, progress=False)


def test_many_data_sets_are_those_of_infer_one_by_one(fitted):
    sets = np.stack([Y, Y[::-1], Y + 1])
    compilations.clear()
    fits = quietly(ppl.infer_batch, counts, X, y=sets, over="y", method="laplace", seed=[0, 1, 2])
    assert not compilations
    np.testing.assert_array_equal(fits["posterior"]["a"][0], fitted["posterior"]["a"])
    assert fits["approximation"]["khat"].dims == ("data_set", "chain")
    assert fits["diagnostics"]["khat"].sizes == {"data_set": 3}
    one = ppl.one_of(fits, 0)
    assert one.attrs["khat"] == fitted.attrs["khat"]


def test_a_result_gives_starting_points_to_other_methods(fitted):
    started = quiet(counts, X, y=Y, init=fitted, chains=2, warmup=0, draws=1)
    assert started.attrs["method"] == "NUTS"
    first = fitted["posterior"]["a"].values.reshape(-1)[[0, 2000]]
    # Nothing is learned without warm-up: one short trajectory away from where it began.
    assert np.abs(started["posterior"]["a"].values[:, 0] - first).max() < 1.5
    full = quiet(counts, X, y=Y, init=fitted)
    assert int(full.attrs["warmup"]) == 1000
    assert abs(full["posterior"]["a"].mean() - fitted["posterior"]["a"].mean()) < 0.05
    with pytest.raises(CheckpointError, match="site 'm'"):
        ppl.infer(two_normals, Y * 1.0, init=fitted, progress=False)


def two_normals(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def test_goals_are_refused(fitted):
    for method in ("laplace", "pathfinder", "svi"):
        with pytest.raises(OptionError, match="until="):
            ppl.infer(counts, X, y=Y, method=method, until=ppl.Goal(ess=100), progress=False)


def test_what_cannot_be_served_is_refused_before_anything_compiles():
    compilations.clear()
    for method in ("laplace", "pathfinder", "svi"):
        with pytest.raises(MethodError, match="discrete"):
            ppl.infer(die, 1.0, method=method, progress=False)
        with pytest.raises(DataError, match="NaN"):
            ppl.infer(two_normals, np.array([1.0, np.nan]), method=method, progress=False)
        with pytest.raises(DataError, match="no data"):
            ppl.infer(two_normals, np.zeros(0), method=method, progress=False)
    with pytest.raises(OptionError, match="LaplaceProposal"):
        ParticleFilter(proposal=Laplace())
    assert not compilations


# --- where approximations fail ------------------------------------------------------------------


@pytest.fixture(scope="module")
def poor():
    return quiet(eight_schools, ERRORS, y=EFFECTS, method=Pathfinder(paths=2), chains=2)


@pytest.mark.slow
def test_a_funnel_is_told_by_k(poor, tmp_path):
    """Heavy weights: an error that names NUTS, on the page as well."""
    (finding,) = [f for f in ppl.findings(poor) if f.kind == "approximation"]
    assert finding.severity == "error"
    assert "init=result" in finding.remedy
    assert finding.number > 0.7
    text = ppl.report(poor, tmp_path / "page.html")
    assert "bad: do not trust these draws" in text
    page = (tmp_path / "page.html").read_text()
    assert 'id="paths"' in page
    assert 'href="#importance-weights"' in page


def heavy(y):
    """Student's t with two degrees of freedom: a normal law at its mode is far too thin."""
    m = numpyro.sample("m", dist.StudentT(2.0, 0.0, 1.0).expand([6]).to_event(1))
    numpyro.sample("y", dist.Normal(m[0], 100.0), obs=y)


@pytest.mark.slow
def test_heavy_tails_are_told_by_k():
    tree = quiet(heavy, np.zeros(1), method="laplace")
    assert tree.attrs["khat"] > 0.7
    assert ppl.findings(tree)[0].kind == "approximation"
    assert np.isnan(tree["sample_stats"]["log_evidence"]).any()


def mixture(y):
    """Which half a datum is of is summed out."""
    m = numpyro.sample("m", dist.Normal(0.0, 3.0))
    with numpyro.plate("row", y.shape[0]):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(m * k, 1.0), obs=y)


@pytest.mark.slow
def test_discrete_sites_are_summed_out():
    y = np.concatenate([np.random.default_rng(0).normal(c, 1, 20) for c in (0, 3)])
    reference = quiet(mixture, y)["posterior"]["m"]
    for method in (Laplace(starts=2), Pathfinder(paths=2), SVI(guide="normal", steps=1000)):
        found = quiet(mixture, y, method=method, chains=2)["posterior"]["m"]
        assert abs(float(found.mean() - reference.mean())) < 0.15 * float(reference.std())
        assert 0.85 < float(found.std() / reference.std()) < 1.15


@pytest.mark.slow
def test_modes_far_apart_are_told_by_r_hat():
    """Each chain climbs once: what they find differs."""

    def modes(y):
        m = numpyro.sample("m", dist.Normal(0.0, 5.0))
        numpyro.sample("y", dist.Normal(m**2, 0.5), obs=y)

    tree = quiet(modes, np.full(3, 9.0), method=Laplace(starts=1), seed=1)
    kinds = {finding.kind: finding for finding in ppl.findings(tree)}
    assert kinds["r_hat"].severity == "error"
    assert "different approximations" in kinds["r_hat"].message


@pytest.mark.slow
def test_few_draws_of_one_law_raise_no_alarm():
    """Twenty scalars, exactly normal, 100 draws a chain: R-hat above its limit at one scalar in
    100,000, in any of twenty runs at one in 250."""

    def means(y):
        m = numpyro.sample("m", dist.Normal(0.0, 10.0).expand([20]).to_event(1))
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    y = np.random.default_rng(0).normal(3.0, 1.0, (12, 20))
    for seed in range(20):
        tree = quiet(means, y, method="laplace", draws=100, seed=seed)
        assert "r_hat" not in {finding.kind for finding in ppl.findings(tree)}


SECOND_PROCESS = """
import numpy as np, numpyro, numpyro.distributions as dist, ppl_toolkit as ppl

def model(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

found = ppl.infer(model, np.ones(9), method="laplace", progress=False)
print(found["posterior"]["m"].mean().item())
"""


@pytest.mark.slow
def test_programs_from_the_disk_find_lapack(tmp_path):
    """The second process compiles and lowers nothing; it must bind the library itself."""
    seen = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SECOND_PROCESS],
            env={**os.environ, "PPL_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout)
    assert seen[0] == seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"precision": "float32"}, {"lanes": 4}])
def test_other_precisions_and_lanes(options):
    for method in (Laplace(), Pathfinder(), SVI(steps=1500)):
        tree = quiet(counts, X, y=Y, method=method, **options)
        assert tree["approximation"]["weight_ess"].min() > 800
        assert tree["posterior"]["a"].dtype == options.get("precision", "float64")


@pytest.mark.slow
def test_log_densities_of_positions_serve():
    def density(x):
        return -0.5 * (x["u"] ** 2).sum() - 0.5 * ((x["v"] - 2.0) / 0.1) ** 2

    start = {"u": np.zeros(2), "v": np.array(0.0)}
    tree = quiet(density, init=start, method="pathfinder")
    assert abs(float(tree["posterior"]["v"].mean()) - 2.0) < 0.01
    more = quietly(ppl.extend, tree, density, draws=100)
    assert more["posterior"].sizes["draw"] == 1100
    nuts = quiet(density, init=tree, draws=200)
    assert nuts.attrs["method"] == "NUTS"


@pytest.mark.slow
def test_a_law_that_was_not_found_says_so_and_keeps_what_there_is():
    def rises(y):
        m = numpyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.factor("up", m)
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(SamplingError, match=r"does not fall along \['m'\]") as caught:
        quiet(rises, np.zeros(2), method=Laplace(starts=1, steps=20), chains=1)
    assert "posterior" in caught.value.partial.children
