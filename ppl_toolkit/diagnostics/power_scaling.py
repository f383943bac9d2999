"""The section of a report on power scaling: what moves with the prior, and what with the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics.markup import Section, bullets, figure, grid, paragraph, table
from ppl_toolkit.diagnostics.model import sites_of
from ppl_toolkit.diagnostics.sensitivity import SENSITIVE, sensitivity, sensitivity_findings
from ppl_toolkit.diagnostics.view import View

if TYPE_CHECKING:
    import pandas

__all__ = ["diagnoses", "power_scaling"]

_MOST_SCALARS = 400
_MOST_SCORES = 1 << 26
_MOST_LISTED = 40
_WORDS = {
    "conflict": "prior and data may disagree",
    "weak_data": "the data say little",
    "pooled": "pooled: its prior is learned",
    "": "",
}


def power_scaling(view: View) -> Section | None:
    """How far every posterior moves with the weight of prior and data; None without the groups."""
    scales = _scales(view)
    if scales is None or not len(scales):
        return None
    pooled = _pooled(view, scales)
    said = diagnoses(scales, pooled)
    order = np.lexsort((-scales["likelihood"], -scales["prior"]))
    listed = order[:_MOST_LISTED]
    rows = [
        (
            str(scales.index[i]),
            f"{scales['prior'].iloc[i]:.3f}",
            f"{scales['likelihood'].iloc[i]:.3f}",
            _WORDS[said[i]],
        )
        for i in listed
    ]
    fails = [(at, 3) for at, i in enumerate(listed) if said[i] == "conflict"]
    words = (
        "How far a posterior moves, relative to the change, when the whole prior or the whole "
        "likelihood counts a little more or less (power scaling). "
        f"Above {SENSITIVE} it is sensitive. To the likelihood alone: the usual case. To both: "
        "prior and data may disagree. To the prior alone: the data say little."
    )
    if "pooled" in said:
        words += (
            " The prior of a site that depends on other sites is learned with them, so that it "
            "moves with both by design: look at the top of the hierarchy."
        )
    if len(scales) < len(view.table):
        words += f" {len(scales)} of {len(view.table):,} scalars were looked at."
    if len(listed) < len(scales):
        words += f" The table has the {len(listed)} most sensitive to the prior."
    heads = ("scalar", "prior", "likelihood", "diagnosis")
    found = [f"{f.message} {f.remedy}" for f in sensitivity_findings(scales[~pooled])]
    shown = table(
        heads, rows, "Sensitivity by scalar", ident="by-scalar", words=(3,), fails=fails
    )  # fmt: skip
    body = paragraph(words) + bullets(found) + grid([_picture(scales), shown], css="facts")
    return Section("sensitivity", "Sensitivity", body)


def _pooled(view: View, scales: pandas.DataFrame) -> NDArray[np.bool_]:
    """Which scalars have a prior with parameters of its own, where the result says so."""
    latent = {site["name"] for site in sites_of(view)
              if site["kind"] == "latent" and site.get("parents")}  # fmt: skip
    learned = {str(view.table.index[i]) for i, site in enumerate(view.sites) if site in latent}
    return np.array([str(name) in learned for name in scales.index], dtype=bool)


def _scales(view: View) -> pandas.DataFrame | None:
    """The table of `sensitivity` for as many sites as are quickly done."""
    groups = view.tree.children
    if view.group != "posterior" or not {"log_likelihood", "log_prior"} <= set(groups):
        return None
    scores = sum(v.size for v in groups["log_likelihood"].dataset.data_vars.values())
    if not view.count or not 0 < scores <= _MOST_SCORES:
        return None
    names: list[str] = []
    for name in view.names:
        known = sum(view.sites.count(n) for n in names)
        if name not in view.ragged and known + view.sites.count(name) <= _MOST_SCALARS:
            names.append(name)
    if not names:
        return None
    try:
        with np.errstate(all="ignore"):
            found = sensitivity(view.tree, var_names=names)
    except Exception:  # of draws that no weights can be smoothed for
        return None
    return found[np.isfinite(found).all(axis=1)]


def diagnoses(scales: pandas.DataFrame, pooled: NDArray[np.bool_]) -> list[str]:
    """The kind of the finding of every row: "pooled" for such sites, "" where there is none."""
    kinds = [sensitivity_findings(scales.iloc[[i]]) for i in range(len(scales))]
    return [
        ("pooled" if flag else found[0].kind) if found else ""
        for found, flag in zip(kinds, pooled, strict=True)
    ]


def _picture(scales: pandas.DataFrame) -> str:
    x, y = (np.asarray(scales[c], dtype=float) for c in ("prior", "likelihood"))
    at_most = (1.1 * SENSITIVE, *x), (1.1 * SENSITIVE, *y)
    where = draw.frame(*((0.0, draw.limits(v)[1]) for v in at_most), width=350.0, height=260.0)
    bad = x > SENSITIVE
    marks = [
        draw.vline(where, SENSITIVE),
        draw.hline(where, SENSITIVE),
        draw.dots(where, x[~bad], y[~bad], "dots big c0"),
        draw.crosses(where, x[bad], y[bad]),
    ]
    both = int((bad & (y > SENSITIVE)).sum())
    text = (
        f"{int(bad.sum())} of {len(x)} scalars are sensitive to the prior (crosses), {both} of "
        f"them to the likelihood too. Dashed: {SENSITIVE}."
    )
    svg = draw.picture(
        where, marks, f"Sensitivity to prior and likelihood. {text}",
        x_label="sensitivity to the prior", y_label="sensitivity to the likelihood",
    )  # fmt: skip
    return figure(svg, "Prior and likelihood", text, ident="prior-likelihood")
