"""Warm-up of gradient samplers by segments, between which all chains are pooled (NumPy).

In a segment every chain adapts its own step size to one metric. At the end the chains share what
they drew: the next metric comes from all of their draws and gradients, chosen by how well it suits
draws that it was not made of. Warm-up is over once the metric in use is nearly as good as the best
there is, and the chains agree; a last stretch then settles one step size for all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from ppl_toolkit import convergence
from ppl_toolkit.inference import scaling
from ppl_toolkit.inference.adaptation import DualAveraging

__all__ = [
    "EARLY",
    "METRIC",
    "OVER",
    "STEP",
    "TRIAL",
    "Drawn",
    "Plan",
    "next_metric",
    "pooled",
    "restarted",
    "spread",
    "step_size",
    "unstuck",
]

METRIC, STEP, TRIAL, OVER = range(4)  # what is learned: the metric, the step size; it is tried
EARLY = 25  # iterations in which trajectories are kept short
_FIRST, _GROWTH = 10, 2.0
_LAST = 100  # iterations for the step size: a quarter to find it, the others to try it
_LEAST_WARMUP = 20
_WORSE = 1.25  # a metric is good enough if no candidate is better by more than this factor
_LEAST_ESS = 100.0
_MOST_R_HAT = 1.1
_BOLDEST = 1.5  # times the step size of dual averaging, which errs towards short steps
_SETTLED = 0.1  # a log step size that falls by less in its trial is tried no more
_CALM, _ROUGH = 3.0, 10.0  # energy errors; the larger has probability exp(-10) under the target
_MOST_ROUGH, _TAIL = 0.01, 8.0  # share of trajectories with such errors; its growth with the step
_REFUSED = 0.25  # of what the target leaves refused, at least, for the sake of rough places
_STUCK = 20.0  # by which the log probability of a place is less where a chain has not arrived


class Plan(NamedTuple):
    """The longest course of a warm-up.

    Attributes:
        ends: iterations after which the metric is renewed; empty if there are too few.
        last: how many of the iterations are for the step size.
    """

    ends: tuple[int, ...]
    last: int

    @classmethod
    def of(cls, warmup: int) -> Plan:
        if warmup < _LEAST_WARMUP:
            return cls((), warmup)
        last = min(_LAST, int(np.ceil(0.3 * warmup)))
        ends, width, end = [0, _FIRST], _FIRST, warmup - last
        while 2 * (end - ends[-1]) > 3 * (width := int(_GROWTH * width)):
            ends.append(ends[-1] + width)
        ends.append(end)
        if ends[-1] - ends[-2] < ends[-2] - ends[-3]:  # the last two share what is left
            ends[-2] = (ends[-3] + ends[-1]) // 2
        return cls(tuple(ends[1:]), last)

    @property
    def first(self) -> tuple[int, int]:
        """What is learned first, and until when."""
        if self.ends:
            return METRIC, self.ends[0]
        return (STEP, self.last) if self.last else (OVER, 0)


class Drawn(NamedTuple):
    """What all chains drew in a segment, (chain, iteration, ...)."""

    positions: Float[np.ndarray, "C N D"]
    gradients: Float[np.ndarray, "C N D"]
    stats: dict[str, np.ndarray]

    def folds(self, together: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
        """Two halves of the draws, of different chains if there are several; every part centred.

        By its chain's mean, or ``together``: by that of all chains of a half. The latter tells how
        far apart chains are, however short they are.
        """
        both = np.stack([self.positions, self.gradients])
        if len(self.positions) == 1:
            parts = np.array_split(both, 2, axis=2)
        else:
            parts = np.array_split(both, 2, axis=1)
        axes = (1, 2) if together else 2
        centred = [part - part.mean(axes, keepdims=True) for part in parts]
        return [tuple(x.reshape(-1, x.shape[-1]) for x in part) for part in centred]


def step_size(log_steps: np.ndarray, acceptance: np.ndarray, target: float) -> float:
    """The log step size with this mean acceptance, from transitions with various step sizes.

    By the law of energy errors of many dimensions: a = 2 Phi(-c eps^2), with the c for which the
    acceptances are right on average (Beskos et al. 2013).
    """
    low, high = -60.0, 60.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        expected = 2.0 * ndtr(-np.exp(np.clip(middle + 2.0 * log_steps, -50.0, 50.0)))
        low, high = (low, middle) if np.sum(acceptance - expected) > 0.0 else (middle, high)
    return _log_response(target) - 0.25 * (low + high)


def pooled(
    kind: str, target: float, state: Any, drawn: Any, stats: dict[str, np.ndarray], index: int,
    warmup: int,
) -> Any:  # fmt: skip
    """The states of all chains after a segment of warm-up that ends before iteration ``index``.

    Args:
        kind: type of the metric, see `scaling.best`.
        target: acceptance that the step size is to have.
        state: of all chains, arrays with a leading chain axis; see `HMCState`.
        drawn: positions and gradients (chain, iteration, D).
        stats: of the segment's transitions.
        index: number of iterations done.
        warmup: how many there are at most.
    """
    plan, segment = Plan.of(warmup), Drawn(drawn[0], drawn[1], stats)
    phase = int(np.asarray(state.phase).max())
    quarter = -(-plan.last // 4) if plan.ends else plan.last
    if phase == METRIC:
        metric, log_step, arrived = next_metric(kind, state, segment)
        ends = [end for end in plan.ends if end > index]
        last = arrived or not ends
        state = spread(
            unstuck(state, segment), metric=metric,
            averaging=restarted(log_step, np.log(10.0) if index <= EARLY else np.log(2.0)),
            phase=STEP if last else METRIC, until=index + quarter if last else ends[0],
        )  # fmt: skip
    elif phase == STEP:
        cautious = float(np.median(state.averaging.log_average))
        log_step = step_size(np.log(stats["step_size"]), stats["acceptance_rate"], target)
        log_step = min(log_step, cautious + np.log(_BOLDEST))
        state = _trial(state, log_step, 0.1, index + quarter, warmup)
    else:
        before, longest = (float(x[0]) for x in (state.averaging.log_step, state.averaging.centre))
        log_step = min(_tried(before, stats, target), longest)
        until = index + 2 * quarter if before - log_step > _SETTLED else warmup + 1
        state = _trial(state, log_step, 0.0, until, warmup)
    return state


def _trial(state: Any, log_step: float, room: float, until: int, warmup: int) -> Any:
    """All chains go on with one step size: to try it, or for good where there is no time left.

    After the trial it may have grown by ``room`` at most.
    """
    phase, until = (TRIAL, until) if until <= warmup else (OVER, 0)
    return spread(state, averaging=restarted(log_step, room), phase=phase, until=until)


def restarted(log_step: float, above: float) -> DualAveraging:
    """Dual averaging that begins anew, drawn towards log steps ``above`` the present one."""
    return DualAveraging(log_step, log_step, 0.0, 0.0, log_step + above)  # type: ignore[arg-type]


def spread(state: Any, **new: Any) -> Any:
    """The state with new values, the same for all chains."""

    def fill(value: Any, like: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, like.dtype), like.shape).copy()

    return state._replace(
        **{name: jax.tree.map(fill, value, getattr(state, name)) for name, value in new.items()}
    )


def next_metric(
    kind: str, state: Any, segment: Drawn, together: bool = False
) -> tuple[Any, float, bool]:
    """The next metric, a log step size for it, and whether it needs no further segment.

    ``together``: see `Drawn.folds`.
    """
    current = jax.tree.map(lambda leaf: np.asarray(leaf[0], float), state.metric)
    log_step = float(np.median(state.averaging.log_average))
    folds = segment.folds(together)
    if not np.all(np.isfinite(segment.gradients)) or len(folds[0][0]) < 3:
        return current, log_step, False
    with np.errstate(all="ignore"):
        try:
            new, _, best, present = scaling.best(kind, folds, current)
        except np.linalg.LinAlgError:
            return current, log_step, False
        gradients = np.concatenate([g for _, g in folds])
        change = np.log(scaling.stiffness(current, gradients))
        change -= np.log(scaling.stiffness(new, gradients))
    if not np.isfinite(change) or not np.isfinite(best):
        return current, log_step, False
    arrived = present <= _WORSE * best and _agree(segment.positions)
    return new, log_step + change, arrived


def _agree(positions: np.ndarray) -> bool:
    if len(positions) == 1:
        positions = np.stack(np.split(positions[0][: positions.shape[1] // 2 * 2], 2))
    if positions.shape[1] < 8:
        return False
    found = convergence.bulk(positions)
    return bool(
        np.nanmax(found["r_hat"]) < _MOST_R_HAT and np.nanmin(found["ess_bulk"]) >= _LEAST_ESS
    )


def unstuck(state: Any, segment: Drawn) -> Any:
    """Chains that do not move, or have not arrived, go on from where the next good chain is.

    A chain has not arrived if it lies below the best one all the time, and at a place of far less
    probability: the logarithm of that is the mean log density plus the logarithms of the scales,
    up to a constant, so that a wide peak counts for as much as a narrow, higher one.
    """
    log_density = segment.stats["lp"]
    if len(log_density) < 2:
        return state
    frozen = np.all(segment.positions == segment.positions[:, :1], axis=(1, 2))
    scales = np.maximum(segment.positions.std(1, dtype=float), 1e-300)
    mass = np.where(frozen, -np.inf, log_density.mean(1) + np.sum(np.log(scales), 1))
    best = int(np.argmax(mass))
    below = log_density.max(1) < log_density[best].min()
    stuck = frozen | (below & (mass < mass[best] - _STUCK))
    if not stuck.any() or stuck.all():
        return state
    good = np.flatnonzero(~stuck)
    source = [c if not stuck[c] else good[np.searchsorted(good, c) % len(good)]
              for c in range(len(stuck))]  # fmt: skip
    return state._replace(point=jax.tree.map(lambda leaf: leaf[source], state.point))


def _tried(log_step: float, stats: dict[str, np.ndarray], target: float) -> float:
    """The log step size that its trial speaks for.

    It is corrected by the acceptance it had, upwards only if all was calm. Energy errors too large
    to be noise tell of places where the curvature is larger than elsewhere; they become divergences
    there. Their frequency is taken to grow as the step's power `_TAIL`, and bounded; but at most
    until a quarter of the refusals are left, since in a funnel no step is short enough, and
    divergences should tell of it.
    """
    acceptance = float(np.clip(np.mean(stats["acceptance_rate"]), 0.05, 0.999))
    change = _log_response(target) - _log_response(acceptance)
    if "max_energy_error" in stats:
        errors = stats["max_energy_error"]
    else:
        errors = -np.log(np.maximum(stats["acceptance_rate"], 1e-300))
    rough = (errors > _ROUGH) | stats["diverging"]
    if rough.any():
        safe = np.log(_MOST_ROUGH * rough.size / (rough.sum() + 0.5)) / _TAIL
        shortest = _log_response(1.0 - _REFUSED * (1.0 - target)) - _log_response(acceptance)
        change = min(change, max(safe, shortest))
    if np.any(errors > _CALM):
        change = min(change, 0.0)
    return log_step + max(change, -1.0)


def _log_response(acceptance: float) -> float:
    """The log step size with this acceptance, up to a constant: a = 2 Phi(-c eps^2)."""
    return 0.5 * np.log(-ndtri(0.5 * acceptance))
