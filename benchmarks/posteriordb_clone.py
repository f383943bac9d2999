"""Four more posteriors, from a clone of stan-dev/posteriordb: larger data, a funnel, 90 parameters.

    git clone https://github.com/stan-dev/posteriordb

`wells` and `radon` have no reference draws there: theirs are means and standard deviations on which
two engines agreed (|z| at most 3.2 over all scalars). Priors are those of the Stan files.
"""

import io
import json
import zipfile
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from posteriordb import Posterior, _scalars

from ppl_toolkit import convergence

__all__ = ["load_clone"]

Array = jax.Array | np.ndarray
FLAT = dist.ImproperUniform(constraints.real, (), ())

# name: (mean, sd)
WELLS = {"alpha": (0.6085, 0.061), "beta": (-0.626, 0.098)}
RADON = {
    "mu_alpha": (1.415, 0.038), "beta[1]": (0.789, 0.102), "beta[2]": (-0.638, 0.067),
    "sigma_alpha": (0.147, 0.049), "sigma_y": (0.7296, 0.0177),
}  # fmt: skip


def wells(distance: Array, switched: Array | None = None) -> None:
    """Who changes to another well, by the distance to it in 100 m."""
    alpha, beta = numpyro.sample("alpha", FLAT), numpyro.sample("beta", FLAT)
    numpyro.sample("switched", dist.Bernoulli(logits=alpha + beta * distance), obs=switched)


def radon(
    county: Array, uranium: Array, floor: Array, counties: int, level: Array | None = None
) -> None:
    """Radon in houses of 85 counties, their intercepts non-centred."""
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    mu = numpyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    with numpyro.plate("county", counties):
        raw = numpyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
    mean = (mu + sigma_alpha * raw)[county] + uranium * beta[0] + floor * beta[1]
    numpyro.sample("level", dist.Normal(mean, sigma), obs=level)


def diamonds(design: Array, price: Array | None = None) -> None:
    """A regression with 24 correlated columns, which are centred."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([design.shape[1]]).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    half_t = dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0))
    sigma = numpyro.sample("sigma", half_t)
    numpyro.sample("price", dist.Normal(intercept + design @ b, sigma), obs=price)


def gp_poisson(x: Array, k: Array | None = None) -> None:
    """Counts whose logarithm is a Gaussian process: a narrow funnel."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    white = numpyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([x.shape[0]]).to_event(1))
    covariance = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
    root = jnp.linalg.cholesky(covariance + 1e-10 * jnp.eye(x.shape[0]))
    numpyro.sample("k", dist.Poisson(jnp.exp(root @ white)), obs=k)


def _unzipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        return json.load(io.TextIOWrapper(file))


def _of_draws(chains: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """The numbers of `Posterior.reference` from reference draws."""
    names = [name for name in chains[0] if not name.startswith("f[")]
    draws = np.stack([[chain[name] for chain in chains] for name in names], axis=-1)
    numbers = convergence.convergence(draws)
    return {
        name: {"mean": numbers["mean"][i], "sd": numbers["sd"][i], "mcse": numbers["mcse_mean"][i]}
        for i, name in enumerate(names)
    }


def _of_numbers(known: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {"mean": mean, "sd": sd, "mcse": sd / 50.0} for name, (mean, sd) in known.items()}


def load_clone(path: str | PathLike[str]) -> dict[str, Posterior]:
    """The four posteriors by name.

    Args:
        path: the clone.
    """
    root = Path(path) / "posterior_database"

    def data(name: str) -> dict[str, Any]:
        read = _unzipped(root / "data" / "data" / f"{name}.json.zip")
        return {k: np.asarray(v) if isinstance(v, list) else v for k, v in read.items()}

    def draws(name: str) -> dict[str, dict[str, float]]:
        return _of_draws(
            _unzipped(root / "reference_posteriors" / "draws" / "draws" / f"{name}.json.zip")
        )

    well, house = data("wells_data"), data("radon_mn")
    gem, count = data("diamonds"), data("gp_pois_regr")
    design = gem["X"][:, 1:].astype(float)
    found = {
        "wells": (
            wells, (well["dist"] / 100.0,), {"switched": well["switched"]}, _of_numbers(WELLS)
        ),
        "radon": (
            radon,
            (house["county_idx"] - 1, house["log_uppm"], house["floor_measure"], house["J"]),
            {"level": house["log_radon"]},
            _of_numbers(RADON),
        ),
        "diamonds": (
            diamonds, (design - design.mean(0),), {"price": gem["Y"]}, draws("diamonds-diamonds")
        ),
        "gp_poisson": (
            gp_poisson, (count["x"].astype(float),), {"k": count["k"]},
            draws("gp_pois_regr-gp_pois_regr"),
        ),
    }  # fmt: skip

    def scalars(reference: dict[str, dict[str, float]]) -> Any:
        return partial(_scalars, tuple(reference), {})

    made = {}
    for name, (model, args, kwargs, reference) in found.items():
        kept = {k: v for k, v in reference.items() if not k.startswith("b_Intercept")}
        made[name] = Posterior(name, model, args, kwargs, kept, scalars(kept))
    return made
