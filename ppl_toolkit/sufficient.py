"""Normal observations with linear means: their likelihood by sufficient statistics.

Where y ~ N(A theta + c, sigma^2) with A, c and y made of the data alone, the sum of squares is
||y - c - A theta||^2 = ||T (-theta, 1)||^2 with T the triangular factor of [A, y - c]: as good as
the sum itself in rounding, whatever the rank of A, at a cost that does not grow with the number of
observations.

That a mean is linear is read off the program's jaxpr: from the mean backwards through operations
that are linear in all that is not data, to the few numbers theta where they begin.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ppl_toolkit.executables import kept
from ppl_toolkit.fused import total_log_prob, unwrapped
from ppl_toolkit.linearity import PRODUCT, Linearity, evaluate, inlined, size
from ppl_toolkit.positions import log_law_of_rest
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import Traced, as_numpy, digest

__all__ = ["Reduced", "reduced"]

_LEAST = 32  # observations of a site; fewer are cheap
_MOST_WORK = 2e9  # multiplications for T, once for every data set
_MOST_KEPT = 32  # programs whose analysis is remembered


class _Site(NamedTuple):
    """An observed site whose likelihood is reduced.

    Attributes:
        theta: variables of the jaxpr that the mean is linear in.
        mean, value: variables of all elements.
        sigma: variable of the standard deviation: one number, or of the data alone.
        fixed: whether it is of the data alone.
    """

    theta: tuple[Any, ...]
    mean: Any
    value: Any
    sigma: Any
    fixed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the table [A, y - c]."""
        return size(self.mean), sum(map(size, self.theta)) + 1

    def table(self, closed: Any, inputs: Sequence[Any]) -> tuple[Any, Any]:
        """[A, y - c] and the sum of log sigma; both of the site over sigma, if that is fixed.

        A is made of the images of the unit vectors.
        """

        def mean(theta: Any) -> Any:
            given, begin = {}, 0
            for v in self.theta:
                given[v] = theta[begin : begin + size(v)].reshape(v.aval.shape)
                begin += size(v)
            return evaluate(closed, [self.mean], inputs, given)[0]

        unit = jnp.eye(self.shape[1] - 1, dtype=self.mean.aval.dtype)
        origin, image = jax.linearize(mean, jnp.zeros_like(unit[0]))
        value, sigma = evaluate(closed, [self.value, self.sigma], inputs)
        sigma = jnp.broadcast_to(sigma if self.fixed else 1.0, value.shape)
        table = jnp.concatenate([jax.vmap(image)(unit), (value - origin)[None]])
        return (table / sigma).T, jnp.sum(jnp.log(sigma))

    def log_prob(self, theta: Sequence[Any], sigma: Any, triangle: Any, constant: Any) -> Any:
        """The log likelihood by T and its constant part."""
        residuals = triangle @ jnp.concatenate([*(-jnp.ravel(t) for t in theta), jnp.ones(1)])
        squares = jnp.dot(residuals, residuals)
        if self.fixed:
            return constant - 0.5 * squares
        return constant - 0.5 * squares / sigma[0] ** 2 - self.shape[0] * jnp.log(sigma[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Reduced:
    """A log density that takes statistics of the data after the data themselves.

    Attributes:
        traced: the log density (D,), (*data, *statistics) -> scalar.
        tables: data -> for every reduced site [A, y - c] (N, P + 1) and the logarithm of the fixed
            part of its standard deviations, summed.
    """

    traced: Traced
    tables: Traced

    def statistics(self, data: Sequence[Any]) -> tuple[np.ndarray, ...]:
        """What `traced` takes after ``data``: T and the constant part of the density, by site.

        Called in the precision context.
        """
        tables = self._tables(data)
        return tuple(part for table in tables for part in _condensed(*map(np.asarray, table)))

    @functools.cached_property
    def _tables(self) -> Callable:
        shapes = tuple(
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.tables.jaxpr.invars
        )
        return kept(lambda data: self.tables(self.tables.consts, data), shapes, quick=True)


def _condensed(table: np.ndarray, log_sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    triangle = np.linalg.qr(table.astype(float), mode="r").astype(table.dtype)
    constant = -0.5 * len(table) * math.log(2.0 * math.pi) - log_sigmas
    return triangle, np.asarray(constant, table.dtype)


_known: collections.OrderedDict[str, Reduced | None] = collections.OrderedDict()
_guard = threading.Lock()


def reduced(program: Program) -> Reduced | None:
    """The log density of a program with reduced likelihoods; None where nothing can be gained.

    What was found is remembered by the text of the program's log density and its constants.
    """
    candidates = [
        site.name for site in program.observed
        if site.distribution == "Normal" and not site.masked and not site.scanned
        and math.prod(site.shape) >= _LEAST
    ]  # fmt: skip
    if not candidates or program.discrete or program.baked or program.layout:
        return None
    full = program.traced("log_density")
    key = "".join([full.text(), *(digest(as_numpy(const)) for const in full.consts)])
    with _guard, program.context():
        if key not in _known:
            _known[key] = _analysed(program, candidates)
        _known.move_to_end(key)
        while len(_known) > _MOST_KEPT:
            _known.popitem(last=False)
        return _known[key]


def _analysed(program: Program, candidates: Sequence[str]) -> Reduced | None:
    def parts(position: Any, data: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The log density of all other sites; mean, value and deviation of the candidates."""
        rest, normal = [], []
        trace = program.trace(data, program.at(position))
        for name, message in trace.items():
            if name in candidates and _is_plain(message):
                normal.append(_mean_value_sigma(message))
            elif message["type"] == "sample":
                rest.append(total_log_prob(message))
        if program.imputed:
            rest.append(log_law_of_rest(program, program.unravel(position), trace))
        return sum(rest, start=jnp.zeros((), program.precision)), normal

    example = (np.zeros(program.size, program.precision), program.data)
    closed = jax.make_jaxpr(inlined(parts, *example))(*example)
    rest, *others = closed.jaxpr.outvars
    triples = [tuple(others[i : i + 3]) for i in range(0, len(others), 3)]
    linearity = Linearity(closed.jaxpr)
    sites = [_reducible(linearity, *triple) for triple in triples]
    plain = [triple for triple, site in zip(triples, sites, strict=True) if site is None]
    chosen = [site for site in sites if site is not None]
    return _composed(closed, example, rest, plain, chosen) if chosen else None


def _is_plain(message: Any) -> bool:
    """Whether a site is normal, element by element, as it stands."""
    one_each = np.shape(message["value"]) == message["fn"].shape()
    plain = one_each and message["scale"] is None and not message["intermediates"]
    return type(unwrapped(message["fn"])) is dist.Normal and plain


def _mean_value_sigma(message: Any) -> tuple[Any, Any, Any]:
    fn, shape = unwrapped(message["fn"]), np.shape(message["value"])
    mean = jnp.broadcast_to(fn.loc, shape).reshape(-1)
    sigma = fn.scale if np.size(fn.scale) == 1 else jnp.broadcast_to(fn.scale, shape)
    return mean, jnp.asarray(message["value"], mean.dtype).reshape(-1), jnp.reshape(sigma, -1)


def _reducible(linearity: Linearity, mean: Any, value: Any, sigma: Any) -> _Site | None:
    """The site, if its mean is linear in so few numbers that it pays to use statistics."""
    fixed = not linearity.depends(sigma)
    one_sigma = fixed or size(sigma) == 1
    if linearity.depends(value) or not linearity.depends(mean) or not one_sigma:
        return None
    site = _Site(linearity.roots(mean), mean, value, sigma, fixed)
    rows, columns = site.shape
    saved = linearity.cost(mean, site.theta) + 4 * rows - 2 * PRODUCT * columns**2
    few = columns <= rows and rows * columns**2 <= _MOST_WORK
    return site if few and saved > 0 else None


def _composed(
    closed: Any, example: tuple, rest: Any, plain: Sequence[tuple], sites: Sequence[_Site]
) -> Reduced:
    """The log density of the rest, of plain normal sites, and of those with statistics."""
    position, data = example
    count = len(data)

    def log_density(position: Any, given: Sequence[Any]) -> Any:
        groups = [(rest,), *plain, *((*site.theta, site.sigma) for site in sites)]
        found = iter(evaluate(closed, list(itertools.chain(*groups)), [position, *given[:count]]))
        (total,), *normal = ([next(found) for _ in group] for group in groups)
        for mean, value, sigma in normal[: len(plain)]:
            total += jnp.sum(dist.Normal(mean, sigma).log_prob(value))
        statistics = itertools.batched(given[count:], 2)
        for site, (*theta, sigma), own in zip(sites, normal[len(plain) :], statistics, strict=True):
            total += site.log_prob(theta, sigma, *own)
        return total

    def tables(data: Sequence[Any]) -> list[Any]:
        return [site.table(closed, [position, *data]) for site in sites]

    shapes = ((min(site.shape), site.shape[1]) for site in sites)
    dtype = position.dtype
    statistics = [jax.ShapeDtypeStruct(s, dtype) for shape in shapes for s in (shape, ())]
    own = tuple(jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in data)
    return Reduced(Traced.of(log_density, position, (*data, *statistics)), Traced.of(tables, own))
