"""Leave-one-out cross-validation: how well a fitted model predicts what it has not seen."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from ppl_toolkit import convergence
from ppl_toolkit.arguments import with_data
from ppl_toolkit.diagnostics.findings import Finding
from ppl_toolkit.diagnostics.pointwise import (
    PointwiseLikelihood,
    listed,
    observation_label,
    read_blocks,
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
from ppl_toolkit.results import require_tree
from ppl_toolkit.sites import variable_name
from ppl_toolkit.tracing import digest

if TYPE_CHECKING:
    import xarray

__all__ = ["LOO", "khat_finding", "loo"]

_BLOCK_BYTES = 256 * 2**20  # of the log likelihoods of a block of observations, all draws
_SMOOTHED_BYTES = 2**20  # of those smoothed at a time
_READ_BYTES = 4 * 2**20
_LEAST_DRAWS = 25  # a shorter tail cannot be fitted
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
    refit: bool = False,
    var_name: str | None = None,
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
            take its log p(y_i | the others) from there. Refits start from the result and share
            one compiled program. A refit that fails leaves the observation as it was, and Ctrl-C
            ends them; ``warning`` says so.
        var_name: the observed variable, where there are several.
        data: further arguments of the model by name, as in `infer`.

    Returns:
        A `LOO`. An `InferenceWarning` is given if something in it needs a look.

    Raises:
        DataError: neither log likelihoods nor a model; too few draws; log likelihoods that are
            not finite; a result of the prior; data that are not those of the run.
        OptionError: several observed variables and no ``var_name``; ``refit`` or arguments without
            a model.
        SiteError: ``var_name`` is not an observed variable, or the model is another one.
        MethodError: discrete sites were summed out, so observations have no likelihood alone.

    Complexity: n sorts of S numbers; without the group `log_likelihood` one evaluation of the
    model at all draws for every 256 MiB of log likelihoods, which is all that is held at a time.

    Source: Vehtari, Gelman, Gabry (2017), Statistics and Computing 27; Vehtari, Simpson, Gelman,
    Yao, Gabry (2024), JMLR 25(72).
    """
    found = _loo(tree, model, args, kwargs, refit, var_name, data)
    if found.warning:
        warning = InferenceWarning(found.warning)
        warning.result = found
        warnings.warn(warning, stacklevel=2)
    return found


def khat_finding(found: LOO) -> Finding | None:
    """The finding that some importance weights cannot be trusted; None if all can."""
    if not found.failed:
        return None
    worst = float(found.pareto_k.max())
    return Finding(
        "khat",
        "warning",
        found.failed[:_MOST_LABELS],
        worst,
        f"Pareto k is up to {worst:.2f} (above {found.good_k:.2f}) for {len(found.failed)} of "
        f"{found.n} observations ({listed(found.failed)}): leaving them out changes the posterior "
        "too much for importance sampling, and elpd is likely too high.",
        "Fit the model again without each of them: ppl.loo(result, model, ..., refit=True). "
        "If these observations are outliers, consider a model with heavier tails.",
    )


def _loo(
    tree: xarray.DataTree,
    model: Callable | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    again: bool,
    var_name: str | None,
    data: Mapping[str, Any] | None,
) -> LOO:
    draws = _require_posterior(tree)
    if tree.attrs.get("log_density"):
        raise DataError(
            "this is a result of a bare log density, which does not tell observations apart. Write "
            "it as a NumPyro model to leave them out."
        )
    likelihoods = tree["log_likelihood"].dataset if "log_likelihood" in tree.children else None
    if model is not None:
        like, source = _of_model(tree, model, args, kwargs, var_name, data)
    elif again:
        raise OptionError("refit=True needs the model and its data: loo(result, model, ...).")
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
    r_eff = _relative_efficiency(tree)
    scores = _smoothed(blocks, size, draws, r_eff, functools.partial(observation_label, like))
    good_k = _good_k(draws)
    bad = [int(i) for i in np.argsort(-scores.k) if scores.k[i] > good_k]
    elpd_i, exact, notes = scores.elpd, dict[int, float](), list[str]()
    if again and source is not None:
        exact, notes = exact_densities(tree, source, like, bad)
        elpd_i[list(exact)] = list(exact.values())
    counted = ~scores.off
    n = int(counted.sum())
    found = LOO(
        elpd=float(elpd_i.sum()),
        se=float(np.sqrt(n * elpd_i[counted].var(ddof=1))) if n > 1 else np.nan,
        p=float((scores.lpd - elpd_i).sum()),
        n=n,
        n_draws=draws,
        elpd_i=_labelled(elpd_i, like, "elpd_i"),
        pareto_k=_labelled(scores.k, like, "pareto_k"),
        good_k=good_k,
        r_eff=r_eff,
        var_name=str(like.name),
        failed=tuple(observation_label(like, i) for i in bad if i not in exact),
        refitted=tuple(observation_label(like, i) for i in exact),
        observed=_observed_hash(tree, str(like.name)),
    )
    unknown = int((np.isnan(scores.k) & ~scores.constant).sum())
    return dataclasses.replace(found, warning=_warning(tree, found, notes, unknown))


def _good_k(draws: int) -> float:
    """Up to this k, S draws give reliable estimates (Vehtari et al. 2024)."""
    return float(min(1 - 1 / np.log10(draws), 0.7))


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
    if draws < _LEAST_DRAWS:
        raise DataError(
            f"loo needs at least {_LEAST_DRAWS} draws; this result has {draws}. Draw more: "
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


def _relative_efficiency(tree: xarray.DataTree) -> float:
    """ESS / S for the mean, averaged over all scalars of the posterior, as ``arviz.loo`` has it.

    One chain has 1: a single autocorrelation time is no better a guess.
    """
    posterior = tree["posterior"].dataset
    chains, draws = posterior.sizes["chain"], posterior.sizes["draw"]
    if chains == 1:
        return 1.0
    sizes = [
        convergence.ess(block.T.reshape(chains, draws, -1), "mean")
        for variable in posterior.data_vars.values()
        for _, block in read_blocks(variable.transpose("chain", "draw", ...), _READ_BYTES)
    ]
    known = [x for x in np.concatenate(sizes) if np.isfinite(x)]
    return float(np.mean(known)) / (chains * draws) if known else 1.0


class _Scores(NamedTuple):
    """By observation, arrays (n,).

    Attributes:
        elpd, lpd: log predictive density without and with the observation.
        k: Pareto k.
        constant, off: whether the log likelihood is the same, or zero, at all draws.
    """

    elpd: np.ndarray
    lpd: np.ndarray
    k: np.ndarray
    constant: np.ndarray
    off: np.ndarray


def _smoothed(
    blocks: Iterable[tuple[int, np.ndarray]],
    size: int,
    draws: int,
    r_eff: float,
    label: Callable[[int], str],
) -> _Scores:
    """Leave-one-out densities from blocks of log likelihoods (observation, draw)."""
    elpd, lpd, k = (np.empty(size) for _ in range(3))
    constant, off = (np.empty(size, bool) for _ in range(2))
    step = max(1, _SMOOTHED_BYTES // (8 * draws))
    for first, block in blocks:
        for begin in range(0, len(block), step):
            ll = np.ascontiguousarray(block[begin : begin + step], dtype=np.float64)
            at = slice(first + begin, first + begin + len(ll))
            _require_finite(ll, at.start, label)
            log_weights, k[at] = convergence.psis(-ll, r_eff)
            elpd[at] = logsumexp(log_weights + ll, axis=1)
            lpd[at] = logsumexp(ll, axis=1) - np.log(draws)
            constant[at] = np.ptp(ll, axis=1) == 0
            off[at] = constant[at] & (ll[:, 0] == 0)
    return _Scores(elpd, lpd, k, constant, off)


def _require_finite(ll: np.ndarray, first: int, label: Callable[[int], str]) -> None:
    flags = ~np.isfinite(ll)
    if not flags.any():
        return
    row = int(np.flatnonzero(flags.any(axis=1))[0])
    value = ll[row][flags[row]][0]
    raise DataError(
        f"the log likelihood of {label(first + row)} is {value} at {int(flags[row].sum())} of "
        f"{ll.shape[1]} draws, so it cannot be left out by weighting draws. Check the observation "
        "against the support of its distribution, and the model for overflow (precision='float64')."
    )


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
