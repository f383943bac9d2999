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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import distributions as dist

from ppl_toolkit.errors import DataError, ModelError, OptionError
from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.evaluation import checked_inputs, checked_targets
from ppl_toolkit.models.kept import by_kept_program
from ppl_toolkit.models.layers import Dense, Layer, Serial, check_order
from ppl_toolkit.models.scale_quadrature import checked_law
from ppl_toolkit.models.trained_outputs import Ensemble, holds_jax

__all__ = [
    "Ensemble",
    "checked_ensemble",
    "gradient_descent_ensemble",
    "readout_of",
    "trained_to",
]


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
        nodes: of the quadrature over sigma^2 at finite time. With 129 CDFs are good to 1e-8,
            until the time is so long that only networks with a sigma^2 far in the lower tail of
            the law are still learning: there take more, until the answer stays.

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
    if holds_jax(given) or holds_jax(law):
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
    if holds_jax(data) or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return law
    # Some laws turn their parameters into JAX arrays, which says nothing of what the user wants.
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), law)
