"""Model comparison: a table that ranks models of the same data by leave-one-out prediction."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_toolkit.diagnostics.leave_one_out import LOO, loo
from ppl_toolkit.errors import DataError, InferenceWarning, OptionError, PPLError

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["compare"]

_WEIGHTS = ("stacking", "bb-pseudo-bma", "pseudo-bma")
_SMALLEST_LOG = -700.0  # exp of much less is zero


def compare(
    models: Mapping[str, xarray.DataTree | LOO],
    method: str = "stacking",
    *,
    var_name: str | None = None,
) -> pandas.DataFrame:
    """Rank models of the same data by how well they predict what they have not seen.

    Args:
        models: for every model a `LOO`, or a result with the group `log_likelihood`.
        method: how weights for averaging the predictions are found: "stacking" (the best average),
            "bb-pseudo-bma" (exponentials of elpd, smoothed by the Bayesian bootstrap) or
            "pseudo-bma" (without).
        var_name: the observed variable of results that have several.

    Returns:
        One row per model, the best first. Columns: rank (0 is the best); elpd; elpd_diff, its
        difference from the best (negative or zero), and dse, the standard error of that; p; se (by
        the bootstrap for "bb-pseudo-bma"); weight; warning. The numbers are those of
        ``arviz.compare`` 1.3.

    Raises:
        OptionError: an unknown method, or fewer than two models.
        DataError: the models have other observations, or what is given is no result.

    Source: Yao, Vehtari, Simpson, Gelman (2018), Bayesian Analysis 13(3); Sivula, Magnusson,
    Matamoros, Vehtari (2025), Bayesian Analysis, on when dse can be trusted.
    """
    import arviz_stats
    import pandas
    import xarray

    if not isinstance(models, Mapping) or len(models) < 2:
        raise OptionError(
            "compare takes a dictionary of two models or more: "
            "compare({'normal': first, 'heavy tails': second})."
        )
    if not isinstance(method, str) or method.lower() not in _WEIGHTS:
        raise OptionError(f"method must be one of {', '.join(_WEIGHTS)}; got {method!r}.")
    estimates = {name: _estimate(name, value, var_name) for name, value in models.items()}
    _require_same_observations(estimates)
    values = {name: found.elpd_i.values.ravel() for name, found in estimates.items()}
    shapes = {name: found.pareto_k.values.ravel() for name, found in estimates.items()}
    # What a mask switches off in every model is no observation.
    off = np.all([(values[name] == 0) & np.isnan(shapes[name]) for name in models], axis=0)
    best = np.max(list(values.values()), axis=0)
    # Stacking takes exponentials of elpd_i, and a common factor of each leaves the weights alone.
    underflows = method.lower() == "stacking" and (best < _SMALLEST_LOG).any()
    elpds = {}
    for name, found in estimates.items():
        pointwise = values[name] - best if underflows else values[name]
        elpds[name] = arviz_stats.ELPDDataLOO(
            elpd=found.elpd,
            se=found.se,
            p=found.p,
            n_samples=found.n_draws,
            n_data_points=found.n,
            scale="log",
            warning=bool(found.failed),
            good_k=found.good_k,
            elpd_i=xarray.DataArray(pointwise[~off], dims=["observation"]),
        )
    table = arviz_stats.compare(elpds, method=method, round_to="none")
    notes = [
        "; ".join(_notes(estimates[name], str(table.loc[name, "diag_diff"])))
        for name in table.index
    ]
    columns = ["rank", "elpd", "elpd_diff", "dse", "p", "se", "weight"]
    return table[columns].assign(warning=pandas.Series(notes, table.index, dtype=object))


def _estimate(name: str, value: Any, var_name: str | None) -> LOO:
    if isinstance(value, LOO):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InferenceWarning)  # a column says so
            return loo(value, var_name=var_name)
    except PPLError as error:
        error.add_note(f"This is about the model {name!r} of compare.")
        raise


def _require_same_observations(estimates: Mapping[str, LOO]) -> None:
    (first, reference), *others = estimates.items()
    for name, found in others:
        sizes = reference.elpd_i.size, found.elpd_i.size
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{first!r} has {sizes[0]} observations but {name!r} has {sizes[1]}: predictions "
                "can be compared only of the same observations, one by one."
            )
        if reference.observed and found.observed and reference.observed != found.observed:
            raise DataError(
                f"{first!r} and {name!r} have different observed values (or the same in another "
                "order), so their predictions cannot be compared. For a transformed response, add "
                "the log Jacobian to each log likelihood: model the original with "
                "numpyro.distributions.TransformedDistribution."
            )


def _notes(found: LOO, difference: str) -> Iterator[str]:
    """What the row of a model must be read with; the reasons of LOO in short."""
    if found.failed:
        yield f"k above {found.good_k:.2f} for {len(found.failed)} of {found.n}"
    elif found.warning:
        yield found.warning.splitlines()[0]
    if difference == "N < 100":
        yield "fewer than 100 observations: dse may be too small"
    elif difference:
        yield "small difference: dse may be too small"
