"""Simulation-based calibration: right samplers pass, wrong ones are named."""

import re
import sys
from pathlib import Path

import arviz as az
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations
from models import EFFECTS, ERRORS, conjugate, die, eight_schools

import ppl_toolkit as ppl
from ppl_toolkit import executables
from ppl_toolkit.diagnostics.calibration import _ranks, calibrate
from ppl_toolkit.diagnostics.simulation import Simulator, holm
from ppl_toolkit.errors import DataError, MethodError, OptionError
from ppl_toolkit.program import Program

sys.path.insert(0, str(Path(__file__).parent))
from broken import HalfStepAccept, IgnoresOne, WrongJacobian

X = np.linspace(-1.0, 1.0, 12)


def regression(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def counts(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Poisson(np.e ** (b[0] + b[1] * x)), obs=y)


COUNTS = np.zeros(12, int)
MODELS = {
    "eight schools": (eight_schools, (ERRORS,), {"y": EFFECTS}),
    "regression": (regression, (X,), {"y": X}),
    "counts": (counts, (X,), {"y": COUNTS}),
}
BROKEN = {
    "wrong Jacobian": WrongJacobian(),
    "half step size in the accept": HalfStepAccept(steps=5),
    "an ignored data point": IgnoresOne(),
}


def check(what, **options):
    model, args, kwargs = MODELS[what]
    return calibrate(model, *args, **kwargs, **{"progress": False, **options})


# --- in short -----------------------------------------------------------------------------------


def test_all_data_sets_run_through_programs_compiled_once(monkeypatch):
    """Twenty or two hundred data sets, other data, another seed: nothing more is compiled."""
    monkeypatch.setenv("PPL_CACHE_DIR", "off")
    executables.clear()
    before = len(compilations)
    budget = {"draws": 19, "warmup": 50, "thinning": 1, "progress": False}
    calibrate(conjugate, np.zeros(4), replications=20, **budget)
    count = len(compilations)
    assert (
        2 <= count - before <= 8
    )  # two programs of the sampler, and those that simulate and measure
    calibrate(conjugate, np.ones(4), replications=200, seed=7, **budget)
    assert len(compilations) == count


@pytest.mark.slow  # the tutorial of calibration has them
def test_exact_draws_pass():
    """Enumeration draws from the exact posterior; the only quantity ties most of the time."""
    found = calibrate(
        die, np.asarray(1.0), method="enumeration", replications=300, warmup=0, progress=False
    )
    assert found.ok
    assert set(found.p_values) == {"k", "log_likelihood", "log_joint"}
    assert found.ranks.max() <= found.draws
    assert found.ranks.min() >= 0


@pytest.mark.slow  # the tutorial of calibration has NUTS in short
def test_nuts_passes_on_a_conjugate_model_and_says_so():
    found = calibrate(conjugate, np.zeros(5), replications=200, warmup=200, progress=False)
    assert found.ok
    assert "Nothing contradicts calibration" in str(found)
    assert "NUTS" in str(found)
    assert list(found.ranks["quantity"].values) == ["log_joint", "log_likelihood", "m"]


@pytest.mark.slow  # the tutorial of calibration has wrong samplers in short
def test_a_wrong_sampler_is_named_with_its_error():
    found = check("eight schools", method=WrongJacobian(), replications=150, warmup=200)
    assert not found.ok
    assert "tau" in found.failed
    assert "tau: p = " in str(found)
    # Without its Jacobian tau is drawn to zero, where chains stay.
    assert re.search(r"tau: p = \S+, the draws are too (low|narrow)", str(found))


@pytest.mark.slow
def test_functions_of_a_users_own_are_ranked():
    found = check(
        "regression", replications=100, warmup=200, thinning=2,
        quantities=lambda sites: {"ratio": sites["slope"] / sites["noise"]},
    )  # fmt: skip
    assert "ratio" in found.p_values
    assert found.thinning == 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_ranks():
    options = {"replications": 40, "warmup": 50, "thinning": 1}
    one, two = (check("regression", threads=t, **options) for t in (1, 2))
    np.testing.assert_array_equal(one.ranks, two.ranks)
    other = check("regression", seed=1, **options)
    assert not np.array_equal(one.ranks, other.ranks)


def test_ranks_break_ties_at_random():
    rng = np.random.default_rng(0)
    drawn = np.tile([[0.0], [1.0], [1.0], [2.0]], (1, 6000))
    ranks = _ranks(np.ones(6000), drawn, rng)
    share = np.bincount(ranks, minlength=5) / 6000
    np.testing.assert_allclose(share, [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=4 * np.sqrt(2 / 9 / 6000))


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_arviz_draws_it():
    found = calibrate(conjugate, np.zeros(5), replications=60, warmup=100, progress=False)
    tree = found.tree()
    values = tree["prior_sbc"]["m"]
    assert values.dims == ("chain", "draw")
    assert 0 < float(values.min()) < float(values.max()) < 1
    az.plot_ecdf_pit(tree, group="prior_sbc", backend="none")


def flat(y):
    m = numpyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def summed(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(m + z, 1.0), obs=y)


def doubled(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=2 * y)


ERRORS_OF = {
    "improper prior": (lambda: calibrate(flat, 1.0), MethodError, "improper"),
    "summed out": (lambda: calibrate(summed, 1.0), MethodError, "true value"),
    "computed": (lambda: calibrate(doubled, 1.0), DataError, r"\['y'\].*computes"),
    "nothing observed": (lambda: calibrate(eight_schools, ERRORS), DataError, "observes nothing"),
    "few": (lambda: check("regression", replications=3), OptionError, "replications"),
    "level": (lambda: check("regression", level=2), OptionError, "level"),
    "method": (lambda: check("regression", method="nutz"), MethodError, "nutz"),
}


@pytest.mark.parametrize("what", ERRORS_OF)
def test_errors(what):
    call, kind, message = ERRORS_OF[what]
    with pytest.raises(kind, match=message):
        call()


# --- at the default budget ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", MODELS)
def test_nuts_is_calibrated(what):
    """Seeds fixed beforehand; a right sampler fails once in 1000."""
    assert check(what, seed=2024).ok


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_wrong_samplers_are_caught(what):
    """Twenty seeds fixed beforehand: at least nineteen alarms."""
    caught = [not check("eight schools", method=BROKEN[what], seed=s).ok for s in range(20)]
    assert sum(caught) >= 19


def test_report_of_the_room():
    assert ppl.calibrate is calibrate


def test_deterministic_sites_are_those_of_the_simulated_data():
    def residuals(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        numpyro.deterministic("residual", y - mean)
        with numpyro.plate("row", 3):
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    program = Program(residuals, (np.full(3, 100.0),))
    for drawn in Simulator.of(program).joints(program, 2, seed=1):
        own = drawn["quantities"]
        np.testing.assert_array_equal(own["residual"], drawn["observed"]["y"] - own["mean"])
