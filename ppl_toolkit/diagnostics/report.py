"""A result as text to read, and as one self-contained HTML page."""

from __future__ import annotations

import html as html_escape
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_toolkit.diagnostics.findings import Finding, findings
from ppl_toolkit.results import posterior_group, scalar_labels, summary

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["html", "report"]

_MOST_ROWS = 60
_MOST_FOREST = 40
_MOST_TRACES = 4
_COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7700")


def report(
    tree: xarray.DataTree,
    path: str | Path | None = None,
    var_names: Sequence[str] | str | None = None,
) -> str:
    """What a run found: estimates, convergence, what to do about trouble.

    Args:
        tree: a result of `infer`.
        path: also write a self-contained HTML page there (no network, no scripts).
        var_names: sites to show; all by default. The findings are always about all of them.

    Returns:
        The report as text; print it.

    The output depends on the result alone: the same result gives the same page.
    """
    if path is not None:
        Path(path).write_text(html(tree, var_names), encoding="utf-8")
    table = summary(tree, var_names)
    lines = [_headline(tree), "", _verdict(findings(tree))]
    lines += [
        f"  {finding.severity}: {finding.message}\n    {finding.remedy}"
        for finding in findings(tree)
    ]
    lines += ["", _rounded(table.head(_MOST_ROWS)).to_string()]
    if len(table) > _MOST_ROWS:
        lines.append(f"... and {len(table) - _MOST_ROWS} more rows: ppl.summary(result)")
    return "\n".join(lines)


def _headline(tree: xarray.DataTree) -> str:
    attrs = tree.attrs
    draws = tree[posterior_group(tree)].sizes
    parts = [
        f"{attrs.get('method', 'draws')}: {draws['chain']} chains of {draws['draw']} draws",
        f"warm-up {attrs.get('warmup', 0)}",
        f"seed {attrs.get('seed', '?')}",
        f"{attrs.get('precision', '')} on {attrs.get('backend', '')}",
    ]
    return ", ".join(parts)


def _verdict(found: list[Finding]) -> str:
    if any(finding.severity == "error" for finding in found):
        return "Verdict: do not use these draws yet."
    if found:
        return "Verdict: look at the findings before using these draws."
    return "Verdict: nothing looks wrong."


def _rounded(table: pandas.DataFrame) -> pandas.DataFrame:
    """Digits that mean something: estimates to their Monte Carlo error, ESS whole."""
    shown = table.astype(object)
    for row, (label, values) in enumerate(table.iterrows()):
        digits = _digits(values["mcse_mean"])
        for column in table.columns:
            value = values[column]
            if column.startswith("ess"):
                text = f"{value:.0f}"
            elif column == "r_hat":
                text = f"{value:.3f}"
            elif column.startswith("mcse"):
                text = f"{value:.2g}"
            else:
                text = f"{value:.{digits}f}"
            shown.iat[row, table.columns.get_loc(column)] = text
        del label
    return shown


def _digits(error: float) -> int:
    """Decimals so that the last digit shown is the first one of the error."""
    if not np.isfinite(error) or error <= 0:
        return 3
    return int(np.clip(np.ceil(-np.log10(error)), 0, 8))


# -- the page -----------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #d0d0d0;
  --soft: #f4f4f2; --bad: #a31515; --mild: #7a5200; --good: #1b6b32; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #16181b; --line: #44474c;
  --soft: #22252a; --bad: #ff9a9a; --mild: #f0c674; --good: #8fdca5; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.verdict { font-size: 1.1rem; font-weight: 600; }
.error { color: var(--bad); } .warning { color: var(--mild); } .fine { color: var(--good); }
ul { padding-left: 1.2rem; } li { margin: .5rem 0; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th { background: var(--soft); } th:first-child, td:first-child { text-align: left; }
tr + tr td { border-top: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; background: #ffffff; border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: #1a1a1a; }
@media print { body { max-width: none; } .wide { overflow: visible; } }
"""


def html(tree: xarray.DataTree, var_names: Sequence[str] | str | None = None) -> str:
    """The report as one HTML page: verdict, estimates, pictures, run card."""
    found = findings(tree)
    table = summary(tree, var_names)
    kind = "fine"
    if found:
        kind = "error" if any(f.severity == "error" for f in found) else "warning"
    items = "".join(
        f'<li><strong class="{f.severity}">{f.severity}</strong>: {_safe(f.message)} '
        f"<em>{_safe(f.remedy)}</em></li>"
        for f in found
    )
    more = len(table) - _MOST_ROWS
    note = f"<p>{more} more rows are in the result.</p>" if more > 0 else ""
    pictures = "".join(
        f"<figure>{svg}<figcaption>{_safe(caption)}</figcaption></figure><br>"
        for svg, caption in _pictures(tree, table)
    )
    card = "".join(
        f"<dt>{_safe(str(key))}</dt><dd>{_safe(_card_value(value))}</dd>"
        for key, value in sorted(tree.attrs.items(), key=lambda item: str(item[0]))
        if key not in ("findings", "created_at")
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Inference report</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>Inference report</h1><p>{_safe(_headline(tree))}</p>"
        f'<p class="verdict {kind}">{_safe(_verdict(found))}</p>'
        + (f"<ul>{items}</ul>" if items else "")
        + f'<h2>Estimates</h2><div class="wide" tabindex="0">{_table(table.head(_MOST_ROWS))}</div>'
        + note
        + f"<h2>Pictures</h2>{pictures}<h2>Run</h2><dl>{card}</dl></main></body></html>\n"
    )


def _safe(text: str) -> str:
    return html_escape.escape(text)


def _card_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(table: pandas.DataFrame) -> str:
    shown = _rounded(table)
    head = "".join(f'<th scope="col">{_safe(str(c))}</th>' for c in ["", *shown.columns])
    rows = "".join(
        f"<tr><td>{_safe(str(name))}</td>"
        + "".join(f"<td>{_safe(str(value))}</td>" for value in row)
        + "</tr>"
        for name, row in zip(shown.index, shown.to_numpy(), strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _pictures(tree: xarray.DataTree, table: pandas.DataFrame) -> list[tuple[str, str]]:
    """(SVG, caption) of a forest plot and of the traces that mix worst."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    draws = tree[posterior_group(tree)].dataset
    scalars: dict[str, np.ndarray] = {}
    for name in draws.data_vars:
        array = draws[name].transpose("chain", "draw", ...)
        values = np.asarray(array, dtype=float).reshape(*array.shape[:2], -1)
        scalars.update(zip(scalar_labels(array), np.moveaxis(values, -1, 0), strict=True))
    low, high = table.columns[2:4]
    with mpl.rc_context({"svg.hashsalt": "ppl", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False}):  # fmt: skip
        shown = table.head(_MOST_FOREST)
        forest = Figure(figsize=(7, 0.6 + 0.22 * len(shown)), layout="constrained")
        axes = forest.subplots()
        rows = np.arange(len(shown))[::-1]
        axes.hlines(rows, shown[low], shown[high], color=_COLOURS[0], lw=2)
        axes.plot(shown["mean"], rows, "o", color="#1a1a1a", ms=4)
        axes.set_yticks(rows, shown.index)
        axes.axvline(0, color="#999999", lw=0.8, zorder=0)
        worst = table["r_hat"].fillna(0).sort_values(ascending=False, kind="stable")
        names = list(worst.index[:_MOST_TRACES])
        traces = Figure(figsize=(7, 1.5 * len(names)), layout="constrained")
        grid = traces.subplots(len(names), 2, squeeze=False, width_ratios=(3, 2))
        for (left, right), name in zip(grid, names, strict=True):
            values = scalars[name]
            ranks = values.ravel().argsort().argsort().reshape(values.shape)
            edges = np.linspace(0, values.size, 21)
            for chain, (value, rank) in enumerate(zip(values, ranks, strict=True)):
                colour = _COLOURS[chain % len(_COLOURS)]
                thin = max(1, len(value) // 500)
                left.plot(np.arange(len(value))[::thin], value[::thin], color=colour, lw=0.5)
                counts, _ = np.histogram(rank, edges)
                right.stairs(counts, edges, color=colour)
            left.set_title(name, loc="left")
            right.set_title("ranks by chain (flat is good)", loc="left")
            right.set_yticks([])
        return [
            (_svg(forest, "Means and intervals"), f"Means and intervals ({low} to {high})."),
            (_svg(traces, "Traces and ranks"), "The scalars with the largest R-hat, by chain."),
        ]


def _svg(figure: Any, label: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    inner = text[text.index("<svg") :]
    return inner.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
