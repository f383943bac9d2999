"""Elliptical slice sampling: priors proved Gaussian, exact posteriors, and what is refused.

Seeds are fixed. A bound of 4 standard errors fails once in 16,000 numbers, a Kolmogorov-Smirnov
test at level 1e-4 at one seed in 10,000.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow, quiet
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.distributions import transforms
from numpyro.infer.reparam import LocScaleReparam
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit import positions
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import MCMC, NUTS, SMC, EllipticalSlice, Slice, block, cycle
from ppl_toolkit.inference.elliptical_slice import _Terms
from ppl_toolkit.inference.gaussian_prior import GaussianDraws, GaussianSites, gaussian_sites
from ppl_toolkit.inference.target import Target
from ppl_toolkit.program import Program

X = np.linspace(0.0, 4.0, 12)
RNG = np.random.default_rng(3)
Y = np.sin(2 * X) + 0.2 * RNG.normal(size=12)


def within(draws, expected):
    """Whether the mean of draws (chain, draw) is the expected number within 4 standard errors."""
    return abs(draws.mean() - expected) < 4 * ppl.convergence.mcse(draws)


# -- which priors are Gaussian, and with what mean and covariance ----------------------------------

ROOT = np.array([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-0.3, 0.2, 0.5]])
A = np.arange(3.0)

PRIORS = {
    "normal": dist.Normal(1.0, 2.0),
    "expanded": dist.Normal(1.0, 2.0).expand([3]),
    "event": dist.Normal(A, 2.0 + A).to_event(1),
    "expanded event": dist.Normal(A, 2.0 + A).to_event(1).expand([2]),
    "multivariate": dist.MultivariateNormal(A, scale_tril=ROOT),
    "covariance": dist.MultivariateNormal(A, ROOT @ ROOT.T),
    "precision": dist.MultivariateNormal(0.0, precision_matrix=ROOT @ ROOT.T),
    "expanded multivariate": dist.MultivariateNormal(A, scale_tril=ROOT).expand([2]),
    "low rank": dist.LowRankMultivariateNormal(A, ROOT[:, :1], 0.5 + A),
    "random walk": dist.GaussianRandomWalk(0.7, 3),
    "affine": dist.TransformedDistribution(
        dist.Normal(1.0, 0.5).expand([3]), transforms.AffineTransform(A, -2.0)
    ),
    "by a matrix": dist.TransformedDistribution(
        dist.Normal(A, 0.5).to_event(1), transforms.LowerCholeskyAffine(A, ROOT)
    ),
    "log-normal": dist.LogNormal(A, 0.5),
    "log-normal event": dist.LogNormal(A, 0.5).to_event(1),
}


def one_site(fn):
    return lambda: numpyro.sample("f", fn)


@pytest.mark.parametrize("name", others_slow(PRIORS, "by a matrix", "log-normal event"))
def test_mean_and_draws_are_those_of_the_density(name):
    """The model's own log prior is quadratic, with its top at the mean and the draws' precision.

    Draws are affine in normal noise, so that their Mahalanobis distances are chi-squared:
    Kolmogorov-Smirnov at level 1e-4.
    """
    program = Program(one_site(PRIORS[name]))
    assert gaussian_sites(program) == GaussianSites(("f",), (), ((),))
    with program.context():
        like = positions.shapes(program)["f"]
        law = GaussianDraws(("f",))
        here = {"f": jnp.zeros(like.shape)}
        mean = jnp.ravel(law(program, (here, random.key(0)), ())["f"][0])

        def log_prior(x):
            return positions.log_terms(program, {"f": x.reshape(like.shape)}, ())[0]["f"]

        gradient, hessian = jax.grad(log_prior), jax.jit(jax.hessian(log_prior))
        np.testing.assert_allclose(gradient(mean), 0.0, atol=1e-10)
        precision = -hessian(mean)
        np.testing.assert_allclose(-hessian(mean + 3.0), precision, rtol=1e-6, atol=1e-9)
        keys = random.split(random.key(1), 4000)
        draws = jax.vmap(lambda key: law(program, (here, key), ())["f"][1])(keys)
        x = draws.reshape(4000, -1) - mean
        distance = np.sum(x @ precision * x, 1)
        assert stats.kstest(distance, stats.chi2(mean.size).cdf).pvalue > 1e-4


def test_priors_without_their_own_sites_are_the_rest_of_the_density():
    def model(y):
        s = numpyro.sample("s", dist.LogNormal(0.0, 1.0))
        f = numpyro.sample("f", dist.Normal(1.0, s).expand([3]).to_event(1))
        numpyro.sample("child", dist.Normal(f.sum(), 2.0))
        numpyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=y)

    program = Program(model, (A,))
    with program.context():
        position = {"s": 0.3, "f": jnp.asarray([0.1, 0.2, 0.3]), "child": jnp.asarray(1.5)}
        own, rest = positions.log_terms(program, position, program.data)
        prior, likelihood = positions.log_parts(program, position, program.data)
        np.testing.assert_allclose(sum(own.values()), prior, rtol=1e-12)
        np.testing.assert_allclose(rest, likelihood, rtol=1e-12)
        np.testing.assert_allclose(own["s"], stats.norm.logpdf(0.3), rtol=1e-12)
        np.testing.assert_allclose(own["child"], stats.norm(0.6, 2.0).logpdf(1.5), rtol=1e-12)
    found = gaussian_sites(program)
    assert set(found.names) == {"s", "f", "child"}
    assert dict(zip(found.names, found.parents, strict=True)) == {
        "s": (), "f": ("s",), "child": ("f",),
    }  # fmt: skip


# -- exact posteriors ------------------------------------------------------------------------------


def regression(y, root, mean, noise):
    f = numpyro.sample("f", dist.MultivariateNormal(mean, scale_tril=root))
    numpyro.sample("y", dist.Normal(f[:2], noise).to_event(1), obs=y)


def test_a_gaussian_likelihood_gives_the_exact_posterior():
    """Five unknowns with correlations, two of them seen: mean and covariance of all."""
    root = np.linalg.cholesky(0.5 ** np.abs(np.subtract.outer(range(5), range(5))))
    mean, y, noise = np.arange(5.0), np.array([2.0, -1.0]), 0.7
    tree = quiet(regression, y, root, mean, noise, method=EllipticalSlice(), draws=4000, seed=1)
    prior = root @ root.T
    gain = prior[:, :2] @ np.linalg.inv(prior[:2, :2] + noise**2 * np.eye(2))
    expected = mean + gain @ (y - mean[:2])
    covariance = prior - gain @ prior[:2]
    x = tree["posterior"]["f"].values - expected
    for i in range(5):
        assert within(x[..., i], 0.0)
        for j in range(i, 5):
            assert within(x[..., i] * x[..., j], covariance[i, j])
    assert (tree["sample_stats"]["n_steps"] == 0).all()
    assert tree["sample_stats"]["n_evaluations"].min() >= 2


def process(x, y, new):
    both = jnp.concatenate([x, new])
    k = jnp.exp(-0.5 * jnp.subtract.outer(both, both) ** 2) + 1e-8 * jnp.eye(both.size)
    f = numpyro.sample("f", dist.MultivariateNormal(0.0, k))
    numpyro.sample("y", dist.Normal(f[: x.size], 0.3).to_event(1), obs=y)


@pytest.mark.slow
def test_gaussian_process_regression_with_known_parameters():
    """The closed form at seen and unseen inputs."""
    new = np.array([0.7, 5.0])
    tree = quiet(process, X, Y, new, method=EllipticalSlice(), draws=3000, warmup=500, seed=2)

    def kernel(a, b):
        return np.exp(-0.5 * np.subtract.outer(a, b) ** 2)

    gain = kernel(np.append(X, new), X) @ np.linalg.inv(kernel(X, X) + 0.09 * np.eye(12))
    mean = gain @ Y
    variance = 1.0 - np.sum(gain * kernel(np.append(X, new), X), 1)
    f = tree["posterior"]["f"].values
    for i in range(14):
        assert within(f[..., i], mean[i])
        assert within((f[..., i] - mean[i]) ** 2, variance[i])


def half(y):
    """A likelihood that is zero on half of the line, and not a number in between."""
    f = numpyro.sample("f", dist.Normal(-1.0, 1.5))
    likely = jnp.where(f > 0.5, -0.5 * (y - f) ** 2, jnp.where(f > 0.0, jnp.nan, -jnp.inf))
    numpyro.factor("likelihood", likely)


def test_where_the_likelihood_is_zero_or_nothing_no_draw_is():
    tree = quiet(half, 2.0, method=EllipticalSlice(), draws=3000, seed=3)
    draws = tree["posterior"]["f"].values
    variance = 1 / (1 + 1 / 2.25)
    mean = variance * (2.0 - 1.0 / 2.25)
    sd = np.sqrt(variance)
    law = stats.truncnorm((0.5 - mean) / sd, np.inf, mean, sd)
    assert stats.kstest(draws[:, ::10].ravel(), law.cdf).pvalue > 1e-4


def thresholds(y):
    """A step in the likelihood, a prior whose scale is another site, and one that depends on it."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("row", y.shape[0]):
        f = numpyro.sample("f", dist.Normal(0.5, scale))
        t = numpyro.sample("t", dist.Normal(f, 1.0))
        numpyro.sample("y", dist.Normal(jnp.round(t), 0.5), obs=y)


PIECES = {
    "beside a slice": cycle([block(EllipticalSlice(), "f"), block(Slice(), ["t", "scale"])]),
    "three blocks": cycle(
        [block(EllipticalSlice(), "f"), block(EllipticalSlice(), "t"), block(Slice(), "scale")]
    ),
    "the scale as well": cycle(
        [block(EllipticalSlice(), "scale"), block(EllipticalSlice(), "f"), block(Slice(), "t")]
    ),
    "beside NUTS": cycle([block(EllipticalSlice(), "t"), block(NUTS(), ["f", "scale"])]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIECES)
def test_the_posterior_is_invariant(name):
    """Level 0.01 for all tests of a part together, at a fixed seed."""
    found = ppl.check(
        thresholds, Y[:2], method=PIECES[name], seed=4, calibration=False, progress=False,
        replications=8000,
    )  # fmt: skip
    assert found, found


def test_evaluations_are_counted():
    calls = []
    draws, terms = GaussianDraws(("f",)), _Terms()

    def scored(given):
        jax.debug.callback(lambda: calls.append(1))
        return {"f": 0.0}, -10.0 * jnp.sum(given[0]["f"] ** 2)

    functions = {
        draws: lambda given: {"f": (jnp.zeros(3), random.normal(given[1], (3,)))},
        terms: scored,
    }
    target = Target(lambda x: (0.0, 0.0), functions=functions)
    kernel = EllipticalSlice(sites=GaussianSites(("f",), (), ((),))).bind(target)
    state, step = kernel.init({"f": jnp.ones(3)}, None), jax.jit(kernel.step)
    for number in range(5):
        jax.effects_barrier()
        calls.clear()
        state, info = step(random.key(number), state)
        jax.effects_barrier()
        assert len(calls) == info["n_evaluations"] >= 2


def test_where_no_point_of_the_ellipse_is_likely_the_chain_stays():
    """The interval of angles shrinks until the ellipse gives the present point, and ends there."""
    draws, terms = GaussianDraws(("f",)), _Terms()
    functions = {
        draws: lambda given: {"f": (jnp.ones(3), random.normal(given[1], (3,)))},
        terms: lambda given: ({"f": 0.0}, -jnp.inf),
    }
    target = Target(lambda x: (0.0, 0.0), functions=functions)
    kernel = EllipticalSlice(sites=GaussianSites(("f",), (), ((),))).bind(target)
    state = kernel.init({"f": jnp.array([0.1, 0.7, -3.0])}, None)
    new, info = jax.jit(kernel.step)(random.key(0), state)
    np.testing.assert_allclose(new.position["f"], state.position["f"], rtol=1e-6)
    assert info["n_evaluations"] < 500


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_likelihood_that_does_not_vary_ends_every_loop(precision):
    """Large and flat: a level can round to the density itself. The posterior is the prior."""

    def flat(y):
        f = numpyro.sample("f", dist.Normal(3.0, 1.0).expand([5]).to_event(1))
        numpyro.factor("flat", y + 0.0 * f.sum())

    tree = quiet(flat, -1e7, method=EllipticalSlice(), draws=5000, precision=precision)
    draws = tree["posterior"]["f"].values
    assert stats.kstest(draws[:, ::10, 0].ravel(), stats.norm(3.0, 1.0).cdf).pvalue > 1e-4


def test_chains_begin_with_a_draw_from_the_prior():
    def model(y):
        f = numpyro.sample("f", dist.Normal(1e4, 1.0))
        numpyro.sample("y", dist.Normal(f, 10.0), obs=y)

    tree = quiet(model, 1e4, method=EllipticalSlice(), draws=1, warmup=0)
    assert (np.abs(tree["posterior"]["f"] - 1e4) < 6).all()
    start = quiet(model, 1e4, method=EllipticalSlice(), draws=1, warmup=0, init={"f": -1e9})
    assert (np.abs(start["posterior"]["f"] - 1e4) > 1e5).all()  # one step from far away


# -- what is refused -------------------------------------------------------------------------------


def half_normal(y):
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    f = numpyro.sample("f", dist.Normal(0.0, s))
    numpyro.sample("y", dist.Normal(f, 1.0), obs=y)


def scaled(y):
    with numpyro.handlers.scale(scale=2.0):
        f = numpyro.sample("f", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(f, 1.0), obs=y)


def masked(y):
    f = numpyro.sample("f", dist.Normal(0.0, 1.0).mask(y > -100.0))
    numpyro.sample("y", dist.Normal(f, 1.0), obs=y)


def series(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x, None

    scan(step, 0.0, y)


def chain(y):
    f = numpyro.sample("f", dist.Normal(0.0, 1.0))
    g = numpyro.sample("g", dist.Normal(f, 1.0))
    numpyro.sample("y", dist.Normal(g, 1.0), obs=y)


def whole(y):
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


BAD = {
    "another prior": (half_normal, "'s' has the prior HalfNormal.*block"),
    "a scaled prior": (scaled, "'f' has a scaled prior"),
    "a mask": (masked, "'f' is masked"),
    "a scan": (series, "'x' is a series made by a scan"),
    "one on another": (chain, r"prior of 'g' depends on \['f'\].*block of its own.*non-centre"),
    "discrete": (whole, "'k' has the prior Poisson"),
}


@pytest.mark.parametrize("what", BAD)
def test_it_names_the_site_at_fault(what):
    model, pattern = BAD[what]
    y = Y if what == "a scan" else Y[0]
    with pytest.raises(MethodError, match=pattern):
        ppl.infer(model, y, method=EllipticalSlice(), progress=False)


def nested(y):
    f = numpyro.sample("f", dist.Normal(0.0, 1.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    g = numpyro.sample("g", dist.Normal(f, 1.0))
    numpyro.sample("y", dist.Normal(g, s), obs=y)


def test_other_refusals():
    with pytest.raises(MethodError, match=r"'s' has the prior HalfNormal"):
        ppl.infer(half_normal, Y[0], method=MCMC(block(EllipticalSlice(), ["f", "s"])))
    with pytest.raises(MethodError, match=r"EllipticalSlice\(\), \['f'\]\), \.\.\.\]\)") as caught:
        ppl.infer(nested, Y[0], method=EllipticalSlice())
    assert "block(Gibbs()" in str(caught.value)
    with pytest.raises(MethodError, match=r"moves the latent sites \['s'\]"):
        ppl.infer(half_normal, Y[0], method=MCMC(block(EllipticalSlice(), "f")))
    with pytest.raises(MethodError, match=r"follows the posterior alone"):
        ppl.infer(scaled, Y[0], method=SMC(kernel=EllipticalSlice()))
    with pytest.raises(MethodError, match=r"reads the priors off the model"):
        EllipticalSlice().require({})
    with pytest.raises(OptionError, match="warmup"):
        EllipticalSlice(warmup=-1)


def test_non_centred_models_are_served():
    """The remedy that the message names."""
    remedied = numpyro.handlers.reparam(chain, config={"g": LocScaleReparam(0.0)})
    tree = quiet(remedied, 1.0, method=EllipticalSlice(), draws=2000, seed=6)
    g = tree["posterior"]["g"].values
    assert within(g, 2.0 / 3.0)  # g ~ N(0, 2), y ~ N(g, 1)
    assert within((g - 2.0 / 3.0) ** 2, 2.0 / 3.0)
