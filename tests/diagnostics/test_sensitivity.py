"""Power scaling: a normal mean whose prior and data agree, or disagree, or one of them is mute."""

import warnings

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.sensitivity import sensitivity, sensitivity_findings
from ppl_toolkit.errors import DataError, SiteError


def mean(y, noise=1.0):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m, noise), obs=y)


def table(y, noise=1.0, seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
        tree = ppl.infer(mean, y, noise, seed=seed, progress=False)
    return sensitivity(tree, mean, y, noise)


def kinds(*args):
    return {finding.kind: finding for finding in sensitivity_findings(table(*args))}


def test_conflict():
    """The prior says 0 +- 1, four observations say 8 +- 1/2."""
    found = kinds(np.full(4, 8.0))
    assert set(found) == {"conflict"}
    assert found["conflict"].sites == ("m",)


def test_weak_data():
    """One observation with a standard error of 30."""
    assert set(kinds(np.zeros(1), 30.0)) == {"weak_data"}


@pytest.mark.slow
def test_many_data_near_the_prior_raise_no_alarm_in_twenty_seeds():
    """200 observations: scaling the prior by 1% moves the posterior by about 1% of 1/200."""
    y = np.random.default_rng(0).normal(0.3, 1.0, 200)
    for seed in range(20):
        found = table(y, 1.0, seed)
        assert float(found["prior"].max()) < 0.02
        assert sensitivity_findings(found) == []


def test_errors():
    y = np.zeros(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
        tree = ppl.infer(mean, y, draws=100, progress=False)
    with pytest.raises(DataError, match="Pass the model"):
        sensitivity(tree)
    with pytest.raises(SiteError, match=r"\['q'\].*'m'"):
        sensitivity(tree, mean, y, var_names="q")
