"""Families of laws that SVI learns: NumPyro's automatic guides, and guides written as programs.

An automatic guide is made for a model of one site, the flat unconstrained vector: densities there
have discrete sites summed out and Jacobians included, so that any of NumPyro's guides serves any
program. A guide that is a function of the model's arguments draws the model's own sites.

Source: Hoffman, Blei, Wang, Paisley (2013), JMLR 14; Kucukelbir et al. (2017), JMLR 18.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.transforms import IdentityTransform, IndependentTransform
from numpyro.infer import autoguide
from numpyro.infer.initialization import init_to_value

from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.program import Program
from ppl_toolkit.replay import alone, log_prob

__all__ = ["NAMES", "Automatic", "Guide", "Written", "guide_of"]

_SITE = "x"  # the flat vector, for automatic guides

NAMES = {
    "normal": autoguide.AutoDiagonalNormal,
    "multivariate_normal": autoguide.AutoMultivariateNormal,
    "low rank": autoguide.AutoLowRankMultivariateNormal,
    "iaf": autoguide.AutoIAFNormal,
    "bnaf": autoguide.AutoBNAFNormal,
}
# They hold points instead of laws, need the model itself, or are made of parts of it.
_REFUSED = (
    autoguide.AutoDelta,
    autoguide.AutoLaplaceApproximation,
    autoguide.AutoDAIS,
    autoguide.AutoSemiDAIS,
    autoguide.AutoGuideList,
)

Vector = Float[Array, " D"]
Parameters = dict[str, Any]


class Guide(Protocol):
    """A family of laws on the unconstrained space."""

    @property
    def needs(self) -> tuple[Any, ...]:
        """Functions of the program that it uses."""

    @property
    def label(self) -> str:
        """What it is called."""

    def require(self, program: Program) -> None:
        """Refuse programs that it cannot serve."""

    def start(self, key: Any, like: Vector, target: Any) -> Parameters:
        """Parameters to begin with, unconstrained."""

    def draw(
        self, key: Any, parameters: Parameters, origin: Vector, target: Any
    ) -> tuple[Vector, Any]:
        """A draw x, smooth in the parameters, and log q(x); ``origin`` is where the law began."""


def guide_of(guide: Any) -> Guide:
    """A family, of what a user may give.

    Raises:
        OptionError: it is none.
    """
    if isinstance(guide, str):
        if (name := guide.replace("_", " ").lower()) in (known := _spoken()):
            return Automatic(known[name])
        raise OptionError(f"guide must be one of {list(NAMES)}, or a guide; got {guide!r:.60}.")
    made = guide.func if isinstance(guide, functools.partial) else guide
    if isinstance(made, type) and issubclass(made, autoguide.AutoGuide):
        if issubclass(made, _REFUSED) or inspect.isabstract(made):
            raise OptionError(
                f"{made.__name__} serves no SVI here: guides must be laws with a density on all "
                f"sites together, such as {list(NAMES)}. For the mode: MAP(); for a normal law "
                "there: Laplace()."
            )
        return Automatic(guide)
    if isinstance(made, autoguide.AutoGuide):
        name = type(made).__name__
        raise OptionError(
            f"guide is a {name} that was made for a model; pass the class, guide={name}, or "
            f"guide=functools.partial({name}, ...) with its options: it is made for the flat "
            "vector of all sites."
        )
    if isinstance(made, type) or not callable(made):
        raise OptionError(
            f"guide must be one of {list(NAMES)}, a class of NumPyro's automatic guides, or a "
            f"function of the model's arguments that draws its sites; got {guide!r:.60}."
        )
    return Written(guide)


def _spoken() -> dict[str, Any]:
    return {name.replace("_", " "): made for name, made in NAMES.items()}


def _parameter_values(parameters: Mapping[str, Any]) -> Callable[[dict], Any]:
    """Values of numpyro.param sites from unconstrained ones, for `handlers.substitute`."""

    def value(message: dict) -> Any:
        if message["type"] != "param" or message["name"] not in parameters:
            return None
        own = parameters[message["name"]]
        constraint = message["kwargs"].get("constraint")
        return own if constraint is None else biject_to(constraint)(own)

    return value


def _run(
    guide: Callable, key: Any, parameters: Mapping[str, Any] | None, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The messages of one run of a guide."""
    handled = handlers.seed(guide, key)
    if parameters is not None:
        handled = handlers.substitute(handled, substitute_fn=_parameter_values(parameters))
    with alone(), handlers.trace() as trace:
        handled(*args, **kwargs)
    return trace


def _unconstrained(trace: Mapping[str, Any]) -> Parameters:
    """The values of numpyro.param sites on the unconstrained space."""
    found = {}
    for name, message in trace.items():
        if message["type"] == "param":
            constraint, value = message["kwargs"].get("constraint"), message["value"]
            found[name] = value if constraint is None else biject_to(constraint).inv(value)
    return jax.tree.map(jnp.asarray, found)


def _log_density(trace: Mapping[str, Any]) -> Any:
    """Of all that a guide drew."""
    sites = (message for message in trace.values() if message["type"] == "sample")
    return sum((jnp.sum(log_prob(message)) for message in sites), start=jnp.zeros(()))


@dataclasses.dataclass(frozen=True)
class Automatic:
    """One of NumPyro's automatic guides, for the flat vector, shifted to where the chain begins.

    Args:
        made: its class, or a `functools.partial` of that.
    """

    made: Any

    needs = ()

    @property
    def label(self) -> str:
        own = self.made.func if isinstance(self.made, functools.partial) else self.made
        return own.__name__

    def require(self, program: Program) -> None:
        """Try it on a vector of the program's size."""
        like = jax.ShapeDtypeStruct((program.size,), program.precision)
        key = jax.eval_shape(lambda: jax.random.key(0))

        def try_out(key: Any, like: Any) -> Any:
            return self.draw(key, self.start(key, like, None), like, None)

        try:
            with program.context():
                x, log_q = jax.eval_shape(try_out, key, like)
        except Exception as error:
            raise MethodError(
                f"{self.label} cannot be made for {program.size} unconstrained dimensions: "
                f"{type(error).__name__}: {error} Use another guide, such as "
                "guide='multivariate_normal'."
            ) from None
        if x.shape != like.shape or log_q.shape != ():
            raise MethodError(f"{self.label} draws {x.shape}, not a vector of {like.shape}.")

    def _for(self, size: int, dtype: Any) -> Any:
        law = dist.ImproperUniform(dist.constraints.real_vector, (), (size,))

        def flat() -> None:
            numpyro.sample(_SITE, law)

        middle = init_to_value(values={_SITE: np.zeros(size, dtype)})
        return self.made(flat, init_loc_fn=middle)

    def start(self, key: Any, like: Vector, target: Any) -> Parameters:
        return _unconstrained(_run(self._for(like.shape[0], like.dtype), key, None))

    def draw(
        self, key: Any, parameters: Parameters, origin: Vector, target: Any
    ) -> tuple[Vector, Any]:
        trace = _run(self._for(origin.shape[0], origin.dtype), key, parameters)
        log_q = _log_density(trace).astype(origin.dtype)
        return origin + trace[_SITE]["value"].astype(origin.dtype), log_q


@dataclasses.dataclass(frozen=True)
class _StartOf:
    """Parameters of a written guide to begin with: a function of a program."""

    guide: Callable

    def example(self, program: Program) -> Any:
        return jax.eval_shape(lambda: jax.random.key(0))

    def __call__(self, program: Program, key: Any, data: Sequence[Any]) -> Parameters:
        args, kwargs = _arguments(program, data)
        return _unconstrained(_run(self.guide, key, None, *args, **kwargs))


@dataclasses.dataclass(frozen=True)
class _DrawOf:
    """A draw of a written guide on the unconstrained space, and its log density there."""

    guide: Callable

    def example(self, program: Program) -> Any:
        start = _StartOf(self.guide)
        key = start.example(program)
        return key, jax.eval_shape(functools.partial(start, program), key, program.data)

    def __call__(
        self, program: Program, given: tuple[Any, Parameters], data: Sequence[Any]
    ) -> tuple[Vector, Any]:
        key, parameters = given
        args, kwargs = _arguments(program, data)
        drawn = _run(self.guide, key, parameters, *args, **kwargs)
        self._require_sites(program, drawn)
        values = {site.name: drawn[site.name]["value"] for site in program.continuous}
        model = program.trace(data, functools.partial(handlers.substitute, data=values))
        flat, log_q = {}, _log_density(drawn)
        for name, x in values.items():
            transform = biject_to(model[name]["fn"].support)
            if _is_identity(biject_to(drawn[name]["fn"].support)) and not _is_identity(transform):
                raise MethodError(
                    f"the guide draws {name!r} from all real numbers; the model's has the support "
                    f"{program.sites[name].support}. Take a law on that, such as "
                    "dist.TransformedDistribution(dist.Normal(...), biject_to(support))."
                )
            flat[name] = u = transform.inv(x)
            log_q += jnp.sum(transform.log_abs_det_jacobian(u, x))
        return program.ravel(flat), log_q

    def _require_sites(self, program: Program, drawn: Mapping[str, Any]) -> None:
        sites = {n: m for n, m in drawn.items() if m["type"] == "sample" and not m["is_observed"]}
        latent = {site.name: site.shape for site in program.continuous}
        missing, unknown = sorted(set(latent) - set(sites)), sorted(set(sites) - set(latent))
        if missing or unknown:
            raise MethodError(
                f"the guide must draw the continuous latent sites of the model, {list(latent)}: it "
                f"lacks {missing} and has {unknown} besides."
            )
        shapes = {name: jnp.shape(message["value"]) for name, message in sites.items()}
        if wrong := [name for name in latent if shapes[name] != latent[name]]:
            raise MethodError(
                f"the guide draws {wrong} with shapes {[shapes[n] for n in wrong]}; the model has "
                f"{[latent[n] for n in wrong]}."
            )
        rough = [name for name, message in sites.items() if not message["fn"].has_rsample]
        if rough:
            raise MethodError(
                f"the guide's laws of {rough} have no draws that are smooth in their parameters; "
                "take others, such as normal, log-normal, gamma or beta laws."
            )


def _is_identity(transform: Any) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, IdentityTransform)


def _arguments(program: Program, data: Sequence[Any]) -> tuple[Any, Any]:
    arguments = program.arguments
    arrays = arguments.arrays if program.baked else list(data[: len(arguments.arrays)])
    return arguments.rebuild(arrays)


@dataclasses.dataclass(frozen=True)
class Written:
    """A guide as NumPyro's users write it: a function of the model's arguments.

    Args:
        guide: it draws every continuous latent site of the model by `numpyro.sample`; what is to be
            learned are its `numpyro.param` sites.
    """

    guide: Callable

    @property
    def needs(self) -> tuple[Any, ...]:
        return _StartOf(self.guide), _DrawOf(self.guide)

    @property
    def label(self) -> str:
        return getattr(self.guide, "__name__", type(self.guide).__name__)

    def require(self, program: Program) -> None:
        """Try it on the program."""
        if program.subsampled:
            raise MethodError(
                "guides that are functions see all rows of the data; for minibatches use an "
                "automatic guide, such as guide='multivariate_normal'."
            )
        try:
            for function in self.needs:
                program.traced(function)
        except (MethodError, OptionError):
            raise
        except Exception as error:
            raise MethodError(
                f"the guide {self.label} does not run on the model's arguments: "
                f"{type(error).__name__}: {error}"
            ) from None

    def start(self, key: Any, like: Vector, target: Any) -> Parameters:
        return target.functions[_StartOf(self.guide)](key)

    def draw(
        self, key: Any, parameters: Parameters, origin: Vector, target: Any
    ) -> tuple[Vector, Any]:
        x, log_q = target.functions[_DrawOf(self.guide)]((key, parameters))
        return x.astype(origin.dtype), log_q.astype(origin.dtype)
