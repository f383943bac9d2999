"""Shared set-up: helper modules of the tests can be imported, compiled programs are kept."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """The tutorials first: they take longest, and no worker should be left alone with them."""
    items.sort(key=lambda item: item.path.name != "test_tutorials.py")
