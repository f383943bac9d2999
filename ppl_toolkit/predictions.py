"""What can be computed from a result once its model is at hand again.

The tree holds no model. `predict` and `log_likelihood` take it again, and check by its hash that
it is the same where that matters.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ppl_toolkit import executables
from ppl_toolkit.arguments import with_data
from ppl_toolkit.errors import DataError, MethodError, ModelError, PPLError, SiteError
from ppl_toolkit.labels import check_coords, coords_of
from ppl_toolkit.program import Program
from ppl_toolkit.results import (
    checked_seed,
    data_groups,
    dataset,
    draws_dataset,
    posterior_group,
    require_tree,
    with_groups,
)
from ppl_toolkit.sites import Site
from ppl_toolkit.tracing import CONCRETE_VALUE_ERRORS, Traced, dependents, key_shape, label

if TYPE_CHECKING:
    import xarray

__all__ = ["log_likelihood", "predict"]

_BATCH = 256


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
            (label, traced.text(differentiable=False), shapes, program.precision),
            lambda: jax.jit(run).trace(*first_args),
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
    known = json.loads(tree.attrs.get("latent_sites", json.dumps(list(draws.data_vars))))
    seen = tree["observed_data"].dataset if "observed_data" in tree.children else {}
    values = {}
    for site in program.latent:
        name = site.variable
        absent = name not in draws or name not in known
        predicted = name in seen or name in draws or _summed_out(program, site) or site.predicted
        if site.name in resample or (absent and predicted):
            continue
        if absent:
            raise SiteError(
                f"the result has no site {name!r}; it has {list(draws.data_vars)}. Is it of "
                "this model?"
            )
        value = np.asarray(draws[name].transpose("chain", "draw", ...))
        shape = value.shape[2:]
        continued = site.scanned and shape[0] < site.shape[0] and shape[1:] == site.shape[1:]
        if shape != site.shape and not continued:
            raise SiteError(
                f"site {site.name!r} has shape {shape} in the result but {site.shape} "
                f"with these arguments. To draw it anew for new groups: resample=[{site.name!r}]."
            )
        there = np.nan_to_num(value) if site.name in program.layout.sites else value
        values[site.name] = there.astype(site.dtype)  # anything where there is no element
    return values


def _summed_out(program: Program, site: Site) -> bool:
    return program.marginalised and site.discrete


def _is_same(program: Program, tree: xarray.DataTree) -> bool:
    """Whether these are the model and the data of the run."""
    attrs = tree.attrs
    return (program.data_hash, program.model_hash) == (
        attrs.get("data_hash"),
        attrs.get("model_hash"),
    )


def _program_like(
    tree: xarray.DataTree, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Program:
    require_tree(tree)
    return Program(
        model,
        args,
        kwargs,
        precision=tree.attrs.get("precision", "float64"),
        dims=json.loads(tree.attrs.get("dims", "{}")),
    )


def _seen(program: Program, tree: xarray.DataTree) -> Program:
    """The program with all rows of plates that saw new ones at every step, if it runs so."""
    if "minibatched_plates" not in tree.attrs:
        return program
    try:
        return program.whole
    except PPLError:
        return program


def _traced_prediction(program: Program, example: Mapping[str, Any], anew: Sequence[str]) -> Traced:
    conditional = not any(site.name in anew for site in program.discrete)
    draw = functools.partial(program.predict, conditional=conditional)
    try:
        traced = Traced.of(draw, key_shape(), example, program.data)
    except (PPLError, *CONCRETE_VALUE_ERRORS):
        raise
    except Exception as error:
        if not program.marginalised:
            raise
        names = [site.name for site in program.discrete]
        raise MethodError(
            f"NumPyro and funsor cannot draw the summed-out sites {names} given the data "
            f"({type(error).__name__}: {error}). To draw them from the model instead: "
            f"resample={names}."
        ) from None
    flags = dict(zip(traced.names, dependents(traced.jaxpr, 1), strict=True))
    random = [flag for name, flag in flags.items() if program.sites[name].kind != "deterministic"]
    if random and not any(random):
        raise ModelError(
            f"{label(program.model)} predicts the same values whatever the seed: it carries a "
            "numpyro.handlers.seed of its own. Pass the model without it."
        )
    return traced


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
        coords: labels of dimensions. Those of the run hold for its own arguments; for new ones,
            only dimensions of latent sites that are not resampled keep them.
        data: further arguments of the model by name, as in `infer`.

    Returns:
        The tree with a further group: for the arguments of the run `posterior_predictive` (or
        `prior_predictive`, for a result of the prior) with the sites the model observes; for new
        arguments `predictions` and `predictions_constant_data`.

    Raises:
        SiteError: the result is of another model, shapes differ, or ``resample`` names no site.
        DataError: coords do not fit, or there is nothing to predict.
    """
    program = _program_like(tree, model, args, with_data(model, kwargs, data))
    unchanged = _is_same(program, tree)
    program = _seen(program, tree)
    anew = [resample] if isinstance(resample, str) else list(resample)
    latent = [site.name for site in program.latent]
    if unknown := [name for name in anew if name not in latent]:
        raise SiteError(f"resample= names {unknown}; the latent sites are {latent}.")
    values = _latent_draws(tree, program, anew)
    if not values:
        raise SiteError("resample= names every latent site; nothing of the result is left.")
    example = {k: jax.ShapeDtypeStruct(v.shape[2:], v.dtype) for k, v in values.items()}
    with program.context():
        traced = _traced_prediction(program, example, anew)
    drawn = _over_draws(program, traced, values, checked_seed(seed), "predict")
    labels = coords_of(tree, program)
    same = not anew and unchanged
    if not same:  # labels of rows are those of the old data; of groups, those of their draws
        groups_kept = {dim for name in values for dim in program.sites[name].dims}
        groups_new = {dim for name in anew for dim in program.sites[name].dims}
        labels = {k: v for k, v in labels.items() if k in groups_kept - groups_new}
    labels = {**check_coords(program, {}), **labels}
    if coords is not None:
        labels |= check_coords(program, coords)
    extra: dict[str, Any] = {}
    if same:
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
    return with_groups(tree, {name: group, **extra})


def log_likelihood(
    tree: xarray.DataTree,
    model: Callable,
    *args: Any,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> xarray.DataTree:
    """Add the groups `log_likelihood` (pointwise) and `log_prior` (by site) to a result.

    Where the elements of a site depend on each other, under a law that knows the density of every
    one given all others (a Gaussian process), these densities are the pointwise log likelihood:
    what leave-one-out needs. They have the attribute ``dependent``.

    Args:
        tree: a result of ``model``.
        model, *args, **kwargs: the model and the arguments of the run.
        data: further arguments of the model by name, as in `infer`.

    Raises:
        DataError: the data are not those of the run.
        SiteError: the result is of another model.
        MethodError: discrete sites were summed out, or the method did not draw all sites.
    """
    program = _program_like(tree, model, args, with_data(model, kwargs, data))
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
    there = tree[posterior_group(tree)].dataset
    if names := [s.name for s in program.discrete if s.variable not in there]:
        raise MethodError(
            f"sites {names} were summed out together, so there is no log likelihood for every "
            "observation alone. Write the sum into the model: "
            "numpyro.distributions.MixtureSameFamily."
        )
    program = _seen(program, tree)
    values = _latent_draws(tree, program)
    if names := [site.name for site in program.latent if site.name not in values]:
        raise MethodError(
            f"{tree.attrs.get('method', 'the method')} left sites {names} to predictions, and the "
            "observations have no log likelihood without them. Take a method that draws every "
            "site, such as NUTS."
        )
    example = {k: jax.ShapeDtypeStruct(v.shape[2:], v.dtype) for k, v in values.items()}

    def terms(_: Any, values: Any, data: Any) -> dict[str, Any]:
        return program.log_terms(values, data) | program.pointwise(values, data)

    with program.context():
        traced = Traced.of(terms, key_shape(), example, program.data)
    scores = _over_draws(program, traced, values, 0, "log_terms")
    coords = coords_of(tree, program)
    groups = {}
    for group, sites in (("log_likelihood", program.observed), ("log_prior", program.latent)):
        chosen = {site.name: scores[site.name] for site in sites}
        dims = {site.name: _batch_dims(site) for site in sites}
        groups[group] = dataset(chosen, dims, coords, ("chain", "draw"))
    for site in program.observed:
        if site.dependent:
            groups["log_likelihood"][site.name].attrs["dependent"] = 1
    return with_groups(tree, groups)


def _batch_dims(site: Site) -> tuple[str, ...]:
    return site.dims if site.dependent else site.dims[: len(site.dims) - site.event_dim]
