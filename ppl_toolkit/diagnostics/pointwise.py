"""Log likelihoods of every observation at every draw, in blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ppl_toolkit import executables
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import Traced

if TYPE_CHECKING:
    import xarray

__all__ = ["PointwiseLikelihood", "listed", "observation_label", "read_blocks"]

_CALL_BYTES = 8 * 2**20  # of one work array of the compiled evaluator
_MOST_DRAWS = 256  # in one call of it
_MOST_LABELS = 5


class PointwiseLikelihood:
    """log p(y_i | theta_s) of one observed site of a program.

    Args:
        program: the model and its data.
        site: name of the observed site.
        size: number n of its observations, in the order of their flattened array.

    A call evaluates the whole site for a few draws and returns the wanted observations only, so
    that its work space is a few times 8 MiB, or that of one draw if it is larger.
    """

    def __init__(self, program: Program, site: str, size: int) -> None:
        self.program, self.site, self.size = program, site, size
        example = {s.name: jax.ShapeDtypeStruct(s.shape, s.dtype) for s in program.latent}

        def score(values: Any, data: Any) -> Any:
            return jnp.ravel(program.log_terms(values, data)[site])

        with program.context():
            self._traced = Traced.of(score, example, program.data)
        widest = max([size, *(int(np.prod(s.shape)) for s in program.latent)])
        self._batch = int(np.clip(_CALL_BYTES // (8 * widest), 1, _MOST_DRAWS))

    def draws_of(self, tree: xarray.DataTree) -> dict[str, np.ndarray]:
        """The latent sites' posterior draws of a result of this model, arrays (S, ...)."""
        posterior, values = tree["posterior"].dataset, {}
        for site in self.program.latent:
            array = np.asarray(posterior[site.variable].transpose("chain", "draw", ...))
            values[site.name] = array.reshape(-1, *array.shape[2:]).astype(site.dtype)
        return values

    def blocks(
        self, values: Mapping[str, np.ndarray], width: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """All observations, ``width`` at a time: (the first's number, array (<= width, S)).

        One compiled program serves all blocks, and one array holds them: a block is gone when the
        next one comes. Complexity: n / width evaluations of the model at all draws; S width numbers
        of memory.
        """
        block = np.empty((width, next(iter(values.values())).shape[0]))
        for first in range(0, self.size, width):
            # The last block reaches back, so that all have the same shape.
            begin = min(first, self.size - width)
            self._fill(block, values, begin)
            yield first, block[first - begin :]

    def one(self, values: Mapping[str, np.ndarray], index: int) -> np.ndarray:
        """The log likelihood (S,) of observation number ``index``."""
        row = np.empty((1, next(iter(values.values())).shape[0]))
        self._fill(row, values, index)
        return row[0]

    def _fill(self, block: np.ndarray, values: Mapping[str, np.ndarray], first: int) -> None:
        """Put the observations from ``first`` on, as many as it has rows, into ``block``."""
        width, total = block.shape
        batch = min(self._batch, 1 << (total - 1).bit_length())

        def run(consts: Any, data: Any, begin: Any, values: Any) -> Any:
            def one(value: Any) -> Any:
                return lax.dynamic_slice(self._traced(consts, value, data), (begin,), (width,))

            return jax.vmap(one, out_axes=1)(values)

        def part(start: int) -> dict[str, np.ndarray]:
            """Draws from ``start`` on; the last one repeated where there are too few."""
            rows = np.minimum(np.arange(start, start + batch), total - 1)
            return {name: value[rows] for name, value in values.items()}

        with self.program.context():
            device = jax.devices()[0]
            begin = np.int32(first)
            fixed = jax.device_put((self._traced.consts, self.program.data, begin), device)
            shapes = str(jax.tree.map(lambda x: (np.shape(x), str(x.dtype)), (fixed, part(0))))
            executable, _ = executables.compiled(
                ("pointwise", self._traced.text(), width, shapes, self.program.precision),
                lambda: jax.jit(run, keep_unused=True).lower(*fixed, part(0)),
                device,
            )
            for start in range(0, total, batch):
                count = min(batch, total - start)
                found = np.asarray(executable.call(*fixed, part(start)))
                block[:, start : start + count] = found[:, :count]


def read_blocks(array: xarray.DataArray, most_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """An array (chain, draw, ...) that may lie on disk, some of its scalars at a time.

    Yields:
        (The first scalar's number, float64 array (scalar, S)), of about ``most_bytes`` bytes.
    """
    chains, draws, *shape = array.shape
    if not shape:
        yield 0, np.asarray(array, dtype=np.float64).reshape(1, -1)
        return
    each = int(np.prod(shape[1:], dtype=int))
    width = max(1, most_bytes // max(1, 8 * chains * draws * each))
    for first in range(0, shape[0], width):
        part = np.asarray(array[:, :, first : first + width], dtype=np.float64)
        yield first * each, part.reshape(chains * draws, -1).T


def observation_label(like: xarray.DataArray, index: int) -> str:
    """What messages call an observation, such as ``y[Choate]``.

    Args:
        like: an array (chain, draw, ...) of the observed variable's log likelihood.
        index: the observation's number in the flattened array.
    """
    place = np.unravel_index(index, like.shape[2:]) if like.ndim > 2 else ()
    parts = [
        str(like.coords[dim].values[i]) if dim in like.coords else str(i)
        for dim, i in zip(like.dims[2:], place, strict=True)
    ]
    return f"{like.name}[{', '.join(parts)}]" if parts else str(like.name)


def listed(labels: Sequence[str]) -> str:
    """The first few labels, and how many more there are."""
    more = len(labels) - _MOST_LABELS
    return ", ".join(labels[:_MOST_LABELS]) + (f" and {more} more" if more > 0 else "")
