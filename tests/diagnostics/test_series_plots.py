"""Findings and pictures of filters and sweeps."""

import warnings

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics import plots
from ppl_toolkit.errors import DataError, InferenceWarning, SiteError
from ppl_toolkit.inference import PPG, ParticleFilter, ParticleGibbs


def pairs(y):
    """Two series."""

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y_t)
        return x, None

    scan(step, np.zeros(2), y)


Y = np.cumsum(np.random.default_rng(0).normal(size=(40, 2)) * 0.4, 0)


@pytest.fixture(scope="module")
def filtered():
    return ppl.infer(pairs, Y, method=ParticleFilter(300), draws=20, progress=False)


@pytest.fixture(scope="module")
def swept():
    method = PPG(functional=lambda carry, latents, t: latents["x"][0], particles=20)
    return ppl.infer(pairs, Y, method=method, draws=30, warmup=5, progress=False)


def test_a_good_filter_has_no_finding(filtered):
    assert ppl.findings(filtered) == []


@pytest.mark.slow
def test_few_sweeps_are_no_finding(swept):
    assert ppl.findings(swept) == []


@pytest.mark.slow
def test_a_filter_with_few_particles_has_one():
    with pytest.warns(InferenceWarning, match="standard deviation"):
        tree = ppl.infer(pairs, 8 * Y, method=ParticleFilter(20), draws=20, progress=False)
    (finding,) = ppl.findings(tree)
    assert finding.kind == "noisy_filter"
    logs = tree["sample_stats"]["log_evidence"].values[:, 0]
    assert finding.number == pytest.approx(logs.std(ddof=1))


def test_bands_are_quantiles(filtered):
    figure = plots.series(filtered, "x", data=Y, transform=np.exp)
    assert len(figure.axes) == 2
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    draws = filtered["posterior"]["x"].values[..., 1].reshape(-1, 40)
    smoothed = np.exp(np.quantile(draws, 0.5, axis=0))
    np.testing.assert_allclose(lines["given all data"].get_ydata(), smoothed)
    own = filtered["filtering"]["x_quantiles"].sel(quantile=2).mean("chain").values[:, 1]
    np.testing.assert_allclose(lines["given data so far"].get_ydata(), np.exp(own))
    np.testing.assert_allclose(lines["data"].get_ydata(), Y[:, 1])


def test_how_a_filter_fared(filtered):
    figure = plots.filtering(filtered, time=np.arange(40) + 1900)
    sizes = filtered["filtering"]["ess"].values
    np.testing.assert_allclose(figure.axes[0].lines[2].get_ydata(), sizes[2])
    assert figure.axes[0].lines[2].get_xdata()[0] == 1900


def test_how_paths_are_renewed(swept):
    figure = plots.renewal(swept, "x")
    share = np.array([line.get_ydata() for line in figure.axes[0].lines])
    assert share.shape == (4, 40)
    told = swept["sample_stats"]["renewed"].values[:, 1:].mean(1)
    np.testing.assert_allclose(share.mean(1), told, rtol=1e-5)


def test_what_cannot_be_drawn(filtered, swept):
    with pytest.raises(SiteError, match="no site"):
        plots.series(filtered, "z")
    with pytest.raises(DataError, match="40 steps"):
        plots.series(filtered, "x", time=np.arange(3))
    with pytest.raises(DataError, match="ParticleFilter"):
        plots.filtering(swept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        one = ppl.infer(pairs, Y, method=ParticleGibbs(particles=20, warmup=0), draws=1)
    with pytest.raises(DataError, match="few draws"):
        plots.renewal(one, "x")


def test_reports_are_made(filtered, swept, tmp_path):
    for name, tree in (("filter", filtered), ("sweeps", swept)):
        ppl.report(tree, tmp_path / f"{name}.html")
        assert (tmp_path / f"{name}.html").stat().st_size > 10_000
