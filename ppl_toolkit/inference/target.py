"""What a kernel leaves invariant: an unnormalised density over positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from ppl_toolkit import positions
from ppl_toolkit.layout import Cases, Layout, Plate
from ppl_toolkit.positions import Position

__all__ = ["SiteKind", "Space", "Target", "space_of"]


class SiteKind(NamedTuple):
    """What kernels must know of a site.

    Attributes:
        discrete: whether its values are integers.
        cardinality: the size of a finite support, 0 if there is none.
        support: printed form of its support.
        within: the masked plate or the cases that it lies in, or whose number it is.
    """

    discrete: bool
    cardinality: int = 0
    support: str = ""
    within: Plate | Cases | None = None


Space = Mapping[str, SiteKind]


def space_of(program: Any) -> dict[str, SiteKind]:
    """The latent sites of a program."""
    within: dict[str, Plate | Cases] = {}
    for plate in program.layout.plates:
        within |= dict.fromkeys((plate.number, *plate.sites), plate)
    for cases in program.layout.cases:
        within |= dict.fromkeys((cases.number, *(name for name, _ in cases.sites)), cases)
    return {
        site.name: SiteKind(site.discrete, site.cardinality, site.support, within.get(site.name))
        for site in program.latent
    }


@dataclasses.dataclass(frozen=True)
class Target:
    """A density p(x) L(x)^power over positions, up to a constant.

    Attributes:
        parts: position -> (log p, log L), the log prior density (Jacobians included) and the log
            likelihood.
        levels: the values of the finite discrete sites' elements, arrays (K,).
        power: of the likelihood.
        layout: the masked plates and cases of the program.
        relaxed: ``parts`` for positions whose discrete sites have real values; ``parts`` if None.
        own: the functions `positions.own_draws` and `positions.own_scores`, for moves that propose
            new elements from their own law; None if there are none.
        minibatches: the functions `minibatches.rows` and `minibatches.log_parts_of_rows`, for
            kernels that draw the rows of subsampled plates anew; None if there are none.
        functions: of (position, more), by the objects that kernels call them by; see `call`.
    """

    parts: Callable[[Position], tuple[Any, Any]]
    levels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    power: Any = 1.0
    layout: Layout = Layout()  # noqa: RUF009 (frozen)
    own: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None
    relaxed: Callable[[Position], tuple[Any, Any]] | None = None
    minibatches: tuple[Callable[[Any], Any], Callable[[Any], tuple[Any, Any]]] | None = None
    functions: Mapping[Any, Callable[[tuple[Position, Any]], Any]] = dataclasses.field(
        default_factory=dict
    )

    @classmethod
    def of(cls, log_density: Callable[[Position], Any], **levels: Any) -> Target:
        """A bare log density, all of it likelihood."""
        return cls(lambda x: (0.0, log_density(x)), levels)

    @classmethod
    def of_program(
        cls, program: Any, data: Any, position: Position, functions: Iterable[Any] = ()
    ) -> Target:
        """The posterior of a program given data, for use inside a traced function.

        Args:
            program: the program.
            data: the arrays of `Program.data`, or others of the same shapes.
            position: any position; what supports depend on is taken from it.
            functions: those that the kernel asks for.
        """

        def bound(function: Callable) -> Callable:
            return lambda given: function(program, given, data)

        return cls(
            lambda x: positions.log_parts(program, x, data),
            positions.levels(program, position, data),
            layout=program.layout,
            own=(
                lambda given: positions.own_draws(program, given, data),
                lambda x: positions.own_scores(program, x, data),
            ),
            functions={f: bound(f) for f in functions},
        )

    def log_density(self, position: Position) -> Any:
        return self._total(*self.parts(position))

    def relaxed_log_density(self, position: Position) -> Any:
        """The log density where discrete sites have real values."""
        return self._total(*(self.relaxed or self.parts)(position))

    def _total(self, prior: Any, likelihood: Any) -> Any:
        if isinstance(self.power, float) and self.power == 1.0:
            return prior + likelihood
        return prior + jnp.where(self.power == 0.0, 0.0, self.power * likelihood)

    def support(self, site: str) -> Any:
        """The values of an element of a finite discrete site, shape (K,)."""
        return jnp.asarray(self.levels[site])

    def log_likelihood(self, position: Position) -> Any:
        return self.parts(position)[1]

    def minibatch(self, key: Any) -> Target:
        """The target seen through newly drawn rows of its subsampled plates; itself without any.

        Its log density and gradient are unbiased estimates of those of the whole.
        """
        if self.minibatches is None or not (rows := self.minibatches[0](key)):
            return self
        parts = self.minibatches[1]
        return dataclasses.replace(self, parts=lambda x: parts((x, rows)), minibatches=None)

    def call(self, function: Any, position: Position, more: Any) -> Any:
        """One of the functions of the program that kernels have asked for (`Spec.functions`)."""
        return self.functions[function]((position, more))

    def given(self, rest: Position) -> Target:
        """The conditional density of the sites that are not in ``rest``."""
        own = None
        if self.own is not None:
            draws, scores = self.own
            own = (
                lambda given: draws((given[0], {**rest, **given[1]})),
                lambda x: scores({**rest, **x}),
            )
        relaxed = None
        if self.relaxed is not None:
            whole = self.relaxed
            real = {name: jnp.asarray(x, jnp.result_type(float)) for name, x in rest.items()}
            relaxed = lambda x: whole({**real, **x})  # noqa: E731
        minibatches = None
        if self.minibatches is not None:
            rows, of_rows = self.minibatches
            minibatches = (rows, lambda given: of_rows(({**rest, **given[0]}, given[1])))

        def completed(function: Callable) -> Callable:
            return lambda given: function(({**rest, **given[0]}, given[1]))

        return dataclasses.replace(
            self,
            parts=lambda x: self.parts({**rest, **x}),
            own=own,
            relaxed=relaxed,
            minibatches=minibatches,
            functions={name: completed(f) for name, f in self.functions.items()},
        )

    def tempered(self, power: Any) -> Target:
        """The same prior with the likelihood to that power of what it is."""
        if isinstance(self.power, float) and self.power == 1.0:
            return dataclasses.replace(self, power=power)
        return dataclasses.replace(self, power=self.power * power)
