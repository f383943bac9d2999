"""What a run shows of itself: a bar in terminals and notebooks, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from ppl_toolkit.errors import OptionError

__all__ = ["Bar", "Lines", "Quiet", "progress_for"]

_SECONDS_BETWEEN_LINES = 10.0


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, text: str) -> None:
        """Something to say before or after the run."""

    def update(self, iteration: int, stats: Mapping[str, np.ndarray]) -> None:
        """A chunk ended at ``iteration``."""


class _Reporter(Quiet):
    """Keeps count of what both visible forms show."""

    def __init__(self, label: str, start: int, warmup: int, total: int, unit: str) -> None:
        self.label, self.start, self.warmup, self.total = label, start, warmup, total
        self.unit, self.divergences = unit, 0

    def status(self, iteration: int, stats: Mapping[str, np.ndarray]) -> str:
        if self.unit:
            return self.unit
        parts = ["warm-up" if iteration <= self.warmup and self.warmup else "draws"]
        if iteration > self.warmup and "diverging" in stats:
            self.divergences += int(np.sum(stats["diverging"]))
        if "step_size" in stats:
            parts.append(f"step {np.mean(stats['step_size'][:, -1]):.2g}")
        if "n_steps" in stats:
            parts.append(f"{np.mean(stats['n_steps']):.0f} gradients/draw")
        if self.divergences:
            parts.append(f"{self.divergences} divergences")
        return ", ".join(parts)


class Lines(_Reporter):
    """A line every ten seconds, and one at the end, on standard error."""

    def __init__(self, label: str, start: int, warmup: int, total: int, unit: str) -> None:
        super().__init__(label, start, warmup, total, unit)
        self._last = time.monotonic()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def update(self, iteration: int, stats: Mapping[str, np.ndarray]) -> None:
        status = self.status(iteration, stats)
        now = time.monotonic()
        if iteration == self.total or now - self._last > _SECONDS_BETWEEN_LINES:
            self._last = now
            counted = self.unit or f"iterations ({status})"
            self.note(f"{self.label}: {iteration}/{self.total} {counted}")


class Bar(_Reporter):
    """A progress bar with live divergences, step size and gradients."""

    def __init__(self, label: str, start: int, warmup: int, total: int, unit: str) -> None:
        super().__init__(label, start, warmup, total, unit)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar: Any = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task(
            self.label, total=self.total, completed=self.start, status="compiling"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False)

    def update(self, iteration: int, stats: Mapping[str, np.ndarray]) -> None:
        self._bar.update(self._task, completed=iteration, status=self.status(iteration, stats))


def _in_notebook() -> bool:
    """Whether a bar can be drawn in a notebook (rich needs ipywidgets for that)."""
    return "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None


def progress_for(
    choice: Any, label: str, start: int, warmup: int, total: int, unit: str = ""
) -> Quiet:
    """The form that ``progress=`` asks for.

    Args:
        choice: "auto" (a bar in terminals and notebooks, else lines), "bar", "lines",
            True (auto) or False (nothing).
        label: what is under way.
        start, warmup, total: iterations that are done, that are warm-up, and in all.
        unit: what is counted, where that is not the iterations of a sampler.
    """
    if choice is False:
        return Quiet()
    if choice in ("auto", True):
        choice = "bar" if sys.stderr.isatty() or _in_notebook() else "lines"
    forms = {"bar": Bar, "lines": Lines}
    if choice not in forms:
        raise OptionError(
            f"progress must be 'auto', 'bar', 'lines', True or False; got {choice!r}."
        )
    return forms[choice](label, start, warmup, total, unit)
