"""Kernels of blackjax inside our compositions, and ours in its loop (needs the extra `bench`)."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import MCMC, NUTS, SGHMC, SGLD, SGNHT, block, cycle, lift
from ppl_toolkit.inference.involution import random_walk
from ppl_toolkit.inference.target import Target

blackjax = pytest.importorskip("blackjax")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

Y = np.array([0.4, 1.2, 2.0])


def mean(y):
    m = numpyro.sample("m", dist.Normal(0, 2))
    s = numpyro.sample("s", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(m, 1), obs=y)
    numpyro.sample("more", dist.Normal(s, 1), obs=y[0])


BUILDERS = {
    "mala": lambda density: blackjax.mala(density, 0.7),
    "barker": lambda density: blackjax.barker(density, 0.9),
    "hmc": lambda density: blackjax.hmc(density, 0.4, jnp.ones(2), 4),
    "rmh": lambda density: blackjax.additive_step_random_walk.normal_random_walk(
        density, 0.9 * jnp.eye(2)
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_lifted_kernel_samples_the_posterior(name):
    """Exact means and variances, within 4 standard errors: 2.5e-4 a kernel."""
    draws = ppl.infer(mean, Y, method=MCMC(lift(BUILDERS[name], name)), draws=3000, progress=False)[
        "posterior"
    ]
    for site, precision, shift in (("m", 0.25 + 3, Y.sum()), ("s", 2.0, Y[0])):
        x = np.asarray(draws[site])
        assert abs(x.mean() - shift / precision) < 4 * ppl.convergence.mcse(x)
        assert abs(x.std() - precision**-0.5) < 4 * ppl.convergence.mcse(x, "sd")


def test_it_is_checked_like_any_other():
    kernel = cycle([block(lift(lambda d: blackjax.mala(d, 0.7), "mala"), "m"), block(NUTS(), "s")])
    found = ppl.check(mean_of_arrays, Y, Y[:1], method=kernel)
    assert found
    assert list(found.invariant) == ["cycle", "mala_m", "nuts_s"]


def mean_of_arrays(y, z):
    m = numpyro.sample("m", dist.Normal(0, 2))
    s = numpyro.sample("s", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(m, 1), obs=y)
    numpyro.sample("z", dist.Normal(s, 1), obs=z)


def test_a_step_size_that_is_no_kernel_of_the_target_is_found():
    """Unadjusted Langevin steps: the invariant law is too wide."""

    def langevin(density):
        class Algorithm:
            @staticmethod
            def init(position):
                return _State(position)

            @staticmethod
            def step(key, state):
                gradient = jax.grad(density)(state.position)
                noise = {k: jax.random.normal(jax.random.fold_in(key, i))
                         for i, k in enumerate(state.position)}  # fmt: skip
                new = {k: x + 0.5 * gradient[k] + noise[k] for k, x in state.position.items()}
                return _State(new), ()

        return Algorithm

    found = ppl.check(mean_of_arrays, Y, Y[:1], method=lift(langevin, "langevin"))
    assert found.guilty == ["langevin"]


class _State(tuple):
    """A state with a position and nothing else."""

    def __new__(cls, position):
        return super().__new__(cls, (position,))

    @property
    def position(self):
        return self[0]


jax.tree_util.register_pytree_node(_State, lambda s: (tuple(s), None), lambda _, c: _State(*c))


def test_our_kernels_run_in_blackjaxs_loop():
    target = Target.of(lambda x: -0.5 * jnp.sum(x["a"] ** 2))
    kernel = random_walk(1.5).bind(target)
    algorithm = blackjax.base.SamplingAlgorithm(
        lambda position, rng_key=None: kernel.init(position, rng_key), kernel.step
    )
    _, history = blackjax.util.run_inference_algorithm(
        rng_key=jax.random.key(0),
        inference_algorithm=algorithm,
        num_steps=20_000,
        initial_position={"a": jnp.zeros(2)},
    )
    draws = np.asarray(history[0].position["a"])
    assert abs(draws.mean()) < 0.1
    assert abs(draws.var() - 1) < 0.15


def test_what_cannot_be_lifted():
    with pytest.raises(OptionError, match="lift takes a function"):
        lift(3)

    def die():
        numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3))

    with pytest.raises(MethodError, match="are discrete"):
        ppl.infer(die, method=MCMC(lift(BUILDERS["mala"], "mala")))


class TestStochasticGradients:
    """The same steps from the same keys, on whole gradients."""

    @staticmethod
    def density(x):
        return -0.5 * x @ jnp.array([[2.0, 0.6], [0.6, 1.0]]) @ x - 0.1 * jnp.sum(x**4)

    def ours(self, kernel, count):
        bound = kernel.bind(Target.of(lambda x: self.density(x["x"])))
        step, state = jax.jit(bound.step), bound.init({"x": self.start}, jax.random.key(0))
        for number in range(count):
            state, _ = step(jax.random.key(number), state)
            yield state

    @staticmethod
    def noise_key(number):
        """The key of the noise of the first step of a transition."""
        return jax.random.split(jax.random.fold_in(jax.random.key(number), 0))[1]

    start = np.array([0.3, -0.8])

    @pytest.fixture(autouse=True)
    def in_float64(self):
        with jax.enable_x64(True):
            yield

    def test_langevin(self):
        """Its step size is half of ours."""
        algorithm = blackjax.sgld(lambda x, batch: jax.grad(self.density)(x))
        x = self.start
        for number, state in enumerate(self.ours(SGLD(0.08), 20)):
            x = algorithm.step(self.noise_key(number), x, (), 0.04)
            np.testing.assert_allclose(state.position["x"], x, rtol=1e-12)

    @pytest.mark.parametrize("kernel", [SGHMC(0.2, friction=0.3), SGNHT(0.2, friction=0.3)])
    def test_momenta(self, kernel):
        """Its integrators move the position first: they are ours if they are given the gradient at
        the new position, where blackjax's kernels give the one at the old position. The friction of
        its thermostat holds |p|^2 / D at one, ours (1 - xi/2) |p|^2 / D."""
        from blackjax.sgmcmc import diffusions

        thermostat = isinstance(kernel, SGNHT)
        e, p, xi = 0.2, jnp.zeros(2), 0.3 / 0.2
        integrate = (diffusions.sgnht if thermostat else diffusions.sghmc)(alpha=0.3 / 0.2)
        before = self.start  # from where a move by e p leads to the position
        for number, state in enumerate(self.ours(kernel, 20)):
            gradient = jax.grad(self.density)(before + e * p)
            extra = (xi,) if thermostat else ()
            before, p, *kept = integrate(
                self.noise_key(number), before, p, *extra, gradient, e
            )  # fmt: skip
            np.testing.assert_allclose(state.kept.motion.momentum, p, rtol=1e-11)
            np.testing.assert_allclose(state.position["x"], before + e * p, rtol=1e-11)
            if thermostat:
                heat = p @ p / 2
                np.testing.assert_allclose(kept[0], xi + e * (heat - 1), rtol=1e-11)
                xi += e * ((1 - e * xi / 2) * heat - 1)
                np.testing.assert_allclose(state.kept.motion.friction, e * xi, rtol=1e-11)


def test_isokinetic_steps_and_lengths_are_theirs():
    """One step of ours is one of theirs, with the same change of energy; so is the sequence."""
    from blackjax.mcmc import integrators
    from blackjax.mcmc.dynamic_hmc import halton_sequence

    from ppl_toolkit.inference.adaptation import Metric
    from ppl_toolkit.inference.ensemble import halton
    from ppl_toolkit.inference.trajectory import Phase, Point, bend

    with jax.enable_x64(True):

        def density(q):
            return -jnp.sum(q**4) / 4 - 0.5 * jnp.sum(q[1:] * q[:-1])

        gradient, scale = jax.value_and_grad(density), jnp.asarray([0.5, 1.0, 2.0])
        q, u = jnp.asarray([0.3, -1.0, 0.8]), jnp.asarray([0.6, 0.0, -0.8])
        end, work = bend(gradient, Metric(scale), 0.4, Phase(Point(q, *gradient(q)), u))
        step = integrators.isokinetic_velocity_verlet(density, scale**2)
        theirs, change = step(integrators.IntegratorState(q, u, *gradient(q)), 0.4)
        np.testing.assert_allclose(end.point.position, theirs.position, rtol=1e-10)
        np.testing.assert_allclose(end.momentum, theirs.momentum, rtol=1e-10)
        np.testing.assert_allclose(work, change, rtol=1e-10)
        for index in range(100):
            ours = halton(jnp.asarray(index), jnp.float64)
            np.testing.assert_allclose(ours, halton_sequence(jnp.asarray(index), 10), rtol=1e-12)
