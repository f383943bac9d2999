"""Leave-one-out cross-validation and comparison: equal to ArviZ, and to exact answers."""

import dataclasses
import tracemalloc
import warnings

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from helpers import compilations, others_slow
from models import EFFECTS, ERRORS, conjugate, eight_schools
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy import stats
from scipy.special import logsumexp

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.diagnostics import leave_one_out, pointwise, refits
from ppl_toolkit.diagnostics.leave_one_out import khat_finding
from ppl_toolkit.diagnostics.page import html
from ppl_toolkit.diagnostics.pointwise import scores_of
from ppl_toolkit.errors import (
    DataError,
    InferenceWarning,
    MethodError,
    OptionError,
    SamplingError,
    SiteError,
)
from ppl_toolkit.progress import Quiet

SCHOOLS = ["Choate", "Deerfield", "Andover", "Hotchkiss", "Lawrenceville", "St. Paul's",
           "Mt. Hermon", "Phillips Exeter"]  # fmt: skip


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def run(model, *args, **options):
    return quiet(ppl.infer, model, *args, **{"progress": False, **options})


def pooled(sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    with numpyro.plate("school", sigma.shape[0]):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


def regression(x, y):
    b = numpyro.sample("b", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.StudentT(4.0, b[0] + b[1] * x, 1.0), obs=y)


def constant(x, y):
    b = numpyro.sample("b", dist.Normal(0, 2))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.StudentT(4.0, b, 1.0), obs=y)


def hand_made(ll, **posterior):
    """A result with these log likelihoods (chain, draw, row)."""
    posterior = posterior or {"m": np.random.default_rng(0).normal(size=ll.shape[:2])}
    return az.from_dict({"posterior": posterior, "log_likelihood": {"y": ll}})


@pytest.fixture(scope="module")
def schools():
    labels = {"school": SCHOOLS}
    return run(eight_schools, ERRORS, y=EFFECTS, seed=1, coords=labels)


@pytest.fixture(scope="module")
def line():
    rng = np.random.default_rng(3)
    x = rng.normal(size=150)
    return x, 0.4 * x + rng.standard_t(4, size=150)


@pytest.fixture(scope="module")
def fits(line):
    models = {"line": regression, "constant": constant}
    trees = {name: run(model, *line, seed=2) for name, model in models.items()}
    return {name: ppl.log_likelihood(trees[name], models[name], *line) for name in models}


# --- the numbers of ArviZ -----------------------------------------------------------------------


def assert_equal(ours, theirs):
    np.testing.assert_allclose(ours.elpd, theirs.elpd, rtol=1e-8)
    np.testing.assert_allclose(ours.se, theirs.se, rtol=1e-8)
    np.testing.assert_allclose(ours.p, theirs.p, rtol=1e-8)
    np.testing.assert_allclose(ours.elpd_i, theirs.elpd_i, rtol=1e-8)
    np.testing.assert_allclose(ours.pareto_k, theirs.pareto_k, rtol=1e-8, atol=1e-10)
    assert ours.good_k == theirs.good_k
    assert ours.elpd_i.dims == theirs.elpd_i.dims
    for dim in ours.elpd_i.dims:
        np.testing.assert_array_equal(ours.elpd_i[dim], theirs.elpd_i[dim])


def test_equals_arviz(fits, schools):
    completed = ppl.log_likelihood(schools, eight_schools, ERRORS, y=EFFECTS)
    for tree in (*fits.values(), completed):
        assert_equal(quiet(ppl.loo, tree), quiet(az.loo, tree))


def test_equals_arviz_for_autocorrelated_draws_of_any_number_of_chains_and_dims():
    """r_eff is far from 1 here, and 1 by convention for one chain."""
    rng = np.random.default_rng(1)
    for chains in (1, 3):
        walk = rng.normal(size=(chains, 300))
        for t in range(1, 300):
            walk[:, t] += 0.9 * walk[:, t - 1]
        ll = stats.norm.logpdf(rng.normal(size=(4, 5)), 0.2 * walk[..., None, None])
        tree = hand_made(ll, m=walk)
        ours, theirs = quiet(ppl.loo, tree), quiet(az.loo, tree)
        assert_equal(ours, theirs)
        assert ours.r_eff == 1.0 if chains == 1 else ours.r_eff < 0.5


@pytest.mark.slow
def test_the_model_gives_what_the_group_gives(schools, line, fits, monkeypatch):
    """In one block, in many with a last one that is not full, and one by one."""
    x, y = line
    expected = ppl.loo(fits["line"])
    bare = fits["line"].drop_nodes("log_likelihood")
    draws = 4000
    for width in (1000, 40, 1):
        monkeypatch.setattr(leave_one_out, "_BLOCK_BYTES", 8 * draws * width)
        found = ppl.loo(bare, regression, x, y)
        np.testing.assert_allclose(found.elpd_i, expected.elpd_i, rtol=1e-10)
        np.testing.assert_allclose(found.pareto_k, expected.pareto_k, rtol=1e-8, atol=1e-10)
        assert found.observed == expected.observed
    np.testing.assert_allclose(ppl.loo(fits["line"]).elpd, expected.elpd, rtol=1e-12)
    by_name = ppl.loo(bare, regression, data={"x": x, "y": y})
    assert by_name.elpd == found.elpd
    labelled = quiet(ppl.loo, schools, eight_schools, ERRORS, y=EFFECTS)
    assert list(labelled.elpd_i.school.values) == SCHOOLS


@pytest.mark.parametrize("method", ["stacking", "bb-pseudo-bma", "pseudo-bma"])
def test_compare_equals_arviz(fits, method):
    ours, theirs = ppl.compare(fits, method), az.compare(fits, method=method, round_to="none")
    assert list(ours.index) == list(theirs.index) == ["line", "constant"]
    for column in ("rank", "elpd", "elpd_diff", "dse", "p", "se", "weight"):
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-8, atol=1e-8)
    again = ppl.compare({name: ppl.loo(tree) for name, tree in fits.items()}, method)
    assert again.equals(ours)


# --- exact answers ------------------------------------------------------------------------------


def exact_conjugate(y):
    """log p(y_i | others) of `conjugate`: N(mean, 1 + 1 / precision) of the others' posterior."""
    precision = 1 / 4 + len(y) - 1
    mean = (y.sum() - y) / precision
    return stats.norm.logpdf(y, mean, np.sqrt(1 + 1 / precision))


Y20 = np.random.default_rng(5).normal(0.5, 1.0, 20)


def conjugate_z_scores(seed):
    """Errors of the 20 densities and of their sum, in Monte Carlo standard errors."""
    tree = run(conjugate, Y20, seed=seed)
    found = ppl.loo(tree, conjugate, Y20)
    assert (found.pareto_k < 0.5).all()
    assert found.failed == ()
    assert found.warning == ""
    assert khat_finding(found) is None
    m = np.asarray(tree["posterior"]["m"])[..., None]
    weights = 1 / stats.norm.pdf(Y20, m, 1.0)
    weights /= weights.mean(axis=(0, 1))  # elpd_i = -log mean weight, by the delta method:
    errors = np.asarray(found.elpd_i) - exact_conjugate(Y20)
    mcse = convergence.mcse(weights)
    return np.append(errors / mcse, errors.sum() / convergence.mcse(weights.sum(axis=-1)))


@pytest.mark.parametrize("seed", range(100, 105))
def test_conjugate_normal(seed):
    """Each density and their sum within 3 Monte Carlo standard errors of the closed form.

    A right implementation fails for at most 21 * 0.27% = 5.7% of the seeds, by the union bound.
    The 21 errors are nearly functions of two numbers, the mean and the variance of the draws, so
    it is less: 2.7% of the seeds 100 to 399, or 13% for one of five. (Seed 3, used before, became
    one of them with the pooled warm-up.)
    """
    assert (np.abs(conjugate_z_scores(seed)) < 3).all()


@pytest.mark.slow
def test_the_monte_carlo_errors_are_of_the_right_size():
    """The root mean square of the z scores is near 1: neither too small an error nor too large.

    Over 500 other seeds it is 1.02. The band holds for all but 0.06% of sets of 40 seeds (by the
    bootstrap from those 500). With these seeds, errors twice or half as large leave it.
    """
    z = np.array([conjugate_z_scores(seed) for seed in range(40)])
    assert 0.7 < np.sqrt(np.mean(z**2)) < 1.4


def test_weights_leave_one_out():
    """The weights behind LOO-PIT are normalised, and give elpd_i as a weighted mean."""
    rng = np.random.default_rng(2)
    ll = stats.norm.logpdf(rng.normal(size=7)[:, None], rng.normal(size=1000))
    found = scores_of([(0, ll[:4]), (4, ll[4:])], 7, 1000, keep_weights=True)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0)
    np.testing.assert_allclose(np.log((found.weights * np.exp(ll)).sum(axis=1)), found.elpd_i)
    assert scores_of([(0, ll)], 7, 1000).weights is None


def test_few_values_of_a_discrete_site():
    """Three values of one site: no Pareto tail, but exact weights. 4 standard errors."""

    def dice(y):
        k = numpyro.sample("k", dist.Categorical(np.array([0.2, 0.3, 0.5])))
        with numpyro.plate("row", y.shape[0]):
            numpyro.sample("y", dist.Normal(1.0 * k, 2.0), obs=y)

    y = np.array([0.1, 1.2, 0.9])
    tree = run(dice, y, draws=5000, seed=4)
    with pytest.warns(InferenceWarning, match="k could not be estimated for 3 of 3"):
        found = ppl.loo(tree, dice, y)
    ll = stats.norm.logpdf(y, np.arange(3)[:, None], 2.0)
    joint = np.log([0.2, 0.3, 0.5]) + ll.sum(axis=1)
    posterior = np.exp(joint - logsumexp(joint))
    mean = posterior @ np.exp(-ll)
    error = np.sqrt((posterior @ np.exp(-2 * ll) - mean**2) / 20000) / mean
    assert (np.abs(found.elpd_i + np.log(mean)) < 4 * error).all()


# --- refits -------------------------------------------------------------------------------------

T = 3.0
Y = np.array([-2.1, 0.3, 1.4, 8.0, -0.6, 2.2])


def effects(y):
    """A mean, an effect for every row, and noise: marginally y_i ~ N(mu, T^2 + 1)."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", y.shape[0]):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + T * z, 1.0), obs=y)


def exact_effects(y):
    """Log p(y_i | others), and the relative variance of p(y_i | mu, z_i) given the others."""
    noise = T**2 + 1
    precision = 1 / 4 + (len(y) - 1) / noise
    mean = (y.sum() - y) / noise / precision
    spread = T**2 + 1 / precision  # of mu + T z_i given the others
    log_mean = stats.norm.logpdf(y, mean, np.sqrt(spread + 1))
    log_square = stats.norm.logpdf(y, mean, np.sqrt(spread + 0.5)) - np.log(2 * np.sqrt(np.pi))
    return log_mean, np.exp(log_square - 2 * log_mean) - 1


@pytest.fixture(scope="module")
def outlier():
    return run(effects, Y, seed=6, coords={"row": list("abcdef")})


@pytest.mark.slow
def test_refits_are_right_where_importance_sampling_is_wrong(outlier):
    """With an effect of its own, every row is influential, and row d is an outlier.

    Bound: 4 standard errors at an effective size of 1000 of the 4000 draws; by the union bound a
    right implementation fails for fewer than 0.04% of the seeds.
    """
    exact, variance = exact_effects(Y)
    with pytest.warns(InferenceWarning, match=r"Pareto k is up to .*y\[d\]"):
        smoothed = ppl.loo(outlier, effects, Y)
    bad = np.asarray(smoothed.pareto_k) > smoothed.good_k
    assert bad[3]
    assert smoothed.elpd_i[3] - exact[3] > 1.0, "much too kind"
    found = quiet(ppl.loo, outlier, effects, Y, refit=True)
    assert found.failed == ()
    assert set(found.refitted) == set(smoothed.failed)
    error = np.sqrt(variance / 1000)
    assert (np.abs(found.elpd_i - exact) < 4 * error)[bad].all()
    np.testing.assert_allclose(found.elpd, found.elpd_i.sum())
    assert found.p > smoothed.p
    assert f"{bad.sum()} refitted" in str(found)


@pytest.mark.slow
def test_further_refits_compile_nothing(outlier):
    again = {"refit": True}
    quiet(ppl.loo, outlier, effects, Y, **again)
    before = len(compilations)
    first = quiet(ppl.loo, outlier, effects, Y, **again)
    assert compilations[before:] == []
    program = ppl.Program(effects, (Y,))
    drawn = [refits.refit_without(outlier, program, "y", (6,), i) for i in range(6)]
    assert compilations[before:] == []
    assert len({float(tree["posterior"]["mu"].mean()) for tree in drawn}) == 6
    second = quiet(ppl.loo, outlier, effects, Y, **again)
    np.testing.assert_array_equal(first.elpd_i, second.elpd_i)


def test_other_data_of_the_shape_compile_nothing_either(outlier):
    quiet(ppl.loo, outlier, effects, Y, refit=True)
    new = run(effects, Y + 1, seed=6)
    before = len(compilations)
    quiet(ppl.loo, new, effects, Y + 1, refit=True)
    assert compilations[before:] == []


def test_a_refit_is_the_posterior_without_the_row(outlier):
    """E[mu | others] in closed form; 4 standard errors."""
    program = ppl.Program(effects, (Y,))
    for index in (0, 3):
        new = refits.refit_without(outlier, program, "y", (6,), index)
        mu = np.asarray(new["posterior"]["mu"])
        others = np.delete(Y, index)
        precision = 1 / 4 + 5 / (T**2 + 1)
        mean = others.sum() / (T**2 + 1) / precision
        assert abs(mu.mean() - mean) < 4 * convergence.mcse(mu)
        assert new.attrs["warmup"] == ppl.NUTS().refit_warmup


MASKED = np.array([True, True, False, True, True])


def grid(y):
    """Two plates; values of shape (2, 5)."""
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("side", 2, dim=-2), numpyro.plate("row", 5, dim=-1):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def no_plate(y):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def vectors(y):
    """Rows are pairs: one event each, with the density of two independent normals."""
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m, 1.0).expand([2]).to_event(1), obs=y)


def series(y):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))

    def step(carry, y_t):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y_t)
        return carry, None

    scan(step, 0.0, y)


def conditioned(y):
    with handlers.condition(data={"y": y}):
        m = numpyro.sample("m", dist.Normal(0.0, 2.0))
        with numpyro.plate("row", y.shape[0]):
            numpyro.sample("y", dist.Normal(m, 1.0))


def half_masked(y):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", 5), handlers.mask(mask=jnp.asarray(MASKED)):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


VALUES = np.random.default_rng(9).normal(size=10)
LEFT_OUT = {  # model, data, shape of its density, what is left out, what stays
    "two plates": (grid, VALUES.reshape(2, 5), (2, 5), 7, np.delete(VALUES, 7)),
    "no plate": (no_plate, VALUES, (10,), 7, np.delete(VALUES, 7)),
    "events": (vectors, VALUES.reshape(5, 2), (5,), 2, np.delete(VALUES, [4, 5])),
    "scan": (series, VALUES, (10,), 7, np.delete(VALUES, 7)),
    "condition": (conditioned, VALUES, (10,), 7, np.delete(VALUES, 7)),
    "mask": (half_masked, VALUES[:5], (5,), 4, VALUES[[0, 1, 3]]),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_exactly_one_observation_is_left_out(what):
    """The refit's density is that of the others: equal log densities up to a constant in m."""
    model, y, shape, index, others = LEFT_OUT[what]
    kept = np.ones(shape, bool)
    kept[np.unravel_index(index, shape)] = False
    leaving = ppl.Program(refits.LeavingOut(model, "y"), (kept, (y,), {}))
    m = np.array([-1.0, 0.3, 2.0])
    expected = stats.norm.logpdf(m, 0, 2) + stats.norm.logpdf(others, m[:, None]).sum(axis=1)
    with leaving.context():
        found = [float(leaving.log_density(np.array([v]), leaving.data)) for v in m]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("what", others_slow(["two plates", "events", "scan"], "two plates"))
def test_observations_of_every_form(what):
    model, y, shape, _, _ = LEFT_OUT[what]
    found = ppl.loo(run(model, y, seed=7), model, y)
    assert found.elpd_i.shape == shape
    if what != "events":
        np.testing.assert_allclose(found.elpd_i.values.ravel(), exact_conjugate(VALUES), atol=0.05)


def test_what_a_mask_switches_off_is_not_counted():
    y = VALUES[:5]
    tree = run(half_masked, y, seed=8)
    found = quiet(ppl.loo, tree, half_masked, y)
    assert found.n == 4
    assert found.elpd_i[2] == 0
    assert np.isnan(found.pareto_k[2])
    of_others = np.asarray(found.elpd_i)[MASKED]
    np.testing.assert_allclose(of_others, exact_conjugate(y[MASKED]), atol=0.1)
    np.testing.assert_allclose(found.se, np.sqrt(4 * of_others.var(ddof=1)))
    table = ppl.compare({"a": found, "b": found})
    assert table["elpd_diff"].tolist() == [0, 0]
    page = html(quiet(ppl.log_likelihood, tree, half_masked, y))
    row = (f"{found.elpd:.1f}", f"{found.se:.1f}", f"{found.p:.1f}", "4", "0", "0")
    assert "".join(f"<td>{cell}</td>" for cell in row) in page


def test_refits_with_findings_are_reported(schools):
    """Every refit is said to have one here. Those whose k is good are left as they are."""
    with pytest.MonkeyPatch.context() as patch:
        finding = ppl.diagnostics.Finding("divergences", "warning", (), 3.0, "", "")
        patch.setattr(refits, "findings", lambda tree: [finding])
        patch.setattr(pointwise, "good_k", lambda draws: 0.5)  # more bad ones
        found = quiet(ppl.loo, schools, eight_schools, ERRORS, y=EFFECTS, refit=True)
    count = len(found.refitted)
    assert 0 < count < 8
    smoothed = quiet(ppl.loo, schools, eight_schools, ERRORS, y=EFFECTS)
    good = np.asarray(found.pareto_k) <= 0.5
    np.testing.assert_array_equal(found.elpd_i[good], smoothed.elpd_i[good])
    assert (found.elpd_i[~good] != smoothed.elpd_i[~good]).all()
    assert f"{count} of {count} refits had findings" in found.warning
    assert f"{found.refitted[0]} (divergences)" in found.warning
    table = ppl.compare({"a": found, "b": found})
    assert "refits had findings" in table["warning"].iloc[0]


@pytest.mark.slow
def test_a_refit_that_says_little_is_reported():
    """The others make an outlier of 9 prior standard deviations all but impossible."""
    y = np.array([0.1, -0.4, 0.3, 30.0])
    found = quiet(ppl.loo, run(effects, y, seed=6), effects, y, refit=True)
    assert "the densities of y[3] have a Monte Carlo error above 30%" in found.warning


def test_a_refit_that_fails_leaves_the_rest(outlier, monkeypatch):
    expected = quiet(ppl.loo, outlier, effects, Y)
    real = refits.refit_without

    def sometimes(tree, program, site, shape, index):
        if index == 3:
            raise SamplingError("no luck")
        return real(tree, program, site, shape, index)

    monkeypatch.setattr(refits, "refit_without", sometimes)
    found = quiet(ppl.loo, outlier, effects, Y, refit=True)
    assert found.failed == ("y[d]",)
    assert found.elpd_i[3] == expected.elpd_i[3]
    assert r"without y[d] failed: no luck" in found.warning
    assert len(found.refitted) == len(expected.failed) - 1


def test_ctrl_c_ends_the_refits_and_keeps_the_rest(outlier, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(refits, "refit_without", stop)
    found = quiet(ppl.loo, outlier, effects, Y, refit=True)
    assert found.refitted == ()
    assert "interrupted after 0 of" in found.warning


@pytest.fixture
def refitted(monkeypatch):
    """Numbers of the observations that refits left out, in their order."""
    real, numbers = refits.refit_without, []

    def counted(tree, program, site, shape, index):
        numbers.append(index)
        return real(tree, program, site, shape, index)

    monkeypatch.setattr(refits, "refit_without", counted)
    return numbers


@pytest.mark.parametrize("most", [0, 1, 2, 50])
def test_the_number_of_refits_has_a_limit(outlier, refitted, most):
    """The largest k come first; the others stay as they were and count as failed."""
    smoothed = quiet(ppl.loo, outlier, effects, Y)
    worst = [int(i) for i in np.argsort(-smoothed.pareto_k.values)]
    bad = worst[: len(smoothed.failed)]
    assert len(bad) > 2
    count = min(most, len(bad))
    found = quiet(ppl.loo, outlier, effects, Y, refit=most)
    assert refitted == bad[:most]
    assert found.refitted == smoothed.failed[:most]
    assert found.failed == smoothed.failed[most:]
    left = np.setdiff1d(range(6), bad[:most])
    np.testing.assert_array_equal(found.elpd_i[left], smoothed.elpd_i[left])
    assert (found.elpd_i[bad[:most]] != smoothed.elpd_i[bad[:most]]).all()
    note = f"refit={most}: {len(bad) - count} of {len(bad)} observations with a k too large were"
    assert (note in found.warning) == (0 < most < len(bad))
    if found.failed:
        assert khat_finding(found).number == smoothed.pareto_k[worst[count]]


@pytest.mark.parametrize("value", [-1, "yes", 1.5, None])
def test_bad_numbers_of_refits(outlier, value):
    before = len(compilations)
    with pytest.raises(OptionError, match=f"refit must be True, False .* got {value!r}"):
        ppl.loo(outlier, effects, Y + 0.0, refit=value)
    assert compilations[before:] == []


def test_refits_show_their_progress(outlier, refitted, capsys):
    with pytest.raises(OptionError, match="progress must be"):
        ppl.loo(outlier, effects, Y, progress="loud")
    quiet(ppl.loo, outlier, effects, Y, refit=2, progress="lines")
    assert "leaving out: 2/2 refits" in capsys.readouterr().err
    quiet(ppl.loo, outlier, effects, Y, refit=2)  # lines where there is no terminal
    assert "leaving out: 2/2 refits" in capsys.readouterr().err
    quiet(ppl.loo, outlier, effects, Y, refit=2, progress=False)
    quiet(ppl.loo, outlier, effects, Y, progress="lines")
    assert capsys.readouterr().err == ""
    assert len(refitted) == 6


def test_every_refit_is_a_step_of_the_progress(outlier, monkeypatch):
    """Failed ones, too."""
    steps = []

    class Steps(Quiet):
        def update(self, iteration, stats):
            steps.append(iteration)

    def fails(*_):
        raise SamplingError("no luck")

    monkeypatch.setattr(refits, "refit_without", fails)
    monkeypatch.setattr(refits, "progress_for", lambda *_: Steps())
    found = quiet(ppl.loo, outlier, effects, Y, refit=2)
    assert steps == [1, 2]
    assert found.refitted == ()


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_that_of_a_block(monkeypatch):
    """10^5 observations at 200 draws are 160 MB of log likelihoods; a block is 16 MB."""
    n, draws = 100_000, 200
    y = np.random.default_rng(10).normal(size=n)
    tree = run(conjugate, y, draws=draws // 2, chains=2, warmup=100, seed=9)
    monkeypatch.setattr(leave_one_out, "_BLOCK_BYTES", 16 * 10**6)
    tracemalloc.start()
    try:
        found = ppl.loo(tree, conjugate, y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.n == n
    np.testing.assert_allclose(found.elpd, exact_conjugate(y).sum(), rtol=1e-3)
    assert peak < 0.25 * 8 * n * draws


def test_draws_on_disk(tmp_path, fits):
    path = tmp_path / "line.nc"
    ppl.save(fits["line"], path)
    with xarray.open_datatree(path) as lazy:
        found = ppl.loo(lazy)
    np.testing.assert_array_equal(found.elpd_i, ppl.loo(fits["line"]).elpd_i)


# --- the finding and the text -------------------------------------------------------------------


def test_the_finding_and_the_warning(outlier):
    with pytest.warns(InferenceWarning) as caught:
        found = ppl.loo(outlier, effects, Y)
    (warning,) = caught
    assert warning.filename == __file__
    assert warning.message.result is found
    finding = khat_finding(found)
    assert (finding.kind, finding.severity) == ("khat", "warning")
    assert finding.number == float(found.pareto_k.max())
    assert finding.sites == found.failed[:5]
    worst = outlier["posterior"]["row"].values[int(np.argmax(found.pareto_k.values))]
    assert finding.sites[0] == f"y[{worst}]"
    assert finding.message in found.warning
    assert "refit=True" in finding.remedy
    assert found.warning in str(found)
    assert f"elpd {found.elpd:12.2f}" in repr(found)


def test_one_single_event_is_pointed_out():
    def event(y):
        m = numpyro.sample("m", dist.Normal(0.0, 2.0))
        numpyro.sample("y", dist.Normal(m, 1.0).expand([3]).to_event(1), obs=y)

    y = VALUES[:3]
    tree = run(event, y, draws=100)
    with pytest.warns(InferenceWarning, match="one single observation"):
        found = ppl.loo(tree, event, y)
    assert found.n == 1
    assert np.isnan(found.se)


# --- comparison ---------------------------------------------------------------------------------


def test_other_data_are_refused(fits, line):
    x, y = line
    found = ppl.loo(fits["line"])
    moved = run(regression, x, y + 1e-9, seed=2, draws=100, warmup=200)
    with pytest.raises(DataError, match=r"'a' and 'b' have different observed values"):
        ppl.compare({"a": found, "b": quiet(ppl.loo, moved, regression, x, y + 1e-9)})
    fewer = run(regression, x[1:], y[1:], seed=2, draws=100, warmup=200)
    with pytest.raises(DataError, match="150 observations but 'b' has 149"):
        ppl.compare({"a": found, "b": quiet(ppl.loo, fewer, regression, x[1:], y[1:])})


def test_warnings_have_a_column(schools):
    found = {
        "separate": quiet(ppl.loo, schools, eight_schools, ERRORS, y=EFFECTS),
        "pooled": quiet(ppl.loo, run(pooled, ERRORS, y=EFFECTS), pooled, ERRORS, y=EFFECTS),
    }
    found["separate"] = dataclasses.replace(found["separate"], failed=("Choate", "Deerfield"))
    notes = ppl.compare(found)["warning"]
    assert "for 2 of 8" in notes["separate"]
    assert "fewer than 100 observations" in notes["separate"]
    assert notes["pooled"] == ""


def test_stacking_survives_densities_below_the_smallest_number(fits):
    """Data in other units scale every density alike, and leave the weights alone."""
    usual = ppl.compare(fits)["weight"]
    moved = {}
    for name, tree in fits.items():
        likelihoods = tree["log_likelihood"].dataset - 2000.0
        moved[name] = tree.copy()
        moved[name]["log_likelihood"] = xarray.DataTree(likelihoods)
    np.testing.assert_allclose(ppl.compare(moved)["weight"], usual, atol=1e-6)


# --- what is refused ----------------------------------------------------------------------------


def two(y, z):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", 5):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)
        numpyro.sample("z", dist.Normal(m, 1.0), obs=z)


def test_several_observed_sites():
    y, z = VALUES[:5], VALUES[5:]
    tree = run(two, y, z, draws=100, warmup=100)
    completed = ppl.log_likelihood(tree, two, y, z)
    for call in ((tree, two, y, z), (completed,)):
        with pytest.raises(OptionError, match=r"\['y', 'z'\].*var_name="):
            ppl.loo(*call)
        with pytest.raises(SiteError, match="'w' is no observed variable"):
            ppl.loo(*call, var_name="w")
        found = quiet(ppl.loo, *call, var_name="z")
        assert found.elpd_i.shape == (5,)
        assert found.var_name == "z"
    with pytest.raises(OptionError, match="var_name=") as error:
        ppl.compare({"a": completed, "b": completed})
    assert "'a'" in error.value.__notes__[0]
    assert len(ppl.compare({"a": completed, "b": completed}, var_name="y")) == 2


def test_bad_calls(schools):
    with pytest.raises(DataError, match="no group log_likelihood"):
        ppl.loo(schools)
    for refit in (True, 3):
        with pytest.raises(OptionError, match=f"refit={refit} needs the model"):
            ppl.loo(schools, refit=refit)
    with pytest.raises(OptionError, match=r"\['y'\] but no model"):
        ppl.loo(schools, y=EFFECTS)
    with pytest.raises(DataError, match="not the data of the run"):
        ppl.loo(schools, eight_schools, ERRORS, y=EFFECTS + 1)
    with pytest.raises(SiteError, match="computes something else"):
        ppl.loo(schools, pooled, ERRORS, y=EFFECTS)
    with pytest.raises(DataError, match="expected a result"):
        ppl.loo("schools.nc")
    with pytest.raises(DataError, match="no posterior"):
        ppl.loo(xarray.DataTree())


def test_results_of_the_prior_are_refused():
    prior = run(eight_schools, ERRORS, method="prior", draws=50)
    with pytest.raises(DataError, match="result of the prior"):
        ppl.loo(prior, eight_schools, ERRORS)


def test_too_few_draws():
    ll = np.random.default_rng(0).normal(size=(2, 12, 3))
    with pytest.raises(DataError, match="at least 25 draws; this result has 24"):
        ppl.loo(hand_made(ll))


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_log_likelihoods_must_be_finite(value):
    ll = np.random.default_rng(0).normal(size=(2, 50, 6))
    ll[1, [3, 4], 4] = value
    with pytest.raises(DataError, match=rf"y\[4\] is {value} at 2 of 100 draws"):
        ppl.loo(hand_made(ll))


def test_groups_of_different_lengths_are_refused():
    tree = hand_made(np.random.default_rng(0).normal(size=(2, 50, 6)))
    tree["posterior"] = xarray.DataTree(tree["posterior"].dataset.isel(draw=slice(0, 40)))
    with pytest.raises(DataError, match="100 draws of the log likelihood but 80 of the posterior"):
        ppl.loo(tree)


def test_models_with_summed_out_sites_are_refused():
    def mixture(y):
        m = numpyro.sample("m", dist.Normal(0.0, 2.0))
        with numpyro.plate("row", 4):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(m + 3.0 * z, 1.0), obs=y)

    tree = run(mixture, VALUES[:4], draws=50, warmup=100)
    with pytest.raises(MethodError, match="summed out"):
        ppl.loo(tree, mixture, VALUES[:4])


def test_bare_log_densities_are_refused():
    def density(x):
        return -0.5 * (x**2).sum()

    tree = run(density, init=np.zeros(2), draws=50, warmup=50)
    for call in ((tree,), (tree, density)):
        with pytest.raises(DataError, match="bare log density"):
            ppl.loo(*call)


def test_nothing_observed():
    def model(y=None):
        m = numpyro.sample("m", dist.Normal(0.0, 2.0))
        numpyro.factor("f", -(m**2))

    with pytest.raises(DataError, match="observes nothing"):
        ppl.loo(run(model, draws=50, warmup=50), model)


@pytest.mark.parametrize(
    ("models", "options", "error", "text"),
    [
        ({"a": None}, {}, OptionError, "two models or more"),
        (None, {}, OptionError, "two models or more"),
        ({"a": None, "b": None}, {"method": "waic"}, OptionError, "one of stacking"),
        ({"a": None, "b": None}, {"method": 3}, OptionError, "one of stacking"),
        ({"a": None, "b": None}, {}, DataError, "expected a result"),
    ],
)
def test_bad_comparisons(models, options, error, text):
    with pytest.raises(error, match=text):
        ppl.compare(models, **options)
