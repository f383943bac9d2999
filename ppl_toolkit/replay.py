"""Runs of a NumPyro model: alone on the handler stack, traced, and with values put in its sites.

NumPyro keeps its handlers in one list per process. A run takes a lock and an empty list, so that
neither other threads nor handlers around the caller have a part in it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers, primitives
from numpyro.distributions import MaskedDistribution, biject_to, constraints
from numpyro.distributions.util import sum_rightmost
from numpyro.primitives import Messenger

from ppl_toolkit.errors import ModelError
from ppl_toolkit.layout import active_elements, mark_of
from ppl_toolkit.sites import finite_support, is_improper, mask_layers

__all__ = [
    "alone",
    "at_unconstrained",
    "filled",
    "is_auxiliary",
    "log_det_name",
    "log_prob",
    "redrawn",
    "require_no_outer_handlers",
    "traced_run",
    "unmasked_elements",
    "widened",
    "with_improper_sites",
]

_LOG_DET = "__log_det"
_lock = threading.RLock()


def require_no_outer_handlers() -> None:
    """Refuse a call inside ``with handler:`` (a seed is harmless), since it would have no effect.

    Raises:
        ModelError: names the handlers.
    """
    with _lock:
        outer = [h for h in primitives._PYRO_STACK if not isinstance(h, handlers.seed)]
    if outer:
        names = ", ".join(type(handler).__name__ for handler in outer)
        raise ModelError(
            f"this call was made inside the NumPyro handlers {names}, which would not reach the "
            "model. Wrap the model instead, as in handlers.condition(model, data=...)."
        )


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One run at a time, on an empty stack of handlers."""
    with _lock:
        stack = primitives._PYRO_STACK
        outer = stack[:]
        stack.clear()
        try:
            yield
        finally:
            stack[:] = outer


def traced_run(run: Callable[[], Any]) -> dict[str, Any]:
    """The messages of all sites that ``run`` visits, by name.

    Raises:
        ModelError: two sites share a name.
    """
    with alone(), _Trace() as trace:
        run()
    return trace


class _Trace(handlers.trace):
    """NumPyro's trace, strict about names: one kind of site for each."""

    def process_message(self, msg: dict) -> None:
        # A parameter that no handler has given a value stays at its initial one.
        msg["initial"] = msg["type"] == "param" and msg["value"] is None

    def postprocess_message(self, msg: dict) -> None:
        earlier = self.trace.get(msg.get("name"))
        if earlier is not None and not earlier["type"] == msg["type"] == "plate":
            raise ModelError(
                f"the name {msg['name']!r} stands for a {earlier['type']} and for a "
                f"{msg['type']} site; every site and plate needs a name of its own."
                if earlier["type"] != msg["type"]
                else f"two sites have the name {msg['name']!r}; every site needs one of its own."
            )
        super().postprocess_message(msg)


def is_auxiliary(message: Mapping[str, Any]) -> bool:
    """Whether a site only carries a factor."""
    return bool(message["infer"].get("is_auxiliary"))


def log_det_name(site: str) -> str:
    """The name of the factor that holds the log Jacobian of a site's transform."""
    return f"{site}{_LOG_DET}"


def log_prob(message: Mapping[str, Any]) -> Any:
    """Elementwise log probability of a sample site, plate scales and masks applied."""
    fn, value, scale = message["fn"], message["value"], message["scale"]
    intermediates = message["intermediates"]
    score = fn.log_prob(value, intermediates) if intermediates else fn.log_prob(value)
    return score if scale is None else scale * score


def unmasked_elements(message: Mapping[str, Any]) -> Any:
    """Which elements of a site's value are under no mask, of its shape."""
    shape = jnp.shape(message["value"])
    seen = jnp.ones((), bool)
    for mask, event_dim in mask_layers(message["fn"]):
        mask = jnp.asarray(mask)
        seen &= mask.reshape(mask.shape + (1,) * event_dim)
    if np.broadcast_shapes(seen.shape, shape) != shape:  # values that are observed many times
        return jnp.ones(shape, bool)
    return jnp.broadcast_to(seen, shape)


def at_unconstrained(values: Mapping[str, Any]) -> Callable[[Callable], Callable]:
    """A handler that puts x = t(u) at the latent sites and scores the log Jacobians."""

    def handler(model: Callable) -> Callable:
        return handlers.substitute(model, substitute_fn=lambda m: _transformed(values, m))

    return handler


def _transformed(values: Mapping[str, Any], message: dict) -> Any:
    """X = t(u) for one site.

    The factor is made inside the site's own plates and masks, so that it is scaled as the site is.
    """
    if message["type"] != "sample" or message["name"] not in values:
        return None
    u, support = values[message["name"]], message["fn"].support
    transform = biject_to(support)
    index = message["infer"].get("_scan_current_index")
    if index is not None:  # inside a scan: one step of the series
        shift = transform.codomain.event_dim - transform.domain.event_dim
        if jnp.ndim(u) > len(message["fn"].shape()) - shift:
            u = u[index]
    if _is_real(support):
        return u
    x = transform(u)
    log_det = transform.log_abs_det_jacobian(u, x)
    rightmost = jnp.ndim(log_det) - jnp.ndim(x) + len(message["fn"].event_shape)
    numpyro.factor(log_det_name(message["name"]), sum_rightmost(log_det, rightmost))
    return x


def _is_real(support: Any) -> bool:
    if isinstance(support, constraints.independent):
        return _is_real(support.base_constraint)
    return support is constraints.real


class filled(Messenger):
    """Puts an allowed value where a site has no element, since results have NaN there."""

    def process_message(self, message: dict) -> None:
        if message["type"] != "sample" or message["is_observed"] or mark_of(message) is None:
            return
        if (value := message["value"]) is None:
            return
        fn = message["fn"].base_dist
        if fn.is_discrete:
            anything = finite_support(fn)[0]
        else:
            transform = biject_to(fn.support)
            anything = transform(jnp.zeros(transform.inverse_shape(fn.shape())))
        message["value"] = jnp.where(active_elements(message, value), value, anything)


class redrawn(Messenger):
    """Turns observed sites into sites to draw, of the shape that was observed."""

    def process_message(self, message: dict) -> None:
        if message["type"] != "sample" or not message["is_observed"] or is_auxiliary(message):
            return
        fn, shape = message["fn"], jnp.shape(message["value"])
        batch = shape[: len(shape) - fn.event_dim]
        if batch != fn.batch_shape:
            message["fn"] = fn.expand(batch)
        message |= {"value": None, "is_observed": False}


def widened(model: Callable) -> Callable:
    """The model with all its rows in every subsampled plate."""

    @functools.wraps(model)
    def whole(*args: Any, **kwargs: Any) -> Any:
        with _Widened():
            return model(*args, **kwargs)

    return whole


class _Widened(Messenger):
    def process_message(self, message: dict) -> None:
        if message["type"] == "plate":
            size, _ = message["args"]
            message |= {"args": (size, None), "value": jnp.arange(size)}


def with_improper_sites(model: Callable) -> Callable:
    """Gives improper sites a value in the first, abstract run, where nothing can draw them."""
    return handlers.substitute(model, substitute_fn=_improper_value)


def _improper_value(message: dict) -> Any:
    if message["type"] != "sample" or message["is_observed"] or message["value"] is not None:
        return None
    fn = message["fn"]
    if not is_improper(fn.base_dist if isinstance(fn, MaskedDistribution) else fn):
        return None
    transform = biject_to(fn.support)
    return transform(jnp.zeros(transform.inverse_shape(fn.shape())))
