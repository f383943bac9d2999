"""Shared set-up: helper modules of the tests can be imported, compiled programs are kept."""

import sys
from pathlib import Path

import jax
import pytest

from ppl_toolkit import executables
from ppl_toolkit.models import kept

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """XLA maps every kernel on its own, and aborts a process with 65,530 maps."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        kept.clear()
        executables.clear()


def pytest_collection_modifyitems(items):
    """The tutorials first: they take longest, and no worker should be left alone with them."""
    items.sort(key=lambda item: item.path.name != "test_tutorials.py")
