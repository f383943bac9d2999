"""Scale mixtures of Gaussians as distributions: against SciPy, NumPyro and numerical integrals.

Draws are tested at fixed seeds: a correct sampler fails at a new seed with probability 1e-3 a test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from helpers import others_slow
from jax import random
from numpyro.distributions.distribution import validation_enabled
from numpyro.infer.util import log_density

from ppl_toolkit.errors import DataError
from ppl_toolkit.models import scale_quadrature
from ppl_toolkit.models.scale_laws import BurrXII
from ppl_toolkit.models.scale_mixture_laws import (
    ScaleMixtureNormal,
    ScaleMixtureProcess,
    StudentTProcess,
    student_t_cdf,
    student_t_icdf,
)
from ppl_toolkit.models.scale_quadrature import posterior_law
from ppl_toolkit.models.scale_tables import Atoms, Tabulated

LEVEL = 1e-3  # false alarms of the tests on draws
rng = np.random.default_rng(1)
ROOT = rng.normal(size=(4, 6))
K = ROOT @ ROOT.T / 6 + 0.1 * np.eye(4)
L = np.linalg.cholesky(K)
Y = rng.normal(size=(3, 4))
LOC = np.array([0.5, -1.0, 0.0, 2.0])


@pytest.fixture(autouse=True)
def in_float64():
    # NumPyro's checks of arguments would compile one by one; they have a test of their own.
    with jax.enable_x64(True), validation_enabled(False):
        yield


def agree(seen, expected, rtol=1e-12, atol=0.0):
    np.testing.assert_allclose(np.asarray(seen), np.asarray(expected), rtol=rtol, atol=atol)


# --- vectors with one scale


def test_inverse_gamma_gives_multivariate_t():
    def laws(alpha, beta):
        ours = StudentTProcess(alpha, beta, L, LOC)
        mixture = ScaleMixtureProcess(dist.InverseGamma(alpha, beta), L, LOC)
        return ours, mixture, dist.MultivariateStudentT(2 * alpha, LOC, jnp.sqrt(beta / alpha) * L)

    def everything(alpha, beta):
        return [(law.log_prob(Y), law.mean, law.variance) for law in laws(alpha, beta)]

    for alpha in (1.7, 0.9, 0.4):  # all moments; no variance; no mean either
        ours, mixture, numpyros = jax.jit(everything)(alpha, 0.6)
        scipys = st.multivariate_t(LOC, 0.6 / alpha * K, df=2 * alpha).logpdf(Y)
        agree(ours[0], scipys, 1e-10)
        for seen, also, expected in zip(ours, mixture, numpyros, strict=True):
            agree(seen, expected, 1e-10)
            agree(also, expected, 1e-10)


def test_chain_rule_is_the_predictive():
    # y_2 | y_1: the posterior law of sigma^2, and the Gaussian's conditional moments at sigma = 1
    law, y1, y2 = dist.InverseGamma(1.7, 0.6), Y[0, :3], Y[0, 3:]
    solved = np.linalg.solve(K[:3, :3], K[:3, 3:])
    schur, mean = K[3:, 3:] - K[3:, :3] @ solved, solved.T @ y1
    whole, part = L, np.linalg.cholesky(K[:3, :3])

    def everything():
        after = posterior_law(law, y1 @ np.linalg.solve(K[:3, :3], y1), 3)
        joint = ScaleMixtureProcess(law, whole).log_prob(Y[0])
        first = ScaleMixtureProcess(law, part).log_prob(y1)
        predictive = ScaleMixtureProcess(after, jnp.sqrt(schur), mean).log_prob(y2)
        number = ScaleMixtureNormal(after, mean[0], jnp.sqrt(schur[0, 0])).log_prob(y2[0])
        return joint - first, predictive, number

    expected, vector, number = jax.jit(everything)()
    agree([vector, number], [expected, expected], 1e-9)


def test_the_gaussian_process_is_the_limit():
    def everything():
        laws = [
            dist.MultivariateNormal(LOC, scale_tril=L),
            ScaleMixtureProcess(dist.Delta(1.0), L, LOC),
            *(StudentTProcess(a, a, L, LOC) for a in (1e3, 1e5)),
        ]
        return [law.log_prob(Y) for law in laws]

    gaussian, point, near, far = map(np.asarray, jax.jit(everything)())
    agree(point, gaussian)
    agree((near - gaussian) / (far - gaussian), np.full(3, 100.0), 0.05)  # O(1 / alpha)


def test_scaling():
    c, alpha, beta = 3.0, 1.7, 0.6
    plain = StudentTProcess(alpha, beta, L).log_prob(Y)
    agree(StudentTProcess(alpha, beta / c, np.sqrt(c) * L).log_prob(Y), plain)
    agree(StudentTProcess(alpha, c**2 * beta, L).log_prob(c * Y), plain - 4 * np.log(c))


def test_batches_broadcast():
    def everything():
        law = BurrXII(jnp.array([1.0, 2.0, 3.0]), 2.0)
        batch = ScaleMixtureProcess(law, jnp.stack([L, 2 * L])[:, None], LOC)
        assert batch.batch_shape == (2, 3)
        assert batch.sample(random.key(0), (5,)).shape == (5, 2, 3, 4)
        single = ScaleMixtureProcess(BurrXII(2.0, 2.0), 2 * L, LOC[None])
        values = batch.log_prob(Y), single.log_prob(Y[1])  # a datum for every law
        return *values, batch.mean, batch.variance, law.mean

    seen, single, mean, variance, scale = jax.jit(everything)()
    agree(seen[1, 1], single[0])
    agree(mean, np.broadcast_to(LOC, (2, 3, 4)))
    agree(variance[0, 1], scale[1] * np.diag(K))


def test_one_scale_is_shared():
    # Four degrees of freedom, correlation 0.6: P(|f_1|, |f_2| > 4) = 0.0057; 0.0041 with a scale
    # for every coordinate, 4.2 standard deviations below for 40,000 draws.
    tril = np.linalg.cholesky([[1.0, 0.6], [0.6, 1.0]])
    draw = jax.jit(lambda: StudentTProcess(2.0, 2.0, tril).sample(random.key(1), (40_000,)))
    draws = np.asarray(draw())
    both = np.sum(np.all(np.abs(draws) > 4, axis=1))
    assert st.binomtest(int(both), 40_000, 0.0057).pvalue > LEVEL
    assert st.kstest(draws[:, 1], st.t(4).cdf).pvalue > LEVEL
    q = np.sum(np.linalg.solve(tril, draws.T) ** 2, axis=0)
    assert st.kstest(q / 2, st.f(2, 4).cdf).pvalue > LEVEL


def test_a_process_at_a_sample_site():
    def model(y):
        beta = numpyro.sample("beta", dist.Gamma(2.0, 1.0))
        f = numpyro.sample("f", StudentTProcess(2.0, beta, L))
        numpyro.sample("y", ScaleMixtureProcess(BurrXII(beta, 2.0), L, f), obs=y)

    values = {"beta": jnp.array(1.3), "f": jnp.array(Y[0])}
    total = jax.jit(lambda v: log_density(model, (Y[1],), {}, v)[0])
    slope = jax.jit(jax.grad(total))(values)
    ends = [total({**values, "beta": 1.3 + h}) for h in (-1e-5, 1e-5)]
    agree(slope["beta"], (ends[1] - ends[0]) / 2e-5, 1e-7)
    step = jnp.zeros(4).at[2].set(1e-5)
    ends = [total({**values, "f": Y[0] + h}) for h in (-step, step)]
    agree(slope["f"][2], (ends[1] - ends[0]) / 2e-5, 1e-7)


# --- Student's t


def test_student_t_cdf_and_quantiles():
    nu = np.array([0.7, 2, 12, 1004])[:, None]
    z = np.array([-40, -3, -1, -0.1, -1e-9, 0, 1e-3, 0.8, 2.5, 9])
    p = np.array([0.0, 1e-40, 1e-9, 0.01, 0.3, 0.499, 0.5, 0.7, 0.99, 1 - 1e-9, 1.0])
    cdf, found = map(np.asarray, jax.jit(lambda: (student_t_cdf(z, nu), student_t_icdf(p, nu)))())
    agree(cdf[:, 4:5], 0.5 - 1e-9 * st.t.pdf(0.0, nu))  # where SciPy errs
    agree(np.delete(cdf, 4, 1), st.t.cdf(np.delete(z, 4), nu), 3e-12)
    agree(st.t.cdf(found[:, :7], nu), np.broadcast_to(p[:7], (4, 7)), 5e-12)
    agree(st.t.sf(found[:, 7:], nu), np.broadcast_to(1 - p[7:], (4, 4)), 5e-12)


def test_student_t_derivatives():
    nu, h, z, p = 3.3, 1e-4, np.array([-3.0, 0.4, 20.0]), np.array([0.1, 0.7, 0.999])

    def slopes(f, x):
        return jax.vmap(jax.grad(f, (0, 1)), (0, None))(x, nu)

    cdf, icdf = jax.jit(lambda: (slopes(student_t_cdf, z), slopes(student_t_icdf, p)))()
    agree(cdf[0], st.t.pdf(z, nu))
    agree(cdf[1], (st.t.cdf(z, nu + h) - st.t.cdf(z, nu - h)) / (2 * h), 1e-6)
    agree(icdf[0], 1 / st.t.pdf(st.t.ppf(p, nu), nu), 1e-10)
    agree(icdf[1], (st.t.ppf(p, nu + h) - st.t.ppf(p, nu - h)) / (2 * h), 1e-6)


# --- numbers with a scale each


LAWS = {
    "inverse gamma": lambda: dist.InverseGamma(2.0, 1.5),
    "atoms": lambda: Atoms(jnp.array([0.25, 1.0, 9.0]), jnp.log(jnp.array([0.2, 0.5, 0.3]))),
    "burr": lambda: BurrXII(2.0, 2.0),
}


def density_of(name):
    """The density of loc 0.3, scale 0.8 in SciPy."""
    if name == "inverse gamma":
        return st.t(4.0, 0.3, 0.8 * np.sqrt(0.75)).pdf
    if name == "atoms":
        sd = 0.8 * np.array([0.5, 1.0, 3.0])
        return lambda x: float(np.array([0.2, 0.5, 0.3]) @ st.norm.pdf(x, 0.3, sd))

    t = np.linspace(-25, 25, 2001)
    weights = st.burr12.pdf(np.exp(t), 2.0, 2.0) * np.exp(t) * (t[1] - t[0])
    return lambda x: float(weights @ st.norm.pdf(x, 0.3, 0.8 * np.exp(t / 2)))


def _probability(density, left, right):
    nodes, weights = np.polynomial.legendre.leggauss(60)
    x = 0.5 * (left + right) + 0.5 * (right - left) * nodes
    return 0.5 * (right - left) * sum(w * density(v) for w, v in zip(weights, x, strict=True))


@pytest.mark.parametrize("name", others_slow(LAWS, "burr"))
def test_marginals(name):
    def everything(y):
        law = ScaleMixtureNormal(LAWS[name](), 0.3, 0.8)
        p = law.cdf(y)
        draws = law.cdf(law.sample(random.key(3), (1000,)))
        slopes = jax.vmap(jax.grad(law.cdf))(y)
        quantile, slope = jax.value_and_grad(law.icdf)(0.9)
        return law.log_prob(y), p, law.icdf(p), slopes, slope, law.log_prob(quantile), draws

    y = np.array([-2.0, 0.25, 1.0, 6.0, 0.3])
    log_prob, p, back, slopes, slope, there, draws = jax.jit(everything)(y)
    density = density_of(name)
    expected = [density(v) for v in y]
    agree(jnp.exp(log_prob), expected, 1e-9)
    agree(p[4], 0.5)
    agree(p[2] - p[4], _probability(density, 0.3, 1.0), 1e-9)
    agree(back, y, 1e-11)
    agree(slopes, expected, 1e-9)
    agree(slope, jnp.exp(-there), 1e-9)
    assert st.kstest(np.asarray(draws), "uniform").pvalue > LEVEL


@pytest.mark.parametrize("name", LAWS)
def test_scores_and_improvements(name):
    t = np.linspace(0, 12, 2001)  # integrals over y +- sinh(t): integrands decay like |x|^-3 or so
    weights = np.cosh(t) * t[1]
    weights[0] /= 2

    def everything(y):
        law = ScaleMixtureNormal(LAWS[name](), 0.3, 0.8)
        improvement = jax.value_and_grad(law.expected_improvement)(y)
        below, above = law.cdf(y - jnp.sinh(t)), 1.0 - law.cdf(y + jnp.sinh(t))
        return law.crps(y), *improvement, below, above

    crps, improvement, slope, below, above = jax.jit(everything)(1.1)
    agree(crps, weights @ (below**2 + above**2), 1e-5)
    agree(improvement, weights @ below, 1e-5)  # E[max(y - X, 0)]
    agree(slope, below[0], 1e-9)


def test_missing_moments():
    def everything():
        wild = ScaleMixtureNormal(dist.InverseGamma(0.4, 1.0), 0.0, 1.0)
        missing = wild.variance, wild.crps(1.0)
        infinite = wild.mean, wild.expected_improvement(1.0)
        return missing, infinite, ScaleMixtureNormal(BurrXII(1.0, 0.5), 0.0, 1.0).variance

    missing, infinite, burr = jax.jit(everything)()
    assert np.all(np.isnan(missing))
    assert np.all(np.isinf([*infinite, burr]))


def test_numbers_in_batches_and_posteriors():
    loc, scale = jnp.array([0.0, 1.0, 2.0]), jnp.array([[1.0], [2.0]])

    def everything():
        table = posterior_law(BurrXII(2.0, 2.0), 11.0, 8)
        law = ScaleMixtureNormal(table, loc, scale)
        assert law.batch_shape == law.cdf(0.5).shape == (2, 3)
        several = ScaleMixtureNormal(dist.InverseGamma(loc + 1.0, 1.0), loc, scale)
        assert several.icdf(0.3).shape == several.sample(random.key(0), (4,))[0].shape == (2, 3)
        alone = ScaleMixtureNormal(table, 1.0, 2.0).crps(0.5)
        return law.icdf(law.cdf(0.5)), law.variance, table.mean, law.crps(0.5), alone

    back, variance, mean, crps, alone = jax.jit(everything)()
    agree(back, np.full((2, 3), 0.5), 1e-9)
    agree(variance, np.broadcast_to(mean * scale**2, (2, 3)))
    agree(crps[1, 1], alone)


def test_quadrature_predictive_is_student_t():
    # The nodes of an inverse gamma posterior, against its closed form
    def everything(law):
        law = ScaleMixtureNormal(law, 0.0, 1.0)
        y = jnp.array([-3.0, 0.2, 4.0])
        scores = jnp.stack([law.icdf(0.01), law.crps(0.7), law.expected_improvement(-2.0)])
        return law.log_prob(y), law.cdf(y), scores

    def both():
        prior = dist.InverseGamma(2.0, 2.0)
        table = Tabulated(*scale_quadrature._by_trapezoid(prior, 11.0, 8.0, 129))
        return everything(table), everything(posterior_law(prior, 11.0, 8))

    for seen, expected in zip(*jax.jit(both)(), strict=True):
        agree(seen, expected, 1e-10)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="positive support"):
        ScaleMixtureProcess(dist.Normal(0.0, 1.0), L)
    with pytest.raises(DataError, match="scale_tril"):
        ScaleMixtureProcess(BurrXII(2.0, 2.0), jnp.ones((4, 3)))
    with pytest.raises(DataError, match="loc"):
        StudentTProcess(2.0, 2.0, L, jnp.zeros(3))
    with pytest.raises(DataError, match="NumPyro distribution"):
        ScaleMixtureNormal(2.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="scale_tril"):
        ScaleMixtureProcess(BurrXII(2.0, 2.0), -L, validate_args=True)
