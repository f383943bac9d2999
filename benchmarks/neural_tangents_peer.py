"""Our networks as those of neural-tangents.

It is optional: ``pip install --no-deps neural-tangents==0.6.5 frozendict``. Its last release
imports TensorFlow, and parts of JAX that are gone; the module of its kernels needs neither.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

from ppl_toolkit.models import infinite_width as ours

__all__ = ["kernel_function", "module", "stax"]


def stax() -> Any:
    """The module ``neural_tangents.stax``, None if it is not installed."""
    return module("stax")


def module(which: str) -> Any:
    """A module of neural-tangents, None if it is not installed."""
    name = "neural_tangents"
    if name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found is None or importlib.util.find_spec("frozendict") is None:
            return None
        package = types.ModuleType(name)  # in place of its __init__, which imports everything
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules[name] = package
    return importlib.import_module(f"{name}.{which}")


def kernel_function(network: ours.Layer) -> Callable:
    """``kernel_fn(x1, x2, get)`` of the same network; ``get`` is "nngp", "ntk", or both."""
    return _twin(stax(), network)[2]


def _twin(nt: Any, layer: Any) -> Any:
    width = 1  # of no consequence to infinite networks
    match layer:
        case ours.Serial():
            return nt.serial(*(_twin(nt, one) for one in layer.layers))
        case ours.Residual():
            shortcut = nt.Identity() if layer.shortcut is None else _twin(nt, layer.shortcut)
            both = nt.parallel(_twin(nt, layer.branch), shortcut)
            return nt.serial(nt.FanOut(2), both, nt.FanInSum())
        case ours.Dense(w, b):
            return nt.Dense(width, W_std=w, b_std=b)
        case ours.Conv(window, strides, w, b):
            return nt.Conv(width, window, strides, padding="SAME", W_std=w, b_std=b)
        case ours.LayerNorm(epsilon):
            return nt.LayerNorm(eps=epsilon)
        case ours.Flatten():
            return nt.Flatten()
        case ours.GlobalAveragePool():
            return nt.GlobalAvgPool()
        case ours.Rectifier(below, above):
            return nt.ABRelu(below, above)
        case ours.Erf(amplitude, frequency, offset):
            return nt.Erf(amplitude, frequency, offset)
        case ours.GELU():
            return nt.Gelu()
        case ours.Sin(amplitude, frequency, phase):
            return nt.Sin(amplitude, frequency, phase)
        case ours.Sign():
            return nt.Sign()
        case ours.Elementwise(function, nodes):
            return nt.ElementwiseNumerical(function, nodes)
    raise ValueError(f"neural-tangents has nothing that is {layer!r}.")
