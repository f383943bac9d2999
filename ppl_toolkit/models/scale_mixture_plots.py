"""Pictures of scale mixtures: bands of predictions, the law of the scale, calibration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpyro import distributions as dist

from ppl_toolkit.errors import DataError
from ppl_toolkit.models.predictive import Predictive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ppl_toolkit.models.scale_mixture import Fitted

__all__ = ["plot_calibration", "plot_predictions", "plot_scale"]

_COLOURS = ("#1f6fb5", "#c2480f", "#1c7d47", "#8b45a6", "#0d7680", "#8a6200")


def plot_predictions(
    fits: Fitted | Mapping[str, Fitted], x: Any, *, of: str = "y", mass: float = 0.9
) -> Figure:
    """Median and central intervals over one input, a panel for every fit.

    Args:
        fits: a fit, or several by name, to data with one feature.
        x: where to predict, (m,), in order.
        of: "y" for targets, "f" for the function.
        mass: of the outer interval; the inner one holds half.

    Raises:
        DataError: the data have more than one feature.
    """
    import matplotlib.pyplot as plt

    named = _named(fits)
    x = np.asarray(x, dtype=float).ravel()
    for fitted in named.values():
        if fitted.conditioned.x.shape[1:] != (1,):
            raise DataError(
                "bands over one input need data with one feature; these have inputs of shape "
                f"{fitted.conditioned.x.shape[1:]}. plot_calibration serves any data."
            )
    figure, panels = plt.subplots(
        1, len(named), figsize=(4.2 * len(named) + 0.8, 3.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, colour, (name, fitted) in zip(panels[0], _cycled(), named.items(), strict=False):
        law = fitted.predict(x[:, None], of=of)
        for held, alpha in ((mass, 0.18), (0.5, 0.28)):
            low, high = law.interval(held)
            panel.fill_between(x, low, high, color=colour, alpha=alpha, lw=0, label=f"{held:.0%}")
        panel.plot(x, law.quantile(0.5), color=colour, lw=1.6, label="median")
        panel.plot(fitted.conditioned.x[:, 0], fitted.conditioned.y, "k.", ms=4, label="data")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("x")
    panels[0, 0].set_ylabel(of)
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def plot_scale(fits: Fitted | Mapping[str, Fitted]) -> Figure:
    """Densities of log sigma^2: the prior law (dashed), given the data, and the best scale q / n.

    Laws without a density (points) are shown as vertical lines.
    """
    import matplotlib.pyplot as plt

    named = _named(fits)
    figure, panel = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    best = [fitted.profiled_scale for fitted in named.values()]
    middle, n = np.median(best), len(next(iter(named.values())).conditioned.y)
    width = max(8 * np.sqrt(2 / n), 2.5)
    grid = np.exp(np.linspace(np.log(middle) - width, np.log(middle) + width, 400))
    for colour, (name, fitted) in zip(_cycled(), named.items(), strict=False):
        prior, posterior = Predictive(fitted.conditioned.prior), fitted.scale
        if isinstance(posterior.law, dist.Delta):
            panel.axvline(float(posterior.law.v), color=colour, lw=1.6, label=name)
            continue
        # In log sigma^2, whose axis this is: the density times sigma^2.
        panel.plot(grid, grid * np.exp(posterior.log_density(grid)), color=colour, label=name)
        panel.plot(grid, grid * np.exp(prior.log_density(grid)), "--", color=colour, lw=1)
    panel.axvline(middle, color="#444444", lw=0.8, ls=":", label="best scale q / n")
    panel.set_xscale("log")
    panel.set_xlabel("sigma^2")
    panel.set_ylabel("density of log sigma^2")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8)
    return figure


def plot_calibration(fits: Fitted | Mapping[str, Fitted], X: Any, y: Any) -> Figure:  # noqa: N803
    """How often targets fall below their predicted quantiles, less the promised share.

    The shaded band holds a calibrated prediction's curve pointwise with probability 95%. Curves
    that rise first and fall below later tell of too wide predictions; the other way round, of too
    narrow ones.

    Args:
        fits: a fit, or several by name.
        X, y: inputs (m, d) and targets (m,) that were not fitted.
    """
    import matplotlib.pyplot as plt
    from scipy import stats

    shares = np.linspace(0.005, 0.995, 199)
    figure, panel = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    m = len(y)
    low, high = (stats.binom.ppf(p, m, shares) / m - shares for p in (0.025, 0.975))
    panel.fill_between(shares, low, high, color="#888888", alpha=0.2, lw=0, label="calibrated, 95%")
    panel.axhline(0, color="#444444", lw=0.8)
    for colour, (name, fitted) in zip(_cycled(), _named(fits).items(), strict=False):
        levels = np.sort(fitted.predict(X).cdf(y))
        found = np.searchsorted(levels, shares, side="right") / m
        panel.plot(shares, found - shares, color=colour, lw=1.5, label=name)
    panel.set_xlabel("promised share below")
    panel.set_ylabel("observed share - promised")
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _named(fits: Any) -> dict[str, Any]:
    if isinstance(fits, Mapping):
        if not fits:
            raise DataError("there is no fit to show.")
        return dict(fits)
    return {type(fits.conditioned.prior).__name__: fits}


def _cycled() -> Iterator[str]:
    return itertools.cycle(_COLOURS)
