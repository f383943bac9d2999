"""What the checks of a sampler found, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ppl_toolkit.diagnostics.exactness import LARGEST_ERROR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ppl_toolkit.diagnostics.validity import Validity

__all__ = ["drawn"]

_GOOD, _BAD, _BAND = "#2a6f97", "#c1440e", "#e4e4e4"
_WIDTH = 4.6
_MOST_CURVES = 4
_TINY = 1e-17  # where errors of exactly zero are drawn


def drawn(found: Validity) -> Figure:
    """A panel for each kind of evidence.

    Exact errors by part, with the limit of rounding; shifts of all quantities in standard errors,
    with Holm's first limit; the ECDFs of the ranks of the worst quantities, with the band in which
    all of them stay; the ratios of evidences, with their mean and its interval.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[Callable[[Any, Validity], None], float]] = []
    if found.exact:
        panels.append((_exact, 1.1 + 0.3 * len(found.exact)))
    if found.tests:
        panels.append((_shifts, 1.1 + 0.3 * len(found.tests)))
    if found.calibrated is not None:
        panels.append((_calibration, 2.9))
    if found.evidence is not None and not found.evidence.problem:
        panels.append((_evidence, 2.9))
    height = max((height for _, height in panels), default=0.0)
    figure = Figure(figsize=(_WIDTH * max(1, len(panels)), max(2.6, height)), layout="constrained")
    figure.suptitle(found.verdict.capitalize(), fontsize=10, x=0.01, ha="left")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    if not panels:
        axes[0].set_axis_off()
    for axis, (draw, _) in zip(axes, panels, strict=False):
        draw(axis, found)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _rows(axis: Any, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)


def _exact(axis: Any, found: Validity) -> None:
    axis.axvspan(_TINY / 3, LARGEST_ERROR, color=_BAND, lw=0)
    for row, exact in enumerate(found.exact.values()):
        for error, marker in zip(exact.errors.values(), "o^s", strict=True):
            colour = _BAD if error > LARGEST_ERROR else _GOOD
            axis.plot(max(error, _TINY), row, marker, ms=6, mfc="none", color=colour)
    names = next(iter(found.exact.values())).errors
    for name, marker in zip(names, "o^s", strict=True):
        axis.plot([], [], marker, ms=6, mfc="none", color="#555555", label=name)
    axis.set_xscale("log")
    axis.set_xlim(_TINY / 3, 3.0)
    axis.legend(fontsize=7, frameon=False, loc="upper right")
    _rows(axis, list(found.exact))
    axis.set_title("Transition matrices, errors", loc="left", fontsize=9)


def _shifts(axis: Any, found: Validity) -> None:
    most = 0.0
    for row, (label, (test, _)) in enumerate(found.tests.items()):
        limit, wrong = found.limit(label), set(found.rejected(label))
        axis.barh(row, 2 * limit, 0.8, -limit, color=_BAND, zorder=0)
        for name, shift in test.shift.items():
            colour = _BAD if name in wrong else _GOOD
            axis.plot(shift, row, "|", color=colour, ms=11, mew=1.4)
        most = max(most, limit, *map(abs, test.shift.values()), 0.0)
    axis.set_xlim(-1.1 * most, 1.1 * most)
    _rows(axis, ["Geweke's test" if label == "geweke" else label for label in found.tests])
    axis.set_title("Invariance, shifts in standard errors", loc="left", fontsize=9)


def _calibration(axis: Any, found: Validity) -> None:
    calibrated = found.calibrated
    assert calibrated is not None
    names = calibrated.worst(_MOST_CURVES)
    low, high = calibrated.band(1 - found.level / len(calibrated.p_values))
    axis.fill_between(calibrated.points, low, high, step="post", color=_BAND, lw=0)
    for i, name in enumerate(names):
        axis.step(
            calibrated.points, calibrated.difference(name), where="post", lw=1.1,
            color=_BAD if name in calibrated.failed else _GOOD, alpha=1 - 0.2 * i,
            ls=("-", "--", "-.", ":")[i], label=f"{name}, p = {calibrated.adjusted[name]:.2g}",
        )  # fmt: skip
    axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # room for the legend
    axis.legend(fontsize=7, frameon=False, loc="upper right", ncols=2)
    axis.set_xlabel("normalised rank", fontsize=8)
    axis.set_title("Calibration, ECDF of ranks - uniform", loc="left", fontsize=9)


def _evidence(axis: Any, found: Validity) -> None:
    evidence = found.evidence
    assert evidence is not None
    colour = _BAD if evidence.p_value < found.level else _GOOD
    axis.hist(evidence.log_ratios, 40, color=colour, alpha=0.35)
    axis.axvline(0.0, color="#555555", lw=1, ls="--")
    mean, low, high = evidence.log_interval(found.level)
    top = axis.get_ylim()[1]
    axis.errorbar(
        mean, 1.06 * top, xerr=[[mean - low], [high - mean]], fmt="o", ms=4, capsize=4, color=colour
    )
    axis.set_ylim(0, 1.15 * top)
    axis.set_xlabel("log (Z_hat / Z): runs, and the mean of Z_hat / Z", fontsize=8)
    axis.set_title(f"Evidence, p = {evidence.p_value:.2g}", loc="left", fontsize=9)
