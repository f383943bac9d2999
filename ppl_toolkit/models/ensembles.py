"""Ensembles of infinitely wide networks, each trained by gradient descent from its own start.

The output of a network is sigma g(x), where sigma is the standard deviation of the readout's
weights if the readout has no bias. Each network draws sigma^2 ~ H and its weights once; gradient
descent on the square loss moves the weights, never sigma. In the limit of infinite width this is
a linear flow, solved exactly here: no network is trained.
Sources: Jacot, Gabriel and Hongler (2018); Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein and
Pennington (2019), Wide neural networks of any depth evolve as linear models; Lee, Yun, Yang and Lee
(2022), Scale mixtures of neural network Gaussian processes, for the law of sigma^2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float
from numpyro import distributions as dist

from ppl_toolkit.errors import DataError, MethodError, ModelError, OptionError
from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.evaluation import checked_inputs, checked_targets
from ppl_toolkit.models.kept import by_kept_program
from ppl_toolkit.models.layers import Dense, Layer, Serial, check_order
from ppl_toolkit.models.location_scale import LocationScaleMixture
from ppl_toolkit.models.scale_mixture_laws import ScaleMixtureNormal, ScaleMixtureProcess
from ppl_toolkit.models.scale_quadrature import atoms_of, checked_law, mean_of

__all__ = [
    "Ensemble",
    "checked_ensemble",
    "gradient_descent_ensemble",
    "readout_of",
    "trained_to",
]

_LOG_2PI = math.log(2.0 * math.pi)


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
        if not (_holds_jax(self) or isinstance(key, jax.core.Tracer)):
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


def _holds_jax(owner: Any) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(owner))


def _evaluated(function: Callable, owner: Any, *args: Any) -> Any:
    """``function(owner, *args)``, by a kept executable in float64 if ``owner`` holds NumPy arrays.

    Data of random keys, which are whole numbers, stay such.
    """
    if _holds_jax((owner, [a for a in args if isinstance(a, jax.core.Tracer)])):
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


def trained_to(
    network: Layer,
    law: Any,
    x: Any,
    y: Any,
    x_new: Any,
    decay: Any,
    ridge: Any,
    *,
    moving: bool = True,
    last: bool = False,
    nodes: int = 129,
) -> Ensemble:
    """`gradient_descent_ensemble` without its checks, traceable.

    Args:
        network, law, x, y, x_new, ridge, nodes: as there.
        decay: learning rate times time over the number of targets; None for infinite time.
        moving: False promises that the time is zero or infinite.
        last: whether only the readout is trained.
    """
    x, y, x_new = (jnp.asarray(a, jnp.result_type(x, y, x_new, float)) for a in (x, y, x_new))
    old = kernel_matrices(network, x, ntk=not last)
    across = kernel_matrices(network, x_new, x, ntk=not last)
    start_new = kernel_matrices(network, x_new, ntk=False).nngp
    theta, theta_across = (old.nngp, across.nngp) if last else (old.ntk, across.ntk)
    eigenvalues, v = jnp.linalg.eigh(theta)
    start_old = jnp.maximum(eigenvalues, 0) if last else v.T @ old.nngp @ v
    return Ensemble(
        law=law,
        decay=decay,
        eigenvalues=eigenvalues + ridge,
        across=theta_across @ v,
        start_old=start_old,
        start_across=across.nngp @ v,
        start_new=start_new,
        y=v.T @ y,
        moving=moving,
        nodes=nodes,
    )


def gradient_descent_ensemble(
    network: Layer,
    x: Float[Array, "n ..."],
    y: Float[Array, " n"],
    x_new: Float[Array, "m ..."],
    *,
    law: Any,
    time: float | None = None,
    learning_rate: float = 1.0,
    ridge: float = 0.0,
    trained: str = "all",
    nodes: int = 129,
) -> Ensemble:
    """Predictions of an ensemble of infinitely wide networks trained by gradient descent.

    The loss of a network is (1 / 2n) (|f - y|^2 + ridge sigma^2 |theta - theta_0|^2), and its
    weights theta follow d theta / dt = -learning_rate * gradient from their random start theta_0.

        e = gradient_descent_ensemble(mlp(3), x, y, x_new, law=dist.InverseGamma(2, 2), time=50.0)
        e.quantile(0.975), e.mean(), e.sample(0, draws=100)

    Args:
        network: a layer that ends in weights.
        x: inputs (n, d), or images.
        y: targets (n,).
        x_new: inputs (m, d), or images.
        law: H of sigma^2, a NumPyro distribution; or a number, for networks that all have it.
        time: t, 0 or more; None for infinity.
        learning_rate: eta; only its product with the time matters.
        ridge: of the loss above, 0 or more. The mean at infinite time is that of a regression with
            this noise variance in units of sigma^2. The covariance is not the posterior's, even if
            only the readout is trained: all networks have the same targets, without noise of their
            own.
        trained: "all" weights and biases, or only those of the "last" layer, the readout.
        nodes: of the quadrature over sigma^2 at finite time. CDFs are off by 1e-8 or less with 129,
            until the time is so long that only networks with a sigma^2 far in the lower tail of
            the law are still learning: at eta t l / n = 1e4 for the largest l by 1e-5 for a
            half-Cauchy law of sigma^2, and 1e-3 for Gamma(1/2). There take more nodes.

    Complexity: 13 n^3 operations and 2 n^2 + 2 n m + m^2 numbers, beside the kernels; the methods
    of `Ensemble` tell theirs. Differentiable where no eigenvalues of the tangent kernel coincide.

    Raises:
        DataError: inputs, targets or the law cannot be used; or the tangent kernel is singular and
            time is infinite (NaN instead where x is a JAX array).
        ModelError: the network does not end in weights.
        OptionError: an option is outside its range.
    """
    law, x, y, x_new = checked_ensemble(network, x, y, x_new, law=law, trained=trained)
    for name, value in (("learning_rate", learning_rate), ("ridge", ridge)):
        least = "positive" if name == "learning_rate" else "0 or more"
        _check_number(name, value, least)
    if time is not None:
        _check_number("time", time, "0 or more, or None for infinity", infinite=True)
    if isinstance(nodes, bool) or not isinstance(nodes, int | np.integer) or nodes < 9:
        raise OptionError(f"nodes must be a whole number, at least 9; got {nodes!r:.40}.")
    known = not isinstance(time, jax.core.Tracer)
    endless = time is None or (known and bool(np.isinf(time)))
    decay = None if endless else learning_rate * time / len(y)  # type: ignore[operator]
    function = functools.partial(
        trained_to,
        moving=not (endless or (known and time == 0)),
        last=trained == "last",
        nodes=int(nodes),
    )
    given = (network, None, x, y, x_new, decay, ridge)  # one program for all laws
    if _holds_jax(given) or _holds_jax(law):
        return dataclasses.replace(function(*given), law=law)
    with jax.enable_x64(True):
        given = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), given)
        made: Ensemble = by_kept_program(function, *given)
    made = dataclasses.replace(made, law=law)
    if endless:
        low, high = made.eigenvalues[[0, -1]]
        if not low > len(y) * np.finfo(float).eps * high:
            raise DataError(
                "training for ever needs a tangent kernel that is positive definite, but its "
                f"eigenvalues go from {high:.3g} to {low:.3g}. Drop inputs that are given twice, "
                f"or say ridge={1e-10 * high:.1g} or more, or a finite time."
            )
    return made


def _check_number(name: str, value: Any, range_: str, *, infinite: bool = False) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    number = np.asarray(value)
    good = number.ndim == 0 and number.dtype.kind in "iuf" and (infinite or np.isfinite(number))
    if not good or not (number > 0 if range_ == "positive" else number >= 0):
        raise OptionError(f"{name} must be a number, {range_}; got {value!r:.40}.")


def checked_ensemble(
    network: Any, x: Any, y: Any, x_new: Any, *, law: Any, trained: str
) -> tuple[Any, Any, Any, Any]:
    """Law, inputs, targets and new inputs, if networks can be trained on them.

    NumPy's where neither the network nor the data are JAX's.

    Raises:
        DataError, ModelError, OptionError: as `gradient_descent_ensemble`.
    """
    if trained not in ("all", "last"):
        raise OptionError(f"trained must be 'all' or 'last'; got {trained!r:.40}.")
    if not isinstance(network, Layer) or not check_order(network):
        raise ModelError(
            "the network must be a layer that ends in weights, such as mlp(3) or "
            f"Serial(Dense(1.4), ReLU(), Dense()); got {network!r:.120}."
        )
    if trained == "last":
        readout_of(network)
    x, x_new = checked_inputs(x, "x"), checked_inputs(x_new, "x_new")
    if x.shape[1:] != x_new.shape[1:]:
        raise DataError(
            f"an input of x has shape {x.shape[1:]} and one of x_new {x_new.shape[1:]}; "
            "they must have the same features."
        )
    y = checked_targets(y, len(x))
    return _checked_law(law, (network, x, y, x_new)), x, y, x_new


def readout_of(network: Layer) -> tuple[tuple[Layer, ...], Dense]:
    """The layers before the last one, and that one.

    Raises:
        ModelError: it is not Dense.
    """
    layers: tuple[Layer, ...] = (network,)
    while isinstance(layers[-1], Serial):
        layers = (*layers[:-1], *layers[-1].layers)
    if not isinstance(layers[-1], Dense):
        raise ModelError(
            f"the last layer must be a readout such as Dense(); got {layers[-1]!r:.80}."
        )
    return layers[:-1], layers[-1]


def _checked_law(law: Any, data: Any) -> Any:
    if not isinstance(law, dist.Distribution):
        if not isinstance(law, jax.core.Tracer):
            number = np.asarray(law)
            if number.ndim or number.dtype.kind not in "iuf" or not 0 < number < np.inf:
                raise DataError(
                    "law must be a NumPyro distribution of sigma^2, such as InverseGamma(2.0, 2.0),"
                    f" or one positive number; got {law!r:.60}."
                )
        law = dist.Delta(law)
    checked_law(law)
    if law.batch_shape:
        raise DataError(f"law must be of one sigma^2; got batch shape {law.batch_shape}.")
    leaves = jax.tree.leaves(law)
    if _holds_jax(data) or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return law
    # Some laws turn their parameters into JAX arrays, which says nothing of what the user wants.
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), law)
