"""Score ascent and score climbing against enumerations, Kalman filters and exact iterations."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, others_slow, quiet
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from scipy.optimize import minimize

import ppl_toolkit as ppl
from ppl_toolkit import executables
from ppl_toolkit.diagnostics.transitions import enumerated
from ppl_toolkit.errors import (
    InitializationError,
    MethodError,
    OptionError,
    SiteError,
)
from ppl_toolkit.inference import (
    Adam,
    Bootstrap,
    Guided,
    LaplaceProposal,
    ParticleFilter,
    ScoreAscent,
    learn_proposal,
)
from ppl_toolkit.inference.ascent import Average, ascended
from ppl_toolkit.inference.particle_filter import Filter, follow, take
from ppl_toolkit.inference.particle_gibbs import Path, sweep
from ppl_toolkit.inference.score import filtered_paths, log_joint, path_score, swept
from ppl_toolkit.inference.score_climbing import log_proposal
from ppl_toolkit.inference.state_space import state_space
from ppl_toolkit.program import Program


@dataclasses.dataclass(frozen=True)
class Plain:
    """Gradient steps of a fixed length, in optax's protocol."""

    size: float

    def init(self, x):
        return ()

    def update(self, gradient, state, x=None):
        return jax.tree.map(lambda g: -self.size * g, gradient), state


# -- a hidden Markov chain: everything by enumeration ----------------------------------------------

SEEN = np.array([0.3, 1.4])


def chain(y):
    """Two states; how long they last, and how far apart and how noisy their observations are."""
    stay = numpyro.sample("stay", dist.Beta(2.0, 1.0))
    gap = numpyro.sample("gap", dist.Normal(0.0, 2.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    first = numpyro.sample("z_0", dist.Categorical(jnp.array([0.6, 0.4])))

    def step(z, y_t):
        moves = jnp.stack([jnp.stack([stay, 1 - stay]), jnp.stack([1 - stay, stay])])
        z = numpyro.sample("z", dist.Categorical(moves[z]))
        numpyro.sample("y", dist.Normal(gap * z, noise), obs=y_t)
        return z, None

    scan(step, first, y)


U = {"stay": np.array(0.7), "gap": np.array(1.2), "noise": np.array(-0.4)}


def own(u):
    return {"stay": jax.nn.sigmoid(u["stay"]), "gap": u["gap"], "noise": jnp.exp(u["noise"])}


def forward(u, y=SEEN):
    """Log p(y) by the forward algorithm, a function of the unconstrained parameters."""
    theta = own(u)
    stay, levels = theta["stay"], theta["gap"] * jnp.arange(2)
    moves = jnp.array([[stay, 1 - stay], [1 - stay, stay]])
    law, total = jnp.array([0.6, 0.4]), 0.0
    for y_t in y:
        law = (law @ moves) * jnp.exp(dist.Normal(levels, theta["noise"]).log_prob(y_t))
        total, law = total + jnp.log(law.sum()), law / law.sum()
    return total


@pytest.fixture(scope="module")
def finite():
    """The model, all its paths, and their probabilities given the data."""
    program = Program(chain, (SEEN,))
    with program.context():
        space = state_space(program)
        states = np.array(list(itertools.product((0, 1), repeat=3)), np.int32)
        paths = Path({"z_0": jnp.asarray(states[:, 0])}, {"z": jnp.asarray(states[:, 1:])})

        def density(u, path, prior=False):
            return log_joint(program, space, u, path, program.data, prior)

        def scored(path):  # every path alone
            return path_score(density, U, jax.tree.map(lambda x: x[None], path), True)

        each = jax.jit(jax.vmap(scored))(paths)
        law = np.exp(each.log_joint)
        yield SimpleNamespace(
            density=density, paths=paths, states=states, each=each, mass=law.sum(),
            law=law / law.sum(), series=space.at(program, U, program.data),
            exact=jax.jit(jax.value_and_grad(forward))(U),
        )  # fmt: skip


def test_densities_of_all_paths_sum_to_the_likelihood(finite):
    np.testing.assert_allclose(np.log(finite.mass), finite.exact[0], rtol=1e-12)


def test_the_mean_score_of_all_paths_is_the_gradient_of_the_likelihood(finite):
    """Fisher's identity, exactly; a Jacobian would add to the scores of stay and noise."""
    for name, g in finite.exact[1].items():
        found = finite.law @ finite.each.gradient[name]
        np.testing.assert_allclose(found, g, rtol=1e-11, err_msg=name)


def test_the_score_of_several_paths_is_their_mean(finite):
    mean = jax.jit(lambda paths: path_score(finite.density, U, paths))(finite.paths)
    np.testing.assert_allclose(mean.log_joint, np.mean(finite.each.log_joint), rtol=1e-12)
    for name, g in mean.gradient.items():
        np.testing.assert_allclose(g, np.mean(finite.each.gradient[name]), rtol=1e-12)
    assert mean.information is None


def test_the_information_of_all_paths_is_that_of_the_likelihood(finite):
    """Louis' identity, exactly: E[-H - s s'] + E[s] E[s]'."""
    mean = np.array([finite.exact[1][name] for name in sorted(U)])
    found = np.tensordot(finite.law, finite.each.information, 1) + np.outer(mean, mean)
    wanted = jax.jit(jax.hessian(lambda x: -forward(dict(zip(sorted(U), x, strict=True)))))(
        np.array([U[name] for name in sorted(U)])
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_the_prior_is_that_of_the_parameters_own_space(finite):
    theta, path = own(U), take(finite.paths, 3)
    wanted = dist.Beta(2.0, 1.0).log_prob(theta["stay"]) + dist.Normal(0, 2).log_prob(theta["gap"])
    wanted += dist.HalfNormal(1.0).log_prob(theta["noise"])
    with_prior = jax.jit(lambda path: finite.density(U, path, prior=True))(path)
    np.testing.assert_allclose(with_prior - finite.each.log_joint[3], wanted, rtol=1e-12)


@pytest.mark.slow
def test_paths_of_a_stationary_sweep_have_the_exact_score_on_average(finite):
    """Every path of before with its probability, every choice of the sweep enumerated."""
    total = dict.fromkeys(U, 0.0)
    scores = jax.jit(jax.vmap(lambda paths: path_score(finite.density, U, paths).gradient))
    for p, state in zip(finite.law, finite.states, strict=True):
        path = Path({"z_0": state[0]}, {"z": state[1:]})

        def run(key, path=path):
            return sweep(key, finite.series, path, Filter(2), paths=2)[0]

        found = enumerated(run)
        for name, s in scores(jax.tree.map(jnp.asarray, found.values)).items():
            total[name] += p * found.probabilities @ np.asarray(s)
    for name, g in finite.exact[1].items():
        np.testing.assert_allclose(total[name], g, rtol=1e-11, err_msg=name)


def test_the_first_sweeps_do_not_count_and_each_begins_where_the_last_one_ended():
    path = Path({}, {"x": jnp.array([1.0])})

    def drawn(key, path):  # three paths, of which the first goes on
        return jax.tree.map(lambda x: jnp.stack([2 * x, x, x]), path)

    last, mean = swept(random.key(0), path, drawn, lambda paths: paths.latents["x"][0, 0], 5, 2)
    assert float(last.latents["x"][0]) == 32.0
    np.testing.assert_allclose(float(mean), (8 + 16 + 32) / 3, rtol=1e-6)


# -- linear and Gaussian ---------------------------------------------------------------------------


def simulated(size, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(), []
    for _ in range(size):
        x = 0.8 * x + 0.5 * rng.normal()
        y.append(x + 0.7 * rng.normal())
    return np.array(y)


def linear(y):
    phi = numpyro.sample("phi", dist.Uniform(-1, 1))
    q = numpyro.sample("q", dist.HalfNormal(0.2))
    start = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, q))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, start, y)


def backwards(y):
    """The same from the last observation to the first."""
    phi = numpyro.sample("phi", dist.Uniform(-1, 1))
    q = numpyro.sample("q", dist.HalfNormal(0.2))
    start = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, q))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, start, y, reverse=True)


def kalman(phi, q, y, r=0.7):
    mean, variance, total = 0.0, 1.0, 0.0
    for y_t in y:
        mean, variance = phi * mean, phi**2 * variance + q**2
        seen = variance + r**2
        total -= 0.5 * (np.log(2 * np.pi * seen) + (y_t - mean) ** 2 / seen)
        mean += variance / seen * (y_t - mean)
        variance *= r**2 / seen
    return total


def at(u):
    """(phi, q) of unconstrained values; phi is in (-1, 1)."""
    return 2 / (1 + np.exp(-u[0])) - 1, np.exp(u[1])


def slope(function, u, h=1e-5):
    """Central differences."""
    return np.array([(function(u + h * e) - function(u - h * e)) / (2 * h) for e in np.eye(len(u))])


def curvature(function, u, h=1e-3):
    return np.array([slope(lambda v, e=e: slope(function, v, h) @ e, u, h) for e in np.eye(len(u))])


def smoother(y, phi=0.8, q=0.5, r=0.7, start=1.0):
    """Means and covariances of x_0, ..., x_T given y."""
    size = len(y)
    root = np.zeros((size + 1, size + 1))
    root[0, 0] = start
    for t in range(1, size + 1):
        root[t] = phi * root[t - 1]
        root[t, t] += q
    prior = root @ root.T
    gain = np.linalg.solve(prior[1:, 1:] + r**2 * np.eye(size), prior[1:]).T
    return gain @ y, prior - gain @ prior[1:]


SHORT, LONG = simulated(12, seed=1), simulated(50)
POINT = np.array([np.log(1.8 / 0.2), np.log(0.5)])  # phi = 0.8, q = 0.5


def bound(model, y):
    """The series at phi = 0.8 and q = 0.5, the log density, and u."""
    program = Program(model, (y,))
    space = state_space(program)
    u = {"phi": jnp.array(POINT[0]), "q": jnp.array(POINT[1])}

    def density(u, path):
        return log_joint(program, space, u, path, program.data)

    return space.at(program, u, program.data), density, u


def exact_score():
    """At these values; with respect to phi and q themselves it is -3.3274 and -5.1879."""
    own = slope(lambda v: kalman(*v, SHORT), np.array([0.8, 0.5]))
    np.testing.assert_allclose(own, [-3.32741, -5.18787], atol=1e-5)
    return slope(lambda u: kalman(*at(u), SHORT), POINT)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", ["sweep", "filter"])
def test_the_score_is_the_slope_of_the_kalman_likelihood(smoothing):
    """|z| <= 4.5, each wrongly fails with probability 7e-6. Sweeps of 8 particles that begin at
    exact paths are unbiased; filters of 200 have a bias O(T / N), here below 0.02."""
    mean, cov = smoother(SHORT)
    with jax.enable_x64(True):
        series, density, u = bound(linear, SHORT)
        root = np.linalg.cholesky(cov)

        def run(key):
            if smoothing == "filter":
                paths, _ = filtered_paths(key, series, Filter(200), 4)
            else:
                key_path, key_sweep = random.split(key)
                x = mean + root @ random.normal(key_path, mean.shape)
                path = Path({"x_0": x[0]}, {"x": x[1:]})
                paths, _ = sweep(key_sweep, series, path, Filter(8), paths=4)
            gradient = path_score(density, u, paths).gradient
            return jnp.stack([gradient["phi"], gradient["q"]])

        found = np.asarray(jax.jit(jax.vmap(run))(random.split(random.key(2), 1000)))
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    allowed = 4.5 * error + (0.02 if smoothing == "filter" else 0.0)
    assert np.all(np.abs(found.mean(0) - exact_score()) <= allowed)
    assert np.all(error < 0.1)  # the bounds say something


@pytest.mark.parametrize("model", [linear, backwards])
def test_the_density_of_a_path_is_that_of_its_steps(model):
    with jax.enable_x64(True):
        series, density, u = bound(model, SHORT)
        x = random.normal(random.key(0), (13,))
        path = Path({"x_0": x[0]}, {"x": x[1:]})
        step = series.start_at(path.initial)
        total = step.log_transition + step.log_observation
        for t in range(12):
            step = series.replay(step.carry, t, {"x": x[1 + t]})
            total += step.log_transition + step.log_observation
        np.testing.assert_allclose(density(u, path), total, rtol=1e-12)


def test_paths_of_a_filter_are_in_the_order_of_time():
    """Observations that are nearly exact: means of paths within 0.3 of the smoother's."""
    with jax.enable_x64(True):
        program = Program(sharp, (LONG,))
        series = state_space(program).at(program, {}, program.data)
        run = jax.jit(lambda key: filtered_paths(key, series, Filter(200), 50)[0])
        x = np.asarray(run(random.key(1)).latents["x"])
    assert x.shape == (50, 50)
    assert np.max(np.abs(x.mean(0) - smoother(LONG, r=0.3, start=0.0)[0][1:])) < 0.3


CLIMB = ScoreAscent(particles=16, paths=4, sweeps=4, dropped=2, errors=True)


@pytest.fixture(scope="module")
def climbed():
    return quiet(linear, LONG, method=CLIMB, chains=6, seed=1)


def best(y, prior=lambda phi, q: 0.0):
    return minimize(lambda u: -kalman(*at(u), y) - prior(*at(u)), np.array([2.0, -1.0]), tol=1e-9)


@pytest.mark.slow
def test_the_estimate_is_the_most_likely_one(climbed):
    """Within 0.02 nats in every chain, as the note has 0.004-0.012."""
    top = -best(LONG).fun
    estimate = climbed["estimate"]
    short = [top - kalman(*v, LONG) for v in zip(estimate["phi"], estimate["q"], strict=True)]
    print("nats short of the maximum:", *(f"{x:.4f}" for x in sorted(short)))
    assert len(short) == 6
    assert max(short) < 0.02
    stats = climbed["sample_stats_iterates"]
    assert np.all(estimate["gradient_norm"] < 0.2 * stats["gradient_norm"].mean("draw"))
    assert float(stats["renewed"].mean()) > 0.9
    assert not stats["skipped"].any()


@pytest.mark.slow
def test_standard_errors_are_those_of_the_curvature(climbed):
    """A chain's are uncertain by a fifth of their size after 200 iterations, the mean of six by
    0.08; 0.25 are 3 times that."""
    u = best(LONG).x
    cov = np.linalg.inv(-curvature(lambda u: kalman(*at(u), LONG), u))
    (phi, q), estimate = at(u), climbed["estimate"]
    wanted = np.sqrt(np.diag(cov)) * [(1 - phi**2) / 2, q]
    for name, se in zip(("phi_se", "q_se"), wanted, strict=True):
        assert np.isfinite(estimate[name]).all()
        np.testing.assert_allclose(estimate[name].mean(), se, rtol=0.25)


@pytest.mark.slow
def test_the_estimate_is_at_the_mean_of_the_iterates(climbed):
    draws, estimate = climbed["iterates"], climbed["estimate"]
    assert draws.sizes["draw"] == estimate.attrs["iterations"] == 200
    np.testing.assert_allclose(estimate["q"], np.exp(np.log(draws["q"]).mean("draw")), rtol=1e-9)
    logit = np.log((1 + draws["phi"]) / (1 - draws["phi"])).mean("draw")
    np.testing.assert_allclose(estimate["phi"], np.tanh(logit / 2), rtol=1e-9)
    assert draws["x"].shape == (6, 200, 50)
    assert ppl.findings(climbed) == []


@pytest.mark.slow
def test_new_data_and_more_iterations_compile_nothing(climbed):
    def run():
        found = quiet(linear, simulated(50, seed=1), method=CLIMB, chains=2, draws=20, warmup=0)
        more = ppl.extend(
            found, linear, simulated(50, seed=1), draws=30, method=CLIMB, progress=False
        )
        again = quiet(linear, simulated(50, seed=1), method=CLIMB, chains=2, draws=50, warmup=0)
        np.testing.assert_array_equal(more["estimate"]["q"], again["estimate"]["q"])
        np.testing.assert_array_equal(more["iterates"]["x"], again["iterates"]["x"])

    compilations.clear()
    run()
    assert not compilations


@pytest.mark.slow
def test_a_run_from_an_earlier_result_begins_where_that_ended(climbed):
    found = quiet(linear, LONG, method=CLIMB, chains=6, seed=2, init=climbed, warmup=0, draws=1)
    state = climbed["sampler_state"]
    np.testing.assert_allclose(
        np.log(found["iterates"]["q"][:, 0]), state["position.q"], rtol=1e-12
    )
    assert found["estimate"].attrs["iterations"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("smoother", "moves"), [("ppg", 0), ("ffbs", 0), ("ffbs", 4)])
def test_the_mode_of_the_posterior_is_that_of_the_density_in_the_models_parameters(smoother, moves):
    """A prior that pulls q from 0.47 to 0.37, and a Jacobian that would put 0.41 in its place;
    of 24 chains, 23 end less than 0.01 nats short, and one 0.037 (filters: with their bias)."""

    def prior(phi, q):
        return -0.5 * (q / 0.2) ** 2

    def short(phi, q):
        return -exact.fun - kalman(phi, q, LONG) - prior(phi, q)

    exact = best(LONG, prior)
    method = ScoreAscent("posterior", smoother, moves=moves)
    estimate = quiet(linear, LONG, method=method, seed=1)["estimate"]
    lost = [float(short(*v)) for v in zip(estimate["phi"], estimate["q"], strict=True)]
    print("nats short of the mode:", *(f"{x:.4f}" for x in sorted(lost)))
    assert max(lost) < 0.08
    assert np.mean(lost) < (0.02 if smoother == "ppg" else 0.03)
    jacobian = best(LONG, lambda phi, q: prior(phi, q) + np.log(q * (1 - phi**2)))
    assert short(*at(jacobian.x)) > 0.2  # the bounds tell them apart


# -- latents that say nothing: exact gradient ascent -----------------------------------------------

SAMPLE = np.array([0.2, -1.3, 2.2, 0.7])


def idle(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * x, 1.0))
        numpyro.sample("y", dist.Normal(mu, sd), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def steps_of_ascent(gradient, count, size):
    u = np.array([0.3, np.log(0.8)])
    found = []
    for _ in range(count):
        found.append(u)
        u = u + size * gradient(*u)
    return np.array(found)


@pytest.mark.parametrize(
    ("objective", "smoother"),
    others_slow([("likelihood", "ppg"), ("posterior", "ffbs")], ("likelihood", "ppg")),
)
def test_iterates_are_those_of_exact_ascent(objective, smoother):
    """Each step's gradient is that at the point it leaves, in unconstrained coordinates, without
    Jacobians."""

    def gradient(mu, log_sd):
        sd = np.exp(log_sd)
        by_mu = np.sum(SAMPLE - mu) / sd**2
        by_log_sd = np.sum((SAMPLE - mu) ** 2) / sd**2 - len(SAMPLE)
        prior = (-mu, -(sd**2)) if objective == "posterior" else (0.0, 0.0)
        return np.array([by_mu + prior[0], by_log_sd + prior[1]])

    method = ScoreAscent(objective, smoother, 2, 1, 2, 1, optimizer=Plain(0.05))
    tree = quiet(idle, SAMPLE, method=method, chains=2, warmup=3, draws=7,
                 init={"mu": 0.3, "sd": 0.8})  # fmt: skip
    wanted = steps_of_ascent(gradient, 10, 0.05)[3:]
    draws = tree["iterates"]
    for chain_number in range(2):
        np.testing.assert_allclose(draws["mu"][chain_number], wanted[:, 0], rtol=1e-10)
        np.testing.assert_allclose(draws["sd"][chain_number], np.exp(wanted[:, 1]), rtol=1e-10)
    norms = [np.linalg.norm(gradient(*u)) for u in wanted]
    stats = tree["sample_stats_iterates"]
    np.testing.assert_allclose(stats["gradient_norm"][0], norms, rtol=1e-9)
    np.testing.assert_allclose(tree["estimate"]["mu"], wanted[:, 0].mean(), rtol=1e-10)


# -- steps -----------------------------------------------------------------------------------------


def test_adam_is_that_of_optax():
    optax = pytest.importorskip("optax")
    ours, theirs = Adam(0.1, (0.9, 0.98)), optax.adam(0.1, 0.9, 0.98, 1e-8)
    x = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    mine, other = ours.init(x), theirs.init(x)
    for number in range(4):
        g = jax.tree.map(lambda v, n=number: jnp.sin(v + n), x)
        step, mine = ours.update(g, mine, x)
        wanted, other = theirs.update(g, other, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), step, wanted)
        x = jax.tree.map(jnp.add, x, step)


def test_steps_go_up_and_gradients_that_are_not_finite_make_none():
    x = {"a": jnp.array(1.0)}
    optimizer = Adam(0.1)
    new, state, fine = ascended(optimizer, {"a": jnp.array(3.0)}, optimizer.init(x), x)
    assert float(new["a"]) == pytest.approx(1.1)
    assert bool(fine)
    again, same, fine = ascended(optimizer, {"a": jnp.array(jnp.nan)}, state, new)
    assert float(again["a"]) == float(new["a"])
    assert not bool(fine)
    assert int(same.taken) == int(state.taken) == 1


def test_averages_begin_after_the_beginning():
    average = Average.of(jnp.array(0.0))
    for value, counts in ((5.0, False), (7.0, False), (1.0, True), (2.0, True), (6.0, True)):
        average = average.update(jnp.array(value), counts)
        if not counts:
            assert float(average.mean) == value
    assert float(average.mean) == pytest.approx(3.0)


# -- score climbing --------------------------------------------------------------------------------


def sharp(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def guide(x, y):
    a, b = numpyro.param("a", 0.0), numpyro.param("b", lambda key: jnp.zeros(()))
    s = numpyro.param("s", 1.0, constraint=constraints.positive)
    numpyro.sample("x", dist.Normal(a * x + b * y, s))


def closest(y):
    """The (a, b, s) of least KL(p || q): x_t regressed on (x_{t-1}, y_t) under the smoothing law,
    with the residual's standard deviation."""
    mean, cov = smoother(y, r=0.3, start=0.0)
    second = cov + np.outer(mean, mean)
    now, before = np.arange(1, len(y) + 1), np.arange(len(y))
    gram = np.array([[second[before, before].sum(), mean[:-1] @ y], [mean[:-1] @ y, y @ y]])
    cross = np.array([second[now, before].sum(), mean[1:] @ y])
    a, b = np.linalg.solve(gram, cross)
    return a, b, np.sqrt((second[now, now].sum() - cross @ [a, b]) / len(y))


@pytest.fixture(scope="module")
def learnt():
    return learn_proposal(Guided(guide), sharp, LONG, seed=1)


@pytest.mark.slow
def test_the_proposal_is_the_closest_gaussian(learnt):
    """To 0.01; other seeds are within 0.003."""
    found = [float(learnt.parameters[name]) for name in "abs"]
    np.testing.assert_allclose(found, closest(LONG), atol=0.01)
    assert learnt.log_q[:20].mean() < learnt.log_q[-200:].mean() - 10


@pytest.mark.slow
def test_sweeps_of_few_particles_begin_where_the_last_one_ended():
    """Three particles hardly leave the path they begin at: a path that stays would bias the
    proposal, a chain of paths does not."""
    few = learn_proposal(Guided(guide), sharp, LONG, particles=3, iterations=4000, seed=1)
    found = [float(few.parameters[name]) for name in "abs"]
    np.testing.assert_allclose(found, closest(LONG), atol=0.01)


@pytest.mark.slow
def test_parameters_are_averaged_over_the_last_half():
    """Of two iterations, over the second: Adam's first step has its full size."""
    found = learn_proposal(Guided(guide), sharp, LONG, iterations=2, optimizer=Adam(0.1))
    for name, first in (("a", 0.0), ("b", 0.0), ("s", 1.0)):
        value = found.parameters[name] if name != "s" else np.log(found.parameters[name]) + 1.0
        assert abs(value - first) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.slow
def test_the_proposal_makes_better_filters(learnt):
    with jax.enable_x64(True):
        program = Program(sharp, (LONG,))
        series = state_space(program).at(program, {}, program.data)
        keys, size, spread = random.split(random.key(1), 30), {}, {}
        proposals = {"model": Bootstrap(), "learnt": learnt.proposal}
        for name, proposal in proposals.items():
            options = Filter(100, proposal)

            def run(key, options=options):
                last, _, sizes = follow(key, series, options, lambda *known: known[2])
                return last.log_evidence, jnp.mean(sizes)

            log_z, sizes = jax.jit(jax.vmap(run))(keys)
            size[name], spread[name] = float(sizes.mean()), float(log_z.std())
    assert size["learnt"] > 1.2 * size["model"]
    assert spread["learnt"] < 0.7 * spread["model"]


@pytest.mark.slow
def test_other_data_compile_nothing(learnt):
    def run():
        learn_proposal(Guided(guide), sharp, simulated(50, seed=3), seed=2)

    compilations.clear()
    run()
    assert not compilations


def test_the_density_of_a_proposal_is_the_sum_over_its_steps():
    with jax.enable_x64(True):
        program = Program(sharp, (SHORT,))
        series = state_space(program).at(program, {}, program.data)
        x = random.normal(random.key(0), (12,))
        found = log_proposal(
            lambda c, y: numpyro.sample("x", dist.Normal(0.2 * c + 0.7 * y, 0.3)),
            series,
            Path({}, {"x": x}),
        )
        before = jnp.concatenate([jnp.zeros(1), x[:-1]])
        wanted = dist.Normal(0.2 * before + 0.7 * SHORT, 0.3).log_prob(x).sum()
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


# -- what is refused -------------------------------------------------------------------------------


def two_lags(y):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))

    def step(window, y_t):
        x = numpyro.sample("x", dist.Normal(a * window[0] + 0.3 * window[1], 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return (x, window[0]), None

    scan(step, (0.0, 0.0), y)


def discrete_parameter(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * k * x, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def no_scan(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0, 1)), 1.0), obs=y)


@pytest.fixture
def nothing_compiled(monkeypatch):
    def made(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(executables, "compiled", made)


@pytest.mark.usefixtures("nothing_compiled")
def test_what_cannot_be_served_is_said_before_anything_is_compiled():
    for model, method, message in (
        (sharp, ScoreAscent(), "no parameters outside its scan"),
        (discrete_parameter, ScoreAscent(), r"parameters \['k'\] are discrete"),
        (no_scan, ScoreAscent(), "needs for its time axis|scan"),
        (two_lags, ScoreAscent(smoother="ffbs"), r"ScoreAscent\(smoother='ffbs'\) joins paths"),
        (chain, ScoreAscent(proposal=LaplaceProposal()), r"latents \['z'\] are discrete"),
    ):
        with pytest.raises(MethodError, match=message):
            ppl.infer(model, SHORT, method=method)
    for wrong in (
        {"objective": "map"},
        {"smoother": "paris"},
        {"particles": 1},
        {"paths": 0},
        {"sweeps": 2, "dropped": 2},
        {"moves": -1},
        {"proposal": 3},
        {"optimizer": 0.1},
        {"optimizer": Adam},
        {"init_radius": -1.0},
        {"warmup": -1},
    ):
        with pytest.raises(OptionError, match=next(reversed(wrong))):
            ScoreAscent(**wrong)
    for wrong in ({"step_size": 0.0}, {"memory": (0.9,)}, {"memory": (0.9, 1.0)}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            Adam(**wrong)


@pytest.mark.usefixtures("nothing_compiled")
def test_what_score_climbing_cannot_serve_is_said_before_anything_is_compiled():
    def other(x, y):
        numpyro.sample("z", dist.Normal(numpyro.param("a", 0.0), 1.0))

    def fixed(x, y):
        numpyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(OptionError, match=r"must be Guided\(program\)"):
        learn_proposal(guide, sharp, LONG)
    with pytest.raises(MethodError, match="no parameter to learn"):
        learn_proposal(Guided(fixed), sharp, LONG)
    with pytest.raises(MethodError, match="must draw the same sites"):
        learn_proposal(Guided(other), sharp, LONG)
    with pytest.raises(MethodError, match=r"values of the parameters \['phi', 'q'\]"):
        learn_proposal(Guided(guide), linear, LONG)
    with pytest.raises(SiteError, match=r"given= names \['r'\]"):
        learn_proposal(Guided(guide), sharp, LONG, given={"r": 1.0})
    for wrong in ({"particles": 1}, {"iterations": 0}, {"paths": 0}, {"optimizer": 1}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            learn_proposal(Guided(guide), sharp, LONG, **wrong)


def test_most_gradients_not_finite_is_a_problem():
    state = SimpleNamespace(skipped=np.array([0, 6]), taken=np.array([10, 10]))
    assert "chains [1]" in ScoreAscent().problem(state)
    state.skipped = np.array([0, 5])
    assert ScoreAscent().problem(state) == ""


# -- longer ones -----------------------------------------------------------------------------------


def impossible(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(mu, 1.0))
        numpyro.factor("never", -jnp.inf)
        return x, None

    scan(step, 0.0, y)


@pytest.mark.slow
def test_impossible_data_are_said_to_be():
    with pytest.raises(InitializationError, match="no particle has a finite weight"):
        quiet(impossible, SHORT, method=ScoreAscent())


@pytest.mark.slow
def test_a_hidden_markov_chain_is_learned():
    """Within 0.02 nats of the exact maximum of the penalised likelihood; 60 times."""
    rng = np.random.default_rng(4)
    z, y = 0, []
    for _ in range(60):
        z = z if rng.uniform() < 0.85 else 1 - z
        y.append(2.0 * z + 0.6 * rng.normal())
    y, names = np.array(y), ("stay", "gap", "noise")

    def objective(x):
        u = dict(zip(names, x, strict=True))
        theta = own(u)
        prior = dist.Beta(2.0, 1.0).log_prob(theta["stay"])
        prior += dist.Normal(0.0, 2.0).log_prob(theta["gap"])
        return -forward(u, y) - prior - dist.HalfNormal(1.0).log_prob(theta["noise"])

    with jax.enable_x64(True):
        value = jax.jit(objective)
        exact = minimize(lambda x: float(value(x)), np.array([1.5, 1.8, -0.5]), tol=1e-9)
        tree = quiet(chain, y, method=ScoreAscent("posterior"), seed=1,
                     init={"stay": 0.7, "gap": 1.0, "noise": 1.0})  # fmt: skip
        for c in range(4):
            stay, gap, noise = (float(tree["estimate"][name][c]) for name in names)
            u = jnp.array([np.log(stay / (1 - stay)), gap, np.log(noise)])
            assert float(value(u)) - exact.fun < 0.02


@pytest.mark.slow
def test_series_that_remember_two_steps_are_replayed():
    """An AR(2) series with noise; exact maximum by one dense Gaussian. Paths along ancestors say
    less than paths drawn backwards: more particles, 0.05 nats."""
    y = simulated(40, seed=2)

    def log_likelihood(a):
        root = np.zeros((40, 40))
        for t in range(40):
            root[t] = a * (root[t - 1] if t else 0.0) + 0.3 * (root[t - 2] if t > 1 else 0.0)
            root[t, t] += 0.5
        seen = root @ root.T + 0.49 * np.eye(40)
        return -0.5 * (y @ np.linalg.solve(seen, y) + np.linalg.slogdet(seen)[1])

    exact = minimize(lambda a: -log_likelihood(a[0]), [0.4], tol=1e-9)
    tree = quiet(two_lags, y, method=ScoreAscent(particles=64), seed=1)
    for a in tree["estimate"]["a"].values:
        assert -exact.fun - log_likelihood(a) < 0.05


@pytest.mark.slow
def test_other_proposals_and_optimisers_find_the_same():
    optax = pytest.importorskip("optax")
    top = -best(LONG).fun
    for method in (
        ScoreAscent(particles=16, proposal=LaplaceProposal(newton=1)),
        ScoreAscent(particles=16, optimizer=optax.adam(0.03)),
        ScoreAscent(particles=16, optimizer=Adam(0.05), sweeps=2, dropped=1),
    ):
        estimate = quiet(linear, LONG, method=method, chains=3, seed=1)["estimate"]
        for phi, q in zip(estimate["phi"], estimate["q"], strict=True):
            assert top - kalman(phi, q, LONG) < 0.04


@pytest.mark.slow
def test_learnt_proposals_serve_other_methods():
    learnt = learn_proposal(Guided(guide), sharp, LONG, seed=1, iterations=200)
    tree = quiet(sharp, LONG, method=ParticleFilter(200, proposal=learnt.proposal), draws=100)
    mean, _ = smoother(LONG, r=0.3, start=0.0)
    x = tree["posterior"]["x"].values.reshape(-1, 50)
    assert np.max(np.abs(x.mean(0) - mean[1:])) < 0.12
