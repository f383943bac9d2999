"""Do prior and data agree? Sensitivity of the posterior to powers of the prior and the likelihood.

Source: Kallioinen, Paananen, Bürkner, Vehtari (2024), Detecting and diagnosing prior and likelihood
sensitivity with power-scaling, Statistics and Computing 34; computed by ArviZ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ppl_toolkit.diagnostics.findings import Finding
from ppl_toolkit.errors import DataError, SiteError
from ppl_toolkit.predictions import log_likelihood
from ppl_toolkit.results import require_tree

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["SENSITIVE", "sensitivity", "sensitivity_findings"]

SENSITIVE = 0.05
_MOST_SITES = 5


def sensitivity(
    tree: xarray.DataTree,
    model: Callable | None = None,
    *args: Any,
    var_names: Sequence[str] | str | None = None,
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> pandas.DataFrame:
    """How much the posterior moves when the prior or the likelihood counts a little more or less.

    Args:
        tree: a result of `infer`.
        model, *args, **kwargs, data: the model and its arguments, unless the result has its log
            likelihood and log prior already (`log_likelihood`).
        var_names: sites to look at; all by default.

    Returns:
        A row for every scalar: the distance by which its posterior moves, relative to the change
        of the power, for ``prior`` and ``likelihood``; above 0.05 it is sensitive. Sensitive to
        both: prior and data may be in conflict. To the prior alone: the data say little.

    Raises:
        DataError: the groups are missing and no model is given.
        SiteError: a name is not there.
    """
    require_tree(tree)
    if not {"log_likelihood", "log_prior"} <= set(tree.children):
        if model is None:
            raise DataError(
                "this result has no log_likelihood and log_prior groups. Pass the model and its "
                "arguments: sensitivity(result, model, *data)."
            )
        tree = log_likelihood(tree, model, *args, data=data, **kwargs)
    dependent = [n for n, v in tree["log_likelihood"].data_vars.items() if "dependent" in v.attrs]
    if dependent:
        raise DataError(
            f"the elements of {dependent} depend on each other: this result has their densities "
            "given all others, whose sum is not the log likelihood that could count more or less."
        )
    names = [var_names] if isinstance(var_names, str) else list(var_names or ())
    if unknown := [name for name in names if name not in tree["posterior"]]:
        known = list(tree["posterior"].data_vars)
        raise SiteError(f"no sites {unknown} in this result; it has {known}.")
    import arviz

    logger = logging.getLogger("arviz_stats.psense")  # the advice of `sensitivity_findings`
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        table = arviz.psense_summary(tree, var_names=names or None, round_to=6)
    finally:
        logger.setLevel(level)
    return table[["prior", "likelihood"]].astype(float)


def sensitivity_findings(table: pandas.DataFrame) -> list[Finding]:
    """The findings of a table of `sensitivity`."""
    prior, likelihood = table["prior"] > SENSITIVE, table["likelihood"] > SENSITIVE
    found = []
    for kind, which, message, remedy in (
        (
            "conflict",
            prior & likelihood,
            "prior and data pull {sites} in different directions: its posterior moves when either "
            "counts a little more.",
            "Look at prior predictive draws (method='prior'), and ask whether the prior or the "
            "data are wrong.",
        ),
        (
            "weak_data",
            prior & ~likelihood,
            "the data say little about {sites}: its posterior moves with the prior alone.",
            "Make sure that the prior is meant as it is, and report it.",
        ),
    ):
        worst = table["prior"][which].sort_values(ascending=False)
        if len(worst):
            sites = tuple(str(name) for name in worst.index[:_MOST_SITES])
            text = message.format(sites=", ".join(sites))
            found.append(Finding(kind, "warning", sites, float(worst.iloc[0]), text, remedy))
    return found
