"""Warm-up: windows, moments, dual averaging, against formulae worked out independently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl_toolkit.inference.adaptation import DualAveraging, Metric, Moments, schedule


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("warmup", "first", "last", "ends"),
    [
        (1000, 75, 950, [99, 149, 249, 449, 949]),  # Stan's reference manual
        (2000, 75, 1950, [99, 149, 249, 449, 849, 1949]),
        (150, 75, 100, [99]),
        (100, 15, 90, [89]),  # scaled: 15%, 75%, 10%
        (10, 10, 10, []),  # too short to learn a metric
        (0, 0, 0, []),
    ],
)
def test_windows(warmup, first, last, ends):
    plan = schedule(warmup)
    assert (int(plan.warmup), int(plan.first), int(plan.last)) == (warmup, first, last)
    assert [int(e) for e in plan.ends if e >= 0] == ends
    renewals = [i for i in range(warmup + 50) if bool(plan.renews(i))]
    assert renewals == ends
    assert [i for i in range(warmup + 5) if bool(plan.collects(i))] == list(range(first, last))


@pytest.mark.parametrize("warmup", range(0, 3000, 37))
def test_every_slow_iteration_belongs_to_a_window_that_ends(warmup):
    plan = schedule(warmup)
    ends = [int(e) for e in plan.ends if e >= 0]
    assert ends == sorted(set(ends))
    if ends:
        assert ends[-1] == int(plan.last) - 1
        widths = np.diff([int(plan.first) - 1, *ends])
        assert (np.diff(widths) >= 0).all()


@pytest.mark.parametrize("dense", [False, True])
def test_moments_are_the_sample_covariance_shrunk_as_stan_does(dense):
    x = np.random.default_rng(0).normal(size=(40, 3)) * [1.0, 10.0, 0.1] + [5.0, 0.0, -3.0]
    moments = Moments.start(jnp.zeros(3), dense)
    for row in x:
        moments = moments.update(jnp.asarray(row))
    covariance = np.cov(x.T) if dense else x.var(axis=0, ddof=1)
    unit = np.eye(3) if dense else np.ones(3)
    expected = 40 / 45 * covariance + 1e-3 * (5 / 45) * unit
    np.testing.assert_allclose(moments.regularised(), expected, rtol=1e-12)


def test_dual_averaging_follows_its_recursion():
    """Hoffman and Gelman (2014), equation 6, written out with sums instead of recursions."""
    target, gamma, t0, kappa = 0.8, 0.05, 10.0, 0.75
    accepted = np.random.default_rng(1).uniform(size=30)
    averaging = DualAveraging.start(jnp.asarray(-1.5))
    mu = -1.5 + np.log(10)
    log_average, total = 0.0, 0.0
    weights = np.zeros(0)
    for t, a in enumerate(accepted, start=1):
        averaging = averaging.update(jnp.asarray(a), jnp.asarray(target))
        weights = np.append(weights * (1 - 1 / (t + t0)), 1 / (t + t0))
        total = weights @ (target - accepted[:t])
        log_step = mu - np.sqrt(t) / gamma * total
        log_average = t**-kappa * log_step + (1 - t**-kappa) * log_average
        np.testing.assert_allclose(averaging.log_step, log_step, rtol=1e-12)
        np.testing.assert_allclose(averaging.log_average, log_average, rtol=1e-12)


def test_dual_averaging_reaches_its_target():
    """On a deterministic response the step settles where the acceptance is the target."""
    averaging = DualAveraging.start(jnp.asarray(3.0))
    for _ in range(3000):
        averaging = averaging.update(jnp.exp(-jnp.exp(averaging.log_step)), jnp.asarray(0.8))
    np.testing.assert_allclose(jnp.exp(averaging.log_average), -np.log(0.8), rtol=0.02)


@pytest.mark.parametrize("dense", [False, True])
def test_positions_move_with_the_inverse_mass_matrix_as_covariance(dense):
    """Velocities are linear in the noise; the square of that map is the inverse mass matrix."""
    matrix = np.cov(np.random.default_rng(0).normal(size=(4, 50)))
    inverse = matrix if dense else np.diagonal(matrix)
    rows = jax.vmap(Metric.of(jnp.asarray(inverse)).velocity)(jnp.eye(4))
    np.testing.assert_allclose(rows.T @ rows, matrix if dense else np.diag(inverse), atol=1e-12)
