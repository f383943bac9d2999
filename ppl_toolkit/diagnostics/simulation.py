"""Joint draws of parameters and data from a model, and functions of both to test samplers by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppl_toolkit.errors import DataError, MethodError
from ppl_toolkit.executables import kept
from ppl_toolkit.labels import check_coords
from ppl_toolkit.program import Program

__all__ = [
    "Quantities",
    "Simulator",
    "holm",
    "quantity_names",
    "rejected",
    "require_simulable",
    "seed_words",
    "table",
    "with_observed",
]

_SALT = 0x5BC  # the keys of simulated data differ from those of the chains
_LOG_LIKELIHOOD, _LOG_JOINT = "log_likelihood", "log_joint"

Quantities = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Simulator(NamedTuple):
    """Compiled functions of a program.

    Attributes:
        joint: (words, index, data) -> sites, unconstrained position, observed values and
            quantities of one draw from the prior and of data given it.
        redraw: (words, index, position, data) -> observed values given the position.
        at: (position, data) -> quantities of one position.
        measure: (sites of many draws, data) -> the quantities of each.
    """

    joint: Callable
    redraw: Callable
    at: Callable
    measure: Callable

    @classmethod
    def of(
        cls,
        program: Program,
        quantities: Quantities | None = None,
        draws: int = 1,
        summed_out: bool = True,
    ) -> Simulator:
        """Refuse programs that cannot be simulated, and set up the functions.

        Args:
            program: the program.
            quantities: further functions of the sites.
            draws: how many draws `measure` takes at a time.
            summed_out: whether the method sums out finite discrete sites beside continuous ones.

        Raises:
            MethodError: the prior is improper, or sites are summed out or subsampled.
            DataError: the model observes nothing, or computes what it observes.
        """
        require_simulable(program, summed_out)
        latent = [site.name for site in program.latent]

        def measured(sites: Mapping[str, Any], data: Sequence[Any]) -> dict[str, Any]:
            values = {name: sites[name] for name in latent}
            terms = program.log_terms(values, data)
            likelihood = sum(jnp.sum(terms[site.name]) for site in program.observed)
            joint = sum(jnp.sum(term) for term in terms.values())
            found = {**sites, _LOG_LIKELIHOOD: likelihood, _LOG_JOINT: joint}
            return {**found, **(quantities(sites) if quantities else {})}

        def observed(key: Any, sites: Mapping[str, Any], data: Sequence[Any]) -> dict[str, Any]:
            drawn = program.predict(key, {name: sites[name] for name in latent}, data)
            return {site.name: drawn[site.name] for site in program.observed}

        def joint(words: Any, index: Any, data: Sequence[Any]) -> dict[str, Any]:
            key = jax.random.fold_in(jax.random.wrap_key_data(words), index)
            key_prior, key_data = jax.random.split(key)
            sites = program.prior(key_prior, data)
            position = program.unconstrain(sites, data)
            drawn = observed(key_data, sites, data)
            new = with_observed(program, drawn, data)
            sites = program.complete({name: sites[name] for name in latent}, new)
            return {"position": position, "observed": drawn, "quantities": measured(sites, new)}

        def redraw(words: Any, index: Any, position: Any, data: Sequence[Any]) -> dict[str, Any]:
            key = jax.random.fold_in(jax.random.wrap_key_data(words), index)
            return observed(key, program.constrain(position, data), data)

        def at(position: Any, data: Sequence[Any]) -> dict[str, Any]:
            return measured(program.constrain(position, data), data)

        data = program.data
        with program.context():
            words, index = seed_words(0), np.uint32(0)
            position = np.zeros(program.size, program.precision)
            latents = {
                site.name: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in program.latent
            }
            sites = jax.eval_shape(program.complete, latents, data)
            many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((draws, *x.shape), x.dtype), sites)
            return cls(
                kept(joint, words, index, data),
                kept(redraw, words, index, position, data),
                kept(at, position, data),
                kept(jax.vmap(measured, (0, None)), many, data),
            )

    def joints(self, program: Program, count: int, seed: int) -> list[dict[str, Any]]:
        """``count`` joint draws, as NumPy arrays."""
        words = seed_words(seed)
        with program.context():
            drawn = [self.joint(words, np.uint32(i), program.data) for i in range(count)]
            return jax.tree.map(np.asarray, drawn)


def seed_words(seed: int) -> np.ndarray:
    """The key data of simulations under a seed."""
    return np.array([seed >> 32, (seed & 0xFFFFFFFF) ^ _SALT], np.uint32)


def with_observed(
    program: Program, observed: Mapping[str, Any], data: Sequence[Any] | None = None
) -> tuple[Any, ...]:
    """The data of the program with simulated values in the observed places."""
    new = list(program.data if data is None else data)
    for site in program.observed:
        new[site.argument] = observed[site.name].astype(new[site.argument].dtype)
    return tuple(new)


def quantity_names(program: Program, quantities: Mapping[str, Any]) -> list[str]:
    """A name for every scalar of the quantities, in the order of `table`."""
    coords = check_coords(program, {})
    names = []
    for name, value in quantities.items():
        site = program.sites.get(name)
        dims = site.dims if site else [f"{name}_dim_{i}" for i in range(np.ndim(value))]
        labels = [coords.get(dim, np.arange(n)) for dim, n in zip(dims, value.shape, strict=True)]
        for index in np.ndindex(*value.shape):
            parts = [str(label[i]) for label, i in zip(labels, index, strict=True)]
            names.append(name + (f"[{', '.join(parts)}]" if parts else ""))
    return names


def table(quantities: Mapping[str, Any], count: int) -> np.ndarray:
    """Quantities of ``count`` draws as a table (draw, scalar)."""
    return np.concatenate(
        [np.asarray(value, float).reshape(count, -1) for value in quantities.values()], axis=1
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number: rejecting those below a keeps the family level a.

    Source: Holm (1979), Scandinavian Journal of Statistics 6.
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def rejected(
    p_values: Mapping[str, float], adjusted: Mapping[str, float], level: float
) -> list[str]:
    """Names whose adjusted p-value is below ``level``, the smallest p-value first."""
    below = [name for name, p in adjusted.items() if p < level]
    return sorted(below, key=p_values.__getitem__)


def require_simulable(program: Program, summed_out: bool) -> None:
    """Refuse programs that no joint draws of parameters and data can be made of.

    Raises:
        MethodError: the prior is improper, or sites are summed out or subsampled.
        DataError: the model observes nothing, or computes what it observes.
    """
    program.require_proper()
    if (summed_out and program.marginalised) or program.subsampled:
        raise MethodError(
            "simulation needs every latent site and all data: discrete sites that are summed out "
            "and subsampled plates have no true value to compare with. Write the sum into the "
            "model."
        )
    if not program.observed:
        raise DataError("the model observes nothing, so there is no posterior to check.")
    computed = [site.name for site in program.observed if site.argument < 0]
    if computed:
        raise DataError(
            f"sites {computed} observe what the model computes, so simulated data cannot be put "
            "there. Pass the observed arrays as arguments and observe them as they are."
        )
