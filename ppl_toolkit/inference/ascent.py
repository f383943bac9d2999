"""Steps of stochastic ascent along noisy gradients.

An optimiser has optax's two functions, ``init(x) -> state`` and ``update(gradient, state, x) ->
(change, state)``, and goes *down* the gradient it is given: any of optax's is one, too. Averages of
the iterates converge at the best rate if the step sizes fall more slowly than 1 / t (Polyak and
Juditsky 1992).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.step_sizes import PolynomialDecay, require_step_size

__all__ = ["Adam", "Average", "ascended", "finite", "require_optimizer"]

_TINY = 1e-8  # beside the root of a second moment


class _Moments(NamedTuple):
    """Running moments of the gradient, per coordinate.

    Attributes:
        taken: steps so far.
        mean, square: sums with weights that fall geometrically, to be divided by the weights' sum.
    """

    taken: Any
    mean: Any
    square: Any


def _falling() -> PolynomialDecay:
    """From 0.1 at the beginning to 0.016 after 400 steps."""
    return PolynomialDecay(0.6, 20.0, 0.6)


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam, whose steps have the size of ``step_size`` in every coordinate.

    With g the gradient, m and v the means of g and g^2 with geometric weights, steps are
    -a_t m / sqrt(v).

    Args:
        step_size: a number, or a function of the number of the step; falls from 0.1 by default.
        memory: the factors by which the weights in m and v fall at every step.

    Raises:
        OptionError: an option out of its range.

    Source: Kingma and Ba (2015), ICLR.
    """

    step_size: Any = dataclasses.field(default_factory=_falling)
    memory: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        require_step_size("Adam", self.step_size, "Begin with 0.1.")
        object.__setattr__(self, "memory", tuple(self.memory))
        if len(self.memory) != 2 or not all(0.0 <= b < 1.0 for b in self.memory):
            raise OptionError(f"memory must be two numbers in [0, 1); got {self.memory!r:.60}.")

    def init(self, x: Any) -> _Moments:
        zero = jax.tree.map(jnp.zeros_like, x)
        return _Moments(jnp.zeros((), jnp.int32), zero, zero)

    def update(self, gradient: Any, state: _Moments, x: Any = None) -> tuple[Any, _Moments]:
        first, second = self.memory
        mean = jax.tree.map(lambda m, g: first * m + (1 - first) * g, state.mean, gradient)
        square = jax.tree.map(lambda v, g: second * v + (1 - second) * g**2, state.square, gradient)
        taken = state.taken + 1
        size = self.step_size(state.taken) if callable(self.step_size) else self.step_size

        def change(m: Any, v: Any) -> Any:
            m, v = m / (1 - first**taken), v / (1 - second**taken)
            return jnp.asarray(-size * m / (jnp.sqrt(v) + _TINY), m.dtype)

        return jax.tree.map(change, mean, square), _Moments(taken, mean, square)


def require_optimizer(optimizer: Any) -> None:
    """Refuse what is none.

    Raises:
        OptionError: says what one is.
    """
    functions = (getattr(optimizer, name, None) for name in ("init", "update"))
    another = isinstance(optimizer, type) or hasattr(optimizer, "get_params")  # NumPyro's
    if another or not all(map(callable, functions)):
        raise OptionError(
            "optimizer must be Adam(...) or one of optax's, such as optax.sgd(1e-3); got "
            f"{optimizer!r:.60}."
        )


def finite(tree: Any) -> Any:
    """Whether all numbers of a pytree are."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()


def ascended(optimizer: Any, gradient: Any, state: Any, x: Any) -> tuple[Any, Any, Any]:
    """One step up the gradient; no step where the gradient or the new point is not finite.

    Returns:
        The new point, the optimiser's state, and whether there was a step.
    """
    down = jax.tree.map(jnp.negative, gradient)
    change, new_state = optimizer.update(down, state, x)
    new = jax.tree.map(lambda a, b: jnp.asarray(a + b, a.dtype), x, change)
    fine = finite((gradient, new))

    def chosen(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)

    return chosen(new, x), chosen(new_state, state), fine


class Average(NamedTuple):
    """A running mean over the iterations after a beginning; before, the latest value.

    Attributes:
        count: iterations in it.
        mean: a pytree.
    """

    count: Any
    mean: Any

    @classmethod
    def of(cls, values: Any) -> Average:
        return cls(jnp.zeros((), jnp.int32), values)

    def update(self, values: Any, counts: Any) -> Average:
        """With the values of one more iteration.

        Args:
            values: of the structure of the mean.
            counts: whether the beginning is over; True from some iteration on.
        """
        count = self.count + jnp.asarray(counts, jnp.int32)
        weight = 1.0 / jnp.maximum(count, 1)
        mean = jax.tree.map(
            lambda m, x: jnp.asarray(m + weight * (x - m), m.dtype), self.mean, values
        )
        return Average(count, mean)
