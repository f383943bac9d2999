"""Moves between dimensions against exact answers.

Three kinds of checks: transition matrices on finite spaces (to 1e-14), acceptance ratios against
closed forms (to 1e-9), and posterior probabilities of models against quadrature, algebra or
enumeration. Wrong moves are seen to be wrong by each of them.
"""

import dataclasses
import functools
import itertools
import json
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from coal import BY_YEAR, EXACT, LOG_EVIDENCE, change_points, dates, days, posterior_of_steps
from helpers import others_slow
from jax import random
from scipy.special import gammaln as log_gamma
from scipy.stats import norm

import ppl_toolkit as ppl
from ppl_toolkit import positions
from ppl_toolkit.diagnostics.transitions import transition_matrix
from ppl_toolkit.errors import InferenceWarning, MethodError, ModelError, OptionError, SiteError
from ppl_toolkit.inference import (
    MCMC,
    NUTS,
    BirthDeath,
    Gibbs,
    LocallyBalanced,
    Moves,
    SplitMerge,
    StepSplit,
    Switch,
    Walk,
    auxiliary,
    block,
    case,
    cycle,
    involution,
    masked_plate,
    moment_split,
    repeat,
    reversible_jump,
)
from ppl_toolkit.inference.target import Target
from ppl_toolkit.layout import Layout, Plate
from ppl_toolkit.program import Program

TOLERANCE = 1e-14
quiet = functools.partial(ppl.infer, progress=False)


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


def target_of(program):
    """The target of a program, as MCMC makes it."""
    data = program.data
    first = positions.start_position(program, random.key(0), data)
    return Target(
        lambda x: positions.log_parts(program, x, data),
        positions.levels(program, first, data),
        layout=program.layout,
        own=(
            lambda given: positions.own_draws(program, given, data),
            lambda x: positions.own_scores(program, x, data),
        ),
    )


def law_and_matrix(spec, target, states):
    """The target's probabilities of the states, and the exact transition matrix of a kernel."""
    log_pi = np.asarray(jax.vmap(target.log_density)(states))
    pi = np.exp(log_pi - log_pi.max())
    kernel = spec.bind(target)

    def step(key, position):
        return kernel.step(key, kernel.init(position, random.key(1)))[0].position

    p = transition_matrix(step, states)
    return pi / pi.sum(), p


def gap(spec, target, states):
    """How far the target is from invariant, and the kernel from reversible."""
    pi, p = law_and_matrix(spec, target, states)
    there = pi > 0
    np.testing.assert_allclose(p[there].sum(axis=1), 1.0, rtol=1e-14)
    flow = pi[:, None] * p
    return np.abs(pi @ p - pi).max(), np.abs(flow - flow.T).max(), p


def all_states(**levels):
    """Every joint value: arrays (n, ...) by site, of (values, shape)."""
    axes = [v for values, shape in levels.values() for v in [values] * int(np.prod(shape))]
    grid = np.array(list(itertools.product(*axes)))
    states, first = {}, 0
    for name, (_, shape) in levels.items():
        count = int(np.prod(shape))
        states[name] = grid[:, first : first + count].reshape(-1, *shape)
        first += count
    return states


# -- finite spaces -------------------------------------------------------------------------------

SIZE, COLOURS = 3, 3


def finite(order):
    """Up to three coloured elements, of any joint weight: its target and its 108 states."""
    rng = np.random.default_rng(5)
    table = rng.normal(size=(SIZE + 1,) + (COLOURS,) * SIZE)

    def log_density(x):
        k, z = x["k"], x["z"]
        there = jnp.arange(SIZE) < k
        if order == "":  # a function of the set of active elements
            counts = [jnp.sum(there & (z == c)) for c in range(COLOURS)]
            seen = jnp.asarray(table)[(k, *counts)]
        else:  # of their sequence
            seen = jnp.asarray(table)[(k, *jnp.where(there, z, 0))]
        if order == "z":
            falls = (z[1:] <= z[:-1]) & there[1:]
            seen = jnp.where(jnp.any(falls), -jnp.inf, seen)
        return seen - jnp.sum(jnp.where(there, 0.0, jnp.log(COLOURS)))

    plate = Plate("c", SIZE, "k", order, (("z", 0),))
    target = Target.of(log_density, k=np.arange(SIZE + 1), z=np.arange(COLOURS))
    target = dataclasses.replace(target, layout=Layout((plate,)))
    states = all_states(k=(range(SIZE + 1), ()), z=(range(COLOURS), (SIZE,)))
    return target, states


def colour(position, target):
    numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))


def mostly_up(k):
    return 0.8 - 0.2 * k


@pytest.mark.usefixtures("in_float64")
class TestBirthAndDeathOnFiniteSpaces:
    @pytest.mark.parametrize(
        ("order", "up"),
        others_slow(
            [(order, up) for order in ("", "index", "z") for up in (None, mostly_up)],
            ("", None), ("index", mostly_up), ("z", mostly_up),
        ),
    )  # fmt: skip
    def test_the_target_is_invariant(self, order, up):
        target, states = finite(order)
        far, asymmetry, p = gap(BirthDeath("c", colour, up), target, states)
        assert far < TOLERANCE
        assert asymmetry < TOLERANCE
        k = states["k"]
        assert (p[np.abs(k[:, None] - k) > 1] == 0).all()
        assert p[k[:, None] + 1 == k].max() > 0.1  # and it does jump

    @pytest.mark.slow
    def test_several_moves_in_one(self):
        target, states = finite("")
        both = Moves((BirthDeath("c", colour), BirthDeath("c", colour, mostly_up)), (1, 2))
        far, asymmetry, p = gap(both, target, states)
        assert max(far, asymmetry) < TOLERANCE
        one, two = (law_and_matrix(part, target, states)[1] for part in both.choices)
        np.testing.assert_allclose(p, one / 3 + 2 * two / 3, rtol=1e-14, atol=1e-16)

    def test_births_at_the_end_and_deaths_anywhere_are_seen(self, monkeypatch):
        """The forgotten transposition."""

        def forgetful(plate, position, slot, last, up, born, orders=reversible_jump.orders):
            to_last, _, slot = orders(plate, position, slot, last, up, born)
            return to_last, jnp.arange(plate.size), slot

        monkeypatch.setattr(reversible_jump, "orders", forgetful)
        target, states = finite("")
        assert gap(BirthDeath("c", colour), target, states)[1] > 1e-4

    def test_a_forgotten_ratio_of_birth_and_death_probabilities_is_seen(self, monkeypatch):
        def without_up(program, v, position, target, score=involution.score):
            k = position["k"]
            b = jnp.where(k == 0, 1.0, jnp.where(k == SIZE, 0.0, mostly_up(k)))
            return score(program, v, position, target) - jnp.log(jnp.where(v["up"] == 1, b, 1 - b))

        def drawn_without_up(program, key, position, target, draw=involution.draw):
            v, _ = draw(program, key, position, target)
            return v, without_up(program, v, position, target)

        monkeypatch.setattr(involution, "draw", drawn_without_up)
        monkeypatch.setattr(involution, "score", without_up)
        target, states = finite("")
        assert gap(BirthDeath("c", colour, mostly_up), target, states)[0] > 5e-3

    def test_a_forgotten_law_of_the_new_element_is_seen(self, monkeypatch):
        def forgetful(program, v, position, target, score=auxiliary.score):
            log_q = jnp.log(jnp.array([0.2, 0.5, 0.3]))[v["born/z"]]
            return score(program, v, position, target) - jnp.where(v["up"] == 1, log_q, 0.0)

        def drawn(program, key, position, target, draw=auxiliary.draw):
            v, _ = draw(program, key, position, target)
            return v, forgetful(program, v, position, target)

        monkeypatch.setattr(involution, "draw", drawn)
        monkeypatch.setattr(involution, "score", forgetful)
        target, states = finite("")
        assert gap(BirthDeath("c", colour), target, states)[0] > 5e-3


def urn(y):
    """A finite program: up to two coloured balls, with a parent that says which colours come."""
    k = numpyro.sample("k", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
    parent = numpyro.sample("parent", dist.Categorical(jnp.array([0.6, 0.4])))
    with masked_plate("ball", 2, k) as active:
        z = numpyro.sample(
            "z", dist.Categorical(jnp.array([[0.1, 0.3, 0.6], [0.5, 0.4, 0.1]])[parent])
        )
        w = numpyro.sample(
            "w", dist.Categorical(jnp.array([[0.3, 0.7], [0.8, 0.2], [0.5, 0.5]])[z])
        )
    numpyro.sample("y", dist.Normal(jnp.sum(jnp.where(active, z + 0.5 * w, 0)), 1.0), obs=y)


def two_models(y):
    """A finite program of two cases, one of them with two sites."""
    which = numpyro.sample("which", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
    with case(which, 0):
        a = numpyro.sample("a", dist.Categorical(jnp.array([0.7, 0.2, 0.1])))
    with case(which, 2):
        b = numpyro.sample("b", dist.Categorical(jnp.array([0.4, 0.6])))
        c = numpyro.sample("c", dist.Categorical(jnp.array([[0.9, 0.1], [0.3, 0.7]])[b]))
    mean = jnp.select([which == 0, which == 2], [a, b - c], 0.5)
    numpyro.sample("y", dist.Normal(mean, 0.7), obs=y)


@pytest.mark.usefixtures("in_float64")
class TestFinitePrograms:
    """Elements from the model's own law, one site of it after the other."""

    @pytest.mark.slow
    def test_birth_and_death(self):
        program = Program(urn, (np.array(1.3),))
        states = all_states(
            k=(range(3), ()), parent=(range(2), ()), z=(range(3), (2,)), w=(range(2), (2,))
        )
        far, asymmetry, p = gap(BirthDeath("ball"), target_of(program), states)
        assert max(far, asymmetry) < TOLERANCE
        assert p[states["k"][:, None] != states["k"]].max() > 0.01

    def test_the_law_of_what_is_there_is_the_models(self):
        """Inactive elements add nothing to the posterior of the others, nor to the evidence."""
        program = Program(urn, (np.array(1.3),))
        states = all_states(
            k=(range(3), ()), parent=(range(2), ()), z=(range(3), (2,)), w=(range(2), (2,))
        )
        joint = np.exp(jax.vmap(target_of(program).log_density)(states))
        wanted = np.zeros((3, 2))
        colours, sizes = [[0.1, 0.3, 0.6], [0.5, 0.4, 0.1]], [[0.3, 0.7], [0.8, 0.2], [0.5, 0.5]]
        for k, parent in itertools.product(range(3), range(2)):
            for balls in itertools.product(itertools.product(range(3), range(2)), repeat=k):
                p = [0.5, 0.3, 0.2][k] * [0.6, 0.4][parent]
                p *= np.prod([colours[parent][z] * sizes[z][w] for z, w in balls])
                wanted[k, parent] += p * norm.pdf(1.3, sum(z + 0.5 * w for z, w in balls))
        found = np.zeros((3, 2))
        np.add.at(found, (states["k"], states["parent"]), joint)
        np.testing.assert_allclose(found, wanted, rtol=1e-14)

    @pytest.mark.slow
    def test_switching(self):
        program = Program(two_models, (np.array(0.4),))
        states = all_states(
            which=(range(3), ()), a=(range(3), ()), b=(range(2), ()), c=(range(2), ())
        )
        target = target_of(program)
        for spec in (Switch("which"), Switch("which", ("one", "none", "two"), any_of_them)):
            far, asymmetry, p = gap(spec, target, states)
            assert max(far, asymmetry) < TOLERANCE
            assert p[states["which"][:, None] != states["which"]].max() > 0.1


def any_of_them(position, target):
    numpyro.sample("a", dist.Categorical(jnp.array([0.3, 0.3, 0.4])))
    b = numpyro.sample("b", dist.Categorical(jnp.array([0.5, 0.5])))
    numpyro.sample("c", dist.Categorical(jnp.array([[0.2, 0.8], [0.6, 0.4]])[b]))


# -- acceptance ratios in closed form --------------------------------------------------------------


def ratio(move, target, position, v):
    """Log r of Metropolis, Hastings and Green, as the kernel computes it; the proposal."""
    x, back = move.involution(position, v, target)
    forth = auxiliary.score(move.auxiliary, v, position, target)
    ratio = target.log_density(x) - target.log_density(position) - forth
    ratio += auxiliary.score(move.auxiliary, back, x, target)
    return float(ratio + move.log_det(position, v, target)), x


@pytest.mark.usefixtures("in_float64")
class TestRatios:
    events = days()
    span = 40907.0

    def log_posterior(self, at, rates):
        """Of ordered steps and rates (Green 1995), up to a constant: no code of ours."""
        k = len(at)
        edges = np.concatenate([[0.0], at, [self.span]])
        gaps = np.diff(edges)
        prior = k * np.log(3) - log_gamma(k + 1)
        prior += log_gamma(2 * k + 2) - (2 * k + 1) * np.log(self.span) + np.log(gaps).sum()
        prior += (np.log(200.0) - 200.0 * rates).sum()
        count, _ = np.histogram(self.events, edges)
        return prior + (count * np.log(rates) - rates * gaps).sum()

    @pytest.mark.parametrize("order", ["at", None])
    @pytest.mark.parametrize("k", [0, 1, 4])
    def test_a_new_step_is_greens(self, order, k):
        """[d_{k+1} / (k + 1)] / [b_k / L], the Jacobian (h1 + h2)^2 / h, the posteriors."""
        program = Program(change_points, (self.events,), {"order": order})
        target, move = target_of(program), StepSplit("step", "at", "rate", "first_rate")
        rng = np.random.default_rng(k)
        position = dict(positions.start_position(program, random.key(3), program.data))
        u = np.sort(rng.normal(size=30)) if order else rng.normal(size=30)
        position |= {"k": jnp.asarray(k), "at": jnp.asarray(u),
                     "rate": jnp.asarray(-5 + 0.3 * rng.normal(size=30)),
                     "first_rate": jnp.asarray(-4.5)}  # fmt: skip
        v, _ = auxiliary.draw(move.auxiliary, random.key(8), position, target)
        v |= {"up": jnp.asarray(1), "born/at": jnp.asarray(0.1), "log_ratio": jnp.asarray(0.7)}
        v["slot"] = jnp.asarray(0 if order else k)
        log_r, x = ratio(move, target, position, v)

        def steps(position):
            k = int(position["k"])
            at = self.span / (1 + np.exp(-np.asarray(position["at"])[:k]))
            rank = np.argsort(at)
            rates = np.exp(np.asarray(position["rate"])[:k][rank])
            return at[rank], np.concatenate([[np.exp(position["first_rate"])], rates])

        (at, rates), (new_at, new_rates) = steps(position), steps(x)
        assert len(new_at) == k + 1
        j = int(np.sum(at < self.span / (1 + np.exp(-0.1))))
        h, h1, h2 = rates[j], new_rates[j], new_rates[j + 1]
        s = [0.0, *new_at, self.span][j : j + 3]
        np.testing.assert_allclose(  # the mean of the logarithms is kept
            (s[1] - s[0]) * np.log(h1) + (s[2] - s[1]) * np.log(h2), (s[2] - s[0]) * np.log(h)
        )
        b, d = (1.0 if k == 0 else 0.5), 0.5
        wanted = self.log_posterior(new_at, new_rates) - self.log_posterior(at, rates)
        wanted += np.log(d / (k + 1)) - np.log(b / self.span) + np.log((h1 + h2) ** 2 / h)
        np.testing.assert_allclose(log_r, wanted, atol=1e-9)
        # and back, with the very numbers that f gives
        _, back_v = move.involution(position, v, target)
        back_r, back = ratio(move, target, x, back_v)
        np.testing.assert_allclose(back_r, -log_r, atol=1e-9)
        for name in position:
            np.testing.assert_allclose(back[name], position[name], atol=1e-12)

    @pytest.mark.parametrize("variance", [False, True])
    def test_a_split_of_a_component_is_richardson_and_greens(self, variance):
        """|J| = w |m1 - m2| s1^2 s2^2 / (u2 (1 - u2^2) u3 (1 - u3) s^2), and moments are kept."""
        move = moment_split("c", "w", "m", "s", variance=variance)
        rng = np.random.default_rng(3)
        for _ in range(20):
            w, m, s2 = rng.gamma(2.0), rng.normal(), rng.gamma(2.0)
            u = {f"u{i}": jnp.asarray(rng.uniform(0.05, 0.95)) for i in (1, 2, 3)}
            power = 1.0 if variance else 0.5
            parent = {"w": np.log(w), "m": m, "s": power * np.log(s2)}
            left, right = move.split(parent, u)
            w1, w2 = np.exp(left["w"]), np.exp(right["w"])
            s1, s2_ = np.exp(left["s"] / power), np.exp(right["s"] / power)
            np.testing.assert_allclose(w1 + w2, w)
            np.testing.assert_allclose(w1 * left["m"] + w2 * right["m"], w * m, atol=1e-12)
            second = w1 * (left["m"] ** 2 + s1) + w2 * (right["m"] ** 2 + s2_)
            np.testing.assert_allclose(second, w * (m**2 + s2))

            def local(z):
                left, right = move.split(dict(zip("wms", z[:3], strict=True)),
                                         {f"u{i}": z[2 + i] for i in (1, 2, 3)})  # fmt: skip
                return jnp.stack([side[name] for side in (left, right) for name in "wms"])

            z = jnp.stack([jnp.asarray(parent[n]) for n in "wms"] + [u[f"u{i}"] for i in (1, 2, 3)])
            log_det = jnp.linalg.slogdet(jax.jacfwd(local)(z))[1]
            u2, u3 = u["u2"], u["u3"]
            j = w * abs(left["m"] - right["m"]) * s1 * s2_ / (u2 * (1 - u2**2) * u3 * (1 - u3) * s2)
            # from (w, m, s^2) to (log w, m, log s^power)
            j *= (w * s2 / (w1 * w2 * s1 * s2_)) * power
            np.testing.assert_allclose(log_det, np.log(j), atol=1e-10)
            back, u_back = move.merge(left, right)
            for one, two in ((back, parent), (u_back, u)):
                for name in one:
                    np.testing.assert_allclose(one[name], two[name], atol=1e-10)


ORDERED, UNORDERED = ((days(), 40907.0, 6, order) for order in ("at", None))
EVERY_MOVE = {
    "ordered steps": (change_points, ORDERED, StepSplit("step", "at", "rate", "first_rate")),
    "exchangeable steps": (change_points, UNORDERED, StepSplit("step", "at", "rate", "first_rate")),
    "ordered births": (change_points, ORDERED, BirthDeath("step")),
    "births": (change_points, UNORDERED, BirthDeath("step")),
    "walk": (change_points, ORDERED, Walk("rate", 0.5)),
    "switch": (lambda: curve(np.ones(2), np.ones(2)), (), Switch("shape")),
    "split": (lambda: mixture(np.ones(3)), (), moment_split("component", "w", "m", "s")),
    "marks": (lambda: clusters(np.ones(2)), (), BirthDeath("cluster")),
    "terms": (lambda: nested(np.ones(4)), (), BirthDeath("term")),
}


SECOND_VARIANTS = (
    "split",
    "ordered steps",
    "exchangeable steps",
    "ordered births",
    "terms",
    "marks",
)


@pytest.mark.usefixtures("in_float64")
class TestInvolutions:
    """f(f(z)) = z and the determinants, by automatic differentiation of the whole map."""

    @pytest.mark.filterwarnings("ignore::ppl_toolkit.errors.DataBakedWarning")
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.slow] if name in SECOND_VARIANTS else [])
            for name in EVERY_MOVE
        ],
    )
    def test_they_are(self, name):
        model, arguments, move = EVERY_MOVE[name]
        program = Program(model, arguments)
        target = target_of(program)

        @jax.jit
        @jax.vmap
        def trials(key):
            position = positions.start_position(program, key, program.data)
            return move.trials(target, position, key)

        found = jax.tree.map(np.asarray, trials(random.split(random.key(1), 20)))
        involution.judge(found)
        (trial,) = found.values()
        ups = np.asarray(trial.z.get("auxiliary up", [0, 1]))
        assert {0, 1} <= set(ups.tolist())


# -- models whose posterior is known --------------------------------------------------------------


def mixture(y, most=4):
    k = numpyro.sample("k", dist.DiscreteUniform(1, most))
    with masked_plate("component", most, k) as active:
        w = numpyro.sample("w", dist.Gamma(1.0, 1.0))
        m = numpyro.sample("m", dist.Normal(0.0, 3.0))
        s = numpyro.sample("s", dist.LogNormal(0.0, 0.5))
    share = jnp.where(active, w, 0.0)
    log_share = jnp.log(jnp.where(active, share / jnp.sum(share), 1.0))
    each = dist.Normal(m, s).log_prob(y[:, None]) + log_share
    each = jnp.where(active, each, -jnp.inf)
    numpyro.factor("y", jnp.sum(jax.scipy.special.logsumexp(each, axis=1)))


class TestSplitAndMerge:
    @pytest.mark.slow
    def test_one_observation_says_nothing_of_k(self):
        """Its law, the components' parameters integrated out, is the same for every k."""
        kernel = Moves((moment_split("component", "w", "m", "s"), BirthDeath("component")), (2, 1))
        walks = [Walk(name, 1.0) for name in "wms"]
        kernel = repeat(Moves((kernel, *walks), (3, 1, 1, 1)), 10)
        found = quiet(mixture, np.full(1, 0.3), 3, method=MCMC(kernel, warmup=200), draws=4000)
        k = found["posterior"]["k"].values
        share = np.stack([(k == i).mean(axis=1) for i in (1, 2, 3)])
        se = share.std(axis=1, ddof=1) / 2
        assert np.all(np.abs(share.mean(axis=1) - 1 / 3) < np.maximum(6 * se, 0.012)), share
        assert json.loads(found.attrs["moves"])[:2] == ["split", "merge"]

    @pytest.mark.slow
    def test_a_missing_jacobian_is_seen_before_the_run(self):
        @dataclasses.dataclass(frozen=True)
        class Forgetful(SplitMerge):
            def log_det(self, position, v, target):
                return jnp.zeros(())

        good = moment_split("component", "w", "m", "s")
        fields = {f.name: getattr(good, f.name) for f in dataclasses.fields(good)}
        kernel = Moves((Forgetful(**fields), *(Walk(name, 1.0) for name in "wms")))
        with pytest.raises(MethodError, match="log_det is not that of the involution"):
            quiet(mixture, np.ones(3), method=MCMC(kernel), draws=1)

    @pytest.mark.slow
    def test_a_merge_that_is_no_inverse_is_seen_before_the_run(self):
        good = moment_split("component", "w", "m", "s")

        def merge(left, right):
            parent, u = good.merge(left, right)
            return {**parent, "m": 0.5 * (left["m"] + right["m"])}, u

        bad = dataclasses.replace(good, merge=merge)
        with pytest.raises(MethodError, match="is no involution"):
            quiet(mixture, np.ones(3), method=MCMC(Moves((bad, Walk("m", 1.0)))), draws=1)


LOG_Z = np.array([-29.66528207, -19.18955030, -20.40819047])


def nested(y):
    """Polynomials of degree 0, 1, 2 with N(0, 1) coefficients and noise of variance 1/4."""
    k = numpyro.sample("k", dist.DiscreteUniform(1, 3))
    with masked_plate("term", 3, k, order="index") as active:
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    x = jnp.linspace(-1.0, 1.0, y.shape[0])
    design = jnp.stack([jnp.ones_like(x), x, x * x], axis=1)
    numpyro.sample("y", dist.Normal(design @ jnp.where(active, b, 0.0), 0.5), obs=y)


def polynomial_data():
    x = np.linspace(-1, 1, 30)
    return 0.5 + 0.8 * x + 0.1 * x**2 + 0.5 * np.sin(17 * x)


class TestNestedRegression:
    def test_the_oracle(self):
        x, y = np.linspace(-1, 1, 30), polynomial_data()
        design = np.stack([np.ones(30), x, x * x], axis=1)
        for k in (1, 2, 3):
            cov = 0.25 * np.eye(30) + design[:, :k] @ design[:, :k].T
            log_z = -0.5 * (30 * np.log(2 * np.pi) + np.linalg.slogdet(cov)[1])
            log_z -= 0.5 * y @ np.linalg.solve(cov, y)
            np.testing.assert_allclose(log_z, LOG_Z[k - 1], atol=1e-8)

    @pytest.mark.slow
    def test_probabilities_of_the_models(self):
        """Ten independent runs. |mean - exact| < 4.78 standard errors (t, 9 degrees of freedom):

        a false alarm once in a thousand runs of this test; the absolute bound is 0.01.
        """
        kernel = Moves((BirthDeath("term"), Walk("b", 0.2)), (2, 1))
        found = quiet(nested, polynomial_data(), method=MCMC(repeat(kernel, 10), warmup=100),
                      draws=5000, chains=10)  # fmt: skip
        exact = np.exp(LOG_Z - LOG_Z.max())
        exact /= exact.sum()
        k = found["posterior"]["k"].values
        share = (k == 3).mean(axis=1)
        se = share.std(ddof=1) / np.sqrt(10)
        assert abs(share.mean() - exact[2]) < min(4.78 * se, 0.01), (share.mean(), se)
        assert (k == 1).mean() < 2e-4  # exactly 2.2e-5

    @pytest.mark.slow
    def test_with_nuts_inside(self):
        kernel = cycle([repeat(BirthDeath("term"), 5), block(NUTS(target_acceptance=0.95), ["b"])])
        found = quiet(nested, polynomial_data(), method=MCMC(kernel, warmup=300), draws=1500)
        k = found["posterior"]["k"].values
        assert abs((k == 3).mean() - 0.22817) < 0.04
        # the posterior of the line's coefficients, given the line
        x = np.linspace(-1, 1, 30)
        design = np.stack([np.ones(30), x], axis=1)
        precision = np.eye(2) + design.T @ design / 0.25
        mean = np.linalg.solve(precision, design.T @ polynomial_data() / 0.25)
        b = found["posterior"]["b"].values[k == 2]
        np.testing.assert_allclose(b[:, :2].mean(axis=0), mean, atol=0.02)
        sd = np.sqrt(np.diag(np.linalg.inv(precision)))
        np.testing.assert_allclose(b[:, :2].std(axis=0), sd, rtol=0.08)


def curve(x, y):
    """A line or an exponential."""
    shape = numpyro.sample("shape", dist.Categorical(jnp.array([0.5, 0.5])))
    with case(shape, 0):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with case(shape, 1):
        rate = numpyro.sample("rate", dist.HalfNormal(1.0))
    mean = jnp.where(shape == 0, 1 - slope * x, jnp.exp(-rate * x))
    numpyro.sample("y", dist.Normal(mean, 0.3), obs=y)


@pytest.mark.slow
def test_switching_between_named_models():
    """Against the evidences by quadrature."""
    x = np.linspace(0, 2, 8)
    y = np.exp(-0.8 * x) + 0.15 * np.cos(9 * x)
    grid = np.linspace(-8, 8, 160001)
    line = norm.logpdf(grid) + norm.logpdf(y, 1 - grid[:, None] * x, 0.3).sum(axis=1)
    positive = grid[grid >= 0]
    decay = norm.logpdf(positive) + np.log(2)
    decay += norm.logpdf(y, np.exp(-positive[:, None] * x), 0.3).sum(axis=1)
    evidence = [np.trapezoid(np.exp(f), g) for f, g in ((line, grid), (decay, positive))]
    exact = evidence[1] / sum(evidence)
    assert 0.1 < exact < 0.9, "a test worth having"
    kernel = Moves((Switch("shape", ("line", "decay")), Walk("slope", 0.2), Walk("rate", 0.3)))
    found = quiet(curve, x, y, method=MCMC(repeat(kernel, 10), warmup=100), draws=5000)
    shape = found["posterior"]["shape"].values
    each = shape.mean(axis=1)
    assert abs(each.mean() - exact) < max(6 * each.std(ddof=1) / 2, 0.005), (each, exact)
    assert np.isnan(found["posterior"]["slope"].values[shape == 1]).all()
    assert np.isfinite(found["posterior"]["rate"].values[shape == 1]).all()
    assert json.loads(found.attrs["moves"]) == ["to line", "to decay", "walk_slope", "walk_rate"]


# Correlations of the diabetes data of Efron, Hastie, Johnstone and Tibshirani (2004), Annals of
# Statistics 32, as in scikit-learn's load_diabetes: below the diagonal of age, sex, bmi, bp, s1 to
# s6, and the disease's progression.
DIABETES = """
0.173737
0.185085 0.088161
0.335428 0.241010 0.395411
0.260061 0.035277 0.249777 0.242464
0.219243 0.142637 0.261170 0.185548 0.896663
-0.075181 -0.379090 -0.366811 -0.178762 0.051519 -0.196455
0.203841 0.332115 0.413807 0.257650 0.542207 0.659817 -0.738493
0.270774 0.149916 0.446157 0.393480 0.515503 0.318357 -0.398577 0.617859
0.301731 0.208133 0.388680 0.390430 0.325717 0.290600 -0.273697 0.417212 0.464669
0.187889 0.043062 0.586450 0.441482 0.212022 0.174054 -0.394789 0.430453 0.565883 0.382483
"""
INCLUSION = [0.04594, 0.97904, 1.0, 0.99992, 0.56958, 0.37886, 0.56840, 0.20294, 0.99998, 0.07346]
PATIENTS = 442


def correlations():
    table = np.eye(11)
    for i, row in enumerate(DIABETES.strip().splitlines(), 1):
        table[i, :i] = table[:i, i] = [float(v) for v in row.split()]
    return table


def selection(table, n=PATIENTS, g=PATIENTS):
    """Which covariates? Zellner's g prior, the marginal likelihood in closed form."""
    p = table.shape[0] - 1
    with numpyro.plate("covariate", p):
        there = numpyro.sample("there", dist.Bernoulli(0.5))
    both = there[:, None] * there[None, :]
    inside = table[:p, :p] * both + jnp.diag(1.0 - there)
    with_y = table[:p, p] * there
    r2 = with_y @ jnp.linalg.solve(inside, with_y)
    k = jnp.sum(there)
    log_bf = 0.5 * (n - 1 - k) * jnp.log(1.0 + g) - 0.5 * (n - 1) * jnp.log(1 + g * (1 - r2))
    numpyro.factor("evidence", log_bf)


@pytest.mark.filterwarnings(
    "ignore::ppl_toolkit.errors.InferenceWarning"
)  # of indicators that are nearly always one
class TestVariableSelection:
    def test_the_oracle(self):
        table = correlations()
        log_p = np.zeros(1024)
        for model in range(1024):
            inside = [i for i in range(10) if model >> i & 1]
            r = table[inside, 10]
            r2 = r @ np.linalg.solve(table[np.ix_(inside, inside)], r) if inside else 0.0
            log_p[model] = 0.5 * (441 - len(inside)) * np.log(443.0)
            log_p[model] -= 0.5 * 441 * np.log(1 + 442 * (1 - r2))
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        found = [p[np.arange(1024) >> i & 1 == 1].sum() for i in range(10)]
        np.testing.assert_allclose(found, INCLUSION, atol=1e-4)

    @pytest.mark.parametrize(
        "kernel",
        [
            pytest.param(Gibbs(), id="Gibbs", marks=pytest.mark.slow),
            pytest.param(repeat(LocallyBalanced(), 3), id="LB", marks=pytest.mark.slow),
        ],
    )
    def test_inclusion_probabilities(self, kernel):
        found = quiet(selection, correlations(), method=MCMC(kernel, warmup=200), draws=10_000)
        share = found["posterior"]["there"].values.mean(axis=(0, 1))
        np.testing.assert_allclose(share, INCLUSION, atol=0.01)


# -- change points ---------------------------------------------------------------------------------

STEPS = StepSplit("step", "at", "rate", "first_rate")
WALKS = (Walk("rate", 0.5), Walk("first_rate", 0.3), Walk("at", 0.4))
CHANGES = Moves((STEPS, *WALKS), (0.5, 0.2, 0.05, 0.25))


class TestCoal:
    def test_the_data(self):
        years = np.floor(dates()).astype(int)
        assert len(years) == 191
        np.testing.assert_array_equal(
            np.bincount(years - 1851, minlength=112), [int(n) for n in BY_YEAR.split()]
        )

    def test_the_oracle_by_quadrature(self):
        log_z, p = posterior_of_steps(days(), q=3)
        np.testing.assert_allclose(log_z[:6], LOG_EVIDENCE, atol=1e-4)
        np.testing.assert_allclose(p[1:13], EXACT["year"], atol=2e-6)
        _, p = posterior_of_steps(days() - days()[0], q=3)
        np.testing.assert_allclose(p[1:10], EXACT["first event"], atol=1e-5)

    @pytest.mark.slow  # the tutorial of change points has a short run
    def test_number_of_steps(self):
        found = quiet(change_points, days(), method=MCMC(repeat(CHANGES, 20), warmup=200),
                      draws=4000)  # fmt: skip
        assert np.abs(shares(found) - EXACT["year"][:6]).max() < 0.025
        stats = found["sample_stats"]
        names = json.loads(found.attrs["moves"])
        assert names == ["birth", "death", "walk_rate", "walk_first_rate", "walk_at"]
        rates = [stats["accepted"].values[stats["move"].values == i].mean() for i in range(5)]
        np.testing.assert_allclose(rates, [0.21, 0.20, 0.48, 0.38, 0.33], atol=0.06)

    @pytest.mark.slow
    @pytest.mark.parametrize("order", ["at", None], ids=["ordered", "exchangeable"])
    def test_number_of_steps_closely(self, order):
        draws = 15_000
        begin = time.process_time()
        found = quiet(change_points, days(), order=order, threads=1,
                      method=MCMC(repeat(CHANGES, 20), warmup=500), draws=draws)  # fmt: skip
        spent = time.process_time() - begin
        assert np.abs(shares(found) - EXACT["year"][:6]).max() < 0.01
        assert spent < 120  # CPU seconds, compiling included

    @pytest.mark.slow
    def test_without_the_split(self):
        """Heights of new steps from their prior: slower, but as right."""
        kernel = Moves((BirthDeath("step"), *WALKS), (0.5, 0.2, 0.05, 0.25))
        found = quiet(change_points, days(), method=MCMC(repeat(kernel, 40), warmup=500),
                      draws=8000)  # fmt: skip
        assert np.abs(shares(found) - EXACT["year"][:6]).max() < 0.02


def shares(found):
    k = found["posterior"]["k"].values
    return np.array([(k == i).mean() for i in range(1, 7)])


# -- results --------------------------------------------------------------------------------------


def clusters(y):
    """A small model with a parent, marks that are discrete, and an observed site."""
    k = numpyro.sample("k", dist.DiscreteUniform(0, 3))
    spread = numpyro.sample("spread", dist.HalfNormal(2.0))
    with masked_plate("cluster", 3, k) as active:
        x = numpyro.sample("x", dist.Normal(0.0, spread))
        sign = numpyro.sample("sign", dist.Categorical(jnp.array([0.3, 0.7])))
        numpyro.deterministic("signed", x * (2 * sign - 1))
    total = numpyro.deterministic("total", jnp.sum(jnp.where(active, x * (2 * sign - 1), 0.0)))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(total, 1.0), obs=y)


def run_clusters(**options):
    """Few draws: what they find is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return quiet(clusters, Y, method=CLUSTERS, **options)


CLUSTERS = MCMC(
    cycle(
        [
            BirthDeath("cluster"),
            block(NUTS(target_acceptance=0.95), ["x", "spread"]),
            block(Gibbs(), ["sign"]),
        ]
    ),
    warmup=100,
)
Y = np.array([0.5, 1.4, -0.2, 2.0])


@pytest.fixture(scope="module")
def run():
    return run_clusters(draws=120, chains=2)


@pytest.mark.filterwarnings("ignore::ppl_toolkit.errors.InferenceWarning")
class TestResults:
    def test_what_is_not_there_is_nan(self, run):
        draws = run["posterior"]
        k = draws["k"].values
        assert {0, 1, 2, 3} <= set(np.unique(k))
        there = np.arange(3) < k[..., None]
        for name in ("x", "sign", "signed"):
            np.testing.assert_array_equal(np.isfinite(draws[name].values), there)
            assert draws[name].dims == ("chain", "draw", "cluster")
        assert np.isfinite(draws["total"].values).all()
        assert json.loads(run.attrs["trans_dimensional"]) == {"cluster": "k"}
        assert json.loads(run.attrs["moves"]) == ["birth", "death"]
        assert run["sample_stats"]["move"].dims == ("chain", "draw")

    def test_the_report_shows_the_dimensions(self, run, tmp_path):
        ppl.report(run, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert "number of active elements of cluster" in page
        assert "birth" in page

    def test_predictions_and_likelihoods(self, run):
        draws = run["posterior"]
        full = ppl.log_likelihood(run, clusters, Y)
        wanted = norm.logpdf(Y, draws["total"].values[..., None])
        np.testing.assert_allclose(full["log_likelihood"]["y"].values, wanted, rtol=1e-9)
        prior = full["log_prior"]["x"].values
        np.testing.assert_array_equal(prior[np.isnan(draws["x"].values)], 0.0)
        predicted = ppl.predict(run, clusters, Y, seed=1)["posterior_predictive"]["y"].values
        residual = predicted - draws["total"].values[..., None]
        assert abs(residual.mean()) < 5 / np.sqrt(residual.size)
        assert abs(residual.std() - 1) < 0.1

    def test_saved_and_loaded(self, run, tmp_path):
        for name in ("run.nc", "run.zarr"):
            ppl.save(run, tmp_path / name)
            again = ppl.load(tmp_path / name)
            for site in run["posterior"].data_vars:
                np.testing.assert_array_equal(
                    again["posterior"][site].values, run["posterior"][site].values
                )

    def test_extended_and_resumed_bit_for_bit(self, run, tmp_path):
        part = run_clusters(draws=50, chains=2)
        whole = ppl.extend(part, clusters, Y, draws=70, method=CLUSTERS, progress=False)
        stored = run_clusters(draws=50, chains=2, store=tmp_path / "s.zarr")
        assert stored["posterior"].sizes["draw"] == 50
        resumed = run_clusters(resume=tmp_path / "s.zarr", draws=120)
        for other in (whole, resumed):
            for site in run["posterior"].data_vars:
                np.testing.assert_array_equal(
                    other["posterior"][site].values, run["posterior"][site].values
                )


def test_masked_plates_survive_an_enumeration_by_funsor():
    """Which replaces the maker of numpyro.plate for good."""

    def summed_out():
        x = numpyro.sample("x", dist.Normal(0, 1))
        with numpyro.plate("row", 2):
            numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.factor("f", -(x**2))

    Program(summed_out).traced("log_density")
    assert [plate.name for plate in Program(clusters, (np.ones(2),)).layout.plates] == ["cluster"]


@pytest.mark.slow
def test_parents_see_active_elements_only():
    """Without data: the parent keeps its prior whatever k does, and k its own."""

    def prior():
        k = numpyro.sample("k", dist.DiscreteUniform(0, 5))
        spread = numpyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with masked_plate("c", 5, k):
            numpyro.sample("x", dist.Normal(0.0, spread))

    kernel = repeat(Moves((BirthDeath("c"), Walk("spread", 1.0), Walk("x", 1.0))), 20)
    found = quiet(prior, method=MCMC(kernel, warmup=100), draws=4000)["posterior"]
    k, log_spread = found["k"].values, np.log(found["spread"].values)
    for values, mean in ((k, 2.5), (k**2, 55 / 6), (log_spread, 0.0), (log_spread**2, 1.0)):
        each = values.mean(axis=1)
        assert abs(each.mean() - mean) < 6 * max(each.std(ddof=1) / 2, 0.01)


# -- what cannot be --------------------------------------------------------------------------------


def with_plate(k_law, size=3, inside=None, k_of=lambda k: k, **options):
    def model():
        k = k_of(numpyro.sample("k", k_law))
        with masked_plate("c", size, k, **options):
            (inside or (lambda: numpyro.sample("x", dist.Normal(0, 1))))()

    return model


WRONG = {
    "k above the size": (with_plate(dist.DiscreteUniform(0, 4)), "3 slots.*values 0 to 4.*size=4"),
    "k without bound": (with_plate(dist.Poisson(2.0)), "finitely many values"),
    "k is real": (with_plate(dist.Normal(0, 1)), "needs a whole number"),
    "k is a vector": (
        with_plate(dist.DiscreteUniform(0, 3).expand([2]).to_event(1), k_of=lambda k: k[0]),
        "as it is",
    ),
    "k is computed": (with_plate(dist.DiscreteUniform(0, 2), k_of=lambda k: k + 1), "as it is"),
    "a flat prior": (
        with_plate(
            dist.DiscreteUniform(0, 3),
            inside=lambda: numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ())),
        ),
        "flat .improper. prior",
    ),
    "endless marks": (
        with_plate(
            dist.DiscreteUniform(0, 3), inside=lambda: numpyro.sample("n", dist.Poisson(1.0))
        ),
        "infinitely many discrete values",
    ),
    "no size": (with_plate(dist.DiscreteUniform(0, 3), size=2.5), "size must be an int"),
    "order by nothing": (with_plate(dist.DiscreteUniform(0, 3), order="z"), "none of its latent"),
    "order by vectors": (
        with_plate(
            dist.DiscreteUniform(0, 3),
            order="x",
            inside=lambda: numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1)),
        ),
        "one real number per slot",
    ),
    "nested": (
        with_plate(
            dist.DiscreteUniform(0, 3),
            inside=lambda: _nested(),
        ),
        "cannot be nested",
    ),
}


def _nested():
    with case(jnp.asarray(1), 1):
        numpyro.sample("x", dist.Normal(0, 1))


@pytest.mark.parametrize("name", WRONG)
def test_models_that_cannot_be(name):
    model, message = WRONG[name]
    with pytest.raises(ModelError, match=message):
        Program(model)


def steps_elsewhere():
    k = numpyro.sample("k", dist.DiscreteUniform(0, 3))
    with masked_plate("c", 3, k):
        numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("z", dist.Categorical(jnp.ones(2) / 2))


BAD_MOVES = {
    "unknown plate": (BirthDeath("d"), SiteError, r"masked plate 'd'.*\['c'\]"),
    "a block without a site": (
        block(BirthDeath("c"), ["k", "x"]),
        MethodError,
        r"leaves out \['z'\]",
    ),
    "not everything moves": (Walk("x", 1.0), MethodError, r"no part of the kernel moves.*'k', 'z'"),
    "splits of colours": (moment_split("c", "x", "x", "x"), MethodError, r"\['z'\].*are discrete"),
    "other sites": (StepSplit("c", "x", "y", "b"), MethodError, r"\['x', 'y'\], but.*\['x', 'z'\]"),
    "no cases": (Switch("k"), SiteError, "no `case` depends on it"),
    "a walk of integers": (
        cycle([Walk("k", 1.0), Walk("x", 1.0), block(Gibbs(), ["z"])]),
        MethodError,
        "is discrete",
    ),
    "gradients alone": (NUTS(), MethodError, "how many parameters it has depends on"),
}


@pytest.mark.parametrize("name", BAD_MOVES)
def test_moves_that_cannot_be(name):
    kernel, error, message = BAD_MOVES[name]
    method = kernel if isinstance(kernel, NUTS) else MCMC(kernel)
    with pytest.raises(error, match=message):
        quiet(steps_elsewhere, method=method)


def test_options_that_cannot_be():
    with pytest.raises(OptionError, match="as many positive weights"):
        Moves((BirthDeath("c"),), (1.0, 2.0))
    with pytest.raises(OptionError, match="takes moves such as"):
        Moves((NUTS(),))
    with pytest.raises(OptionError, match="scale must be a positive number"):
        Walk("x", 0.0)


@pytest.mark.slow
def test_elements_with_events_and_inner_plates():
    """Vectors, simplices and rows of elements; on a plate that is not the rightmost one."""

    def model(y):
        k = numpyro.sample("k", dist.DiscreteUniform(1, 3))
        with masked_plate("c", 3, k, dim=-2) as active:
            v = numpyro.sample("v", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
            with numpyro.plate("inner", 2, dim=-1):
                x = numpyro.sample("x", dist.Normal(v[:, :, 0], 1.0))
        mean = jnp.sum(jnp.where(active, x, 0.0), axis=0)
        numpyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    y = np.array([0.4, 1.0])
    kernel = cycle([BirthDeath("c"), block(NUTS(), ["v", "p", "x"])])
    found = quiet(model, y, method=MCMC(kernel, warmup=200), draws=1500)["posterior"]
    k = found["k"].values
    there = np.arange(3) < k[..., None]
    np.testing.assert_array_equal(
        np.isfinite(found["x"].values), np.repeat(there[..., None], 2, -1)
    )
    # y ~ N(0, (1 + k) I + k 1 1'), so that p(k | y) is known
    z = [
        np.exp(-0.5 * np.linalg.slogdet(c)[1] - 0.5 * y @ np.linalg.solve(c, y))
        for c in ((1 + n) * np.eye(2) + n * np.ones((2, 2)) for n in (1, 2, 3))
    ]
    share = [(k == n).mean() for n in (1, 2, 3)]
    np.testing.assert_allclose(share, np.array(z) / sum(z), atol=0.04)
