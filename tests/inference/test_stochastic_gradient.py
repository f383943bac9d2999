"""Stochastic-gradient kernels: steps by hand, laws by linear algebra, all minibatches."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow
from jax import random
from scipy import stats

from ppl_toolkit import Program, positions
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference import (
    SGHMC,
    SGLD,
    SGNHT,
    Cyclical,
    PolynomialDecay,
    block,
    cycle,
    repeat,
)
from ppl_toolkit.inference.adaptation import schedule
from ppl_toolkit.inference.control_variates import Anchor, estimate
from ppl_toolkit.inference.kernel import Stage
from ppl_toolkit.inference.target import Target
from ppl_toolkit.minibatches import log_parts_of_rows, rows, subset, whole_log_parts


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


rng = np.random.default_rng(0)
N, B = 12, 4
X = rng.normal(size=(N, 2))
Y = X @ np.array([1.0, -0.5]) + rng.normal(size=N)


def regression(x, y, batch):
    w = numpyro.sample("w", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("row", N, subsample_size=batch) as row:
        numpyro.sample("y", dist.Normal(x[row] @ w, 1), obs=y[row])


def logistic(x, y, batch):
    w = numpyro.sample("w", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("row", N, subsample_size=batch) as row:
        numpyro.sample("y", dist.Bernoulli(logits=x[row] @ w), obs=y[row])


def mean(y, batch):
    m = numpyro.sample("m", dist.Normal(0, 2))
    with numpyro.plate("row", N, subsample_size=batch):
        numpyro.sample("y", dist.Normal(m, 1), obs=numpyro.subsample(y, event_dim=0))


def target_of(program):
    """What kernels see in a run: the whole target, and minibatches of it."""
    data = program.data
    return Target(
        lambda x: whole_log_parts(program, x, data),
        minibatches=(
            lambda key: rows(program, key, data),
            lambda given: log_parts_of_rows(program, given, data),
        ),
    )


# -- rows -----------------------------------------------------------------------------------------


class TestSubsets:
    @pytest.mark.parametrize(("size", "count"), [(5, 2), (6, 5), (4, 4), (9, 4)])
    def test_all_are_equally_likely(self, size, count):
        """Chi squared of 40 000 subsets, at level 1e-4 each."""
        drawn = jax.vmap(lambda key: subset(key, size, count))(random.split(random.key(1), 40_000))
        seen = collections.Counter(map(tuple, np.sort(np.asarray(drawn), axis=1)))
        subsets = list(itertools.combinations(range(size), count))
        assert set(seen) <= set(subsets)
        counts = [seen[one] for one in subsets]
        assert len(counts) == 1 or stats.chisquare(counts).pvalue > 1e-4

    @pytest.mark.parametrize(("size", "count"), [(100, 99), (10**6, 2000)])
    def test_large_ones_have_no_row_twice(self, size, count):
        drawn = jax.vmap(lambda key: subset(key, size, count))(random.split(random.key(0), 20))
        assert drawn.min() >= 0
        assert drawn.max() < size
        assert all(len(set(one)) == count for one in np.asarray(drawn).tolist())


def test_plates_draw_independently():
    """The nine pairs of single rows of two plates, 9000 draws: chi squared at level 1e-4."""

    def two(y):
        m = numpyro.sample("m", dist.Normal(0, 1))
        for name in "ab":
            with numpyro.plate(name, 3, subsample_size=1) as row:
                numpyro.sample(f"y_{name}", dist.Normal(m, 1), obs=y[row])

    program = Program(two, (np.arange(3.0),))
    keys = random.split(random.key(2), 9000)
    drawn = jax.vmap(lambda key: rows(program, key, program.data))(keys)
    pairs = np.asarray(3 * drawn["a"] + drawn["b"]).ravel()
    assert stats.chisquare(np.bincount(pairs, minlength=9)).pvalue > 1e-4


def crossed(y, few):
    """Two subsampled plates that cross, and a third one beside them."""
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0, 1))
    with (
        numpyro.plate("row", 4, subsample_size=few, dim=-2) as i,
        numpyro.plate("column", 3, subsample_size=2, dim=-1) as j,
    ):
        numpyro.sample("y", dist.Normal(a + b**2, 1), obs=y[i[:, None], j])
    with numpyro.plate("other", 5, subsample_size=3) as k:
        numpyro.sample("z", dist.Normal(a * b, 2.0), obs=y.ravel()[k])


@pytest.mark.parametrize(
    ("model", "args", "at"),
    [
        (regression, (X, Y, 3), {"w": np.array([0.3, 1.1])}),
        (logistic, (X, (Y > 0) * 1, 2), {"w": np.array([0.3, 1.1])}),
        (mean, (Y, 5), {"m": np.asarray(0.4)}),
        (crossed, (rng.normal(size=(4, 3)), 2), {"a": np.asarray(0.3), "b": np.asarray(-0.7)}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gradients_over_all_minibatches_have_the_mean_of_the_whole(model, args, at):
    program = Program(model, args)
    plates = {name: (size, len(index)) for name, (size, index) in program.subsampled.items()}

    def density(x, chosen):
        return sum(log_parts_of_rows(program, (x, chosen), program.data))

    combinations = [list(itertools.combinations(range(n), k)) for n, k in plates.values()]
    chosen = [np.array(each) for each in zip(*itertools.product(*combinations), strict=True)]
    batches = dict(zip(plates, chosen, strict=True))
    values, gradients = jax.jit(jax.vmap(lambda c: jax.value_and_grad(density)(at, c)))(batches)
    whole = jax.jit(
        jax.value_and_grad(lambda x: sum(whole_log_parts(program, x, program.data)))
    )(at)  # fmt: skip
    np.testing.assert_allclose(values.mean(), whole[0], rtol=1e-12)
    for name in at:
        np.testing.assert_allclose(gradients[name].mean(0), whole[1][name], rtol=1e-11)
    arrays = tuple(a for a in program.arguments.arrays)
    full = Program(model, (*args[:-1], None)) if model is not crossed else program.whole
    alone = jax.jit(lambda x: sum(positions.log_parts(full, x, arrays)))(at)
    np.testing.assert_allclose(whole[0], alone, rtol=1e-13)  # without subsample_size


def test_a_program_without_subsampled_plates_is_whole():
    program = Program(regression, (X, Y, None))
    assert program.whole is program
    target = target_of(program)
    assert target.minibatch(random.key(0)) is target


# -- steps by hand --------------------------------------------------------------------------------


PROGRAM = Program(regression, (X, Y, B))


@jax.jit
def choices(key, number):
    """The rows and the noise of one step, from the keys that the kernels use."""
    key_rows, key_noise = random.split(random.fold_in(key, number))
    return rows(PROGRAM, key_rows, PROGRAM.data)["row"], random.normal(key_noise, (2,), float)


class ByHand:
    """The algorithms in NumPy, on the regression, with the noise and the rows of the kernels."""

    def __init__(self, kernel, warming):
        self.kernel, self.warming = kernel, warming
        self.w, self.t = np.array([0.5, -1.0]), 0
        self.p, self.xi = np.zeros(2), getattr(kernel, "friction", None)
        self.tau, self.gbar, self.V = np.ones(2), np.ones(2), np.ones(2)
        self.anchor = self.w

    def gradient(self, w, index):
        return -w / 4 + N / len(index) * X[index].T @ (Y[index] - X[index] @ w)

    def step(self, key):
        """One transition of ``steps`` steps that sample."""
        number, left, kernel = 0, self.kernel.steps, self.kernel
        while left:
            index, noise = map(np.asarray, choices(key, number))
            e, exploring = kernel.step_size, False
            if isinstance(e, PolynomialDecay):
                e = 0.02 / (5.0 + self.t) ** 0.4
            elif isinstance(e, Cyclical):
                exploring = self.t % 7 < 3
                e = 0.005 * (np.cos(np.pi * (self.t % 7) / 7) + 1)
            g = self.gradient(self.w, index)
            if kernel.control_variates:
                g = self.gradient(self.anchor, np.arange(N)) + (
                    g - self.gradient(self.anchor, index)
                )
            self.move(e, g, 0.0 * noise if exploring else noise, exploring)
            number, left, self.t = number + 1, left - (not exploring), self.t + 1
        return number

    def move(self, e, g, noise, exploring):
        if isinstance(self.kernel, SGLD):
            self.w = self.w + e / 2 * g + np.sqrt(e) * noise
            return
        alpha = self.kernel.friction
        if isinstance(self.kernel, SGNHT):
            self.p = self.p - self.xi * self.p + e * g + np.sqrt(2 * alpha) * noise
            if not exploring:
                self.xi += e * e * ((1 - self.xi / 2) * self.p @ self.p / 2 - 1)
        elif self.kernel.scale_adapted:
            if self.warming:  # Springenberg et al. (2016), equations 7 to 9
                w = 1 / (self.tau + 1)
                self.tau = self.tau - self.tau * self.gbar**2 / (self.V + 1e-10) + 1
                self.gbar = self.gbar + w * (g - self.gbar)
                self.V = self.V + w * (g * g - self.V)
            M = np.sqrt(self.V) + 1e-10
            own = 0.0 if self.kernel.control_variates else e**4
            v = e * self.p  # as they write it
            v = v + e * e / M * g - alpha * v + np.sqrt(2 * e * e * alpha / M - own) * noise
            self.p = v / e
        else:
            self.p = (1 - alpha) * self.p + e * g + np.sqrt(2 * alpha) * noise
        self.w = self.w + e * self.p


KERNELS = {
    "SGLD": SGLD(0.01),
    "SGLD, three steps a draw": SGLD(0.01, steps=3),
    "SGLD, decaying": SGLD(PolynomialDecay(0.02, 5.0, 0.4), steps=2),
    "SGLD, cyclical": SGLD(Cyclical(0.01, 7, 0.4), steps=2),
    "SGLD, control variates": SGLD(0.01, control_variates=True),
    "SGHMC": SGHMC(0.05, friction=0.2),
    "SGHMC, cyclical": SGHMC(Cyclical(0.01, 7, 0.4), friction=0.2),
    "SGHMC, scale-adapted": SGHMC(0.05, friction=0.3, scale_adapted=True),
    "SGHMC, scale-adapted, control variates": SGHMC(
        0.05, friction=0.3, scale_adapted=True, control_variates=True
    ),
    "SGNHT": SGNHT(0.05, friction=0.2),
    "SGNHT, cyclical": SGNHT(Cyclical(0.01, 7, 0.4), friction=0.2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_steps_are_those_of_the_papers(name):
    """Twelve transitions, the first eight of them warm-up (too short for a window)."""
    kernel, by_hand = KERNELS[name], ByHand(KERNELS[name], warming=True)
    plan = schedule(8)

    @jax.jit
    def step(key, index, state):
        return kernel.bind(target_of(PROGRAM), Stage(index, plan)).step(key, state)

    start = {"w": by_hand.w}
    state = jax.jit(kernel.bind(target_of(PROGRAM)).init)(start, random.key(0))
    for index in range(12):
        by_hand.warming = index < 8
        key = random.key(index)
        state, info = step(key, np.int32(index), state)
        number = by_hand.step(key)
        np.testing.assert_allclose(state.position["w"], by_hand.w, rtol=1e-12)
        assert info["n_steps"] == number * (2 if kernel.control_variates else 1)
        assert not info["diverging"]
    if "kinetic_temperature" in info:
        xi = by_hand.xi
        mass = np.sqrt(by_hand.V) if getattr(kernel, "scale_adapted", False) else 1.0
        wanted = (1 - xi / 2) * np.mean(by_hand.p**2 * mass)
        np.testing.assert_allclose(info["kinetic_temperature"], wanted, rtol=1e-8)


@pytest.mark.slow
def test_the_anchor_is_the_mean_of_a_window_of_the_warm_up():
    program = Program(logistic, (X, (Y > 0) * 1, B))
    target, plan = target_of(program), schedule(40)
    kernel = SGLD(0.05, control_variates=True)

    def body(state, index):
        bound = kernel.bind(target, Stage(index, plan))
        state, _ = bound.step(random.fold_in(random.key(3), index), state)
        return state, (state.position["w"], state.kept.anchor)

    first = kernel.bind(target).init({"w": np.array([1.0, 1.0])}, random.key(0))
    _, (w, anchors) = jax.jit(lambda: jax.lax.scan(body, first, jnp.arange(60)))()
    begin, end = int(plan.first), int(plan.ends[plan.ends >= 0][-1])
    ends = [-1, *plan.ends[plan.ends >= 0].tolist()]
    start = max(begin, ends[-2] + 1)
    np.testing.assert_allclose(anchors.position[0], [1.0, 1.0])
    np.testing.assert_allclose(anchors.position[-1], w[start : end + 1].mean(0), rtol=1e-12)
    whole = jax.grad(lambda x: target.log_density({"w": x}))(anchors.position[-1])
    np.testing.assert_allclose(anchors.gradient[-1], whole, rtol=1e-12)


# -- laws by linear algebra -----------------------------------------------------------------------


def spread(kernel, program, steps, chains=10_000):
    """Mean square of site m about the posterior's mean after a number of steps from there."""
    precision = N + 1 / 4
    centre = Y.sum() / precision
    bound = kernel.bind(target_of(program))

    def chain(key):
        first = bound.init({"m": jnp.asarray(centre)}, key)
        last, _ = jax.lax.scan(
            lambda state, k: (bound.step(k, state)[0], None), first, random.split(key, steps)
        )
        return last.position["m"]

    m = np.asarray(jax.jit(jax.vmap(chain))(random.split(random.key(5), chains)))
    return np.mean((m - centre) ** 2)


def exact_spread(e, alpha, steps, noise, mass=1.0, own=0.0):
    """The same by recursion of the covariance of (x, p); alpha None: SGLD."""
    a = N + 1 / 4
    if alpha is None:
        A, Q = np.array([[1 - e * a / 2]]), np.array([[e + e**2 / 4 * noise]])
    else:
        A = np.array([[1 - e * e * mass * a, e * (1 - alpha)], [-e * mass * a, 1 - alpha]])
        q = 2 * alpha * mass + e**2 * mass**2 * noise - own
        Q = q * np.outer([e, 1.0], [e, 1.0])
    S = np.zeros_like(Q)
    for _ in range(steps):
        S = A @ S @ A.T + Q
    return S[0, 0]


# Variance of N / B times a sum of B of N numbers without replacement.
NOISE = N**2 * (1 - B / N) * Y.var(ddof=1) / B

LAWS = {
    "SGLD": (SGLD(0.06), B, (0.06, None, 30, NOISE)),
    "SGLD, whole gradients": (SGLD(0.06), None, (0.06, None, 30, 0.0)),
    "SGLD, control variates": (SGLD(0.06, control_variates=True), B, (0.06, None, 30, 0.0)),
    "SGHMC": (SGHMC(0.08, friction=0.3), B, (0.08, 0.3, 30, NOISE)),
    "SGHMC, whole gradients": (SGHMC(0.15, friction=0.5), None, (0.15, 0.5, 30, 0.0)),
    "SGHMC, control variates": (
        SGHMC(0.15, friction=0.5, control_variates=True), B, (0.15, 0.5, 30, 0.0),
    ),
    # The scales are frozen where there is no warm-up, at one.
    "scale-adapted": (
        SGHMC(0.08, friction=0.3, scale_adapted=True), B, (0.08, 0.3, 30, NOISE, 1.0, 0.08**2),
    ),
    "scale-adapted, whole gradients": (
        SGHMC(0.15, friction=0.5, scale_adapted=True), None, (0.15, 0.5, 30, 0.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", others_slow(LAWS, "SGLD", "SGHMC"))
def test_the_spread_of_the_draws_is_that_of_the_linear_map(name):
    """10 000 independent chains of a Gaussian mean: the mean square has a relative standard error
    of 1.4% (normal draws; those of minibatches have thinner tails). Within 4 of them: 6e-5 each.
    """
    kernel, batch, law = LAWS[name]
    found = spread(kernel, Program(mean, (Y, batch)), law[2])
    assert abs(found / exact_spread(*law) - 1) < 4 * np.sqrt(2 / 10_000)


def test_the_variances_that_the_documentation_gives():
    a, V = N + 1 / 4, NOISE
    e = 0.06
    np.testing.assert_allclose(
        exact_spread(e, None, 500, V), (1 + e * V / 4) / (a * (1 - e * a / 4)), rtol=1e-12
    )
    for e, alpha, m in ((0.08, 0.3, 1.0), (0.1, 1.0, 0.5), (0.2, 0.05, 2.0)):
        T = (1 + e * e * m * V / (2 * alpha)) / (1 - e * e * m * a / (2 * (2 - alpha)))
        np.testing.assert_allclose(exact_spread(e, alpha, 3000, V, m), T / a, rtol=1e-10)


def along(kernel, target, size, count, seed=0):
    """Positions (count, size) and statistics of one chain that starts at zero."""

    def run(key):
        bound = kernel.bind(target)
        first = bound.init({"x": jnp.zeros(size)}, key)

        def body(state, k):
            state, info = bound.step(k, state)
            return state, (state.position["x"], info)

        return jax.lax.scan(body, first, random.split(key, count))[1]

    return jax.jit(run)(random.key(seed))


@pytest.mark.parametrize("noise", others_slow([0.0, 60.0], 60.0))
def test_the_thermostat_absorbs_the_noise_of_the_gradients(noise):
    """400 coordinates of unit scale: with V e^2 = 0.6 plain SGHMC would be four times too hot.

    The fluctuation of xi is of order 1 / D; the bound of 2% is four standard errors of the mean
    square of 400 coordinates over some 150 autocorrelation times."""
    size = 400
    wobble = np.sqrt(noise)

    def of_rows(given):
        x, row = given
        shift = random.normal(random.wrap_key_data(row["key"]), (size,), float)
        return 0.0, -0.5 * jnp.sum(x["x"] ** 2) + wobble * jnp.dot(x["x"], shift)

    target = Target(
        lambda x: (0.0, -0.5 * jnp.sum(x["x"] ** 2)),
        minibatches=(lambda key: {"key": random.key_data(key)}, of_rows),
    )
    x, info = along(SGNHT(0.1, friction=0.1), target, size, 6000)
    assert abs(np.mean(x[1000:] ** 2) - 1) < 0.02
    assert abs(float(info["kinetic_temperature"][1000:].mean()) - 1) < 0.02
    # Without noise friction stays; with it, 2 xi - xi^2 over 2 - xi balances 2 alpha + e^2 V.
    wanted = (2 * 0.1 + 0.01 * noise) / 2
    assert abs(float(info["friction"][1000:].mean()) - wanted) < 0.02


# -- control variates -----------------------------------------------------------------------------


def estimates(model, args, at, anchor):
    """Gradients at one point by every minibatch, with the anchor at another, and of the whole."""
    program = Program(model, args)
    name = program.latent[0].name
    ((plate, (size, index)),) = program.subsampled.items()

    def whole(x):
        return jax.value_and_grad(
            lambda x: sum(whole_log_parts(program, {name: x}, program.data))
        )(x)  # fmt: skip

    def of(chosen):
        def batch(x):
            return jax.value_and_grad(
                lambda x: sum(
                    log_parts_of_rows(program, ({name: x}, {plate: chosen}), program.data)
                )
            )(x)

        return estimate(batch, Anchor.at(anchor, whole), at)[1], batch(at)[1]

    subsets = np.array(list(itertools.combinations(range(size), len(index))))
    controlled, plain = jax.jit(jax.vmap(of))(subsets)
    return np.asarray(controlled), np.asarray(plain), np.asarray(whole(at)[1])


def test_control_variates_take_all_noise_from_gaussian_means():
    controlled, plain, whole = estimates(mean, (Y, 5), jnp.asarray(1.3), jnp.asarray(0.2))
    np.testing.assert_allclose(controlled, whole, rtol=1e-12)
    np.testing.assert_allclose(
        plain.var(), N**2 * (1 - 5 / N) * Y.var(ddof=1) / 5, rtol=1e-12
    )  # as the laws above suppose


def test_control_variates_are_unbiased_and_quieter_near_the_anchor():
    at = jnp.array([0.9, -0.4])
    variances = []
    for shift in (0.2, 0.02):
        controlled, plain, whole = estimates(
            logistic, (X, (Y > 0) * 1, 3), at, at + shift * jnp.array([1.0, 1.0])
        )
        np.testing.assert_allclose(controlled.mean(0), whole, rtol=1e-10)
        variances.append(controlled.var(0).sum() / plain.var(0).sum())
    assert variances[0] < 0.05
    np.testing.assert_allclose(variances[0] / variances[1], 100, rtol=0.2)  # squared distance


# -- schedules ------------------------------------------------------------------------------------


def two_modes(x):
    return jax.scipy.special.logsumexp(
        jnp.stack([-0.5 * jnp.sum((x["x"] - c) ** 2) / 0.25 for c in (-4.0, 4.0)])
    )


class TestCycles:
    def test_only_the_sampling_stage_makes_draws(self):
        target = Target.of(lambda x: -0.5 * jnp.sum(x["x"] ** 2))
        _, info = along(SGLD(Cyclical(0.1, 10, 0.6), steps=1), target, 1, 40)
        assert info["n_steps"].tolist() == [7, 1, 1, 1] * 10
        t = np.array([6, 7, 8, 9] * 10)
        np.testing.assert_allclose(info["step_size"], 0.05 * (1 + np.cos(np.pi * t / 10)))

    def test_exploration_is_without_noise(self):
        """x <- (1 - e_t / 2) x for six steps, then one step with noise."""
        target = Target.of(lambda x: -0.5 * jnp.sum((x["x"] - 3.0) ** 2))
        kernel = SGLD(Cyclical(0.1, 10, 0.6))
        finals = [along(kernel, target, 1, 1, seed)[0][0, 0] for seed in range(2)]
        e = 0.05 * (1 + np.cos(np.pi * np.arange(7) / 10))
        still = 3.0 - 3.0 * np.prod(1 - e / 2)
        keys = [random.split(random.key(seed), 1)[0] for seed in range(2)]
        noise = [
            random.normal(random.split(random.fold_in(key, 6))[1], (1,), float)[0] for key in keys
        ]
        np.testing.assert_allclose(finals, still + np.sqrt(e[6]) * np.array(noise), rtol=1e-10)

    def test_both_modes_are_found_where_a_constant_step_stays_in_one(self):
        """Modes 16 standard deviations apart; 40 cycles. A cycle that chose each with probability
        above 0.1 would miss one with probability below 0.9^40 = 1.5%; the seed is fixed."""
        constant, _ = along(SGLD(0.05), Target.of(two_modes), 1, 4000, seed=1)
        assert abs(np.sign(constant[200:]).mean()) == 1.0
        x, _ = along(SGLD(Cyclical(1.6, 100, 0.7)), Target.of(two_modes), 1, 1200, seed=1)
        shares = [np.mean(x > 0), np.mean(x < 0)]
        assert min(shares) > 0.1
        np.testing.assert_allclose(np.abs(x).mean(), 4.0, atol=0.2)
        assert 0.3 < np.std(np.abs(x)) < 0.7


def test_functions_of_the_step_are_schedules():
    def halves(t):
        return 0.1 * 0.5**t

    target = Target.of(lambda x: -0.5 * jnp.sum(x["x"] ** 2))
    _, info = along(SGLD(halves), target, 1, 5)
    np.testing.assert_allclose(info["step_size"], 0.1 * 0.5 ** np.arange(5))


# -- as parts of compositions ---------------------------------------------------------------------


def test_the_count_of_steps_goes_on_inside_compositions():
    decay = PolynomialDecay(0.1, 1.0, 1.0)
    kernel = cycle([block(repeat(SGLD(decay), 3), "x"), block(SGLD(0.01), "y")])
    target = Target.of(lambda x: -0.5 * (x["x"] ** 2 + x["y"] ** 2))
    bound = kernel.bind(target)
    state = bound.init({"x": jnp.asarray(0.3), "y": jnp.asarray(1.0)}, random.key(0))
    step = jax.jit(bound.step)
    for number in range(3):
        state, info = step(random.key(number), state)
        wanted = 0.1 / (1 + 3 * number + 2)
        np.testing.assert_allclose(info["step_size.sgld_x"], wanted, rtol=1e-12)
        assert info["n_steps"] == 4


@pytest.mark.slow
def test_anchors_are_renewed_where_other_sites_have_moved():
    """The whole gradient at the anchor, given the other site where it is now."""
    target = Target.of(lambda x: -0.5 * (x["a"] - x["b"]) ** 2 - 0.5 * x["b"] ** 2)
    kernel = cycle([block(SGLD(0.3, control_variates=True), "a"), block(SGLD(0.3), "b")])
    bound = kernel.bind(target)
    state = bound.init({"a": jnp.asarray(0.0), "b": jnp.asarray(2.0)}, random.key(0))
    before, step = state.position["b"], jax.jit(bound.step)
    for number in range(3):
        state, _ = step(random.key(number), state)
        anchor = state.parts[0].kept.kept.anchor
        np.testing.assert_allclose(anchor.gradient, before - anchor.position, rtol=1e-12)
        before = state.position["b"]


# -- steps that leave the finite numbers ----------------------------------------------------------


@pytest.mark.parametrize("kernel", [SGLD(0.3), SGHMC(0.3), SGNHT(0.3)], ids=lambda k: k.label)
def test_a_step_into_nothing_is_taken_back_and_said(kernel):
    """Half a normal distribution: NaN below zero."""
    target = Target.of(lambda x: jnp.sum(jnp.log(jnp.sqrt(x["x"])) * 2 - 0.5 * x["x"] ** 2))

    def run(key):
        bound = kernel.bind(target)

        def body(state, k):
            state, info = bound.step(k, state)
            return state, (state.position["x"], info["diverging"])

        return jax.lax.scan(body, bound.init({"x": jnp.ones(1)}, key), random.split(key, 2000))[1]

    x, diverging = jax.jit(run)(random.key(2))
    assert np.isfinite(x).all()
    assert 0 < diverging.mean() < 0.5
    back = np.flatnonzero(diverging)
    assert (x[back] > 0).all()  # where the gradient was finite


def test_running_away_is_said():
    target = Target.of(lambda x: -0.5 * jnp.sum(x["x"] ** 2))
    x, info = along(SGLD(50.0), target, 1, 2000)
    assert np.isfinite(x).all()
    assert info["diverging"].any()


# -- options --------------------------------------------------------------------------------------

WRONG = {
    "no step size": (lambda: SGLD(), "SGLD needs a step size.*tenth of the smallest"),
    "step size 0": (lambda: SGLD(0.0), "step_size must be a positive number; got 0.0"),
    "step size NaN": (lambda: SGHMC(float("nan")), "step_size must be a positive"),
    "step size a word": (lambda: SGNHT("small"), "step_size must be a positive"),
    "a schedule that raises": (lambda: SGLD(lambda t: t.nothing), "number of the step.*Attribute"),
    "a schedule of zeros": (lambda: SGLD(lambda t: 0.0 * t), "begins with 0.0"),
    "friction 0": (lambda: SGHMC(0.1, friction=0.0), "friction"),
    "friction 2": (lambda: SGNHT(0.1, friction=2.0), r"friction must lie in \(0, 1\]"),
    "friction NaN": (lambda: SGHMC(0.1, friction=float("nan")), "friction"),
    "no steps": (lambda: SGLD(0.1, steps=0), "steps must be an integer >= 1"),
    "warmup": (lambda: SGLD(0.1, warmup=-1), "warmup"),
    "radius": (lambda: SGLD(0.1, init_radius=-1.0), "init_radius"),
    "decay of nothing": (lambda: PolynomialDecay(0.0), "scale"),
    "growth": (lambda: PolynomialDecay(0.1, 1.0, -0.5), "power must lie between 0 and 1"),
    "cycle without length": (lambda: Cyclical(0.1, 0), "length"),
    "nothing but exploration": (lambda: Cyclical(0.1, 10, 0.95), "leaves a step of 10 to sample"),
}


@pytest.mark.parametrize("what", WRONG)
def test_options(what):
    make, message = WRONG[what]
    with pytest.raises(OptionError, match=message):
        make()
