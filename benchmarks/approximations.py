"""Approximations: Laplace, Pathfinder, SVI beside those of NumPyro and blackjax.

    python benchmarks/approximations.py [--rounds 3]

Four independent fits of 1000 draws each, on two posteriors (10 and 4 dimensions). The ways take
turns in one process: first a cold call of each (nothing compiled, no caches on disk), then some
rounds with a new seed and the data the other way round. Peers are jitted whole, the data as
arguments, and mapped over the fits. Errors are the largest over the sites' scalars: of means, in
posterior standard deviations, and of standard deviations, as a share; against 4 x 10,000 draws of
NUTS. CPU seconds count all threads.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ["PPL_CACHE_DIR"] = "off"

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from blackjax.vi import multipathfinder
from examples import EXAMPLES, new_data
from jax import lax, random
from measure import cost_of, counted_compilations, machine, show_table
from numpyro import infer
from numpyro.infer import autoguide
from numpyro.infer.util import initialize_model
from peers import CHAINS, Data

import ppl_toolkit as ppl
from ppl_toolkit import executables
from ppl_toolkit.inference import SVI, Laplace, Pathfinder

DRAWS, STEPS, PATHS = 1000, 3000, 4
Values = dict[str, np.ndarray]
Fit = Callable[[int, Data], tuple[Values, float | None]]


def ours(method: Any) -> Callable[[Callable, Data], Fit]:
    def make(model: Callable, data: Data) -> Fit:
        def fit(seed: int, data: Data) -> tuple[Values, float | None]:
            tree = ppl.infer(
                model, *data.args, method=method, draws=DRAWS, chains=CHAINS, seed=seed,
                progress=False, data=data.kwargs,
            )  # fmt: skip
            draws = {str(name): site.values for name, site in tree["posterior"].data_vars.items()}
            return draws, tree.attrs.get("khat")

        return fit

    return make


def jitted(of_one: Callable, data: Data) -> Fit:
    """A function of (key, data) on every one of the fits, in one program."""

    def of_all(seed: Any, arrays: list[Any]) -> Any:
        keys = random.split(random.key(seed), CHAINS)
        return lax.map(lambda key: of_one(key, data.with_arrays(arrays)), keys)

    with jax.enable_x64(True):
        call = jax.jit(of_all).lower(np.uint32(0), data.arrays()).compile()

    def fit(seed: int, data: Data) -> tuple[Values, float | None]:
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, call(np.uint32(seed), data.arrays())), None

    return fit


def numpyro_svi(kind: type) -> Callable[[Callable, Data], Fit]:
    def make(model: Callable, data: Data) -> Fit:
        def of_one(key: Any, data: Data) -> Any:
            guide = kind(model)
            optimizer = numpyro.optim.Adam(lambda t: 0.05 * 0.5 * (1 + jnp.cos(jnp.pi * t / STEPS)))
            svi = infer.SVI(model, guide, optimizer, infer.Trace_ELBO(num_particles=8))
            key_fit, key_draws = random.split(key)
            found = svi.run(key_fit, STEPS, *data.args, progress_bar=False, **data.kwargs)
            return guide.sample_posterior(
                key_draws, found.params, *data.args, sample_shape=(DRAWS,), **data.kwargs
            )

        return jitted(of_one, data)

    return make


def blackjax_pathfinder(model: Callable, data: Data) -> Fit:
    def of_one(key: Any, data: Data) -> Any:
        key_start, key_fit, key_draws = random.split(key, 3)
        info = initialize_model(
            key_start, model, model_args=data.args, model_kwargs=data.kwargs, dynamic_args=True
        )
        potential = info.potential_fn(*data.args, **data.kwargs)
        constrain = info.postprocess_fn(*data.args, **data.kwargs)
        like = info.param_info.z
        flat, unravel = jax.flatten_util.ravel_pytree(like)
        starts = random.uniform(key_start, (PATHS, flat.size), flat.dtype, -2.0, 2.0)
        state, _ = multipathfinder.multi_approximate(
            key_fit, lambda x: -potential(x), jax.vmap(unravel)(starts), DRAWS
        )
        algorithm = multipathfinder.as_top_level_api(lambda x: -potential(x))
        return jax.vmap(constrain)(algorithm.sample(key_draws, state, DRAWS))

    return jitted(of_one, data)


WAYS: dict[str, Callable[[Callable, Data], Fit]] = {
    "Laplace": ours(Laplace()),
    "Pathfinder": ours(Pathfinder(paths=PATHS)),
    "SVI, full": ours(SVI(steps=STEPS)),
    "SVI, independent": ours(SVI(guide="normal", steps=STEPS)),
    "NumPyro, AutoLaplaceApproximation": numpyro_svi(autoguide.AutoLaplaceApproximation),
    "NumPyro, AutoMultivariateNormal": numpyro_svi(autoguide.AutoMultivariateNormal),
    "NumPyro, AutoNormal": numpyro_svi(autoguide.AutoNormal),
    "blackjax, multi-path Pathfinder": blackjax_pathfinder,
    "NUTS": ours("nuts"),
}


def moments(values: Values, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of all scalars of some sites, all fits together."""
    table = [values[n].reshape(values[n].shape[0] * values[n].shape[1], -1) for n in names]
    flat = np.concatenate(table, axis=1)
    return flat.mean(axis=0), flat.std(axis=0)


def errors(values: Values, reference: Values) -> tuple[float, float]:
    names = sorted(set(values) & set(reference))
    mean, sd = moments(values, names)
    right, spread = moments(reference, names)
    return float(np.max(np.abs(mean - right) / spread)), float(np.max(np.abs(sd / spread - 1)))


def rows(name: str, rounds: int) -> list[list[Any]]:
    model, data = EXAMPLES[name]
    data = data.with_arrays([x.astype(float) for x in data.arrays()])
    turned = new_data(data)
    long = ppl.infer(
        model, *turned.args, draws=10_000, seed=99, progress=False, data=turned.kwargs
    )["posterior"]  # fmt: skip
    reference = {str(n): site.values for n, site in long.data_vars.items()}
    fits, cold = {}, {}
    for way, make in WAYS.items():
        jax.clear_caches()
        executables.clear()

        def first(way: str = way, make: Callable = make) -> None:
            fits[way] = make(model, data)
            fits[way](0, data)

        cold[way], _ = cost_of(first)
    for fit in fits.values():  # what a cold call of a later way has cleared away
        fit(0, data)
    calls: dict[str, list] = {way: [] for way in WAYS}
    compiled: dict[str, int] = dict.fromkeys(WAYS, 0)
    for turn in range(1, rounds + 1):
        for way, fit in fits.items():
            with counted_compilations() as seen:
                cost, (values, khat) = cost_of(lambda fit=fit, turn=turn: fit(turn, turned))
            compiled[way] += len(seen)
            calls[way].append((cost.cpu, *errors(values, reference), khat))
    return [
        [way, cold[way].cpu, *(median(call[i] for call in own) for i in range(3)),
         "-" if own[0][3] is None else f"{median(call[3] for call in own):.2f}", compiled[way]]
        for way, own in calls.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("ppl_toolkit", "jax", "numpyro", "blackjax"))
    for name in EXAMPLES:
        show_table(
            f"{name}: {CHAINS} fits of {DRAWS} draws, medians of {options.rounds} rounds",
            ["way", "cold CPU s", "call CPU s", "error of means", "of sds", "k-hat",
             "compilations"],
            rows(name, options.rounds),
        )  # fmt: skip


if __name__ == "__main__":
    main()
