"""A result as text to read; the page is in `ppl_toolkit.diagnostics.page`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ppl_toolkit.diagnostics import approximation
from ppl_toolkit.diagnostics.findings import Finding
from ppl_toolkit.diagnostics.overview import headline
from ppl_toolkit.diagnostics.parameters import shown
from ppl_toolkit.diagnostics.view import view

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["report"]

_MOST_ROWS = 60


def report(
    tree: xarray.DataTree,
    path: str | Path | None = None,
    var_names: Sequence[str] | str | None = None,
) -> str:
    """What a run found: estimates, convergence, what to do about trouble.

    Args:
        tree: a result of `infer`.
        path: also write a self-contained HTML page there: one file, which loads nothing.
        var_names: sites to show; all by default. The findings are always about all of them.

    Returns:
        The report as text; print it.

    The output depends on the result alone: the same result gives the same page.
    """
    result = view(tree, var_names)
    if path is not None:
        from ppl_toolkit.diagnostics.page import compose

        Path(path).write_text(compose(result), encoding="utf-8")
    bias = result.attribute("approximation")
    lines = [headline(result), *([f"Approximate: {bias}."] if bias else [])]
    lines += approximation.lines(tree)
    lines += ["", _verdict(result.found)]
    lines += [
        f"  {finding.severity}: {finding.message}\n    {finding.remedy}" for finding in result.found
    ]
    table = result.table.head(_MOST_ROWS)
    if result.approximate:
        table = table.drop(columns=["ess_bulk", "ess_tail"])
    lines += ["", _rounded(table).to_string()]
    if result.superchains > 1:
        lines.append(
            f"r_hat is nested: it compares {result.superchains} superchains, of "
            f"{result.chains // result.superchains} chains that share their starts."
        )
    if len(result.table) > _MOST_ROWS:
        lines.append(f"... and {len(result.table) - _MOST_ROWS} more rows: ppl.summary(result)")
    return "\n".join(lines)


def _verdict(found: Sequence[Finding]) -> str:
    if any(finding.severity == "error" for finding in found):
        return "Verdict: do not use these draws yet."
    if found:
        return "Verdict: look at the findings before using these draws."
    return "Verdict: nothing looks wrong."


def _rounded(table: pandas.DataFrame) -> pandas.DataFrame:
    """Digits that mean something: estimates to their Monte Carlo error, ESS whole."""
    texts = table.astype(object)
    for row, error in enumerate(table["mcse_mean"]):
        for at, column in enumerate(table.columns):
            texts.iat[row, at] = shown(str(column), float(table.iat[row, at]), float(error))
    return texts
