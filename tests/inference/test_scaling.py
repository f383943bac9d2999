"""Metrics from draws and gradients, against algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl_toolkit.inference import scaling
from ppl_toolkit.inference.adaptation import LowRank, Metric


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def covariance(dim, seed=0):
    root = np.random.default_rng(seed).normal(size=(dim, dim))
    return root @ root.T + 0.1 * np.eye(dim)


def gaussian(matrix, n, seed=1):
    """Centred draws and gradients of N(0, matrix)."""
    x = np.random.default_rng(seed).normal(size=(n, len(matrix))) @ np.linalg.cholesky(matrix).T
    x -= x.mean(0)
    return x, -np.linalg.solve(matrix, x.T).T


def matrix_of(metric, dim):
    """L, by what the sampler does with it."""
    return np.asarray(jax.vmap(metric.velocity)(jnp.eye(dim))).T


def test_geometric_mean_of_diagonal_matrices():
    found = scaling._geometric_mean(np.diag([1.0, 4.0, 8.0]), np.diag([1.0, 1.0, 0.5]))
    np.testing.assert_allclose(found, np.diag([1.0, 2.0, 4.0]), atol=1e-12)


def test_the_geometric_mean_solves_its_equation():
    a, b = covariance(5, 0), covariance(5, 1)
    m = scaling._geometric_mean(a, b)
    np.testing.assert_allclose(m @ b @ m, a, rtol=1e-9)


@pytest.mark.parametrize("n", [7, 40])
def test_a_gaussian_has_its_own_covariance_from_few_draws(n, monkeypatch):
    """Draws alone would give the sample's covariance, with errors of the order n^-1/2."""
    monkeypatch.setattr(scaling, "_PRIOR", 0.0)
    matrix = covariance(5)
    factor = scaling.dense(*gaussian(matrix, n)).factor
    np.testing.assert_allclose(factor @ factor.T, matrix, rtol=1e-6, atol=1e-8)


def test_the_diagonal_of_a_gaussian_without_correlation_is_exact():
    variances = np.array([1e-4, 1.0, 300.0])
    scale = scaling.diagonal(*gaussian(np.diag(variances), 6))
    np.testing.assert_allclose(scale**2, variances, rtol=1e-12)


@pytest.mark.parametrize("bad", [0.0, np.inf, np.nan])
def test_scales_of_what_does_not_vary_are_finite_and_positive(bad):
    x, g = gaussian(np.eye(3), 10)
    x[:, 1], g[:, 2] = 0.0, bad
    scale = scaling.diagonal(x, g)
    assert np.all(np.isfinite(scale))
    assert np.all(scale > 0.0)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low rank"])
def test_positions_forces_and_velocities_belong_together(kind):
    """Rows z of x = L z, forces L^T g, velocities L p with one and the same L."""
    x, g = gaussian(covariance(6), 30)
    made = {
        "diagonal": Metric(scaling.diagonal(x, g)),
        "dense": scaling.dense(x, g),
        "low rank": scaling.low_rank(x, g, 3),
    }[kind]
    factor = matrix_of(made, 6)
    np.testing.assert_allclose(scaling._standardised(made, x) @ factor.T, x, atol=1e-9)
    np.testing.assert_allclose(scaling._forces(made, g), g @ factor, atol=1e-9)
    np.testing.assert_allclose(jax.vmap(made.force)(jnp.asarray(g)), g @ factor, atol=1e-9)


def test_low_rank_finds_a_direction_that_is_stretched():
    dim, long = 60, np.zeros(60)
    long[[3, 40]] = np.array([0.6, -0.8])
    matrix = np.eye(dim) + 399.0 * np.outer(long, long)
    made = scaling.low_rank(*gaussian(matrix, 200))
    assert isinstance(made, LowRank)
    factor = matrix_of(made, dim)
    plain = Metric(scaling.diagonal(*gaussian(matrix, 200)))
    test = gaussian(matrix, 5000, 3)
    assert scaling.condition(plain, *test) > 3 * scaling.condition(made, *test)
    variance = long @ factor @ factor.T @ long
    assert 250.0 < variance < 600.0


def test_condition_of_the_right_metric_is_that_of_noise():
    matrix = covariance(4)
    x, g = gaussian(matrix, 100000)
    right = Metric(np.linalg.cholesky(matrix))
    assert abs(scaling.condition(right, x, g) - 1.0) < 0.03
    lengths = np.linalg.eigvalsh(matrix)
    wrong = scaling.condition(Metric(np.ones(4)), x, g)
    np.testing.assert_allclose(wrong, np.sqrt(lengths[-1] / lengths[0]), rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "matrix", "expected"),
    [
        ("dense", np.diag([1.0, 100.0, 0.01]), "diagonal"),
        ("dense", np.array([[1.0, 0.95], [0.95, 1.0]]), "dense"),
        ("diagonal", np.array([[1.0, 0.95], [0.95, 1.0]]), "diagonal"),
        ("low rank", np.eye(50), "diagonal"),
        ("low rank", np.eye(50) + 5.0, "low rank"),
    ],
)
def test_the_best_type_is_chosen(kind, matrix, expected):
    """By draws held out: an estimate with more numbers must earn them."""
    dim = len(matrix)
    folds = [gaussian(matrix, 80, seed) for seed in (5, 6)]
    unit = {
        "dense": Metric(np.eye(dim)),
        "diagonal": Metric(np.ones(dim)),
        "low rank": LowRank(np.ones(dim), np.zeros((scaling.RANK, dim)), np.zeros(scaling.RANK)),
    }[kind]
    made, name, condition, present = scaling.best(kind, folds, unit)
    assert name == expected
    assert type(made) is type(unit)
    assert condition <= present * 1.3
