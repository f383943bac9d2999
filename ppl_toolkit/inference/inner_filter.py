"""Particle filters inside other samplers: functions of a program that can be run again.

All the randomness of such a filter is in the *words* it was given, those of one key for the start
and one for every step, (T + 1, 2). A filter can so be carried on step by step, or be run again from
its words, which are far fewer than its particles: nothing of its history need be kept to draw a
path from it later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit import positions
from ppl_toolkit.inference.paris import genealogy
from ppl_toolkit.inference.particle_filter import (
    Filter,
    History,
    advance,
    first_population,
    take,
)
from ppl_toolkit.inference.population import Population
from ppl_toolkit.inference.randomness import repeated, scanned, shapes_of
from ppl_toolkit.inference.state_space import Series, StateSpace
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program

__all__ = ["InnerFilter", "drawn_path", "fresh_words"]

_WORDS = jax.ShapeDtypeStruct((2,), np.uint32)


def fresh_words(key: Any, count: int) -> Any:
    """Words of ``count`` new keys, (count, 2)."""
    return random.key_data(random.split(key, count))


def drawn_path(
    key: Any,
    space: StateSpace,
    program: Program,
    position: Position,
    data: Sequence[Any],
    series: Series,
    initial: Any,
    history: History,
    log_weights: Any,
) -> dict[str, Any]:
    """One path of a filter along its ancestors: a position of the latents and the initial sites.

    Args:
        position: of all latent sites; those of the path may have any values.
        series, initial, history, log_weights: see `genealogy`.
    """
    first, latents = genealogy(key, series, initial, history, log_weights, 1)
    values = positions.own_values(program, position, data)
    own = {**values, **take(first, 0), **{name: x[:, 0] for name, x in latents.items()}}
    moved = positions.position_of(program, own, data)
    return {name: moved[name] for name in (*space.initial, *space.latents)}


@dataclasses.dataclass(frozen=True)
class _Part:
    """A function of a program whose series is filtered."""

    space: StateSpace
    options: Filter

    def _static(self, program: Program) -> dict[str, Any]:
        shapes = positions.shapes(program)
        return {name: shapes[name] for name in self.space.static}

    def _population(self, program: Program) -> Any:
        with program.context():
            return jax.eval_shape(
                lambda *given: _Start(self.space, self.options)(program, given, program.data)[1],
                self._static(program),
                _WORDS,
            )


class _Start(_Part):
    """(static position, words) -> its log prior, and the particles at the start."""

    def example(self, program: Program) -> Any:
        return self._static(program), _WORDS

    def __call__(
        self, program: Program, given: tuple[Position, Any], data: Sequence[Any]
    ) -> tuple[Any, Population]:
        position, words = given
        series = self.space.at(program, position, data)
        first, _ = first_population(random.wrap_key_data(words), series, self.options.particles)

        def after(population: Population) -> Population:
            return advance(random.wrap_key_data(words), series, population, 0, self.options)[0]

        later = shapes_of(after, first)  # the types that the steps keep
        first = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), first, later)
        return jnp.asarray(series.log_prior, jnp.result_type(float)), first


class _Step(_Part):
    """(static position, particles, words, t) -> the particles after step t of 0, ..., T - 1."""

    def example(self, program: Program) -> Any:
        time = jax.ShapeDtypeStruct((), np.int32)
        return self._static(program), self._population(program), _WORDS, time

    def __call__(
        self, program: Program, given: tuple[Position, Population, Any, Any], data: Sequence[Any]
    ) -> Population:
        position, population, words, t = given
        series = self.space.at(program, position, data)
        return advance(random.wrap_key_data(words), series, population, t, self.options)[0]


class _Path(_Part):
    """(static position, words (T + 1, 2), words) -> log Z_hat and a whole position: its path."""

    def example(self, program: Program) -> Any:
        every = jax.ShapeDtypeStruct((self.space.length + 1, 2), np.uint32)
        return self._static(program), every, _WORDS

    def __call__(
        self, program: Program, given: tuple[Position, Any, Any], data: Sequence[Any]
    ) -> tuple[Any, dict[str, Any]]:
        position, words, words_path = given
        series = self.space.at(program, position, data)
        keys = random.wrap_key_data(words)
        first, initial = first_population(keys[0], series, self.options.particles)

        def step(population: Population, t: Any) -> tuple[Population, History]:
            new, history, _ = advance(keys[t + 1], series, population, t, self.options)
            return new, history

        last, history = scanned(step, first, series.length)
        anywhere = {n: jnp.zeros(s.shape, s.dtype) for n, s in positions.shapes(program).items()}
        path = drawn_path(
            random.wrap_key_data(words_path), self.space, program, {**anywhere, **position}, data,
            series, initial, history, last.log_weights,
        )  # fmt: skip
        return last.log_evidence, {**position, **path}


@dataclasses.dataclass(frozen=True)
class InnerFilter:
    """A filter of a program, for many positions of its static sites.

    Args:
        space: the time axis of the program.
        options: of the filter.
    """

    space: StateSpace
    options: Filter

    @property
    def functions(self) -> tuple[Any, Any, Any]:
        """What it needs of the program, see `Program.traced`."""
        own = self.space, self.options
        return _Start(*own), _Step(*own), _Path(*own)

    def start(self, target: Any, position: Position, words: Any) -> tuple[Any, Population]:
        """Log prior of a static position, and the particles at the start."""
        return target.functions[self.functions[0]]((dict(position), words))

    def step(self, target: Any, position: Position, cloud: Population, words: Any, t: Any) -> Any:
        """The particles after one more step."""
        return target.functions[self.functions[1]]((dict(position), cloud, words, t))

    def run(self, target: Any, position: Position, words: Any, end: Any) -> tuple[Any, Population]:
        """Log prior, and the particles after ``end`` steps: O(N end), whatever T is.

        Args:
            words: (T + 1, 2), of which the first ``end`` + 1 count.
        """
        log_prior, first = self.start(target, position, words[0])

        def step(t: Any, cloud: Population) -> Population:
            return self.step(target, position, cloud, words[t + 1], t)

        return log_prior, repeated(end, step, first)

    def path(
        self, target: Any, position: Mapping[str, Any], words: Any, key: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The estimate log Z_hat, and a position of all sites with a path of this very filter.

        Cost: O(N T) time, and memory for one filter's history.
        """
        return target.functions[self.functions[2]]((dict(position), words, random.key_data(key)))
