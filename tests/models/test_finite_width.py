"""Networks of finite width: against the kernels they tend to, and ensembles of infinite width.

Draws are tested at fixed seeds: a correct simulator fails at a new seed with probability 1e-3 a
test, where nothing else is said.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special as sc
import scipy.stats as st
from helpers import others_slow
from jax import random

from ppl_toolkit.errors import DataError, InferenceWarning, ModelError, OptionError
from ppl_toolkit.models import finite_width
from ppl_toolkit.models.activations import Activation
from ppl_toolkit.models.ensembles import gradient_descent_ensemble
from ppl_toolkit.models.finite_width import Weights, apply, init, random_outputs, trained_outputs
from ppl_toolkit.models.infinite_width import (
    GELU,
    Conv,
    Cos,
    Dense,
    Elementwise,
    Erf,
    Flatten,
    HermiteSeries,
    LayerNorm,
    LeakyReLU,
    ReLU,
    Residual,
    Serial,
    Sign,
    Step,
    mlp,
)
from ppl_toolkit.models.layers import layer

LEVEL = 1e-3
rng = np.random.default_rng(4)
X, X_NEW, Y = rng.normal(size=(4, 3)), rng.normal(size=(2, 3)), rng.normal(size=4)
LAW = dist.InverseGamma(2.0, 3.0)
UNIFORM = dist.Uniform(0.2, 3.0)
HIDDEN, LINEAR = Dense(1.2, 0.4), Serial(Dense(1.3, 0.5))
WIDTH = 256


def test_activations():
    x = np.array([-1.3, 0.0, 0.7])
    expected = {
        Erf(0.8, 0.4, 0.3): 0.8 * sc.erf(0.4 * x) + 0.3,
        GELU(): x * sc.ndtr(x),
        Cos(1.1, 0.5, 0.3): 1.1 * np.cos(0.5 * x + 0.3),
        LeakyReLU(0.3): [-0.39, 0.0, 0.7],
        Step(): [0.0, 0.5, 1.0],
        Sign(): [-1.0, 0.0, 1.0],
        Elementwise(jnp.tanh): np.tanh(x),
        HermiteSeries(jnp.arctan): np.arctan(x),
    }
    one = Weights(np.ones((1, 1)), np.zeros(1))
    with jax.enable_x64(True):
        for activation, values in expected.items():
            seen = apply(Serial(Dense(), activation, Dense()), (one, (), one), x[:, None])
            np.testing.assert_allclose(seen, values, rtol=1e-12, atol=1e-15)


# --- both kernels are the limits of what finite networks have


@pytest.mark.parametrize(
    "network",
    [
        Serial(Serial(HIDDEN, Erf(0.8, 0.4, 0.4)), HIDDEN, LeakyReLU(0.3), HIDDEN,
               Cos(1.1, 0.5, 0.3), Dense(0.9, 0.5)),
        pytest.param(Serial(
            HIDDEN, Residual(Serial(Elementwise(jnp.tanh), HIDDEN), Serial(ReLU(), HIDDEN)),
            LayerNorm(), Residual(Serial(HermiteSeries(jax.nn.silu), HIDDEN)), ReLU(), Dense(),
        ), marks=pytest.mark.slow),
    ],
    ids=["plain", "residual and normalised"],
)  # fmt: skip
def test_empirical_kernels_tend_to_the_kernels(network):
    # Gradients by the readout alone give the covariance, K; by all parameters the tangent kernel.
    count = 24

    def kernels(key):
        parameters = init(network, key, WIDTH, 3)
        jacobian = jax.jacobian(lambda p: apply(network, p, jnp.asarray(X)))(parameters)

        def inner(tree):
            return sum(jnp.einsum("i...,j...->ij", leaf, leaf) for leaf in jax.tree.leaves(tree))

        return jnp.stack([inner(jacobian[-1]), inner(jacobian)])

    with jax.enable_x64(True):
        seen = np.asarray(jax.jit(lambda k: jax.lax.map(kernels, random.split(k, count)))(
            random.key(1)))  # fmt: skip
    expected = np.stack(network.kernels(X))
    error = seen.std(0, ddof=1) / np.sqrt(count)
    largest = np.abs(expected).max(axis=(1, 2), keepdims=True)
    # 5 standard errors (at most 1e-3 false alarms by Student's t in 32 entries), and the O(1 /
    # width) of the expectation, some units of depth / width.
    assert (np.abs(seen.mean(0) - expected) < 5 * error + 6 / WIDTH * largest).all()
    assert (error < 0.06 * largest).all()  # the test sees errors of a third


# --- random outputs: a scale mixture


def check_student(f, network):
    """Outputs (networks, 2) against Student's t with 4 degrees of freedom, alone and together."""
    alpha = beta = 2.0
    kernel = network.nngp(X[:2])
    for i in range(2):
        z = f[:, i] / np.sqrt(beta / alpha * kernel[i, i])
        assert st.kstest(z, st.t(2 * alpha).cdf).pvalue > LEVEL / 3
    q = np.einsum("ki,ij,kj->k", f, np.linalg.inv(kernel), f) * alpha / (2 * beta)
    assert st.kstest(q, st.f(2, 2 * alpha).cdf).pvalue > LEVEL / 3  # with one scale for both


@pytest.mark.slow
def test_random_outputs_are_student_t():
    network = mlp(2, weight_std=1.4, bias_std=0.3)
    law = dist.InverseGamma(2.0, 2.0)
    check_student(random_outputs(network, X[:2], width=64, networks=1000, law=law), network)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_random_outputs_of_4000_wide_networks_are_student_t(precision):
    network = mlp(2, weight_std=1.4, bias_std=0.3)
    law = dist.InverseGamma(2.0, 2.0)
    options = {"width": 256, "networks": 4000, "law": law, "precision": precision}
    seen = random_outputs(network, X[:2], **options)
    assert seen.dtype == precision
    check_student(seen, network)


def test_networks_do_not_depend_on_their_number_or_batch(monkeypatch):
    options = {"width": 8, "law": LAW, "seed": 3}
    many = random_outputs(mlp(1), X, networks=7, **options)
    monkeypatch.setattr(finite_width, "_BATCH_BYTES", 8 * 40 * 3)  # three networks
    np.testing.assert_allclose(random_outputs(mlp(1), X, networks=5, **options), many[:5], 1e-12)
    other = random_outputs(mlp(1), X, networks=5, **{**options, "seed": 4})
    assert np.unique(np.vstack([many, other])).size == 12 * 4


# --- training


@pytest.mark.parametrize(
    ("time", "ridge"), others_slow([(1.5, 0.0), (20.0, 0.0), (1.5, 0.7)], (1.5, 0.7))
)
def test_linear_networks_are_the_ensemble_at_any_width(time, ridge):
    # Their flow is the linear one itself, but for the steps.
    options = {"law": UNIFORM, "time": time, "ridge": ridge}
    seen = trained_outputs(
        LINEAR, X, Y, X_NEW, width=1, networks=2000, steps=400, seed=2, **options
    )
    e = gradient_descent_ensemble(LINEAR, X, Y, X_NEW, **options)
    for level in e.cdf(seen).T:
        assert st.kstest(level, "uniform").pvalue > LEVEL / 2


def test_steps_suit_the_scale_of_each_network(monkeypatch):
    monkeypatch.setattr(finite_width, "_BATCH_BYTES", 8 * 4 * 100)  # a hundred networks
    options = {"law": LAW, "time": 3.0}
    seen = trained_outputs(LINEAR, X, Y, X_NEW, width=1, networks=1000, seed=2, **options)
    e = gradient_descent_ensemble(LINEAR, X, Y, X_NEW, **options)
    for level in e.cdf(seen).T:
        assert st.kstest(level, "uniform").pvalue > LEVEL / 4
        assert ((level > LEVEL / 8000) & (level < 1 - LEVEL / 8000)).all()  # none that diverged


@pytest.mark.parametrize("trained", ["all", "last"])
def test_one_network_follows_its_gradient(trained):
    # An Euler step of the loss (|f - y|^2 + ridge sigma^2 |theta - theta_0|^2) / 2n, twice.
    network, s2, ridge, rate = mlp(1, Erf(), bias_std=0.4), 1.7, 0.3, 0.4
    seen = trained_outputs(network, X, Y, X_NEW, width=16, networks=3, law=s2, time=1.0,
                           learning_rate=2 * rate, steps=2, ridge=ridge, trained=trained,
                           seed=5)  # fmt: skip

    def both(key):
        start = init(network, random.split(key)[1], 16, 3)
        fixed = () if trained == "all" else start[:-1]

        def loss(p):
            moved = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), p, start[len(fixed) :])
            gap = jnp.sqrt(s2) * apply(network, fixed + p, X) - Y
            return ((gap**2).sum() + ridge * s2 * sum(jax.tree.leaves(moved))) / 8

        p = start[len(fixed) :]
        for _ in range(2):
            p = jax.tree.map(lambda a, g: a - rate * g, p, jax.grad(loss)(p))
        return jnp.sqrt(s2) * apply(network, fixed + p, X_NEW)

    with jax.enable_x64(True):
        expected = jax.jit(both)(random.fold_in(random.key(5), 2))
    np.testing.assert_allclose(seen[2], expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["all", "last"])
@pytest.mark.parametrize("law", [1.5, dist.InverseGamma(4.0, 3.0)], ids=["plain", "mixture"])
def test_trained_networks_are_the_ensemble(law, trained):
    network = mlp(2, Erf(), weight_std=1.4, bias_std=0.3)
    options = {"law": law, "time": 4.0, "trained": trained}
    count, width = 600, 256
    seen = trained_outputs(network, X, Y, X_NEW, width=width, networks=count, seed=7, **options)
    e = gradient_descent_ensemble(network, X, Y, X_NEW, **options)
    # Standard errors, 2 per cent of the errors by the steps, and O(1 / width) by training.
    bias = (0.02 + 8 / width) * np.abs(Y).max()
    error = np.sqrt(e.variance() / count)
    assert (np.abs(seen.mean(0) - e.mean()) < st.norm.isf(LEVEL / 4) * error + bias).all()
    for level in e.cdf(seen).T:  # a distance of 1.95 / sqrt(count) has probability 1e-3
        assert st.kstest(level, "uniform").statistic < 1.95 / np.sqrt(count) + 0.03


def test_divergence_is_told():
    with pytest.warns(InferenceWarning, match=r"of 2000 networks diverged.*more steps"):
        seen = trained_outputs(LINEAR, X, Y, X_NEW, width=1, networks=2000, law=UNIFORM,
                               time=1500.0, steps=400)  # fmt: skip
    assert (np.isfinite(seen).all(axis=1) | np.isnan(seen).all(axis=1)).all()


# --- what cannot be used


@layer()
class Unknown(Activation):
    """Known by its expectations only: there is no function to simulate."""

    def expectations(self, s, q1, q2):
        return s, jnp.ones_like(s)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ModelError, "not simulated", {"network": Serial(Conv(), ReLU(), Flatten(), Dense())}),
        (ModelError, "function", {"network": Serial(Dense(), Unknown(), Dense())}),
        (ModelError, "function", {"network": Serial(Dense(), Residual(Serial(Unknown(), Dense())),
                                                    ReLU(), Dense())}),
        (ModelError, "last layer", {"network": Serial(Dense(), ReLU())}),
        (ModelError, "needs Gaussian", {"network": Serial(ReLU(), Dense())}),
        (ModelError, "layer that ends", {"network": 3}),
        (OptionError, "width", {"width": 0}),
        (OptionError, "networks", {"networks": 1.5}),
        (OptionError, "steps", {"steps": 0}),
        (OptionError, "time", {"time": float("inf")}),
        (OptionError, "time", {"time": None}),
        (OptionError, "ridge", {"ridge": -1.0}),
        (OptionError, "trained", {"trained": "first"}),
        (OptionError, "precision", {"precision": "half"}),
        (OptionError, "seed", {"seed": "one"}),
        (OptionError, "needs .* steps", {"time": 1e8}),
        (DataError, "finite width", {"x": np.ones((4, 2, 2, 1)), "x_new": np.ones((4, 2, 2, 1))}),
        (DataError, "one target", {"y": Y[:2]}),
        (DataError, "law must be", {"law": 0.0}),
    ],
)  # fmt: skip
def test_bad_input_is_explained(error, match, change):
    given = {"network": mlp(1), "x": X, "y": Y, "x_new": X_NEW, "width": 4, "time": 1.0,
             "networks": 3}  # fmt: skip
    with pytest.raises(error, match=match):
        trained_outputs(**{**given, **change})


@pytest.mark.parametrize(
    ("error", "change"), [(DataError, {"x": X[0]}), (OptionError, {"width": -1})]
)
def test_bad_input_of_random_outputs_is_explained(error, change):
    with pytest.raises(error):
        random_outputs(**{"network": mlp(1), "x": X, "width": 4, **change})
