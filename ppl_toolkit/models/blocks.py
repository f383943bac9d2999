"""Kernel matrices of a network, block by block.

All layers are applied to a block of pairs of inputs while it is in the cache. Of a symmetric matrix
the blocks on and below the diagonal are computed; the others are their transposes. The derivative
goes through the blocks again, so that no layer's n x n matrix is ever kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ppl_toolkit.models.covariances import (
    Kernels,
    covariances_of,
    per_position,
    variances_of,
)

__all__ = ["Tiles", "kernel_matrices", "lower_pullback", "lower_triangle", "tiles"]


class Tiles(NamedTuple):
    """The blocks of an n1 x n2 matrix.

    Attributes:
        rows, columns: where each block begins, int32 arrays. The last blocks reach back, so that
            all have the same shape.
        first_row, first_column: the rows and columns from here on are in no block before.
        height, width: the shape of a block.
    """

    rows: np.ndarray
    columns: np.ndarray
    first_row: np.ndarray
    first_column: np.ndarray
    height: int
    width: int


def tiles(n1: int, n2: int, block: int, *, lower: bool) -> Tiles:
    """Cut a matrix into blocks; with ``lower``, those on and below the diagonal."""
    height, width = min(block, n1), min(block, n2)
    pairs = [
        (i, j) for i in range(0, n1, height) for j in range(0, n2, width) if not lower or j <= i
    ]
    row, column = np.asarray(pairs, np.int32).T
    return Tiles(
        np.minimum(row, n1 - height), np.minimum(column, n2 - width), row, column, height, width
    )


def kernel_matrices(
    network: Any, x1: Any, x2: Any = None, *, ntk: bool = True, block: int = 256
) -> Kernels:
    """Both kernels of a network at all pairs of inputs, as a traceable function.

    Args:
        network: a layer.
        x1: inputs (n1, d), or images.
        x2: inputs (n2, d); ``x1`` itself if None.
        ntk: whether to compute the tangent kernel.
        block: rows and columns worked on at a time.

    Returns:
        Arrays (n1, n2). Where they fit in one block they can be differentiated to any order;
        beyond, once and in reverse.
    """
    dtype = jnp.result_type(x1, float)
    network, x1, x2 = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (network, x1, x2))
    n2 = len(x1 if x2 is None else x2)
    if max(len(x1), n2) <= block:
        return _pairs(network, x1, x1 if x2 is None else x2, ntk, jnp.eye(len(x1), dtype=bool)
                      if x2 is None else None)  # fmt: skip
    return _matrices(ntk, block, network, x1, x2)


def _pairs(network: Any, a: Any, b: Any, ntk: bool, same: Any) -> Kernels:
    """The kernels of all pairs of two short lists of inputs; ``same``: which pairs are one input.

    Those take their values from closed forms: the angle between an input and itself is zero, where
    rounding costs half of the tangent kernel's digits.
    """
    state = network.cross(covariances_of(a, b, ntk=ntk, joint=network.joint))
    if state.nngp.ndim != 2:
        raise per_position()
    found = Kernels(state.nngp, state.ntk)
    if same is None:
        return found
    own = network.diagonal(variances_of(a, ntk=ntk, joint=network.joint))
    return jax.tree.map(
        lambda pairs, single: jnp.where(same, single[:, None], pairs), found, Kernels(*own)
    )


def lower_triangle(network: Any, x: Any, *, block: int = 256) -> Any:
    """The Gaussian-process kernel (n, n) on and below the diagonal; above, anything finite.

    Half the work of `kernel_matrices`. It cannot be differentiated: see `lower_pullback`.
    """
    return _filled(False, min(block, len(x)), False, network, x, None).nngp


def lower_pullback(
    network: Any, x: Any, entries: Callable[[Any, Any, int], Any], *, block: int = 256
) -> tuple[Any, Any]:
    """The derivative of sum_ij Kbar_ij K_ij by network and inputs, for a symmetric Kbar.

    Args:
        entries: ``entries(i, j, size)`` gives the square block of Kbar that begins at (i, j). It is
            never needed as a whole.
    """

    def of_nngp(i: Any, j: Any, height: int, _: int) -> Kernels:
        return Kernels(entries(i, j, height))

    return _pulled_back(False, min(block, len(x)), network, x, None, of_nngp)[:2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matrices(ntk: bool, block: int, network: Any, x1: Any, x2: Any) -> Kernels:
    return _filled(ntk, block, True, network, x1, x2)


def _filled(ntk: bool, block: int, mirror: bool, network: Any, x1: Any, x2: Any) -> Kernels:
    symmetric = x2 is None
    n1, n2 = len(x1), len(x1 if symmetric else x2)
    cut = tiles(n1, n2, block, lower=symmetric)
    blank = jnp.zeros((n1, n2), x1.dtype)

    def write(index: Any, out: Kernels) -> Kernels:
        i, j, found = _block(ntk, cut, network, x1, x2, index)
        out = jax.tree.map(lambda whole, part: lax.dynamic_update_slice(whole, part, (i, j)),
                           out, found)  # fmt: skip
        if not (symmetric and mirror):
            return out
        turned = lax.optimization_barrier(jax.tree.map(jnp.transpose, found))
        return jax.tree.map(lambda whole, part: lax.dynamic_update_slice(whole, part, (j, i)),
                            out, turned)  # fmt: skip

    return lax.fori_loop(0, len(cut.rows), write, Kernels(blank, blank if ntk else None))


def _block(
    ntk: bool, cut: Tiles, network: Any, x1: Any, x2: Any, index: Any
) -> tuple[Any, Any, Kernels]:
    i, j = jnp.asarray(cut.rows)[index], jnp.asarray(cut.columns)[index]
    a = lax.dynamic_slice_in_dim(x1, i, cut.height)
    b = lax.dynamic_slice_in_dim(x1 if x2 is None else x2, j, cut.width)
    found = _pairs(network, a, b, ntk, _same(cut, i, j) if x2 is None else None)
    return i, j, lax.optimization_barrier(found)


def _same(cut: Tiles, i: Any, j: Any) -> Any:
    return (i + jnp.arange(cut.height))[:, None] == (j + jnp.arange(cut.width))[None, :]


def _forward(ntk: bool, block: int, network: Any, x1: Any, x2: Any) -> tuple[Kernels, tuple]:
    return _matrices(ntk, block, network, x1, x2), (network, x1, x2)


def _backward(ntk: bool, block: int, kept: tuple, bar: Kernels) -> tuple[Any, Any, Any]:
    symmetric = kept[2] is None

    def entries(i: Any, j: Any, height: int, width: int) -> Kernels:
        def part(whole: Any) -> Any:
            here = lax.dynamic_slice(whole, (i, j), (height, width))
            if not symmetric:
                return here
            return (here + lax.dynamic_slice(whole, (j, i), (width, height)).T) / 2

        return jax.tree.map(part, bar)

    network, x1, x2 = kept
    return _pulled_back(ntk, block, network, x1, x2, entries)


def _pulled_back(
    ntk: bool, block: int, network: Any, x1: Any, x2: Any, entries: Callable
) -> tuple[Any, Any, Any]:
    """The derivative of the sum of the matrices' entries times ``entries``, block by block."""
    symmetric = x2 is None
    cut = tiles(len(x1), len(x1 if symmetric else x2), block, lower=symmetric)

    def add(index: Any, sums: tuple) -> tuple:
        of_network, of_x1, of_x2 = sums
        i, j = jnp.asarray(cut.rows)[index], jnp.asarray(cut.columns)[index]
        # Blocks that reach back count only what is new; those below the diagonal count twice.
        new = (i + jnp.arange(cut.height) >= jnp.asarray(cut.first_row)[index])[:, None] & (
            j + jnp.arange(cut.width) >= jnp.asarray(cut.first_column)[index]
        )
        times = jnp.where(new, jnp.where(i == j, 1, 2) if symmetric else 1, 0)
        bar = jax.tree.map(lambda part: times * part, entries(i, j, cut.height, cut.width))
        a = lax.dynamic_slice_in_dim(x1, i, cut.height)
        b = lax.dynamic_slice_in_dim(x1 if symmetric else x2, j, cut.width)
        same = _same(cut, i, j) if symmetric else None
        _, pullback = jax.vjp(lambda net, a, b: _pairs(net, a, b, ntk, same), network, a, b)
        more, more_a, more_b = pullback(bar)
        of_network = jax.tree.map(jnp.add, of_network, more)
        of_x1 = _added(of_x1, more_a, i)
        if symmetric:
            of_x1 = _added(of_x1, more_b, j)
        else:
            of_x2 = _added(of_x2, more_b, j)
        return of_network, of_x1, of_x2

    start = jax.tree.map(jnp.zeros_like, (network, x1, x2))
    return lax.fori_loop(0, len(cut.rows), add, start)


def _added(whole: Any, part: Any, start: Any) -> Any:
    before = lax.dynamic_slice_in_dim(whole, start, len(part))
    return lax.dynamic_update_slice_in_dim(whole, before + part, start, 0)


_matrices.defvjp(_forward, _backward)
