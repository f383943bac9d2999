"""JAX's random bits at a lower price on CPUs: Threefry-2x32 with its rounds written out.

On CPUs JAX rolls the rounds into a loop, whose every turn computes both words anew and goes through
memory. Written out they are one pass over the data.
Source: Salmon, Moraes, Dror and Shaw (2011), Parallel random numbers: as easy as 1, 2, 3.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.extend.random import define_prng_impl

__all__ = ["serves", "written_out"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_OWN = "threefry2x32"


def _rotated(x: Any, by: int) -> Any:
    return (x << np.uint32(by)) | (x >> np.uint32(32 - by))


def _hashed(first: Any, second: Any, high: Any, low: Any) -> tuple[Any, Any]:
    """Two words of 32 bits for the counter (high, low) under the key (first, second)."""
    keys = (first, second, first ^ second ^ _PARITY)
    x, y = high + keys[0], low + keys[1]
    for turn in range(5):
        for by in _ROTATIONS[turn % 2]:
            x = x + y
            y = x ^ _rotated(y, by)
        x = x + keys[(turn + 1) % 3]
        y = y + keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return x, y


def _bits(key: Any, width: int, shape: tuple[int, ...]) -> Any:
    """Words of ``width`` bits, as `jax.random.bits` gives them."""
    size = math.prod(shape)
    if size >= 2**32:
        return random.bits(random.wrap_key_data(key, impl=_OWN), shape, f"uint{width}")
    low = lax.iota(np.uint32, size).reshape(shape)
    x, y = _hashed(key[0], key[1], jnp.zeros_like(low), low)
    if width == 64:
        words = (x.astype(np.uint64) << np.uint64(32)) | y.astype(np.uint64)
    else:
        words = (x ^ y).astype(f"uint{width}")
    return lax.optimization_barrier(words)  # else XLA hashes again wherever they are used


_WRITTEN_OUT = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: random.key_data(random.key(seed, impl=_OWN)),
    split=lambda key, shape: random.key_data(
        random.split(random.wrap_key_data(key, impl=_OWN), shape)
    ),
    random_bits=_bits,
    fold_in=lambda key, data: random.key_data(
        random.fold_in(random.wrap_key_data(key, impl=_OWN), data)
    ),
    name="threefry2x32_written_out",
    tag="3fw",
)


def serves(key: Any) -> bool:
    """Whether this is a key of JAX's Threefry."""
    return str(random.key_impl(key)) == _OWN


def written_out(words: Any) -> Any:
    """Keys (...) whose bits are those of JAX's Threefry keys with the same words, (..., 2)."""
    return random.wrap_key_data(words, impl=_WRITTEN_OUT)
