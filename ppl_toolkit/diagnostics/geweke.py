"""Geweke's test: a sampler and a simulator of the data, in turns, must keep the joint law.

Draw parameters from the prior and data given them. Let the sampler move the parameters given the
data, and draw the data anew given the parameters; repeat. If the sampler leaves the posterior
invariant, parameters and data after any number of turns have the law they had at the start. Many
independent replications make the comparison paired, and free of autocorrelation times. The last
move of the sampler is judged with the data it was given: fresh data would hide a sampler that
overlooks some of them.

Source: Geweke (2004), Getting it right, Journal of the American Statistical Association 99.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from ppl_toolkit import results
from ppl_toolkit.arguments import with_data
from ppl_toolkit.diagnostics.simulation import (
    Quantities,
    Simulator,
    holm,
    quantity_names,
    rejected,
    seed_words,
    table,
    with_observed,
)
from ppl_toolkit.engine import Engine
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import as_method
from ppl_toolkit.program import Program
from ppl_toolkit.runner import Run

__all__ = ["Geweke", "geweke"]

_LEVEL = 1e-3


class Geweke(NamedTuple):
    """What Geweke's test found.

    Attributes:
        z: paired z-scores of the change of each function of parameters and data.
        p_values: two-sided, by function.
        adjusted: the same, corrected by Holm for their number.
        level: family level below which a function counts as changed.
        replications, transitions: independent pairs, and moves of the sampler in each.
        method: what was checked.
    """

    z: dict[str, float]
    p_values: dict[str, float]
    adjusted: dict[str, float]
    level: float
    replications: int
    transitions: int
    method: str

    @property
    def failed(self) -> list[str]:
        """Functions whose mean changed, the worst first."""
        return rejected(self.p_values, self.adjusted, self.level)

    @property
    def ok(self) -> bool:
        """Whether nothing changed; wrongly False with probability ``level`` at most."""
        return not self.failed

    def __str__(self) -> str:
        head = (
            f"{self.method}: {len(self.z)} functions, {self.replications} replications of "
            f"{self.transitions} transitions."
        )
        if self.ok:
            return f"{head}\nNothing contradicts invariance."
        lines = [
            f"  {name}: z = {self.z[name]:+.1f}, p = {self.adjusted[name]:.2g}"
            for name in self.failed
        ]
        return "\n".join([head, "Not invariant:", *lines])


def geweke(
    model: Callable,
    *args: Any,
    method: Any = "nuts",
    replications: int = 2000,
    transitions: int = 3,
    warmup: int = 500,
    quantities: Quantities | None = None,
    seed: int = 0,
    level: float = _LEVEL,
    precision: str = "float64",
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Geweke:
    """Check that one transition of a method leaves the posterior of a model invariant.

    The sampler's step size and metric are learned on one simulated data set and then fixed.
    First and second powers of every scalar of every site, the log likelihood and the log joint
    density are compared.

    Args:
        model, *args, **kwargs, quantities, precision, data: as in `calibrate`.
        method: a method whose states can be moved: "nuts", "hmc", or an object.
        replications: independent replications R.
        transitions: turns of sampler and simulator in each.
        warmup: iterations to learn step size and metric.
        seed, level: of the simulations; of the verdict.

    Raises:
        MethodError: the method's state cannot be moved, or the model cannot be simulated.

    Cost: R transitions + warm-up, one call of a compiled program for each turn.
    """
    for name, value in (("replications", replications), ("transitions", transitions)):
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a positive integer; got {value!r}.")
    seed = results.checked_seed(seed)
    program = Program(model, args, with_data(model, kwargs, data), precision=precision)
    chosen = as_method(method)
    chosen.check(program)
    if not hasattr(chosen, "moved"):
        raise MethodError(
            f"{type(chosen).__name__} draws independently: it has no transitions to check. Use "
            "calibrate."
        )
    simulator = Simulator.of(program, quantities)
    starts = simulator.joints(program, replications + 1, seed)
    engine = Engine(program, chosen, 1, jax.local_devices()[:1])
    engine.compile("advance", "init", "refresh")
    learned = _learned(program, engine, starts.pop(), seed, warmup)
    words = seed_words(seed)

    def work(index: int) -> Any:
        start = starts[index]
        position, new = start["position"][None], with_observed(program, start["observed"])
        with program.context():
            unit = Run(engine, 1, seed, engine.settings, 1).units[0]
            for turn in range(transitions):
                unit.use(new)
                unit.restore(chosen.moved(learned, position))
                unit.refresh()
                number = index * transitions + turn
                unit.advance(number, 1, collect=False)
                position = chosen.position(unit.host_state())
                if turn < transitions - 1:
                    index_of_data = np.uint32(replications + 1 + number)
                    drawn = simulator.redraw(words, index_of_data, position[0], new)
                    new = with_observed(program, drawn, new)
            return jax.tree.map(np.asarray, simulator.at(position[0], new))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ends = list(pool.map(work, range(replications)))
    names = quantity_names(program, starts[0]["quantities"])
    before = np.concatenate([table(start["quantities"], 1) for start in starts])
    after = np.concatenate([table(end, 1) for end in ends])
    return _verdict(names, before, after, level, transitions, repr(chosen))


def _learned(
    program: Program, engine: Engine, start: Mapping[str, Any], seed: int, warmup: int
) -> Any:
    """A state with the step size and metric learned on one simulated data set."""
    with program.context():
        settings = engine.method.settings(program, warmup)
        unit = Run(engine, 1, seed, settings, 1).units[0]
        unit.use(with_observed(program, start["observed"]))
        unit.init(np.zeros((1, program.size), program.precision), np.zeros(1, bool))
        unit.warm(warmup)
        return unit.host_state()


def _verdict(
    names: list[str],
    before: np.ndarray,
    after: np.ndarray,
    level: float,
    transitions: int,
    method: str,
) -> Geweke:
    """Paired z-tests of first and second powers, in units of the start's spread."""
    centre, scale = before.mean(axis=0), before.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    first, last = (before - centre) / scale, (after - centre) / scale
    z = {}
    for power, suffix in ((1, ""), (2, "^2")):
        change = last**power - first**power
        spread = change.std(axis=0, ddof=1)
        moved = spread > 0
        scores = change.mean(axis=0) / np.where(moved, spread, 1.0) * np.sqrt(len(change))
        z.update(
            {
                name + suffix: float(score)
                for name, score, flag in zip(names, scores, moved, strict=True)
                if flag
            }
        )
    p = {name: float(2 * stats.norm.sf(abs(score))) for name, score in z.items()}
    return Geweke(z, p, holm(p), level, len(before), transitions, method)
