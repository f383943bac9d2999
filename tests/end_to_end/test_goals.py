"""Runs that end once they are precise enough."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet, quietly

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.errors import OptionError, SiteError
from ppl_toolkit.goals import Judge

Y = np.random.default_rng(0).normal(3.0, 1.0, 20)
STEPS = (100, 125, 157, 197, 247, 309, 387, 484, 605, 757, 947, 1184)


def conjugate(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    numpyro.deterministic("twice", 2.0 * mu)
    numpyro.deterministic("one", 1.0)
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def exact(y):
    variance = 1.0 / (len(y) + 0.01)
    return variance * y.sum(), np.sqrt(variance)


def until(goal, **options):
    return quiet(conjugate, Y, until=goal, warmup=100, **options)


@pytest.fixture(scope="module")
def reached():
    return until(ppl.Goal(ess=1000))


def test_a_run_ends_at_the_first_number_of_draws_that_will_do(reached):
    draws = reached["posterior"]["mu"].values
    assert draws.shape[1] in STEPS
    assert reached.attrs["goal_missing"] == ""
    assert "draws, until ESS >= 1000, R-hat <= 1.01, warm-up" in str(ppl.report(reached))
    for number in STEPS[: STEPS.index(draws.shape[1]) + 1]:
        found = convergence.convergence(draws[:, :number])
        enough = min(found["ess_bulk"], found["ess_tail"]) >= 1000 and found["r_hat"] <= 1.01
        assert enough == (number == draws.shape[1])


def test_what_was_drawn_does_not_depend_on_the_goal(reached):
    count = reached["posterior"].sizes["draw"]
    plain = quiet(conjugate, Y, draws=count, warmup=100)
    np.testing.assert_array_equal(plain["posterior"]["mu"], reached["posterior"]["mu"])


@pytest.mark.parametrize("chunk", [7, 500])
def test_where_a_run_ends_does_not_depend_on_chunks(reached, chunk):
    other = until(ppl.Goal(ess=1000), chunk=chunk)
    np.testing.assert_array_equal(other["posterior"]["mu"], reached["posterior"]["mu"])


def test_going_on_ends_at_the_same_draw(reached, tmp_path):
    goal, path = ppl.Goal(ess=1000), tmp_path / "run.zarr"
    short = until(goal, draws=130)
    assert "effective draws of 1000" in short.attrs["goal_missing"]
    assert [f.kind for f in ppl.findings(short)].count("goal") == 1
    longer = quietly(ppl.extend, short, conjugate, Y, until=goal)
    np.testing.assert_array_equal(longer["posterior"]["mu"], reached["posterior"]["mu"])
    until(goal, draws=130, store=path)
    for _ in range(2):  # the goal is kept with the run; once it is reached nothing is drawn
        resumed = quiet(conjugate, Y, resume=path, draws=5000)
        np.testing.assert_array_equal(resumed["posterior"]["mu"], reached["posterior"]["mu"])


@pytest.mark.parametrize("part", [slice(None, None, 2), slice(0, 60)], ids=["thinned", "cut"])
def test_going_on_from_some_of_the_draws(part):
    """The run itself goes on where it was; it is judged after as many draws as it has made."""
    first = quiet(conjugate, Y, warmup=100, draws=120)
    longer = quietly(
        ppl.extend, first.isel(draw=part), conjugate, Y, until=ppl.Goal(ess=800), draws=3000
    )
    new = longer["posterior"]["mu"].values[:, 60:]
    assert 120 + new.shape[1] in STEPS
    whole = quietly(ppl.extend, first, conjugate, Y, draws=new.shape[1])
    np.testing.assert_array_equal(new, whole["posterior"]["mu"].values[:, 120:])


def test_errors_of_means():
    mean, sd = exact(Y)
    relative = until(ppl.Goal(mcse=0.015))
    assert convergence.mcse(relative["posterior"]["mu"].values) <= 0.015 * sd * 1.1
    absolute = until(ppl.Goal(mcse={"twice": 0.01}))
    assert convergence.mcse(absolute["posterior"]["twice"].values) <= 0.01
    assert relative["posterior"].sizes["draw"] > absolute["posterior"].sizes["draw"] > 100
    assert abs(float(absolute["posterior"]["mu"].mean()) - mean) < 4.5 * 0.005


@pytest.mark.slow
def test_errors_are_of_the_right_size_although_the_end_is_chosen_by_them():
    """The mean square of 60 z scores is chi-squared over 60: this band fails once in 10,000."""
    z = []
    for seed in range(60):
        draws = until(ppl.Goal(mcse=0.04), seed=seed)["posterior"]["mu"].values
        z.append((draws.mean() - exact(Y)[0]) / convergence.mcse(draws))
    assert 0.43 < np.mean(np.square(z)) < 1.9


def normal(chains=4, draws=100, seed=0):
    return np.random.default_rng(seed).normal(size=(chains, draws))


def judged(goal, x, **options):
    judge = Judge(goal, **options)
    judge.add({"x": x})
    return judge.done(), judge.missing


def test_numbers_at_which_runs_are_judged():
    judge, seen = Judge(ppl.Goal(ess=10)), []
    for _ in STEPS:
        seen.append(judge.next)
        judge.add({"x": np.zeros((4, judge.next - judge.draws))})
    assert tuple(seen) == STEPS
    between = Judge(ppl.Goal(ess=10))
    between.add({"x": normal(draws=110)})
    assert between.next == 125
    assert not between.done()  # whatever the draws are


def test_r_hat_is_needed_but_never_enough():
    apart = normal() + np.array([0.0, 0.0, 0.0, 0.8])[:, None]
    assert "R-hat" in judged(ppl.Goal(ess=20), apart)[1]
    assert judged(ppl.Goal(ess=20, r_hat=1.5), apart) == (True, "")
    assert "of 2000" in judged(ppl.Goal(ess=2000, r_hat=2.0), normal())[1]


def test_nested_r_hat_for_superchains():
    groups = normal(chains=64) + 0.3 * np.repeat(normal(chains=4, draws=1), 16, 0)
    assert judged(ppl.Goal(ess=100, r_hat=1.05), groups, superchains=4)[0]
    apart = normal(chains=64) + 2.0 * np.repeat(normal(chains=4, draws=1), 16, 0)
    assert "R-hat" in judged(ppl.Goal(ess=1, r_hat=1.05), apart, superchains=4)[1]


def test_few_effective_draws_are_never_enough_for_an_error():
    slow = np.repeat(normal(draws=10), 10, axis=1)
    assert "of 100" in judged(ppl.Goal(mcse=10.0, r_hat=3.0), slow)[1]


def test_constants_and_absent_elements_do_not_count():
    x = np.stack([normal(), np.ones((4, 100)), np.where(normal() > 0, normal(), np.nan)], -1)
    assert judged(ppl.Goal(ess=100), x) == (True, "")


BAD = {
    "nothing": ({}, "needs ess= or mcse="),
    "negative": ({"ess": -3}, "ess of a Goal must be a positive number; got -3"),
    "text": ({"ess": "many"}, "got 'many'"),
    "mcse": ({"mcse": {"mu": 0.0}}, "mcse mu of a Goal must be a positive number; got 0.0"),
    "r_hat": ({"ess": 10, "r_hat": 1.0}, "above 1; got 1.0"),
    "sites": ({"ess": 10, "sites": "mu"}, "list of names"),
    "no sites": ({"ess": 10, "sites": []}, r"list of names; got \[\]"),
    "numbers as sites": ({"ess": 10, "sites": [3]}, r"list of names; got \[3\]"),
    "no errors": ({"mcse": {}}, "needs ess= or mcse="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_goals(name):
    options, message = BAD[name]
    with pytest.raises(OptionError, match=message):
        ppl.Goal(**options)


def test_bad_calls():
    with pytest.raises(OptionError, match=r"until must be a Goal, such as ppl\.Goal\(ess=1000\)"):
        quiet(conjugate, Y, until=1000)
    with pytest.raises(SiteError, match=r"unknown sites \['nu'\]"):
        until(ppl.Goal(ess=10, sites=["nu"]))
    with pytest.raises(OptionError, match="MAP decides itself how far it goes"):
        until(ppl.Goal(ess=10), method="map")
