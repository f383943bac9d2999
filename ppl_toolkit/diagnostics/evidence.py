"""The section of a report on the evidence, stages of sequential Monte Carlo, nested sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics import measures
from ppl_toolkit.diagnostics.markup import (
    Section,
    chain_css,
    chain_keys,
    figure,
    grid,
    numbers,
    paragraph,
    table,
)
from ppl_toolkit.diagnostics.nested import nested_runs
from ppl_toolkit.diagnostics.parameters import decimals
from ppl_toolkit.diagnostics.view import View

if TYPE_CHECKING:
    import xarray

__all__ = ["Evidence", "combined", "evidence"]

_Array = NDArray[np.float64]

_MOST_CHAINS = 8
_MOST_LISTED = 64
_NOISY = 0.5  # standard error of a log evidence
_LOW_SHARE = 0.25  # of the particles, for the ESS of the weights
_LOW_ACCEPTANCE = 0.1


class Evidence(NamedTuple):
    """Several independent estimates of one evidence as one.

    Attributes:
        log: its logarithm.
        se: standard error of that, from the spread of the estimates; NaN for a single one.
    """

    log: float
    se: float


def combined(logs: ArrayLike) -> Evidence:
    """The mean of unbiased estimates Z_c of the evidence, from their logarithms.

    log Z = log(mean Z_c), and its standard error is sd(Z_c) / (Z sqrt(chains)) (the delta
    method). Evidences are averaged, not their logarithms, since only those are unbiased.

    Args:
        logs: log evidence by chain; those that are not finite are left out.
    """
    values = measures.finite(logs)
    if not values.size:
        return Evidence(float("nan"), float("nan"))
    log = float(np.logaddexp.reduce(values) - np.log(values.size))
    ratios = np.exp(values - log)  # Z_c / Z
    many = values.size > 1
    return Evidence(log, float(ratios.std(ddof=1) / np.sqrt(values.size)) if many else float("nan"))


def evidence(view: View) -> Section | None:
    """Log evidence by chain and of all; temperature, ESS and acceptance by stage."""
    stages = view.tree["smc"].dataset if "smc" in view.tree.children else None
    if stages is not None and "stage" not in stages.sizes:
        stages = None
    logs = _log_evidence(view, stages)
    if logs is not None and view.approximate and not np.isfinite(logs).any():
        logs = None  # weights that cannot be relied on
    if logs is None and stages is None:
        return None
    body = _estimate(view, logs) if logs is not None else ""
    if stages is not None:
        body += _by_chain(view, stages, logs) + _pictures(view, stages)
    body += nested_runs(view.tree)
    return Section("evidence", "Evidence", body) if body else None


def _log_evidence(view: View, stages: xarray.Dataset | None) -> _Array | None:
    """Log evidence by chain: as the sampler gave it, or as it stood after the last stage."""
    if view.stats is not None and "log_evidence" in view.stats:
        found = view.stats["log_evidence"]
        if "chain" in found.dims and found.size:
            return np.asarray(found.transpose("chain", ...), float).reshape(view.chains, -1)[:, -1]
    by_stage = _stages(stages, "log_evidence")
    return None if by_stage is None else np.array([_last(row) for row in by_stage])


def _stages(stages: xarray.Dataset | None, name: str) -> _Array | None:
    """A quantity of shape (chain, stage), NaN after the last stage of a chain; or None."""
    if stages is None or name not in stages or set(stages[name].dims) != {"chain", "stage"}:
        return None
    values = np.asarray(stages[name].transpose("chain", "stage"), dtype=float)
    return values if np.isfinite(values).any() else None


def _last(row: _Array) -> float:
    good = measures.finite(row)
    return float(good[-1]) if good.size else float("nan")


# -- the estimate -------------------------------------------------------------------------------


def _estimate(view: View, logs: _Array) -> str:
    found = combined(logs)
    chains = int(np.isfinite(logs).sum())
    if view.attribute("method") == "Enumeration":
        shown = [(draw.written(found.log, 7), "log evidence, exact")]
        return numbers(shown) + paragraph("All configurations were summed, so there is no error.")
    shown = [(_rounded(found.log, found.se), "log evidence")]
    if np.isfinite(found.se):
        shown.append((draw.written(found.se, 2), "standard error"))
    words = (
        f"The mean of the evidences of {chains} independent chains, as a logarithm; its error is "
        "from their spread."
        if chains > 1
        else "One chain: its error is not known. Several independent ones tell."
    )
    if found.se > _NOISY:
        words += (
            f" An error above {_NOISY} means that a few chains make up the mean, and that the "
            "error itself is uncertain: use more particles or live points, or more moves."
        )
    elif np.isfinite(found.se):
        words += (
            f" Up to {_NOISY} it can be trusted; differences of log evidences between models "
            "should be well above it."
        )
    if chains < len(logs):
        words += f" {len(logs) - chains} chains without a finite evidence are left out."
    return numbers(shown) + paragraph(words) + grid([_spread(logs, found)])


def _rounded(log: float, se: float) -> str:
    """A log evidence with the digits that its error leaves, and one more."""
    return f"{log:.{decimals(se / 10)}f}".replace("-", "−") if np.isfinite(log) else "NaN"


def _spread(logs: _Array, found: Evidence) -> str:
    good = np.flatnonzero(np.isfinite(logs))
    if good.size < 2 or not np.ptp(logs[good]) > 0:
        return ""
    ends = [found.log - 2 * found.se, found.log + 2 * found.se]
    where = draw.frame((-0.5, len(logs) - 0.5), draw.limits(logs, ends))
    x = [where.x[0], where.x[1]]
    marks = [
        draw.band(where, x, [ends[0]] * 2, [ends[1]] * 2, "fill plain"),
        draw.hline(where, found.log),
        draw.dots(where, good, logs[good], "dots big c0"),
    ]
    text = "By chain (dots); of all (dashed), with two standard errors (band)."
    whole = list(range(0, len(logs), max(1, -(-len(logs) // 8))))
    svg = draw.picture(
        where, marks, f"Log evidence of {len(logs)} chains. {text}", x_label="chain",
        y_label="log evidence", x_ticks=([float(w) for w in whole], [str(w) for w in whole]),
    )  # fmt: skip
    return figure(svg, "Log evidence", text, ident="log-evidence")


# -- stages -------------------------------------------------------------------------------------


def _particles(view: View, stages: xarray.Dataset) -> float:
    """How many particles a chain has; NaN if the result does not say."""
    for attributes in (view.tree["smc"].attrs, stages.attrs, view.tree.attrs):
        if "particles" in attributes:
            return float(attributes["particles"])
    return float("nan")


def _by_chain(view: View, stages: xarray.Dataset, logs: _Array | None) -> str:
    particles = _particles(view, stages)
    columns: list[tuple[str, list[str], NDArray[np.bool_]]] = []

    def add(name: str, values: _Array, digits: int, fails: NDArray[np.bool_] | None = None) -> None:
        flags = np.zeros(len(values), dtype=bool) if fails is None else fails
        columns.append((name, [draw.written(float(v), digits) for v in values], flags))

    if logs is not None:
        texts = [_rounded(float(v), combined(logs).se) for v in logs]
        columns.append(("log evidence", texts, np.zeros(len(logs), dtype=bool)))
    known = [x for name in stages.data_vars if (x := _stages(stages, str(name))) is not None]
    if known:
        add("stages", np.max([np.isfinite(x).sum(axis=1) for x in known], axis=0).astype(float), 6)
    with np.errstate(all="ignore"):
        for name, label in (("ess", "smallest ESS"), ("n_unique", "fewest ancestors")):
            if (x := _stages(stages, name)) is not None:
                least = np.nanmin(np.where(np.isfinite(x), x, np.inf), axis=1)
                add(
                    label,
                    np.round(least),
                    9,
                    least < _LOW_SHARE * particles if name == "ess" else None,
                )
        if (x := _stages(stages, "acceptance_rate")) is not None:
            add("mean acceptance", _mean(x), 3, _mean(x) < _LOW_ACCEPTANCE)
        if (x := _stages(stages, "n_moves")) is not None:
            add("moves", np.nansum(x, axis=1), 9)
    if not columns:
        return ""
    chains = min(len(columns[0][1]), _MOST_LISTED)
    rows = [[f"chain {c}", *(texts[c] for _, texts, _ in columns)] for c in range(chains)]
    fails = [(c, j + 1) for j, (_, _, flags) in enumerate(columns) for c in range(chains)
             if flags[c]]  # fmt: skip
    heads = ["", *(name for name, _, _ in columns)]
    title = "<h3>Stages</h3>"
    if np.isfinite(particles):
        title += paragraph(f"{int(particles):,} particles in every chain.")
    return title + table(heads, rows, "Stages by chain", ident="by-chain-smc", fails=fails)


def _mean(values: _Array) -> _Array:
    good = np.isfinite(values)
    return np.where(good, values, 0.0).sum(axis=1) / good.sum(axis=1)


def _pictures(view: View, stages: xarray.Dataset) -> str:
    particles = _particles(view, stages)
    share = np.isfinite(particles)
    unit = particles if share else 1.0
    of_all = ", share of the particles" if share else ""
    within = (0.0, 1.0) if share else None
    figures = [
        _path(stages, "temperature", "Schedule", "temperature",
              "The weight of the likelihood, or the share of the data. It should rise without "
              "jumps.", span=(0.0, 1.0)),
        _path(stages, "ess", "ESS of the weights", f"ESS{of_all}",
              "Before resampling. Good: level, near the half at which adaptive schedules aim or "
              "above. Below a quarter (dashed) steps are too long.",
              unit=unit, span=within, level=_LOW_SHARE if share else None),
        _path(stages, "acceptance_rate", "Acceptance", "acceptance rate",
              f"Of the moves. Good: 0.2 to 0.9; below {_LOW_ACCEPTANCE} (dashed) particles stay "
              "copies of each other.", span=(0.0, 1.0), level=_LOW_ACCEPTANCE),
        _path(stages, "n_unique", "Distinct ancestors", f"ancestors{of_all}",
              "Particles with a descendant. Few of them mean that the sample hangs on a few "
              "particles of the stage before.", unit=unit, span=within),
        _path(stages, "n_moves", "Moves", "moves", "Markov steps of every particle.", whole=True),
        _path(stages, "step_size", "Step size", "step size", "Of the moves."),
        _path(stages, "log_evidence", "Growth of the evidence", "log evidence",
              "Chains that part company say at which stage the error arises."),
    ]  # fmt: skip
    figures = [f for f in figures if f]
    if not figures:
        return ""
    shown = min(int(stages.sizes.get("chain", 1)), _MOST_CHAINS)
    return chain_keys(shown) + grid(figures)


def _path(
    stages: xarray.Dataset,
    name: str,
    title: str,
    label: str,
    text: str,
    *,
    unit: float = 1.0,
    span: tuple[float, float] | None = None,
    level: float | None = None,
    whole: bool = False,
) -> str:
    """One quantity by stage, a line for every chain; "" if the run did not keep it."""
    values = _stages(stages, name)
    if values is None:
        return ""
    values = values / unit
    at = np.arange(values.shape[1]) + 1.0
    if span is None:
        span = draw.limits(values, *([[0.0]] if whole else []))
    if whole:
        span = (0.0, span[1])
    where = draw.frame((1.0, max(float(values.shape[1]), 2.0)), span, whole=whole)
    marks = [draw.hline(where, level)] if level is not None else []
    for c in range(min(len(values), _MOST_CHAINS)):
        marks.append(draw.line(where, at, values[c], chain_css(c)))
        marks.append(draw.dots(where, at, values[c], f"dots {chain_css(c).split()[1]}"))
    good = measures.finite(values)
    whole_ticks = at[:: max(1, -(-len(at) // 7))].tolist()
    svg = draw.picture(
        where, marks,
        f"{title} by stage, from {draw.written(float(good.min()))} to "
        f"{draw.written(float(good.max()))}.",
        x_label="stage", y_label=label, x_ticks=(whole_ticks, [f"{t:.0f}" for t in whole_ticks]),
    )  # fmt: skip
    return figure(svg, title, text, ident=f"smc-{name.replace('_', '-')}")
