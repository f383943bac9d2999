"""The model section of a report: sites, who depends on whom, the source."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ppl_toolkit.diagnostics.graph import Node, graph
from ppl_toolkit.diagnostics.markup import Section, paragraph, safe, scrolling, table
from ppl_toolkit.diagnostics.view import View

__all__ = ["model", "sites_of", "support_words"]

_MOST_LISTED = 200
_MOST_NODES = 60
_MOST_LETTERS = 20_000

_FRAMES = {
    "latent": "node",
    "observed": "node seen",
    "deterministic": "node dash1",
    "factor": "node dash2",
}
_SUPPORTS = {
    "Real": "real",
    "RealVector": "real vector",
    "Positive": "> 0",
    "Nonnegative": "≥ 0",
    "UnitInterval": "0 to 1",
    "Boolean": "0 or 1",
    "IntegerNonnegative": "0, 1, 2, …",
    "IntegerPositive": "1, 2, …",
}


def sites_of(view: View) -> list[dict[str, Any]]:
    """The sites as the run recorded them; none for results of other makers."""
    try:
        found = json.loads(view.attribute("model_sites") or "[]")
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def model(view: View) -> Section | None:
    """A table of sites, a graph of dependence, the source; None if the run recorded neither."""
    sites = sites_of(view)
    source = view.attribute("model_source")
    body = ""
    if sites:
        body += _picture(sites) + _table(sites)
    if source:
        shown = str(source)[:_MOST_LETTERS] + ("…" if len(str(source)) > _MOST_LETTERS else "")
        body += (
            '<h3>Source</h3><pre class="code" role="region" tabindex="0" aria-label="Source">'
            f"{safe(shown)}</pre>"
        )
    return Section("model", "Model", body) if body else None


def _table(sites: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            str(site["name"]), str(site["kind"]), str(site["distribution"]),
            support_words(str(site["support"])), " × ".join(map(str, site["shape"])) or "scalar",
            ", ".join(site["plates"]), ", ".join(site.get("parents", ())),
        )
        for site in sites[:_MOST_LISTED]
    ]  # fmt: skip
    heads = ("site", "kind", "distribution", "support", "shape", "plates", "depends on")
    used = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]
    more = len(sites) - len(rows)
    return (
        "<h3>Sites</h3>"
        + table(
            [heads[i] for i in used],
            [[row[i] for i in used] for row in rows],
            "Sites of the model",
            ident="sites",
            words=range(1, len(used)),
        )
        + (paragraph(f"{more} more sites are not shown.") if more > 0 else "")
    )


def _picture(sites: Sequence[Mapping[str, Any]]) -> str:
    if not any(site.get("parents") for site in sites):
        return ""
    if len(sites) > _MOST_NODES:
        return paragraph(f"{len(sites)} sites are too many for a picture of their dependence.")
    parents = {str(site["name"]): list(site.get("parents", ())) for site in sites}
    nodes = [
        Node(_indexed(site), _law(site), _FRAMES.get(str(site["kind"]), "node")) for site in sites
    ]
    shown = {str(site["name"]): node.name for site, node in zip(sites, nodes, strict=True)}
    said = "; ".join(
        f"{name} depends on {', '.join(above)}" for name, above in parents.items() if above
    )
    svg = graph(
        nodes,
        {shown[n]: [shown[p] for p in above if p in shown] for n, above in parents.items()},
        f"Graph of the model: {said}.",
    )
    words = (
        "Arrows lead from a site to those whose density or value reads it. Solid frames are "
        "latent sites, filled ones observed, dashed ones are computed; plates are in brackets."
    )
    return paragraph(words) + scrolling(svg, "Graph of the model", "wide fit plate")


def _indexed(site: Mapping[str, Any]) -> str:
    plates = ", ".join(site["plates"])
    return f"{site['name']}[{plates}]" if plates else str(site["name"])


def _law(site: Mapping[str, Any]) -> str:
    return str(site["distribution"]) if site["kind"] in ("latent", "observed") else site["kind"]


def support_words(text: str) -> str:
    """A support as NumPyro prints it, in plain words; bounds that are arrays are left out."""
    found = re.fullmatch(r"(\w+)\((.*)\)", text)
    if found is None:
        return text
    kind, inside = found[1].strip("_"), found[2]
    if kind in _SUPPORTS:
        return _SUPPORTS[kind]
    if kind in ("IndependentConstraint", "Independent"):
        return support_words(inside.rpartition(",")[0])
    bounds = {
        name: f"{float(value):g}".replace("-", "−")
        for name, value in re.findall(r"(lower_bound|upper_bound)=(-?[\d.]+(?:e[+-]?\d+)?)", inside)
    }
    low, high = bounds.get("lower_bound", "…"), bounds.get("upper_bound", "…")
    signs = {"GreaterThan": f"> {low}", "GreaterThanEq": f"≥ {low}", "LessThan": f"< {high}",
             "LessThanEq": f"≤ {high}"}  # fmt: skip
    if kind in signs:
        return signs[kind]
    if kind.endswith("Interval") and bounds:
        return f"{low}, …, {high}" if kind.startswith("Integer") else f"{low} to {high}"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower()
