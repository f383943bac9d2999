"""Laplace's approximation: a normal law at the mode, with the curvature there.

Source: Tierney and Kadane (1986), JASA 81; MacKay (2003), Information Theory, Inference, and
Learning Algorithms, chapter 27.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Int

from ppl_toolkit.inference.climbing import highest
from ppl_toolkit.inference.importance import Approximated, Approximation, Learned, Settings
from ppl_toolkit.inference.step_sizes import require_count
from ppl_toolkit.program import Program

__all__ = ["Curvature", "Laplace", "hessian"]

_NEWTON = 10  # steps at the end of the climb
_ARRIVED = 1e-20  # rise that one more step promises: 1e-10 standard deviations off
_CLOSE = 1e-2  # the same, of a point that counts as the mode
_ROUNDING = 8.0  # units of it, by which log p may fall at a step
_COLUMNS = 64  # of the Hessian, at once
_FLAT = 1e-10  # of curvatures relative to those of the single coordinates
_MOST_NAMED = 5

Vector = Float[Array, " D"]
Scalar = Float[Array, ""]
Matrix = Float[Array, "D D"]


class Curvature(NamedTuple):
    """Minus the Hessian, as diag(1/s) C diag(1/s) with ones on the diagonal of C = L L^T.

    Scaled so, coordinates of very different scales do no harm.

    Attributes:
        scale: s.
        factor: L, lower triangular; not finite unless C is positive definite.
        least: the least eigenvalue of C where it is not, else one.
        direction: the eigenvector that belongs to it, in coordinates scaled by s.
    """

    scale: Vector
    factor: Matrix
    least: Scalar
    direction: Vector

    @classmethod
    def of(cls, matrix: Matrix) -> Curvature:
        """Of minus the Hessian."""
        size = jnp.abs(jnp.diagonal(matrix))
        scale = lax.rsqrt(jnp.where(size > 0.0, size, 1.0))
        scaled = scale[:, None] * matrix * scale
        factor = jnp.linalg.cholesky(scaled)
        finite = jnp.all(jnp.isfinite(scaled))

        def trouble() -> tuple[Scalar, Vector]:
            values, vectors = jnp.linalg.eigh(jnp.where(finite, scaled, 0.0))
            return values[0], vectors[:, 0]

        definite = jnp.all(jnp.isfinite(factor)) & (jnp.min(jnp.diagonal(factor)) ** 2 > _FLAT)
        least, direction = lax.cond(
            definite, lambda: (jnp.ones((), matrix.dtype), jnp.zeros_like(scale)), trouble
        )
        return cls(scale, factor, least, direction)

    @property
    def definite(self) -> Bool[Array, ""]:
        """Whether the function falls in every direction."""
        return self.least > _FLAT

    @property
    def log_determinant(self) -> Scalar:
        """Of minus the Hessian."""
        return 2.0 * jnp.sum(jnp.log(jnp.diagonal(self.factor)) - jnp.log(self.scale))

    def solve(self, gradient: Vector) -> Vector:
        """The Newton step from a point with this gradient."""
        return self.scale * cho_solve((self.factor, True), self.scale * gradient)

    def spread(self, noise: Vector) -> Vector:
        """Standard normal numbers as a draw of N(0, minus the inverse Hessian)."""
        return self.scale * solve_triangular(self.factor, noise, trans=1, lower=True)


class Mode(NamedTuple):
    """A normal law at a maximum.

    Attributes:
        position, value: the mode and log p there.
        curvature: there.
        promise: the rise of log p that one more Newton step would bring to first order.
    """

    position: Vector
    value: Scalar
    curvature: Curvature
    promise: Scalar

    @property
    def fine(self) -> Bool[Array, ""]:
        return jnp.isfinite(self.value) & self.curvature.definite


def hessian(function: Callable[[Any], Any], x: Vector) -> Matrix:
    """Second derivatives, some columns at a time: D gradients, and memory for 64 of them."""
    gradient = jax.grad(function)

    def column(unit: Vector) -> Vector:
        return jax.jvp(gradient, (x,), (unit,))[1]

    size = x.shape[0]
    found = lax.map(column, jnp.eye(size, dtype=x.dtype), batch_size=min(size, _COLUMNS))
    return 0.5 * (found + found.T)


class _Newton(NamedTuple):
    mode: Mode
    step: Vector
    taken: Int[Array, ""]
    going: Bool[Array, ""]


def at_top(function: Callable[[Any], Any], start: Vector) -> tuple[Mode, Int[Array, ""]]:
    """Newton's method from a point near the maximum, until there is nothing more to gain.

    Args:
        function: of a vector (D,).
        start: near its maximum.

    Returns:
        The end with its curvature, and how many steps were taken.

    Cost: D gradients and O(D^3) operations a step.
    """
    low = jnp.asarray(-jnp.inf, start.dtype)
    zero, square = jnp.zeros_like(start), jnp.zeros((*start.shape, *start.shape), start.dtype)
    nothing = Curvature(zero, square, jnp.zeros((), start.dtype), zero)

    def going(turn: _Newton) -> Bool[Array, ""]:
        return turn.going & (turn.taken < _NEWTON)

    def newton(turn: _Newton) -> _Newton:
        x = turn.mode.position + turn.step
        value, gradient = jax.value_and_grad(function)(x)
        curvature = Curvature.of(-hessian(function, x))
        step = curvature.solve(gradient)
        promise = 0.5 * jnp.dot(gradient, step)
        new = Mode(x, value, curvature, jnp.where(curvature.definite, promise, jnp.inf))
        first = turn.taken == 0
        least = turn.mode.value - _ROUNDING * jnp.finfo(x.dtype).eps * (1.0 + jnp.abs(value))
        better = first | (new.fine & (value >= least))
        mode = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, turn.mode)
        more = better & new.fine & (promise > _ARRIVED)
        return _Newton(mode, step, turn.taken + 1, more)

    start_mode = Mode(start, low, nothing, jnp.asarray(jnp.inf, start.dtype))
    turn = _Newton(start_mode, zero, jnp.zeros((), jnp.int32), jnp.asarray(True))
    end = lax.while_loop(going, newton, turn)
    return end.mode, end.taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laplace(Approximated):
    """A normal law at the mode of the posterior, with the curvature there.

    The mode is that of the density on the unconstrained space, the Jacobian of the coordinates
    included: of log sigma, say, not of sigma, which makes the law a better one (`MAP` finds the
    mode on the parameters' own spaces). Its covariance is the inverse of the exact Hessian of
    -log p there. The law is exact where the posterior is normal in these coordinates, good where
    much is known of every parameter, and wrong for funnels, tails and several modes, which k-hat
    tells.

    Args:
        starts: climbs of every chain, from points uniform in (-radius, radius); the highest end
            counts. The first is the given start, if there is one.
        steps: of L-BFGS in every climb, at most; Newton's method ends it.
        resample: whether draws are resampled by importance weights.
        pool_size: draws of q that are weighed together, and the default number of draws.
        init_radius: of the starts.

    Raises:
        OptionError: an option out of its range.
        SamplingError (from `infer`): there is no mode, or log p is not curved downwards in all
            directions there; the sites along the others are named.

    Cost: some 20 to 200 gradients per start, 2 D or 3 D for the Hessians, O(D^3) operations; then a
    density and O(D^2) per draw. The state has D^2 numbers. Several hundred dimensions are fine.

    Source: Tierney and Kadane (1986).
    """

    starts: int = 4
    steps: int = 500
    coordinates: tuple[str, ...] = dataclasses.field(default=(), init=False, repr=False)

    warmup: ClassVar[int] = 1
    refit_warmup: ClassVar[int] = 1
    said: ClassVar[str] = "a normal law at the mode"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("starts", self.starts)
        require_count("steps", self.steps)

    def on(self, program: Program) -> Laplace:
        method = copy.copy(self)  # ``coordinates`` is no option
        object.__setattr__(method, "coordinates", program.coordinates)
        return method

    def statics(self) -> tuple:
        return (self.resample, self.pool_size, self.starts, self.steps)

    def blank(self, key: Any, position: Vector, target: Any) -> Mode:
        nothing, size = jnp.zeros_like(position), position.shape[0]
        square = jnp.zeros((size, size), position.dtype)
        zero = jnp.zeros((), position.dtype)
        return Mode(position, zero, Curvature(nothing, square, zero, nothing), zero)

    def learned(
        self, key: Any, index: Any, state: Approximation, target: Any, settings: Settings
    ) -> Learned:
        """Everything in the first iteration."""
        density = self.density(target)

        def learn() -> Learned:
            top = highest(density, key, self.starts, state.given, settings.radius, self.steps)
            mode, newton = at_top(density, top.position)
            size = top.position.shape[0]
            return Learned(mode, top.evaluations + newton * (size + 1))

        none = jnp.zeros((), jnp.int32)
        return lax.cond(index == 0, learn, lambda: Learned(state.law, none))

    def drawn(self, key: Any, number: Any, law: Mode, target: Any) -> tuple[Vector, Scalar]:
        x, size = law.position, law.position.shape[0]
        z = random.normal(key, x.shape, x.dtype)
        log_q = 0.5 * (law.curvature.log_determinant - size * math.log(2.0 * math.pi) - z @ z)
        return x + law.curvature.spread(z), log_q

    def centre(self, law: Mode) -> Vector:
        return law.position

    def told(self, law: Mode) -> dict[str, tuple[tuple[str, ...], Any]]:
        return {"log_density_at_mode": (("chain",), law.value)}

    def problem(self, state: Approximation) -> str:
        """Why there is no normal law, if there is none."""
        law = jax.tree.map(np.asarray, state.law)
        if lost := np.flatnonzero(~np.isfinite(law.value)).tolist():
            return (
                f"chains {lost}: none of the {self.starts} starting points has a finite density "
                "and gradient. Give one: init={site: value}, or init='prior'."
            )
        if flat := np.flatnonzero(~(law.curvature.least > _FLAT)).tolist():
            weight = np.abs(law.curvature.direction[flat[0]])
            order = np.argsort(-weight)[:_MOST_NAMED]
            along = [self._name(i) for i in order if weight[i] > 0.3 * weight.max()]
            far = float(np.abs(law.position[flat[0]]).max())
            return (
                f"chains {flat}: there is no maximum with a curvature. At the highest point found "
                f"the log density does not fall along {along} (unconstrained values up to "
                f"{far:.3g}): it is flat there, or rises for ever. Give these sites proper or "
                "narrower priors, non-centre hierarchical sites, or use NUTS."
            )
        if steep := np.flatnonzero(law.promise > _CLOSE).tolist():
            return (
                f"chains {steep} had not come to a mode in {self.steps} steps: take more (steps=), "
                "or start nearer to it (init=)."
            )
        return ""

    def _name(self, coordinate: int) -> str:
        names = self.coordinates
        return names[coordinate] if names else f"coordinate {coordinate}"
