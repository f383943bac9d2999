"""The section of a report on models whose number of parameters is itself unknown."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ppl_toolkit import convergence
from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics import measures
from ppl_toolkit.diagnostics.jump_evidence import CrossCheck, cross_checks
from ppl_toolkit.diagnostics.markup import (
    Section,
    anchor,
    chain_css,
    figure,
    grid,
    numbers,
    paragraph,
    safe,
    table,
)
from ppl_toolkit.diagnostics.view import View

__all__ = ["Sizes", "dimensions", "sizes", "transitions"]

_Array = NDArray[np.float64]

_MOST_BARS = 40
_MOST_CELLS = 14  # rows and columns of the table of transitions
_MOST_CHAINS = 4
_MOST_SITES = 6
_POINTS = 400
_FEW_JUMPS = 20


class Sizes(NamedTuple):
    """The posterior of a size.

    Attributes:
        values: the sizes from the smallest to the largest one seen, shape (K,).
        probability: of each, the mean over chains, shape (K,).
        se: its standard error, from the spread of the chains; NaN for one chain.
    """

    values: NDArray[np.int64]
    probability: _Array
    se: _Array


def sizes(k: ArrayLike) -> Sizes:
    """Posterior probabilities of a size.

    Args:
        k: whole numbers, shape (chain, draw).
    """
    drawn = np.asarray(k).astype(np.int64)
    values = np.arange(drawn.min(), drawn.max() + 1)
    share = (drawn[:, :, None] == values).mean(axis=1)
    chains = len(drawn)
    se = share.std(axis=0, ddof=1) / np.sqrt(chains) if chains > 1 else np.full(len(values), np.nan)
    return Sizes(values, share.mean(axis=0), se)


def transitions(k: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """How often each size follows each, from one draw to the next of a chain.

    Args:
        k: whole numbers, shape (chain, draw).

    Returns:
        (sizes, shape (K,); counts from row to column, shape (K, K)).
    """
    drawn = np.asarray(k).astype(np.int64)
    first, count = drawn.min(), int(np.ptp(drawn)) + 1
    pairs = (drawn[:, :-1] - first) * count + (drawn[:, 1:] - first)
    counts = np.bincount(pairs.ravel(), minlength=count * count).reshape(count, count)
    return np.arange(first, first + count), counts


def dimensions(view: View) -> Section | None:
    """The posterior of every size, its trace, jumps, checks; None for models of fixed dimension."""
    body = ""
    for plate, site in view.trans_dimensional.items():
        if site not in view.draws or view.draws[site].ndim != 2 or not view.draws[site].size:
            continue
        k = view.scalar_of(view.draws, site, 0)
        if np.isfinite(k).all() and np.array_equal(k, np.round(k)):
            body += _size(view, plate, site, k)
    if body:
        body += _moves(view)
    body += "".join(_checked(found) for found in cross_checks(view.tree))
    return Section("dimensions", "Dimensions", body) if body else None


def _size(view: View, plate: str, site: str, k: _Array) -> str:
    jumps = (np.diff(k, axis=1) != 0).sum(axis=1)
    words = (
        f"{site} is the number of active elements of {plate}. Elements have no identity from draw "
        "to draw, so that their table rows mean little: look at the pictures here."
    )
    if view.count > 1 and jumps.min() < _FEW_JUMPS:
        words += (
            f" A chain changed {site} {int(jumps.min())} times only: its probabilities are not "
            "to be trusted. Draw more, or propose moves that fit the data better."
        )
    shown = [(draw.written(float(jumps.sum()), 9), f"jumps of {site}")]
    if view.count >= 4:
        with np.errstate(all="ignore"):
            found = convergence.ranked(k)
        shown += [
            (f"{float(found['ess_bulk']):,.0f}", f"bulk ESS of {site}"),
            (f"{float(found['r_hat']):.3f}", f"R-hat of {site}"),
        ]
    figures = [_bars(view, site, k), *_traces(site, k)]
    figures += [_active(view, str(n)) for n in view.ragged if plate in view.draws[n].dims][
        :_MOST_SITES
    ]
    return (
        f"<h3>{safe(site)}</h3>{paragraph(words)}{numbers(shown)}{grid(figures)}"
        f"{_jumps(site, jumps)}{_crossing(site, k)}"
    )


def _bars(view: View, site: str, k: _Array) -> str:
    found = sizes(k)
    order = np.argsort(-found.probability)[:_MOST_BARS]
    low, high = int(found.values[order].min()), int(found.values[order].max())
    keep = (found.values >= low) & (found.values <= high)
    x, p, se = found.values[keep], found.probability[keep], found.se[keep]
    best = int(np.argmax(p))
    text = f"Most probable: {x[best]}, with {p[best]:.1%}"
    if np.isfinite(se[best]):
        text += f" ± {se[best]:.1%}; lines: two standard errors, from the spread of the chains"
    before = _before(view, site, x)
    if before is not None:
        text += "; dots: the prior"
    top = float(max(np.nanmax(np.where(np.isfinite(se), p + 2 * se, p)),
                    0.0 if before is None else before.max()))  # fmt: skip
    where = draw.frame((low - 0.7, high + 0.7), (0.0, 1.05 * top))
    marks = [
        draw.bars(where, np.arange(low, high + 2) - 0.5, p, "solid c0"),
        draw.segments(where, x, x, np.maximum(p - 2 * se, 0.0), p + 2 * se, "line bold ink"),
    ]
    if before is not None:
        marks.append(draw.dots(where, x, before, "dots big c1"))
    whole = [int(v) for v in x[:: max(1, -(-len(x) // 10))]]
    svg = draw.picture(
        where, marks, f"Posterior probabilities of {site}. {text}.", x_label=site,
        y_label="probability", x_ticks=([float(v) for v in whole], [str(v) for v in whole]),
    )  # fmt: skip
    return figure(svg, f"Posterior of {site}", f"{text}.", ident=f"size-{anchor(site)}")


def _before(view: View, site: str, x: NDArray[np.int64]) -> _Array | None:
    """Prior probabilities of sizes, if the result has prior draws."""
    if view.group == "prior" or "prior" not in view.tree.children:
        return None
    prior = view.tree["prior"].dataset
    if site not in prior or not prior[site].size:
        return None
    drawn = np.asarray(prior[site], dtype=float).ravel()
    return (drawn[:, None] == x).mean(axis=0)


def _traces(site: str, k: _Array) -> list[str]:
    """One picture for every chain: steps of chains on top of each other hide each other."""
    count = k.shape[1]
    if count < 2:
        return []
    step = -(-count // _POINTS)
    at = np.arange(0, count, step)
    pictures = []
    for c in range(min(len(k), _MOST_CHAINS)):
        where = draw.frame((0.0, float(count)), (k.min() - 0.5, k.max() + 0.5), whole=True)
        svg = draw.picture(
            where, [draw.stairs(where, [*at, count], k[c, at], f"line thin {chain_css(c)[5:7]}")],
            f"Trace of {site} in chain {c}, from {k[c].min():.0f} to {k[c].max():.0f}.",
            x_label="draw", y_label=site,
        )  # fmt: skip
        every = "" if step == 1 else f"One draw in {step}."
        pictures.append(figure(svg, f"Trace, chain {c}", every))
    return pictures


def _active(view: View, name: str) -> str:
    """The values of a site's active elements, pooled over elements and draws."""
    array = view.draws[name].transpose("chain", "draw", ...)
    values = measures.finite(array)
    x, y = measures.density(values)
    if not x.size:
        return ""
    where = draw.frame(draw.limits(x, pad=0.0), (0.0, 1.05 * float(y.max())), bare=True)
    text = "Values of the active elements, pooled over elements and draws."
    marks = [draw.shape(where, x, y, "fill c0"), draw.line(where, x, y, "line c0")]
    svg = draw.picture(
        where, marks, f"Density of the active elements of {name}. {text}", x_label=name, bare=True
    )
    return figure(svg, name, text)


# -- moves --------------------------------------------------------------------------------------


def _jumps(site: str, jumps: NDArray[np.intp]) -> str:
    listed = ", ".join(f"{n:,}" for n in jumps[:24])
    return paragraph(f"Jumps of {site} from one draw to the next, by chain: {listed}.")


def _crossing(site: str, k: _Array) -> str:
    if k.shape[1] < 2:
        return ""
    values, counts = transitions(k)
    if len(values) < 2:
        return paragraph(f"{site} never changed.")
    often = np.sort(np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")
                    [:_MOST_CELLS])  # fmt: skip
    rows = [[f"{values[i]}", *(f"{counts[i, j]:,}" if counts[i, j] else "·" for j in often)]
            for i in often]  # fmt: skip
    words = f"Transitions of {site}: how often the size in a row was followed by that in a column."
    if len(often) < len(values):
        words += f" The {len(often)} most frequent of {len(values)} sizes."
    heads = ["from \\ to", *(str(values[j]) for j in often)]
    return paragraph(words) + table(
        heads, rows, f"Transitions of {site}", ident=f"transitions-{anchor(site)}"
    )


def _moves(view: View) -> str:
    """Proposals and acceptance by kind of move, where the sampler kept them."""
    stats = view.stats
    if stats is None or not {"move", "accepted"} <= set(stats.data_vars):
        return ""
    if any(set(stats[n].dims) != {"chain", "draw"} for n in ("move", "accepted")):
        return ""
    move = np.asarray(stats["move"].transpose("chain", "draw")).astype(np.int64)
    accepted = np.asarray(stats["accepted"].transpose("chain", "draw")).astype(bool)
    if not move.size:
        return ""
    names = _names(view)
    rows = []
    for i in np.unique(move):
        mine = move == i
        rate = [accepted[c][mine[c]].mean() for c in range(len(move)) if mine[c].any()]
        name = names[i] if 0 <= i < len(names) else f"move {i}"
        rows.append((
            name, f"{int(mine.sum()):,}", f"{int((mine & accepted).sum()):,}",
            f"{accepted[mine].mean():.3f}", f"{min(rate):.3f} to {max(rate):.3f}",
        ))  # fmt: skip
    heads = ("move", "proposed", "accepted", "rate", "by chain")
    words = (
        "Moves by kind. Jumps between dimensions are accepted more rarely than other moves; what "
        "counts is that there are many of them in all."
    )
    return f"<h3>Moves</h3>{paragraph(words)}" + table(heads, rows, "Moves", ident="moves")


def _checked(found: CrossCheck) -> str:
    """Probabilities by jumps beside those by evidences."""
    rows = [
        (
            str(value), f"{row['jumps']:.4f}", f"{row['mcse']:.4f}", f"{row['smc']:.4f}",
            f"{row['se']:.4f}", f"{row['z']:+.1f}".replace("-", "−"), f"{row['p']:.2g}",
        )
        for value, row in found.table.iterrows()
    ]  # fmt: skip
    fails = [(i, 6) for i, value in enumerate(found.table.index) if value in found.failed]
    heads = (found.site, "by jumps", "MCSE", "by evidence", "standard error", "z", "p")
    words = (
        f"Posterior of {found.site} by the jumps of this run, and by evidences from {found.runs} "
        f"runs of sequential Monte Carlo given each value. {found.verdict}"
    )
    name = f"Cross-check of {found.site}"
    shown = table(heads, rows, name, ident=f"cross-check-{anchor(found.site)}", fails=fails)
    return f"<h3>{safe(name)}</h3>{paragraph(words)}{shown}"


def _names(view: View) -> list[str]:
    try:
        return [str(name) for name in json.loads(view.attribute("moves") or "[]")]
    except (ValueError, TypeError):
        return []
