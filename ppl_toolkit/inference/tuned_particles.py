"""How many particles a filter inside another sampler should have."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree

from ppl_toolkit import positions
from ppl_toolkit.errors import MethodError
from ppl_toolkit.executables import evaluate_once
from ppl_toolkit.inference.particle_filter import Filter, follow
from ppl_toolkit.inference.population import effective_size, normalised
from ppl_toolkit.inference.state_space import StateSpace
from ppl_toolkit.program import Program

__all__ = ["tuned_particles"]

_AIM = 1.3  # standard deviation of log Z_hat: 1.0 to 1.7 is good
_TRUSTED = (0.5, 2.5)  # from there the variance is taken to shrink like 1 / N
_LEAST, _MOST = 16, 2**15
_PARAMETERS, _ROUNDS, _FILTERS = 64, 10, 100
_TRIES = 4
_HALVINGS = 30
_RADIUS = 2.0

_known: weakref.WeakKeyDictionary[Program, dict[Filter, int]] = weakref.WeakKeyDictionary()


def tuned_particles(program: Program, space: StateSpace, options: Callable[[int], Filter]) -> int:
    """The power of two for which log Z_hat at likely parameters has a standard deviation near 1.3.

    Likely parameters are found by 10 rounds of 64 filters each; the next 64 parameters are Gaussian
    with the mean and covariance of those before, weighted by prior times estimate (to the power
    that leaves a quarter of them an effective weight). Then 100 filters are run at the last mean,
    again with other N until their standard deviation can be scaled to the one aimed at. Nothing of
    this depends on the seed of a run.

    Args:
        options: N -> the filter.

    Raises:
        MethodError: no parameters with a likelihood were found.

    Cost: about 740 filters, and some small programs are compiled.
    Source: Doucet, Pitt, Deligiannidis and Kohn (2015), Biometrika 102, for the aim.
    """
    known = _known.setdefault(program, {})
    count = _power_of_two(max(64, space.length))
    if options(count) not in known:
        with program.context():
            known[options(count)] = _tuned(program, space, options, count)
    return known[options(count)]


def _power_of_two(count: float) -> int:
    return int(2 ** np.round(np.log2(np.clip(count, _LEAST, _MOST))))


def _tuned(
    program: Program, space: StateSpace, options: Callable[[int], Filter], first: int
) -> int:
    words = np.zeros(2, np.uint32)

    def centre(words: Any, data: Any) -> Any:
        return _likely(random.wrap_key_data(words), program, space, options(first), data)

    likely, count = evaluate_once(centre, words, program.data), first
    for _ in range(_TRIES):
        spread = _spread(program, space, options(count), likely)
        if not spread:
            raise MethodError(
                f"no parameters of {space.name} were found at which a filter has a finite "
                "likelihood, so particles='tuned' cannot measure it. Give a number of particles."
            )
        best = _power_of_two(count * np.clip(spread / _AIM, 0.25, 4.0) ** 2)
        if best == count or _TRUSTED[0] <= spread <= _TRUSTED[1]:
            return best
        count = best
    return count


def _spread(program: Program, space: StateSpace, options: Filter, likely: Any) -> float:
    """Standard deviation of log Z_hat: infinite if filters fail, zero if all do."""

    def logs(words: Any, likely: Any, data: Any) -> Any:
        keys = random.split(random.wrap_key_data(words), _FILTERS)
        return jax.vmap(lambda key: _estimate(key, program, space, options, likely, data))(keys)

    found = np.asarray(evaluate_once(logs, np.ones(2, np.uint32), likely, program.data))
    finite = np.isfinite(found)
    if finite.all():
        return float(found.std(ddof=1)) or float(np.finfo(float).tiny)
    return float("inf") if finite.any() else 0.0


def _estimate(
    key: Any, program: Program, space: StateSpace, options: Filter, static: Any, data: Any
) -> Any:
    """The log prior + log Z_hat."""
    series = space.at(program, static, data)
    last, _, _ = follow(key, series, options, lambda *_: None)
    return series.log_prior + last.log_evidence


def _likely(key: Any, program: Program, space: StateSpace, options: Filter, data: Any) -> Any:
    """A static position in the middle of the likely ones."""
    key_first, key_rounds = random.split(key)

    def first(key: Any, number: Any) -> Any:
        """A draw from the prior, or for every second one a point near the origin."""
        key_prior, key_radius = random.split(key)
        start = positions.start_position(program, key_prior, data)
        flat, unravel = ravel_pytree({name: start[name] for name in space.static})
        near = random.uniform(key_radius, flat.shape, flat.dtype, -_RADIUS, _RADIUS)
        return unravel(jnp.where((number % 2 == 0) & jnp.isfinite(flat), flat, near))

    keys = random.split(key_first, _PARAMETERS)
    cloud = jax.vmap(first)(keys, jnp.arange(_PARAMETERS))
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], cloud))
    x = jax.vmap(lambda one: ravel_pytree(one)[0])(cloud)

    def next_round(i: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        x, _ = state
        key_filters, key_next = random.split(random.fold_in(key_rounds, i))
        own = random.split(key_filters, _PARAMETERS)
        logs = jax.vmap(
            lambda k, v: _estimate(k, program, space, options, unravel(v), data)
        )(own, x)  # fmt: skip
        weights = jnp.exp(_tempered(logs))
        mean = weights @ x
        centred = x - mean
        covariance = centred.T @ (weights[:, None] * centred)
        root = jnp.linalg.cholesky(covariance + 1e-6 * jnp.eye(x.shape[1]))
        return mean + random.normal(key_next, x.shape, x.dtype) @ root.T, mean

    _, mean = lax.fori_loop(0, _ROUNDS, next_round, (x, x[0]))
    return unravel(mean)


def _tempered(logs: Any) -> Any:
    """Log weights of the highest power in (0, 1] that leaves a quarter of them effective."""

    def enough(power: Any) -> Any:
        return effective_size(power * logs) >= 0.25 * logs.shape[0]

    def halved(_: Any, interval: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = interval
        middle = 0.5 * (low + high)
        return jnp.where(enough(middle), middle, low), jnp.where(enough(middle), high, middle)

    zero, one = jnp.zeros((), logs.dtype), jnp.ones((), logs.dtype)
    low, _ = lax.fori_loop(0, _HALVINGS, halved, (zero, one))
    return normalised(jnp.where(enough(one), one, low) * logs)[0]
