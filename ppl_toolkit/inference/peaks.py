"""The largest value of a density: what rejection sampling needs to know."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist

__all__ = ["log_peak"]

_AT_LOCATION = (dist.Normal, dist.StudentT, dist.Laplace, dist.Cauchy, dist.Logistic, dist.Gumbel)


def log_peak(fn: Any) -> Any:
    """The maximum of ``fn.log_prob``, summed over its batch; None where it is not known."""
    found = _log_peak(fn)
    return None if found is None else jnp.sum(found)


def _log_peak(fn: Any) -> Any:
    if isinstance(fn, dist.Independent):
        inner = _log_peak(fn.base_dist)
        if inner is None:
            return None
        return jnp.sum(inner, tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    if isinstance(fn, dist.ExpandedDistribution):
        inner = _log_peak(fn.base_dist)
        return None if inner is None else jnp.broadcast_to(inner, fn.batch_shape)
    if (mode := _mode(fn)) is None:
        return None
    return fn.log_prob(mode)


def _mode(fn: Any) -> Any:
    """Where the density of a law is largest; None where it is not known."""
    if type(fn) in _AT_LOCATION or isinstance(fn, dist.MultivariateNormal):
        return fn.loc
    if type(fn) is dist.LogNormal:
        return jnp.exp(fn.loc - fn.scale**2)
    if type(fn) is dist.Uniform:
        return 0.5 * (fn.low + fn.high)
    if type(fn) in (dist.HalfNormal, dist.Exponential, dist.HalfCauchy):
        return jnp.full(fn.batch_shape, jnp.finfo(jnp.result_type(float)).tiny)  # beside zero
    if type(fn) is dist.Poisson:
        return jnp.floor(fn.rate)
    if isinstance(fn, dist.BinomialProbs | dist.BinomialLogits):
        return jnp.floor(jnp.clip((fn.total_count + 1) * fn.probs, 0, fn.total_count))
    if isinstance(fn, dist.BernoulliProbs | dist.BernoulliLogits):
        return jnp.asarray(fn.probs > 0.5, jnp.int32)
    if isinstance(fn, dist.CategoricalProbs | dist.CategoricalLogits):
        return jnp.argmax(fn.probs, -1)
    return None
