"""The draws on many data sets as one tree, and the ordinary result of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ppl_toolkit import results
from ppl_toolkit.call import Call, attributes_of, method_groups
from ppl_toolkit.many_runs import Finished
from ppl_toolkit.results import DATA_SET
from ppl_toolkit.runner import Outcome, Timing
from ppl_toolkit.tracing import digest

if TYPE_CHECKING:
    import xarray

__all__ = ["Drawn", "single", "tree_of", "with_group"]

# What says nothing of one data set alone.
_ATTRIBUTES, _GROUPS = ("data_sets", "over", "findings"), ("diagnostics", "failed", "runs")


class Drawn:
    """The draws, statistics and last states on data sets, arrays (data set, chain, ...) by name.

    They are gathered in place, so that no second copy of them is ever needed.

    Args:
        count: how many data sets there may be.
    """

    def __init__(self, count: int) -> None:
        self.values: dict[str, np.ndarray] = {}
        self.stats: dict[str, np.ndarray] = {}
        self.states: dict[str, np.ndarray] = {}
        self.timings: dict[int, Timing] = {}
        self.warmup_steps: dict[int, int] = {}
        self._count = count
        self._structure: Any = None  # of a state

    @property
    def numbers(self) -> list[int]:
        """The data sets that are there."""
        return sorted(self.timings)

    def put(self, number: int, finished: Finished) -> None:
        """Take what came of a data set."""
        states = results.state_arrays(finished.state)
        for kept, new in (
            (self.values, finished.block.values), (self.stats, finished.block.stats),
            (self.states, states),
        ):  # fmt: skip
            for name, array in new.items():
                if name not in kept:
                    kept[name] = np.empty((self._count, *array.shape), array.dtype)
                kept[name][number] = array
        self._structure = jax.tree.structure(finished.state)
        self.timings[number], self.warmup_steps[number] = finished.timing, finished.warmup_steps

    def shown(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of the data sets that are there."""
        if len(self.timings) == self._count:
            return arrays
        return {name: array[self.numbers] for name, array in arrays.items()}

    def last_states(self) -> Any:
        """The states at the end, arrays (data set, chain, ...)."""
        return jax.tree.unflatten(self._structure, self.shown(self.states).values())


def tree_of(
    calls: Sequence[Call],
    drawn: Drawn,
    varied: Sequence[int],
    labels: np.ndarray,
    compile_seconds: float,
    said: Mapping[str, Any],
) -> xarray.DataTree:
    """The result for the data sets that are there.

    Args:
        calls: one call per data set.
        drawn: what came of them.
        varied: the numbers of the arguments that differ.
        labels: of all data sets.
        compile_seconds: of the whole run.
        said: attributes of the whole run.
    """
    call, numbers = calls[0], drawn.numbers
    program = call.program
    coords = {**call.coords, DATA_SET: labels[numbers]}
    own = {DATA_SET: coords[DATA_SET]}
    leading = (DATA_SET, "chain", "draw")
    values, stats, states = drawn.shown(drawn.values), drawn.shown(drawn.stats), drawn.last_states()
    there = [calls[number] for number in numbers]
    runs = _runs(there, drawn, stats, varied)
    groups: dict[str, xarray.Dataset] = {
        call.group: results.draws_dataset(values, program, coords, leading=leading),
        results.stats_group(call.group): results.draws_dataset(stats, program, own, 0, leading),
        **results.data_groups(program, coords, [one.program for one in there], varied),
        **_method_groups(call, states, own),
        "sampler_state": results.state_dataset(states, own, leading[:2]),
        "runs": results.dataset(runs, {}, own, leading[:1]),
    }
    summed = {name: runs[name].sum().item() for name in runs if name not in ("seed", "data_hash")}
    outcome = Outcome(
        call.warmup + call.draws, None, False, None,
        Timing(summed["time_warmup"], summed["time_sampling"]), 0,
    )  # fmt: skip
    attributes = attributes_of(call, call.identity(), outcome, compile_seconds, 0)
    del attributes["data_hash"]
    attributes |= {**summed, "data_sets": len(calls), **said}
    return results.build({k: v for k, v in groups.items() if v.data_vars}, attributes)


def _runs(
    calls: Sequence[Call], drawn: Drawn, stats: dict[str, np.ndarray], varied: Sequence[int]
) -> dict[str, np.ndarray]:
    """What the attributes of every data set's own result say of it, (data set,) by name."""
    program, numbers = calls[0].program, drawn.numbers
    shared = {
        number: digest(array)
        for number, array in enumerate(program.arguments.arrays)
        if number not in varied
    }

    def data_hash(call: Call) -> str:
        arrays = enumerate(call.program.arguments.arrays)
        return program.hash_of_data(shared.get(i) or digest(array) for i, array in arrays)

    found = {
        "seed": np.array([call.seed for call in calls], np.uint64),
        "data_hash": np.array([data_hash(call) for call in calls]),
        "time_warmup": np.array([drawn.timings[number].warmup for number in numbers]),
        "time_sampling": np.array([drawn.timings[number].sampling for number in numbers]),
        "n_gradient_evaluations_warmup": np.array([drawn.warmup_steps[n] for n in numbers]),
    }
    if "n_steps" in stats and calls[0].group == "posterior":
        found["n_gradient_evaluations"] = stats["n_steps"].sum((1, 2), dtype=np.int64)
    return found


def _method_groups(
    call: Call, states: Any, coords: dict[str, np.ndarray]
) -> dict[str, xarray.Dataset]:
    """The groups that the method makes of its last states, by data set."""
    import xarray

    def parted(group: xarray.Dataset) -> xarray.Dataset:
        arrays = {
            name: ((DATA_SET, *array.dims), array.values.reshape(-1, call.chains, *array.shape[1:]))
            for name, array in group.data_vars.items()
        }
        inner = {str(dim): values for dim, values in group.coords.items() if dim != "chain"}
        coordinates = {**inner, **coords, "chain": np.arange(call.chains)}
        return xarray.Dataset(arrays, coords=coordinates, attrs=group.attrs)

    all_chains = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
    groups = method_groups(call.method, all_chains)
    return {name: parted(group) for name, group in groups.items()}


def single(tree: xarray.DataTree, place: int) -> xarray.DataTree:
    """The result of the data set at a place, but for what is concluded from its draws."""
    groups = {}
    for name, group in tree.children.items():
        if name not in _GROUPS:
            own = group.to_dataset()
            own.attrs = {k: value for k, value in own.attrs.items() if k not in _ATTRIBUTES}
            own = own.isel({DATA_SET: place}, drop=True) if DATA_SET in own.dims else own
            # There are as many stages as any data set needed.
            groups[name] = own.dropna("stage", how="all") if "stage" in own.dims else own
    attributes = {str(name): x for name, x in tree.attrs.items() if name not in _ATTRIBUTES}
    runs = tree["runs"].dataset
    attributes |= {str(name): runs[name].values[place].item() for name in runs.data_vars}
    return results.build(groups, {**attributes, "interrupted": 0})


def with_group(tree: xarray.DataTree, name: str, group: xarray.Dataset) -> xarray.DataTree:
    """The tree with one more group."""
    import xarray

    tree[name] = xarray.DataTree(group.assign_attrs(results.run_attributes()))
    return tree
