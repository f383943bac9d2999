"""The posterior of one model for many data sets of one shape, by one compiled program."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ppl_toolkit import results
from ppl_toolkit.arguments import with_data
from ppl_toolkit.batch_results import Drawn, single, tree_of, with_group
from ppl_toolkit.call import Call, conclusions, require_started
from ppl_toolkit.data_sets import DataSets, numbered
from ppl_toolkit.diagnostics.findings import (
    Finding,
    as_json,
    as_text,
    findings,
    findings_of_setup,
    unjudged,
)
from ppl_toolkit.diagnostics.many import judge, summarised
from ppl_toolkit.diagnostics.pointwise import listed
from ppl_toolkit.engine import Engine
from ppl_toolkit.errors import (
    DataError,
    InferenceWarning,
    MethodError,
    ModelError,
    OptionError,
    PPLError,
    SamplingError,
    SiteError,
)
from ppl_toolkit.front_door import Options, infer
from ppl_toolkit.labels import label_of_each
from ppl_toolkit.many_runs import DataSet, each_data_set
from ppl_toolkit.progress import progress_for
from ppl_toolkit.results import DATA_SET

if TYPE_CHECKING:
    import xarray

    from ppl_toolkit.inference.method import Method

__all__ = ["data_set_seeds", "infer_batch", "one_of"]


def infer_batch(
    model: Callable,
    *args: Any,
    over: str | Sequence[str],
    method: str | Method = "auto",
    draws: int | None = None,
    warmup: int | None = None,
    chains: int | None = None,
    seed: int | Sequence[int] = 0,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    data: Mapping[str, Any] | None = None,
    progress: bool | str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    **kwargs: Any,
) -> xarray.DataTree:
    """Infer the latent sites of one model for each of many data sets.

    Every data set has a posterior of its own: nothing is shared among them but the compiled
    program. For one regression per gene, simulation studies, refits without some of the data::

        fits = ppl.infer_batch(regression, x, y=expression, over="y")   # y: (gene, sample)
        fits["posterior"]["slope"].mean(["chain", "draw"])              # by gene
        fits["diagnostics"].to_dataset().to_dataframe()                 # a row per gene
        ppl.report(ppl.one_of(fits, 17))                                # one of them, in full

        keep = ~np.eye(len(y), dtype=bool)  # for numpyro.handlers.mask, in the model
        ppl.infer_batch(regression, x, y=y, keep=keep, over="keep")     # leaving one out

    Args:
        model: a NumPyro model function.
        *args, **kwargs: its arguments for all data sets.
        over: the names of the arguments that vary. These have one entry per data set: an array has
            them along its first axis, a list or tuple in its places, a dictionary in each of its
            values. The other arguments are shared.
        method: as in `infer`. Methods that draw from the posterior, and those that seek its
            maximum, serve many data sets.
        draws, warmup, chains: for every data set, as in `infer`.
        seed: an integer, from which every data set gets a seed of its own, see `data_set_seeds`; or
            those seeds, one per data set.
        coords: labels for dimensions, as in `infer`; those of ``"data_set"`` name the data sets.
        dims, data, precision: as in `infer`.
        progress: as in `infer`; the data sets are counted.
        threads: data sets worked on at a time on CPU; the number of cores if None.

    Returns:
        A tree like that of `infer` whose groups have a leading dimension ``data_set``; shared data
        do not. Two groups are new. ``diagnostics`` has a row per data set: the least ESS, the
        largest R-hat and Monte Carlo error (in standard deviations) of its scalars, divergences,
        mean acceptance, the worst E-BFMI, and the kinds of its findings. ``runs`` has its seed,
        times and numbers of gradients. The draws of a data set are, bit for bit, those of `infer`
        on it alone with its seed. `one_of` takes one out; `ppl.summary` takes all.

        Data sets that fail, or that Ctrl-C comes before, are left out; the labels tell which are
        there. Everything that needs a second look is in one warning.

    Raises:
        ModelError, DataError, SiteError, MethodError, OptionError: before anything is compiled;
            data sets that differ in shape or type, or cannot be, are named by number.
        InitializationError, SamplingError: all data sets failed.
        KeyboardInterrupt: Ctrl-C came before any was finished.

    Cost: that of `infer` for every data set, without reading and labelling it anew. All draws are
    held in memory, 8 bytes for every scalar of every draw, and about 60 for the statistics of
    NUTS. Data sets are spread over threads, the chains of one run after the other.
    """
    options = Options(
        method, draws, warmup, chains, None, coords, dims, progress, None, precision, threads, None,
        None, None, None,
    )  # fmt: skip
    options.check()
    _refuse_options_of_infer(model, kwargs)
    sets = DataSets.of(model, args, with_data(model, kwargs, data), over)
    seeds = _seeds(seed, sets.size)
    labels = np.arange(sets.size)
    if isinstance(coords, Mapping) and DATA_SET in coords:
        labels = label_of_each(DATA_SET, coords[DATA_SET], sets.size)
        if len(np.unique(labels)) < sets.size:
            raise DataError(f"coords[{DATA_SET!r}] names several data sets alike.")
        options = options._replace(coords={k: v for k, v in coords.items() if k != DATA_SET})
    with numbered(0):
        program = options.program(model, *sets.call(0))
    call = options.new_call(program)
    _require_served(call)
    arrays, varied = sets.arrays(program)
    said = {
        "over": ", ".join(sets.varied),
        "seed": int(seed) if isinstance(seed, int | np.integer) else "one per data set",
    }
    tree = _carried_out(_calls(call, arrays, seeds), varied, labels, said)
    _warn_of(tree)
    return tree


def one_of(tree: xarray.DataTree, label: Any) -> xarray.DataTree:
    """The result of one data set, as `infer` would have given it.

    Args:
        tree: a result of `infer_batch`.
        label: of the data set: what ``coords={"data_set": ...}`` gave it, else its number.

    Returns:
        An ordinary result, for `ppl.report`, `ppl.summary`, `ppl.extend` (with the arguments of
        this data set) and ArviZ.

    Raises:
        DataError: there is no such data set, or ``tree`` is no result for many.
    """
    results.require_tree(tree, many=True)
    if "data_sets" not in tree.attrs:
        raise DataError("this is the result of infer, for one data set: use it as it is.")
    there = np.asarray(tree["runs"].dataset[DATA_SET])
    places = [place for place, name in enumerate(there) if np.ndim(label) == 0 and name == label]
    if not places:
        few = listed([str(name) for name in there])
        raise DataError(f"there is no data set {label!r} in this result; there are {few}.")
    one = single(tree, places[0])
    one.attrs.update(conclusions(one))
    return one


def data_set_seeds(seed: int, count: int) -> list[int]:
    """The seeds of ``count`` data sets in `infer_batch`: well mixed, in [0, 2^63).

    That of number i is ``numpy.random.SeedSequence(seed, spawn_key=(i,)).generate_state(1,
    numpy.uint64)[0] >> 1``, whatever the number of data sets.
    """
    made = (np.random.SeedSequence(seed, spawn_key=(number,)) for number in range(count))
    return [int(one.generate_state(1, np.uint64)[0]) >> 1 for one in made]


# -- before the run -----------------------------------------------------------------------------


def _seeds(seed: Any, count: int) -> list[int]:
    if np.ndim(seed) == 0:
        return data_set_seeds(results.checked_seed(seed), count)
    seeds = [results.checked_seed(one) for one in seed]
    if len(seeds) != count:
        raise OptionError(f"seed= has {len(seeds)} seeds, but there are {count} data sets.")
    return seeds


def _refuse_options_of_infer(model: Callable, kwargs: Mapping[str, Any]) -> None:
    """Say so of options that `infer` alone has; names that the model has are arguments."""
    own = set(inspect.signature(infer_batch).parameters)
    foreign = [name for name in inspect.signature(infer).parameters if name not in own]
    with contextlib.suppress(TypeError, ValueError):  # things without a signature
        foreign = [name for name in foreign if name not in inspect.signature(model).parameters]
    if asked := [name for name in foreign if name in kwargs]:
        raise OptionError(
            f"infer_batch has no options {asked}: they are of infer, which takes one data set."
        )


def _require_served(call: Call) -> None:
    """Refuse models and methods that one program cannot serve for many data sets."""
    if call.program.baked:
        raise ModelError(
            "the model needs concrete values of its data (the warning says where), so every data "
            "set would need a compiled program of its own. Pass what it computes from them as "
            "arguments, compute it with jax.numpy, or call infer in a loop."
        )
    if call.group not in ("posterior", "maximum"):
        raise MethodError(
            f"{call.name} gives no draws from a posterior: call infer for every data set. "
            "infer_batch takes NUTS(), HMC(), SMC(), MCMC(...), MAP() and others like them."
        )
    if call.draws_rows:
        raise MethodError(
            f"{call.name} draws the rows of subsampled plates anew at every step, which "
            "infer_batch does not serve: call infer for every data set."
        )
    if DATA_SET in call.program.dimensions:
        raise SiteError(
            f"the model has a dimension {DATA_SET!r} of its own; give that plate another name."
        )


def _calls(
    call: Call, arrays: Sequence[tuple[np.ndarray, ...]], seeds: Sequence[int]
) -> list[Call]:
    """The call for every data set, its data checked."""
    calls = []
    for number, (own, seed) in enumerate(zip(arrays, seeds, strict=True)):
        with numbered(number):
            program = call.program if number == 0 else call.program.on(own)
            _ = program.computed_observations  # checks them
        calls.append(call._replace(program=program, seed=seed))
    return calls


# -- the run ------------------------------------------------------------------------------------


def _carried_out(
    calls: Sequence[Call], varied: Sequence[int], labels: np.ndarray, said: Mapping[str, Any]
) -> xarray.DataTree:
    """Run all data sets, label what comes out (attributes ``said`` included), and judge it."""
    call, begin = calls[0], time.perf_counter()
    cores = len(os.sched_getaffinity(0)) if call.devices[0].platform == "cpu" else 1
    threads = min(call.threads or cores, len(calls))
    engine = Engine(call.program, call.method, call.lanes, call.devices)
    label = f"{call.name}, {call.chains} chains each"
    with progress_for(call.progress, label, 0, 0, len(calls), "data sets") as shown:
        if call.progress:
            shown.note(call.reason)
        engine.compile("advance", "init")
        compile_seconds = time.perf_counter() - begin
        came = _run(engine, calls, threads, lambda done: shown.update(done, {}))
    if not came.drawn.numbers:
        raise _nothing(came)
    said = {**said, "interrupted": int(came.interrupted), "n_threads": threads}
    tree = tree_of(calls, came.drawn, varied, labels, compile_seconds, said)
    found = findings_of_setup(tree)
    if came.failed:
        failed = _failed(came.failed, labels)
        tree = with_group(tree, "failed", failed)
        found = [_failures(failed, len(calls)), *found]
    try:
        verdicts = judge(tree, lambda place: single(tree, place), threads)
    except (Exception, KeyboardInterrupt) as problem:  # must not cost the draws
        found.append(unjudged(problem))
    else:
        tree = with_group(tree, "diagnostics", verdicts.table)
        found += summarised(verdicts.found, len(came.drawn.numbers))
    tree.attrs["findings"] = as_json(found)
    return tree


class _Came(NamedTuple):
    """What came of the data sets: draws, errors by number, and whether Ctrl-C came."""

    drawn: Drawn
    failed: dict[int, Exception]
    interrupted: bool


def _run(
    engine: Engine, calls: Sequence[Call], threads: int, progress: Callable[[int], None]
) -> _Came:
    call = calls[0]
    drawn, failed = Drawn(len(calls)), {}
    origins = np.zeros((call.chains, call.program.size), call.program.precision)
    given = np.zeros(call.chains, bool)
    data_sets = []
    with call.program.context():
        for one in calls:
            settings = engine.method.settings(one.program, one.warmup)
            data_sets.append(DataSet(one.program.data, settings, one.seed))
    problem = getattr(engine.method, "problem", lambda state: None)  # that it did not arrive
    runs = each_data_set(
        engine, data_sets, call.chains, call.warmup, call.draws, threads,
        lambda number, state: require_started(calls[number], state, origins, given),
        call.superchains,
    )  # fmt: skip
    try:
        for done, (number, outcome) in enumerate(runs, start=1):
            if isinstance(outcome, Exception):
                failed[number] = outcome
            elif text := problem(outcome.state):
                failed[number] = SamplingError(text)
            else:
                drawn.put(number, outcome)
            with contextlib.suppress(Exception):  # a closed stream must not cost the draws
                progress(done)
    except KeyboardInterrupt:
        return _Came(drawn, failed, True)
    return _Came(drawn, failed, False)


# -- what is said of it -------------------------------------------------------------------------


def _nothing(came: _Came) -> BaseException:
    """The error of a run without any result."""
    if came.interrupted:
        return KeyboardInterrupt()
    number, error = min(came.failed.items(), key=lambda item: item[0])
    text = f"all {len(came.failed)} data sets failed. Data set {number}: {error}"
    made = type(error)(text) if isinstance(error, PPLError) else SamplingError(text)
    made.__cause__ = error
    return made


def _failed(errors: Mapping[int, Exception], labels: np.ndarray) -> xarray.Dataset:
    """Why there is nothing of the data sets that failed."""
    import xarray

    numbers = sorted(errors)
    said = [f"{type(errors[number]).__name__}: {errors[number]}" for number in numbers]
    return xarray.Dataset({"error": (DATA_SET, said)}, coords={DATA_SET: labels[numbers]})


def _failures(failed: xarray.Dataset, count: int) -> Finding:
    names = [str(name) for name in failed[DATA_SET].values]
    return Finding(
        "failed",
        "error",
        (),
        len(names),
        f"failed: {len(names)} of {count} data sets ({listed(names)}), which are left out. Of "
        f"{names[0]}: {failed['error'].values[0]}",
        'All reasons are in result["failed"].',
    )


def _warn_of(tree: xarray.DataTree) -> None:
    """The one warning that a run may give; it carries the result."""
    count, there = int(tree.attrs["data_sets"]), tree["runs"].sizes[DATA_SET]
    parts = []
    if tree.attrs["interrupted"]:
        parts.append(
            f"interrupted: {there} of {count} data sets are done; these are returned. Infer the "
            "others with the seeds they have: see ppl_toolkit.batch.data_set_seeds."
        )
    if found := findings(tree):
        parts.append(
            f"findings about {count} data sets:\n{as_text(found)}\nThe table of all is "
            'result["diagnostics"]; ppl.one_of(result, label) takes one out.'
        )
    if not parts:
        return
    warning = InferenceWarning("\n".join(parts))
    warning.result = tree
    warnings.warn(warning, stacklevel=3)
