"""The picture of the README, from the demo's fit: docs/picture.svg."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import ppl_toolkit as ppl
from ppl_toolkit.demo import DAYS, WEIGHTS, growth

FILE = Path(__file__).resolve().parent / "picture.svg"
SHOWN = (4, 9, 14, 25)  # rats with unlike growth
BLUE, RED, GREY, INK = "#2a6f97", "#c1440e", "#8a8a8a", "#1a1a1a"
STYLE = {
    "svg.hashsalt": "ppl", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def shrinkage(axes: mpl.axes.Axes, draws: dict[str, np.ndarray]) -> None:
    """Each rat's own least-squares line, and its line in the model of all rats."""
    days = DAYS - 22.0
    own_slope = days @ WEIGHTS / (days @ days)
    own_weight = WEIGHTS.mean(axis=0)
    weight, slope = draws["a"].mean(axis=0), draws["b"].mean(axis=0)
    angle = np.linspace(0, 2 * np.pi, 200)
    for share in (0.5, 0.89):  # where the lines of rats lie: contours of the population
        radius = np.sqrt(-2 * np.log1p(-share))
        x = draws["intercept"].mean() + radius * draws["intercept_sd"].mean() * np.cos(angle)
        y = draws["slope"].mean() + radius * draws["slope_sd"].mean() * np.sin(angle)
        axes.fill(x, y, color=BLUE, alpha=0.09, lw=0)
    for rat in range(WEIGHTS.shape[1]):
        axes.annotate(
            "",
            (weight[rat], slope[rat]),
            (own_weight[rat], own_slope[rat]),
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.8, "shrinkA": 3, "shrinkB": 2},
        )
    axes.plot(own_weight, own_slope, "o", mfc="white", mec=GREY, ms=5, label="each rat on its own")
    axes.plot(weight, slope, "o", color=BLUE, ms=5, label="all rats together")
    for rat in SHOWN:
        axes.annotate(
            str(rat),
            (weight[rat - 1], slope[rat - 1]),
            xytext=(6, -3),
            textcoords="offset points",
            color=RED,
            weight="bold",
        )
    axes.set(xlabel="weight on day 22 (g)", ylabel="growth (g per day)")
    axes.legend(frameon=False, loc="lower right", handletextpad=0.2)


def growth_of(axes: mpl.axes.Axes, rat: int, draws: dict[str, np.ndarray]) -> None:
    """The line of one rat, its 89% band and that of further weighings, from the average rat's."""
    grid = np.linspace(5, 39, 35)

    def average(days: np.ndarray) -> np.ndarray:
        return draws["intercept"].mean() + draws["slope"].mean() * (days - 22.0)

    a, b = draws["a"][:, rat - 1, None], draws["b"][:, rat - 1, None]
    line = a + b * (grid - 22.0) - average(grid)
    noise = draws["noise"][:, None] * np.random.default_rng(rat).normal(size=(len(line), 1))
    axes.axhline(0, color=GREY, lw=0.8, ls=":")
    for values, alpha in ((line + noise, 0.16), (line, 0.35)):
        low, high = np.quantile(values, [0.055, 0.945], axis=0)
        axes.fill_between(grid, low, high, color=BLUE, alpha=alpha, lw=0)
    axes.plot(grid, line.mean(axis=0), color=BLUE, lw=1.5)
    axes.plot(DAYS, WEIGHTS[:, rat - 1] - average(DAYS), "o", color=RED, ms=4.5)
    axes.text(
        0.05, 0.95, f"rat {rat}", transform=axes.transAxes, color=RED, weight="bold", va="top"
    )
    axes.set(ylim=(-55, 75), xlim=(5, 39), xticks=DAYS, yticks=[-40, 0, 40])


def main() -> None:
    """Fit, draw, write."""
    posterior = ppl.infer(growth, DAYS, weight=WEIGHTS, seed=0, progress=False)
    group = posterior["posterior"]
    draws = {k: v.values.reshape(-1, *v.shape[2:]) for k, v in group.data_vars.items()}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.1), layout="constrained", facecolor="white")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1), wspace=0.04)
        shrinkage(left.subplots(), draws)
        panels = right.subplots(2, 2, sharex=True, sharey=True)
        for axes, rat in zip(panels.flat, SHOWN, strict=True):
            growth_of(axes, rat, draws)
        right.supxlabel("age (days)", fontsize=10)
        right.supylabel("weight against the average rat (g)", fontsize=10)
        left.suptitle(
            "30 rats: each borrows strength from the others",
            fontsize=11,
            x=0.02,
            ha="left",
        )
        right.suptitle(
            "Four of them, with 89% bands of line and weighing", fontsize=11, x=0.02, ha="left"
        )
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(FILE, metadata=nothing)
    text = FILE.read_text(encoding="utf-8")
    FILE.write_text(re.sub(r"[ \t]+$", "", text, flags=re.M), encoding="utf-8")
    print(f"wrote {FILE.name}, {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
