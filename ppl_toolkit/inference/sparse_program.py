"""What sparse variational inference needs of a program, and how it calls it.

`SparseProgram` is the protocol; the classes below are functions of a program, traced into the
compiled run (see `Program.traced`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import biject_to

from ppl_toolkit.inference.sparse_posterior import InverseGammaScale, Pieces, PointScale
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import key_shape

__all__ = ["PiecesOf", "Sites", "SparseProgram", "Start", "sparse_model"]


@runtime_checkable
class SparseProgram(Protocol):
    """A program that sparse variational inference can serve.

    Its latent sites are those of ``priors``; ``sigma2``, unless ``law`` is a Delta; ``w`` (M, C),
    standard normal; and others only with ``infer={"predicted": True}``. The labels are independent
    and categorical given the latent functions of `sparse_posterior`, which are their logits.

    Attributes:
        classes: C.
        law: of sigma^2.
        priors: of the kernel's parameters, by site.
    """

    classes: int
    law: Any
    priors: Mapping[str, Any]

    def pieces(self, parameters: Mapping[str, Any], rows: Any, *args: Any, **kwargs: Any) -> Pieces:
        """Of the ``rows`` of the data (all if None); the further arguments are the program's."""

    def check_values(self, *args: Any, **kwargs: Any) -> None:
        """Raise a `DataError` if the arguments, NumPy arrays here, have values of no use."""


def sparse_model(program: Program) -> SparseProgram:
    """The model of a program that has passed `SVTP.check`."""
    model: Any = program.model
    return model


def _parameters(program: Program, u: Any) -> tuple[dict[str, Any], Any]:
    """The kernel's parameters at an unconstrained vector (H,), and their log density there."""
    values: dict[str, Any] = {}
    total, at = jnp.zeros((), u.dtype), 0
    for name, prior in sparse_model(program).priors.items():
        site, transform = program.sites[name], biject_to(prior.support)
        own = u[at : at + site.unconstrained_size].reshape(site.unconstrained_shape)
        values[name] = transform(own)
        jacobian = transform.log_abs_det_jacobian(own, values[name])
        total += jnp.sum(prior.log_prob(values[name])) + jnp.sum(jacobian)
        at += site.unconstrained_size
    return values, total


@dataclasses.dataclass(frozen=True)
class Start:
    """Key -> the kernel's parameters drawn from their priors, unconstrained: of a program."""

    def example(self, program: Program) -> Any:
        return key_shape()

    def __call__(self, program: Program, key: Any, data: Sequence[Any]) -> Any:
        parts = [
            jnp.ravel(biject_to(prior.support).inv(prior.sample(random.fold_in(key, number))))
            for number, prior in enumerate(sparse_model(program).priors.values())
        ]
        return jnp.concatenate([jnp.zeros(0, program.precision), *parts])


@dataclasses.dataclass(frozen=True)
class Sites:
    """Unconstrained parameters -> their values by site, log prior, law of sigma^2: of a program."""

    def example(self, program: Program) -> Any:
        sizes = [program.sites[name].unconstrained_size for name in sparse_model(program).priors]
        return jax.ShapeDtypeStruct((sum(sizes),), program.precision)

    def __call__(self, program: Program, u: Any, data: Sequence[Any]) -> Any:
        law: Any = sparse_model(program).law
        if isinstance(law, dist.Delta):
            scale: Any = PointScale(_constant(law.v, u.dtype))
        else:
            a, b = (_constant(x, u.dtype) for x in (law.concentration, law.rate))
            scale = InverseGammaScale.of(a, b)
        return (*_parameters(program, u), scale)


@dataclasses.dataclass(frozen=True)
class PiecesOf:
    """(unconstrained parameters, rows) -> `Pieces`: a function of a program."""

    count: int

    def example(self, program: Program) -> Any:
        return Sites().example(program), jax.ShapeDtypeStruct((self.count,), np.int32)

    def __call__(self, program: Program, more: Any, data: Sequence[Any]) -> Pieces:
        u, rows = more
        args, kwargs = program.arguments.rebuild(data[: len(program.arguments.arrays)])
        return sparse_model(program).pieces(_parameters(program, u)[0], rows, *args, **kwargs)


def _constant(value: Any, dtype: Any) -> Any:
    """A number that is no part of the program's text, so that another one compiles nothing."""
    return jnp.asarray(np.atleast_1d(value), dtype)[0]
