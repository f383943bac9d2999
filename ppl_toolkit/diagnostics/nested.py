"""What a report shows of runs of nested sampling: a table, and where their evidence lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics import measures
from ppl_toolkit.diagnostics.findings import NEAR_START, NOT_UNIFORM
from ppl_toolkit.diagnostics.markup import chain_css, chain_keys, figure, grid, paragraph, table

if TYPE_CHECKING:
    import xarray

__all__ = ["nested_runs"]

_MOST_CHAINS, _MOST_LISTED, _POINTS = 8, 64, 400
_BINS = 60


def nested_runs(tree: xarray.DataTree) -> str:
    """Runs and their points as HTML; "" if the result has none."""
    if "nested" not in tree.children:
        return ""
    runs = tree["nested"].dataset
    body = "<h3>Runs</h3>" + paragraph(
        f"{int(runs.attrs['live']):,} live points in every chain. The deviation of a log evidence "
        "that a run tells of itself leaves out what too few slices do. Hardly any new point should "
        "stay near to where it started."
    )
    body += _by_chain(runs)
    if "dead_points" in tree.children:
        points = tree["dead_points"].dataset
        chains = min(points.sizes["chain"], _MOST_CHAINS)
        body += chain_keys(chains) + grid([_climb(points, chains), _mass(points, chains)])
    return body


def _by_chain(runs: xarray.Dataset) -> str:
    columns = {
        "log evidence": ("log_evidence", 6), "its deviation": ("log_evidence_sd", 2),
        "information (nats)": ("information", 3), "effective points": ("ess", 9),
        "iterations": ("n_iterations", 9), "likelihoods": ("n_evaluations", 9),
        "near to start": ("near_start", 2), "p of ranks": ("insertion_p", 2),
    }  # fmt: skip
    numbers = {name: np.asarray(runs[key], float) for name, (key, _) in columns.items()}
    wrong = {
        "near to start": numbers["near to start"] > NEAR_START,
        "p of ranks": numbers["p of ranks"] < NOT_UNIFORM,
    }
    rows, fails = [], []
    for c in range(min(runs.sizes["chain"], _MOST_LISTED)):
        row = [f"chain {c}"]
        for j, (name, (_, digits)) in enumerate(columns.items()):
            value = numbers[name][c]
            row.append(draw.written(np.round(value) if digits == 9 else float(value), digits))
            if name in wrong and wrong[name][c]:
                fails.append((c, j + 1))
        rows.append(row)
    return table(["", *columns], rows, "Runs by chain", ident="by-chain-nested", fails=fails)


def _columns(points: xarray.Dataset, chain: int) -> tuple[NDArray[np.float64], ...]:
    """Information gained -log X, log likelihood and posterior weight of a chain's points."""
    gained, likelihood, weight = (
        np.asarray(points[name].transpose("chain", "point")[chain], float)
        for name in ("log_volume", "log_likelihood", "log_weight")
    )
    good = np.isfinite(gained) & np.isfinite(likelihood)
    return -gained[good], likelihood[good], np.exp(weight[good])


def _climb(points: xarray.Dataset, chains: int) -> str:
    curves = [_columns(points, c)[:2] for c in range(chains)]
    curves = [(x[:: max(1, len(x) // _POINTS)], y[:: max(1, len(x) // _POINTS)]) for x, y in curves]
    upper = np.concatenate([y[len(y) // 20 :] for _, y in curves])  # the lowest are far below
    where = draw.frame(draw.limits(np.concatenate([x for x, _ in curves])), draw.limits(upper))
    marks = [draw.line(where, x, y, chain_css(c)) for c, (x, y) in enumerate(curves)]
    text = "Likelihood of the points as the prior's volume shrinks. A bend is a change of phase."
    svg = draw.picture(
        where, marks, f"Log likelihood by prior volume. {text}",
        x_label="information gained, -log volume (nats)", y_label="log likelihood",
    )  # fmt: skip
    return figure(svg, "Climb", text, ident="nested-climb")


def _mass(points: xarray.Dataset, chains: int) -> str:
    curves = [_columns(points, c) for c in range(chains)]
    most = max(float(measures.finite(x).max()) for x, _, _ in curves)
    edges = np.linspace(0.0, most, _BINS + 1)
    heights = [np.histogram(x, edges, weights=w)[0] for x, _, w in curves]
    where = draw.frame((0.0, most), (0.0, 1.05 * max(float(h.max()) for h in heights)))
    marks = [draw.stairs(where, edges, h, chain_css(c)) for c, h in enumerate(heights)]
    text = (
        "Where the posterior lies. It should fade out at the right: a run that ends before has "
        "lost a part."
    )
    svg = draw.picture(
        where, marks, f"Posterior mass by prior volume. {text}",
        x_label="information gained, -log volume (nats)", y_label="posterior mass",
    )  # fmt: skip
    return figure(svg, "Posterior mass", text, ident="nested-mass")
