"""Auxiliary draws and proposals written as NumPyro programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import random
from numpyro import handlers
from numpyro.primitives import Messenger

from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.randomness import categorical, continuous
from ppl_toolkit.replay import log_prob, traced_run
from ppl_toolkit.sites import finite_support

__all__ = ["Drawn", "draw", "score"]

Values = Mapping[str, Any]


class Drawn(Messenger):
    """Draws every sample site; finite ones by choices that can be enumerated."""

    def __init__(self, key: Any, function: Callable | None = None) -> None:
        super().__init__(function)
        self.key = key

    def process_message(self, message: dict) -> None:
        if message["type"] != "sample" or message["value"] is not None:
            return
        self.key, key = random.split(self.key)
        fn = message["fn"]
        levels = None if fn.batch_shape else finite_support(fn)
        if levels is None:
            continuous(f"site {message['name']!r}")
            message["value"] = fn.sample(key)
        else:
            message["value"] = levels[categorical(key, fn.log_prob(levels))]


def draw(program: Callable, key: Any, *args: Any) -> tuple[dict[str, Any], Any]:
    """Values of the program's sites, and the log density of them together."""

    def run() -> None:
        with Drawn(key):
            program(*args)

    trace = traced_run(run)
    return _values(trace), _total(trace)


def score(program: Callable, values: Values, *args: Any) -> Any:
    """The log density with which the program would draw ``values``.

    Raises:
        MethodError: the program has other sites than ``values``.
    """
    fixed = handlers.substitute(program, data=dict(values))
    trace = traced_run(lambda: handlers.seed(fixed, random.key(0))(*args))
    names = set(_values(trace))
    if names != set(values):
        raise MethodError(
            f"the auxiliary program has the sites {sorted(names)}, but its values have "
            f"{sorted(values)}; it must have the same sites wherever it is run."
        )
    return _total(trace)


def _values(trace: Values) -> dict[str, Any]:
    return {
        name: message["value"]
        for name, message in trace.items()
        if message["type"] == "sample" and not message["is_observed"]
    }


def _total(trace: Values) -> Any:
    scores = [jnp.sum(log_prob(m)) for m in trace.values() if m["type"] == "sample"]
    return sum(scores, start=jnp.zeros(()))
