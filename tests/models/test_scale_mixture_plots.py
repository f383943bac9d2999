"""Pictures of scale mixtures show what they say."""

import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest

from ppl_toolkit.errors import DataError
from ppl_toolkit.models.infinite_width import mlp
from ppl_toolkit.models.scale_mixture import (
    fit,
    plot_calibration,
    plot_predictions,
    plot_scale,
)

X = np.linspace(-1, 1, 6)[:, None]
Y = np.sin(3 * X[:, 0])
ONE = fit(mlp(1), X, Y, noise=0.1)


def test_bands_hold_the_quantiles():
    x = np.linspace(-2, 2, 5)
    figure = plot_predictions({"Student-t": ONE}, x, mass=0.8)
    (panel,) = figure.axes
    assert panel.get_title() == "Student-t"
    outer = panel.collections[0].get_paths()[0].vertices[:, 1]
    low, high = ONE.predict(x[:, None]).interval(0.8)
    np.testing.assert_allclose(outer.min(), low.min())
    np.testing.assert_allclose(outer.max(), high.max())
    np.testing.assert_allclose(panel.lines[0].get_ydata(), ONE.predict(x[:, None]).quantile(0.5))
    plt.close(figure)


def test_densities_of_the_scale_are_densities():
    figure = plot_scale({"t": ONE, "point": ONE.with_law(dist.Delta(1.0))})
    (panel,) = figure.axes
    for line in panel.lines[:1]:  # given the data; the prior's tail leaves the picture
        area = np.trapezoid(line.get_ydata(), np.log(line.get_xdata()))
        np.testing.assert_allclose(area, 1, atol=0.01)
    assert [text.get_text() for text in panel.get_legend().get_texts()][:2] == ["t", "point"]
    plt.close(figure)


def test_calibration_of_targets_at_their_quantiles():
    """Targets at the predicted medians: half of the promised shares have none below, all later."""
    figure = plot_calibration(ONE, X, ONE.predict(X).quantile(0.5))
    curve = figure.axes[0].lines[-1]
    shares, gap = curve.get_xdata(), curve.get_ydata()
    np.testing.assert_allclose(gap[shares < 0.49], -shares[shares < 0.49])
    np.testing.assert_allclose(gap[shares > 0.51], 1 - shares[shares > 0.51])
    plt.close(figure)


def test_several_features_have_no_band():
    wide = fit(mlp(1), np.c_[X, X**2], Y, noise=0.1)
    with pytest.raises(DataError, match="plot_calibration"):
        plot_predictions(wide, X[:, 0])
    with pytest.raises(DataError, match="no fit"):
        plot_scale({})
