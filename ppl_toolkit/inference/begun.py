"""Where chains of particle methods begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax, random

from ppl_toolkit import positions
from ppl_toolkit.inference.inner_filter import drawn_path
from ppl_toolkit.inference.particle_filter import Filter, follow, take
from ppl_toolkit.inference.state_space import StateSpace
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import key_shape

__all__ = ["Begun"]

_TRIED = 16  # draws from the prior


@dataclasses.dataclass(frozen=True)
class Begun:
    """(position, key) -> where a chain begins: a function of a program.

    Of 16 draws of the parameters from their prior one is taken by the evidence that a filter
    estimates for it, and with it a path of that filter; where all filters fail, the position stays.

    Attributes:
        space: the time axis of the program.
        options: of the filter.
        held: parameters that stay as they are.

    Cost: 16 filters, one after the other (one, if no parameter is free).
    """

    space: StateSpace
    options: Filter
    held: tuple[str, ...] = ()

    def example(self, program: Program) -> Any:
        return positions.shapes(program), key_shape()

    def __call__(self, program: Program, given: tuple[Position, Any], data: Sequence[Any]) -> Any:
        old, key = given
        free = set(self.space.static) - set(self.held)

        def one(key: Any) -> tuple[Any, Any]:
            key_prior, key_filter, key_path = random.split(key, 3)
            drawn = positions.start_position(program, key_prior, data)
            position = {n: drawn[n] if n in free else x for n, x in old.items()}
            series = self.space.at(program, position, data)
            last, initial, history = follow(key_filter, series, self.options, lambda _, h, __: h)
            path = drawn_path(
                key_path, self.space, program, position, data, series, initial, history,
                last.log_weights,
            )  # fmt: skip
            return {**position, **path}, last.log_evidence

        begun, logs = lax.map(one, random.split(key, _TRIED if free else 1))
        weights = jnp.where(jnp.isnan(logs), -jnp.inf, logs)
        chosen = take(begun, random.categorical(random.fold_in(key, _TRIED), weights))
        alive = jnp.isfinite(jnp.max(weights))
        return {n: jnp.where(alive, chosen[n], x) for n, x in old.items()}
