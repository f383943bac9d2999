"""Two posteriors that need no files: eight schools, and a regression of children's test scores."""

from collections.abc import Callable

import numpy as np
from peers import Data
from posteriordb import eight_schools_noncentered, kidscore_momhsiq

__all__ = ["EXAMPLES", "new_data"]


def _eight_schools() -> Data:
    sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Data((sigma,), {"y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])})


def _test_scores() -> Data:
    """Made-up scores of 434 children, like the published ones."""
    rng = np.random.default_rng(0)
    schooling = (rng.uniform(size=434) < 0.79).astype(float)
    iq = rng.normal(100.0, 15.0, 434)
    score = rng.normal(25.0 + 6.0 * schooling + 0.56 * iq, 18.0)
    return Data((schooling, iq), {"kid_score": score})


EXAMPLES: dict[str, tuple[Callable, Data]] = {
    "eight schools": (eight_schools_noncentered, _eight_schools()),
    "test scores": (kidscore_momhsiq, _test_scores()),
}


def new_data(data: Data) -> Data:
    """Other data of the same shapes: the same rows the other way round."""
    return data.with_arrays([x[::-1].copy() for x in data.arrays()])
