"""The prediction section of a report: data against their predictions, and leave-one-out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics import ecdf, measures
from ppl_toolkit.diagnostics.markup import Section, anchor, figure, grid, paragraph, safe, table
from ppl_toolkit.diagnostics.pointwise import LEAST_DRAWS, Scores, relative_efficiency, scores_of
from ppl_toolkit.diagnostics.view import View

if TYPE_CHECKING:
    import xarray

__all__ = ["predictive"]

_Array = NDArray[np.float64]

_MOST_VARIABLES = 6
_MOST_CURVES = 40
_MOST_MEAN = 400
_MOST_BARS = 40
_MOST_RANKS = 1000  # the exact band costs their square
_LEAST_RANKS = 8  # the band of fewer is no help
_POINTS = 40
_MOST_SCORES = 1 << 27  # of log likelihoods
_VERY_BAD_K = 1.0
_MOST_LISTED = 10


def predictive(view: View) -> Section | None:
    """Predictive checks by type of data, PIT, test statistics, LOO; None without such groups."""
    tree = view.tree
    group = f"{view.group}_predictive"
    observed = tree["observed_data"].dataset if "observed_data" in tree.children else None
    drawn = tree[group].dataset if group in tree.children else None
    body = ""
    if observed is not None and drawn is not None and _has_draws(drawn):
        names = [str(n) for n in drawn.data_vars if n in observed and observed[n].size]
        for name in names[:_MOST_VARIABLES]:
            body += _checks(name, observed[name], drawn[name], group)
        if len(names) > _MOST_VARIABLES:
            body += paragraph(f"{len(names) - _MOST_VARIABLES} more variables are not shown.")
    if view.group == "posterior" and "log_likelihood" in tree.children:
        body += _cross_validation(view, observed, drawn)
    title = "Prediction" if view.group == "posterior" else "Prior prediction"
    return Section("prediction", title, body) if body else None


def _has_draws(group: xarray.Dataset) -> bool:
    return bool(group.sizes.get("chain", 0) * group.sizes.get("draw", 0))


# -- predictive checks --------------------------------------------------------------------------


def _checks(name: str, observed: xarray.DataArray, drawn: xarray.DataArray, group: str) -> str:
    y = np.asarray(observed, dtype=float).ravel()
    predicted = measures.flat_predictions(drawn, observed)
    seen = np.isfinite(y)
    if predicted is None or not seen.any() or not np.isfinite(predicted).any():
        return ""
    y, predicted = y[seen], predicted[:, seen]
    kind = measures.data_kind(y, predicted)
    pictures: dict[str, Callable[[str, _Array, _Array], str]] = {
        "continuous": _densities,
        "count": _rootogram,
        "binary": _proportions,
    }
    figures = [pictures[kind](name, y, predicted), _pit(name, "PIT", measures.pit(y, predicted))]
    names = ("mean",) if kind == "binary" else ("mean", "sd", "min", "max")
    if y.size < 2:
        names = ("mean",)
    figures += [_statistic(name, which, y, predicted) for which in names]
    words = (
        f"{y.size:,} {kind} observations. Their distribution, where each lies among its "
        "predictions (PIT: the probability integral transform; it stays in the band with "
        "probability 95% if the model is right), and statistics of data sets drawn from the fit."
    )
    if group == "posterior_predictive":
        words += (
            " The fit has seen the observations, which makes PIT lean to the middle: where "
            "there is a LOO-PIT, that one decides."
        )
    return f"<h3>{safe(name)}</h3>{paragraph(words)}{grid(figures)}"


def _densities(name: str, y: _Array, predicted: _Array) -> str:
    own = measures.density(y)
    middle = np.quantile(measures.finite(predicted), [0.005, 0.995])
    span = draw.limits(y, np.clip(middle, *measures.central(predicted)))
    grid_x = np.linspace(*span, 96)
    at = np.linspace(0, len(predicted) - 1, min(_MOST_MEAN, len(predicted))).astype(int)
    if y.size > 1:
        curves = [c for i in at if (c := measures.density(predicted[i], 64))[0].size]
    else:
        curves = [c for c in [measures.density(predicted)] if c[0].size]
    if not curves:
        return ""
    levels = np.stack([np.interp(grid_x, x, d, left=0.0, right=0.0) for x, d in curves])
    shown = levels[:: max(1, -(-len(levels) // _MOST_CURVES))]
    average = levels.mean(axis=0)
    # A few predicted data sets with sharp peaks should not flatten all others.
    top = 1.05 * max(
        float(np.quantile(shown.max(axis=1), 0.9)),
        float(average.max()),
        float(own[1].max(initial=0)),
    )
    where = draw.frame(span, (0.0, top), bare=True)
    marks = [draw.line(where, grid_x, level, "line thin veil plain") for level in shown]
    marks.append(draw.line(where, grid_x, average, "line c1 dash1"))
    marks.append(draw.line(where, *own, "line bold ink"))
    ticks = y if y.size <= 200 else np.quantile(y, np.linspace(0, 1, 200))
    marks.append(draw.segments(where, ticks, ticks, 0.0, 0.04 * top, "line thin ink"))
    svg = draw.picture(
        where, marks, f"Densities of {name}, observed and predicted.", x_label=name, bare=True
    )
    text = f"Observed (bold), {len(shown)} predicted data sets (grey), the mean of many (dashed)."
    return figure(svg, "Density", text)


def _rootogram(name: str, y: _Array, predicted: _Array) -> str:
    low, high = (
        float(min(y.min(), np.nanquantile(predicted, 0.001))),
        float(max(y.max(), np.nanquantile(predicted, 0.999))),
    )
    width = max(1, int(np.ceil((high - low + 1) / _MOST_BARS)))
    edges = np.arange(low - 0.5, high + 0.5 + width, width)
    seen, _ = np.histogram(y, edges)
    step = max(1, len(predicted) // 400)
    counts = np.stack([np.histogram(row[np.isfinite(row)], edges)[0] for row in predicted[::step]])
    q = np.sqrt(np.quantile(counts, [0.055, 0.5, 0.945], axis=0))
    root = np.sqrt(seen)
    middle = (edges[:-1] + edges[1:]) / 2
    where = draw.frame(
        (float(edges[0]), float(edges[-1])), (0.0, 1.08 * float(max(q.max(), root.max())))
    )
    out = int(((root < q[0] - 1e-12) | (root > q[2] + 1e-12)).sum())
    marks = [
        draw.bars(where, edges, q[1], "fill plain"),
        draw.segments(where, middle, middle, q[0], q[2], "line c1"),
        draw.dots(where, middle, root, "dots big ink"),
    ]
    text = (
        "Roots of the observed counts (dots), of the predicted ones: medians (bars) and 89% "
        f"intervals (lines). {out} of {len(seen)} dots are outside."
    )
    svg = draw.picture(where, marks, f"Rootogram of {name}. {text}", x_label=name, y_label="√count")
    return figure(svg, "Rootogram", text)


def _proportions(name: str, y: _Array, predicted: _Array) -> str:
    share = np.nanmean(predicted, axis=1)
    ones, low, high = float(y.mean()), *np.quantile(share, [0.055, 0.945])
    where = draw.frame((-0.6, 1.6), (0.0, 1.0))
    marks = [draw.bars(where, [-0.4, 0.4], [1 - ones], "solid c0"),
             draw.bars(where, [0.6, 1.4], [ones], "solid c0"),
             draw.segments(where, [0.0, 1.0], [0.0, 1.0], [1 - high, low], [1 - low, high],
                           "line thick c1")]  # fmt: skip
    text = f"Observed shares (bars), 89% of the predicted ones (lines). Ones: {ones:.1%}."
    svg = draw.picture(
        where, marks, f"Bars of {name}. {text}", x_label=name, y_label="share",
        x_ticks=([0.0, 1.0], ["0", "1"]),
    )  # fmt: skip
    return figure(svg, "Zeros and ones", text)


def _pit(name: str, title: str, values: _Array) -> str:
    u = np.sort(measures.finite(values))
    if u.size < _LEAST_RANKS:
        return ""
    if u.size > _MOST_RANKS:
        u = u[np.linspace(0, u.size - 1, _MOST_RANKS).astype(int)]
    parts = min(_POINTS, u.size)
    band = ecdf.band(u.size, np.arange(1, parts) / parts)
    at = np.concatenate([[0.0], band.points, [1.0]])
    low = np.concatenate([[0.0], band.low / u.size - band.points, [0.0]])
    high = np.concatenate([[0.0], band.high / u.size - band.points, [0.0]])
    counts = np.searchsorted(u, band.points, side="right")
    excess = np.concatenate([[0.0], counts / u.size - band.points, [0.0]])
    out = bool(((counts < band.low) | (counts > band.high)).any())
    where = draw.frame((0.0, 1.0), draw.limits(low, high, excess))
    marks = [
        draw.band(where, at, low, high, "fill plain"),
        draw.hline(where, 0.0),
        draw.line(where, at, excess, "line c0"),
    ]
    text = "It leaves the band." if out else "It stays in the band."
    svg = draw.picture(
        where, marks, f"ECDF of {title} values of {name} less the uniform one. {text}",
        x_label=title, y_label="ECDF − uniform",
    )  # fmt: skip
    return figure(svg, f"{title} ECDF", text)


def _statistic(name: str, which: str, y: _Array, predicted: _Array) -> str:
    functions: dict[str, Callable[..., Any]] = {
        "mean": np.nanmean,
        "sd": np.nanstd,
        "min": np.nanmin,
        "max": np.nanmax,
    }
    function = functions[which]
    own, theirs = float(function(y)), measures.finite(function(predicted, axis=1))
    if not theirs.size:
        return ""
    span = draw.limits([own], measures.central(theirs))
    counts, edges = np.histogram(theirs, 30, span)
    where = draw.frame(span, (0.0, 1.05 * max(float(counts.max()), 1.0)), bare=True)
    p = float((theirs < own).mean() + 0.5 * (theirs == own).mean())
    text = f"Observed {draw.written(own)} (line); {p:.0%} of the predicted ones are below."
    marks = [draw.bars(where, edges, counts, "solid c0"), draw.vline(where, own, "line thick ink")]
    svg = draw.picture(
        where, marks, f"Histogram of the {which} of predicted {name}. {text}", x_label=which,
        bare=True,
    )  # fmt: skip
    return figure(svg, f"Statistic: {which}", text)


# -- leave-one-out ------------------------------------------------------------------------------


def _cross_validation(
    view: View, observed: xarray.Dataset | None, drawn: xarray.Dataset | None
) -> str:
    group = view.tree["log_likelihood"].dataset
    size = group.sizes.get("chain", 0) * group.sizes.get("draw", 0)
    if size < LEAST_DRAWS:
        return ""
    r_eff = relative_efficiency(view.draws)
    rows: list[tuple[str, ...]] = []
    figures: list[str] = []
    notes: list[str] = []
    fails: list[tuple[int, int]] = []
    for name in list(group.data_vars)[:_MOST_VARIABLES]:
        array = group[name].transpose("chain", "draw", ...)
        if not array.size or array.size > _MOST_SCORES:
            continue
        ll = np.asarray(array, dtype=float).reshape(size, -1).T
        known = np.isfinite(ll).all(axis=1)
        if not known.any():
            continue
        predicted = _matching(str(name), observed, drawn, array)
        found = scores_of(
            [(0, ll[known])], int(known.sum()), size, r_eff, keep_weights=predicted is not None
        )
        labels = [t for t, k in zip(_labels(array), known, strict=True) if k]
        worst = found.worst_first()
        if worst:
            fails.append((len(rows), 5))
        rows.append(
            (
                str(name), f"{found.elpd:.1f}", f"{found.se:.1f}", f"{found.p:.1f}",
                f"{found.n:,}", f"{len(worst)}", f"{int((found.k > _VERY_BAD_K).sum())}",
                draw.written(float(np.nanmax(found.k, initial=-np.inf)), 2),
            )
        )  # fmt: skip
        figures.append(_k_hats(str(name), found, labels))
        if predicted is not None and found.weights is not None:
            y, draws = predicted
            values = measures.weighted_pit(y[known], draws[:, known], found.weights.T)
            figures.append(_pit(str(name), "LOO-PIT", values))
        if worst:
            listed = ", ".join(labels[i] for i in worst[:_MOST_LISTED])
            more = f" and {len(worst) - _MOST_LISTED} more" if len(worst) > _MOST_LISTED else ""
            notes.append(
                f"{name}: k-hat is above {found.good_k:.2f} for {listed}{more}. There the "
                "estimates are not to be trusted: the fit depends much on single observations."
            )
    if not rows:
        return ""
    heads = ("variable", "elpd", "se", "p", "n", "bad k-hat", "above 1", "largest k-hat")
    words = (
        "Expected log predictive density of observations left out one by one (PSIS-LOO); p is "
        "the effective number of parameters. k-hat tells how far each can be trusted."
    )
    return (
        f'<div id="loo"><h3>Leave-one-out</h3>{paragraph(words)}'
        + table(heads, rows, "Leave-one-out cross-validation", fails=fails)
        + "".join(paragraph(text) for text in notes)
        + grid(figures)
        + "</div>"
    )


def _matching(
    name: str,
    observed: xarray.Dataset | None,
    drawn: xarray.Dataset | None,
    scores: xarray.DataArray,
) -> tuple[_Array, _Array] | None:
    """Observations and predictions, one for every log likelihood, or None."""
    if observed is None or drawn is None or name not in observed or name not in drawn:
        return None
    if drawn[name].shape != scores.shape or drawn[name].size > measures.MOST_PREDICTIONS:
        return None
    predicted = measures.flat_predictions(drawn[name], observed[name])
    if predicted is None:
        return None
    return np.asarray(observed[name], dtype=float).ravel(), predicted


def _labels(array: xarray.DataArray) -> list[str]:
    """The coordinates of every observation."""
    own = array.dims[2:]
    values = [np.asarray(array[d]) for d in own]
    return [
        ", ".join(f"{d} {v[i]}" for d, v, i in zip(own, values, index, strict=True)) or "the datum"
        for index in np.ndindex(*array.shape[2:])
    ]


def _k_hats(name: str, found: Scores, labels: list[str]) -> str:
    n = len(found.k)
    at = np.arange(n)
    bad = found.k > found.good_k
    low, high = draw.limits(found.k, [0.0, found.good_k + 0.1])
    where = draw.frame((-0.5, n - 0.5), (max(low, -1.0), high))
    shown = at if n <= 1500 else at[np.union1d(np.flatnonzero(bad), at[:: n // 1000])]
    fine = shown[~bad[shown]]
    marks = [
        draw.hline(where, found.good_k),
        draw.dots(where, fine, found.k[fine], "dots big c0" if n <= 300 else "dots c0"),
        draw.crosses(where, at[bad], found.k[bad]),
    ]
    worst = int(np.argmax(np.nan_to_num(found.k, nan=-np.inf)))
    text = (
        f"{int(bad.sum())} of {n:,} above {found.good_k:.2f} (dashed; crosses). "
        f"Largest: {labels[worst]}."
    )
    svg = draw.picture(
        where, marks, f"Pareto k-hat of {name} by observation. {text}", x_label="observation",
        y_label="k-hat",
    )  # fmt: skip
    return figure(svg, f"k-hat: {name}", text, ident=f"k-hat-{anchor(name)}")
