"""Any elementwise activation: expectations over pairs of Gaussians by quadrature.

Both rules know E[f(u) g(v)] for functions f, g of Gaussians u, v of covariance s and variances q1,
q2, and differentiate it by the heat equation (Price 1958): by s it is E[f' g'], by q1 it is
E[f'' g] / 2, by q2 E[f g''] / 2. No derivative of the quadrature is taken, which would be infinite
where inputs coincide.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ppl_toolkit.errors import OptionError
from ppl_toolkit.models.activations import Activation
from ppl_toolkit.models.layers import layer

__all__ = ["Elementwise", "HermiteSeries"]


_MOST = 370  # weights of more points leave the range of numbers
_ALONG = 100  # points for an input with itself, which cost little


class _Quadrature(Activation):
    """An activation known by its values: see `Elementwise` and `HermiteSeries`."""

    function: Callable
    nodes: int
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise OptionError(
                f"an activation is a function such as jnp.tanh; got {self.function!r:.60}."
            )
        if seen := _trouble(self.function):
            raise OptionError(
                "an activation is an elementwise function of JAX arrays, such as jnp.tanh (not "
                f"np.tanh); got {self.function!r:.60}, {seen}."
            )
        if not isinstance(self.nodes, int) or not self.least <= self.nodes <= _MOST:
            raise OptionError(
                f"nodes must be an integer from {self.least} to {_MOST}; got {self.nodes!r}."
            )

    def expectations(self, s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
        f, slope = self.function, _derivative(self.function)
        return self.expected(f, f, s, q1, q2), self.expected(slope, slope, s, q1, q2)

    def own(self, q: Any) -> tuple[Any, Any]:
        f, slope = self.function, _derivative(self.function)
        nodes = max(self.nodes, _ALONG)
        return _single(nodes, f, f, q), _single(nodes, slope, slope, q)

    @abc.abstractmethod
    def expected(self, f: Callable, g: Callable, s: Any, q1: Any, q2: Any) -> Any:
        """E[f(u) g(v)]."""


@layer()
class Elementwise(_Quadrature):
    """Any smooth activation, such as ``Elementwise(jnp.tanh)``, by Gauss-Hermite quadrature.

    Attributes:
        function: an elementwise function of JAX arrays, twice differentiable. Pass the same object
            every time: another one compiles anew.
        nodes: m points in either dimension. At variance 1, 25 give F of tanh to 1e-5, and at
            variance 4 to 1e-2 (a test holds it to that). `HermiteSeries` is more accurate, and
            costs less; a function with a kink needs a closed form.

    Complexity: m^2 evaluations of the function for every pair of inputs.
    """

    function: Callable
    nodes: int = 25

    def expected(self, f: Callable, g: Callable, s: Any, q1: Any, q2: Any) -> Any:
        if f is g:  # given the one of smaller variance, the other is smoother; and it is symmetric
            q1, q2 = jnp.minimum(q1, q2), jnp.maximum(q1, q2)
        return _over_grid(self.nodes, f, g, s, q1, q2)


@layer()
class HermiteSeries(_Quadrature):
    """Any smooth activation by its Hermite series in the correlation of the inputs.

    E[phi(u) phi(v)] = sum_k a_k(q1) a_k(q2) rho^k, rho = s / sqrt(q1 q2), with the Hermite
    coefficients a_k(q) = E[phi(sqrt(q) z) He_k(z)] / sqrt(k!) by quadrature for every input.

    Attributes:
        function: an elementwise function of JAX arrays, twice differentiable.
        degree: the last k. What is left out is at most the sum of a_k^2 beyond, for coinciding
            inputs; diagonals are exact.
        nodes: points of the quadrature; more than ``degree``.

    Complexity: n ``nodes`` ``degree`` operations for n inputs, and ``degree`` for every pair, where
    `Elementwise` takes ``nodes^2`` evaluations of the function.

    Source: Daniely, Frostig, Singer (2016).
    """

    function: Callable
    degree: int = 40
    nodes: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.degree, int) or not 0 <= self.degree < self.nodes:
            raise OptionError(
                f"degree must be an integer from 0 to nodes - 1 = {self.nodes - 1}; "
                f"got {self.degree!r}."
            )

    def expected(self, f: Callable, g: Callable, s: Any, q1: Any, q2: Any) -> Any:
        return _over_series((self.degree, self.nodes), f, g, s, q1, q2)


@functools.cache
def _trouble(function: Callable) -> str:
    """What keeps a function from being an activation; empty if nothing does."""
    values = jax.ShapeDtypeStruct((2, 3), jnp.result_type(float))
    try:
        found = jax.eval_shape(_derivative(function), values)
    except Exception as error:
        return f"which raises {type(error).__name__}"
    shape = getattr(found, "shape", None)
    return "" if shape == values.shape else f"which maps shape {values.shape} to {shape}"


@functools.cache
def _derivative(function: Callable) -> Callable:
    """The elementwise derivative; the same object for the same function."""

    def slope(x: Any) -> Any:
        return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    return slope


@functools.cache
def _normal_nodes(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights for expectations over a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return points, weights / weights.sum()


def _heat(rule: Callable) -> Callable:
    """``rule(size, f, g, s, q1, q2)`` with its derivative by the heat equation."""
    expected = jax.custom_jvp(rule, nondiff_argnums=(0, 1, 2))

    def derivative(size: Any, f: Callable, g: Callable, primals: tuple, tangents: tuple) -> tuple:
        (ds, dq1, dq2), (df, dg) = tangents, (_derivative(f), _derivative(g))
        change = expected(size, df, dg, *primals) * ds
        change += expected(size, _derivative(df), g, *primals) * dq1 / 2
        change += expected(size, f, _derivative(dg), *primals) * dq2 / 2
        return expected(size, f, g, *primals), change

    expected.defjvp(derivative)
    return expected


@_heat
def _over_grid(nodes: int, f: Callable, g: Callable, s: Any, q1: Any, q2: Any) -> Any:
    points, weights = (jnp.asarray(x, s.dtype) for x in _normal_nodes(nodes))
    along, across = _conditional(s, q1, q2)

    def over_first(total: Any, node: tuple) -> tuple:
        u, weight = node

        def over_second(inner: Any, other: tuple) -> tuple:
            z, share = other
            return inner + share * g(along * u + across * z), None

        inner, _ = lax.scan(over_second, jnp.zeros_like(s), (points, weights))
        return total + weight * f(jnp.sqrt(q1) * u) * inner, None

    return lax.scan(over_first, jnp.zeros_like(s), (points, weights))[0]


def _conditional(s: Any, q1: Any, q2: Any) -> tuple[Any, Any]:
    """The coefficients of v = along * (u / sqrt(q1)) + across * z with z independent of u."""
    along = s / jnp.sqrt(jnp.where(q1 == 0, 1, q1))
    return along, jnp.sqrt(jnp.maximum(q2 - along**2, 0))


@_heat
def _over_series(size: tuple, f: Callable, g: Callable, s: Any, q1: Any, q2: Any) -> Any:
    degree, nodes = size
    product = q1 * q2
    rho = jnp.clip(s / jnp.sqrt(jnp.where(product == 0, 1, product)), -1, 1)
    left, right = _coefficients(degree, nodes, f, q1), _coefficients(degree, nodes, g, q2)
    total = left[degree] * right[degree]
    for k in range(degree - 1, -1, -1):
        total = total * rho + left[k] * right[k]
    return total


def _coefficients(degree: int, nodes: int, f: Callable, q: Any) -> Any:
    """a_k(q) for k = 0, ..., degree, shape (degree + 1, *q.shape)."""
    points, weights = _normal_nodes(nodes)
    # He_k(z) / sqrt(k!), by the recurrence of the normalised polynomials.
    table = [np.ones_like(points), points]
    for k in range(1, degree):
        table.append((points * table[k] - np.sqrt(k) * table[k - 1]) / np.sqrt(k + 1))
    basis = jnp.asarray(np.stack(table[: degree + 1]) * weights, q.dtype)
    values = f(jnp.sqrt(q)[..., None] * jnp.asarray(points, q.dtype))
    return jnp.moveaxis(values @ basis.T, -1, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _single(nodes: int, f: Callable, g: Callable, q: Any) -> Any:
    """E[f(u) g(u)] of one Gaussian of variance q."""
    points, weights = (jnp.asarray(x, q.dtype) for x in _normal_nodes(nodes))
    u = jnp.sqrt(q)[..., None] * points
    return (f(u) * g(u)) @ weights


@_single.defjvp
def _(nodes: int, f: Callable, g: Callable, primals: tuple, tangents: tuple) -> tuple:
    ((q,), (dq,)), (df, dg) = (primals, tangents), (_derivative(f), _derivative(g))
    bent = _single(nodes, _derivative(df), g, q) + _single(nodes, f, _derivative(dg), q)
    return _single(nodes, f, g, q), (bent / 2 + _single(nodes, df, dg, q)) * dq
