"""The building blocks of inference, and the methods made of them.

Names load on first use. `method_named` finds a method by its name, here or among installed
plug-ins (entry-point group ``ppl_toolkit.methods``).
"""

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

_HOME = {
    "HMC": "hmc",
    "NUTS": "hmc",
    "Prior": "prior",
    "Enumeration": "enumeration",
}

__all__ = [
    "HMC",
    "NUTS",
    "Enumeration",
    "Prior",
    "as_method",
    "method_named",
    "method_names",
]

if TYPE_CHECKING:
    from ppl_toolkit.inference.enumeration import Enumeration
    from ppl_toolkit.inference.hmc import HMC, NUTS
    from ppl_toolkit.inference.prior import Prior


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def as_method(method: Any) -> Any:
    """A method object: of a name, of a class, or as it is.

    Raises:
        MethodError: it is none of these.
    """
    from ppl_toolkit.errors import MethodError
    from ppl_toolkit.inference.method import Method

    made = method_named(method) if isinstance(method, str) else method
    made = made() if isinstance(made, type) else made
    if not isinstance(made, Method):
        raise MethodError(
            f"method must be a name or a method object such as NUTS(); got {method!r}."
        )
    return made


def _plugins() -> dict[str, Any]:
    return {point.name.lower(): point for point in entry_points(group="ppl_toolkit.methods")}


def method_names() -> list[str]:
    """The names that ``infer(method=...)`` takes."""
    return sorted({name.lower() for name in _HOME} | set(_plugins()))


def method_named(name: str) -> Any:
    """The method class called ``name`` (any case).

    Raises:
        MethodError: no method has this name.
    """
    from ppl_toolkit.errors import MethodError

    for known in _HOME:
        if known.lower() == name.lower():
            return __getattr__(known)
    point = _plugins().get(name.lower())
    if point is None:
        raise MethodError(
            f"there is no method {name!r}; the names are {method_names()} and 'auto'. "
            "A method object works too: infer(model, ..., method=NUTS(target_acceptance=0.9))."
        )
    return point.load()
