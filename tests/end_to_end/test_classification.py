"""Classification by scale mixtures through `infer` and `predict`: right, compiled once, refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet, quietly
from scipy.special import softmax

import ppl_toolkit as ppl
from ppl_toolkit.errors import DataError, MethodError, ModelError, OptionError
from ppl_toolkit.inference import SVTP
from ppl_toolkit.models.infinite_width import Conv, Dense, Flatten, ReLU, Serial, mlp
from ppl_toolkit.models.scale_mixture_classification import (
    choose_inducing,
    scale_mixture_classification,
)

rng = np.random.default_rng(0)
CENTRES = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])


def groups(count):
    """Three overlapping groups of points."""
    y = rng.integers(0, 3, size=count)
    return CENTRES[y] + 0.7 * rng.normal(size=(count, 2)), y


X, Y = groups(120)
NEW, NEW_Y = groups(200)
Z = X[:12]
LAW = dist.InverseGamma(6.0, 6.0)  # with the default law moments of sigma^2 need more draws
MODEL = scale_mixture_classification(functools.partial(mlp, 1), classes=3, law=LAW)
METHOD = SVTP(batch=40, samples=8)
OPTIONS = {"inducing": Z, "method": METHOD, "warmup": 300, "chains": 2}


@pytest.fixture(scope="module")
def fit():
    """With warnings as errors: independent fits agree, and nothing is found wrong."""
    return ppl.infer(MODEL, X, Y, **OPTIONS, draws=600, progress=False)


def test_what_was_not_drawn_has_no_log_likelihood(fit):
    with pytest.raises(MethodError, match=r"left sites \['e'\] to predictions.*NUTS"):
        ppl.log_likelihood(fit, MODEL, X, Y, inducing=Z)


def test_new_inputs_are_classified(fit):
    posterior = fit["posterior"]
    assert set(posterior.data_vars) == {"weight_std", "bias_std", "sigma2", "w"}
    assert posterior["w"].dims == ("chain", "draw", "inducing_point", "class")
    few = fit.sel(draw=slice(0, 50))
    predictions = ppl.predict(few, MODEL, NEW, inducing=Z)["predictions"]
    assert predictions["p"].dims == ("chain", "draw", "row", "class")
    p = predictions["p"].values.mean((0, 1))
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-12)
    assert (p.argmax(1) == NEW_Y).mean() > 0.93
    assert -np.log(p[np.arange(200), NEW_Y]).mean() < 0.3
    drawn = (predictions["y"].values[..., None] == np.arange(3)).mean((0, 1))
    assert np.abs(drawn - p).max() < 0.25  # 102 draws: 5 standard errors


def test_what_is_said_of_a_fit(fit):
    group = fit["variational"]
    assert group.attrs["epochs"] == pytest.approx(100.0)
    elbo = fit["sample_stats"]["elbo"].values
    assert len(np.unique(elbo[0])) == 30  # renewed at every 20th draw
    np.testing.assert_allclose(group["elbo"], elbo[:, ::20].mean(1), rtol=1e-10)
    mean = (group["scale_rate"] / (group["scale_shape"] - 1)).values
    np.testing.assert_allclose(fit["posterior"]["sigma2"].mean("draw"), mean, rtol=0.2)
    assert "minibatches of 40 rows" in fit.attrs["approximation"]


def test_a_second_call_of_the_same_shape_compiles_nothing(fit):
    again = rng.permutation(len(X))
    compilations.clear()
    other = quiet(MODEL, X[again] + 0.1, Y[again], **{**OPTIONS, "inducing": Z + 0.1}, draws=30)
    assert other["posterior"].sizes["draw"] == 30
    assert not compilations


@pytest.mark.slow
def test_pieces_of_a_run_and_refits(fit, tmp_path):
    part = quiet(MODEL, X, Y, **OPTIONS, draws=20, chunk=7, store=tmp_path / "run.zarr")
    more = quietly(ppl.extend, part.load(), MODEL, X, Y, draws=580, method=METHOD, inducing=Z)
    for name, values in fit["posterior"].data_vars.items():
        np.testing.assert_array_equal(more["posterior"][name], values)
    refit = quiet(MODEL, X, Y, **{**OPTIONS, "warmup": 5}, draws=40, init=fit, seed=3)
    assert (np.abs(refit["variational"]["elbo"] - fit["variational"]["elbo"]) < 5.0).all()
    assert refit["variational"].attrs["epochs"] == pytest.approx(5 / 3)


def sites(model, *args, **kwargs):
    return [site.name for site in ppl.Program(model, args, kwargs).latent]


def test_the_program_is_an_ordinary_one():
    assert sites(MODEL, X, Y, inducing=Z) == ["weight_std", "bias_std", "sigma2", "w", "e"]
    assert sites(MODEL, X, Y) == ["weight_std", "bias_std", "sigma2", "w"]
    known = scale_mixture_classification(mlp(1), classes=3, law=dist.Delta(1.0))
    assert sites(known, X, Y) == ["w"]
    assert sites(known, NEW, inducing=Z) == ["w", "f", "y"]


def test_probabilities_are_those_of_the_scaled_functions():
    network = mlp(1)
    model = scale_mixture_classification(network, classes=3)
    w, e = rng.normal(size=(12, 3)), rng.normal(size=(5, 3))
    K = network.nngp(Z)
    root = np.linalg.cholesky(K + 1e-6 * np.diag(K).mean() * np.eye(12))
    A = np.linalg.solve(root, network.nngp(Z, NEW[:5])).T
    rest = network.variances(NEW[:5]).nngp - (A**2).sum(1)
    f = np.sqrt(2.5) * (A @ w + np.sqrt(rest)[:, None] * e)
    program = ppl.Program(model, (NEW[:5], NEW_Y[:5]), {"inducing": Z})
    with program.context():
        values = {"sigma2": 2.5, "w": w, "e": e}
        p = jax.jit(program.complete)(values, program.data)["p"]
    np.testing.assert_allclose(p, softmax(f, axis=1), rtol=1e-6)


def test_images_have_kernels_of_convolutions():
    network = Serial(Conv((3, 3), weight_std=1.4), ReLU(), Flatten(), Dense())
    images = rng.normal(size=(30, 4, 4, 1))
    labels, inducing = np.arange(30) % 2, choose_inducing(images, 8, network)
    assert inducing.shape == (8, 4, 4, 1)
    model = scale_mixture_classification(network, classes=2, law=dist.Delta(1.0))
    assert sites(model, images, labels, inducing=inducing) == ["w", "e"]
    with jax.enable_x64(True):
        pieces = jax.jit(model.pieces)({}, None, images, labels, inducing)
        explained = (pieces.basis**2).sum(1) + pieces.residual
    np.testing.assert_allclose(explained, network.variances(images).nngp, rtol=1e-12)


def test_inducing_inputs_are_the_pivots_of_the_kernel():
    network = mlp(2)
    K, chosen = network.nngp(X), []
    for _ in range(6):
        inner = K[np.ix_(chosen, chosen)]
        rest = np.diag(K) - (K[:, chosen] * np.linalg.solve(inner, K[chosen]).T).sum(1)
        rest[chosen] = -1.0
        chosen.append(int(np.argmax(rest)))
    np.testing.assert_array_equal(choose_inducing(X, 6, network), X[chosen])
    np.testing.assert_array_equal(choose_inducing(X, 5, network), X[chosen[:5]])
    every = choose_inducing(X[:9], 9, network)
    assert {tuple(x) for x in every} == {tuple(x) for x in X[:9]}


# --- bad input: typed errors before anything is compiled ------------------------------------------


def plain(x, y=None):
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Categorical(logits=jnp.zeros((len(x), 3))), obs=y)
    numpyro.sample("m", dist.Normal())


def broken(array, value):
    array = np.array(array, dtype=float if isinstance(value, float) else None)
    array[3] = value
    return array


def svtp(model=MODEL, x=X, y=Y, z=Z, **options):
    return quiet(model, x, y, inducing=z, method=SVTP(**options), draws=5, warmup=5)


def other_law(law):
    return scale_mixture_classification(mlp(1), classes=3, law=law)


REFUSED = {
    "a label too large": (
        lambda: svtp(y=broken(Y, 3)), DataError, r"3 at index \(3,\).*numpy.unique.labels",
    ),
    "a label too large for NUTS": (
        lambda: quiet(MODEL, X, broken(Y, 3), method="nuts"), DataError, r"3 at index \(3,\)",
    ),
    "a negative label": (lambda: svtp(y=broken(Y, -1)), DataError, r"-1 at index \(3,\)"),
    "labels that are numbers": (lambda: svtp(y=Y * 1.0), DataError, "integers 0, ..., 2"),
    "labels of another length": (lambda: svtp(y=Y[:50]), DataError, r"shape \(120,\)"),
    "labels of one kind each": (lambda: svtp(y=np.eye(3, dtype=int)[Y]), DataError, "one label"),
    "a row with NaN": (lambda: svtp(x=broken(X, np.nan)), DataError, "'X' has 2 NaN"),
    "an infinite row": (lambda: svtp(x=broken(X, np.inf)), DataError, "not finite in 1 of 120"),
    "inputs without features": (lambda: svtp(x=X[:, 0], z=Z[:, 0]), DataError, r"x\[:, None\]"),
    "wide inducing inputs": (
        lambda: svtp(z=np.ones((4, 3))), DataError, r"shape \(3,\) and one of X \(2,\)",
    ),
    "NaN in inducing inputs": (lambda: svtp(z=broken(Z, np.nan)), DataError, "'inducing' has 2"),
    "no labels": (lambda: svtp(y=None), MethodError, "SVTP learns from labels"),
    "neither labels nor inducing inputs": (
        lambda: svtp(y=None, z=None), ModelError, "inducing=X",
    ),
    "one class": (lambda: scale_mixture_classification(classes=1), OptionError, "at least 2"),
    "half a class": (lambda: scale_mixture_classification(classes=2.5), OptionError, "at least 2"),
    "a law of negative numbers": (lambda: other_law(dist.Normal()), DataError, "positive support"),
    "a scale of zero": (lambda: other_law(dist.Delta(0.0)), DataError, "one positive number"),
    "many scales": (
        lambda: other_law(dist.InverseGamma(np.ones(2), 1.0)), DataError, "one positive number",
    ),
    "no law": (lambda: other_law(2.0), DataError, "NumPyro distribution"),
    "a law SVTP does not know": (
        lambda: svtp(other_law(dist.LogNormal())), MethodError, "LogNormal. Say law=InverseGamma",
    ),
    "no such prior": (
        lambda: scale_mixture_classification(mlp(1), classes=2, priors={"weight_std": LAW}),
        OptionError, r"names \['weight_std'\]",
    ),
    "no network": (lambda: scale_mixture_classification("mlp", classes=2), OptionError, "layers"),
    "a batch too large": (lambda: svtp(batch=121), OptionError, "more than the 120 rows"),
    "a batch of none": (lambda: svtp(batch=0), OptionError, "batch must be an integer >= 1"),
    "a rate too large": (lambda: svtp(rate=1.5), OptionError, r"rate must lie in \(0, 1\]"),
    "no rate": (lambda: svtp(rate="fast"), OptionError, "step_size|rate"),
    "no optimizer": (lambda: svtp(optimizer="adam"), OptionError, "optimizer must be Adam"),
    "a program without the protocol": (
        lambda: quiet(plain, X, Y, method="svtp"), MethodError, "'plain' does not",
    ),
    "a given start": (
        lambda: quiet(MODEL, X, Y, **OPTIONS, init={"sigma2": 1.0}), OptionError, "leave init= out",
    ),
    "too many inducing inputs": (lambda: choose_inducing(X, 121), OptionError, "count=121"),
    "inducing inputs that are the same": (
        lambda: choose_inducing(np.ones((9, 2)), 2), OptionError, "not count=2 different",
    ),
    "no inducing inputs": (lambda: choose_inducing(X, 0), OptionError, "number of inducing"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    call, error, text = REFUSED[what]
    compilations.clear()
    with pytest.raises(error, match=text):
        call()
    assert not compilations
