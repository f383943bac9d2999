"""The two numbers that Gaussian data say about a kernel: a quadratic form and a determinant.

For every law of the scale, the evidence of targets y under a kernel depends on the kernel through
q = y^T (K + noise I)^-1 y and log |K + noise I| alone: one Cholesky factor serves them all.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float

from ppl_toolkit.models.blocks import lower_pullback, lower_triangle

__all__ = ["Statistics", "factor", "statistics"]

_LARGE = 1024  # rows, from where it pays to work in pieces


class Statistics(NamedTuple):
    """What a scale mixture needs to know of the data.

    Attributes:
        quadratic: q = tr(Y^T Kt^-1 Y), with Kt = K + noise I.
        log_determinant: p log |Kt|, for p columns of targets.
        size: the number of targets, n p.
    """

    quadratic: Float[Array, ""]
    log_determinant: Float[Array, ""]
    size: int


def statistics(network: Any, x: Any, y: Any, noise: Any, *, block: int = 256) -> Statistics:
    """The statistics of targets under a network's kernel, differentiable once, in reverse.

    Args:
        network: a layer.
        x: inputs (n, d), or images.
        y: targets (n,), or (n, p) for p outputs that share kernel and scale.
        noise: what is added to the diagonal: the noise variance in units of sigma^2.
        block: rows and columns of the kernel worked on at a time.

    Complexity: n^3 / 3 operations and 2 n^2 numbers for the values, 2 n^3 more and 3 n^2 numbers
    for the derivative by all parameters and inputs together. NaN where Kt is not positive definite.

    Source: Rasmussen, Williams (2006), Gaussian Processes for Machine Learning, section 5.4.
    """
    dtype = jnp.result_type(x, y, float)
    network, x, y, noise = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), (network, x, y, noise)
    )
    quadratic, log_determinant = _statistics(block, network, x, y.reshape(len(y), -1), noise)
    return Statistics(quadratic, log_determinant, y.size)


def factor(network: Any, x: Any, noise: Any, *, block: int = 256) -> Float[Array, "n n"]:
    """The lower Cholesky factor of K + noise I; NaN where that is not positive definite."""
    lower = lower_triangle(network, x, block=block)
    diagonal = jnp.arange(len(x))
    return lax.linalg.cholesky(lower.at[diagonal, diagonal].add(noise), symmetrize_input=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(block: int, network: Any, x: Any, y: Any, noise: Any) -> tuple[Any, Any]:
    return _forward(block, network, x, y, noise)[0]


def _forward(block: int, network: Any, x: Any, y: Any, noise: Any) -> tuple[tuple, tuple]:
    root = factor(network, x, noise, block=block)
    solved = cho_solve((root, True), y)
    log_determinant = 2 * y.shape[1] * jnp.log(jnp.diagonal(root)).sum()
    return ((y * solved).sum(), log_determinant), (network, x, root, solved)


def _backward(block: int, kept: tuple, bars: tuple) -> tuple[Any, Any, Any, Any]:
    """With Kt^-1 = W^T W: d q = -v^T dK v, d log |Kt| = tr(Kt^-1 dK)."""
    (network, x, root, solved), (of_quadratic, of_determinant) = kept, bars
    of_determinant = of_determinant * solved.shape[1]
    inverse_root = _inverse_of(root)

    def entries(i: Any, j: Any, size: int) -> Any:
        a, b = (lax.dynamic_slice_in_dim(inverse_root, at, size, axis=1) for at in (i, j))
        v, w = (lax.dynamic_slice_in_dim(solved, at, size) for at in (i, j))
        return of_determinant * (a.T @ b) - of_quadratic * (v @ w.T)

    of_network, of_x = lower_pullback(network, x, entries, block=block)
    of_noise = of_determinant * (inverse_root**2).sum() - of_quadratic * (solved**2).sum()
    return of_network, of_x, 2 * of_quadratic * solved, of_noise


def _inverse_of(root: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a lower triangular matrix, by pieces of some columns each.

    They begin with zeros, which cost no time, and no whole identity matrix lies beside it.
    """
    n, count = len(root), 4 if len(root) >= _LARGE else 1
    inverse = jnp.zeros_like(root)
    for piece in range(count):
        first, last = n * piece // count, n * (piece + 1) // count
        units = jnp.eye(n - first, last - first, dtype=root.dtype)
        columns = solve_triangular(root[first:, first:], units, lower=True)
        inverse = inverse.at[first:, first:last].set(columns)
        root, inverse = lax.optimization_barrier((root, inverse))  # one after the other: memory
    return inverse


_statistics.defvjp(_forward, _backward)
