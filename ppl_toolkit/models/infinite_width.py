"""Infinitely wide neural networks: their Gaussian-process and tangent kernels.

A network is built of layers, and is a kernel:

    network = Serial(Dense(1.4, 0.3), ReLU(), Dense(1.4, 0.3), ReLU(), Dense())
    network.nngp(x)          # covariance of the outputs of a random network, (n, n)
    network.ntk(x, x_new)    # neural tangent kernel

Sources: Neal (1996); Cho, Saul (2009); Lee, Bahri, Novak, Schoenholz, Pennington, Sohl-Dickstein
(2018) for the Gaussian process; Jacot, Gabriel, Hongler (2018) for the tangent kernel; Novak et al.
(2019) for convolutions.
"""

from __future__ import annotations

from typing import Any

from ppl_toolkit.errors import OptionError
from ppl_toolkit.models.activations import (
    GELU,
    RBF,
    Abs,
    Activation,
    Cos,
    Erf,
    Identity,
    LeakyReLU,
    Rectifier,
    ReLU,
    Sign,
    Sin,
    Step,
)
from ppl_toolkit.models.convolution import Conv, Flatten, GlobalAveragePool
from ppl_toolkit.models.covariances import Kernels
from ppl_toolkit.models.layers import Dense, Layer, LayerNorm, Residual, Serial
from ppl_toolkit.models.quadrature_activations import Elementwise, HermiteSeries

__all__ = [
    "GELU",
    "RBF",
    "Abs",
    "Activation",
    "Conv",
    "Cos",
    "Dense",
    "Elementwise",
    "Erf",
    "Flatten",
    "GlobalAveragePool",
    "HermiteSeries",
    "Identity",
    "Kernels",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "ReLU",
    "Rectifier",
    "Residual",
    "Serial",
    "Sign",
    "Sin",
    "Step",
    "mlp",
    "resnet",
]


def mlp(
    depth: int,
    activation: Layer | None = None,
    *,
    weight_std: Any = 1.4142135623730951,
    bias_std: Any = 0.0,
    readout_std: Any = 1.0,
) -> Serial:
    """A fully connected network: ``depth`` times (Dense, activation), and a readout without bias.

    Args:
        depth: hidden layers.
        activation: `ReLU` if None.
        weight_std, bias_std: of the hidden layers. ReLU networks keep their signals' variance
            with ``weight_std`` = sqrt(2) and no bias (He et al. 2015).
        readout_std: standard deviation of the readout's weights. Both kernels are proportional to
            its square, since the readout has no bias: what a scale mixture needs, which puts a
            law on this factor and takes 1 here.
    """
    _check_depth(depth)
    activation = ReLU() if activation is None else activation
    hidden = [layer for _ in range(depth) for layer in (Dense(weight_std, bias_std), activation)]
    return Serial(*hidden, Dense(readout_std))


def resnet(
    depth: int,
    activation: Layer | None = None,
    *,
    weight_std: Any = 1.0,
    bias_std: Any = 0.0,
    readout_std: Any = 1.0,
) -> Serial:
    """A residual network: Dense, ``depth`` times x + Dense(activation(x)), activation, readout."""
    _check_depth(depth)
    activation = ReLU() if activation is None else activation
    dense = Dense(weight_std, bias_std)
    blocks = [Residual(Serial(activation, dense)) for _ in range(depth)]
    return Serial(dense, *blocks, activation, Dense(readout_std))


def _check_depth(depth: int) -> None:
    if not isinstance(depth, int) or depth < 0:
        raise OptionError(f"depth must be a number of layers, at least 0; got {depth!r}.")
