"""Layers of infinitely wide networks, and their composition.

A layer maps the covariances of its input units to those of its output units, as the number of units
grows without bound, together with the tangent kernel (Neal 1996; Lee et al. 2018; Jacot, Gabriel,
Hongler 2018). Weights are standard normal times ``weight_std / sqrt(fan in)``, biases standard
normal times ``bias_std`` (the NTK parametrisation); both are trained.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp

from ppl_toolkit.errors import ModelError
from ppl_toolkit.models.covariances import Covariances, Kernels, Variances
from ppl_toolkit.models.evaluation import evaluated, evaluated_variances

__all__ = [
    "Dense",
    "Layer",
    "LayerNorm",
    "Residual",
    "Serial",
    "SingleLayer",
    "check_order",
    "layer",
]


class Layer(abc.ABC):
    """A layer, or a network of them; immutable, and a pytree whose leaves are its parameters.

    Attributes:
        takes_gaussian: whether its input units must be Gaussian, so that only a layer of weights,
            or another layer that keeps them Gaussian, may come before it.
        gives_gaussian: whether its output units are Gaussian; None if they are when the input is.
    """

    takes_gaussian: ClassVar[bool] = False
    gives_gaussian: ClassVar[bool | None] = None

    @property
    def joint(self) -> bool:
        """Whether it needs the covariances of all pairs of an image's positions."""
        return False

    @abc.abstractmethod
    def cross(self, state: Covariances) -> Covariances:
        """Covariances of the output units at pairs of inputs."""

    @abc.abstractmethod
    def diagonal(self, state: Variances) -> Variances:
        """Variances of the output units at single inputs, in closed form: exact, no angle of zero.

        Cost: O(n), where pairs cost O(n1 n2).
        """

    def kernels(self, x1: Any, x2: Any = None, *, ntk: bool = True, block: int = 256) -> Kernels:
        """Both kernels at all pairs of inputs.

        Args:
            x1: inputs, vectors (n1, d) or images (n1, height, width, channels).
            x2: inputs (n2, ...); ``x1`` itself if None, which computes one half of the matrix and
                takes its diagonal from closed forms.
            ntk: whether to compute the tangent kernel, too.
            block: rows and columns worked on at a time. Work space is O(block^2).

        Returns:
            Matrices (n1, n2). NumPy arrays give float64 NumPy arrays, from a program compiled once
            for every shape; JAX arrays give JAX arrays in the precision that is active.

        Raises:
            DataError: the inputs are empty, not finite, or do not fit together.
            ModelError: the layers do not fit together, or not to the inputs.
        """
        check_order(self)
        return evaluated(self, x1, x2, ntk=ntk, block=block)

    def nngp(self, x1: Any, x2: Any = None, *, block: int = 256) -> Any:
        """The covariance (n1, n2) of the network's output over its weights: see `kernels`."""
        return self.kernels(x1, x2, ntk=False, block=block).nngp

    def ntk(self, x1: Any, x2: Any = None, *, block: int = 256) -> Any:
        """The neural tangent kernel (n1, n2): see `kernels`."""
        return self.kernels(x1, x2, ntk=True, block=block).ntk

    def variances(self, x: Any, *, ntk: bool = False) -> Kernels:
        """The diagonals (n,) of both kernels, in O(n)."""
        check_order(self)
        return evaluated_variances(self, x, ntk=ntk)


class SingleLayer(Layer):
    """A layer that is not made of others: it says what becomes of pairs and of single inputs."""

    def cross(self, state: Covariances) -> Covariances:
        sides = (self.diagonal(Variances(q, None)).nngp for q in (state.left, state.right))
        return Covariances(*self.pairs(state), *sides)

    @abc.abstractmethod
    def pairs(self, state: Covariances) -> tuple[Any, Any]:
        """The new `Covariances.nngp` and `Covariances.ntk`."""


@dataclass_transform(frozen_default=True)
def layer(*parameters: str) -> Any:
    """Decorator: a frozen dataclass that is a pytree of the named fields; the others are static."""

    def register(cls: type) -> type:
        made: Any = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(made)]
        static = [name for name in names if name not in parameters]
        jax.tree_util.register_dataclass(made, list(parameters), static)
        return made

    return register


@layer("weight_std", "bias_std")
class Dense(SingleLayer):
    """A fully connected layer.

    S <- w^2 S + b^2, T <- S + w^2 T: the tangent kernel's first term comes from this layer's own
    weights and biases, the second from those before.

    Attributes:
        weight_std: w, the standard deviation of a weight times sqrt(fan in).
        bias_std: b.
    """

    weight_std: Any = 1.0
    bias_std: Any = 0.0
    gives_gaussian: ClassVar[bool] = True

    def pairs(self, state: Covariances) -> tuple[Any, Any]:
        return self._of(state.nngp, state.ntk)

    def diagonal(self, state: Variances) -> Variances:
        return Variances(*self._of(state.nngp, state.ntk))

    def _of(self, s: Any, t: Any) -> tuple[Any, Any]:
        s = self.weight_std**2 * s + self.bias_std**2
        return s, None if t is None else s + self.weight_std**2 * t


@layer("epsilon")
class LayerNorm(SingleLayer):
    """Normalisation of a layer's units (channels) to unit variance, without trained parameters.

    Divides both kernels by sqrt((q1 + epsilon)(q2 + epsilon)).
    """

    epsilon: Any = 1e-12
    takes_gaussian: ClassVar[bool] = True

    def pairs(self, state: Covariances) -> tuple[Any, Any]:
        q1, q2 = state.variances
        return self._divided(state, jnp.sqrt((q1 + self.epsilon) * (q2 + self.epsilon)))

    def diagonal(self, state: Variances) -> Variances:
        by = state.single + self.epsilon
        if state.joint:
            by = jnp.sqrt(by[..., None, None] * by[:, None, None])
        return Variances(*self._divided(state, by))

    def _divided(self, state: Any, by: Any) -> tuple[Any, Any]:
        return state.nngp / by, None if state.ntk is None else state.ntk / by


@jax.tree_util.register_pytree_node_class
class Serial(Layer):
    """Layers one after another; itself a layer."""

    layers: tuple[Layer, ...]

    def __init__(self, *layers: Layer) -> None:
        for one in layers:
            if not isinstance(one, Layer):
                raise ModelError(
                    f"Serial takes layers such as Dense(1.4, 0.3) and ReLU(); got {one!r:.80}."
                )
        self.layers = layers

    @property
    def joint(self) -> bool:
        return any(one.joint for one in self.layers)

    def cross(self, state: Covariances) -> Covariances:
        for one in self.layers:
            state = _apart(one, one.cross(state))
        return state

    def diagonal(self, state: Variances) -> Variances:
        for one in self.layers:
            state = _apart(one, one.diagonal(state))
        return state

    def tree_flatten(self) -> tuple[tuple[Layer, ...], None]:
        return self.layers, None

    @classmethod
    def tree_unflatten(cls, _: None, layers: tuple[Layer, ...]) -> Serial:
        made = object.__new__(cls)
        made.layers = layers
        return made

    def __repr__(self) -> str:
        return f"Serial({', '.join(map(repr, self.layers))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Serial) and self.layers == other.layers

    def __hash__(self) -> int:
        return hash((Serial, self.layers))


def _apart(one: Layer, state: Any) -> Any:
    """The state after a layer, computed before later layers are.

    Else the compiler would fuse all layers into one loop that computes what is used twice again and
    again, at a cost that grows with the square of the depth.
    """
    return state if one.gives_gaussian is not False else jax.lax.optimization_barrier(state)


@layer("branch", "shortcut")
class Residual(Layer):
    """shortcut(x) + branch(x), whose weights are independent: covariances and tangents add.

    Attributes:
        branch: a layer that ends in weights, such as ``Serial(ReLU(), Dense(1.4, 0.3))``.
        shortcut: a layer, or None for x itself.
    """

    branch: Layer
    shortcut: Layer | None = None
    takes_gaussian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.branch, str | int | float | None):
            raise ModelError(
                "Residual takes layers, such as Serial(ReLU(), Dense(1.4, 0.3)); got "
                f"{self.branch!r:.80}."
            )

    @property
    def joint(self) -> bool:
        return self.branch.joint or (self.shortcut is not None and self.shortcut.joint)

    def cross(self, state: Covariances) -> Covariances:
        return _sum(
            state if self.shortcut is None else self.shortcut.cross(state), self.branch.cross(state)
        )

    def diagonal(self, state: Variances) -> Variances:
        return _sum(
            state if self.shortcut is None else self.shortcut.diagonal(state),
            self.branch.diagonal(state),
        )


def _sum(a: Any, b: Any) -> Any:
    return type(a)(*(None if x is None else x + y for x, y in zip(a, b, strict=True)))


def check_order(network: Layer, gaussian: bool = False) -> bool:
    """Check that no layer needs Gaussian units where it has none.

    Args:
        network: the layers.
        gaussian: whether the units before the first layer are Gaussian.

    Returns:
        Whether the units after the last layer are.

    Raises:
        ModelError: the activations of units that are no longer Gaussian have no closed form.
    """
    if isinstance(network, Serial):
        for one in network.layers:
            gaussian = check_order(one, gaussian)
        return gaussian
    if network.takes_gaussian and not gaussian:
        raise ModelError(
            f"{network!r:.60} needs Gaussian units before it, and these are inputs or activations: "
            "put a layer of weights between, such as Dense(1.4, 0.3)."
        )
    if isinstance(network, Residual):
        ends = [check_order(network.branch, True)]
        ends += [] if network.shortcut is None else [check_order(network.shortcut, True)]
        if not all(ends):
            raise ModelError(
                "the branch and the shortcut of a Residual must end in a layer of weights, such as "
                f"Serial(ReLU(), Dense(1.4, 0.3)); got {network!r:.160}."
            )
        return True
    return gaussian if network.gives_gaussian is None else network.gives_gaussian
