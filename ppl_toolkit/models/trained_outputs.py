"""Outputs of an ensemble of infinitely wide networks that were trained by gradient descent.

`ensembles` trains; here is the law of what comes out.
Sources: as there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float

from ppl_toolkit.errors import DataError, MethodError, OptionError
from ppl_toolkit.models.kept import by_kept_program
from ppl_toolkit.models.location_scale import LocationScaleMixture
from ppl_toolkit.models.scale_mixture_laws import ScaleMixtureNormal, ScaleMixtureProcess
from ppl_toolkit.models.scale_quadrature import atoms_of, mean_of

__all__ = ["Ensemble", "holds_jax"]

_ARRAYS = ["law", "decay", "eigenvalues", "across", "start_old", "start_across", "start_new", "y"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=["moving", "nodes"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """The law of the outputs f at m new inputs of networks trained on n targets.

    Given s = sigma^2 they are Gaussian. With the eigenvectors V and eigenvalues l of the tangent
    kernel Theta + ridge I and d(s) = (1 - exp(-eta s t l / n)) / l:

        G = Theta* V diag(d) V',  mean = G y,  covariance = s (K** + G K G' - G K*' - K* G').

    Over the law of s: at t = 0 and at infinite t the mean does not depend on s, and the outputs are
    a scale mixture under the PRIOR law of s (for an inverse gamma law Student's t with 2 alpha
    degrees of freedom: training does not update the law, as conditioning would). Between, a mixture
    of locations and scales, summed over the nodes of a quadrature.

    Made from NumPy arrays, its methods compute in float64 and give NumPy arrays; else they are
    traceable, and ``marginals`` and ``joint`` hold JAX arrays.

    Attributes:
        law: H, the law of sigma^2.
        decay: eta t / n; None for infinite t.
        eigenvalues: l, (n,).
        across: Theta* V, (m, n).
        start_old: V' K V, (n, n); its diagonal (n,) where it has no more (training of the readout).
        start_across: K* V, (m, n).
        start_new: K**, (m, m).
        y: V' y, (n,).
        moving: whether the mean depends on sigma^2: 0 < t < infinity.
        nodes: of the quadrature over sigma^2.
    """

    law: Any
    decay: Any
    eigenvalues: Float[Array, " n"]
    across: Float[Array, "m n"]
    start_old: Float[Array, "n *n"]
    start_across: Float[Array, "m n"]
    start_new: Float[Array, "m m"]
    y: Float[Array, " n"]
    moving: bool
    nodes: int

    def mean(self, sigma2: Any = None) -> Float[Array, "*s m"]:
        """The mean of the outputs given sigma^2 (*s); over its law if None.

        Over the law it is the centre of symmetry, or E[G y]: no mean where E[sigma] is infinite.
        """
        if sigma2 is None:
            return _evaluated(_overall_mean, self)
        return _evaluated(_means, self._given, _checked_scale(sigma2))

    def variance(self, sigma2: Any = None) -> Float[Array, "*s m"]:
        """The variance of every output given sigma^2 (*s); over its law if None.

        Complexity: n^2 m for each sigma^2, n m where only the readout is trained.
        """
        if sigma2 is None:
            return _evaluated(lambda law: law.variance, self.marginals)
        return _evaluated(_variances, self._given, _checked_scale(sigma2))

    def covariance(self, sigma2: Any = None) -> Float[Array, "*s m m"]:
        """The covariance of the outputs given sigma^2 (*s); over its law if None.

        Complexity: n^2 m + n m^2 for each sigma^2, or node of its quadrature.
        """
        if sigma2 is None:
            return _evaluated(_overall_covariance, self)
        return _evaluated(_covariances, self._given, _checked_scale(sigma2))

    @functools.cached_property
    def marginals(self) -> ScaleMixtureNormal | LocationScaleMixture:
        """The law of every output, over sigma^2 too: a NumPyro distribution of batch shape (m,).

        Its own methods compute in the precision of JAX that is active; those of the ensemble,
        which use it, keep to float64.

        Complexity: that of ``variance``, for each node at finite t. Computed once.
        """
        return _evaluated(_marginals, self)

    @functools.cached_property
    def joint(self) -> ScaleMixtureProcess:
        """The joint law of the outputs, a NumPyro distribution: a scale mixture.

        Raises:
            MethodError: at finite t > 0, where it is none.
        """
        if self.moving:
            raise MethodError(
                "trained to a finite time the outputs are no scale mixture, as their mean depends "
                "on sigma^2: use sample(seed, draws) for all outputs together, marginals for "
                "single ones, or mean(sigma2) and covariance(sigma2)."
            )
        return _evaluated(_joint, self)

    def log_density(self, value: Any) -> Float[Array, "*k m"]:
        """The log density of every single output at ``value`` (*k, m)."""
        return _evaluated(lambda law, v: law.log_prob(v), self.marginals, value)

    def cdf(self, value: Any) -> Float[Array, "*k m"]:
        """The distribution function of every single output at ``value`` (*k, m)."""
        return _evaluated(lambda law, v: law.cdf(v), self.marginals, value)

    def quantile(self, p: Any) -> Float[Array, "*k m"]:
        """Quantiles of every single output at levels ``p``, which broadcast with (m,)."""
        return _evaluated(lambda law, p: law.icdf(p), self.marginals, p)

    def sample(self, key: Any, draws: int = 1000) -> Float[Array, "draws m"]:
        """Outputs of ``draws`` independent networks; all of one network have the same sigma^2.

        Args:
            key: a seed, or a JAX key.
            draws: number of networks.

        Complexity: 10 (n + m)^3 once, (n + m)^2 for each network.
        """
        if isinstance(draws, bool) or not isinstance(draws, int | np.integer) or draws < 1:
            raise OptionError(f"draws must be a number of networks, 1 or more; got {draws!r:.40}.")
        if isinstance(key, int | np.integer):
            key = random.key(int(key))
        if not (holds_jax(self) or isinstance(key, jax.core.Tracer)):
            key = np.asarray(random.key_data(key))
        return _evaluated(functools.partial(_outputs, int(draws)), self, key)

    @property
    def _given(self) -> Ensemble:
        """Without the law: programs that do not need it serve all laws."""
        return dataclasses.replace(self, law=None)

    def _gain(self, s: Any) -> Any:
        """d(s) = (1 - exp(-eta s t l / n)) / l, (*s, n)."""
        rate, s = self.eigenvalues, jnp.asarray(s)[..., None]
        eps = jnp.finfo(rate.dtype).eps
        rounding = len(rate) * eps * rate[-1]
        known = rate > rounding
        if self.decay is None:
            inverse = jnp.where(known, 1.0 / rate, jnp.nan)
            return jnp.broadcast_to(inverse, jnp.broadcast_shapes(s.shape, inverse.shape))
        # An eigenvalue of zero, but for rounding, has no part in Theta* either: d(s) = eta s t / n
        # does not matter there, until it makes rounding errors count.
        flat = jnp.where(self.decay * s * rounding < jnp.sqrt(eps), self.decay * s, 0.0)
        rate = jnp.where(known, rate, 1.0)
        return jnp.where(known, -jnp.expm1(-self.decay * s * rate) / rate, flat)


def holds_jax(owner: Any) -> bool:
    """Whether there is a JAX array among the leaves of ``owner``."""
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(owner))


def _evaluated(function: Callable, owner: Any, *args: Any) -> Any:
    """``function(owner, *args)``, by a kept executable in float64 if ``owner`` holds NumPy arrays.

    Data of random keys, which are whole numbers, stay such.
    """
    if holds_jax((owner, [a for a in args if isinstance(a, jax.core.Tracer)])):
        return function(owner, *args)
    given = [np.asarray(a) for a in args]
    given = [a if a.dtype == np.uint32 else a.astype(np.float64) for a in given]
    with jax.enable_x64(True):
        return by_kept_program(function, owner, *given)


def _checked_scale(sigma2: Any) -> Any:
    if not isinstance(sigma2, jax.core.Tracer):
        values = np.asarray(sigma2)
        if values.dtype.kind not in "iuf" or not (np.isfinite(values) & (values > 0)).all():
            raise DataError(f"sigma2 must be positive and finite; got {sigma2!r:.60}.")
    return sigma2


def _means(e: Ensemble, s: Any) -> Any:
    return (e._gain(s) * e.y) @ e.across.T  # G y


def _each(function: Callable, s: Any) -> Any:
    """``function`` of every number of ``s``, one after another: their matrices are large."""
    s = jnp.asarray(s, jnp.result_type(float))
    found = lax.map(function, s.reshape(-1))
    return found.reshape(s.shape + found.shape[1:])


def _unit_variance(e: Ensemble, s: Any) -> Any:
    """c(s) = diag(K** + G K G' - 2 G K*'), (m,); at least the rounding errors of K**."""
    g, start = e.across * e._gain(s), jnp.diagonal(e.start_new)  # G V
    c = start + ((_times_start(e, g) - 2.0 * e.start_across) * g).sum(-1)
    return jnp.maximum(c, jnp.finfo(c.dtype).eps * start)


def _variances(e: Ensemble, s: Any) -> Any:
    return _each(lambda one: one * _unit_variance(e, one), s)


def _unit_covariance(e: Ensemble, s: Any) -> Any:
    g = e.across * e._gain(s)
    half = (0.5 * _times_start(e, g) - e.start_across) @ g.T  # G K G' / 2 - K* G'
    return e.start_new + half + half.T


def _covariances(e: Ensemble, s: Any) -> Any:
    return _each(lambda one: one * _unit_covariance(e, one), s)


def _times_start(e: Ensemble, g: Any) -> Any:
    """G K V."""
    return g * e.start_old if e.start_old.ndim == 1 else g @ e.start_old


def _overall_mean(e: Ensemble) -> Any:
    if not e.moving:
        return _means(e, jnp.ones(()))
    values, log_weights = atoms_of(e.law, e.nodes)
    return jnp.exp(log_weights) @ _means(e, values)


def _overall_covariance(e: Ensemble) -> Any:
    """E[s C(s)] + Cov[G y], as `LocationScaleMixture.variance`."""
    if not e.moving:
        return mean_of(e.law) * _unit_covariance(e, jnp.ones(()))
    values, log_weights = atoms_of(e.law, e.nodes)
    weights, centre = jnp.exp(log_weights), _overall_mean(e)
    settled = _unit_covariance(e, values[-1])

    def add(total: Any, node: tuple) -> tuple:
        s, weight = node
        away = _means(e, s) - centre
        more = s * (_unit_covariance(e, s) - settled) + jnp.outer(away, away)
        return total + weight * more, None

    return lax.scan(add, mean_of(e.law) * settled, (values, weights))[0]


def _marginals(e: Ensemble) -> ScaleMixtureNormal | LocationScaleMixture:
    if not e.moving:
        one = jnp.ones(())
        return ScaleMixtureNormal(e.law, _means(e, one), jnp.sqrt(_unit_variance(e, one)))
    values, log_weights = atoms_of(e.law, e.nodes)
    c = lax.map(functools.partial(_unit_variance, e), values)
    return LocationScaleMixture(e.law, values, log_weights, _means(e, values).T, c.T)


def _joint(e: Ensemble) -> ScaleMixtureProcess:
    one = jnp.ones(())
    c, start = _unit_covariance(e, one), jnp.diagonal(e.start_new)
    # Outputs that the targets fix exactly are left with rounding errors.
    rounding = 10 * len(c) * jnp.finfo(c.dtype).eps * start.max()
    root = lax.linalg.cholesky(c + rounding * jnp.eye(len(c), dtype=c.dtype))
    return ScaleMixtureProcess(e.law, root, _means(e, one))


def _outputs(draws: int, e: Ensemble, key: Any) -> Any:
    """Outputs f0* + G (y - f0), from outputs f0 before training: no matrix for each sigma^2."""
    key = random.wrap_key_data(key) if key.dtype == jnp.uint32 else key
    key_scale, key_normal = random.split(key)
    s = e.law.sample(key_scale, (draws,))
    old = jnp.diag(e.start_old) if e.start_old.ndim == 1 else e.start_old
    kernel = jnp.block([[e.start_new, e.start_across], [e.start_across.T, old]])
    values, vectors = jnp.linalg.eigh(kernel)  # singular where inputs are both old and new
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))
    f0 = jnp.sqrt(s)[:, None] * (random.normal(key_normal, (draws, len(root))) @ root.T)
    m = len(e.start_new)
    return f0[:, :m] + (e._gain(s) * (e.y - f0[:, m:])) @ e.across.T
