"""Additive functionals of a series: what smoothing takes expectations of.

h(x_{0:T}) = h_0(x_0) + sum_t h_t(c_{t-1}, x_t).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl_toolkit.errors import MethodError, OptionError, PPLError
from ppl_toolkit.inference.randomness import over
from ppl_toolkit.inference.state_space import Series, StateSpace
from ppl_toolkit.positions import start_position
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import key_shape, user_line

__all__ = [
    "Additive",
    "as_additive",
    "first_sums",
    "require_ancestors",
    "require_bound",
    "require_moves",
]

_UNNAMED = "smoothed"
_EXAMPLE = 'functional=lambda carry, latents, t: {"cross": carry * latents["x"]}'


@dataclasses.dataclass(frozen=True)
class Additive:
    """An additive functional, several ones by name.

    Args:
        step: (carry before the step, latents of the step by name, number of the step from 0) ->
            h_t, a number or an array, or a dictionary of them by name.
        start: initial sites by name -> h_0, of the same structure; zero if None.
    """

    step: Callable[[Any, dict[str, Any], Any], Any]
    start: Callable[[dict[str, Any]], Any] | None = None

    def increment(self, carry: Any, latents: dict[str, Any], t: Any) -> dict[str, Any]:
        """h_t by name."""
        return _named(self.step(carry, latents, t))

    def begin(self, series: Series) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Initial sites -> h_0 by name."""
        if self.start is not None:
            own = self.start
            return lambda initial: _named(own(initial))

        def one(key: Any) -> Any:
            first = series.start(key)
            return self.increment(first.carry, series.step(key, first.carry, 0).latents, 0)

        like = jax.eval_shape(one, key_shape())
        return lambda _: {name: jnp.zeros(x.shape, x.dtype) for name, x in like.items()}

    def first(self, series: Series, initial: Any, count: int) -> dict[str, Any]:
        """h_0 of every particle, arrays (N, ...) by name."""
        return first_sums(self.begin(series), initial, count)

    def check(self, space: StateSpace, program: Program) -> None:
        """Try it on the series of a program.

        Raises:
            MethodError: it raises an error, or what it returns are no numbers by name.
        """

        def trial(key: Any) -> Any:
            series = space.at(program, start_position(program, key, program.data), program.data)
            first = series.start(key)
            latents = series.step(key, first.carry, 0).latents
            return (
                self.begin(series)(first.latents),
                self.increment(first.carry, latents, jnp.zeros((), jnp.int32)),
            )

        try:
            with program.context():
                start, step = jax.eval_shape(trial, key_shape())
        except PPLError:
            raise
        except Exception as error:
            raise MethodError(
                f"the functional raised {type(error).__name__} at {user_line(error)}: {error}. It "
                f"is called as {_EXAMPLE}."
            ) from None
        shapes = [{name: x.shape for name, x in tree.items()} for tree in (start, step)]
        if shapes[0] != shapes[1]:
            raise MethodError(
                f"the functional's start gives {shapes[0]}, but its step {shapes[1]}: they are "
                "added up, so names and shapes must be the same."
            )


def _named(values: Any) -> dict[str, Any]:
    """Sums by name, in floats."""
    named = dict(values) if isinstance(values, Mapping) else {_UNNAMED: values}
    wide = jnp.result_type(float)
    for name, x in named.items():
        if not isinstance(name, str) or not hasattr(jnp.asarray(x), "dtype"):
            raise MethodError(f"the functional gives {name!r}, but names are strings.")
    return {name: jnp.asarray(x, wide) for name, x in named.items()}


def as_additive(functional: Any) -> Additive:
    """A functional as `Additive`.

    Raises:
        OptionError: it is no function.
    """
    if isinstance(functional, Additive):
        return functional
    if not callable(functional):
        raise OptionError(
            f"functional must be a function, such as {_EXAMPLE}; got {functional!r:.60}."
        )
    return Additive(functional)


def first_sums(start: Callable[[dict[str, Any]], Any], initial: Any, count: int) -> Any:
    """h_0 of every particle, arrays (N, ...); ``initial`` may be empty."""
    if jax.tree.leaves(initial):
        return over(start, initial)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), start({}))


def require_ancestors(ancestors: Any) -> None:
    """Refuse numbers of ancestors with which sums degenerate.

    Raises:
        OptionError: it is neither None nor an integer of two or more.
    """
    wrong = isinstance(ancestors, bool) or not isinstance(ancestors, int | np.integer)
    if ancestors is not None and (wrong or ancestors < 2):
        raise OptionError(
            "ancestors must be an integer >= 2 or None (all of them); with one, the sums "
            f"degenerate like genealogies. Got {ancestors!r}."
        )


def require_moves(name: str, moves: Any) -> None:
    """Refuse what is no way to draw ancestors.

    Raises:
        OptionError: it is neither "rejection" nor an integer of zero or more.
    """
    wrong = isinstance(moves, bool) or not isinstance(moves, int | np.integer) or moves < 0
    if wrong and moves != "rejection":
        raise OptionError(f"{name} must be an integer >= 0, or 'rejection'; got {moves!r}.")


def require_bound(space: StateSpace, program: Program, moves: Any) -> None:
    """Refuse rejection where the largest density of a step is not known.

    Raises:
        MethodError: says what to use instead.
    """
    if moves != "rejection":
        return

    def peak(key: Any) -> Any:
        series = space.at(program, start_position(program, key, program.data), program.data)
        return series.log_peak(series.start(key).carry, 0)

    with program.context():
        known = jax.eval_shape(peak, key_shape())
    if known is None or space.mixed:
        why = (
            "its observations depend on the carry"
            if space.mixed
            else f"the largest density of {list(space.latents)} is not known"
        )
        raise MethodError(
            f"ancestors cannot be drawn by rejection for {space.name}: {why}. Use a chain instead, "
            "such as moves=4, or exact draws (0)."
        )
