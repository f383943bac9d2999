"""The course of a warm-up, segment by segment, on states made by hand."""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from ppl_toolkit.inference import warm_up
from ppl_toolkit.inference.adaptation import DualAveraging, Metric
from ppl_toolkit.inference.hmc import Draw, HMCState
from ppl_toolkit.inference.trajectory import Point
from ppl_toolkit.inference.warm_up import METRIC, OVER, STEP, TRIAL, Plan, pooled, step_size

CHAINS, DIM = 4, 2
MATRIX = np.array([[4.0, 1.8], [1.8, 1.0]])


def state_of(phase, until, log_steps=(0.0,) * CHAINS, factor=None):
    ones = np.ones(CHAINS)
    factor = np.eye(DIM) if factor is None else factor
    positions = np.arange(CHAINS * DIM, dtype=float).reshape(CHAINS, DIM)
    log_steps = np.asarray(log_steps, float)
    return HMCState(
        Point(positions, -ones, positions),
        DualAveraging(log_steps, log_steps, 0 * ones, 5 * ones, log_steps),
        Metric(np.stack([factor] * CHAINS)),
        np.full(CHAINS, phase, np.int32),
        np.full(CHAINS, until, np.int32),
    )


def segment(n, seed=0, steps=0.5, acceptance=0.8, shift=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(CHAINS, n, DIM)) @ np.linalg.cholesky(MATRIX).T
    x = x + shift * np.arange(CHAINS)[:, None, None]
    g = -x @ np.linalg.inv(MATRIX)
    stats = {
        "lp": 0.5 * np.sum(x * g, -1),
        "step_size": np.full((CHAINS, n), steps),
        "acceptance_rate": np.full((CHAINS, n), acceptance),
        "diverging": np.zeros((CHAINS, n), bool),
    }
    return Draw(x, g), stats


def test_the_longest_course():
    assert Plan.of(1000) == ((10, 30, 70, 150, 310, 605, 900), 100)
    assert Plan.of(100) == ((10, 30, 70), 30)
    assert Plan.of(19) == ((), 19)
    assert Plan.of(1000).first == (METRIC, 10)
    assert Plan.of(19).first == (STEP, 19)
    assert Plan.of(0).first == (OVER, 0)


@pytest.mark.parametrize("warmup", range(20, 3000, 31))
def test_segments_grow_and_leave_time_for_the_step_size(warmup):
    ends, last = Plan.of(warmup)
    widths = np.diff([0, *ends])
    assert ends[-1] == warmup - last
    assert np.all(widths > 0)
    assert np.all(np.diff(widths) >= 0)
    assert last == min(100, np.ceil(0.3 * warmup))


def test_the_step_size_of_an_exact_response():
    """Acceptance 2 Phi(-c eps^2): the step with the wanted acceptance, whatever was tried."""
    log_steps = np.log(np.random.default_rng(0).uniform(0.2, 1.5, 100))
    acceptance = 2 * ndtr(-0.3 * np.exp(2 * log_steps))
    for target in (0.6, 0.8, 0.95):
        found = step_size(log_steps, acceptance, target)
        np.testing.assert_allclose(2 * ndtr(-0.3 * np.exp(2 * found)), target, rtol=1e-9)


def test_chains_share_a_metric_and_a_step_size():
    state = state_of(METRIC, 10, [0.1, 0.2, 0.4, 9.0])
    new = pooled("dense", 0.8, state, *segment(10), 10, 1000)
    assert set(new.phase) == {METRIC}
    assert set(new.until) == {30}
    for leaf in (new.metric.factor, new.averaging.log_step, new.averaging.centre):
        assert np.all(leaf == leaf[:1])
    assert new.averaging.log_step[0] < 3.0  # the median: one chain that ran away does no harm
    assert np.all(new.averaging.updates == 0)


def test_a_metric_that_cannot_be_bettered_ends_the_search():
    draws = segment(60, 1)
    right = np.linalg.cholesky(MATRIX)
    new = pooled("dense", 0.8, state_of(METRIC, 155, factor=right), *draws, 155, 1000)
    assert set(new.phase) == {STEP}
    assert set(new.until) == {180}
    poor = pooled("dense", 0.8, state_of(METRIC, 155), *draws, 155, 1000)
    assert set(poor.phase) == {METRIC}
    assert set(poor.until) == {310}


def test_chains_that_disagree_go_on():
    right = np.linalg.cholesky(MATRIX)
    draws = segment(60, 1, shift=2.0)
    new = pooled("dense", 0.8, state_of(METRIC, 155, factor=right), *draws, 155, 1000)
    assert set(new.phase) == {METRIC}


def test_the_last_segment_ends_the_search_in_any_case():
    new = pooled("dense", 0.8, state_of(METRIC, 900), *segment(60), 900, 1000)
    assert set(new.phase) == {STEP}
    assert set(new.until) == {925}


def found_step(index=925):
    """The state whose step size, longer than the 0.5 it comes from, is to be tried."""
    state = state_of(STEP, index, np.log([0.5] * CHAINS))
    return pooled("dense", 0.8, state, *segment(25, steps=0.5, acceptance=0.9), index, 1000)


def tried(state, index=950, error=1.0, rough=0, **options):
    """After a trial in which some of 100 trajectories had errors that are no noise."""
    draws, stats = segment(25, **options)
    errors = np.full(stats["lp"].shape, error)
    errors.flat[:rough] = 50.0
    new = pooled("dense", 0.8, state, draws, {**stats, "max_energy_error": errors}, index, 1000)
    return new, float(new.averaging.log_step[0] - state.averaging.log_step[0])


def test_the_step_size_is_found_tried_and_corrected():
    found = found_step()
    assert set(found.phase) == {TRIAL}
    assert set(found.until) == {950}
    assert np.all(found.averaging.log_average > np.log(0.5))
    over, change = tried(found, acceptance=0.85)
    assert set(over.phase) == {OVER}
    assert set(over.until) == {0}
    assert 0.0 < change <= 0.1
    assert tried(found, acceptance=0.99)[1] == pytest.approx(0.1)
    assert tried(found, acceptance=0.85, error=5.0)[1] == 0.0  # not calm enough to grow


def test_a_step_size_that_is_not_accepted_shrinks_as_the_response_says():
    c = -ndtri(0.35)
    _, change = tried(found_step(), acceptance=0.7)
    np.testing.assert_allclose(2 * ndtr(-c * np.exp(2 * change)), 0.8, rtol=1e-9)


@pytest.mark.parametrize("rough", [1, 4, 20])
def test_rough_places_bound_the_step_size(rough):
    """Errors grow as the eighth power: one in a hundred trajectories may have them."""
    _, change = tried(found_step(), rough=rough)
    np.testing.assert_allclose((rough + 0.5) / 100 * np.exp(8 * change), 0.01, rtol=1e-9)


def test_a_step_size_that_shrank_is_tried_again_and_does_not_grow():
    found = found_step()
    again, change = tried(found, rough=4)
    assert change < -0.1
    assert set(again.phase) == {TRIAL}
    assert set(again.until) == {1000}
    over, change = tried(again, 1000, acceptance=0.95)
    assert change == 0.0
    assert set(over.phase) == {OVER}
    late, _ = tried(found_step(975), 1000, rough=4)  # no time is left
    assert set(late.phase) == {OVER}


def test_divergences_are_rough_and_errors_are_read_off_acceptance_where_need_be():
    found = found_step()
    draws, stats = segment(25)
    stats["diverging"][2, 3] = True
    diverged = pooled("dense", 0.8, found, draws, stats, 950, 1000)
    stats["diverging"][2, 3], stats["acceptance_rate"][2, 3] = False, np.exp(-11.0)
    refused = pooled("dense", 0.8, found, draws, stats, 950, 1000)
    _, change = tried(found, rough=1)
    for state in (diverged, refused):
        np.testing.assert_allclose(
            state.averaging.log_step - found.averaging.log_step, change, atol=1e-9
        )


def test_a_frozen_chain_goes_on_from_another():
    draws, stats = segment(25)
    draws.position[2] = draws.position[2, :1]
    state = state_of(METRIC, 30)
    new = pooled("dense", 0.8, state, draws, stats, 30, 1000)
    np.testing.assert_array_equal(new.point.position[2], state.point.position[3])
    np.testing.assert_array_equal(new.point.position[:2], state.point.position[:2])


def test_a_chain_that_has_not_arrived_goes_on_from_another():
    draws, stats = segment(25)
    stats["lp"][3] -= 1000.0
    state = state_of(METRIC, 30)
    new = pooled("dense", 0.8, state, draws, stats, 30, 1000)
    np.testing.assert_array_equal(new.point.position[3], state.point.position[0])


def test_several_chains_that_have_not_arrived_go_on_from_others():
    draws, stats = segment(25)
    stats["lp"][[1, 3]] -= 40.0
    state = state_of(METRIC, 30)
    new = pooled("dense", 0.8, state, draws, stats, 30, 1000)
    np.testing.assert_array_equal(new.point.position, state.point.position[[0, 2, 2, 0]])


def test_a_wide_peak_stays_beside_a_narrow_and_higher_one():
    """Lower by 33, but wider by 2 log(10,000) = 18: less probable by 15, which is not enough."""
    draws, stats = segment(25)
    draws.position[:3] /= 1e4
    stats["lp"][:3] += 2 * np.log(1e4) + 15.0
    state = state_of(METRIC, 30)
    new = pooled("dense", 0.8, state, draws, stats, 30, 1000)
    np.testing.assert_array_equal(new.point.position, state.point.position)


def test_gradients_that_are_no_numbers_change_no_metric():
    draws, stats = segment(25)
    draws.gradient[0, 0, 0] = np.nan
    new = pooled("dense", 0.8, state_of(METRIC, 30), draws, stats, 30, 1000)
    np.testing.assert_array_equal(new.metric.factor[0], np.eye(DIM))
    assert set(new.until) == {70}


def test_one_chain_learns_from_itself():
    draws, stats = segment(160)
    one = HMCState(*[
        type(part)(*[leaf[:1] for leaf in part]) if isinstance(part, tuple) else part[:1]
        for part in state_of(METRIC, 257, factor=np.linalg.cholesky(MATRIX))
    ])  # fmt: skip
    alone = Draw(draws.position[:1], draws.gradient[:1])
    new = pooled("dense", 0.8, one, alone, {k: v[:1] for k, v in stats.items()}, 257, 1000)
    assert new.metric.factor.shape == (1, DIM, DIM)
    assert set(new.phase) == {STEP}


def test_single_precision_stays():
    state = state_of(METRIC, 30)
    small = HMCState(*[
        type(p)(*[leaf.astype(np.float32) for leaf in p]) if isinstance(p, tuple) else p
        for p in state
    ])  # fmt: skip
    new = pooled("dense", 0.8, small, *segment(25), 30, 1000)
    assert new.metric.factor.dtype == new.averaging.log_step.dtype == np.float32
    assert new.phase.dtype == warm_up.np.int32
