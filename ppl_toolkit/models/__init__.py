"""Probabilistic programs, and the distributions and kernels they need.

- `infinite_width`: kernels of infinitely wide networks (NNGP, NTK), composed of layers.
- `scale_mixture`: Student-t processes and other scale mixtures of them: fits, laws, a program.
- `scale_mixture_classification`: the same for classes.
- `ensembles`, `finite_width`: networks trained by gradient descent, infinitely wide or simulated.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "ensembles",
    "finite_width",
    "infinite_width",
    "scale_mixture",
    "scale_mixture_classification",
]

if TYPE_CHECKING:
    from ppl_toolkit.models import (
        ensembles,
        finite_width,
        infinite_width,
        scale_mixture,
        scale_mixture_classification,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
