"""The posterior section of a report: every site pictured, and what the data did to the prior."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics import measures
from ppl_toolkit.diagnostics.markup import Section, figure, grid, paragraph, table
from ppl_toolkit.diagnostics.view import View

if TYPE_CHECKING:
    import xarray

__all__ = ["marginals"]

_Array = NDArray[np.float64]

_MOST_SCALAR_SITES = 24
_MOST_ARRAY_SITES = 12
_MOST_ROWS = 40
_MOST_RIBBON = 200
_MOST_COMPARED = 200
_MOST_LISTED = 60
_MOST_ELEMENTS = 6
_WHOLE = 30


def marginals(view: View) -> Section | None:
    """Densities of scalar sites, forests of the others, prior against posterior."""
    if not view.count or not len(view.table):
        return None
    prior = None
    if view.group == "posterior" and "prior" in view.tree.children:
        candidate = view.tree["prior"].dataset
        if {"chain", "draw"} <= set(candidate.sizes) and candidate.sizes["draw"]:
            prior = candidate
    sizes = {name: view.sites.count(name) for name in view.names}
    first = {name: view.sites.index(name) for name in view.names}
    scalars = [n for n in view.names if view.draws[n].ndim == 2]
    arrays = [n for n in view.names if view.draws[n].ndim > 2 and sizes[n]]
    figures = [_density(view, first[n], prior) for n in scalars[:_MOST_SCALAR_SITES]]
    forests = [_forest(view, n, first[n], sizes[n]) for n in arrays[:_MOST_ARRAY_SITES]]
    left_out = max(0, len(scalars) - _MOST_SCALAR_SITES) + max(0, len(arrays) - _MOST_ARRAY_SITES)
    words = "Every site has a scale of its own. Bars hold 89% (thin) and 50% (thick) of the draws."
    if left_out:
        words += f" {left_out} more sites are in the table only."
    body = paragraph(words) + grid(figures) + grid(forests, "forest", "panels top")
    if prior is not None:
        body += _against_prior(view, prior, first, sizes)
    title = "Posterior" if view.group == "posterior" else "Prior"
    return Section("posterior", title, body)


# -- one site -----------------------------------------------------------------------------------


def _curve(values: _Array, within: tuple[float, float] | None = None) -> tuple[str, _Array, _Array]:
    """("stairs" with edges, or "line" with points; densities): whole numbers are not smoothed."""
    x = measures.finite(values)
    if x.size and np.array_equal(x, np.round(x)) and np.ptp(x) <= _WHOLE:
        low, high = int(x.min()), int(x.max())
        counts = np.bincount((x - low).astype(int), minlength=high - low + 1)
        return "stairs", np.arange(float(low), high + 2) - 0.5, counts / x.size
    return ("line", *measures.density(x, within=within))


def _draw_curve(where: draw.Frame, curve: tuple[str, _Array, _Array], css: str) -> str:
    kind, x, y = curve
    if kind == "stairs":
        return draw.bars(where, x, y, f"fill {css}") + draw.stairs(where, x, y, f"line {css}")
    return draw.shape(where, x, y, f"fill {css}") + draw.line(where, x, y, f"line {css}")


def _density(view: View, row: int, prior: xarray.Dataset | None) -> str:
    name = str(view.table.index[row])
    values = measures.finite(view.scalar(row))
    if not values.size:
        return figure("", name, "No finite draws.")
    if not np.ptp(values) > 0:
        return figure("", name, f"Constant: {draw.written(float(values[0]), 6)}.")
    curve = _curve(values)
    before = None
    if prior is not None and view.sites[row] in prior:
        site = view.sites[row]
        if prior[site].ndim == view.draws[site].ndim:
            try:
                # The prior is shown as far as it helps to see the posterior.
                drawn = view.scalar_of(prior, site, view.places[row])
                before = _curve(drawn, draw.limits(values, pad=0.3))
            except (IndexError, ValueError):  # a prior of other data, with other shapes
                before = None
    reach = [curve[1]]
    if before is not None:
        low, high = draw.limits(values, pad=0.3)
        reach.append(before[1][(before[1] >= low) & (before[1] <= high)])
    span = draw.limits(*reach, pad=0.0)
    tallest = max(float(c[2].max(initial=0)) for c in (curve, before) if c is not None)
    where = draw.frame(span, (-0.1 * tallest, 1.05 * tallest), bare=True)
    q = np.quantile(values, [0.055, 0.25, 0.75, 0.945])
    mean = float(values.mean())
    marks = []
    if before is not None:
        kind, x, y = before
        keep = (x >= span[0]) & (x <= span[1])
        marks.append(
            draw.stairs(where, x, y, "line plain dash1") if kind == "stairs"
            else draw.line(where, x[keep], y[keep], "line plain dash1")
        )  # fmt: skip
    base = -0.05 * tallest
    marks += [
        _draw_curve(where._replace(y=(0.0, where.y[1]), bottom=float(where.up(0.0))), curve, "c0"),
        draw.segments(where, q[0], q[3], base, base, "line ink"),
        draw.segments(where, q[1], q[2], base, base, "line thick ink"),
        draw.dots(where, [mean], [base], "dots big c1"),
    ]
    text = f"Mean {draw.written(mean)}, 89% from {draw.written(q[0])} to {draw.written(q[3])}."
    if measures.central(values) != (values.min(), values.max()):
        text += " Tails cut off."
    shown = f"{text} Prior dashed." if before is not None else text
    svg = draw.picture(where, marks, f"Density of {name}. {text}", bare=True)
    return figure(svg, name, shown)


def _labels(view: View, name: str, first: int, size: int) -> list[str]:
    labels = [str(view.table.index[i]) for i in range(first, first + size)]
    return [t[len(name) + 1 : -1] if t.startswith(f"{name}[") else t for t in labels]


def _quantiles(view: View, first: int, rows: range) -> _Array:
    """The 5.5%, 25%, 50%, 75% and 94.5% quantiles of rows, shape (5, rows)."""
    probs = [0.055, 0.25, 0.5, 0.75, 0.945]
    with np.errstate(all="ignore"):
        return np.stack([np.quantile(view.scalar(first + i), probs) for i in rows], axis=1)


def _forest(view: View, name: str, first: int, size: int) -> str:
    if size > _MOST_ROWS:
        return _ribbon(view, name, first, size)
    labels = _labels(view, name, first, size)
    q = _quantiles(view, first, range(size))
    middle = q[2]  # medians: the mean of a heavy tail may lie outside its interval
    if not np.isfinite(middle).any():
        return figure("", name, "No finite draws.")
    places = np.arange(size)[::-1].astype(float)
    where = draw.frame(
        draw.limits(q), (-0.7, size - 0.3), height=54 + max(14.0 * size, 28), y_labels=labels
    )
    marks = [
        draw.vline(where, 0.0),
        draw.segments(where, q[0], q[4], places, places, "line c0"),
        draw.segments(where, q[1], q[3], places, places, "line thick c0"),
        draw.dots(where, middle, places, "dots big ink"),
    ]
    least, most = int(np.nanargmin(middle)), int(np.nanargmax(middle))
    text = (
        f"Medians from {draw.written(float(middle[least]))} ({labels[least]}) "
        f"to {draw.written(float(middle[most]))} ({labels[most]})."
    )
    svg = draw.picture(
        where, marks, f"Forest of {name}, {size} rows. {text}",
        y_ticks=([float(p) for p in places], labels),
        y_label=", ".join(map(str, view.draws[name].transpose("chain", "draw", ...).dims[2:])),
    )  # fmt: skip
    return figure(svg, name, text)


def _ribbon(view: View, name: str, first: int, size: int) -> str:
    step = -(-size // _MOST_RIBBON)
    at = range(0, size, step)
    q = _quantiles(view, first, at)
    x = np.asarray(at, dtype=float)
    where = draw.frame((0.0, float(size - 1)), draw.limits(q))
    marks = [
        draw.band(where, x, q[0], q[4], "fill c0"),
        draw.band(where, x, q[1], q[3], "fill c0"),
        draw.line(where, x, q[2], "line c0"),
    ]
    every = "" if step == 1 else f" One element in {step}."
    text = f"Median, 50% and 89% by position among {size:,} elements.{every}"
    svg = draw.picture(where, marks, f"Ribbon of {name}. {text}", x_label="element")
    return figure(svg, name, text)


# -- prior against posterior --------------------------------------------------------------------


def _against_prior(
    view: View, prior: xarray.Dataset, first: dict[str, int], sizes: dict[str, int]
) -> str:
    rows: list[int] = []
    posts, pres = [], []
    for name in view.names:
        if name not in prior or prior[name].ndim != view.draws[name].ndim:
            continue
        if any(prior.sizes[d] != n for d, n in view.draws[name].sizes.items()
               if d not in ("chain", "draw")):  # fmt: skip
            continue
        for i in range(first[name], first[name] + sizes[name]):
            if len(rows) >= _MOST_COMPARED:
                break
            rows.append(i)
            posts.append(view.scalar(i).ravel())
            pres.append(view.scalar_of(prior, name, view.places[i]).ravel())
    if not rows:
        return ""
    numbers = measures.contraction(np.stack(posts, axis=1), np.stack(pres, axis=1))
    names = [str(view.table.index[i]) for i in rows]
    with np.errstate(all="ignore"):
        low = np.nanmin(np.append(numbers.contraction, 0.0))
    finite = np.isfinite(numbers.contraction) & np.isfinite(numbers.z)
    where = draw.frame(
        draw.limits([max(low, -1.0), 1.0]), draw.limits(np.abs(numbers.z[finite]), [0.0, 1.0])
    )
    marks = [
        draw.vline(where, 0.0),
        draw.dots(where, numbers.contraction, np.abs(numbers.z), "dots big c0"),
    ]
    scatter = figure(
        draw.picture(
            where, marks, f"Contraction and shift of {len(rows)} scalars.", x_label="contraction",
            y_label="|z|",
        ),
        "Contraction and shift",
        "Right: the data say much. High: they say other than the prior did.",
    )  # fmt: skip
    elements = [
        _density(view, rows[j], prior)
        for j in np.argsort(np.nan_to_num(numbers.contraction, nan=np.inf), kind="stable")
        if view.draws[view.sites[rows[j]]].ndim > 2
    ][:_MOST_ELEMENTS] if len(rows) <= _MOST_LISTED else []  # fmt: skip
    listed = table(
        ("scalar", "contraction", "z", "by"),
        [
            (
                names[j],
                draw.written(float(numbers.contraction[j]), 3),
                draw.written(float(numbers.z[j]), 2),
                "quartiles" if numbers.robust[j] else "moments",
            )
            for j in range(min(len(rows), _MOST_LISTED))
        ],
        "Contraction and z-scores",
        words=(3,),
    )
    words = (
        "Contraction is 1 − Var(posterior) / Var(prior): 0 if the data taught nothing, 1 if "
        "everything. z is the way from the prior mean to the posterior mean in prior standard "
        "deviations. For priors with very heavy tails, medians and quartiles stand in."
    )
    more = len(rows) - _MOST_LISTED
    note = (
        paragraph(f"{more} more scalars are in the picture only.", "mute small") if more > 0 else ""
    )
    return (
        f'<div id="prior"><h3>Prior and posterior</h3>{paragraph(words)}'
        f"{grid([scatter, *elements])}{listed}{note}</div>"
    )
