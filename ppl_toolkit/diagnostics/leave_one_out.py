"""Leave-one-out cross-validation: how well a fitted model predicts what it has not seen."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_toolkit.arguments import with_data
from ppl_toolkit.diagnostics.findings import Finding
from ppl_toolkit.diagnostics.pointwise import (
    LEAST_DRAWS,
    PointwiseLikelihood,
    listed,
    observation_label,
    read_blocks,
    relative_efficiency,
    scores_of,
)
from ppl_toolkit.diagnostics.refits import exact_densities
from ppl_toolkit.errors import (
    DataBakedWarning,
    DataError,
    InferenceWarning,
    OptionError,
    SiteError,
)
from ppl_toolkit.predictions import log_likelihood
from ppl_toolkit.program import Program
from ppl_toolkit.progress import progress_for
from ppl_toolkit.results import require_tree
from ppl_toolkit.sites import variable_name
from ppl_toolkit.tracing import digest

if TYPE_CHECKING:
    import xarray

__all__ = ["LOO", "khat_finding", "loo"]

_BLOCK_BYTES = 256 * 2**20  # of the log likelihoods of a block of observations, all draws
_MOST_LABELS = 5


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LOO:
    """What leave-one-out cross-validation says of a fitted model.

    Attributes:
        elpd: expected log pointwise predictive density, the sum of ``elpd_i``; larger is better.
        se: its standard error over observations; NaN for a single one.
        p: effective number of parameters: how much better the data fit than they are predicted.
        n: number of observations.
        n_draws: number S of posterior draws.
        elpd_i: log p(y_i | all other observations), with the dimensions of the observations.
        pareto_k: shape of the tail of the importance weights of each observation; NaN where there
            is no tail (constant weights, few distinct ones).
        good_k: up to this k the importance weights can be trusted, min(1 - 1 / log10 S, 0.7).
        r_eff: relative efficiency of the draws that the smoothing took into account.
        var_name: the observed variable.
        failed: labels of the observations with k above ``good_k``, worst first; their ``elpd_i``
            are likely too high. Those that were refitted are not among them.
        refitted: labels of those whose ``elpd_i`` comes from a refit without them.
        warning: what to look at, "" if nothing.
        observed: a hash of the observed values, "" if the result does not hold them.
        dependent: whether the observations depend on each other (a Gaussian process), so that each
            draw gives its density given all others; they cannot be switched off one by one.
    """

    elpd: float
    se: float
    p: float
    n: int
    n_draws: int
    elpd_i: xarray.DataArray
    pareto_k: xarray.DataArray
    good_k: float
    r_eff: float
    var_name: str
    failed: tuple[str, ...] = ()
    refitted: tuple[str, ...] = ()
    warning: str = ""
    observed: str = ""
    dependent: bool = False

    def __str__(self) -> str:
        trusted = self.n - len(self.failed) - len(self.refitted)
        parts = [
            f"{trusted} good (k up to {self.good_k:.2f})",
            *([f"{len(self.refitted)} refitted"] if self.refitted else []),
            *([f"{len(self.failed)} not to be trusted"] if self.failed else []),
        ]
        lines = [
            f"Leave-one-out cross-validation of {self.var_name!r}: {self.n} "
            f"observation{'' if self.n == 1 else 's'}, {self.n_draws} draws",
            f"elpd {self.elpd:12.2f}   standard error {self.se:.2f}",
            f"p    {self.p:12.2f}   effective number of parameters",
            f"Pareto k: {', '.join(parts)}",
            *([self.warning] if self.warning else []),
        ]
        return "\n".join(lines)

    __repr__ = __str__


def loo(
    tree: xarray.DataTree,
    model: Callable | None = None,
    *args: Any,
    refit: bool | int = False,
    var_name: str | None = None,
    progress: bool | str = "auto",
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LOO:
    """Leave-one-out cross-validation by Pareto-smoothed importance sampling.

    The posterior without observation i is the posterior with weights 1 / p(y_i | theta); their
    largest are smoothed (`convergence.psis`), which also tells where there is no trusting them.
    The numbers are those of ``arviz.loo`` 1.3. The log likelihoods are those of the group
    `log_likelihood` if the result has one; otherwise they are computed from the model for one
    block of observations after the other, so that memory stays bounded.

    Observations whose log likelihood is zero at every draw are switched off by a mask of the
    model; they are not counted in ``n`` and ``se``.

    Args:
        tree: a result of `infer`, or any tree with the groups posterior and log_likelihood.
        model, *args, **kwargs: the model and the arguments of the run.
        refit: whether to fit the model again without each observation whose k is too large, and
            take its log p(y_i | the others) from there; a number is the most refits, those of the
            largest k. Refits start from the result and share one compiled program. A refit that
            fails leaves the observation as it was, and Ctrl-C ends them; ``warning`` says so.
        var_name: the observed variable, where there are several.
        progress: how the refits are shown, as in `infer`.
        data: further arguments of the model by name, as in `infer`.

    Returns:
        A `LOO`. An `InferenceWarning` is given if something in it needs a look.

    Raises:
        DataError: neither log likelihoods nor a model; too few draws; log likelihoods that are
            not finite; a result of the prior; data that are not those of the run.
        OptionError: several observed variables and no ``var_name``; ``refit`` or arguments without
            a model; ``refit`` is neither a bool nor a number of refits; an unknown ``progress``.
        SiteError: ``var_name`` is not an observed variable, or the model is another one.
        MethodError: discrete sites were summed out, so observations have no likelihood alone.

    Complexity: n sorts of S numbers; without the group `log_likelihood` one evaluation of the
    model at all draws for every 256 MiB of log likelihoods, which is all that is held at a time.

    Source: Vehtari, Gelman, Gabry (2017), Statistics and Computing 27; Vehtari, Simpson, Gelman,
    Yao, Gabry (2024), JMLR 25(72).
    """
    found = _loo(tree, model, args, kwargs, refit, var_name, progress, data)
    if found.warning:
        warning = InferenceWarning(found.warning)
        warning.result = found
        warnings.warn(warning, stacklevel=2)
    return found


def khat_finding(found: LOO) -> Finding | None:
    """The finding that some importance weights cannot be trusted; None if all can."""
    if not found.failed:
        return None
    worst = _k_of_failed(found)
    return Finding(
        "khat",
        "warning",
        found.failed[:_MOST_LABELS],
        worst,
        f"Pareto k is up to {worst:.2f} (above {found.good_k:.2f}) for {len(found.failed)} of "
        f"{found.n} observations ({listed(found.failed)}): leaving them out changes the posterior "
        "too much for importance sampling, and elpd is likely too high.",
        (
            "Fit the model to the others alone, and draw more. "
            if found.dependent
            else "Fit the model again without each of them: ppl.loo(result, model, ..., "
            "refit=True). "
        )
        + "If these observations are outliers, consider a model with heavier tails.",
    )


def _loo(
    tree: xarray.DataTree,
    model: Callable | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    refit: bool | int,
    var_name: str | None,
    progress: bool | str,
    data: Mapping[str, Any] | None,
) -> LOO:
    most = _most_refits(refit)
    progress_for(progress, "", 0, 0, 0)  # refuses what it does not know, before any work
    draws = _require_posterior(tree)
    if tree.attrs.get("log_density"):
        raise DataError(
            "this is a result of a bare log density, which does not tell observations apart. Write "
            "it as a NumPyro model to leave them out."
        )
    likelihoods = tree["log_likelihood"].dataset if "log_likelihood" in tree.children else None
    if model is not None:
        like, source = _of_model(tree, model, args, kwargs, var_name, data)
        if most and "dependent" in like.attrs:
            raise OptionError(
                f"the elements of {like.name!r} depend on each other, so that a refit cannot leave "
                "one of them out. Say refit=False: their densities given all others are exact for "
                "every draw."
            )
    elif most:
        raise OptionError(f"refit={refit} needs the model and its data: loo(result, model, ...).")
    elif kwargs or data:
        raise OptionError(
            f"loo got arguments {[*kwargs, *(data or {})]} but no model; pass the model before "
            "them: loo(result, model, ...)."
        )
    elif likelihoods is None:
        raise DataError(
            "this result has no group log_likelihood. Pass the model and the data of the run: "
            "loo(result, model, ...)."
        )
    else:
        like, source = _chosen(likelihoods, var_name), None
    size = int(np.prod(like.shape[2:], dtype=int))
    if likelihoods is not None:
        array = _chosen(likelihoods, str(like.name)).transpose("chain", "draw", *like.dims[2:])
        if array.shape[0] * array.shape[1] != draws:
            raise DataError(
                f"there are {array.shape[0] * array.shape[1]} draws of the log likelihood but "
                f"{draws} of the posterior; compute it again: ppl.log_likelihood(result, model, "
                "...)."
            )
        blocks = read_blocks(array, _BLOCK_BYTES)
    else:
        assert source is not None  # there is a model
        width = int(np.clip(_BLOCK_BYTES // (8 * draws), 1, size))
        blocks = source.blocks(source.draws_of(tree), width)
    r_eff = relative_efficiency(tree["posterior"].dataset)
    label = functools.partial(observation_label, like)
    scores = scores_of(_finite(blocks, label), size, draws, r_eff)
    bad = scores.worst_first()
    exact, notes = dict[int, float](), list[str]()
    if most and source is not None:
        exact, notes = exact_densities(tree, source, like, bad[:most], progress)
        scores.elpd_i[list(exact)] = list(exact.values())
        if unasked := bad[most:]:
            notes.append(
                f"refit={refit}: {len(unasked)} of {len(bad)} observations with a k too large were "
                f"not refitted ({listed([label(i) for i in unasked])})."
            )
    found = LOO(
        elpd=scores.elpd,
        se=scores.se,
        p=scores.p,
        n=scores.n,
        n_draws=draws,
        elpd_i=_labelled(scores.elpd_i, like, "elpd_i"),
        pareto_k=_labelled(scores.k, like, "pareto_k"),
        good_k=scores.good_k,
        r_eff=r_eff,
        var_name=str(like.name),
        failed=tuple(label(i) for i in bad if i not in exact),
        dependent="dependent" in like.attrs,
        refitted=tuple(label(i) for i in exact),
        observed=_observed_hash(tree, str(like.name)),
    )
    unknown = int((np.isnan(scores.k) & ~scores.constant).sum())
    return dataclasses.replace(found, warning=_warning(tree, found, notes, unknown))


def _most_refits(refit: Any) -> int:
    """The largest number of refits that ``refit=`` allows."""
    if isinstance(refit, bool | np.bool_):
        return sys.maxsize if refit else 0
    if not isinstance(refit, int | np.integer) or refit < 0:
        raise OptionError(
            f"refit must be True, False or the most refits, an integer >= 0; got {refit!r}."
        )
    return int(refit)


def _require_posterior(tree: xarray.DataTree) -> int:
    """The number of posterior draws; refuses results without enough of them."""
    require_tree(tree)
    if "posterior" not in tree.children:
        if "prior" in tree.children:
            raise DataError(
                "this is a result of the prior, which knows no data to leave out. Run infer with "
                "a method that samples the posterior."
            )
        raise DataError(f"this tree has no posterior; its groups are {list(tree.children)}.")
    sizes = tree["posterior"].sizes
    draws = int(sizes.get("chain", 0) * sizes.get("draw", 0))
    if draws < LEAST_DRAWS:
        raise DataError(
            f"loo needs at least {LEAST_DRAWS} draws; this result has {draws}. Draw more: "
            "ppl.extend(result, model, ...)."
        )
    return draws


def _chosen(likelihoods: xarray.Dataset, var_name: str | None) -> xarray.DataArray:
    """The pointwise log likelihood of one observed variable, dims chain, draw, ..."""
    names = [str(name) for name in likelihoods.data_vars]
    if not names:
        raise DataError(
            "the model observes nothing, so there is nothing to leave out. Pass the observed data."
        )
    if var_name is None:
        if len(names) > 1:
            raise OptionError(f"there are observed variables {names}; choose one with var_name=.")
        var_name = names[0]
    if variable_name(var_name) not in names:
        raise SiteError(f"var_name={var_name!r} is no observed variable; there are {names}.")
    return likelihoods[variable_name(var_name)].transpose("chain", "draw", ...)


def _of_model(
    tree: xarray.DataTree,
    model: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    var_name: str | None,
    data: Mapping[str, Any] | None,
) -> tuple[xarray.DataArray, PointwiseLikelihood]:
    """The log likelihood at one draw per chain, for its labels, and what computes it at all."""
    import xarray

    # One draw goes through log_likelihood, which checks that this is the model of the run.
    groups = {"posterior": tree["posterior"].dataset.isel(draw=slice(0, 1))}
    if "observed_data" in tree.children:
        groups["observed_data"] = tree["observed_data"].dataset
    first = xarray.DataTree.from_dict(groups)
    first.attrs.update(tree.attrs)
    scored = log_likelihood(first, model, *args, data=data, **kwargs)
    like = _chosen(scored["log_likelihood"].dataset, var_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataBakedWarning)  # given already
        program = Program(
            model,
            args,
            with_data(model, kwargs, data),
            precision=tree.attrs["precision"],
            dims=json.loads(tree.attrs.get("dims", "{}")),
        )
    site = next(s.name for s in program.observed if s.variable == like.name)
    return like, PointwiseLikelihood(program, site, int(np.prod(like.shape[2:], dtype=int)))


def _finite(
    blocks: Iterable[tuple[int, np.ndarray]], label: Callable[[int], str]
) -> Iterator[tuple[int, np.ndarray]]:
    """The same blocks; refuses observations whose log likelihood is not finite at some draw."""
    for first, block in blocks:
        # Least and largest draws are NaN where a draw is, and need no array of the block's size.
        ends = np.stack([block.min(axis=1), block.max(axis=1)])
        if not np.isfinite(ends).all():
            row = int(np.flatnonzero(~np.isfinite(ends).all(axis=0))[0])
            wrong = block[row][~np.isfinite(block[row])]
            raise DataError(
                f"the log likelihood of {label(first + row)} is {wrong[0]} at {wrong.size} of "
                f"{block.shape[1]} draws, so it cannot be left out by weighting draws. Check the "
                "observation against the support of its distribution, and the model for overflow "
                "(precision='float64')."
            )
        yield first, block


def _k_of_failed(found: LOO) -> float:
    """The largest k among the failed observations, whose labels come worst first."""
    k = found.pareto_k.values.ravel()
    like = found.pareto_k.rename(found.var_name).expand_dims(("chain", "draw"))
    worst_first = (int(i) for i in np.argsort(-k))
    return float(next(k[i] for i in worst_first if observation_label(like, i) == found.failed[0]))


def _labelled(values: np.ndarray, like: xarray.DataArray, name: str) -> xarray.DataArray:
    """Numbers by observation with the dimensions and labels of the observations."""
    import xarray

    dims = like.dims[2:]
    coords = {dim: like.coords[dim].values for dim in dims if dim in like.coords}
    return xarray.DataArray(values.reshape(like.shape[2:]), coords, dims, name)


def _observed_hash(tree: xarray.DataTree, name: str) -> str:
    """A hash of the observed values in their order, whatever their type and shape."""
    if "observed_data" not in tree.children or name not in tree["observed_data"].dataset:
        return ""
    return digest(np.asarray(tree["observed_data"][name], dtype=np.float64).ravel())


def _warning(tree: xarray.DataTree, found: LOO, notes: Sequence[str], unknown: int) -> str:
    """All that needs a look, in lines."""
    lines = []
    if finding := khat_finding(found):
        lines.append(f"{finding.message} {finding.remedy}")
    lines += notes
    if unknown:
        lines.append(
            f"k could not be estimated for {unknown} of {found.n} observations, whose weights take "
            "too few values."
        )
    if found.elpd_i.size == 1:
        lines.append(
            f"{found.var_name!r} is one single observation, so leaving it out leaves nothing. Its "
            "elements must belong to a plate, not to one event (to_event), to be left out singly."
        )
    if plates := tree.attrs.get("subsampled_plates"):
        lines.append(
            f"plates {plates} see a random subsample, whose log likelihoods are scaled up: leaving "
            "one out leaves out several. Use all data (no subsample_size)."
        )
    return "\n".join(lines)
