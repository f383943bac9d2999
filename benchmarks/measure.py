"""How the benchmarks measure: CPU seconds, counts of compilations, medians, tables.

CPU seconds are the user and system time of this process over all its threads. They tell what a
call costs however busy the machine is; wall clock seconds do not.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Cost",
    "cost_inside",
    "cost_of",
    "counted_compilations",
    "geometric_mean",
    "machine",
    "show_table",
]


class Cost(NamedTuple):
    """What a piece of work cost."""

    cpu: float
    wall: float


def cost_of(work: Callable[[], Any]) -> tuple[Cost, Any]:
    """Run ``work``; its cost and its result."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall), result


@contextlib.contextmanager
def cost_inside(owner: Any, name: str) -> Iterator[list[Cost]]:
    """Collect the cost of every call of ``owner.name`` made inside the block."""
    function, costs = getattr(owner, name), []

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        cost, result = cost_of(lambda: function(*args, **kwargs))
        costs.append(cost)
        return result

    setattr(owner, name, timed)
    try:
        yield costs
    finally:
        setattr(owner, name, function)


@functools.cache
def _compile_seconds() -> list[float]:
    """A list to which JAX appends the seconds of every XLA compilation from now on."""
    import jax.monitoring

    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """Collect the seconds of every XLA compilation made inside the block."""
    every, found = _compile_seconds(), []
    before = len(every)
    try:
        yield found
    finally:
        found.extend(every[before:])


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def machine(*packages: str) -> str:
    """One line on the date, the processor and the versions."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).split(": ")[1]
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [
        datetime.date.today().isoformat(),
        f"{model}, {cores} cores",
        f"Python {platform.python_version()}",
        *versions,
    ]
    return "; ".join(parts)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table with columns of even width."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "| " + " | ".join([first.strip().ljust(widths[0]), *others]) + " |"

    rule = [("-" * w) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    print(f"\n{title}\n", line(header), line(rule), *map(line, cells), sep="\n", flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


Work = Callable[[int], Any]  # of a round, which seeds it


def in_turns(rounds: int, works: Mapping[str, Work]) -> tuple[dict[str, list[Cost]], dict]:
    """What each piece of work cost, and gave, in every round."""
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    given: dict[str, list] = {name: [] for name in works}
    for turn in range(1, rounds + 1):
        for name, work in works.items():
            cost, result = cost_of(lambda work=work, turn=turn: work(turn))
            costs[name].append(cost)
            given[name].append(result)
    return costs, given
