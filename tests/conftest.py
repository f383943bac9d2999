"""Shared set-up: helper modules of the tests can be imported, compiled programs are kept."""

import os
import shutil
import sys
import tempfile
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


def pytest_configure(config):
    """Programs of the tests, wrong ones on purpose among them, stay out of the user's cache."""
    if "PPL_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="ppl_toolkit-tests-")  # which the workers inherit
        os.environ["PPL_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items):
    """The tutorials first: they take longest, and no worker should be left alone with them."""
    items.sort(key=lambda item: item.path.name != "test_tutorials.py")
