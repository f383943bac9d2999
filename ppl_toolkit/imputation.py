"""Missing observations that are imputed (NumPyro's ``obs_mask=``), and what there is unused.

``numpyro.sample("y", fn, obs=y, obs_mask=seen)`` makes two sites of the whole shape, "y_observed"
and "y_unobserved", each masked where the other has the value that is used: y, a deterministic site.
With no law, chains would follow the unused elements for ever; they rest (`ppl_toolkit.resting`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ppl_toolkit.sites import finite_support, mask_layers

__all__ = ["read_imputed", "unused_elements"]

_HALVES = {"_unobserved": "_observed", "_observed": "_unobserved"}


def read_imputed(trace: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The latent sites with unused elements, by name."""
    return tuple(
        name
        for name, message in trace.items()
        if message["type"] == "sample" and not message["is_observed"]
        if _mask(trace, name) is not None
        if not message["fn"].is_discrete or finite_support(message["fn"]) is not None
    )


def unused_elements(trace: Mapping[str, Mapping[str, Any]], name: str, value: Any) -> Any:
    """Which elements of such a site's ``value`` are unused; broadcasts to its shape.

    The value may be on the site's own space or on the real one: events differ, batches do not.
    """
    batch = jnp.ndim(trace[name]["value"]) - trace[name]["fn"].event_dim
    mask = jnp.broadcast_to(jnp.asarray(_mask(trace, name)), jnp.shape(value)[:batch])
    return ~mask.reshape(mask.shape + (1,) * (jnp.ndim(value) - batch))


def _mask(trace: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """The mask by ``obs_mask=`` among those of a site, None if there is none.

    It is the innermost but for those that the distribution came with, which both halves share.
    """
    for end, other in _HALVES.items():
        stem = name.removesuffix(end)
        if stem == name or trace.get(stem, {}).get("type") != "deterministic":
            continue
        if trace.get(stem + other, {}).get("type") != "sample":
            continue
        own, half = (
            [mask for mask, _ in reversed(mask_layers(trace[stem + part]["fn"]))]
            for part in (end, other)
        )
        if len(own) < len(half) or (len(own) > 1 and _is_scanned(trace[name])):
            continue  # nothing is observed; or scan has hidden what both halves share
        pairs = itertools.zip_longest(own, half)
        return next((mask for mask, of_half in pairs if mask is not of_half), None)
    return None


def _is_scanned(message: Mapping[str, Any]) -> bool:
    return bool(message.get("_control_flow_done"))
