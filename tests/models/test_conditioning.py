"""Scale mixtures given data, against dense formulas, refits, the chain rule and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import integrate, stats

from ppl_toolkit.errors import DataError, InferenceWarning, OptionError
from ppl_toolkit.models.infinite_width import mlp
from ppl_toolkit.models.scale_mixture import (
    Atoms,
    BurrXII,
    fit,
    fit_fixed_noise,
    of_standard_deviation,
)

# The fixture of the specification: golden values below are its.
ROWS = np.arange(8)
X = np.sin(0.7 * ROWS[:, None] + 1.3 * np.arange(3))
Y = np.cos(1.1 * ROWS)
X_NEW = X[:3] + 0.15
NETWORK = mlp(3, weight_std=1.4, bias_std=0.3)
NOISE = 0.1
GAMMA = dist.InverseGamma(2.0, 2.0)
GOLDEN = {
    "gaussian": (dist.Delta(1.0), -8.32477536171817),
    "inverse gamma": (GAMMA, -8.73612892133042),
    "burr": (BurrXII(2.0, 2.0), -9.12047166031),
    "half-Cauchy": (of_standard_deviation(dist.HalfCauchy(1.0)), -9.738232249389),
    "exponential": (dist.Exponential(1.0), -9.089716610823),
}
LAWS = {name: law for name, (law, _) in GOLDEN.items()} | {
    "atoms": Atoms(np.array([0.5, 1.0, 4.0]), np.log([0.2, 0.5, 0.3]))
}
FITTED = {}


def fitted(law):
    """One factor for all laws."""
    if not FITTED:
        FITTED["one"] = fit(NETWORK, X, Y, noise=NOISE)
    return FITTED["one"].with_law(law)


def dense(x=X):
    return NETWORK.nngp(x) + NOISE * np.eye(len(x))


@pytest.mark.parametrize("name", GOLDEN)
def test_evidences_have_the_golden_values(name):
    law, golden = GOLDEN[name]
    np.testing.assert_allclose(fitted(law).log_evidence, golden, rtol=0, atol=1e-11)


def test_the_posterior_of_the_scale():
    np.testing.assert_allclose(fitted(GAMMA).scale.mean, 1.50425437236158, rtol=1e-13)
    np.testing.assert_allclose(fitted(BurrXII(2.0, 2.0)).scale.mean, 1.191557147147, rtol=1e-12)
    q = Y @ np.linalg.solve(dense(), Y)
    np.testing.assert_allclose(fitted(GAMMA).profiled_scale, q / 8, rtol=1e-12)
    # The law of an inverse gamma scale stays inverse gamma.
    reference = stats.invgamma(2 + 4, scale=2 + q / 2)
    points = np.array([0.5, 1.0, 3.0])
    np.testing.assert_allclose(fitted(GAMMA).scale.cdf(points), reference.cdf(points), rtol=1e-10)


def test_a_student_process_is_scipys():
    reference = stats.multivariate_t(np.zeros(8), dense(), df=4)
    np.testing.assert_allclose(fitted(GAMMA).log_evidence, reference.logpdf(Y), atol=1e-10)


def test_predictions_of_a_student_process():
    """Location m*, scale (2 beta + q) / (2 alpha + n) C*, 2 alpha + n degrees of freedom."""
    inverse = np.linalg.inv(dense())
    across, q = NETWORK.nngp(X_NEW, X), Y @ inverse @ Y
    covariance = NETWORK.nngp(X_NEW) + NOISE * np.eye(3) - across @ inverse @ across.T
    scale = np.sqrt((4 + q) / 12 * np.diag(covariance))
    reference = stats.t(12, across @ inverse @ Y, scale)
    found = fitted(GAMMA).predict(X_NEW)
    values = np.array([-1.0, 0.3, 2.0])
    np.testing.assert_allclose(found.mean, reference.mean(), rtol=1e-10)
    np.testing.assert_allclose(found.variance, reference.var(), rtol=1e-10)
    np.testing.assert_allclose(found.log_density(values), reference.logpdf(values), rtol=1e-9)
    np.testing.assert_allclose(found.cdf(values), reference.cdf(values), rtol=1e-9)
    low, high = found.interval(0.8)
    np.testing.assert_allclose(low, reference.ppf(0.1), rtol=1e-9)
    np.testing.assert_allclose(high, reference.ppf(0.9), rtol=1e-9)
    joint = stats.multivariate_t(reference.mean(), (4 + q) / 12 * covariance, df=12)
    np.testing.assert_allclose(
        fitted(GAMMA).joint_log_density(X_NEW, values), joint.logpdf(values), atol=1e-8
    )


def test_without_noise_the_function_has_less_variance():
    found, function = fitted(GAMMA).predict(X_NEW), fitted(GAMMA).predict(X_NEW, of="f")
    noise = NOISE * fitted(GAMMA).scale.mean
    np.testing.assert_allclose(found.variance - function.variance, noise, rtol=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_the_mean_is_that_of_the_gaussian_process(name):
    np.testing.assert_allclose(
        fitted(LAWS[name]).predict(X_NEW).mean, fitted(dist.Delta(1.0)).predict(X_NEW).mean,
        rtol=1e-12,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["half-Cauchy", "inverse gamma", "burr", "exponential", "gaussian", "atoms"]
)
def test_the_chain_rule_and_leave_one_out_by_refits(name):
    law = LAWS[name]
    densities = fitted(law).leave_one_out_log_densities()
    np.testing.assert_allclose(
        fitted(law).leave_one_out().log_density(Y), densities, rtol=0, atol=1e-10
    )
    left = 5
    others = np.delete(ROWS, left)
    rest = fit(NETWORK, X[others], Y[others], noise=NOISE, law=law)
    one = X[[left]], Y[[left]]
    single = rest.predict(one[0]).log_density(one[1])[0]
    np.testing.assert_allclose(single, densities[left], rtol=0, atol=1e-9)
    gained = fitted(law).log_evidence - rest.log_evidence
    np.testing.assert_allclose(gained, densities[left], rtol=0, atol=1e-9)
    np.testing.assert_allclose(rest.joint_log_density(*one), gained, rtol=0, atol=1e-8)


def test_the_golden_sum_of_leave_one_out():
    total = fitted(GAMMA).leave_one_out_log_densities().sum()
    np.testing.assert_allclose(total, -6.242903508669, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_one_step_predictions_multiply_to_the_evidence():
    """p(y_1) p(y_2 | y_1) ..., for a law without a closed form."""
    law = LAWS["half-Cauchy"]
    first = fit(NETWORK, X[:5], Y[:5], noise=NOISE, law=law)
    total = first.log_evidence + sum(
        fit(NETWORK, X[:i], Y[:i], noise=NOISE, law=law).predict(X[[i]]).log_density(Y[[i]])[0]
        for i in range(5, 8)
    )
    np.testing.assert_allclose(total, fitted(law).log_evidence, rtol=0, atol=1e-9)


def test_a_concentrated_law_is_a_gaussian_process():
    """The difference falls like 1 / alpha."""
    exact = fitted(dist.Delta(1.0)).log_evidence
    gaps = [fitted(dist.InverseGamma(a, a)).log_evidence - exact for a in (1e2, 1e4, 1e6)]
    np.testing.assert_allclose(gaps[0] / gaps[1], 100, rtol=0.1)
    np.testing.assert_allclose(gaps[1] / gaps[2], 100, rtol=1e-2)


def test_scaling_the_targets():
    """y -> c y with beta -> c^2 beta: -n log c in the evidence, c in the predictions."""
    c = 3.0
    larger = fit(NETWORK, X, c * Y, noise=NOISE, law=dist.InverseGamma(2.0, 2.0 * c**2))
    np.testing.assert_allclose(
        larger.log_evidence, fitted(GAMMA).log_evidence - 8 * np.log(c), rtol=1e-12
    )
    np.testing.assert_allclose(
        larger.predict(X_NEW).quantile(0.9), c * fitted(GAMMA).predict(X_NEW).quantile(0.9),
        rtol=1e-10,
    )  # fmt: skip


def test_scaling_the_kernel():
    """(K, noise, beta) -> (c K, c noise, beta / c) changes nothing: the flat direction."""
    c = 2.5
    other = fit(
        mlp(3, weight_std=1.4, bias_std=0.3, readout_std=np.sqrt(c)), X, Y, noise=c * NOISE,
        law=dist.InverseGamma(2.0, 2.0 / c),
    )  # fmt: skip
    np.testing.assert_allclose(other.log_evidence, fitted(GAMMA).log_evidence, rtol=1e-12)


def test_no_law_beats_the_profiled_scale():
    """Type-II maximum likelihood over the law collapses to a point at q / n."""
    best = fitted(GAMMA).profiled_log_evidence
    q_n = fitted(GAMMA).profiled_scale
    along = [fitted(dist.InverseGamma(a, a * q_n)).log_evidence for a in (1.0, 10.0, 1e3, 1e5)]
    assert np.all(np.diff(along) > 0)
    assert along[-1] < best < along[-1] + 1e-3


def test_draws_share_their_scale():
    """Extremes at two inputs come together: the joint law, not only the marginals.

    P(both far out) is 0.0057 for a bivariate t with 4 degrees of freedom and correlation 0.6 beyond
    4 on both sides, and 0.0041 for independent t's under the same factor. 5 standard errors of
    40,000 draws: false alarms once in two million.
    """
    law = dist.InverseGamma(2.0, 2.0)
    from ppl_toolkit.models.scale_mixture import ScaleMixtureProcess

    with jax.enable_x64(True):
        root = np.linalg.cholesky(np.array([[1.0, 0.6], [0.6, 1.0]]))
        draws = np.asarray(
            ScaleMixtureProcess(law, jnp.asarray(root)).sample(jax.random.key(0), (40000,))
        )
    both = np.mean(np.all(np.abs(draws) > 4, axis=1))
    error = np.sqrt(0.0057 / 40000)
    assert abs(both - 0.0057) < 5 * error
    assert abs(both - 0.0041) > 3 * error


@pytest.mark.slow
def test_joint_draws_of_predictions_share_their_scale():
    joint = fit(NETWORK, X[:1], Y[:1], noise=NOISE).sample(X_NEW[:2], 40000)
    ranks = np.abs(joint - np.median(joint, 0)) / np.std(joint, 0)
    together = np.mean(np.all(ranks > 3, axis=1))
    apart = np.prod(np.mean(ranks > 3, axis=0))
    assert together > 5 * apart


def test_importance_sampling_comes_to_the_same():
    from ppl_toolkit.models.scale_mixture import importance

    one = fitted(BurrXII(2.0, 2.0))
    with jax.enable_x64(True):
        q, log_determinant, n = one.conditioned.statistics
        found = importance(one.conditioned.prior, q, float(n), jax.random.key(1), 20000)
        estimate = float(-0.5 * (n * np.log(2 * np.pi) + log_determinant) + found.log_marginal)
        # The standard error of a log mean of weights: sqrt(1 / ESS - 1 / S); 5 of them.
        error = np.sqrt(1 / found.effective_size - 1 / 20000)
    assert abs(estimate - one.log_evidence) < 5 * error
    assert error < 0.02


# -- noise with a variance of its own ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inverse gamma", "burr"])
def test_evidence_with_fixed_noise(name):
    law = LAWS[name]
    density = stats.invgamma(2, scale=2) if name == "inverse gamma" else stats.burr12(2, 2)
    kernel = NETWORK.nngp(X)

    def integrand(t):
        covariance = np.exp(t) * kernel + NOISE * np.eye(8)
        likelihood = stats.multivariate_normal(np.zeros(8), covariance).pdf(Y)
        return likelihood * density.pdf(np.exp(t)) * np.exp(t)

    exact = np.log(integrate.quad(integrand, -12, 12, epsabs=1e-14, limit=400)[0])
    found = fit_fixed_noise(NETWORK, X, Y, noise=NOISE, law=law)
    np.testing.assert_allclose(found.log_evidence, exact, rtol=0, atol=1e-10)
    rest = fit_fixed_noise(NETWORK, X[:-1], Y[:-1], noise=NOISE, law=law)
    np.testing.assert_allclose(
        rest.predict(X[-1:]).log_density(Y[-1:])[0], exact - rest.log_evidence, rtol=0, atol=1e-9
    )


def test_moments_with_fixed_noise_are_those_given_the_data():
    """Means and variances over sigma^2 given the data, by a fine grid of log sigma^2."""
    law, kernel = stats.burr12(2, 2), NETWORK.nngp(X)
    across, own = NETWORK.nngp(X_NEW, X), NETWORK.variances(X_NEW).nngp
    parts = []
    for t in np.linspace(-9, 9, 1201):
        s2 = np.exp(t)
        covariance = s2 * kernel + NOISE * np.eye(8)
        weight = stats.multivariate_normal(np.zeros(8), covariance).pdf(Y) * law.pdf(s2) * s2
        gain = s2 * across @ np.linalg.inv(covariance)
        parts.append((weight, gain @ Y, s2 * own - s2 * np.sum(gain * across, 1) + NOISE))
    weights, means, variances = (np.array(x) for x in zip(*parts, strict=True))
    weights /= weights.sum()
    mean = weights @ means
    found = fit_fixed_noise(NETWORK, X, Y, noise=NOISE, law=LAWS["burr"]).predict(X_NEW)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-7)
    exact = weights @ (variances + (means - mean) ** 2)
    np.testing.assert_allclose(found.variance, exact, rtol=1e-6)


def test_fixed_noise_with_one_scale_is_a_gaussian_process():
    found = fit_fixed_noise(NETWORK, X, Y, noise=NOISE, law=dist.Delta(1.3))
    covariance = 1.3 * NETWORK.nngp(X) + NOISE * np.eye(8)
    np.testing.assert_allclose(
        found.log_evidence, stats.multivariate_normal(np.zeros(8), covariance).logpdf(Y),
        rtol=1e-12,
    )  # fmt: skip
    across = 1.3 * NETWORK.nngp(X_NEW, X)
    prediction = found.predict(X_NEW, of="f")
    np.testing.assert_allclose(prediction.mean, across @ np.linalg.solve(covariance, Y), rtol=1e-10)
    variance = 1.3 * NETWORK.variances(X_NEW).nngp - np.sum(
        across * np.linalg.solve(covariance, across.T).T, axis=1
    )
    np.testing.assert_allclose(prediction.variance, variance, rtol=1e-9)
    again = found.with_noise(0.3)
    other = fit_fixed_noise(NETWORK, X, Y, noise=0.3, law=dist.Delta(1.3))
    np.testing.assert_allclose(again.log_evidence, other.log_evidence, rtol=1e-12)


# -- what cannot be done -----------------------------------------------------------------------

NAN_ROW = np.where(ROWS[:, None] == 3, np.nan, X)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"X": NAN_ROW}, DataError, "first in row 3"),
        ({"X": X[:, 0]}, DataError, r"X\[:, None\]|x\[:, None\]"),
        ({"y": Y[:3]}, DataError, r"\(8,\)"),
        ({"y": np.where(ROWS == 2, np.inf, Y)}, DataError, "first in row 2"),
        ({"y": 0 * Y}, DataError, "nothing of a scale"),
        ({"y": ["a"] * 8}, DataError, "real numbers"),
        ({"y": Y * 1j}, DataError, "real numbers"),
        ({"noise": -0.1}, OptionError, "at least 0"),
        ({"noise": np.nan}, OptionError, "at least 0"),
        ({"law": dist.Normal(0.0, 1.0)}, DataError, "positive support"),
        ({"law": "burr"}, DataError, "NumPyro distribution"),
        ({"law": dist.InverseGamma(np.ones(3), 1.0)}, DataError, "batch"),
    ],
)
def test_bad_input(change, error, says):
    with pytest.raises(error, match=says):
        fit(**({"network": NETWORK, "X": X, "y": Y, "noise": NOISE} | change))


def test_bad_questions():
    one = fitted(GAMMA)
    for ask, error in (
        (lambda: one.predict(X_NEW[:, :2]), DataError),
        (lambda: one.predict(X_NEW, of="z"), OptionError),
        (lambda: one.predict(X_NEW).quantile(1.5), OptionError),
        (lambda: one.predict(X_NEW).log_density(np.ones(5)), DataError),
        (lambda: one.predict(X_NEW).interval(2.0), OptionError),
        (lambda: one.with_law(3), DataError),
        (lambda: fit_fixed_noise(NETWORK, X, Y, noise=0.0), OptionError),
    ):
        with pytest.raises(error):
            ask()


def test_repeated_rows_without_noise_get_a_recorded_jitter():
    twice = np.r_[X, X[:2]], np.r_[Y, Y[:2]]
    with pytest.warns(InferenceWarning, match="2 of 10 rows of X repeat"):
        found = fit(NETWORK, *twice, noise=0.0)
    assert 0 < found.jitter < 1e-3
    np.testing.assert_allclose(found.conditioned.noise, found.jitter)
    assert fitted(GAMMA).jitter == 0


def test_a_mean_that_does_not_exist_is_refused():
    from ppl_toolkit.models.scale_mixture import Predictive, ScaleMixtureNormal

    heavy = Predictive(ScaleMixtureNormal(dist.InverseGamma(0.5, 1.0), np.zeros(2), 1.0))
    with pytest.raises(DataError, match=r"quantile\(0.5\)"):
        _ = heavy.mean
    np.testing.assert_allclose(heavy.quantile(0.5), 0, atol=1e-12)
    assert np.all(np.isinf(Predictive(
        ScaleMixtureNormal(dist.InverseGamma(0.9, 1.0), np.zeros(2), 1.0)).variance))  # fmt: skip


def test_one_factor_serves_all_laws():
    chosen = ("gaussian", "inverse gamma", "burr")
    table = fitted(GAMMA).compare({name: LAWS[name] for name in chosen})
    assert table.index[0] == "gaussian"
    np.testing.assert_allclose(table.loc["burr", "log_evidence"], -9.12047166031, atol=1e-10)
    np.testing.assert_allclose(table.loc["inverse gamma", "elpd_loo"], -6.242903508669, atol=1e-10)
