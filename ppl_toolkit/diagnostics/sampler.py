"""The sampler section of a report: energy, acceptance, step size, tree depth, divergences."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppl_toolkit import convergence
from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics import measures
from ppl_toolkit.diagnostics.findings import BFMI
from ppl_toolkit.diagnostics.markup import Section, figure, grid, paragraph, table
from ppl_toolkit.diagnostics.view import View

if TYPE_CHECKING:
    import xarray

__all__ = ["Separation", "sampler", "separation"]

_Array = NDArray[np.float64]

_MOST_CHAINS_LISTED = 64
_MOST_RANKED = 2000
_MOST_COORDINATES = 10
_MOST_LINES = 80
_MOST_POINTS = 700
_BLOCK_BYTES = 1 << 25


def sampler(view: View) -> Section | None:
    """What the sampler said of itself, where it kept statistics."""
    stats = view.stats
    if stats is None or not view.count or not stats.data_vars:
        return None
    pictures = [_energy(stats), _acceptance(view, stats), _depth(stats)]
    body = _by_chain(view, stats) + grid(p for p in pictures if p)
    if "diverging" in stats:
        body += f'<div id="divergences">{_divergences(view, stats)}</div>'
    return Section("sampler", "Sampler", body) if body else None


def _values(stats: xarray.Dataset, name: str) -> _Array | None:
    """A statistic of shape (chain, draw), or None."""
    if name not in stats or set(stats[name].dims) != {"chain", "draw"}:
        return None
    return np.asarray(stats[name].transpose("chain", "draw"), dtype=float)


# -- by chain -----------------------------------------------------------------------------------


def _by_chain(view: View, stats: xarray.Dataset) -> str:
    columns: list[tuple[str, list[str], list[bool]]] = []

    def add(name: str, values: _Array, digits: int, fails: NDArray[np.bool_] | None = None) -> None:
        texts = [draw.written(float(v), digits) for v in values]
        flags = [bool(f) for f in fails] if fails is not None else [False] * len(texts)
        columns.append((name, texts, flags))

    with np.errstate(all="ignore"):
        if (x := _values(stats, "diverging")) is not None:
            add("divergences", x.sum(axis=1), 6, x.sum(axis=1) > 0)
        if (x := _values(stats, "energy")) is not None:
            bfmi = np.asarray(convergence.bfmi(x))
            add("E-BFMI", bfmi, 2, bfmi < BFMI)
        if (x := _values(stats, "acceptance_rate")) is not None:
            add("mean acceptance", x.mean(axis=1), 3)
        if (x := _values(stats, "step_size")) is not None:
            add("step size", x[:, -1], 3)
        if (x := _values(stats, "tree_depth")) is not None:
            add("mean tree depth", x.mean(axis=1), 2)
        if (x := _values(stats, "reached_max_treedepth")) is not None:
            add("at the largest depth", x.sum(axis=1), 6, x.mean(axis=1) > 0.01)
        if (x := _values(stats, "n_steps")) is not None:
            add("gradients", x.sum(axis=1), 9)
        if (x := _values(stats, "lp")) is not None:
            add("mean log density", x.mean(axis=1), 5)
    if not columns:
        return ""
    chains = min(len(columns[0][1]), _MOST_CHAINS_LISTED)
    rows = [[f"chain {c}", *(texts[c] for _, texts, _ in columns)] for c in range(chains)]
    fails = [
        (c, j + 1) for j, (_, _, flags) in enumerate(columns) for c in range(chains) if flags[c]
    ]
    heads = ["", *(name for name, _, _ in columns)]
    more = paragraph(f"The first {chains} of {view.chains} chains.") if chains < view.chains else ""
    return table(heads, rows, "Sampler statistics by chain", ident="by-chain", fails=fails) + more


def _energy(stats: xarray.Dataset) -> str:
    energy = _values(stats, "energy")
    if energy is None or energy.shape[1] < 2:
        return ""
    with np.errstate(all="ignore"):
        centred = energy - energy.mean()
        jumps = np.diff(energy, axis=1)
    x1, y1 = measures.density(centred)
    x2, y2 = measures.density(jumps)
    if not x1.size or not x2.size:
        return ""
    where = draw.frame(draw.limits(x1, x2), (0.0, 1.05 * max(y1.max(), y2.max())), bare=True)
    bfmi = measures.finite(convergence.bfmi(energy))
    text = "Energies (filled) should be no wider than their changes from draw to draw (dashed)."
    if bfmi.size:
        text += f" Smallest E-BFMI {bfmi.min():.2f}; alarm below {BFMI}."
    marks = [
        draw.shape(where, x1, y1, "fill c0"),
        draw.line(where, x1, y1, "line c0"),
        draw.line(where, x2, y2, "line c1 dash1"),
    ]
    svg = draw.picture(
        where, marks, f"Densities of energies and of their changes. {text}",
        x_label="energy, centred", bare=True,
    )  # fmt: skip
    return figure(svg, "Energy", text, ident="energy")


def _acceptance(view: View, stats: xarray.Dataset) -> str:
    rates = _values(stats, "acceptance_rate")
    if rates is None or not measures.finite(rates).size:
        return ""
    counts, edges = np.histogram(measures.finite(rates), 25, (0.0, 1.0))
    where = draw.frame((0.0, 1.0), (0.0, 1.05 * counts.max()), whole=True)
    marks = [draw.bars(where, edges, counts, "solid c0")]
    text = f"Mean {np.nanmean(rates):.3f}"
    target = _target(view)
    if target is not None:
        marks.append(draw.vline(where, target))
        text += f"; asked for {target:g} (dashed)"
    svg = draw.picture(
        where, marks, f"Histogram of acceptance rates. {text}.", x_label="acceptance rate",
        y_label="draws",
    )  # fmt: skip
    return figure(svg, "Acceptance", f"{text}.", ident="acceptance")


def _target(view: View) -> float | None:
    try:
        value = json.loads(view.attribute("method_options") or "{}")["target_acceptance"]
        return float(value)
    except (ValueError, KeyError, TypeError):
        return None


def _depth(stats: xarray.Dataset) -> str:
    depth = _values(stats, "tree_depth")
    if depth is None or not measures.finite(depth).size:
        return ""
    flat = measures.finite(depth).astype(int)
    low, high = int(flat.min()), int(flat.max())
    counts = np.bincount(flat - low, minlength=high - low + 1)
    edges = np.arange(low, high + 2) - 0.5
    where = draw.frame((low - 0.7, high + 0.7), (0.0, 1.05 * counts.max()), whole=True)
    whole = list(range(low, high + 1, max(1, (high - low) // 8)))
    text = f"From {low} to {high}."
    reached = _values(stats, "reached_max_treedepth")
    if reached is not None:
        text += f" {reached.mean():.1%} of the trajectories ended at the largest depth."
    svg = draw.picture(
        where,
        [draw.bars(where, edges, counts, "solid c0")],
        f"Bars of tree depths. {text}",
        x_label="tree depth",
        y_label="draws",
        x_ticks=([float(w) for w in whole], [str(w) for w in whole]),
    )
    return figure(svg, "Tree depth", text, ident="tree-depth")


# -- divergences --------------------------------------------------------------------------------


class Separation(NamedTuple):
    """Rows of the table in the order in which they tell divergent draws from others.

    Attributes:
        rows: rows, the most telling first.
        areas: the area under the ROC curve of each.
        looked_at: how many rows were compared.
    """

    rows: list[int]
    areas: list[float]
    looked_at: int


def separation(view: View, diverging: NDArray[np.bool_]) -> Separation:
    """Rank scalars by how well they separate divergent draws (the distance of AUC from 1/2).

    Args:
        view: the result.
        diverging: shape (chain, draw).
    """
    flags = diverging.ravel()
    sizes = {name: view.sites.count(name) for name in view.names}
    areas: dict[int, float] = {}
    first = 0
    starts: dict[str, int] = {}
    for name in view.names:
        starts[name] = first
        first += sizes[name]
    # Small sites first: scale parameters of a hierarchy are scalars, and they tell the most.
    for name in sorted(view.names, key=lambda n: sizes[n]):
        if len(areas) + sizes[name] > _MOST_RANKED or 8 * flags.size * sizes[name] > _BLOCK_BYTES:
            take = max(0, min(_MOST_RANKED - len(areas), _BLOCK_BYTES // (8 * flags.size), 64))
            picked = range(starts[name], starts[name] + min(take, sizes[name]))
            if not picked:
                continue
            values = np.stack([view.scalar(i).ravel() for i in picked], axis=1)
        else:
            picked = range(starts[name], starts[name] + sizes[name])
            values = view.site(name)
        for row, area in zip(picked, measures.auc(values, flags), strict=True):
            areas[row] = float(area)
    good = {row: area for row, area in areas.items() if np.isfinite(area)}
    rows = sorted(good, key=lambda row: (-abs(good[row] - 0.5), row))
    return Separation(rows, [good[row] for row in rows], len(areas))


def _divergences(view: View, stats: xarray.Dataset) -> str:
    heading = "<h3>Divergences</h3>"
    raw = _values(stats, "diverging")
    diverging = None if raw is None else raw.astype(bool)
    if diverging is None or diverging.shape != (view.chains, view.count) or not diverging.any():
        return heading + paragraph("No draw diverged.")
    count = int(diverging.sum())
    ranked = separation(view, diverging)
    words = (
        f"{count:,} of {diverging.size:,} draws diverged. The scalars below are those that best "
        "separate them from the others, by the area under the ROC curve (AUC: the chance that "
        "a divergent draw has the larger value; 0.5 tells nothing)."
    )
    if count < 10:
        words += " With so few of them the ranking is a hint at most."
    if ranked.looked_at < len(view.table):
        words += f" {ranked.looked_at:,} of {len(view.table):,} scalars were compared."
    body = heading + paragraph(words)
    if not ranked.rows:
        return body
    names = [str(view.table.index[i]) for i in ranked.rows]
    shown = len(names[:_MOST_COORDINATES])
    values = [view.scalar(i) for i in ranked.rows[:shown]]
    listed = table(
        ("scalar", "AUC"),
        [(names[j], f"{ranked.areas[j]:.3f}") for j in range(shown)],
        "Scalars by their separation of divergent draws",
    )
    pictures = []
    if shown >= 2:
        pictures += [_parallel(names[:shown], values, diverging),
                     _pair(names[:2], values[:2], diverging)]  # fmt: skip
    return body + grid([*pictures, listed], css="panels two top")


def _some(where: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    """At most so many of them, evenly spaced."""
    if len(where) <= most:
        return where
    return where[np.linspace(0, len(where) - 1, most).astype(int)]


def _parallel(names: list[str], values: list[_Array], diverging: NDArray[np.bool_]) -> str:
    flags = diverging.ravel()
    flat = np.stack([v.ravel() for v in values], axis=1)
    low, high = flat.min(axis=0), flat.max(axis=0)
    # Ranks would hide how far out a draw lies; the plain scale hides a skewed bulk less than that.
    with np.errstate(all="ignore"):
        scaled = (flat / 2 - low / 2) / (high / 2 - low / 2)
    columns = np.arange(len(names))
    where = draw.frame((0.0, 1.0), (-0.4, len(names) - 0.6), width=350.0,
                       height=54 + 24.0 * len(names), y_labels=names)  # fmt: skip
    marks = []
    for chosen, css, most in (
        (~flags, "line thin veil plain", _MOST_LINES),
        (flags, "line thin bad", _MOST_LINES),
    ):
        rows = _some(np.flatnonzero(chosen), most)
        paths = [draw.line(where, scaled[i], columns[::-1], css) for i in rows]
        marks += paths
    label = (
        f"Parallel coordinates of {len(names)} scalars; divergent draws stand out for "
        f"{names[0]} and {names[1]}."
    )
    svg = draw.picture(
        where, marks, label, x_label="smallest to largest draw",
        x_ticks=([0.0, 1.0], ["min", "max"]),
        y_ticks=([float(c) for c in columns[::-1]], names),
    )  # fmt: skip
    text = f"Up to {_MOST_LINES} divergent draws (red) over as many others (grey)."
    return figure(svg, "Parallel coordinates", text, ident="parallel")


def _pair(names: list[str], values: list[_Array], diverging: NDArray[np.bool_]) -> str:
    flags = diverging.ravel()
    x, y = (v.ravel() for v in values)
    x_log, y_log = _wants_log(x), _wants_log(y)
    where = draw.frame(
        draw.limits(x, log=x_log), draw.limits(y, log=y_log), width=350.0,
        height=260.0, x_log=x_log, y_log=y_log,
    )  # fmt: skip
    others = _some(np.flatnonzero(~flags), _MOST_POINTS)
    bad = _some(np.flatnonzero(flags), _MOST_POINTS)
    marks = [
        draw.dots(where, x[others], y[others], "dots veil plain"),
        draw.crosses(where, x[bad], y[bad], "line bad"),
    ]
    label = f"Scatter of {names[0]} and {names[1]}: {len(bad)} divergent draws as crosses."
    scale = [name + (" (log scale)" if log else "") for name, log in
             ((names[0], x_log), (names[1], y_log))]  # fmt: skip
    svg = draw.picture(where, marks, label, x_label=scale[0], y_label=scale[1])
    text = "Divergent draws (crosses) among others (dots)."
    return figure(svg, f"{names[0]} and {names[1]}", text, ident="pair")


def _wants_log(values: _Array) -> bool:
    """Whether a positive scalar spans decades."""
    good = measures.finite(values)
    return bool(good.size and good.min() > 0 and np.quantile(good, 0.99) > 30 * good.min())
