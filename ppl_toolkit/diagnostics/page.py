"""A result as one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ppl_toolkit.diagnostics.dimensions import dimensions
from ppl_toolkit.diagnostics.evidence import evidence
from ppl_toolkit.diagnostics.marginals import marginals
from ppl_toolkit.diagnostics.markup import safe
from ppl_toolkit.diagnostics.mixing import convergence
from ppl_toolkit.diagnostics.model import model
from ppl_toolkit.diagnostics.overview import (
    downloads,
    headline,
    reproduction,
    run_card,
    verdict,
)
from ppl_toolkit.diagnostics.parameters import parameters, row_anchors
from ppl_toolkit.diagnostics.power_scaling import power_scaling
from ppl_toolkit.diagnostics.predictive import predictive
from ppl_toolkit.diagnostics.residuals import residuals
from ppl_toolkit.diagnostics.sampler import sampler
from ppl_toolkit.diagnostics.style import SCRIPT, style_sheet
from ppl_toolkit.diagnostics.view import View, view

if TYPE_CHECKING:
    import xarray

__all__ = ["compose", "html"]


def html(tree: xarray.DataTree, var_names: Sequence[str] | str | None = None) -> str:
    """The report as one HTML page.

    Verdict, run, parameters, convergence, sampler, evidence, dimensions, posterior, prediction,
    residuals, sensitivity, model, downloads: a section appears if the result has what it shows.
    The page loads nothing: style, script and pictures are inside. It depends on the result alone:
    the same result gives the same page.

    Args:
        tree: a result of `infer`.
        var_names: sites to show; all by default. The findings are always about all of them.

    Raises:
        SiteError: a site is not there.
    """
    return compose(view(tree, var_names))


def compose(result: View) -> str:
    """The page of a view."""
    sections = [
        section
        for section in (
            run_card(result),
            parameters(result),
            convergence(result),
            sampler(result),
            evidence(result),
            dimensions(result),
            marginals(result.without(result.ragged)),
            predictive(result),
            residuals(result),
            power_scaling(result),
            model(result),
            downloads(result),
            reproduction(result),
        )
        if section is not None
    ]
    body = "".join(section.html() for section in sections)
    anchors = set(re.findall(r'\bid="([^"]+)"', body))
    links = "".join(f'<li><a href="#{s.ident}">{safe(s.title)}</a></li>' for s in sections)
    name = result.attribute("method") or "Inference"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(name)} report</title><style>{style_sheet()}</style></head><body>\n"
        '<a class="skip" href="#content">Skip to the content</a>'
        f'<header><h1>Inference report</h1><p class="mute">{safe(headline(result))}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f'<main id="content">{verdict(result, anchors, row_anchors(result))}{body}</main>'
        "<footer><p>Made by ppl_toolkit from the result alone; it loads nothing.</p></footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
