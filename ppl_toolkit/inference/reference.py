"""A proper law to start from, where a prior is flat.

With u the unconstrained values of the sites whose priors are flat, J(u) the Jacobian of their
transforms and q a proper density, the path of laws

    p(rest) q(u) [p(y | x) J(u) / q(u)]^b,    b from 0 to 1,

ends at the posterior whatever q is, and its evidence is that of the flat prior: the integral of
p(y | x) p(rest) over all x. Here q is Student's t with 3 degrees of freedom for each coordinate,
whose tails reach far.

These are functions of a program that a method calls, see `Program.traced`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import random

from ppl_toolkit import positions
from ppl_toolkit.positions import Position
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import key_shape

__all__ = ["ReferenceDraw", "ReferenceParts"]

_FREEDOM = 3.0


@dataclasses.dataclass(frozen=True)
class ReferenceParts:
    """position -> (log p(rest) + log q(u), log p(y | x) + log J(u) - log q(u))."""

    scale: float

    def example(self, program: Program) -> Any:
        return positions.shapes(program)

    def __call__(self, program: Program, position: Position, data: Sequence[Any]) -> Any:
        prior, likelihood = positions.log_parts(program, position, data)
        jacobian = positions.log_jacobian(program, position, data, _flat(program))
        law = dist.StudentT(_FREEDOM, 0.0, self.scale)
        log_q = sum((jnp.sum(law.log_prob(position[n])) for n in _flat(program)), start=0.0)
        return prior - jacobian + log_q, likelihood + jacobian - log_q


@dataclasses.dataclass(frozen=True)
class ReferenceDraw:
    """key -> a position from the prior, its flat sites from q."""

    scale: float

    def example(self, program: Program) -> Any:
        return key_shape()

    def __call__(self, program: Program, key: Any, data: Sequence[Any]) -> dict[str, Any]:
        position = positions.start_position(program, key, data)
        for number, name in enumerate(_flat(program)):
            own, like = random.fold_in(key, number), position[name]
            position[name] = self.scale * random.t(own, _FREEDOM, like.shape, like.dtype)
        return position


def _flat(program: Program) -> list[str]:
    return [site.name for site in program.latent if not site.proper]
