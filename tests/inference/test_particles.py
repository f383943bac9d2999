"""Particle filters and smoothers against enumerations and exact Gaussian answers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow
from jax import random
from numpyro.contrib.control_flow import scan

from ppl_toolkit.diagnostics.transitions import enumerated
from ppl_toolkit.inference.paris import paris
from ppl_toolkit.inference.particle_filter import Filter, follow
from ppl_toolkit.inference.particle_gibbs import Path, sweep
from ppl_toolkit.inference.proposals import Adapted, Auxiliary, Bootstrap, Guided, LaplaceProposal
from ppl_toolkit.inference.state_space import state_space
from ppl_toolkit.program import Program

# -- two states, three times: everything by enumeration ------------------------------------------

MU = np.array([0.6, 0.4])
MOVES = np.array([[0.7, 0.3], [0.2, 0.8]])
G = np.array([[0.9, 0.2], [0.3, 1.1], [0.5, 1.7]])
STATES = list(itertools.product((0, 1), repeat=3))
LAW = np.array(
    [MU[a] * G[0, a] * MOVES[a, b] * G[1, b] * MOVES[b, c] * G[2, c] for a, b, c in STATES]
)
Z = LAW.sum()
H = np.array([a * b + b / 2 + b * c + c / 2 for a, b, c in STATES])
TWO = Filter(2, resampling="multinomial", ess=1.0)


def two_states(mu, moves, log_g):
    z = numpyro.sample("z_0", dist.Categorical(mu))
    numpyro.factor("g_0", log_g[0, z])

    def step(z, log_g):
        z = numpyro.sample("z", dist.Categorical(moves[z]))
        numpyro.factor("g", log_g[z])
        return z, None

    scan(step, z, log_g[1:])


def statistic(carry, latents, t):
    return 1.0 * latents["z"] * carry + latents["z"] / 2


def nothing(initial):
    return jnp.zeros(())


@pytest.fixture(scope="module")
def finite():
    program = Program(two_states, (MU, MOVES, np.log(G)))
    with program.context():
        yield state_space(program).at(program, {}, program.data)


def test_the_oracle():
    np.testing.assert_allclose(Z, 0.464608, rtol=1e-15)
    np.testing.assert_allclose(LAW @ H, 0.821547, rtol=1e-6)


@pytest.mark.parametrize("proposal", [Bootstrap(), Adapted()], ids=repr)
def test_evidence_is_unbiased_exactly(finite, proposal):
    options = Filter(2, proposal, "multinomial", 1.0)
    found = enumerated(lambda key: follow(key, finite, options, lambda *_: None)[0].log_evidence)
    np.testing.assert_allclose(found.probabilities.sum(), 1.0, rtol=1e-14)
    np.testing.assert_allclose(found.probabilities @ np.exp(found.values), Z, rtol=1e-14)


@pytest.mark.parametrize("proposal", [Bootstrap(), Adapted()], ids=repr)
def test_evidence_times_smoothed_sums_is_unbiased_exactly(finite, proposal):
    def run(key):
        options = Filter(2, proposal, "multinomial", 1.0)
        last, sums = paris(key, finite, options, statistic, nothing, draws=None)
        return jnp.exp(last.log_evidence) * sums

    found = enumerated(run)
    np.testing.assert_allclose(found.probabilities @ found.values, LAW @ H, rtol=1e-14)


@pytest.fixture(scope="module")
def conditional(finite):
    """The transition matrix of a conditional sweep, and the mean of its estimate, by path."""
    matrix, means = np.zeros((8, 8)), np.zeros(8)

    def run(key, path):
        return sweep(key, finite, path, TWO, statistic, nothing, draws=None)

    for i, (a, b, c) in enumerate(STATES):
        path = Path({"z_0": jnp.int32(a)}, {"z": jnp.array([b, c], jnp.int32)})
        found = enumerated(run, path)
        new, estimate = found.values
        z = new.latents["z"]
        np.add.at(matrix[i], new.initial["z_0"] * 4 + z[:, 0] * 2 + z[:, 1], found.probabilities)
        means[i] = found.probabilities @ estimate
    return matrix, means


@pytest.mark.slow
def test_a_conditional_sweep_leaves_the_smoothing_law_invariant(conditional):
    matrix, means = conditional
    phi = LAW / Z
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-14)
    np.testing.assert_allclose(phi @ matrix, phi, rtol=1e-14)
    np.testing.assert_allclose(phi @ means, phi @ H, rtol=1e-14)
    values = np.sort(np.linalg.eigvals(matrix).real)[::-1]
    np.testing.assert_allclose(values[:4], [1.0, 0.6611, 0.4702, 0.4457], atol=5e-5)


def test_the_bias_of_particle_gibbs_decays_as_published(conditional):
    matrix, means = conditional
    law = np.array([MU[a] * MOVES[a, b] * MOVES[b, c] for a, b, c in STATES])
    biases = []
    for _ in range(6):
        biases.append(law @ means - LAW @ H / Z)
        law = law @ matrix
    wanted = [-0.34287, -0.23364, -0.15939, -0.10801, -0.07271, -0.04869]
    np.testing.assert_allclose(biases, wanted, atol=5e-6)


@pytest.mark.parametrize(
    ("particles", "second", "bias", "bound"),
    others_slow(
        [(2, 0.7069, -1.13336, 0.8167), (3, 0.5320, -0.82457, 0.6901)],
        (3, 0.5320, -0.82457, 0.6901),
    ),
)
def test_a_series_of_one_step_is_iterated_importance_resampling(particles, second, bias, bound):
    """Three points: the spectrum of the kernel, and the bias of the first sweep from the prior."""
    law, w, h = np.array([0.5, 0.3, 0.2]), np.array([0.4, 1.0, 3.0]), np.array([0.0, 1.0, 5.0])

    def points(law, log_w):
        def step(carry, _):
            z = numpyro.sample("z", dist.Categorical(law))
            numpyro.factor("w", log_w[z])
            return z, None

        scan(step, 0, None, length=1)

    def value(carry, latents, t):
        return jnp.asarray(h)[latents["z"]]

    program = Program(points, (law, np.log(w)))
    matrix, means = np.zeros((3, 3)), np.zeros(3)
    with program.context():
        series = state_space(program).at(program, {}, program.data)
        options = Filter(particles, resampling="multinomial", ess=1.0)
        for z in range(3):
            path = Path({}, {"z": jnp.array([z], jnp.int32)})

            def run(key, path=path):
                return sweep(key, series, path, options, value, nothing, draws=None)

            found = enumerated(run)
            new, estimate = found.values
            np.add.at(matrix[z], new.latents["z"][:, 0], found.probabilities)
            means[z] = found.probabilities @ estimate
    target = law * w / (law @ w)
    np.testing.assert_allclose(target @ matrix, target, rtol=1e-14)
    np.testing.assert_allclose(target @ means, target @ h, rtol=1e-14)
    values = np.sort(np.linalg.eigvals(matrix).real)[::-1]
    np.testing.assert_allclose(values[1], second, atol=5e-5)
    assert values[1] < bound
    np.testing.assert_allclose(law @ means - target @ h, bias, atol=5e-6)


# -- linear and Gaussian -------------------------------------------------------------------------


def linear(y, phi=0.8, q=0.5, r=0.7):
    start = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, q))
        numpyro.sample("y", dist.Normal(x, r), obs=y_t)
        return x, None

    scan(step, start, y)


def smoother(y, phi=0.8, q=0.5, r=0.7):
    """Log evidence, and means and covariances of x_0, ..., x_T given y, by one dense Gaussian."""
    size = len(y)
    root = np.zeros((size + 1, size + 1))
    root[0, 0] = 1.0
    for t in range(1, size + 1):
        root[t] = phi * root[t - 1]
        root[t, t] += q
    prior = root @ root.T
    seen = prior[1:, 1:] + r**2 * np.eye(size)
    gain = np.linalg.solve(seen, prior[1:]).T
    log_z = -0.5 * (y @ np.linalg.solve(seen, y) + np.linalg.slogdet(seen)[1])
    log_z -= 0.5 * size * np.log(2 * np.pi)
    return log_z, gain @ y, prior - gain @ prior[1:]


def simulated(size, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(), []
    for _ in range(size):
        x = 0.8 * x + 0.5 * rng.normal()
        y.append(x + 0.7 * rng.normal())
    return np.array(y)


Y = simulated(15)


@pytest.fixture(scope="module")
def gaussian():
    program = Program(linear, (Y,))
    with program.context():
        yield state_space(program).at(program, {}, program.data)


def many(function, count, seed):
    """``function`` of many keys in one program."""
    return jax.tree.map(
        np.asarray, jax.jit(jax.vmap(function))(random.split(random.key(seed), count))
    )


def guide(x, y):
    """The law of x_t given x_{t-1} and y_t."""
    precision = 1 / 0.25 + 1 / 0.49
    mean = (0.8 * x / 0.25 + y / 0.49) / precision
    numpyro.sample("x", dist.Normal(mean, precision**-0.5))


def move(x, y):
    numpyro.sample("x", dist.Normal(0.8 * x, 0.5))


def ahead(x, y):
    return dist.Normal(0.8 * x, jnp.sqrt(0.25 + 0.49)).log_prob(y)


FILTERS = {
    "multinomial": Filter(32, resampling="multinomial", ess=1.0),
    "adaptive": Filter(32),
    "killing": Filter(32, resampling="killing"),
    "guided": Filter(32, Guided(guide)),
    "look-ahead": Filter(32, Guided(guide, ahead)),
    "look-ahead, model": Filter(32, Guided(move, ahead), ess=1.0),
    "laplace": Filter(32, LaplaceProposal()),
    "auxiliary": Filter(32, Auxiliary(), ess=1.0),
    "auxiliary, in part": Filter(32, Auxiliary(0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", others_slow(FILTERS, "multinomial", "guided"))
def test_evidence_is_unbiased(gaussian, name):
    """|z| <= 4.5: wrongly fails with probability 7e-6 each."""
    log_z = many(
        lambda key: follow(key, gaussian, FILTERS[name], lambda *_: None)[0].log_evidence, 1000, 1
    )
    ratio = np.exp(log_z - smoother(Y)[0])
    assert abs(ratio.mean() - 1.0) <= 4.5 * ratio.std() / np.sqrt(len(ratio))


@pytest.mark.parametrize(
    "proposal",
    [
        pytest.param(Guided(guide, ahead), id="own"),
        pytest.param(LaplaceProposal(1, 1.0, 0.0), id="laplace"),
    ],
)
@pytest.mark.slow
def test_fully_adapted_filters_have_equal_weights(gaussian, proposal):
    options = Filter(16, proposal, ess=1.0)
    _, _, weights = follow(random.key(0), gaussian, options, lambda p, *_: p.log_weights)
    np.testing.assert_allclose(np.asarray(weights), -np.log(16), atol=1e-12)


def test_observations_before_the_move_are_looked_ahead_to_perfectly():
    """They depend on the carry alone: all weights are equal."""

    def seen_first(y):
        def step(x, y_t):
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return numpyro.sample("x", dist.Normal(0.8 * x, 0.5)), None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    program = Program(seen_first, (Y,))
    with program.context():
        space = state_space(program)
        series = space.at(program, {}, program.data)
        options = Filter(16, Auxiliary(), ess=1.0)
        _, _, weights = follow(random.key(0), series, options, lambda p, *_: p.log_weights)
    assert space.ahead
    np.testing.assert_allclose(np.asarray(weights), -np.log(16), atol=1e-12)


@pytest.mark.slow
def test_a_constant_factor_shifts_the_evidence_alone():
    def shifted(y, c):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            numpyro.factor("c", c)
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    found = []
    for c in (0.0, 1.25):
        program = Program(shifted, (Y, c))
        with program.context():
            series = state_space(program).at(program, {}, program.data)
            last, _, _ = follow(random.key(3), series, Filter(64), lambda *_: None)
            found.append((float(last.log_evidence), np.asarray(last.log_weights)))
    np.testing.assert_allclose(found[1][0] - found[0][0], 15 * 1.25, rtol=1e-12)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-12)


def test_nothing_observed_means_evidence_one():
    def free(length):
        def step(x, _):
            return numpyro.sample("x", dist.Normal(0.8 * x, 0.5)), None

        scan(step, 0.0, None, length=length)

    program = Program(free, (7,))
    with program.context():
        series = state_space(program).at(program, {}, program.data)
        last, _, _ = follow(random.key(3), series, Filter(64), lambda *_: None)
    assert abs(float(last.log_evidence)) < 1e-12


def product(carry, latents, t):
    return latents["x"] * carry


def exact_product():
    _, mean, cov = smoother(Y)
    return float(np.sum(mean[1:] * mean[:-1] + np.diag(cov, 1)))


@pytest.mark.parametrize(("draws", "moves"), others_slow([(None, 0), (2, 0), (2, 4)]))
def test_smoothed_sums_agree_with_the_gaussian_smoother(gaussian, draws, moves):
    """400 particles: bias O(T / N), here below 0.03; |z| <= 4.5."""
    found = many(
        lambda key: paris(key, gaussian, Filter(400), product, nothing, draws, moves)[1], 32, 2
    )
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert abs(found.mean() - exact_product()) <= 4.5 * error + 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    ("particles", "proposal"),
    [
        pytest.param(2, Bootstrap(), id="2"),
        pytest.param(8, Bootstrap(), id="8"),
        pytest.param(4, Guided(guide, ahead), id="guided"),
        pytest.param(2, LaplaceProposal(), id="laplace"),
    ],
)
def test_conditional_sweeps_are_stationary(gaussian, particles, proposal):
    """From a path of the smoothing law the estimate is unbiased for every N, and the new path
    follows the law: |z| <= 4.5 for the estimate, means and squares."""
    _, mean, cov = smoother(Y)
    root = np.linalg.cholesky(cov)
    options = Filter(particles, proposal)

    def run(key):
        key_path, key_sweep = random.split(key)
        x = mean + root @ random.normal(key_path, mean.shape)
        path = Path({"x_0": x[0]}, {"x": x[1:]})
        new, estimate = sweep(key_sweep, gaussian, path, options, product, nothing, 2)
        new = jnp.concatenate([new.initial["x_0"][None], new.latents["x"]])
        return estimate, new - mean, (new - mean) ** 2

    count = 1000
    estimate, first, second = many(run, count, 5)
    for values, wanted in ((estimate, exact_product()), (first, 0.0), (second, np.diag(cov))):
        error = values.std(0, ddof=1) / np.sqrt(count)
        assert np.max(np.abs(values.mean(0) - wanted) / error) <= 4.5
