"""Any program with a `scan` is a state-space model.

The sites before the scan are *static* parameters, or *initial* ones that enter through the first
carry only. A step has latent sites and observed ones. With the static parameters given,

    p(x_{0:T}, y) = p(x_0) g_0 prod_t m_t(x_t | c_{t-1}) g_t(y_t | c_{t-1}, x_t),

where x_t are the latents of step t and c_t = f(c_{t-1}, x_t) is the carry after it. Everything is
found by running the model's own code; nothing is written twice.

If the carry after p steps is a function of the latents of these p steps alone, the series has
memory p. Backward sampling needs p <= 1: then p(x_{t+1} | c_t) is the density of one path given
the other's past.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro import handlers
from numpyro.distributions import biject_to

from ppl_toolkit.capture import Scan, captured, run_step
from ppl_toolkit.errors import MethodError, SiteError
from ppl_toolkit.executables import evaluate_once
from ppl_toolkit.inference.auxiliary import Drawn
from ppl_toolkit.inference.peaks import log_peak
from ppl_toolkit.inference.randomness import enumerating
from ppl_toolkit.positions import Position, start_position
from ppl_toolkit.program import Program
from ppl_toolkit.replay import at_unconstrained, log_det_name, log_prob, with_improper_sites
from ppl_toolkit.sites import finite_support
from ppl_toolkit.tracing import dependents, label

__all__ = ["Series", "StateSpace", "Step", "state_space"]

_FIXED = np.zeros(2, np.uint32)  # a key, where everything that matters has a value

_MOST_MEMORY = 8  # of a series, that is looked for by running it
_TRIED = 6  # particles that it is looked for with


class Step(NamedTuple):
    """One step of one particle.

    Attributes:
        carry: after the step, c_t.
        latents: values of its latent sites, x_t, by name.
        log_transition: log m_t, with scales and masks as the model has them.
        log_observation: log g_t.
        correction: log m_t minus the log density that the latents are drawn from in `step`: zero
            unless a handler scales them.
    """

    carry: Any
    latents: dict[str, Any]
    log_transition: Any
    log_observation: Any
    correction: Any


@dataclasses.dataclass(frozen=True)
class Series:
    """A state-space model whose static parameters are given. Particles are mapped over by callers.

    Attributes:
        length: number of steps T after the start.
        mixed: whether log g depends on the carry before the step, given its latents.
        log_prior: log density of the static parameters, Jacobians included.
        latents: names of the latents of a step.
        start: key -> `Step` number 0, its latents being the initial sites.
        start_at: latents -> the same with given values.
        step: (key, carry, t) -> `Step` t + 1 of 1, ..., T, drawn from the model; t from 0 on.
        replay: (carry, t, latents) -> the same with given values.
    """

    scan: Scan
    length: int
    mixed: bool
    latents: tuple[str, ...]
    log_prior: Any
    start: Callable[[Any], Step]
    start_at: Callable[[Mapping[str, Any]], Step]
    step: Callable[[Any, Any, Any], Step]
    replay: Callable[[Any, Any, Mapping[str, Any]], Step]

    def x(self, t: Any) -> Any:
        """What the scan runs over, in step t."""
        return jax.tree.map(lambda v: v[self.scan.time(t)], self.scan.xs)

    def replay_real(self, carry: Any, t: Any, values: Mapping[str, Any]) -> tuple[Step, Any]:
        """`replay` at unconstrained values, and the log Jacobian of the model's own."""
        new, trace = run_step(self.scan, carry, t, _FIXED, at_unconstrained(values))
        factors = [trace.pop(log_det_name(n)) for n in values if log_det_name(n) in trace]
        return _scored(new, trace, self.latents), _total(factors)

    def real(self, carry: Any, t: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        """Unconstrained values of the latents of a step."""
        _, trace = run_step(self.scan, carry, t, _FIXED, _put(values))
        return {n: biject_to(trace[n]["fn"].support).inv(values[n]) for n in self.latents}

    def middle(self, carry: Any, t: Any) -> dict[str, Any]:
        """Unconstrained means of the latents of a step given the carry; zero where infinite."""
        _, trace = run_step(self.scan, carry, t, _FIXED, _at_means)
        return {
            n: jnp.nan_to_num(biject_to(trace[n]["fn"].support).inv(trace[n]["value"]), posinf=0.0,
                              neginf=0.0)
            for n in self.latents
        }  # fmt: skip

    def log_peak(self, carry: Any, t: Any) -> Any:
        """The largest log density of the latents of a step given the carry; None: not known.

        Known for one latent site, of a law whose mode has a formula, without scales or masks.
        """
        _, trace = run_step(self.scan, carry, t, _FIXED)
        own = [trace[name] for name in self.latents]
        plain = all(m["scale"] is None and m.get("mask") is None for m in own)
        return log_peak(own[0]["fn"]) if len(own) == 1 and plain else None

    def levels(self, carry: Any, t: Any) -> dict[str, Any]:
        """The values of the finite latents of a step, arrays (K,)."""
        _, trace = run_step(self.scan, carry, t, _FIXED)
        return {n: finite_support(trace[n]["fn"]) for n in self.latents}


@dataclasses.dataclass(frozen=True)
class StateSpace:
    """What there is to know of the time axis of a program.

    Attributes:
        name: what messages call the model.
        static: latent sites before the scan that its steps, or laws of other sites, depend on.
        initial: latent sites before the scan that enter through the first carry only.
        latents: latent sites of a step.
        observed: observed sites of a step, factors included.
        length: number of steps T.
        memory: the number of steps whose latents determine the carry; None if no number does.
        mixed: whether the observations of a step depend on the carry before it, given its latents.
        ahead: whether they depend on nothing but the carry before it.
        culprits: leaves of the carry that stand in the way of memory one.
    """

    name: str
    static: tuple[str, ...]
    initial: tuple[str, ...]
    latents: tuple[str, ...]
    observed: tuple[str, ...]
    length: int
    memory: int | None
    mixed: bool
    ahead: bool
    culprits: tuple[str, ...] = ()

    def at(self, program: Program, position: Position, data: Sequence[Any]) -> Series:
        """The series at a position of the static sites, for use inside a traced function.

        Args:
            program: the program this is the view of.
            position: unconstrained values of the static sites, values of the discrete ones; other
                sites are passed over.
            data: the arrays of `Program.data`, or others of the same shapes.
        """
        static = {name: position[name] for name in self.static}
        discrete = {n: x for n, x in static.items() if program.sites[n].discrete}
        real = {n: x for n, x in static.items() if n not in discrete}
        return self._series(program, data, _put(discrete), at_unconstrained(real))

    def given(self, program: Program, values: Mapping[str, Any], data: Sequence[Any]) -> Series:
        """The same at values of the static sites on their own spaces.

        The log prior density then has no Jacobians.
        """
        return self._series(program, data, _put({name: values[name] for name in self.static}))

    def _series(self, program: Program, data: Sequence[Any], *put: Callable) -> Series:
        own = {*self.static, *map(log_det_name, self.static)}
        return series(program, data, put, own, frozenset(self.initial), self.mixed)

    def in_order(self, latents: Mapping[str, Any], series: Series) -> dict[str, Any]:
        """Values of the sites, arrays (T, ...), in the order of the steps (and back).

        They are in the order of ``xs``, which is the opposite for scans that run backwards; what is
        put into the sites is in the order of the steps.
        """
        return {n: x[::-1] if series.scan.reverse else x for n, x in latents.items()}

    @property
    def replays(self) -> int:
        """Steps by which ancestors of a path are drawn; 0 where paths can be drawn backwards."""
        memory = self.length if self.memory is None else self.memory
        return memory if memory > 1 else 0

    def require_real_parameters(self, program: Program, why: str) -> None:
        """Refuse series without parameters, or with discrete ones.

        Args:
            program: the program this is the view of.
            why: what needs real ones, as in "the random walk moves real numbers".

        Raises:
            MethodError: names the discrete ones.
        """
        if not self.static:
            raise MethodError(
                f"{self.name} has no parameters outside its scan; use ParticleFilter."
            )
        if discrete := [n for n in self.static if program.sites[n].discrete]:
            raise MethodError(
                f"{why}, but the parameters {discrete} are discrete. Use ParticleGibbs with a "
                "kernel for them, such as Gibbs()."
            )

    def require_backward(self, method: str) -> None:
        """Refuse series whose paths cannot be joined by one step's density.

        Raises:
            MethodError: names the leaves of the carry that remember more.
        """
        if self.memory is None or self.memory > 1:
            remembers = (
                "all steps before" if self.memory is None else f"the {self.memory} steps before"
            )
            raise MethodError(
                f"{method} joins paths by the density of one step, but the carry of "
                f"{self.name} depends on the latents of {remembers}, through "
                f"{', '.join(self.culprits)}. Use ParticleGibbs, whose ancestor sampling replays "
                "as many steps as it takes, or carry nothing but the latest latents."
            )


_known: weakref.WeakKeyDictionary[Program, StateSpace] = weakref.WeakKeyDictionary()


def state_space(program: Program) -> StateSpace:
    """Look at the time axis of a program (once).

    Raises:
        MethodError: there is none, or something about it that particle methods cannot serve; says
            what, and what to do.

    Cost: some traces of the model; a small program is compiled if the memory cannot be read off
    them.
    """
    if program in _known:
        return _known[program]
    with program.context():
        scan, before = _prefix(program, program.data, _FIXED)
        if scan is None:
            raise MethodError(
                f"{label(program.model)} has no numpyro.contrib.control_flow.scan, which particle "
                "methods need for its time axis. Write the loop over time as a scan."
            )
        step = _Look(program, scan, before)
        _refuse(program, scan, before, step)
        static, initial = _static_and_initial(program, before)
        for site in (program.sites[n] for n in (*initial, *step.latents)):
            if not site.proper:
                raise MethodError(
                    f"site {site.name!r} has a flat (improper) prior, which no particle can be "
                    "drawn from. Give it a proper one."
                )
        space = StateSpace(
            label(program.model), static, initial, step.latents, step.observed, scan.length, 1,
            *step.dependence(),
        )  # fmt: skip
        memory, culprits = _memory(program, space)
        _known[program] = dataclasses.replace(space, memory=memory, culprits=culprits)
    return _known[program]


# -- runs of the model -----------------------------------------------------------------------------


def _prefix(
    program: Program, data: Sequence[Any], key: Any, *wrappers: Callable
) -> tuple[Scan | None, dict[str, Any]]:
    """The scan and the messages before it."""
    model = program.model
    for wrapper in (*wrappers, with_improper_sites):
        model = wrapper(model)
    return captured(lambda: program.run(data, key, model))


def _put(values: Mapping[str, Any]) -> Callable[[Callable], Callable]:
    return functools.partial(handlers.substitute, data=dict(values))


def _at_means(function: Callable) -> Callable:
    """A handler that puts the mean of its law at every site that has one."""

    def mean(message: dict) -> Any:
        if message["type"] != "sample" or message["is_observed"]:
            return None
        try:
            return message["fn"].mean
        except NotImplementedError:  # the law has no mean that NumPyro knows: zero, unconstrained
            transform = biject_to(message["fn"].support)
            return transform(jnp.zeros(transform.inverse_shape(message["fn"].shape())))

    return handlers.substitute(function, substitute_fn=mean)


def _choosing(key: Any) -> list[Callable[[Callable], Callable]]:
    """What draws finite sites by choices, while these are enumerated."""
    return [functools.partial(Drawn, random.fold_in(key, 0))] if enumerating() else []


def _latent(trace: Mapping[str, Any]) -> list[str]:
    return [n for n, m in trace.items() if m["type"] == "sample" and not m["is_observed"]]


def _total(messages: Sequence[Mapping[str, Any]]) -> Any:
    return sum((jnp.sum(log_prob(message)) for message in messages), start=0.0)


def _scored(carry: Any, trace: Mapping[str, Any], latents: Sequence[str]) -> Step:
    """A step's log densities; ``latents`` may be observed in the trace, since they were put."""
    own = [trace[name] for name in latents]
    scaled = [message for message in own if message["scale"] is not None]
    drawn = _total([{**message, "scale": None} for message in scaled])
    rest = [m for n, m in trace.items() if m["type"] == "sample" and n not in latents]
    return Step(
        carry,
        {name: trace[name]["value"] for name in latents},
        _density(_total(own)),
        _density(_total(rest)),
        jnp.asarray(_total(scaled) - drawn, float),
    )


def _density(log_density: Any) -> Any:
    """NaN means impossible: laws whose parameters are, after a carry that cannot be."""
    log_density = jnp.asarray(log_density, float)
    return jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)


def series(
    program: Program,
    data: Sequence[Any],
    put: Sequence[Callable],
    static: set[str],
    initial: frozenset[str],
    mixed: bool,
) -> Series:
    """The series of a program.

    Args:
        put: handlers that give the static sites their values.
        static: names of these sites, and of their Jacobians.
    """
    scan, before = _prefix(program, data, _FIXED, *put)
    assert scan is not None  # `state_space` has seen to it
    body = run_step(scan, scan.start, 0, _FIXED)[1]
    latents = _latent(body)
    log_prior = _total([m for n, m in before.items() if m["type"] == "sample" and n in static])

    def begin(key: Any, *wrappers: Callable) -> Step:
        own, trace = _prefix(program, data, key, *put, *wrappers, *_choosing(key))
        assert own is not None
        there = {n: m for n, m in trace.items() if n not in static}
        return _scored(own.start, there, [n for n in there if n in initial])

    def start_at(values: Mapping[str, Any]) -> Step:
        return begin(_FIXED, _put(values))

    def step(key: Any, carry: Any, t: Any) -> Step:
        return _scored(*run_step(scan, carry, t, key, *_choosing(key)), latents)

    def replay(carry: Any, t: Any, values: Mapping[str, Any]) -> Step:
        return _scored(*run_step(scan, carry, t, _FIXED, _put(values)), latents)

    return Series(
        scan, scan.length, mixed, tuple(latents), log_prior, begin, start_at, step, replay
    )


# -- what depends on what --------------------------------------------------------------------------


def _depends(function: Callable, first: Any, *rest: Any) -> list[bool]:
    """Which outputs of ``function(first, *rest)`` depend on ``first``."""
    jaxpr = jax.make_jaxpr(function)(first, *rest).jaxpr
    return dependents(jaxpr, len(jax.tree.leaves(first)))


class _Look:
    """One step of the captured scan, looked at from outside."""

    def __init__(self, program: Program, scan: Scan, before: Mapping[str, Any]) -> None:
        self.scan = scan
        carry, trace = run_step(scan, scan.start, 0, _FIXED)
        self.trace = trace
        self.latents = tuple(_latent(trace))
        self.observed = tuple(
            n for n, m in trace.items() if m["type"] == "sample" and m["is_observed"]
        )
        self.values = {name: trace[name]["value"] for name in self.latents}
        self.carry = carry

    def scored(self, carry: Any, values: Mapping[str, Any]) -> Step:
        return _scored(*run_step(self.scan, carry, 0, _FIXED, _put(values)), self.latents)

    def dependence(self) -> tuple[bool, bool]:
        """Whether log g depends on the carry given the latents, and on nothing but the carry."""

        def observation(first: Any, second: Any, swap: bool) -> Any:
            carry, values = (second, first) if swap else (first, second)
            return self.scored(carry, values).log_observation

        carry = self.scan.start
        (of_carry,) = _depends(lambda c, v: observation(c, v, False), carry, self.values)
        (of_latents,) = _depends(lambda v, c: observation(v, c, True), self.values, carry)
        return of_carry, of_carry and not of_latents


def _static_and_initial(
    program: Program, before: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Latent sites before the scan, divided.

    Initial ones: no step depends on them given the carry, the first carry or an observation
    before the scan does, and the law of no static site does.
    """
    names = _latent(before)
    values = {name: before[name]["value"] for name in names}

    def run(values: Mapping[str, Any]) -> tuple[Scan, dict[str, Any]]:
        scan, trace = _prefix(program, program.data, _FIXED, _put(values))
        assert scan is not None
        return scan, trace

    def others(name: str) -> dict[str, Any]:
        return {n: v for n, v in values.items() if n != name}

    def of_step(one: Any, rest: Mapping[str, Any], carry: Any) -> Any:
        scan, _ = run({**rest, **one})
        new, trace = run_step(scan, carry, 0, _FIXED)
        return new, _scored(None, trace, _latent(trace))[1:]

    def of_start(one: Any, rest: Mapping[str, Any]) -> Any:
        scan, trace = run({**rest, **one})
        seen = [m for m in trace.values() if m["type"] == "sample" and m["is_observed"]]
        return scan.start, _total(seen)

    def of_laws(one: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
        _, trace = run({**rest, **one})
        return {n: _total([trace[n]]) for n in names}

    carry = run(values)[0].start
    static: set[str] = set()
    children: dict[str, set[str]] = {}
    for name in names:
        one, rest = {name: values[name]}, others(name)
        laws = zip(sorted(names), _depends(of_laws, one, rest), strict=True)
        children[name] = {n for n, flag in laws if flag} - {name}
        enters = any(_depends(of_start, one, rest))
        if any(_depends(of_step, one, rest, carry)) or not enters:
            static.add(name)
    while more := {n for n in names if n not in static and children[n] & static}:
        static |= more  # what laws of static sites depend on
    return tuple(n for n in names if n in static), tuple(n for n in names if n not in static)


def _memory(program: Program, space: StateSpace) -> tuple[int | None, tuple[str, ...]]:
    """The memory, and the leaves of the carry that remember more than one step.

    Read off which leaf of the new carry depends on which of the old one, given the latents. Where
    that goes in circles (a counter, a window in one array), the series is run: two particles that
    are given the same latents must have the same carry after p steps.
    """
    scan, _ = _prefix(program, program.data, _FIXED)
    assert scan is not None
    paths, structure = jax.tree_util.tree_flatten_with_path(scan.start)
    leaves = [jnp.asarray(leaf) for _, leaf in paths]
    names = [f"carry{jax.tree_util.keystr(path)}" for path, _ in paths]
    values = {n: m["value"] for n, m in run_step(scan, scan.start, 0, _FIXED)[1].items()
              if n in space.latents}  # fmt: skip
    edges = np.zeros((len(leaves), len(leaves)), bool)  # new leaf i depends on old leaf j
    for j in range(len(leaves)):

        def new(one: Any, rest: Sequence[Any], values: Any, j: int = j) -> Any:
            carry = jax.tree.unflatten(structure, [*rest[:j], one, *rest[j:]])
            return jax.tree.leaves(run_step(scan, carry, 0, _FIXED, _put(values))[0])

        edges[:, j] = _depends(new, leaves[j], leaves[:j] + leaves[j + 1 :], values)
    culprits = tuple(n for n, row in zip(names, edges, strict=True) if row.any())
    reach, memory = np.eye(len(leaves), dtype=bool), 0
    while reach.any() and memory <= len(leaves):
        reach, memory = edges @ reach, memory + 1
    if not reach.any():
        return memory, culprits if memory > 1 else ()
    found = _memory_by_running(program, space)
    return found, culprits if found is None or found > 1 else ()


def _memory_by_running(program: Program, space: StateSpace) -> int | None:
    longest = min(space.length, _MOST_MEMORY)

    def gaps(words: Any, data: Any) -> Any:
        """How far carries are apart after p steps with the same latents, from different pasts."""
        key = random.wrap_key_data(words)
        static = {
            name: x
            for name, x in start_position(program, key, data).items()
            if name in space.static
        }
        path = space.at(program, static, data)
        keys = random.split(key, _TRIED)
        carry = jax.vmap(lambda k: path.start(k).carry)(keys)
        carry = jax.vmap(lambda k, c: path.step(k, c, 0).carry)(keys, carry)  # starts may be equal

        def turn(carries: tuple, p: Any) -> tuple[tuple, Any]:
            carry, other = carries
            t = jnp.minimum(p + 1, space.length - 1)
            fresh = jax.vmap(lambda k, c: path.step(random.fold_in(k, t), c, t))(keys, carry)
            again = jax.vmap(lambda c, x: path.replay(c, t, x))(other, fresh.latents)
            return (fresh.carry, again.carry), _largest_gap(fresh.carry, again.carry)

        other = jax.tree.map(lambda x: jnp.roll(x, 1, 0), carry)
        return lax.scan(turn, (carry, other), jnp.arange(longest))[1]

    found = np.asarray(evaluate_once(gaps, np.zeros(2, np.uint32), program.data))
    same = np.flatnonzero(found <= 1e-6)
    return int(same[0]) + 1 if same.size else None


def _largest_gap(a: Any, b: Any) -> Any:
    """Relative to the size of the values."""

    def gap(x: Any, y: Any) -> Any:
        x, y = jnp.asarray(x, float), jnp.asarray(y, float)
        return jnp.max(jnp.abs(x - y) / (1.0 + jnp.abs(x)), initial=0.0)

    return functools.reduce(jnp.maximum, jax.tree.leaves(jax.tree.map(gap, a, b)), jnp.zeros(()))


# -- what cannot be served -------------------------------------------------------------------------


def _refuse(program: Program, scan: Scan, before: Mapping[str, Any], step: _Look) -> None:
    name = label(program.model)
    if scan.length < 1:
        raise MethodError(f"the scan of {name} has no steps.")
    if scan.handlers:
        raise MethodError(
            f"the scan of {name} is inside {', '.join(sorted(set(scan.handlers)))}, which NumPyro "
            "does not carry into its steps. Use it inside the function that is scanned."
        )
    if program.subsampled or any(
        m["type"] == "plate" and m["args"][1] not in (None, m["args"][0])
        for m in step.trace.values()
    ):
        raise MethodError(
            f"{name} subsamples a plate; particle methods weigh particles by all the data. Remove "
            "subsample_size."
        )
    known = {*before, *step.trace}
    for site in program.sites.values():
        if site.name in known or site.kind == "deterministic":
            continue
        if site.scanned:
            raise MethodError(
                f"{name} has a second scan, with site {site.name!r}. Particle methods follow one: "
                "put both into one function that is scanned."
            )
        raise MethodError(
            f"{site.kind} site {site.name!r} of {name} comes after the scan, so that no particle "
            "would be weighed by it. Move it into the function that is scanned"
            + (", with the data in xs." if site.kind == "observed" else ", or before the scan.")
        )
    for kind, values in scan.values:
        if kind != "condition" or callable(values):
            continue
        for site, series_of_values in values.items():
            if site in step.trace and (have := np.shape(series_of_values)[0]) < scan.length:
                raise MethodError(
                    f"site {site!r} is conditioned on {have} values, but the scan has "
                    f"{scan.length} steps. Infer with a scan of length {have}, then forecast the "
                    "rest with ppl.predict."
                )
    if not step.latents and not _latent(before):
        raise SiteError(f"the scan of {name} has no latent site.")
