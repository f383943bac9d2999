"""Climbs to a maximum of a function of one flat vector: L-BFGS from one start, or from several.

The directions and the line search (strong Wolfe conditions, by zooming) are optax's; values that
are not finite count as outside of the domain, and steps are shortened until they are inside.

Source: Nocedal and Wright (2006), Numerical Optimization, chapters 3 and 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Climb", "Path", "climb", "highest", "start_within"]

_TRIES = 100  # points drawn for a start with a finite value
_LINE_SEARCH = 30  # evaluations in a line search, at most
_ROUNDING = 4.0  # units of rounding: a smaller rise is none

Vector = Float[Array, " D"]
Scalar = Float[Array, ""]
Function = Callable[[Any], Any]


class Path(NamedTuple):
    """The points of a climb, start and end included.

    Attributes:
        positions, gradients: (steps + 1, D); rows beyond ``length`` are zero.
        length: how many points there are.
    """

    positions: Float[Array, "T D"]
    gradients: Float[Array, "T D"]
    length: Int[Array, ""]


class Climb(NamedTuple):
    """Where a climb ended.

    Attributes:
        position, value, gradient: there; the value is minus infinity if none was finite.
        evaluations: gradients computed on the way.
    """

    position: Vector
    value: Scalar
    gradient: Vector
    evaluations: Int[Array, ""]

    @property
    def found(self) -> Bool[Array, ""]:
        """Whether value and gradient are finite."""
        return jnp.isfinite(self.value) & jnp.all(jnp.isfinite(self.gradient))


class _Turn(NamedTuple):
    """What goes round the loop: the point reached, the next one, and whether to go on."""

    reached: Climb
    next: Vector
    optimizer: Any
    path: Path
    idle: Int[Array, ""]


def climb(
    function: Function, start: Vector, steps: int, memory: int = 6, keeps_path: bool = False
) -> tuple[Climb, Path]:
    """L-BFGS from ``start`` up to a maximum of ``function``, or until ``steps`` steps are taken.

    Args:
        function: of a vector (D,); NaN counts as minus infinity.
        start: (D,).
        steps: at most.
        memory: pairs of steps and changes of the gradient that curvatures are taken from.
        keeps_path: whether the path is returned; else it has no rows.

    Returns:
        Where it ended (a climb ends when two steps running bring no rise beyond rounding), and the
        path.

    Cost: one or two gradients per step as a rule, and O(memory D).
    """
    import optax

    @jax.jit
    def loss(x: Vector) -> Scalar:
        value = -function(x)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    search = optax.scale_by_zoom_linesearch(_LINE_SEARCH, initial_guess_strategy="one")
    optimizer = optax.lbfgs(memory_size=memory, linesearch=search)
    evaluate = optax.value_and_grad_from_state(loss)
    none, low = jnp.zeros((), jnp.int32), jnp.asarray(-jnp.inf, start.dtype)
    rows = jnp.zeros((steps + 1 if keeps_path else 0, *start.shape), start.dtype)
    first = _Turn(
        Climb(start, low, jnp.zeros_like(start), none), start, optimizer.init(start),
        Path(rows, rows, none), none,
    )  # fmt: skip

    def go_on(turn: _Turn) -> Bool[Array, ""]:
        return (turn.path.length <= steps) & (turn.idle < 2)

    def step(turn: _Turn) -> _Turn:
        reached, x, path = turn.reached, turn.next, turn.path
        value, gradient = evaluate(x, state=turn.optimizer)
        new = Climb(x, -value, -gradient, reached.evaluations)
        least = _ROUNDING * jnp.finfo(x.dtype).eps * (1.0 + jnp.abs(reached.value))
        rises = new.found & (new.value > reached.value + jnp.where(path.length > 0, least, 0.0))
        higher = new.found & (new.value >= reached.value)
        if keeps_path:
            path = path._replace(
                positions=path.positions.at[path.length].set(x),
                gradients=path.gradients.at[path.length].set(new.gradient),
            )
        change, state = optimizer.update(
            gradient, turn.optimizer, x, value=value, grad=gradient, value_fn=loss
        )
        searched = optax.tree.get(state, "info").num_linesearch_steps.astype(jnp.int32)
        reached = jax.tree.map(lambda a, b: jnp.where(higher, a, b), new, reached)
        reached = reached._replace(evaluations=new.evaluations + searched)
        moved = new.found & jnp.all(jnp.isfinite(change)) & jnp.any(change != 0.0)
        idle = jnp.where(moved, jnp.where(rises, 0, turn.idle + 1), 2)
        following = jnp.where(moved, x + change, x)
        return _Turn(reached, following, state, path._replace(length=path.length + 1), idle)

    end = lax.while_loop(go_on, step, first)
    return end.reached, end.path


def start_within(function: Function, key: Any, like: Vector, radius: Any) -> Vector:
    """A point uniform in (-radius, radius)^D where the function is finite, if one is soon found."""

    def draw(number: Any) -> Vector:
        shape, dtype = like.shape, like.dtype
        return radius * random.uniform(random.fold_in(key, number), shape, dtype, -1.0, 1.0)

    def again(number: Any) -> Bool[Array, ""]:
        return (number < _TRIES) & ~jnp.isfinite(function(draw(number)))

    return draw(lax.while_loop(again, lambda number: number + 1, jnp.zeros((), jnp.int32)))


def highest(
    function: Function,
    key: Any,
    starts: int,
    given: tuple[Vector, Any],
    radius: Any,
    steps: int,
    memory: int = 6,
) -> Climb:
    """The highest end of several climbs; evaluations are those of all.

    Args:
        function: see `climb`.
        key: of the random starts.
        starts: how many.
        given: a point for the first, and whether there is one.
        radius: of the others, see `start_within`.
        steps, memory: see `climb`.
    """
    position, is_given = given

    def further(number: Any, best: Climb) -> Climb:
        drawn = start_within(function, random.fold_in(key, number), position, radius)
        begin = jnp.where(is_given & (number == 0), position, drawn)
        new, _ = climb(function, begin, steps, memory)
        better = new.found & (new.value > best.value)
        total = best.evaluations + new.evaluations
        chosen = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)
        return chosen._replace(evaluations=total)

    nothing = Climb(
        position, jnp.asarray(-jnp.inf, position.dtype), jnp.zeros_like(position),
        jnp.zeros((), jnp.int32),
    )  # fmt: skip
    return lax.fori_loop(0, starts, further, nothing)
