"""The pictures draw, say what they need, and show what they should."""

import warnings

import numpy as np
import pytest
import xarray
from models import EFFECTS, ERRORS, conjugate, eight_schools

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics import plots
from ppl_toolkit.diagnostics.ecdf import band
from ppl_toolkit.errors import DataError


@pytest.fixture(scope="module")
def tree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
        fit = ppl.infer(eight_schools, ERRORS, y=EFFECTS, draws=200, progress=False)
        prior = ppl.infer(
            eight_schools, ERRORS, y=EFFECTS, method="prior", draws=200, progress=False
        )
    fit["prior"] = xarray.DataTree(prior["prior"].to_dataset())
    return ppl.predict(fit, eight_schools, ERRORS, y=EFFECTS)


PICTURES = {
    "traces": lambda t: plots.traces(t, var_names=["mu"]),
    "ranks": lambda t: plots.ranks(t, var_names=["mu"]),
    "forest": lambda t: plots.forest(t, var_names=["theta"]),
    "energy": plots.energy,
    "divergences": lambda t: plots.divergences(t, var_names=["mu", "tau"]),
    "prior_posterior": lambda t: plots.prior_posterior(t, var_names=["mu"]),
    "predictive": plots.predictive,
}


@pytest.mark.parametrize("name", PICTURES)
def test_draws(name, tree, tmp_path):
    PICTURES[name](tree).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 2000


def test_missing_groups_are_named(tree):
    bare = xarray.DataTree.from_dict({"posterior": tree["posterior"].to_dataset()})
    with pytest.raises(DataError, match=r"\['prior'\]"):
        plots.prior_posterior(bare)
    with pytest.raises(DataError, match="sample_stats"):
        plots.energy(bare)


def test_calibration_shows_the_difference_and_the_band():
    found = ppl.calibrate(
        conjugate, np.zeros(3), replications=60, warmup=100, thinning=1, progress=False
    )
    figure = plots.calibration(found)
    assert len(figure.axes) == 3
    panel = figure.axes[0]
    name = panel.get_title(loc="left").split(",")[0]
    assert name == min(found.p_values, key=found.p_values.get)
    x, y = panel.lines[0].get_data()
    ranks = found.ranks.sel(quantity=name).values
    share = np.mean(ranks[:, None] < np.arange(1, 101), axis=0)
    np.testing.assert_allclose(y, share - x, atol=1e-12)
    edges = panel.collections[0].get_paths()[0].vertices[:, 1]
    limits = band(60, x)
    assert np.isclose(edges.max(), np.max(limits.high / 60 - x))
    with pytest.raises(DataError, match="no quantities"):
        plots.calibration(found, ["q"])
