"""Importance weights inside the compiled program, and the climb, against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import random

from ppl_toolkit import pareto
from ppl_toolkit.inference.climbing import climb, highest, start_within
from ppl_toolkit.inference.importance import Sums, smoothed


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def agree(seen, expected, rtol=1e-10, atol=0.0):
    np.testing.assert_allclose(np.asarray(seen), np.asarray(expected), rtol=rtol, atol=atol)


# --- weights ------------------------------------------------------------------------------------

smooth = jax.jit(smoothed)


@pytest.mark.parametrize("heaviness", [0.1, 0.4, 0.9, 1.5])
def test_smoothed_weights_are_those_on_the_host(heaviness):
    rng = np.random.default_rng(int(100 * heaviness))
    logs = 7.0 - heaviness * np.log(rng.random(400))
    shares, khat = smooth(logs)
    expected, k = pareto.psis(logs)
    agree(shares, expected)
    agree(khat, k)
    agree(pareto.khat(logs), k)


def test_k_tells_the_tail_of_the_weights():
    """Weights U^-k have a Pareto tail of shape k: means over 40 samples, four standard errors."""
    rng = np.random.default_rng(1)
    for k in (0.3, 0.8):
        found = [float(smooth(-k * np.log(rng.random(1000)))[1]) for _ in range(40)]
        assert abs(np.mean(found) - k) < 4 * np.std(found) / np.sqrt(40) + 0.03  # prior towards 1/2


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (np.zeros(60), 0.0),  # exact
        (np.arange(60) * 1e-9, 0.0),  # up to rounding
        (np.full(60, -np.inf), np.inf),  # p is zero wherever q draws
        (np.where(np.arange(60) < 57, -np.inf, 0.0), np.inf),  # nearly so
        (np.where(np.arange(60) == 3, np.inf, 0.0), np.inf),
        (np.where(np.arange(60) == 3, np.nan, 0.0), 0.0),  # a zero among equals
        (np.full(60, np.nan), np.inf),
    ],
)
def test_k_where_there_is_no_tail(logs, expected):
    assert float(smooth(logs)[1]) == expected == pareto.khat(logs)


numbers = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e-300]))


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=60, max_size=60))
def test_k_is_never_nan(logs):
    shares, khat = smooth(np.array(logs))
    assert not np.isnan(khat)
    assert not np.isnan(np.asarray(shares)).any()
    assert not np.isnan(pareto.khat(logs))


def test_sums_of_weights_give_the_evidence_and_its_error():
    rng = np.random.default_rng(0)
    logs = 300.0 + rng.normal(size=(3, 50))
    sums = Sums.start(jnp.float64)
    for part in logs:
        sums = sums.add(jnp.asarray(part))
    w = np.exp(logs.ravel() - 300.0)
    agree(sums.log_evidence(), 300.0 + np.log(w.mean()))
    agree(sums.log_evidence_sd(), w.std() / w.mean() / np.sqrt(150))


# --- climbing -----------------------------------------------------------------------------------


def test_climbs_end_at_the_top():
    def valley(x):
        return -jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    end, path = jax.jit(lambda x: climb(valley, x, 300, keeps_path=True))(jnp.full(6, -1.5))
    agree(end.position, np.ones(6), rtol=1e-7)
    n = int(path.length)
    assert 10 < n < 200
    agree(path.positions[0], np.full(6, -1.5))
    agree(path.gradients[3], jax.grad(valley)(path.positions[3]))
    assert not np.any(path.positions[n:])
    heights = np.array([valley(x) for x in path.positions[:n]])
    assert np.all(np.diff(heights) > -1e-12)
    agree(end.value, heights.max(), atol=1e-12)


@pytest.mark.parametrize("outside", [np.nan, -np.inf, np.inf])
def test_a_climb_stays_where_the_function_is_finite(outside):
    """The top, at 1.8, lies close to the edge of the domain."""

    def edge(x):
        return jnp.where(jnp.all(x < 1.9), -1e3 * jnp.sum((x - 1.8) ** 2), outside)

    if outside == np.inf:  # an infinite density is no maximum, but no reason to crash either
        end, _ = climb(edge, jnp.zeros(3), 100)
        assert np.isfinite(end.position).all()
        return
    agree(climb(edge, jnp.zeros(3), 100)[0].position, np.full(3, 1.8), rtol=1e-6)


def test_the_highest_of_several_climbs():
    def peaks(x):
        return jnp.logaddexp(-20 * jnp.sum((x - 1.5) ** 2), 1.0 - 20 * jnp.sum((x + 1.5) ** 2))

    @jax.jit
    def find(starts):
        return highest(peaks, random.key(0), starts, (jnp.array([1.4]), True), 2.0, 100)

    agree(find(8).position, [-1.5], rtol=1e-6)
    agree(find(1).position, [1.5], rtol=1e-6)  # the given one
    assert find(8).evaluations > find(1).evaluations


def test_starts_have_a_finite_value_and_lie_within_the_radius():
    def positive(x):
        return jnp.sum(jnp.log(x))

    found = jax.vmap(lambda key: start_within(positive, key, jnp.zeros(2), 3.0))(
        random.split(random.key(0), 20)
    )
    assert np.all((found > 0) & (found < 3))
