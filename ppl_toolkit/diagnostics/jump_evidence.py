"""Reversible jumps against evidences: two independent ways to the posterior of a model's number.

A sampler that jumps between models visits model k with probability p(k | y). The same follows from
the evidences p(k) p(y | k), each estimated by sequential Monte Carlo inside model k alone, which
knows of no jump: a wrong acceptance ratio of the jumps shows as a difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from numpyro import handlers
from scipy import stats
from scipy.special import logsumexp

from ppl_toolkit import convergence, results
from ppl_toolkit.arguments import with_data
from ppl_toolkit.diagnostics.evidence import combined
from ppl_toolkit.diagnostics.simulation import holm
from ppl_toolkit.errors import (
    DataBakedWarning,
    DataError,
    InferenceWarning,
    MethodError,
    ModelError,
    OptionError,
    SiteError,
)
from ppl_toolkit.front_door import infer
from ppl_toolkit.inference.smc import SMC
from ppl_toolkit.program import Program
from ppl_toolkit.progress import progress_for

if TYPE_CHECKING:
    import pandas
    import xarray

    from ppl_toolkit.sites import Site

__all__ = ["CrossCheck", "compared", "cross_check", "cross_checks"]

_LEVEL = 1e-3
_THRESHOLD = 0.01
_RUNS = 8
_PREFIX = "cross_check_"
_NOISY = 0.5  # standard error of a log evidence


class CrossCheck(NamedTuple):
    """Posterior probabilities of a number by jumps, and by evidences.

    Attributes:
        table: a row for every value that was compared: ``jumps`` and its Monte Carlo standard error
            ``mcse``; ``smc`` and its standard error ``se``; ``z``, their difference in standard
            errors of it; ``p``, its p-value, corrected by Holm for the number of values;
            ``log_evidence``, log p(k) p(y | k), and ``log_evidence_se``.
        site: the integer site.
        left_out: probability, by the jumps, of the values that were not compared; both kinds of
            probabilities are given the values that were.
        resolution: the smallest difference that would have counted, of the least certain value.
        level: family level of the verdict.
        runs: independent runs of SMC for every value.
        method: of these.
    """

    table: pandas.DataFrame
    site: str
    left_out: float
    resolution: float
    level: float
    runs: int
    method: str

    @property
    def failed(self) -> list[int]:
        """Values whose probabilities differ, the worst first."""
        p = self.table["p"].sort_values(kind="stable")
        return [int(value) for value in p.index[p < self.level]]

    @property
    def ok(self) -> bool:
        """Whether nothing differs; wrongly False with probability ``level`` at most."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """What to make of it, in words."""
        if self.ok:
            words = (
                f"Nothing contradicts the jumps (least p-value {self.table['p'].min():.2g}, "
                f"corrected for {len(self.table)} values; a false alarm once in "
                f"{1 / self.level:,.0f} checks). "
            )
            words += (
                f"Differences from {self.resolution:.2g} on would have counted."
                if self.resolution < 1
                else "But no difference would have counted: take more runs (chains=)."
            )
        else:
            values = ", ".join(map(str, self.failed))
            words = (
                f"Jumps and evidences disagree about {self.site} = {values} (least p-value "
                f"{self.table['p'].min():.2g}, corrected for {len(self.table)} values; a false "
                f"alarm once in {1 / self.level:,.0f} checks). Either a move is wrong, or the "
                f"chains have not mixed (R-hat and the number of jumps of {self.site} tell), or "
                "SMC lost a part of the posterior (more particles, or more moves)."
            )
        if (self.table["log_evidence_se"] > _NOISY).any():
            words += (
                f" A log evidence has a standard error above {_NOISY}, so that its errors are "
                "themselves uncertain: use more particles."
            )
        return words

    def __str__(self) -> str:
        shown = self.table[["jumps", "mcse", "smc", "se", "z"]]
        formats = {"z": "{:+.1f}".format}
        numbers = shown.to_string(
            float_format="{:.4f}".format, formatters=formats, index_names=False
        )
        head = (
            f"Posterior of {self.site}: by jumps, and by evidences from {self.runs} runs of SMC "
            f"given each value ({self.left_out:.2%} left out)."
        )
        return f"{head}\n{numbers}\n{self.verdict}"

    def attached(self, tree: xarray.DataTree) -> xarray.DataTree:
        """The result with this in a group of its own, which its page shows."""
        own = self._asdict()
        group = own.pop("table").rename_axis("value").to_xarray()
        return results.with_groups(tree, {f"{_PREFIX}{self.site}": group.assign_attrs(own)})


def cross_checks(tree: xarray.DataTree) -> list[CrossCheck]:
    """The checks that are attached to a result."""
    found = []
    for name, group in tree.children.items():
        if name.startswith(_PREFIX):
            attrs = group.attrs
            own = {n: attrs[n] for n in CrossCheck._fields if n != "table"}
            found.append(CrossCheck(group.dataset.to_dataframe(), **own))
    return found


def cross_check(
    tree: xarray.DataTree,
    model: Callable,
    *args: Any,
    site: str | None = None,
    values: Sequence[int] | None = None,
    threshold: float = _THRESHOLD,
    method: SMC | None = None,
    chains: int = _RUNS,
    seed: int = 0,
    level: float = _LEVEL,
    progress: bool | str = "auto",
    threads: int | None = None,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> CrossCheck:
    """Check the probabilities of a sampler that jumps between models by their evidences.

    For every value k of the number, the model is conditioned on it and SMC run from the prior
    given k: its evidence is p(k) p(y | k), the prior mass of k included, and does not depend on
    any jump.

    Args:
        tree: a result of `infer` by reversible jumps (or by any other sampler).
        model, *args, **kwargs, data: the model and the arguments of the run.
        site: an integer latent site without dimensions; the one that says how many elements of a
            masked plate there are, or which case, if None.
        values: of the site, to compare; those with a posterior probability of ``threshold`` or more
            if None.
        threshold: see ``values``.
        method: what estimates the evidences, such as ``SMC(particles=4096)``; its kernel must move
            all sites but this one. `SMC()` if None.
        chains: independent runs of it for every value, from whose spread the errors are found.
        seed: of these.
        level: family level of the verdict.
        progress, threads: as in `infer`.

    Returns:
        A table and a verdict, which wrongly says that they differ with probability ``level`` at
        most if both samplers are right. Print it; ``.attached(tree)`` puts it on the result's page,
        and `diagnostics.plots.cross_check` draws it.

    Raises:
        SiteError: there is no such site, none, or more than one to choose from.
        ModelError, DataError: the model or the data are not those of the result; a value was never
            visited, or there are not two values to compare.
        MethodError: the prior is improper, or SMC cannot serve the model.
        OptionError: options out of their range.
        SamplingError: SMC did not come to the posterior.

    Errors: the jumps' from the effective sample size of each value's indicator, given the values
    compared (and not below that of a sampler with that efficiency and the probabilities of SMC);
    those of SMC by the delta method from the spread of the runs. Their difference is referred to
    Student's distribution with the degrees of freedom of Welch (1947), Biometrika 34.

    Cost: ``chains`` runs of SMC for every value; one program is compiled for all of them.
    """
    _check_options(threshold, chains, level, method)
    seed = results.checked_seed(seed)
    results.require_tree(tree)
    program = Program(
        model,
        args,
        with_data(model, kwargs, data),
        precision=tree.attrs.get("precision", "float64"),
    )
    number = _number(program, site)
    drawn = _drawn(tree, number)
    _require_same(program, tree)
    chosen = _chosen(drawn, number.name, values, threshold)
    logs = []
    with progress_for(progress, "evidences", 0, 0, len(chosen), "values") as shown:
        for done, value in enumerate(chosen, start=1):
            run = _run_given(
                program, number, value, method or SMC(), chains, (seed + done) % 2**64, threads
            )
            logs.append(np.asarray(run["sample_stats"].dataset["log_evidence"])[:, 0])
            shown.update(done, {})
    table, resolution = compared(drawn, chosen, np.array(logs), level)
    left_out = 1.0 - float(np.isin(drawn, chosen).mean())
    return CrossCheck(
        table, number.variable, left_out, resolution, level, chains, repr(method or SMC())
    )


def compared(
    drawn: ArrayLike, values: Sequence[int], logs: ArrayLike, level: float = _LEVEL
) -> tuple[pandas.DataFrame, float]:
    """Probabilities of values among draws, and by independent estimates of their evidences.

    Args:
        drawn: integers, shape (chain, draw).
        values: K of them.
        logs: log evidences, shape (K, run); their exponentials are unbiased up to one factor.
        level: family level, for the resolution.

    Returns:
        (the table of `CrossCheck`, its resolution)
    """
    import pandas

    drawn, logs = np.asarray(drawn), np.asarray(logs, float)
    count, runs = logs.shape
    estimates = [combined(row) for row in logs]
    log_z, e = np.array([z.log for z in estimates]), np.array([z.se for z in estimates])
    q = np.exp(log_z - logsumexp(log_z))
    # dq_k = q_k sum_j (1{j = k} - q_j) dlog Z_j
    parts = (q[:, None] * (np.eye(count) - q) * e) ** 2
    se = np.sqrt(parts.sum(axis=1))

    is_k = drawn[:, :, None] == np.asarray(values)
    inside = is_k.any(axis=2, keepdims=True)
    share = is_k.mean(axis=(0, 1)) / inside.mean()
    mcse = np.asarray(convergence.mcse((is_k - share * inside) / inside.mean()), float)
    spread = share * (1.0 - share)
    wanted = np.sqrt(np.maximum(q * (1.0 - q) / np.where(spread > 0, spread, 1.0), 1.0))

    total = (wanted * mcse) ** 2 + se**2
    difference, error = share - q, np.sqrt(total)
    z = difference / error
    with np.errstate(divide="ignore"):
        freedom = total**2 / ((parts**2).sum(axis=1) / (runs - 1))
    p = 2.0 * stats.t.sf(np.abs(z), freedom)
    adjusted = holm(dict(zip(map(str, values), p.tolist(), strict=True)))
    critical = stats.t.isf(0.5 * level / count, freedom) * error
    columns = {
        "jumps": share, "mcse": mcse, "smc": q, "se": se, "z": z,
        "p": [adjusted[str(value)] for value in values],
        "log_evidence": log_z, "log_evidence_se": e,
    }  # fmt: skip
    return pandas.DataFrame(columns, index=[int(v) for v in values]), float(critical.max())


class _Given:
    """A model with one more argument: the value of a site."""

    def __init__(self, model: Callable, site: str) -> None:
        self.model, self.site = model, site
        self.__name__ = getattr(model, "__name__", type(model).__name__)

    def __call__(self, value: Any, args: tuple, kwargs: dict) -> None:
        handlers.condition(self.model, data={self.site: value})(*args, **kwargs)


def _run_given(
    program: Program,
    number: Site,
    value: int,
    method: Any,
    chains: int,
    seed: int,
    threads: int | None,
) -> xarray.DataTree:
    """Runs of SMC from the prior given a value of the number."""
    args, kwargs = program.arguments.rebuild(program.arguments.arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        warnings.simplefilter("ignore", DataBakedWarning)
        run = infer(
            _Given(program.model, number.name),
            np.asarray(value, number.dtype),
            args,
            kwargs,
            method=method,
            draws=1,
            chains=chains,
            seed=seed,
            precision=program.precision,
            progress=False,
            threads=threads,
        )
    if run.attrs["interrupted"]:
        raise KeyboardInterrupt
    return run


# -- what is refused -------------------------------------------------------------------------------


def _check_options(threshold: Any, chains: Any, level: Any, method: Any) -> None:
    for name, share in (("threshold", threshold), ("level", level)):
        if not 0.0 < share < 1.0:
            raise OptionError(f"{name} must lie between 0 and 1; got {share!r}.")
    if isinstance(chains, bool) or not isinstance(chains, int) or chains < 3:
        raise OptionError(
            f"chains must be an integer >= 3, for their spread tells the error; got {chains!r}."
        )
    if method is not None and not isinstance(method, SMC):
        raise OptionError(f"method must be an SMC(...); got {method!r:.80}.")


def _number(program: Program, name: str | None) -> Site:
    """The site whose values are compared."""
    layout = program.layout
    known = [*(plate.number for plate in layout.plates), *(cases.number for cases in layout.cases)]
    latent = {site.name: site for site in program.latent}
    known = [number for number in dict.fromkeys(known) if number in latent]
    if name is None:
        if len(known) != 1:
            raise SiteError(
                f"the number of a masked plate, or of a case, is wanted, and this model has "
                f"{known or 'none'}. Say which integer site to compare: cross_check(..., site=)."
            )
        name = known[0]
    if name not in latent or not latent[name].discrete or latent[name].shape:
        whole = [site.name for site in program.discrete if not site.shape]
        raise SiteError(
            f"cross_check compares the values of one integer latent site without dimensions; "
            f"{name!r} is none. There are {whole}."
        )
    return latent[name]


def _drawn(tree: xarray.DataTree, number: Site) -> np.ndarray:
    draws = tree[results.posterior_group(tree)].dataset
    if number.variable not in draws or draws[number.variable].ndim != 2:
        raise SiteError(
            f"the result has no draws of {number.variable!r}; it has {list(draws.data_vars)}."
        )
    return np.asarray(draws[number.variable].transpose("chain", "draw")).astype(np.int64)


def _require_same(program: Program, tree: xarray.DataTree) -> None:
    if tree.attrs.get("model_hash") != program.model_hash:
        raise ModelError("this model is not that of the result; cross_check needs the same one.")
    if tree.attrs.get("data_hash") != program.data_hash:
        raise DataError("these data are not those of the result; cross_check needs the same ones.")
    if flat := [site.name for site in program.latent if not site.proper]:
        raise MethodError(
            f"sites {flat} have flat (improper) priors, so that there is no evidence to compare "
            "with. Give them proper priors."
        )


def _chosen(
    drawn: np.ndarray, name: str, values: Sequence[int] | None, threshold: float
) -> list[int]:
    """The values to compare, in increasing order."""
    seen, counts = np.unique(drawn, return_counts=True)
    share = dict(zip(seen.tolist(), (counts / drawn.size).tolist(), strict=True))
    if values is None:
        chosen = [value for value, p in share.items() if p >= threshold]
    else:
        chosen = sorted({int(value) for value in values})
        if never := [value for value in chosen if value not in share]:
            raise DataError(
                f"{name} was never {never} in the draws, so that their probability there has no "
                f"known error; it was {sorted(share)}. Draw more, or leave these values out."
            )
    if len(chosen) < 2:
        raise DataError(
            f"two values of {name} or more are needed to compare; those seen, and their shares: "
            f"{ {value: round(p, 4) for value, p in share.items()} }. If others should be possible,"
            " the chains may have never left the model they began in: draw more, or say values=."
        )
    return chosen
