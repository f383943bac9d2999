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
    "MCMC": "mcmc",
    "SMC": "smc",
    "SGLD": "stochastic_gradient",
    "SGHMC": "stochastic_gradient",
    "SGNHT": "stochastic_gradient",
    "ParticleFilter": "filtering",
    "ParticleGibbs": "particle_kernel",
    "PPG": "particle_kernel",
    "PMMH": "particle_marginal",
    "SMC2": "smc_squared",
    "ScoreAscent": "score",
    "SVTP": "sparse_variational",
    "MAP": "maximum",
    "Laplace": "laplace",
    "Pathfinder": "pathfinder",
    "SVI": "variational",
    "ChEES": "chees",
    "MAMS": "mams",
    "Type2ML": "maximum",
    "Slice": "slice",
    "EllipticalSlice": "elliptical_slice",
    "NestedSampling": "nested_sampling",
}
# What methods are composed of.
_PIECES = {
    "block": "kernel",
    "cycle": "kernel",
    "mixture": "kernel",
    "repeat": "kernel",
    "tempered": "kernel",
    "involutive": "involution",
    "leapfrog": "involution",
    "lift": "lifted",
    "mala": "involution",
    "metropolis_hastings": "involution",
    "DelayedRejection": "delayed_rejection",
    "ParallelTempering": "parallel_tempering",
    "PseudoMarginal": "pseudo_marginal",
    "RandomWalk": "random_walk",
    "Gibbs": "discrete",
    "MetropolisedGibbs": "discrete",
    "LocallyBalanced": "discrete",
    "GibbsWithGradients": "discrete",
    "masked_plate": "plates",
    "case": "plates",
    "BirthDeath": "reversible_jump",
    "Switch": "reversible_jump",
    "SplitMerge": "split_merge",
    "StepSplit": "split_merge",
    "moment_split": "split_merge",
    "Additive": "additive",
    "OnlineFilter": "online",
    "ConditionalSMC": "particle_kernel",
    "Adam": "ascent",
    "learn_proposal": "score_climbing",
    "ParticleMarginal": "particle_marginal",
    "Adapted": "proposals",
    "Auxiliary": "proposals",
    "Bootstrap": "proposals",
    "Guided": "proposals",
    "LaplaceProposal": "proposals",
    "Cyclical": "step_sizes",
    "PolynomialDecay": "step_sizes",
    "Moves": "moves",
    "Walk": "moves",
}

__all__ = [
    "HMC",
    "MAMS",
    "MAP",
    "MCMC",
    "NUTS",
    "PMMH",
    "PPG",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "SMC",
    "SMC2",
    "SVI",
    "SVTP",
    "Adam",
    "Adapted",
    "Additive",
    "Auxiliary",
    "BirthDeath",
    "Bootstrap",
    "ChEES",
    "ConditionalSMC",
    "Cyclical",
    "DelayedRejection",
    "EllipticalSlice",
    "Enumeration",
    "Gibbs",
    "GibbsWithGradients",
    "Guided",
    "Laplace",
    "LaplaceProposal",
    "LocallyBalanced",
    "MetropolisedGibbs",
    "Moves",
    "NestedSampling",
    "OnlineFilter",
    "ParallelTempering",
    "ParticleFilter",
    "ParticleGibbs",
    "ParticleMarginal",
    "Pathfinder",
    "PolynomialDecay",
    "Prior",
    "PseudoMarginal",
    "RandomWalk",
    "ScoreAscent",
    "Slice",
    "SplitMerge",
    "StepSplit",
    "Switch",
    "Type2ML",
    "Walk",
    "as_method",
    "block",
    "case",
    "cycle",
    "involutive",
    "leapfrog",
    "learn_proposal",
    "lift",
    "mala",
    "masked_plate",
    "method_named",
    "method_names",
    "metropolis_hastings",
    "mixture",
    "moment_split",
    "repeat",
    "tempered",
]

if TYPE_CHECKING:
    from ppl_toolkit.inference.additive import Additive
    from ppl_toolkit.inference.ascent import Adam
    from ppl_toolkit.inference.chees import ChEES
    from ppl_toolkit.inference.delayed_rejection import DelayedRejection
    from ppl_toolkit.inference.discrete import (
        Gibbs,
        GibbsWithGradients,
        LocallyBalanced,
        MetropolisedGibbs,
    )
    from ppl_toolkit.inference.elliptical_slice import EllipticalSlice
    from ppl_toolkit.inference.enumeration import Enumeration
    from ppl_toolkit.inference.filtering import ParticleFilter
    from ppl_toolkit.inference.hmc import HMC, NUTS
    from ppl_toolkit.inference.involution import (
        involutive,
        leapfrog,
        mala,
        metropolis_hastings,
    )
    from ppl_toolkit.inference.kernel import block, cycle, mixture, repeat, tempered
    from ppl_toolkit.inference.laplace import Laplace
    from ppl_toolkit.inference.lifted import lift
    from ppl_toolkit.inference.mams import MAMS
    from ppl_toolkit.inference.maximum import MAP, Type2ML
    from ppl_toolkit.inference.mcmc import MCMC
    from ppl_toolkit.inference.moves import Moves, Walk
    from ppl_toolkit.inference.nested_sampling import NestedSampling
    from ppl_toolkit.inference.online import OnlineFilter
    from ppl_toolkit.inference.parallel_tempering import ParallelTempering
    from ppl_toolkit.inference.particle_kernel import PPG, ConditionalSMC, ParticleGibbs
    from ppl_toolkit.inference.particle_marginal import PMMH, ParticleMarginal
    from ppl_toolkit.inference.pathfinder import Pathfinder
    from ppl_toolkit.inference.plates import case, masked_plate
    from ppl_toolkit.inference.prior import Prior
    from ppl_toolkit.inference.proposals import (
        Adapted,
        Auxiliary,
        Bootstrap,
        Guided,
        LaplaceProposal,
    )
    from ppl_toolkit.inference.pseudo_marginal import PseudoMarginal
    from ppl_toolkit.inference.random_walk import RandomWalk
    from ppl_toolkit.inference.reversible_jump import BirthDeath, Switch
    from ppl_toolkit.inference.score import ScoreAscent
    from ppl_toolkit.inference.score_climbing import learn_proposal
    from ppl_toolkit.inference.slice import Slice
    from ppl_toolkit.inference.smc import SMC
    from ppl_toolkit.inference.smc_squared import SMC2
    from ppl_toolkit.inference.sparse_variational import SVTP
    from ppl_toolkit.inference.split_merge import SplitMerge, StepSplit, moment_split
    from ppl_toolkit.inference.step_sizes import Cyclical, PolynomialDecay
    from ppl_toolkit.inference.stochastic_gradient import SGHMC, SGLD, SGNHT
    from ppl_toolkit.inference.variational import SVI


def __getattr__(name: str) -> Any:
    home = _HOME.get(name) or _PIECES.get(name)
    if home:
        value = getattr(import_module(f"{__name__}.{home}"), name)
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
        if hasattr(made, "bind"):
            raise MethodError(f"{made!r:.80} is a kernel; say method=MCMC({made!r:.80}).")
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
