"""Finite random choices that can be enumerated, and the control flow that may hold them.

Kernels make their finite choices (accept or not, which site, which value) through these functions.
In a run they are `jax.random`; inside `Paths` every choice follows a given path, and its
probability is kept, so that the exact transition matrix of a kernel on a finite space comes from
the very code that samples. Source: the enumeration layer of Ścibior et al. (2018), POPL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from ppl_toolkit.errors import MethodError

__all__ = [
    "Paths",
    "accept",
    "categorical",
    "continuous",
    "enumerating",
    "numbered",
    "over",
    "repeated",
    "scanned",
    "shapes_of",
    "switch",
]

_active = threading.local()


class Paths:
    """Choices that are given instead of drawn.

    Args:
        path: number of the outcome of every choice, in the order in which they are made, shape
            (m,); None: outcome 0 for all, to learn how many choices there are.

    Attributes:
        sizes: number of outcomes of every choice made so far.
        probability: product of the probabilities of the outcomes taken.
    """

    def __init__(self, path: Any = None) -> None:
        self.path = path
        self.sizes: list[int] = []
        self.probability: Any = 1.0

    def __enter__(self) -> Paths:
        if getattr(_active, "paths", None) is not None:
            raise RuntimeError("choices are enumerated already")
        _active.paths = self
        return self

    def __exit__(self, *_: object) -> None:
        _active.paths = None

    def take(self, probabilities: Any) -> Any:
        """The outcome of the next choice, an index into ``probabilities`` (K,)."""
        number = len(self.sizes)
        self.sizes.append(probabilities.shape[0])
        if self.path is None:
            return jnp.zeros((), jnp.int32)
        outcome = self.path[number]
        self.probability = self.probability * probabilities[outcome]
        return outcome


def _paths() -> Paths | None:
    return getattr(_active, "paths", None)


def shapes_of(function: Callable, *args: Any) -> Any:
    """Shapes of ``function(*args)``; the choices it makes while it is looked at do not count."""
    paths = _paths()
    if paths is None:
        return jax.eval_shape(function, *args)
    _active.paths = None
    try:
        with Paths():
            return jax.eval_shape(function, *args)
    finally:
        _active.paths = paths


def categorical(key: Any, log_weights: Any) -> Any:
    """An index drawn with probabilities proportional to exp(log_weights), shape (K,).

    Where all weights are zero, index 0.
    """
    paths = _paths()
    if paths is None:
        return random.categorical(key, log_weights)
    highest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(highest), highest, 0.0))
    first = jnp.zeros_like(weights).at[0].set(1.0)
    total = jnp.sum(weights)
    return paths.take(jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), first))


def accept(key: Any, log_ratio: Any) -> Any:
    """True with probability min(1, exp(log_ratio)); NaN counts as minus infinity."""
    log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    paths = _paths()
    if paths is None:
        return jnp.log(random.uniform(key, (), jnp.result_type(float))) < log_ratio
    p = jnp.minimum(1.0, jnp.exp(log_ratio))
    return paths.take(jnp.stack([1.0 - p, p])) == 1


def enumerating() -> bool:
    """Whether finite choices are being enumerated, one by one."""
    return _paths() is not None


def continuous(what: str) -> None:
    """Said by kernels before they draw a real number: such choices cannot be enumerated.

    Raises:
        MethodError: choices are being enumerated.
    """
    if _paths() is not None:
        raise MethodError(f"{what} draws real numbers, so its transitions cannot be enumerated.")


# -- keys --------------------------------------------------------------------------------------


def numbered(key: Any, count: int) -> Any:
    """Keys (N,) of N particles: the words of a hash of a key, plus the particle's number.

    The number is added to the last word, so that these keys cost one hash, not N as those of
    `random.split`. The key must be used for nothing else. Threefry's streams of keys that differ
    in a single bit pass for independent, which `random.key(0)`, `random.key(1)`, ... rely on, too
    (Salmon et al., 2011, Random123).

    The keys of one call are all different. Those of two calls whose own keys are independent meet
    if all words but the last agree and the last ones are less than N apart, which has a chance of
    2 N / 2^64. Over T steps that is N T^2 / 2^64, or 5e-10 for N = 1e4 and T = 1e3, where N T keys
    that are all hashed meet with a chance of (N T)^2 / 2^65, or 3e-6. All that it would do is give
    particles of two steps the same noise.
    """
    words = random.key_data(random.fold_in(key, 0))  # else `key(7)` and `key(8)` would overlap
    last = words[-1] + jnp.arange(count, dtype=words.dtype)
    columns = [*(jnp.broadcast_to(word, (count,)) for word in words[:-1]), last]
    return random.wrap_key_data(jnp.stack(columns, axis=-1), impl=random.key_impl(key))


# -- control flow ------------------------------------------------------------------------------


def switch(index: Any, branches: Sequence[Callable], *operands: Any) -> Any:
    """``branches[index](*operands)``."""
    if _paths() is None:
        return lax.switch(index, branches, *operands)
    # Choices of branches not taken are enumerated too; their probabilities sum to one.
    results = [branch(*operands) for branch in branches]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[index], *results)


def repeated(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``carry`` after ``body(i, carry)`` for i = 0, ..., count - 1."""
    if _paths() is None:
        return lax.fori_loop(0, count, body, carry)
    for i in range(count):
        carry = body(i, carry)
    return carry


def scanned(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, count: int) -> Any:
    """The carry after (carry, output) = ``body(carry, t)`` for t = 0, ..., count - 1; outputs."""
    if _paths() is None:
        return lax.scan(body, carry, jnp.arange(count))
    outputs = []
    for t in range(count):
        carry, output = body(carry, t)
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def over(function: Callable, *args: Any) -> Any:
    """``function`` on every row of the arguments, results stacked."""
    if _paths() is None:
        return jax.vmap(function)(*args)
    rows = jax.tree.leaves(args)[0].shape[0]
    results = [function(*jax.tree.map(lambda x, i=i: x[i], args)) for i in range(rows)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
