"""Expectations of additive functionals, read off a result of `PPG` or `ParticleFilter`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_toolkit import convergence
from ppl_toolkit.errors import DataError
from ppl_toolkit.results import posterior_group, require_tree, stats_group

if TYPE_CHECKING:
    import xarray

__all__ = ["smoothed"]

_MARK = "smoothed."  # how the statistics' names begin; in cycles they end with the kernel's
_KERNEL = ".conditional_smc"
_LEFT = 0.05  # of the first bias, after the sweeps that are left out
_MANY = 50  # sweeps from which autocorrelations of all lags are used


def smoothed(tree: xarray.DataTree) -> xarray.Dataset:
    """Expectations of the functionals of `PPG` given the data, or of `ParticleFilter(functional=)`.

    The first k_0 sweeps are left out, k_0 being the least number with r^k_0 < 0.05, where r is the
    largest correlation of a sum with that of the next sweep (in the second half of the sweeps); at
    most half of the sweeps, and fewer if there was a warm-up.

    Args:
        tree: a result.

    Returns:
        By name of the functional: the estimate, and ``<name>_se``, its standard error: for fewer
        than 50 kept sweeps sd sqrt((1 + r) / ((1 - r) n)) with that functional's r, and otherwise
        from all autocorrelations. Attributes: ``lag_1`` (r), ``left_out`` (k_0), ``kept`` sweeps
        of every chain, ``enough``: whether k_0 reached its goal.

    Raises:
        DataError: the result has no such sums, or too few sweeps.

    Source: Cardoso et al. (2023), ICML, for the average over sweeps after the first.
    """
    import xarray

    require_tree(tree)
    if "smoothing" in tree.children:
        return _of_filters(tree["smoothing"].dataset)
    stats = tree[stats_group(posterior_group(tree))].dataset
    sums = {
        str(name).removeprefix(_MARK).removesuffix(_KERNEL): x
        for name, x in stats.items()
        if str(name).startswith(_MARK)
    }
    if not sums:
        raise DataError(
            "this result has no sums of functionals; run method=PPG(functional=...) or "
            "ParticleFilter(functional=...)."
        )
    sweeps = stats.sizes["draw"]
    if sweeps < 4:
        raise DataError(f"{sweeps} sweeps are too few to tell their correlation; draw 4 or more.")
    arrays = {n: np.asarray(x.transpose("chain", "draw", ...), float) for n, x in sums.items()}
    r = max(float(np.max(_lag_1(x[:, sweeps // 2 :]), initial=0.0)) for x in arrays.values())
    wanted = 1 if r <= _LEFT else math.ceil(math.log(_LEFT) / math.log(min(r, 0.999)))
    already = int(tree.attrs.get("warmup", 0))
    left_out = min(max(wanted - already, 0), sweeps // 2)
    found: dict[str, Any] = {}
    for name, x in arrays.items():
        own = x[:, left_out:]
        dims = sums[name].dims[2:]
        found[name] = (dims, own.mean((0, 1)))
        found[f"{name}_se"] = (dims, _standard_error(own))
    numbers = {
        "lag_1": r, "left_out": left_out, "kept": sweeps - left_out,
        "enough": bool(left_out + already >= wanted),
    }  # fmt: skip
    return xarray.Dataset(found, attrs=numbers)


def _of_filters(group: xarray.Dataset) -> xarray.Dataset:
    """The last estimates of independent filters: their mean, and its standard error."""
    last = group.isel(time=-1)
    means, chains = last.mean("chain"), group.sizes["chain"]
    errors = (
        last.std("chain", ddof=1) / np.sqrt(chains) if chains > 1 else last.mean("chain") * np.nan
    )
    return means.assign({f"{name}_se": x for name, x in errors.items()})


def _lag_1(x: Any) -> Any:
    """Correlation with the next draw, about the mean of all chains; x is (chain, draw, ...)."""
    away = x - x.mean((0, 1))
    total = np.sum(away**2, (0, 1)) * (1.0 - 1.0 / x.shape[1])
    both = np.sum(away[:, 1:] * away[:, :-1], (0, 1))
    return np.divide(both, total, out=np.zeros_like(both), where=total > 0)


def _standard_error(x: Any) -> Any:
    chains, draws = x.shape[:2]
    if draws >= _MANY:
        return convergence.mcse(x, "mean")
    r = np.clip(_lag_1(x), 0.0, 0.99)
    sd = x.std((0, 1), ddof=1)
    return sd * np.sqrt((1.0 + r) / ((1.0 - r) * chains * draws))
