"""Kernels for discrete sites with finite supports.

One step moves every element of its sites once, one after the other (Gibbs, Metropolised Gibbs), or
one element (locally balanced proposals, Gibbs with gradients).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.nn import log_softmax
from jax.scipy.special import logsumexp

from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.kernel import SAMPLING, Info, Kernel, Placed, Spec, Stage
from ppl_toolkit.inference.randomness import accept, categorical, repeated
from ppl_toolkit.inference.target import Space, Target
from ppl_toolkit.positions import Position

__all__ = ["Gibbs", "GibbsWithGradients", "LocallyBalanced", "MetropolisedGibbs"]


def _require_finite(label: str, space: Space) -> None:
    wrong = [name for name, kind in space.items() if not kind.discrete]
    if wrong:
        raise MethodError(
            f"{label} moves discrete sites, but {wrong} are continuous. Compose it: "
            f"cycle([block(NUTS(), {wrong}), block({label}(), [discrete sites])])."
        )
    endless = [name for name, kind in space.items() if not kind.cardinality]
    if endless:
        raise MethodError(
            f"{label} tries every value of a site, but {endless} have infinitely many, or a joint "
            "support; truncate their distributions, or move them by an involutive kernel."
        )


@dataclasses.dataclass(frozen=True)
class _Discrete(Spec):
    """What the kernels of this file share: a state that is the position alone."""

    def require(self, space: Space) -> None:
        _require_finite(type(self).__name__, space)

    @abc.abstractmethod
    def _step(self, key: Any, position: Position, target: Target) -> tuple[Position, Info]:
        """The new position, and the statistics."""

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            position, info = self._step(key, state.position, target)
            return Placed(position, ()), info

        return Kernel(
            lambda position, key: Placed(position, ()),
            step,
            lambda state, position: Placed(position, ()),
        )


def _with(position: Position, name: str, element: Any, value: Any) -> Position:
    """The position with one element (flat number) of one site at another value."""
    array = position[name]
    flat = array.reshape(-1).at[element].set(jnp.asarray(value, array.dtype))
    return {**position, name: flat.reshape(array.shape)}


def _log_conditional(position: Position, name: str, element: Any, target: Target) -> Any:
    """Log density, up to a constant, of every value of one element given all others: (K,)."""
    return jax.vmap(lambda v: target.log_density(_with(position, name, element, v)))(
        target.support(name)
    )


def _sweep(
    key: Any,
    position: Position,
    target: Target,
    update: Callable[[Any, Position, str, Any], tuple[Position, Any]],
) -> tuple[Position, Any]:
    """``update`` on every element in order; also the share of elements that changed."""
    changes, count = jnp.zeros(()), 0
    for number, name in enumerate(sorted(position)):
        size, key_site = position[name].size, random.fold_in(key, number)

        def one(i: Any, carry: tuple, name: str = name, key: Any = key_site) -> tuple:
            position, changes = carry
            position, changed = update(random.fold_in(key, i), position, name, i)
            return position, changes + changed

        position, changes = repeated(size, one, (position, changes))
        count += size
    return position, changes / max(count, 1)


@dataclasses.dataclass(frozen=True)
class Gibbs(_Discrete):
    """Draws every element from its conditional distribution, one after the other.

    Cost: K evaluations of the log density per element, K the size of its support.
    """

    reversible: ClassVar[bool] = False  # a sweep in fixed order; each of its steps is

    def _step(self, key: Any, position: Position, target: Target) -> tuple[Position, Info]:
        def update(key: Any, position: Position, name: str, i: Any) -> tuple[Position, Any]:
            drawn = categorical(key, _log_conditional(position, name, i, target))
            value = target.support(name)[drawn]
            return _with(position, name, i, value), value != position[name].reshape(-1)[i]

        position, changed = _sweep(key, position, target, update)
        return position, {"changed": changed}


@dataclasses.dataclass(frozen=True)
class MetropolisedGibbs(_Discrete):
    """Proposes another value of every element, one after the other; never the present one.

    Value c is proposed with probability p_c / (1 - p_current) and accepted with probability
    min(1, (1 - p_current) / (1 - p_c)), p the conditional distribution: better than Gibbs in
    Peskun's order. Cost: as Gibbs. Source: Liu (1996), Biometrika 83.
    """

    reversible: ClassVar[bool] = False

    def _step(self, key: Any, position: Position, target: Target) -> tuple[Position, Info]:
        def update(key: Any, position: Position, name: str, i: Any) -> tuple[Position, Any]:
            key_value, key_accept = random.split(key)
            levels, old = target.support(name), position[name].reshape(-1)[i]
            log_p = log_softmax(_log_conditional(position, name, i, target))
            current = jnp.argmax(levels == old)
            others = log_p.at[current].set(-jnp.inf)
            proposed = categorical(key_value, others)
            # log(1 - p_c): the sum of all others, for c = current and c = proposed
            ratio = logsumexp(others) - logsumexp(log_p.at[proposed].set(-jnp.inf))
            accepted = accept(key_accept, ratio) & (proposed != current)
            value = jnp.where(accepted, levels[proposed], old)
            return _with(position, name, i, value), accepted

        position, changed = _sweep(key, position, target, update)
        return position, {"acceptance_rate": changed}


# -- one element at a time, chosen by how much it matters ------------------------------------------

_BALANCED: dict[str, Callable[[Any], Any]] = {
    "sqrt": lambda log_t: 0.5 * log_t,
    "barker": lambda log_t: -jnp.logaddexp(0.0, -log_t),
    "min": lambda log_t: jnp.minimum(0.0, log_t),
    "max": lambda log_t: jnp.maximum(0.0, log_t),
}


def _neighbours(position: Position, target: Target) -> list[tuple[str, Any, Any]]:
    """All changes of one element to one of its values: (site, elements (M,), values (M,))."""
    moves = []
    for name in sorted(position):
        size, levels = position[name].size, target.support(name)
        elements = jnp.repeat(
            jnp.arange(size), levels.shape[0], total_repeat_length=size * len(levels)
        )
        moves.append((name, elements, jnp.tile(levels, size)))
    return moves


def _is_present(position: Position, moves: list[tuple[str, Any, Any]]) -> Any:
    """Which changes change nothing."""
    return jnp.concatenate(
        [position[name].reshape(-1)[elements] == values for name, elements, values in moves]
    )


def _moved(position: Position, moves: list[tuple[str, Any, Any]], which: Any) -> Position:
    """The position after change number ``which``."""
    new, first = dict(position), 0
    for name, elements, values in moves:
        count = elements.shape[0]
        inside = (which >= first) & (which < first + count)
        local = jnp.clip(which - first, 0, count - 1)
        changed = _with(position, name, jnp.asarray(elements)[local], values[local])[name]
        new[name] = jnp.where(inside, changed, position[name])
        first += count
    return new


@dataclasses.dataclass(frozen=True)
class LocallyBalanced(_Discrete):
    """Changes one element, chosen by how much the density gains.

    A neighbour y (one element has another value) is proposed with probability proportional to
    g(pi(y) / pi(x)), where g(t) = t g(1 / t), and accepted with probability min(1, Z(x) / Z(y)), Z
    the sum of g over the neighbours.

    Args:
        balancing: g: "sqrt" (square root), "barker" (t / (1 + t)), "min" (min(1, t)) or "max".

    Cost: two evaluations of the log density for every neighbour (in batches of 256).
    Source: Zanella (2020), Journal of the American Statistical Association 115.
    """

    balancing: str = "sqrt"

    def __post_init__(self) -> None:
        if self.balancing not in _BALANCED:
            raise OptionError(
                f"balancing must be one of {list(_BALANCED)}; got {self.balancing!r}."
            )

    def _log_weights(self, position: Position, target: Target) -> Any:
        """Log g of the ratio for every neighbour; minus infinity for the position itself."""
        moves = _neighbours(position, target)
        here = target.log_density(position)
        number = jnp.arange(sum(elements.shape[0] for _, elements, _ in moves))
        there = lax.map(
            lambda i: target.log_density(_moved(position, moves, i)), number, batch_size=256
        )
        balanced = _BALANCED[self.balancing](there - here)
        return jnp.where(_is_present(position, moves), -jnp.inf, balanced)

    def _step(self, key: Any, position: Position, target: Target) -> tuple[Position, Info]:
        key_which, key_accept = random.split(key)
        forth = self._log_weights(position, target)
        which = categorical(key_which, forth)
        new = _moved(position, _neighbours(position, target), which)
        ratio = logsumexp(forth) - logsumexp(self._log_weights(new, target))
        accepted = accept(key_accept, ratio)
        position = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, dict(position))
        return position, {"acceptance_rate": jnp.minimum(1.0, jnp.exp(ratio))}


@dataclasses.dataclass(frozen=True)
class GibbsWithGradients(_Discrete):
    """Changes one element, chosen by the gradient of the density: for many discrete elements.

    The log ratio pi(y) / pi(x) of every neighbour is replaced by its first-order estimate, the
    gradient at x times the change; the proposal is proportional to the square root of that, and the
    exact Metropolis-Hastings ratio corrects it. The model must accept real values at the sites.

    Cost: two gradients of the log density, whatever the number of elements.
    Source: Grathwohl, Swersky, Hashemi, Duvenaud, Maddison (2021), ICML.
    """

    relaxes: ClassVar[bool] = True

    def _log_proposal(self, position: Position, target: Target) -> Any:
        dtype = jnp.result_type(float)
        real = jax.tree.map(lambda x: x.astype(dtype), dict(position))
        slope = jax.grad(target.relaxed_log_density)(real)
        moves = _neighbours(position, target)
        gains = jnp.concatenate(
            [
                slope[name].reshape(-1)[elements] * (values - position[name].reshape(-1)[elements])
                for name, elements, values in moves
            ]
        )
        return log_softmax(jnp.where(_is_present(position, moves), -jnp.inf, 0.5 * gains))

    def _step(self, key: Any, position: Position, target: Target) -> tuple[Position, Info]:
        key_which, key_accept = random.split(key)
        moves = _neighbours(position, target)
        forth = self._log_proposal(position, target)
        which = categorical(key_which, forth)
        new = _moved(position, moves, which)
        back = _back(position, moves, which)
        ratio = (
            target.log_density(new)
            - target.log_density(position)
            + self._log_proposal(new, target)[back]
            - forth[which]
        )
        accepted = accept(key_accept, ratio)
        position = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, dict(position))
        return position, {"acceptance_rate": jnp.minimum(1.0, jnp.exp(ratio))}


def _back(position: Position, moves: list[tuple[str, Any, Any]], which: Any) -> Any:
    """The number of the change that undoes change number ``which``."""
    first, found = 0, which
    for name, elements, values in moves:
        count = elements.shape[0]
        element = jnp.asarray(elements)[jnp.clip(which - first, 0, count - 1)]
        old = position[name].reshape(-1)[element]
        undo = first + jnp.argmax((elements == element) & (values == old))
        found = jnp.where((which >= first) & (which < first + count), undo, found)
        first += count
    return found
