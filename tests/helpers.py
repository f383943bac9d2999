"""What many tests need: calls without warnings and progress bars, and a count of compilations."""

import warnings

import jax
import pytest

import ppl_toolkit as ppl
from ppl_toolkit.errors import InferenceWarning

compilations: list[str] = []
"""One entry for everything that XLA compiled in this process since the list was last cleared."""

jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
)


def others_slow(cases, *quick):
    """The cases of a test, or tuples of several arguments: those not named are slow tests."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]),
            marks=[] if case in quick else [pytest.mark.slow],
        )
        for case in cases
    ]


def quietly(call, *args, **options):
    """``call(*args, **options)`` without findings as warnings, and without a progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return call(*args, **{"progress": False, **options})


def quiet(*args, **options):
    """`ppl.infer`, quietly."""
    return quietly(ppl.infer, *args, **options)
