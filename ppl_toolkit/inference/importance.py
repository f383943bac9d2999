"""Draws of an approximation q of the posterior, made equal to those of p by importance weights.

`Laplace`, `Pathfinder` and `SVI` find a law q on the unconstrained space; what they share is here.
Every so often a pool of draws of q is made and weighed by p / q, p being the unnormalised posterior
density with the Jacobian of the unconstrained coordinates. The largest weights are smoothed by a
generalised Pareto distribution, whose shape k tells whether q covers p well enough: up to 0.7 the
weights can be relied on. The draws that a user gets are the pool resampled by these weights, in
random order.

Sources: Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling, JMLR 25;
Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?, ICML, for k as a test of q; Zhang,
Carpenter, Gelman, Vehtari (2022), JMLR 23, for resampling a pool.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from ppl_toolkit import pareto
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.population import size_of_shares
from ppl_toolkit.inference.resampling import resample
from ppl_toolkit.inference.step_sizes import require_count, require_positive
from ppl_toolkit.program import Program

__all__ = ["Approximated", "Approximation", "Learned", "Pool", "Sums", "smoothed"]

_AT_ONCE = 128  # densities of a pool

Vector = Float[Array, " D"]
Scalar = Float[Array, ""]


class Pool(NamedTuple):
    """P draws of q.

    Attributes:
        positions: (P, D).
        log_densities: log p there, minus infinity where p is NaN.
        log_weights: log p - log q.
        chosen: the numbers of the draws that become draws of the run, in their order.
        khat: shape of the tail of the weights.
        effective: effective sample size of the smoothed weights.
    """

    positions: Float[Array, "P D"]
    log_densities: Float[Array, " P"]
    log_weights: Float[Array, " P"]
    chosen: Int[Array, " P"]
    khat: Scalar
    effective: Scalar


class Sums(NamedTuple):
    """Sums over the weights of all pools so far, for the evidence.

    Attributes:
        log_sum, log_squares: logs of the sums of the weights and of their squares.
        number: of weights.
    """

    log_sum: Scalar
    log_squares: Scalar
    number: Scalar

    @classmethod
    def start(cls, dtype: Any) -> Sums:
        low = jnp.asarray(-jnp.inf, dtype)
        return cls(low, low, jnp.zeros((), dtype))

    def add(self, log_weights: Float[Array, " P"]) -> Sums:
        return Sums(
            jnp.logaddexp(self.log_sum, logsumexp(log_weights)),
            jnp.logaddexp(self.log_squares, logsumexp(2.0 * log_weights)),
            self.number + log_weights.shape[0],
        )

    def log_evidence(self, xp: Any = jnp) -> Any:
        """Log of the mean weight, an unbiased estimate of the evidence; ``xp`` may be numpy."""
        return self.log_sum - xp.log(self.number)

    def log_evidence_sd(self, xp: Any = jnp) -> Any:
        """Standard error of that, by the relative variance of the weights (the delta method)."""
        relative = self.number * xp.exp(self.log_squares - 2.0 * self.log_sum) - 1.0
        return xp.sqrt(xp.maximum(relative, 0.0) / self.number)


class Approximation(NamedTuple):
    """The state of a chain.

    Attributes:
        law: what was learned: q, and what is said of it.
        given: a position to start from, (D,), and whether there is one.
        pool: the newest draws of q.
        sums: over the weights of all pools.
    """

    law: Any
    given: tuple[Vector, Any]
    pool: Pool
    sums: Sums


class Settings(NamedTuple):
    """Arguments of the compiled program.

    Attributes:
        warmup: iterations.
        radius: of random starts.
        rate: of learning, where there is one.
    """

    warmup: Any
    radius: Any
    rate: Any = ()


class Learned(NamedTuple):
    """What learning gave: the law, and how many gradients it took."""

    law: Any
    gradients: Int[Array, ""]


def smoothed(log_weights: Float[Array, " S"]) -> tuple[Float[Array, " S"], Scalar]:
    """Pareto-smoothed importance weights, inside a compiled program.

    Args:
        log_weights: unnormalised; S is 25 or more. NaN counts as weight zero.

    Returns:
        Smoothed log weights that sum to one, and k. The weights are those of `pareto.psis`, k that
        of `pareto.khat`, which is never NaN.
    """
    tail = pareto.tail_length(log_weights.shape[0])
    clean = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    top = jnp.max(clean)
    sound = jnp.isfinite(top)
    out = clean - jnp.where(sound, top, 0.0)
    order = jnp.argsort(out)[-tail - 1 :]
    largest = out[order]
    cutoff = jnp.exp(largest[0])
    shapes, scales = pareto.fit((jnp.exp(largest[1:]) - cutoff)[None], jnp)
    k, sigma = shapes[0], scales[0]
    alike = sound & (largest[-1] - largest[0] < pareto.ALIKE)
    prob = np.arange(0.5, tail) / tail
    smooth = jnp.minimum(jnp.log(cutoff + pareto.quantile(prob, k, sigma, jnp)), 0.0)
    fitted = sound & ~alike & jnp.isfinite(k) & jnp.all(jnp.isfinite(smooth))
    out = out.at[order[1:]].set(jnp.where(fitted, smooth, largest[1:]))
    shares = jnp.where(sound, out - logsumexp(out), -jnp.inf)
    khat = jnp.where(alike, 0.0, jnp.where(fitted, k, jnp.inf))
    return shares, khat.astype(out.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Approximated(abc.ABC):
    """What `Laplace`, `Pathfinder` and `SVI` share: pools of draws of q, weighed and resampled.

    A chain is an independent run: it has its own starts, its own optimisation and its own draws, so
    that R-hat shows where chains found different approximations (several modes, or an optimisation
    that failed). The draws of a chain are equally weighted: pools of ``pool_size`` draws of q, each
    resampled by its Pareto-smoothed importance weights (systematically, so that a draw of weight w
    comes about ``pool_size`` w times) and shuffled; with ``resample=False`` they are plain draws of
    q. More draws than one pool has come from further pools of the same q.
    """

    resample: bool = True
    pool_size: int = 1000
    init_radius: float = 2.0

    one_law: ClassVar[bool] = False
    refit_warmup: ClassVar[int]
    said: ClassVar[str]
    """What q is, in a few words."""

    def __post_init__(self) -> None:
        if not isinstance(self.resample, bool):
            raise OptionError(f"resample must be True or False; got {self.resample!r:.60}.")
        require_count("pool_size", self.pool_size)
        if self.pool_size < pareto.FEWEST:
            raise OptionError(
                f"pool_size must be {pareto.FEWEST} or more, for a tail of the weights to be seen; "
                f"got {self.pool_size}."
            )
        require_positive("init_radius", self.init_radius)

    # -- what a method adds ----------------------------------------------------------------------

    @abc.abstractmethod
    def blank(self, key: Any, position: Vector, target: Any) -> Any:
        """A law before anything is learned."""

    @abc.abstractmethod
    def learned(
        self, key: Any, index: Any, state: Approximation, target: Any, settings: Settings
    ) -> Learned:
        """The law after iteration ``index``."""

    @abc.abstractmethod
    def drawn(self, key: Any, number: Any, law: Any, target: Any) -> tuple[Vector, Scalar]:
        """A draw of q, and log q there; ``number`` counts the draws of a pool."""

    @abc.abstractmethod
    def told(self, law: Any) -> dict[str, tuple[tuple[str, ...], Any]]:
        """What results say of the laws of all chains: dimensions and values by name."""

    # -- as a method of `infer` ------------------------------------------------------------------

    @property
    def needs(self) -> tuple[Any, ...]:
        return ("log_density", "constrain")

    @property
    def draws(self) -> int:
        """Default number of draws: one pool."""
        return int(self.pool_size)

    def density(self, target: Any) -> Callable[[Vector], Scalar]:
        """Log p on the unconstrained space."""
        return target.log_density

    def check(self, program: Program) -> None:
        """Refuse programs without a continuous latent site, or with discrete ones left."""
        program.require_gradients(type(self).__name__)

    def attributes(self) -> dict[str, str]:
        how = "resampled by Pareto-smoothed importance weights" if self.resample else "as they are"
        return {"approximation": f"draws of {self.said}, {how}"}

    def settings(self, program: Program, warmup: int) -> Settings:
        return Settings(np.int32(warmup), np.asarray(self.init_radius, program.precision))

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> Approximation:
        position, given = start
        law = self.blank(key, position, target)
        return self._begun(law, (position, jnp.asarray(given)))

    def refresh(self, state: Approximation, target: Any, settings: Settings) -> Approximation:
        """Before a new start, on other data, from where the last one ended."""
        return self._begun(*self.renewed(state))

    def renewed(self, state: Approximation) -> tuple[Any, tuple[Vector, Any]]:
        """The law to begin with and the position to start from, on other data."""
        return state.law, (self.centre(state.law), jnp.asarray(True))

    @abc.abstractmethod
    def centre(self, law: Any) -> Vector:
        """A point in the middle of q."""

    def _begun(self, law: Any, given: tuple[Vector, Any]) -> Approximation:
        shape, dtype = given[0].shape, given[0].dtype
        nothing, blank = jnp.zeros((), dtype), jnp.zeros(self.pool_size, dtype)
        numbers = jnp.arange(self.pool_size, dtype=jnp.int32)
        positions = jnp.zeros((self.pool_size, *shape), dtype)
        pool = Pool(positions, blank, blank, numbers, nothing, nothing)
        return Approximation(law, given, pool, Sums.start(dtype))

    def step(
        self, key: Any, index: Any, state: Approximation, target: Any, settings: Settings
    ) -> tuple[Approximation, Vector, dict[str, Any]]:
        """Learning, as long as there is something to learn; then one draw after the other."""
        key_learn, key_pool = random.split(key)
        law, gradients = self.learned(key_learn, index, state, target, settings)
        state = state._replace(law=law)
        number = index - settings.warmup
        state = lax.cond(
            (number >= 0) & (number % self.pool_size == 0),
            lambda: self._filled(key_pool, state, target),
            lambda: state,
        )
        pool, sums = state.pool, state.sums
        chosen = pool.chosen[number % self.pool_size]
        reliable = pool.khat < pareto.reliable(self.pool_size)
        stats = {
            "lp": pool.log_densities[chosen],
            "log_weight": pool.log_weights[chosen],
            "khat": pool.khat,
            "log_evidence": jnp.where(reliable, sums.log_evidence(), jnp.nan),
            "n_steps": jnp.asarray(gradients, jnp.int32),
        }
        return state, pool.positions[chosen], stats

    def _filled(self, key: Any, state: Approximation, target: Any) -> Approximation:
        """A new pool."""
        key_draws, key_chosen, key_order = random.split(key, 3)
        density = self.density(target)

        def draw(number: Any) -> tuple[Vector, Scalar, Scalar]:
            x, log_q = self.drawn(random.fold_in(key_draws, number), number, state.law, target)
            log_p = density(x).astype(x.dtype)
            log_p = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p)
            return x, log_p, log_p - log_q

        size = self.pool_size
        batch = max(n for n in range(1, _AT_ONCE + 1) if size % n == 0)
        numbers = jnp.arange(size, dtype=jnp.int32)
        positions, log_p, log_weights = lax.map(draw, numbers, batch_size=batch)
        shares, khat = smoothed(log_weights)
        chosen = numbers
        if self.resample:
            chosen = random.permutation(key_order, resample(key_chosen, shares, "systematic"))
        pool = Pool(positions, log_p, log_weights, chosen, khat, size_of_shares(shares))
        return state._replace(pool=pool, sums=state.sums.add(log_weights))

    def values(self, draw: Vector, target: Any) -> dict[str, Any]:
        return target.constrain(draw)

    def failed(self, state: Approximation) -> Any:
        return np.zeros(np.shape(state.pool.khat), bool)

    def groups(self, state: Approximation) -> dict[str, dict[str, tuple[tuple[str, ...], Any]]]:
        """Of the newest pool of every chain: weights, k and effective sample size; the evidence.

        And what the method says of its laws.
        """
        pool = jax.tree.map(np.asarray, state.pool)
        sums = jax.tree.map(np.asarray, state.sums)
        with np.errstate(all="ignore"):
            found = {
                "khat": (("chain",), pool.khat),
                "weight_ess": (("chain",), pool.effective),
                "log_evidence": (("chain",), sums.log_evidence(np)),
                "log_evidence_sd": (("chain",), sums.log_evidence_sd(np)),
                "log_weight": (("chain", "pool_draw"), pool.log_weights),
            }
        return {"approximation": {**found, **self.told(jax.tree.map(np.asarray, state.law))}}
