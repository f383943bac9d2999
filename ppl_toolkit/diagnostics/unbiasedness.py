"""Is the mean of a sampler's evidence estimates the evidence?

E[Z_hat] = Z holds for sequential Monte Carlo whose path, moves and kernel are fixed beforehand.
What is adapted makes the estimate consistent only, so a pilot run adapts, its choices are frozen,
and independent runs of the frozen sampler are compared with Z: the sum over all configurations of
a finite model, a number that the user knows, or importance sampling from the prior and, where all
sites are continuous, from Student's t about the particles of the pilot run.

Estimates of an evidence are skewed to the right, and the mean of R of them is too. The studentised
mean T is made normal to second order by Hall's transformation, with the skewness l of the mean,

    g(T) = T + l (T^2 / 3 + 1 / 6) + l^2 T^3 / 27,

which has an inverse in closed form, for intervals. It corrects a skewness that is small: where l is
above a fifth, the estimates are too noisy to be judged, and that is said instead.

Sources: Del Moral (2004), Feynman-Kac Formulae, for unbiasedness; Hall (1992), JRSS B 54, 221-228.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.distributions import MultivariateStudentT
from scipy import special, stats

from ppl_toolkit import executables, positions
from ppl_toolkit.diagnostics.exactness import configurations, is_finite, log_masses
from ppl_toolkit.diagnostics.simulation import seed_words
from ppl_toolkit.engine import Engine
from ppl_toolkit.inference.smc import SMC, SMCState
from ppl_toolkit.many_runs import run_data_sets
from ppl_toolkit.program import Program
from ppl_toolkit.runner import Run

__all__ = ["Evidences", "Unbiasedness", "compared", "unbiasedness"]

_RUNS = 500
_PILOT = 2**63  # added to the seed of the runs
_BATCH = 2**13
_BATCHES = 32
_FREEDOM = 5.0
_LEAST_STAGES = 3
_LEAST_ESS = 1000.0  # of the draws that estimate Z
_MOST_SKEWED = 0.2
_A, _B = 1 / 3, 1 / 6  # of the Edgeworth expansion of a studentised mean


class Evidences(NamedTuple):
    """Independent positive numbers of one mean, the evidence.

    Attributes:
        logs: their logarithms, (R,); minus infinity for zero.
        source: where they come from.
    """

    logs: np.ndarray
    source: str


class Unbiasedness(NamedTuple):
    """A comparison of evidence estimates with the evidence.

    Attributes:
        logs: log Z_hat of every run of the frozen sampler, (R,).
        log_evidence: log Z.
        source: how Z is known.
        ratio: mean of Z_hat / Z.
        error: standard error of the ratio; that of Z is part of it.
        skewness: of the ratio.
        p_value: of unbiasedness, two-sided; one if ``problem`` is not empty.
        problem: why the evidence could not be tested; empty if it was.
        stages, moves: of the frozen sampler; moves per stage and particle.
    """

    logs: np.ndarray
    log_evidence: float
    source: str
    ratio: float
    error: float
    skewness: float
    p_value: float
    problem: str = ""
    stages: int = 0
    moves: int = 0

    @property
    def log_ratios(self) -> np.ndarray:
        """Of the runs, log (Z_hat / Z); those of no weight are left out."""
        ratios = self.logs - self.log_evidence
        return ratios[np.isfinite(ratios)]

    def log_interval(self, level: float) -> tuple[float, float, float]:
        """The logarithm of the ratio, and the ends of its interval."""
        low, high = self.interval(level)
        tiny = 0.01 * self.ratio  # for an end at zero
        mean, low, high = np.log([max(x, tiny) for x in (self.ratio, low, high)])
        return float(mean), float(low), float(high)

    def interval(self, level: float) -> tuple[float, float]:
        """Where E[Z_hat] / Z lies, but for a chance of ``level``."""
        z = stats.norm.isf(level / 2)
        low, high = (self.ratio - self.error * _inverse(x, self.skewness) for x in (z, -z))
        return max(low, 0.0), high

    def __str__(self) -> str:
        if self.problem:
            return f"the evidence could not be tested: {self.problem}"
        return (
            f"{len(self.logs):,} runs with the {self.stages} stages of a pilot run frozen: mean of "
            f"Z_hat / Z = {self.ratio:.4g} +- {self.error:.2g}, p = {self.p_value:.2g} "
            f"(log Z = {self.log_evidence:.3f}, {self.source})."
        )


def unbiasedness(
    program: Program, method: SMC, seed: int, log_evidence: float | None = None, runs: int = _RUNS
) -> Unbiasedness:
    """Compare the mean of a sampler's evidence estimates with the evidence.

    Args:
        program: with its data.
        method: the sampler; what it adapts is taken from one pilot run.
        seed: of everything.
        log_evidence: log Z, if it is known. Else it is enumerated for finite programs, and
            estimated by importance sampling with 2^18 draws for others.
        runs: independent runs R.

    Raises:
        MethodError: the prior is improper.

    Cost: R + 1 runs, by two compiled programs, and 2^18 log densities where Z is not known.
    """
    if method.generations > 1:
        return _untested(
            "persistent sampling weighs with estimates of earlier evidences, so that its own is "
            "consistent, not unbiased."
        )
    pilot = _pilot(program, method, seed)
    if isinstance(pilot, str):
        return _untested(pilot)
    reference = _reference(program, pilot, seed, log_evidence)
    size = _effective_size(reference.logs)
    if len(reference.logs) > 1 and size < _LEAST_ESS:
        return _untested(
            f"importance sampling {reference.source} gives an effective sample size of {size:.0f}, "
            f"less than {_LEAST_ESS:.0f}. Give log_evidence= if you know it, or fewer data."
        )
    frozen = _frozen(method, pilot)
    engine = Engine(program, frozen, 1, jax.local_devices()[:1])
    engine.compile("advance", "init")
    stages = len(frozen.powers or ())
    blocks = run_data_sets(engine, [program.data] * runs, seed, stages, 1)
    logs = np.array([block.stats["log_evidence"][0, 0] for block in blocks])
    found = compared(Evidences(logs, "runs"), reference)
    return found._replace(stages=stages, moves=frozen.moves or frozen.waste_free - 1)


def _untested(problem: str) -> Unbiasedness:
    nan = math.nan
    return Unbiasedness(np.zeros(0), nan, "", nan, nan, nan, 1.0, problem)


# -- the comparison -----------------------------------------------------------------------------


def compared(estimates: Evidences, reference: Evidences) -> Unbiasedness:
    """Test that two samples of positive numbers have one mean.

    Args:
        estimates: R of them.
        reference: a sample, or one number that is exact.

    Returns:
        The comparison; its p-value is right up to terms of the order of the squared skewness of
        the ratio. The ratio is in units of the reference's mean.
    """
    log_z = _log_mean(reference.logs)
    # Far too large estimates must not overflow: both sides in units of the larger.
    shift = max(0.0, float(np.max(estimates.logs)) - log_z - 100.0)
    ours, theirs = (np.exp(logs - log_z - shift) for logs in (estimates.logs, reference.logs))
    (mean, variance, third), (other, more, beside) = _moments(ours), _moments(theirs)
    error = math.sqrt(variance + more)
    difference = mean - other
    skewness = (third - beside) / error**3 if error > 0 else 0.0
    problem, p = "", 1.0
    if error == 0.0:
        p = 1.0 if abs(difference) <= 1e-10 else 0.0
    elif abs(skewness) > _MOST_SKEWED:
        problem = (
            f"the mean of {len(ours):,} estimates has a skewness of {skewness:.2f}: they are too "
            "noisy (standard deviation of log Z_hat "
            f"{np.std(estimates.logs[np.isfinite(estimates.logs)]):.2g}). Take more particles."
        )
    else:
        p = float(2 * stats.norm.sf(abs(_transformed(difference / error, skewness))))
    scale = math.exp(min(shift, 700.0))
    return Unbiasedness(
        estimates.logs, log_z, reference.source, mean * scale, error * scale, skewness, p, problem
    )


def _log_mean(logs: np.ndarray) -> float:
    return float(special.logsumexp(logs)) - math.log(len(logs))


def _effective_size(logs: np.ndarray) -> float:
    return float(np.exp(2 * special.logsumexp(logs) - special.logsumexp(2 * logs)))


def _moments(values: np.ndarray) -> tuple[float, float, float]:
    """The mean; estimates of the second and third cumulants of the mean. Exact for one value."""
    count = len(values)
    if count == 1:
        return float(values[0]), 0.0, 0.0
    centred = values - values.mean()
    return (
        float(values.mean()),
        float(np.sum(centred**2) / ((count - 1) * count)),
        float(np.mean(centred**3) / count**2),
    )


def _transformed(t: float, skewness: float) -> float:
    """A studentised mean made normal: Hall's g."""
    return t + skewness * (_A * t**2 + _B) + (_A * skewness) ** 2 * t**3 / 3


def _inverse(x: float, skewness: float) -> float:
    """The t whose g(t) is x."""
    c = _A * skewness
    if abs(c) < 1e-8:
        return x
    return float((np.cbrt(1 + 3 * c * (x - _B * skewness)) - 1) / c)


# -- what is known of the evidence --------------------------------------------------------------


def _reference(
    program: Program, pilot: SMCState, seed: int, log_evidence: float | None
) -> Evidences:
    if log_evidence is not None:
        return Evidences(np.array([float(log_evidence)]), "given")
    if is_finite(program):
        exact = special.logsumexp(log_masses(program, configurations(program)))
        return Evidences(np.array([exact]), "by enumeration")
    if program.discrete:
        return Evidences(_weights(program, (), seed), "by draws from the prior")
    flat = jax.vmap(lambda x: ravel_pytree(x)[0])(pilot.generations.particles.position)
    cloud = np.asarray(flat, float)
    scale = np.atleast_2d(np.cov(cloud.T)) + 1e-12 * np.eye(cloud.shape[1])
    around = (cloud.mean(axis=0), np.linalg.cholesky(scale))
    return Evidences(
        _weights(program, around, seed), "by draws from the prior and about the pilot's particles"
    )


def _weights(program: Program, around: tuple, seed: int) -> np.ndarray:
    """Log importance weights whose mean is an unbiased estimate of Z.

    Args:
        program: the program.
        around: mean and Cholesky factor of a cloud of unconstrained positions; every other draw is
            from Student's t there, and all are weighted against the mixture of both laws, so that
            no weight exceeds twice the likelihood. Empty: all draws are from the prior.
        seed: of the draws.
    """

    def one(words: Any, index: Any, around: tuple, data: Sequence[Any]) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(words), index)
        position = positions.prior_position(program, key, data)
        if not around:
            return positions.log_parts(program, position, data)[1]
        flat, unravel = ravel_pytree(position)
        law = MultivariateStudentT(_FREEDOM, *around)
        flat = jnp.where(index % 2 == 0, flat, law.sample(key))
        prior, likelihood = positions.log_parts(program, unravel(flat), data)
        return prior + likelihood - jnp.logaddexp(prior, law.log_prob(flat)) + math.log(2)

    def batch(words: Any, first: Any, around: tuple, data: Sequence[Any]) -> Any:
        return jax.vmap(lambda i: one(words, i, around, data))(first + jnp.arange(_BATCH))

    words = seed_words(seed)
    with program.context():
        run = executables.kept(batch, words, np.int32(0), around, program.data)

        def part(number: int) -> np.ndarray:
            with program.context():
                return np.asarray(run(words, np.int32(number * _BATCH), around, program.data))

        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            logs = np.concatenate(list(pool.map(part, range(_BATCHES))))
    return np.where(np.isnan(logs), -np.inf, logs.astype(float))


# -- the sampler with its choices frozen --------------------------------------------------------


class _FrozenSettings(NamedTuple):
    """Those of `SMC`, and a state of the kernel."""

    usual: Any
    learned: Any


@dataclasses.dataclass(frozen=True)
class _Frozen(SMC):
    """A sampler with fixed powers whose kernel starts with what it learned elsewhere."""

    learned: Any = dataclasses.field(default=None, compare=False, repr=False)

    def settings(self, program: Program, warmup: int) -> Any:
        return _FrozenSettings(super().settings(program, warmup), self.learned)

    def init(self, key: Any, start: Any, target: Any, settings: Any) -> SMCState:
        state = super().init(key, start, target, settings.usual)
        return state._replace(learned=settings.learned)

    def step(
        self, key: Any, index: Any, state: SMCState, target: Any, settings: Any
    ) -> tuple[SMCState, Any, dict[str, Any]]:
        return super().step(key, index, state, target, settings.usual)


def _pilot(program: Program, method: SMC, seed: int) -> SMCState | str:
    """The state after one run that adapts, or why it did not come to its end."""
    engine = Engine(program, method, 1, jax.local_devices()[:1])
    engine.compile("advance", "init")
    with program.context():
        settings = method.settings(program, method.warmup)
        unit = Run(engine, 1, (seed + _PILOT) % 2**64, settings, 1).units[0]
        unit.init(np.zeros((1, program.size), program.precision), np.zeros(1, bool))
        unit.warm(method.warmup)
        state = unit.host_state()
    if bool(method.failed(state)[0]):
        return "no draw from the prior has a positive likelihood."
    return method.problem(state) or jax.tree.map(lambda x: x[0], state)


def _frozen(method: SMC, pilot: SMCState) -> _Frozen:
    """The sampler with the choices that the pilot made."""
    stages = int(pilot.stages)
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    if method.powers is None:
        options["powers"] = _path(np.asarray(pilot.records["temperature"])[:stages])
    if method.moves is None and not method.waste_free:
        options["moves"] = int(pilot.records["n_moves"][:stages].max())
    return _Frozen(**options, learned=pilot.learned)


def _path(points: np.ndarray) -> tuple[float, ...]:
    """Points in (0, 1], and more between them: one stage alone resamples nothing before its end."""
    path = np.concatenate([[0.0], points])
    while len(path) <= _LEAST_STAGES:
        path = np.sort(np.concatenate([path, (path[1:] + path[:-1]) / 2]))
    return tuple(path[1:].tolist())
