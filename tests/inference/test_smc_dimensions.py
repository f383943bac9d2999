"""SMC on models with masked plates and cases: their number free, and given.

The number free: birth, death and switch move the particles. Given: the model is conditioned on it,
and its prior mass is part of the evidence. Seeds are fixed; false-alarm rates are said.
"""

import itertools
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from coal import LOG_EVIDENCE, change_points, days
from jax import random
from numpyro import handlers
from scipy.special import gammaln, logsumexp
from test_reversible_jump import LOG_Z, curve, nested, polynomial_data
from test_smc import agrees, evidences, exactly

import ppl_toolkit as ppl
from ppl_toolkit import positions
from ppl_toolkit.errors import InferenceWarning, MethodError
from ppl_toolkit.inference import (
    MCMC,
    NUTS,
    SMC,
    BirthDeath,
    GibbsWithGradients,
    RandomWalk,
    Switch,
    Walk,
    case,
    cycle,
    masked_plate,
    smc,
)
from ppl_toolkit.program import Program


def infer(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return ppl.infer(model, *args, progress=False, **options)


def given(model, **values):
    """The model conditioned on some sites."""
    return handlers.condition(model, data=values)


def clusters(y):
    """Exchangeable elements with a discrete mark and a parent."""
    k = numpyro.sample("k", dist.DiscreteUniform(0, 2))
    spread = numpyro.sample("spread", dist.Categorical(jnp.array([0.4, 0.6])))
    with masked_plate("cluster", 2, k) as active:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0 + spread))
        sign = numpyro.sample("sign", dist.Categorical(jnp.array([0.3, 0.7])))
    total = jnp.sum(jnp.where(active, x + sign, 0.0))
    numpyro.sample("y", dist.Normal(total, 1.0), obs=y)


def evidences_of_clusters(y):
    """Log p(k) p(y | k) by algebra: a sum over spreads and numbers of marks."""
    found = []
    for k in range(3):
        parts = [
            np.log([0.4, 0.6][spread])
            + sum(np.log([0.3, 0.7][s]) for s in signs)
            - 0.5 * np.log(2 * np.pi * (v := 1 + k * (1 + spread) ** 2))
            - 0.5 * (y - sum(signs)) ** 2 / v
            for spread in (0, 1)
            for signs in itertools.product((0, 1), repeat=k)
        ]
        found.append(logsumexp(parts) - np.log(3))
    return np.array(found)


T = np.linspace(0, 2, 8)
LINE = T, np.exp(-0.8 * T) + 0.15 * np.cos(9 * T)


def evidences_of_curve(x, y):
    """By quadrature."""
    grid = np.linspace(-8, 8, 40001)

    def log_evidence(mean, log_prior):
        like = -0.5 * ((y - mean) / 0.3) ** 2 - np.log(0.3) - 0.5 * np.log(2 * np.pi)
        return np.log(0.5 * np.trapezoid(np.exp(like.sum(axis=1) + log_prior), grid))

    normal = -0.5 * grid**2 - 0.5 * np.log(2 * np.pi)
    half = np.where(grid >= 0, normal + np.log(2), -np.inf)
    decay = np.exp(-np.abs(grid[:, None]) * x)
    return np.array([log_evidence(1 - grid[:, None] * x, normal), log_evidence(decay, half)])


Y = np.asarray(2.6)
MODELS = {
    "terms": (nested, (polynomial_data(),), "k", (1, 2, 3), lambda: LOG_Z - np.log(3)),
    "elements with marks": (clusters, (Y,), "k", (0, 1, 2), lambda: evidences_of_clusters(2.6)),
    "cases": (curve, LINE, "shape", (0, 1), lambda: evidences_of_curve(*LINE)),
}


@pytest.mark.slow  # in short, `test_jump_evidence` has evidences of numbers of terms
@pytest.mark.parametrize("name", MODELS)
def test_number_free(name):
    """The total evidence, and the posterior of the number; 16 runs.

    Beyond 4.5 standard errors once in 2400 seeds, for each of up to four numbers.
    """
    model, data, site, values, exactly_known = MODELS[name]
    exact = exactly_known()
    tree = infer(model, *data, method=SMC(particles=512), chains=16)
    assert agrees(tree, logsumexp(exact), 0.05)
    drawn = tree["posterior"][site].values
    for value, p in zip(values, np.exp(exact - logsumexp(exact)), strict=True):
        share = (drawn == value).mean(axis=1)
        if p > 1e-3:
            assert abs(share.mean() - p) < 4.5 * share.std(ddof=1) / 4
        else:
            assert share.mean() < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_number_given(name):
    """The evidence with every value of it, p(k) included; once in 2400 seeds each."""
    model, data, site, values, exactly_known = MODELS[name]
    for value, exact in zip(values, exactly_known(), strict=True):
        method = SMC(particles=512)
        tree = infer(given(model, **{site: value}), *data, method=method, chains=16)
        if name == "elements with marks" and value == 0:  # no element: a constant likelihood
            np.testing.assert_allclose(evidences(tree), exact, rtol=1e-12)
        else:
            assert agrees(tree, exact, 0.05)
        assert site not in tree["posterior"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["at", None])
def test_ordered_elements_given_their_number(order):
    """Change points, against quadrature: log p(k) + log p(y | k) (once in 2400 seeds each)."""
    for k in (0, 2):
        wanted = LOG_EVIDENCE[k] + k * np.log(3) - gammaln(k + 1)
        wanted -= np.log(sum(3.0**n / np.exp(gammaln(n + 1)) for n in range(4)))
        model = given(change_points, k=k)
        method = SMC(kernel=RandomWalk(), particles=1024)
        tree = infer(model, days(), 40907.0, 3, order, method=method, chains=16)
        assert agrees(tree, wanted, 0.2)
        at = tree["posterior"]["at"].values
        np.testing.assert_array_equal(np.isfinite(at), np.broadcast_to(np.arange(3) < k, at.shape))
        if order:
            assert (np.diff(at[..., :k]) > 0).all()


@pytest.mark.slow
def test_a_kernel_of_ones_own():
    """The moves of reversible jumps inside SMC."""
    kernel = cycle([BirthDeath("term"), Walk("b", 0.3), Walk("b", 0.1)])
    tree = infer(nested, polynomial_data(), method=SMC(kernel=kernel, max_moves=200), chains=16)
    assert agrees(tree, logsumexp(LOG_Z) - np.log(3), 0.1)


# -- exactly -------------------------------------------------------------------------------------


def coins(y):
    """Two models of two values each."""
    which = numpyro.sample("which", dist.Categorical(jnp.array([0.3, 0.7])))
    with case(which, 0):
        a = numpyro.sample("a", dist.Categorical(jnp.array([0.9, 0.1])))
    with case(which, 1):
        b = numpyro.sample("b", dist.Categorical(jnp.array([0.4, 0.6])))
    numpyro.sample("y", dist.Normal(jnp.where(which == 0, a, 2.0 * b - 1.0), 0.7), obs=y)


def case_program(values):
    """A finite program with cases, as `exactly` takes it."""
    program = Program(coins, (np.array(0.4),))
    data = program.data
    first = positions.start_position(program, random.key(0), data)
    parts = lambda x: positions.log_parts(program, x, data)  # noqa: E731
    target = SimpleNamespace(
        log_parts=parts,
        levels=lambda x: positions.levels(program, first, data),
        prior_position=lambda key: jax.tree.map(lambda s: s[0], values),
        own_draws=lambda given: positions.own_draws(program, given, data),
        own_scores=lambda x: positions.own_scores(program, x, data),
    )

    def scored(positions_, batches):
        prior, like = jax.vmap(parts)(positions_)
        return smc.Particles(positions_, prior, like[:, None])

    prior, like = jax.vmap(parts)(values)
    return SimpleNamespace(
        target=target, layout=program.layout, states=values, scored=scored,
        law=(np.exp(prior), np.exp(like)),
    )  # fmt: skip


@pytest.mark.slow
def test_jumps_inside_smc_are_properly_weighted_exactly():
    """E[Z] and E[Z mean(h)] over all histories of two particles that switch between models."""
    with jax.enable_x64(True):
        grid = np.array(list(itertools.product(range(2), repeat=3)))
        states = dict(zip(("which", "a", "b"), grid.T, strict=True))
        model = case_program(states)
        method = SMC(
            particles=2, moves=1, resampling="multinomial", kernel=Switch("which"),
            powers=(0.4, 1.0),
        )  # fmt: skip
        h = lambda x: 1.0 * x["which"] + 0.5 * x["b"]  # noqa: E731
        found = exactly(model, method, h)
        prior, like = model.law
        values = np.asarray(jax.vmap(h)(states))
    assert prior.sum() == pytest.approx(1.0, abs=1e-13)
    np.testing.assert_allclose(found, (prior @ like, (prior * like) @ values), atol=1e-14)


# -- what is refused -------------------------------------------------------------------------------


def test_moves_are_tried_before_the_run():
    class Wrong(Walk):
        tried = True

        def log_det(self, position, v, target):
            return jnp.ones(())

    kernel = cycle([BirthDeath("term"), Wrong("b", 0.1)])
    with pytest.raises(MethodError, match="log_det is not that of the involution"):
        infer(nested, polynomial_data(), method=SMC(kernel=kernel))


def test_kernels_that_cannot_serve():
    y = polynomial_data()
    with pytest.raises(MethodError, match=r"leaves out.*'k'"):
        infer(given(nested, k=2), y, method=SMC(kernel=Walk("b", 0.1)))
    with pytest.raises(MethodError, match=r"MCMC.NUTS"):
        infer(given(nested, k=2), y, method="nuts")
    with pytest.raises(MethodError, match="gradients with respect to discrete"):
        infer(coins, Y, method=SMC(kernel=GibbsWithGradients()))


@pytest.mark.slow
def test_mcmc_given_the_number():
    """The same conditioned model under a chain: the coefficients of a line, by algebra."""
    tree = infer(given(nested, k=2), polynomial_data(), method=MCMC(NUTS()), draws=1000)
    x = np.linspace(-1, 1, 30)
    design = np.stack([np.ones(30), x], axis=1)
    mean = np.linalg.solve(np.eye(2) + 4 * design.T @ design, 4 * design.T @ polynomial_data())
    b = tree["posterior"]["b"].values
    np.testing.assert_allclose(b[..., :2].mean(axis=(0, 1)), mean, atol=0.015)
    assert np.isnan(b[..., 2]).all()
    start = infer(
        given(change_points, k=2), days(), 40907.0, 3, method=MCMC(RandomWalk(), warmup=50),
        draws=5,
    )  # fmt: skip
    assert (np.diff(start["posterior"]["at"].values[..., :2]) > 0).all()
