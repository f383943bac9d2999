"""The section of a report with the table of all scalars."""

from __future__ import annotations

import math

import numpy as np

from ppl_toolkit.diagnostics.markup import Section, mark, paragraph, safe, scrolling
from ppl_toolkit.diagnostics.view import View

__all__ = ["decimals", "parameters", "row_anchors", "shown"]

_MOST_ROWS = 500


def decimals(error: float) -> int:
    """Decimals so that the last digit shown is the first one of the error."""
    if not math.isfinite(error) or error <= 0:
        return 3
    return int(np.clip(np.ceil(-np.log10(error)), 0, 8))


def shown(column: str, value: float, error: float) -> str:
    """A number of the summary with the digits that mean something.

    Args:
        column: its column.
        value: the number.
        error: the Monte Carlo standard error of the row's mean.
    """
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if column.startswith("ess"):
        return f"{value:.0f}"
    if column == "r_hat":
        return f"{value:.3f}"
    if column.startswith("mcse"):
        return f"{value:.2g}"
    text = f"{value:.{decimals(error)}f}"
    return text if len(text) <= 12 else f"{value:.6g}"


def _rows(view: View) -> list[int]:
    """The rows of the page: all, or those that fail and then the first ones."""
    total = len(view.table)
    if total <= _MOST_ROWS:
        return list(range(total))
    failing = view.fails("r_hat") | view.fails("ess_bulk") | view.fails("ess_tail")
    order = np.argsort(~failing, kind="stable")[:_MOST_ROWS]
    return sorted(int(i) for i in order)


def row_anchors(view: View) -> dict[str, str]:
    """The anchor of every scalar in the table, by its label."""
    return {str(view.table.index[i]): f"p{i}" for i in _rows(view)}


def parameters(view: View) -> Section:
    """A table to sort and to search in; without scripts, a plain one."""
    table, rows = view.table, _rows(view)
    low, high = (str(c) for c in table.columns[2:4])
    percent = low.removeprefix("eti").removesuffix("_lb")
    below = f"{(100 - float(percent)) / 2:g}%"
    above = f"{(100 + float(percent)) / 2:g}%"
    columns = [
        ("mean", "mean"), ("sd", "sd"), (low, below), (high, above), ("", "interval"),
        ("mcse_mean", "MCSE mean"), ("mcse_sd", "MCSE sd"), ("ess_bulk", "bulk ESS"),
        ("ess_tail", "tail ESS"), ("r_hat", view.r_hat_name),
    ]  # fmt: skip
    if view.approximate:
        columns = [(key, text) for key, text in columns if not key.startswith("ess")]
    head = '<th scope="col" data-key="parameter">parameter</th>' + "".join(
        f'<th scope="col" data-key="{key}">{safe(text)}</th>' if key
        else f'<th scope="col">{safe(text)}</th>'
        for key, text in columns
    )  # fmt: skip
    values = {key: np.asarray(table[key], dtype=float) for key, _ in columns if key}
    failing = {key: view.fails(key) for key in ("r_hat", "ess_bulk", "ess_tail")}
    ranges = _ranges(view, values[low], values[high])
    most = view.chains * view.count
    body = []
    for i in rows:
        cells = [f'<th scope="row" title="{safe(table.index[i])}">{safe(table.index[i])}</th>']
        for key, _ in columns:
            if not key:
                glyph = _interval(
                    values[low][i], values["mean"][i], values[high][i], ranges[view.sites[i]]
                )
                cells.append(f"<td>{glyph}</td>")
                continue
            value = float(values[key][i])
            text = shown(key, value, float(values["mcse_mean"][i]))
            fails = key in failing and bool(failing[key][i])
            level = ""
            if key in ("ess_bulk", "ess_tail") and math.isfinite(value) and most:
                width = 100 * min(value / most, 1.0)
                level = f'<i class="level" style="width:{width:.0f}%"></i>'
            cells.append(
                f'<td data-v="{value!r}"{" class=fails" if fails else ""}>'
                f"{mark() if fails else ''}{text}{level}</td>"
            )
        body.append(f'<tr id="p{i}">{"".join(cells)}</tr>')
    need = f"ESS below {view.least_ess}" if view.enough_for_ess else ""
    limits = " or ".join(t for t in (f"{view.r_hat_name} above {view.r_hat_limit:.3g}", need) if t)
    words = (
        f"Intervals hold {percent}% of the draws, with equal tails. The bars show the interval "
        "and the mean on one scale for each site"
        f"{'' if view.approximate else ', and ESS as a share of all draws'}. "
        f"▲ marks {limits}."
    )
    if len(rows) < len(table):
        words += (
            f" The table shows {len(rows)} of {len(table):,} scalars, those with marks first; "
            "ppl.summary(result) has all."
        )
    markup = (
        f'<table data-sort=""><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )
    return Section(
        "parameters", "Parameters", paragraph(words) + scrolling(markup, "Parameters", "wide")
    )


def _ranges(view: View, low: np.ndarray, high: np.ndarray) -> dict[str, tuple[float, float]]:
    """The range of the intervals of every site."""
    found: dict[str, tuple[float, float]] = {}
    sites = np.asarray(view.sites, dtype=object)
    for name in view.names:
        mine = sites == name
        ends = np.concatenate([low[mine], high[mine]])
        ends = ends[np.isfinite(ends)]
        found[name] = (float(ends.min()), float(ends.max())) if ends.size else (0.0, 0.0)
    return found


def _interval(low: float, mean: float, high: float, within: tuple[float, float]) -> str:
    """A bar from low to high with a mark at the mean, on the scale of the site."""
    first, last = within
    if not (math.isfinite(low) and math.isfinite(mean) and math.isfinite(high)) or first >= last:
        return ""
    a, m, b = (
        100 * min(max((v / 2 - first / 2) / (last / 2 - first / 2), 0.0), 1.0)
        for v in (low, mean, high)
    )
    return (
        f'<span class="glyph"><i style="left:{a:.0f}%;width:{max(b - a, 1):.0f}%"></i>'
        f'<b style="left:{m:.0f}%"></b></span>'
    )
