"""Pictures of series: bands of latents over time, how a filter fared, how paths are renewed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_toolkit.errors import DataError, SiteError
from ppl_toolkit.results import posterior_group, require_tree

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

__all__ = ["filtering", "renewal", "series"]

_FILTERED, _SMOOTHED = "#c1440e", "#2a6f97"
_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def series(
    tree: xarray.DataTree,
    site: str,
    *,
    data: Any = None,
    time: Any = None,
    transform: Callable[[Any], Any] | None = None,
) -> Figure:
    """Bands of a latent series: 90 and 50%, and the median.

    Args:
        tree: a result; the draws of its site are the smoothed series (given all data), the group
            ``filtering`` of `ParticleFilter`, where there is one, the filtered one (given the data
            up to each time).
        site: with its first dimension over time; further ones get a panel each, eight at most.
        data: a series to show beside it, (T,), such as the observations.
        time: values of the time axis, (T,).
        transform: an increasing function of the values, such as numpy.exp.

    Raises:
        SiteError, DataError: there is no such site, or it is no series.
    """
    require_tree(tree)
    draws = tree[posterior_group(tree)].dataset
    if site not in draws.data_vars:
        raise SiteError(f"no site {site!r} in this result; it has {list(draws.data_vars)}.")
    values = draws[site].transpose("chain", "draw", ...)
    if values.ndim < 3:
        raise DataError(f"site {site!r} is no series: it has no dimension over time.")
    smooth = np.asarray(values).reshape(-1, values.shape[2], int(np.prod(values.shape[3:])))
    bands = [(_SMOOTHED, "given all data", np.quantile(smooth, _LEVELS, axis=0))]
    if "filtering" in tree.children and f"{site}_quantiles" in tree["filtering"]:
        own = tree["filtering"][f"{site}_quantiles"].mean("chain")
        filtered = np.moveaxis(np.asarray(own), 1, 0).reshape(len(_LEVELS), *smooth.shape[1:])
        bands.insert(0, (_FILTERED, "given data so far", filtered))
    x = _times(time, smooth.shape[1])
    change = transform or (lambda v: v)
    count = min(smooth.shape[2], 8)
    figure, panels = _panels(count, 2.6)
    for number, panel in enumerate(panels):
        for colour, label, quantiles in bands:
            low, near, middle, far, high = change(quantiles[:, :, number])
            panel.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)
            panel.fill_between(x, near, far, color=colour, alpha=0.22, lw=0)
            panel.plot(x, middle, color=colour, lw=1.4, label=label)
        if data is not None:
            shown = np.asarray(data)
            panel.plot(x, shown if shown.ndim == 1 else shown[:, number], ".", ms=4,
                       color="#444444", label="data")  # fmt: skip
        panel.set_ylabel(site if count == 1 else f"{site}[{number}]")
    panels[0].legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    _label_time(panels[-1], x)
    return figure


def filtering(tree: xarray.DataTree, *, time: Any = None) -> Figure:
    """How a filter fared: effective sample size, surviving ancestors, evidence step by step.

    Few ancestors of the early steps mean that paths along them would be poor: paths drawn backwards
    do not depend on them.

    Args:
        tree: a result of `ParticleFilter`; each of its chains is a line.
        time: values of the time axis, (T,).
    """
    require_tree(tree)
    if "filtering" not in tree.children:
        raise DataError(
            "this picture needs a result of method=ParticleFilter(...); the groups here are "
            f"{list(tree.children)}."
        )
    group = tree["filtering"].dataset
    particles = int(group.attrs["particles"])
    x = _times(time, group.sizes["time"])
    figure, panels = _panels(3, 1.7)
    shown = (
        ("ess", f"ESS\n(of {particles})", (0, 1.05 * particles)),
        ("ancestors_left", "ancestors left\nat the end", (0.8, 1.3 * particles)),
        ("log_evidence_increment", "log p(y now |\ny before)", None),
    )
    for panel, (name, label, limits) in zip(panels, shown, strict=True):
        for row in np.asarray(group[name]):
            panel.plot(x, row, lw=1.0, alpha=0.8, color=_SMOOTHED)
        panel.set_ylabel(label, fontsize=8)
        if limits:
            panel.set_ylim(*limits)
    panels[1].set_yscale("log")
    _label_time(panels[-1], x)
    return figure


def renewal(tree: xarray.DataTree, site: str, *, time: Any = None) -> Figure:
    """Share of sweeps that renewed the path, at every time: near one everywhere if it mixes.

    Args:
        tree: a result of `ParticleGibbs`, `PPG` or `PMMH`.
        site: a latent series.
        time: values of the time axis, (T,).
    """
    require_tree(tree)
    draws = tree[posterior_group(tree)].dataset
    if site not in draws.data_vars:
        raise SiteError(f"no site {site!r} in this result; it has {list(draws.data_vars)}.")
    values = np.asarray(draws[site].transpose("chain", "draw", ...))
    if values.ndim < 3 or values.shape[1] < 2:
        raise DataError(f"site {site!r} is no series, or has too few draws.")
    changed = values[:, 1:] != values[:, :-1]
    share = changed.reshape(*changed.shape[:3], -1).any(-1).mean(1)
    x = _times(time, share.shape[1])
    figure, (panel,) = _panels(1, 2.2)
    for row in share:
        panel.plot(x, row, lw=1.0, alpha=0.8, color=_SMOOTHED)
    panel.set(ylim=(0, 1.02), ylabel="share renewed")
    _label_time(panel, x)
    return figure


def _panels(count: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height * count + 0.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(count, 1, sharex=True))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
    return figure, panels


def _label_time(panel: Any, time: Any) -> None:
    """Whole numbers stay whole on the axis of time."""
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("time")
    if np.issubdtype(time.dtype, np.integer):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _times(time: Any, length: int) -> Any:
    if time is None:
        return np.arange(1, length + 1)
    time = np.asarray(time)
    if time.shape != (length,):
        raise DataError(f"time has shape {time.shape}; the series has {length} steps.")
    return time
