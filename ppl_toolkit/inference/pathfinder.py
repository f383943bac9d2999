"""Pathfinder: normal laws along the path of an optimisation, the best of them by its bound.

On its way to a mode L-BFGS passes through the bulk of the posterior, and its estimate of the
inverse Hessian there is the covariance of a normal law. Of all points of the path that one is taken
whose law has the largest bound on the evidence (ELBO). Several paths see several modes.

Source: Zhang, Carpenter, Gelman, Vehtari (2022), Pathfinder: Parallel quasi-Newton variational
inference, JMLR 23(306); Byrd, Nocedal, Schnabel (1994), Mathematical Programming 63, for the
compact form of BFGS; Gilbert and Lemaréchal (1989), Mathematical Programming 45, for its diagonal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

from ppl_toolkit.inference.climbing import Path, climb, start_within
from ppl_toolkit.inference.importance import Approximated, Approximation, Learned, Settings
from ppl_toolkit.inference.step_sizes import require_count

__all__ = ["Pathfinder", "QuasiNormal", "diagonal", "quasi_normal"]

_CURVED = 1e-12  # s'z relative to z'z: a pair with less curvature is left out

Vector = Float[Array, " D"]
Scalar = Float[Array, ""]


class QuasiNormal(NamedTuple):
    """A normal law whose covariance is diagonal but for a few directions.

    The covariance is diag(a)^(1/2) (I + Q (L L' - I) Q') diag(a)^(1/2), the columns of Q
    orthonormal, R of them.

    Attributes:
        mean: (D,).
        variance: a.
        basis: Q.
        factor: L, lower triangular.
    """

    mean: Vector
    variance: Vector
    basis: Float[Array, "D R"]
    factor: Float[Array, "R R"]

    def draw(self, noise: Vector) -> tuple[Vector, Scalar]:
        """Standard normal numbers as a draw, and the log density there: O(R D)."""
        along = self.basis.T @ noise
        turned = noise + self.basis @ (self.factor @ along - along)
        return self.mean + jnp.sqrt(self.variance) * turned, self._log_density(noise)

    def log_density(self, x: Vector) -> Scalar:
        """Anywhere: O(R D)."""
        turned = (x - self.mean) / jnp.sqrt(self.variance)
        along = self.basis.T @ turned
        back = solve_triangular(self.factor, along, lower=True)
        return self._log_density(turned + self.basis @ (back - along))

    def _log_density(self, noise: Vector) -> Scalar:
        log_root = 0.5 * jnp.sum(jnp.log(self.variance))
        log_root += jnp.sum(jnp.log(jnp.abs(jnp.diagonal(self.factor))))
        return -0.5 * (noise @ noise + noise.shape[0] * math.log(2.0 * math.pi)) - log_root


class Pairs(NamedTuple):
    """The last m steps s of a path with the changes z of minus the gradient, the newest last.

    Attributes:
        steps, changes: (m, D), zero where there were fewer.
    """

    steps: Float[Array, "m D"]
    changes: Float[Array, "m D"]

    def add(self, step: Vector, change: Vector) -> Pairs:
        return Pairs(
            jnp.concatenate([self.steps[1:], step[None]]),
            jnp.concatenate([self.changes[1:], change[None]]),
        )


def curved(step: Vector, change: Vector) -> Bool[Array, ""]:
    """Whether a step tells a curvature that is positive."""
    return step @ change > _CURVED * (change @ change)


def diagonal(variance: Vector, step: Vector, change: Vector) -> Vector:
    """The diagonal of the inverse Hessian, a, after one more step that tells a curvature.

    BFGS on diag(1 / a), with 1 / a scaled so that it has the curvature z'z along the step, and only
    its diagonal kept.
    """
    s, z = step, change
    b = s @ z
    first = jnp.sum(z**2 * variance)  # z' A z
    second = jnp.sum(s**2 / variance)  # s' A^-1 s
    inverse = first / (b * variance) + z**2 / b - first * s**2 / (b * second * variance**2)
    return 1.0 / inverse


def quasi_normal(position: Vector, gradient: Vector, variance: Vector, pairs: Pairs) -> QuasiNormal:
    """The law that L-BFGS sees from a point: one Newton step on, its inverse Hessian estimate.

    With S and Z the pairs as columns, R the upper triangle of S'Z, E its diagonal,

        H = diag(a) + B G B',    B = [diag(a) Z, S],
        G = [[0, -R^-1], [-R^-T, R^-T (E + Z' diag(a) Z) R^-1]].

    Args:
        position, gradient: of log p, (D,).
        variance: a.
        pairs: m of them.

    Returns:
        N(position + H gradient, H), as a root of H: with diag(a)^(-1/2) B = Q R_B, Q orthonormal,
        L L' = I + R_B G R_B'.

    Cost: O(m^2 D).
    """
    S, Z = pairs.steps.T, pairs.changes.T
    m = S.shape[1]
    products = S.T @ Z
    empty = jnp.diagonal(products) == 0.0
    R = jnp.triu(products) + jnp.diag(jnp.where(empty, 1.0, 0.0).astype(S.dtype))
    inverse = solve_triangular(R, jnp.eye(m, dtype=S.dtype))
    inside = jnp.diag(jnp.diagonal(products)) + Z.T @ (variance[:, None] * Z)
    G = jnp.block(
        [[jnp.zeros((m, m), S.dtype), -inverse], [-inverse.T, inverse.T @ inside @ inverse]]
    )
    B = jnp.concatenate([variance[:, None] * Z, S], axis=1)
    basis, triangle = jnp.linalg.qr(B / jnp.sqrt(variance)[:, None])
    inner = jnp.eye(triangle.shape[0], dtype=S.dtype) + triangle @ G @ triangle.T
    factor = jnp.linalg.cholesky(0.5 * (inner + inner.T))
    mean = position + variance * gradient + B @ (G @ (B.T @ gradient))
    return QuasiNormal(mean, variance, basis, factor)


class Best(NamedTuple):
    """The law with the largest bound along a path.

    Attributes:
        elbo: the bound's estimate; minus infinity if no point had a law.
        law: that law.
        place: its number on the path.
        length: of the path.
    """

    elbo: Scalar
    law: QuasiNormal
    place: Int[Array, ""]
    length: Int[Array, ""]


def best_along(
    key: Any, density: Callable[[Any], Any], path: Path, memory: int, draws: int
) -> Best:
    """The best law of a path.

    Args:
        key: of the draws behind the bounds.
        density: log p, of a vector (D,).
        path: see `climb`.
        memory: m.
        draws: behind every bound.

    Cost: per point ``draws`` densities and O(m^2 D + m D draws).
    """
    size, dtype = path.positions.shape[1], path.positions.dtype
    rank = min(size, 2 * memory)
    zero, none = jnp.zeros(size, dtype), jnp.zeros((), jnp.int32)
    nothing = QuasiNormal(
        zero, zero + 1.0, jnp.zeros((size, rank), dtype), jnp.eye(rank, dtype=dtype)
    )
    blank = jnp.zeros((memory, size), dtype)

    noise = random.normal(key, (draws, size), dtype)  # the same at all points, to compare them

    def bound(law: QuasiNormal) -> Scalar:
        x, log_q = jax.vmap(law.draw)(noise)
        return jnp.mean(jax.vmap(density)(x) - log_q)

    def further(number: Any, carry: tuple) -> tuple:
        variance, pairs, best = carry
        s = path.positions[number] - path.positions[number - 1]
        z = path.gradients[number - 1] - path.gradients[number]
        told = curved(s, z)
        variance = jnp.where(told, diagonal(variance, s, z), variance)
        pairs = jax.tree.map(lambda a, b: jnp.where(told, a, b), pairs.add(s, z), pairs)
        law = quasi_normal(path.positions[number], path.gradients[number], variance, pairs)
        elbo = bound(law)
        better = jnp.isfinite(elbo) & (elbo > best.elbo)
        new = Best(elbo, law, jnp.asarray(number, jnp.int32), path.length)
        return variance, pairs, jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)

    worst = Best(jnp.asarray(-jnp.inf, dtype), nothing, none, path.length)
    first = (zero + 1.0, Pairs(blank, blank), worst)
    return lax.fori_loop(1, path.length, further, first)[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pathfinder(Approximated):
    """Multi-path Pathfinder: normal laws found on the way to modes, resampled together.

    Every chain climbs ``paths`` paths by L-BFGS on the unconstrained space and takes from each the
    normal law with the largest bound on the evidence (ELBO). Its draws are those of the mixture of
    these laws, weighed by p over the density of the mixture (which is never noisier than weights by
    the component alone, and does not favour a path that saw little). Quicker than NUTS by far, as
    rough as Laplace's approximation, but it needs no mode: funnels and unbounded densities do no
    harm. Where k-hat is bad, its draws are still good starts: ``infer(model, ..., init=result)``.

    Args:
        paths: of every chain. The first begins at the given start, if there is one, the others
            uniformly in (-radius, radius).
        steps: of every path, at most.
        memory: m, pairs of steps and gradients behind the inverse Hessian.
        elbo_draws: behind the bound at every point of a path.
        resample: whether draws are resampled by importance weights.
        pool_size: draws of q that are weighed together, and the default number of draws.
        init_radius: of the starts.

    Raises:
        OptionError: an option out of its range.
        SamplingError (from `infer`): no path of a chain came to a law.

    Cost: per point of a path one or two gradients, ``elbo_draws`` densities and O(m^2 D); then a
    density and O(paths m D) per draw.

    Source: Zhang, Carpenter, Gelman, Vehtari (2022); Veach and Guibas (1995) and Owen and Zhou
    (2000), JASA 95, for weights by the mixture, which they do not use.
    """

    paths: int = 4
    steps: int = 200
    memory: int = 6
    elbo_draws: int = 10

    warmup: ClassVar[int] = 1
    refit_warmup: ClassVar[int] = 1
    said: ClassVar[str] = "normal laws along paths to modes"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("paths", "steps", "memory", "elbo_draws"):
            require_count(name, getattr(self, name))

    def statics(self) -> tuple:
        return (
            self.resample, self.pool_size, self.paths, self.steps, self.memory, self.elbo_draws,
        )  # fmt: skip

    def blank(self, key: Any, position: Vector, target: Any) -> Best:
        none, dtype = jnp.zeros((), jnp.int32), position.dtype
        rank = min(position.shape[0], 2 * self.memory)
        basis, factor = jnp.zeros((position.shape[0], rank), dtype), jnp.zeros((rank, rank), dtype)
        law = QuasiNormal(position, jnp.ones_like(position), basis, factor)
        one = Best(jnp.asarray(-jnp.inf, dtype), law, none, none)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.paths, *x.shape)), one)

    def learned(
        self, key: Any, index: Any, state: Approximation, target: Any, settings: Settings
    ) -> Learned:
        """Everything in the first iteration."""
        density = self.density(target)
        position, given = state.given

        def walk(number: Any) -> Learned:
            key_start, key_bounds = random.split(random.fold_in(key, number))
            drawn = start_within(density, key_start, position, settings.radius)
            begin = jnp.where(given & (number == 0), position, drawn)
            end, path = climb(density, begin, self.steps, self.memory, keeps_path=True)
            best = best_along(key_bounds, density, path, self.memory, self.elbo_draws)
            return Learned(best, end.evaluations)

        def learn() -> Learned:
            best, gradients = lax.map(walk, jnp.arange(self.paths, dtype=jnp.int32))
            return Learned(best, jnp.sum(gradients, dtype=jnp.int32))

        none = jnp.zeros((), jnp.int32)
        return lax.cond(index == 0, learn, lambda: Learned(state.law, none))

    def drawn(self, key: Any, number: Any, law: Best, target: Any) -> tuple[Vector, Scalar]:
        """Of the law of the paths that came to one, in turn."""
        there = jnp.isfinite(law.elbo)
        count = jnp.maximum(jnp.sum(there, dtype=jnp.int32), 1)
        own = jnp.argsort(~there)[number % count]
        component = jax.tree.map(lambda x: x[own], law.law)
        noise = random.normal(key, component.mean.shape, component.mean.dtype)
        x, _ = component.draw(noise)
        densities = jax.vmap(lambda one: one.log_density(x))(law.law)
        return x, logsumexp(jnp.where(there, densities, -jnp.inf)) - jnp.log(count)

    def centre(self, law: Best) -> Vector:
        return law.law.mean[jnp.argmax(law.elbo)]

    def told(self, law: Best) -> dict[str, tuple[tuple[str, ...], Any]]:
        by_path = ("chain", "path")
        return {
            "path_elbo": (by_path, law.elbo),
            "path_length": (by_path, law.length),
            "path_place": (by_path, law.place),
        }

    def problem(self, state: Approximation) -> str:
        """Said if no path came to a law."""
        elbo = np.asarray(state.law.elbo)
        if not (lost := np.flatnonzero(~np.isfinite(elbo).any(axis=1)).tolist()):
            return ""
        return (
            f"chains {lost}: none of {self.paths} paths came to a normal law with a finite bound. "
            "Give a start with a finite density (init={site: value}, or init='prior'), more "
            "paths=, or use NUTS."
        )
