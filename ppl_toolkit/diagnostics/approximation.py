"""What is said of draws of an approximation: k-hat, the weights, the bound as it was learned.

Thresholds of k-hat: estimates by importance weights are reliable up to 0.7 and cost more draws from
0.5 on (Vehtari et al. 2024); Yao et al. (2018) take the same lines for the approximation itself. A
single chain counts as failed from 1 on, where not even the mean of the weights exists. That a bound
counts as rising from a tenth of a nat in the last tenth of the steps is a convention of this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppl_toolkit import pareto
from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics.markup import (
    Section,
    chain_css,
    chain_keys,
    figure,
    grid,
    numbers,
    paragraph,
    table,
)

if TYPE_CHECKING:
    import xarray

    from ppl_toolkit.diagnostics.findings import Finding
    from ppl_toolkit.diagnostics.view import View

__all__ = ["GROUP", "Weights", "approximation", "attributes", "findings", "lines", "weights_of"]

_Array = NDArray[np.float64]

GROUP = "approximation"
"""The group of what is known of an approximation."""

GOOD, BAD, HOPELESS = 0.5, 0.7, 1.0
_RISE = 0.1  # nats, in the last tenth of the steps
_LEAST_STRETCHES = 20
_MOST_CHAINS = 8
_MOST_LISTED = 64
_NUTS = "Use NUTS, started from here: infer(model, ..., init=result). "


class Weights(NamedTuple):
    """The importance weights of a run.

    Attributes:
        khat: of the newest pools of all chains together.
        by_chain: of each chain's, (chain,).
        effective: effective sample sizes, (chain,).
        size: draws in a pool.
    """

    khat: float
    by_chain: _Array
    effective: _Array
    size: int


def weights_of(tree: xarray.DataTree) -> Weights | None:
    """The weights of a result, if it has any."""
    if GROUP not in tree.children or "log_weight" not in tree[GROUP].dataset:
        return None
    group = tree[GROUP].dataset
    logs = np.asarray(group["log_weight"].transpose("chain", "pool_draw"), float)
    khat, effective = (np.asarray(group[name], float) for name in ("khat", "weight_ess"))
    if not (khat.any() or effective.any()):  # interrupted before anything was drawn
        return None
    return Weights(pareto.khat(logs.ravel()), khat, effective, logs.shape[1])


def lines(tree: xarray.DataTree) -> list[str]:
    """What a report as text says of the weights."""
    if (found := weights_of(tree)) is None:
        return []
    return [
        f"k-hat {_written(found.khat)} ({_meaning(found.khat)}); by chain {_range(found)}. By the "
        f"weights {found.effective.sum():,.0f} of {found.size * len(found.effective):,} draws are "
        "effective. They are independent draws of an approximation: R-hat tells whether the chains "
        "found the same one."
    ]


def _written(khat: float) -> str:
    return f"{khat:.2f}"


def _range(found: Weights) -> str:
    return f"{_written(found.by_chain.min())} to {_written(found.by_chain.max())}"


def _meaning(khat: float) -> str:
    if khat <= GOOD:
        return "good"
    return "fair" if khat <= BAD else "bad: do not trust these draws"


# -- findings -----------------------------------------------------------------------------------


def findings(tree: xarray.DataTree, make: Callable[..., Finding]) -> list[Finding]:
    """Bad weights, and a bound that was still rising.

    Args:
        tree: a result with the group `GROUP`.
        make: the class `Finding`.
    """
    return [*_of_weights(tree, make), *_of_bound(tree, make)]


def _of_weights(tree: xarray.DataTree, make: Callable[..., Finding]) -> list[Finding]:
    found = weights_of(tree)
    if found is None:
        return []
    worst = float(np.max(found.by_chain))
    if found.khat <= GOOD and worst <= HOPELESS:
        return []
    raw = not _resampled(tree)
    shown = f"k-hat is {_written(found.khat)} ({_range(found)} by chain)"
    if found.khat > BAD or worst > HOPELESS:
        chain = "" if found.khat > BAD else f" in chain {int(np.argmax(found.by_chain))}"
        limit = BAD if found.khat > BAD else HOPELESS
        return [
            make(
                "approximation",
                "error",
                (),
                max(found.khat, worst) if found.khat <= BAD else found.khat,
                f"{shown}; above {limit:g}{chain}: the approximation misses parts of the "
                "posterior, and importance weights do not mend it. Do not trust the draws.",
                _NUTS + "Or take a richer family, or non-centre hierarchical sites.",
            )
        ]
    return [
        make(
            "approximation",
            "warning",
            (),
            found.khat,
            f"{shown}; between {GOOD:g} and {BAD:g}: the approximation is rough"
            + (
                ", and these are draws of it as they are."
                if raw
                else "; the weighted draws can be used, but fewer of them count "
                f"({found.effective.sum():,.0f} of {found.size * len(found.effective):,})."
            ),
            ("Resample them (resample=True). " if raw else "") + _NUTS.strip(),
        )
    ]


def _resampled(tree: xarray.DataTree) -> bool:
    try:
        return bool(json.loads(tree.attrs.get("method_options", "{}")).get("resample", True))
    except ValueError:
        return True


def _of_bound(tree: xarray.DataTree, make: Callable[..., Finding]) -> list[Finding]:
    """Whether the bound rose in the last tenth of the steps, beyond its noise."""
    group = tree[GROUP].dataset
    if "elbo" not in group or group.sizes["stretch"] < _LEAST_STRETCHES:
        return []
    elbo = np.asarray(group["elbo"].transpose("chain", "stretch"), float)
    part = elbo.shape[1] // 10
    last, before = elbo[:, -part:], elbo[:, -2 * part : -part]
    rise = last.mean(axis=1) - before.mean(axis=1)
    noise = np.sqrt((last.var(axis=1, ddof=1) + before.var(axis=1, ddof=1)) / part)
    rising = rise > np.maximum(_RISE, 3.0 * noise)
    if not rising.any():
        return []
    return [
        make(
            "elbo",
            "warning",
            (),
            float(rise.max()),
            f"the bound was still rising in chains {np.flatnonzero(rising).tolist()}: by up to "
            f"{rise.max():.2g} nats in the last tenth of the steps.",
            "Take more steps (steps=), or start nearer (init=, the result of Pathfinder, say).",
        )
    ]


# -- the section of the page --------------------------------------------------------------------


def approximation(view: View) -> Section | None:
    """What is known of an approximation: weights by chain, their tails, the bound."""
    found = weights_of(view.tree)
    if found is None:
        return None
    group = view.tree[GROUP].dataset
    total = found.size * len(found.effective)
    shown = [
        (_written(found.khat), f"k-hat of {total:,} weights"),
        (f"{found.effective.sum():,.0f}", f"of {total:,} draws effective, by the weights"),
    ]
    words = (
        f"These are independent draws of {_law(view)}, not of the posterior. k-hat is the shape of "
        "the tail of the importance weights posterior / approximation: up to 0.5 the draws are "
        "good, up to 0.7 usable once resampled, above that the approximation misses parts of the "
        "posterior. R-hat compares the chains, which are independent runs; autocorrelations and "
        "effective sample sizes of Markov chains have no meaning here."
    )
    body = numbers(shown) + paragraph(words) + _by_chain(group, found)
    pictures = [p for p in (_tails(group), _bound(group), _paths(group)) if p]
    keys = chain_keys(min(len(found.by_chain), _MOST_CHAINS))
    return Section(GROUP, "Approximation", body + keys + grid(pictures))


def _law(view: View) -> str:
    said = str(view.attribute("approximation") or "an approximation")
    return said.partition(",")[0].removeprefix("draws of ")


def _by_chain(group: xarray.Dataset, found: Weights) -> str:
    columns: dict[str, list[str]] = {
        "k-hat": [_written(k) for k in found.by_chain],
        "effective, by the weights": [f"{n:,.0f}" for n in found.effective],
    }
    for name, label, digits in (
        ("log_evidence", "log evidence, by the weights", 6),
        ("log_evidence_sd", "standard error", 2),
        ("log_density_at_mode", "log density at the mode", 6),
    ):
        if name in group:
            columns[label] = [draw.written(float(x), digits) for x in group[name].values]
    if "path_elbo" in group:
        best = np.asarray(group["path_elbo"].max("path"), float)
        columns["best bound"] = [draw.written(float(x), 6) for x in best]
    if "elbo" in group and group.sizes["stretch"]:
        last = np.asarray(group["elbo"].isel(stretch=slice(-10, None)).mean("stretch"), float)
        columns["bound at the end"] = [draw.written(float(x), 6) for x in last]
    chains = min(len(found.by_chain), _MOST_LISTED)
    rows = [[f"chain {c}", *(texts[c] for texts in columns.values())] for c in range(chains)]
    fails = [(c, 1) for c in range(chains) if found.by_chain[c] > BAD]
    heads = ["", *columns]
    return table(heads, rows, "Approximation by chain", ident="by-chain-weights", fails=fails)


def _tails(group: xarray.Dataset) -> str:
    """The largest weights of every chain, as shares of all."""
    logs = np.asarray(group["log_weight"].transpose("chain", "pool_draw"), float)
    most = pareto.tail_length(logs.shape[1])
    top = logs.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        return ""
    shares = np.exp(logs - top)
    shares /= shares.sum(axis=1, keepdims=True)
    largest = -np.sort(-shares, axis=1)[:, :most]
    largest = np.maximum(largest, 1e-12)
    rank = np.arange(1, most + 1)
    where = draw.frame(
        (1.0, float(most)), draw.limits(largest, [1.0 / logs.shape[1]], log=True), y_log=True
    )
    marks = [draw.hline(where, 1.0 / logs.shape[1])]
    marks += [
        draw.line(where, rank, largest[c], chain_css(c))
        for c in range(min(len(largest), _MOST_CHAINS))
    ]
    text = (
        "Shares of the largest importance weights, before they are smoothed. Good: close to the "
        f"dashed line, where all {logs.shape[1]:,} are equal."
    )
    svg = draw.picture(
        where, marks, f"Largest importance weights by chain. {text}", x_label="rank",
        y_label="share of all weights",
    )  # fmt: skip
    return figure(svg, "Importance weights", text, ident="importance-weights")


def _bound(group: xarray.Dataset) -> str:
    """The bound along the steps of learning."""
    if "elbo" not in group or group.sizes["stretch"] < 2:
        return ""
    elbo = np.asarray(group["elbo"].transpose("chain", "stretch"), float)
    steps = np.asarray(group["elbo_step"].transpose("chain", "stretch"), float)
    settled = elbo[:, elbo.shape[1] // 4 :]
    low, high = float(settled.min()), float(elbo.max())
    span = max(high - low, 1e-6 * max(1.0, abs(high)))
    where = draw.frame((0.0, float(steps.max())), (low - 0.5 * span, high + 0.1 * span))
    marks = [
        draw.line(where, steps[c], np.maximum(elbo[c], where.y[0]), chain_css(c))
        for c in range(min(len(elbo), _MOST_CHAINS))
    ]
    text = "Means over stretches of the steps; the rise at the beginning is cut off."
    svg = draw.picture(
        where, marks, f"The bound on the evidence by chain. {text}", x_label="step",
        y_label="bound (ELBO)",
    )  # fmt: skip
    return figure(svg, "Bound on the evidence", text, ident="elbo")


def _paths(group: xarray.Dataset) -> str:
    """The bounds of the paths that draws come from."""
    if "path_elbo" not in group:
        return ""
    bounds = np.asarray(group["path_elbo"].transpose("chain", "path"), float)
    good = np.where(np.isfinite(bounds), bounds, np.nan)
    chains, count = bounds.shape
    where = draw.frame((-0.5, chains - 0.5), draw.limits(good[np.isfinite(good)]))
    shift = (np.arange(count) - 0.5 * (count - 1)) * 0.5 / max(count, 1)
    marks = [draw.dots(where, c + shift, good[c], "dots big c0") for c in range(chains)]
    text = "One dot for every path; paths far below the others saw another mode, or little."
    whole = list(range(0, chains, max(1, -(-chains // 8))))
    svg = draw.picture(
        where, marks, f"Bounds of the paths by chain. {text}", x_label="chain",
        y_label="bound (ELBO)", x_ticks=([float(w) for w in whole], [str(w) for w in whole]),
    )  # fmt: skip
    return figure(svg, "Bounds of the paths", text, ident="paths")


def attributes(tree: xarray.DataTree) -> dict[str, Any]:
    """What the root of a result says of its weights: ``khat``."""
    found = weights_of(tree)
    return {} if found is None else {"khat": found.khat}
