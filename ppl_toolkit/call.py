"""One checked call, carried out: compile, run, label."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import numpyro

from ppl_toolkit import results
from ppl_toolkit.bare_density import is_density
from ppl_toolkit.diagnostics import approximation
from ppl_toolkit.diagnostics.findings import as_json, diagnose
from ppl_toolkit.diagnostics.structure import model_sites, model_source
from ppl_toolkit.engine import Engine
from ppl_toolkit.errors import InitializationError, PPLError, SamplingError
from ppl_toolkit.goals import Goal, Judge
from ppl_toolkit.program import Program
from ppl_toolkit.progress import progress_for
from ppl_toolkit.runner import MemorySink, Outcome, Run
from ppl_toolkit.sites import variable_name
from ppl_toolkit.starts import start_numbers
from ppl_toolkit.store import ZarrSink, require_free

if TYPE_CHECKING:
    import xarray

__all__ = [
    "Begin",
    "Call",
    "attributes_of",
    "carry_out",
    "conclusions",
    "method_groups",
    "require_started",
]


class Call(NamedTuple):
    """A checked call: everything a run needs."""

    program: Program
    method: Any
    reason: str
    draws: int
    warmup: int
    chains: int
    seed: int
    coords: Mapping[str, np.ndarray]
    progress: bool | str
    chunk: int | None
    threads: int | None
    lanes: int
    devices: tuple[Any, ...]
    store: str | Path | None = None
    superchains: int = 0
    goal: Goal | None = None

    @property
    def group(self) -> str:
        return getattr(self.method, "group", "posterior")

    @property
    def name(self) -> str:
        return type(self.method).__name__

    @property
    def draws_rows(self) -> bool:
        """Whether subsampled plates see new rows at every step."""
        return bool(self.program.subsampled) and getattr(self.method, "minibatches", False)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with this one."""
        return {
            "method": self.name,
            "method_options": results.options_text(self.method),
            "method_reason": self.reason,
            "seed": self.seed,
            "chains": self.chains,
            "warmup": self.warmup,
            "lanes": self.lanes,
            "superchains": self.superchains,
            "precision": self.program.precision,
            "dims": json.dumps(self.program.user_dims),
            "model_hash": self.program.model_hash,
            "data_hash": self.program.data_hash,
            "goal": "" if self.goal is None else json.dumps(dataclasses.asdict(self.goal)),
            "log_density": int(is_density(self.program.model)),
            "latent_sites": json.dumps([site.variable for site in self.program.latent]),
        }


class Begin(NamedTuple):
    """Where a run begins.

    Attributes:
        positions, given: flat starting points (chain, D), and which of them are given.
        state: the sampler's state of an earlier run as named arrays, instead.
        renew: whether that state is of other data, so that its caches must be renewed.
        iteration, draws, warmup_steps: what the earlier part of this run has done.
        earlier: its draws by site, where there is a goal.
    """

    positions: np.ndarray
    given: np.ndarray
    state: Mapping[str, np.ndarray] | None = None
    renew: bool = False
    iteration: int = 0
    draws: int = 0
    warmup_steps: int = 0
    earlier: Mapping[str, np.ndarray] | None = None


def carry_out(call: Call, begin: Begin) -> xarray.DataTree:
    """Run a call from where it begins, and label what comes out.

    Raises:
        InitializationError: no starting point has a finite density.
        SamplingError: the run failed; its ``partial`` is what was drawn before.
    """
    program, method = call.program, call.method
    identity = call.identity()
    clock = time.perf_counter()
    engine = Engine(program, method, call.lanes, call.devices)
    other = _data_groups(call)
    total = call.warmup + call.draws
    going_on = begin.state is not None and not begin.renew
    if call.store is not None and not going_on:
        require_free(call.store)
    label = f"{call.name}, {call.chains} chains"
    with progress_for(call.progress, label, begin.iteration, call.warmup, total) as shown:
        if not going_on and call.progress:
            shown.note(call.reason)
        first = ["init"] if begin.state is None else ["refresh"] if begin.renew else []
        engine.compile("advance", *first)
        compile_seconds = time.perf_counter() - clock
        settings = method.settings(program, call.warmup)
        run = Run(engine, call.chains, call.seed, settings, call.threads)
        if begin.state is None:
            numbers = start_numbers(call.chains, call.superchains)
            run.start(begin.positions, begin.given, numbers)
        else:
            old = results.read_state(begin.state, engine.structure.state)
            if begin.renew and call.superchains:  # which begin where one of their chains ended
                leaders = start_numbers(call.chains, call.superchains)
                leaders *= call.chains // call.superchains
                old = jax.tree.map(lambda leaf: leaf[leaders], old)
            run.restore(old, fresh_data=begin.renew)
        require_started(call, run.state(), begin.positions, begin.given)
        sink: MemorySink | ZarrSink = MemorySink()
        if call.store is not None:
            sink = ZarrSink(
                call.store,
                {**identity, "target_draws": call.draws},
                call.group,
                {name: site.dims for name, site in program.sites.items()},
                call.coords,
                begin.draws if going_on else None,
            )
        sink.open(engine.no_draws(call.chains))
        judge = None if call.goal is None else Judge(call.goal, call.superchains)
        if judge is not None and begin.earlier is not None:
            judge.add(begin.earlier)
            judge.draws = begin.draws  # some may have been thinned away
        outcome = run.chunks(
            sink,
            shown,
            start=begin.iteration,
            warmup=call.warmup,
            total=total,
            warmup_steps=begin.warmup_steps,
            chunk=call.chunk,
            judge=judge,
        )
    attributes = attributes_of(call, identity, outcome, compile_seconds, run.threads)
    if judge is not None:
        attributes |= {"goal_text": str(call.goal), "goal_missing": judge.missing}
    if outcome.error is not None:
        raise _failure(call, sink, outcome, attributes, other, begin.draws) from outcome.error
    tree = _labelled(call, sink, outcome, attributes, other, begin.draws)
    _require_arrived(engine.method, call.warmup, outcome, tree)
    return tree


def _data_groups(call: Call) -> dict[str, xarray.Dataset]:
    """The data; all rows of plates that see new ones at every step, where the model allows."""
    program = call.program
    if call.draws_rows:
        with contextlib.suppress(PPLError):
            plates = {variable_name(plate) for plate in program.subsampled}
            labels = {dim: label for dim, label in call.coords.items() if dim not in plates}
            return results.data_groups(program.whole, labels)
    return results.data_groups(program, call.coords)


def _require_arrived(method: Any, warmup: int, outcome: Outcome, tree: xarray.DataTree) -> None:
    """Refuse draws of a method that did not get to the posterior in its warm-up."""
    problem = getattr(method, "problem", None)
    if problem is None or outcome.iteration <= warmup:
        return
    if text := problem(outcome.state):
        error = SamplingError(f"{text} What there is, is in error.partial.")
        error.partial = tree
        raise error


def require_started(call: Call, state: Any, positions: np.ndarray, given: np.ndarray) -> None:
    """Refuse to go on from points without a density, naming the sites at fault."""
    failed = np.asarray(call.method.failed(state))
    if not failed.any():
        return
    chain = int(np.flatnonzero(failed)[0])
    if own := getattr(call.method, "failure", ""):
        raise InitializationError(f"chain {chain}: {own}")
    guilty = _sites_without_density(call, positions[chain])
    where = "the given starting point" if given[chain] else "any of the points tried"
    raise InitializationError(
        f"chain {chain} found no finite log density and gradient at {where}. "
        + (f"Sites without a finite log density there: {guilty}. " if guilty else "")
        + "Check the data and the priors' scales, or give infer a starting point: "
        "init={site: value}."
    )


def _sites_without_density(call: Call, position: np.ndarray) -> list[str]:
    program = call.program
    if program.discrete:
        return []
    with program.context():
        values = program.constrain(position, program.data)
        latent = {site.name: values[site.name] for site in program.latent}
        terms = program.log_terms(latent, program.data)
    return [name for name, term in terms.items() if not np.all(np.isfinite(np.asarray(term)))]


def _failure(
    call: Call,
    sink: MemorySink | ZarrSink,
    outcome: Outcome,
    attributes: dict[str, Any],
    other: dict[str, xarray.Dataset],
    first_draw: int,
) -> SamplingError:
    """The error of a run that ended early, with what was drawn before."""
    where = ["error.partial"]
    try:
        partial = _labelled(call, sink, outcome, attributes, other, first_draw)
    except Exception:  # on a disk that is full, say
        partial, where = None, []
    if call.store is not None:
        where.append(f"{call.store} (go on with resume=)")
    error = SamplingError(
        f"the run failed at iteration {outcome.iteration} of {call.warmup + call.draws} with "
        f"{type(outcome.error).__name__}: {outcome.error}. What was drawn before is in "
        f"{' and in '.join(where)}."
    )
    error.partial = partial
    return error


def attributes_of(
    call: Call,
    identity: Mapping[str, Any],
    outcome: Outcome,
    compile_seconds: float,
    threads: int,
) -> dict[str, Any]:
    """Root attributes: strings and numbers that make the run reproducible."""
    program = call.program
    attributes = {
        **identity,
        "iteration": outcome.iteration,
        "time_compile": compile_seconds,
        "time_warmup": outcome.timing.warmup,
        "time_sampling": outcome.timing.sampling,
        "n_gradient_evaluations_warmup": outcome.warmup_steps,
        "backend": call.devices[0].platform,
        "device_kind": call.devices[0].device_kind,
        "n_devices": len(call.devices),
        "n_threads": threads,
        "jax_version": jax.__version__,
        "numpyro_version": numpyro.__version__,
        "interrupted": int(outcome.interrupted),
        "data_baked": int(program.baked),
        "model_sites": json.dumps(model_sites(program)),
        "model_source": model_source(program.model),
    }
    if program.layout.plates:
        numbers = {plate.name: plate.number for plate in program.layout.plates}
        attributes["trans_dimensional"] = json.dumps(
            {variable_name(plate): variable_name(site) for plate, site in numbers.items()}
        )
    attributes |= getattr(call.method, "attributes", dict)()
    if program.parameters:
        attributes["fixed_parameters"] = ", ".join(program.parameters)
    if program.arguments.narrowed:
        attributes["float32_data"] = ", ".join(program.arguments.narrowed)
    if program.subsampled:
        name = "minibatched_plates" if call.draws_rows else "subsampled_plates"
        attributes[name] = ", ".join(program.subsampled)
    return attributes


def _labelled(
    call: Call,
    sink: MemorySink | ZarrSink,
    outcome: Outcome,
    attributes: dict[str, Any],
    other: dict[str, xarray.Dataset],
    first_draw: int,
) -> xarray.DataTree:
    """The result of a run, from memory or as it lies on disk."""
    program, coords = call.program, call.coords
    other = {**other, **method_groups(call.method, outcome.state)}
    other["sampler_state"] = results.state_dataset(outcome.state)
    if isinstance(sink, ZarrSink):
        tree = sink.finish(other, attributes)
        return sink.annotate(conclusions(tree))
    values, stats = sink.block()
    groups = {
        call.group: results.draws_dataset(values, program, coords, first_draw),
        results.stats_group(call.group): results.draws_dataset(stats, program, {}, first_draw),
        **other,
    }
    tree = results.build({k: v for k, v in groups.items() if v.data_vars}, attributes)
    tree.attrs.update(conclusions(tree))
    return tree


def method_groups(method: Any, state: Any) -> dict[str, xarray.Dataset]:
    """Groups that a method makes of its last state; its numbers are their attributes."""
    import xarray

    groups = getattr(method, "groups", None)
    found: dict[str, xarray.Dataset] = {}
    for name, entries in (groups(state) if groups else {}).items():
        attributes = {key: value for key, (dims, value) in entries.items() if not dims}
        arrays = {key: (dims, value) for key, (dims, value) in entries.items() if dims}
        group = xarray.Dataset(arrays, attrs=attributes)
        found[name] = group.assign_coords({dim: np.arange(n) for dim, n in group.sizes.items()})
    return found


def conclusions(tree: xarray.DataTree) -> dict[str, Any]:
    """Attributes computed from the draws: the findings, the number of gradients."""
    found: dict[str, Any] = {"findings": as_json(diagnose(tree)), **approximation.attributes(tree)}
    if "sample_stats" in tree.children and "n_steps" in tree["sample_stats"]:
        found["n_gradient_evaluations"] = int(tree["sample_stats"]["n_steps"].sum())
    return found
