"""Kernels of blackjax inside our compositions, and ours in its loop (needs the extra `bench`)."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import MCMC, NUTS, block, cycle, lift
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
