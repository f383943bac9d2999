"""Parts of a NumPyro model that are there only sometimes: `masked_plate` and `case`.

Both are ordinary contexts: the model's density has no term for what is not there. Kernels need a
law for inactive elements all the same, and theirs is N(0, 1) on the real space (uniform for finite
discrete ones), whatever the prior. Inactive elements then say nothing to the rest of the model: the
other choice, that they keep their own prior given their parents (Carlin and Chib 1995), leaves the
same posterior of k and of what is active, but lets a parent move only as far as its inactive
children follow (2.3 times the effective sample size of a parent of up to ten groups, under NUTS:
benchmarks/composition.py). Both laws are normalised, so that evidences are those of the model.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro
from numpyro.primitives import Messenger

from ppl_toolkit.errors import ModelError
from ppl_toolkit.layout import Mark

__all__ = ["case", "masked_plate"]


class masked_plate(numpyro.plate):
    """A plate with a variable number of elements, at most ``size``.

    ::

        k = numpyro.sample("k", dist.DiscreteUniform(1, 10))
        with masked_plate("component", 10, k) as active:
            centre = numpyro.sample("centre", dist.Normal(0, 5))
        ... jnp.where(active, centre, ...) ...

    The first k slots are active. What the model computes from the values of its sites must not
    depend on the inactive ones (`jnp.where(active, ...)`); results have NaN there.

    Args:
        name: of the plate.
        size: number of slots, a Python int.
        k: the value of an integer latent site outside of plates, whose values are known and at most
            ``size``.
        dim: the batch dimension, a negative int; the rightmost free one if None.
        order: how slots differ. None: not at all, as clusters; their joint law must be
            exchangeable. The name of one of the plate's sites: active slots are kept in increasing
            order of it, and the model may rely on that; the law is then the one the model
            describes, restricted to that order and multiplied by k!. "index": by their place, as
            the terms of nested regressions; only the last one can go.

    Returns:
        (by ``with``) which slots are active, bool (size,), with a trailing axis of length 1 for
        every batch dimension to the right of this one.

    Raises:
        ModelError: sizes that are no int.
    """

    def __new__(cls, *_: Any, **__: Any) -> masked_plate:
        # NumPyro's enumeration puts a maker of plain plates in the place of that of its own class.
        return object.__new__(cls)

    def __init__(
        self, name: str, size: int, k: Any, dim: int | None = None, order: str | None = None
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ModelError(f"masked_plate {name!r}: size must be an int >= 1; got {size!r}.")
        super().__init__(name, size, dim=dim)
        active = (jnp.arange(size) < k).reshape(size, *[1] * (-self.dim - 1))
        self._mark = Mark("masked_plate", name, size, k, active, self.dim, order or "")

    def __enter__(self) -> Any:
        super().__enter__()
        return self._mark.active

    def process_message(self, msg: dict) -> None:
        super().process_message(msg)
        if msg["type"] in ("sample", "deterministic"):
            self._mark.put(msg)


class case(Messenger):
    """Sites that are there only if another one has a certain value: the parts of a model.

    ::

        shape = numpyro.sample("shape", dist.Categorical(jnp.array([0.5, 0.5])))
        with case(shape, 0):
            slope = numpyro.sample("slope", dist.Normal(0, 1))
        with case(shape, 1):
            rate = numpyro.sample("rate", dist.HalfNormal(1))
        mean = jnp.where(shape == 0, slope * x, jnp.exp(-rate * x))

    Args:
        which: the value of an integer latent site.
        number: the value of it with which the sites inside are there.

    Returns:
        (by ``with``) whether they are there now, bool ().
    """

    def __init__(self, which: Any, number: int) -> None:
        super().__init__()
        active = jnp.asarray(which == number)
        self._mark = Mark("case", "", number, which, active, 0, "")

    def __enter__(self) -> Any:
        super().__enter__()
        return self._mark.active

    def process_message(self, msg: dict) -> None:
        if msg["type"] in ("sample", "deterministic"):
            self._mark.put(msg)
