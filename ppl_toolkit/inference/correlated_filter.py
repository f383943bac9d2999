"""Particle filters as functions of normal variates, smooth ones as far as that goes.

A filter whose randomness is z ~ N(0, I) can be run again at z' = rho z + sqrt(1 - rho^2) N(0, I),
which has the same law: then log Z_hat changes little, and so does its error. For this every latent
is a function of its law and of normal variates, quantile(Phi(z)) or a location and a scale; and
resampling is systematic with the uniform Phi(z), among particles that are sorted, so that a small
change of the weights replaces particles by near ones.

Source: Deligiannidis, Doucet and Pitt (2018), JRSS B 80.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import random
from jax.scipy.stats import norm
from numpyro.primitives import Messenger

from ppl_toolkit import positions
from ppl_toolkit.capture import run_step
from ppl_toolkit.errors import MethodError
from ppl_toolkit.inference.inner_filter import drawn_path
from ppl_toolkit.inference.particle_filter import History, take, weighed
from ppl_toolkit.inference.population import Population
from ppl_toolkit.inference.resampling import inverse_cdf
from ppl_toolkit.inference.state_space import Series, StateSpace, Step
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program
from ppl_toolkit.sites import finite_support
from ppl_toolkit.tracing import key_shape

__all__ = ["CorrelatedEstimate", "Variates", "correlated", "from_normals", "sorted_filter"]

_FIXED = np.zeros(2, np.uint32)  # a key, where everything that matters has a value


class Variates(NamedTuple):
    """Normal variates of a filter of N particles over T steps.

    Attributes:
        start: of the initial sites, (N, ...) by name.
        steps: of the latents of the steps, (T, N, ...) by name.
        resampling: (T,).
    """

    start: dict[str, Any]
    steps: dict[str, Any]
    resampling: Any

    @property
    def particles(self) -> int:
        """N."""
        if self.steps:
            return int(jax.tree.leaves(self.steps)[0].shape[1])
        return int(jax.tree.leaves(self.start)[0].shape[0])


def correlated(key: Any, old: Variates, correlation: float) -> Variates:
    """The next z, rho z + sqrt(1 - rho^2) N(0, I): reversible, with N(0, I) invariant."""
    leaves, tree = jax.tree.flatten(old)
    keys = random.split(key, len(leaves))
    rest = (1.0 - correlation**2) ** 0.5
    new = [
        correlation * z + rest * random.normal(k, z.shape, z.dtype)
        for k, z in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, new)


# -- draws from normal variates --------------------------------------------------------------------

Transport = tuple[tuple[int, ...], Callable[[Any], Any]]


def from_normals(fn: Any, site: str) -> Transport:
    """The shape of z, and the function of z that has the law ``fn`` for z ~ N(0, I).

    Raises:
        MethodError: the distribution has neither a quantile function nor a location and a scale.
    """
    if isinstance(fn, dist.Normal):
        return fn.shape(), lambda z: fn.loc + fn.scale * z
    if isinstance(fn, dist.MultivariateNormal):
        return fn.shape(), lambda z: fn.loc + jnp.squeeze(fn.scale_tril @ z[..., None], -1)
    if isinstance(fn, dist.Delta):
        return (), lambda _: fn.v
    if isinstance(fn, dist.Independent | dist.MaskedDistribution):
        return from_normals(fn.base_dist, site)
    if isinstance(fn, dist.ExpandedDistribution):
        shape, function = from_normals(fn.base_dist, site)
        own = shape[len(fn.base_dist.batch_shape) :]
        return (*fn.batch_shape, *own), lambda z: jnp.broadcast_to(function(z), fn.shape())
    if isinstance(fn, dist.TransformedDistribution):
        shape, function = from_normals(fn.base_dist, site)

        def transformed(z: Any) -> Any:
            x = function(z)
            for transform in fn.transforms:
                x = transform(x)
            return x

        return shape, transformed
    if not fn.event_shape and (levels := finite_support(fn)) is not None:
        return fn.shape(), lambda z: _finite_quantile(fn, levels, _uniform(z))
    if not fn.event_shape and _has_quantiles(fn):
        return fn.shape(), lambda z: fn.icdf(_uniform(z))
    raise MethodError(
        f"correlation= makes every latent a function of normal variates, which is not known for "
        f"site {site!r} with its {type(fn).__name__}. Use correlation=0, or write the site as a "
        "function of one that has a quantile function (icdf)."
    )


def _has_quantiles(fn: Any) -> bool:
    """Whether ``icdf`` can be computed here: some need packages that may be missing."""
    try:
        jax.eval_shape(fn.icdf, jax.ShapeDtypeStruct(fn.shape(), jnp.result_type(float)))
    except (NotImplementedError, ImportError):  # NumPyro has none, or asks for another package
        return False
    return True


def _uniform(z: Any) -> Any:
    """Phi(z), inside (0, 1) whatever the rounding."""
    limits = jnp.finfo(z.dtype)
    return jnp.clip(norm.cdf(z), limits.tiny, 1.0 - limits.epsneg)


def _finite_quantile(fn: Any, levels: Any, uniform: Any) -> Any:
    each = levels.reshape(-1, *[1] * len(fn.batch_shape))
    cumulative = jnp.cumsum(jnp.exp(fn.log_prob(each)), 0)
    place = jnp.sum(cumulative[:-1] <= uniform * cumulative[-1], 0)
    return levels[place]


class _Placed(Messenger):
    """Puts functions of normal variates at the latent sites; without any, learns their shapes."""

    def __init__(self, variates: Mapping[str, Any] | None, function: Callable | None = None):
        super().__init__(function)
        self.variates = variates
        self.shapes: dict[str, tuple[int, ...]] = {}

    def process_message(self, message: dict) -> None:
        if message["type"] != "sample" or message["value"] is not None:
            return
        name = message["name"]
        shape, function = from_normals(message["fn"], name)
        self.shapes[name] = shape
        z = jnp.zeros(shape) if self.variates is None else self.variates[name]
        message["value"] = jnp.asarray(function(z))


def _placed(variates: Mapping[str, Any]) -> Callable[[Callable], Callable]:
    return lambda function: _Placed(variates, function)


def _first(series: Series, variates: Mapping[str, Any]) -> Step:
    start: Callable[..., Step] = series.start  # takes handlers around the model, too
    return start(_FIXED, _placed(variates))


def _next(series: Series, carry: Any, t: Any, variates: Mapping[str, Any]) -> Step:
    _, trace = run_step(series.scan, carry, t, _FIXED, _placed(variates))
    return series.replay(carry, t, {name: trace[name]["value"] for name in series.latents})


# -- the filter ------------------------------------------------------------------------------------


def _place(steps: Step) -> Any:
    """Where a particle is in the order: its first real coordinate, else its first one."""
    leaves = [jnp.asarray(x) for x in steps.latents.values()]
    real = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    every = [*(real or leaves), jnp.zeros(1)]
    return jnp.ravel(every[0])[0].astype(jnp.result_type(float))


def sorted_filter(series: Series, variates: Variates) -> tuple[Population, Any, History]:
    """Filter a whole series: the last population, the initial sites, and the history.

    Resampled at every step, systematically, in the order of the first coordinate.

    Cost: O(T N log N), memory O(N T).
    """
    count = variates.particles

    def started(z: Mapping[str, Any]) -> tuple[Step, Any]:
        step = _first(series, z)
        return step, _place(step)

    starts, places = jax.vmap(started, axis_size=count)(variates.start)
    first = weighed(Population.of(starts.carry), starts)

    def move(carry: tuple[Population, Any], given: tuple[Any, Any, Any]) -> Any:
        (population, places), (t, z, z_resampling) = carry, given
        order = jnp.argsort(places)
        points = (jnp.arange(count) + _uniform(z_resampling)) / count
        weights = jnp.exp(population.log_weights)[order]
        alive = jnp.sum(weights) > 0
        chosen = jnp.where(alive, inverse_cdf(weights, points), jnp.arange(count))
        ancestors = order[chosen].astype(jnp.int32)

        def moved(own: Any, z: Mapping[str, Any]) -> tuple[Step, Any]:
            step = _next(series, own, t, z)
            return step, _place(step)

        steps, places = jax.vmap(moved)(take(population.particles, ancestors), z)
        base = jnp.where(alive, -jnp.log(float(count)), -jnp.inf)
        even = jnp.full_like(population.log_weights, base)
        new = weighed(Population(steps.carry, even, population.log_evidence), steps)
        history = History(population.particles, population.log_weights, ancestors, steps.latents)
        return (new, places), history

    times = jnp.arange(series.length)
    (last, _), history = jax.lax.scan(
        move, (first, places), (times, variates.steps, variates.resampling)
    )
    return last, starts.latents, history


@dataclasses.dataclass(frozen=True)
class CorrelatedEstimate:
    """(position, (variates, key)) -> log prior of the static sites + log Z_hat, and a path.

    A function of a program.

    Attributes:
        space: its time axis.
        particles: N.
        start, steps: shapes of the variates of one particle, (name, shape) of every site.
    """

    space: StateSpace
    particles: int
    start: tuple[tuple[str, tuple[int, ...]], ...]
    steps: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, program: Program, space: StateSpace, particles: int) -> CorrelatedEstimate:
        """For a program, which is looked at.

        Raises:
            MethodError: some latent is no known function of normal variates.
        """
        start, step = _Placed(None), _Placed(None)

        def look(key: Any) -> Any:
            position = positions.start_position(program, key, program.data)
            series = space.at(program, position, program.data)
            first: Callable[..., Step] = series.start
            begun = first(_FIXED, lambda function: _inside(start, function))
            return run_step(
                series.scan, begun.carry, 0, _FIXED, lambda function: _inside(step, function)
            )[0]

        with program.context():
            jax.eval_shape(look, key_shape())
        return cls(space, particles, tuple(start.shapes.items()), tuple(step.shapes.items()))

    def variates(self, key: Any) -> Variates:
        """Independent normal variates."""
        count, length = self.particles, self.space.length
        zeros = Variates(
            {name: jnp.zeros((count, *shape)) for name, shape in self.start},
            {name: jnp.zeros((length, count, *shape)) for name, shape in self.steps},
            jnp.zeros(length),
        )
        return correlated(key, zeros, 0.0)

    def example(self, program: Program) -> Any:
        with program.context():
            more = jax.eval_shape(lambda: (self.variates(random.key(0)), random.key(0)))
        return positions.shapes(program), more

    def __call__(self, program: Program, given: tuple[Position, Any], data: Sequence[Any]) -> Any:
        position, (variates, key) = given
        series = self.space.at(program, position, data)
        last, initial, history = sorted_filter(series, variates)
        path = drawn_path(
            key, self.space, program, position, data, series, initial, history, last.log_weights
        )
        return series.log_prior + last.log_evidence, path


def _inside(handler: _Placed, function: Callable) -> Callable:
    """A function that is run inside a handler."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with handler:
            return function(*args, **kwargs)

    return run
