"""Nested sampling: unbiased by its weights, right on models with known evidence, aware of trouble.

Seeds are fixed. Where a bound is statistical, its false-alarm rate over seeds is said.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow, quiet
from jax import random
from models import EFFECTS, ERRORS, eight_schools
from scipy import integrate, stats

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.evidence import combined
from ppl_toolkit.errors import InitializationError, MethodError, OptionError, SamplingError
from ppl_toolkit.inference import NestedSampling
from ppl_toolkit.inference.nested_points import (
    insertion_ranks,
    near_start,
    point_maker,
    weighted,
)


def evidences(tree):
    """Log evidence by chain, with what the run says of its error."""
    values = tree["sample_stats"]["log_evidence"].values
    assert (values == values[:, :1]).all()
    return values[:, 0]


def agrees(tree, exact, most=0.3):
    """The mean of the evidences is exact within 4 standard errors, which are small.

    The error follows Student's t with chains - 1 degrees of freedom: with 16 chains one in 900
    seeds fails.
    """
    found = combined(evidences(tree))
    assert 0.0 < found.se < most
    return abs(found.log - exact) < 4 * found.se


# -- volumes and weights, with points that are exact draws -----------------------------------------

SIZE, DELETED, ITERATIONS = 20, 5, 60


def heights(x, name):
    return {
        "smooth": 4.0 * x - 3.0,
        "steep": 30.0 * x - 26.0,
        "plateau at the bottom": np.where(x < 0.3, -1.0, 2.0 * x),
        "plateau in the middle": np.where(x < 0.3, 3.0 * x, np.where(x < 0.7, 1.0, 2.0 * x)),
        "zero on a half": np.where(x < 0.5, -np.inf, x),
    }[name]


def simulated(name, runs, seed=0):
    """Runs with independent draws above the bound: likelihoods rise with x in (0, 1)."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(0.0, 1.0, 1_000_001)
    table = heights(grid, name)
    x = rng.uniform(size=(runs, SIZE))
    births = np.full((runs, SIZE), np.nan)
    dead, born = [], []
    rows = np.arange(runs)[:, None]
    for _ in range(ITERATIONS):
        likelihood = heights(x, name)
        worst = np.argsort(likelihood, 1, kind="stable")[:, :DELETED]
        bound = likelihood[rows, worst].max(1, keepdims=True)
        dead.append(likelihood[rows, worst])
        born.append(births[rows, worst])
        low = grid[np.minimum(np.searchsorted(table, bound, side="right"), grid.size - 1)]
        low = np.maximum(low - 1e-6, 0.0)
        x[rows, worst] = rng.uniform(low, 1.0, size=(runs, DELETED))
        births[rows, worst] = bound
    dead, born = np.concatenate(dead, 1), np.concatenate(born, 1)
    points = [SimpleNamespace(loglikelihood=a, loglikelihood_birth=b) for a, b in
              ((dead, born), (heights(x, name), births))]  # fmt: skip

    def one(a, b, c, d):
        return weighted(
            SimpleNamespace(loglikelihood=a, loglikelihood_birth=b),
            SimpleNamespace(loglikelihood=c, loglikelihood_birth=d),
            dead.shape[1],
        )

    with jax.enable_x64(True):
        flat = [getattr(p, f) for p in points for f in ("loglikelihood", "loglikelihood_birth")]
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(*flat)), flat


@pytest.mark.parametrize(
    "name",
    others_slow(
        ["smooth", "steep", "plateau at the bottom", "plateau in the middle", "zero on a half"],
        "plateau in the middle",
    ),
)  # fmt: skip
def test_the_evidence_is_unbiased_with_exact_draws(name):
    """The mean of 6000 estimates of Z, within 4 standard errors: one in 16,000 seeds fails."""
    found, _ = simulated(name, 6000)
    grid = (np.arange(1_000_000) + 0.5) / 1_000_000
    exact = np.mean(np.exp(heights(grid, name)))
    ratio = np.exp(found.log_evidence) / exact
    assert abs(ratio.mean() - 1.0) < 4 * ratio.std(ddof=1) / np.sqrt(ratio.size)
    np.testing.assert_allclose(np.exp(found.log_weight).sum(1), 1.0, rtol=1e-9)
    if name in ("smooth", "steep"):  # what a run says of its error holds, up to a quarter
        told = np.sqrt(np.mean(found.log_evidence_sd**2))
        assert 0.75 < found.log_evidence.std() / told < 1.25
        density = np.exp(heights(grid, name)) / exact
        information = np.mean(density * np.log(density))
        error = found.information.std() / np.sqrt(found.information.size)
        assert abs(found.information.mean() - information) < 0.05 + 4 * error


def test_volumes_of_one_run_by_hand():
    """Three points, one dies at a time, one birth above 1.0 and one above 2.0."""
    nan = np.nan
    dead = SimpleNamespace(loglikelihood=np.array([1.0, 2.0, 99.0]),
                           loglikelihood_birth=np.array([nan, nan, nan]))  # fmt: skip
    live = SimpleNamespace(loglikelihood=np.array([3.0, 1.5, 4.0]),
                           loglikelihood_birth=np.array([nan, 1.0, 2.0]))  # fmt: skip
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, weighted(dead, live, 2))
    # In order: 1.0 (3 live), 1.5 (3), 2.0 (2), 3.0 (2), 4.0 (1); the third dead place is empty.
    volumes = np.cumprod([2 / 3, 2 / 3, 1 / 2, 1 / 2, 0.0])
    shares = -np.diff(volumes, prepend=1.0)
    evidence = shares @ np.exp([1.0, 1.5, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(found.log_evidence, np.log(evidence))
    order = [0, 2, 3, 1, 4]  # places of 1.0, 2.0, 3.0, 1.5, 4.0 in that order
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(found.log_volume[[0, 1, 3, 4, 5]], np.log(volumes)[order])
    weights = shares * np.exp([1.0, 1.5, 2.0, 3.0, 4.0]) / evidence
    np.testing.assert_allclose(np.exp(found.log_weight[[0, 1, 3, 4, 5]]), weights[order])
    assert np.isnan(found.log_volume[2])
    assert found.log_weight[2] == -np.inf
    np.testing.assert_allclose(found.ess, 1 / np.sum(weights**2))


@pytest.mark.parametrize("levels", [0, 7])
def test_insertion_ranks_of_independent_draws_are_uniform(levels):
    """On plateaus as well; Kolmogorov-Smirnov at level 1e-4, and no correlation in a batch.

    The new points are above the contour, the others where they will.
    """
    runs, new = 1500, jnp.array([4, 9, 21, 22, 29])
    places = random.uniform(random.key(2), (runs, 30))
    contour = 1.0 / 7.0
    places = places.at[:, new].set(contour + (1.0 - contour) * places[:, new])
    values = jnp.floor(levels * places) / levels if levels else places

    keys, lowest = random.split(random.key(3), runs), 0.0 if levels else contour
    ranks = np.asarray(jax.vmap(lambda k, x: insertion_ranks(k, x, new, lowest))(keys, values))
    assert stats.kstest(ranks.ravel(), "uniform").pvalue > 1e-4
    correlation = np.corrcoef(ranks.T)[np.triu_indices(5, 1)]
    assert np.abs(correlation).max() < 4 / np.sqrt(runs)


def test_a_plateau_is_one_in_all_programs():
    """Values of one expression, compiled in several ways, differ in their last bits."""
    value = np.float64(-1.4959226032237267)
    point = point_maker(lambda x: (0.0, x["a"]))
    with jax.enable_x64(True):
        made = [
            float(point({"a": jnp.float64(x)}).loglikelihood)
            for x in (value, value * (1 + 2e-16), value * (1 - 2e-16), value * (1 + 1e-10))
        ]
    assert made[0] == made[1] == made[2] != made[3]
    assert abs(made[0] - value) < 1e-11


def test_points_near_to_their_start_are_told():
    rng = np.random.default_rng(1)
    root = np.array([[2.0, 0.0], [1.9, 0.3]])
    points = rng.normal(size=(200, 2)) @ root.T
    new, start = np.array([3, 50, 120]), rng.normal(size=(3, 2)) @ root.T
    start[1] = points[50] + 0.01 * root[:, 1]  # has hardly moved
    found = near_start(
        {"x": jnp.asarray(points)}, new, {"x": jnp.asarray(start)}, jnp.asarray(root)
    )
    scaled = np.linalg.solve(root, (points[new][:, None] - points[None]).reshape(-1, 2).T)
    distance = np.sum(scaled**2, 0).reshape(3, 200)
    moved = np.sum(np.linalg.solve(root, (points[new] - start).T) ** 2, 0)
    others = np.setdiff1d(np.arange(200), new)
    nearer = (distance[:, others] < moved[:, None]).sum(1)
    np.testing.assert_array_equal(found, nearer < 0.01 * 197)
    assert found[1]


# -- known evidences -------------------------------------------------------------------------------


def normal(y, s):
    m = numpyro.sample("m", dist.Normal(0.0, jnp.full(y.shape[0], 2.0)).to_event(1))
    numpyro.sample("y", dist.Normal(m, s).to_event(1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 20])
def test_conjugate_normal_models(size):
    """Log evidence, posterior means and standard deviations in 1, 5 and 20 dimensions.

    Draws of independent runs: means of standardised draws are compared by the spread of the 16
    runs, 4 standard errors of Student's t with 15 degrees of freedom: 1 in 900 a number.
    """
    y, s = np.linspace(-2.0, 2.0, size) + 0.3, 0.3
    exact = stats.norm(0.0, np.sqrt(4.0 + s**2)).logpdf(y).sum()
    live = 500 if size == 20 else 200
    tree = quiet(normal, y, s, method=NestedSampling(live=live), chains=16, seed=3)
    assert agrees(tree, exact)
    told = tree["nested"]["log_evidence_sd"].values
    # Chi-squared with 15 degrees of freedom, 1e-4 on both sides.
    spread = np.sum((evidences(tree) - evidences(tree).mean()) ** 2 / told**2)
    assert stats.chi2(15).ppf(1e-4) < spread < stats.chi2(15).ppf(1 - 1e-4)
    mean, sd = 4.0 * y / (4.0 + s**2), np.sqrt(4.0 * s**2 / (4.0 + s**2))
    z = (tree["posterior"]["m"].values - mean) / sd
    for quantity in (z.mean((1, 2)), z.var(1).mean(1) - 1.0):
        assert abs(quantity.mean()) < 4 * quantity.std(ddof=1) / 4
    assert ppl.findings(tree) == []
    assert tree["posterior"].sizes["draw"] == live
    assert (tree["nested"]["ess"] > live).all()


def peaks(y):
    """Two peaks of one height, far apart, one of three times the mass of the other."""
    x = numpyro.sample("x", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    left = stats_normal(x, -5.0, 0.2) + jnp.log(0.25)
    right = stats_normal(x, 5.0, 0.2 * jnp.sqrt(3.0)) + jnp.log(0.75)
    numpyro.factor("peaks", jnp.logaddexp(left, right) + y)


def stats_normal(x, mean, sd):
    return dist.Normal(mean, sd).log_prob(x).sum()


@pytest.mark.slow
def test_two_peaks_far_apart():
    tree = quiet(peaks, 0.0, method=NestedSampling(live=300), chains=16, seed=4)
    assert agrees(tree, -2 * np.log(20.0))
    shares = (tree["posterior"]["x"].values[..., 0] > 0).mean(1)
    assert abs(shares.mean() - 0.75) < 4 * shares.std(ddof=1) / 4


def flat(x_is, y):
    """Flat on most of the prior: twice as likely inside a ball, and zero on a third of it."""
    x = numpyro.sample("x", dist.Uniform(0.0, 1.0).expand([2]).to_event(1))
    inside = jnp.sum((x - 0.5) ** 2) < 0.09
    level = jnp.where(x[0] < 1 / 3, -jnp.inf, jnp.where(inside, jnp.log(10.0), 0.0))
    numpyro.factor("level", level + 0.0 * (y + x_is))


def inner_area():
    """Of the disc of radius 0.3 around (0.5, 0.5), right of 1/3."""
    d, r = 0.5 - 1 / 3, 0.3
    return np.pi * r**2 - (r**2 * np.arccos(d / r) - d * np.sqrt(r**2 - d**2))


@pytest.mark.slow
def test_plateaus():
    """Likelihoods of three values, zero among them: every point ties with others."""
    tree = quiet(flat, 0.0, 0.0, method=NestedSampling(live=400), chains=16, seed=5)
    area = inner_area()
    assert agrees(tree, np.log(2 / 3 - area + 10.0 * area))
    x = tree["posterior"]["x"].values
    assert (x[..., 0] > 1 / 3).all()
    inside = (((x - 0.5) ** 2).sum(-1) < 0.09).mean(1)
    share = 10.0 * area / (2 / 3 + 9.0 * area)
    assert abs(inside.mean() - share) < 4 * inside.std(ddof=1) / 4


def steps(y):
    a = numpyro.sample("a", dist.Uniform(0.0, 1.0))
    numpyro.sample("y", dist.Poisson(1.0 + jnp.floor(10.0 * a)), obs=y)


@pytest.mark.slow
def test_many_plateaus():
    """Ten values, each on a tenth of the prior. The error of the mean is 0.004, of a p-value 0.02:
    at level 4e-5. A likelihood whose last bits vary on a plateau is 0.017 too small, and 42% of
    its p-values are below 0.05."""
    tree = quiet(steps, 3, method=NestedSampling(live=200), chains=128, seed=100, draws=1)
    runs = tree["nested"].dataset
    logs = runs["log_evidence"].values
    exact = np.log(np.mean(stats.poisson.pmf(3, 1.0 + np.arange(10))))
    bias = np.var(logs) / 2  # of a logarithm
    assert abs(logs.mean() + bias - exact) < 4 * logs.std(ddof=1) / np.sqrt(logs.size)
    assert np.mean(runs["insertion_p"] < 0.05) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 128)
    assert not [f for f in ppl.findings(tree) if f.kind == "nested"]


@pytest.mark.slow
def test_a_likelihood_that_does_not_vary_at_all():
    def nothing(y):
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("nothing", y)

    tree = quiet(nothing, -3.0, method=NestedSampling(live=50))
    np.testing.assert_allclose(evidences(tree), -3.0, rtol=1e-12)
    assert (tree["nested"]["n_iterations"] == 0).all()


def schools_evidence():
    """The effects are integrated out; mu and tau by quadrature."""

    def likelihood(mu, tau):
        each = stats.norm(mu, np.sqrt(tau**2 + ERRORS**2)).pdf(EFFECTS)
        return np.prod(each) * stats.norm(0, 5).pdf(mu) * stats.halfcauchy(0, 5).pdf(tau)

    value, _ = integrate.dblquad(
        lambda mu, t: likelihood(mu, 5 * np.tan(t)) * 5 / np.cos(t) ** 2,
        0.0, np.pi / 2 - 1e-9, -30.0, 40.0, epsabs=1e-20,
    )  # fmt: skip
    return np.log(value)


@pytest.mark.slow
def test_eight_schools_against_quadrature():
    method = NestedSampling(live=400)
    tree = quiet(eight_schools, ERRORS, y=EFFECTS, method=method, chains=16, seed=6)
    assert agrees(tree, schools_evidence())


@pytest.mark.slow
def test_float32():
    tree = quiet(normal, np.array([0.5, -1.0]), 0.3, method=NestedSampling(live=200), chains=8,
                 precision="float32", seed=7)  # fmt: skip
    assert tree["posterior"]["m"].dtype == "float32"
    exact = stats.norm(0.0, np.sqrt(4.0 + 0.09)).logpdf([0.5, -1.0]).sum()
    assert agrees(tree, exact)


# -- what it says of itself ------------------------------------------------------------------------


@pytest.mark.slow  # the tutorial without gradients has the same run
def test_too_few_slices_are_a_finding():
    """Ten dimensions, two slices for a point: copies of copies, and an evidence that is wrong."""
    y = np.linspace(-2.0, 2.0, 10)
    tree = quiet(normal, y, 0.3, method=NestedSampling(live=100, steps=2), seed=1)
    found = {finding.kind: finding for finding in ppl.findings(tree)}
    assert found["nested"].severity == "error"
    assert "stayed near" in found["nested"].message
    assert "steps=" in found["nested"].remedy


SMALL = NestedSampling(live=50)  # one program for several tests


@pytest.mark.slow
def test_ranks_that_are_not_uniform_are_a_finding():
    tree = quiet(normal, np.zeros(2), 0.3, method=SMALL, seed=1)
    assert not [f for f in ppl.findings(tree) if f.kind == "nested"]
    tree["nested"]["insertion_p"][1] = 1e-9
    del tree.attrs["findings"]
    (found,) = (f for f in ppl.findings(tree) if f.kind == "nested")
    assert "too high or too low" in found.message


def test_more_draws_than_points_are_worth_are_a_finding():
    tree = quiet(normal, np.zeros(2), 0.3, method=SMALL, draws=1000, seed=1)
    (found,) = (f for f in ppl.findings(tree) if f.kind == "duplicates")
    assert found.number == tree["nested"]["ess"].min()


def test_points_come_with_volumes_and_weights():
    tree = quiet(normal, np.zeros(2), 0.3, method=SMALL, seed=1)
    points, runs = tree["dead_points"], tree["nested"]
    assert runs.attrs["live"] == 50
    for c in range(4):
        n = int(runs["n_iterations"][c]) * 5 + 50
        one = {name: x.values[c, :n] for name, x in points.data_vars.items()}
        assert np.isnan(points["log_volume"].values[c, n:]).all()
        assert (np.diff(one["log_likelihood"]) >= 0).all()
        assert (np.diff(one["log_volume"]) < 0).all()
        np.testing.assert_allclose(np.exp(one["log_weight"]).sum(), 1.0)
        shells = -np.diff(np.exp(one["log_volume"]), prepend=1.0)
        evidence = np.log(shells @ np.exp(one["log_likelihood"]))
        np.testing.assert_allclose(evidence, runs["log_evidence"][c])
        ranks = one["insertion_rank"]
        assert np.isfinite(ranks).sum() == n - 50
    assert (runs["n_evaluations"] > 10 * 3 * runs["n_iterations"]).all()


def test_a_run_that_is_not_over_is_an_error():
    with pytest.raises(SamplingError, match=r"still hold \d+\.\d% of the evidence.*max_iter"):
        quiet(normal, np.zeros(2), 0.3, method=SMALL, warmup=5)


def impossible(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Uniform(100.0 + x, 101.0 + x), obs=y)


def improper(y):
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def whole(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x + k, 1.0), obs=y)


BAD = {
    "no likelihood": (lambda: quiet(impossible, 0.0, method="nestedsampling"),
                      InitializationError, "positive likelihood"),
    "improper prior": (lambda: quiet(improper, 0.0, method=NestedSampling()),
                       MethodError, "improper"),
    "discrete": (lambda: quiet(whole, 0.0, method=NestedSampling()),
                 MethodError, r"\['k'\] are discrete. SMC"),
    "few points": (lambda: quiet(normal, np.zeros(20), 1.0, method=NestedSampling(live=40)),
                   OptionError, "20 dimensions"),
    "until": (lambda: quiet(normal, np.zeros(2), 1.0, method=NestedSampling(),
                            until=ppl.Goal(ess=100)), OptionError, "until"),
    "init": (lambda: quiet(normal, np.zeros(2), 1.0, method=NestedSampling(), init="prior"),
             OptionError, "init"),
    "live": (lambda: NestedSampling(live=5), OptionError, "ten points"),
    "delete": (lambda: NestedSampling(live=100, delete=60), OptionError, "half"),
    "steps": (lambda: NestedSampling(steps=0), OptionError, "steps"),
    "precision": (lambda: NestedSampling(precision=1.0), OptionError, "precision"),
    "iterations": (lambda: NestedSampling(max_iterations=0), OptionError, "max_iterations"),
}  # fmt: skip


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w == "no likelihood"))
                                  for w in BAD])  # fmt: skip
def test_it_says_what_it_cannot_do(what):
    call, error, pattern = BAD[what]
    with pytest.raises(error, match=pattern):
        call()
