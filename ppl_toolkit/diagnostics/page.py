"""A result as one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ppl_toolkit.diagnostics.approximation import approximation
from ppl_toolkit.diagnostics.dimensions import dimensions
from ppl_toolkit.diagnostics.evidence import evidence
from ppl_toolkit.diagnostics.marginals import marginals
from ppl_toolkit.diagnostics.markup import document
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
from ppl_toolkit.diagnostics.view import View, view

if TYPE_CHECKING:
    import xarray

__all__ = ["compose", "html"]


def html(tree: xarray.DataTree, var_names: Sequence[str] | str | None = None) -> str:
    """The report as one HTML page.

    Verdict, run, parameters, approximation or convergence and sampler, evidence, dimensions,
    posterior, prediction, residuals, sensitivity, model, downloads: a section appears if the result
    has what it shows.
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
            approximation(result),
            None if result.approximate else convergence(result),
            None if result.approximate else sampler(result),
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
    name = result.attribute("method") or "Inference"
    return document(
        f"{name} report",
        "Inference report",
        headline(result),
        verdict(result, anchors, row_anchors(result)),
        sections,
    )
