"""A Gaussian in three dimensions, and whether points are draws of it."""

import numpy as np
from scipy import stats

COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.3], [0.0, -0.3, 0.5]])
PRECISION = np.linalg.inv(COVARIANCE)


def gaussian(q):
    """Its log density."""
    return -0.5 * q @ PRECISION @ q


def require_draws(ends):
    """Refuse points (n, 3) that are no independent draws of it.

    Means, variances, two products, the radius and one coordinate: ten tests at 1e-5 each.
    """
    n = len(ends)
    bound = stats.norm.isf(0.5e-5)
    for i in range(3):
        sd = np.sqrt(COVARIANCE[i, i])
        assert abs(ends[:, i].mean()) < bound * sd / np.sqrt(n)
        assert abs((ends[:, i] ** 2).mean() - sd**2) < bound * sd**2 * np.sqrt(2 / n)
    for i, j in ((0, 1), (1, 2)):
        product = ends[:, i] * ends[:, j]
        assert abs(product.mean() - COVARIANCE[i, j]) < bound * product.std() / np.sqrt(n)
    radius = np.einsum("ni,ij,nj->n", ends, PRECISION, ends)
    assert stats.kstest(radius, stats.chi2(3).cdf).pvalue > 1e-5
    assert stats.kstest(ends[:, 0], stats.norm(0, 1).cdf).pvalue > 1e-5
