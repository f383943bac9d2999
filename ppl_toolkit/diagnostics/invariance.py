"""Does a kernel leave the posterior invariant? A test by exact joint draws.

Parameters from the prior and data given them are an exact draw from the joint law, so that
parameters are an exact draw from the posterior given the data. After some steps of a kernel that
leaves this posterior invariant they still are. Every quantity h of parameters and data then has
E[h(after)] = E[h(before)], which is tested on the same replications: what a kernel does wrong shows
against the small differences it makes, not against the spread of the prior.

In Geweke's form the data are drawn anew given the parameters, and the kernel steps again, in turns:
the joint law must still hold at the end, and small mistakes add up from turn to turn.

Source: Geweke (2004), JASA 99, for the joint law and the turns; Gandy and Scott (2020) for
replications.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import stats

from ppl_toolkit import executables, positions
from ppl_toolkit.diagnostics.simulation import require_simulable, seed_words, with_observed
from ppl_toolkit.inference.adaptation import schedule
from ppl_toolkit.inference.kernel import SAMPLING, Stage
from ppl_toolkit.inference.target import Target
from ppl_toolkit.program import Program

__all__ = ["Invariance", "invariance"]

_REFERENCE = 500  # replications that only fix the scale of the quantities
_WARMUP = 300  # steps that tune the kernel, on one data set
_BATCH = 250
_PILOT = 2**31  # its number among the joint draws
_LEAST_MOVED = 20  # replications in which a quantity changed
_LIKELIHOOD, _PRIOR = "log likelihood", "log prior"


class Invariance(NamedTuple):
    """The outcome of a test of invariance.

    Attributes:
        p_values: by quantity; the location and the spread of each are tested.
        shift: mean change of a quantity's location by quantity, in standard errors.
        moved: share of the replications in which anything changed.
        replications, steps: how many were made, with how many steps of the kernel each.
        turns: of steps and new data.
    """

    p_values: dict[str, float]
    shift: dict[str, float]
    moved: float
    replications: int
    steps: int
    turns: int = 1

    def __str__(self) -> str:
        turns = f"{self.turns} turns of " if self.turns > 1 else ""
        return (
            f"{self.replications:,} replications of {turns}{self.steps} steps, of which "
            f"{self.moved:.0%} moved"
        )


def invariance(
    program: Program, spec: Any, replications: int, steps: int, seed: int, turns: int = 1
) -> list[Invariance]:
    """Test a kernel on a program.

    Args:
        program: whose observed arrays give the shapes of simulated data.
        spec: the kernel; parts that adapt are tuned on one data set, then fixed.
        replications: joint draws R, beside 500 that fix the scales.
        steps: of the kernel on every one.
        seed: of everything.
        turns: of steps and new data. The last steps are judged with the data they were given:
            fresh data would hide a kernel that overlooks some of them.

    Returns:
        The test after the first turn, and, if there are more, that after the last. p-values are for
        every scalar of every latent site (unconstrained), the log prior and the log likelihood.

    Raises:
        MethodError, DataError: no joint draws can be made of the program.

    Cost: R + 500 times ``turns * steps`` steps, in one compiled program.
    """
    require_simulable(program, summed_out=False)
    before, *later = _replicated(program, spec, replications + _REFERENCE, steps, seed, turns)
    return [
        _compared(before, after, steps, turn)
        for turn, after in zip((1, turns), later, strict=False)
    ]


def _compared(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], steps: int, turns: int
) -> Invariance:
    p_values: dict[str, float] = {}
    shift: dict[str, float] = {}
    changed: Any = False
    for name in before:
        reference = np.sort(before[name][:_REFERENCE])
        old, new = before[name][_REFERENCE:], after[name][_REFERENCE:]
        changed = changed | (old != new)
        for suffix, function in (("", _location), (" (spread)", _spread)):
            difference = function(new, reference) - function(old, reference)
            z = _standardised(difference)
            if z is not None:
                p_values[name + suffix] = float(2 * stats.t.sf(abs(z), len(difference) - 1))
                shift[name + suffix] = z
    moved = float(np.mean(changed))
    return Invariance(p_values, shift, moved, len(changed), steps, turns)


def _location(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Where values lie among the reference, in [0, 1]: bounded, so that means are normal."""
    right = np.searchsorted(reference, values, "right")
    return (np.searchsorted(reference, values) + right) / (2.0 * len(reference))


def _spread(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return (2.0 * _location(values, reference) - 1.0) ** 2


def _standardised(difference: np.ndarray) -> float | None:
    """The mean in standard errors; None where too little changed to say anything."""
    if np.count_nonzero(difference) < _LEAST_MOVED:
        return None
    return float(difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference))))


def _replicated(
    program: Program, spec: Any, count: int, steps: int, seed: int, turns: int
) -> list[dict[str, np.ndarray]]:
    """Quantities of every replication before the steps, after them, and after the last turn."""

    def redrawn(key: Any, position: Any, data: Sequence[Any]) -> tuple[Any, ...]:
        """The data with simulated observations."""
        values = positions.values_at(program, position, data)
        latent = {site.name: values[site.name] for site in program.latent}
        drawn = program.predict(key, latent, data)
        observed = {site.name: drawn[site.name] for site in program.observed}
        return tuple(map(jnp.asarray, with_observed(program, observed, data)))

    def joint(key: Any, data: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
        """A position from the prior, and data given it."""
        key_prior, key_data = jax.random.split(key)
        position = positions.prior_position(program, key_prior, data)
        return position, redrawn(key_data, position, data)

    def quantities(position: Any, data: Sequence[Any]) -> dict[str, Any]:
        prior, likelihood = positions.log_parts(program, position, data)
        return {**position, _PRIOR: prior, _LIKELIHOOD: likelihood}

    def pilot(words: Any, data: Sequence[Any]) -> Any:
        """The kernel's state after warm-up on one data set."""
        key = jax.random.fold_in(jax.random.wrap_key_data(words), _PILOT)
        position, data = joint(key, data)
        target = Target.of_program(program, data, position, spec.functions)
        plan = schedule(_WARMUP)

        def step(i: Any, state: Any) -> Any:
            kernel = spec.bind(target, Stage(i, plan))
            return kernel.step(jax.random.fold_in(key, i), state)[0]

        first = spec.bind(target, Stage(jnp.zeros((), jnp.int32), plan)).init(position, key)
        return lax.fori_loop(0, _WARMUP, step, first)

    def stepped(key: Any, tuned: Any, position: Any, data: Sequence[Any]) -> Any:
        """The position after the steps."""
        kernel = spec.bind(Target.of_program(program, data, position, spec.functions), SAMPLING)
        state = lax.fori_loop(
            0,
            steps,
            lambda i, s: kernel.step(jax.random.fold_in(key, i), s)[0],
            kernel.refresh(tuned, position) if spec.adapts else kernel.init(position, key),
        )
        return dict(state.position)

    def batch(words: Any, tuned: Any, first: Any, data: Sequence[Any]) -> Any:
        def one(index: Any) -> tuple[Any, ...]:
            key = jax.random.fold_in(jax.random.wrap_key_data(words), index)
            key, key_steps = jax.random.split(key)
            position, new_data = joint(key, data)
            start = quantities(position, new_data)
            if turns == 1:
                moved = stepped(key_steps, tuned, position, new_data)
                return start, quantities(moved, new_data)

            def turn(i: Any, carry: tuple) -> tuple:
                position, data, early, _ = carry
                key_data, key_turn = jax.random.split(jax.random.fold_in(key_steps, i))
                fresh = redrawn(key_data, position, data)
                data = jax.tree.map(lambda old, new: jnp.where(i == 0, old, new), data, fresh)
                position = stepped(key_turn, tuned, position, data)
                found = quantities(position, data)
                early = jax.tree.map(lambda old, new: jnp.where(i == 0, new, old), early, found)
                return position, data, early, found

            *_, early, late = lax.fori_loop(
                0, turns, turn, (dict(position), new_data, start, start)
            )
            return start, early, late

        return jax.vmap(one)(first + jnp.arange(_BATCH))

    with program.context():
        words = seed_words(seed)
        tuned = executables.evaluate_once(pilot, words, program.data) if spec.adapts else ()
        run = executables.kept(batch, words, tuned, np.int32(0), program.data, quick=True)

        def part(first: int) -> Any:
            with program.context():
                found = run(words, tuned, np.int32(first), program.data)
                return jax.tree.map(np.asarray, found)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            parts = list(pool.map(part, range(0, count, _BATCH)))
    joined = jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)
    return [_by_scalar(program, quantities) for quantities in joined]


def _by_scalar(program: Program, quantities: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Quantities as (replication,) arrays by scalar."""
    found = {}
    for name, values in quantities.items():
        for index in np.ndindex(*values.shape[1:]):
            label = name + (f"[{', '.join(map(str, index))}]" if index else "")
            found[label] = np.asarray(values[(slice(None), *index)], float)
    return found
