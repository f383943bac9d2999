"""What chains in lock step share, and how they learn it: exact where it can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import qmc

from ppl_toolkit.inference import ensemble
from ppl_toolkit.inference.adaptation import DualAveraging, LowRank, Metric
from ppl_toolkit.inference.chees import ChEES
from ppl_toolkit.inference.ensemble import EnsembleState, Length, chees, chees_gradient, halton
from ppl_toolkit.inference.hmc import Draw
from ppl_toolkit.inference.mams import MAMS
from ppl_toolkit.inference.trajectory import Point, hamiltonian
from ppl_toolkit.inference.warm_up import METRIC, OVER, STEP, Drawn


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_the_shares_are_those_of_van_der_corput():
    found = jax.vmap(lambda i: halton(i, jnp.float64))(jnp.arange(2000))
    expected = qmc.Halton(1, scramble=False).random(2001)[1:, 0]  # which begins with zero
    np.testing.assert_array_equal(found, expected)
    late = halton(jnp.asarray(2**31 - 2), jnp.float64)
    np.testing.assert_allclose(late, 1.0 - 2.0**-31, rtol=1e-12)
    assert halton(jnp.asarray(5, jnp.int32), jnp.float32).dtype == jnp.float32


SCALES = np.array([1.0, 0.5, 2.0])


def exact_ends(z, u, time):
    """Hamiltonian dynamics of independent normals, and its velocity, in closed form."""
    phase = time / SCALES
    ends = z * np.cos(phase) + u * SCALES * np.sin(phase)
    return ends, u * np.cos(phase) - z / SCALES * np.sin(phase)


@pytest.mark.parametrize("time", [0.3, 1.1, 2.4, 5.0])
def test_the_gradient_is_that_of_the_criterion(time):
    """By differences along exact trajectories, the centre held fixed."""
    rng = np.random.default_rng(0)
    z, u = rng.normal(size=(2, 50, 3))
    ends, velocity = exact_ends(z, u, time)

    def criterion(time):
        return float(chees(z - z.mean(0), exact_ends(z, u, time)[0] - ends.mean(0)))

    numeric = (criterion(time + 1e-5) - criterion(time - 1e-5)) / 2e-5
    found = chees_gradient(z, ends, velocity, np.ones(50))
    np.testing.assert_allclose(found, numeric, rtol=1e-8)


def test_the_gradient_along_trajectories_as_they_are_run():
    """Five steps of a size and of one a little longer, not Gaussian, with a metric: the same."""
    metric = Metric(jnp.asarray([[1.0, 0.0], [0.4, 0.6]]))

    def density(q):
        return -jnp.sum(q**4) / 4 - 0.5 * q[0] * q[1]

    gradient = jax.value_and_grad(density)
    keys = jax.random.split(jax.random.key(0), 40)
    starts = jax.random.normal(jax.random.key(1), (40, 2))

    def ends(step):
        def one(key, q):
            return hamiltonian(key, Point(q, *gradient(q)), gradient, metric, step, 500).end

        return jax.vmap(one)(keys, starts)

    at = ends(0.002)
    z, after = metric.coordinates(starts), metric.coordinates(at.point.position)

    def criterion(step):
        other = metric.coordinates(ends(step).point.position)
        return float(chees(z - z.mean(0), other - after.mean(0)))

    numeric = (criterion(0.002 + 1e-7) - criterion(0.002 - 1e-7)) / (2e-7 * 500)
    found = chees_gradient(z, after, at.momentum, jnp.ones(40))
    np.testing.assert_allclose(found, numeric, rtol=1e-4)  # the leapfrog's own error


def test_chains_count_by_their_acceptance_and_broken_ones_not_at_all():
    rng = np.random.default_rng(1)
    z, u = rng.normal(size=(2, 30, 3))
    ends, velocity = exact_ends(z, u, 1.0)
    weights = np.repeat([1.0, 0.0], 15)
    half = ends.copy()
    half[15:] += 100.0
    found = chees_gradient(z, half, velocity, weights)
    first = np.arange(15)
    after = ends[first] - ends[first].mean(0)
    change = (after**2).sum(1) - ((z - z.mean(0))[first] ** 2).sum(1)
    expected = np.mean(change * (after * velocity[first]).sum(1))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    half[15:], velocity[15] = np.inf, np.nan
    np.testing.assert_allclose(chees_gradient(z, half, velocity, np.ones(30)), expected, rtol=1e-9)
    nobody = chees_gradient(z, half, velocity, np.zeros(30))
    assert nobody == 0.0


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low rank"])
def test_coordinates_undo_the_metric(kind):
    rng = np.random.default_rng(2)
    metric = {
        "diagonal": Metric(jnp.asarray([0.5, 2.0, 3.0])),
        "dense": Metric(jnp.asarray(rng.normal(size=(3, 3)) + 2.0 * np.eye(3))),
        "low rank": LowRank(
            jnp.asarray([0.5, 2.0, 3.0]), jnp.asarray([[0.6, 0.0, 0.8]]), jnp.asarray([1.7])
        ),
    }[kind]
    z = jnp.asarray(rng.normal(size=(5, 3)))
    x = jax.vmap(metric.velocity)(z)
    np.testing.assert_allclose(metric.coordinates(x), z, rtol=1e-10)


def test_the_acceptance_of_an_ensemble():
    """The harmonic mean of ChEES, to which one chain of many adds twenty at most; the mean."""
    a = np.array([0.5, 1.0, 0.8])
    np.testing.assert_allclose(ChEES().mean_acceptance(a), 3 / (2 + 1 + 1.25), rtol=1e-12)
    np.testing.assert_allclose(MAMS().mean_acceptance(a), a.mean(), rtol=1e-12)
    stuck = ChEES().mean_acceptance(np.array([0.0] + 63 * [1.0]))
    np.testing.assert_allclose(stuck, 64 / (20 + 63), rtol=1e-12)


# -- warm-up ------------------------------------------------------------------------------------

CHAINS = 16
ROOT = np.linalg.cholesky(np.array([[4.0, 1.8], [1.8, 1.0]]))


def state_of(phase, until):
    ones = np.ones(CHAINS)
    moments = jax.tree.map(lambda _: np.zeros(CHAINS), ensemble._ASCENT.init(0.0))
    return EnsembleState(
        Point(np.zeros((CHAINS, 2)), -ones, np.zeros((CHAINS, 2))),
        DualAveraging(-ones, -ones, 0 * ones, 5 * ones, 0 * ones),
        Length(0.3 * ones, 0.4 * ones, 9 * ones, moments),
        Metric(np.stack([np.eye(2)] * CHAINS)),
        np.full(CHAINS, phase, np.int32),
        np.full(CHAINS, until, np.int32),
    )


def segment(n, seed=0, still=()):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(CHAINS, n, 2))
    x = z @ ROOT.T
    x[list(still)] = x[list(still), :1]
    g = -x @ np.linalg.inv(ROOT @ ROOT.T)
    stats = {"lp": 0.5 * np.sum(x * g, -1)}
    return Draw(x, g), stats


@pytest.mark.parametrize("method", [ChEES(), MAMS()])
def test_the_metric_comes_from_all_chains_and_the_length_is_a_quarter_turn_of_it(method):
    drawn, stats = segment(40)
    new = method.pool(state_of(METRIC, 26), drawn, stats, 26, 400)
    factor = new.metric.factor[0]
    np.testing.assert_allclose(factor @ factor.T, ROOT @ ROOT.T, rtol=0.15)
    quarter = 0.5 * np.pi * (1.0 if isinstance(method, ChEES) else np.sqrt(2))
    np.testing.assert_allclose(np.exp(new.length.log_average), quarter, rtol=0.12)
    for leaf in jax.tree.leaves(new._replace(point=())):
        assert np.all(leaf == leaf[:1])
    assert set(new.length.updates) == {0.0}


def test_halves_of_an_ensemble_are_centred_by_their_own_means():
    """However short chains are, how far apart they are counts; that halves are does not."""
    x = np.arange(CHAINS, dtype=float)[:, None, None] * np.ones((1, 3, 2))
    drawn = Drawn(x, -x, {})
    for own, _ in drawn.folds(together=False):
        np.testing.assert_array_equal(own, 0.0)
    for number, (own, _) in enumerate(drawn.folds(together=True)):
        half = x[8 * number : 8 * number + 8]
        np.testing.assert_allclose(own, (half - half.mean((0, 1))).reshape(-1, 2))


def test_the_course_of_warm_up():
    """Segments until metric and chains are good, then at most a hundred iterations, then draws."""
    method = ChEES()
    first = method.pool(state_of(METRIC, 10), *segment(4), 10, 400)
    assert (set(first.phase), set(first.until)) == ({METRIC}, {30})  # too few to tell
    state = method.pool(state_of(METRIC, 30), *segment(40), 30, 400)
    state = method.pool(state, *segment(40, 1), 70, 400)
    assert (set(state.phase), set(state.until)) == ({STEP}, {170})
    state = method.pool(state, *segment(40, 2), 170, 400)
    assert (set(state.phase), method.pooled_at(state)) == ({OVER}, 0)
    late = method.pool(state_of(METRIC, 300), *segment(4), 300, 400)
    assert (set(late.phase), set(late.until)) == ({STEP}, {400})


def test_a_chain_that_stands_still_goes_on_from_another_one():
    drawn, stats = segment(40, still=[3])
    state = state_of(METRIC, 26)
    positions = np.arange(2.0 * CHAINS).reshape(CHAINS, 2)
    state = state._replace(point=state.point._replace(position=positions))
    new = ChEES().pool(state, drawn, stats, 26, 400)
    np.testing.assert_array_equal(new.point.position[3], positions[4])
    np.testing.assert_array_equal(np.delete(new.point.position, 3, 0), np.delete(positions, 3, 0))


def test_the_length_goes_up_the_gradient_between_bounds():
    length = Length.start(jnp.asarray(0.0))
    up = length.update(jnp.asarray(5.0), -1.0, 1.0)
    np.testing.assert_allclose(up.log_length, 0.025, rtol=1e-6)
    down = length.update(jnp.asarray(-5.0), -1.0, 1.0)
    np.testing.assert_allclose(down.log_length, -0.025, rtol=1e-6)
    assert length.update(jnp.asarray(5.0), -1.0, 0.01).log_length == 0.01
    same = length.update(jnp.asarray(np.nan), -1.0, 1.0)
    assert same.log_length == 0.0
    steps = length
    for _ in range(3):
        steps = steps.update(jnp.asarray(1.0), -1.0, 1.0)
    x = 0.025 * np.arange(1, 4)
    expected = x[0]
    for t in (2, 3):
        expected += t**-0.5 * (x[t - 1] - expected)
    np.testing.assert_allclose(steps.log_average, expected, rtol=1e-6)
