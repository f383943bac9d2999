"""Bare log densities, seen as NumPyro models with flat priors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpyro
import numpyro.distributions as dist

from ppl_toolkit.errors import ModelError, OptionError
from ppl_toolkit.starts import is_tree

__all__ = ["as_model", "density_like", "is_density"]

_POSITION = "x"  # the site of a log density over one array


def as_model(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], init: Any
) -> tuple[Callable, tuple, Any]:
    """A model as it is; a log density of a position as a model with a flat prior.

    A function is taken as a log density when ``init`` is an array, or a dictionary, and the
    function takes exactly one argument more than were passed.
    """
    if not callable(model) or init is None or isinstance(init, str) or is_tree(init):
        return model, args, init
    try:
        inspect.signature(model).bind(*args, **kwargs)
        if isinstance(init, Mapping):
            return model, args, init
    except (TypeError, ValueError):
        pass
    start = dict(init) if isinstance(init, Mapping) else {_POSITION: init}
    try:
        inspect.signature(model).bind(None, *args, **kwargs)
    except (TypeError, ValueError):
        return model, args, init
    try:
        arrays = {name: np.asarray(value, float) for name, value in start.items()}
    except (TypeError, ValueError):
        raise OptionError(
            "init of a log density must be an array of numbers, or a dictionary of such arrays."
        ) from None
    single = not isinstance(init, Mapping)
    return _FromLogDensity(model, arrays, single), args, arrays


class _FromLogDensity:
    """A log density as a NumPyro model: flat sites and one factor."""

    def __init__(self, function: Callable, like: Mapping[str, np.ndarray], single: bool) -> None:
        self.fn, self.single = function, single
        self.shapes = {name: np.shape(value) for name, value in like.items()}
        self.__name__ = getattr(function, "__name__", "log_density")

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        flat = {
            name: numpyro.sample(name, dist.ImproperUniform(dist.constraints.real, (), shape))
            for name, shape in self.shapes.items()
        }
        value = self.fn(flat[_POSITION] if self.single else flat, *args, **kwargs)
        if value is None or np.shape(value) != ():
            raise ModelError(
                f"the log density {self.__name__!r} must return a scalar; got "
                f"{'None' if value is None else f'shape {np.shape(value)}'}. With init= an array, "
                "infer takes its first argument for a log density of a position; for a NumPyro "
                "model give init={site: value}."
            )
        numpyro.factor("log_density", value)


def is_density(model: Any) -> bool:
    """Whether a model was made of a log density."""
    return isinstance(model, _FromLogDensity)


def density_like(model: Callable, shapes: Mapping[str, Any]) -> Callable:
    """The log density of an earlier run as a model again, given the shapes of its sites."""
    return _FromLogDensity(
        model, {k: np.zeros(v) for k, v in shapes.items()}, list(shapes) == [_POSITION]
    )
