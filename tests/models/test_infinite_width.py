"""Kernels of infinitely wide networks: golden values, closed forms, loops over all positions.

Most tests are exact. What many networks share is computed by one program: the tests spend their
time in the compiler.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilations
from kernels_by_loops import kernels_by_loops

from ppl_toolkit.errors import DataError, ModelError, OptionError
from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.infinite_width import (
    GELU,
    RBF,
    Abs,
    Conv,
    Dense,
    Elementwise,
    Erf,
    Flatten,
    GlobalAveragePool,
    Identity,
    LayerNorm,
    LeakyReLU,
    ReLU,
    Residual,
    Serial,
    Sin,
    Step,
    mlp,
    resnet,
)

X = np.sin(0.7 * np.arange(8)[:, None] + 1.3 * np.arange(3))
RNG = np.random.default_rng(1)
X1, X2 = RNG.normal(size=(11, 3)), RNG.normal(size=(7, 3))
IMAGES = RNG.normal(size=(5, 4, 3, 2))
W = {"weight_std": 1.4, "bias_std": 0.3}
MLP = functools.partial(mlp, 3, **W, readout_std=0.8)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnames="block")
def matrices(networks, x1, x2=None, block=256):
    """Both kernels of a dictionary of networks, from one program."""
    return {name: kernel_matrices(one, x1, x2, block=block) for name, one in networks.items()}


def assert_close(got, want, rtol):
    """Entries, relative to the largest of theirs."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


# -- golden values -------------------------------------------------------------------------------

NETWORKS = {
    "ReLU": MLP(),
    "leaky ReLU": MLP(LeakyReLU(0.1)),
    "erf": MLP(Erf()),
    "GELU": MLP(GELU()),
    "sin": MLP(Sin()),
    "absolute value": MLP(Abs()),
    "identity": MLP(Identity()),
    "residual": resnet(2, **W, readout_std=0.8),
}
GOLDEN = """
    ReLU            0.27810208837544   0.278204095257139   0.448164980676391 0.724536111343943 1.70683592270556
    leaky ReLU      0.280084808279123  0.269189295360205   0.460872245931866 0.771623390311374 1.75652168132746
    erf             0.190977235896648  0.109264264063531   0.301168819691733 0.768649584840564 1.59443461188749
    GELU            0.148376178812628  0.139784670524773   0.303918570116886 0.4809092077375   1.26518657629242
    sin             0.164993221680012  0.0894553766842624  0.270733308890448 0.69356589328748  1.57845530683329
    absolute value  2.10898770399511   2.37716911097068    3.29962384541113  4.44456874937304  12.9703993816445
    identity        1.66852904642607   1.03988056624568    3.29962384541113  6.44602018570427  12.9703993816445
    residual        0.952025856618806  nan                 1.68248070620962  2.08588444314945  4.9737142731116
"""  # noqa: E501 (a table)
GOLDEN = {
    line[4:20].strip(): np.array(line[20:].split(), float) for line in GOLDEN.splitlines()[1:]
}


@pytest.mark.parametrize("name", NETWORKS)
def test_golden_values(name):
    """Three layers with weights 1.4 and biases 0.3: K[0, 1], K[0, 7], K[3, 3]; T[0, 1], T[3, 3]."""
    k, t = matrices(NETWORKS, X)[name]
    got = [k[0, 1], k[0, 7], k[3, 3], t[0, 1], t[3, 3]]
    known = ~np.isnan(GOLDEN[name])  # the specification has no K[0, 7] for the residual network
    np.testing.assert_allclose(np.array(got)[known], GOLDEN[name][known], rtol=1e-13)


def test_they_are_what_one_gets():
    network = NETWORKS["ReLU"]
    k, t = network.kernels(X)
    assert type(k) is type(t) is np.ndarray
    assert_close((k, t), matrices(NETWORKS, X)["ReLU"], 1e-15)
    np.testing.assert_array_equal(network.nngp(X), network.kernels(X, ntk=False).nngp)
    assert_close(network.nngp(X), k, 1e-15)
    np.testing.assert_array_equal(network.ntk(X), t)
    assert network.kernels(X, ntk=False).ntk is None


# -- closed forms --------------------------------------------------------------------------------


def test_a_linear_network_is_affine():
    """K = w^2 K + b^2, layer by layer, whatever the correlations."""
    k = X @ X.T / 3
    t = np.zeros_like(k)
    for w, b in [(1.4, 0.3)] * 3 + [(0.8, 0.0)]:
        k = w**2 * k + b**2
        t = k + w**2 * t
    assert_close(matrices(NETWORKS, X)["identity"], (k, t), 1e-14)


@functools.cache
def shallow():
    """One layer."""
    networks = {
        "erf": Serial(Dense(1.4, 0.3), Erf(), Dense(0.8)),
        "ReLU": Serial(Dense(1.4, 0.3), ReLU(), Dense(0.8)),
        "RBF": Serial(Dense(1.0, 0.3), RBF(0.7), Dense()),
        "step": Serial(Dense(1.4, 0.3), Step(), Dense(0.8)),
    }
    with jax.enable_x64(True):
        return matrices(networks, X1, X2)


def test_one_layer_of_erf_is_the_arcsine_kernel():
    """Williams (1997), for inputs with a constant in front and weights N(0, Sigma)."""
    one, two = (np.column_stack([np.ones(len(x)), x]) for x in (X1, X2))
    sigma = np.diag([0.3**2, *[1.4**2 / 3] * 3])
    own = [1 + 2 * np.einsum("ni,ij,nj->n", x, sigma, x) for x in (one, two)]
    between = 2 * one @ sigma @ two.T / np.sqrt(np.outer(*own))
    assert_close(shallow()["erf"].nngp, 0.8**2 * 2 / np.pi * np.arcsin(between), 1e-14)


def test_one_layer_of_relu_is_an_arc_cosine_kernel():
    """Cho and Saul (2009), of order 1: J(theta) = sin(theta) + (pi - theta) cos(theta)."""
    one, two = (np.column_stack([1.4 * x / np.sqrt(3), np.full(len(x), 0.3)]) for x in (X1, X2))
    sizes = np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(two, axis=1))
    theta = np.arccos(one @ two.T / sizes)
    order_1 = sizes * (np.sin(theta) + (np.pi - theta) * np.cos(theta)) / np.pi
    order_0 = 1 - theta / np.pi
    k = 0.8**2 * order_1 / 2
    assert_close(shallow()["ReLU"], (k, k + 0.8**2 * (one @ two.T) * order_0 / 2), 1e-14)
    assert_close(shallow()["step"].nngp, 0.8**2 * order_0 / 2, 1e-14)
    assert_close(shallow()["step"].ntk, 0.8**2 * order_0 / 2, 1e-14)  # of the readout alone


def test_one_layer_of_rbf_is_the_squared_exponential():
    squares = ((X1[:, None] - X2) ** 2).sum(axis=-1) / 3
    assert_close(shallow()["RBF"].nngp, np.exp(-0.7 * squares), 1e-14)


def test_homogeneity():
    """ReLU networks without biases: kernels of c x are those of x times c^2, from 1e-60 to 1e60."""
    networks = {"ReLU": mlp(3), "residual": resnet(2)}
    want = matrices(networks, X1)
    for c in (1e-60, 3.0, 1e60):
        got = jax.tree.map(lambda k, c=c: k / c**2, matrices(networks, c * X1))
        assert_close(got, want, 1e-14)


def test_rotations_leave_kernels_alone():
    turn, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    for name, got in matrices(NETWORKS, X @ turn).items():
        # Tangents of rectifiers have a kink where inputs are parallel.
        assert_close(got, matrices(NETWORKS, X)[name], 1e-14)


def test_kernels_are_positive_semidefinite():
    for k in jax.tree.leaves(matrices(NETWORKS, X)):
        assert_close(k, k.T, 1e-15)
        values = np.linalg.eigvalsh(k)
        assert values[0] > -1e-15 * values[-1]


def test_depth_weights_and_readout():
    """Biases of the readout are none: both kernels are proportional to its weights' variance."""
    networks = {"one": mlp(2, Erf(), **W), "half": mlp(2, Erf(), **W, readout_std=0.5)}
    found = matrices(networks, X)
    assert_close(found["half"], jax.tree.map(lambda k: k / 4, found["one"]), 1e-15)
    assert mlp(0) == Serial(Dense(1.0))
    assert mlp(1) == Serial(Dense(np.sqrt(2)), ReLU(), Dense())
    assert resnet(0, Erf()) == Serial(Dense(), Erf(), Dense())
    block = Residual(Serial(ReLU(), Dense(1.4, 0.3)))
    assert resnet(1, **W) == Serial(Dense(1.4, 0.3), block, ReLU(), Dense())


def test_layers_are_pytrees_of_their_parameters():
    network = Serial(Dense(1.4, 0.3), LayerNorm(), Residual(Serial(ReLU(), Dense())), Erf(0.5))
    leaves, tree = jax.tree.flatten(network)
    assert leaves == [1.4, 0.3, 1e-12, 1.0, 0.0, 0.5, 1.0, 0.0]
    again = jax.tree.unflatten(tree, leaves)
    assert again == network
    assert hash(again) == hash(network)
    assert repr(Serial(Dense(1.4, 0.3), Erf())) == (
        "Serial(Dense(weight_std=1.4, bias_std=0.3), Erf(amplitude=1.0, frequency=1.0, offset=0.0))"
    )


# -- diagonals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "rtol"), [("float64", 2e-15), ("float32", 1e-6)])
def test_diagonals_are_exact(precision, rtol):
    """Of the tangent kernel of ReLU too, where the angle 0 costs half of the digits: against a
    recursion in Python's numbers. A duplicate elsewhere in the matrix keeps the other half."""
    x = RNG.normal(size=(9, 40))  # sums whose digits depend on their order
    x = np.concatenate([x, x[:2]]).astype(precision)
    for block in (4, 11):
        with jax.enable_x64(precision == "float64"):
            k, t = matrices({"": MLP()}, x, block=block)[""]
        assert k.dtype == t.dtype == precision
        for row, one in enumerate(x.astype(float)):
            q, tangent = sum(v * v for v in one) / 40, 0.0
            for _ in range(3):
                q = 1.4**2 * q + 0.3**2
                q, tangent = q / 2, (q + 1.4**2 * tangent) / 2
            q = 0.8**2 * q
            np.testing.assert_allclose(k[row, row], q, rtol=rtol)
            np.testing.assert_allclose(t[row, row], q + 0.8**2 * tangent, rtol=rtol)
        np.testing.assert_allclose(k[9, 0], k[0, 0], rtol=rtol)
        np.testing.assert_allclose(t[9, 0], t[0, 0], rtol=10 * rtol**0.5)


def test_variances_are_diagonals():
    network = Serial(
        Dense(1.4, 0.3), LayerNorm(), Residual(Serial(GELU(), Dense(0.9, 0.2))), ReLU(), Dense()
    )
    k, t = network.kernels(X1)
    own = network.variances(X1, ntk=True)
    assert type(own.nngp) is np.ndarray
    assert_close(own, (np.diag(k), np.diag(t)), 1e-15)
    assert network.variances(X1).ntk is None


# -- against loops over positions ------------------------------------------------------------------

BRANCH = Serial(ReLU(), Dense(1.1, 0.2), LayerNorm(0.1), Erf(0.8, 1.2, 0.3), Dense(0.7, 0.1))
DENSE = {
    "ReLU": MLP(),
    "normalised": Serial(
        Dense(1.4, 0.3), LayerNorm(), Erf(), Dense(1.2, 0.5), LayerNorm(0.2), Abs(), Dense(0.8)
    ),
    "residual": Serial(
        Dense(1.4, 0.3), Residual(BRANCH), Residual(BRANCH, Dense(0.6, 0.4)), Erf(), Dense(0.8)
    ),
}
CONVOLUTIONS = (
    Conv((3, 2), (1, 1), 1.3, 0.2), Erf(), Conv((2, 3), (2, 1), 1.1, 0.1), LayerNorm(0.1),
    Residual(Serial(LeakyReLU(0.2), Conv((1, 2), (1, 1), 0.9, 0.3))), Erf(),
)  # fmt: skip
CONVOLUTIONAL = {
    "flattened": Serial(*CONVOLUTIONS, Flatten(), Dense(1.2, 0.1), Erf(), Dense(0.8)),
    "pooled": Serial(*CONVOLUTIONS, GlobalAveragePool(), Dense(0.8)),
    "both": Serial(
        Conv((2, 2)), Residual(Serial(Erf(), GlobalAveragePool(), Dense(0.7)), Flatten()), Dense()
    ),
}


@pytest.mark.parametrize(
    ("networks", "x", "first"),
    [
        pytest.param(DENSE, X1, 6, id="dense"),
        pytest.param(CONVOLUTIONAL, IMAGES, 3, id="conv"),
    ],
)
@pytest.mark.slow
def test_loops_over_positions_agree(networks, x, first):
    """A matrix among the inputs, and one between the first and the others."""
    among, between = matrices(networks, x), matrices(networks, x[:first], x[first:])
    for name, network in networks.items():
        k, t = kernels_by_loops(network, x)
        # Its diagonals have the angles of rounding, of which tangents see the first power.
        assert_close(among[name].nngp, k, 1e-14)
        assert_close(among[name].ntk, t, 1e-7)
        for got, want in zip((*among[name], *between[name]), (k, t, k, t), strict=True):
            part = np.s_[:first, first:]
            assert_close(got if got.shape[1] < len(x) else got[part], want[part], 1e-13)


def test_flattening_first_is_all_pixels_as_features():
    got = Serial(Flatten(), Dense(1.2, 0.1), Erf(), Dense(0.8)).kernels(IMAGES)
    want = Serial(Dense(1.2, 0.1), Erf(), Dense(0.8)).kernels(IMAGES.reshape(5, -1))
    assert_close(got, want, 1e-15)


def test_images_have_exact_diagonals_and_variances_too():
    """Pooled, block by block; an image has the angle zero with itself at the same position only."""
    network = Serial(Conv((1, 2)), ReLU(), Conv((2, 1)), ReLU(), GlobalAveragePool(), Dense())
    parts = matrices({"": network}, IMAGES, block=2)[""]
    own = network.variances(IMAGES, ntk=True)
    assert_close(own, [np.diag(k) for k in parts], 1e-15)
    slow = kernels_by_loops(network, IMAGES)
    assert_close(parts.nngp, slow[0], 1e-14)
    assert_close(parts.ntk, slow[1], 1e-7)


def test_an_image_of_one_position_is_a_vector():
    """Pooling keeps pairs of positions: here of one with itself, which coarse quadrature tells."""
    coarse = Elementwise(jnp.tanh, 3)
    pooled = Serial(Conv((3, 3), (1, 1), 3.0, 0.3), coarse, GlobalAveragePool(), Dense())
    dense = Serial(Dense(1.0, 0.3), coarse, Dense())  # eight of nine weights see the border
    images = X1[:, None, None, :]
    assert_close(pooled.kernels(images, X2[:, None, None, :]), dense.kernels(X1, X2), 1e-14)
    want = dense.variances(X1, ntk=True)
    assert_close(pooled.variances(images, ntk=True), want, 1e-14)
    assert_close([np.diag(k) for k in pooled.kernels(images)], want, 1e-14)


# -- blocks and derivatives ------------------------------------------------------------------------

PARTS = Serial(
    Dense(1.4, 0.3), Residual(Serial(ReLU(), Dense(0.9, 0.2)), Dense(0.7)), Erf(), Dense(0.8)
)
BY_K, BY_T = RNG.normal(size=(2, 11, 11))  # not symmetric


@functools.partial(jax.jit, static_argnames="block")
def with_gradient(network, x1, x2, block):
    """Both kernels, and the derivative of a weighted sum of them by parameters and inputs."""

    def loss(network, x1, x2):
        k, t = kernel_matrices(network, x1, x2, block=block)
        weights = (BY_K[:, : k.shape[1]], BY_T[:, : k.shape[1]])
        return (weights[0] * k + weights[1] * t).sum(), (k, t)

    by = (0, 1) if x2 is None else (0, 1, 2)
    gradient, values = jax.grad(loss, argnums=by, has_aux=True)(network, x1, x2)
    return values, gradient


@pytest.mark.slow
@pytest.mark.parametrize("x2", [None, X2], ids=["among", "between"])
def test_blocks_make_no_difference(x2):
    """11 rows (and 7 columns) in one block, in ragged ones, and alone: values to the last digit or
    the one before, which depends on how the compiler vectorises a row; derivatives to 1e-13."""
    dense = with_gradient(PARTS, X1, x2, 20)
    for block in (4, 1):
        values, gradient = with_gradient(PARTS, X1, x2, block)
        assert_close(values, dense[0], 1e-15)
        assert_close(gradient, dense[1], 1e-13)


def test_no_block_is_larger_than_asked_for():
    """What fits in one block is computed without a loop, and differentiated to any order."""

    def text(n, block):
        def nngp(x):
            return kernel_matrices(mlp(1), x, block=block).nngp

        x = jax.ShapeDtypeStruct((n, 3), float)
        twice = str(jax.make_jaxpr(jax.jacfwd(jax.jacfwd(nngp)))(x)) if block >= n else ""
        return str(jax.make_jaxpr(nngp)(x)), twice

    assert text(11, 11) == text(11, 20)
    assert not any(loop in one for one in text(11, 11) for loop in ("scan", "while"))
    for block in (1, 4, 10):
        ours, _ = text(11, block)
        assert f"f64[{block},{block}]" in ours
        assert "scan" in ours or "while" in ours


def test_large_inputs_are_those_of_float64():
    """NumPy's inputs are computed with in float64, whatever the precision of JAX: 1e40 is no limit.

    Without biases the kernels of rectifiers are homogeneous of degree two.
    """
    network = mlp(2)
    with jax.enable_x64(False):
        large, small = network.nngp(1e40 * X1), network.nngp(X1)
    np.testing.assert_allclose(large / 1e80, small, rtol=1e-13)


def test_derivatives_with_duplicates_and_zeros():
    """Finite, and those of finite differences: of the process's kernel by everything, of the
    tangent kernel by parameters (by inputs it has a kink where they are parallel). Where inputs
    coincide its differences are rounding errors: there its derivatives are those of the diagonal.
    """
    x = np.concatenate([X[:3], X[:1], np.zeros((2, 3)), 2 * X[1:2], -X[2:3]])
    network = mlp(2, **W)
    leaves, tree = jax.tree.flatten(network)
    weights = np.random.default_rng(2).normal(size=(2, 8, 8))
    first, second = [0, 4], [3, 5]  # pairs that coincide
    weights[1, first, second] = weights[1, second, first] = 0.0

    @jax.jit
    def losses(parameters, x):
        k, t = kernel_matrices(jax.tree.unflatten(tree, parameters), x)
        sums = jnp.stack([(weights[0] * k).sum(), (weights[1] * t).sum()])
        return sums, jnp.stack([t[first, second], t[first, first]])

    parameters = np.array(leaves)
    jacobian = jax.jit(jax.jacrev(losses, argnums=(0, 1)))
    (by_parameters, by_x), (tangent, _) = jacobian(parameters, x)
    np.testing.assert_allclose(tangent[0], tangent[1], rtol=1e-12)
    assert np.all(np.isfinite(by_x))
    step = 1e-6
    for place, got in enumerate(by_parameters.T):
        move = step * (np.arange(len(leaves)) == place)
        want = (losses(parameters + move, x)[0] - losses(parameters - move, x)[0]) / (2 * step)
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-7)
    for place in np.ndindex(x.shape):
        move = np.zeros_like(x)
        move[place] = step
        want = (losses(parameters, x + move)[0] - losses(parameters, x - move)[0]) / (2 * step)
        np.testing.assert_allclose(by_x[0][place], want[0], atol=1e-5)  # F is C^2 at duplicates


def test_derivatives_without_biases_at_zero_are_finite():
    x = np.concatenate([np.zeros((2, 3)), X[:2]])
    networks = [mlp(2), Serial(Dense(), LayerNorm(), ReLU(), Dense(), Erf(), Dense())]

    @jax.jit
    def gradient(networks, x):
        def total(networks, x):
            return sum(k.sum() for one in networks for k in kernel_matrices(one, x))

        return jax.grad(total, argnums=(0, 1))(networks, x)

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient(networks, x)))


# -- calls -----------------------------------------------------------------------------------------


def test_a_second_call_compiles_nothing():
    """Nor do other parameters; a view, a list or float32 numbers are float64 in the end."""
    make = functools.partial(mlp, 1, Erf())
    make().kernels(X1)
    make().kernels(X1, X2)
    make().variances(X1)
    compilations.clear()
    k, _ = make(weight_std=0.7, bias_std=0.4).kernels(X1 + 1)
    make().kernels(X1 + 1, X2[::-1])
    make().variances(2 * X1)
    from_list = make(weight_std=0.7, bias_std=0.4).kernels((X1 + 1).tolist()).nngp
    assert not compilations
    from_single = make().nngp(X1.astype(np.float32))
    assert type(k) is np.ndarray
    np.testing.assert_array_equal(from_list, k)
    assert from_single.dtype == k.dtype == float


def test_precision_does_not_depend_on_jaxs_for_numpy_inputs():
    network = mlp(1, Erf())
    want = network.kernels(X1)
    with jax.enable_x64(False):
        got = network.kernels(X1)
    assert got.nngp.dtype == float
    assert_close(got, want, 0)


def test_jax_arrays_give_jax_arrays():
    """In the precision that is active; they may be traced, and batched."""
    network, want = Serial(Dense(1.4, 0.3)), Serial(Dense(1.4, 0.3)).kernels(X1)
    with jax.enable_x64(False):
        found = network.kernels(jnp.asarray(X1))
        assert all(isinstance(k, jax.Array) and k.dtype == jnp.float32 for k in found)
        assert_close(found, want, 1e-6)
        assert isinstance(network.variances(jnp.asarray(X1)).nngp, jax.Array)
        assert isinstance(Serial(Dense(jnp.asarray(1.4))).nngp(X1), jax.Array)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def of_chains(w, x):
        return mlp(1, Erf(), weight_std=w).kernels(x, block=4)

    found = of_chains(jnp.array([0.7, 1.4]), X1)
    assert_close([k[1] for k in found], mlp(1, Erf(), weight_std=1.4).kernels(X1), 1e-15)


NAN = np.where(np.arange(11)[:, None] == 4, np.nan, X1)
NET = mlp(1)
ROWS = "values that are not finite in 1 of 11 rows, first in row 4"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NET.kernels(NAN), DataError, f"x1 has {ROWS}: drop these rows, or fill them in"),
        (lambda: NET.kernels(X1, NAN), DataError, f"x2 has {ROWS}"),
        (lambda: NET.variances(np.where(X1 > 1, np.inf, X1)), DataError, "x has values that are"),
        (lambda: NET.nngp(jax.device_put(NAN)), DataError, f"x1 has {ROWS}"),
        (lambda: NET.kernels(X1[:, 0]), DataError, r"got \(11,\). For a single feature say x\[:, "),
        (lambda: NET.kernels(X1, X2[0]), DataError, r"x2 must have shape \(n, features\)"),
        (lambda: NET.kernels(X1[None]), DataError, r"must have shape .*; got \(1, 11, 3\)\.$"),
        (lambda: NET.kernels(3.0), DataError, r"must have shape .*; got \(\)"),
        (lambda: NET.kernels(X1[:0]), DataError, r"must not be empty; got \(0, 3\)"),
        (lambda: NET.kernels(X1, X2[:, :2]), DataError, r"x1 has shape \(3,\) and one of x2 \(2"),
        (lambda: NET.kernels(X1, IMAGES), DataError, r"x1 has shape \(3,\) and one of x2 \(4, 3"),
        (lambda: NET.kernels([["a", "b"]]), DataError, "x1 must be an array of real numbers"),
        (lambda: NET.kernels([[1.0, 2.0], [3.0]]), DataError, "x1 must be an array of real"),
        (lambda: NET.kernels(X1 * 1j), DataError, "x1 must be an array of real"),
        (lambda: NET.kernels(jax.device_put(X1 * 1j)), DataError, "x1 must be an array of real"),
        (lambda: NET.kernels(1e80 * X1), DataError, "fourth powers, .* standardise the features"),
        (lambda: NET.kernels(None), DataError, r"must have shape|array of real numbers"),
        (lambda: NET.kernels(X1, block=0), OptionError, "block must be a positive number .* got 0"),
        (lambda: NET.kernels(X1, block=2.0), OptionError, "block must be .* got 2.0"),
        (lambda: mlp(-1), OptionError, "depth must be a number of layers, at least 0; got -1"),
        (lambda: resnet(2.0), OptionError, "depth must be a number of layers, at least 0; got 2.0"),
        (lambda: Serial(Dense(), jnp.tanh), ModelError, r"Serial takes layers such as Dense\(1.4"),
        (lambda: mlp(2, "relu"), ModelError, r"Serial takes layers .*; got 'relu'"),
        (lambda: Conv((3, 0)), OptionError, r"window must be two positive integers; got \(3, 0\)"),
        (lambda: Conv(3), OptionError, "window must be two positive integers; got 3"),
        (lambda: Conv((3, 3), 2), OptionError, "strides must be two positive integers; got 2"),
        (lambda: Serial(ReLU(), Dense()).nngp(X1), ModelError, "needs Gaussian units before it"),
        (lambda: Serial(Dense(), ReLU(), Erf()).ntk(X1), ModelError, r"Erf.* needs Gaussian units"),
        (lambda: Serial(LayerNorm(), Dense()).variances(X1), ModelError, "LayerNorm.* needs Gauss"),
        (lambda: Serial(Dense(), ReLU(), LayerNorm()).nngp(X1), ModelError, "LayerNorm.* needs Ga"),
        (lambda: Serial(Dense(), Residual(ReLU())).nngp(X1), ModelError, "must end in a layer of"),
        (lambda: Serial(Dense(), Residual(Dense(), Erf())).nngp(X1), ModelError, "and the shortcu"),
        (lambda: Serial(Residual(Dense()), ReLU()).nngp(X1), ModelError, "Residual.* needs Gauss"),
        (lambda: Serial(Conv(), Flatten()).nngp(X1), ModelError, "Conv works on images, and has"),
        (lambda: Serial(Dense(), Flatten()).nngp(X1), ModelError, "Flatten works on images, and h"),
        (lambda: Serial(Flatten(), Flatten()).nngp(IMAGES), ModelError, "Flatten works on images"),
        (lambda: Serial(GlobalAveragePool(), Conv()).nngp(IMAGES), ModelError, "Conv works on ima"),
        (lambda: Serial(Conv(), ReLU(), Dense()).nngp(IMAGES), ModelError, r"put Flatten\(\) or"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_compiled(call, error, message):
    compilations.clear()
    with pytest.raises(error, match=message):
        call()
    assert not compilations


def test_a_quadrature_of_pairs_is_symmetric_and_does_not_depend_on_blocks():
    x = np.random.default_rng(1).normal(size=(9, 4))
    network = mlp(2, Elementwise(jnp.tanh), weight_std=1.4, bias_std=0.3)
    whole = network.kernels(x)
    for matrix, cut in zip(whole, network.kernels(x, block=5), strict=True):
        np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-14)
        np.testing.assert_allclose(matrix, cut, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("network", "images"),
    [
        (Serial(Conv(), ReLU(), Flatten(), Dense()), False),
        (Serial(Dense(), Flatten(), Dense()), False),
        (Serial(Dense(), GlobalAveragePool(), Dense()), False),
        (Serial(Conv(), ReLU(), Dense()), True),
    ],
)
def test_variances_refuse_what_kernels_refuse(network, images):
    x = np.ones((2, 3, 3, 1)) if images else np.ones((2, 3))
    for ask in (network.variances, network.kernels):
        with pytest.raises(ModelError):
            ask(x)


def test_layers_are_computed_one_after_the_other():
    """Fused, the work and the compilation would grow with the square of the depth."""
    text = jax.jit(lambda x: kernel_matrices(mlp(5), x).ntk).lower(np.ones((4, 2))).as_text()
    assert text.count("optimization_barrier") >= 5
