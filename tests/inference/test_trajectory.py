"""Isokinetic trajectories: their solution, their Jacobian, and invariance, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import COVARIANCE, gaussian, require_draws
from scipy.integrate import solve_ivp

from ppl_toolkit.inference.adaptation import LowRank, Metric
from ppl_toolkit.inference.trajectory import (
    Phase,
    Point,
    bend,
    hamiltonian,
    isokinetic,
    kick,
    metropolis,
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


METRICS = {
    "diagonal": Metric(jnp.asarray([0.7, 1.5, 1.0])),
    "dense": Metric(jnp.asarray([[0.9, 0.1, 0.0], [0.5, 1.2, 0.0], [0.0, -0.2, 0.7]])),
    "low rank": LowRank(
        jnp.asarray([0.7, 1.5, 1.0]),
        jnp.asarray([[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]]),
        jnp.asarray([1.5, 0.0]),
    ),
}


def quartic(q):
    return -jnp.sum(q**4) / 4 - 0.5 * jnp.sum(q[1:] * q[:-1])


def unit(values):
    return jnp.asarray(values) / np.linalg.norm(values)


def start_at(density, q, u):
    value, gradient = jax.value_and_grad(density)(jnp.asarray(q))
    return Phase(Point(jnp.asarray(q), value, gradient), unit(u))


@pytest.mark.parametrize("dim", [2, 3, 7])
def test_a_kick_solves_its_equation(dim):
    """u' = (I - u u^T) f / (D - 1), and the work is (D - 1) times the integral of its divergence
    per dimension: u.f / (D - 1)."""
    rng = np.random.default_rng(dim)
    u, force = unit(rng.normal(size=dim)), jnp.asarray(3.0 * rng.normal(size=dim))

    def slope(_, y):
        along = y[:dim] @ force
        return [*((force - y[:dim] * along) / (dim - 1)), along]

    solved = solve_ivp(slope, (0.0, 0.8), [*u, 0.0], rtol=1e-11, atol=1e-12).y[:, -1]
    turned, work = kick(u, force, jnp.asarray(0.8))
    np.testing.assert_allclose(turned, solved[:dim], atol=1e-8)
    np.testing.assert_allclose(work, solved[dim], rtol=1e-8)
    back, undone = kick(turned, force, jnp.asarray(-0.8))
    np.testing.assert_allclose(back, u, atol=1e-12)
    np.testing.assert_allclose(undone, -work, rtol=1e-9)


def test_kicks_by_no_force_and_by_a_huge_one():
    u = unit([0.6, -0.8, 0.1])
    same, nothing = kick(u, jnp.zeros(3), jnp.asarray(0.5))
    np.testing.assert_array_equal(same, u)
    assert nothing == 0.0
    turned, work = kick(u, jnp.asarray([0.0, 1e6, 0.0]), jnp.asarray(1.0))
    np.testing.assert_allclose(turned, [0.0, 1.0, 0.0], atol=1e-12)
    assert np.isfinite(work)


def test_small_kicks_in_float32_lose_no_digits():
    """The work is u.f step to first order; the logarithm of one plus little would lose it."""
    with jax.enable_x64(False):
        u = jnp.asarray(unit([0.6, -0.8, 0.1]), jnp.float32)
        force = jnp.asarray([1.0, 2.0, -1.0], jnp.float32)
        _, work = kick(u, force, jnp.asarray(1e-5, jnp.float32))
        np.testing.assert_allclose(work, 1e-5 * float(u @ force), rtol=1e-4)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_steps_are_reversible(metric):
    gradient = jax.value_and_grad(quartic)
    z = start_at(quartic, [0.3, -1.0, 0.8], [1.0, 0.2, -0.5])
    there, total = z, 0.0
    for step in (0.2, -0.2):
        for _ in range(6):
            there, work = bend(gradient, metric, step, there)
            total += work
        moved = np.linalg.norm(there.point.position - z.point.position)
        assert (moved > 0.3) == (step > 0)
    np.testing.assert_allclose(there.point.position, z.point.position, atol=1e-12)
    np.testing.assert_allclose(there.momentum, z.momentum, atol=1e-12)
    np.testing.assert_allclose(total, 0.0, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_the_work_is_minus_the_log_of_the_jacobian(metric):
    """In three dimensions, of the map of position and two angles; the sphere's area element at
    both ends included."""
    gradient = jax.value_and_grad(quartic)

    def momentum(angles):
        a, b = angles
        return jnp.stack([jnp.sin(a) * jnp.cos(b), jnp.sin(a) * jnp.sin(b), jnp.cos(a)])

    def once(x):
        value, slope = gradient(x[:3])
        z = Phase(Point(x[:3], value, slope), momentum(x[3:]))
        end, work = bend(gradient, metric, 0.4, z)
        u = end.momentum
        angles = jnp.stack([jnp.arccos(u[2]), jnp.arctan2(u[1], u[0])])
        return jnp.concatenate([end.point.position, angles]), work

    x = jnp.asarray([0.3, -1.0, 0.8, 1.1, 0.4])
    y, work = once(x)
    jacobian = jax.jacobian(lambda x: once(x)[0])(x)
    log_det = jnp.log(jnp.abs(jnp.linalg.det(jacobian))) + jnp.log(jnp.sin(y[3]) / jnp.sin(x[3]))
    np.testing.assert_allclose(work, -log_det, rtol=1e-9)


def test_the_energy_error_is_of_second_order():
    gradient, metric = jax.value_and_grad(quartic), METRICS["dense"]
    q = jnp.asarray([0.3, -1.0, 0.8])
    point = Point(q, *gradient(q))
    errors = [
        abs(float(isokinetic(jax.random.key(3), point, gradient, metric, 1.0 / n, n).error))
        for n in (50, 100)
    ]
    assert 3.8 < errors[0] / errors[1] < 4.2


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@pytest.mark.parametrize("step", [0.6, 2.0])
def test_one_transition_leaves_a_gaussian_invariant(kind, step):
    """Exact draws stay exact draws after one transition of three steps.

    40000 exact starts; means, variances and two products keep their values, the radius and one
    coordinate their laws. Ten tests at 1e-5 each: false alarm below 2e-4 (seeds are fixed).
    """
    n = 40_000
    rng = np.random.default_rng(8)
    starts = jnp.asarray(rng.normal(size=(n, 3)) @ np.linalg.cholesky(COVARIANCE).T)
    metric, gradient = METRICS[kind], jax.value_and_grad(gaussian)

    @jax.jit
    @jax.vmap
    def once(key, q):
        key_momentum, key_accept = jax.random.split(key)
        point = Point(q, *gradient(q))
        flight = isokinetic(key_momentum, point, gradient, metric, step, 3)
        end, info = metropolis(key_accept, point, flight)
        return end.position, info

    ends, info = once(jax.random.split(jax.random.key(1), n), starts)
    ends, rate = np.asarray(ends), np.asarray(info["acceptance_rate"]).mean()
    assert 0.3 < rate < 0.999
    require_draws(ends)


@pytest.mark.parametrize("flight", [hamiltonian, isokinetic])
@pytest.mark.parametrize(
    ("value", "slope"), [(np.nan, 0.0), (np.inf, 0.0), (-np.inf, 0.0), (0.0, np.nan), (0.0, np.inf)]
)
def test_where_no_number_is_nobody_goes(flight, value, slope):
    """Half of the plane has no finite density or gradient: such ends are refused and counted."""

    def gradient(q):
        there = q[0] > 0.5
        inside = -0.5 * jnp.sum(q**2)
        return jnp.where(there, value, inside), jnp.where(there, slope, -q)

    metric = Metric(jnp.ones(2))
    q = jnp.asarray([0.4, 0.1])
    point = Point(q, *gradient(q))

    def once(key):
        key_flight, key_accept = jax.random.split(key)
        found = flight(key_flight, point, gradient, metric, 0.7, 2)
        end, info = metropolis(key_accept, point, found)
        return found.end.point.position, end, info

    proposed, ends, info = jax.vmap(once)(jax.random.split(jax.random.key(0), 500))
    gone = ~(np.asarray(proposed)[:, 0] <= 0.5)
    assert 0.1 < gone.mean() < 0.9
    assert np.asarray(info["diverging"])[gone].all()
    assert (np.asarray(info["acceptance_rate"])[gone] == 0.0).all()
    assert (np.asarray(ends.position)[gone] == np.asarray(q)).all()
    assert np.isfinite(np.asarray(ends.gradient)).all()
    assert np.isfinite(np.asarray(info["energy"])).all()
