"""The state-space view of ordinary models: what depends on what, and what is refused."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import log_density

from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.state_space import state_space
from ppl_toolkit.program import Program

Y = np.array([0.3, -1.2, 0.8, 0.1, 1.4])


def observe(mean, y):
    numpyro.sample("y", dist.Normal(mean, 0.7), obs=y)


def linear(y, length=None):
    phi = numpyro.sample("phi", dist.Uniform(-1, 1))
    q = numpyro.sample("q", dist.HalfNormal(1.0))
    start = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, q))
        observe(x, y_t)
        return x, x

    scan(step, start, y, length=length)


def pair_window(y):
    def step(carry, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * carry["now"] + 0.1 * carry["past"], 1.0))
        observe(x, y_t)
        return {"now": x, "past": carry["now"]}, None

    scan(step, {"now": 0.0, "past": 0.0}, y)


def array_window(y):
    a = numpyro.sample("a", dist.Normal(0, 0.3).expand([2]).to_event(1))
    start = numpyro.sample("start", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def step(window, y_t):
        x = numpyro.sample("x", dist.Normal(a @ window, 1.0))
        observe(x, y_t)
        return jnp.stack([x, window[0]]), None

    scan(step, start, y)


def running_sum(y):
    def step(total, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * jnp.tanh(total), 1.0))
        observe(x, y_t)
        return total + x, None

    scan(step, 0.0, y)


def innovations(y):
    def step(x, y_t):
        e = numpyro.sample("e", dist.Normal(0.0, 1.0))
        x = 0.9 * x + e
        observe(x, y_t)
        return x, None

    scan(step, 0.0, y)


def counter(y):
    def step(carry, y_t):
        t, x = carry
        x = numpyro.sample("x", dist.Normal(0.5 * x + jnp.sin(t), 1.0))
        observe(x, y_t)
        return (t + 1.0, x), None

    scan(step, (0.0, 0.0), y)


def leverage(y):
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    start = numpyro.sample("h_0", dist.Normal(0.0, 1.0))

    def step(h, y_t):
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)), obs=y_t)
        return numpyro.sample("h", dist.Normal(0.9 * h + 0.1 * y_t, s)), None

    scan(step, start, y)


def difference(y):
    def step(x, y_t):
        new = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        observe(new - x, y_t)
        return new, None

    scan(step, 0.0, y)


def hidden_markov(y):
    rows = numpyro.sample("rows", dist.Dirichlet(jnp.ones(3)).expand([3]).to_event(1))

    def step(z, y_t):
        z = numpyro.sample("z", dist.Categorical(rows[z]), infer={"enumerate": "parallel"})
        observe(1.0 * z, y_t)
        return z, None

    scan(step, 0, y)


def hierarchy(y):
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    b = numpyro.sample("b", dist.Normal(0.0, tau))
    start = numpyro.sample("x_0", dist.Normal(b, 1.0))
    numpyro.sample("y_0", dist.Normal(start, 1.0), obs=0.3)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        observe(x, y_t)
        return x, None

    scan(step, start, y)


CASES = {  # static, initial, memory, mixed, ahead
    linear: (("phi", "q"), ("x_0",), 1, False, False),
    pair_window: ((), (), 2, False, False),
    array_window: (("a",), ("start",), 2, False, False),
    running_sum: ((), (), None, False, False),
    innovations: ((), (), None, True, False),
    counter: ((), (), 1, False, False),
    leverage: (("s",), ("h_0",), 1, True, True),
    difference: ((), (), 1, True, False),
    hidden_markov: (("rows",), (), 1, False, False),
    hierarchy: (("tau", "b"), ("x_0",), 1, False, False),
}


@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
def test_what_depends_on_what(model):
    space = state_space(Program(model, (Y,)))
    found = (space.static, space.initial, space.memory, space.mixed, space.ahead)
    assert found == CASES[model]
    assert space.length == 5


@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_start_steps_and_law_of_parameters_make_the_joint_density(model, seed):
    """Replayed step by step, a path has the log density that NumPyro gives to the whole."""
    program = Program(model, (Y,))
    space = state_space(program)
    with program.context():
        key = random.key(seed)
        position = program.traced("start_position")(
            program.traced("start_position").consts, key, program.data
        )
        values = program.traced("values_at")(
            program.traced("values_at").consts, position, program.data
        )
        series = space.at(program, position, program.data)
        step = series.start_at({name: values[name] for name in space.initial})
        total = series.log_prior + step.log_transition + step.log_observation
        carry = step.carry
        for t in range(series.length):
            latents = {name: values[name][t] for name in space.latents}
            step = series.replay(carry, t, latents)
            total += step.log_transition + step.log_observation
            carry = step.carry
        latent = {site.name: values[site.name] for site in program.latent}
        wanted = log_density(handlers.seed(model, 0), (Y,), {}, latent)[0]
        jacobian = sum(program.traced("log_parts")(
            program.traced("log_parts").consts, position, program.data
        )) - wanted  # fmt: skip
        initial_and_steps = [program.sites[n] for n in (*space.initial, *space.latents)]
        assert all(s.discrete or s.support == "Real()" or "real" in s.support.lower()
                   for s in initial_and_steps)  # fmt: skip
        np.testing.assert_allclose(total, wanted + jacobian, rtol=1e-12)


def test_a_reversed_scan_runs_backwards():
    def backwards(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
            observe(x, y_t)
            return x, None

        scan(step, 0.0, y, reverse=True)

    program = Program(backwards, (Y,))
    with program.context():
        series = state_space(program).at(program, {}, program.data)
        step = series.replay(jnp.zeros(()), 0, {"x": jnp.asarray(0.2)})
        wanted = dist.Normal(0.2, 0.7).log_prob(Y[-1])
        np.testing.assert_allclose(step.log_observation, wanted, rtol=1e-14)


def test_conditioned_data_reach_their_steps():
    model = handlers.condition(linear, data={"y": jnp.asarray(Y)})
    program = Program(model, (None,), {"length": 5})
    with program.context():
        series = state_space(program).at(program, {"phi": 0.3, "q": 0.1}, program.data)
        step = series.replay(jnp.zeros(()), 3, {"x": jnp.asarray(0.2)})
        wanted = dist.Normal(0.2, 0.7).log_prob(Y[3])
        np.testing.assert_allclose(step.log_observation, wanted, rtol=1e-6)


# -- refused -------------------------------------------------------------------------------------


def no_scan(y):
    observe(numpyro.sample("x", dist.Normal(0.0, 1.0)), y)


def observed_after(y):
    def step(x, _):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        return x, x

    _, path = scan(step, 0.0, None, length=5)
    numpyro.sample("y", dist.Normal(path, 1.0), obs=y)


def two_scans(y):
    linear(y)

    def step(x, _):
        return numpyro.sample("u", dist.Normal(0.9 * x, 1.0)), None

    scan(step, 0.0, None, length=5)


def flat_start(y):
    start = numpyro.sample("x_0", dist.ImproperUniform(dist.constraints.real, (), ()))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        observe(x, y_t)
        return x, None

    scan(step, start, y)


def subsampled(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        with numpyro.plate("rows", 4, subsample_size=2):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


REFUSED = {
    no_scan: "has no numpyro.contrib.control_flow.scan",
    observed_after: "observed site 'y' .* comes after the scan.*Move it into the function",
    two_scans: "second scan, with site 'u'",
    flat_start: "'x_0' has a flat",
    handlers.mask(linear, mask=jnp.array(True)): "inside mask",
    handlers.scale(linear, scale=2.0): "inside scale",
    subsampled: "subsamples a plate",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda m: getattr(m, "__name__", type(m).__name__))
def test_what_particles_cannot_follow_is_refused(model):
    with pytest.raises(MethodError, match=REFUSED[model]):
        state_space(Program(model, (Y,)))


def test_smoothers_that_need_memory_one_say_what_remembers():
    space = state_space(Program(pair_window, (Y,)))
    with pytest.raises(
        MethodError, match=r"latents of the 2 steps before, through carry\['past'\]"
    ):
        space.require_backward("PaRIS")
