"""Trees of arrays as few flat buffers, one for each type: what each array costs is paid once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Packing"]


class Packing(NamedTuple):
    """How the leaves of a tree, all with the same leading axes, lie side by side in buffers.

    Attributes:
        treedef: of the tree.
        leaves: type, first place, and shape without the leading axes of every leaf.
        sizes: of the buffers, by type.
    """

    treedef: Any
    leaves: tuple[tuple[str, int, tuple[int, ...]], ...]
    sizes: dict[str, int]

    @classmethod
    def of(cls, structure: Any, leading: int = 1) -> Packing:
        """The packing of a tree of arrays, or of what stands for them."""
        leaves, treedef = jax.tree.flatten(structure)
        sizes: dict[str, int] = {}
        places = []
        for leaf in leaves:
            dtype, shape = np.dtype(leaf.dtype).name, tuple(leaf.shape[leading:])
            places.append((dtype, sizes.get(dtype, 0), shape))
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return cls(treedef, tuple(places), sizes)

    def pack(self, tree: Any) -> dict[str, jax.Array]:
        """The buffers (..., size) of a tree (traced)."""
        parts: dict[str, list[jax.Array]] = {dtype: [] for dtype in self.sizes}
        for leaf, (dtype, _, shape) in zip(jax.tree.leaves(tree), self.leaves, strict=True):
            array = jnp.asarray(leaf, dtype)  # constants of a jaxpr are none
            parts[dtype].append(array.reshape(*array.shape[: array.ndim - len(shape)], -1))
        return {
            dtype: own[0] if len(own) == 1 else jnp.concatenate(own, axis=-1)
            for dtype, own in parts.items()
        }

    def unpack(self, buffers: dict[str, Any]) -> Any:
        """The tree of which these are the buffers; NumPy arrays or traced ones."""
        leaves = []
        for dtype, first, shape in self.leaves:
            buffer = buffers[dtype]
            part = buffer[..., first : first + math.prod(shape)]
            leaves.append(part.reshape(*buffer.shape[:-1], *shape))
        return jax.tree.unflatten(self.treedef, leaves)
