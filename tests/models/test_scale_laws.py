"""Laws of a squared scale, and integrals over it: against SciPy, closed forms and golden values.

Draws are compared by Kolmogorov and Smirnov's test at fixed seeds: a correct sampler fails at a new
seed with probability 1e-3 a test.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special as sp
import scipy.stats as st
from jax import random
from jax.scipy.special import logsumexp
from numpyro.distributions.distribution import validation_enabled
from numpyro.infer.util import log_density

from ppl_toolkit.errors import DataError, OptionError
from ppl_toolkit.models import scale_quadrature
from ppl_toolkit.models.scale_laws import (
    BurrXII,
    GeneralizedInverseGaussian,
    gig_log_normalizer,
    of_standard_deviation,
)
from ppl_toolkit.models.scale_quadrature import (
    atoms_of,
    importance,
    log_marginal,
    mean_of,
    posterior_law,
)
from ppl_toolkit.models.scale_tables import Atoms, Tabulated

LEVEL = 1e-3  # false alarms of the tests on draws
X = np.array([1e-8, 0.01, 0.3, 1.0, 2.7, 40.0, 1e6])
# Eight data in a network kernel with three ReLU layers: quadratic form and log determinant.
Q, LOG_DET, N = 11.0425437236158, -9.09600953145428, 8
CONSTANT = -0.5 * N * np.log(2 * np.pi) - 0.5 * LOG_DET


@pytest.fixture(autouse=True)
def in_float64():
    # NumPyro's checks of arguments would compile one by one; they have a test of their own.
    with jax.enable_x64(True), validation_enabled(False):
        yield


def quadrature(law, q, n, nodes=129):
    """What laws without closed forms get."""
    return logsumexp(scale_quadrature._by_trapezoid(law, q, n, nodes)[1], axis=0)


def tabulated(law):
    """Any continuous law, at the nodes of its quadrature."""
    grid, terms = scale_quadrature._by_trapezoid(law, 0.0, 0.0, 129)
    return Tabulated(grid, jnp.moveaxis(terms, 0, -1), law.support)


def half_cauchy():
    return of_standard_deviation(dist.HalfCauchy(1.0))


def agree(seen, expected, rtol=1e-12, atol=0.0):
    np.testing.assert_allclose(np.asarray(seen), np.asarray(expected), rtol=rtol, atol=atol)


# --- the laws themselves


@pytest.mark.parametrize(("c", "d"), [(2.0, 2.0), (0.5, 5.0), (3.0, 0.4)])
def test_burr_is_scipys(c, d):
    scipys, p = st.burr12(c, d), np.array([1e-9, 0.1, 0.5, 0.99])

    def everything(c, d):
        law = BurrXII(c, d)
        quantiles = law.icdf(p)
        there = law.cdf(quantiles), law.log_prob(1e300)  # no overflow of x^c
        return law.log_prob(X), law.cdf(X), quantiles, *there, law.mean, law.variance

    log_prob, cdf, quantiles, back, far, mean, variance = jax.jit(everything)(c, d)
    agree(log_prob, scipys.logpdf(X), 1e-11)
    agree(cdf, scipys.cdf(X), 1e-7 if d == 5 else 1e-11)  # SciPy subtracts from one
    agree(quantiles, scipys.ppf(p), 1e-8)
    agree(back, p)
    agree(mean, scipys.mean() if c * d > 1 else np.inf, 1e-9)
    agree(variance, scipys.var() if c * d > 2 else np.inf, 1e-9)
    assert np.isfinite(far)


def test_burr_draws_and_gradients():
    def everything():
        draws = BurrXII(2.0, 1.5).sample(random.key(1), (4000,))
        return draws, jax.grad(lambda c: BurrXII(c, 1.5).log_prob(3.0))(2.0)

    draws, slope = jax.jit(everything)()
    assert st.kstest(np.asarray(draws), st.burr12(2.0, 1.5).cdf).pvalue > LEVEL
    ends = [st.burr12(c, 1.5).logpdf(3.0) for c in (2.0 - 1e-5, 2.0 + 1e-5)]
    agree(slope, (ends[1] - ends[0]) / 2e-5, 1e-8)


def test_gig_normalizer_is_bessels_function():
    p = np.array([-300.0, -50, -3.3, -1, -0.5, 0, 0.2, 1, 2.5, 40])[:, None]
    z = np.array([1e-6, 1e-3, 0.1, 1, 10, 100, 1e4])
    with np.errstate(all="ignore"):
        expected = np.log(2 * sp.kve(p, z)) - z + p / 2 * np.log(9)
    known = np.isfinite(expected)  # SciPy overflows
    seen = np.asarray(gig_log_normalizer(p, 3 * z, z / 3))
    agree(seen[known], expected[known], 1e-13, 1e-10)


def test_gig_limits_are_gamma_and_inverse_gamma():
    x = X[1:6]

    def everything():
        gamma, inverse = (
            GeneralizedInverseGaussian(*a) for a in ((2.0, 0.0, 3.0), (-2.5, 3.0, 0.0))
        )
        wild = GeneralizedInverseGaussian(-1.0, 3.0, 0.0).mean, gig_log_normalizer(1.0, 3.0, 0.0)
        near = gig_log_normalizer(2.0, 1e-13, 3.0) - gig_log_normalizer(2.0, 0.0, 3.0)
        return gamma.log_prob(x), inverse.log_prob(x), inverse.mean, inverse.variance, wild, near

    gamma, inverse, mean, variance, wild, near = jax.jit(everything)()
    agree(gamma, st.gamma(2, scale=2 / 3).logpdf(x))
    agree(inverse, st.invgamma(2.5, scale=1.5).logpdf(x))
    agree([mean, variance], [1.0, st.invgamma(2.5, scale=1.5).var()])
    assert np.all(np.isinf(wild))
    assert abs(near) < 1e-12


def test_gig_is_scipys_with_its_moments_and_gradients():
    p, chi, psi = -1.3, 2.0, 0.7
    scipys = st.geninvgauss(p, np.sqrt(chi * psi), scale=np.sqrt(chi / psi))

    def everything(p, chi, psi):
        law = GeneralizedInverseGaussian(p, chi, psi)
        slope = jax.value_and_grad(jax.grad(gig_log_normalizer, 2), 2)(p, chi, psi)
        return law.log_prob(X[1:6]), law.mean, law.variance, *slope

    log_prob, mean, variance, first, second = jax.jit(everything)(p, chi, psi)
    agree(log_prob, scipys.logpdf(X[1:6]), 1e-10)
    agree([mean, variance], [scipys.mean(), scipys.var()], 1e-9)
    # d log Z / d psi = -E[x] / 2, and its second derivative is the variance over four
    agree([first, second], [-0.5 * mean, 0.25 * variance], 1e-10)


def test_gig_draws():
    p, chi, psi = np.transpose([[0.5, 1, 2], [-3, 10, 0.1], [0.1, 1e-3, 1], [2, 0, 3]])

    def drawn(p, chi, psi):
        return GeneralizedInverseGaussian(p, chi, psi).sample(random.key(2), (4000,))

    draws = np.asarray(jax.jit(drawn)(p, chi, psi))
    assert draws.shape == (4000, 4)
    for k in range(3):
        w, scale = np.sqrt(chi[k] * psi[k]), np.sqrt(chi[k] / psi[k])
        scipys = st.geninvgauss(p[k], w, scale=scale)
        grid = np.quantile(draws[:, k], np.linspace(0.0025, 0.9975, 200))
        table = scipys.cdf(grid)  # slow in SciPy: interpolate
        cdf = lambda x, grid=grid, table=table: np.interp(x, grid, table)  # noqa: E731
        inside = draws[(draws[:, k] >= grid[0]) & (draws[:, k] <= grid[-1]), k]
        share = (cdf(inside) - table[0]) / (table[-1] - table[0])
        assert st.kstest(share, "uniform").pvalue > LEVEL
    assert st.kstest(draws[:, 3], st.gamma(2, scale=2 / 3).cdf).pvalue > LEVEL


def test_atoms():
    def everything():
        law = Atoms(jnp.array([1.0, 4.0, 2.0]), jnp.log(jnp.array([2.0, 1.0, 5.0])))
        batch = Atoms(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0.0, -jnp.inf]))
        masses = law.log_prob(jnp.array([4.0, 2.0, 3.0]))
        cdf = law.cdf(jnp.array([0.5, 1.0, 3.0, 4.0]))
        draws = law.sample(random.key(3), (4000,)), batch.sample(random.key(4), (5,))
        return masses, cdf, jnp.stack([law.mean, law.variance]), draws

    masses, cdf, moments, (draws, batch) = jax.jit(everything)()
    agree(masses, [np.log(1 / 8), np.log(5 / 8), -np.inf])
    agree(cdf, [0, 1 / 4, 7 / 8, 1])
    agree(moments, [2.0, (2 * 1 + 1 * 4) / 8])
    counts = np.bincount(np.asarray(draws).astype(int))[[1, 2, 4]]
    assert st.chisquare(counts, 4000 * np.array([2, 5, 1]) / 8).pvalue > LEVEL
    agree(batch, np.tile([1.0, 3.0], (5, 1)))
    with pytest.raises(DataError, match="shape"):
        Atoms(1.0, 0.0)


def test_tabulated_is_the_law_it_tabulates():
    law, far = dist.LogNormal(0.3, 0.8), np.exp(0.3 + 0.8 * 30)  # beyond the last node

    def everything(x, p):
        table = tabulated(law)
        # With a fourth of the nodes shifts that are not central would be seen.
        coarse = Tabulated(table.grid._replace(step=4 * table.grid.step), table.log_weights[::4])
        draws = law.cdf(coarse.sample(random.key(5), (4000,)))
        seen = (table.log_prob(x), table.cdf(x), law.cdf(table.icdf(p)), table.mean, table.variance)
        return (
            seen,
            draws,
            table.log_prob(far / 2) - table.log_prob(far),
            jax.grad(table.log_prob)(far),
        )

    x, p = np.array([0.05, 0.4, 1.0, 1.7, 9.0]), np.array([1e-4, 0.2, 0.5, 0.97])
    (log_prob, cdf, back, mean, variance), draws, fall, slope = jax.jit(everything)(x, p)
    scipys = st.lognorm(0.8, scale=np.exp(0.3))
    agree(log_prob, scipys.logpdf(x), atol=2e-5)
    agree(cdf, scipys.cdf(x), atol=2e-6)
    agree(back, p, atol=2e-6)
    agree([mean, variance], [scipys.mean(), scipys.var()], 1e-10)
    assert st.kstest(np.asarray(draws), "uniform").pvalue > LEVEL
    assert fall > 0
    assert slope < 0


def test_tabulated_keeps_batches_and_supports():
    least, x = np.array([1.0, 3.0]), np.array([[1.2, 3.1], [2.0, 9.0]])

    def everything(least, x):
        table = tabulated(dist.Pareto(least, 2.5))
        back = table.icdf(table.cdf(x))
        draws = table.sample(random.key(6), (7,))
        return table.log_prob(x), table.cdf(x), back, table.mean, draws

    log_prob, cdf, back, mean, draws = jax.jit(everything)(least, x)
    scipys = st.pareto(2.5, scale=least)
    agree(log_prob, scipys.logpdf(x), atol=2e-5)
    agree(cdf, scipys.cdf(x), atol=2e-6)
    agree(back, x, 1e-9)
    agree(mean, scipys.mean(), 1e-9)
    assert draws.shape == (7, 2)
    assert np.all(np.asarray(draws) > least)


@pytest.mark.parametrize(
    ("base", "scipys"),
    [
        (dist.HalfCauchy(2.0), st.halfcauchy(scale=2.0)),
        (dist.HalfNormal(0.5), st.halfnorm(scale=0.5)),
        (dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 1.5)), st.t(3, scale=1.5)),
    ],
)
def test_law_of_a_standard_deviation(base, scipys):
    s2, folded = X[1:6], isinstance(base, dist.FoldedDistribution)

    def everything():
        law = of_standard_deviation(base)
        if folded:
            return law.log_prob(s2), quadrature(law, 0.0, 0.0)
        return law.log_prob(s2), law.cdf(s2), law.cdf(law.sample(random.key(7), (1000,)))

    log_prob, cdf, *draws = jax.jit(everything)()
    twice = np.log(2) if folded else 0.0
    agree(log_prob, twice + scipys.logpdf(np.sqrt(s2)) - np.log(2 * np.sqrt(s2)))
    agree(cdf, 1e-300 if folded else scipys.cdf(np.sqrt(s2)), 1e-11, 1e-12)
    for draw in draws:
        assert st.kstest(np.asarray(draw), "uniform").pvalue > LEVEL


def test_moments_of_squares():
    agree(of_standard_deviation(dist.HalfNormal(0.5)).mean, 0.25)
    assert np.isinf(half_cauchy().mean)
    assert np.isinf(jax.jit(lambda: tabulated(half_cauchy()).mean)())


def test_laws_live_at_sample_sites():
    def model():
        c = numpyro.sample("c", dist.Gamma(2.0, 1.0))
        s2 = numpyro.sample("s2", BurrXII(c, 2.0))
        g = numpyro.sample("g", GeneralizedInverseGaussian(-1.0, s2, 2.0))
        numpyro.sample("a", Atoms(jnp.array([1.0, 2.0]), jnp.zeros(2)), obs=2.0)
        numpyro.sample("t", posterior_law(half_cauchy(), g, 3.0), obs=1.3)

    values = {"c": 2.0, "s2": 0.7, "g": 1.1}
    total = jax.jit(lambda v: log_density(model, (), {}, v)[0])
    slope = jax.grad(total)(values)["g"]
    ends = [total({**values, "g": 1.1 + h}) for h in (-1e-5, 1e-5)]
    agree(slope, (ends[1] - ends[0]) / 2e-5, 1e-6)
    law = jax.tree.map(lambda x: x, BurrXII(2.0, 3.0))  # a pytree
    agree(law.log_prob(1.0), np.log(6 / 16))


def test_arguments_are_validated():
    for make in (
        lambda: BurrXII(-1.0, 2.0, validate_args=True),
        lambda: GeneralizedInverseGaussian(1.0, -1.0, 2.0, validate_args=True),
        lambda: Atoms(jnp.array([-1.0]), jnp.zeros(1), validate_args=True),
    ):
        with pytest.raises(ValueError, match="invalid"):
            make()
    with pytest.raises(DataError, match="support"):
        of_standard_deviation(dist.Normal(0.0, 1.0))
    with pytest.raises(DataError, match="NumPyro"):
        of_standard_deviation(2.0)


# --- integrals over the scale


@jax.jit
def both(alpha, q, n):
    law = dist.InverseGamma(alpha, 2.0)
    return quadrature(law, q, n), log_marginal(law, q, n)


@pytest.mark.parametrize("n", [1, 3, 10, 10**2, 10**3, 10**4, 10**5])
def test_quadrature_is_the_closed_form(n):
    alpha = np.array([0.5, 2.0, 8.0])[:, None]  # 0.5 with n = 1, q = 50: very heavy tails
    ratio = np.array([1e-6, 0.02, 1.0, 50.0, 1e8])  # q / n: also far in the tails of the law
    seen, expected = both(alpha, ratio * n, float(n))
    agree(seen, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "log_evidence", "mean"),
    [
        (lambda: dist.InverseGamma(2.0, 2.0), -8.73612892133042, 1.50425437236158),
        (lambda: BurrXII(2.0, 2.0), -9.12047166031, 1.191557147147),
        (half_cauchy, -9.738232249389, None),
        (lambda: dist.Exponential(1.0), -9.089716610823, None),
        (lambda: GeneralizedInverseGaussian(1.0, 0.0, 2.0), -9.089716610823, None),
        (lambda: dist.Delta(1.0), -8.32477536171817, 1.0),
    ],
)
def test_golden_values(make, log_evidence, mean):
    evidence, seen = jax.jit(
        lambda: (
            log_marginal(make(), Q, N),
            0.0 if mean is None else posterior_law(make(), Q, N).mean,
        )
    )()
    agree(CONSTANT + evidence, log_evidence, atol=1e-11)
    agree(seen, mean or 0.0, 1e-12)


def test_laws_without_data_integrate_to_one():
    def everything():
        laws = [
            BurrXII(0.5, 0.3),  # tails like |f|^-0.3
            dist.Exponential(1e-8),  # far from sigma = 1
            dist.LogNormal(20.0, 0.1),
            dist.Pareto(3.0, 1.5),
            dist.Gamma(0.1, 1.0),
            dist.Beta(2.0, 3.0),
        ]
        return jnp.stack([quadrature(law, 0.0, 0.0) for law in laws])

    agree(jax.jit(everything)(), np.zeros(6), atol=1e-11)


def test_fewer_nodes():
    def errors():
        law = dist.InverseGamma(2.0, 2.0)
        exact = log_marginal(law, Q, N)
        return [jnp.abs(quadrature(law, Q, N, nodes) - exact) for nodes in (17, 65)]

    few, many = jax.jit(errors)()
    assert few > 1e-8
    assert many < 1e-12


def test_derivatives_through_the_quadrature():
    def by_quadrature(x):
        return quadrature(dist.InverseGamma(x[0], x[1]), x[2], 7.0)

    def closed(x):
        return log_marginal(dist.InverseGamma(x[0], x[1]), x[2], 7.0)

    x = jnp.array([1.5, 0.7, 20.0])

    def slopes(f):
        return jax.jit(lambda x: (jax.grad(f)(x), jax.hessian(f)(x)))(x)

    for seen, expected in zip(slopes(by_quadrature), slopes(closed), strict=True):
        agree(seen, expected, 1e-9, 1e-12)


def test_derivative_in_a_moving_support():
    def total(m):
        return log_marginal(dist.Pareto(m, 2.5), 4.0, 3.0)

    slope, below, above = jax.jit(lambda m, h: (jax.grad(total)(m), total(m - h), total(m + h)))(
        1.3, 1e-4
    )
    agree(slope, (above - below) / 2e-4, 1e-7)


def test_batches_and_vmap():
    c, q = jnp.array([1.0, 2.0, 3.0]), jnp.array([[0.5], [9.0]])

    def of_one(c, q):
        return log_marginal(BurrXII(c, 2.0), q, 4.0)

    each = jax.vmap(jax.vmap(of_one, (0, None)), (None, 0))
    whole, single = jax.jit(lambda: (of_one(c, q), each(c, q[:, 0])))()
    assert whole.shape == (2, 3)
    agree(single, whole)


def test_posteriors_stay_in_their_families():
    q, n = 3.0, 5.0
    inverse = posterior_law(dist.InverseGamma(2.0, 1.0), q, n)
    agree([inverse.concentration, inverse.rate], [4.5, 2.5])
    gig = posterior_law(GeneralizedInverseGaussian(1.0, 0.5, 2.0), q, n)
    agree([gig.p, gig.chi, gig.psi], [-1.5, 3.5, 2.0])
    assert isinstance(posterior_law(dist.Delta(2.0), q, n), dist.Delta)
    prior = Atoms(jnp.array([1.0, 2.0]), jnp.log(jnp.array([0.3, 0.7])))
    weights = np.array([0.3, 0.7]) * np.array([1.0, 2.0]) ** (-n / 2) * np.exp([-q / 2, -q / 4])
    agree(jnp.exp(posterior_law(prior, q, n).log_probs), weights / weights.sum())
    agree(log_marginal(prior, q, n), np.log(weights.sum()))


def test_tabulated_posterior_is_the_conjugate_one():
    x = np.array([0.4, 1.0, 3.0])

    def everything():
        table = posterior_law(dist.Exponential(1.0), Q, N)  # quadrature
        gig = posterior_law(GeneralizedInverseGaussian(1.0, 0.0, 2.0), Q, N)
        again = [posterior_law(law, 2.0, 3.0).mean for law in (table, gig)]  # more data
        assert isinstance(table, Tabulated)
        return [(law.mean, law.variance, law.log_prob(x)) for law in (table, gig)], again

    ((mean, variance, log_prob), expected), again = jax.jit(everything)()
    agree([mean, variance], expected[:2], 1e-11)
    agree(log_prob, expected[2], atol=2e-5)
    agree(again[0], again[1], 1e-5)


def test_means_of_laws():
    agree(mean_of(dist.Exponential(0.5)), 2.0)
    agree(mean_of(dist.LeftTruncatedDistribution(dist.Normal(0.0, 1.0))), np.sqrt(2 / np.pi), 1e-9)
    values, log_weights = atoms_of(dist.Delta(3.0))
    agree([values[0], log_weights[0]], [3.0, 0.0])


@pytest.mark.slow
def test_importance_sampling_estimates_the_integral():
    def everything():
        law, bounded = BurrXII(2.0, 2.0), dist.Pareto(1.0, 2.0)
        found = [importance(law, Q, N, random.key(8), 4000, p) for p in ("prior", "matched")]
        many = [importance(law, 1000.0, 1000, random.key(9), 4000, p) for p in ("prior", "matched")]
        outside = importance(bounded, 9.0, 9, random.key(9), 4000, "matched")
        sizes = [estimate.effective_size for estimate in (*found, *many, outside)]
        errors = [estimate.log_marginal - log_marginal(law, Q, N) for estimate in found]
        errors.append(outside.log_marginal - log_marginal(bounded, 9.0, 9))
        return sizes, errors, [estimate.posterior.mean for estimate in found]

    sizes, errors, means = jax.jit(everything)()
    # Relative errors are ESS^-1/2: five of them are a false alarm of 1e-6.
    for k, size in enumerate((sizes[0], sizes[1], sizes[4])):
        assert abs(errors[k]) < 5 / np.sqrt(size)
    agree(means, np.full(2, 1.191557147147), 5 / np.sqrt(min(sizes[:2])))
    # The loss of the prior as a proposal, for 1000 data: ESS = S p sqrt(8 pi / n).
    density = st.burr12.pdf(1.0, 2.0, 2.0)
    agree(sizes[2], 4000 * density * np.sqrt(8 * np.pi / 1000), 0.3)
    agree(sizes[3], 4000 * np.sqrt(3) / 2, 0.03)  # a normal from one of twice its variance


def test_what_cannot_be_a_law_is_refused():
    for law, text in [
        (2.0, "NumPyro distribution"),
        (dist.Normal(0.0, 1.0), "positive support"),
        (dist.Uniform(-1.0, 1.0), "positive support"),
        (dist.Poisson(3.0), "Atoms"),
        (dist.Delta(-1.0), "positive support"),
        (dist.Dirichlet(jnp.ones(3)), "event"),
    ]:
        with pytest.raises(DataError, match=text):
            log_marginal(law, 1.0, 1.0)
    with pytest.raises(OptionError, match="at least 9"):
        log_marginal(BurrXII(2.0, 2.0), 1.0, 1.0, nodes=8)
    with pytest.raises(OptionError, match="proposal"):
        importance(BurrXII(2.0, 2.0), 1.0, 1.0, random.key(0), proposal="best")


def test_single_precision():
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = jax.jit(lambda: quadrature(dist.InverseGamma(2.0, 2.0), Q, N))()
        assert seen.dtype == jnp.float32
        agree(CONSTANT + float(seen), -8.73612892133042, atol=2e-5)
