"""A result as the sections of a report see it: its estimates, and its draws, read when needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_toolkit.diagnostics.approximation import GROUP
from ppl_toolkit.diagnostics.findings import Finding, findings, least_ess, r_hat_limit
from ppl_toolkit.results import (
    posterior_group,
    scalar_labels,
    stats_group,
    summary,
    superchains_of,
)

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["View", "view"]

_COLUMNS = ("mean", "sd", "eti89_lb", "eti89_ub", "ess_bulk", "ess_tail", "r_hat", "mcse_mean",
            "mcse_sd")  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A result, its summary and its findings.

    Attributes:
        tree: the result.
        group: the group of its draws, "posterior" or "prior".
        table: `ppl_toolkit.summary` of the sites to show.
        sites: the site of every row of the table.
        places: where in its site a row's scalar lies (flat).
        found: the findings.
    """

    tree: xarray.DataTree
    group: str
    table: pandas.DataFrame
    sites: list[str]
    places: list[int]
    found: list[Finding]

    @property
    def draws(self) -> xarray.Dataset:
        """The group of the draws."""
        return self.tree[self.group].dataset

    @property
    def chains(self) -> int:
        """The number of chains."""
        return int(self.draws.sizes.get("chain", 0))

    @property
    def count(self) -> int:
        """The number of draws per chain."""
        return int(self.draws.sizes.get("draw", 0))

    @property
    def names(self) -> list[str]:
        """The sites shown, in the model's order."""
        return list(dict.fromkeys(self.sites))

    @property
    def stats(self) -> xarray.Dataset | None:
        """The sampler's statistics, if there are any."""
        name = stats_group(self.group)
        return self.tree[name].dataset if name in self.tree.children else None

    @property
    def approximate(self) -> bool:
        """Whether the draws are independent ones of an approximation."""
        return GROUP in self.tree.children

    @property
    def superchains(self) -> int:
        """Groups of chains that share their starts; 0 if none do."""
        return superchains_of(self.tree)

    @property
    def r_hat_name(self) -> str:
        """What the column r_hat of the table is."""
        return "nested R-hat" if self.superchains > 1 else "R-hat"

    @property
    def r_hat_limit(self) -> float:
        """The largest R-hat of chains that may be used."""
        return r_hat_limit(self.superchains, self.chains, max(self.count, 1))

    @property
    def least_ess(self) -> int:
        """The effective sample size below which estimates count as noisy."""
        return least_ess(self.superchains, self.chains)

    @property
    def enough_for_ess(self) -> bool:
        """Whether there are draws enough to expect that effective sample size."""
        return not self.approximate and self.count * self.chains >= 2 * self.least_ess

    def attribute(self, name: str) -> Any:
        """An attribute of the run, or None."""
        value = self.tree.attrs.get(name)
        return None if value is None or value == "" else value

    @property
    def trans_dimensional(self) -> dict[str, str]:
        """Plates whose number of active elements is unknown, with the site of that number."""
        try:
            found = json.loads(self.attribute("trans_dimensional") or "{}")
        except (ValueError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def ragged(self) -> list[str]:
        """Sites over such plates: their inactive elements are NaN."""
        plates = set(self.trans_dimensional)
        return [str(n) for n, v in self.draws.data_vars.items() if plates & set(v.dims)]

    def without(self, names: Sequence[str]) -> View:
        """The view of the other sites."""
        keep = [i for i, site in enumerate(self.sites) if site not in names]
        if len(keep) == len(self.sites):
            return self
        return dataclasses.replace(
            self,
            table=self.table.iloc[keep],
            sites=[self.sites[i] for i in keep],
            places=[self.places[i] for i in keep],
        )

    def scalar(self, row: int) -> NDArray[np.float64]:
        """The draws of a row of the table, shape (chain, draw)."""
        return self.scalar_of(self.draws, self.sites[row], self.places[row])

    def scalar_of(self, draws: xarray.Dataset, site: str, place: int) -> NDArray[np.float64]:
        """The draws of one element of a site in some group, shape (chain, draw)."""
        array = draws[site].transpose("chain", "draw", ...)
        index = np.unravel_index(place, array.shape[2:]) if array.ndim > 2 else ()
        return np.asarray(array[(slice(None), slice(None), *map(int, index))], dtype=float)

    def site(self, name: str) -> NDArray[np.float64]:
        """All draws of a site, shape (draw of any chain, element)."""
        array = self.draws[name].transpose("chain", "draw", ...)
        return np.asarray(array, dtype=float).reshape(self.chains * self.count, -1)

    def fails(self, column: str) -> NDArray[np.bool_]:
        """Which rows miss a threshold in a column of the table."""
        values = np.asarray(self.table[column], dtype=float)
        with np.errstate(invalid="ignore"):
            if column == "r_hat":
                return values > self.r_hat_limit
            if column in ("ess_bulk", "ess_tail") and self.enough_for_ess:
                return values < self.least_ess
        return np.zeros(len(values), dtype=bool)

    def worst(self, most: int) -> list[int]:
        """Rows in order of need: the largest R-hat first, then the smallest ESS.

        Rows without any convergence numbers (constants) come last.
        """
        r_hat = np.nan_to_num(np.asarray(self.table["r_hat"], dtype=float), nan=0.0)
        bulk = np.asarray(self.table["ess_bulk"], dtype=float)
        ess = np.fmin(bulk, np.asarray(self.table["ess_tail"], dtype=float))
        above = np.maximum(r_hat - self.r_hat_limit, 0.0)
        order = np.lexsort((np.nan_to_num(ess, nan=np.inf), -above))
        varying = np.asarray(self.table["sd"], dtype=float) > 0
        return [int(i) for i in order if varying[i]][:most]


def view(tree: xarray.DataTree, var_names: Sequence[str] | str | None = None) -> View:
    """The view of a result.

    Raises:
        SiteError: a site is not there.
        DataError: this is no result, or it has no draws' group.
    """
    group = posterior_group(tree)
    draws = tree[group].dataset
    if draws.sizes.get("draw", 0) * draws.sizes.get("chain", 0):
        table = summary(tree, var_names)
    else:
        table = _empty_summary(draws, var_names)
    chosen = [var_names] if isinstance(var_names, str) else list(var_names or draws.data_vars)
    sites: list[str] = []
    places: list[int] = []
    for name in map(str, chosen):
        size = int(np.prod([n for d, n in draws[name].sizes.items() if d not in ("chain", "draw")]))
        sites += [name] * size
        places += range(size)
    return View(tree, group, table, sites, places, findings(tree))


def _empty_summary(
    draws: xarray.Dataset, var_names: Sequence[str] | str | None
) -> pandas.DataFrame:
    """A run without draws has sites, but no numbers."""
    import pandas

    from ppl_toolkit.errors import SiteError

    names = [var_names] if isinstance(var_names, str) else list(var_names or draws.data_vars)
    if unknown := [name for name in names if name not in draws.data_vars]:
        raise SiteError(f"no sites {unknown} in this result; it has {list(draws.data_vars)}.")
    labels = [
        label
        for name in names
        for label in scalar_labels(draws[name].transpose("chain", "draw", ...))
    ]
    return pandas.DataFrame(np.nan, index=labels, columns=list(_COLUMNS))
