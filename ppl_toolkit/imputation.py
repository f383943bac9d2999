"""Missing observations that are imputed (NumPyro's ``obs_mask=``), with a law for the others.

``numpyro.sample("y", fn, obs=y, obs_mask=seen)`` makes two sites of the whole shape: "y_observed",
and a latent "y_unobserved", where a mask takes the elements that are observed out of the density.
With no law at all, chains would follow those for ever. Here they rest (`ppl_toolkit.resting`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from numpyro.distributions import Distribution, biject_to, constraints
from numpyro.distributions.util import sum_rightmost
from numpyro.primitives import Messenger

from ppl_toolkit.replay import log_det_name, unmasked
from ppl_toolkit.resting import resting_draw, resting_log_prob
from ppl_toolkit.sites import finite_support

__all__ = ["Imputed", "imputing"]


class Imputed(Distribution):
    """A distribution whose masked elements rest, instead of having no law.

    Elements of infinite discrete supports keep their own law there.

    Args:
        base_dist: a masked distribution.
    """

    pytree_data_fields = ("base_dist",)

    def __init__(self, base_dist: Any) -> None:
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        return self.base_dist.support

    @property
    def has_enumerate_support(self) -> bool:
        return self.base_dist.has_enumerate_support

    def enumerate_support(self, expand: bool = True) -> Any:
        return self.base_dist.enumerate_support(expand=expand)

    @property
    def _rests(self) -> bool:
        return not self.is_discrete or finite_support(self) is not None

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Missing elements from their own law, the others from that of rest."""
        own = self.base_dist.sample(key, sample_shape)
        if not self._rests:
            return own
        key = random.fold_in(key, 1)
        if self.is_discrete:
            other = resting_draw(key, self, own)
        else:
            transform = biject_to(self.support)
            like = jax.eval_shape(transform.inv, own)
            other = transform(resting_draw(key, self, like))
        missing, _ = unmasked(self.base_dist)
        return jnp.where(missing.reshape(missing.shape + (1,) * self.event_dim), own, other)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """By element of the batch."""
        missing, own = unmasked(self.base_dist)
        if not self._rests:
            return own.log_prob(value)
        if self.is_discrete:
            other = resting_log_prob(self, value)
        else:
            transform = biject_to(self.support)
            z = transform.inv(value)
            log_det = transform.log_abs_det_jacobian(z, value)
            batch = jnp.ndim(value) - self.event_dim
            other = sum_rightmost(resting_log_prob(self, z), jnp.ndim(z) - batch)
            other -= sum_rightmost(log_det, jnp.ndim(log_det) - batch)
        return self.base_dist.log_prob(value) + jnp.where(missing, 0.0, other)


def imputing(model: Callable) -> Callable:
    """The model with a law for all elements of sites that impute missing observations."""

    @functools.wraps(model)
    def imputed(*args: Any, **kwargs: Any) -> Any:
        with _Imputing():
            return model(*args, **kwargs)

    return imputed


class _Imputing(Messenger):
    def __enter__(self) -> Any:
        self._observed: set[str] = set()
        self._log_dets: set[str] = set()
        return super().__enter__()

    def process_message(self, message: dict) -> None:
        if message["type"] != "sample":
            return
        name = message["name"]
        if message["is_observed"]:
            if name in self._log_dets:  # the mask hides the transform of resting elements, too
                _, message["fn"] = unmasked(message["fn"])
            self._observed.add(name)
        elif name.removesuffix("_unobserved") + "_observed" in self._observed:
            message["fn"] = Imputed(message["fn"])
            self._log_dets.add(log_det_name(name))
