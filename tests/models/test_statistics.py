"""Quadratic form and log determinant of targets under a network's kernel, and their derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl_toolkit.models import statistics as module
from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.infinite_width import (
    Conv,
    Dense,
    Erf,
    Flatten,
    ReLU,
    Residual,
    Serial,
    mlp,
)
from ppl_toolkit.models.statistics import factor, statistics


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


NETWORK = Serial(Dense(1.4, 0.3), Residual(Serial(ReLU(), Dense(0.8, 0.2))), Erf(), Dense(1.1))
RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(300, 3)), RNG.normal(size=(300, 2))  # a block of 256 rows and a rest
FEW = 9
BLOCK = 4  # for few rows


@functools.partial(jax.jit, static_argnames="block")
def found(network, x, y, noise, block=256):
    return statistics(network, x, y, noise, block=block)[:2]


def by_numpy(network, x, y, noise):
    k = np.asarray(network.nngp(x)) + noise * np.eye(len(x))
    columns = y.reshape(len(y), -1)
    sign, log_determinant = np.linalg.slogdet(k)
    assert sign == 1
    quadratic = (columns * np.linalg.solve(k, columns)).sum()
    return quadratic, columns.shape[1] * log_determinant


def test_golden_values():
    """Eight inputs of three features, three ReLU layers."""
    x = np.sin(0.7 * np.arange(8)[:, None] + 1.3 * np.arange(3))
    own = statistics(mlp(3, weight_std=1.4, bias_std=0.3), x, np.cos(1.1 * np.arange(8)), 0.1)
    np.testing.assert_allclose(own.quadratic, 11.0425437236158, rtol=1e-13)
    np.testing.assert_allclose(own.log_determinant, -9.09600953145428, rtol=1e-13)
    assert own.size == 8


@pytest.mark.parametrize(("rows", "block"), [(300, 256), (FEW, BLOCK)])
@pytest.mark.parametrize("outputs", [None, 2])
def test_they_are_numpys(rows, block, outputs):
    """Of one column of targets, or of several that share kernel and scale."""
    x, y = X[:rows], Y[:rows, 0] if outputs is None else Y[:rows]
    got = found(NETWORK, x, y, 0.3, block)
    np.testing.assert_allclose(got, by_numpy(NETWORK, x, y, 0.3), rtol=1e-12)


def test_sizes_count_every_target():
    assert statistics(Serial(Dense()), X[:3], Y[:3], 0.1, block=3).size == 6


def test_the_factor_is_cholesky_s():
    root = jax.jit(functools.partial(factor, block=BLOCK))(NETWORK, X[:FEW], 0.3)
    k = NETWORK.nngp(X[:FEW]) + 0.3 * np.eye(FEW)
    np.testing.assert_allclose(root, np.linalg.cholesky(k), rtol=0, atol=1e-14)


def weighted(network, x, y, noise, block):
    quadratic, log_determinant, _ = statistics(network, x, y, noise, block=block)
    return 0.7 * quadratic - 1.3 * log_determinant


def by_autodiff(network, x, y, noise):
    """The same from the matrix as a whole, by JAX's derivatives of its factor."""
    k = kernel_matrices(network, x, ntk=False, block=len(x)).nngp + noise * jnp.eye(len(x))
    root = jnp.linalg.cholesky(k)
    whitened = jax.scipy.linalg.solve_triangular(root, y, lower=True)
    return 0.7 * (whitened**2).sum() - 2.6 * y.shape[1] * jnp.log(jnp.diag(root)).sum()


BY_ALL = (0, 1, 2, 3)


def assert_same_gradient(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())


def test_derivatives_by_parameters_inputs_targets_and_noise():
    args = (NETWORK, X, Y, 0.3)
    got = jax.jit(jax.grad(functools.partial(weighted, block=256), BY_ALL))(*args)
    want = jax.jit(jax.grad(by_autodiff, BY_ALL))(*args)
    assert got[1].shape == X.shape
    assert got[2].shape == Y.shape
    assert_same_gradient(got, want)


def test_the_inverse_by_pieces(monkeypatch):
    root = np.tril(np.random.default_rng(3).normal(size=(11, 11))) + 4 * np.eye(11)
    monkeypatch.setattr(module, "_LARGE", 8)
    text = str(jax.make_jaxpr(module._inverse_of)(root))
    found = jax.jit(module._inverse_of)(root)
    assert text.count("triangular_solve[") == 4
    np.testing.assert_allclose(found, np.linalg.inv(root), rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_derivatives_of_images_and_batches():
    """Chains of parameters at once; a convolution, whose inputs have positions."""
    images, y = RNG.normal(size=(5, 3, 3, 2)), Y[:5]
    makes = {
        "vectors": lambda w: (Serial(Dense(w, 0.3), Erf(), Dense()), X[:FEW], Y[:FEW]),
        "images": lambda w: (
            Serial(Conv((2, 2), (1, 1), w), Erf(), Flatten(), Dense()), images, y
        ),
    }  # fmt: skip
    for make in makes.values():

        def ours(w, noise, make=make):
            return weighted(*make(w), noise, 2)

        def theirs(w, noise, make=make):
            return by_autodiff(*make(w), noise)

        w, noise = np.array([0.8, 1.4]), np.array([0.3, 0.1])
        got, want = (jax.jit(jax.vmap(jax.grad(f, (0, 1))))(w, noise) for f in (ours, theirs))
        assert_same_gradient(got, want)


def test_what_is_not_positive_definite_is_nan():
    """Duplicated rows without noise may pass by rounding; a negative variance never does."""
    assert np.all(np.isnan(found(NETWORK, X[:FEW], Y[:FEW], -1.0, BLOCK)))
    assert np.all(np.isfinite(found(NETWORK, X[:FEW], Y[:FEW], 1.0, BLOCK)))


def test_the_kernel_of_float32_inputs():
    """They stay what they are: half the memory."""
    with jax.enable_x64(False):
        quadratic, log_determinant = found(NETWORK, X[:FEW], Y[:FEW], 0.3, BLOCK)
    assert quadratic.dtype == jnp.float32
    want = by_numpy(NETWORK, X[:FEW], Y[:FEW], 0.3)
    np.testing.assert_allclose((quadratic, log_determinant), want, rtol=1e-5)
