"""Particle filters that go on when new data come, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit.arguments import Arguments
from ppl_toolkit.errors import DataError, MethodError, PPLError
from ppl_toolkit.executables import evaluate_once, kept
from ppl_toolkit.inference.filtering import ParticleFilter, summaries
from ppl_toolkit.inference.paris import expectation
from ppl_toolkit.inference.particle_filter import first_population
from ppl_toolkit.inference.population import Population, relative_variance
from ppl_toolkit.inference.randomness import over
from ppl_toolkit.inference.state_space import Series, state_space
from ppl_toolkit.positions import start_position
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import label

__all__ = ["OnlineFilter", "OnlineState"]


class OnlineState(NamedTuple):
    """A filter after some steps: arrays, that may be pickled.

    Attributes:
        time: number of steps so far.
        population: the particles' carries, log weights, and log p(y) so far.
        summaries: mean, sd and quantiles (5, 25, 50, 75, 95%) of the last step's latents.
        ess: effective sample size before the last step's resampling.
        smoothed: expectations of the functional's sums so far given the data so far, by name.
        log_evidence_sd: standard deviation of the estimate of log p(y), from the lineages.
        sums: the functional's sums given each particle, arrays (N, ...).
        eves: the first ancestor of each particle, (N,).
        resamplings: how often particles were resampled.
        words: of the random key.
    """

    time: Any
    population: Population
    summaries: dict[str, dict[str, Any]]
    ess: Any
    smoothed: dict[str, Any]
    log_evidence_sd: Any
    sums: dict[str, Any]
    eves: Any
    resamplings: Any
    words: Any

    @property
    def log_evidence(self) -> float:
        """Log p(y) so far."""
        return float(self.population.log_evidence)


class OnlineFilter:
    """A particle filter of a model with a `scan`, that goes on with new data.

    Each call takes what the model itself takes, for the new steps alone::

        online = OnlineFilter(model, y[:100], method=ParticleFilter(1000, given={"phi": 0.9}))
        state = online.start(seed=0)           # the first 100 steps
        state = online.update(state, y[100])   # one more
        state.summaries["x"]["mean"], state.log_evidence

    The series must be the arguments whose first axis has the length of the scan, and a step must
    see nothing of them but its own entries; both is checked on the first block.

    Args:
        model, *args, **kwargs: a model and its arguments for the first three or more steps.
        method: options of the filter, and the parameters' values; its paths are not drawn.
        precision: "float64" or "float32".

    Raises:
        MethodError: particles cannot follow the model, or not block by block; says why.

    Cost: as `ParticleFilter`, a step; memory O(N), whatever the number of steps. A new length of
    block compiles once.
    """

    def __init__(
        self,
        model: Callable,
        *args: Any,
        method: ParticleFilter | None = None,
        precision: str = "float64",
        **kwargs: Any,
    ) -> None:
        self.program = Program(model, args, kwargs, precision=precision)
        method = ParticleFilter() if method is None else method
        method.check(self.program)
        self.method = method.on(self.program)
        self._given = self.method.settings(self.program, 0).given
        self._blocks: dict[Any, Callable] = {}
        assert self.method.space is not None
        length = self.method.space.length
        arguments = self.program.arguments
        self._series = [x.ndim > 0 and x.shape[0] == length for x in arguments.arrays]
        _require_blocks(self.program, self._series, length)

    def start(self, seed: int = 0) -> OnlineState:
        """The filter after the first block."""
        words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
        with self.program.context():
            begin = kept(
                lambda words, given, data: self._begun(self.program, words, given, data),
                words, self._given, self.program.data,
            )  # fmt: skip
            state = begin(words, self._given, self.program.data)
        return self._alive(state)

    def update(self, state: OnlineState, *args: Any, **kwargs: Any) -> OnlineState:
        """The filter after further steps.

        Args:
            state: as returned by `start` or `update`; it stays as it is.
            *args, **kwargs: the model's arguments for the new steps. A single step's entries may
                lack the axis of time.

        Raises:
            DataError: they are not those of the first block for other steps, they are not finite,
                or no particle can explain them.
        """
        model, precision = self.program.model, self.program.precision
        arrays = list(Arguments.of(model, args, kwargs, precision).arrays)
        first = self.program.arguments
        if len(arrays) != len(first.arrays):
            raise DataError(
                f"update takes the arguments of {label(model)} for the new steps, "
                f"{list(first.names)}; got {len(arrays)} arrays."
            )
        for i, (name, like, timed) in enumerate(
            zip(first.names, first.arrays, self._series, strict=True)
        ):
            if timed and arrays[i].ndim == like.ndim - 1:
                arrays[i] = arrays[i][None]
            want, have = (x.shape[1:] if timed else x.shape for x in (like, arrays[i]))
            if want != have or arrays[i].dtype != like.dtype:
                raise DataError(
                    f"argument {name} has shape {arrays[i].shape} and type {arrays[i].dtype}; the "
                    f"first block had {like.shape} and {like.dtype}."
                )
            if not np.isfinite(arrays[i]).all():
                raise DataError(
                    f"argument {name} has non-finite values. For steps without an observation, "
                    "mask them in the model: numpyro.handlers.mask(mask=seen)."
                )
        shapes = tuple(x.shape for x in arrays)
        with self.program.context():
            if shapes not in self._blocks:
                self._blocks[shapes] = self._compiled(arrays, state)
            new = self._blocks[shapes](state, self._given, tuple(arrays))
        return self._alive(new)

    def _compiled(self, arrays: Sequence[Any], state: OnlineState) -> Callable:
        program = _of_block(self.program, arrays)
        return kept(
            lambda state, given, data: self._further(program, state, given, data),
            state, self._given, program.data,
        )  # fmt: skip

    def _at(self, program: Program, given: Any, data: Any) -> Series:
        assert self.method.space is not None
        return self.method.space.given(program, given, data)

    def _begun(self, program: Program, words: Any, given: Any, data: Any) -> OnlineState:
        series, method = self._at(program, given, data), self.method
        key = random.fold_in(random.wrap_key_data(words), 0)
        first, initial = first_population(key, series, method.particles)
        sums = method.run.first_sums(series, initial)
        zero = jnp.zeros((), jnp.int32)
        like = jax.eval_shape(
            lambda: summaries(first, over(lambda k, c: series.step(k, c, 0).latents,
                                           random.split(key, method.particles), first.particles))
        )  # fmt: skip
        state = OnlineState(
            zero, first, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like),
            jnp.zeros((), jnp.result_type(float)), expectation(first, sums),
            jnp.zeros((), jnp.result_type(float)), sums,
            jnp.arange(method.particles, dtype=jnp.int32), zero, words,
        )  # fmt: skip
        return self._moved(series, state)

    def _further(self, program: Program, state: OnlineState, given: Any, data: Any) -> OnlineState:
        return self._moved(self._at(program, given, data), state)

    def _moved(self, series: Series, state: OnlineState) -> OnlineState:
        """After all steps of a series."""
        run, root = self.method.run, random.wrap_key_data(state.words)

        def step(t: Any, old: OnlineState) -> OnlineState:
            key = random.fold_in(root, old.time + 1)
            new = run.moved(key, series, old.population, old.sums, t)
            count = old.resamplings + run.options.due(new.ess).astype(jnp.int32)
            eves = old.eves[new.history.ancestors]
            variance = relative_variance(new.population.log_weights, eves, count)
            return OnlineState(
                old.time + 1, new.population, new.summaries, new.ess,
                expectation(new.population, new.sums), jnp.sqrt(jnp.maximum(variance, 0.0)),
                new.sums, eves, count, old.words,
            )  # fmt: skip

        return jax.lax.fori_loop(0, series.length, step, state)

    def _alive(self, state: OnlineState) -> OnlineState:
        state = jax.tree.map(np.asarray, state)
        if not np.isfinite(state.population.log_evidence):
            raise DataError(f"by step {int(state.time)} {ParticleFilter.failure}")
        return state


def _of_block(program: Program, arrays: Sequence[Any]) -> Program:
    """The program of other steps.

    Raises:
        MethodError: its scan has another length than the new data.
    """
    args, kwargs = program.arguments.rebuild(arrays)
    return Program(program.model, args, kwargs, precision=program.precision)


def _require_blocks(program: Program, timed: Sequence[bool], length: int) -> None:
    """Refuse models whose steps see more of the series than their own entries.

    Raises:
        MethodError: says what differs.
    """
    name = label(program.model)
    if length < 3:
        raise MethodError("give OnlineFilter the data of the first three or more steps.")
    if not any(timed):
        raise MethodError(
            f"no argument of {name} has as many entries as its scan has steps ({length}), so that "
            "new steps could not be told. Pass the series as arrays, to be scanned over as xs."
        )
    later = [x[1:3] if own else x for x, own in zip(program.data, timed, strict=True)]
    try:
        block = _of_block(program, later)
        space = state_space(block)
    except PPLError as error:
        raise MethodError(
            f"{name} cannot be run on two steps of its data alone: {error} The length of the scan "
            "must be that of the arrays it runs over."
        ) from None
    if space.length != 2:
        raise MethodError(
            f"the scan of {name} has {space.length} steps where its data have two: its length must "
            "be that of the arrays it runs over."
        )
    whole = state_space(program)

    def steps(words: Any, data: Any, part: Any) -> Any:
        """The second step: of the whole, and as the first of another block."""
        key = random.wrap_key_data(words)
        position = start_position(program, key, data)
        one, other = whole.at(program, position, data), space.at(block, position, part)
        if one.scan.reverse:
            raise MethodError(f"the scan of {name} runs backwards: nothing can be added to it.")
        carry = one.step(key, one.start(key).carry, 0).carry
        return (one.x(1), one.step(key, carry, 1)), (other.x(0), other.step(key, carry, 0))

    with program.context():
        found = evaluate_once(steps, np.zeros(2, np.uint32), program.data, block.data)
    (x, step), (other_x, other_step) = jax.tree.map(np.asarray, found)
    if not _same(x, other_x):
        raise MethodError(
            f"what the scan of {name} runs over is not cut like its arguments (a counter, or a "
            "transform of the whole series?). Pass it as an argument, or count in the carry."
        )
    if not _same(step, other_step):
        raise MethodError(
            f"a step of {name} sees more of its data than the scan hands to it; hand it all that "
            "it needs as xs."
        )


def _same(one: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.allclose(a, b, 1e-6, 1e-9, equal_nan=True) for a, b in leaves)
