"""Infinitely wide convolutional networks: convolution, flattening, pooling.

Sources: Novak et al. (2019), Bayesian deep convolutional networks with many channels are Gaussian
processes; Garriga-Alonso, Rasmussen, Aitchison (2019); Arora et al. (2019) for the tangent kernel.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax

from ppl_toolkit.errors import ModelError, OptionError
from ppl_toolkit.models.covariances import Covariances, Variances
from ppl_toolkit.models.layers import SingleLayer, layer

__all__ = ["Conv", "Flatten", "GlobalAveragePool"]


@layer("weight_std", "bias_std")
class Conv(SingleLayer):
    """A convolution with zero padding, as many positions out as in (over the strides).

    S <- w^2 patch(S) + b^2 and T <- S + w^2 patch(T), where patch is the mean over the window's
    offsets, with zeros beyond the border.

    Attributes:
        window: height and width of the filter.
        strides: steps in both directions.
        weight_std: w, the standard deviation of a weight times sqrt(channels in * window area).
        bias_std: b.

    Complexity: n1 n2 H W |window| operations for images of H x W positions; H W times that in a
    network with a `GlobalAveragePool`.
    """

    window: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    weight_std: Any = 1.0
    bias_std: Any = 0.0
    gives_gaussian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("window", "strides"):
            value = getattr(self, name)
            if not (
                isinstance(value, tuple)
                and len(value) == 2
                and all(isinstance(v, int) and v > 0 for v in value)
            ):
                raise OptionError(f"{name} must be two positive integers; got {value!r}.")

    def pairs(self, state: Covariances) -> tuple[Any, Any]:
        if state.nngp.ndim == 2:
            raise _not_an_image("Conv")
        return self._of(state, ((2, 3), (4, 5)) if state.joint else ((2, 3),))

    def diagonal(self, state: Variances) -> Variances:
        if state.nngp.ndim == 1:
            raise _not_an_image("Conv")
        return Variances(*self._of(state, ((1, 2), (3, 4)) if state.joint else ((1, 2),)))

    def _of(self, state: Any, axes: tuple) -> tuple[Any, Any]:
        s = self.weight_std**2 * self._patch(state.nngp, axes) + self.bias_std**2
        if state.ntk is None:
            return s, None
        return s, s + self.weight_std**2 * self._patch(state.ntk, axes)

    def _patch(self, s: Any, axes: tuple[tuple[int, int], ...]) -> Any:
        """The mean over the window's offsets, which are the same for every pair of ``axes``."""
        sizes = tuple(s.shape[axis] for axis in axes[0])
        padding = lax.padtype_to_pads(sizes, self.window, self.strides, "SAME")
        widths = [(0, 0)] * s.ndim
        for pair in axes:
            for axis, width in zip(pair, padding, strict=True):
                widths[axis] = width
        padded = jnp.pad(s, widths)
        steps = [1] * s.ndim
        for pair in axes:
            steps[pair[0]], steps[pair[1]] = self.strides
        total = jnp.zeros(())
        for up in range(self.window[0]):
            for right in range(self.window[1]):
                start, end = [0] * s.ndim, list(padded.shape)
                for pair in axes:
                    for axis, offset, size, step in zip(
                        pair, (up, right), sizes, self.strides, strict=True
                    ):
                        positions = -(-size // step)
                        start[axis], end[axis] = offset, offset + (positions - 1) * step + 1
                total = total + lax.slice(padded, start, end, steps)
        return total / (self.window[0] * self.window[1])


@layer()
class Flatten(SingleLayer):
    """All positions of an image as one vector: means over positions."""

    def pairs(self, state: Covariances) -> tuple[Any, Any]:
        if state.nngp.ndim == 2:
            raise _not_an_image("Flatten")
        return _means(state, "nmhwhw->nmhw", (2, 3))

    def diagonal(self, state: Variances) -> Variances:
        if state.nngp.ndim == 1:
            raise _not_an_image("Flatten")
        return Variances(*_means(state, "nhwhw->nhw", (1, 2)))


@layer()
class GlobalAveragePool(SingleLayer):
    """The mean of the units over all positions: means over all pairs of positions.

    It makes every layer before it keep the covariances of all pairs: (H W)^2 numbers for every
    pair of images.
    """

    @property
    def joint(self) -> bool:
        return True

    def pairs(self, state: Covariances) -> tuple[Any, Any]:
        if not state.joint:
            raise _not_an_image("GlobalAveragePool")
        return _means(state, None, (2, 3, 4, 5))

    def diagonal(self, state: Variances) -> Variances:
        return Variances(*_means(state, None, (1, 2, 3, 4)))


def _means(state: Any, same_position: str | None, over: tuple[int, ...]) -> tuple[Any, Any]:
    """Means over the axes ``over``; of joint states first the pairs of the same position."""

    def mean(s: Any) -> Any:
        s = jnp.einsum(same_position, s) if state.joint and same_position else s
        return s.mean(over)

    return mean(state.nngp), None if state.ntk is None else mean(state.ntk)


def _not_an_image(name: str) -> ModelError:
    return ModelError(
        f"{name} works on images, and has vectors before it. Images are inputs of shape (n, height,"
        " width, channels); behind Flatten or GlobalAveragePool they are vectors."
    )
