"""Metropolis–Hastings–Green: a kernel from an auxiliary draw and an involution.

With v ~ q(. | x) and an involution f, the proposal (x', v') = f(x, v) is accepted with probability
min(1, r), where

    log r = log pi(x') + log q(v' | x') - log pi(x) - log q(v | x) + log |det df|,

the determinant taken over the real coordinates with the discrete ones held fixed. Every Metropolis
kernel is a choice of q and f; `random_walk`, `metropolis_hastings`, `mala` and `leapfrog` here are.
The determinant is computed by automatic differentiation over the coordinates that f touches.

Sources: Green (1995), Biometrika 82; Neklyudov, Welling, Egorov, Vetrov (2020), ICML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.extend import core as jax_core
from jax.flatten_util import ravel_pytree

from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.auxiliary import draw, score
from ppl_toolkit.inference.kernel import SAMPLING, Info, Kernel, Placed, Spec, Stage
from ppl_toolkit.inference.randomness import accept
from ppl_toolkit.inference.target import Target
from ppl_toolkit.positions import Position

__all__ = [
    "Involutive",
    "Trial",
    "involutive",
    "judge",
    "leapfrog",
    "log_determinant",
    "mala",
    "metropolis_hastings",
    "random_walk",
]

Values = Mapping[str, Any]
_TOLERANCE = 1e-8  # of f(f(z)) = z and of the determinants, in float64
_PLAUSIBLE = 30.0  # log acceptance ratios of proposals that say something


@dataclasses.dataclass(frozen=True, repr=False)
class Involutive(Spec):
    """The kernel of an auxiliary program and an involution.

    Args:
        auxiliary: NumPyro program of (position, target) that draws v.
        involution: (position, v, target) -> (position', v'), its own inverse. Positions have
            unconstrained values of the continuous sites, and v the values of the program's sites.
        log_det: log |det| as a function of (position, v, target), or a number such as 0.0 for maps
            that preserve volume; by automatic differentiation if None.
        name: what statistics call the kernel.

    Cost: one evaluation of the log density, two runs of the auxiliary program, and a Jacobian of
    the touched coordinates (n evaluations of f for n of them) unless ``log_det`` is given.
    """

    auxiliary: Callable[[Position, Target], Any]
    involution: Callable[[Position, Values, Target], tuple[Position, Values]]
    log_det: Callable[[Position, Values, Target], Any] | float | None = None
    name: str = "involution"

    tried: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for what in ("auxiliary", "involution"):
            if not callable(getattr(self, what)):
                raise OptionError(f"{what} must be a function; got {getattr(self, what)!r:.60}.")

    @property
    def label(self) -> str:
        return self.name

    def image(self, position: Position, v: Values, target: Target) -> tuple[Position, Values, Any]:
        """F(x, v) and log |det df|."""
        new, new_v = self.involution(position, v, target)
        if self.log_det is None:
            return (
                new,
                new_v,
                log_determinant(lambda x, v: self.involution(x, v, target), position, v),
            )
        if callable(self.log_det):
            return new, new_v, self.log_det(position, v, target)
        return new, new_v, self.log_det

    def statistics(self, v: Values) -> Info:
        """Further statistics of a step, from its auxiliary draw."""
        return {}

    def bind(self, target: Target, stage: Stage = SAMPLING) -> Kernel:
        def init(position: Position, key: Any) -> Placed:
            return Placed(position, target.log_density(position))

        def step(key: Any, state: Placed) -> tuple[Placed, Info]:
            key_v, key_accept = random.split(key)
            position, log_pi = state
            v, log_q = draw(self.auxiliary, key_v, position, target)
            new, new_v, log_det = self.image(position, v, target)
            new_log_pi = target.log_density(new)
            new_log_q = score(self.auxiliary, new_v, new, target)
            ratio = new_log_pi - log_pi + new_log_q - log_q + log_det
            accepted = accept(key_accept, ratio)
            moved = jax.tree.map(
                lambda a, b: jnp.where(accepted, a, b),
                Placed(dict(new), new_log_pi),
                Placed(dict(position), log_pi),
            )
            rate = jnp.exp(jnp.minimum(0.0, jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)))
            info = {"acceptance_rate": rate, "accepted": accepted, **self.statistics(v)}
            return moved, info

        return Kernel(init, step, lambda state, position: init(position, None))

    def trials(self, target: Target, position: Position, key: Any) -> dict[str, Any]:
        v, log_q = draw(self.auxiliary, key, position, target)
        new, new_v = self.involution(position, v, target)
        given, image = _shapes((dict(position), v)), _shapes((dict(new), dict(new_v)))
        if given != image:
            raise MethodError(
                f"the involution {self.label!r} must return values of the sites, shapes and types "
                f"it was given: {given}; got {image}."
            )
        *_, log_det = self.image(position, v, target)
        back, back_v, back_log_det = self.image(new, new_v, target)
        change = target.log_density(new) - target.log_density(position)
        change += score(self.auxiliary, new_v, new, target) - log_q
        own = log_determinant(lambda x, v: self.involution(x, v, target), position, v)
        dets = [jnp.asarray(x, jnp.result_type(float)) for x in (log_det, back_log_det, own)]
        return {
            self.label: Trial({**position, **_prefixed(v)}, {**back, **_prefixed(back_v)}, change,
                              *dets)
        }  # fmt: skip


class Trial(NamedTuple):
    """An involution tried at one z = (x, v).

    Attributes:
        z, back: values of the sites of x and of v at z, and at f(f(z)).
        change: log of the acceptance ratio without the determinant.
        log_det, back_log_det: as the kernel has it, at z and at f(z).
        own: the determinant at z by automatic differentiation.
    """

    z: Values
    back: Values
    change: Any
    log_det: Any
    back_log_det: Any
    own: Any


def judge(trials: Mapping[str, Trial]) -> None:
    """Refuse kernels whose functions are no involutions, or whose determinants are wrong.

    Args:
        trials: of several z each, arrays (trial, ...). Those whose proposals could not be accepted
            anyhow (an integrator that runs away) say nothing and are passed over.

    Raises:
        MethodError: says what was expected and what was seen.
    """
    for label, trial in trials.items():
        tolerance = _TOLERANCE if trial.own.dtype == np.float64 else 1e-3
        for i in np.flatnonzero(np.abs(trial.change + trial.own) < _PLAUSIBLE):
            for name, z in trial.z.items():
                back = trial.back[name][i]
                if not np.allclose(back, z[i], tolerance, tolerance, equal_nan=True):
                    raise MethodError(
                        f"{label!r} is no involution: f(f(z)) has {name} = {np.ravel(back)[:3]}, "
                        f"but z has {np.ravel(z[i])[:3]}."
                    )
            for seen, wanted, what in (
                (trial.log_det[i], trial.own[i], "log_det is not that of the involution"),
                (
                    trial.back_log_det[i],
                    -trial.log_det[i],
                    "log_det at f(z) is not minus that at z",
                ),
            ):
                if not np.allclose(seen, wanted, tolerance, tolerance):
                    raise MethodError(f"{label!r}: {what}: {seen:.6g} instead of {wanted:.6g}.")


def _prefixed(v: Values) -> dict[str, Any]:
    """The auxiliary sites, which may have names of latent ones."""
    return {f"auxiliary {name}": value for name, value in v.items()}


def _shapes(z: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x))), z)


def log_determinant(
    f: Callable[[Position, Values], tuple[Position, Values]], position: Position, v: Values
) -> Any:
    """Log |det| of the Jacobian of f over the real coordinates it touches.

    Arrays that f passes on unchanged are left out: the full determinant is that of the others,
    since their rows of the Jacobian are those of the identity.

    Cost: n forward derivatives of f for n touched coordinates, and O(n^3).
    """
    z = (dict(position), dict(v))
    leaves, structure = jax.tree.flatten(z)
    untouched = _passed_on(lambda *xs: f(*jax.tree.unflatten(structure, xs)), leaves)
    real = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    moving = [i for i in range(len(leaves)) if real[i] and not untouched[i]]
    if not moving:
        return jnp.zeros(())
    vector, unravel = ravel_pytree([leaves[i] for i in moving])

    def local(c: Any) -> Any:
        new = list(leaves)
        for i, leaf in zip(moving, unravel(c), strict=True):
            new[i] = leaf
        images = jax.tree.leaves(f(*jax.tree.unflatten(structure, new)))
        return ravel_pytree([images[i] for i in moving])[0]

    return _log_abs_det(jax.jacfwd(local)(vector))


def _passed_on(f: Callable, leaves: list[Any]) -> list[bool]:
    """Which arrays f returns as they came, in the same place."""
    jaxpr = jax.make_jaxpr(f)(*leaves).jaxpr
    return [
        isinstance(out, jax_core.Var) and out is given
        for out, given in zip(jaxpr.outvars, jaxpr.invars, strict=True)
    ]


def _log_abs_det(a: Any) -> Any:
    """Log |det| in closed form up to 3 x 3, which compiles faster than a factorisation."""
    if a.shape[0] == 1:
        return jnp.log(jnp.abs(a[0, 0]))
    if a.shape[0] == 2:
        return jnp.log(jnp.abs(a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]))
    if a.shape[0] == 3:
        return jnp.log(jnp.abs(jnp.dot(a[0], jnp.cross(a[1], a[2]))))
    return jnp.linalg.slogdet(a)[1]


def involutive(
    auxiliary: Callable,
    involution: Callable,
    log_det: Callable | float | None = None,
    name: str = "involution",
) -> Involutive:
    """The kernel of an auxiliary program and an involution; see `Involutive`."""
    return Involutive(auxiliary, involution, log_det, name)


# -- instances ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Gaussian:
    """V ~ N(0, scale^2) for every coordinate of every site, named as the sites."""

    scale: float

    def __call__(self, position: Position, target: Target) -> None:
        for name, x in position.items():
            numpyro.sample(name, dist.Normal(jnp.zeros_like(x), self.scale).to_event(x.ndim))


def _add(position: Position, v: Values, target: Target) -> tuple[Position, Values]:
    return (
        {name: x + v[name] for name, x in position.items()},
        {name: -v[name] for name in v},
    )


def random_walk(scale: float) -> Involutive:
    """Gaussian random walk Metropolis: f(x, v) = (x + v, -v)."""
    if not scale > 0:
        raise OptionError(f"scale must be positive; got {scale!r}.")
    return Involutive(_Gaussian(scale), _add, 0.0, "random_walk")


def _swap(position: Position, v: Values, target: Target) -> tuple[Position, Values]:
    return (
        {**position, **{name: jnp.asarray(y, position[name].dtype) for name, y in v.items()}},
        {name: jnp.asarray(position[name], v[name].dtype) for name in v},
    )


def metropolis_hastings(proposal: Callable, name: str = "metropolis_hastings") -> Involutive:
    """Metropolis–Hastings with any proposal: f(x, y) = (y, x).

    Args:
        proposal: NumPyro program of (position, target) that draws new values of some latent sites
            under their names (continuous sites: unconstrained values). It may depend on the
            position; if it does not, this is the independence sampler.
        name: what statistics call the kernel.
    """
    return Involutive(proposal, _swap, 0.0, name)


@dataclasses.dataclass(frozen=True)
class _Langevin:
    """Y ~ N(x + step^2 / 2 grad log pi(x), step^2)."""

    step: float

    def __call__(self, position: Position, target: Target) -> None:
        gradient = jax.grad(target.log_density)(dict(position))
        for name, x in position.items():
            mean = x + 0.5 * self.step**2 * gradient[name]
            numpyro.sample(name, dist.Normal(mean, self.step).to_event(x.ndim))


def mala(step: float) -> Involutive:
    """The Metropolis-adjusted Langevin algorithm.

    Source: Roberts and Tweedie (1996), Bernoulli 2.
    """
    if not step > 0:
        raise OptionError(f"step must be positive; got {step!r}.")
    return Involutive(_Langevin(step), _swap, 0.0, "mala")


@dataclasses.dataclass(frozen=True)
class _Leapfrog:
    """Flip of the momentum after some leapfrog steps."""

    step: float
    steps: int

    def __call__(self, position: Position, v: Values, target: Target) -> tuple[Position, Values]:
        gradient = jax.grad(target.log_density)

        def kick(x: Position, p: Values, size: float) -> Values:
            slope = gradient(dict(x))
            return {name: p[name] + size * slope[name] for name in p}

        def once(_: Any, z: tuple) -> tuple:
            x, p = z
            p = kick(x, p, 0.5 * self.step)
            x = {name: x[name] + self.step * p[name] for name in x}
            return x, kick(x, p, 0.5 * self.step)

        x, p = jax.lax.fori_loop(0, self.steps, once, (dict(position), dict(v)))
        return x, {name: -p[name] for name in p}


def leapfrog(step: float, steps: int) -> Involutive:
    """Hamiltonian Monte Carlo: momenta from N(0, 1), f = flip after ``steps`` leapfrog steps."""
    if not step > 0 or steps < 1:
        raise OptionError(f"step and steps must be positive; got {step!r}, {steps!r}.")
    return Involutive(_Gaussian(1.0), _Leapfrog(step, steps), 0.0, "hmc")
