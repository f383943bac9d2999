"""The law of elements that are not there: N(0, 1) on the real space, uniform on finite supports.

Kernels need a law for every number of a position. This one is normalised and independent of all
else, so that posteriors and evidences stay those of the model.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import random

from ppl_toolkit.sites import finite_support

__all__ = ["resting_draw", "resting_log_prob"]


def resting_draw(key: Any, fn: Any, like: Any) -> Any:
    """A draw of the shape and type of ``like``, a value of ``fn`` on the real space."""
    if fn.is_discrete:
        return random.choice(key, finite_support(fn), jnp.shape(like)).astype(like.dtype)
    return random.normal(key, jnp.shape(like), like.dtype)


def resting_log_prob(fn: Any, x: Any) -> Any:
    """Elementwise log density at ``x``, a value of ``fn`` on the real space."""
    if fn.is_discrete:
        return jnp.full(jnp.shape(x), -jnp.log(finite_support(fn).shape[0]))
    return -0.5 * x**2 - 0.5 * jnp.log(2 * jnp.pi)
