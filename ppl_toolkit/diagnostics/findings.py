"""What is wrong with a run, as data and as text, each finding with its remedy.

Thresholds: R-hat 1.01 and 100 effective draws per chain (Vehtari et al. 2021), E-BFMI 0.3
(Betancourt 2016), any divergence after warm-up (Betancourt 2017).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ppl_toolkit import convergence
from ppl_toolkit.diagnostics import measures
from ppl_toolkit.results import scalar_labels

if TYPE_CHECKING:
    import xarray

__all__ = ["Finding", "as_text", "diagnose", "findings"]

_R_HAT = 1.01
_STUCK_R_HAT = 1.5
_ESS_PER_CHAIN = 100
_BFMI = 0.3
_MOST_SITES = 5
_FEW_DRAWS = 100  # of all chains
_BLOCK_BYTES = 4 * 2**20
_LEAST_DIVERGING = 5  # draws, to say where they lie
_SEPARATES = 0.2  # from one half: the chance that a diverging draw has the larger value

_STEPS = "Take smaller steps: NUTS(target_acceptance=0.95). "
_NON_CENTRE = (
    "Non-centre hierarchical sites: numpyro.infer.reparam.LocScaleReparam(0) for location and "
    "scale families. "
)


class Finding(NamedTuple):
    """One thing to look at.

    Attributes:
        kind: "divergences", "tree_depth", "bfmi", "r_hat", "ess", "stuck", "precision",
            "parameters", "subsample", "few_draws", "not_finite" or
            "unjudged".
        severity: "error" (do not use the draws) or "warning" (look before you use them).
        sites: the scalars or sites concerned, the worst first.
        number: the figure that gave the alarm.
        message: what was seen.
        remedy: what to do about it.
    """

    kind: str
    severity: str
    sites: tuple[str, ...]
    number: float
    message: str
    remedy: str


def findings(tree: xarray.DataTree) -> list[Finding]:
    """The findings of a result; those stored with the run where there are any.

    Args:
        tree: a result of `infer`.

    Returns:
        Findings, errors first; an empty list if nothing looks wrong.
    """
    stored = tree.attrs.get("findings")
    if stored is None:
        return diagnose(tree)
    return [Finding(**{**f, "sites": tuple(f["sites"])}) for f in json.loads(stored)]


def diagnose(tree: xarray.DataTree) -> list[Finding]:
    """Compute the findings of a result from its draws and sampler statistics."""
    found = [
        finding
        for part in (_sampler_findings, _convergence_findings, _setup_findings)
        for finding in _guarded(part, tree)
    ]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _guarded(part: Callable[[xarray.DataTree], list[Finding]], tree: Any) -> list[Finding]:
    """The findings of one part; a mistake in it must not cost the draws it looks at."""
    try:
        return part(tree)
    except Exception as problem:
        seen = f"{type(problem).__name__}: {problem}"
        return [
            Finding(
                "unjudged",
                "warning",
                (),
                1.0,
                f"some of the draws' diagnostics could not be computed ({seen}).",
                "Look at the draws themselves (ppl.summary), and please report this.",
            )
        ]


def as_text(found: Sequence[Finding]) -> str:
    """The findings as lines to read."""
    return "\n".join(f"- {f.message} {f.remedy}" for f in found)


def as_json(found: Sequence[Finding]) -> str:
    """The findings as a JSON list, for attributes of files."""
    return json.dumps([f._asdict() for f in found])


def _sampler_findings(tree: xarray.DataTree) -> list[Finding]:
    if "sample_stats" not in tree.children:
        return []
    stats = tree["sample_stats"].dataset
    if not stats.sizes.get("draw"):
        return []
    found = []
    if "diverging" in stats and (count := int(stats["diverging"].sum())):
        total = stats["diverging"].size
        many = count > 0.01 * total
        per_chain = np.asarray(stats["diverging"].sum("draw")).astype(int).tolist()
        where, sites = _where_diverging(tree)
        found.append(
            Finding(
                "divergences",
                "error" if many else "warning",
                sites,
                count,
                f"{count} of {total} draws diverged (by chain: {per_chain}){where}: the sampler "
                "cannot follow the posterior's curvature there, and estimates may be biased.",
                (_NON_CENTRE + _STEPS if many else _STEPS + _NON_CENTRE).strip(),
            )
        )
    if "reached_max_treedepth" in stats:
        share = float(stats["reached_max_treedepth"].mean())
        if share > 0.01:
            found.append(
                Finding(
                    "tree_depth",
                    "warning",
                    (),
                    share,
                    f"{share:.0%} of the trajectories ended at the largest tree depth: "
                    "exploration is slow.",
                    "Rescale or decorrelate parameters (standardise predictors; "
                    "NUTS(metric='dense')), or raise max_depth.",
                )
            )
    if "energy" in stats and stats.sizes["draw"] >= 100:
        energy = np.asarray(stats["energy"].transpose("chain", "draw"), dtype=float)
        bfmi = convergence.bfmi(energy)
        low = [int(c) for c in np.flatnonzero(bfmi < _BFMI)]
        if low:
            found.append(
                Finding(
                    "bfmi",
                    "warning",
                    (),
                    float(np.min(bfmi)),
                    f"E-BFMI is {np.min(bfmi):.2f} (below {_BFMI}) in chains {low}: momentum "
                    "resampling explores the energy slowly, often a sign of heavy tails or a "
                    "funnel.",
                    "Reparametrise, or give scale parameters lighter-tailed priors.",
                )
            )
    return found


def _where_diverging(tree: xarray.DataTree) -> tuple[str, tuple[str, ...]]:
    """The scalars that separate draws that diverged from the others, in words and as names."""
    flags = np.asarray(tree["sample_stats"]["diverging"].transpose("chain", "draw")).ravel()
    if "posterior" not in tree.children or flags.sum() < _LEAST_DIVERGING:
        return "", ()
    told: list[tuple[float, str]] = []
    for array in tree["posterior"].dataset.data_vars.values():
        for block in _blocks(array.transpose("chain", "draw", ...)):
            values = np.asarray(block, dtype=float).reshape(flags.size, -1)
            told += zip(measures.auc(values, flags).tolist(), scalar_labels(block), strict=True)
    clear = [pair for pair in told if abs(pair[0] - 0.5) > _SEPARATES]
    clear.sort(key=lambda pair: -abs(pair[0] - 0.5))
    parts = [f"{'large' if auc > 0.5 else 'small'} {name}" for auc, name in clear[:2]]
    return (f", mostly at {' and '.join(parts)}" if parts else ""), tuple(n for _, n in clear[:2])


def _convergence_findings(tree: xarray.DataTree) -> list[Finding]:
    if "posterior" not in tree.children:
        return []
    draws = tree["posterior"].dataset
    chains, count = draws.sizes.get("chain", 0), draws.sizes.get("draw", 0)
    if not any(variable.size for variable in draws.data_vars.values()):
        return []
    names: list[str] = []
    r_hats, ess, broken = [], [], []
    continuous, moves = False, np.zeros(chains, bool)
    for name in draws.data_vars:
        for block in _blocks(draws[name].transpose("chain", "draw", ...)):
            values = np.asarray(block, dtype=float).reshape(chains, count, -1)
            labels = scalar_labels(block)
            broken += [labels[i] for i in np.flatnonzero(~np.isfinite(values).any(axis=(0, 1)))]
            names += labels
            split = values if chains > 1 else _halves(values)
            numbers = convergence.ranked(split)
            r_hats.append(numbers["r_hat"])
            ess.append(np.minimum(numbers["ess_bulk"], numbers["ess_tail"]))
            if block.dtype.kind == "f":
                continuous = True
                # A result may hold infinities; what matters is whether anything changed.
                moves |= (values != values[:, :1]).any(axis=(1, 2))
    r_hat, effective = np.concatenate(r_hats), np.concatenate(ess)
    stuck = {int(c) for c in np.flatnonzero(~moves)} if continuous and count > 1 else set()
    found = _few_draws(chains, count) + _not_finite(broken)
    if stuck or np.nanmax(r_hat, initial=1.0) > _STUCK_R_HAT:
        worst = _worst(names, -r_hat, r_hat > _STUCK_R_HAT)
        if stuck:
            which = f"chains {sorted(stuck)} did not move"
        elif chains > 1:
            which = f"chains sit in different places: {_places(draws, worst[0])}"
        else:
            which = "the two halves of the chain sit in different places"
        number = float(np.nanmax(r_hat, initial=1.0))
        found.append(
            Finding(
                "stuck",
                "error",
                worst,
                number,
                f"{which} (R-hat up to {number:.2f}{_naming(worst)}).",
                _funnel_first(tree) + "Look for several modes or label switching; start elsewhere "
                "(init='prior' or init={...}), or warm up for longer.",
            )
        )
    elif np.nanmax(r_hat, initial=1.0) > _R_HAT:
        worst = _worst(names, -r_hat, r_hat > _R_HAT)
        number = float(np.nanmax(r_hat))
        found.append(
            Finding(
                "r_hat",
                "warning",
                worst,
                number,
                f"R-hat is {number:.3f} (above {_R_HAT}){_naming(worst)}: the chains have not "
                "mixed.",
                "Draw more (ppl.extend), warm up for longer, or reparametrise.",
            )
        )
    need = _ESS_PER_CHAIN * chains
    if count * chains >= 2 * need and np.nanmin(effective, initial=np.inf) < need:
        worst = _worst(names, effective, effective < need)
        number = float(np.nanmin(effective))
        found.append(
            Finding(
                "ess",
                "warning",
                worst,
                number,
                f"the effective sample size is {number:.0f} (below {need}){_naming(worst)}: "
                "estimates are noisy.",
                "Draw more (ppl.extend), or reparametrise to mix faster.",
            )
        )
    return found


def _funnel_first(tree: xarray.DataTree) -> str:
    """Chains that diverge are caught in a funnel rather than in a mode."""
    stats = tree["sample_stats"].dataset if "sample_stats" in tree.children else {}
    diverged = "diverging" in stats and bool(stats["diverging"].any())
    return "Mend the divergences first: chains may be caught in a funnel. " if diverged else ""


def _places(draws: xarray.Dataset, scalar: str) -> str:
    """Where the chains sit, in two groups parted by the widest gap between their means."""
    name = scalar.partition("[")[0]
    array = draws[name].transpose("chain", "draw", ...)
    column = scalar_labels(array).index(scalar)
    means = np.asarray(array, float).reshape(*array.shape[:2], -1)[..., column].mean(axis=1)
    order = np.argsort(means)
    cut = int(np.argmax(np.diff(means[order]))) + 1
    groups = [np.sort(part) for part in (order[:cut], order[cut:])]
    places = [f"near {means[part].mean():.3g} in chains {part.tolist()}" for part in groups]
    return f"{scalar} is {places[0]}, {places[1]}"


def _halves(values: np.ndarray) -> np.ndarray:
    """One chain as two: what can be said of convergence when there are no others."""
    half = values.shape[1] // 2
    return np.concatenate([values[:, :half], values[:, values.shape[1] - half :]])


def _few_draws(chains: int, count: int) -> list[Finding]:
    if chains * count >= _FEW_DRAWS and chains > 1:
        return []
    text = (
        f"{count} draws of one chain" if chains == 1 else f"{count} draws of {chains} chains each"
    )
    why = "one chain cannot show that others would agree" if chains == 1 else "they are too few"
    return [
        Finding(
            "few_draws",
            "warning",
            (),
            chains * count,
            f"there are {text}: {why}, so convergence cannot be judged.",
            "Run four chains (chains=4), and draw more (ppl.extend).",
        )
    ]


def _not_finite(names: Sequence[str]) -> list[Finding]:
    if not names:
        return []
    shown = tuple(names[:_MOST_SITES])
    return [
        Finding(
            "not_finite",
            "error",
            shown,
            len(names),
            f"{len(names)} scalars have no finite draw ({', '.join(shown)}).",
            "Look at what the model computes there: division by zero, log of zero, overflow.",
        )
    ]


def _blocks(array: xarray.DataArray) -> Iterator[xarray.DataArray]:
    """A site in parts of bounded size along its first own dimension (draws may lie on disk)."""
    if not array.size:
        return
    if array.ndim == 2:
        yield array
        return
    width = max(1, _BLOCK_BYTES // (8 * array.size // array.shape[2]))
    for first in range(0, array.shape[2], width):
        yield array[:, :, first : first + width]


def _setup_findings(tree: xarray.DataTree) -> list[Finding]:
    found = []
    if narrowed := tree.attrs.get("float32_data"):
        found.append(
            Finding(
                "precision",
                "warning",
                tuple(str(narrowed).split(", ")),
                32.0,
                f"data {narrowed} came as float32 into a float64 run: seven digits were lost "
                "before.",
                "Pass float64 arrays, or ask for precision='float32'.",
            )
        )
    if names := tree.attrs.get("fixed_parameters"):
        found.append(
            Finding(
                "parameters",
                "warning",
                tuple(str(names).split(", ")),
                1.0,
                f"numpyro.param sites {names} were not learned: they stay at their initial values.",
                "Give them priors: numpyro.sample, numpyro.handlers.lift, or random_module for "
                "networks.",
            )
        )
    if plates := tree.attrs.get("subsampled_plates"):
        found.append(
            Finding(
                "subsample",
                "warning",
                tuple(str(plates).split(", ")),
                1.0,
                f"plates {plates} see one random subsample, fixed for the whole run: this is "
                "the posterior of the reweighted subsample.",
                "Use all data (no subsample_size) for exact inference.",
            )
        )
    return found


def _worst(names: list[str], order: np.ndarray, flags: np.ndarray) -> tuple[str, ...]:
    ranked = [int(i) for i in np.argsort(order) if flags[i]]
    return tuple(names[i] for i in ranked[:_MOST_SITES])


def _naming(sites: tuple[str, ...]) -> str:
    return f" for {', '.join(sites)}" if sites else ""
