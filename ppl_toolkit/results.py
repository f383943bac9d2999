"""Draws become an `xarray.DataTree` in ArviZ's schema; what can be done with it afterwards.

The tree holds no model. Functions that need one (`predict`, `log_likelihood`) take it again and
check by its hash that it is the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ppl_toolkit import __version__, convergence, executables
from ppl_toolkit.errors import CheckpointError, DataError, OptionError, SiteError
from ppl_toolkit.program import Program
from ppl_toolkit.sites import Site
from ppl_toolkit.tracing import Traced

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["build", "dataset", "load", "log_likelihood", "predict", "save", "summary"]

_BATCH = 256


# -- building the tree --------------------------------------------------------------------------


def _dims_of(program: Program) -> dict[str, tuple[str, ...]]:
    return {name: site.dims for name, site in program.sites.items()}


def label_dimensions(sizes: Mapping[str, int], coords: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A coordinate for every dimension: the user's, or 0, 1, 2, ..."""
    labels = {}
    for dim, size in sizes.items():
        values = np.asarray(coords.get(dim, np.arange(size)))
        if values.shape != (size,):
            raise DataError(
                f"coords[{dim!r}] has {values.size} labels, but dimension {dim!r} has {size}."
            )
        labels[dim] = values
    return labels


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
            extra = [f"{name}_dim_{i}" for i in range(value.ndim - len(leading))]
        names = (*leading, *extra)
        sizes.update(zip(names, value.shape, strict=True))
        data[name] = (names, value)
    return xarray.Dataset(data, coords=label_dimensions(sizes, coords))


def draws_dataset(
    values: Mapping[str, np.ndarray],
    program: Program,
    coords: Mapping[str, Any],
    first_draw: int = 0,
) -> xarray.Dataset:
    """Arrays (chain, draw, ...) by site as a dataset with the program's dimension names."""
    order = {name: i for i, name in enumerate(program.sites)}
    ordered = dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order))))
    labelled = dataset(ordered, _dims_of(program), coords, ("chain", "draw"))
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


def data_groups(program: Program, coords: Mapping[str, Any]) -> dict[str, xarray.Dataset]:
    """The observed and the other data of a program, by group."""
    sites = program.sites
    observed = {
        site.name: program.data[site.argument] for site in program.observed if site.argument >= 0
    }
    taken = {site.argument for site in program.observed}
    constant = {
        _variable_name(name): array
        for i, (name, array) in enumerate(
            zip(program.arguments.names, program.arguments.arrays, strict=True)
        )
        if i not in taken
    }
    groups = {
        "observed_data": dataset(observed, {n: sites[n].dims for n in observed}, coords),
        "constant_data": dataset(constant, _constant_dims(program, constant), coords),
    }
    return {name: group for name, group in groups.items() if group.data_vars}


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
        if len(first) == 1 and name not in first:
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


def posterior_group(tree: xarray.DataTree) -> str:
    """The group that holds the draws: "posterior", or "prior" for prior runs."""
    for name in ("posterior", "prior"):
        if name in tree.children:
            return name
    raise DataError(
        f"this tree has neither a posterior nor a prior group; its groups are "
        f"{list(tree.children)}."
    )


# -- the sampler's state ------------------------------------------------------------------------


def _state_names(state: Any) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return [jax.tree_util.keystr(path, simple=True, separator=".") or "state" for path, _ in paths]


def state_arrays(state: Any) -> dict[str, np.ndarray]:
    """A sampler state as named arrays with a leading chain axis."""
    return dict(zip(_state_names(state), map(np.asarray, jax.tree.leaves(state)), strict=True))


def state_dataset(state: Any) -> xarray.Dataset:
    """A sampler state as a dataset (dims chain, ...)."""
    import xarray

    data = {
        name: (("chain", *(f"{name}_dim_{i}" for i in range(value.ndim - 1))), value)
        for name, value in state_arrays(state).items()
    }
    chains = next(iter(data.values()))[1].shape[0]
    return xarray.Dataset(data, coords={"chain": np.arange(chains)})


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


# -- files --------------------------------------------------------------------------------------


def save(tree: xarray.DataTree, path: str | Path) -> Path:
    """Write a result to ``path``: netCDF (``.nc``) or zarr (``.zarr``).

    Raises:
        OptionError: the suffix is neither.
    """
    path = Path(path)
    if path.suffix == ".nc":
        temporary = path.with_name(path.name + ".part")
        tree.to_netcdf(temporary, engine="h5netcdf")
        temporary.replace(path)
    elif path.suffix == ".zarr":
        tree.to_zarr(path, mode="w")
    else:
        raise OptionError(f"cannot tell the format from {path.name!r}: end it in .nc or .zarr.")
    return path


def load(path: str | Path) -> xarray.DataTree:
    """Read a result: netCDF into memory, zarr lazily.

    Raises:
        CheckpointError: there is no such file.
    """
    import xarray

    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no result at {path}.")
    if path.suffix == ".zarr" or path.is_dir():
        return xarray.open_datatree(path, engine="zarr", chunks=None)
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()


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
        tree: a result.
        var_names: sites to show; all by default.
        prob: probability of the equal-tailed interval.
        group: "posterior" (default) or "prior".

    Returns:
        Columns mean, sd, the interval, ess_bulk, ess_tail (5% and 95% quantiles, as in Stan),
        r_hat, mcse_mean, mcse_sd.

    Raises:
        SiteError: a name is not there.
    """
    import pandas

    draws = tree[group or posterior_group(tree)].dataset
    names = [var_names] if isinstance(var_names, str) else list(var_names or draws.data_vars)
    unknown = [name for name in names if name not in draws.data_vars]
    if unknown:
        raise SiteError(f"no sites {unknown} in this result; it has {list(draws.data_vars)}.")
    if not 0 < prob < 1:
        raise OptionError(f"prob must lie between 0 and 1; got {prob}.")
    tables = []
    for name in names:
        array = draws[name].transpose("chain", "draw", ...)
        values = np.asarray(array, dtype=float)
        flat = values.reshape(*values.shape[:2], -1)
        numbers = convergence.convergence(flat)
        low, high = np.quantile(flat, [(1 - prob) / 2, (1 + prob) / 2], axis=(0, 1))
        percent = f"{100 * prob:g}"
        tables.append(
            pandas.DataFrame(
                {
                    "mean": numbers["mean"],
                    "sd": numbers["sd"],
                    f"eti{percent}_lb": low,
                    f"eti{percent}_ub": high,
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


def scalar_labels(array: xarray.DataArray) -> list[str]:
    """A label for every scalar of a site, such as ``theta[Choate]``."""
    labels = []
    for index in np.ndindex(*array.shape[2:]):
        parts = [str(array[d].values[i]) for d, i in zip(array.dims[2:], index, strict=True)]
        labels.append(str(array.name) + (f"[{', '.join(parts)}]" if parts else ""))
    return labels


# -- functions that need the model again --------------------------------------------------------


def _over_draws(
    program: Program, traced: Traced, values: Mapping[str, np.ndarray], seed: int, label: str
) -> dict[str, np.ndarray]:
    """``traced(key, values, data)`` for every draw, in batches of one compiled shape.

    Args:
        values: arrays (chain, draw, ...) of the latent sites.

    Returns:
        Arrays (chain, draw, ...) by site. Draw s of the flattened draws uses fold_in(seed, s).
    """
    chains, draws = next(iter(values.values())).shape[:2]
    total = chains * draws
    flat = {k: v.reshape(total, *v.shape[2:]) for k, v in values.items()}
    batch = min(_BATCH, 1 << (total - 1).bit_length())

    def run(consts: Any, data: Any, words: Any, numbers: Any, values: Any) -> Any:
        root = jax.random.wrap_key_data(words)

        def one(number: Any, value: Any) -> Any:
            return traced(consts, jax.random.fold_in(root, number), value, data)

        return jax.vmap(one)(numbers, values)

    def padded(x: np.ndarray, first: int) -> np.ndarray:
        part = x[first : first + batch]
        return np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])

    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    numbers = np.arange(total, dtype=np.uint32)
    parts: dict[str, list[np.ndarray]] = {}
    with program.context():
        device = jax.devices()[0]
        fixed = jax.device_put((traced.consts, program.data, words), device)
        first_args = (*fixed, padded(numbers, 0), {k: padded(v, 0) for k, v in flat.items()})
        shapes = str(jax.tree.map(lambda x: (np.shape(x), str(x.dtype)), first_args))
        executable, _ = executables.compiled(
            (label, traced.text(), shapes, program.precision),
            lambda: jax.jit(run, keep_unused=True).lower(*first_args),
            device,
        )
        for first in range(0, total, batch):
            out = executable.call(
                *fixed, padded(numbers, first), {k: padded(v, first) for k, v in flat.items()}
            )
            count = min(batch, total - first)
            for name, value in out.items():
                parts.setdefault(name, []).append(np.array(np.asarray(value)[:count]))
    return {
        name: np.concatenate(blocks).reshape(chains, draws, *blocks[0].shape[1:])
        for name, blocks in parts.items()
    }


def _latent_draws(
    tree: xarray.DataTree, program: Program, resample: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The latent sites' draws of a result, checked against the program."""
    draws = tree[posterior_group(tree)].dataset
    seen = tree["observed_data"].dataset if "observed_data" in tree.children else {}
    values = {}
    for site in program.latent:
        if site.name in resample or (site.name in seen and site.name not in draws):
            continue
        if site.name not in draws:
            raise SiteError(
                f"the result has no site {site.name!r}; it has {list(draws.data_vars)}. Is it of "
                "this model?"
            )
        value = np.asarray(draws[site.name].transpose("chain", "draw", ...))
        if value.shape[2:] != site.shape:
            raise SiteError(
                f"site {site.name!r} has shape {value.shape[2:]} in the result but {site.shape} "
                f"with these arguments. To draw it anew for new groups: resample=[{site.name!r}]."
            )
        values[site.name] = value.astype(site.dtype)
    return values


def _program_like(
    tree: xarray.DataTree, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Program:
    return Program(
        model,
        args,
        kwargs,
        precision=tree.attrs.get("precision", "float64"),
        dims=json.loads(tree.attrs.get("dims", "{}")),
    )


def _coords_of(tree: xarray.DataTree, program: Program) -> dict[str, np.ndarray]:
    """Coordinates of a result that still have the length this program gives them."""
    sizes = program.dimensions
    found: dict[str, np.ndarray] = {}
    for group in tree.children.values():
        for dim, values in group.dataset.coords.items():
            if sizes.get(str(dim)) == values.size:
                found[str(dim)] = np.asarray(values)
    return found


def check_coords(program: Program, coords: Mapping[str, Any]) -> dict[str, Any]:
    """The user's labels of dimensions.

    Raises:
        DataError: no site has such a dimension, or its length differs.
    """
    sizes = program.dimensions
    for dim, values in coords.items():
        if dim not in sizes:
            raise DataError(
                f"coords names dimension {dim!r}, which no site has; there are {sorted(sizes)}. "
                "Plates give dimensions their names; dims= names event dimensions."
            )
        if len(values) != sizes[dim]:
            raise DataError(
                f"coords[{dim!r}] has {len(values)} labels, but the dimension has {sizes[dim]}."
            )
    return dict(coords)


def predict(
    tree: xarray.DataTree,
    model: Callable,
    *args: Any,
    seed: int = 0,
    resample: str | Sequence[str] = (),
    coords: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> xarray.DataTree:
    """Draw the data anew for every draw of a result.

    Args:
        tree: a result of ``model``.
        model: the model.
        *args, **kwargs: its arguments: those of the run (posterior predictive), or new ones
            (predictions; leave out what is to be predicted, or pass values of the right shape).
        seed: predictions of one seed are the same whatever the batch size.
        resample: latent sites to draw from the model instead of taking their posterior draws,
            for groups the data did not have.
        coords: labels of dimensions; those of the run where they fit, but for the dimensions of
            resampled sites.
        data: further arguments of the model by name, as in `infer`.

    Returns:
        The tree with a further group: for the arguments of the run `posterior_predictive` (or
        `prior_predictive`, for a result of the prior) with the sites the model observes; for new
        arguments `predictions` and `predictions_constant_data`.

    Raises:
        SiteError: the result is of another model, shapes differ, or ``resample`` names no site.
        DataError: coords do not fit, or there is nothing to predict.
    """
    program = _program_like(tree, model, args, {**kwargs, **(data or {})})
    anew = [resample] if isinstance(resample, str) else list(resample)
    latent = [site.name for site in program.latent]
    if unknown := [name for name in anew if name not in latent]:
        raise SiteError(f"resample= names {unknown}; the latent sites are {latent}.")
    values = _latent_draws(tree, program, anew)
    if not values:
        raise SiteError("resample= names every latent site; nothing of the result is left.")
    example = {k: jax.ShapeDtypeStruct(v.shape[2:], v.dtype) for k, v in values.items()}
    with program.context():
        traced = Traced.of(program.predict, _example_key(), example, program.data)
    drawn = _over_draws(program, traced, values, _seed(seed), "predict")
    new_dims = {dim for name in anew for dim in program.sites[name].dims}
    kept = {k: v for k, v in _coords_of(tree, program).items() if k not in new_dims}
    labels = {**kept, **check_coords(program, coords or {})}
    extra: dict[str, Any] = {}
    if program.data_hash == tree.attrs.get("data_hash") and not anew:
        name = f"{posterior_group(tree)}_predictive"
        drawn = {k: v for k, v in drawn.items() if program.sites[k].kind == "observed"}
        if not drawn:
            raise DataError(
                "with these arguments the model observes nothing, so there is nothing to predict. "
                "Pass the observed data too."
            )
    else:
        name = "predictions"
        groups = data_groups(program, labels)
        extra = {f"predictions_{k}": v for k, v in groups.items() if k == "constant_data"}
    group = draws_dataset(drawn, program, labels)
    return _with_groups(tree, {name: group, **extra})


def log_likelihood(
    tree: xarray.DataTree,
    model: Callable,
    *args: Any,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> xarray.DataTree:
    """Add the groups `log_likelihood` (pointwise) and `log_prior` (by site) to a result.

    Args:
        tree: a result of ``model``.
        model, *args, **kwargs: the model and the arguments of the run.
        data: further arguments of the model by name, as in `infer`.

    Raises:
        DataError: the data are not those of the run.
        SiteError: the result is of another model.
    """
    program = _program_like(tree, model, args, {**kwargs, **(data or {})})
    if program.data_hash != tree.attrs.get("data_hash"):
        raise DataError(
            "these arguments are not the data of the run, so its log likelihood would mean "
            "nothing. Pass the run's data; for new data use predict."
        )
    if program.model_hash != tree.attrs.get("model_hash"):
        raise SiteError(
            "this model computes something else than the one of the run (its hash differs), so its "
            "log likelihood would mean nothing."
        )
    values = _latent_draws(tree, program)
    example = {k: jax.ShapeDtypeStruct(v.shape[2:], v.dtype) for k, v in values.items()}

    def terms(_: Any, values: Any, data: Any) -> dict[str, Any]:
        return program.log_terms(values, data)

    with program.context():
        traced = Traced.of(terms, _example_key(), example, program.data)
    scores = _over_draws(program, traced, values, 0, "log_terms")
    coords = _coords_of(tree, program)
    groups = {}
    for group, sites in (("log_likelihood", program.observed), ("log_prior", program.latent)):
        chosen = {site.name: scores[site.name] for site in sites}
        dims = {site.name: _batch_dims(site) for site in sites}
        groups[group] = dataset(chosen, dims, coords, ("chain", "draw"))
    return _with_groups(tree, groups)


def _batch_dims(site: Site) -> tuple[str, ...]:
    return site.dims[: len(site.dims) - site.event_dim]


def _with_groups(tree: xarray.DataTree, groups: Mapping[str, xarray.Dataset]) -> xarray.DataTree:
    import xarray

    new = tree.copy()
    for name, group in groups.items():
        sampled = {"sample_dims": ["chain", "draw"]} if "draw" in group.dims else {}
        new[name] = xarray.DataTree(group.assign_attrs(run_attributes(**sampled)))
    return new


def _example_key() -> Any:
    """The type of a key, without making one (which would compile)."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _seed(seed: int) -> int:
    if not isinstance(seed, int | np.integer) or not 0 <= int(seed) < 2**64:
        raise OptionError(f"seed must be an integer in [0, 2^64); got {seed!r}.")
    return int(seed)


def options_text(method: Any) -> str:
    """A method's options as JSON."""
    return json.dumps(dataclasses.asdict(method), default=repr, sort_keys=True)
