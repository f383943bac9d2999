"""Threads for the units of a run, and Ctrl-C while they work."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Interrupts", "workers"]


@contextlib.contextmanager
def workers(count: int) -> Iterator[concurrent.futures.Executor]:
    """Threads for the units, among which the matrix library (BLAS) starts none of its own.

    Its threads would wait for each other in busy loops where cores are short, for longer than a
    small factorisation takes; and its sums would depend on their number.
    """
    with (
        _libraries(len(sys.modules)).limit(limits=1, user_api="blas"),
        concurrent.futures.ThreadPoolExecutor(max(count, 1)) as pool,
    ):
        yield pool


@functools.lru_cache(1)
def _libraries(modules: int) -> Any:
    """The matrix libraries in use; looked for again once more modules are loaded."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


class Interrupts:
    """Turns the first Ctrl-C of a run into a request to stop; the second one interrupts.

    Signals reach the main thread only; elsewhere this does nothing.
    """

    requested = False

    def __enter__(self) -> Interrupts:
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
