"""Pictures of results: ArviZ's plots under short names, and those that ArviZ does not have.

Every function takes a result and passes further keywords on to ArviZ, which draws with matplotlib
unless ``backend=`` says otherwise; what comes back has ``savefig(path)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_toolkit.diagnostics.calibration import Calibration
from ppl_toolkit.diagnostics.jump_evidence import CrossCheck
from ppl_toolkit.diagnostics.series_plots import filtering, renewal, series
from ppl_toolkit.errors import DataError
from ppl_toolkit.results import require_tree

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

__all__ = [
    "calibration",
    "cross_check",
    "divergences",
    "energy",
    "filtering",
    "forest",
    "predictive",
    "prior_posterior",
    "ranks",
    "renewal",
    "series",
    "traces",
]


def traces(tree: xarray.DataTree, var_names: Any = None, **options: Any) -> Any:
    """Traces and marginal distributions, by chain."""
    return _arviz("plot_trace_dist", tree, ["posterior"], var_names=var_names, **options)


def ranks(tree: xarray.DataTree, var_names: Any = None, **options: Any) -> Any:
    """Ranks of the draws of every chain among all: level if the chains agree."""
    return _arviz("plot_rank", tree, ["posterior"], var_names=var_names, **options)


def forest(tree: xarray.DataTree, var_names: Any = None, **options: Any) -> Any:
    """Means and intervals of every scalar."""
    return _arviz("plot_forest", tree, ["posterior"], var_names=var_names, **options)


def energy(tree: xarray.DataTree, **options: Any) -> Any:
    """Energies of the draws, and their changes: alike if momenta explore them well."""
    return _arviz("plot_energy", tree, ["sample_stats"], **options)


def divergences(tree: xarray.DataTree, var_names: Any, **options: Any) -> Any:
    """Pairs of sites, with the draws that diverged marked."""
    return _arviz("plot_pair", tree, ["posterior"], var_names=var_names, **options)


def prior_posterior(tree: xarray.DataTree, var_names: Any = None, **options: Any) -> Any:
    """Prior and posterior of every scalar (needs a ``prior`` group beside it)."""
    return _arviz(
        "plot_prior_posterior", tree, ["posterior", "prior"], var_names=var_names, **options
    )


def predictive(tree: xarray.DataTree, **options: Any) -> Any:
    """Observed data among those the model predicts (`ppl.predict` adds them)."""
    needs = ["posterior_predictive", "observed_data"]
    return _arviz("plot_ppc_dist", tree, needs, **options)


def calibration(
    found: Calibration, quantities: Sequence[str] | None = None, joint: float = 0.95
) -> Figure:
    """Ranks of true values against uniform ones: the difference of their distribution functions.

    Args:
        found: from `calibrate`.
        quantities: which to show; those with the smallest p-values, nine at most, if None.
        joint: probability that uniform ranks stay inside the grey band, all of them.

    Returns:
        A matplotlib figure, a panel for every quantity.

    Raises:
        DataError: a quantity is not there.
    """
    from matplotlib.figure import Figure

    known = found.worst(len(found.p_values))
    names = known[:9] if quantities is None else list(quantities)
    if unknown := [name for name in names if name not in found.p_values]:
        raise DataError(f"no quantities {unknown}; there are {known}.")
    low, high = found.band(joint)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, name in zip(panels, names, strict=False):
        colour = "#c1440e" if name in found.failed else "#2a6f97"
        panel.fill_between(found.points, low, high, step="post", color="#d9d9d9", lw=0)
        panel.step(found.points, found.difference(name), where="post", color=colour)
        panel.set_title(f"{name}, p = {found.adjusted[name]:.2g}", loc="left", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.supxlabel("normalised rank", fontsize=9)
    figure.supylabel("ECDF - uniform", fontsize=9)
    return figure


def cross_check(found: CrossCheck) -> Figure:
    """Probabilities of a number by jumps and by evidences, with two standard errors of each.

    Args:
        found: from `ppl_toolkit.cross_check`.

    Returns:
        A matplotlib figure; values that differ are marked.
    """
    from matplotlib.figure import Figure

    table = found.table
    place = np.arange(len(table))
    figure = Figure(figsize=(1.6 + 0.7 * len(table), 2.8), layout="constrained")
    panel = figure.subplots()
    for shift, p, error, colour, marker, label in (
        (-0.12, "jumps", "mcse", "#2a6f97", "o", "by jumps"),
        (0.12, "smc", "se", "#c1440e", "D", "by evidences"),
    ):
        panel.errorbar(
            place + shift, table[p], 2 * table[error], color=colour, fmt=marker, ms=4.5,
            capsize=3, lw=1.2, label=label,
        )  # fmt: skip
    for at, value in enumerate(table.index):
        if value in found.failed:
            panel.axvspan(at - 0.4, at + 0.4, color="#c1440e", alpha=0.12, lw=0)
    panel.set_xticks(place, [str(value) for value in table.index])
    panel.set(xlabel=found.site, ylabel="probability", ylim=(0, None))
    panel.set_xlim(-0.6, len(table) - 0.4)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    return figure


def _arviz(name: str, tree: xarray.DataTree, groups: Sequence[str], **options: Any) -> Any:
    require_tree(tree)
    if missing := [group for group in groups if group not in tree.children]:
        raise DataError(
            f"this picture needs the groups {missing}; the result has {list(tree.children)}."
        )
    import arviz

    return getattr(arviz, name)(tree, **options)
