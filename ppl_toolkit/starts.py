"""Where the chains start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl_toolkit.errors import CheckpointError, DataError, OptionError, SiteError
from ppl_toolkit.executables import evaluate
from ppl_toolkit.program import Program

__all__ = [
    "drawn_starts",
    "held",
    "is_tree",
    "one_per_chain",
    "positions_of",
    "start_numbers",
    "start_positions",
]

_START_SALT = 0x5EED  # the keys of starting points differ from those of the chains


def is_tree(value: Any) -> bool:
    """Whether ``value`` is a result (without importing xarray)."""
    return type(value).__name__ == "DataTree"


def start_numbers(chains: int, superchains: int) -> np.ndarray:
    """The number of every chain's start; the chains of a superchain share theirs."""
    return np.arange(chains) // (chains // superchains if superchains else 1)


def start_positions(
    program: Program, init: Any, chains: int, seed: int, superchains: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Flat starting points (chain, D), and which of them are given.

    With superchains ``init`` has one value for every superchain, or one for all. A result gives
    none: its state is taken over.
    """
    positions = np.zeros((chains, program.size), program.precision)
    nothing = np.zeros(chains, bool)
    if init is None or is_tree(init):
        return positions, nothing
    if isinstance(init, str):
        if init != "prior":
            raise OptionError(f"init must be 'prior', a dictionary, or a result; got {init!r}.")
        program.require_proper()
        with program.context():

            def draws(words: Any, data: Any) -> Any:
                root = jax.random.wrap_key_data(words)

                def draw(chain: Any) -> Any:
                    key = jax.random.fold_in(root, chain)
                    return program.unconstrain(program.prior(key, data), data)

                return jax.vmap(draw)(jnp.asarray(starts))

            starts = start_numbers(chains, superchains)
            words = np.array([seed >> 32, (seed & 0xFFFFFFFF) ^ _START_SALT], np.uint32)
            found = evaluate(draws, words, program.data)
        return np.asarray(found), np.ones(chains, bool)
    if not isinstance(init, Mapping):
        raise OptionError(
            f"init must be None, 'prior', a dictionary of site values or a result; got "
            f"{type(init).__name__}."
        )
    starts = start_numbers(chains, superchains)
    what = "superchain" if superchains else "chain"
    positions = positions_of(program, init, int(starts[-1]) + 1, seed, each=what)[starts]
    return positions, np.ones(chains, bool)


def one_per_chain(program: Program, init: Any, chains: int) -> bool:
    """Whether ``init`` gives every chain a start of its own."""
    if is_tree(init) or not isinstance(init, Mapping):
        return False
    shapes = {site.name: (chains, *site.shape) for site in program.continuous}
    given = {name: np.asarray(value, object).shape for name, value in init.items()}
    return any(shape == shapes.get(name) for name, shape in given.items())


def drawn_starts(program: Program, draws: Any, chains: int) -> dict[str, np.ndarray]:
    """Values of the continuous sites at draws (a dataset), one for each chain.

    With as many chains as the result has, each starts at the last draw of its own.

    Raises:
        CheckpointError: the result lacks a site, or has it in another shape.
    """
    starts = {}
    for site in program.continuous:
        if site.variable not in draws or draws[site.variable].shape[2:] != site.shape:
            raise CheckpointError(
                f"init= is a result without draws of site {site.name!r} of shape {site.shape}. "
                "Pass a dictionary of values instead."
            )
        values = np.asarray(draws[site.variable].transpose("chain", "draw", ...))
        flat = values.reshape(-1, *site.shape)
        starts[site.name] = flat[np.arange(1, chains + 1) * len(flat) // chains - 1]
    return starts


def positions_of(
    program: Program,
    init: Mapping[str, Any],
    chains: int,
    seed: int,
    what: str = "init",
    each: str = "chain",
) -> np.ndarray:
    """Flat positions of constrained site values; sites without one start at random.

    Args:
        program: whose sites they are.
        init: values by site, one for all or with a leading dimension of ``chains``.
        chains: how many positions.
        seed: of random values.
        what, each: what messages call ``init``, and that which starts at a position.

    Raises:
        DataError, SiteError: about ``what`` was given.
    """
    latent = {site.name: site for site in program.continuous}
    unknown = [name for name in init if name not in latent]
    if unknown:
        raise SiteError(f"{what}= names {unknown}; the continuous latent sites are {list(latent)}.")
    values = {}
    for name, value in init.items():
        try:
            array = np.asarray(value, program.precision)
        except (TypeError, ValueError):
            raise DataError(
                f"{what}[{name!r}] is not an array of numbers: {value!r:.60}."
            ) from None
        shape = latent[name].shape
        if not np.isfinite(array).all():
            raise DataError(f"{what}[{name!r}] has non-finite values.")
        if array.shape == (chains, *shape):
            values[name] = array
        elif array.shape == shape:
            values[name] = np.broadcast_to(array, (chains, *shape))
        else:
            raise SiteError(
                f"{what}[{name!r}] has shape {array.shape}; site {name!r} needs {shape}, or "
                f"{(chains, *shape)} with one value per {each}."
            )
    rng = np.random.default_rng(seed)
    random_points = rng.uniform(-2, 2, (chains, program.size)).astype(program.precision)

    def unconstrained(value: Any, point: Any, data: Any) -> Any:
        return program.unconstrain({**program.constrain(point, data), **value}, data)

    with program.context():
        batched = jax.vmap(unconstrained, (0, 0, None))
        found = np.asarray(evaluate(batched, values, random_points, program.data))
    for site in program.continuous:
        part = found[:, site.offset : site.offset + site.unconstrained_size]
        if site.name in init and not np.isfinite(part).all():
            raise SiteError(
                f"{what}[{site.name!r}] lies outside the support of {site.distribution} "
                f"({site.support})."
            )
    return found


def held(program: Program, given: Mapping[str, Any]) -> dict[str, Any]:
    """The position of sites that are given: unconstrained values of the continuous ones.

    Raises:
        DataError, SiteError: these are no sites, or no values of theirs.
    """
    sites = {site.name: site for site in program.latent}
    if unknown := [name for name in given if name not in sites]:
        raise SiteError(f"given= names {unknown}; the latent sites are {list(sites)}.")
    real = {name: x for name, x in given.items() if not sites[name].discrete}
    found: dict[str, Any] = {}
    if real:
        flat = positions_of(program, real, 1, 0, "given")[0]
        for site in (sites[name] for name in real):
            part = flat[site.offset : site.offset + site.unconstrained_size]
            found[site.name] = part.reshape(site.unconstrained_shape)
    for name in given:
        if name in found:
            continue
        site, value = sites[name], np.asarray(given[name])
        if value.shape != site.shape or value.dtype.kind not in "biu":
            raise SiteError(
                f"given[{name!r}] is {given[name]!r:.60}; site {name!r} needs integers of shape "
                f"{site.shape}."
            )
        found[name] = value.astype(site.dtype)
    return found
