"""Small pictures as SVG text: axes, lines, stairs, bars, bands, dots, crosses, segments.

A `Frame` maps data coordinates to the picture's own; the functions that draw marks return SVG
text in it, and `picture` puts marks and axes together. Colours and widths are left to the style
sheet of the page (classes such as ``line c0``), so that one picture serves light and dark, screen
and print. All of it depends on the numbers alone: no identifiers, no dates.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Frame",
    "band",
    "bars",
    "crosses",
    "dots",
    "frame",
    "hline",
    "limits",
    "line",
    "note",
    "picture",
    "segments",
    "shape",
    "stairs",
    "ticks",
    "vline",
    "written",
]

_Array = NDArray[np.float64]

_WIDTH, _HEIGHT = 280.0, 176.0
_LETTER = 6.6  # the mean width of a letter at the style sheet's 11 units
_LONGEST_LABEL = 20


# -- numbers and scales -------------------------------------------------------------------------


def limits(*values: ArrayLike, pad: float = 0.04, log: bool = False) -> tuple[float, float]:
    """The range of the finite values, a little widened; (0, 1) if there are none."""
    parts = [np.asarray(v, dtype=float).ravel() for v in values]
    flat = np.concatenate(parts) if parts else np.zeros(0)
    flat = flat[np.isfinite(flat) & ((flat > 0) | (not log))]
    if not flat.size:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(flat.min()), float(flat.max())
    if log:
        room = max(high / low, 1.1) ** pad
        return low / room, high * room
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        half = 0.5 * abs(low) or 0.5
        return low - half, high + half
    # Halves before differences: the range of huge values of both signs may overflow.
    room = 2 * pad * (high / 2 - low / 2)
    return low - room, high + room


def ticks(low: float, high: float, most: int = 5, log: bool = False) -> list[float]:
    """Round numbers within a range, at most ``most`` of them."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        powers = [10.0**e for e in range(first, last + 1)]
        if len(powers) >= 2:
            return powers[:: -(-len(powers) // most)]
        fine = [m * 10.0**e for e in range(first - 1, last + 2) for m in (1, 2, 5)]
        return [v for v in fine if low <= v <= high] or ticks(low, high, most)
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [v for v in (low, high) if math.isfinite(v)]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first > 2 * most:  # the range is below the precision of its numbers
        return [low, high]
    return [min(max(i * step, low), high) for i in range(first, last + 1)]


def written(value: float, digits: int = 4) -> str:
    """A number for people: few digits, a true minus sign."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def _upright(data: tuple[float, float], log: bool, whole: bool) -> list[float]:
    """Ticks of a vertical axis."""
    values = ticks(*data, log=log)
    return [v for v in values if v == round(v)] if whole else values


def _texts(values: Sequence[float]) -> list[str]:
    """Texts of ticks, with as many digits as tell them from each other exactly."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    digits = 1
    while digits < 9 and any(abs(float(f"{v:.{digits}g}") - v) > 1e-6 * abs(step) for v in values):
        digits += 1
    return [written(v, max(digits, 4)) for v in values]


class Frame(NamedTuple):
    """Where data lie in a picture.

    Attributes:
        x, y: ranges of the data.
        left, right, top, bottom: the plotting area in the picture's units.
        width, height: the picture's size.
        x_log, y_log: whether an axis is logarithmic.
        whole: whether the vertical axis counts, so that its ticks are whole numbers.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    left: float
    right: float
    top: float
    bottom: float
    width: float
    height: float
    x_log: bool = False
    y_log: bool = False
    whole: bool = False

    def across(self, x: ArrayLike) -> _Array:
        """Horizontal places of x, kept within the plotting area."""
        return _place(x, self.x, self.left, self.right, self.x_log)

    def up(self, y: ArrayLike) -> _Array:
        """Vertical places of y, kept within the plotting area."""
        return _place(y, self.y, self.bottom, self.top, self.y_log)


def _place(
    values: ArrayLike, data: tuple[float, float], first: float, last: float, log: bool
) -> _Array:
    v, (low, high) = np.asarray(values, dtype=float), data
    with np.errstate(all="ignore"):
        if log:
            share = np.log(v / low) / math.log(high / low)
        else:
            share = (v / 2 - low / 2) / (high / 2 - low / 2)
    return first + np.clip(share, 0.0, 1.0) * (last - first)


def frame(
    x: tuple[float, float],
    y: tuple[float, float],
    *,
    width: float = _WIDTH,
    height: float = _HEIGHT,
    x_log: bool = False,
    y_log: bool = False,
    y_labels: Sequence[str] | None = None,
    bare: bool = False,
    whole: bool = False,
) -> Frame:
    """A frame with room for the labels of its axes.

    Args:
        x, y: ranges of the data.
        width, height: the picture's size.
        x_log, y_log: logarithmic axes.
        y_labels: labels of the vertical axis, if they are not its numbers.
        bare: without a vertical axis.
        whole: the vertical axis counts.
    """
    labels = y_labels or _texts(_upright(y, y_log, whole))
    longest = max((min(len(t), _LONGEST_LABEL) for t in labels), default=0)
    left = 6.0 if bare else 9 + _LETTER * longest
    return Frame(x, y, left, width - 8, 20, height - 34, width, height, x_log, y_log, whole)


# -- marks --------------------------------------------------------------------------------------


def _points(across: _Array, up: _Array) -> list[str]:
    return [f"{_short(a)} {_short(b)}" for a, b in zip(across.tolist(), up.tolist(), strict=True)]


def _short(value: float) -> str:
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _path(css: str, steps: str) -> str:
    return f'<path class="{css}" d="{steps}"/>' if steps else ""


def line(where: Frame, x: ArrayLike, y: ArrayLike, css: str = "line c0") -> str:
    """A line through points; it is broken where a coordinate is not a number."""
    across, up = where.across(x), where.up(y)
    good = np.isfinite(across) & np.isfinite(up)
    if good.all():
        return _path(css, "M" + "L".join(_points(across, up))) if across.size else ""
    runs = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(int)))
    parts = []
    for first, last in runs.reshape(-1, 2):
        points = _points(across[first:last], up[first:last])
        parts.append("M" + "L".join(points if len(points) > 1 else points * 2))
    return _path(css, "".join(parts))


def shape(where: Frame, x: ArrayLike, y: ArrayLike, css: str = "fill c0") -> str:
    """The area between a curve and the lower edge of the picture."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    base = where.y[0]
    if not x.size:
        return ""
    return band(where, x, np.full(x.shape, base), y, css)


def band(where: Frame, x: ArrayLike, low: ArrayLike, high: ArrayLike, css: str = "fill") -> str:
    """The area between two curves."""
    across = where.across(x)
    below, above = where.up(low), where.up(high)
    good = np.isfinite(across) & np.isfinite(below) & np.isfinite(above)
    if not good.any():
        return ""
    there = _points(across[good], above[good])
    back = _points(across[good][::-1], below[good][::-1])
    return _path(css, "M" + "L".join([*there, *back]) + "Z")


def stairs(where: Frame, edges: ArrayLike, heights: ArrayLike, css: str = "line c0") -> str:
    """The outline of a histogram: one height between any two edges."""
    edges, heights = np.asarray(edges, dtype=float), np.asarray(heights, dtype=float)
    if not heights.size:
        return ""
    across, up = where.across(edges), where.up(heights)
    steps = [f"M{_short(across[0])} {_short(up[0])}"]
    for i, level in enumerate(up.tolist()):
        steps.append(f"V{_short(level)}" if i else "")
        steps.append(f"H{_short(float(across[i + 1]))}")
    return _path(css, "".join(steps))


def bars(where: Frame, edges: ArrayLike, heights: ArrayLike, css: str = "fill c0") -> str:
    """A histogram as bars; those of no height are left out."""
    across, up = where.across(edges), where.up(heights)
    base = _short(float(where.up(max(0.0, where.y[0]))))
    parts = []
    for i, level in enumerate(up.tolist()):
        if np.isfinite(level) and _short(level) != base:
            left, right = float(across[i]) + 0.5, float(across[i + 1]) - 0.5
            if right <= left:
                left, right = left - 0.5, right + 0.5
            parts.append(f"M{_short(left)} {base}V{_short(level)}H{_short(right)}V{base}Z")
    return _path(css, "".join(parts))


def dots(where: Frame, x: ArrayLike, y: ArrayLike, css: str = "dots c0") -> str:
    """A dot at every point (one path: lines of no length with round caps)."""
    return _path(css, "".join(f"M{p}h0" for p in _seen(where, x, y)))


def crosses(where: Frame, x: ArrayLike, y: ArrayLike, css: str = "line bad") -> str:
    """A cross at every point."""
    return _path(css, "".join(f"M{p}m-3-3l6 6m0-6l-6 6" for p in _seen(where, x, y)))


def _seen(where: Frame, x: ArrayLike, y: ArrayLike) -> list[str]:
    across, up = np.broadcast_arrays(where.across(x), where.up(y))
    good = np.isfinite(across) & np.isfinite(up)
    return _points(across[good], up[good])


def segments(
    where: Frame, x0: ArrayLike, x1: ArrayLike, y0: ArrayLike, y1: ArrayLike, css: str
) -> str:
    """Straight lines from (x0, y0) to (x1, y1)."""
    first = np.broadcast_arrays(where.across(x0), where.across(x1), where.up(y0), where.up(y1))
    a, b, c, d = (np.ravel(v) for v in first)
    good = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & np.isfinite(d)
    starts, ends = _points(a[good], c[good]), _points(b[good], d[good])
    return _path(css, "".join(f"M{s}L{e}" for s, e in zip(starts, ends, strict=True)))


def vline(where: Frame, x: float, css: str = "line ref") -> str:
    """A vertical line through the picture, if x lies in it."""
    if not where.x[0] <= x <= where.x[1]:
        return ""
    return segments(where, x, x, where.y[0], where.y[1], css)


def hline(where: Frame, y: float, css: str = "line ref") -> str:
    """A horizontal line through the picture, if y lies in it."""
    if not where.y[0] <= y <= where.y[1]:
        return ""
    return segments(where, where.x[0], where.x[1], y, y, css)


def note(where: Frame, x: float, y: float, text: str, anchor: str = "start") -> str:
    """Words at a point."""
    return _text(float(where.across(x)), float(where.up(y)), text, anchor)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    how = "" if anchor == "middle" else f' style="text-anchor:{anchor}"'
    return f'<text x="{_short(x)}" y="{_short(y)}"{how}>{html.escape(text)}</text>'


# -- the whole ----------------------------------------------------------------------------------


def picture(
    where: Frame,
    marks: Iterable[str],
    label: str,
    *,
    x_label: str = "",
    y_label: str = "",
    x_ticks: tuple[Sequence[float], Sequence[str]] | None = None,
    y_ticks: tuple[Sequence[float], Sequence[str]] | None = None,
    bare: bool = False,
) -> str:
    """Marks and axes as one SVG element.

    Args:
        where: the frame the marks were drawn in.
        marks: SVG text of the marks, the first one at the back.
        label: what the picture shows, for those who do not see it.
        x_label, y_label: what the axes measure.
        x_ticks, y_ticks: places and texts of ticks; round numbers by default.
        bare: without a vertical axis.
    """
    axes = [_horizontal(where, x_ticks)]
    if not bare:
        axes.append(_vertical(where, y_ticks))
    if x_label:
        room = where.right - where.left
        middle = (where.left + where.right) / 2
        axes.append(_text(middle, where.height - 4, _cut(x_label, int(room / _LETTER))))
    if y_label:
        axes.append(_text(2, 11, _cut(y_label, int(where.width / _LETTER)), "start"))
    return (
        f'<svg viewBox="0 0 {_short(where.width)} {_short(where.height)}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(axes)}{"".join(marks)}</svg>'
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _horizontal(where: Frame, given: tuple[Sequence[float], Sequence[str]] | None) -> str:
    values, texts = given or _round_ticks(where.x, where.x_log, where.right - where.left)
    places = where.across(values).tolist()
    marks = "".join(f"M{_short(p)} {_short(where.bottom)}v4" for p in places)
    edge = f"M{_short(where.left)} {_short(where.bottom)}H{_short(where.right)}"
    words = []
    for place, text in zip(places, texts, strict=True):
        half = _LETTER * len(text) / 2  # a label at the edge moves inwards
        inside = min(max(place, half + 1), where.width - half - 1)
        words.append(_text(inside, where.bottom + 15, text))
    return _path("axis", edge + marks) + "".join(words)


def _round_ticks(
    data: tuple[float, float], log: bool, room: float
) -> tuple[list[float], list[str]]:
    for most in (6, 5, 4, 3, 2):
        values = ticks(*data, most=most, log=log)
        texts = _texts(values)
        if sum(_LETTER * (len(t) + 2) for t in texts) <= room:
            return values, texts
    return values[:1] + values[-1:], texts[:1] + texts[-1:]


def _numbered(values: Sequence[float]) -> tuple[Sequence[float], Sequence[str]]:
    return values, _texts(values)


def _vertical(where: Frame, given: tuple[Sequence[float], Sequence[str]] | None) -> str:
    values, texts = given or _numbered(_upright(where.y, where.y_log, where.whole))
    places = where.up(values).tolist()
    grid = "".join(f"M{_short(where.left)} {_short(p)}H{_short(where.right)}" for p in places)
    words = []
    for place, text in zip(places, texts, strict=True):
        words.append(_text(where.left - 5, place + 4, _cut(text, _LONGEST_LABEL), "end"))
    return _path("grid", grid) + "".join(words)
