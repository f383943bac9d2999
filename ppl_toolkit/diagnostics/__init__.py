"""Findings and reports: they read results, and no sampler imports them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {"Finding": "findings", "diagnose": "findings", "html": "page"}

__all__ = ["Finding", "diagnose", "html", "plots"]

if TYPE_CHECKING:
    from ppl_toolkit.diagnostics import plots
    from ppl_toolkit.diagnostics.findings import Finding, diagnose
    from ppl_toolkit.diagnostics.page import html


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module(f"{__name__}.plots")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
