"""Thirteen posteriors of stan-dev/posteriordb as NumPyro models, with their reference values.

Each posterior is a plain NumPyro model, the arguments that bind it to its data, and the
published summaries of the reference draws (Stan, 10 chains of 1000 thinned draws).
`eight_schools_centered` is a fourteenth: the centred form of the first, difficult on purpose,
with the same reference.

Every array is an argument of its model and nothing is closed over. Sites carry the names of the
Stan parameters, so that element ``beta[1]`` of the reference is the first entry of site ``beta``.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import constraints

__all__ = ["NAMES", "Posterior", "load"]

Array = jax.Array | np.ndarray
Draws = Mapping[str, np.ndarray]

RK4_STEPS_PER_INTERVAL = 16
POPULATION_BOUNDS = (1e-8, 1e4)


class Posterior(NamedTuple):
    """A model, its data and what its posterior is known to be.

    Attributes:
        name: The entry of `NAMES`.
        model: The NumPyro model.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model, the observed values among them.
        reference: For each scalar, say ``"theta[1]"``, its ``mean``, ``sd``, ``mcse`` (of the
            mean) and the quantiles ``q5``, ``q50``, ``q95``.
        scalars: Maps draws, one array of shape (chain, draw, ...) per site, to one array of shape
            (chain, draw) per scalar of the reference. Deterministic sites missing from the draws
            are computed from the others.
    """

    name: str
    model: Callable[..., None]
    args: tuple
    kwargs: dict[str, Any]
    reference: dict[str, dict[str, float]]
    scalars: Callable[[Draws], dict[str, np.ndarray]]


# Hierarchical models


def eight_schools_noncentered(sigma: Array, y: Array | None = None) -> None:
    """Effects of coaching in eight schools, non-centred."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", sigma.shape[0]):
        theta_raw = numpyro.sample("theta_raw", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_raw)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centered(sigma: Array, y: Array | None = None) -> None:
    """Effects of coaching in eight schools, centred: a funnel that defeats plain NUTS."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", sigma.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


# Regressions


def flat_regression(x: Array, y: Array | None = None) -> None:
    """Normal linear regression of y on the columns of x, flat in the coefficients and sigma > 0."""
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with numpyro.plate("observation", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore_momhsiq(mom_hs: Array, mom_iq: Array, kid_score: Array | None = None) -> None:
    """Children's test scores given their mother's schooling and IQ, regressors not centred."""
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("child", mom_hs.shape[0]):
        mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq
        numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def sblrc_blr(x: Array, y: Array | None = None) -> None:
    """Bayesian linear regression without intercept, weakly informative priors."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("observation", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kilpisjarvi(
    x: Array,
    pmualpha: Array,
    psalpha: Array,
    pmubeta: Array,
    psbeta: Array,
    y: Array | None = None,
) -> None:
    """Trend of the summer temperature at Kilpisjarvi, the year not centred."""
    alpha = numpyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = numpyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with numpyro.plate("year", x.shape[0]):
        numpyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def gp_regr(x: Array, y: Array | None = None) -> None:
    """Gaussian-process regression with the latent function integrated out."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))  # the variance of the noise
    distance = (x[:, None] - x[None, :]) / rho
    covariance = alpha**2 * jnp.exp(-0.5 * distance**2) + sigma * jnp.eye(x.shape[0])
    numpyro.sample("y", dist.MultivariateNormal(0.0, covariance_matrix=covariance), obs=y)


# Mixtures and time series


def low_dim_gauss_mix(num_observations: int, y: Array | None = None) -> None:
    """A mixture of two normals, its components labelled by the order of their means."""
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    mixing = dist.Categorical(probs=jnp.stack([theta, 1.0 - theta]))
    with numpyro.plate("observation", num_observations):
        numpyro.sample("y", dist.MixtureSameFamily(mixing, dist.Normal(mu, sigma)), obs=y)


def autoregression(lags: Array, y: Array | None = None) -> None:
    """Autoregression of order K; row t of `lags` holds the K values before y[t], latest first."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("time", lags.shape[0]):
        numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def garch11(sigma1: Array, y: Array) -> None:
    """GARCH(1,1), flat on the triangle alpha1 + beta1 < 1."""
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = numpyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    fraction = numpyro.sample("fraction", dist.Uniform(0.0, 1.0))
    beta1 = numpyro.deterministic("beta1", fraction * (1.0 - alpha1))
    # The density of (alpha1, beta1) is 1 / (1 - alpha1) without this factor, flat with it.
    numpyro.factor("flat_on_triangle", jnp.log1p(-alpha1))

    def step(variance, shock):
        variance = shock + beta1 * variance
        return variance, variance

    first = jnp.square(sigma1)
    _, rest = lax.scan(step, first, alpha0 + alpha1 * jnp.square(y[:-1] - mu))
    scale = jnp.sqrt(jnp.concatenate([first[None], rest]))
    with numpyro.plate("time", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, scale), obs=y)


def hmm_example(y: Array) -> None:
    """A hidden Markov chain of two states with unit normal noise, summed over its paths."""
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    hidden_markov_likelihood(theta1, theta2, mu, y)


def hidden_markov_likelihood(theta1: Array, theta2: Array, mu: Array, y: Array) -> None:
    """The factor of the observations of `hmm_example`, all paths summed.

    Args:
        theta1, theta2: transition probabilities from either state, of shape (2,).
        mu: means of the states, of shape (2,).
        y: observations, of shape (n,).
    """
    log_transition = jnp.log(jnp.stack([theta1, theta2]))
    log_emission = dist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(log_alpha, log_emission_t):
        predicted = jax.nn.logsumexp(log_alpha[:, None] + log_transition, axis=0)
        return predicted + log_emission_t, None

    log_alpha, _ = lax.scan(step, log_emission[0], log_emission[1:])
    numpyro.factor("log_likelihood", jax.nn.logsumexp(log_alpha))


def lotka_volterra(times: Array, y_init: Array | None = None, y: Array | None = None) -> None:
    """Predator and prey: the lynx and hare pelts of the Hudson's Bay Company from 1900 on."""
    theta = numpyro.sample(
        "theta",
        dist.TruncatedNormal(
            jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]), low=0.0
        ).to_event(1),
    )
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    z = solve_lotka_volterra(theta, z_init, times)
    with numpyro.plate("species", 2, dim=-1):
        numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=y_init)
        with numpyro.plate("time", times.shape[0], dim=-2):
            numpyro.sample("y", dist.LogNormal(jnp.log(z), sigma), obs=y)


def solve_lotka_volterra(
    theta: Array,
    z_init: Array,
    times: Array,
    steps_per_interval: int = RK4_STEPS_PER_INTERVAL,
) -> jax.Array:
    """Solves u' = (t1 - t2 v) u, v' = (t4 u - t3) v from time 0 by Runge-Kutta steps of order 4.

    Sixteen steps a year give a relative error of 2e-7 at the posterior mean of the pelt data, and
    below 4e-7 over its posterior. For parameters far from the data the equations are stiff at
    this step, and the solution would overflow, or turn negative and have no logarithm.
    Populations are therefore held within `POPULATION_BOUNDS` after every step, orders of
    magnitude beyond anything the data allow: the density stays finite and poor out there, and is
    untouched where the posterior lies. The bounds do not depend on the parameters, so the density
    remains continuous.

    Args:
        theta: The four rates.
        z_init: Prey and predators at time 0.
        times: Increasing positive times, of shape (n,).
        steps_per_interval: Steps from each time to the next.

    Returns:
        Prey and predators at `times`, of shape (n, 2).
    """
    growth, predation, death, conversion = theta

    def slope(u, v):
        return (growth - predation * v) * u, (conversion * u - death) * v

    def step(populations, h):
        u, v = populations
        u1, v1 = slope(u, v)
        u2, v2 = slope(u + 0.5 * h * u1, v + 0.5 * h * v1)
        u3, v3 = slope(u + 0.5 * h * u2, v + 0.5 * h * v2)
        u4, v4 = slope(u + h * u3, v + h * v3)
        u = jnp.clip(u + h / 6.0 * (u1 + 2.0 * u2 + 2.0 * u3 + u4), *POPULATION_BOUNDS)
        v = jnp.clip(v + h / 6.0 * (v1 + 2.0 * v2 + 2.0 * v3 + v4), *POPULATION_BOUNDS)
        return (u, v), (u, v)

    intervals = jnp.diff(times, prepend=0.0)
    h = jnp.repeat(intervals / steps_per_interval, steps_per_interval)
    _, (u, v) = lax.scan(step, (z_init[0], z_init[1]), h)
    last = slice(steps_per_interval - 1, None, steps_per_interval)
    return jnp.stack([u[last], v[last]], axis=-1)


# From the Stan data of a posterior to the arguments of its model

Data = Mapping[str, Any]
Arguments = tuple[tuple, dict[str, Any]]


def _column(data: Data, name: str) -> np.ndarray:
    return np.asarray(data[name], dtype=float)


def _design(*columns: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones_like(columns[0]), *columns])


def _arguments_eight_schools(data: Data) -> Arguments:
    return (_column(data, "sigma"),), {"y": _column(data, "y")}


def _arguments_ark(data: Data) -> Arguments:
    y, order = _column(data, "y"), data["K"]
    lags = np.column_stack([y[order - k : len(y) - k] for k in range(1, order + 1)])
    return (lags,), {"y": y[order:]}


def _arguments_garch(data: Data) -> Arguments:
    return (_column(data, "sigma1"),), {"y": _column(data, "y")}


def _arguments_kidscore(data: Data) -> Arguments:
    columns = _column(data, "mom_hs"), _column(data, "mom_iq")
    return columns, {"kid_score": _column(data, "kid_score")}


def _arguments_mixture(data: Data) -> Arguments:
    return (data["N"],), {"y": _column(data, "y")}


def _arguments_hmm(data: Data) -> Arguments:
    return (), {"y": _column(data, "y")}


def _arguments_gp(data: Data) -> Arguments:
    return (_column(data, "x"),), {"y": _column(data, "y")}


def _arguments_nes(data: Data) -> Arguments:
    age = _column(data, "age_discrete")
    x = _design(
        _column(data, "real_ideo"),
        _column(data, "race_adj"),
        *((age == level).astype(float) for level in (2, 3, 4)),
        _column(data, "educ1"),
        _column(data, "gender"),
        _column(data, "income"),
    )
    return (x,), {"y": _column(data, "partyid7")}


def _arguments_mesquite(data: Data) -> Arguments:
    logged = ("diam1", "diam2", "canopy_height", "total_height", "density")
    x = _design(*(np.log(_column(data, name)) for name in logged), _column(data, "group"))
    return (x,), {"y": np.log(_column(data, "weight"))}


def _arguments_earnings(data: Data) -> Arguments:
    height, male = _column(data, "height"), _column(data, "male")
    z = (height - height.mean()) / height.std(ddof=1)
    return (_design(z, male, z * male),), {"y": np.log(_column(data, "earn"))}


def _arguments_sblrc(data: Data) -> Arguments:
    return (_column(data, "X"),), {"y": _column(data, "y")}


def _arguments_kilpisjarvi(data: Data) -> Arguments:
    names = ("x", "pmualpha", "psalpha", "pmubeta", "psbeta")
    return tuple(_column(data, name) for name in names), {"y": _column(data, "y")}


def _arguments_lotka_volterra(data: Data) -> Arguments:
    return (_column(data, "ts"),), {"y_init": _column(data, "y_init"), "y": _column(data, "y")}


# Deterministic sites, for draws that lack them


def _theta_of_eight_schools(draws: Draws) -> np.ndarray:
    mu, tau = np.asarray(draws["mu"]), np.asarray(draws["tau"])
    return mu[..., None] + tau[..., None] * np.asarray(draws["theta_raw"])


def _beta1_of_garch(draws: Draws) -> np.ndarray:
    return np.asarray(draws["fraction"]) * (1.0 - np.asarray(draws["alpha1"]))


class _Entry(NamedTuple):
    stem: str
    model: Callable[..., None]
    arguments: Callable[[Data], Arguments]
    computed: Mapping[str, Callable[[Draws], np.ndarray]] = MappingProxyType({})


_EIGHT_SCHOOLS = "eight_schools-eight_schools_noncentered"
_ENTRIES = {
    "eight_schools_noncentered": _Entry(
        _EIGHT_SCHOOLS,
        eight_schools_noncentered,
        _arguments_eight_schools,
        {"theta": _theta_of_eight_schools},
    ),
    "eight_schools_centered": _Entry(
        _EIGHT_SCHOOLS, eight_schools_centered, _arguments_eight_schools
    ),
    "arK": _Entry("arK-arK", autoregression, _arguments_ark),
    "garch11": _Entry("garch-garch11", garch11, _arguments_garch, {"beta1": _beta1_of_garch}),
    "kidscore_momhsiq": _Entry("kidiq-kidscore_momhsiq", kidscore_momhsiq, _arguments_kidscore),
    "low_dim_gauss_mix": _Entry(
        "low_dim_gauss_mix-low_dim_gauss_mix", low_dim_gauss_mix, _arguments_mixture
    ),
    "hmm_example": _Entry("hmm_example-hmm_example", hmm_example, _arguments_hmm),
    "gp_regr": _Entry("gp_pois_regr-gp_regr", gp_regr, _arguments_gp),
    "nes": _Entry("nes1980-nes", flat_regression, _arguments_nes),
    "logmesquite": _Entry("mesquite-logmesquite", flat_regression, _arguments_mesquite),
    "logearn_interaction_z": _Entry(
        "earnings-logearn_interaction_z", flat_regression, _arguments_earnings
    ),
    "sblrc-blr": _Entry("sblrc-blr", sblrc_blr, _arguments_sblrc),
    "kilpisjarvi": _Entry("kilpisjarvi_mod-kilpisjarvi", kilpisjarvi, _arguments_kilpisjarvi),
    "lotka_volterra": _Entry(
        "hudson_lynx_hare-lotka_volterra", lotka_volterra, _arguments_lotka_volterra
    ),
}
NAMES = tuple(_ENTRIES)


def load(path: str | PathLike[str]) -> dict[str, Posterior]:
    """Reads every posterior.

    Args:
        path: The folder that holds one JSON file per posterior, with its data and reference.

    Returns:
        The posteriors by name, in the order of `NAMES`.
    """
    posteriors = {}
    for name, entry in _ENTRIES.items():
        stored = json.loads((Path(path) / f"{entry.stem}.json").read_text())
        args, kwargs = entry.arguments(stored["data"])
        reference = _reference(stored["reference"])
        scalars = partial(_scalars, tuple(reference), entry.computed)
        posteriors[name] = Posterior(name, entry.model, args, kwargs, reference, scalars)
    return posteriors


def _reference(stored: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    rows = zip(
        stored["names"],
        stored["mean"],
        stored["sd"],
        stored["mcse_mean"],
        stored["q05_q50_q95"],
        strict=True,
    )
    return {
        name: {"mean": mean, "sd": sd, "mcse": mcse, "q5": q5, "q50": q50, "q95": q95}
        for name, mean, sd, mcse, (q5, q50, q95) in rows
    }


def _scalars(
    names: tuple[str, ...],
    computed: Mapping[str, Callable[[Draws], np.ndarray]],
    draws: Draws,
) -> dict[str, np.ndarray]:
    missing = {site: value(draws) for site, value in computed.items() if site not in draws}
    draws = {**draws, **missing}
    found = {}
    for name in names:
        site, _, index = name.rstrip("]").partition("[")
        values = np.asarray(draws[site])
        found[name] = values[..., int(index) - 1] if index else values
    return found
