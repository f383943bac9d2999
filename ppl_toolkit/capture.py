"""The scan of a model, taken out of it: what comes before, one step, and what it runs over."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from numpyro import handlers, primitives
from numpyro.primitives import Messenger

from ppl_toolkit import threefry
from ppl_toolkit.replay import traced_run

__all__ = ["Scan", "captured", "run_step"]

_HARMLESS = ("seed", "substitute", "condition", "trace", "_Capture", "_Trace")


class Scan(NamedTuple):
    """A call of NumPyro's `scan` that was not carried out.

    Attributes:
        body: (carry, x) -> (carry, output), with sample sites inside.
        start: the carry before the first step.
        xs: what it runs over, arrays (T, ...).
        length: the number of steps T.
        reverse: whether it runs backwards.
        values: what handlers around it put into its sites, (kind, values by site or a function
            of the message), from the inside out.
        handlers: names of other handlers around it, which do not reach its sites.
    """

    body: Callable[[Any, Any], tuple[Any, Any]]
    start: Any
    xs: Any
    length: int
    reverse: bool
    values: tuple[tuple[str, Any], ...]
    handlers: tuple[str, ...]

    def time(self, t: Any) -> Any:
        """The index into ``xs`` of step number t, and into the series of the sites' values.

        What handlers put into the sites is in the order of the steps, whichever way they run: so
        NumPyro has it.
        """
        return self.length - 1 - t if self.reverse else t


class _Stop(BaseException):
    """Leaves the model at its scan."""


class _Capture(Messenger):
    scan: Scan | None = None

    def process_message(self, message: dict) -> None:
        if message["type"] != "control_flow":
            return
        body, start, xs, length, reverse = message["args"]
        if length is None:
            length = jax.tree.leaves(xs)[0].shape[0]
        around = [type(h).__name__ for h in primitives._PYRO_STACK]
        self.scan = Scan(
            body, start, xs, length, reverse, tuple(message["kwargs"]["substitute_stack"]),
            tuple(name for name in around if name not in _HARMLESS),
        )  # fmt: skip
        raise _Stop


def _site_key(key: Any, number: int, message: dict) -> Any:
    """The key of site ``number`` of a particle: the number is added to the key's first word.

    Laws that can be drawn with such keys get one whose hash is written out, with the same bits. The
    words of particles' keys differ in the last one (`inference.randomness.numbered`), so that
    all sites of all particles of a step have different keys. Those of two steps meet with a chance
    of 4 N S / 2^64 for N particles with S sites.
    """
    words = random.key_data(key)
    own = jnp.concatenate([words[:1] + jnp.asarray(number, words.dtype), words[1:]])
    if message["type"] == "sample" and threefry.serves(key):
        quick = threefry.written_out(own)
        # JAX draws Poisson variates with its own keys only, and says so by this error while it
        # traces: such sites get the usual key below.
        with contextlib.suppress(NotImplementedError):
            shape = message["kwargs"]["sample_shape"]
            jax.eval_shape(lambda: message["fn"].sample(quick, shape))
            return quick
    return random.wrap_key_data(own, impl=random.key_impl(key))


class _Keys(Messenger):
    """A key for every site that draws, as NumPyro's seed gives them, but made without a hash."""

    def __init__(self, function: Callable, key: Any) -> None:
        super().__init__(function)
        self.key = key
        self.count = 0

    def process_message(self, message: dict) -> None:
        if message["type"] not in ("sample", "prng_key", "plate", "control_flow"):
            return
        if message["kwargs"]["rng_key"] is None and message["value"] is None:
            message["kwargs"]["rng_key"] = _site_key(self.key, self.count, message)
            self.count += 1


def captured(run: Callable[[], Any]) -> tuple[Scan | None, dict[str, Any]]:
    """The first scan that ``run`` comes to (None: it has none), and the messages before it."""
    capture = _Capture()

    def until_scan() -> None:
        try:
            with capture:
                run()
        except _Stop:
            pass

    trace = traced_run(until_scan)
    return capture.scan, trace


def run_step(
    scan: Scan,
    carry: Any,
    t: Any,
    key: Any,
    *wrappers: Callable[[Callable], Callable],
) -> tuple[Any, dict[str, Any]]:
    """One step of a scan, from ``carry``.

    Args:
        scan: as captured.
        carry: before the step.
        t: the number of the step.
        key: of the sites that have no value (`_site_key`); used for nothing else.
        *wrappers: handlers around the step, from the inside out.

    Returns:
        The carry after the step, and the messages of its sites.
    """
    step = handlers.infer_config(scan.body, config_fn=lambda _: {"_scan_current_index": t})
    step = _Keys(step, key)
    for kind, values in scan.values:
        put = functools.partial(_value, values, t)
        if kind == "condition":
            step = handlers.condition(step, condition_fn=put)
        else:
            step = handlers.substitute(step, substitute_fn=put)
    for wrapper in wrappers:
        step = wrapper(step)
    x = jax.tree.map(lambda v: v[scan.time(t)], scan.xs)
    found = []
    trace = traced_run(lambda: found.append(step(carry, x)[0]))
    return found[0], trace


def _value(values: Any, t: Any, message: dict) -> Any:
    """What a handler around the scan puts at a site in step t."""
    if message["type"] != "sample":
        return None
    value = values(message) if callable(values) else values.get(message["name"])
    if value is None:
        return None
    own = len(message["kwargs"]["sample_shape"] + message["fn"].shape())
    return value[t] if jnp.ndim(value) > own else value
