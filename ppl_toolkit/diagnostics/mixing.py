"""The convergence section of a report: all scalars at a glance, and the worst ones closely."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics import measures
from ppl_toolkit.diagnostics.markup import (
    Section,
    chain_css,
    chain_keys,
    figure,
    grid,
    paragraph,
    safe,
)
from ppl_toolkit.diagnostics.style import CHAIN_COLOURS
from ppl_toolkit.diagnostics.view import View

__all__ = ["convergence"]

_Array = NDArray[np.float64]

_MOST_SCALARS = 8
_OPEN = 3
_MOST_CHAINS = 8
_TRACE_POINTS = 250
_RANK_BINS = 20
_LAGS = 60


def convergence(view: View) -> Section | None:
    """R-hat and ESS of all scalars; ranks, traces, growth of ESS, autocorrelation of the worst."""
    if view.count < 4 or not len(view.table):
        return None
    worst = view.worst(_MOST_SCALARS)
    body = grid([*_r_hats(view), _sizes(view)])
    if worst:
        values = [view.scalar(i) for i in worst]
        stacked = np.stack(values, axis=-1)
        counts, bulk, tail = measures.ess_evolution(stacked)
        parts = []
        for j, (i, x) in enumerate(zip(worst, values, strict=True)):
            name = str(view.table.index[i])
            figures = grid([
                _ranks(name, x), _trace(name, x), _growth(view, name, counts, bulk[:, j],
                tail[:, j]), _autocorrelation(name, x),
            ])  # fmt: skip
            about = safe(f"{name}: {_numbers(view, i)}")
            state = " open" if j < _OPEN else ""
            parts.append(f"<details{state}><summary>{about}</summary>{figures}</details>")
        title = "The scalar" if len(worst) == 1 else f"The {len(worst)} scalars that need it most"
        shown = min(view.chains, _MOST_CHAINS)
        words = (
            "By R-hat, then by ESS. Ranks that leave the shaded band tell of chains that "
            "disagree: it holds all bars of chains of one law with probability 95%, given their "
            "autocorrelation. Traces should look alike and level; ESS should grow in "
            "proportion to the draws; autocorrelation should fade."
        )
        if shown < view.chains:
            words += f" Pictures show the first {shown} of {view.chains} chains."
        body += (
            f'<div id="worst"><h3>{title}</h3>{paragraph(words)}{chain_keys(shown)}'
            f"{''.join(parts)}</div>"
        )
    else:
        body += paragraph("No scalar varies, so there is nothing to look at more closely.")
    return Section("convergence", "Convergence", body)


def _numbers(view: View, row: int) -> str:
    values = view.table.iloc[row]
    return (
        f"{view.r_hat_name} {values['r_hat']:.3f}, bulk ESS {values['ess_bulk']:.0f}, "
        f"tail ESS {values['ess_tail']:.0f}"
    )


# -- all scalars --------------------------------------------------------------------------------


def _histogram(values: _Array, low: float, high: float) -> tuple[_Array, _Array]:
    bins = int(np.clip(2 * np.sqrt(values.size), 8, 40))
    counts, edges = np.histogram(values, bins, (low, high))
    return counts.astype(float), edges


def _r_hats(view: View) -> list[str]:
    values = measures.finite(view.table["r_hat"])
    if not values.size:
        return []
    name, most = view.r_hat_name, view.r_hat_limit
    above = int((values > most).sum())
    low, high = draw.limits(values, [0.9995, most * 1.002])
    counts, edges = _histogram(values, low, high)
    where = draw.frame((low, high), (0.0, 1.08 * counts.max()), whole=True)
    marks = [
        draw.bars(where, edges, counts, "solid c0"),
        draw.vline(where, most),
        draw.note(where, most, 0.93 * where.y[1], f" {most:.3g}"),
    ]
    text = f"{above} of {values.size:,} above {most:.3g}; largest {values.max():.3f}."
    svg = draw.picture(
        where, marks, f"Histogram of {name}: {text}", x_label=name, y_label="scalars"
    )
    return [figure(svg, f"{name} of all scalars", text, ident="r-hat")]


def _sizes(view: View) -> str:
    bulk = measures.finite(view.table["ess_bulk"])
    tail = measures.finite(view.table["ess_tail"])
    if not bulk.size + tail.size:
        return ""
    need = view.least_ess
    low, high = 0.0, draw.limits(bulk, tail, [1.1 * need] if view.enough_for_ess else [1.0])[1]
    heights = [(_histogram(v, low, high), css) for v, css in ((bulk, "c0"), (tail, "c1"))]
    tallest = max(counts.max() for (counts, _), _ in heights)
    where = draw.frame((low, high), (0.0, 1.08 * tallest), whole=True)
    (b, be), (t, te) = heights[0][0], heights[1][0]
    marks = [
        draw.bars(where, be, b, "fill c0"),
        draw.stairs(where, be, b, "line c0"),
        draw.stairs(where, te, t, "line c1 dash1"),
    ]
    text = f"Bulk (solid, filled) from {bulk.min():,.0f}, tail (dashed) from {tail.min():,.0f}."
    if view.enough_for_ess:
        marks += [
            draw.vline(where, float(need)),
            draw.note(where, need, 0.93 * where.y[1], f" {need}"),
        ]
    svg = draw.picture(
        where,
        marks,
        f"Histograms of effective sample sizes. {text}",
        x_label="effective sample size",
        y_label="scalars",
    )
    return figure(svg, "Effective sample sizes of all scalars", text, ident="effective-size")


# -- one scalar ---------------------------------------------------------------------------------


def _thin_css(chain: int) -> str:
    return f"line thin c{chain % CHAIN_COLOURS}"


def _ranks(name: str, x: _Array) -> str:
    chains, count = x.shape
    bins = max(2, min(_RANK_BINS, count // 10))
    if np.isnan(x).any():
        return ""
    counts = measures.rank_counts(x, bins)
    low, high = measures.rank_band(chains, count, bins, measures.chain_efficiency(x))
    out = int(((counts < low) | (counts > high)).any(axis=1).sum())
    edges = np.linspace(0.0, x.size, bins + 1)
    where = draw.frame((0.0, float(x.size)), (0.0, 1.08 * max(float(counts.max()), high)))
    marks = [
        draw.band(where, edges[[0, -1]], [low, low], [high, high], "fill plain"),
        draw.hline(where, count / bins, "line ref"),
    ]
    marks += [
        draw.stairs(where, edges, counts[c], chain_css(c)) for c in range(min(chains, _MOST_CHAINS))
    ]
    text = (
        "One chain: nothing to compare with." if chains == 1
        else "All chains stay in the band." if not out
        else f"{out} of {chains} chains leave the band."
    )  # fmt: skip
    svg = draw.picture(
        where, marks, f"Rank plot of {name}. {text}", x_label="rank among all chains",
        y_label="draws",
    )  # fmt: skip
    return figure(svg, "Ranks", text)


def _trace(name: str, x: _Array) -> str:
    chains, count = x.shape
    step = max(1, -(-count // _TRACE_POINTS))
    at = np.arange(0, count, step)
    where = draw.frame((0.0, float(max(count - 1, 1))), draw.limits(x))
    marks = [draw.line(where, at, x[c, ::step], _thin_css(c)) for c in range(min(chains, 8))]
    every = "" if step == 1 else f"One draw in {step}."
    svg = draw.picture(
        where,
        marks,
        f"Trace of {name}: {chains} chains of {count} draws between "
        f"{draw.written(where.y[0])} and {draw.written(where.y[1])}.",
        x_label="draw",
    )
    return figure(svg, "Trace", every)


def _growth(view: View, name: str, counts: _Array, bulk: _Array, tail: _Array) -> str:
    if not counts.size:
        return ""
    top = draw.limits(bulk, tail, [view.least_ess if view.enough_for_ess else 1.0])[1]
    where = draw.frame((0.0, float(counts[-1])), (0.0, top))
    marks = [
        draw.line(where, counts, bulk, "line c0"),
        draw.dots(where, counts, bulk, "dots big c0"),
        draw.line(where, counts, tail, "line c1 dash1"),
        draw.dots(where, counts, tail, "dots big c1"),
    ]
    if view.enough_for_ess:
        marks.insert(0, draw.hline(where, float(view.least_ess)))
    svg = draw.picture(
        where,
        marks,
        f"Growth of the effective sample size of {name}: bulk up to "
        f"{draw.written(float(bulk[-1]))}, tail up to {draw.written(float(tail[-1]))}.",
        x_label="draws per chain",
        y_label="ESS",
    )
    return figure(svg, "Growth of ESS", "Bulk (solid) and tail (dashed).")


def _autocorrelation(name: str, x: _Array) -> str:
    rho = measures.autocorrelation(x, _LAGS)
    lags = np.arange(rho.shape[1])
    low = min(-0.2, draw.limits(rho)[0])
    where = draw.frame((0.0, float(max(lags[-1], 1))), (low, 1.0))
    marks = [draw.hline(where, 0.0)]
    marks += [draw.line(where, lags, rho[c], chain_css(c)) for c in range(min(len(rho), 8))]
    first = float(np.nanmean(rho[:, 1])) if np.isfinite(rho[:, 1:2]).any() else float("nan")
    text = f"At lag 1: {draw.written(first, 2)}."
    svg = draw.picture(where, marks, f"Autocorrelation of {name} by chain. {text}", x_label="lag")
    return figure(svg, "Autocorrelation", text)
