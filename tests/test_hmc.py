"""HMC and NUTS: the integrator, the tree, the choice of a point, and invariance, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import COVARIANCE, gaussian, require_draws
from helpers import others_slow
from scipy import stats

from ppl_toolkit.inference import hmc
from ppl_toolkit.inference.adaptation import Metric
from ppl_toolkit.inference.hmc import hmc_transition, nuts_transition
from ppl_toolkit.inference.trajectory import Phase, Point, energy_of, leapfrog


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def quartic(q):
    """Not Gaussian: trajectories do not close, energies vary."""
    return -jnp.sum(q**4) / 4 - 0.5 * jnp.sum(q[1:] * q[:-1])


def start_at(density, q, p):
    value, gradient = jax.value_and_grad(density)(q)
    return Phase(Point(jnp.asarray(q), value, gradient), jnp.asarray(p))


def inverse_of(kind, dim=3):
    if kind == "diagonal":
        return np.diag(np.linspace(0.5, 2.0, dim))
    root = np.random.default_rng(1).normal(size=(dim, dim))
    return root @ root.T + np.eye(dim)


def metric_of(kind, dim=3):
    inverse = inverse_of(kind, dim)
    return Metric.of(jnp.asarray(inverse if kind == "dense" else np.diag(inverse)))


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
class TestLeapfrog:
    def test_reversible(self, kind):
        gradient, metric = jax.value_and_grad(quartic), metric_of(kind)
        z = start_at(quartic, np.array([0.3, -1.0, 0.8]), np.array([1.0, 0.2, -0.5]))
        there = z
        for _ in range(7):
            there = leapfrog(gradient, metric, 0.1, there)
        assert np.linalg.norm(there.point.position - z.point.position) > 0.1
        for _ in range(7):
            there = leapfrog(gradient, metric, -0.1, there)
        np.testing.assert_allclose(there.point.position, z.point.position, atol=1e-13)
        np.testing.assert_allclose(there.momentum, z.momentum, atol=1e-13)

    def test_volume_is_preserved(self, kind):
        gradient, metric = jax.value_and_grad(quartic), metric_of(kind)

        def step(x):
            value, slope = gradient(x[:3])
            z = leapfrog(gradient, metric, 0.3, Phase(Point(x[:3], value, slope), x[3:]))
            return jnp.concatenate([z.point.position, z.momentum])

        jacobian = jax.jacobian(step)(jnp.asarray([0.3, -1.0, 0.8, 1.0, 0.2, -0.5]))
        np.testing.assert_allclose(np.linalg.det(jacobian), 1.0, rtol=1e-12)

    def test_energy_error_is_of_second_order(self, kind):
        gradient, metric = jax.value_and_grad(quartic), metric_of(kind)
        z = start_at(quartic, np.array([0.3, -1.0, 0.8]), np.array([1.0, 0.2, -0.5]))
        errors = []
        for steps in (50, 100):
            end = z
            for _ in range(steps):
                end = leapfrog(gradient, metric, 1.0 / steps, end)
            errors.append(abs(float(energy_of(end) - energy_of(z))))
        assert 3.8 < errors[0] / errors[1] < 4.2


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_the_coordinates_are_those_of_the_inverse_mass_matrix(kind):
    """With x = L z and M^-1 = L L^T, momenta p = L^-T z' move x by M^-1 p."""
    metric = metric_of(kind)
    inverse = inverse_of(kind)
    p = jnp.asarray([1.0, -2.0, 0.5])
    np.testing.assert_allclose(metric.velocity(metric.force(p)), inverse @ p, rtol=1e-12)
    np.testing.assert_allclose(metric.scales(), np.sqrt(np.diag(inverse)), rtol=1e-12)


def orbit(density, metric, step, z, size):
    gradient = jax.jit(jax.value_and_grad(density))
    points = []
    for _ in range(size):
        z = leapfrog(gradient, metric, step, z)
        points.append(z)
    return points


def turns_by_definition(points, kind):
    """Index of the first leaf at which some complete binary subtree ending there has turned.

    The definition has momenta of law N(0, M) and velocities M^-1 p.
    """
    inverse = inverse_of(kind)
    root = np.linalg.inv(np.linalg.cholesky(inverse))  # p = L^-T z
    momenta = np.array([z.momentum for z in points]) @ root

    def turned(first, last):
        left, right = momenta[first], momenta[last]
        span = inverse @ (momenta[first : last + 1].sum(0) - (left + right) / 2)
        return left @ span <= 0 or right @ span <= 0

    for last in range(len(points)):
        width = 2
        while (last + 1) % width == 0:
            if turned(last - width + 1, last):
                return last
            width *= 2
    return None


@pytest.mark.parametrize(
    ("density", "kind"),
    [
        (gaussian, "dense"),
        pytest.param(quartic, "diagonal", marks=pytest.mark.slow),
        pytest.param(gaussian, "diagonal", marks=pytest.mark.slow),
        pytest.param(quartic, "dense", marks=pytest.mark.slow),
    ],
)
def test_the_iterative_tree_stops_where_the_recursive_definition_does(density, kind):
    """60 orbits: the leaf count, the momentum sum and the weight equal the brute-force ones."""
    metric, depth = metric_of(kind), 7
    gradient = jax.value_and_grad(density)
    grow = jax.jit(
        lambda key, z, step: hmc._subtree(
            key, 0, gradient, metric, step, z, energy_of(z), jnp.int32(2**depth), depth
        )
    )
    rng = np.random.default_rng(5)
    stops = []
    for number in range(60):
        step = rng.choice([-1, 1]) * rng.uniform(0.02, 0.25)
        z = start_at(density, rng.normal(size=3), rng.normal(size=3))
        leaves, _ = grow(jax.random.key(number), z, step)
        points = orbit(density, metric, step, z, 2**depth)
        stop = turns_by_definition(points, kind)
        stops.append(stop)
        count = 2**depth if stop is None else stop + 1
        assert int(leaves.size) == count
        assert bool(leaves.turning) == (stop is not None)
        energies = np.array([float(energy_of(p)) for p in points[:count]])
        errors = energies - float(energy_of(z))
        np.testing.assert_allclose(leaves.log_weight, np.logaddexp.reduce(-errors), rtol=1e-9)
        np.testing.assert_allclose(
            leaves.momentum_sum, sum(np.asarray(p.momentum) for p in points[:count]), atol=1e-9
        )
        np.testing.assert_allclose(leaves.acceptance, np.minimum(1, np.exp(-errors)).sum())
    assert len(set(stops)) >= 6, "the orbits must differ"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_one_block_of_the_generator_is_a_uniform_number(dtype):
    """Kolmogorov-Smirnov at level 1e-4 over numbers of one key and over keys; never zero."""
    keys = jax.random.split(jax.random.key(2), 20_000)
    over_keys = jax.vmap(lambda key: hmc._uniform(key, 3, dtype))(keys)
    over_numbers = jax.vmap(lambda n: hmc._uniform(keys[0], n, dtype))(jnp.arange(20_000))
    for numbers in (over_keys, over_numbers):
        assert numbers.dtype == dtype
        assert numbers.min() > 0.0
        assert numbers.max() <= 1.0
        assert stats.kstest(np.asarray(numbers, float), "uniform").pvalue > 1e-4


def test_the_point_of_a_subtree_is_chosen_with_probability_proportional_to_its_weight():
    """20000 choices among 8 leaves of unequal weight: chi-square, false alarm 1e-4."""
    metric = metric_of("diagonal")
    gradient = jax.value_and_grad(quartic)
    z = start_at(quartic, np.array([2.1, 2.1, 0.4]), np.array([0.4, -1.9, 0.3]))
    step, energy = 0.24, energy_of(z)
    keys = jax.random.split(jax.random.key(0), 20_000)
    points = orbit(quartic, metric, step, z, 8)
    assert turns_by_definition(points, "diagonal") is None
    leaves, _ = jax.jit(
        jax.vmap(lambda k: hmc._subtree(k, 5, gradient, metric, step, z, energy, jnp.int32(8), 3))
    )(keys)
    positions = np.array([p.point.position for p in points])
    chosen = np.linalg.norm(leaves.chosen.position[:, None] - positions, axis=-1).argmin(axis=1)
    weights = np.exp(-np.array([float(energy_of(p)) for p in points]))
    expected = weights / weights.sum()
    assert expected.max() / expected.min() > 1.5, "the weights must be unequal"
    counts = np.bincount(chosen, minlength=8)
    assert stats.chisquare(counts, expected * len(keys)).pvalue > 1e-4
    energies = np.array([float(energy_of(p)) for p in points])
    np.testing.assert_allclose(leaves.energy, energies[chosen], rtol=1e-12)


def transitions(kind, step):
    def nuts(key, point, gradient, metric):
        return nuts_transition(key, point, gradient, metric, step, 6)

    def plain(key, point, gradient, metric):
        return hmc_transition(key, point, gradient, metric, step, 5)

    return {"nuts": nuts, "hmc": plain}[kind]


@pytest.mark.parametrize(
    ("kind", "step"),
    others_slow(
        [(kind, step) for kind in ("nuts", "hmc") for step in (0.35, 0.9)],
        ("nuts", 0.9), ("hmc", 0.9),  # where mistakes show most
    ),
)  # fmt: skip
def test_one_transition_leaves_a_gaussian_invariant(kind, step):
    """Exact draws stay exact draws after one transition.

    40000 exact starts, one transition each; the squared Mahalanobis radius, and each coordinate
    and its product with the start, keep their known laws. Eight z-tests and two KS tests at 1e-5
    each: false alarm below 2e-4 (seeds are fixed). Wrong acceptance, wrong orbit choice or a
    missing Jacobian shift these means by many standard errors at the large step.
    """
    n = 40_000
    root = np.linalg.cholesky(COVARIANCE)
    rng = np.random.default_rng(8)
    starts = jnp.asarray(rng.normal(size=(n, 3)) @ root.T)
    metric = metric_of("diagonal")
    move, gradient = transitions(kind, step), jax.value_and_grad(gaussian)

    @jax.jit
    @jax.vmap
    def once(key, q):
        value, slope = gradient(q)
        point, info = move(key, Point(q, value, slope), gradient, metric)
        return point.position, info

    ends, info = once(jax.random.split(jax.random.key(1), n), starts)
    ends = np.asarray(ends)
    assert 0.3 < np.asarray(info["acceptance_rate"]).mean() < 0.999
    assert (np.abs(ends - starts).max(axis=1) > 0).mean() > 0.3
    require_draws(ends)


@pytest.mark.parametrize("kind", ["nuts", "hmc"])
def test_one_transition_leaves_a_skewed_law_invariant(kind):
    """Gamma(2) on the log scale, 40000 exact starts; KS at 1e-5 (fixed seed)."""
    n = 40_000
    rng = np.random.default_rng(3)
    starts = jnp.asarray(np.log(rng.gamma(2.0, size=(n, 1))))

    def density(u):
        return jnp.sum(2.0 * u - jnp.exp(u))

    metric = Metric.of(jnp.ones(1))
    move, gradient = transitions(kind, 0.9), jax.value_and_grad(density)

    @jax.jit
    @jax.vmap
    def once(key, q):
        value, slope = gradient(q)
        return move(key, Point(q, value, slope), gradient, metric)[0].position

    ends = np.asarray(once(jax.random.split(jax.random.key(2), n), starts))[:, 0]
    assert stats.kstest(np.exp(ends), stats.gamma(2.0).cdf).pvalue > 1e-5


def test_the_newer_half_of_a_trajectory_is_preferred():
    """Biased progressive sampling: of halves of equal weight the new one is taken for certain, so
    that a transition of two doublings never stays where it was."""
    step, draws = 1e-4, 4000
    start = start_at(gaussian, np.array([0.3, -0.2, 0.1]), np.zeros(3))
    metric = metric_of("diagonal")

    def once(key):
        point, stats = nuts_transition(
            key, start.point, jax.value_and_grad(gaussian), metric, jnp.asarray(step), 2
        )
        return jnp.any(point.position != start.point.position), stats["n_steps"]

    moved, steps = jax.vmap(once)(jax.random.split(jax.random.key(0), draws))
    assert (np.asarray(steps) == 3).all()
    # The weights differ by less than 1e-6: a single stay has probability below 1e-2.
    assert np.asarray(moved).all()


def test_statistics_of_a_transition():
    """Step counts add up to the gradients evaluated; depth and divergence flags are right."""
    calls = []

    def counted(q):
        jax.debug.callback(lambda: calls.append(1))
        return gaussian(q)

    metric, gradient = metric_of("diagonal"), jax.value_and_grad(counted)
    q = jnp.asarray([0.5, -0.5, 1.0])
    value, slope = jax.value_and_grad(gaussian)(q)
    move = jax.jit(
        lambda key, step, gradient=gradient: nuts_transition(
            key, Point(q, value, slope), gradient, metric, step, 5
        )
    )
    for number in range(5):
        calls.clear()
        _, info = move(jax.random.key(number), 0.3)
        jax.effects_barrier()
        assert len(calls) == int(info["n_steps"])
        assert int(info["n_steps"]) < 2 ** int(info["tree_depth"])
        assert not bool(info["diverging"])
    _, info = move(jax.random.key(0), 1e-4)
    assert bool(info["reached_max_treedepth"])
    assert int(info["n_steps"]) == 31
    point, info = move(jax.random.key(0), 1e3)
    assert bool(info["diverging"])
    np.testing.assert_array_equal(point.position, q)
    assert float(info["energy_error"]) == 0.0
