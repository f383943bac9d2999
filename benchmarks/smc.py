"""SMC samplers and blackjax's adaptive_tempered_smc, on models whose log evidence is exact.

Both see the same log densities, aim at an effective sample size of one half, resample
systematically, and move by HMC with eight leapfrog steps and a dense metric from the particles. Of
blackjax its user must choose the step size, here that of a standard normal target, D^(-1/4), and
the number of moves, here five. `composition.py` runs them.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import blackjax.smc.resampling as blackjax_resampling
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from blackjax.smc import extend_params
from jax import random
from jax.flatten_util import ravel_pytree

import ppl_toolkit as ppl
from ppl_toolkit.inference import SMC
from ppl_toolkit.program import Program

__all__ = ["ENGINES", "Problem", "Runs", "problems"]

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


class Problem(NamedTuple):
    """A model, its arguments, and its log evidence."""

    model: Callable
    args: tuple
    exact: float


def regression(x, y):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ b, 0.5), obs=y)


def eight_schools(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", sigma.shape[0]):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def variance_components(y):
    """Scales far from their prior: the path from the prior is long and crooked."""
    group_sd = numpyro.sample("group_sd", dist.HalfNormal(10.0))
    noise_sd = numpyro.sample("noise_sd", dist.HalfNormal(10.0))
    with numpyro.plate("group", y.shape[0]):
        effect = numpyro.sample("effect", dist.Normal(0.0, group_sd))
        numpyro.sample("y", dist.Normal(effect[:, None], noise_sd).to_event(1), obs=y)


def normal_evidence(x, y):
    covariance = 0.25 * np.eye(len(y)) + x @ x.T
    _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    return float(-0.5 * (log_det + y @ np.linalg.solve(covariance, y)))


def schools_evidence():
    """By quadrature over the scale; given it, the effects and their mean are Gaussian."""
    u = (np.arange(20_000) + 0.5) / 20_000
    tau = 5 * np.tan(0.5 * np.pi * u)  # equal shares of the half-Cauchy
    precision = 1 / (ERRORS**2 + tau[:, None] ** 2)
    total, weighted = precision.sum(1) + 1 / 25, (precision * EFFECTS).sum(1)
    log_p = 0.5 * (
        np.log(precision / (2 * np.pi)).sum(1) - (precision * EFFECTS**2).sum(1)
        + weighted**2 / total - np.log(25 * total)
    )  # fmt: skip
    return float(np.logaddexp.reduce(log_p) - np.log(len(u)))


def components_evidence(y):
    """By quadrature over the two scales."""
    groups, size = y.shape
    within = ((y - y.mean(1, keepdims=True)) ** 2).sum()
    grid = np.exp(np.linspace(np.log(1e-3), np.log(30.0), 800))
    a, s = np.meshgrid(grid, grid, indexing="ij")
    total = s**2 + size * a**2
    log_p = -0.5 * (
        groups * size * np.log(2 * np.pi) + groups * (size - 1) * np.log(s**2)
        + groups * np.log(total) + within / s**2 + size * (y.mean(1) ** 2).sum() / total
    )  # fmt: skip
    log_prior = 2 * np.log(np.sqrt(2 / np.pi) / 10) - 0.5 * (a**2 + s**2) / 100
    log_width = 2 * np.log(np.log(grid[1] / grid[0])) + np.log(a) + np.log(s)
    return float(np.logaddexp.reduce((log_p + log_prior + log_width).ravel()))


def problems() -> dict[str, Problem]:
    rng = np.random.default_rng(0)
    t = np.linspace(-1, 1, 30)
    x3 = np.vander(t, 3, increasing=True)
    y3 = 0.5 + 0.8 * t + 0.1 * t**2 + 0.5 * np.sin(17 * t)
    x20 = rng.normal(size=(100, 20)) @ (np.eye(20) + 0.3)
    y20 = x20 @ rng.normal(size=20) + 0.5 * rng.normal(size=100)
    y = rng.normal(size=(8, 1)) * 0.3 + 0.2 * rng.normal(size=(8, 12))
    return {
        "regression, D=3": Problem(regression, (x3, y3), normal_evidence(x3, y3)),
        "regression, D=20": Problem(regression, (x20, y20), normal_evidence(x20, y20)),
        "eight schools, D=10": Problem(eight_schools, (ERRORS, EFFECTS), schools_evidence()),
        "components, D=10": Problem(variance_components, (y,), components_evidence(y)),
    }


Runs = Callable[[int, int], np.ndarray]  # (first seed, number of runs) -> log evidences


def ours(problem: Problem, particles: int, **options: Any) -> Runs:
    method = SMC(particles=particles, **options)

    def runs(seed: int, count: int) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ppl.infer(
                problem.model, *problem.args, method=method, chains=count, draws=1, seed=seed,
                progress=False,
            )  # fmt: skip
        return tree["sample_stats"]["log_evidence"].values[:, 0]

    return runs


def theirs(problem: Problem, particles: int) -> Runs:
    program = Program(problem.model, problem.args)
    parts, draw = program.traced("log_parts"), program.traced("prior_position")

    def log_parts(x):
        return parts(parts.consts, x, program.data)

    def metric(key, state, info):
        x = jax.vmap(lambda p: ravel_pytree(p)[0])(state.particles)
        centred = x - state.weights @ x
        covariance = centred.T @ (state.weights[:, None] * centred)
        return extend_params({"inverse_mass_matrix": covariance})

    def run(key):
        key, first = random.split(key)
        cloud = jax.vmap(lambda k: dict(draw(draw.consts, k, program.data)))(
            random.split(first, particles)
        )
        size = sum(x.size for x in jax.tree.leaves(cloud)) // particles
        hmc = blackjax.hmc.build_kernel()

        def step(key, state, log_density, inverse_mass_matrix):
            return hmc(key, state, log_density, size**-0.25, inverse_mass_matrix, 8)

        sampler = blackjax.inner_kernel_tuning(
            blackjax.adaptive_tempered_smc, lambda x: log_parts(x)[0], lambda x: log_parts(x)[1],
            step, blackjax.hmc.init, blackjax_resampling.systematic, metric,
            extend_params({"inverse_mass_matrix": jnp.eye(size)}), num_mcmc_steps=5, target_ess=0.5,
        )  # fmt: skip

        def stage(carry):
            key, state, evidence = carry
            key, own = random.split(key)
            state, info = sampler.step(own, state)
            return key, state, evidence + info.log_likelihood_increment

        going_on = lambda carry: carry[1].sampler_state.tempering_param < 1  # noqa: E731
        start = sampler.init(cloud)
        start = start._replace(parameter_override=metric(key, start.sampler_state, None))
        return jax.lax.while_loop(going_on, stage, (key, start, jnp.zeros(())))[2]

    compiled = jax.jit(run)

    def runs(seed: int, count: int) -> np.ndarray:
        with program.context():
            return np.array([float(compiled(random.key(seed + i))) for i in range(count)])

    return runs


ENGINES: dict[str, Callable[[Problem, int], Runs]] = {
    "SMC": ours,
    "SMC, waste-free": lambda p, n: ours(p, 4 * n, waste_free=16),
    "blackjax": theirs,
}
