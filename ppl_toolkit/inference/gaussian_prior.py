"""Which latent sites have a Gaussian law given the other sites: its mean, and draws from it.

A law is recognised by its class, in the coordinates of a position: normal and multivariate normal
ones, random walks with normal steps, what `expand`, `to_event` and affine transforms make of them,
and log-normal ones, whose logarithm a position has. Means and draws are the model's own, so that
they belong to the density that the model scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import random
from numpyro.distributions import transforms

from ppl_toolkit import positions
from ppl_toolkit.errors import MethodError
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import dependents, key_shape

__all__ = ["GaussianDraws", "GaussianSites", "gaussian_sites"]

_GAUSSIAN = (
    dist.Normal,
    dist.MultivariateNormal,
    dist.LowRankMultivariateNormal,
    dist.GaussianRandomWalk,
)
_AFFINE = (transforms.AffineTransform, transforms.LowerCholeskyAffine)


class GaussianSites(NamedTuple):
    """What a program's latent sites have for priors.

    Attributes:
        names: the sites whose law is Gaussian given all others.
        refused: the others, and why they are none of these.
        parents: by site of ``names``, the latent sites that its law depends on.
    """

    names: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    parents: tuple[tuple[str, ...], ...]

    def require(self, label: str, sites: Collection[str]) -> None:
        """Refuse sites that are not Gaussian, and such whose law depends on another of them.

        Raises:
            MethodError: names the first one at fault.
        """
        own: list[str] = []
        for name, parents in zip(self.names, self.parents, strict=True):
            if name in sites and not set(parents) & set(own):
                own.append(name)
        beside = (
            f"Move it by another kernel: cycle([block({label}(), {own or ['Gaussian sites']}), "
            "...]) with block(NUTS(), [...]) or block(Gibbs(), [...]) for the others."
        )
        for name, why in self.refused:
            if name in sites:
                raise MethodError(
                    f"{label} moves sites whose prior is Gaussian given all others, and site "
                    f"{name!r} {why}. {beside}"
                )
        for name, parents in zip(self.names, self.parents, strict=True):
            if name in sites and (both := sorted(set(parents) & set(sites))):
                raise MethodError(
                    f"{label} moves sites whose prior is Gaussian given all others, but the prior "
                    f"of {name!r} depends on {both}, which it is to move as well. Give each a "
                    f"block of its own: block({label}(), [{name!r}]), or non-centre {name!r}."
                )


def _on_the_real_line(fn: Any) -> Any:
    """The distribution of the logarithm of a log-normal value; others as they are."""
    if type(fn) is dist.LogNormal:
        return dist.Normal(fn.loc, fn.scale)
    if type(fn) is dist.Independent:
        return _on_the_real_line(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if type(fn) is dist.ExpandedDistribution:
        return _on_the_real_line(fn.base_dist).expand(fn.batch_shape)
    return fn


def _mean(fn: Any) -> Any:
    """The mean of a Gaussian distribution, of its shape; None of all others."""
    if type(fn) in _GAUSSIAN:
        mean = fn.mean
    elif type(fn) in (dist.Independent, dist.ExpandedDistribution):
        mean = _mean(fn.base_dist)
    elif type(fn) is dist.TransformedDistribution and all(
        type(t) in _AFFINE for t in fn.transforms
    ):
        mean = _mean(fn.base_dist)
        for transform in fn.transforms if mean is not None else ():
            mean = transform(mean)
    else:
        return None
    return None if mean is None else jnp.broadcast_to(mean, fn.shape())


def _why_not(program: Program, name: str, message: Any) -> str:
    """What keeps a site's law from being Gaussian; "" if nothing does."""
    site, fn = program.sites[name], message["fn"]
    if site.scanned:
        return "is a series made by a scan, whose steps depend on each other"
    if site.masked:
        return "is masked, so that its prior is not that of its distribution"
    if message["scale"] is not None:
        return "has a scaled prior (handlers.scale, or a subsampled plate)"
    if _mean(_on_the_real_line(fn)) is None:
        return f"has the prior {site.distribution}"
    return ""


def gaussian_sites(program: Program) -> GaussianSites:
    """Look at the priors of all latent sites.

    Cost: traces the model twice.
    """
    refused: dict[str, str] = {}

    def look(position: Position, data: Sequence[Any]) -> None:
        trace = positions.trace_at(program, position, data)
        refused.update({s.name: _why_not(program, s.name, trace[s.name]) for s in program.latent})

    with program.context():
        jax.eval_shape(look, positions.shapes(program), program.data)
    names = tuple(name for name, why in refused.items() if not why)
    return GaussianSites(
        names, tuple((n, why) for n, why in refused.items() if why), _parents(program, names)
    )


def _parents(program: Program, names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """By site, the latent sites that its mean or its draws depend on."""
    traced = program.traced(GaussianDraws(names))
    (shapes, _), places = GaussianDraws(names).example(program), {}
    for place, name in enumerate(sorted(shapes)):  # the order of the inputs
        places[name] = traced.jaxpr.invars[place]
    found: dict[str, list[str]] = {name: [] for name in names}
    for parent, first in places.items():
        rest = [v for v in traced.jaxpr.invars if v is not first]
        flags = dependents(traced.jaxpr.replace(invars=[first, *rest]), 1)
        of_sites = dict(zip(sorted(names), zip(flags[::2], flags[1::2], strict=True), strict=True))
        for name in names:
            if any(of_sites[name]):
                found[name].append(parent)
    return tuple(tuple(found[name]) for name in names)


@dataclasses.dataclass(frozen=True)
class GaussianDraws:
    """(position, key) -> mean and a draw of each of some Gaussian sites, given all others.

    A function of a program: see `Program.traced`. Both are in the coordinates of the position.
    """

    names: tuple[str, ...]

    def example(self, program: Program) -> Any:
        return positions.shapes(program), key_shape()

    def __call__(self, program: Program, given: tuple[Position, Any], data: Sequence[Any]) -> Any:
        position, key = given
        trace = positions.trace_at(program, position, data)
        laws = {name: _on_the_real_line(trace[name]["fn"]) for name in self.names}
        return {
            name: (_mean(law), law.sample(random.fold_in(key, number)))
            for number, (name, law) in enumerate(laws.items())
        }
