"""Predictive checks: are data like those observed what the model expects?

Source: Gelman, Meng, Stern (1996), Posterior predictive assessment of model fitness via realized
discrepancies, Statistica Sinica 6; Box (1980) for the prior form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_toolkit.diagnostics.findings import Finding
from ppl_toolkit.errors import DataError, OptionError
from ppl_toolkit.front_door import infer
from ppl_toolkit.predictions import predict
from ppl_toolkit.results import require_tree

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["check_findings", "check_posterior", "check_prior"]

Statistics = Mapping[str, Callable[[np.ndarray], np.ndarray]]

_ALARM = 0.005  # in either tail
_DRAWS = 500

STATISTICS: Statistics = {
    "mean": lambda y: y.mean(axis=-1),
    "sd": lambda y: y.std(axis=-1),
    "min": lambda y: y.min(axis=-1),
    "max": lambda y: y.max(axis=-1),
}
"""The usual statistics, as functions over the last axis."""


def check_posterior(
    tree: xarray.DataTree,
    model: Callable | None = None,
    *args: Any,
    statistics: Statistics | None = None,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> pandas.DataFrame:
    """Compare statistics of the observed data with those of posterior predictive data.

    Args:
        tree: a result of `infer`.
        model, *args, **kwargs, data: the model and the arguments of the run, unless the result has
            a `posterior_predictive` group already (`predict`).
        statistics: functions of a data set, ``{name: function over the last axis}``; mean, standard
            deviation, smallest and largest value if None. What a mask hides is left out.
        seed: of the predictions.

    Returns:
        A row for every observed site and statistic: the observed value, the 5%, 50% and 95%
        quantiles under the model, and ``p_low`` and ``p_high``, the shares of predicted values at
        or below and at or above it. A small one says that the model does not make such data.

    Raises:
        DataError: there are no predictions and no model is given, or its arguments are not those of
            the run, or nothing is observed.
    """
    require_tree(tree)
    if "posterior_predictive" not in tree.children:
        if model is None:
            raise DataError(
                "this result has no posterior_predictive group. Pass the model and its arguments: "
                "check_posterior(result, model, *data)."
            )
        tree = predict(tree, model, *args, seed=seed, data=data, **kwargs)
        if "posterior_predictive" not in tree.children:
            raise DataError(
                "these arguments are not those of the run, so that what it saw cannot be compared "
                "with what it predicts. Pass the run's data."
            )
    return _table(tree, "posterior_predictive", statistics)


def check_prior(
    model: Callable,
    *args: Any,
    statistics: Statistics | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> pandas.DataFrame:
    """Compare statistics of the observed data with those of prior predictive data.

    Args:
        model, *args, **kwargs, data: the model and its arguments, the observed data included.
        statistics, seed: as in `check_posterior`.
        draws: draws per chain from the prior.

    Returns:
        The same table. Observed values far outside say that the prior rules the data out; quantiles
        that no data could reach say that it is too wide.

    Raises:
        MethodError: the prior is improper.
        DataError: the model observes nothing.
    """
    arguments = {**kwargs, "data": data} if data is not None else kwargs
    prior = infer(model, *args, method="prior", draws=draws, seed=seed, progress=False, **arguments)
    return _table(
        predict(prior, model, *args, seed=seed, **arguments), "prior_predictive", statistics
    )


def check_findings(table: pandas.DataFrame) -> list[Finding]:
    """The statistics that the model hardly ever produces."""
    least = np.minimum(table["p_low"], table["p_high"])
    found = []
    for (site, name), p in least[least < _ALARM].items():
        row = table.loc[(site, name)]
        found.append(
            Finding(
                "predictive",
                "warning",
                (str(site),),
                float(p),
                f"the {name} of {site} is {row['observed']:.3g}, but the model gives "
                f"{row['q5']:.3g} to {row['q95']:.3g} (90%).",
                "The model misses this side of the data: look at its distribution and at what it "
                "leaves out.",
            )
        )
    return found


def _table(tree: xarray.DataTree, group: str, statistics: Statistics | None) -> pandas.DataFrame:
    import pandas

    chosen = STATISTICS if statistics is None else statistics
    if not chosen:
        raise OptionError("statistics= is empty; name at least one function.")
    rows = {}
    observed = tree["observed_data"].dataset
    for site, drawn in tree[group].dataset.data_vars.items():
        if site not in observed:
            continue
        y = np.asarray(observed[site], float).reshape(-1)
        flat = np.asarray(drawn.transpose("chain", "draw", ...), float).reshape(-1, y.size)
        seen_at = ~np.isnan(y)  # a mask hides the others
        if not seen_at.any():
            continue
        y, flat = y[seen_at], flat[:, seen_at]
        for name, statistic in chosen.items():
            seen, predicted = np.asarray(statistic(y)), np.asarray(statistic(flat))
            if seen.shape or predicted.shape != flat.shape[:1]:
                raise OptionError(
                    f"statistic {name!r} must reduce the last axis: it made {predicted.shape} of "
                    f"{flat.shape}."
                )
            low, middle, high = np.quantile(predicted, [0.05, 0.5, 0.95])
            rows[str(site), name] = {
                "observed": float(seen),
                "q5": low,
                "q50": middle,
                "q95": high,
                "p_low": float(np.mean(predicted <= seen)),
                "p_high": float(np.mean(predicted >= seen)),
            }
    if not rows:
        raise DataError("there is nothing to compare: no value is observed that no mask hides.")
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table.index = pandas.MultiIndex.from_tuples(table.index, names=["site", "statistic"])
    return table
