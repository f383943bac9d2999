"""Sparse variational inference: parts of the bound against exact answers, and the method."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from helpers import quiet
from jax import random
from scipy.integrate import quad
from scipy.special import softmax

import ppl_toolkit as ppl
from ppl_toolkit.inference import SVTP
from ppl_toolkit.inference.sparse_posterior import (
    Coefficients,
    InverseGammaScale,
    Moments,
    Pieces,
    PointScale,
    drawn,
    expected_log_softmax,
    moments,
    natural_step,
)
from ppl_toolkit.inference.sparse_program import PiecesOf, Sites
from ppl_toolkit.inference.sparse_variational import Free
from ppl_toolkit.models.infinite_width import mlp
from ppl_toolkit.models.scale_mixture_classification import scale_mixture_classification


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def agree(seen, expected, rtol=1e-12, atol=0.0):
    np.testing.assert_allclose(np.asarray(seen), np.asarray(expected), rtol=rtol, atol=atol)


def law(key, classes, m):
    """Some q(v | sigma^2) with nothing special about it."""
    rng = np.random.default_rng(key)
    root = 0.4 * rng.normal(size=(classes, m, m)) + np.eye(m)
    fixed, scaled = rng.normal(size=(2, classes, m))
    precision = root @ root.swapaxes(1, 2)
    return Coefficients(
        *map(jnp.asarray, (fixed, scaled, precision, np.linalg.cholesky(precision)))
    )


# --- a Gaussian likelihood: everything is known -------------------------------------------------

# Targets with noise sigma^2 NOISE at 8 inputs, three hidden layers; Z = X.
INPUTS = np.sin(0.7 * np.arange(8)[:, None] + 1.3 * np.arange(3))
TARGETS = np.cos(1.1 * np.arange(8))
NOISE, ALPHA, BETA = 0.1, 2.0, 2.0


def gaussian(known, scale):
    """E_q[log N(y; f, sigma^2 NOISE)], from E[1 / sigma] and E[1 / sigma^2]."""
    one, two = scale.inverses
    rest, k = TARGETS[:, None] - known.fixed, known.scaled
    square = two * rest**2 - 2 * one * rest * k + k**2 + known.variance
    return -0.5 * (jnp.log(2 * jnp.pi * NOISE) + scale.log + square / NOISE).sum()


@pytest.fixture(scope="module")
def conjugate():
    with jax.enable_x64(True):
        K = mlp(3, weight_std=1.4, bias_std=0.3).nngp(INPUTS)
        A = np.linalg.cholesky(K)
        quadratic = TARGETS @ np.linalg.solve(K + NOISE * np.eye(8), TARGETS)
        precision = np.eye(8) + A.T @ A / NOISE
        mean = np.linalg.solve(precision, A.T @ TARGETS / NOISE)
        q = Coefficients.of(mean[None], np.zeros((1, 8)), jnp.asarray(precision[None]))
        scale = InverseGammaScale.of(ALPHA + 4.0, BETA + quadratic / 2)
        law = st.multivariate_t(np.zeros(8), BETA / ALPHA * (K + NOISE * np.eye(8)), 2 * ALPHA)
        pieces = Pieces(jnp.asarray(A), jnp.zeros(8), None)
        yield SimpleNamespace(pieces=pieces, q=q, scale=scale, evidence=law.logpdf(TARGETS))


def bound(pieces, scale, fixed, scaled, precision):
    q = Coefficients.of(fixed, scaled, precision)
    prior = InverseGammaScale.of(ALPHA, BETA)
    known = gaussian(moments(q, pieces), scale)
    return known - scale.divergence(prior) - q.divergence(scale)


def test_the_bound_at_the_posterior_is_the_exact_evidence(conjugate):
    """-8.7361...: the value for these inputs by SciPy's multivariate t."""
    agree(conjugate.evidence, -8.73612892133042, rtol=1e-13)
    at = jax.jit(bound)(conjugate.pieces, conjugate.scale, *conjugate.q[:3])
    agree(at, conjugate.evidence, rtol=1e-12)


def test_any_perturbation_lowers_the_bound(conjugate):
    arguments = (conjugate.scale, *conjugate.q[:3])
    function = jax.jit(lambda *x: bound(conjugate.pieces, *x))
    slopes = jax.jit(jax.grad(function, argnums=(0, 1, 2, 3)))(*arguments)
    for slope in jax.tree.leaves(slopes):
        assert np.abs(slope).max() < 1e-9
    leaves, tree = jax.tree.flatten(arguments)
    rng = np.random.default_rng(0)
    for number, leaf in enumerate(leaves):
        for _ in range(3):
            step = 0.1 * rng.normal(size=np.shape(leaf))
            step = step + np.swapaxes(step, -1, -2) if np.ndim(leaf) == 3 else step
            moved = [*leaves[:number], leaf + step, *leaves[number + 1 :]]
            assert function(*tree.unflatten(moved)) < conjugate.evidence - 1e-6


def test_one_natural_step_arrives_at_the_posterior(conjugate):
    """From anywhere, whatever q(sigma^2) is."""
    scale = InverseGammaScale.of(1.7, 3.1)

    @jax.jit
    def step(q):
        slopes = jax.grad(gaussian)(moments(q, conjugate.pieces), scale)
        return natural_step(q, conjugate.pieces.basis, slopes, scale, 1.0)

    end = step(law(1, 1, 8))
    agree(end.fixed, conjugate.q.fixed, rtol=1e-9)
    agree(end.precision, conjugate.q.precision, rtol=1e-12)
    agree(end.scaled, 0.0, atol=1e-9)


# --- the parts ----------------------------------------------------------------------------------


def expectation(function, a, b):
    """Of a function of sigma^2 under InverseGamma(a, b)."""
    pdf = st.invgamma(a, scale=b).pdf
    return quad(lambda t: function(np.exp(t)) * pdf(np.exp(t)) * np.exp(t), -12, 12, limit=400)[0]


def test_moments_and_divergences_of_the_scale():
    a, b = 2.6, 1.9
    q, prior = InverseGammaScale.of(a, b), InverseGammaScale.of(1.5, 0.7)
    agree([q.shape, q.rate], [a, b])
    agree(q.log, expectation(np.log, a, b), rtol=1e-8)
    agree(q.inverses, [expectation(lambda s: s**-0.5, a, b), b**-1 * a], rtol=1e-8)
    one, other = st.invgamma(a, scale=b), st.invgamma(1.5, scale=0.7)
    gap = expectation(lambda s: one.logpdf(s) - other.logpdf(s), a, b)
    agree(q.divergence(prior), gap, rtol=1e-8)
    agree(prior.divergence(prior), 0.0, atol=1e-14)


def test_the_means_are_where_the_derivatives_of_the_divergence_are_given():
    scale, q = InverseGammaScale.of(2.6, 1.9), law(2, 3, 4)
    slopes = jax.grad(lambda m, k: Coefficients(m, k, *q[2:]).divergence(scale), (0, 1))
    found = jax.jit(lambda m, k: scale.means(*slopes(m, k)))(q.fixed, q.scaled)
    agree(found, q[:2], rtol=1e-10)


def test_divergence_of_the_coefficients():
    """E over sigma^2 of the divergences of NumPyro's normal laws."""
    scale, q = InverseGammaScale.of(2.6, 1.9), law(3, 2, 3)

    def given(s2):
        root = jnp.sqrt(s2)
        prior = dist.MultivariateNormal(jnp.zeros(3), s2 * jnp.eye(3))
        own = dist.MultivariateNormal(q.fixed + root * q.scaled, precision_matrix=q.precision / s2)
        return dist.kl_divergence(own, prior).sum()

    t = np.linspace(-6.0, 14.0, 801)  # log sigma^2
    density = st.invgamma(2.6, scale=1.9).pdf(np.exp(t)) * np.exp(t)
    exact = np.trapezoid(density * np.asarray(jax.jit(jax.vmap(given))(np.exp(t))), t)
    agree(q.divergence(scale), exact, rtol=1e-6)


def test_the_expected_log_softmax_and_its_derivatives():
    """For two classes, against Gauss-Hermite rules; draws on a grid of equal shares."""
    fixed, scaled, root = np.random.default_rng(4).normal(size=(3, 3, 2))
    known = Moments(fixed, scaled, root**2 + 0.3)
    labels, s2 = jnp.array([0, 1, 1]), 1.7
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    exact_noise = jnp.asarray(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 1, 2))
    shares = np.outer(weights, weights).ravel() / weights.sum() ** 2

    def value(known, s2):
        f = known.fixed + jnp.sqrt(s2) * (known.scaled + jnp.sqrt(known.variance) * exact_noise)
        return shares @ jax.nn.log_softmax(f)[:, jnp.arange(3), labels].sum(1)

    middle = st.norm.ppf((np.arange(400) + 0.5) / 400)
    noise = np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 1, 2)
    noise = jnp.asarray(np.repeat(noise, 3, axis=1))
    sigma2 = jnp.full(len(noise), s2)
    found = jax.jit(expected_log_softmax)(known, labels, sigma2, noise)
    by_moments, by_sigma2 = jax.jit(jax.grad(value, (0, 1)))(known, s2)
    agree(found.value, value(known, s2), rtol=2e-3)
    for seen, exact in zip(found.by_moments, by_moments, strict=True):
        agree(seen, exact, rtol=2e-3)
    agree(found.by_sigma2.sum(), by_sigma2, rtol=2e-3)
    shown = jax.jit(jax.grad(lambda *x: found.linear(*x), (0, 1)))(known, sigma2)
    agree(shown[1], found.by_sigma2)
    for seen, exact in zip(shown[0], found.by_moments, strict=True):
        agree(seen, exact)


@pytest.mark.slow
def test_draws_share_one_scale():
    """Two values with four degrees of freedom and correlation 0.6 are both beyond 4 with the
    probability 0.0057 of the bivariate t, and 0.0041 if each had a scale of its own; so are
    values of different classes, 0.00221 for uncorrelated ones (by quadrature over sigma^2) and not
    0.016^2. At 200 000 draws: 4 standard errors."""
    q = Coefficients.of(
        jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.broadcast_to(jnp.eye(2), (2, 2, 2))
    )
    root = jnp.linalg.cholesky(jnp.array([[1.0, 0.6], [0.6, 1.0]]))

    def far(key):
        sigma2, w = drawn(key, InverseGammaScale.of(2.0, 2.0), q)
        f = jnp.abs(jnp.sqrt(sigma2) * root @ w) > 4.0
        return jnp.stack([f[0, 0] & f[1, 0], f[0, 0] & f[0, 1]])

    count = 200_000
    seen = jax.jit(jax.vmap(far))(random.split(random.key(5), count)).mean(0)
    apart = expectation(lambda s: (2 * st.norm.sf(4 / np.sqrt(s))) ** 2, 2.0, 2.0)
    for share, exact in zip(seen, (0.00573, apart), strict=True):
        assert abs(share - exact) < 4 * np.sqrt(exact / count) + 5e-6


@pytest.mark.slow
def test_draws_have_the_moments_of_q():
    q = law(6, 2, 3)
    draw = jax.jit(jax.vmap(lambda key: drawn(key, InverseGammaScale.of(6.0, 4.0), q)))
    sigma2, w = draw(random.split(random.key(7), 100_000))
    sigma = jnp.sqrt(sigma2)[:, None, None]
    rest = w - (q.fixed / sigma.swapaxes(1, 2) + q.scaled).swapaxes(1, 2)
    white = jnp.einsum("cji,sjc->sci", q.root, rest)
    agree(white.mean(0), 0.0, atol=0.015)
    agree(jnp.einsum("sci,scj->cij", white, white) / len(w), [np.eye(3)] * 2, atol=0.02)
    assert st.kstest(np.asarray(sigma2), st.invgamma(6.0, scale=4.0).cdf).pvalue > 1e-4


# --- as a method --------------------------------------------------------------------------------

RNG = np.random.default_rng(8)
X = RNG.normal(size=(24, 2))
Y = (X[:, 0] * X[:, 1] > 0).astype(int) + (X[:, 0] > 0.8)
Z = X[::3]


@pytest.mark.slow
def test_minibatches_give_unbiased_bounds_and_gradients():
    """Means over 2000 keys with 8 of 24 rows and with all, 4.5 standard errors apart at most. The
    kernel has one parameter u, the log of the basis' length."""
    basis, residual = np.random.default_rng(9).normal(size=(24, 4)), jnp.linspace(0.1, 1.0, 24)
    q = law(9, 3, 4)
    free = Free(InverseGammaScale.of(3.0, 4.0), jnp.full(1, 0.3), jnp.full(1, -1.5))
    program = SimpleNamespace(
        observed=[SimpleNamespace(shape=(24,))], model=SimpleNamespace(classes=3)
    )

    def looks(batch):
        method = SVTP(batch=batch, samples=2).on(program)
        functions = {
            Sites(): lambda u: ({}, -(u**2).sum() / 2, InverseGammaScale.of(2.0, 2.0)),
            PiecesOf(batch or 24): lambda x: Pieces(
                jnp.exp(x[0]) * jnp.asarray(basis)[x[1]], residual[x[1]], jnp.asarray(Y)[x[1]]
            ),
        }

        def look(key):
            def elbo(free):
                return method.bound(key, free, q, SimpleNamespace(functions=functions))

            (value, (A, slopes, _)), gradient = jax.value_and_grad(elbo, has_aux=True)(free)
            natural = [s.T @ A for s in (slopes.fixed, slopes.scaled)]
            curvature = jnp.einsum("bc,bm,bk->cmk", slopes.variance, A, A)
            return jax.flatten_util.ravel_pytree((value, gradient, natural, curvature))[0]

        return np.asarray(jax.jit(jax.vmap(look))(random.split(random.key(10), 2000)))

    some, all_rows = looks(8), looks(None)
    assert not np.array_equal(some[:, 0], all_rows[:, 0])
    error = np.sqrt((some.var(0) + all_rows.var(0)) / 2000)
    assert (np.abs(some.mean(0) - all_rows.mean(0)) < 4.5 * error).all()


SMALL, SMALL_Y = X[:4], np.array([0, 1, 1, 0])
LAWS = {"inverse gamma": dist.InverseGamma(2.0, 2.0), "known": dist.Delta(1.5)}


def exact_evidence(law):
    """log p(y) with two classes, by a million draws of f from the prior."""
    K = mlp(2).nngp(SMALL)
    root = np.linalg.cholesky(K + 1e-6 * np.diag(K).mean() * np.eye(4))
    rng = np.random.default_rng(12)
    s2 = 2.0 / rng.gamma(2.0, size=(10**6, 1, 1)) if law != "known" else 1.5
    f = np.sqrt(s2) * (root @ rng.normal(size=(10**6, 4, 2)))
    likelihood = softmax(f, axis=-1)[:, np.arange(4), SMALL_Y].prod(1)
    return np.log(likelihood.mean()), likelihood.std() / likelihood.mean() / 1e3


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_the_bound_lies_below_the_exact_evidence(name):
    """By 0.27, whatever the law: of two classes only the difference of the functions matters, which
    makes them dependent given the labels, and q does not know."""
    model = scale_mixture_classification(mlp(2), classes=2, law=LAWS[name])
    fit = quiet(model, SMALL, SMALL_Y, method=SVTP(), warmup=300, draws=2000, chains=2, seed=1)
    assert ("sigma2" in fit["posterior"]) == (name != "known")
    exact, error = exact_evidence(name)
    for elbo in fit["variational"]["elbo"].values:
        assert exact - 0.29 < elbo < exact - 0.24 + 4 * error


def test_a_known_scale_is_the_sparse_gaussian_process():
    """Hensman et al. (2015), in terms of u = f(Z) and not whitened: q(u) = N(mean, S),
    q(f_i) = N(A mean, k_ii - A k_zi + A S A^T) with A = k_iz K_zz^-1, KL(q(u) | p(u))."""
    s2, network = 1.5, mlp(2)
    model = scale_mixture_classification(network, classes=3, law=dist.Delta(s2))
    pieces = jax.jit(model.pieces)({}, np.arange(5), X, Y, inducing=Z)
    q = law(13, 3, len(Z))._replace(scaled=jnp.zeros((3, len(Z))))
    K = network.nngp(Z)
    K = K + 1e-6 * np.diag(K).mean() * np.eye(len(Z))
    root = np.linalg.cholesky(K)
    mean, S = q.fixed @ root.T, s2 * root @ np.linalg.inv(q.precision) @ root.T
    inverse = np.linalg.inv(s2 * K)
    divergence = 0.5 * sum(
        np.trace(inverse @ S[c]) + mean[c] @ inverse @ mean[c] - len(Z)
        + np.linalg.slogdet(s2 * K)[1] - np.linalg.slogdet(S[c])[1]
        for c in range(3)
    )  # fmt: skip
    agree(jax.jit(Coefficients.divergence)(q, PointScale(s2)), divergence, rtol=1e-8)
    across = network.nngp(X[:5], Z)
    A = np.linalg.solve(K, across.T).T
    known = jax.jit(moments)(q, pieces)
    rest = s2 * (np.diag(network.nngp(X[:5])) - (A * across).sum(1))
    agree(known.fixed, A @ mean.T, rtol=1e-8, atol=1e-9)
    agree(s2 * known.variance, rest[:, None] + np.einsum("im,cmk,ik->ic", A, S, A), rtol=1e-6)
    np.testing.assert_array_equal(pieces.labels, Y[:5])


@pytest.mark.slow
@pytest.mark.parametrize("inducing", [None, Z], ids=["exact", "sparse"])
def test_class_probabilities_are_those_of_nuts(inducing):
    """At 40 new inputs, some of them far out: 0.13 apart at most, 0.04 on average (ours are nearer
    to 1/3), and the likeliest class is the same at 37 or more. The law of sigma^2 is narrower than
    the posterior."""
    model = scale_mixture_classification(mlp(2), classes=3)
    new = 1.5 * np.random.default_rng(14).normal(size=(40, 2))
    at = X if inducing is None else inducing

    def found(method):
        tree = quiet(model, X, Y, inducing=inducing, method=method, seed=2)
        p = ppl.predict(tree, model, new, inducing=at)["predictions"]["p"]
        return p.values.mean((0, 1)), tree["posterior"]["sigma2"].values

    (ours, narrow), (exact, scale) = found("svtp"), found("nuts")
    assert np.abs(ours - exact).max() < 0.13
    assert np.abs(ours - exact).mean() < 0.04
    assert (ours.argmax(1) == exact.argmax(1)).sum() >= 37
    assert np.log(narrow).std() < np.log(scale).std()
