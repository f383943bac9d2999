"""Geweke's test: right transitions keep the joint law of parameters and data, wrong ones do not."""

import sys
from pathlib import Path

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow
from models import die

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.geweke import geweke
from ppl_toolkit.errors import MethodError, OptionError

sys.path.insert(0, str(Path(__file__).parent))
from broken import IgnoresOne, WrongJacobian


def pair(y):
    """Few data with a scale to learn: every observation counts."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m, noise), obs=y)


Y = np.zeros(2)
BUDGET = {"replications": 500, "transitions": 2, "warmup": 200}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nuts", ppl.HMC(steps=5)], ids=["nuts", "hmc"])
def test_right_samplers_pass(method):
    """Wrong alarm once in 1000 runs; the seed is fixed."""
    found = geweke(pair, Y, method=method, **BUDGET)
    assert found.ok, str(found)
    assert {"m", "m^2", "noise", "log_likelihood", "log_joint"} <= set(found.z)
    assert "Nothing contradicts invariance" in str(found)


@pytest.mark.parametrize(
    "method",
    others_slow([WrongJacobian(), IgnoresOne()], IgnoresOne()),
    ids=["Jacobian", "data point"],
)
def test_wrong_samplers_are_caught(method):
    found = geweke(pair, Y, method=method, **BUDGET)
    assert not found.ok
    assert "Not invariant" in str(found)


def test_the_seed_decides():
    budget = {"replications": 30, "transitions": 2, "warmup": 50}
    assert geweke(pair, Y, **budget).z == geweke(pair, Y, **budget).z
    assert geweke(pair, Y, **budget).z != geweke(pair, Y, seed=1, **budget).z


def test_errors():
    with pytest.raises(MethodError, match="no transitions"):
        geweke(die, np.asarray(1.0), method="enumeration")
    with pytest.raises(OptionError, match="replications"):
        geweke(pair, Y, replications=0)
