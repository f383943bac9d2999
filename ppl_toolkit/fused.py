"""Log probabilities of whole sites, cheaper than the sum over their elements.

Of a sum of logarithms of numbers of moderate size one logarithm of their product is left. Bernoulli
sites with logits and mixtures spend most of their time on such sums; Poisson sites with
log-linear rates, on logarithms of exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from ppl_toolkit.replay import log_prob

__all__ = ["sum_log", "total", "total_log_prob", "unwrapped"]

_FEW = 32  # elements; with fewer nothing is gained


def sum_log(x: Float[Array, "..."], largest: float) -> Float[Array, ""]:
    """The sum of the logarithms of numbers in [0, ``largest``], by logarithms of products.

    As many factors are multiplied as cannot overflow; numbers below one may underflow together only
    where their sum is below -600 (float64). Absolute error: one rounding a factor.
    """
    finfo = jnp.finfo(x.dtype)
    factors = max(1, min(256, int(np.log(float(finfo.max)) / np.log(max(largest, 2.0))) - 1))
    return _sum_log(x.reshape(-1), factors)


def _by_products(x: Float[Array, " N"], factors: int) -> Float[Array, ""]:
    columns = -(-x.shape[0] // factors)
    padded = jnp.concatenate([x, jnp.ones(factors * columns - x.shape[0], x.dtype)])
    return jnp.sum(jnp.log(jnp.prod(padded.reshape(factors, columns), axis=0)))


_sum_log = jax.custom_jvp(_by_products, nondiff_argnums=(1,))


@_sum_log.defjvp
def _sum_log_jvp(factors: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    return _sum_log(x, factors), jnp.sum(dx / x)


def _bernoulli(fn: Any, y: Any) -> Any:
    """Of y log p + (1 - y) log(1 - p) = (y - 1[l > 0]) l - log(1 + exp(-|l|))."""
    logits = jnp.broadcast_to(fn.logits, jnp.shape(y))
    slope = y - (logits > 0.0)
    linear = jnp.where(slope == 0.0, 0.0, slope * logits)  # infinite logits may be right
    return jnp.sum(linear) - sum_log(1.0 + jnp.exp(-jnp.abs(logits)), 2.0)


def _poisson(fn: Any, y: Any) -> Any:
    """Of y log r - r - log y!; of r = exp(eta) the logarithm is left out, see `logarithms`."""
    rate = jnp.asarray(fn.rate, jnp.result_type(float))
    counts = jnp.asarray(y, rate.dtype)
    rate = jnp.broadcast_to(rate, jnp.shape(y))
    linear = jnp.where(counts == 0.0, 0.0, counts * jnp.log(rate))  # a rate may be zero
    return jnp.sum(linear - rate - gammaln(counts + 1.0))


def _mixture(fn: Any, value: Any) -> Any:
    """Of log sum_k exp(a_k) = a + log sum_k exp(a_k - a) with the largest a of every element."""
    parts = fn.component_log_probs(value)
    parts = jnp.where(jnp.isneginf(parts), -jnp.inf, parts)  # no gradient through empty parts
    largest = lax.stop_gradient(jnp.max(parts, axis=-1, keepdims=True))
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    sums = jnp.sum(jnp.exp(parts - largest), axis=-1)
    return jnp.sum(largest) + sum_log(sums, float(parts.shape[-1]))


_TOTALS: dict[type, Callable[[Any, Any], Any]] = {
    dist.BernoulliLogits: _bernoulli,
    dist.Poisson: _poisson,
    dist.MixtureSameFamily: _mixture,
    dist.MixtureGeneral: _mixture,
}


def unwrapped(fn: Any) -> Any:
    """The distribution within expansions and events of single elements."""
    while isinstance(fn, dist.distribution.Independent | dist.distribution.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def total_log_prob(message: Mapping[str, Any]) -> Any:
    """The log probability of a sample site, all elements together, plate scale and mask applied.

    Equal to the sum of `log_prob` up to rounding.
    """
    fn, value, scale = message["fn"], message["value"], message["scale"]
    fn = unwrapped(fn)
    total = _TOTALS.get(type(fn))
    one_each = np.shape(value) == message["fn"].shape()
    plain = one_each and not message["intermediates"] and not np.ndim(scale)
    if total is None or not plain or np.size(value) < _FEW:
        return jnp.sum(log_prob(message))
    score = total(fn, value)
    if fn._validate_args:  # NumPyro's densities are zero outside the support then
        score = jnp.where(jnp.all(fn.support(value)), score, -jnp.inf)
    return score if scale is None else scale * score


def total(trace: Mapping[str, Mapping[str, Any]]) -> Any:
    """The log probability of all sample sites of a trace."""
    messages = (message for message in trace.values() if message["type"] == "sample")
    return sum((total_log_prob(message) for message in messages), start=0.0)
