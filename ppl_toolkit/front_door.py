"""The front door: check the call, pick the method, run it, label the result."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ppl_toolkit import results
from ppl_toolkit.arguments import with_data
from ppl_toolkit.bare_density import as_model, density_like
from ppl_toolkit.call import Begin, Call, carry_out, conclusions
from ppl_toolkit.diagnostics.findings import as_text, findings
from ppl_toolkit.engine import Engine
from ppl_toolkit.errors import CheckpointError, InferenceWarning, MethodError, OptionError
from ppl_toolkit.files import load
from ppl_toolkit.goals import Goal
from ppl_toolkit.inference import as_method, method_named
from ppl_toolkit.inference.method import Method
from ppl_toolkit.labels import check_coords, coords_of
from ppl_toolkit.program import Program
from ppl_toolkit.starts import drawn_starts, is_tree, one_per_chain, start_positions
from ppl_toolkit.store import Checkpoint, read_checkpoint

if TYPE_CHECKING:
    import xarray

__all__ = ["Options", "extend", "infer"]

_DRAWS, _MOST_DRAWS, _CHAINS, _SEED = 1000, 10_000, 4, 0
_FEWEST_SUPERCHAINS = 4  # by default: fewer tell little of how they differ
_LEAST = {"draws": 1, "warmup": 0, "chains": 1, "chunk": 1, "threads": 1, "lanes": 1,
          "superchains": 2}  # fmt: skip


def infer(
    model: Callable,
    *args: Any,
    method: str | Method = "auto",
    draws: int | None = None,
    warmup: int | None = None,
    chains: int | None = None,
    superchains: int | None = None,
    until: Goal | None = None,
    seed: int | None = None,
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
        method: "auto", a name such as "nuts" or "laplace", or a method object such as
            ``NUTS(target_acceptance=0.95)``.
        draws: draws per chain to keep; 1000, or what the method prefers, if None. With ``until``
            the most of them; 10,000 if None.
        warmup: warm-up iterations per chain; the method's default if None.
        chains: independent runs; 4, or what the method prefers, if None.
        superchains: so many groups of chains that start at the same point, for many short chains:
            their convergence is judged by nested R-hat. None: every chain has its own start, unless
            the method prefers groups.
        until: a `Goal`, such as ``ppl.Goal(ess=1000)``: the run ends when it is reached.
        seed: an integer, 0 if None. The same seed gives the same draws, however the run is cut into
            chunks, threads, stores and resumptions.
        init: where to start: None (random), "prior", a dictionary of site values (one for all
            chains, or with a leading dimension of chains, or of superchains), or an earlier result,
            whose step size and metric are taken over and whose warm-up is short; where they do not
            fit (a result of `Pathfinder`, say, or of other chains or another metric) chains start
            at its last draws. For a log density: a position.
        coords: labels for dimensions, ``{"school": names}``.
        dims: names for event dimensions, ``{"beta": ["predictor"]}``.
        data: further arguments of the model by name, for names that infer itself uses.
        progress: "auto", "bar", "lines", True or False.
        chunk: iterations between checks for Ctrl-C, progress and commits; chosen by time if None.
        store: a directory (``.zarr``) that draws are streamed to; makes the run resumable after a
            crash, with memory bounded.
        resume: such a directory of an unfinished run; pass the same model and arguments. Options
            that are left out are those of the run; ``draws`` may be larger than before.
        precision: "float64" (default on CPU) or "float32" (default elsewhere).
        threads: chains run at a time on CPU; the number of cores if None.
        lanes: chains per compiled unit; 1 on CPU, all chains on accelerators if None. Draws are
            the same only for the same lanes. Of methods that advance their chains together: all.
        devices: JAX devices to spread the chains over; the default device if None.

    Returns:
        A tree in ArviZ's schema: `posterior`, `sample_stats`, `observed_data`, `constant_data`,
        `sampler_state`. Findings are in its attributes (`ppl.findings`), and warned about once;
        the warning carries the result, for those who turn warnings into errors.

    Raises:
        ModelError, DataError, SiteError, MethodError, OptionError: before anything is compiled.
        InitializationError: no starting point has a finite density.
        CheckpointError: ``resume`` or ``store`` cannot be used.
        SamplingError: the run failed; ``error.partial`` holds what was drawn.
    """
    options = Options(
        method, draws, warmup, chains, seed, coords, dims, progress, chunk, precision, threads,
        lanes, devices, superchains, until,
    )  # fmt: skip
    options.check()
    for name, place in (("store", store), ("resume", resume)):
        if not isinstance(place, str | Path | None):
            raise OptionError(f"{name} must be the path of a directory; got {place!r}.")
    arguments = with_data(model, kwargs, data)
    if resume is None:
        call, begin = _started(model, args, arguments, options, init, store)
    elif store is None and init is None:
        call, begin = _resumed(model, args, arguments, options, resume)
    else:
        raise OptionError("resume= continues a run; it takes neither store= nor init=.")
    _ = call.program.computed_observations  # checks them; may compile, unlike all before
    tree = carry_out(call, begin)
    _warn_of(tree)
    return tree


class Options(NamedTuple):
    """The options of `infer`; None where they are left to their defaults."""

    method: str | Method
    draws: int | None
    warmup: int | None
    chains: int | None
    seed: int | None
    coords: Mapping[str, Any] | None
    dims: Mapping[str, Sequence[str]] | None
    progress: bool | str
    chunk: int | None
    precision: str | None
    threads: int | None
    lanes: int | None
    devices: Sequence[Any] | None
    superchains: int | None
    until: Goal | None

    def check(self) -> None:
        """Refuse numbers out of their range."""
        for name, least in _LEAST.items():
            _check_count(name, getattr(self, name), least)
        if self.seed is not None:
            results.checked_seed(self.seed)
        _check_goal(self.until)

    def program(self, model: Callable, args: tuple, arguments: Mapping[str, Any]) -> Program:
        """The model on its arguments, in the precision and with the dimensions asked for."""
        precision = _precision(self.precision)
        return Program(model, args, arguments, precision=precision, dims=self.dims)

    def new_call(self, program: Program, store: Any = None) -> Call:
        """The call of a new run."""
        method, reason = _choose(self.method, program)
        labels = check_coords(program, {} if self.coords is None else self.coords)
        warmup = method.warmup if self.warmup is None else self.warmup
        return self.call(program, method, reason, labels, warmup, store)

    def call(
        self,
        program: Program,
        method: Any,
        reason: str,
        labels: Mapping[str, np.ndarray],
        warmup: int,
        store: str | Path | None,
    ) -> Call:
        """The call, with defaults in place of what was left out."""
        method.check(program)
        chains: int = getattr(method, "chains", _CHAINS) if self.chains is None else self.chains
        superchains = self.superchains or _default_superchains(method, chains)
        lanes, devices = _placed(method, chains, self.lanes, self.devices)
        if superchains and (chains % superchains or chains == superchains):
            raise OptionError(
                f"superchains={superchains} must part chains={chains} into equal groups of two or "
                f"more, such as chains={8 * superchains}."
            )
        if self.until is not None:
            _check_serves(method)
            drawn = ("latent", "deterministic")
            self.until.check([s.name for s in program.sites.values() if s.kind in drawn])
        most = getattr(method, "draws", _DRAWS) if self.until is None else _MOST_DRAWS
        draws = self.draws if self.draws is not None else most
        return Call(
            program, method, reason, draws, warmup, chains,
            _SEED if self.seed is None else int(self.seed), labels, self.progress, self.chunk,
            self.threads, lanes, devices, store, superchains, self.until,
        )  # fmt: skip


def _started(
    model: Callable,
    args: tuple,
    arguments: Mapping[str, Any],
    options: Options,
    init: Any,
    store: str | Path | None,
) -> tuple[Call, Begin]:
    """A new run: from random or given points, or from the state of an earlier result."""
    earlier = init if is_tree(init) else None
    if earlier is not None:
        results.require_tree(earlier)
        model = _model_of(earlier, model)
    else:
        model, args, init = as_model(model, args, arguments, init)
    program = options.program(model, args, arguments)
    call = options.new_call(program, store)
    if earlier is not None and not _takes_over(call, earlier):
        drawn = earlier[results.posterior_group(earlier)].dataset
        init, earlier = drawn_starts(program, drawn, call.superchains or call.chains), None
    elif earlier is not None and options.warmup is None:
        call = call._replace(warmup=call.method.refit_warmup)
    if init is not None and earlier is None and not getattr(call.method, "takes_start", True):
        raise OptionError(f"{call.name} does not start from a given position; leave init= out.")
    if options.superchains is None and one_per_chain(program, init, call.chains):
        call = call._replace(superchains=0)  # a default of the method
    begin = Begin(*start_positions(program, init, call.chains, call.seed, call.superchains))
    if earlier is not None:
        _require_same_sites(program, earlier)
        begin = begin._replace(state=_state_of(earlier), renew=True)
    return call, begin


def _takes_over(call: Call, earlier: xarray.DataTree) -> bool:
    """Whether a run can begin with the sampler's state of a result."""
    state = _state_of(earlier)
    if not state or len(next(iter(state.values()))) != call.chains:
        return False
    engine = Engine(call.program, call.method, call.lanes, call.devices)
    return results.fits_state(state, engine.structure.state)


def _resumed(
    model: Callable,
    args: tuple,
    arguments: Mapping[str, Any],
    options: Options,
    path: str | Path,
) -> tuple[Call, Begin]:
    """A stored run that goes on; what was left out is as it was."""
    stored = read_checkpoint(path)
    was = stored.manifest
    _refuse_changes(was, options)
    draws = options.draws or int(was["target_draws"])
    if draws < was["draws"]:
        raise OptionError(f"the stored run has {was['draws']} draws already; got {draws=}.")
    if was["log_density"]:
        model = density_like(model, {k: v.shape for k, v in stored.shapes.items()})
    dims = json.loads(was["dims"]) if options.dims is None else options.dims
    program = Program(model, args, arguments, precision=was["precision"], dims=dims)
    method, reason = _stored_method(options.method, was)
    labels = check_coords(program, stored.coords if options.coords is None else options.coords)
    _require_same(program, was)
    kept = {name: was[name] for name in ("chains", "seed", "lanes")}
    kept["superchains"] = was.get("superchains", 0)
    if options.until is None and was.get("goal"):
        kept["until"] = Goal(**json.loads(was["goal"]))
    options = options._replace(draws=draws, **kept)
    call = options.call(program, method, reason, labels, int(was["warmup"]), path)
    return call, _going_on(call, stored, load(path) if call.goal is not None else None)


def extend(
    tree: xarray.DataTree,
    model: Callable,
    *args: Any,
    draws: int | None = None,
    until: Goal | None = None,
    progress: bool | str = "auto",
    chunk: int | None = None,
    threads: int | None = None,
    method: Method | None = None,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> xarray.DataTree:
    """Draw more from where a result ended: 500 and 500 more equal a run of 1000, bit for bit.

    Args:
        tree: a result of `infer`, complete or interrupted (in warm-up as well).
        model, *args, **kwargs: the model and the arguments of the run.
        draws: further draws per chain; 1000 if None. With ``until`` the most; 10,000 if None.
        until: a `Goal` for the old and the new draws together.
        progress, chunk, threads, data: as in `infer`.
        method: the method object of the run, where it is one of your own.

    Returns:
        A tree with the old and the new draws. Groups computed from the old draws
        (log likelihoods, predictions) are left out: compute them again.

    Raises:
        CheckpointError: the result has no sampler state, or the model or the data differ.
    """
    results.require_tree(tree)
    for name, value in (("draws", draws), ("chunk", chunk), ("threads", threads)):
        _check_count(name, value, 1)
    _check_goal(until)
    if draws is None:
        draws = _DRAWS if until is None else _MOST_DRAWS
    if "sampler_state" not in tree.children:
        raise CheckpointError("this result has no sampler_state group, so it cannot be extended.")
    attrs: dict[str, Any] = {str(k): v for k, v in tree.attrs.items()}
    arguments = with_data(model, kwargs, data)
    program = Program(
        _model_of(tree, model),
        args,
        arguments,
        precision=attrs["precision"],
        dims=json.loads(attrs["dims"]),
    )
    _require_same(program, attrs)
    method, _ = _stored_method("auto" if method is None else method, attrs)
    done = int(attrs["iteration"]) - int(attrs["warmup"])  # some may have been thinned away
    if tree["sampler_state"].sizes["chain"] != int(attrs["chains"]):
        raise CheckpointError(
            f"the result has the state of {tree['sampler_state'].sizes['chain']} of "
            f"{attrs['chains']} chains; only whole results can be extended."
        )
    done = max(done, 0)
    call = Call(
        program, method, attrs["method_reason"], done + draws, int(attrs["warmup"]),
        int(attrs["chains"]), int(attrs["seed"]), coords_of(tree, program), progress,
        chunk, threads, int(attrs["lanes"]), tuple(jax.local_devices()[:1]),
        None, int(attrs.get("superchains", 0)), until,
    )  # fmt: skip
    stored = Checkpoint(
        {
            "iteration": int(attrs["iteration"]),
            "draws": done,
            "warmup_steps": int(attrs.get("n_gradient_evaluations_warmup", 0)),
        },
        _state_of(tree),
        {},
        {},
    )
    new = carry_out(call, _going_on(call, stored, tree if until is not None else None))
    joined = _concatenated(tree, new)
    _warn_of(joined)
    return joined


def _model_of(tree: xarray.DataTree, model: Callable) -> Callable:
    """The model of a result: as it is, or a log density as a model."""
    if not tree.attrs.get("log_density"):
        return model
    draws = tree[results.posterior_group(tree)].dataset.data_vars
    return density_like(model, {str(name): values.shape[2:] for name, values in draws.items()})


def _going_on(call: Call, stored: Checkpoint, tree: xarray.DataTree | None) -> Begin:
    """The beginning of a run that goes on from a checkpoint; a goal sees the draws of ``tree``."""
    nowhere = np.zeros((call.chains, call.program.size), call.program.precision)
    was = stored.manifest
    earlier = None
    if tree is not None and was["draws"]:
        group = tree[call.group].dataset
        sites = [s for s in call.program.sites.values() if s.variable in group]
        earlier = {s.name: group[s.variable].values[:, : was["draws"]] for s in sites}
    return Begin(
        nowhere, np.zeros(call.chains, bool), stored.state, iteration=int(was["iteration"]),
        draws=int(was["draws"]), warmup_steps=int(was["warmup_steps"]), earlier=earlier,
    )  # fmt: skip


def _require_same_sites(program: Program, tree: xarray.DataTree) -> None:
    """A sampler's state is taken over by position: the sites must be the same, in order."""
    own = [site.variable for site in program.latent]
    earlier = json.loads(tree.attrs.get("latent_sites", json.dumps(own)))
    if own != earlier:
        raise CheckpointError(
            f"init= is a result for the sites {earlier}; this model has {own}. Pass a dictionary "
            "of values instead."
        )


def _state_of(tree: xarray.DataTree) -> dict[str, np.ndarray]:
    if "sampler_state" not in tree.children:
        return {}
    state = tree["sampler_state"].dataset.data_vars
    return {str(name): np.asarray(value) for name, value in state.items()}


def _concatenated(old: xarray.DataTree, new: xarray.DataTree) -> xarray.DataTree:
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
    tree.attrs.update(conclusions(tree))
    return tree


def _warn_of(tree: xarray.DataTree) -> None:
    """The one warning a run may give; it carries the result."""
    if tree.attrs["interrupted"]:
        done = tree[results.posterior_group(tree)].sizes["draw"]
        text = (
            f"interrupted after {done} draws per chain; these are returned. Go on with "
            "ppl.extend(result, model, ...)."
        )
    elif found := findings(tree):
        text = f"{len(found)} finding{'s' if len(found) > 1 else ''}:\n{as_text(found)}"
    else:
        return
    warning = InferenceWarning(text)
    warning.result = tree
    warnings.warn(warning, stacklevel=3)


# -- checks and choices -------------------------------------------------------------------------


def _check_count(name: str, value: Any, least: int) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least
    if value is not None and wrong:
        raise OptionError(f"{name} must be an integer >= {least}; got {value!r}.")


def _check_goal(until: Any) -> None:
    if not isinstance(until, Goal | None):
        raise OptionError(f"until must be a Goal, such as ppl.Goal(ess=1000); got {until!r}.")


def _check_serves(method: Any) -> None:
    if not getattr(method, "one_law", True):
        raise OptionError(
            f"until= ends runs whose draws are of one law; {type(method).__name__} decides itself "
            "how far it goes. Leave until= out."
        )


def _precision(precision: str | None) -> str:
    if precision is None:
        return "float64" if jax.default_backend() == "cpu" else "float32"
    if precision not in ("float64", "float32"):
        raise OptionError(f"precision must be 'float64' or 'float32'; got {precision!r}.")
    return precision


def _placed(
    method: Any, chains: int, lanes: int | None, devices: Sequence[Any] | None
) -> tuple[int, tuple[Any, ...]]:
    """Lanes and devices; of methods whose chains advance together all on one device."""
    devices = tuple(devices or jax.local_devices()[:1])
    if not getattr(method, "together", False):
        return lanes or _default_lanes(chains), devices
    name = type(method).__name__
    if chains < 2:
        raise OptionError(f"{name} adapts its chains together: it needs chains=2 or more.")
    if lanes not in (None, chains):
        raise OptionError(
            f"the chains of {name} advance together, in as many lanes; got {lanes=} for "
            f"{chains=}. Leave lanes= out."
        )
    if len(devices) > 1:
        raise OptionError(
            f"the chains of {name} advance together, on one device; got {len(devices)}. Leave "
            "devices= out."
        )
    return chains, devices


def _default_lanes(chains: int) -> int:
    """One lane on CPU (lock step costs NUTS 2-5 times there); all chains on accelerators."""
    return 1 if jax.default_backend() == "cpu" else chains


def _default_superchains(method: Any, chains: int) -> int:
    """As many groups of two chains or more as the method prefers, or fewer; 0 if none are equal."""
    most = min(getattr(method, "superchains", 0), chains // 2)
    return max((n for n in range(_FEWEST_SUPERCHAINS, most + 1) if chains % n == 0), default=0)


def _choose(method: str | Method, program: Program) -> tuple[Any, str]:
    """The method object, and why it was taken."""
    if method != "auto":
        chosen = as_method(method)
        return chosen, f"{type(chosen).__name__}: asked for."
    if program.discrete and not program.continuous:
        count = program.configurations
        return as_method("enumeration"), (
            f"Enumeration: all latent sites are discrete, with {count:,} joint values."
        )
    if program.marginalised:
        names = [site.name for site in program.discrete]
        return as_method("nuts"), (
            f"NUTS: continuous latent sites (D = {program.size}); the discrete sites {names} are "
            "summed out exactly."
        )
    return as_method("nuts"), f"NUTS: all latent sites are continuous (D = {program.size})."


def _stored_method(method: Any, was: Mapping[str, Any]) -> tuple[Any, str]:
    """The method of a stored run; one that is asked for must be the same."""
    asked = method if isinstance(method, str) else as_method(method)
    if not isinstance(asked, str):
        options = (type(asked).__name__, results.options_text(asked))
        if options != (was["method"], was["method_options"]):
            raise CheckpointError(
                f"the earlier run has method={was['method']} with options "
                f"{was['method_options']}; it cannot go on with {asked}."
            )
        return asked, was["method_reason"]
    if asked.lower() not in ("auto", was["method"].lower()):
        raise CheckpointError(
            f"the earlier run has method={was['method']}; it cannot go on with {asked}."
        )
    try:
        known = method_named(was["method"])
    except MethodError:
        raise CheckpointError(
            f"the earlier run used a method of your own, {was['method']}; pass it: method=..."
        ) from None
    try:
        return known(**json.loads(was["method_options"])), was["method_reason"]
    except (OptionError, TypeError):
        raise CheckpointError(
            f"the earlier run used {was['method']} with parts of your own; pass the same method "
            f"again: method={was['method']}(...). Its options were {was['method_options']}."
        ) from None


def _refuse_changes(was: Mapping[str, Any], options: Options) -> None:
    """Options that are given must be those of the stored run."""
    for option in ("warmup", "chains", "seed", "lanes", "superchains", "precision"):
        value = getattr(options, option)
        if value is not None and value != was[option]:
            raise CheckpointError(
                f"the stored run has {option}={was[option]!r}; it cannot go on with "
                f"{option}={value!r}."
            )


def _require_same(program: Program, attributes: Mapping[str, Any]) -> None:
    for what, own in (("model", program.model_hash), ("data", program.data_hash)):
        if attributes.get(f"{what}_hash") != own:
            raise CheckpointError(
                f"the {what} of the earlier run differ{'s' if what == 'model' else ''} from this "
                "one, so it cannot go on. For new data use infer(..., init=result)."
            )
