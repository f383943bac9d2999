"""Metropolis–Hastings–Green: instances equal direct forms, determinants closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import (
    MCMC,
    block,
    cycle,
    involutive,
    leapfrog,
    mala,
    metropolis_hastings,
)
from ppl_toolkit.inference.adaptation import Metric
from ppl_toolkit.inference.auxiliary import draw, score
from ppl_toolkit.inference.hmc import hmc_transition
from ppl_toolkit.inference.involution import log_determinant, random_walk
from ppl_toolkit.inference.target import Target
from ppl_toolkit.inference.trajectory import Point


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


PRECISION = np.array([[2.0, 0.6], [0.6, 1.0]])


def log_density(x):
    z = jnp.stack([x["a"], x["b"]])
    return -0.5 * z @ PRECISION @ z - 0.1 * jnp.sum(z**4)


TARGET = Target.of(log_density)
START = {"a": np.asarray(0.3), "b": np.asarray(-0.8)}


def run(spec, count, seed=0):
    """Positions (count, 2) of a chain, and whether each step was accepted."""
    kernel = spec.bind(TARGET)

    def one(state, key):
        state, info = kernel.step(key, state)
        return state, (jnp.stack([state.position["a"], state.position["b"]]), info["accepted"])

    keys = random.split(random.key(seed), count)
    return jax.jit(lambda: jax.lax.scan(one, kernel.init(START, keys[0]), keys)[1])()


def direct(propose, count, seed=0):
    """Metropolis–Hastings written out: ``propose(key, x) -> (y, log q(x | y) - log q(y | x))``."""
    density = jax.jit(lambda z: log_density({"a": z[0], "b": z[1]}))
    propose = jax.jit(propose)
    x, positions = np.array([0.3, -0.8]), []
    for key in random.split(random.key(seed), count):
        key_v, key_accept = random.split(key)
        y, correction = propose(key_v, x)
        ratio = density(y) - density(x) + correction
        if np.log(random.uniform(key_accept, (), float)) < ratio:
            x = np.asarray(y)
        positions.append(x)
    return np.stack(positions)


def noise(key):
    """The two normal numbers that the auxiliary program of the kernels draws, site by site."""
    numbers = []
    for _ in range(2):
        key, own = random.split(key)
        numbers.append(dist.Normal(0.0, 1.0).to_event(0).sample(own))
    return jnp.stack(numbers)


def test_random_walk():
    positions, accepted = run(random_walk(0.9), 300)
    wanted = direct(lambda key, x: (x + 0.9 * noise(key), 0.0), 300)
    np.testing.assert_allclose(positions, wanted, rtol=1e-12)
    assert 0.2 < accepted.mean() < 0.9


def test_langevin():
    gradient = jax.grad(lambda z: log_density({"a": z[0], "b": z[1]}))

    def propose(key, x):
        def mean(z):
            return z + 0.5 * 0.8**2 * gradient(z)

        y = mean(x) + 0.8 * noise(key)
        log_q = [-0.5 * jnp.sum((u - mean(w)) ** 2) / 0.8**2 for u, w in ((x, y), (y, x))]
        return y, log_q[0] - log_q[1]

    positions, accepted = run(mala(0.8), 300)
    np.testing.assert_allclose(positions, direct(propose, 300), rtol=1e-10)
    assert 0.2 < accepted.mean() < 1.0


def test_independence():
    def proposal(position, target):
        numpyro.sample("a", dist.Normal(0.1, 0.9))
        numpyro.sample("b", dist.Normal(-0.2, 1.1))

    mean, sd = np.array([0.1, -0.2]), np.array([0.9, 1.1])

    def propose(key, x):
        y = mean + sd * noise(key)
        return y, 0.5 * jnp.sum(((y - mean) ** 2 - (x - mean) ** 2) / sd**2)

    positions, _ = run(metropolis_hastings(proposal), 300)
    np.testing.assert_allclose(positions, direct(propose, 300), rtol=1e-12)


def test_hamiltonian():
    """The involution proposes what `hmc_transition` proposes, with the same energy error."""
    kernel = leapfrog(0.25, 7)
    momentum = {"a": jnp.asarray(0.7), "b": jnp.asarray(-1.1)}
    new, flipped, log_det = kernel.image(START, momentum, TARGET)
    ratio = (
        log_density(new) - log_density(START)
        + score(kernel.auxiliary, flipped, new, TARGET)
        - score(kernel.auxiliary, momentum, START, TARGET)
    )  # fmt: skip
    z = jnp.array([0.3, -0.8])

    def density(z):
        return log_density({"a": z[0], "b": z[1]})

    point = Point(z, *jax.value_and_grad(density)(z))
    seen = {}

    def normal(key, shape, dtype):
        return jnp.array([0.7, -1.1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppl_toolkit.inference.hmc.random.normal", normal)
        patch.setattr("ppl_toolkit.inference.hmc.random.uniform", lambda *a: jnp.asarray(1e-300))
        moved, seen = hmc_transition(
            random.key(0), point, jax.value_and_grad(density), Metric.identity(z, False),
            jnp.asarray(0.25), 7,
        )  # fmt: skip
    np.testing.assert_allclose([new["a"], new["b"]], moved.position, rtol=1e-13)
    np.testing.assert_allclose(ratio, -seen["energy_error"], rtol=1e-11)
    assert log_det == 0.0


class TestDeterminants:
    def test_of_the_height_split(self):
        """Green (1995): (h, u) -> (h', h''), |J| = (h' + h'')^2 / h."""

        def split(x, v):
            left, right = x["s"] - 0.2, 1.5 - x["s"]
            ratio = (1 - v["u"]) / v["u"]
            h1 = x["h"] * ratio ** (-right / (left + right))
            return {**x, "h": h1}, {"u": h1 * ratio}

        x, v = {"s": jnp.asarray(0.7), "h": jnp.asarray(2.3)}, {"u": jnp.asarray(0.35)}
        (new, new_v), h = split(x, v), 2.3
        h1, h2 = float(new["h"]), float(new_v["u"])
        np.testing.assert_allclose(0.5 * np.log(h1) + 0.8 * np.log(h2), 1.3 * np.log(h), rtol=1e-14)
        wanted = np.log((h1 + h2) ** 2 / h)
        np.testing.assert_allclose(log_determinant(split, x, v), wanted, rtol=1e-13)

    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    def test_of_linear_maps(self, size):
        a = np.random.default_rng(size).normal(size=(size, size))

        def f(x, v):
            return {**x, "z": jnp.asarray(a) @ x["z"]}, v

        x = {"z": jnp.ones(size), "untouched": jnp.ones(1000), "k": jnp.asarray(3)}
        found = log_determinant(f, x, {"u": jnp.ones(4)})
        np.testing.assert_allclose(found, np.linalg.slogdet(a)[1], rtol=1e-12)

    def test_of_a_swap(self):
        x, v = {"a": START["a"]}, {"u": START["b"]}
        found = log_determinant(lambda x, v: ({"a": v["u"]}, {"u": x["a"]}), x, v)
        assert found == 0.0

    def test_untouched_arrays_are_not_differentiated(self):
        """A Jacobian of 10^4 coordinates would take 800 MB."""
        x = {"big": jnp.zeros(10_000), "a": jnp.asarray(1.0)}
        jaxpr = jax.make_jaxpr(
            lambda x, v: log_determinant(lambda x, v: ({**x, "a": 2 * x["a"]}, v), x, v)
        )(x, {"u": jnp.asarray(0.0)})
        assert max(v.aval.size for e in jaxpr.eqns for v in e.outvars) < 10


class TestAuxiliaryPrograms:
    def program(self, x, target):
        i = numpyro.sample("i", dist.Categorical(jnp.array([0.2, 0.8])))
        numpyro.sample("u", dist.Normal(1.0 * i, 2.0))

    def test_draws_are_scored_as_they_were_drawn(self):
        values, log_q = draw(self.program, random.key(3), START, TARGET)
        assert set(values) == {"i", "u"}
        wanted = np.log([0.2, 0.8])[values["i"]] + dist.Normal(1.0 * values["i"], 2.0).log_prob(
            values["u"]
        )
        np.testing.assert_allclose(log_q, wanted, rtol=1e-14)
        np.testing.assert_allclose(score(self.program, values, START, TARGET), wanted, rtol=1e-14)

    def test_draws_have_the_law_of_the_program(self):
        """4000 draws: frequency within 4 standard errors (6e-5), mean of u likewise."""
        draws = jax.vmap(lambda k: draw(self.program, k, START, TARGET)[0])(
            random.split(random.key(0), 4000)
        )
        assert abs(draws["i"].mean() - 0.8) < 4 * np.sqrt(0.16 / 4000)
        assert abs(draws["u"].mean() - 0.8) < 4 * np.sqrt(4.16 / 4000)

    def test_another_set_of_sites_is_refused(self):
        with pytest.raises(MethodError, match="same sites wherever"):
            score(self.program, {"i": jnp.asarray(1)}, START, TARGET)


# -- what `infer` refuses before it runs -----------------------------------------------------------


def model(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    s = numpyro.sample("s", dist.HalfNormal(1))
    numpyro.sample("y", dist.Normal(a, s), obs=y)


def unit(position, target):
    numpyro.sample("u", dist.Normal(0, 1))


def stretch(x, v, target):
    return {**x, "a": x["a"] * jnp.exp(v["u"])}, {"u": -v["u"]}


WRONG = {
    "no involution": (
        involutive(unit, lambda x, v, t: ({**x, "a": x["a"] + v["u"]}, v)),
        r"no involution: f\(f\(z\)\) has a",
    ),
    "no involution of the auxiliary": (
        involutive(unit, lambda x, v, t: ({**x, "a": x["a"] + v["u"]}, {"u": 1 - v["u"]})),
        "no involution",
    ),
    "a determinant that is not its own": (
        involutive(
            unit, lambda x, v, t: ({**x, "a": x["a"] * jnp.exp(v["u"])}, {"u": -v["u"]}), 0.0
        ),
        "log_det is not that of the involution: 0 instead of",
    ),
    "a site that is lost": (
        involutive(unit, lambda x, v, t: ({"a": x["a"] + v["u"]}, {"u": -v["u"]})),
        "sites, shapes and types",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_involution_is_refused_before_the_run(what):
    spec, message = WRONG[what]
    with pytest.raises(MethodError, match=message):
        ppl.infer(model, np.ones(3), method=MCMC(spec), progress=False)
    inside = cycle([block(random_walk(0.3), "s"), block(spec, ["a", "s"])])
    with pytest.raises(MethodError, match=message):
        ppl.infer(model, np.ones(3), method=MCMC(inside), progress=False)


@pytest.mark.filterwarnings("ignore::ppl_toolkit.errors.InferenceWarning")
def test_an_integrator_that_runs_away_is_no_error():
    tree = ppl.infer(
        model, np.ones(3), method=MCMC(leapfrog(0.3, 5), init_radius=0.5), progress=False, draws=50
    )
    assert tree["posterior"].sizes["draw"] == 50


@pytest.mark.parametrize(
    "make", [lambda: random_walk(0.0), lambda: mala(-1), lambda: leapfrog(0.1, 0)]
)
def test_options(make):
    with pytest.raises(OptionError, match="positive"):
        make()
