"""Kernels on finite spaces: their exact transition matrices leave the target invariant.

Row sums, pi P = pi and, where a kernel says it is reversible, the symmetry of diag(pi) P hold to
1e-14; nothing is sampled. Wrong kernels are seen to be wrong by far more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow
from jax import random

from ppl_toolkit.diagnostics.transitions import enumerated, transition_matrix
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import (
    HMC,
    DelayedRejection,
    Gibbs,
    GibbsWithGradients,
    LocallyBalanced,
    MetropolisedGibbs,
    ParallelTempering,
    PseudoMarginal,
    block,
    cycle,
    metropolis_hastings,
    mixture,
    randomness,
    repeat,
    tempered,
)
from ppl_toolkit.inference.kernel import Placed
from ppl_toolkit.inference.target import Target

TOLERANCE = 1e-14
LEVELS = {"a": 3, "b": 2, "c": 2}  # b has three elements


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def problem():
    """Twelve binary and ternary variables' worth of correlated target: its states and density."""
    rng = np.random.default_rng(1)
    shape = (3, 2, 2, 2, 2)
    prior, like = rng.normal(size=shape), 1.5 * rng.normal(size=shape)
    grid = np.stack(np.unravel_index(np.arange(prior.size), shape), axis=-1)
    states = {"a": grid[:, 0], "b": grid[:, 1:4], "c": grid[:, 4]}

    def look_up(table, x):
        index = jnp.stack([x["a"], *(x["b"][i] for i in range(3)), x["c"]])
        return jnp.asarray(table)[tuple(index)]

    levels = {name: np.arange(count) for name, count in LEVELS.items()}
    target = Target(lambda x: (look_up(prior, x), look_up(like, x)), levels)
    return target, states, prior.ravel(), like.ravel()


def law(power=1.0):
    _, _, prior, like = problem()
    p = np.exp(prior + power * like - (prior + power * like).max())
    return p / p.sum()


def matrix(spec, target=None):
    own, states, *_ = problem()
    kernel = spec.bind(target or own)

    def step(key, position):
        state, _ = kernel.step(key, kernel.init(position, random.key(1)))
        return state.position

    return transition_matrix(step, states)


def asymmetry(pi, p):
    flow = pi[:, None] * p
    return np.abs(flow - flow.T).max()


PROPOSAL = np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5]])


def proposal_of_a(x, target):
    numpyro.sample("a", dist.Categorical(jnp.asarray(PROPOSAL)[x["a"]]))


def second_proposal(x, y, target):
    logits = 1.0 * (x["a"] == jnp.arange(3)) - 0.7 * (y["a"] == jnp.arange(3))
    numpyro.sample("a", dist.Categorical(logits=logits))


def proposal_of_both(x, target):
    numpyro.sample("a", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
    numpyro.sample("c", dist.Categorical(jnp.array([0.3, 0.7])[jnp.array([x["c"], 1 - x["c"]])]))


KERNELS = {
    "Gibbs": Gibbs(),
    "Metropolised Gibbs": MetropolisedGibbs(),
    **{f"locally balanced, {g}": LocallyBalanced(g) for g in ("sqrt", "barker", "min", "max")},
    "Metropolis-Hastings": metropolis_hastings(proposal_of_a),
    "Metropolis-Hastings on two sites": metropolis_hastings(proposal_of_both),
    "delayed rejection": DelayedRejection(proposal_of_a, second_proposal),
    "block": block(Gibbs(), ["a"]),
    "block of a block": block(block(MetropolisedGibbs(), "b"), ["b", "c"]),
    "cycle": cycle([block(Gibbs(), ["a"]), block(LocallyBalanced(), ["b", "c"])]),
    "palindrome": cycle([block(Gibbs(), ["a"]), block(Gibbs(), ["c"])], palindromic=True),
    "mixture": mixture([block(Gibbs(), ["a"]), LocallyBalanced()], [0.3, 0.7]),
    "repeat": repeat(LocallyBalanced(), 2),
    "cycle of mixtures": cycle(
        [mixture([block(Gibbs(), "a"), block(Gibbs(), "c")]), block(LocallyBalanced(), "b")]
    ),
}


@pytest.mark.parametrize(
    "name", others_slow(KERNELS, *(name for name in KERNELS if name != "repeat"))
)
def test_the_target_is_invariant(name):
    spec, pi = KERNELS[name], law()
    p = matrix(spec)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=TOLERANCE)
    np.testing.assert_allclose(pi @ p, pi, rtol=TOLERANCE)
    if spec.reversible:
        assert asymmetry(pi, p) < TOLERANCE
    elif name in ("Gibbs", "Metropolised Gibbs", "cycle"):
        assert asymmetry(pi, p) > 1e-4, "symmetry is not there by chance"


@pytest.mark.parametrize("power", others_slow([0.0, 0.4, 2.0], 0.4))
def test_tempered_kernels_leave_the_tempered_target_invariant(power):
    pi = law(power)
    p = matrix(tempered(LocallyBalanced(), power))
    np.testing.assert_allclose(pi @ p, pi, rtol=TOLERANCE)
    assert np.abs(law() @ p - law()).max() > 1e-3


def test_gibbs_is_the_product_of_its_conditionals():
    """By hand: each element in turn from its conditional, sites in alphabetical order."""
    pi = law().reshape(3, 2, 2, 2, 2)
    wanted = np.eye(48)
    for axis in range(5):
        conditional = pi / pi.sum(axis=axis, keepdims=True)
        one = np.zeros((48, 48))
        for i, index in enumerate(np.ndindex(3, 2, 2, 2, 2)):
            for value in range(pi.shape[axis]):
                to = (*index[:axis], value, *index[axis + 1 :])
                one[i, np.ravel_multi_index(to, pi.shape)] = conditional[to]
        wanted = wanted @ one
    np.testing.assert_allclose(matrix(Gibbs()), wanted, rtol=1e-14)


def test_batches_that_do_not_come_out_even_make_no_difference(monkeypatch):
    """Neither of states nor of paths: what fills up the last batch does not count."""
    kernel, log_weights = block(Gibbs(), "a"), jnp.log(jnp.array([0.1, 0.2, 0.3, 0.15, 0.25]))

    def throw(key):
        return randomness.categorical(key, log_weights)

    whole, outcomes = matrix(kernel), enumerated(throw)
    np.testing.assert_allclose(outcomes.probabilities, jnp.exp(log_weights), rtol=1e-14)
    monkeypatch.setattr("ppl_toolkit.diagnostics.transitions._BATCH", 2)
    np.testing.assert_allclose(matrix(kernel), whole, rtol=1e-14)
    parts = enumerated(throw)
    np.testing.assert_array_equal(parts.values, outcomes.values)
    np.testing.assert_array_equal(parts.probabilities, outcomes.probabilities)


@pytest.mark.slow
def test_a_cycle_is_the_product_and_a_mixture_the_mean():
    one, two = block(Gibbs(), "a"), LocallyBalanced()
    p, q = matrix(one), matrix(two)
    np.testing.assert_allclose(matrix(cycle([one, two])), p @ q, rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(matrix(repeat(two, 3)), q @ q @ q, rtol=1e-14, atol=1e-16)
    mixed = matrix(mixture([one, two], [1, 3]))
    np.testing.assert_allclose(mixed, 0.25 * p + 0.75 * q, rtol=1e-14, atol=1e-16)


def test_delayed_rejection_beats_metropolis_in_peskuns_order():
    """A second try adds to every off-diagonal probability."""
    once = matrix(metropolis_hastings(proposal_of_a))
    twice = matrix(KERNELS["delayed rejection"])
    off = ~np.eye(48, dtype=bool)
    assert (twice[off] >= once[off] - 1e-16).all()
    assert twice[off].sum() > once[off].sum() + 1


def test_gradients_guide_binary_sites():
    """A log density that is a polynomial of real arguments; not linear, so the ratio matters."""
    rng = np.random.default_rng(2)
    coupling, field = rng.normal(size=(5, 5)), rng.normal(size=5)

    def log_density(x):
        z = x["z"].astype(float)
        return z @ field + z @ coupling @ z + 0.8 * z[0] * z[1] * z[4]

    states = {"z": np.stack(np.unravel_index(np.arange(32), (2,) * 5), axis=-1)}
    target = Target.of(log_density, z=np.arange(2))
    pi = np.exp(np.asarray(jax.vmap(log_density)(states)))
    pi /= pi.sum()
    kernel = GibbsWithGradients().bind(target)
    p = transition_matrix(lambda key, x: kernel.step(key, Placed(x, ()))[0].position, states)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=TOLERANCE)
    np.testing.assert_allclose(pi @ p, pi, rtol=TOLERANCE)
    assert asymmetry(pi, p) < TOLERANCE


def test_parallel_tempering_leaves_the_product_of_tempered_targets_invariant():
    """Two replicas of one ternary site, both parities of the exchange."""
    prior, like = np.array([0.2, -0.4, 0.1]), np.array([1.0, -2.0, 0.5])
    target = Target(
        lambda x: (jnp.asarray(prior)[x["a"]], jnp.asarray(like)[x["a"]]), {"a": np.arange(3)}
    )
    powers = (1.0, 0.3)
    kernel = ParallelTempering(block(metropolis_hastings(proposal_of_a), "a"), powers).bind(target)
    one, two = (np.exp(prior + b * like) for b in powers)
    pi = np.outer(one / one.sum(), two / two.sum()).ravel()
    pairs = np.stack(np.unravel_index(np.arange(9), (3, 3)), axis=-1)
    for parity in (0, 1):
        start = kernel.init({"a": jnp.asarray(0)}, random.key(0))

        def step(key, pair, parity=parity, start=start):
            inner = start.states
            states = jax.vmap(lambda s, x: s._replace(position={"a": x}))(inner, pair)
            # caches of the inner kernels at these positions
            fresh = jax.tree.map(
                lambda *xs: jnp.stack(xs),
                *[
                    block(metropolis_hastings(proposal_of_a), "a")
                    .bind(target.tempered(b))
                    .init({"a": pair[r]}, random.key(0))
                    for r, b in enumerate(powers)
                ],
            )
            del states
            state = start._replace(states=fresh, swaps=jnp.asarray(parity, jnp.int32))
            return kernel.step(key, state)[0].states.position["a"]

        p = transition_matrix(step, pairs)
        np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=TOLERANCE)
        np.testing.assert_allclose(pi @ p, pi, rtol=TOLERANCE)


class TestPseudoMarginal:
    """Two estimates of the likelihood of each of two values: a space of four states."""

    like = np.array([[0.4, 1.6], [0.2, 0.9]])  # by value and by estimate
    chance = np.array([[0.25, 0.75], [0.6, 0.4]])
    prior = np.array([0.3, 0.7])

    def kernel(self, spec=None):
        def estimator(key, x):
            which = randomness.categorical(key, jnp.log(jnp.asarray(self.chance))[x["a"]])
            return jnp.log(jnp.asarray(self.like))[x["a"], which]

        def proposal(x, target):
            numpyro.sample("a", dist.Categorical(jnp.array([[0.3, 0.7], [0.6, 0.4]])[x["a"]]))

        target = Target.of(lambda x: jnp.log(jnp.asarray(self.prior))[x["a"]])
        return (spec or PseudoMarginal)(proposal, estimator).bind(target)

    def states(self):
        a, which = np.repeat([0, 1], 2), np.tile([0, 1], 2)
        return Placed({"a": a}, np.log(self.prior)[a] + np.log(self.like)[a, which])

    def number(self, state):
        a, states = state.position["a"], self.states()
        same = (states.position["a"] == a) & (jnp.abs(states.kept - state.kept) < 1e-12)
        return jnp.argmax(same)

    def law(self):
        return (self.prior[:, None] * self.chance * self.like).ravel() / np.sum(
            self.prior[:, None] * self.chance * self.like
        )

    def test_the_extended_target_is_invariant_and_its_margin_exact(self):
        kernel, pi = self.kernel(), self.law()
        p = transition_matrix(
            lambda key, state: kernel.step(key, state)[0], self.states(), self.number
        )
        np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=TOLERANCE)
        np.testing.assert_allclose(pi @ p, pi, rtol=TOLERANCE)
        assert asymmetry(pi, p) < TOLERANCE
        exact = self.prior * (self.chance * self.like).sum(axis=1)
        np.testing.assert_allclose(pi.reshape(2, 2).sum(axis=1), exact / exact.sum(), rtol=1e-15)

    def test_estimating_again_is_seen(self):
        kernel, pi = self.kernel(), self.law()

        def again(key, state):
            key_step, key_again = random.split(key)
            return kernel.step(key_step, kernel.init(state.position, key_again))[0]

        p = transition_matrix(again, self.states(), self.number)
        assert np.abs(pi @ p - pi).max() > 1e-2


class TestWrongKernelsAreSeen:
    def gap(self, spec):
        pi = law()
        return np.abs(pi @ matrix(spec) - pi).max()

    def test_a_dropped_proposal_ratio(self, monkeypatch):
        from ppl_toolkit.inference import involution

        monkeypatch.setattr(involution, "score", lambda *args: 0.0)
        monkeypatch.setattr(
            involution, "draw",
            lambda program, key, *args, draw=involution.draw: (draw(program, key, *args)[0], 0.0),
        )  # fmt: skip
        assert self.gap(metropolis_hastings(proposal_of_a)) > 1e-3

    def test_a_locally_balanced_proposal_without_its_ratio(self, monkeypatch):
        from ppl_toolkit.inference import discrete

        monkeypatch.setattr(discrete, "accept", lambda key, ratio: randomness.accept(key, 0.0))
        assert self.gap(LocallyBalanced()) > 1e-3

    def test_metropolised_gibbs_that_always_accepts(self, monkeypatch):
        from ppl_toolkit.inference import discrete

        monkeypatch.setattr(discrete, "accept", lambda key, ratio: randomness.accept(key, 0.0))
        assert self.gap(MetropolisedGibbs()) > 1e-3

    def test_delayed_rejection_without_the_complements(self, monkeypatch):
        from ppl_toolkit.inference import delayed_rejection as module

        monkeypatch.setattr(module, "_log_complement", lambda ratio: 0.0)
        assert self.gap(KERNELS["delayed rejection"]) > 1e-3

    def test_a_function_that_is_no_balancing_function(self, monkeypatch):
        from ppl_toolkit.inference import discrete

        monkeypatch.setitem(discrete._BALANCED, "sqrt", lambda log_t: 0.3 * log_t)
        assert self.gap(LocallyBalanced()) > 1e-3


@pytest.mark.slow
def test_ten_thousand_states():
    """Thirteen binary elements with pair couplings: 8192 states, one locally balanced step."""
    rng = np.random.default_rng(3)
    coupling = 0.3 * rng.normal(size=(13, 13))

    def log_density(x):
        z = x["z"].astype(float)
        return z @ coupling @ z

    states = {"z": np.stack(np.unravel_index(np.arange(8192), (2,) * 13), axis=-1)}
    weights = 2 ** np.arange(12, -1, -1)
    log_pi = np.asarray(jax.vmap(log_density)(states))
    pi = np.exp(log_pi - log_pi.max())
    pi /= pi.sum()
    kernel = LocallyBalanced("barker").bind(Target.of(log_density, z=np.arange(2)))
    p = transition_matrix(
        lambda key, x: kernel.step(key, Placed(x, ()))[0].position,
        states,
        lambda x: x["z"] @ weights,
    )
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=TOLERANCE)
    np.testing.assert_allclose(pi @ p, pi, rtol=TOLERANCE)


def test_enumeration_is_exact():
    """The sum of two dice, one of them loaded by the other."""

    def throw(key):
        one = randomness.categorical(key, jnp.zeros(6))
        two = randomness.categorical(key, jnp.where(jnp.arange(6) == one, jnp.log(5.0), 0.0))
        return one + two

    found = enumerated(throw)
    assert found.values.shape == (36,)
    np.testing.assert_allclose(found.probabilities.sum(), 1.0, rtol=1e-15)
    doubles = found.probabilities[found.values == 0].sum()
    np.testing.assert_allclose(doubles, 1 / 6 * 1 / 2, rtol=1e-15)


def test_real_numbers_cannot_be_enumerated():
    target = Target.of(lambda x: -0.5 * x["r"] ** 2)
    kernel = HMC().bind(target)
    with pytest.raises(MethodError, match="draws real numbers"):
        enumerated(lambda key: kernel.step(key, kernel.init({"r": jnp.zeros(())}, key))[0].position)


class TestCompositionsThatCannotBeValid:
    def test_different_targets(self):
        with pytest.raises(OptionError, match=r"different targets.*0.5.*1.0"):
            cycle([Gibbs(), tempered(Gibbs(), 0.5)])

    def test_weights_that_depend_on_the_state(self):
        with pytest.raises(OptionError, match="ratio of an involutive kernel"):
            mixture([Gibbs(), Gibbs()], lambda x: [0.5, 0.5])

    def test_pseudo_marginal_beside_others(self):
        lonely = PseudoMarginal(proposal_of_a, lambda key, x: 0.0)
        with pytest.raises(OptionError, match="no other kernel may move it"):
            cycle([lonely, Gibbs()])

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: cycle([]), "at least one"),
            (lambda: cycle([3]), "a kernel is needed"),
            (lambda: mixture([Gibbs()], [-1.0]), "non-negative"),
            (lambda: mixture([Gibbs()], [1.0, 2.0]), "1 kernels needs as many"),
            (lambda: repeat(Gibbs(), 0), "times"),
            (lambda: block(Gibbs(), []), "names"),
            (lambda: tempered(Gibbs(), -1.0), "power"),
            (lambda: ParallelTempering(Gibbs(), [0.5, 0.1]), "fall from 1.0"),
            (lambda: LocallyBalanced("cube"), "balancing"),
            (lambda: metropolis_hastings(3), "function"),
            (lambda: DelayedRejection(proposal_of_a, None), "function"),
        ],
    )
    def test_options(self, make, match):
        with pytest.raises(OptionError, match=match):
            make()
