"""Pathfinder: inverse Hessians against dense BFGS, laws against SciPy, normal posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet
from jax import random
from scipy import stats
from test_laplace import X, Y, exact, regression

import ppl_toolkit as ppl
from ppl_toolkit.errors import OptionError, SamplingError
from ppl_toolkit.inference import Pathfinder
from ppl_toolkit.inference.climbing import climb
from ppl_toolkit.inference.pathfinder import Pairs, best_along, diagonal, quasi_normal


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


def problem(size, seed):
    """A normal law, and steps with the changes of minus its gradient."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    precision = root @ root.T / size + 0.1 * np.eye(size)
    steps = rng.normal(size=(12, size))
    return precision, steps, steps @ precision


def dense(variance, steps, changes):
    """The inverse Hessian by one BFGS update after the other."""
    H, identity = np.diag(variance), np.eye(len(variance))
    for s, z in zip(steps, changes, strict=True):
        left = identity - np.outer(s, z) / (s @ z)
        H = left @ H @ left.T + np.outer(s, s) / (s @ z)
    return H


@pytest.mark.parametrize(("size", "memory", "told"), [(7, 4, 4), (7, 4, 2), (3, 4, 4), (1, 6, 3)])
def test_the_law_is_that_of_dense_bfgs(in_float64, size, memory, told):
    """With fewer pairs than there is room for, and with more directions than dimensions."""
    _, steps, changes = problem(size, 10 * size + told)
    # The changes of no quadratic function: pairs disagree on the curvature.
    changes = changes * np.random.default_rng(told).uniform(0.8, 1.2, changes.shape)
    keep = np.flatnonzero(np.sum(steps * changes, axis=1) > 0)[:told]
    variance = np.random.default_rng(1).uniform(0.2, 3.0, size)
    blank = np.zeros((memory - len(keep), size))
    pairs = Pairs(np.concatenate([blank, steps[keep]]), np.concatenate([blank, changes[keep]]))
    x, g = np.random.default_rng(2).normal(size=(2, size))
    law = jax.jit(quasi_normal)(x, g, variance, pairs)
    H = dense(variance, steps[keep], changes[keep])
    np.testing.assert_allclose(law.mean, x + H @ g, rtol=1e-8, atol=1e-10)
    noise = np.random.default_rng(3).normal(size=(20, size))
    draws, log_q = jax.vmap(law.draw)(noise)
    expected = stats.multivariate_normal(law.mean, H).logpdf(draws).reshape(20)
    np.testing.assert_allclose(log_q, expected, rtol=1e-8)
    np.testing.assert_allclose(jax.vmap(law.log_density)(draws), expected, rtol=1e-8)
    root = (jax.vmap(law.draw)(np.eye(size))[0] - law.mean).T
    np.testing.assert_allclose(root @ root.T, H, rtol=1e-7, atol=1e-9)


def test_the_diagonal_is_that_of_a_scaled_bfgs_update(in_float64):
    _, steps, changes = problem(5, 0)
    a, s, z = np.random.default_rng(0).uniform(0.5, 2.0, 5), steps[0], changes[0]
    B = np.diag((z @ (a * z)) / (s @ z) / a)
    updated = B - np.outer(B @ s, B @ s) / (s @ B @ s) + np.outer(z, z) / (z @ s)
    np.testing.assert_allclose(diagonal(a, s, z), 1 / np.diag(updated), rtol=1e-10)


def test_the_best_law_of_a_path_is_the_posterior_of_a_normal_target(in_float64):
    """Memory for all directions: the bound ends at the log of the total mass."""
    precision, _, _ = problem(4, 5)

    def density(x):
        return -0.5 * (x - 3.0) @ precision @ (x - 3.0)

    @jax.jit
    def find(start):
        _, path = climb(density, start, 100, 6, keeps_path=True)
        return best_along(random.key(0), density, path, 6, 50)

    best = find(jnp.full(4, -1.0))
    mass = 0.5 * (4 * np.log(2 * np.pi) - np.linalg.slogdet(precision)[1])
    np.testing.assert_allclose(best.elbo, mass, atol=0.02)
    np.testing.assert_allclose(best.law.mean, np.full(4, 3.0), atol=0.02)
    assert 0 < best.place < best.length


@pytest.fixture(scope="module")
def fitted():
    return quiet(regression, X, Y, method="pathfinder")


def test_a_normal_posterior(fitted):
    """Moments of 4000 weighted draws: five standard errors; the evidence within its own errors."""
    mean, covariance, evidence = exact()
    draws = fitted["posterior"]["b"].values.reshape(-1, 4)
    effective = float(fitted["approximation"]["weight_ess"].sum())
    assert effective > 3000
    assert fitted.attrs["khat"] < 0.5
    white = np.linalg.solve(np.linalg.cholesky(covariance), (draws - mean).T)
    assert np.abs(white.mean(axis=1)).max() < 5 / np.sqrt(effective)
    assert np.abs(np.cov(white) - np.eye(4)).max() < 5 * np.sqrt(2 / effective)
    group = fitted["approximation"]
    error = np.abs(group["log_evidence"].values - evidence)
    assert np.all(error < 4.5 * group["log_evidence_sd"].values + 1e-6)
    assert group["path_elbo"].dims == ("chain", "path")
    assert np.all(group["path_place"] < group["path_length"])


def test_weights_are_those_of_the_mixture(fitted):
    """Log q of the draws against SciPy's densities of the laws in the state."""
    state = fitted["sampler_state"].dataset
    chain = state.isel(chain=1)
    densities = []
    for path in range(4):
        a = np.sqrt(chain["law.law.variance"].values[path])
        Q, L = chain["law.law.basis"].values[path], chain["law.law.factor"].values[path]
        root = a[:, None] * (np.eye(4) + Q @ (L - np.eye(len(L))) @ Q.T)
        normal = stats.multivariate_normal(chain["law.law.mean"].values[path], root @ root.T)
        densities.append(normal.logpdf(chain["pool.positions"].values))
    log_q = np.logaddexp.reduce(densities, axis=0) - np.log(4)
    found = chain["pool.log_densities"].values - chain["pool.log_weights"].values
    np.testing.assert_allclose(found, log_q, atol=1e-8)


def test_new_data_and_seeds_compile_nothing(fitted):
    compilations.clear()
    quiet(regression, X, Y[::-1].copy(), method="pathfinder", seed=5)
    assert not compilations


def test_a_run_on_new_data_starts_where_the_last_one_ended(fitted):
    again = quiet(regression, X, Y + 0.1, method="pathfinder", init=fitted)
    mean, _, _ = exact(X, Y + 0.1)
    np.testing.assert_allclose(again["posterior"]["b"].mean(["chain", "draw"]), mean, atol=0.05)


def stretched(scales, direction):
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), scales.shape))
    z = x / scales
    numpyro.factor("normal", -0.5 * (z @ z + 9.0 * (direction @ z) ** 2))


@pytest.mark.slow
def test_two_hundred_dimensions():
    """A normal target with a direction of its own, and scales from 0.1 to 10."""
    rng = np.random.default_rng(0)
    scales = np.exp(rng.uniform(np.log(0.1), np.log(10), 200))
    direction = rng.normal(size=200) / np.sqrt(200)
    tree = quiet(
        stretched, scales, direction, method=Pathfinder(steps=500, resample=False), chains=2
    )
    values = tree["posterior"]["x"].values.reshape(2000, 200)
    variance = scales**2 * (1 - 9 / (1 + 9 * direction @ direction) * direction**2)
    ratio = values.std(axis=0) / np.sqrt(variance)
    assert 0.5 < np.median(ratio) < 1.5
    assert np.all(np.abs(values.mean(axis=0)) < np.sqrt(variance))


def nowhere(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.factor("never", jnp.where(m < 100.0, -jnp.inf, 0.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


@pytest.mark.slow
def test_no_path_is_told():
    with pytest.raises(SamplingError, match="none of 2 paths"):
        quiet(nowhere, np.ones(2), method=Pathfinder(paths=2), chains=1)


@pytest.mark.parametrize("option", ["paths", "steps", "memory", "elbo_draws", "pool_size"])
def test_options_out_of_range(option):
    with pytest.raises(OptionError, match=option):
        Pathfinder(**{option: 0})
    with pytest.raises(OptionError, match="until="):
        ppl.infer(regression, X, Y, method="pathfinder", until=ppl.Goal(ess=100))
