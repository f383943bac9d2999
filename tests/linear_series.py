"""Linear Gaussian series with two unknown parameters, and the posterior by quadrature."""

import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from scipy.stats import norm


def dynamics():
    phi = numpyro.sample("phi", dist.Uniform(-1, 1))
    return phi, numpyro.sample("q", dist.HalfNormal(1.0))


def followed(phi, q, start, y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, q))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, start, y)


def series(y):
    """x_t = phi x_{t-1} + N(0, q^2), y_t = x_t + N(0, 0.7^2), from x_0 = 0."""
    followed(*dynamics(), 0.0, y)


def series_from_start(y):
    """The same from x_0 ~ N(0, 1)."""
    phi, q = dynamics()
    followed(phi, q, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def moved(rng, x, size):
    """``size`` observations of a series with phi = 0.8, q = 0.5 that is at x before the first."""
    y = []
    for _ in range(size):
        x = 0.8 * x + 0.5 * rng.normal()
        y.append(x + 0.7 * rng.normal())
    return np.array(y)


def simulated(size, seed=0):
    """Data of `series`."""
    return moved(np.random.default_rng(seed), 0.0, size)


def simulated_from_start(size, seed=0):
    """Data of `series_from_start`."""
    rng = np.random.default_rng(seed)
    return moved(rng, rng.normal(), size)


def exact(y, y_0=None):
    """Log evidence, and (mean, sd) of phi, q and the path x, by Gauss-Legendre quadrature.

    Args:
        y: the series.
        y_0: an observation of x_0 ~ N(0, 1); None: x_0 = 0.

    A Kalman filter and smoother at 64 x 96 nodes; q is cut off at 5 prior standard deviations.
    """
    (a, wa), (b, wb) = np.polynomial.legendre.leggauss(64), np.polynomial.legendre.leggauss(96)
    phi, q = np.meshgrid(a, 2.5 * (b + 1.0), indexing="ij")
    log_w = np.log(np.outer(wa, 2.5 * wb)) - np.log(2.0) + np.log(2.0) + norm.logpdf(q)
    mean, var = np.zeros_like(phi), np.zeros_like(phi)
    if y_0 is not None:
        log_w += norm.logpdf(y_0, 0.0, np.sqrt(1.49))
        mean, var = mean + y_0 / 1.49, var + 0.49 / 1.49
    predicted, filtered = [], []
    for y_t in y:
        mean, var = phi * mean, phi**2 * var + q**2
        predicted.append((mean, var))
        log_w += norm.logpdf(y_t, mean, np.sqrt(var + 0.49))
        gain = var / (var + 0.49)
        mean, var = mean + gain * (y_t - mean), var * (1 - gain)
        filtered.append((mean, var))
    top = log_w.max()
    total = np.exp(log_w - top).sum()
    w = np.exp(log_w - top) / total

    def moments(means, variances=0.0):
        first = np.sum(w * means)
        return first, np.sqrt(np.sum(w * (variances + (means - first) ** 2)))

    smoothed = [filtered[-1]]
    for (m, v), (pm, pv) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        back = v * phi / pv
        later, later_var = smoothed[0]
        smoothed.insert(0, (m + back * (later - pm), v + back**2 * (later_var - pv)))
    path = np.array([moments(m, v) for m, v in smoothed]).T
    return top + np.log(total), {"phi": moments(phi), "q": moments(q), "x": (path[0], path[1])}


def log_likelihood(y, phi, q):
    """Log p(y | phi, q) by the Kalman filter."""
    mean, var, total = 0.0, 0.0, 0.0
    for y_t in y:
        mean, var = phi * mean, phi**2 * var + q**2
        total += norm.logpdf(y_t, mean, np.sqrt(var + 0.49))
        gain = var / (var + 0.49)
        mean, var = mean + gain * (y_t - mean), var * (1 - gain)
    return total
