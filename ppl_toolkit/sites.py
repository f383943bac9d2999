"""What a program knows of its sites, read off the messages of a NumPyro trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpyro.distributions import MaskedDistribution, biject_to

from ppl_toolkit.errors import DataError, ModelError, SiteError

__all__ = [
    "Site",
    "check_labels",
    "check_observed_values",
    "finite_support",
    "first_index",
    "is_improper",
    "mask_layers",
    "read_site",
    "variable_name",
]

_RESERVED = ("chain", "draw", "sample", "pred_id")  # by ArviZ's schema
_WRAPPERS = ("ExpandedDistribution", "Independent", "MaskedDistribution")


class Site(NamedTuple):
    """What a program knows of one site.

    Attributes:
        name: the site's name.
        kind: "latent", "observed", "deterministic" or "factor".
        shape, dtype: of its value.
        event_dim: number of trailing dimensions that belong to one draw of its distribution.
        dims: a name for every dimension of its value; plates give theirs.
        distribution: class name of its distribution ("" for deterministic sites).
        support: printed form of its support.
        bounds: the least and the greatest value of an integer support, if they are plain numbers.
        discrete: whether its values are integers.
        cardinality: size of a finite support per element, 0 if there is none.
        unconstrained_shape: shape of its unconstrained counterpart (continuous latent sites).
        offset: where that begins in the flat vector (-1 for sites without one).
        proper: False for flat (improper) priors, which cannot be drawn from.
        masked: whether a mask switches some of its elements off.
        argument: index of the data array observed there, -1 if it is computed.
        scanned: whether it is a series made by NumPyro's scan (its first dimension).
        dependent: whether its elements depend on each other, under a law that knows the density of
            every element given all others (a method ``left_out_log_densities(value)``).
        predicted: whether it is there for predictions (``infer={"predicted": True}``): drawn anew
            when the result of a run does not have it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: Any
    event_dim: int
    dims: tuple[str, ...]
    distribution: str = ""
    support: str = ""
    bounds: tuple[int, int] | None = None
    discrete: bool = False
    cardinality: int = 0
    unconstrained_shape: tuple[int, ...] = ()
    offset: int = -1
    proper: bool = True
    masked: bool = False
    argument: int = -1
    scanned: bool = False
    dependent: bool = False
    predicted: bool = False

    @property
    def unconstrained_size(self) -> int:
        return math.prod(self.unconstrained_shape)

    @property
    def variable(self) -> str:
        """Its name in results: "/", with which `scope` divides names, means groups there."""
        return variable_name(self.name)


def variable_name(name: str) -> str:
    """What a site or dimension is called in results."""
    return name.replace("/", ".")


def check_labels(sites: Mapping[str, Site]) -> None:
    """Refuse names that a labelled result cannot hold.

    Raises:
        SiteError: a name is reserved or used twice, or a dimension has two lengths.
    """
    variables: dict[str, str] = {}
    lengths: dict[str, tuple[int, str]] = {}
    for site in sites.values():
        if site.variable in variables:
            raise SiteError(
                f"sites {site.name!r} and {variables[site.variable]!r} would both be called "
                f"{site.variable!r} in the result; rename one."
            )
        variables[site.variable] = site.name
        if repeated := {dim for dim in site.dims if site.dims.count(dim) > 1}:
            raise SiteError(
                f"site {site.name!r} has dimension {sorted(repeated)[0]!r} twice: dims="
                f"{list(site.dims)}. Every dimension of a site needs a name of its own."
            )
        for dim, size in zip(site.dims, site.shape, strict=True):
            before, owner = lengths.setdefault(dim, (size, site.name))
            if before != size:
                raise SiteError(
                    f"dimension {dim!r} has length {before} at site {owner!r} but {size} at site "
                    f"{site.name!r}; plates of different sizes need different names."
                )
    for name in (*variables, *lengths):
        if name in _RESERVED:
            raise SiteError(
                f"the name {name!r} is reserved for results (of {_RESERVED}); rename the site or "
                "plate."
            )
    if both := sorted(variables.keys() & lengths.keys()):
        raise SiteError(
            f"{both[0]!r} names a site and a dimension; rename the site or the plate, or name the "
            "dimension with dims=."
        )


def read_site(
    message: Mapping[str, Any],
    data: Sequence[Any],
    offset: int,
    event_dims: Sequence[str],
) -> Site | None:
    """The site of one message of a trace, None for plates and the like.

    Args:
        message: from a trace of the model on abstract values.
        data: the traced data arrays, to recognise those observed as they are.
        offset: where the site begins in the flat vector, if it goes there.
        event_dims: the user's names for its last dimensions.

    Raises:
        DataError: observed data of a shape or type that does not fit.
        SiteError: more dimension names than dimensions.
    """
    name, value = message["name"], message["value"]
    if message["type"] == "deterministic":
        shape = jnp.shape(value)
        dims = _dims(name, shape, 0, message.get("cond_indep_stack") or [], event_dims)
        return Site(name, "deterministic", shape, jnp.result_type(value), 0, dims)
    if message["type"] != "sample":
        return None
    fn = message["fn"]
    if not hasattr(value, "shape") and not np.isscalar(value):
        raise DataError(
            f"site {name!r} observes a {type(value).__name__}; pass an array: np.asarray(values)."
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    base = fn.base_dist if isinstance(fn, MaskedDistribution) else fn
    names = event_dims or message["infer"].get("event_dims", ())
    common: dict[str, Any] = {
        "name": name,
        "shape": shape,
        "dtype": dtype,
        "event_dim": fn.event_dim,
        "dims": _dims(name, shape, fn.event_dim, message["cond_indep_stack"], names),
        "distribution": _distribution_name(base),
        "masked": bool(mask_layers(fn)),
        "scanned": bool(message.get("_control_flow_done"))
        and "_scan_current_index" in message["infer"],
        "dependent": hasattr(base, "left_out_log_densities"),
        "predicted": bool(message["infer"].get("predicted")),
    }
    if message["infer"].get("is_auxiliary") and message["is_observed"]:
        return Site(kind="factor", **common)
    support = fn.support
    common |= {"support": str(support), "discrete": bool(fn.is_discrete)}
    common["bounds"] = _bounds(support)
    if message["is_observed"]:
        argument = next((i for i, array in enumerate(data) if array is value), -1)
        _check_observed_shape(name, fn, shape)
        return Site(kind="observed", argument=argument, **common)
    if common["distribution"] == "Delta":
        raise ModelError(
            f"site {name!r} is a latent Delta: a number, not a random variable. Write "
            f"numpyro.deterministic({name!r}, value)."
        )
    if fn.is_discrete:
        return Site(kind="latent", cardinality=_cardinality(fn), **common)
    return Site(
        kind="latent",
        unconstrained_shape=tuple(biject_to(support).inverse_shape(shape)),
        offset=offset,
        proper=not is_improper(base),
        **common,
    )


def _dims(
    name: str,
    shape: tuple[int, ...],
    event_dim: int,
    frames: Sequence[Any],
    event_dims: Sequence[str],
) -> tuple[str, ...]:
    """A name for every dimension: its plate's, the user's, or SITE_dim_N."""
    dims = [f"{variable_name(name)}_dim_{axis}" for axis in range(len(shape))]
    for frame in frames:
        axis = len(shape) - event_dim + frame.dim
        if 0 <= axis < len(shape) and shape[axis] == frame.size:
            dims[axis] = variable_name(frame.name)
    if len(event_dims) > len(shape):
        raise SiteError(
            f"dims= gives {len(event_dims)} names {list(event_dims)} for site {name!r} of shape "
            f"{shape}."
        )
    if event_dims:
        dims[len(dims) - len(event_dims) :] = event_dims
    return tuple(dims)


def is_improper(fn: Any) -> bool:
    """Whether a distribution is a flat, improper prior."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__ == "ImproperUniform"


def mask_layers(fn: Any) -> list[tuple[Any, int]]:
    """The masks of a distribution, the outermost first, and the event dimensions under each."""
    masks = []
    while type(fn).__name__ in _WRAPPERS:
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    return masks


def _distribution_name(fn: Any) -> str:
    while type(fn).__name__ in _WRAPPERS:
        fn = fn.base_dist
    return type(fn).__name__


def finite_support(fn: Any) -> Any:
    """The values of one element of a finite discrete distribution, shape (K,); None if infinite.

    Elements of an event made by ``to_event`` are independent, and count one by one.
    """
    while hasattr(fn, "base_dist") and type(fn).__name__ in _WRAPPERS:
        fn = fn.base_dist
    if fn.event_shape:
        return None
    try:
        levels = fn.enumerate_support(expand=False)
    # NumPyro's answer for infinite ones; JAX's (a TypeError) where the number of values is traced;
    # and whatever a law of the user's own, which needs no such method, has to say.
    except (NotImplementedError, AttributeError, TypeError, ValueError):
        return None
    return jnp.reshape(levels, (levels.shape[0], -1))[:, 0]


def _bounds(support: Any) -> tuple[int, int] | None:
    """Of an integer interval whose ends do not depend on values, as of a categorical law."""
    ends = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    whole = all(isinstance(end, int | np.integer) for end in ends)
    return (int(ends[0]), int(ends[1])) if whole and support.is_discrete else None  # type: ignore[arg-type]


def _cardinality(fn: Any) -> int:
    levels = finite_support(fn)
    return 0 if levels is None else levels.shape[0]


def _check_observed_shape(name: str, fn: Any, shape: tuple[int, ...]) -> None:
    try:
        np.broadcast_shapes(shape, tuple(fn.shape()))
    except ValueError:
        raise DataError(
            f"site {name!r} observes data of shape {shape}, but its distribution "
            f"{_distribution_name(fn)} has shape {tuple(fn.shape())}. Check the plate's size and "
            "the arguments' lengths."
        ) from None


def first_index(flags: np.ndarray) -> tuple[int, ...]:
    """The index of the first True."""
    return tuple(int(i) for i in np.argwhere(flags)[0])


_SUPPORT_TESTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Boolean": lambda x: (x == 0) | (x == 1),
    "IntegerNonnegative": lambda x: (x >= 0) & (x == np.floor(x)),
    "IntegerPositive": lambda x: (x >= 1) & (x == np.floor(x)),
    "Positive": lambda x: x > 0,
    "Nonnegative": lambda x: x >= 0,
    "UnitInterval": lambda x: (x >= 0) & (x <= 1),
}


def check_observed_values(site: Site, array: np.ndarray, argument: str) -> None:
    """Refuse observed values the site's distribution gives no density to."""
    bad = ~np.isfinite(array)
    if bad.any():
        raise DataError(
            f"argument {argument!r}, observed at site {site.name!r}, has {int(bad.sum())} "
            f"non-finite values (first at index {first_index(bad)})."
        )
    good = np.ones(array.shape, bool)
    if site.bounds is not None:
        good = (array >= site.bounds[0]) & (array <= site.bounds[1]) & (array == np.floor(array))
    elif test := _SUPPORT_TESTS.get(site.support.split("(")[0].strip("_")):
        good = test(array)
    if not good.all():
        remedy = (
            " numpy.unique(labels, return_inverse=True) numbers classes from 0."
            if site.distribution.startswith("Categorical")
            else ""
        )
        index = first_index(~good)
        raise DataError(
            f"argument {argument!r}, observed at site {site.name!r}, has the value "
            f"{array[index]} at index {index}, which is outside the support of "
            f"{site.distribution} ({site.support}).{remedy}"
        )
