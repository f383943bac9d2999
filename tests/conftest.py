"""Shared set-up: helper modules of the tests can be imported, compiled programs are kept."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
