"""Markov score climbing: a proposal learns the law of the latents given all the data.

With q the proposal, and lambda its parameters, KL(p || q) of the smoothing law p falls along

    E_p[ grad_lambda log q(x_{1:T}) ],   log q(x_{1:T}) = sum_t log q_t(x_t | c_{t-1}; lambda).

Paths come from conditional sweeps that use the proposal themselves. They leave p invariant whatever
lambda is, so that nothing is biased by a poor proposal, as importance weights would be.

Source: Naesseth, Lindsten and Blei (2020), Markovian score climbing: variational inference with
KL(p || q), NeurIPS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

from ppl_toolkit.arguments import with_data
from ppl_toolkit.errors import InitializationError, MethodError, OptionError, SamplingError
from ppl_toolkit.executables import evaluate
from ppl_toolkit.inference.ascent import Adam, Average, ascended, require_optimizer
from ppl_toolkit.inference.auxiliary import score
from ppl_toolkit.inference.filtering import ParticleFilter
from ppl_toolkit.inference.particle_filter import Filter, require_particles, take
from ppl_toolkit.inference.particle_gibbs import Path, sweep, usual_particles
from ppl_toolkit.inference.proposals import Guided
from ppl_toolkit.inference.score import filtered_paths
from ppl_toolkit.inference.state_space import Series, StateSpace, state_space
from ppl_toolkit.inference.step_sizes import require_count
from ppl_toolkit.positions import start_position
from ppl_toolkit.program import Program
from ppl_toolkit.replay import traced_run
from ppl_toolkit.tracing import key_shape, label

__all__ = ["LearntProposal", "learn_proposal", "log_proposal"]


class LearntProposal(NamedTuple):
    """What `learn_proposal` found.

    Attributes:
        proposal: with the learnt parameters in it.
        parameters: their values, by name.
        log_q: the mean over paths of log q(x_{1:T}), by iteration; minus KL(p || q), up to a
            constant and noise.
    """

    proposal: Guided
    parameters: dict[str, np.ndarray]
    log_q: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _With:
    """A proposal's program with values in its parameters."""

    program: Callable[[Any, Any], Any]
    values: Mapping[str, Any]

    def __call__(self, carry: Any, x: Any) -> Any:
        return handlers.substitute(self.program, data=dict(self.values))(carry, x)


def learn_proposal(
    proposal: Guided,
    model: Callable,
    *args: Any,
    given: Mapping[str, Any] | None = None,
    particles: int | None = None,
    iterations: int = 400,
    paths: int = 4,
    optimizer: Any = None,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    precision: str = "float64",
    **kwargs: Any,
) -> LearntProposal:
    """Learn the ``numpyro.param`` values of a proposal, for a series whose parameters are given.

    Args:
        proposal: `Guided(program)`, whose program has sites such as
            ``numpyro.param("gain", 0.5)``. What it looks ahead to is left as it is.
        model: a NumPyro model with a `scan`.
        *args, **kwargs: its arguments.
        given: values of the static sites, by name; see `ParticleFilter`.
        particles: N of a conditional sweep; T / 2, but at least 16 and at most 256, if None.
        iterations: sweeps, each with a step; parameters are averaged over the last half of them,
            on the unconstrained space.
        paths: M, drawn from the particles of every sweep.
        optimizer: `Adam(...)`, or one of optax's; ``Adam()`` if None.
        seed: an integer.
        data: further arguments of the model by name, for names that this function itself uses.
        precision: "float64" or "float32".

    Returns:
        The proposal with these values, for ``ParticleFilter(proposal=...)`` or any other method
        of particles, also on other data of the same kind.

    Raises:
        OptionError, MethodError, SiteError: before anything is compiled.
        InitializationError: no particle of the first filter has a finite weight.
        SamplingError: no gradient was finite.

    Cost: per iteration O(N T + M N T) steps of the model, and M gradients of log q. One program is
    compiled; other data of the same shapes take the same.
    """
    optimizer = Adam() if optimizer is None else optimizer
    _check_options(proposal, particles, iterations, paths, optimizer)
    program = Program(model, args, with_data(model, kwargs, data), precision=precision)
    space = state_space(program)
    given = dict(given or {})
    with program.context():
        supports = _parameters(proposal, space, program)
        seeded = dataclasses.replace(proposal, program=_seeded(proposal.program))
        method = ParticleFilter(given=given, proposal=seeded)
        method.check(program)
        usual = usual_particles(space.length)
        climb = _Climb(program, space, proposal, supports, optimizer, particles or usual,
                       iterations, paths)  # fmt: skip
        words = np.array([int(seed) >> 32, int(seed) & 0xFFFFFFFF], np.uint32)
        values = method.settings(program, 0).given
        found = jax.tree.map(np.asarray, evaluate(climb, words, values, program.data))
    parameters, log_q, started, steps = found
    if not started:
        raise InitializationError(ParticleFilter.failure)
    if not steps:
        raise SamplingError(
            "no gradient of the proposal's log density was finite: it gives paths of the latents "
            "no density. Check its supports, and the initial values of its parameters."
        )
    learnt = dataclasses.replace(proposal, program=_With(proposal.program, parameters))
    return LearntProposal(learnt, parameters, log_q)


@dataclasses.dataclass(frozen=True)
class _Climb:
    """(key data, static values, data) -> parameters, log q by iteration, started, steps."""

    program: Program
    space: StateSpace
    proposal: Guided
    supports: Mapping[str, Any]
    optimizer: Any
    particles: int
    iterations: int
    paths: int

    def __call__(self, words: Any, given: Mapping[str, Any], data: Any) -> Any:
        key = random.wrap_key_data(words)
        key_start, key_sweeps = random.split(key)
        series = self.space.given(self.program, given, data)
        u = self._begin(series)
        backward = not self.space.replays
        known, log_z = filtered_paths(key_start, series, self._filter(u), 1, 0, backward)

        def step(state: Any, n: Any) -> tuple[Any, Any]:
            u, memory, path, average, steps = state
            several, _ = sweep(
                random.fold_in(key_sweeps, n), series, path, self._filter(u),
                replays=self.space.replays, paths=self.paths,
            )  # fmt: skip
            value, gradient = jax.value_and_grad(self._mean_log_q)(u, several, series)
            average = average.update(u, n >= self.iterations // 2)
            u, memory, fine = ascended(self.optimizer, gradient, memory, u)
            return (u, memory, take(several, 0), average, steps + fine), value

        first = (u, self.optimizer.init(u), take(known, 0), Average.of(u), jnp.zeros((), int))
        last, log_q = lax.scan(step, first, jnp.arange(self.iterations))
        return self._constrained(last[3].mean), log_q, jnp.isfinite(log_z), last[4]

    def _begin(self, series: Series) -> dict[str, Any]:
        """The parameters' initial values, unconstrained."""
        values = _trace(self.proposal, series)
        return {
            name: jnp.asarray(biject_to(support).inv(jnp.asarray(values[name]["value"], float)))
            for name, support in self.supports.items()
        }

    def _constrained(self, u: Mapping[str, Any]) -> dict[str, Any]:
        return {name: biject_to(self.supports[name])(x) for name, x in u.items()}

    def _program(self, u: Mapping[str, Any]) -> _With:
        return _With(self.proposal.program, self._constrained(u))

    def _filter(self, u: Mapping[str, Any]) -> Filter:
        return Filter(self.particles, dataclasses.replace(self.proposal, program=self._program(u)))

    def _mean_log_q(self, u: Any, paths: Path, series: Series) -> Any:
        each = jax.vmap(lambda path: log_proposal(self._program(u), series, path))(paths)
        return jnp.mean(each)


def log_proposal(program: Callable[[Any, Any], Any], series: Series, path: Path) -> Any:
    """Log q(x_{1:T}), with which a proposal's program draws a path.

    Args:
        program: of (carry, x), as in `Guided`.
        series: the model, its static parameters given.
        path: one path of its latents.
    """

    def step(state: tuple[Any, Any], t: Any) -> tuple[tuple[Any, Any], None]:
        carry, total = state
        latents = take(path.latents, t)
        total += score(program, latents, carry, series.x(t))
        return (series.replay(carry, t, latents).carry, total), None

    first = (series.start_at(path.initial).carry, jnp.zeros(()))
    return lax.scan(step, first, jnp.arange(series.length))[0][1]


# -- parameters of a program ---------------------------------------------------------------------


def _seeded(program: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """For parameters whose initial value is a function of a key."""
    return handlers.seed(program, random.key(0))


def _trace(proposal: Guided, series: Series) -> dict[str, Any]:
    """The messages of one run of a proposal, from a start of the series."""
    carry = series.start(random.key(0)).carry
    return traced_run(lambda: _seeded(proposal.program)(carry, series.x(0)))


def _parameters(proposal: Guided, space: StateSpace, program: Program) -> dict[str, Any]:
    """Names and constraints of a proposal's parameters.

    Raises:
        MethodError: it has none.
    """
    seeded = dataclasses.replace(proposal, program=_seeded(proposal.program))
    seeded.check(space, program)
    found: dict[str, Any] = {}

    def look(key: Any) -> None:
        position = start_position(program, key, program.data)
        for name, message in _trace(proposal, space.at(program, position, program.data)).items():
            if message["type"] == "param":
                found[name] = message["kwargs"].get("constraint", constraints.real)

    jax.eval_shape(look, key_shape())
    if not found:
        raise MethodError(
            f"the proposal {label(proposal.program)} has no parameter to learn. Write its numbers "
            'as numpyro.param("name", initial value, constraint=...).'
        )
    return found


def _check_options(
    proposal: Any, particles: Any, iterations: Any, paths: Any, optimizer: Any
) -> None:
    if not isinstance(proposal, Guided):
        raise OptionError(
            f"the proposal to learn must be Guided(program); got {proposal!r:.60}. Write "
            "learn_proposal(Guided(program), model, *data)."
        )
    if particles is not None:
        require_particles(particles)
    require_count("iterations", iterations)
    require_count("paths", paths)
    require_optimizer(optimizer)
