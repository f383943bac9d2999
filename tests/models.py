"""Models and data that several tests share."""

import numpy as np
import numpyro
import numpyro.distributions as dist

# Rubin (1981), Estimation in parallel randomized experiments, table 1.
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(sigma, y=None):
    """Non-centred."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", sigma.shape[0]):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centred(sigma, y=None):
    """The funnel: meant to diverge."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", sigma.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def conjugate(y):
    """Normal mean with known variance 1 and prior N(0, 4)."""
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def die(y):
    """Which of three dice was thrown: exact by enumeration."""
    k = numpyro.sample("k", dist.Categorical(np.array([0.2, 0.3, 0.5])))
    numpyro.sample("y", dist.Normal(1.0 * k, 1.0), obs=y)
