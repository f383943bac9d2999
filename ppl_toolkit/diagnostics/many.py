"""What is wrong with the runs on many data sets: a table for all of them, and one list of findings.

All draws are judged in one pass by the batched diagnostics of `convergence`. The findings, which
take longer to put into words, are computed for those data sets alone that any figure speaks
against.
"""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ppl_toolkit import convergence
from ppl_toolkit.diagnostics.approximation import GROUP
from ppl_toolkit.diagnostics.findings import (
    BFMI,
    FEW_DRAWS,
    HEAT,
    MONTE_CARLO_ERROR,
    MOVING,
    TREE_DEPTH,
    Finding,
    Judged,
    always_there,
    convergence_of,
    findings_of_draws,
    least_ess,
    r_hat_limit,
)
from ppl_toolkit.diagnostics.pointwise import listed
from ppl_toolkit.results import DATA_SET, scalar_labels, superchains_of

if TYPE_CHECKING:
    import xarray

__all__ = ["Verdicts", "judge", "summarised"]

_SLAB_BYTES = 8 * 2**20
_SMALLER_IS_WORSE = ("bfmi", "ess", "few_draws", "stuck")


class Verdicts(NamedTuple):
    """The diagnostics of many data sets.

    Attributes:
        table: figures by data set, the worst of its scalars or chains each: ``ess`` (the smaller
            one of bulk and tail), ``r_hat`` (nested where there are superchains), ``mcse`` (Monte
            Carlo error of mean or standard deviation, in standard deviations); ``divergences``,
            ``acceptance``, ``tree_depth`` (share of trajectories that ended at the largest) and
            ``bfmi`` where the sampler tells; ``findings``, the kinds of them, separated by commas.
        found: the findings by label, of the data sets that have any.
    """

    table: xarray.Dataset
    found: dict[Any, list[Finding]]


def judge(
    tree: xarray.DataTree, one_of: Callable[[int], xarray.DataTree], threads: int
) -> Verdicts:
    """Judge the draws on many data sets.

    Args:
        tree: with posterior and sampler statistics (data set, chain, draw, ...).
        one_of: the result of one data set by its place.
        threads: how many work at a time.

    Complexity: that of `convergence.convergence` on all scalars of all data sets, by slabs of
    bounded size.
    """
    import xarray

    labels = np.asarray(next(iter(tree.children.values())).dataset[DATA_SET])
    figures = _of_sampler(tree)
    judged: list[Judged] | None = None
    if "posterior" in tree.children:
        draws = always_there(tree["posterior"].dataset, tree.attrs)
        judged = _judged(draws, threads, superchains_of(tree))
        with np.errstate(all="ignore"):
            figures["ess"] = np.array([np.fmin.reduce(j.ess, initial=np.nan) for j in judged])
            figures["r_hat"] = np.array([np.fmax.reduce(j.r_hat, initial=np.nan) for j in judged])
            figures["mcse"] = np.array([np.fmax.reduce(j.error, initial=np.nan) for j in judged])
    kinds = [""] * len(labels)
    found = {}
    for place in np.flatnonzero(_suspicious(tree, figures, judged)):
        own = findings_of_draws(one_of(int(place)), judged[place] if judged else None)
        if own:
            found[labels[place].item()] = own
            kinds[place] = ", ".join(finding.kind for finding in own)
    order = ("ess", "r_hat", "mcse", "divergences", "acceptance", "tree_depth", "bfmi", "khat")
    shown = {name: (DATA_SET, figures[name]) for name in order if name in figures}
    shown["findings"] = (DATA_SET, np.array(kinds))
    return Verdicts(xarray.Dataset(shown, coords={DATA_SET: labels}), found)


def _of_sampler(tree: xarray.DataTree) -> dict[str, np.ndarray]:
    """Figures of the sampler's statistics, (data set,)."""
    if "sample_stats" not in tree.children:
        return {}
    stats = tree["sample_stats"].dataset
    found = {}
    if "diverging" in stats:
        found["divergences"] = stats["diverging"].values.sum((1, 2))
    if "acceptance_rate" in stats:
        found["acceptance"] = stats["acceptance_rate"].values.mean((1, 2))
    if "reached_max_treedepth" in stats:
        found["tree_depth"] = stats["reached_max_treedepth"].values.mean((1, 2))
    if "khat" in stats:
        found["khat"] = stats["khat"].values.max((1, 2))
    if "energy" in stats:
        energy = np.moveaxis(stats["energy"].values, 0, -1)
        found["bfmi"] = convergence.bfmi(energy).min(axis=0)
    for name in stats.data_vars:
        if str(name).startswith("kinetic_temperature"):
            heat = np.abs(stats[name].values.mean((1, 2)) - 1.0)
            found["heat"] = np.maximum(heat, found.get("heat", 0.0))
    return found


def _suspicious(
    tree: xarray.DataTree, figures: Mapping[str, np.ndarray], judged: Sequence[Judged] | None
) -> np.ndarray:
    """The data sets that may have findings: at least those which have."""
    sizes = next(iter(tree.children.values())).sizes
    chains, draws = sizes["chain"], sizes["draw"]
    if judged is None:  # not draws from a posterior
        return np.zeros(sizes[DATA_SET], bool)
    if {"filtering", GROUP} & set(tree.children) or chains == 1 or chains * draws < FEW_DRAWS:
        return np.ones(sizes[DATA_SET], bool)
    groups = superchains_of(tree)
    limits: dict[str, tuple[float, float]] = {  # what is outside is looked at
        "ess": (least_ess(groups, chains), np.inf),
        "r_hat": (-np.inf, r_hat_limit(groups, chains, draws)),
        "mcse": (-np.inf, MONTE_CARLO_ERROR), "divergences": (-np.inf, 0.0),
        "tree_depth": (-np.inf, TREE_DEPTH), "bfmi": (BFMI, np.inf), "heat": (-np.inf, HEAT),
    }  # fmt: skip
    bad = np.array([bool(j.broken) or bool(np.any(j.moving < MOVING)) for j in judged])
    for name, (low, high) in limits.items():
        if name in figures:
            bad |= (figures[name] < low) | (figures[name] > high)
    return bad


def _judged(draws: xarray.Dataset, threads: int, superchains: int) -> list[Judged]:
    """What is known of the draws on every data set."""
    sites = list(draws.data_vars.values())
    names = [label for site in sites for label in scalar_labels(site[0])]
    bytes_of_one = sum(8 * site[0].size for site in sites)
    count, width = draws.sizes[DATA_SET], max(1, _SLAB_BYTES // max(1, bytes_of_one))

    def slab(first: int) -> list[Judged]:
        arrays = [site.values[first : first + width] for site in sites]
        return _slab(names, arrays, superchains)

    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        return [one for part in pool.map(slab, range(0, count, width)) for one in part]
    finally:  # Ctrl-C does not wait for the others
        pool.shutdown(cancel_futures=True)


def _slab(names: list[str], arrays: Sequence[np.ndarray], superchains: int) -> list[Judged]:
    """The same for some data sets; arrays (data set, chain, draw, ...) by site."""
    size, chains, count = arrays[0].shape[:3]
    numbers: dict[str, list[np.ndarray]] = {"r_hat": [], "ess": [], "error": []}
    infinite = []
    continuous, moved = False, np.zeros((size, chains, max(count - 1, 0)), bool)
    for array in arrays:
        values = array.reshape(size, chains, count, math.prod(array.shape[3:]))
        together = np.moveaxis(values.astype(float, copy=False), 0, 2).reshape(chains, count, -1)
        for key, found in convergence_of(together, superchains).items():
            numbers[key].append(found.reshape(size, -1))
        infinite.append(~np.isfinite(values).any(axis=(1, 2)))
        if array.dtype.kind == "f":
            continuous = True
            new, old = values[:, :, 1:], values[:, :, :-1]
            moved |= ((new != old) & ~(np.isnan(new) & np.isnan(old))).any(axis=3)
    unknown = not continuous or count < 2
    moving = np.full((size, chains), np.nan) if unknown else moved.mean(axis=2)
    joined = {key: np.concatenate(parts, 1) for key, parts in numbers.items()}
    broken = np.concatenate(infinite, 1)
    return [
        Judged(
            names=names,
            broken=[names[k] for k in np.flatnonzero(broken[i])],
            moving=moving[i],
            **{key: array[i] for key, array in joined.items()},
        )
        for i in range(size)
    ]


def summarised(found: Mapping[Any, Sequence[Finding]], count: int) -> list[Finding]:
    """One finding for every kind, errors first: which data sets, and the worst of them.

    Args:
        found: the findings of the data sets that have any, by label.
        count: how many data sets there are.
    """
    by_kind: dict[str, list[tuple[Any, Finding]]] = {}
    for label, own in found.items():
        for finding in own:
            by_kind.setdefault(finding.kind, []).append((label, finding))
    joint = []
    for kind, cases in by_kind.items():
        sign = -1.0 if kind in _SMALLER_IS_WORSE else 1.0
        label, worst = max(
            cases, key=lambda case: (case[1].severity == "error", sign * case[1].number)
        )
        which = f"{kind}: {len(cases)} of {count} data sets"
        if len(cases) == 1:
            said = f"{which} ({label}): {worst.message}"
        else:
            names = listed([str(name) for name, _ in cases])
            said = f"{which} ({names}). The worst is {label}: {worst.message}"
        joint.append(worst._replace(message=said))
    return sorted(joint, key=lambda finding: finding.severity != "error")
