"""What the checks of a sampler found, as one self-contained HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ppl_toolkit.diagnostics import drawing as draw
from ppl_toolkit.diagnostics.calibration import Calibration
from ppl_toolkit.diagnostics.exactness import LARGEST_ERROR
from ppl_toolkit.diagnostics.markup import (
    Section,
    document,
    figure,
    grid,
    numbers,
    paragraph,
    safe,
    table,
)
from ppl_toolkit.diagnostics.unbiasedness import Unbiasedness

if TYPE_CHECKING:
    from ppl_toolkit.diagnostics.validity import Validity

__all__ = ["page_of"]

_MOST_CURVES = 6
_MOST_LISTED = 12
_WIDTH = 460.0  # of pictures that take two columns
_ROW = 22.0  # height of a row of shifts


def page_of(found: Validity) -> str:
    """The page."""
    sections = [
        section
        for section in (
            _exact(found),
            _shifts(found),
            _calibration(found.calibrated, found.level),
            _evidence(found.evidence, found.level),
            Section("sampler", "Sampler", f"<pre>{safe(found.method)}</pre>"),
        )
        if section is not None
    ]
    kernels = ", ".join([*found.exact, *found.invariant]) or found.method.split("(")[0]
    title = "Check of a sampler"
    return document(title, title, kernels, _verdict(found), sections)


def _verdict(found: Validity) -> str:
    sign, css = ("✓", "fine") if found else ("✕", "error")
    words = found.verdict.capitalize()
    blamed = (
        f"<p>What fails by itself: {safe(', '.join(found.guilty))}.</p>" if found.guilty else ""
    )
    note = (
        f"<p>Right samplers are called wrong with a probability of {found.level:g} for each kind "
        "of test by simulation.</p>"
    )
    return (
        f'<section id="verdict" class="verdict {css}" aria-label="Verdict">'
        f'<p><span aria-hidden="true">{sign} </span>{safe(words)}</p>{blamed}{note}</section>\n'
    )


def _exact(found: Validity) -> Section | None:
    if not found.exact:
        return None
    heads = ("kernel", "states", *next(iter(found.exact.values())).errors)
    rows = [
        (label, f"{exact.states:,}", *(f"{error:.1e}" for error in exact.errors.values()))
        for label, exact in found.exact.items()
    ]
    fails = [
        (i, j + 2)
        for i, exact in enumerate(found.exact.values())
        for j, error in enumerate(exact.errors.values())
        if error > LARGEST_ERROR
    ]
    words = (
        "The transition matrix of the code that samples, enumerated, against the exact posterior. "
        f"Errors up to {LARGEST_ERROR:g} are rounding."
    )
    body = paragraph(words) + table(heads, rows, "Errors of transition matrices", fails=fails)
    return Section("exact", "Exact transition matrices", body)


def _shifts(found: Validity) -> Section | None:
    if not found.tests:
        return None
    count = len(found.tests)
    names = ["Geweke's test" if label == "geweke" else label for label in found.tests]
    everything = [abs(z) for test, _ in found.tests.values() for z in test.shift.values()]
    reach = 1.1 * max([*everything, *(found.limit(label) for label in found.tests)])
    where = draw.frame(
        (-reach, reach), (count - 0.5, -0.5), width=_WIDTH, height=60 + _ROW * count, y_labels=names
    )
    marks = []
    for row, label in enumerate(found.tests):
        limit, wrong = found.limit(label), set(found.rejected(label))
        test, _ = found.tests[label]
        bottom, top = [row + 0.4] * 2, [row - 0.4] * 2
        marks.append(draw.band(where, [-limit, limit], bottom, top, css="fill plain"))
        for css, shown in (
            ("line c0", [z for name, z in test.shift.items() if name not in wrong]),
            ("line bad thick", [test.shift[name] for name in wrong]),
        ):
            marks.append(draw.segments(where, shown, shown, row - 0.3, row + 0.3, css))
    marks.append(draw.vline(where, 0.0))
    svg = draw.picture(
        where, marks, "Shifts of all quantities by kernel", x_label="shift in standard errors",
        y_ticks=(list(range(count)), names),
    )  # fmt: skip
    caption = "A mark for every quantity; those beyond the grey limit (Holm's first) fail."
    words = (
        "Parameters from the prior with data drawn given them are exact draws from posteriors, and "
        "must still be after some steps."
    )
    if (turns := found.geweke) is not None:
        words += (
            f" Geweke's test: {turns.turns} turns of {turns.steps} steps of the whole kernel, with "
            "data drawn anew between them."
        )
    rows = [
        (name, f"{test.replications:,}", f"{test.moved:.0%}", str(len(test.p_values)),
         ", ".join(f"{q} ({test.shift[q]:+.1f})" for q in found.rejected(label)[:_MOST_LISTED])
         or "nothing")
        for name, (label, (test, _)) in zip(names, found.tests.items(), strict=True)
    ]  # fmt: skip
    fails = [(i, 4) for i, label in enumerate(found.tests) if found.rejected(label)]
    heads = ("kernel", "replications", "moved", "tests", "changed (standard errors)")
    listed = table(heads, rows, "Tests of invariance", words=(4,), fails=fails)
    picture = grid([figure(svg, "Shifts", caption)], css="panels two")
    return Section("invariance", "Invariance", paragraph(words) + picture + listed)


def _calibration(found: Calibration | None, level: float) -> Section | None:
    if found is None:
        return None
    size = found.ranks.sizes["replication"]
    low, high = found.band(1 - level / len(found.p_values))
    names = found.worst(_MOST_CURVES)
    reach = 1.05 * max(high.max(), -low.min(), *(abs(found.difference(n)).max() for n in names))
    panels = []
    for name in names:
        where = draw.frame((0.0, 1.0), (-reach, reach))
        css = "line bad" if name in found.failed else "line c0"
        curve = draw.line(where, found.points, found.difference(name), css)
        marks = [draw.band(where, found.points, low, high, css="fill plain"), curve]
        svg = draw.picture(
            where, marks, f"ECDF of the ranks of {name} minus uniform", x_label="normalised rank"
        )
        panels.append(figure(svg, name, f"corrected p = {found.adjusted[name]:.2g}"))
    words = (
        f"Ranks of the true values among {found.draws} draws on {size:,} simulated data sets: "
        "their distribution function minus the uniform one, of the quantities with the smallest "
        f"p-values among {len(found.p_values)}. If the sampler is right, all curves of all "
        f"quantities stay in their grey bands with a probability of at least {1 - level:.4g}."
    )
    text = "" if found.ok else f"<pre>{safe(found)}</pre>"
    return Section("calibration", "Calibration", paragraph(words) + grid(panels) + text)


def _evidence(found: Unbiasedness | None, level: float) -> Section | None:
    if found is None:
        return None
    if found.problem:
        return Section("evidence", "Evidence", paragraph(f"Not tested: {found.problem}"))
    mean, low, high = found.log_interval(level)
    heights, edges = np.histogram(found.log_ratios, 40)
    where = draw.frame(
        draw.limits(edges, [0.0, low, high]), (0.0, 1.2 * heights.max()),
        width=_WIDTH, height=220, whole=True,
    )  # fmt: skip
    css = "bad" if found.p_value < level else "c0"
    top = 1.1 * heights.max()
    marks = [
        draw.bars(where, edges, heights, f"fill {css}"),
        draw.vline(where, 0.0),
        draw.segments(where, low, high, top, top, f"line bold {css}"),
        draw.dots(where, [mean], [top], f"dots big {css}"),
    ]
    svg = draw.picture(
        where, marks, "Evidence estimates", x_label="log (Z_hat / Z)", y_label="runs"
    )
    words = (
        f"{len(found.logs):,} independent runs, in {found.stages} stages with {found.moves} moves "
        f"each; powers, moves and kernel as a pilot run chose them, since the evidence is unbiased "
        f"only if nothing adapts. log Z = {found.log_evidence:.4f}, {found.source}."
    )
    caption = f"runs; above them the mean of Z_hat / Z with its interval of {1 - level:.2%}"
    left, right = found.interval(level)
    shown = numbers(
        [
            (f"{found.ratio:.4g}", "mean of Z_hat / Z"),
            (f"{left:.4g} to {right:.4g}", f"interval of {1 - level:.2%}"),
            (f"{found.p_value:.2g}", "p-value"),
        ]
    )
    picture = grid([figure(svg, "Evidence", caption)], css="panels two")
    return Section("evidence", "Evidence", paragraph(words) + shown + picture)
