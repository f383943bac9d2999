"""Simulation-based calibration: does a method draw from the posterior of this model?

Draw parameters from the prior and data given them. If the method is right, the rank of the true
value among posterior draws is uniform, for every function of parameters and data.

Source: Talts et al. (2018), arXiv:1804.06788; Modrák et al. (2023), Bayesian Analysis, for
functions of the data, such as the log likelihood; Säilynoja et al. (2022) for the exact bands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ppl_toolkit import convergence, results
from ppl_toolkit.arguments import with_data
from ppl_toolkit.diagnostics.ecdf import band, p_value
from ppl_toolkit.diagnostics.simulation import (
    Quantities,
    Simulator,
    holm,
    quantity_names,
    rejected,
    table,
    with_observed,
)
from ppl_toolkit.engine import Block, Engine
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference import as_method
from ppl_toolkit.many_runs import run_data_sets
from ppl_toolkit.program import Program
from ppl_toolkit.progress import progress_for

if TYPE_CHECKING:
    import xarray

__all__ = ["Calibration", "calibrate"]

_LEVEL = 1e-3
_PILOTS = 10
_MOST_THINNING = 20


class Calibration(NamedTuple):
    """What simulation-based calibration found.

    Attributes:
        ranks: rank of the true value among ``draws`` posterior draws, (quantity, replication).
        draws: posterior draws per replication, L: ranks run from 0 to L.
        p_values: exact p-value of uniformity by quantity.
        adjusted: the same, corrected by Holm for the number of quantities.
        level: family level below which a quantity counts as not calibrated.
        thinning: iterations per draw.
        method: what was checked.
    """

    ranks: xarray.DataArray
    draws: int
    p_values: dict[str, float]
    adjusted: dict[str, float]
    level: float
    thinning: int
    method: str

    @property
    def failed(self) -> list[str]:
        """Quantities whose ranks are not uniform, the worst first."""
        return rejected(self.p_values, self.adjusted, self.level)

    @property
    def ok(self) -> bool:
        """Whether every quantity passed; wrongly False with probability ``level`` at most."""
        return not self.failed

    def worst(self, most: int) -> list[str]:
        """The quantities with the smallest p-values, at most so many."""
        return sorted(self.p_values, key=self.p_values.__getitem__)[:most]

    @property
    def points(self) -> np.ndarray:
        """Normalised ranks (0, 1] at which distribution functions are compared, (draws + 1,)."""
        return np.arange(1, self.draws + 2) / (self.draws + 1)

    def difference(self, name: str) -> np.ndarray:
        """The distribution function of a quantity's ranks minus the uniform one, at `points`."""
        row = self.ranks.sel(quantity=name).values
        counts = np.bincount(row, minlength=self.draws + 1)
        return np.cumsum(counts) / row.size - self.points

    def band(self, joint: float) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper limits of such differences, all of which hold with this probability."""
        size = self.ranks.sizes["replication"]
        limits = band(size, self.points, joint)
        return limits.low / size - self.points, limits.high / size - self.points

    def tree(self) -> xarray.DataTree:
        """Normalised ranks as `arviz.plot_ecdf_pit(tree, group="prior_sbc")` takes them."""
        import xarray

        scaled = (self.ranks + 0.5) / (self.draws + 1)
        data = scaled.to_dataset("quantity").rename({"replication": "draw"}).expand_dims("chain")
        return xarray.DataTree.from_dict({"prior_sbc": data})

    def __str__(self) -> str:
        count = self.ranks.sizes["replication"]
        head = (
            f"{self.method}: {len(self.p_values)} quantities, {count} data sets, ranks among "
            f"{self.draws} draws (one of {self.thinning} iterations kept)."
        )
        if self.ok:
            least = min(self.adjusted, key=self.adjusted.__getitem__)
            verdict = (
                f"Nothing contradicts calibration (least p-value {self.adjusted[least]:.3g}, of "
                f"{least}, corrected for {len(self.p_values)} tests)."
            )
            return f"{head}\n{verdict}"
        lines = [
            f"  {name}: p = {self.adjusted[name]:.2g}, {self._shape(name)}" for name in self.failed
        ]
        return "\n".join([head, "Not calibrated:", *lines])

    def _shape(self, name: str) -> str:
        """What the ranks look like, and what that means."""
        u = (self.ranks.sel(quantity=name).values + 0.5) / (self.draws + 1)
        shift = (u.mean() - 0.5) * np.sqrt(12 * u.size)
        spread = (np.mean((u - 0.5) ** 2) - 1 / 12) * np.sqrt(180 * u.size)
        if abs(shift) > abs(spread):
            return f"the draws are too {'low' if shift > 0 else 'high'}"
        return f"the draws are too {'narrow' if spread > 0 else 'wide'}"


def calibrate(
    model: Callable,
    *args: Any,
    method: Any = "nuts",
    replications: int = 1000,
    draws: int = 99,
    warmup: int = 500,
    thinning: int | None = None,
    quantities: Quantities | None = None,
    seed: int = 0,
    level: float = _LEVEL,
    progress: bool | str = "auto",
    threads: int | None = None,
    precision: str = "float64",
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Calibration:
    """Check a method on a model by simulation-based calibration.

    Args:
        model, *args, **kwargs: the model and its arguments. Observed arrays give the shapes of the
            data that are simulated; their values do not matter.
        method: as in `infer`: a name or a method object.
        replications: simulated data sets R.
        draws: posterior draws L per data set, after thinning.
        warmup: warm-up iterations on every data set.
        thinning: iterations per draw; chosen from the first data sets if None, so that draws are
            nearly independent.
        quantities: further functions of the sites, ``{site: value} -> {name: scalar}``, of JAX
            arrays. Every scalar of every site, the log likelihood and the log joint density are
            always among the quantities.
        seed, progress, threads, precision, data: as in `infer`.
        level: family level of the verdict.

    Returns:
        Ranks, exact p-values, and a verdict that is wrong with probability ``level`` at most when
        the method is right. Print it.

    Raises:
        MethodError: the prior is improper, or sites are summed out or subsampled.
        DataError: the model observes nothing, or computes what it observes.

    Cost: R (warmup + L thinning) iterations, by programs compiled once for all data sets. Threads
    take one data set after the other: in lock step (`jax.vmap`) NUTS would cost 5 to 46 times the
    CPU, the more the more data sets go together (benchmarks/README.md).
    """
    for name, value, least in (
        ("replications", replications, 20), ("draws", draws, 9), ("warmup", warmup, 0),
        ("thinning", thinning, 1),
    ):  # fmt: skip
        if value is not None and (not isinstance(value, int) or value < least):
            raise OptionError(f"{name} must be an integer >= {least}; got {value!r}.")
    if not 0 < level < 1:
        raise OptionError(f"level must lie between 0 and 1; got {level}.")
    seed = results.checked_seed(seed)
    program = Program(model, args, with_data(model, kwargs, data), precision=precision)
    chosen = as_method(method)
    chosen.check(program)
    summed_out = "log_density" in chosen.needs
    simulator = Simulator.of(program, quantities, draws, summed_out)
    engine = Engine(program, chosen, 1, jax.local_devices()[:1])
    truths = simulator.joints(program, replications, seed)
    data_sets = [with_observed(program, truth["observed"]) for truth in truths]
    engine.compile("advance", "init")
    if thinning is None:
        pilot = run_data_sets(engine, data_sets[:_PILOTS], seed, warmup, 4 * draws, threads)
        thinning = _thinning(pilot)
    label = f"calibrating {type(chosen).__name__}"
    with progress_for(progress, label, 0, 0, replications, "data sets") as shown:
        blocks = run_data_sets(
            engine, data_sets, seed, warmup, draws * thinning, threads,
            lambda done: shown.update(done, {}),
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    names = quantity_names(program, truths[0]["quantities"])
    ranks = np.empty((len(names), replications), int)
    with program.context():
        for i, (truth, block) in enumerate(zip(truths, blocks, strict=True)):
            sites = {k: v[0, thinning - 1 :: thinning] for k, v in block.values.items()}
            drawn = table(simulator.measure(sites, data_sets[i]), draws)
            ranks[:, i] = _ranks(table(truth["quantities"], 1)[0], drawn, rng)
    return _verdict(names, ranks, draws, level, thinning, repr(chosen))


def _thinning(pilot: Sequence[Block]) -> int:
    """Iterations per nearly independent draw: the median over data sets of the slowest scalar."""
    times = []
    for block in pilot:
        for values in block.values.values():
            flat = np.asarray(values, float).reshape(*values.shape[:2], -1)
            effective = np.atleast_1d(convergence.ess(flat))
            times.append(flat.shape[1] / np.nanmin(effective, initial=flat.shape[1]))
    per_set = np.reshape(times, (len(pilot), -1)).max(axis=1)
    return int(np.clip(np.ceil(np.median(per_set)), 1, _MOST_THINNING))


def _ranks(true: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ranks of true values (scalar,) among draws (draw, scalar); ties are broken at random."""
    below, ties = (drawn < true).sum(axis=0), (drawn == true).sum(axis=0)
    return below + rng.integers(0, ties + 1)


def _verdict(
    names: Sequence[str], ranks: np.ndarray, draws: int, level: float, thinning: int, method: str
) -> Calibration:
    import xarray

    varies = [bool(np.ptp(row)) for row in ranks]
    kept = [name for name, flag in zip(names, varies, strict=True) if flag]
    kept_ranks = ranks[np.asarray(varies)]
    size = kept_ranks.shape[1]
    points = np.arange(1, draws + 2) / (draws + 1)
    test = functools.partial(p_value, size=size, points=points)
    found = {
        name: test(np.cumsum(np.bincount(row, minlength=draws + 1)))
        for name, row in zip(kept, kept_ranks, strict=True)
    }
    array = xarray.DataArray(
        kept_ranks,
        dims=("quantity", "replication"),
        coords={"quantity": kept, "replication": np.arange(size)},
        name="rank",
    )
    return Calibration(array, draws, found, holm(found), level, thinning, method)
