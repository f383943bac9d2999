"""ppl_toolkit: composable, compiled inference for NumPyro models.

Importing this package imports nothing heavy: every public name is loaded on first use.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("ppl_toolkit")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0.0.0"

_HOME = {
    "infer": "front_door",
    "extend": "front_door",
    "Goal": "goals",
    "infer_batch": "batch",
    "one_of": "batch",
    "Program": "program",
    "predict": "predictions",
    "log_likelihood": "predictions",
    "summary": "results",
    "save": "files",
    "load": "files",
    "findings": "diagnostics.findings",
    "calibrate": "diagnostics.calibration",
    "check_posterior": "diagnostics.checks",
    "check_prior": "diagnostics.checks",
    "geweke": "diagnostics.geweke",
    "report": "diagnostics.report",
    "sensitivity": "diagnostics.sensitivity",
    "loo": "diagnostics.leave_one_out",
    "compare": "diagnostics.comparison",
    "check": "diagnostics.validity",
    "cross_check": "diagnostics.jump_evidence",
    "smoothed": "diagnostics.smoothing",
    "OnlineFilter": "inference.online",
    "HMC": "inference.hmc",
    "NUTS": "inference.hmc",
    "ChEES": "inference.chees",
    "MAMS": "inference.mams",
    "Slice": "inference.slice",
    "EllipticalSlice": "inference.elliptical_slice",
    "NestedSampling": "inference.nested_sampling",
    "Laplace": "inference.laplace",
    "Pathfinder": "inference.pathfinder",
    "SVI": "inference.variational",
    "Prior": "inference.prior",
    "Enumeration": "inference.enumeration",
    "MCMC": "inference.mcmc",
    "SMC": "inference.smc",
    "SGLD": "inference.stochastic_gradient",
    "SGHMC": "inference.stochastic_gradient",
    "SGNHT": "inference.stochastic_gradient",
}
_ROOMS = ("convergence", "diagnostics", "errors", "inference", "models")

__all__ = [*sorted(_HOME), *_ROOMS, "__version__"]

if TYPE_CHECKING:
    from ppl_toolkit import convergence, diagnostics, errors, inference, models
    from ppl_toolkit.batch import infer_batch, one_of
    from ppl_toolkit.diagnostics.calibration import calibrate
    from ppl_toolkit.diagnostics.checks import check_posterior, check_prior
    from ppl_toolkit.diagnostics.comparison import compare
    from ppl_toolkit.diagnostics.findings import findings
    from ppl_toolkit.diagnostics.geweke import geweke
    from ppl_toolkit.diagnostics.jump_evidence import cross_check
    from ppl_toolkit.diagnostics.leave_one_out import loo
    from ppl_toolkit.diagnostics.report import report
    from ppl_toolkit.diagnostics.sensitivity import sensitivity
    from ppl_toolkit.diagnostics.smoothing import smoothed
    from ppl_toolkit.diagnostics.validity import check
    from ppl_toolkit.files import load, save
    from ppl_toolkit.front_door import extend, infer
    from ppl_toolkit.goals import Goal
    from ppl_toolkit.inference.chees import ChEES
    from ppl_toolkit.inference.elliptical_slice import EllipticalSlice
    from ppl_toolkit.inference.enumeration import Enumeration
    from ppl_toolkit.inference.hmc import HMC, NUTS
    from ppl_toolkit.inference.laplace import Laplace
    from ppl_toolkit.inference.mams import MAMS
    from ppl_toolkit.inference.mcmc import MCMC
    from ppl_toolkit.inference.nested_sampling import NestedSampling
    from ppl_toolkit.inference.online import OnlineFilter
    from ppl_toolkit.inference.pathfinder import Pathfinder
    from ppl_toolkit.inference.prior import Prior
    from ppl_toolkit.inference.slice import Slice
    from ppl_toolkit.inference.smc import SMC
    from ppl_toolkit.inference.stochastic_gradient import SGHMC, SGLD, SGNHT
    from ppl_toolkit.inference.variational import SVI
    from ppl_toolkit.predictions import log_likelihood, predict
    from ppl_toolkit.program import Program
    from ppl_toolkit.results import summary


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
