"""The samplers that are compared: ours, NumPyro's and blackjax's NUTS on the same NumPyro model.

A sampler is made for a posterior (which may compile) and then called with a seed and data of the
same shapes. All run 4 chains in float64 with a target acceptance of 0.8 and a tree depth of at
most 10, and give every draw's constrained and deterministic sites as NumPy arrays.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.base import get_filter_adapt_info_fn
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import initialize_model

import ppl_toolkit as ppl

__all__ = [
    "DEFAULTS",
    "ENGINES",
    "TUNED",
    "Data",
    "Engine",
    "Sample",
    "Sampler",
    "flattened",
    "jitted",
    "numpyro_jitted",
    "numpyro_object",
    "sample_of",
]

CHAINS = 4


class Data(NamedTuple):
    """The arguments of a model."""

    args: tuple
    kwargs: Mapping[str, Any]

    def arrays(self) -> list[np.ndarray]:
        return [x for x in jax.tree.leaves((self.args, dict(self.kwargs))) if _is_array(x)]

    def with_arrays(self, arrays: list[Any]) -> "Data":
        """The same arguments with other arrays; ints and the like stay what they are."""
        left = iter(arrays)
        args, kwargs = jax.tree.map(
            lambda x: next(left) if _is_array(x) else x, (self.args, dict(self.kwargs))
        )
        return Data(args, kwargs)


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)


class Sample(NamedTuple):
    """What a sampler gives.

    Attributes:
        values: (chain, draw, ...) by site.
        warmup_gradients: gradients in warm-up, over all chains; None where the sampler does not
            tell.
        gradients: gradients of the kept draws.
        cpu: CPU seconds, where another process did the work.
    """

    values: dict[str, np.ndarray]
    warmup_gradients: int | None
    gradients: int
    cpu: float | None = None


Sampler = Callable[[int, Data], Sample]


class Engine(Protocol):
    """Makes a sampler for a model and data of some shapes."""

    def __call__(self, model: Callable, data: Data, warmup: int, draws: int) -> Sampler: ...


def ours(model: Callable, data: Data, warmup: int, draws: int) -> Sampler:
    """`ppl.infer` as a user calls it; nothing is kept between calls but its own caches."""

    def sample(seed: int, data: Data) -> Sample:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
            tree = ppl.infer(
                model, *data.args, method="nuts", warmup=warmup, draws=draws, chains=CHAINS,
                seed=seed, progress=False, data=data.kwargs,
            )  # fmt: skip
        return sample_of(tree)

    return sample


def sample_of(tree: Any) -> Sample:
    """What `infer` gave."""
    values = {str(name): site.values for name, site in tree["posterior"].data_vars.items()}
    attrs = tree.attrs
    return Sample(values, attrs["n_gradient_evaluations_warmup"], attrs["n_gradient_evaluations"])


def jitted(run: Callable, data: Data) -> Sampler:
    """A compiled function of (seed, arrays of the data) -> (values, steps of warm-up, of draws)."""
    with jax.enable_x64(True):
        call = jax.jit(run).lower(np.uint32(0), data.arrays()).compile()

    def sample(seed: int, data: Data) -> Sample:
        with jax.enable_x64(True):
            values, *steps = call(np.uint32(seed), data.arrays())
        return Sample(
            {k: np.asarray(v) for k, v in values.items()},
            *(int(np.asarray(x).sum()) for x in steps),
        )

    return sample


def flattened(model: Callable, data: Data) -> tuple[Any, Callable]:
    """A flat position, and arrays of the data -> log density and values at such positions."""
    with jax.enable_x64(True):
        found, potential, constrain, _ = initialize_model(
            random.key(0), model, dynamic_args=True, model_args=data.args,
            model_kwargs=dict(data.kwargs), validate_grad=False,
        )  # fmt: skip
        flat, unravel = ravel_pytree(found.z)

    def bind(arrays: list[Any]) -> tuple[Callable, Callable]:
        args, kwargs = data.with_arrays(arrays)
        energy, to_values = potential(*args, **kwargs), constrain(*args, **kwargs)
        return lambda x: -energy(unravel(x)), lambda x: to_values(unravel(x))

    return flat, bind


def numpyro_jitted(
    model: Callable, data: Data, warmup: int, draws: int, chains: int = CHAINS
) -> Sampler:
    """NumPyro at its best: the whole vectorised run inside one jax.jit, the data as arguments."""

    def run(seed: Any, arrays: list[Any]) -> tuple[dict, Any, Any]:
        args, kwargs = data.with_arrays(arrays)
        mcmc = MCMC(
            NUTS(model), num_warmup=warmup, num_samples=draws, num_chains=chains,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        counted = {"extra_fields": ("num_steps",)}
        mcmc.warmup(random.key(seed), *args, collect_warmup=True, **counted, **kwargs)
        warmup_steps = mcmc.get_extra_fields()["num_steps"]
        mcmc.run(random.key(seed), *args, **counted, **kwargs)
        steps = mcmc.get_extra_fields()["num_steps"]
        values = mcmc.get_samples(group_by_chain=True)
        return values, jnp.sum(warmup_steps), jnp.sum(steps)

    return jitted(run, data)


def numpyro_object(model: Callable, data: Data, warmup: int, draws: int) -> Sampler:
    """NumPyro as its documentation shows it: one MCMC object, run again and again.

    Chains run one after another, which is what the default comes down to on one device. (A
    vectorised object of NumPyro 0.22 raises when it is run again on new data.)
    """
    mcmc = MCMC(
        NUTS(model), num_warmup=warmup, num_samples=draws, num_chains=CHAINS,
        chain_method="sequential", progress_bar=False,
    )  # fmt: skip

    def sample(seed: int, data: Data) -> Sample:
        with jax.enable_x64(True):
            mcmc.run(random.key(seed), *data.args, extra_fields=("num_steps",), **data.kwargs)
        values = mcmc.get_samples(group_by_chain=True)
        steps = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["num_steps"]).sum()
        return Sample({k: np.asarray(v) for k, v in values.items()}, None, int(steps))

    return sample


def blackjax_chain(
    model: Callable, data: Data, warmup: int, draws: int, dense: bool, over_chains: Callable
) -> Sampler:
    """A hand-written blackjax loop: window adaptation and a scan of `nuts`, jitted.

    The position is one flat vector, the data are arguments, and of the warm-up only the numbers
    of steps are kept. ``over_chains`` is lax.map, or jax.vmap as its documentation has it.
    """
    flat, bind = flattened(model, data)
    steps_only = get_filter_adapt_info_fn(info_keys={"num_integration_steps"})

    def chain(arrays: list[Any], key: Any) -> tuple[dict, Any, Any]:
        log_density, values = bind(arrays)
        key_start, key_warmup, key_draws = random.split(key, 3)
        start = random.uniform(key_start, flat.shape, flat.dtype, -2.0, 2.0)
        adaptation = blackjax.window_adaptation(
            blackjax.nuts, log_density, target_acceptance_rate=0.8, adaptation_info_fn=steps_only,
            is_mass_matrix_diagonal=not dense,
        )  # fmt: skip
        (state, tuned), info = adaptation.run(key_warmup, start, warmup)
        step = blackjax.nuts(log_density, **tuned).step

        def draw(state: Any, key: Any) -> tuple[Any, tuple]:
            state, info = step(key, state)
            return state, (state.position, info.num_integration_steps)

        _, (positions, steps) = lax.scan(draw, state, random.split(key_draws, draws))
        return jax.vmap(values)(positions), jnp.sum(info.info.num_integration_steps), jnp.sum(steps)

    def run(seed: Any, arrays: list[Any]) -> Any:
        keys = random.split(random.key(seed), CHAINS)
        return over_chains(functools.partial(chain, arrays), keys)

    return jitted(run, data)


def blackjax_mapped(model: Callable, data: Data, warmup: int, draws: int) -> Sampler:
    """One chain, mapped over four: blackjax at its best on a CPU."""
    return blackjax_chain(model, data, warmup, draws, False, lax.map)


def blackjax_dense(model: Callable, data: Data, warmup: int, draws: int) -> Sampler:
    """The same with a dense metric."""
    return blackjax_chain(model, data, warmup, draws, True, lax.map)


def blackjax_vectorised(model: Callable, data: Data, warmup: int, draws: int) -> Sampler:
    """Four chains in lock step, as its documentation teaches."""
    return blackjax_chain(model, data, warmup, draws, False, _vmapped)


def _vmapped(function: Callable, keys: Any) -> Any:
    return jax.vmap(function)(keys)


ENGINES: dict[str, Engine] = {
    "ours": ours,
    "numpyro": numpyro_jitted,
    "blackjax vectorised": blackjax_vectorised,
    "blackjax": blackjax_mapped,
    "blackjax dense": blackjax_dense,
}
DEFAULTS = ("numpyro", "blackjax vectorised", "nutpie")  # as their documentation has them
TUNED = ("blackjax", "blackjax dense", "nutpie low rank")  # by hand, for these posteriors
