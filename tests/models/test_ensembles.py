"""Ensembles of trained, infinitely wide networks: against the flow's matrix exponential and SciPy.

Draws are tested at fixed seeds: a correct sampler fails at a new seed with probability 1e-3 a test.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats as st

from ppl_toolkit.errors import DataError, MethodError, ModelError, OptionError
from ppl_toolkit.models.ensembles import gradient_descent_ensemble
from ppl_toolkit.models.infinite_width import Dense, Erf, ReLU, Residual, Serial, mlp
from ppl_toolkit.models.location_scale import LocationScaleMixture
from ppl_toolkit.models.scale_tables import Atoms

LEVEL = 1e-3  # false alarms of the tests on draws
rng = np.random.default_rng(2)
X, X_NEW, Y = rng.normal(size=(6, 2)), rng.normal(size=(3, 2)), rng.normal(size=6)
NETWORK = mlp(2, Erf(), weight_std=1.4, bias_std=0.3)
OLD, ACROSS, NEW = NETWORK.kernels(X), NETWORK.kernels(X_NEW, X), NETWORK.kernels(X_NEW)
ALPHA, BETA, TIME = 3.0, 2.0, 9.0
LAW = dist.InverseGamma(ALPHA, BETA)
VALUE = np.array([[-0.4, 0.1, 1.3], [2.0, -2.0, 0.0]])  # of one shape: programs are compiled once


@functools.cache
def ensemble(law=LAW, **options):
    return gradient_descent_ensemble(NETWORK, X, Y, X_NEW, law=law, **options)


def direct(s, time, trained="all", ridge=0.0):
    """Mean and covariance by the formulas, with N = 6 targets."""
    theta, theta_across = (OLD.ntk, ACROSS.ntk) if trained == "all" else (OLD.nngp, ACROSS.nngp)
    theta = theta + ridge * np.eye(6)
    left = 0 if time is None else scipy.linalg.expm(-s * time / 6 * theta)
    g = theta_across @ np.linalg.solve(theta, np.eye(6) - left)
    half = g @ ACROSS.nngp.T
    return g @ Y, s * (NEW.nngp + g @ OLD.nngp @ g.T - half - half.T)


def over_law(function, law=None):
    """The integral of a function of s under an inverse gamma law, on a fine grid of log s."""
    log_s = np.linspace(-4, 20, 241)
    weights = (law or st.invgamma(ALPHA, scale=BETA)).pdf(np.exp(log_s)) * np.exp(log_s)
    values = np.stack([function(s) for s in np.exp(log_s)])
    return scipy.integrate.trapezoid(np.moveaxis(values, 0, -1) * weights, log_s)


def agree(seen, expected, rtol=1e-12, atol=1e-13):
    assert isinstance(seen, np.ndarray)
    assert seen.dtype == np.float64
    np.testing.assert_allclose(seen, expected, rtol=rtol, atol=atol)


# --- given sigma^2


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize(
    ("time", "trained"),
    [(TIME, "all"), (TIME, "last"), (None, "all"), (None, "last"), (0.0, "all")],
)
def test_given_the_scale_the_formulas_hold(time, trained, ridge):
    e = ensemble(time=time, trained=trained, ridge=ridge)
    for s in (0.3, 2.0):
        mean, covariance = direct(s, time, trained, ridge)
        agree(e.mean(s), mean, 1e-10)
        agree(e.covariance(s), covariance, 1e-10, 1e-12)


def test_several_scales_at_once():
    e, s = ensemble(time=TIME), np.array([[0.3], [2.0]])
    agree(e.variance(s)[1, 0], np.diag(direct(2.0, TIME)[1]), 1e-10)
    for method, shape in ((e.mean, (3,)), (e.covariance, (3, 3))):
        seen = method(s)
        assert seen.shape == (2, 1, *shape)
        agree(seen[1, 0], method(2.0))


def test_the_learning_rate_multiplies_the_time():
    agree(ensemble(time=TIME, learning_rate=0.5).mean(1.1), direct(1.1, TIME / 2)[0], 1e-10)


def test_the_scale_moves_the_output_not_the_tangent_kernel_twice():
    # The linear flow itself: f = sigma g, weights follow the gradient of |f - y|^2 / 2n.
    s, time, features = 1.7, 4.0, np.linalg.cholesky(np.block(
        [[OLD.ntk, ACROSS.ntk.T], [ACROSS.ntk, NEW.ntk]]))  # fmt: skip
    jacobian, jacobian_new = np.sqrt(s) * features[:6], np.sqrt(s) * features[6:]
    f0 = rng.normal(size=9)

    def slope(_, weights):
        return -jacobian.T @ (f0[:6] + jacobian @ weights - Y) / 6

    moved = scipy.integrate.solve_ivp(slope, (0, time), np.zeros(9), rtol=1e-10, atol=1e-12)
    f = f0[6:] + jacobian_new @ moved.y[:, -1]
    e = ensemble(time=time)
    g = np.asarray((e.across * e._gain(s)) @ np.linalg.eigh(OLD.ntk)[1].T)
    np.testing.assert_allclose(f, f0[6:] + g @ (Y - f0[:6]), rtol=1e-5)
    np.testing.assert_allclose(g @ Y, e.mean(s), rtol=1e-5)


def test_infinite_time_is_the_limit():
    late, end = ensemble(time=1e9), ensemble()
    agree(late.mean(0.7), end.mean(0.7), 1e-9)
    agree(late.covariance(0.7), end.covariance(0.7), 1e-8, 1e-10)
    agree(ensemble(time=np.inf).mean(), end.mean())


# --- over the law of sigma^2


@pytest.mark.parametrize("trained", ["all", "last"])
@pytest.mark.slow
def test_at_infinite_time_degrees_of_freedom_stay(trained):
    e = ensemble(trained=trained)
    mean, c = direct(1.0, None, trained)
    expected = st.t(2 * ALPHA, mean, np.sqrt(BETA / ALPHA * np.diag(c)))
    agree(e.log_density(VALUE), expected.logpdf(VALUE), 1e-8)
    agree(e.cdf(VALUE), expected.cdf(VALUE), 1e-8)
    agree(e.quantile(0.975), expected.ppf(0.975), 1e-8)
    agree(e.mean(), mean, 1e-10)
    agree(e.variance(), expected.var(), 1e-8)
    agree(e.covariance(), BETA / (ALPHA - 1) * c, 1e-8, 1e-12)
    with jax.enable_x64(True):
        joint = jax.jit(e.joint.log_prob)(VALUE)
    together = st.multivariate_t(mean, BETA / ALPHA * c, df=2 * ALPHA).logpdf(VALUE)
    np.testing.assert_allclose(joint, together, rtol=1e-7)


def test_at_time_zero_it_is_the_prior():
    prior = st.t(2 * ALPHA, 0, np.sqrt(BETA / ALPHA * np.diag(NEW.nngp)))
    for time in (0.0, 1e-12):
        e = ensemble(time=time)
        agree(e.mean(), np.zeros(3), atol=1e-11)
        agree(e.log_density(VALUE), prior.logpdf(VALUE), 1e-9)
        agree(e.cdf(VALUE), prior.cdf(VALUE), 1e-9)
        agree(e.variance(), BETA / (ALPHA - 1) * np.diag(NEW.nngp), 1e-9)


def test_at_finite_time_the_law_is_the_integral_over_the_scale():
    e = ensemble(time=TIME)

    def parts(s):
        mean, covariance = direct(s, TIME)
        normal = st.norm(mean, np.sqrt(np.diag(covariance)))
        both = np.stack([mean, mean**2 + normal.var()])
        return np.stack([normal.pdf(VALUE), normal.cdf(VALUE), both])

    density, cdf, (mean, square) = over_law(parts)
    agree(e.log_density(VALUE), np.log(density), 1e-9)
    agree(e.cdf(VALUE), cdf, 1e-9)
    agree(e.mean(), mean, 1e-9)
    agree(e.variance(), square - mean**2, 1e-9)
    agree(np.diag(e.covariance()), e.variance(), 1e-9)
    assert np.ptp([e.mean(s) for s in (0.1, 1.0)], axis=0).max() > 0.05  # a location that moves


def test_quantiles_invert_the_distribution_function():
    e = ensemble(time=TIME)
    p = np.array([1e-12, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-6])[:, None]
    agree(e.cdf(e.quantile(p)), np.broadcast_to(p, (6, 3)), 1e-10)
    prior, far = ensemble(time=1e-12), np.full((6, 1), 2.0**-40)  # symmetric, in both tails
    agree(-prior.quantile(1 - far), prior.quantile(far), 1e-9)
    ends = e.quantile(np.array([[0.0], [1.0]]))
    assert (ends == [[-np.inf], [np.inf]]).all()


def test_heavy_tails_of_the_scale():
    # E[sigma^2] is finite, yet a ten-thousandth of it is beyond the last node; then infinite.
    law = st.invgamma(1.2, scale=1.0)
    e = ensemble(dist.InverseGamma(1.2, 1.0), time=TIME)
    # E[s c(s)] = E[s] c(end) + E[s (c(s) - c(end))], where c(s) is settled beyond s = 1e5
    end = np.diag(direct(1.0, None)[1])

    def parts(s):
        mean, covariance = direct(s, TIME) if s < 1e5 else (direct(1.0, None)[0], s * np.diag(end))
        return np.stack([np.diag(covariance) - s * end, mean, mean**2])

    rest, mean, square = over_law(parts, law)
    agree(e.variance(), 5.0 * end + rest + square - mean**2, 1e-7)
    assert np.isinf(ensemble(dist.InverseGamma(0.9, 1.0), time=TIME).variance()).all()


def test_finitely_many_scales():
    values, shares = np.array([2.0, 0.4]), np.array([0.3, 0.7])
    e = ensemble(Atoms(values, np.log(shares)), time=TIME)
    normals = [st.norm(m, np.sqrt(np.diag(c))) for m, c in (direct(s, TIME) for s in values)]
    expected = np.tensordot(shares, [n.cdf(VALUE) for n in normals], 1)
    agree(e.cdf(VALUE), expected, 1e-6)  # Atoms were made in JAX's float32


def test_one_scale_for_all():
    mean, covariance = direct(0.4, None)
    agree(ensemble(0.4).mean(), mean, 1e-10)
    agree(ensemble(0.4).covariance(), covariance, 1e-8)


# --- samples


def test_samples_share_the_scale_of_their_network():
    draws = ensemble().sample(3, 1000)
    mean, c = direct(1.0, None)
    q = np.einsum("ki,ij,kj->k", draws - mean, np.linalg.inv(BETA / ALPHA * c), draws - mean) / 3
    assert st.kstest(q, st.f(3, 2 * ALPHA).cdf).pvalue > LEVEL


def test_samples_at_finite_time():
    e = ensemble(time=TIME)
    draws = e.sample(5, 1000)
    for level in e.cdf(draws).T:
        assert st.kstest(level, "uniform").pvalue > LEVEL / 3
    np.testing.assert_array_equal(e.sample(5, 1000), draws)


def test_the_law_is_that_of_linearised_networks():
    # Outputs at old and new inputs follow df = -(s / n) [Theta; Theta*] (f - y) dt, from N(0, s K).
    count = 1000
    root = np.linalg.cholesky(np.block([[OLD.nngp, ACROSS.nngp.T], [ACROSS.nngp, NEW.nngp]]))
    s = st.invgamma(ALPHA, scale=BETA).rvs(count, random_state=rng)
    start = np.sqrt(s)[:, None] * (rng.normal(size=(count, 9)) @ root.T)
    flow = np.zeros((10, 10))  # of (f, f*, 1)
    flow[:9, :6] = -np.vstack([OLD.ntk, ACROSS.ntk]) / 6
    flow[:9, 9] = -flow[:9, :6] @ Y
    moved = scipy.linalg.expm(TIME * s[:, None, None] * flow)
    f = np.einsum("kij,kj->ki", moved, np.hstack([start, np.ones((count, 1))]))[:, 6:9]
    e = ensemble(time=TIME)
    z = np.linalg.solve(np.linalg.cholesky(e.covariance(s)), (f - e.mean(s))[..., None])[..., 0]
    # Given sigma^2 standard normal: means, and the products of pairs
    assert st.chi2(3).sf(count * (z.mean(0) ** 2).sum()) > LEVEL / 3
    products = (z.T @ z / count - np.eye(3)) / np.sqrt((1 + np.eye(3)) / count)
    assert np.abs(products).max() < st.norm.isf(LEVEL / 3 / 12)  # six of them, both sides
    for level in e.cdf(f).T:  # and over the law of sigma^2
        assert st.kstest(level, "uniform").pvalue > LEVEL / 9


# --- JAX arrays, and what cannot be used


def test_jax_arrays_are_traced():
    def mean(time):
        e = gradient_descent_ensemble(NETWORK, jnp.asarray(X), Y, X_NEW, law=LAW, time=time)
        return e.mean(1.3)

    with jax.enable_x64(True):
        value, slope = jax.jit(lambda t: jax.jvp(mean, (t,), (jnp.ones(()),)))(TIME)
    assert isinstance(value, jax.Array)
    np.testing.assert_allclose(value, direct(1.3, TIME)[0], rtol=1e-10)
    rate = 1.3 / 6  # d G / dt = rate Theta* exp(-rate t Theta)
    expected = rate * ACROSS.ntk @ scipy.linalg.expm(-rate * TIME * OLD.ntk) @ Y
    np.testing.assert_allclose(slope, expected, rtol=1e-9)


def test_quantiles_are_differentiable():
    values, weights, locs = np.array([0.5, 2.0]), np.log([0.4, 0.6]), np.array([-1.0, 0.7])

    def quantile(shift, factor):
        law = LocationScaleMixture(
            LAW, values, weights, shift + factor * locs, factor**2 * np.array([0.3, 0.2])
        )
        return law.icdf(0.8)

    with jax.enable_x64(True):
        value, slopes = jax.jit(jax.value_and_grad(quantile, (0, 1)))(0.0, 1.0)
    np.testing.assert_allclose(slopes, (1.0, value), rtol=1e-10)


def test_inputs_given_twice():
    twice = np.vstack([X[:5], X[:1]])
    with pytest.raises(DataError, match=r"positive definite.*ridge="):
        gradient_descent_ensemble(NETWORK, twice, Y, X_NEW, law=LAW)
    for options in ({"time": 50.0}, {"ridge": 1e-3}):
        e = gradient_descent_ensemble(NETWORK, twice, Y, X_NEW, law=LAW, **options)
        assert np.isfinite(e.mean(1.0)).all()
        assert np.isfinite(e.sample(3, 1000)).all()
    late = gradient_descent_ensemble(NETWORK, twice, Y, X_NEW, law=LAW, time=1e25).mean(1.0)
    old, across = NETWORK.ntk(twice), NETWORK.ntk(X_NEW, twice)
    agree(late, across @ np.linalg.pinv(old, rcond=1e-13) @ Y, 1e-8)

    def traced(x):
        return gradient_descent_ensemble(NETWORK, x, Y, X_NEW, law=LAW).mean(1.0)

    with jax.enable_x64(True):
        assert np.isnan(jax.jit(traced)(twice)).all()


def test_outputs_that_the_targets_fix():
    e = gradient_descent_ensemble(NETWORK, X, Y, X[2:5], law=LAW)
    agree(e.mean(), Y[2:5], 1e-9)
    assert (e.variance() < 1e-9).all()
    assert (e.log_density(np.stack([Y[2:5]] * 2)) > 5).all()  # not NaN


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (OptionError, "trained", {"trained": "first"}),
        (OptionError, "time", {"time": -1.0}),
        (OptionError, "time", {"time": float("nan")}),
        (OptionError, "learning_rate", {"learning_rate": 0.0}),
        (OptionError, "ridge", {"ridge": -0.1}),
        (OptionError, "nodes", {"nodes": 3}),
        (DataError, "law must be", {"law": -1.0}),
        (DataError, "law must be", {"law": "gamma"}),
        (DataError, "positive", {"law": dist.Normal()}),
        (DataError, "batch shape", {"law": dist.InverseGamma(np.ones(2), 1.0)}),
        (DataError, "one target", {"y": Y[:3]}),
        (DataError, "not finite", {"y": np.append(Y[:5], np.nan)}),
        (DataError, "same features", {"x_new": np.ones((2, 3))}),
        (DataError, "x must have shape", {"x": X[0]}),
        (ModelError, "ends in weights", {"network": Serial(Dense(), ReLU())}),
        (ModelError, "ends in weights", {"network": "mlp"}),
        (
            ModelError,
            "last layer",
            {"network": Serial(Dense(), Residual(Serial(ReLU(), Dense()))), "trained": "last"},
        ),
    ],
)
def test_bad_input_is_explained(error, match, change):
    given = {"network": NETWORK, "x": X, "y": Y, "x_new": X_NEW, "law": LAW, "time": 1.0}
    with pytest.raises(error, match=match):
        gradient_descent_ensemble(**{**given, **change})


def test_bad_questions_are_explained():
    e = ensemble(time=TIME)
    with pytest.raises(MethodError, match="no scale mixture"):
        _ = e.joint
    with pytest.raises(DataError, match="sigma2 must be positive"):
        e.mean(-1.0)
    with pytest.raises(OptionError, match="draws"):
        e.sample(0, 0)
