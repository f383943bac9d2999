"""What is wrong with a run, as data and as text, each finding with its remedy.

Thresholds: R-hat 1.01 and 100 effective draws per chain (Vehtari et al. 2021), or per superchain,
with nested R-hat, where many short chains share starts (Margossian et al. 2024), E-BFMI 0.3
(Betancourt 2016), any divergence after warm-up (Betancourt 2017). Monte Carlo errors above a tenth
of the standard deviation, and the lines between chains that have not mixed and chains that are
stuck or in different modes, are conventions of this file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ppl_toolkit import convergence
from ppl_toolkit.diagnostics import approximation, measures
from ppl_toolkit.results import scalar_labels, superchains_of
from ppl_toolkit.starts import start_numbers

if TYPE_CHECKING:
    import xarray

__all__ = [
    "BFMI",
    "ESS_PER_CHAIN",
    "FEW_DRAWS",
    "HEAT",
    "MONTE_CARLO_ERROR",
    "MOVING",
    "NEAR_START",
    "NOISY_EVIDENCE",
    "NOT_UNIFORM",
    "R_HAT",
    "TREE_DEPTH",
    "Finding",
    "Judged",
    "always_there",
    "as_json",
    "as_text",
    "convergence_of",
    "diagnose",
    "findings",
    "findings_of_draws",
    "findings_of_setup",
    "least_ess",
    "r_hat_limit",
    "unjudged",
]

R_HAT = 1.01
ESS_PER_CHAIN = 100
BFMI = 0.3
TREE_DEPTH = 0.01  # share of the trajectories that end at the largest depth
MOVING = 0.01  # share of the draws that differ from the one before
MONTE_CARLO_ERROR = 0.1  # of mean or standard deviation, in standard deviations
FEW_DRAWS = 100  # of all chains
HEAT = 0.2  # of a temperature of one
NOISY_EVIDENCE = 1.0  # standard deviation of the log, from run to run
NEAR_START = 0.3  # share of the new points of nested sampling that stayed near to their start
NOT_UNIFORM = 1e-5  # p-value of the ranks at which they came in
_HOPELESS_R_HAT = 1.5  # more draws would not mend it
_APART = 3.0  # standard deviations within chains, between groups of chains in different modes
_DRIFT = 0.5  # of them between the halves of a chain that is on its way, not in a mode
_MOST_SITES = 5
_MOST_CHAINS = 8  # that are listed one by one
_BLOCK_BYTES = 4 * 2**20
_LEAST_DIVERGING = 5  # draws, to say where they lie
_SEPARATES = 0.2  # from one half: the chance that a diverging draw has the larger value

_ADAPTIVE = ("NUTS", "HMC", "ChEES", "MAMS")
_NON_CENTRE = (
    "Non-centre hierarchical sites: numpyro.infer.reparam.LocScaleReparam(0) for location and "
    "scale families. "
)


class Finding(NamedTuple):
    """One thing to look at.

    Attributes:
        kind: "divergences", "tree_depth", "bfmi", "hot"; "r_hat", "stuck", "multimodal", "ess",
            "mcse", "few_draws", "not_finite"; "precision", "parameters", "subsample"; "khat"
            (`loo`), "conflict", "weak_data" (`sensitivity`), "predictive" (`check_posterior`);
            "noisy_filter"; "nested", "duplicates" (nested sampling); "approximation", "elbo";
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
    return _errors_first([*findings_of_draws(tree), *findings_of_setup(tree)])


def findings_of_draws(tree: xarray.DataTree, judged: Judged | None = None) -> list[Finding]:
    """What its draws and sampler statistics say of a result; ``judged``, where that is known."""
    mixed = functools.partial(_convergence_findings, judged=judged)
    parts = (_sampler_findings, mixed, _of_nested)
    return _errors_first([finding for part in parts for finding in _guarded(part, tree)])


def findings_of_setup(tree: xarray.DataTree) -> list[Finding]:
    """What the attributes of a result say."""
    return _guarded(_setup_findings, tree)


def _errors_first(found: list[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: finding.severity != "error")


def _guarded(part: Callable[[xarray.DataTree], list[Finding]], tree: Any) -> list[Finding]:
    """The findings of one part; a mistake in it must not cost the draws it looks at."""
    try:
        return part(tree)
    except Exception as problem:
        return [unjudged(problem)]


def unjudged(problem: BaseException) -> Finding:
    """What is said where the draws could not be judged."""
    seen = f"{type(problem).__name__}: {problem}"
    return Finding(
        "unjudged",
        "warning",
        (),
        1.0,
        f"some of the draws' diagnostics could not be computed ({seen}).",
        "Look at the draws themselves (ppl.summary), and please report this.",
    )


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
        name = tree.attrs.get("method")
        name = name if name in _ADAPTIVE else "NUTS"
        options = json.loads(tree.attrs.get("method_options") or "{}")
        target = options.get("target_acceptance", 0.8)
        higher = 0.95 if target < 0.95 else 0.99
        steps = f"Take smaller steps: {name}(target_acceptance={higher}). "
        per_chain = np.asarray(stats["diverging"].sum("draw")).astype(int)
        told = f"by chain: {per_chain.tolist()}"
        if per_chain.size > _MOST_CHAINS:
            told = f"in {np.count_nonzero(per_chain)} of {per_chain.size} chains"
        where, sites = _where_diverging(tree)
        found.append(
            Finding(
                "divergences",
                "error" if many else "warning",
                sites,
                count,
                f"{count} of {total} draws diverged ({told}){where}: the sampler "
                "cannot follow the posterior's curvature there, and estimates may be biased.",
                "Take smaller steps: a step_size of a tenth."
                if "approximation" in tree.attrs
                else (_NON_CENTRE + steps if many else steps + _NON_CENTRE).strip(),
            )
        )
    if "reached_max_treedepth" in stats:
        share = float(stats["reached_max_treedepth"].mean())
        if share > TREE_DEPTH:
            found.append(
                Finding(
                    "tree_depth",
                    "warning",
                    (),
                    share,
                    f"{share:.0%} of the trajectories ended at the largest tree depth: "
                    "exploration is slow.",
                    "Rescale or decorrelate parameters (standardise predictors), or raise "
                    "max_depth.",
                )
            )
    if "energy" in stats and stats.sizes["draw"] >= 100:
        energy = np.asarray(stats["energy"].transpose("chain", "draw"), dtype=float)
        bfmi = convergence.bfmi(energy)
        low = [int(c) for c in np.flatnonzero(bfmi < BFMI)]
        if low:
            found.append(
                Finding(
                    "bfmi",
                    "warning",
                    (),
                    float(np.min(bfmi)),
                    f"E-BFMI is {np.min(bfmi):.2f} (below {BFMI}) in chains {_numbers(low)}: "
                    "momentum resampling explores the energy slowly, often a sign of heavy tails "
                    "or a funnel.",
                    "Reparametrise, or give scale parameters lighter-tailed priors.",
                )
            )
    for name in stats.data_vars:
        if str(name).startswith("kinetic_temperature") and stats.sizes["draw"] >= 100:
            found += _heat(float(stats[name].mean()))
    return found


def _heat(temperature: float) -> list[Finding]:
    """Whether the momenta of stochastic-gradient chains are hotter than the posterior."""
    if abs(temperature - 1.0) <= HEAT:
        return []
    return [
        Finding(
            "hot",
            "warning",
            (),
            temperature,
            f"the momenta have temperature {temperature:.2f} instead of 1: the noise of the "
            "gradients, or too long a step, makes the variances of the draws wrong by about that "
            "factor.",
            "Take smaller steps or larger minibatches, or control_variates=True.",
        )
    ]


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


class Judged(NamedTuple):
    """What the diagnosis knows of the draws, arrays by scalar.

    Attributes:
        names: labels of the scalars.
        r_hat: R-hat; nested R-hat if chains share starting points; between halves of one chain.
        ess: the smaller one of bulk and tail ESS.
        error: the larger one of the Monte Carlo errors of mean and standard deviation, in standard
            deviations.
        broken: labels of scalars without a finite draw.
        moving: by chain, the share of the draws that differ from the one before in anything
            continuous; NaN if nothing is continuous.
    """

    names: list[str]
    r_hat: np.ndarray
    ess: np.ndarray
    error: np.ndarray
    broken: list[str]
    moving: np.ndarray


def _judged(draws: xarray.Dataset, superchains: int) -> Judged:
    chains, count = draws.sizes.get("chain", 0), draws.sizes.get("draw", 0)
    names: list[str] = []
    broken: list[str] = []
    numbers: dict[str, list[np.ndarray]] = {"r_hat": [], "ess": [], "error": []}
    continuous, moved = False, np.zeros((chains, max(count - 1, 0)), bool)
    for name in draws.data_vars:
        for block in _blocks(draws[name].transpose("chain", "draw", ...)):
            values = np.asarray(block, dtype=float).reshape(chains, count, -1)
            labels = scalar_labels(block)
            names += labels
            broken += [labels[i] for i in np.flatnonzero(~np.isfinite(values).any(axis=(0, 1)))]
            for key, found in convergence_of(values, superchains).items():
                numbers[key].append(found)
            if block.dtype.kind == "f":
                continuous = True
                raw = np.asarray(block).reshape(chains, count, -1)
                new, old = raw[:, 1:], raw[:, :-1]
                moved |= ((new != old) & ~(np.isnan(new) & np.isnan(old))).any(axis=2)
    moving = moved.mean(axis=1) if continuous and count > 1 else np.full(chains, np.nan)
    joined = {key: np.concatenate(parts) for key, parts in numbers.items()}
    return Judged(names=names, broken=broken, moving=moving, **joined)


def convergence_of(values: np.ndarray, superchains: int = 0) -> dict[str, np.ndarray]:
    """`Judged.r_hat`, `ess` and `error` of draws (chain, draw, scalar)."""
    chains, count = values.shape[:2]
    if chains == 1:  # as two: what can be said of convergence when there are no others
        half = count // 2
        values = np.concatenate([values[:, :half], values[:, count - half :]])
    found = convergence.convergence(values)
    if superchains > 1:
        found["r_hat"] = convergence.rhat_nested(values, start_numbers(chains, superchains))
    with np.errstate(all="ignore"):
        error = np.maximum(found["mcse_mean"], found["mcse_sd"]) / found["sd"]
    ess = np.minimum(found["ess_bulk"], found["ess_tail"])
    return {"r_hat": found["r_hat"], "ess": ess, "error": error}


def _convergence_findings(tree: xarray.DataTree, judged: Judged | None = None) -> list[Finding]:
    if "posterior" not in tree.children:
        return []
    draws = tree["posterior"].dataset
    chains, count = draws.sizes.get("chain", 0), draws.sizes.get("draw", 0)
    if not any(variable.size for variable in draws.data_vars.values()):
        return []
    draws = always_there(draws, tree.attrs)
    superchains = superchains_of(tree)
    judged = judged or _judged(draws, superchains)
    if approximation.GROUP in tree.children:  # independent draws
        own = approximation.findings(tree, Finding)
        # Chains that hang on a few heavy draws differ, whatever was found.
        heavy = any(finding.severity == "error" for finding in own)
        agreement = _agreement(draws, judged, _HOPELESS_R_HAT if heavy else R_HAT)
        return [*_not_finite(judged.broken), *own, *agreement]
    if "filtering" in tree.children:  # paths of one filter are independent draws, given it
        return [*_not_finite(judged.broken), *_of_filters(tree)]
    if "nested" in tree.children:  # independent draws, given their run
        hang = [f for f in _noise(judged, chains, count, 0) if f.kind == "mcse"]
        return [
            *_few_draws(chains, count),
            *_not_finite(judged.broken),
            *_runs_differ(judged, count),
            *hang,
        ]
    if count < ESS_PER_CHAIN and _sums_along_sweeps(tree):  # what is wanted are the sums
        return _not_finite(judged.broken)
    return [
        *_few_draws(chains, count),
        *_not_finite(judged.broken),
        *_mixing(tree, draws, judged, superchains),
        *_noise(judged, chains, count, superchains),
    ]


def always_there(draws: xarray.Dataset, attrs: Mapping[Any, Any]) -> xarray.Dataset:
    """Without the sites of trans-dimensional plates, whose elements come and go."""
    plates = set(json.loads(attrs.get("trans_dimensional", "{}")))
    return draws[[name for name, site in draws.data_vars.items() if not plates & set(site.dims)]]


def _mixing(
    tree: xarray.DataTree, draws: xarray.Dataset, judged: Judged, superchains: int
) -> list[Finding]:
    """Chains that stand still, sit in different modes, or have not mixed: the first that holds."""
    names, r_hat, chains = judged.names, judged.r_hat, draws.sizes["chain"]
    number = float(np.nanmax(r_hat, initial=1.0))
    limit = r_hat_limit(superchains, chains, draws.sizes["draw"])
    stuck = np.flatnonzero(judged.moving < MOVING)
    hopeless = _worst(names, -r_hat, r_hat > _HOPELESS_R_HAT)
    if stuck.size:
        shares = ", ".join(f"{judged.moving[c]:.1%}" for c in stuck[:_MOST_CHAINS])
        return [
            Finding(
                "stuck",
                "error",
                hopeless,
                float(judged.moving.min()),
                f"chains {_numbers(stuck)} stood still: {shares} of their draws moved.",
                _funnel_first(tree) + "Start elsewhere (init='prior' or init={...}), warm up for "
                "longer, or take smaller steps.",
            )
        ]
    if hopeless and chains > 1:
        means, gap, drift = _apart(draws, hopeless[0])
        if gap > _APART and drift < _DRIFT:
            return [
                Finding(
                    "multimodal",
                    "error",
                    hopeless,
                    number,
                    f"chains sit in different places: {_places(hopeless[0], means)} (R-hat up to "
                    f"{number:.2f}{_naming(hopeless)}).",
                    _funnel_first(tree) + "Look for several modes or label switching: break the "
                    "symmetry in the model, start elsewhere (init='prior' or init={...}), or warm "
                    "up for longer.",
                )
            ]
    if number <= limit:
        return []
    worst = _worst(names, -r_hat, r_hat > limit)
    which = "nested R-hat" if superchains > 1 else "R-hat"
    if chains > 1:
        why = "the chains have not mixed"
    else:
        why = "the two halves of the chain sit in different places"
    return [
        Finding(
            "r_hat",
            "error" if hopeless else "warning",
            worst,
            number,
            f"{which} is {number:.3f} (above {limit:.3g}){_naming(worst)}: {why}.",
            _funnel_first(tree) + "Draw more (ppl.extend), warm up for longer, or reparametrise.",
        )
    ]


def _agreement(draws: xarray.Dataset, judged: Judged, limit: float) -> list[Finding]:
    """Whether the chains found the same approximation; few draws do, since they are independent."""
    chains, count = draws.sizes["chain"], draws.sizes["draw"]
    if few := _few_draws(chains, count):
        return few
    return _runs_apart(
        judged,
        limit,
        count,
        "the chains found different approximations, of several modes perhaps, or an optimisation "
        "failed.",
        "Look at the chains one by one; take more starts, paths or steps; or use NUTS or SMC.",
    )


def _runs_apart(judged: Judged, limit: float, count: int, why: str, remedy: str) -> list[Finding]:
    """Whether runs differ by more than ``count`` independent draws of each may.

    For N of these, N (R-hat^2 - 1) / 2 is about F - 1, F the mean square between the halves of four
    chains in units of that within; it exceeds 5 at one scalar in 100,000.
    """
    number = float(np.nanmax(judged.r_hat, initial=1.0))
    limit = float(np.sqrt(limit**2 + 8.0 / count))
    if number <= limit:
        return []
    worst = _worst(judged.names, -judged.r_hat, judged.r_hat > limit)
    severity = "error" if number > _HOPELESS_R_HAT else "warning"
    said = f"R-hat is {number:.3f} (above {limit:.3g}){_naming(worst)}: {why}"
    return [Finding("r_hat", severity, worst, number, said, remedy)]


def _numbers(chains: Sequence[int] | np.ndarray) -> str:
    """The numbers of chains, the first ones if there are many."""
    if len(chains) <= _MOST_CHAINS:
        return str(list(map(int, chains)))
    first = ", ".join(str(int(c)) for c in chains[:_MOST_CHAINS])
    return f"[{first}, ...] ({len(chains)} in all)"


def least_ess(superchains: int, chains: int) -> int:
    """The effective draws below which estimates count as noisy."""
    return ESS_PER_CHAIN * (superchains if superchains > 1 else chains)


def r_hat_limit(superchains: int, chains: int, count: int) -> float:
    """The largest R-hat of chains that may be used.

    Few draws per superchain differ by chance: nested R-hat of independent draws, M of them per
    superchain, is about sqrt(1 + 1 / M).
    """
    if superchains < 2:
        return R_HAT
    return float(np.sqrt(R_HAT**2 + superchains / (chains * count)))


def _noise(judged: Judged, chains: int, count: int, superchains: int) -> list[Finding]:
    """Few effective draws; or enough of them, but tails that spoil mean and standard deviation."""
    names, effective, error = judged.names, judged.ess, judged.error
    need = least_ess(superchains, chains)
    if count * chains < 2 * need:
        return []
    found = []
    noisy = effective < need
    if noisy.any():
        worst = _worst(names, effective, noisy)
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
    heavy = (error > MONTE_CARLO_ERROR) & ~noisy
    if heavy.any():
        worst = _worst(names, -error, heavy)
        number = float(np.nanmax(error[heavy]))
        found.append(
            Finding(
                "mcse",
                "warning",
                worst,
                number,
                f"the Monte Carlo error of mean or standard deviation is {number:.0%} of the "
                f"standard deviation (above {MONTE_CARLO_ERROR:.0%}){_naming(worst)}, though ranks "
                "mix well: heavy tails, moments hang on a few draws.",
                "Report medians and quantiles, give the site a lighter-tailed prior, or draw more.",
            )
        )
    return found


def _funnel_first(tree: xarray.DataTree) -> str:
    """Chains that diverge are caught in a funnel rather than in a mode."""
    stats = tree["sample_stats"].dataset if "sample_stats" in tree.children else {}
    diverged = "diverging" in stats and bool(stats["diverging"].any())
    return "Mend the divergences first: chains may be caught in a funnel. " if diverged else ""


def _apart(draws: xarray.Dataset, scalar: str) -> tuple[np.ndarray, float, float]:
    """Where the chains sit, and whether they stay.

    Returns:
        The chains' means of a scalar; in standard deviations within chains, the widest gap between
        them, and the median distance between the means of a chain's halves.
    """
    array = draws[scalar.partition("[")[0]].transpose("chain", "draw", ...)
    column = scalar_labels(array).index(scalar)
    values = np.asarray(array, float).reshape(*array.shape[:2], -1)[..., column]
    means, half = values.mean(axis=1), values.shape[1] // 2
    within = max(float(np.sqrt(values.var(axis=1).mean())), np.finfo(float).tiny)
    drift = np.median(np.abs(values[:, half:].mean(axis=1) - values[:, :half].mean(axis=1)))
    return means, float(np.diff(np.sort(means)).max()) / within, float(drift) / within


def _places(scalar: str, means: np.ndarray) -> str:
    """Where the chains sit, in two groups parted by the widest gap between their means."""
    order = np.argsort(means)
    cut = int(np.argmax(np.diff(means[order]))) + 1
    groups = [np.sort(part) for part in (order[:cut], order[cut:])]
    places = [f"near {means[part].mean():.3g} in chains {_numbers(part)}" for part in groups]
    return f"{scalar} is {places[0]}, {places[1]}"


def _few_draws(chains: int, count: int) -> list[Finding]:
    if chains * count >= FEW_DRAWS and chains > 1:
        return []
    verb, draws = ("is", "draw") if count == 1 else ("are", "draws")
    of = "one chain" if chains == 1 else f"{chains} chains each"
    why = "one chain cannot show that others would agree" if chains == 1 else "they are too few"
    return [
        Finding(
            "few_draws",
            "warning",
            (),
            chains * count,
            f"there {verb} {count} {draws} of {of}: {why}, so convergence cannot be judged.",
            ("Run four chains (chains=4), and draw" if chains == 1 else "Draw")
            + " more (ppl.extend).",
        )
    ]


def _sums_along_sweeps(tree: xarray.DataTree) -> bool:
    stats = tree["sample_stats"].dataset if "sample_stats" in tree.children else {}
    return any(str(name).startswith("smoothed.") for name in stats)


def _of_filters(tree: xarray.DataTree) -> list[Finding]:
    """Noise of the evidence, which is that of all that a filter says.

    Between chains, where there are several: what lineages tell is never much above one.
    """
    group = tree["filtering"].dataset
    logs = np.asarray(group["log_evidence_increment"].sum("time"))
    told = np.asarray(group["log_evidence_sd"])
    worst = float(np.std(logs, ddof=1) if logs.size > 1 else np.max(told))
    if worst <= NOISY_EVIDENCE:
        return []
    return [
        Finding(
            "noisy_filter",
            "warning",
            (),
            worst,
            f"log evidence has a standard deviation of {worst:.1f} from run to run (above "
            f"{NOISY_EVIDENCE:g}): few particles carry the weight.",
            "Take more particles, or a proposal that looks at the data: "
            "proposal=LaplaceProposal(), Adapted() or Guided(...).",
        )
    ]


def _runs_differ(judged: Judged, count: int) -> list[Finding]:
    """Whether runs of nested sampling differ."""
    return _runs_apart(
        judged,
        R_HAT,
        count,
        "the runs differ.",
        "Take more live points, or more slices for each new one: NestedSampling(live=..., "
        "steps=...).",
    )


def _of_nested(tree: xarray.DataTree) -> list[Finding]:
    """New points that are no draws of the prior above their bound; draws that are no new ones.

    The line for points that stayed near is a convention of this file. It was set on normal
    posteriors of 5 to 20 dimensions, where a share of 0.35 went with evidences that are too large
    by one standard deviation of a run, and shares below 0.2 with right ones.
    """
    if "nested" not in tree.children:
        return []
    runs = tree["nested"].dataset
    near, p = float(runs["near_start"].max()), float(runs["insertion_p"].min())
    found = []
    if near > NEAR_START or p < NOT_UNIFORM / runs.sizes["chain"]:
        why = (
            f"{near:.0%} of the new points stayed near to the points that they started at"
            if near > NEAR_START
            else "new points come in too high or too low among the others (p-value of their ranks "
            f"{p:.1g})"
        )
        found.append(
            Finding(
                "nested",
                "error",
                (),
                near if near > NEAR_START else p,
                f"{why}: they are not independent draws, and the evidence is biased.",
                "Take more slices for each: NestedSampling(steps=...). Modes far apart need more "
                "live points as well.",
            )
        )
    worth, draws = float(runs["ess"].min()), tree["posterior"].sizes.get("draw", 0)
    if draws > worth:
        found.append(
            Finding(
                "duplicates",
                "warning",
                (),
                worth,
                f"a chain's {draws:,} draws are taken from points that are worth {worth:,.0f}: "
                "many are the same, and errors that count draws are too small.",
                "Take more live points instead of more draws: NestedSampling(live=...).",
            )
        )
    return found


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
    missing = tree.attrs.get("goal_missing")
    if missing and not tree.attrs.get("interrupted"):
        found.append(
            Finding(
                "goal",
                "warning",
                (),
                1.0,
                f"the goal ({tree.attrs['goal_text']}) was not reached: {missing}.",
                "Raise draws=, the most that are drawn, or go on with "
                "ppl.extend(result, model, ..., until=goal).",
            )
        )
    return found


def _worst(names: list[str], order: np.ndarray, flags: np.ndarray) -> tuple[str, ...]:
    ranked = [int(i) for i in np.argsort(order) if flags[i]]
    return tuple(names[i] for i in ranked[:_MOST_SITES])


def _naming(sites: tuple[str, ...]) -> str:
    return f" for {', '.join(sites)}" if sites else ""
