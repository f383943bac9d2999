"""Results follow ArviZ's schema, survive their files, and serve prediction."""

import warnings

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet
from models import EFFECTS, ERRORS, conjugate, eight_schools
from numpyro.infer import MCMC, NUTS
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit.errors import DataError, OptionError, SiteError

SCHOOLS = ["Choate", "Deerfield", "Andover", "Hotchkiss", "Lawrenceville", "St. Paul's",
           "Mt. Hermon", "Phillips Exeter"]  # fmt: skip


@pytest.fixture(scope="module")
def schools():
    return quiet(eight_schools, ERRORS, y=EFFECTS, seed=1, coords={"school": SCHOOLS})


@pytest.fixture(scope="module")
def completed(schools):
    with_likelihood = ppl.log_likelihood(schools, eight_schools, ERRORS, y=EFFECTS)
    return ppl.predict(with_likelihood, eight_schools, ERRORS, y=EFFECTS, seed=2)


class TestSchema:
    def test_groups_dims_and_labels(self, schools):
        assert {"posterior", "sample_stats", "observed_data", "constant_data",
                "sampler_state"} <= set(schools.children)  # fmt: skip
        theta = schools["posterior"]["theta"]
        assert theta.dims == ("chain", "draw", "school")
        assert theta.shape == (4, 1000, 8)
        assert list(theta.coords["school"].values) == SCHOOLS
        assert list(schools["posterior"].data_vars) == ["mu", "tau", "z", "theta"]
        assert list(schools["constant_data"].data_vars) == ["sigma"]
        np.testing.assert_array_equal(schools["observed_data"]["y"], EFFECTS)
        assert schools["observed_data"]["y"].dims == ("school",)
        assert schools["constant_data"]["sigma"].dims == ("school",)

    def test_sample_stats_have_the_schema_s_names_and_signs(self, schools):
        sampled = schools["sample_stats"]
        expected = {"lp", "acceptance_rate", "step_size", "tree_depth", "n_steps", "diverging",
                    "energy", "energy_error", "max_energy_error",
                    "reached_max_treedepth"}  # fmt: skip
        assert set(sampled.data_vars) == expected
        assert sampled["diverging"].dtype == bool
        assert (np.asarray(sampled["energy"]) > -np.asarray(sampled["lp"])).all()
        small, usual = np.unique(sampled["step_size"])  # pooled; halved at every sixteenth draw
        np.testing.assert_allclose(2 * small, usual)

    def test_attributes_are_complete_and_plain(self, schools):
        attrs = schools.attrs
        for name in ("seed", "method", "method_options", "model_hash", "data_hash", "precision",
                     "backend", "time_compile", "time_warmup", "time_sampling", "jax_version",
                     "n_gradient_evaluations", "n_gradient_evaluations_warmup", "inference_library",
                     "creation_library", "created_at", "findings"):  # fmt: skip
            assert name in attrs, name
        for value in (*attrs.values(), *schools["posterior"].attrs.values()):
            assert isinstance(value, str | int | float | list), value
        total = int(schools["sample_stats"]["n_steps"].sum())
        assert attrs["n_gradient_evaluations"] == total

    def test_results_are_numpy(self, schools):
        for group in schools.children.values():
            for variable in group.data_vars.values():
                assert isinstance(variable.data, np.ndarray)
        assert schools["posterior"]["mu"].dtype == np.float64

    def test_lp_is_the_sum_of_its_parts(self, completed):
        """lp = log prior + log likelihood + log |Jacobian| (tau is on the log scale)."""
        prior = sum(v.sum([d for d in v.dims if d not in ("chain", "draw")])
                    for v in completed["log_prior"].data_vars.values())  # fmt: skip
        likelihood = completed["log_likelihood"]["y"].sum("school")
        jacobian = np.log(completed["posterior"]["tau"])
        np.testing.assert_allclose(
            prior + likelihood + jacobian, completed["sample_stats"]["lp"], rtol=1e-9, atol=1e-9
        )

    def test_log_prior_and_likelihood_are_the_densities(self, completed):
        draws = completed["posterior"]
        np.testing.assert_allclose(
            completed["log_prior"]["mu"], stats.norm(0, 5).logpdf(draws["mu"]), rtol=1e-10
        )
        np.testing.assert_allclose(
            completed["log_likelihood"]["y"],
            stats.norm(draws["theta"], ERRORS).logpdf(EFFECTS),
            rtol=1e-10,
        )


@pytest.mark.slow
def test_the_same_draws_through_arviz_from_numpyro_give_the_same_groups():
    """NumPyro's own sampler and converter agree with our names, dims, data and likelihood."""
    with jax.enable_x64(True):
        mcmc = MCMC(NUTS(eight_schools), num_warmup=50, num_samples=20, progress_bar=False)
        mcmc.run(jax.random.key(0), ERRORS, y=EFFECTS)
        theirs = az.from_numpyro(mcmc, log_likelihood=True)
    ours = quiet(eight_schools, ERRORS, y=EFFECTS, draws=20, warmup=50, chains=1)
    for name, variable in theirs["posterior"].data_vars.items():
        ours["posterior"][name][:] = variable.values  # their draws in our tree
    ours = ppl.log_likelihood(ours, eight_schools, ERRORS, y=EFFECTS)
    assert set(ours["posterior"].data_vars) == set(theirs["posterior"].data_vars)
    for group in ("posterior", "log_likelihood", "observed_data"):
        for name, variable in theirs[group].data_vars.items():
            assert ours[group][name].dims == variable.dims
            np.testing.assert_allclose(ours[group][name], variable, rtol=1e-10)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".nc", ".zarr"])
    def test_round_trip_is_exact(self, suffix, completed, tmp_path):
        path = ppl.save(completed, tmp_path / f"run{suffix}")
        back = ppl.load(path)
        assert back.load().identical(completed)
        opened = az.from_netcdf(path) if suffix == ".nc" else az.from_zarr(path)
        assert opened.load().identical(completed)

    def test_a_stored_run_opens_with_arviz(self, tmp_path):
        tree = quiet(eight_schools, ERRORS, y=EFFECTS, draws=50, warmup=50,
                     store=tmp_path / "run.zarr", coords={"school": SCHOOLS})  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = az.from_zarr(tmp_path / "run.zarr")
        np.testing.assert_array_equal(opened["posterior"]["theta"], tree["posterior"]["theta"])
        assert list(opened["posterior"]["school"].values) == SCHOOLS
        assert opened["posterior"]["theta"].dims == ("chain", "draw", "school")

    @pytest.mark.slow
    def test_memory_is_bounded_when_streaming(self, tmp_path):
        """Draws of a run of 30 MB never sit in memory together."""
        import tracemalloc

        def wide(n, y):
            with numpyro.plate("n", n):
                numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(0, 1), obs=y)

        options = {"chains": 1, "warmup": 20, "chunk": 50, "method": ppl.HMC(steps=1)}
        quiet(wide, 2000, 0.0, draws=50, **options)  # compile before measuring
        peaks = {}
        for name, store in (("memory", None), ("disk", tmp_path / "wide.zarr")):
            tracemalloc.start()
            tree = quiet(wide, 2000, 0.0, draws=2000, store=store, **options)
            peaks[name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert tree["posterior"]["x"].shape == (1, 2000, 2000)
        assert peaks["memory"] > 30e6
        assert peaks["disk"] < 0.5 * peaks["memory"]

    def test_unknown_suffix(self, schools, tmp_path):
        with pytest.raises(OptionError, match=r"\.nc or \.zarr"):
            ppl.save(schools, tmp_path / "run.txt")


class TestSummary:
    def test_equals_arviz(self, schools):
        ours = ppl.summary(schools)
        theirs = az.summary(schools, round_to="none")
        assert list(ours.index) == list(theirs.index)
        for column in ("mean", "sd", "ess_bulk", "r_hat", "mcse_mean", "mcse_sd"):
            np.testing.assert_allclose(
                ours[column].astype(float), theirs[column].astype(float), rtol=1e-8
            )
        np.testing.assert_allclose(ours["eti89_lb"], theirs["eti89_lb"].astype(float), rtol=1e-8)
        tail = az.ess(schools, method="tail", prob=(0.05, 0.95))
        np.testing.assert_allclose(ours.loc["mu", "ess_tail"], tail["mu"], rtol=1e-8)

    def test_names_and_errors(self, schools):
        assert list(ppl.summary(schools, "mu").index) == ["mu"]
        assert "eti50_lb" in ppl.summary(schools, ["mu"], prob=0.5)
        with pytest.raises(SiteError, match="nope"):
            ppl.summary(schools, "nope")
        with pytest.raises(OptionError, match="prob"):
            ppl.summary(schools, prob=1.5)


class TestPredict:
    def test_posterior_predictive_follows_its_law(self):
        """Conjugate normal: the predictive is N(posterior mean, posterior variance + 1).

        4000 nearly independent draws of each of 5 rows; z-tests at 1e-5 (fixed seeds).
        """
        y = np.array([0.3, 1.2, -0.4, 0.9, 2.0])
        tree = quiet(conjugate, y, seed=5)
        drawn = ppl.predict(tree, conjugate, y, seed=3)["posterior_predictive"]["y"]
        variance = 1 / (1 / 4 + len(y))
        mean, sd = variance * y.sum(), np.sqrt(variance + 1)
        draws = np.asarray(drawn).reshape(-1, 5)
        bound = stats.norm.isf(1e-5)
        assert np.abs(draws.mean(0) - mean).max() < bound * 1.5 * sd / np.sqrt(len(draws))
        assert np.abs(draws.var(0) / sd**2 - 1).max() < bound * 1.5 * np.sqrt(2 / len(draws))
        correlation = np.corrcoef(draws.T)[0, 1]
        assert abs(correlation - variance / (1 + variance)) < 5 / np.sqrt(len(draws))

    def test_only_observed_sites_and_labels(self, completed):
        group = completed["posterior_predictive"]
        assert list(group.data_vars) == ["y"]
        assert group["y"].dims == ("chain", "draw", "school")
        assert list(group["school"].values) == SCHOOLS

    def test_seeds_and_prefixes(self, schools):
        one = ppl.predict(schools, eight_schools, ERRORS, y=EFFECTS, seed=2)
        two = ppl.predict(schools, eight_schools, ERRORS, y=EFFECTS, seed=2)
        other = ppl.predict(schools, eight_schools, ERRORS, y=EFFECTS, seed=3)
        y = "posterior_predictive/y"
        np.testing.assert_array_equal(one[y], two[y])
        assert not np.isclose(one[y], other[y]).any()

    def test_new_data_give_predictions_with_deterministic_sites(self):
        def regression(x, y=None):
            slope = numpyro.sample("slope", dist.Normal(0, 10))
            with numpyro.plate("row", x.shape[0]):
                mean = numpyro.deterministic("mean", slope * x)
                numpyro.sample("y", dist.Normal(mean, 0.1), obs=y)

        x = np.linspace(-1, 1, 20)
        tree = quiet(regression, x, y=2 * x)
        new = ppl.predict(tree, regression, np.array([3.0, 4.0]), seed=1)
        assert new["predictions"]["y"].shape == (4, 1000, 2)
        np.testing.assert_allclose(new["predictions"]["mean"].mean(("chain", "draw")), [6, 8],
                                   atol=0.1)  # fmt: skip
        np.testing.assert_array_equal(new["predictions_constant_data"]["x"], [3.0, 4.0])

    def test_new_groups_need_to_be_named(self, schools):
        with pytest.raises(SiteError, match=r"resample=\['z'\]"):
            ppl.predict(schools, eight_schools, np.ones(3))
        new = ppl.predict(schools, eight_schools, np.ones(3), resample=["z"])
        assert new["predictions"]["y"].shape == (4, 1000, 3)

    def test_other_models_are_refused(self, schools):
        with pytest.raises(SiteError, match="Is it of this model"):
            ppl.predict(schools, conjugate, EFFECTS)
        with pytest.raises(DataError, match="not the data of the run"):
            ppl.log_likelihood(schools, eight_schools, ERRORS, y=EFFECTS + 1)


def dishes(n, scale=1.5, y=None):
    """Binomial counts in dishes; ``scale`` is a default that is data."""
    b = numpyro.sample("b", dist.Normal(0, 1))
    with numpyro.plate("dish", n.shape[0]):
        z = numpyro.sample("z", dist.Normal(0, scale))
        numpyro.sample("y", dist.Binomial(n, logits=b + z), obs=y)


N, SEEDS = np.array([10, 20, 30, 40]), np.array([3, 12, 14, 30])


@pytest.fixture(scope="module")
def germinated():
    return quiet(dishes, N, y=SEEDS, coords={"dish": list("ABCD")}, draws=100)


class TestPredictFurther:
    def test_a_default_passed_explicitly_is_the_same_data(self, germinated):
        same = ppl.predict(germinated, dishes, N, scale=1.5, y=SEEDS)
        assert "posterior_predictive" in same.children
        other = ppl.predict(germinated, dishes, N, scale=1.0, y=SEEDS)
        assert "predictions" in other.children
        assert float(germinated["constant_data"]["scale"]) == 1.5

    def test_labels_of_new_groups_are_not_those_of_the_old(self, germinated):
        kept = ppl.predict(germinated, dishes, N + 5)["predictions"]
        assert list(kept["dish"].values) == list("ABCD")
        anew = ppl.predict(germinated, dishes, N + 5, resample="z")["predictions"]
        assert list(anew["dish"].values) == [0, 1, 2, 3]
        named = ppl.predict(germinated, dishes, N[:2], resample=["z"], coords={"dish": ["E", "F"]})[
            "predictions"
        ]
        assert list(named["dish"].values) == ["E", "F"]
        with pytest.raises(DataError, match="dsh"):
            ppl.predict(germinated, dishes, N, coords={"dsh": [1]})

    def test_new_groups_follow_their_law(self, germinated):
        """Given b the new effects are N(0, 1.5) again: mean and variance of logit z, 4 sigma."""
        anew = ppl.predict(germinated, dishes, N, resample="z", seed=1)["predictions"]
        z = np.asarray(anew["z"])
        assert abs(z.mean()) < 4 * 1.5 / np.sqrt(z.size)
        assert abs(z.std() - 1.5) < 4 * 1.5 / np.sqrt(2 * z.size)

    def test_unknown_sites_to_resample(self, germinated):
        for name in ("zz", ["zz"]):
            with pytest.raises(SiteError, match=r"\['zz'\].*'b', 'z'"):
                ppl.predict(germinated, dishes, N, resample=name)

    def test_prior_predictive(self):
        prior = quiet(dishes, N, y=SEEDS, method="prior", draws=500)
        tree = ppl.predict(prior, dishes, N, y=SEEDS, seed=3)
        y = np.asarray(tree["prior_predictive"]["y"])
        assert y.shape == (4, 500, 4)
        p = 1 / (1 + np.exp(-np.asarray(prior["prior"]["b"])[..., None] - prior["prior"]["z"]))
        expected, variance = N * p, N * p * (1 - p)
        z = (y - expected).sum(axis=(0, 1)) / np.sqrt(variance.sum(axis=(0, 1)))
        assert np.abs(z).max() < 4
        assert az.extract(tree, group="prior_predictive").sizes["sample"] == 2000

    def test_nothing_to_predict(self):
        prior = quiet(dishes, N, method="prior", draws=10)
        with pytest.raises(DataError, match="Pass the observed data"):
            ppl.predict(prior, dishes, N)

    def test_names_of_event_dimensions_are_kept(self):
        def pairs(y):
            m = numpyro.sample("m", dist.Normal(0, 1).expand([2]).to_event(1))
            with numpyro.plate("row", y.shape[0]):
                numpyro.sample("y", dist.MultivariateNormal(m, np.eye(2)), obs=y)

        dims = {"m": ["side"], "y": ["side"]}
        y = np.zeros((3, 2))
        tree = quiet(pairs, y, dims=dims, coords={"side": ["L", "R"]}, draws=50)
        drawn = ppl.predict(tree, pairs, y)["posterior_predictive"]["y"]
        assert drawn.dims == ("chain", "draw", "row", "side")
        assert list(drawn["side"].values) == ["L", "R"]

    def test_arguments_whose_names_are_taken(self):
        def model(seed, coords):
            m = numpyro.sample("m", dist.Normal(seed, 1.0))
            numpyro.sample("y", dist.Normal(m, 1.0), obs=coords)

        data = {"seed": 0.5, "coords": np.ones(3)}
        tree = quiet(model, data=data, draws=50)
        assert "posterior_predictive" in ppl.predict(tree, model, data=data, seed=2).children
        assert "log_likelihood" in ppl.log_likelihood(tree, model, data=data).children


def test_log_likelihood_is_refused_for_another_model_of_the_same_sites(germinated):
    def logs(n, scale=1.5, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("dish", n.shape[0]):
            z = numpyro.sample("z", dist.Normal(0, scale))
            numpyro.sample("y", dist.Binomial(n, logits=b - z), obs=y)

    with pytest.raises(SiteError, match="something else"):
        ppl.log_likelihood(germinated, logs, N, y=SEEDS)


def test_report_of_some_sites(germinated, tmp_path):
    text = ppl.report(germinated, tmp_path / "some.html", var_names="b")
    assert not any(line.startswith("z[") for line in text.splitlines())
    page = (tmp_path / "some.html").read_text(encoding="utf-8")
    assert 'title="b"' in page
    assert 'title="z[A]"' not in page
    with pytest.raises(SiteError, match="zz"):
        ppl.report(germinated, var_names=["zz"])


def test_report_is_the_same_for_the_same_result_and_needs_no_network(completed, tmp_path):
    text = ppl.report(completed, tmp_path / "a.html")
    ppl.report(completed, tmp_path / "b.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "b.html").read_text(encoding="utf-8")
    assert "theta[Choate]" in text
    assert "theta[Choate]" in page
    assert "Verdict" in text
    for word in ("http:", "https:", "src=", "@import", "url("):
        assert word not in page, word
    assert page.count("<svg") > 20


def test_loo_through_arviz(completed):
    loo = az.loo(completed)
    assert np.isfinite(loo.elpd)
    assert -36 < loo.elpd < -28  # about -31 for this model and these data
