"""The kernel of a program: a network as it is, or one whose variances are sites with priors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpyro import distributions as dist

from ppl_toolkit.errors import OptionError
from ppl_toolkit.models.infinite_width import Layer, mlp

__all__ = ["check_priors", "checked_network", "kernel_priors", "network_with"]

_WEIGHT, _BIAS = "weight_std", "bias_std"


def checked_network(network: Any) -> Layer | Callable[..., Layer]:
    """A network, or a function of ``weight_std`` and ``bias_std``; three ReLU layers if None.

    Raises:
        OptionError: it is neither.
    """
    if network is None:
        return functools.partial(mlp, 3)
    if not isinstance(network, Layer) and not callable(network):
        raise OptionError(
            "network must be layers, or a function of weight_std and bias_std that gives them, "
            f"such as functools.partial(mlp, 3); got {network!r:.60}."
        )
    return network


def kernel_priors(network: Any) -> dict[str, dist.Distribution]:
    """Priors of the kernel's sites, in the precision of the run; none of a network as it is."""
    if isinstance(network, Layer):
        return {}
    return {_WEIGHT: dist.LogNormal(np.log(1.4), 0.3), _BIAS: dist.HalfNormal(0.5)}


def network_with(network: Any, sites: Mapping[str, Any]) -> Layer:
    """The network with the values of its sites, which are among ``sites``."""
    if isinstance(network, Layer):
        return network
    made: Layer = network(**{name: sites[name] for name in (_WEIGHT, _BIAS)})
    return made


def check_priors(known: Iterable[str], given: Mapping[str, Any]) -> None:
    """Refuse priors of sites that there are not.

    Raises:
        OptionError: there are some, or what is given is no distribution.
    """
    if unknown := sorted(set(given) - set(known)):
        raise OptionError(f"priors= names {unknown}; the sites with priors are {sorted(known)}.")
    if wrong := [name for name, prior in given.items() if not isinstance(prior, dist.Distribution)]:
        raise OptionError(f"the priors of {wrong} are no NumPyro distributions.")
