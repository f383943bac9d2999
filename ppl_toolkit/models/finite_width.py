"""Networks of finite width made of the same layers: drawn at random, and trained.

They are what the kernels are limits of: weights are standard normal, and a layer multiplies them by
``weight_std / sqrt(fan in)`` and its biases by ``bias_std`` (the NTK parametrisation). All hidden
layers have the same number of units, ``width``. The outputs of a network are sigma g(x): see
`ensembles`, whose law of trained networks this simulates.
Source: Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein and Pennington (2019).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float

from ppl_toolkit.errors import DataError, InferenceWarning, ModelError, OptionError
from ppl_toolkit.models.activations import GELU, Activation, Erf, Rectifier, Sign, Sin, Step
from ppl_toolkit.models.ensembles import checked_ensemble, readout_of
from ppl_toolkit.models.kept import by_kept_program
from ppl_toolkit.models.layers import Dense, Layer, LayerNorm, Residual, Serial
from ppl_toolkit.models.quadrature_activations import Elementwise, HermiteSeries

__all__ = ["Weights", "apply", "init", "random_outputs", "trained_outputs"]

_BATCH_BYTES = 2**25  # of the weights of the networks that are simulated together
_MOST_STEPS = 100_000
# A step of gradient descent times its fastest rate. Where the flow has exp(-r) left of an error,
# steps of z have (1 - z)^(r / z): 0.184 z less, at r = 1, at most.
_STEP = 0.1


class Weights(NamedTuple):
    """The parameters of a `Dense` layer, all standard normal at the start."""

    weight: Float[Array, "fan_in units"]
    bias: Float[Array, " units"]


def init(network: Layer, key: Any, width: int, features: int) -> Any:
    """Random parameters; traceable.

    Args:
        network: Serial, Dense, Residual, LayerNorm and elementwise activations; its last layer is
            Dense, and has one unit.
        key: a JAX key.
        width: units of every hidden layer.
        features: d of an input.

    Returns:
        A tree of `Weights`: a tuple along each Serial, a pair (branch, shortcut) of a Residual.

    Raises:
        ModelError: a layer cannot be simulated.
    """
    shapes = _shapes(_simulated(network), features, int(width), 1)[0]
    leaves, tree = jax.tree.flatten(shapes, is_leaf=_is_shape)
    # All at once: a generator for each layer would be most of what there is to compile.
    ends = np.cumsum([math.prod(shape) for shape in leaves])
    normals = jnp.split(random.normal(key, (int(ends[-1]),)), ends[:-1])
    shaped = [part.reshape(shape) for part, shape in zip(normals, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)


def apply(network: Layer, parameters: Any, x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """The outputs of one network; traceable and differentiable.

    Complexity: 2 n width^2 operations for each hidden layer.
    """
    return _forward(_simulated(network), parameters, x)[:, 0]


def _shapes(one: Layer, fan_in: int, width: int, last: int) -> tuple[Any, int]:
    """Shapes of a layer's parameters, whose last units are ``last``; and how many units it has."""
    if isinstance(one, Dense):
        return Weights((fan_in, last), (last,)), last  # type: ignore[arg-type]
    if isinstance(one, Serial):
        shapes = []
        for i, inner in enumerate(one.layers):
            units = last if i == len(one.layers) - 1 else width
            own, fan_in = _shapes(inner, fan_in, width, units)
            shapes.append(own)
        return tuple(shapes), fan_in
    if isinstance(one, Residual):
        parts = (one.branch, one.shortcut)
        return tuple(() if p is None else _shapes(p, fan_in, width, width)[0] for p in parts), width
    return (), fan_in


def _is_shape(tree: Any) -> bool:
    return type(tree) is tuple and bool(tree) and all(isinstance(size, int) for size in tree)


def _forward(one: Layer, parameters: Any, h: Any) -> Any:
    """The units (n, units out) of a layer that follow from units (n, units in)."""
    if isinstance(one, Dense):
        scale = one.weight_std / math.sqrt(h.shape[1])
        return scale * (h @ parameters.weight) + one.bias_std * parameters.bias
    if isinstance(one, Serial):
        for inner, own in zip(one.layers, parameters, strict=True):
            h = _forward(inner, own, h)
        return h
    if isinstance(one, Residual):
        around = h if one.shortcut is None else _forward(one.shortcut, parameters[1], h)
        return around + _forward(one.branch, parameters[0], h)
    if isinstance(one, LayerNorm):
        centred = h - h.mean(1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + one.epsilon)
    return _function(one)(h)


def _function(activation: Layer) -> Callable[[Any], Any]:
    match activation:
        case Rectifier(a, c):
            return lambda x: a * jnp.minimum(x, 0) + c * jnp.maximum(x, 0)
        case Erf(a, b, c):
            return lambda x: a * jax.scipy.special.erf(b * x) + c
        case Sin(a, b, c):
            return lambda x: a * jnp.sin(b * x + c)
        case GELU():
            return functools.partial(jax.nn.gelu, approximate=False)
        case Step():
            return lambda x: jnp.heaviside(x, 0.5)
        case Sign():
            return jnp.sign
        case Elementwise() | HermiteSeries():
            return activation.function
    raise ModelError(f"the function of the activation {activation!r:.60} is not known here.")


def _simulated(network: Layer) -> Serial:
    """The layers one after another, the last one Dense.

    Raises:
        ModelError: one of them cannot be simulated.
    """
    before, readout = readout_of(network)
    _check(Serial(*before))
    return Serial(*before, readout)


def _check(one: Layer) -> None:
    if isinstance(one, Serial):
        for inner in one.layers:
            _check(inner)
    elif isinstance(one, Residual):
        for part in (one.branch, one.shortcut):
            if part is not None:
                _check(part)
    elif isinstance(one, Activation):
        _function(one)
    elif not isinstance(one, Dense | LayerNorm):
        raise ModelError(
            f"{one!r:.60} is not simulated at finite width: networks of Dense, Residual, LayerNorm "
            "and elementwise activations are."
        )


def random_outputs(
    network: Layer,
    x: Float[Array, "n d"],
    *,
    width: int,
    networks: int = 1000,
    law: Any = 1.0,
    seed: int = 0,
    precision: str = "float64",
) -> np.ndarray:
    """The outputs of independent random networks.

    Args:
        network: as for `init`.
        x: inputs (n, d).
        width: units of every hidden layer.
        networks: how many.
        law: of sigma^2, drawn once for each network: a NumPyro distribution, or a number.
        seed: the same seed gives the same networks, however many.
        precision: "float64", or "float32" in a third to a half of the time.

    Returns:
        An array (networks, n).

    Complexity: width^2 random numbers and 2 n width^2 operations for each hidden layer of each
    network; memory for some 30 MB of weights, whatever the number of networks.

    Raises:
        DataError, ModelError, OptionError: inputs, layers or options cannot be used.
    """
    _check_options(precision, seed, width=width, networks=networks)
    law, x, *_ = _checked(network, x, None, None, law, "all")
    layers = _simulated(network)
    batch = _batch(layers, width, x.shape[1], networks)

    count = -(-networks // batch) * batch

    def outputs(key: Any, layers: Any, x: Any, s2: Any) -> Any:
        def one(own: tuple) -> Any:
            index, s2 = own
            parameters = init(layers, _keys(key, index)[1], width, x.shape[1])
            return jnp.sqrt(s2) * apply(layers, parameters, x)

        return lax.map(one, (jnp.arange(count), s2), batch_size=batch)

    s2 = _scales(law, count, seed)
    return _run(precision, seed, outputs, layers, x, s2)[:networks]


def trained_outputs(
    network: Layer,
    x: Float[Array, "n d"],
    y: Float[Array, " n"],
    x_new: Float[Array, "m d"],
    *,
    width: int,
    time: float,
    networks: int = 100,
    law: Any = 1.0,
    learning_rate: float = 1.0,
    steps: int | None = None,
    ridge: float = 0.0,
    trained: str = "all",
    seed: int = 0,
    precision: str = "float64",
) -> np.ndarray:
    """The outputs, at new inputs, of independent networks after gradient descent on all targets.

    What `gradient_descent_ensemble` describes in the limit of infinite width, with the same loss.
    A network takes steps of size learning_rate * time / (number of steps).

    Args:
        network: as for `init`.
        x: inputs (n, d).
        y: targets (n,).
        x_new: inputs (m, d).
        width: units of every hidden layer.
        time: t, finite.
        networks: how many.
        law: of sigma^2, drawn once for each network and not trained.
        learning_rate: eta; only its product with the time matters.
        steps: of each network. If None as many as its sigma^2 needs by the tangent kernel of the
            infinitely wide network: a step then is a tenth of the shortest time in which an error
            decays, which leaves errors within 2 % of the flow's.
        ridge: of the loss, in units of sigma^2.
        trained: "all", or only the "last" layer.
        seed: the same seed gives the same networks, however many.
        precision: "float64" or "float32".

    Returns:
        An array (networks, m); NaN for networks that diverged, with an `InferenceWarning`.

    Complexity: 6 (n + m) width^2 operations for each step and hidden layer of a network (2 (n + m)
    width for each step where only the readout is trained); three times the weights of some 30 MB of
    networks in memory.

    Raises:
        DataError, ModelError, OptionError: inputs, layers or options cannot be used; or sigma^2 of
            some network needs over 100,000 steps.
    """
    counted = {"width": width, "networks": networks} | ({} if steps is None else {"steps": steps})
    _check_options(precision, seed, **counted)
    law, x, y, x_new = _checked(network, x, y, x_new, law, trained)
    for name, value in (("time", time), ("learning_rate", learning_rate), ("ridge", ridge)):
        if not isinstance(value, int | float | np.number) or not 0 <= value < np.inf:
            raise OptionError(f"{name} must be a finite number, 0 or more; got {value!r:.40}.")
    layers = _simulated(network)
    n, features = x.shape
    batch = _batch(layers, width, features, networks)
    count = -(-networks // batch) * batch

    # Networks of like sigma^2 go together: the largest tells the steps of a batch.
    s2 = _scales(law, count, seed)
    largest = np.sort(s2)[batch - 1 :: batch]
    counts = _counts(network, x, largest, time * learning_rate, ridge, trained, steps)

    def outputs(key: Any, layers: Any, x: Any, y: Any, x_new: Any, s2: Any, plan: Any) -> Any:
        inputs = jnp.concatenate([x, x_new])
        flow, penalty, counts = plan

        def start(index: Any) -> tuple[Layer, Any, Any]:
            """What is trained, its parameters, and its inputs."""
            drawn = init(layers, _keys(key, index)[1], width, features)
            if trained == "all":
                return layers, drawn, inputs
            hidden = _forward(Serial(*layers.layers[:-1]), drawn[:-1], inputs)
            return layers.layers[-1], drawn[-1], hidden

        def one_batch(group: tuple) -> Any:
            index, s2, count = group

            def one(index: Any, s2: Any) -> Any:
                part, first, h = start(index)

                def loss(parameters: Any) -> Any:
                    f = jnp.sqrt(s2) * _forward(part, parameters, h[:n])[:, 0]
                    total = ((f - y) ** 2).sum()
                    if ridge:
                        moved = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), parameters, first)
                        total += penalty * s2 * sum(jax.tree.leaves(moved))
                    return total / (2 * n)

                def step(_: Any, parameters: Any) -> Any:
                    slope = jax.grad(loss)(parameters)
                    return jax.tree.map(lambda a, g: a - flow / count * g, parameters, slope)

                found = lax.fori_loop(0, count.astype(int), step, first)
                return jnp.sqrt(s2) * _forward(part, found, h[n:])[:, 0]

            return jax.vmap(one)(index, s2)

        groups = jnp.argsort(s2).reshape(-1, batch)
        found = lax.map(one_batch, (groups, s2[groups], counts))
        return jnp.zeros((count, len(x_new))).at[groups.reshape(-1)].set(found.reshape(count, -1))

    plan = (np.float64(time * learning_rate), np.float64(ridge), counts.astype(np.float64))
    found = _run(precision, seed, outputs, layers, x, y, x_new, s2, plan)[:networks]
    lost = ~np.isfinite(found).all(axis=1)
    if lost.any():
        found[lost] = np.nan
        warnings.warn(
            f"{lost.sum()} of {networks} networks diverged, the smallest sigma^2 among them being "
            f"{s2[:networks][lost].min():.3g}: take more steps, or leave steps=None.",
            InferenceWarning,
            stacklevel=2,
        )
    return found


def _counts(
    network: Layer, x: Any, s2: Any, flow: float, ridge: float, trained: str, steps: int | None
) -> np.ndarray:
    """Steps for each sigma^2: the fastest rate is eta sigma^2 (largest eigenvalue + ridge) / n."""
    if steps is not None:
        return np.full(len(s2), steps)
    kernel = network.ntk(x) if trained == "all" else network.nngp(x)
    rate = s2 * (np.linalg.eigvalsh(kernel)[-1] + ridge) / len(x)
    counts = np.maximum(np.ceil(flow * rate / _STEP), 1)
    if counts.max() > _MOST_STEPS:
        raise OptionError(
            f"a network with sigma^2 = {s2.max():.3g} needs {counts.max():.3g} steps to time "
            f"{flow:.3g}: take a shorter time, a law of sigma^2 with a lighter tail, or say steps="
            " and let such networks diverge."
        )
    return counts


def _checked(
    network: Any, x: Any, y: Any, x_new: Any, law: Any, trained: str
) -> tuple[Any, Any, Any, Any]:
    """NumPy arrays, as `checked_ensemble` lets them pass, of vectors."""
    if isinstance(network, Layer):
        _simulated(network)
    if y is None:
        x_new, y = x, np.zeros(len(x) if np.ndim(x) else 0)
    law, x, y, x_new = checked_ensemble(network, x, y, x_new, law=law, trained=trained)
    if x.ndim != 2:
        raise DataError(f"x must have shape (n, features) at finite width; got {x.shape}.")
    as_numpy = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf, np.float64))
    return as_numpy(law), *(as_numpy(a) for a in (x, y, x_new))


def _check_options(precision: Any, seed: Any, **counts: Any) -> None:
    if precision not in ("float64", "float32"):
        raise OptionError(f"precision must be 'float64' or 'float32'; got {precision!r:.40}.")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise OptionError(f"seed must be a whole number; got {seed!r:.40}.")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise OptionError(f"{name} must be a whole number, 1 or more; got {value!r:.40}.")


def _batch(layers: Layer, width: int, features: int, networks: int) -> int:
    """How many networks to simulate together, in batches of nearly equal size."""
    shapes = jax.tree.leaves(_shapes(layers, features, int(width), 1)[0], is_leaf=_is_shape)
    size = 8 * sum(math.prod(shape) for shape in shapes)
    most = max(1, _BATCH_BYTES // size)
    return -(-networks // -(-networks // most))


def _keys(key: Any, index: Any) -> Any:
    """The keys of a network's sigma^2 and of its weights."""
    return random.split(random.fold_in(key, index))


def _scales(law: Any, count: int, seed: int) -> np.ndarray:
    """Sigma^2 of each network. Drawn in thousands: one program for most numbers of networks."""
    index = np.arange(1024 * -(-count // 1024))

    def scales(key: Any, law: Any, index: Any) -> Any:
        return jax.vmap(lambda i: law.sample(_keys(key, i)[0]))(index.astype(int))

    return _run("float64", seed, scales, law, index)[:count]


def _run(precision: str, seed: int, function: Callable, *args: Any) -> np.ndarray:
    """``function(key, *args)`` by a kept executable."""
    key = np.asarray(random.key_data(random.key(int(seed))))

    def with_key(key: Any, *args: Any) -> Any:
        return function(random.wrap_key_data(key), *args)

    with jax.enable_x64(precision == "float64"):
        args = jax.tree.map(lambda leaf: np.asarray(leaf, precision), args)
        return np.array(by_kept_program(with_key, key, *args))
