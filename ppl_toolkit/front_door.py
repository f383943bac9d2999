"""The front door: check the call, pick the method, run it, label the result."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import numpyro

from ppl_toolkit import results
from ppl_toolkit.bare_density import as_model, position_like
from ppl_toolkit.diagnostics.findings import Finding, as_json, as_text, diagnose, findings
from ppl_toolkit.errors import (
    CheckpointError,
    InferenceWarning,
    InitializationError,
    MethodError,
    OptionError,
    SamplingError,
)
from ppl_toolkit.inference import method_named
from ppl_toolkit.inference.method import Method
from ppl_toolkit.program import Program
from ppl_toolkit.progress import progress_for
from ppl_toolkit.runner import Engine, MemorySink, Outcome, Run
from ppl_toolkit.starts import is_tree, start_positions
from ppl_toolkit.store import Checkpoint, ZarrSink, read_checkpoint

if TYPE_CHECKING:
    import xarray

__all__ = ["extend", "infer"]


def infer(
    model: Callable,
    *args: Any,
    method: str | Method = "auto",
    draws: int = 1000,
    warmup: int | None = None,
    chains: int = 4,
    seed: int = 0,
    init: Any = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    data: Mapping[str, Any] | None = None,
    progress: bool | str = "auto",
    chunk: int | None = None,
    store: str | Path | None = None,
    resume: str | Path | None = None,
    precision: str | None = None,
    threads: int | None = None,
    lanes: int | None = None,
    devices: Sequence[Any] | None = None,
    **kwargs: Any,
) -> xarray.DataTree:
    """Infer the latent sites of a model.

    Args:
        model: a NumPyro model function, or (together with ``init=``) a log density function of
            a position.
        *args, **kwargs: its arguments. Arrays may change from call to call without compiling.
        method: "auto", a name ("nuts", "hmc", "prior", "enumeration"), or a method object such as
            ``NUTS(target_acceptance=0.95)``.
        draws: draws per chain to keep.
        warmup: warm-up iterations per chain; the method's default if None.
        chains: independent runs.
        seed: an integer. The same seed gives the same draws, however the run is cut into
            chunks, threads, stores and resumptions.
        init: where to start: None (random), "prior", a dictionary of site values (one for all
            chains, or with a leading chain dimension), or an earlier result, whose step size and
            metric are taken over and whose warm-up is short. For a log density: a position.
        coords: labels for dimensions, ``{"school": names}``.
        dims: names for event dimensions, ``{"beta": ["predictor"]}``.
        data: further keyword arguments of the model, for names that infer itself uses.
        progress: "auto", "bar", "lines", True or False.
        chunk: iterations between checks for Ctrl-C, progress and commits; chosen by time if None.
        store: a directory (``.zarr``) that draws are streamed to; makes the run resumable after a
            crash, with memory bounded.
        resume: such a directory of an unfinished run; pass the same model and arguments. ``draws``
            may be larger than before.
        precision: "float64" (default on CPU) or "float32" (default elsewhere).
        threads: chains run at a time on CPU; the number of cores if None.
        lanes: chains per compiled unit; 1 on CPU, all chains on accelerators if None. Draws are
            the same only for the same lanes.
        devices: JAX devices to spread the chains over; the default device if None.

    Returns:
        A tree in ArviZ's schema: `posterior`, `sample_stats`, `observed_data`, `constant_data`,
        `sampler_state`. Findings are in its attributes (`ppl.findings`), and warned about once.

    Raises:
        ModelError, DataError, SiteError, MethodError, OptionError: before anything is compiled.
        InitializationError: no starting point has a finite density.
        CheckpointError: ``resume`` or ``store`` cannot be used.
        SamplingError: the run failed; ``error.partial`` holds what was drawn.
    """
    _check_options(draws, warmup, chains, chunk, threads, lanes)
    seed = results._seed(seed)
    stored = read_checkpoint(resume) if resume is not None else None
    if stored is not None:
        if store is not None or init is not None:
            raise OptionError("resume= continues a run; it takes neither store= nor init=.")
        _refuse_changes(stored, method, warmup, chains, seed)
        seed, chains = stored.manifest["seed"], stored.manifest["chains"]
        precision = precision or stored.manifest["precision"]
    model, args, init = as_model(model, args, {**kwargs, **(data or {})}, init)
    program = Program(
        model,
        args,
        {**kwargs, **(data or {})},
        precision=_precision(precision),
        dims=dims,
    )
    chosen, reason = _choose(method, program, stored)
    chosen.check(program)
    labels = results.check_coords(program, coords or {})
    previous = init if is_tree(init) else None
    if stored is not None:
        warmup = int(stored.manifest["warmup"])
    elif warmup is None:
        warmup = chosen.refit_warmup if previous is not None else chosen.warmup
    call = _Call(
        program, chosen, reason, draws, warmup, chains, seed, labels, progress, chunk, threads,
        lanes or _default_lanes(chains), tuple(devices or jax.local_devices()[:1]),
    )  # fmt: skip
    positions, given = start_positions(program, init, chains, seed)
    return _run(call, positions, given, previous, store, stored, resume)


def extend(
    tree: xarray.DataTree,
    model: Callable,
    *args: Any,
    draws: int = 1000,
    progress: bool | str = "auto",
    chunk: int | None = None,
    threads: int | None = None,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> xarray.DataTree:
    """Draw more from where a result ended: 500 and 500 more equal a run of 1000, bit for bit.

    Args:
        tree: a result of `infer`.
        model, *args, **kwargs: the model and the arguments of the run.
        draws: further draws per chain.
        progress, chunk, threads, data: as in `infer`.

    Returns:
        A tree with the old and the new draws.

    Raises:
        CheckpointError: the result has no sampler state, or the model or the data differ.
    """
    _check_options(draws, None, tree.sizes.get("chain", 1), chunk, threads, None)
    if "sampler_state" not in tree.children:
        raise CheckpointError("this result has no sampler_state group, so it cannot be extended.")
    attrs: dict[str, Any] = {str(k): v for k, v in tree.attrs.items()}
    model_kwargs = {**kwargs, **(data or {})}
    model, args, _ = as_model(model, args, model_kwargs, position_like(tree))
    program = Program(
        model, args, model_kwargs, precision=attrs["precision"], dims=json.loads(attrs["dims"])
    )
    _require_same(program, attrs)
    method = method_named(attrs["method"])(**_init_options(attrs))
    group = results.posterior_group(tree)
    state = tree["sampler_state"].dataset
    manifest = {
        "iteration": int(attrs["iteration"]),
        "draws": int(tree[group].sizes["draw"]),
        "warmup_steps": int(attrs.get("n_gradient_evaluations_warmup", 0)),
    }
    stored = Checkpoint(manifest, {str(k): np.asarray(v) for k, v in state.data_vars.items()})
    call = _Call(
        program, method, attrs["method_reason"], manifest["draws"] + draws, int(attrs["warmup"]),
        int(attrs["chains"]), int(attrs["seed"]), results._coords_of(tree, program), progress,
        chunk, threads, int(attrs["lanes"]), tuple(jax.local_devices()[:1]),
    )  # fmt: skip
    positions = np.zeros((call.chains, program.size), program.precision)
    new = _run(call, positions, np.zeros(call.chains, bool), None, None, stored, None, warn=False)
    return _concatenated(tree, new, program)


class _Call(NamedTuple):
    """A checked call: everything a run needs."""

    program: Program
    method: Any
    reason: str
    draws: int
    warmup: int
    chains: int
    seed: int
    coords: Mapping[str, Any]
    progress: bool | str
    chunk: int | None
    threads: int | None
    lanes: int
    devices: tuple[Any, ...]

    @property
    def group(self) -> str:
        return getattr(self.method, "group", "posterior")

    @property
    def name(self) -> str:
        return type(self.method).__name__

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
            "precision": self.program.precision,
            "dims": json.dumps(self.program.user_dims),
            "model_hash": self.program.model_hash,
            "data_hash": self.program.data_hash,
        }


# -- running ------------------------------------------------------------------------------------


def _run(
    call: _Call,
    positions: np.ndarray,
    given: np.ndarray,
    previous: xarray.DataTree | None,
    store: str | Path | None,
    stored: Checkpoint | None,
    resume: str | Path | None,
    warn: bool = True,
) -> xarray.DataTree:
    program, method = call.program, call.method
    identity = call.identity()
    if stored is not None and resume is not None:
        _require_same(program, stored.manifest)
        store = resume
    begin = time.perf_counter()
    engine = Engine(program, method, call.lanes, call.devices)
    before = stored.manifest if stored is not None else {"iteration": 0, "draws": 0}
    start, kept = int(before["iteration"]), int(before["draws"])
    total = call.warmup + call.draws
    sink: MemorySink | ZarrSink = MemorySink()
    if store is not None:
        manifest = {**identity, "coords": _plain(call.coords), "target_draws": call.draws}
        sink = ZarrSink(
            store,
            manifest,
            call.group,
            {name: site.dims for name, site in program.sites.items()},
            kept if stored is not None else None,
        )
    label = f"{call.name}, {call.chains} chains"
    with progress_for(call.progress, label, start, call.warmup, total) as shown:
        if stored is None and call.progress:
            shown.note(call.reason)
        old = _old_state(stored, previous, engine)
        engine.compile("advance", *(["init"] if old is None else []))
        if previous is not None and old is not None:
            engine.compile("refresh")
        compile_seconds = time.perf_counter() - begin
        run = Run(
            engine, call.chains, call.seed, method.settings(program, call.warmup), call.threads
        )
        if old is None:
            run.start(positions, given)
        else:
            run.restore(old, fresh_data=stored is None)
        _require_started(call, run, positions, given)
        outcome = run.chunks(
            sink,
            shown,
            start=start,
            warmup=call.warmup,
            total=total,
            warmup_steps=int(before.get("warmup_steps", 0)),
            chunk=call.chunk,
        )
    attributes = _attributes(call, identity, outcome, compile_seconds)
    if outcome.error is not None:
        raise _failure(call, sink, outcome, attributes, kept, store) from outcome.error
    tree = _labelled(call, sink, outcome, attributes, kept)
    if outcome.interrupted:
        done = max(outcome.iteration - call.warmup, 0)
        warnings.warn(
            f"interrupted after {done} of {call.draws} draws per chain; these are returned. "
            "Go on with ppl.extend(result, model, ...).",
            InferenceWarning,
            stacklevel=3,
        )
    elif warn:
        _warn_of(findings(tree))
    return tree


def _failure(
    call: _Call,
    sink: MemorySink | ZarrSink,
    outcome: Outcome,
    attributes: dict[str, Any],
    kept: int,
    store: str | Path | None,
) -> SamplingError:
    """The error of a run that ended early, with what was drawn before."""
    where = ["error.partial"]
    try:
        partial = _labelled(call, sink, outcome, attributes, kept)
    except Exception:  # on a disk that is full, say
        partial, where = None, []
    if store is not None:
        where.append(f"{store} (go on with resume=)")
    error = SamplingError(
        f"the run failed at iteration {outcome.iteration} of {call.warmup + call.draws} with "
        f"{type(outcome.error).__name__}: {outcome.error}. What was drawn before is in "
        f"{' and in '.join(where)}."
    )
    error.partial = partial
    return error


def _old_state(
    stored: Checkpoint | None, previous: xarray.DataTree | None, engine: Engine
) -> Any | None:
    """The sampler state to go on from, or None for a fresh start."""
    if stored is not None:
        return results.read_state(stored.state, engine.state_structure)
    if previous is None:
        return None
    arrays = {str(k): np.asarray(v) for k, v in previous["sampler_state"].dataset.data_vars.items()}
    return results.read_state(arrays, engine.state_structure)


def _require_started(call: _Call, run: Run, positions: np.ndarray, given: np.ndarray) -> None:
    """Refuse to go on from points without a density, naming the sites at fault."""
    failed = np.asarray(call.method.failed(run.state()))
    if not failed.any():
        return
    chain = int(np.flatnonzero(failed)[0])
    guilty = _sites_without_density(call, positions[chain])
    where = "the given starting point" if given[chain] else "any of the points tried"
    raise InitializationError(
        f"chain {chain} found no finite log density and gradient at {where}. "
        + (f"Sites without a finite log density there: {guilty}. " if guilty else "")
        + "Check the data and the priors' scales, or give a starting point with init={site: value}."
    )


def _sites_without_density(call: _Call, position: np.ndarray) -> list[str]:
    program = call.program
    if program.discrete:
        return []
    with program.context():
        values = program.constrain(position, program.data)
        latent = {site.name: values[site.name] for site in program.latent}
        terms = program.log_terms(latent, program.data)
    return [name for name, term in terms.items() if not np.all(np.isfinite(np.asarray(term)))]


def _attributes(
    call: _Call,
    identity: Mapping[str, Any],
    outcome: Outcome,
    compile_seconds: float,
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
        "n_threads": call.threads or 0,
        "jax_version": jax.__version__,
        "numpyro_version": numpyro.__version__,
        "interrupted": int(outcome.interrupted),
        "data_baked": int(program.baked),
    }
    if program.arguments.narrowed:
        attributes["float32_data"] = ", ".join(program.arguments.narrowed)
    if program.subsampled:
        attributes["subsampled_plates"] = ", ".join(program.subsampled)
    return attributes


def _labelled(
    call: _Call,
    sink: MemorySink | ZarrSink,
    outcome: Outcome,
    attributes: dict[str, Any],
    first_draw: int,
) -> xarray.DataTree:
    """The result of a run, from memory or as it lies on disk."""
    program = call.program
    other = results.data_groups(program, call.coords)
    other["sampler_state"] = results.state_dataset(outcome.state)
    if isinstance(sink, ZarrSink):
        tree = sink.finish(program, call.coords, other, attributes)
        return sink.annotate(_conclusions(tree))
    block = sink.block()
    draws = {} if block is None else block.values
    stats = {} if block is None else block.stats
    groups = {
        call.group: results.draws_dataset(draws, program, call.coords, first_draw),
        results.stats_group(call.group): results.draws_dataset(stats, program, {}, first_draw),
        **other,
    }
    tree = results.build({k: v for k, v in groups.items() if v.sizes}, attributes)
    tree.attrs.update(_conclusions(tree))
    return tree


def _conclusions(tree: xarray.DataTree) -> dict[str, Any]:
    """Attributes computed from the draws: the findings, the number of gradients."""
    conclusions: dict[str, Any] = {"findings": as_json(diagnose(tree))}
    if "sample_stats" in tree.children and "n_steps" in tree["sample_stats"]:
        conclusions["n_gradient_evaluations"] = int(tree["sample_stats"]["n_steps"].sum())
    return conclusions


def _concatenated(old: xarray.DataTree, new: xarray.DataTree, program: Program) -> xarray.DataTree:
    import xarray

    joined = {}
    for name, group in new.children.items():
        if "draw" in group.dims and name in old.children:
            joined[name] = xarray.concat(
                [old[name].to_dataset(), group.to_dataset()], dim="draw", combine_attrs="override"
            )
        else:
            joined[name] = group.to_dataset()
    tree = xarray.DataTree.from_dict(joined)
    tree.attrs.update(new.attrs)
    for key in ("time_warmup", "time_sampling", "time_compile"):
        tree.attrs[key] = float(old.attrs[key]) + float(new.attrs[key])
    tree.attrs.update(_conclusions(tree))
    _warn_of(findings(tree))
    return tree


def _warn_of(found: Sequence[Finding]) -> None:
    """The one warning a run may give."""
    if found:
        count = f"{len(found)} finding{'s' if len(found) > 1 else ''}"
        warnings.warn(f"{count}:\n{as_text(found)}", InferenceWarning, stacklevel=4)


# -- checks and choices -------------------------------------------------------------------------


def _check_options(
    draws: Any, warmup: Any, chains: Any, chunk: Any, threads: Any, lanes: Any
) -> None:
    for name, value, least in (
        ("draws", draws, 1),
        ("warmup", warmup, 0),
        ("chains", chains, 1),
        ("chunk", chunk, 1),
        ("threads", threads, 1),
        ("lanes", lanes, 1),
    ):
        optional = name not in ("draws", "chains")
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise OptionError(f"{name} must be an integer >= {least}; got {value!r}.")


def _precision(precision: str | None) -> str:
    if precision is None:
        return "float64" if jax.default_backend() == "cpu" else "float32"
    if precision not in ("float64", "float32"):
        raise OptionError(f"precision must be 'float64' or 'float32'; got {precision!r}.")
    return precision


def _default_lanes(chains: int) -> int:
    """One lane on CPU (lock step costs NUTS 2-5 times there); all chains on accelerators."""
    return 1 if jax.default_backend() == "cpu" else chains


def _choose(method: str | Method, program: Program, stored: Checkpoint | None) -> tuple[Any, str]:
    """The method object, and why it was taken."""
    if stored is not None:
        options = {"method_options": stored.manifest["method_options"]}
        known = method_named(stored.manifest["method"])(**_init_options(options))
        return known, stored.manifest["method_reason"]
    if isinstance(method, type):
        method = method()
    if not isinstance(method, str):
        if not isinstance(method, Method):
            raise MethodError(
                f"method must be a name or a method object such as NUTS(); got {method!r}."
            )
        return method, f"{type(method).__name__}: asked for."
    if method != "auto":
        return method_named(method)(), f"{method_named(method).__name__}: asked for."
    if program.discrete and not program.continuous:
        count = program.configurations
        return method_named("enumeration")(), (
            f"Enumeration: all latent sites are discrete, with {count:,} joint values."
        )
    if program.marginalised:
        names = [site.name for site in program.discrete]
        return method_named("nuts")(), (
            f"NUTS: continuous latent sites (D = {program.size}); the discrete sites {names} are "
            "summed out exactly."
        )
    return method_named("nuts")(), f"NUTS: all latent sites are continuous (D = {program.size})."


def _init_options(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(attributes["method_options"])


def _refuse_changes(stored: Checkpoint, method: Any, warmup: Any, chains: int, seed: int) -> None:
    """Options that differ from those of the stored run, and are not the defaults, are an error."""
    manifest = stored.manifest
    name = method if isinstance(method, str) else type(method).__name__
    for option, value, default in (
        ("method", name.lower(), "auto"),
        ("warmup", warmup, None),
        ("chains", chains, 4),
        ("seed", seed, 0),
    ):
        was = manifest[option].lower() if option == "method" else manifest[option]
        if value not in (default, was):
            raise CheckpointError(
                f"the stored run has {option}={was!r}; it cannot go on with {option}={value!r}."
            )


def _require_same(program: Program, attributes: Mapping[str, Any]) -> None:
    for what, own in (("model", program.model_hash), ("data", program.data_hash)):
        if attributes.get(f"{what}_hash") != own:
            raise CheckpointError(
                f"the {what} of the earlier run differ{'s' if what == 'model' else ''} from this "
                "one, so it cannot go on. For new data use infer(..., init=result)."
            )


def _plain(coords: Mapping[str, Any]) -> dict[str, list]:
    return {dim: np.asarray(values).tolist() for dim, values in coords.items()}
