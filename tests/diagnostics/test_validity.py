"""`check`: wrong samplers are found out and named, right ones are left alone.

The slow tests run the default budget on twenty seeds fixed beforehand. Right samplers: a wrong
alarm in any of twenty runs has a probability of at most 20 x 10^-4 by construction.
"""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

import ppl_toolkit as ppl
from ppl_toolkit import engine, executables
from ppl_toolkit.errors import DataError, MethodError, OptionError
from ppl_toolkit.inference import (
    MCMC,
    NUTS,
    SMC,
    Gibbs,
    LocallyBalanced,
    PseudoMarginal,
    block,
    cycle,
    involutive,
    mixture,
    rehearsal,
    smc,
    smc_stage,
)
from ppl_toolkit.inference.involution import random_walk

sys.path.insert(0, str(Path(__file__).parent))
import pages

SEEDS = range(20)
Y = np.zeros(5)  # its values do not matter


def location_scale(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    s = numpyro.sample("s", dist.HalfNormal(1))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(a, s), obs=y)


def mixed(y):
    w = numpyro.sample("w", dist.Beta(1, 1))
    mu = numpyro.sample("mu", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(w))
        numpyro.sample("y", dist.Normal(mu[z], 1), obs=y)


def flat(y):
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


def dice(y):
    with numpyro.plate("n", len(y)):
        k = numpyro.sample("k", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        numpyro.sample("y", dist.Normal(1.0 * k, 1), obs=y)


def branching(y):
    """A program with one choice or two: x is made only if the flag is set."""
    flag = numpyro.sample("flag", dist.Bernoulli(0.3))
    x = numpyro.sample("x", dist.Categorical(jnp.array([0.5, 0.2, 0.3])))
    numpyro.sample("y", dist.Normal(jnp.where(flag == 1, 1.0 + x, 0.0), 1), obs=y)


# -- a move that stretches one coordinate, and its mutant ----------------------------------------


def factor(position, target):
    numpyro.sample("u", dist.Normal(0, 0.3))


def stretch(position, v, target):
    return {**position, "a": position["a"] * jnp.exp(v["u"])}, {"u": -v["u"]}


def drift(position, target):
    numpyro.sample("v", dist.Normal(0.02, 0.3))


def slide(position, v, target):
    return {**position, "a": position["a"] + v["v"]}, {"v": -v["v"]}


def without_density_of_drift(position, v, target):
    law = dist.Normal(0.02, 0.3)
    return law.log_prob(v["v"]) - law.log_prob(-v["v"])


RIGHT_STRETCH = involutive(factor, stretch, name="stretch")
WRONG_STRETCH = involutive(factor, stretch, log_det=0.0, name="stretch")


# -- single-site Metropolis-Hastings on a program whose number of choices changes -----------------


def single_site(position, target):
    """Draw one of the n choices, and a new value for it from its prior."""
    both = position["flag"] == 1
    site = numpyro.sample("site", dist.Categorical(jnp.where(both, 0.5, jnp.array([1.0, 0.0]))))
    numpyro.sample("new_flag", dist.Bernoulli(jnp.where(site == 0, 0.3, 1.0 * both)))
    old = jnp.arange(3) == position["x"]
    fresh = jnp.array([0.5, 0.2, 0.3])
    # x is drawn afresh when its branch is entered, too
    numpyro.sample("new_x", dist.Categorical(jnp.where(both & (site == 0), 1.0 * old, fresh)))


def exchange(position, v, target):
    as_int = {"flag": v["new_flag"], "x": v["new_x"]}
    new = {name: as_int[name].astype(position[name].dtype) for name in position}
    return new, {**v, "new_flag": position["flag"], "new_x": position["x"]}


def without_number_of_choices(position, v, target):
    """Takes the ratio n / n' of the numbers of choices out again."""
    return jnp.log((1.0 + v["new_flag"]) / (1.0 + position["flag"]))


# -- pseudo-marginal: noise of mean one in the place of an estimate --------------------------------


def location(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(a, 1), obs=y)


def walk(position, target):
    numpyro.sample("a", dist.Normal(position["a"], 1.5))


def noise(key, position):
    """Log of an unbiased estimate of one, the noisier the larger a is."""
    sd = 2.0 / (1.0 + jnp.exp(-2.0 * position["a"]))
    return sd * random.normal(key) - 0.5 * sd**2


@dataclasses.dataclass(frozen=True, repr=False)
class EstimatedAgain(PseudoMarginal):
    """Estimates the present likelihood anew in every step."""

    def bind(self, target, stage=ppl.inference.kernel.SAMPLING):
        kernel = super().bind(target, stage)

        def step(key, state):
            key_again, key_step = random.split(key)
            return kernel.step(key_step, kernel.init(state.position, key_again))

        return kernel._replace(step=step)


# -- the fast tests --------------------------------------------------------------------------------


@pytest.fixture
def no_trial(monkeypatch):
    """Lets involutions with a wrong determinant through, which `infer` refuses beforehand."""
    monkeypatch.setattr(rehearsal, "judge", lambda trials: None)


@pytest.mark.slow
def test_a_right_composition_passes_with_all_its_parts():
    kernel = cycle([block(NUTS(), ["w", "mu"]), block(Gibbs(), "z")])
    found = ppl.check(mixed, np.zeros(6), method=kernel)
    assert found
    assert list(found.invariant) == ["cycle", "nuts_w_mu", "gibbs_z"]
    assert "nothing wrong was found" in str(found)
    assert found.invariant["gibbs_z"].moved > 0.3
    assert found.geweke.turns == 4  # a small model: Geweke's test as well
    assert "Geweke's test: 4,000 replications of 4 turns of 3 steps" in str(found)


@pytest.mark.slow
def test_the_guilty_part_is_named(no_trial):
    walk = random_walk(0.5)
    kernel = cycle([mixture([block(walk, "a"), WRONG_STRETCH]), block(walk, "s")])
    found = ppl.check(location_scale, Y, method=kernel)
    assert not found
    assert found.guilty == ["stretch"]
    assert found.rejected("stretch")[0] in ("a (spread)", "log prior")
    assert "What fails by itself: stretch." in str(found)


@pytest.mark.slow
def test_mistakes_add_up_over_the_turns_of_geweke(no_trial):
    """A weak mistake (a drift of a fiftieth): three steps show less of it than twelve."""
    drifting = involutive(drift, slide, log_det=without_density_of_drift, name="drifting")
    found = ppl.check(location_scale, Y, method=cycle([drifting, block(NUTS(), "s")]))
    assert "geweke" in found.failed
    assert abs(found.geweke.shift["a"]) > 1.3 * abs(found.invariant["cycle"].shift["a"])
    assert found.guilty


def test_geweke_needs_a_kernel_and_real_numbers():
    with pytest.raises(MethodError, match="Geweke's test needs a kernel"):
        ppl.check(dice, np.array([0.3]), method=Gibbs(), geweke=True)
    with pytest.raises(MethodError, match="Geweke's test needs a kernel"):
        ppl.check(location_scale, Y, method=SMC(), geweke=True)
    assert ppl.check(location_scale, Y, method=random_walk(0.5), geweke=False).geweke is None


@pytest.mark.slow
def test_populations_are_calibrated_and_their_evidence_compared(tmp_path):
    y = np.array([0.3, 1.0, 2.0])
    found = ppl.check(dice, y, method=SMC(particles=64), progress=False)
    assert found
    assert found.calibrated.ok
    assert found.evidence.source == "by enumeration"
    assert "evidence: 500 runs with the" in str(found)
    off = dataclasses.replace(found, evidence=found.evidence._replace(p_value=1e-9))
    assert off.failed == ["evidence"]
    assert not off
    assert len(found.plot().axes) == 2
    found.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    pages.check(text)
    assert "Nothing wrong was found" in text
    assert 'id="evidence"' in text
    unknown = dataclasses.replace(found, evidence=found.evidence._replace(problem="no reason"))
    assert len(unknown.plot().axes) == 1
    unknown.save(tmp_path / "page.html")
    assert "Not tested: no reason" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_pictures_of_kernels_mark_what_fails(no_trial, tmp_path):
    kernel = cycle([WRONG_STRETCH, block(NUTS(), "s")])
    found = ppl.check(location_scale, Y, method=kernel, geweke=False)
    (panel,) = found.plot().axes
    assert [text.get_text() for text in panel.get_yticklabels()] == list(found.invariant)
    red = [line.get_xdata()[0] for line in panel.lines if line.get_color() == "#c1440e"]
    names = [(label, q) for label in found.invariant for q in found.rejected(label)]
    assert sorted(red) == sorted(found.invariant[label].shift[q] for label, q in names)
    found.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    pages.check(text)
    assert "What fails by itself: stretch" in text


@pytest.mark.slow
def test_pictures_of_exact_errors(tmp_path):
    found = ppl.check(dice, np.array([0.3, 1.0]), method=cycle([Gibbs(), LocallyBalanced()]))
    (panel,) = found.plot().axes
    assert panel.get_xscale() == "log"
    found.save(tmp_path / "page.html")
    pages.check((tmp_path / "page.html").read_text())


def test_finite_models_are_checked_exactly():
    found = ppl.check(dice, np.array([0.3, 1.0, 2.0]), method=LocallyBalanced())
    assert found
    (exact,) = found.exact.values()
    assert exact.states == 27
    assert max(exact.invariance, exact.rows, exact.asymmetry) < 1e-14


@pytest.mark.slow
def test_the_number_of_choices_belongs_into_the_ratio(no_trial):
    right = involutive(single_site, exchange, log_det=0.0, name="single site")
    wrong = involutive(single_site, exchange, log_det=without_number_of_choices, name="dropped")
    y = np.asarray(1.3)
    assert ppl.check(branching, y, method=right)
    found = ppl.check(branching, y, method=wrong)
    assert found.guilty == ["dropped"]
    assert found.exact["dropped"].invariance > 0.01
    assert "changes posterior probabilities" in str(found)


def test_options_and_models_that_cannot_be_checked():
    with pytest.raises(OptionError, match="replications"):
        ppl.check(location_scale, Y, replications=3)
    with pytest.raises(OptionError, match="level"):
        ppl.check(location_scale, Y, level=2.0)
    with pytest.raises(OptionError, match="steps"):
        ppl.check(location_scale, Y, steps=0)
    with pytest.raises(OptionError, match="does not estimate the evidence"):
        ppl.check(location_scale, Y, log_evidence=0.0)
    with pytest.raises(DataError, match="observes nothing"):
        ppl.check(lambda: numpyro.sample("x", dist.Normal(0, 1)))
    with pytest.raises(MethodError, match="improper"):
        ppl.check(flat, 1.0)
    with pytest.raises(MethodError, match="no part of the kernel moves"):
        ppl.check(location_scale, Y, method=MCMC(block(NUTS(), "a")))


def test_a_part_may_leave_sites_alone():
    assert ppl.check(location_scale, Y, method=block(random_walk(0.5), "a"))


# -- the default budget on twenty seeds ------------------------------------------------------------

WRONG = {
    "no Jacobian": (location_scale, (Y,), WRONG_STRETCH),
    "estimated again": (location, (Y[:2],), EstimatedAgain(walk, noise)),
    "dropped number of choices": (
        branching, (np.asarray(1.3),),
        involutive(single_site, exchange, log_det=without_number_of_choices),
    ),
}  # fmt: skip
RIGHT = {
    "NUTS": (location_scale, (Y,), NUTS()),
    "random walk": (location_scale, (Y,), random_walk(0.6)),
    "stretch": (location_scale, (Y,), cycle([RIGHT_STRETCH, block(NUTS(), "s")])),
    "NUTS and Gibbs": (
        mixed, (np.zeros(6),), cycle([block(NUTS(), ["w", "mu"]), block(Gibbs(), "z")]),
    ),
    "pseudo-marginal": (location, (Y[:2],), PseudoMarginal(walk, noise)),
    "SMC": (location_scale, (Y,), SMC(particles=256)),
    "SMC over batches": (location_scale, (Y,), SMC(particles=256, batches=3)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_samplers_are_found_out_in_nineteen_of_twenty_seeds(name, no_trial):
    model, args, kernel = WRONG[name]
    if "stretch" in str(kernel):  # which does not move the sign of a, nor s
        kernel = cycle([kernel, block(NUTS(), "s")])
    found = [not ppl.check(model, *args, method=kernel, seed=s, progress=False) for s in SEEDS]
    assert sum(found) >= 19


@pytest.mark.slow
def test_data_counted_twice_are_found_out_in_nineteen_of_twenty_seeds(monkeypatch):
    """SMC over three batches of data that weighs and moves with the first batch in it twice."""
    once = smc_stage.tempered_likelihood

    def twice(point, like):
        return once(point, like) + once(jnp.minimum(point, 1.0), like)

    for module in (smc, smc_stage):
        monkeypatch.setattr(module, "tempered_likelihood", twice)
    monkeypatch.setenv("PPL_CACHE_DIR", "off")  # nor are these programs kept for others
    executables.clear()
    engine._structures.clear()
    try:
        method = SMC(particles=256, batches=3)
        found = [
            not ppl.check(location_scale, Y, method=method, seed=s, progress=False) for s in SEEDS
        ]
    finally:
        executables.clear()
    assert sum(found) >= 19


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_samplers_pass_on_all_twenty_seeds(name):
    model, args, kernel = RIGHT[name]
    for seed in SEEDS:
        found = ppl.check(model, *args, method=kernel, seed=seed, progress=False)
        assert found, str(found)
