"""Draws become an `xarray.DataTree` in ArviZ's schema; its groups, attributes and summary."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ppl_toolkit import __version__, convergence
from ppl_toolkit.errors import (
    CheckpointError,
    DataError,
    OptionError,
    SiteError,
)
from ppl_toolkit.labels import label_dimensions
from ppl_toolkit.program import Program
from ppl_toolkit.sites import variable_name
from ppl_toolkit.starts import start_numbers

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = [
    "DATA_SET",
    "build",
    "checked_seed",
    "data_groups",
    "dataset",
    "draws_dataset",
    "options_text",
    "posterior_group",
    "read_state",
    "require_tree",
    "run_attributes",
    "scalar_labels",
    "state_arrays",
    "state_dataset",
    "stats_group",
    "summary",
    "superchains_of",
    "with_groups",
]


DATA_SET = "data_set"
"""The leading dimension of results for many data sets."""

# -- building the tree --------------------------------------------------------------------------


def _dims_of(program: Program) -> dict[str, tuple[str, ...]]:
    return {name: site.dims for name, site in program.sites.items()}


def dataset(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    leading: Sequence[str] = (),
) -> xarray.Dataset:
    """A labelled dataset of ``values``; ``leading`` names their first dimensions."""
    import xarray

    data: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, value in values.items():
        extra = dims.get(name, ())
        if len(extra) != value.ndim - len(leading):
            extra = [f"{variable_name(name)}_dim_{i}" for i in range(value.ndim - len(leading))]
        names = (*leading, *extra)
        sizes.update(zip(names, value.shape, strict=True))
        data[variable_name(name)] = (names, value)
    return xarray.Dataset(data, coords=label_dimensions(sizes, coords))


def draws_dataset(
    values: Mapping[str, np.ndarray],
    program: Program,
    coords: Mapping[str, Any],
    first_draw: int = 0,
    leading: Sequence[str] = ("chain", "draw"),
) -> xarray.Dataset:
    """Arrays (chain, draw, ...) by site as a dataset with the program's dimension names."""
    order = {name: i for i, name in enumerate(program.sites)}
    ordered = dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order))))
    labelled = dataset(ordered, _dims_of(program), coords, leading)
    if first_draw and "draw" in labelled:
        labelled = labelled.assign_coords(draw=labelled["draw"] + first_draw)
    return labelled


def run_attributes(**extra: Any) -> dict[str, Any]:
    """Attributes every group of a run carries: strings and numbers only, as netCDF needs."""
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "ppl_toolkit",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "inference_library": "ppl_toolkit",
        "inference_library_version": __version__,
        **extra,
    }


def data_groups(
    program: Program,
    coords: Mapping[str, Any],
    many: Sequence[Program] = (),
    varied: Collection[int] = (),
) -> dict[str, xarray.Dataset]:
    """The observed and the other data of a program, by group.

    Args:
        program: a program.
        coords: labels of dimensions.
        many: the program on each of many data sets, if there are any; what varies among them has
            the leading dimension `DATA_SET`.
        varied: the numbers of the arguments that do.
    """
    sites, arguments = program.sites, program.arguments
    observed: dict[str, int | str] = {  # by the number of an argument, or the name of a site
        site.name: site.argument if site.argument >= 0 else site.name
        for site in program.observed
        if site.argument >= 0 or site.name in program.computed_observations
    }
    taken = {site.argument for site in program.observed}
    constant: dict[str, int | str] = {
        _variable_name(name): i for i, name in enumerate(arguments.names) if i not in taken
    }
    dims = _constant_dims(program, {name: _datum(program, i) for name, i in constant.items()})
    used = {dim for names in dims.values() for dim in names}
    renamed: dict[str, str] = {}
    for name in constant:
        new = f"{name}_data" if name in used else name
        while new in (*renamed.values(), *used):
            new += "_"
        renamed[name] = new

    def group(
        sources: Mapping[str, int | str],
        dims: Mapping[str, Any],
        datum: Callable[[Program, str, int | str], np.ndarray],
    ) -> xarray.Dataset:
        def varies(name: str, source: int | str) -> bool:
            masks = (one.observed_elements[name] for one in many if name in one.observed_elements)
            hidden = {mask.tobytes() for mask in masks}
            return bool(many) and (source in varied or isinstance(source, str) or len(hidden) > 1)

        each = {n: varies(n, i) for n, i in sources.items()}
        shared = {n: datum(program, n, i) for n, i in sources.items() if not each[n]}
        of_each = {
            n: np.stack([datum(one, n, i) for one in many]) for n, i in sources.items() if each[n]
        }
        found = dataset(shared, dims, coords)
        return found.merge(dataset(of_each, dims, coords, (DATA_SET,))) if of_each else found

    groups = {
        "observed_data": group(
            observed, {name: sites[name].dims for name in observed}, _observation
        ),
        "constant_data": group(
            {renamed[name]: i for name, i in constant.items()},
            {renamed[name]: names for name, names in dims.items()},
            lambda one, _, source: _datum(one, source),
        ),
    }
    return {name: group for name, group in groups.items() if group.data_vars}


def _datum(program: Program, source: int | str) -> np.ndarray:
    """An argument by its number, or what the model computes for a site."""
    return (
        program.computed_observations[source] if isinstance(source, str) else program.data[source]
    )


def _observation(program: Program, site: str, source: int | str) -> np.ndarray:
    """What a site observes, NaN where a mask hides it."""
    value, seen = _datum(program, source), program.observed_elements.get(site)
    return value if seen is None or seen.all() else np.where(seen, value, np.nan)


def _variable_name(argument: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in argument).strip("_")


def _constant_dims(
    program: Program, constant: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, ...]]:
    """Dimension names for covariates: a plate's name where exactly one plate has the length."""
    by_size: dict[int, set[str]] = {}
    for site in program.sites.values():
        for dim, size in zip(site.dims, site.shape, strict=True):
            if not dim.startswith(f"{site.name}_dim_"):
                by_size.setdefault(size, set()).add(dim)
    dims = {}
    for name, value in constant.items():
        first = by_size.get(value.shape[0], set()) if value.ndim else set()
        if len(first) == 1:
            rest = [f"{name}_dim_{i}" for i in range(1, value.ndim)]
            dims[name] = (*first, *rest)
    return dims


def build(groups: Mapping[str, xarray.Dataset], attributes: Mapping[str, Any]) -> xarray.DataTree:
    """The tree of a run; ``attributes`` go to the root and to its first group."""
    import xarray

    named = {}
    for i, (name, group) in enumerate(groups.items()):
        sampled = {"sample_dims": ["chain", "draw"]} if "draw" in group.dims else {}
        own = run_attributes(**(attributes if i == 0 else {}))
        named[name] = group.assign_attrs({**own, **sampled})
    tree = xarray.DataTree.from_dict(named)
    tree.attrs.update(run_attributes(**attributes))
    return tree


def stats_group(group: str) -> str:
    """The group of a draws' group's sampler statistics."""
    return "sample_stats" if group == "posterior" else f"sample_stats_{group}"


def posterior_group(tree: xarray.DataTree, many: bool = False) -> str:
    """The group of draws: "posterior"; "prior"; "iterates" and "maximum" of searches."""
    require_tree(tree, many)
    for name in ("posterior", "prior", "iterates", "maximum"):
        if name in tree.children:
            return name
    raise DataError(
        f"this tree has neither a posterior nor a prior group; its groups are "
        f"{list(tree.children)}."
    )


def require_tree(tree: Any, many: bool = False) -> None:
    """Refuse what is not a result; and, unless ``many``, that of many data sets."""
    if type(tree).__name__ != "DataTree":
        raise DataError(
            f"expected a result of infer (an xarray.DataTree); got {type(tree).__name__}."
        )
    if not many and "data_sets" in tree.attrs:
        raise DataError(
            "this is the result of infer_batch, for many data sets. Take one out: "
            "ppl.one_of(result, label)."
        )


def with_groups(tree: xarray.DataTree, groups: Mapping[str, xarray.Dataset]) -> xarray.DataTree:
    """A copy of ``tree`` with further groups."""
    import xarray

    new = tree.copy()
    for name, group in groups.items():
        sampled = {"sample_dims": ["chain", "draw"]} if "draw" in group.dims else {}
        new[name] = xarray.DataTree(group.assign_attrs(run_attributes(**sampled)))
    return new


# -- the sampler's state ------------------------------------------------------------------------


def _state_names(state: Any) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return [jax.tree_util.keystr(path, simple=True, separator=".") or "state" for path, _ in paths]


def state_arrays(state: Any) -> dict[str, np.ndarray]:
    """A sampler state as named arrays with a leading chain axis."""
    return dict(zip(_state_names(state), map(np.asarray, jax.tree.leaves(state)), strict=True))


def state_dataset(
    state: Any, coords: Mapping[str, Any] | None = None, leading: Sequence[str] = ("chain",)
) -> xarray.Dataset:
    """A sampler state as a dataset (dims chain, ...)."""
    import xarray

    count = len(leading)
    data = {
        name: ((*leading, *(f"{name}_dim_{i}" for i in range(value.ndim - count))), value)
        for name, value in state_arrays(state).items()
    }
    sizes = dict(zip(leading, next(iter(data.values()))[1].shape, strict=False))
    return xarray.Dataset(data, coords=label_dimensions(sizes, coords or {}))


def fits_state(arrays: Mapping[str, Any], structure: Any) -> bool:
    """Whether `read_state` can read these arrays."""
    shapes = {name: np.shape(value)[1:] for name, value in arrays.items()}
    wanted = zip(_state_names(structure), jax.tree.leaves(structure), strict=True)
    return all(shapes.get(name) == like.shape[1:] for name, like in wanted)


def read_state(arrays: Mapping[str, Any], structure: Any) -> Any:
    """The state with the structure of ``structure`` from named arrays.

    Raises:
        CheckpointError: names or shapes do not fit: another method, model or version wrote them.
    """
    names, leaves = _state_names(structure), []
    for name, like in zip(names, jax.tree.leaves(structure), strict=True):
        if name not in arrays:
            raise CheckpointError(
                f"the stored sampler state lacks {name!r}: it was written by another method."
            )
        value = np.asarray(arrays[name])
        if value.shape[1:] != like.shape[1:]:
            raise CheckpointError(
                f"the stored sampler state has {name!r} of shape {value.shape[1:]} per chain, "
                f"but this run needs {like.shape[1:]}: the model or the method's options differ."
            )
        leaves.append(value.astype(like.dtype))
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(structure), leaves)


# -- numbers ------------------------------------------------------------------------------------


def summary(
    tree: xarray.DataTree,
    var_names: Sequence[str] | str | None = None,
    *,
    prob: float = 0.89,
    group: str | None = None,
) -> pandas.DataFrame:
    """Estimates and convergence diagnostics of every scalar, one row each.

    Args:
        tree: a result, of `infer_batch` as well.
        var_names: sites to show; all by default.
        prob: probability of the equal-tailed interval.
        group: "posterior" (default) or "prior".

    Returns:
        Columns mean, sd, the interval, ess_bulk, ess_tail (5% and 95% quantiles, as in Stan),
        r_hat (nested R-hat of chains that share their starts in superchains), mcse_mean, mcse_sd.

    Raises:
        SiteError: a site or group is not there.
    """
    import pandas

    require_tree(tree, many=True)
    if group is not None and group not in tree.children:
        raise SiteError(
            f"there is no group {group!r} in this result; it has {list(tree.children)}."
        )
    draws = tree[group or posterior_group(tree, many=True)].dataset
    names = [var_names] if isinstance(var_names, str) else list(var_names or draws.data_vars)
    unknown = [name for name in names if name not in draws.data_vars]
    if unknown:
        raise SiteError(f"no sites {unknown} in this result; it has {list(draws.data_vars)}.")
    if not 0 < prob < 1:
        raise OptionError(f"prob must lie between 0 and 1; got {prob}.")
    superchains = superchains_of(tree)
    tables = []
    for name in names:
        array = draws[name].transpose("chain", "draw", ...)
        values = np.asarray(array, dtype=float)
        flat = values.reshape(*values.shape[:2], math.prod(values.shape[2:]))
        if not values.shape[1]:
            raise DataError(
                "there are no draws to summarise: the run was interrupted in its warm-up. Go on "
                "with ppl.extend(result, model, ...)."
            )
        numbers = convergence.convergence(flat, quantiles=[(1 - prob) / 2, (1 + prob) / 2])
        if superchains > 1:
            groups = start_numbers(len(flat), superchains)
            numbers["r_hat"] = convergence.rhat_nested(flat, groups)
        percent = f"{100 * prob:g}"
        tables.append(
            pandas.DataFrame(
                {
                    "mean": numbers["mean"],
                    "sd": numbers["sd"],
                    f"eti{percent}_lb": numbers["quantile_0"],
                    f"eti{percent}_ub": numbers["quantile_1"],
                    "ess_bulk": numbers["ess_bulk"],
                    "ess_tail": numbers["ess_tail"],
                    "r_hat": numbers["r_hat"],
                    "mcse_mean": numbers["mcse_mean"],
                    "mcse_sd": numbers["mcse_sd"],
                },
                index=scalar_labels(array),
            )
        )
    return pandas.concat(tables)


def superchains_of(tree: xarray.DataTree) -> int:
    """Groups of chains that share their starts; 0 if none do, or if chains were left out."""
    there = [child.sizes["chain"] for child in tree.children.values() if "chain" in child.sizes]
    whole = bool(there) and there[0] == tree.attrs.get("chains", there[0])
    return int(tree.attrs.get("superchains", 0)) if whole else 0


def scalar_labels(array: xarray.DataArray) -> list[str]:
    """A label for every scalar of a site, such as ``theta[Choate]``."""
    if array.ndim == 2:
        return [str(array.name)]
    named = [[str(value) for value in array[dim].values] for dim in array.dims[2:]]
    return [f"{array.name}[{', '.join(parts)}]" for parts in itertools.product(*named)]


def checked_seed(seed: int) -> int:
    """A seed as an integer in [0, 2^64)."""
    if not isinstance(seed, int | np.integer) or not 0 <= int(seed) < 2**64:
        raise OptionError(f"seed must be an integer in [0, 2^64); got {seed!r}.")
    return int(seed)


def options_text(method: Any) -> str:
    """The options a method was made with, as JSON."""
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    return json.dumps(options, default=_plain_number, sort_keys=True)


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else repr(value)
