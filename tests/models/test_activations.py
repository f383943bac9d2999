"""Expectations of activations over pairs of Gaussians: closed forms, quadrature, their derivatives.

Smooth activations are known three times: in closed form, on a grid of 80 x 80 points, and by their
Hermite series. Derivatives are known from the heat equation (Price 1958).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import others_slow
from jax.scipy.special import erf
from kernels_by_loops import expectations

from ppl_toolkit.errors import OptionError
from ppl_toolkit.models.angles import angle, arctan2, sine
from ppl_toolkit.models.infinite_width import (
    GELU,
    RBF,
    Abs,
    Cos,
    Elementwise,
    Erf,
    HermiteSeries,
    Identity,
    LeakyReLU,
    Rectifier,
    ReLU,
    Sign,
    Sin,
    Step,
)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


SMOOTH = {
    "erf": (Erf(0.7, 0.6, 0.4), lambda x: 0.7 * erf(0.6 * x) + 0.4),
    "GELU": (GELU(), gelu),
    "sin": (Sin(1.3, 0.8, 0.5), lambda x: 1.3 * jnp.sin(0.8 * x + 0.5)),
    "RBF": (RBF(0.3), lambda x: np.sqrt(2) * jnp.sin(np.sqrt(0.6) * x + np.pi / 4)),
}
KINKED = {
    "ReLU": ReLU(),
    "leaky ReLU": LeakyReLU(0.1),
    "absolute value": Abs(),
    "rectifier": Rectifier(0.4, -1.3),
}
EVERY = {
    **{name: closed for name, (closed, _) in SMOOTH.items()},
    **KINKED,
    "erf of Williams": Erf(),
    "tanh on a grid": Elementwise(jnp.tanh),
    "tanh in a series": HermiteSeries(jnp.tanh, 20, 60),
}


@functools.cache
def pairs():
    """Correlations from -0.95 to 0.95, variances from 0.2 to 0.8: s, q1, q2."""
    rho, q1, q2 = np.meshgrid([-0.95, -0.4, 0.0, 0.3, 0.9], [0.2, 0.6, 0.8], [0.3, 0.5])
    return tuple(x.ravel() for x in (rho * np.sqrt(q1 * q2), q1, q2))


def with_slopes(activation, s, q1, q2):
    """Both expectations, and their derivatives by s, q1 and q2: (2,) and (2, 3) for every pair."""

    def both(at):
        f, slope = activation.expectations(*at)
        return jnp.stack([f, slope])

    at = jnp.stack([s, q1, q2])
    each = jnp.eye(3)[:, :, None] * jnp.ones_like(at)
    return jax.vmap(lambda one: jax.jvp(both, (at,), (one,)), out_axes=(None, 1))(each)


@functools.cache
def found():
    """Values and derivatives of everything, from one program."""
    named = {
        **{(name, "closed"): activation for name, activation in EVERY.items()},
        **{(name, "grid"): Elementwise(f, 80) for name, (_, f) in SMOOTH.items()},
        **{(name, "series"): HermiteSeries(f, 40, 80) for name, (_, f) in SMOOTH.items()},
    }

    @jax.jit
    def program(s, q1, q2):
        return {key: with_slopes(one, s, q1, q2) for key, one in named.items()}

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, program(*pairs()))


@pytest.mark.parametrize("name", others_slow(SMOOTH, *(n for n in SMOOTH if n != "erf")))
def test_closed_forms_grid_and_series_agree(name):
    """The values E[phi phi] and E[phi' phi'], and their derivatives by s, q1 and q2: those of the
    latter are E[phi'' phi''] and E[phi''' phi'] / 2."""
    for way in ("grid", "series"):
        for got, want in zip(found()[name, way], found()[name, "closed"], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", EVERY)
def test_prices_theorem(name):
    """E[phi' phi'] is the derivative of E[phi phi] by s."""
    values, slopes = found()[name, "closed"]
    np.testing.assert_allclose(slopes[0, 0], values[1], rtol=1e-13, atol=1e-14)


@pytest.mark.slow
def test_the_heat_equation():
    """The derivative of E[phi phi] by q1 is E[phi'' phi] / 2: here with phi'' written out."""
    s, q1, q2 = pairs()
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    weights /= weights.sum()
    u = np.sqrt(q1)[:, None, None] * points[:, None]
    rest = np.sqrt(q2 - s**2 / q1)[:, None, None] * points
    v = (s / q1)[:, None, None] * u + rest
    bent = -4 / np.sqrt(np.pi) * u * np.exp(-(u**2))  # erf''
    want = np.einsum("i,j,nij->n", weights, weights, bent * np.asarray(erf(v))) / 2
    np.testing.assert_allclose(found()["erf of Williams", "closed"][1][0, 1], want, atol=1e-14)
    # ReLU'' is a point mass: half the density of u at 0 times E[v_+ | u = 0].
    want = np.sqrt(q2 - s**2 / q1) / np.sqrt(2 * np.pi) / np.sqrt(2 * np.pi * q1) / 2
    np.testing.assert_allclose(found()["ReLU", "closed"][1][0, 1], want, rtol=1e-13)


@pytest.mark.parametrize("name", KINKED)
def test_rectifiers_are_arc_cosines(name):
    """Cho and Saul's formula, from the halves above and below zero."""
    want = expectations(KINKED[name], *pairs())
    np.testing.assert_allclose(found()[name, "closed"][0], want, rtol=1e-13, atol=1e-15)


def test_names_of_special_cases():
    np.testing.assert_array_equal(Identity().expectations(*pairs()), [pairs()[0], np.ones(30)])
    assert Cos(1.3, 0.8, 0.5) == Sin(1.3, 0.8, 0.5 + np.pi / 2)
    assert Identity() == Rectifier(1.0, 1.0)
    assert (ReLU(), Abs()) == (LeakyReLU(0.0), LeakyReLU(-1.0))


def test_steps_and_signs():
    """P(u > 0, v > 0) = 1/4 + arcsin(rho) / (2 pi) (Sheppard 1899); no tangent."""
    s, q1, q2 = pairs()
    both = 0.25 + np.arcsin(s / np.sqrt(q1 * q2)) / (2 * np.pi)
    for activation, want in ((Step(), both), (Sign(), 4 * both - 1)):
        f, slope = activation.expectations(*pairs())
        np.testing.assert_allclose(f, want, rtol=1e-13, atol=1e-15)
        assert not np.any(slope)
        f, slope = activation.own(q1)
        np.testing.assert_array_equal(f, 0.5 if activation == Step() else 1.0)
        assert not np.any(slope)


def test_an_input_with_itself():
    """`own` is `expectations` at s = q1 = q2, exact where that has a kink; so is its derivative."""
    q = np.array([1e-6, 0.1, 0.8, 1.3])
    ways = {
        **{name: closed for name, (closed, _) in SMOOTH.items()},
        "rectifier": Rectifier(0.4, -1.3),
        "grid": Elementwise(gelu, 100),  # as many points as `own` has
        "series": HermiteSeries(gelu, 60),
    }

    @jax.jit
    def program(q):
        return {
            name: (
                jax.jvp(one.own, (q,), (jnp.ones_like(q),)),
                jax.jvp(lambda q, one=one: one.expectations(q, q, q), (q,), (jnp.ones_like(q),)),
            )
            for name, one in ways.items()
        }

    for own, pair in program(q).values():
        for got, want in zip(jax.tree.leaves(own), jax.tree.leaves(pair), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_second_derivatives_of_quadrature():
    """Its derivatives can be differentiated as a closed form's can."""

    at = np.stack(pairs())
    way = np.random.default_rng(1).normal(size=at.shape)

    @jax.jit
    def program(at):
        def twice(one):
            def slope(at):
                return jax.jvp(lambda at: one.expectations(*at)[0], (at,), (way,))[1]

            return jax.jvp(slope, (at,), (way,))[1]

        return [twice(one) for one in (GELU(), Elementwise(gelu, 60), HermiteSeries(gelu, 40))]

    want, *others = program(at)
    for got in others:
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("way", [Elementwise(jnp.tanh), HermiteSeries(jnp.tanh)])
def test_quadrature_where_inputs_coincide_or_vanish(way):
    """rho = 1, rho = -1 and zero variance: finite values and derivatives, and the right ones."""
    s, q1, q2 = np.array([[0.5, -0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.7, 0.0]])
    values, slopes = jax.jit(functools.partial(with_slopes, way))(s, q1, q2)
    assert np.all(np.isfinite(slopes))
    f, slope = way.own(q1)  # tanh is odd, its derivative even
    np.testing.assert_allclose(values[:, 0], [f[0], slope[0]], rtol=1e-5)
    np.testing.assert_allclose(values[:, 1], [-f[0], slope[0]], rtol=1e-5)
    np.testing.assert_allclose(values[0, 2:], 0, atol=1e-15)
    np.testing.assert_allclose(values[1, 3], 1, rtol=1e-14)
    np.testing.assert_allclose(slopes[0, 0], values[1], rtol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Elementwise("tanh"), "an activation is a function such as jnp.tanh; got 'tanh'"),
        (lambda: HermiteSeries(3), "an activation is a function such as jnp.tanh; got 3"),
        (lambda: Elementwise(np.tanh), "such as jnp.tanh .* raises TracerArrayConversionError"),
        (lambda: HermiteSeries(lambda x: x.sum()), r"which maps shape \(2, 3\) to \(\)"),
        (lambda: Elementwise(lambda x: 2.0), r"which maps shape \(2, 3\) to"),
        (lambda: Elementwise(jnp.tanh, 1), "nodes must be an integer from 2 to 370; got 1"),
        (lambda: Elementwise(jnp.tanh, 25.0), "nodes must be an integer from 2 to 370; got 25.0"),
        (lambda: HermiteSeries(jnp.tanh, -1), "degree must be an integer from 0 to nodes - 1 = 99"),
        (lambda: HermiteSeries(jnp.tanh, 30, 30), "from 0 to nodes - 1 = 29; got 30"),
        (lambda: HermiteSeries(jnp.tanh, 2.5), "got 2.5"),
    ],
)
def test_options_outside_their_range(call, message):
    with pytest.raises(OptionError, match=message):
        call()


# -- angles ----------------------------------------------------------------------------------------


def units_between(got, want):
    """Units in the last place; ``want`` may have more of them."""
    unit = np.spacing(np.abs(want).astype(got.dtype))
    return np.abs(np.asarray(got).astype(want.dtype) - want) / unit


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_arctan2_is_that_of_numpy_within_three_units(precision):
    rng = np.random.default_rng(1)
    info = np.finfo(precision)
    widest = 0.3 * np.log(float(info.max))
    size = np.exp(rng.uniform(-widest, widest, size=(2, 200_000)))
    size[:, ::2] = rng.uniform(0.1, 2, size=size[:, ::2].shape)  # ordinary ones in between
    y, x = (np.sign(rng.normal(size=size.shape)) * size).astype(precision)
    near = np.tan(np.pi / 8) + np.arange(-50, 51) * info.eps  # where one formula takes over
    y, x = np.append(y, near.astype(precision)), np.append(x, np.ones(101, precision))
    got = jax.jit(arctan2)(y, x)
    assert got.dtype == precision
    assert units_between(got, np.arctan2(y.astype(float), x.astype(float))).max() <= 3


def test_arctan2_at_special_points():
    """The axes, the diagonals, the origin, the smallest numbers, infinity."""
    tiny, huge, inf = np.finfo(float).tiny, 1e300, np.inf
    y, x = np.array(
        [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, -1), (-1, 1),
         (tiny, 1), (1, tiny), (tiny, -1), (tiny, tiny), (huge, huge), (huge, tiny), (tiny, huge),
         (inf, 1), (-inf, 1), (1, inf), (1, -inf)], float,
    ).T  # fmt: skip
    assert units_between(jax.jit(arctan2)(y, x), np.arctan2(y, x)).max() <= 1


def test_angles_and_sines_at_the_ends():
    """Of parallel, opposite, orthogonal and vanishing Gaussians; derivatives are finite there."""
    s, q1, q2 = np.array([[2.0, -2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [4.0, 4.0, 4.0, 1.0]])
    np.testing.assert_array_equal(angle(s, q1, q2), [0, np.pi, np.pi / 2, 0])
    np.testing.assert_array_equal(sine(s, q1, q2), [0, 0, 2, 0])
    np.testing.assert_array_equal(sine(1.0 + 1e-15, 1.0, 1.0), 0)  # rounding
    slopes = jax.jit(jax.vmap(jax.grad(angle, argnums=(0, 1, 2))))(s, q1, q2)
    np.testing.assert_allclose(slopes, [[0, 0, -0.5, 0], [0] * 4, [0] * 4], atol=1e-15)


@pytest.mark.parametrize(("q", "bound"), [(1.0, 1e-5), (4.0, 1e-2)])
def test_the_stated_accuracy_of_a_grid_of_25(q, bound):
    with jax.enable_x64(True):
        variances, s = jnp.full(9, q), q * jnp.linspace(-0.9, 0.9, 9)
        coarse = Elementwise(jnp.tanh).expectations(s, variances, variances)[0]
        fine = HermiteSeries(jnp.tanh, 200, 350).expectations(s, variances, variances)[0]
        assert bound / 1000 < jnp.abs(coarse - fine).max() < bound
