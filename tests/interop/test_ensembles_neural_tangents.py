"""Ensembles of trained networks beside neural-tangents (`pip install --no-deps neural-tangents`).

Its package imports TensorFlow and parts of JAX that are gone: the modules needed are loaded without
running the package's own ``__init__``.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ppl_toolkit.models.ensembles import gradient_descent_ensemble
from ppl_toolkit.models.infinite_width import Erf, mlp

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from neural_tangents_peer import module

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

rng = np.random.default_rng(0)
X, X_NEW, Y = rng.normal(size=(6, 3)), rng.normal(size=(4, 3)), rng.normal(size=6)
S2 = 1.7


@pytest.fixture(scope="module")
def peer():
    found = module("stax"), module("predict")
    if None in found:
        pytest.skip("neural-tangents is not installed")
    return found


@pytest.mark.parametrize("trained", ["ntk", "nngp"])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("time", [None, 3.0])
def test_conditional_moments_agree(peer, time, ridge, trained):
    stax, predict = peer
    with jax.enable_x64(True):
        hidden = [stax.Dense(1, W_std=1.4, b_std=0.3), stax.Erf()] * 2
        # Their readout has sigma in it, so that both of their kernels are sigma^2 times ours.
        _, _, kernel = stax.serial(*hidden, stax.Dense(1, W_std=np.sqrt(S2)))
        predicted = predict.gradient_descent_mse_ensemble(
            kernel, X, Y[:, None], learning_rate=0.6, diag_reg=S2 * ridge,
            diag_reg_absolute_scale=True,
        )(t=time, x_test=X_NEW, get=trained, compute_cov=True)  # fmt: skip
    e = gradient_descent_ensemble(
        mlp(2, Erf(), weight_std=1.4, bias_std=0.3), X, Y, X_NEW, law=S2, time=time,
        learning_rate=0.6, ridge=ridge, trained="all" if trained == "ntk" else "last",
    )  # fmt: skip
    mean, covariance = np.asarray(predicted.mean)[:, 0], np.asarray(predicted.covariance)
    np.testing.assert_allclose(e.mean(S2), mean, rtol=0, atol=1e-14)
    if not (ridge and trained == "nngp"):
        # Theirs then has K + ridge I for K in the covariance, too: each network has noisy targets
        # of its own, which makes the Bayesian posterior of infinite time.
        np.testing.assert_allclose(e.covariance(S2), covariance, rtol=0, atol=1e-14)
