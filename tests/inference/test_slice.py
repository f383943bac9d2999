"""Slice sampling: exact laws, with and without a gradient; what it learns, and what it counts.

Seeds are fixed. A right sampler fails a Kolmogorov-Smirnov test at level 1e-4 at one seed in 10,000
(every tenth sweep is nearly independent), a bound of 4 standard errors once in 16,000 numbers.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow, quiet
from jax import random
from models import conjugate
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit.errors import InferenceWarning, MethodError, OptionError
from ppl_toolkit.inference import MCMC, NUTS, SMC, Slice, block, cycle
from ppl_toolkit.inference.adaptation import Moments, schedule
from ppl_toolkit.inference.kernel import Placed, Stage
from ppl_toolkit.inference.slice import Chain, Lines
from ppl_toolkit.inference.target import Target

Y = np.random.default_rng(0).normal(1.0, 1.0, size=12)
MEAN, SD = Y.sum() / (12 + 1 / 4), (12 + 1 / 4) ** -0.5


def z_scores(tree, name, mean, sd):
    """Errors of mean and standard deviation in Monte Carlo standard errors."""
    rows = ppl.summary(tree, name)
    return np.concatenate(
        [(rows["mean"] - mean) / rows["mcse_mean"], (rows["sd"] - sd) / rows["mcse_sd"]]
    )


def where(inside, value):
    return jnp.where(inside, value, -jnp.inf)


# Log densities that are not normalised, starting points, and their laws.
LAWS = {
    "normal": (lambda x: -0.5 * x**2, 0.0, stats.norm()),
    "skewed": (lambda x: 3.0 * x - jnp.exp(x), 0.0, stats.loggamma(3.0)),
    "kink": (lambda x: -jnp.abs(x), 0.0, stats.laplace()),
    "heavy tails": (lambda x: -2.0 * jnp.log1p(x**2 / 3.0), 0.0, stats.t(3)),
    "truncated": (lambda x: where(x > 1.0, -0.5 * x**2), 1.5, stats.truncnorm(1.0, np.inf)),
    "uniform": (lambda x: where((x > 0) & (x < 1e-3), 0.0), 5e-4, stats.uniform(0, 1e-3)),
    "not a number": (lambda x: jnp.log(x) - x, 1.0, stats.gamma(2.0)),  # where x is negative
    "far and wide": (lambda x: -0.5 * ((x - 1e5) / 1e4) ** 2, 0.0, stats.norm(1e5, 1e4)),
}


@pytest.mark.parametrize("name", others_slow(LAWS, "truncated", "not a number"))
def test_draws_have_the_law(name):
    density, start, law = LAWS[name]
    tree = quiet(density, init=start, method=Slice(), draws=2000, seed=3)
    draws = tree["posterior"]["x"].values
    assert stats.kstest(draws[:, ::10].ravel(), law.cdf).pvalue > 1e-4
    assert (tree["sample_stats"]["n_steps"] == 0).all()


STEPS = np.array([0.1, 0.5, 0.15, 0.25])  # of mass on (0, 1), (1, 3), (3, 3.5), (3.5, 6)
EDGES = np.array([0.0, 1.0, 3.0, 3.5, 6.0])


def steps(x, log_heights, edges):
    piece = jnp.searchsorted(edges, x, side="right") - 1
    inside = (x > edges[0]) & (x < edges[-1])
    return jnp.where(inside, log_heights[jnp.clip(piece, 0, 3)], -jnp.inf)


def test_a_density_without_a_gradient():
    """A step function: NUTS sees a gradient of zero, and a slice sampler needs none."""
    heights = np.log(STEPS / np.diff(EDGES))
    tree = quiet(steps, heights, EDGES, init=2.0, method=Slice(), draws=4000, seed=1)
    draws = tree["posterior"]["x"].values
    for low, high, mass in zip(EDGES[:-1], EDGES[1:], STEPS, strict=True):
        inside = (draws > low) & (draws < high)
        assert abs(inside.mean() - mass) < 4 * ppl.convergence.mcse(inside.astype(float))
        within = draws[:, ::10][inside[:, ::10]]
        assert stats.kstest(within, stats.uniform(low, high - low).cdf).pvalue > 1e-4


def gaussian(x, inverse):
    return -0.5 * x @ inverse @ x


CORRELATED = np.array([[1.0, 95.0, 0.0], [95.0, 10_000.0, 0.0], [0.0, 0.0, 1e-6]])


@pytest.mark.parametrize("directions", others_slow(["auto", "coordinates"], "auto"))
def test_a_correlated_gaussian_has_its_covariance(directions):
    """Correlation 0.95, scales 1, 100 and 1/1000; directions by the covariance remove it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        tree = ppl.infer(
            gaussian, np.linalg.inv(CORRELATED), init=np.zeros(3), progress=False, seed=5,
            method=Slice(directions=directions), draws=1500,
        )  # fmt: skip
    assert np.abs(z_scores(tree, "x", 0.0, np.sqrt(np.diag(CORRELATED)))).max() < 4
    x = tree["posterior"]["x"].values
    product = x[..., 0] * x[..., 1]
    assert abs(product.mean() - 95.0) < 4 * ppl.convergence.mcse(product)
    share = ppl.summary(tree, "x")["ess_bulk"].min() / 6000
    assert share > 0.4 if directions == "auto" else share < 0.2
    assert tree["sample_stats"]["n_evaluations"].mean() / 3 < 5.5  # widths are right


def test_evaluations_are_counted():
    calls = []

    def density(position):
        jax.debug.callback(lambda: calls.append(1))
        return -0.5 * jnp.sum(position["x"] ** 2 / jnp.array([1.0, 1e2, 1e-2]))

    kernel = Slice(max_expansions=5).bind(Target.of(density))
    state, step = kernel.init({"x": jnp.ones(3)}, random.key(0)), jax.jit(kernel.step)
    for number in range(5):
        jax.effects_barrier()
        calls.clear()
        state, info = step(random.key(number), state)
        jax.effects_barrier()
        assert len(calls) == info["n_evaluations"] > 6
        assert info["n_steps"] == 0


def test_a_sweep_keeps_the_density_of_its_point():
    density = Target.of(lambda position: jnp.sum(jnp.sin(position["x"])) - position["y"] ** 2)
    kernel = Slice().bind(density)
    state = kernel.init({"x": jnp.zeros(2), "y": jnp.zeros(())}, random.key(0))
    state, _ = kernel.step(random.key(1), state)
    np.testing.assert_allclose(state.kept.log_density, density.log_density(state.position))
    elsewhere = kernel.refresh(state, {"x": jnp.ones(2), "y": jnp.ones(())})
    np.testing.assert_allclose(elsewhere.kept.log_density, 2 * np.sin(1.0) - 1.0)


def test_warm_up_learns_and_sampling_does_not():
    method, plan = Slice(), schedule(100)
    moments = Moments.start(jnp.zeros(2), True)
    lines = Lines(jnp.zeros(()), jnp.eye(2), moments)
    adapted = jax.jit(lambda lines, x, b, i: method._adapted(lines, x, b, Stage(i, plan)))
    early = adapted(lines, jnp.ones(2), jnp.array([1.0, 6.0]), 0)
    np.testing.assert_allclose(early.directions, np.diag([0.5, 3.0]))  # half as long, and thrice

    rng = np.random.default_rng(0)
    index = int(plan.first)
    while index < int(plan.ends[0]) + 1:
        before = lines
        x = jnp.asarray(rng.normal(size=2) * [1.0, 10.0])
        lines = adapted(lines, x, jnp.ones(2), index)
        index += 1
    n = float(before.moments.draws) + 1
    scale = np.sqrt(np.diag(lines.directions @ lines.directions.T))
    np.testing.assert_allclose(scale / 3.0, [1.0, 10.0], rtol=4 / np.sqrt(2 * n))
    assert float(lines.moments.draws) == 0.0

    short, long = (quiet(conjugate, Y, method=method, draws=d, warmup=60) for d in (5, 50))
    for name in short["sampler_state"].data_vars:
        if "directions" in name:
            np.testing.assert_array_equal(short["sampler_state"][name], long["sampler_state"][name])


def test_chains_learn_directions_from_each_other():
    """By the covariance of all their draws, those on the way there left out."""
    rng, plan = np.random.default_rng(1), schedule(100)
    end = int(plan.ends[0]) + 1
    x = (
        rng.normal(size=(3, end, 2)) @ [[1.0, 2.0], [0.0, 3.0]]
        + 100.0 * np.arange(3)[:, None, None]
    )
    x[:, : int(plan.first)] = 1e9
    for directions, expected in (
        (np.stack([np.eye(2)] * 3), None),
        (np.ones((3, 2)), 3.0 * x[:, int(plan.first) :].reshape(-1, 2).std(0)),
    ):
        kept = Lines(np.zeros(3), directions, ())
        state = Chain(Placed({}, kept), np.full(3, end))
        new = Slice().pool(state, x, {}, end, 100)
        found = new.kernel.kept.directions
        assert found.shape == directions.shape
        assert (found == found[0]).all()
        if expected is None:
            own = x[:, int(plan.first) :].reshape(-1, 2)
            n = len(own)
            covariance = np.cov(own.T, bias=True) * (n + 2 * np.eye(2)) / (n + 2)
            np.testing.assert_allclose(found[0] @ found[0].T, 9 * covariance)
        else:
            np.testing.assert_allclose(found[0], expected)
        later = [int(e) + 1 for e in plan.ends if e >= end]
        assert (new.until == (later[0] if later else 0)).all()


def peaks(weight):
    x = numpyro.sample("x", dist.Normal(0.0, 100.0))
    small = dist.Normal(60.0, 0.5).log_prob(x) + jnp.log(weight)
    numpyro.factor("peaks", jnp.logaddexp(dist.Normal(0.0, 1.0).log_prob(x), small))


@pytest.mark.slow
def test_a_chain_that_begins_at_a_small_peak_far_away_gets_to_the_large_one():
    """Its own widths would not reach there: 60 is 120 of its standard deviations away."""
    start = {"x": np.array([0.0, 1.0, -1.0, 60.0])}
    tree = quiet(peaks, 1e-12, method=Slice(warmup=300), draws=500, init=start)
    assert (np.abs(tree["posterior"]["x"]) < 10).all()


def test_many_dimensions_have_directions_along_the_coordinates():
    for size, dimensions in ((40, 2), (41, 1)):
        state = (
            Slice()
            .bind(Target.of(lambda p: -jnp.sum(p["x"] ** 2)))
            .init({"x": jnp.zeros(size)}, random.key(0))
        )
        assert state.kept.directions.ndim == dimensions


def mixture(y):
    k = numpyro.sample("k", dist.Bernoulli(0.3))
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m + 3.0 * k, 1.0), obs=y)


@pytest.mark.slow
def test_discrete_sites_are_summed_out():
    tree = quiet(mixture, Y, method=Slice(), draws=3000, seed=2)
    assert list(tree["posterior"].data_vars) == ["m"]
    # The exact posterior is a mixture of two normal laws.
    covariance = np.eye(12) + 4.0
    logs = [np.log(p) + stats.multivariate_normal(np.full(12, 3.0 * k), covariance).logpdf(Y)
            for k, p in ((0, 0.7), (1, 0.3))]  # fmt: skip
    weight = 1 / (1 + np.exp(logs[0] - logs[1]))
    means = np.array([Y.sum(), (Y - 3.0).sum()]) / (12 + 1 / 4)
    mean = (1 - weight) * means[0] + weight * means[1]
    variance = (1 - weight) * means[0] ** 2 + weight * means[1] ** 2 - mean**2 + SD**2
    assert np.abs(z_scores(tree, "m", mean, np.sqrt(variance))).max() < 4


def rounded(y):
    """Observed to whole numbers only: the likelihood of the mean has no gradient."""
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(jnp.round(m), 0.5 + s), obs=y)


PIECES = {
    "alone": (Slice(), rounded),
    "along the coordinates": (Slice(directions="coordinates", width=0.5), rounded),
    "few expansions": (Slice(max_expansions=1), rounded),
    "in blocks": (cycle([block(Slice(), "m"), block(Slice(), "s")]), rounded),
    "beside NUTS": (cycle([block(Slice(), "m"), block(NUTS(), "s")]), rounded),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIECES)
def test_the_posterior_is_invariant(name):
    """Level 0.01 for all its tests together, at a fixed seed."""
    kernel, model = PIECES[name]
    found = ppl.check(model, Y[:3], method=kernel, seed=4, calibration=False, progress=False)
    assert found, found


def test_it_is_a_piece_of_cycles():
    in_cycle = MCMC(cycle([block(Slice(), "m"), block(NUTS(), "s")]))
    tree = quiet(rounded, Y, method=in_cycle, draws=200, warmup=200)
    stats_ = tree["sample_stats"]
    assert (stats_["n_steps"] > 0).all()  # of NUTS
    assert (stats_["n_evaluations"] >= 3).all()


@pytest.mark.slow
def test_it_moves_populations():
    population = quiet(conjugate, Y, method=SMC(particles=512, kernel=Slice()), seed=1)
    assert np.abs(z_scores(population, "m", MEAN, SD)).max() < 4
    exact = stats.multivariate_normal(np.zeros(12), np.eye(12) + 4.0).logpdf(Y)
    logs = population["sample_stats"]["log_evidence"].values[:, 0]
    assert abs(np.mean(np.exp(logs - exact)) - 1) < 0.5


BAD = {
    "directions": (lambda: Slice(directions="dense"), OptionError, "one of"),
    "width": (lambda: Slice(width=0.0), OptionError, "width"),
    "expansions": (lambda: Slice(max_expansions=0), OptionError, "max_expansions"),
    "warm-up": (lambda: Slice(warmup=-1), OptionError, "warmup"),
    "radius": (lambda: Slice(init_radius=-1.0), OptionError, "init_radius"),
    "discrete": (
        lambda: ppl.infer(
            lambda y: numpyro.sample("y", dist.Normal(numpyro.sample("k", dist.Poisson(3)), 1),
                                     obs=y),
            Y, method=Slice(),
        ),
        MethodError, "Slice.*'k'",
    ),
    "discrete in a piece": (
        lambda: ppl.infer(mixture, Y, method=MCMC(Slice())), MethodError, r"Slice.*\['k'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_it_says_what_it_cannot_do(what):
    call, error, pattern = BAD[what]
    with pytest.raises(error, match=pattern):
        call()
