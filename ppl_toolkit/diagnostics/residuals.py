"""The residual section of a report: what the fit leaves over, along every coordinate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics import measures
from ppl_toolkit.diagnostics.markup import Section, figure, grid, paragraph, safe
from ppl_toolkit.diagnostics.view import View

if TYPE_CHECKING:
    import xarray

__all__ = ["Residuals", "bins", "by_group", "residuals"]

_Array = NDArray[np.float64]

_MOST_VARIABLES = 6
_MOST_PANELS = 6  # of one variable
_MOST_GROUPS = 40
_BINS = 20
_MOST_LABELS = 30
_MOST_DOTS = 1000
_MANY = 200
_INTERVAL = (0.055, 0.945)
_LEAST_DRAWS = 25


class Residuals(NamedTuple):
    """Mean residuals of groups of observations, and where the model expects them.

    Attributes:
        mean: mean of y - E[prediction] by group, shape (G,).
        low, high: the central 89% of the same mean for data drawn from the fit, shape (G,).
        size: observations by group, shape (G,).
    """

    mean: _Array
    low: _Array
    high: _Array
    size: NDArray[np.intp]

    @property
    def outside(self) -> NDArray[np.bool_]:
        """Which means lie outside their interval."""
        return (self.mean < self.low) | (self.mean > self.high)


def by_group(y: ArrayLike, predicted: ArrayLike, group: ArrayLike) -> Residuals:
    """Mean residuals by group.

    The mean over a group of data drawn from the fit has the correlations of its observations,
    whatever their law: the intervals hold for counts and for zeros and ones as well.

    Args:
        y: observations, shape (n,).
        predicted: predictions, shape (draw, n).
        group: the group 0, 1, ... of every observation, shape (n,); none is empty.
    """
    observed, drawn = np.asarray(y, dtype=float), np.asarray(predicted, dtype=float)
    index = np.asarray(group)
    members = [np.flatnonzero(index == g) for g in range(int(index.max()) + 1)]
    centre = drawn.mean(axis=0)
    mean = np.array([(observed[m] - centre[m]).mean() for m in members])
    spread = np.stack([drawn[:, m].mean(axis=1) - centre[m].mean() for m in members], axis=1)
    low, high = np.quantile(spread, _INTERVAL, axis=0)
    return Residuals(mean, low, high, np.array([m.size for m in members]))


def bins(x: ArrayLike) -> tuple[_Array, NDArray[np.intp]]:
    """Groups of observations along a number: one for every value, or bins of equal counts.

    Args:
        x: shape (n,).

    Returns:
        (the mean of x by group, shape (G,); the group of every observation, shape (n,)).
    """
    values = np.asarray(x, dtype=float)
    distinct, group = np.unique(values, return_inverse=True)
    if distinct.size > _MOST_GROUPS:
        edges = np.unique(np.quantile(distinct, np.linspace(0, 1, _BINS + 1)))
        group = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        _, group = np.unique(group, return_inverse=True)  # without those that are empty
    sums = np.bincount(group, weights=values)
    return sums / np.bincount(group), group


def residuals(view: View) -> Section | None:
    """Residuals along the coordinates of every observed variable with posterior predictions."""
    children = view.tree.children
    if view.group != "posterior" or not {"observed_data", "posterior_predictive"} <= set(children):
        return None
    observed = view.tree["observed_data"].dataset
    drawn = view.tree["posterior_predictive"].dataset
    if drawn.sizes.get("chain", 0) * drawn.sizes.get("draw", 0) < _LEAST_DRAWS:
        return None
    names = [n for n in drawn.data_vars if n in observed and observed[n].ndim and observed[n].size]
    body = ""
    for name in names[:_MOST_VARIABLES]:
        figures = _variable(view, str(name), observed[name], drawn[name])
        if figures:
            body += f"<h3>{safe(name)}</h3>{grid(figures, css='panels two top')}"
    if not body:
        return None
    words = (
        "Observations less their mean predictions, along every coordinate, and along the given "
        "data of the same length. Bold dots are means over what has the same value (or lies in "
        "the same part of a long axis); the lines through zero hold 89% of such means of data "
        "drawn from the fit: at most about one in nine is outside by chance. Look for runs, bends "
        "and steps: a coordinate with a pattern is one that the model should know of."
    )
    if len(names) > _MOST_VARIABLES:
        words += f" {len(names) - _MOST_VARIABLES} more variables are not shown."
    return Section("residuals", "Residuals", paragraph(words) + body)


def _variable(
    view: View, name: str, observed: xarray.DataArray, drawn: xarray.DataArray
) -> list[str]:
    predicted = measures.flat_predictions(drawn, observed)
    if predicted is None:
        return []
    y = np.asarray(observed, dtype=float).ravel()
    seen = np.isfinite(y) & np.isfinite(predicted).all(axis=0)
    if seen.sum() < 2:
        return []
    y, predicted = y[seen], predicted[:, seen]
    figures = [
        _panel(name, label, at.ravel()[seen], y, predicted)
        for label, at in _axes(view, observed)
        if len(np.unique(at.ravel()[seen])) > 1
    ]
    return figures[:_MOST_PANELS]


def _axes(view: View, observed: xarray.DataArray) -> list[tuple[str, NDArray]]:
    """What residuals are plotted against: names, and values of the observations' shape."""

    def spread(values: NDArray, dim: Any) -> NDArray:
        along = [1] * observed.ndim
        along[observed.dims.index(dim)] = -1
        return np.broadcast_to(values.reshape(along), observed.shape)

    found = {str(dim): spread(np.asarray(observed[dim]), dim) for dim in observed.dims}
    children = view.tree.children
    given = children["constant_data"].dataset.data_vars if "constant_data" in children else {}
    for name, array in given.items():
        if array.ndim != 1 or array.dtype.kind not in "iufb" or array.dims[0] not in observed.dims:
            continue
        values, dim = np.asarray(array, dtype=float), array.dims[0]
        if values.size == observed.sizes[dim] and np.isfinite(values).all():
            shaped = spread(values, dim)
            if not np.array_equal(shaped, found[str(dim)]):  # not twice the same picture
                found.setdefault(str(name), shaped)
    return list(found.items())


def _panel(name: str, label: str, at: NDArray, y: _Array, predicted: _Array) -> str:
    if at.dtype.kind in "iufb":
        return _along(name, label, at.astype(float), y, predicted)
    if at.dtype.kind in "mM":
        days = at.astype("datetime64[D]") if at.dtype.kind == "M" else at.astype("timedelta64[D]")
        return _along(name, label, days.astype(float), y, predicted, dates=at.dtype.kind == "M")
    return _by_label(name, label, at.astype(str), y, predicted)


def _words(found: Residuals) -> str:
    groups = len(found.mean)
    many = bool((found.size > 1).any())
    what = "means" if many else "residuals"
    return f"{int(found.outside.sum())} of {groups} {what} are outside 89%."


def _along(
    name: str, label: str, x: _Array, y: _Array, predicted: _Array, dates: bool = False
) -> str:
    """Residuals against a number."""
    centres, group = bins(x)
    found = by_group(y, predicted, group)
    out, means = found.outside, bool((found.size > 1).any())
    raw = y - predicted.mean(axis=0)
    # The values of zeros and ones lie on two curves, whatever the fit: means alone tell.
    dotted = means and measures.data_kind(y, predicted) != "binary"
    step = max(1, -(-len(y) // _MOST_DOTS))
    reach = [found.mean, found.low, found.high, *([raw[::step]] if dotted else [])]
    where = draw.frame(draw.limits(x), draw.limits(*reach), width=350.0, height=220.0)
    marks = [draw.hline(where, 0.0)]
    if dotted:
        css = "dots veil plain" if len(y) > _MANY else "dots plain"
        marks.append(draw.dots(where, x[::step], raw[::step], css))
    marks += [
        draw.segments(where, centres, centres, found.low, found.high, "line bold c0"),
        draw.dots(where, centres[~out], found.mean[~out], "dots big ink"),
        draw.crosses(where, centres[out], found.mean[out], "line bold bad"),
    ]
    text = _words(found)
    if dotted:
        text += " Grey: single residuals."
    ticks = None
    if dates:
        places = np.linspace(x.min(), x.max(), 3)
        texts = [str(np.datetime64(int(p), "D")) for p in places]
        ticks = ([float(int(p)) for p in places], texts)
    svg = draw.picture(
        where, marks, f"Residuals of {name} along {label}. {text}", x_label=label,
        y_label=f"{name} − mean prediction", x_ticks=ticks,
    )  # fmt: skip
    return figure(svg, f"{name} along {label}", text)


def _by_label(name: str, label: str, at: NDArray, y: _Array, predicted: _Array) -> str:
    """Residuals by label, in the labels' order of appearance."""
    distinct, first, group = np.unique(at, return_index=True, return_inverse=True)
    order = np.argsort(first)  # np.unique sorts; labels have an order of their own
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    labels, group = distinct[order], rank[group]
    found = by_group(y, predicted, group)
    shown = np.arange(len(labels))
    text = _words(found)
    if len(labels) > _MOST_LABELS:
        far = np.abs(found.mean) / np.maximum(found.high - found.low, np.finfo(float).tiny)
        shown = np.sort(np.argsort(-far, kind="stable")[:_MOST_LABELS])
        text += f" The {_MOST_LABELS} of {len(labels)} that are furthest from their interval."
    names = [str(labels[i]) for i in shown]
    mean, low, high = found.mean[shown], found.low[shown], found.high[shown]
    out = found.outside[shown]
    places = np.arange(len(shown))[::-1].astype(float)
    where = draw.frame(
        draw.limits(mean, low, high), (-0.7, len(shown) - 0.3), width=350.0,
        height=54 + max(15.0 * len(shown), 30), y_labels=names,
    )  # fmt: skip
    marks = [
        draw.vline(where, 0.0),
        draw.segments(where, low, high, places, places, "line bold c0"),
        draw.dots(where, mean[~out], places[~out], "dots big ink"),
        draw.crosses(where, mean[out], places[out], "line bold bad"),
    ]
    svg = draw.picture(
        where, marks, f"Residuals of {name} by {label}. {text}",
        x_label=f"{name} − mean prediction", y_label=label,
        y_ticks=([float(p) for p in places], names),
    )  # fmt: skip
    return figure(svg, f"{name} by {label}", text)
