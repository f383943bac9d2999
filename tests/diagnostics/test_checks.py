"""Predictive checks against laws that are known."""

import warnings

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import conjugate
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.checks import check_findings, check_posterior, check_prior
from ppl_toolkit.errors import DataError, MethodError, OptionError


def fit(y, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
        return ppl.infer(conjugate, y, progress=False, **options)


Y = np.random.default_rng(0).normal(0.5, 1.0, 20)


def test_prior_predictive_quantiles_are_exact():
    """The mean of n data is N(0, 4 + 1/n) under the prior: quantiles within 4 standard errors."""
    table = check_prior(conjugate, Y, draws=2000)
    law = stats.norm(0, np.sqrt(4 + 1 / 20))
    row = table.loc[("y", "mean")]
    for name, p in (("q5", 0.05), ("q50", 0.5), ("q95", 0.95)):
        exact = law.ppf(p)
        error = np.sqrt(p * (1 - p) / 8000) / law.pdf(exact)
        assert abs(row[name] - exact) < 4 * error
    assert abs(row["p_low"] - law.cdf(Y.mean())) < 4 * 0.5 / np.sqrt(8000)
    assert row["observed"] == pytest.approx(Y.mean())


def test_posterior_predictive_p_value_of_a_fixed_scale_is_exact():
    """sd^2 n of data with unit variance is chi^2 of n - 1 whatever the mean is."""
    table = check_posterior(fit(Y), conjugate, Y)
    share = stats.chi2(19).cdf(20 * Y.var())
    assert abs(table.loc[("y", "sd"), "p_low"] - share) < 4 * 0.5 / np.sqrt(4000)


def test_data_that_do_not_fit_are_a_finding_and_data_that_do_are_not():
    """Twenty data sets of the model: four statistics, each in 1% of sets by chance, at most one
    set in six with an alarm but for once in 1000."""
    wide = check_posterior(fit(10 * Y), conjugate, 10 * Y)
    kinds = {finding.sites for finding in check_findings(wide)}
    assert kinds == {("y",)}
    assert any("the sd of y" in finding.message for finding in check_findings(wide))
    rng = np.random.default_rng(1)
    alarms = 0
    for seed in range(20):
        y = rng.normal(rng.normal(0, 2), 1.0, 20)
        found = check_findings(check_posterior(fit(y, seed=seed, draws=500), conjugate, y))
        alarms += bool(found)
    assert alarms <= 4


def test_statistics_of_ones_own():
    tree = ppl.predict(fit(Y, draws=100), conjugate, Y)
    table = check_posterior(tree, statistics={"positive": lambda y: (y > 0).mean(axis=-1)})
    assert list(table.index) == [("y", "positive")]
    with pytest.raises(OptionError, match="last axis"):
        check_posterior(tree, statistics={"all": lambda y: y})
    with pytest.raises(OptionError, match="empty"):
        check_posterior(tree, statistics={})


def test_errors():
    with pytest.raises(DataError, match="Pass the model"):
        check_posterior(fit(Y, draws=100))

    def flat(y):
        m = numpyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    with pytest.raises(MethodError, match="improper"):
        check_prior(flat, Y)
