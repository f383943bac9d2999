"""Simultaneous bands of uniform ranks, against published values, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ppl_toolkit.diagnostics.ecdf import band, coverage, p_value, pointwise_level


def grid(count):
    return np.arange(1, count + 1) / count


@pytest.mark.parametrize(
    ("size", "points", "level"), [(50, 50, 0.0064), (100, 50, 0.0047), (250, 100, 0.0033)]
)
def test_pointwise_levels_of_joint_95_percent(size, points, level):
    assert pointwise_level(size, grid(points), 0.95) == pytest.approx(level, abs=6e-5)


def brute(size, bins):
    """Probability of every vector of cumulative counts, by enumeration of multinomial counts."""
    for counts in itertools.product(range(size + 1), repeat=bins):
        if sum(counts) == size:
            ways = math.factorial(size) / math.prod(map(math.factorial, counts))
            yield np.cumsum(counts), ways / bins**size


def test_coverage_and_p_values_by_enumeration():
    size, bins = 5, 4
    z = grid(bins)

    def extremeness(cumulative):
        left = stats.binom.cdf(cumulative, size, z)
        right = stats.binom.sf(cumulative - 1, size, z)
        return np.minimum(left, right)[:-1].min()

    table = [(c, p, extremeness(c)) for c, p in brute(size, bins)]
    for level in (0.05, 0.2, 0.6):
        low, high = stats.binom.ppf(level / 2, size, z), stats.binom.ppf(1 - level / 2, size, z)
        inside = sum(p for c, p, _ in table if ((c >= low) & (c <= high)).all())
        assert coverage(level, size, z) == pytest.approx(inside, abs=1e-12)
    for c, _, extreme in table[::7]:
        exact = sum(p for _, p, other in table if other <= extreme * (1 + 1e-12))
        assert p_value(c, size, z) == pytest.approx(exact, abs=1e-10)


@pytest.mark.slow
def test_p_values_are_uniform_or_conservative():
    """1000 sets of uniform ranks: P(p <= a) <= a, with 4 standard errors of room."""
    rng = np.random.default_rng(0)
    size, bins, sets = 60, 20, 1000
    p = np.array(
        [
            p_value(np.cumsum(np.bincount(rng.integers(0, bins, size), minlength=bins)), size,
                    grid(bins))
            for _ in range(sets)
        ]
    )  # fmt: skip
    for level in (0.01, 0.05, 0.2, 0.5):
        share = (p <= level).mean()
        error = np.sqrt(level * (1 - level) / sets)
        assert share < level + 4 * error
        assert share > 0.6 * level - 4 * error  # and not wildly so: counts are discrete


def test_the_band_holds_for_simulated_ranks():
    rng = np.random.default_rng(1)
    size, bins, sets = 100, 50, 4000
    made = band(size, grid(bins), 0.95)
    counts = np.cumsum(rng.multinomial(size, np.full(bins, 1 / bins), sets), axis=1)
    held = ((counts >= made.low) & (counts <= made.high)).all(axis=1).mean()
    assert abs(held - coverage(pointwise_level(size, grid(bins)), size, grid(bins))) < 4 * 0.0035
    assert 0.94 < held < 0.97


def test_skewed_and_dispersed_ranks_are_seen():
    size, bins = 300, 20
    z = grid(bins)
    uniform = np.round(size * z)
    assert p_value(uniform, size, z) > 0.99
    for law in (stats.beta(1.5, 1.0), stats.beta(2.0, 2.0), stats.beta(0.5, 0.5)):
        assert p_value(np.round(size * law.cdf(z)), size, z) < 1e-3


@pytest.mark.parametrize("size", range(1, 9))
def test_bands_of_a_few_ranks(size):
    made = band(size, grid(size), 0.95)
    assert (made.low <= made.high).all()
    assert coverage(pointwise_level(size, grid(size)), size, grid(size)) >= 0.9
