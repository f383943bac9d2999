"""Laplace's approximation: exact on normal posteriors; Hessians, and what has none."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet
from models import EFFECTS, ERRORS, eight_schools
from scipy import integrate, stats

import ppl_toolkit as ppl
from ppl_toolkit import results
from ppl_toolkit.errors import OptionError, SamplingError
from ppl_toolkit.inference import Laplace
from ppl_toolkit.inference.laplace import Curvature, hessian
from ppl_toolkit.program import Program

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 4)) @ RNG.normal(size=(4, 4))
Y = X @ np.array([1.0, -2.0, 0.5, 0.0]) + 0.7 * RNG.normal(size=30)
NOISE, PRIOR = 0.7, 3.0


def regression(x, y):
    """Known noise: the posterior is normal."""
    b = numpyro.sample("b", dist.Normal(0.0, PRIOR).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ b, NOISE), obs=y)


def exact(x=X, y=Y):
    """Mean, covariance and log evidence."""
    precision = x.T @ x / NOISE**2 + np.eye(4) / PRIOR**2
    covariance = np.linalg.inv(precision)
    evidence = stats.multivariate_normal(
        np.zeros(len(y)), PRIOR**2 * x @ x.T + NOISE**2 * np.eye(len(y))
    ).logpdf(y)
    return covariance @ x.T @ y / NOISE**2, covariance, evidence


def law(tree):
    """Mean and covariance of every chain's normal law, from the stored state."""
    state = tree["sampler_state"].dataset
    scale = state["law.curvature.scale"].values
    factor = state["law.curvature.factor"].values
    root = scale[..., None] * np.linalg.inv(factor).swapaxes(1, 2)
    return state["law.position"].values, root @ root.swapaxes(1, 2)


@pytest.fixture(scope="module")
def fitted():
    return quiet(regression, X, Y, method="laplace")


def test_a_normal_posterior_is_found_exactly(fitted):
    mean, covariance, evidence = exact()
    means, covariances = law(fitted)
    for chain in range(4):
        np.testing.assert_allclose(means[chain], mean, rtol=1e-8)
        np.testing.assert_allclose(covariances[chain], covariance, rtol=1e-8)
    group = fitted["approximation"]
    np.testing.assert_allclose(group["log_evidence"], evidence, atol=1e-6)
    np.testing.assert_allclose(group["khat"], 0.0)
    np.testing.assert_allclose(group["weight_ess"], 1000.0)
    np.testing.assert_allclose(fitted["sample_stats"]["log_evidence"], evidence, atol=1e-6)
    assert fitted.attrs["khat"] == 0.0
    assert ppl.findings(fitted) == []


def test_draws_have_the_posterior_moments(fitted):
    """4000 independent draws; five standard errors for the largest of 14 deviations."""
    mean, covariance, _ = exact()
    draws = fitted["posterior"]["b"].values.reshape(-1, 4)
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, (draws - mean).T)
    assert np.abs(white.mean(axis=1)).max() < 5 / np.sqrt(4000)
    assert np.abs(np.cov(white) - np.eye(4)).max() < 5 * np.sqrt(2 / 4000)


def test_log_densities_of_the_draws_are_those_of_the_normal_law(fitted):
    """Log q = log p - log weight, against SciPy."""
    mean, covariance, evidence = exact()
    draws = fitted["posterior"]["b"].values
    log_q = (fitted["sample_stats"]["lp"] - fitted["sample_stats"]["log_weight"]).values
    expected = stats.multivariate_normal(mean, covariance).logpdf(draws)
    np.testing.assert_allclose(log_q, expected, atol=1e-8)
    np.testing.assert_allclose(fitted["sample_stats"]["lp"], expected + evidence, atol=1e-8)


def test_new_data_and_seeds_compile_nothing(fitted):
    compilations.clear()
    other = quiet(regression, X, Y[::-1].copy(), method="laplace", seed=5)
    assert not compilations
    np.testing.assert_allclose(law(other)[0][0], exact(X, Y[::-1])[0], rtol=1e-8)


def test_going_on_draws_the_same_as_one_longer_run(fitted):
    """Over the end of a pool."""
    whole = quiet(regression, X, Y, method="laplace", draws=1200)
    np.testing.assert_array_equal(whole["posterior"]["b"][:, :1000], fitted["posterior"]["b"])
    first = quiet(regression, X, Y, method="laplace", draws=900)
    both = ppl.extend(first, regression, X, Y, draws=300, progress=False)
    np.testing.assert_array_equal(both["posterior"]["b"], whole["posterior"]["b"])
    np.testing.assert_array_equal(
        both["sample_stats"]["log_evidence"], whole["sample_stats"]["log_evidence"]
    )


def skewed(y):
    """A gamma posterior on the unconstrained log scale, and a funnel's neck it is not."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Poisson(rate), obs=y)


@pytest.mark.slow
def test_resampled_draws_are_those_of_a_posterior_that_is_not_normal():
    """Gamma(2 + sum y, 1 + n): exact moments, and the exact evidence.

    The mode is that of log rate, (2 + sum y) / (1 + n), where the density of the rate itself has
    its mean. Bounds: 4.5 standard errors of 4 x 1000 weighted draws.
    """
    y = np.array([1, 0, 2, 1, 3])
    a, b = 2 + y.sum(), 1 + len(y)
    tree = quiet(skewed, y, method=Laplace(starts=2), seed=3)
    np.testing.assert_allclose(tree["sampler_state"]["law.position"], np.log(a / b), rtol=1e-6)
    draws, target = tree["posterior"]["rate"].values, stats.gamma(a, scale=1 / b)
    effective = tree["approximation"]["weight_ess"].values.sum()
    assert 3000 < effective < 4000
    assert abs(draws.mean() - target.mean()) < 4.5 * target.std() / np.sqrt(effective)
    below = (draws < target.ppf(0.1)).mean()
    assert abs(below - 0.1) < 4.5 * np.sqrt(0.09 / effective)

    def joint(rate):
        return stats.gamma(2).pdf(rate) * np.prod(stats.poisson(rate).pmf(y))

    evidence = np.log(integrate.quad(joint, 0, 20)[0])
    found = tree["approximation"]
    error = found["log_evidence"].values - evidence
    assert np.all(np.abs(error) < 4.5 * found["log_evidence_sd"].values)
    logs = tree["sampler_state"]["pool.positions"].values  # the draws of q
    assert abs(logs.mean() - np.log(a / b)) < 4.5 * logs.std() / np.sqrt(4000)
    assert logs.mean() - np.log(draws).mean() > 4 * logs.std() / np.sqrt(4000)  # q is not p


# --- the parts ----------------------------------------------------------------------------------


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


def test_the_hessian_is_that_of_finite_differences(in_float64):
    program = Program(eight_schools, (ERRORS,), {"y": EFFECTS})
    x = np.random.default_rng(3).normal(size=program.size)

    def density(x):
        return program.log_density(x, program.data)

    found = jax.jit(lambda x: hessian(density, x))(x)
    slope = jax.jit(jax.grad(density))
    steps = 1e-6 * np.eye(program.size)
    expected = np.stack([(slope(x + e) - slope(x - e)) / 2e-6 for e in steps])
    np.testing.assert_allclose(found, expected, atol=2e-7)


def test_curvatures_of_very_different_scales(in_float64):
    scales = np.array([1e-6, 1.0, 1e5])
    root = np.diag(scales) @ np.array([[1, 0, 0], [0.5, 1, 0], [0.2, -0.7, 1]])
    matrix = root @ root.T
    found = jax.jit(Curvature.of)(matrix)
    assert found.definite
    np.testing.assert_allclose(found.log_determinant, np.linalg.slogdet(matrix)[1], rtol=1e-10)
    g = np.array([1e-6, 2.0, -1e5])
    np.testing.assert_allclose(found.solve(g), np.linalg.solve(matrix, g), rtol=1e-8)
    spread = jax.vmap(found.spread)(jnp.eye(3)).T
    np.testing.assert_allclose(spread @ spread.T, np.linalg.inv(matrix), rtol=1e-8)


@pytest.mark.parametrize(
    ("matrix", "along"),
    [
        (np.diag([1.0, 0.0, 2.0]), [0, 1, 0]),
        (np.diag([1.0, 5.0, -2.0]), [0, 0, 1]),
        (np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), [1, -1, 0]),
    ],
)
def test_the_direction_without_curvature_is_found(in_float64, matrix, along):
    found = jax.jit(Curvature.of)(matrix)
    assert not found.definite
    unit = np.array(along) / np.linalg.norm(along)
    np.testing.assert_allclose(abs(found.direction @ unit), 1.0, rtol=1e-8)


# --- what is refused ----------------------------------------------------------------------------


def ridge(y):
    """Only the sum of a and b is known."""
    flat = dist.ImproperUniform(dist.constraints.real, (), ())
    a, b = numpyro.sample("a", flat), numpyro.sample("b", flat)
    c = numpyro.sample("c", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(a + b + c, 1.0), obs=y)


def nowhere(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.factor("never", jnp.where(m < 100.0, -jnp.inf, 0.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


@pytest.mark.slow
def test_directions_without_curvature_are_named():
    with pytest.raises(SamplingError, match=r"does not fall along \['[ab]', '[ab]'\]"):
        quiet(ridge, np.ones(5), method=Laplace(starts=1), chains=2)


def test_a_failure_names_the_sites_along_the_direction(fitted):
    """As `problem` reads it off a state."""
    program = Program(regression, (X, Y))
    method = Laplace().on(program)
    arrays = {str(k): np.asarray(v) for k, v in fitted["sampler_state"].data_vars.items()}
    with program.context():
        blank = jax.eval_shape(
            lambda p: jax.tree.map(
                lambda x: x[None], method.init(jax.random.key(0), (p, False), None, None)
            ),
            np.zeros(4),
        )
    state = results.read_state(arrays, blank)
    assert method.problem(state) == ""
    curvature = state.law.curvature._replace(
        least=np.array([1.0, -0.3, 1.0, 0.0]),
        direction=np.tile([0.0, 0.8, 0.0, -0.6], (4, 1)),
    )
    flat = state._replace(law=state.law._replace(curvature=curvature))
    assert "chains [1, 3]" in method.problem(flat)
    assert "along ['b[1]', 'b[3]']" in method.problem(flat)
    lost = state._replace(law=state.law._replace(value=np.array([0.0, -np.inf, 0.0, 0.0])))
    assert "chains [1]: none of the 4 starting points" in method.problem(lost)
    steep = state._replace(law=state.law._replace(promise=np.array([0.0, 0.0, 3.0, 0.0])))
    assert "chains [2] had not come to a mode in 500 steps" in method.problem(steep)


@pytest.mark.slow
def test_no_finite_start_is_told():
    with pytest.raises(SamplingError, match="none of the 1 starting points"):
        quiet(nowhere, np.ones(5), method=Laplace(starts=1), chains=1)


@pytest.mark.parametrize(
    "options",
    [{"starts": 0}, {"steps": 1.5}, {"pool_size": 24}, {"resample": "yes"}, {"init_radius": -1.0}],
)
def test_options_out_of_range(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Laplace(**options)
