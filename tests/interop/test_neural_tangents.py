"""Kernels of infinitely wide networks beside those of neural-tangents (optional, see its module).

Both are in float64. Numbers agree to some units in the last place of a matrix's largest entry,
except where an input meets itself, or one like it: there its tangent kernels of rectifiers keep
half of their digits.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.infinite_width import (
    GELU,
    RBF,
    Abs,
    Conv,
    Cos,
    Dense,
    Elementwise,
    Erf,
    Flatten,
    GlobalAveragePool,
    Identity,
    LayerNorm,
    LeakyReLU,
    Rectifier,
    ReLU,
    Residual,
    Serial,
    Sign,
    Sin,
    mlp,
    resnet,
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from neural_tangents_peer import kernel_function, stax

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(stax() is None, reason="neural-tangents is not installed"),
]

RNG = np.random.default_rng(1)
X1, X2 = RNG.normal(size=(9, 4)), RNG.normal(size=(6, 4))
IMAGES1, IMAGES2 = RNG.normal(size=(4, 5, 4, 2)), RNG.normal(size=(3, 5, 4, 2))
TOLERANCE = 2e-15  # of the largest entry; 6e-16 was seen
W = {"weight_std": 1.4, "bias_std": 0.3, "readout_std": 0.8}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def theirs(network, x1, x2=None):
    return jax.jit(functools.partial(kernel_function(network), get=("nngp", "ntk")))(x1, x2)


def errors(network, x1, x2=None, diagonal=True):
    """Of the covariance and the tangent kernel, over the largest entries."""
    among = np.ones((len(x1), len(x1 if x2 is None else x2)), bool)
    if not diagonal:
        np.fill_diagonal(among, False)
    pairs = zip(network.kernels(x1, x2, block=5), theirs(network, x1, x2), strict=True)
    return [np.abs(ours - own)[among].max() / np.abs(own).max() for ours, own in pairs]


ACTIVATIONS = {
    "erf": Erf(),
    "erf, with parameters": Erf(0.7, 0.6, 0.4),
    "GELU": GELU(),
    "sin": Sin(1.3, 0.8, 0.5),
    "cos": Cos(),
    "RBF": RBF(0.3),
    "identity": Identity(),
    "ReLU": ReLU(),
    "leaky ReLU": LeakyReLU(0.1),
    "absolute value": Abs(),
    "rectifier": Rectifier(0.4, -1.3),
}
KINKED = {"ReLU", "leaky ReLU", "absolute value", "rectifier"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_three_layers_of_every_activation(name):
    network = mlp(3, ACTIVATIONS[name], **W)
    k, t = errors(network, X1)
    assert k < TOLERANCE
    assert t < (1e-7 if name in KINKED else TOLERANCE)
    assert max(errors(network, X1, X2)) < TOLERANCE


def test_signs():
    """One layer, and off the diagonal, where its signs have the angle of rounding."""
    network = Serial(Dense(1.1, 0.3), Sign(), Dense(0.8))
    assert max(errors(network, X1, X2)) < TOLERANCE
    assert max(errors(network, X1, diagonal=False)) < TOLERANCE


def test_quadrature():
    few, many = (
        mlp(2, Elementwise(jnp.tanh, nodes), weight_std=0.6, bias_std=0.3) for nodes in (60, 100)
    )
    assert max(errors(many, X1, X2)) < 1e-10
    assert max(errors(many, X1)) < 1e-10
    for x1, x2 in ((X1, X2), (X1, None)):  # with 60 nodes ours is nearer than its grid is
        exact = many.kernels(x1, x2, block=5)
        for own, right in zip(few.kernels(x1, x2, block=5), exact, strict=True):
            assert np.abs(own - right).max() / np.abs(right).max() < 1e-9
        for grid, right in zip(theirs(few, x1, x2), exact, strict=True):
            assert np.abs(grid - right).max() / np.abs(right).max() < 1e-6


BRANCH = Serial(GELU(), Dense(1.1, 0.2), LayerNorm(), Erf(), Dense(0.7, 0.1))
CONVOLUTIONS = (
    Conv((3, 3), (1, 1), 1.3, 0.2), Erf(), Conv((3, 2), (2, 1), 1.1, 0.1), LayerNorm(),
    Residual(Serial(GELU(), Conv((3, 3), (1, 1), 0.9, 0.3))), Erf(),
)  # fmt: skip
COMPOSED = {
    "residual": (resnet(3, GELU(), weight_std=0.9, bias_std=0.3), X1, X2),
    "residual, with a shortcut": (
        Serial(Dense(1.4, 0.3), Residual(BRANCH), Residual(BRANCH, Dense(0.6, 0.4)), Erf()),
        X1, X2,
    ),
    "normalised": (
        Serial(Dense(1.4, 0.3), LayerNorm(), GELU(), Dense(1.2, 0.5), LayerNorm(0.1), Erf()),
        X1, X2,
    ),
    "flattened": (
        Serial(*CONVOLUTIONS, Flatten(), Dense(1.2, 0.1), Erf(), Dense(0.8)), IMAGES1, IMAGES2
    ),
    "pooled": (
        Serial(*CONVOLUTIONS, GlobalAveragePool(), Dense(1.2, 0.1), Erf(), Dense(0.8)),
        IMAGES1, IMAGES2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_networks(name):
    network, x1, x2 = COMPOSED[name]
    assert max(errors(network, x1)) < TOLERANCE
    assert max(errors(network, x1, x2)) < TOLERANCE


@pytest.mark.parametrize("last", [Flatten(), GlobalAveragePool()])
def test_convolutions_with_relu(last):
    network = Serial(Conv((3, 3), (1, 1), 1.3), ReLU(), Conv((3, 3), (2, 2)), ReLU(), last, Dense())
    assert max(errors(network, IMAGES1, IMAGES2)) < TOLERANCE
    k, t = errors(network, IMAGES1)
    assert k < TOLERANCE
    assert t < 1e-7


def test_duplicates():
    """The tangent kernel of ReLU between two rows that are alike: both keep half of the digits."""
    x = np.concatenate([X1, X1[:3]])
    k, t = errors(mlp(3, **W), x)
    assert k < TOLERANCE
    assert TOLERANCE < t < 1e-7


@pytest.mark.parametrize(
    ("precision", "exact", "off"), [("float64", 1e-15, 1e-9), ("float32", 1e-6, 1e-4)]
)
def test_diagonals_are_exact_where_its_are_not(precision, exact, off):
    """Three layers of ReLU: relative errors of the tangent kernel of inputs with themselves."""
    q = np.mean(X1.astype(precision).astype(float) ** 2, axis=1)
    t = np.zeros_like(q)
    for _ in range(3):
        q = 1.4**2 * q + 0.3**2
        q, t = q / 2, (q + 1.4**2 * t) / 2
    want = 0.8**2 * (q + t)
    network = mlp(3, **W)
    with jax.enable_x64(precision == "float64"):
        x = jnp.asarray(X1, precision)
        ours, own = np.diag(kernel_matrices(network, x).ntk), np.diag(theirs(network, x)[1])
    assert np.abs(ours / want - 1).max() < exact
    assert np.abs(own / want - 1).max() > off
