"""Log likelihoods of every observation at every draw, and densities with the observation left out.

Both come in blocks of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.special import logsumexp

from ppl_toolkit import convergence, executables
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import Traced

if TYPE_CHECKING:
    import xarray

__all__ = [
    "LEAST_DRAWS",
    "PointwiseLikelihood",
    "Scores",
    "good_k",
    "listed",
    "observation_label",
    "read_blocks",
    "relative_efficiency",
    "scores_of",
]

LEAST_DRAWS = 25  # the tail of fewer cannot be smoothed

_CALL_BYTES = 8 * 2**20  # of one work array of the compiled evaluator
_MOST_DRAWS = 256  # in one call of it
_SMOOTHED_BYTES = 2**20  # of log likelihoods smoothed at a time
_READ_BYTES = 4 * 2**20  # of draws read at a time
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
            return jnp.ravel(program.pointwise(values, data)[site])

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
                (
                    "pointwise",
                    self._traced.text(differentiable=False),
                    width,
                    shapes,
                    self.program.precision,
                ),
                lambda: jax.jit(run).trace(*fixed, part(0)),
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


def relative_efficiency(posterior: xarray.Dataset) -> float:
    """ESS / S for the mean, averaged over all scalars of the posterior, as ``arviz.loo`` has it.

    One chain has 1: a single autocorrelation time is no better a guess.
    """
    chains, draws = posterior.sizes["chain"], posterior.sizes["draw"]
    if chains == 1:
        return 1.0
    sizes = [
        convergence.ess(block.T.reshape(chains, draws, -1), "mean")
        for variable in posterior.data_vars.values()
        for _, block in read_blocks(variable.transpose("chain", "draw", ...), _READ_BYTES)
    ]
    known = [x for block in sizes for x in block if np.isfinite(x)]
    return float(np.mean(known)) / (chains * draws) if known else 1.0


def good_k(draws: int) -> float:
    """Up to this k, S draws give reliable estimates (Vehtari et al. 2024)."""
    return float(min(1 - 1 / np.log10(draws), 0.7))


class Scores(NamedTuple):
    """Leave-one-out densities of n observations from S draws.

    Attributes:
        elpd_i, lpd_i: log predictive density without and with the observation, shape (n,).
        k: Pareto k, shape (n,).
        constant, off: whether the log likelihood is the same, or zero, at all draws, shape (n,).
        good_k: up to this k the densities can be trusted.
        weights: normalised importance weights, shape (n, S), or None if they were not asked for.
    """

    elpd_i: np.ndarray
    lpd_i: np.ndarray
    k: np.ndarray
    constant: np.ndarray
    off: np.ndarray
    good_k: float
    weights: np.ndarray | None

    @property
    def n(self) -> int:
        """The number of observations that are not switched off."""
        return int((~self.off).sum())

    @property
    def elpd(self) -> float:
        """Expected log pointwise predictive density."""
        return float(self.elpd_i.sum())

    @property
    def se(self) -> float:
        """Standard error of `elpd` over observations; NaN for a single one."""
        return float(np.sqrt(self.n * self.elpd_i[~self.off].var(ddof=1))) if self.n > 1 else np.nan

    @property
    def p(self) -> float:
        """Effective number of parameters."""
        return float((self.lpd_i - self.elpd_i).sum())

    def worst_first(self) -> list[int]:
        """Numbers of the observations that cannot be trusted, the largest k first."""
        return [int(i) for i in np.argsort(-self.k) if self.k[i] > self.good_k]


def scores_of(
    blocks: Iterable[tuple[int, np.ndarray]],
    size: int,
    draws: int,
    r_eff: float = 1.0,
    *,
    keep_weights: bool = False,
) -> Scores:
    """Leave-one-out densities from finite log likelihoods.

    Args:
        blocks: (the first observation's number, array (observation, draw)), which together hold
            every observation once.
        size, draws: numbers n of observations and S of draws.
        r_eff: relative efficiency of the draws.
        keep_weights: whether to return the n S importance weights, too.

    Source: Vehtari, Gelman, Gabry (2017), Statistics and Computing 27.
    """
    elpd, lpd, k = (np.empty(size) for _ in range(3))
    constant, off = (np.empty(size, bool) for _ in range(2))
    weights = np.empty((size, draws)) if keep_weights else None
    step = max(1, _SMOOTHED_BYTES // (8 * draws))
    for first, block in blocks:
        for begin in range(0, len(block), step):
            ll = np.ascontiguousarray(block[begin : begin + step], dtype=np.float64)
            at = slice(first + begin, first + begin + len(ll))
            log_weights, k[at] = convergence.psis(-ll, r_eff)
            elpd[at] = logsumexp(log_weights + ll, axis=1)
            lpd[at] = logsumexp(ll, axis=1) - np.log(draws)
            constant[at] = np.ptp(ll, axis=1) == 0
            off[at] = constant[at] & (ll[:, 0] == 0)
            if weights is not None:
                weights[at] = np.exp(log_weights)
    return Scores(elpd, lpd, k, constant, off, good_k(draws), weights)


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
