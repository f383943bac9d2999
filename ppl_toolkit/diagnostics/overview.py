"""The first and the last sections of a report: verdict, run card, downloads, how to repeat it."""

from __future__ import annotations

import base64
import json
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from ppl_toolkit.diagnostics.drawing import written
from ppl_toolkit.diagnostics.findings import Finding, as_json
from ppl_toolkit.diagnostics.markup import Section, facts, numbers, paragraph, safe, table
from ppl_toolkit.diagnostics.view import View

__all__ = ["downloads", "headline", "reproduction", "run_card", "verdict"]

_MOST_CSV_ROWS = 2000
_MOST_LISTED = 60

# Where the evidence of a finding is, by its kind: the first of these that the page has.
_EVIDENCE = {
    "divergences": ("divergences", "sampler"),
    "tree_depth": ("tree-depth", "sampler"),
    "bfmi": ("energy", "sampler"),
    "hot": ("sampler",),
    "r_hat": ("r-hat", "convergence"),
    "ess": ("effective-size", "convergence"),
    "mcse": ("worst", "convergence"),
    "stuck": ("worst", "convergence"),
    "multimodal": ("worst", "convergence"),
    "khat": ("loo", "prediction"),
    "predictive": ("prediction",),
    "conflict": ("sensitivity", "prior"),
    "weak_data": ("sensitivity", "prior"),
    "precision": ("data", "run"),
    "parameters": ("sites", "run"),
    "subsample": ("sites", "run"),
    "nested": ("by-chain-nested", "evidence"),
    "duplicates": ("by-chain-nested", "evidence"),
    "approximation": ("importance-weights", "approximation"),
    "elbo": ("elbo", "approximation"),
    "few_draws": ("run",),
    "not_finite": ("parameters",),
}
_VERDICTS = {
    "fine": ("✓", "Fine: nothing looks wrong."),
    "warning": ("▲", "Look at the findings before you use these draws."),
    "error": ("✕", "Do not use these draws yet."),
}


def headline(view: View) -> str:
    """The run in one line."""
    parts = [
        f"{view.attribute('method') or 'draws'}: {view.chains} chain"
        f"{'' if view.chains == 1 else 's'} of {view.count:,} draws"
    ]
    if view.superchains > 1:
        parts.append(f"{view.superchains} superchains")
    if goal := view.attribute("goal_text"):
        parts.append(f"until {goal}")
    if (warmup := view.attribute("warmup")) is not None:
        parts.append(f"warm-up {int(warmup):,}")
    if (seed := view.attribute("seed")) is not None:
        parts.append(f"seed {seed}")
    where = [view.attribute("precision"), view.attribute("backend")]
    parts.append(" on ".join(str(w) for w in where if w is not None))
    return ", ".join(p for p in parts if p)


def verdict(view: View, anchors: Container[str], rows: Mapping[str, str]) -> str:
    """What to think of the run, and why.

    Args:
        view: the result.
        anchors: the anchors of the rest of the page.
        rows: the anchors of the table's rows, by label.
    """
    kind = "fine"
    if view.found:
        kind = "error" if any(f.severity == "error" for f in view.found) else "warning"
    sign, words = _VERDICTS[kind]
    items = "".join(_finding(f, anchors, rows) for f in view.found)
    return (
        f'<section id="verdict" class="verdict {kind}" aria-label="Verdict">'
        f'<p><span aria-hidden="true">{sign} </span>{words}</p>'
        + (f"<ul>{items}</ul>" if items else "")
        + "</section>\n"
    )


def _finding(finding: Finding, anchors: Container[str], rows: Mapping[str, str]) -> str:
    wanted = (*_EVIDENCE.get(finding.kind, ()), "parameters", "run")
    target = next(anchor for anchor in wanted if anchor in anchors)
    sites = ", ".join(
        f'<a href="#{rows[site]}">{safe(site)}</a>' for site in finding.sites if site in rows
    )
    severity = "error" if finding.severity == "error" else "warning"
    return (
        f'<li class="{severity}"><span class="tag">{severity}</span>: {safe(finding.message)} '
        f'<a href="#{target}">See the evidence</a>'
        + (f" (rows: {sites})" if sites else "")
        + f'.<span class="advice"><b>What to do:</b> {safe(finding.remedy)}</span></li>'
    )


# -- the run ------------------------------------------------------------------------------------


def run_card(view: View) -> Section:
    """What was run, on what, how long it took and what it brought."""
    attr = view.attribute
    run = [("method", safe(attr("method") or "unknown"))]
    if reason := attr("method_reason"):
        run.append(("chosen", safe(str(reason).partition(": ")[2] or reason)))
    if bias := attr("approximation"):
        run.append(("approximate", safe(bias)))
    for name, value in _options(view).items():
        run.append((name.replace("_", " "), f"<code>{safe(value)}</code>"))
    run.append(("chains × draws", f"{view.chains} × {view.count:,}"))
    for name, label in (("warmup", "warm-up"), ("seed", "seed"), ("lanes", "lanes")):
        if attr(name) is not None and (name != "warmup" or "warmup" not in _options(view)):
            run.append((label, safe(attr(name))))
    if attr("interrupted"):
        run.append(("ended", "interrupted: these are the draws made before"))
    machine = []
    if attr("backend"):
        kind = attr("device_kind")
        text = f"{attr('n_devices') or 1} × {attr('backend')}"
        machine.append(("device", safe(text + (f" ({kind})" if kind != attr("backend") else ""))))
    for name, label in (("precision", "precision"), ("n_threads", "threads")):
        if attr(name):
            machine.append((label, safe(attr(name))))
    for name, label in (("inference_library", "inference_library_version"), ("jax", "jax_version"),
                        ("numpyro", "numpyro_version")):  # fmt: skip
        if attr(label):
            known = attr(name) if name == "inference_library" else name
            machine.append((str(known), safe(attr(label))))
    for name in ("model_hash", "data_hash"):
        if attr(name):
            short = f"<code>{safe(str(attr(name))[:12])}</code>"
            machine.append((name.replace("_", " "), short))
    return Section(
        "run",
        "Run",
        _yield(view)
        + _times(view)
        + f'<div class="facts">{facts(run)}{facts(machine)}</div>'
        + f'<div class="facts">{_sites(view)}{_data(view)}</div>',
    )


def _options(view: View) -> dict[str, Any]:
    try:
        options = json.loads(view.attribute("method_options") or "{}")
    except ValueError:
        return {}
    return options if isinstance(options, dict) else {}


def _yield(view: View) -> str:
    """The smallest ESS, and what it cost."""
    table_ = view.table
    if view.approximate:
        return ""
    varying = np.asarray(table_["sd"], dtype=float) > 0
    effective = np.asarray(table_["ess_bulk"], dtype=float)[varying]
    effective = effective[np.isfinite(effective)]
    shown = []
    if effective.size:
        least = float(effective.min())
        shown.append((f"{least:,.0f}", "smallest bulk ESS"))
        seconds = float(view.attribute("time_sampling") or 0)
        if seconds > 0:
            shown.append((_rate(least / seconds), "of it per second of sampling"))
        gradients = float(view.attribute("n_gradient_evaluations") or 0)
        if gradients > 0:
            shown.append((_rate(1000 * least / gradients), "of it per 1000 gradients"))
    for name, label in (("n_gradient_evaluations", "gradients, sampling"),
                        ("n_gradient_evaluations_warmup", "gradients, warm-up")):  # fmt: skip
        if view.attribute(name):
            shown.append((f"{int(view.attribute(name)):,}", label))
    return numbers(shown)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else written(value, 3)


def _times(view: View) -> str:
    names = (("time_compile", "compile"), ("time_warmup", "warm-up"), ("time_sampling", "sampling"))
    times = [
        (label, float(value))
        for name, label in names
        if (value := view.attribute(name)) is not None
    ]
    total = sum(seconds for _, seconds in times)
    if not total > 0:
        return ""
    parts = "".join(
        f'<i class="c{i}" style="width:{100 * seconds / total:.1f}%"></i>'
        for i, (_, seconds) in enumerate(times)
    )
    keys = "".join(
        f'<span><span class="key c{i}"></span>{label} {written(seconds, 3)} s</span>'
        for i, (label, seconds) in enumerate(times)
    )
    return f'<div class="split" aria-hidden="true">{parts}</div><div class="keys">{keys}</div>'


def _shape(sizes: Mapping[Any, int]) -> str:
    own = [f"{d}: {n:,}" for d, n in sizes.items() if d not in ("chain", "draw")]
    return ", ".join(own) or "scalar"


def _sites(view: View) -> str:
    if view.attribute("model_sites"):  # a section of their own tells more
        return ""
    rows = [
        (str(name), _shape(variable.sizes), str(variable.dtype))
        for name, variable in view.draws.data_vars.items()
    ]
    more = f" (the first {_MOST_LISTED} of {len(rows)})" if len(rows) > _MOST_LISTED else ""
    listed = table(
        ("site", "shape", "type"),
        rows[:_MOST_LISTED],
        "Sites of the model",
        ident="sites",
        words=(1, 2),
    )
    return f"<div><h3>Sites{more}</h3>{listed}</div>"


def _data(view: View) -> str:
    rows = [
        (str(name), _shape(variable.sizes), str(variable.dtype), role)
        for group, role in (("observed_data", "observed"), ("constant_data", "given"))
        if group in view.tree.children
        for name, variable in view.tree[group].dataset.data_vars.items()
    ]
    if not rows:
        return ""
    listed = table(
        ("name", "shape", "type", "role"), rows[:_MOST_LISTED], "Data", ident="data",
        words=(1, 2, 3),
    )  # fmt: skip
    return f"<div><h3>Data</h3>{listed}</div>"


# -- to take along ------------------------------------------------------------------------------


def downloads(view: View) -> Section:
    """The table as CSV and the findings as JSON, inside the page."""
    csv = view.table.head(_MOST_CSV_ROWS).to_csv(index_label="parameter", lineterminator="\n")
    found = json.dumps(json.loads(as_json(view.found)), indent=1)
    links = [
        _link("summary.csv", "text/csv", csv, "Summary as CSV"),
        _link("findings.json", "application/json", found, "Findings as JSON"),
    ]
    more = len(view.table) - _MOST_CSV_ROWS
    note = f"The first {_MOST_CSV_ROWS:,} rows; ppl.summary(result) has all." if more > 0 else ""
    items = "".join(f"<li>{link}</li>" for link in links)
    return Section("downloads", "Downloads", f"<ul>{items}</ul>{paragraph(note) if note else ''}")


def _link(name: str, kind: str, text: str, words: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    size = f"{max(len(text) / 1000, 0.1):,.1f} kB"
    return (
        f'<a download="{name}" href="data:{kind};charset=utf-8;base64,{data}">{words}</a> '
        f'<span class="mute small">({size})</span>'
    )


def reproduction(view: View) -> Section:
    """The settings that give these draws again."""
    attr = view.attribute
    # A Prior's warm-up, say, is no argument of its constructor.
    options = {k: v for k, v in _options(view).items() if k != "warmup"}
    method = attr("method")
    settings = []
    if method:
        inside = ", ".join(f"{name}={value!r}" for name, value in options.items())
        settings.append(f"method={method}({inside})")
    settings += [f"chains={view.chains}", f"draws={view.count}"]
    for name in ("superchains", "warmup", "seed", "lanes"):
        if attr(name) is not None and (name != "superchains" or attr(name)):
            settings.append(f"{name}={attr(name)}")
    if attr("precision"):
        settings.append(f"precision={attr('precision')!r}")
    if (attr("dims") or "{}") != "{}":
        settings.append(f"dims={json.loads(attr('dims'))!r}")
    lines = ["import ppl_toolkit as ppl"]
    if method:
        lines.append(f"from ppl_toolkit.inference import {method}")
    lines += ["", "result = ppl.infer(", "    model, *data,"]
    lines += [f"    {setting}," for setting in settings]
    lines.append(")")
    packages = (
        ("ppl_toolkit", "inference_library_version"),
        ("jax", "jax_version"),
        ("numpyro", "numpyro_version"),
    )
    versions = [f"{name}=={attr(key)}" for name, key in packages if attr(key)]
    hashes = [
        f"{name.replace('_hash', '')}: {attr(name)}" for name in ("model_hash", "data_hash")
        if attr(name)
    ]  # fmt: skip
    words = (
        "The same model and data (their hashes are below), settings, versions and kind of device "
        "give the same draws."
    )
    return Section(
        "reproduce",
        "Run it again",
        paragraph(words)
        + f"<pre>{safe(chr(10).join(lines))}</pre>"
        + (f"<pre>{safe(chr(10).join([*versions, *hashes]))}</pre>" if versions + hashes else ""),
    )
