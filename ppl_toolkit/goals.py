"""When a run has drawn enough: effective draws and Monte Carlo errors that are asked for.

Draws are judged at numbers that are fixed beforehand, so that where a run ends depends on the seed
alone. Stopping at a precision that is itself estimated is right in the limit of a small error
(Glynn and Whitt 1992); that it is not met by luck early on is guarded by a least number of
effective draws, and by R-hat, which alone never ends a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppl_toolkit import convergence
from ppl_toolkit.errors import OptionError, SiteError
from ppl_toolkit.starts import start_numbers

__all__ = ["Goal", "Judge"]

_FIRST, _GROWTH = 100, 1.25  # draws per chain at which a run is judged first, and again
_LEAST_ESS = 100.0


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a run is to reach; it ends as soon as it has.

    A run is judged after 100 draws per chain, 125, 157 and so on, each time a quarter more. It
    ends when for every scalar of the sites the bulk and the tail effective sample size are at least
    ``ess`` (100 if only ``mcse`` is given), the Monte Carlo error of the mean is at most ``mcse``,
    and R-hat is at most ``r_hat``. Constants, and elements that are not always there, are left out.

    Args:
        ess: effective draws, of all chains together.
        mcse: Monte Carlo error of posterior means: a share of the posterior standard deviation,
            or a dictionary of errors by site, in the site's own units.
        sites: names of the sites that count; those of ``mcse`` if that is a dictionary, else all.
        r_hat: the most that R-hat (nested R-hat with ``superchains=``) may be.

    Raises:
        OptionError: neither ``ess`` nor ``mcse``, a number that is not positive, no names.

    Example:
        ``infer(model, y, draws=20_000, until=Goal(ess=1000))``
    """

    ess: float | None = None
    mcse: float | Mapping[str, float] | None = None
    sites: Sequence[str] | None = None
    r_hat: float = 1.01

    def __post_init__(self) -> None:
        if self.ess is None and (self.mcse is None or self.mcse == {}):
            raise OptionError("a Goal needs ess= or mcse=, such as Goal(ess=1000).")
        errors = self.mcse if isinstance(self.mcse, Mapping) else {"": self.mcse}
        numbers = {"ess": self.ess, **{f"mcse {k}".strip(): v for k, v in errors.items()}}
        for name, value in numbers.items():
            if value is not None and not (_is_number(value) and value > 0.0):
                raise OptionError(f"{name} of a Goal must be a positive number; got {value!r}.")
        if not (_is_number(self.r_hat) and self.r_hat > 1.0):
            raise OptionError(f"r_hat of a Goal must be a number above 1; got {self.r_hat!r}.")
        if not _is_list_of_names(self.sites):
            raise OptionError(f"sites of a Goal is a list of names; got {self.sites!r:.60}.")

    def check(self, names: Sequence[str]) -> None:
        """Refuse sites that a result will not have."""
        wanted = [*(self.sites or ()), *(self.mcse if isinstance(self.mcse, Mapping) else ())]
        if unknown := sorted(set(wanted) - set(names)):
            raise SiteError(f"the Goal names unknown sites {unknown}; the model has {list(names)}.")

    def counts(self, name: str) -> bool:
        """Whether a site is judged."""
        if isinstance(self.mcse, Mapping):
            return name in self.mcse or name in (self.sites or ())
        return self.sites is None or name in self.sites

    def __str__(self) -> str:
        parts = [f"ESS >= {self.ess:g}"] if self.ess is not None else []
        if isinstance(self.mcse, Mapping):
            parts += [f"MCSE of {name} <= {value:g}" for name, value in self.mcse.items()]
        elif self.mcse is not None:
            parts.append(f"MCSE <= {self.mcse:g} sd")
        of = f" of {', '.join(self.sites)}" if self.sites else ""
        return f"{', '.join(parts)}{of}, R-hat <= {self.r_hat:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _is_list_of_names(sites: Any) -> bool:
    if sites is None:
        return True
    is_list = isinstance(sites, Sequence) and not isinstance(sites, str)
    return is_list and len(sites) > 0 and all(isinstance(name, str) for name in sites)


def _further(number: int) -> int:
    return int(np.ceil(_GROWTH * number))


class Judge:
    """The draws of a run so far, and whether they meet a goal.

    Args:
        goal: what is asked for.
        superchains: groups of chains that share their starts, 0 if none do.

    Attributes:
        draws: per chain, so far; those that it was not shown are counted, too.
        missing: what was short of the goal when it was judged last; "" if nothing was.
    """

    def __init__(self, goal: Goal, superchains: int = 0) -> None:
        self.goal, self.superchains = goal, superchains
        self.draws = 0
        self.missing = f"fewer than {_FIRST} draws per chain"
        self._parts: dict[str, list[np.ndarray]] = {}

    @property
    def next(self) -> int:
        """The number of draws per chain at which the run is judged next."""
        number = _FIRST
        while number <= self.draws:
            number = _further(number)
        return number

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Draws (chain, draw, ...) by site."""
        for name, value in values.items():
            if self.goal.counts(name):
                self._parts.setdefault(name, []).append(value)
        self.draws += next(iter(values.values())).shape[1] if values else 0

    def done(self) -> bool:
        """Whether this is a number of draws to judge at, and all is as it should be."""
        number = _FIRST
        while number < self.draws:
            number = _further(number)
        if number != self.draws:
            return False
        found = [self._shortfall(name) for name in self._parts]
        short = [text for text in found if text]
        self.missing = short[0] if short else "" if self._parts else "no site to judge"
        return not self.missing

    def _shortfall(self, name: str) -> str:
        parts = self._parts[name]
        draws = parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
        self._parts[name] = [draws]
        table = draws.reshape(*draws.shape[:2], -1).astype(float)
        keep = np.all(np.isfinite(table), (0, 1)) & (np.ptp(table, (0, 1)) > 0.0)
        if not keep.any():
            return ""
        table = table[..., keep]
        least = _LEAST_ESS if self.goal.ess is None else self.goal.ess
        numbers = convergence.convergence(table)
        ess = float(np.min([numbers["ess_bulk"], numbers["ess_tail"]]))
        if not ess >= least:
            return f"{name} has {ess:.0f} effective draws of {least:g}"
        error = float(np.max(numbers["mcse_mean"] / (1.0 if self._absolute else numbers["sd"])))
        most = self.goal.mcse.get(name) if isinstance(self.goal.mcse, Mapping) else self.goal.mcse
        if most is not None and not error <= most:
            unit = "" if self._absolute else " sd"
            return f"{name} has a Monte Carlo error of {error:.2g}{unit}, not {most:g}{unit}"
        if self.superchains:
            groups = start_numbers(len(table), self.superchains)
            r_hat = float(np.max(convergence.rhat_nested(table, groups)))
        else:
            r_hat = float(np.max(numbers["r_hat"]))
        return "" if r_hat <= self.goal.r_hat else f"{name} has an R-hat of {r_hat:.3f}"

    @property
    def _absolute(self) -> bool:
        return isinstance(self.goal.mcse, Mapping)
