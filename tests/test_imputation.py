"""Missing observations by ``obs_mask=``: every element has a law, and all else keeps its own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow, quiet, quietly
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to
from numpyro.infer.util import potential_energy
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit import MCMC, NUTS, SMC, Laplace, positions
from ppl_toolkit.errors import DataError
from ppl_toolkit.inference import BirthDeath, RandomWalk, block, cycle, masked_plate
from ppl_toolkit.program import Program
from ppl_toolkit.sufficient import reduced

N = 12
SEEN = np.arange(N) % 3 != 1
RNG = np.random.default_rng(5)

LAWS = {
    "normal": lambda a: dist.Normal(a, 2.0),
    "positive": lambda a: dist.Gamma(2.0, jnp.exp(a)),
    "unit interval": lambda a: dist.Beta(2.0, jnp.exp(a)),
    "bound that moves": lambda a: dist.TruncatedNormal(a, 2.0, low=a - 90.0),
    "vectors": lambda a: dist.MultivariateNormal(a * jnp.ones(3), jnp.eye(3)),
    "simplices": lambda a: dist.Dirichlet(jnp.exp(a) * jnp.ones(3)),
    "masked already": lambda a: dist.Normal(a, 2.0).mask(np.arange(N) % 2 == 0),
}


def program_of(law):
    def model(y, seen):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", N):
            numpyro.sample("y", law(a), obs=y, obs_mask=seen)

    fn = law(0.5)
    y = fn.sample(jax.random.key(0), (N,) if not fn.batch_shape else ())
    return Program(model, (np.array(y, float), SEEN))


def density_and_numpyros(program):
    """Compiled: our log density, with its gradient, and NumPyro's, of the flat vector."""

    def numpyros(position):
        values = program.unravel(position)
        return -potential_energy(program.model, program.arguments.arrays, {}, values)

    return jax.jit(jax.value_and_grad(program.log_density)), jax.jit(numpyros)


def require_rest(program, unused, site="y_unobserved"):
    """Those elements are N(0, 1) on the real space, and all else is as in NumPyro, to 1e-11."""
    with program.context():
        ours, numpyros = density_and_numpyros(program)
        for scale in (1.0, 5.0):
            position = scale * RNG.normal(size=program.size)
            z = np.asarray(program.unravel(position)[site])[unused]
            found, gradient = ours(position, program.data)
            expected = numpyros(position) + stats.norm.logpdf(z).sum()
            np.testing.assert_allclose(found, expected, rtol=1e-11)
            of_site = np.asarray(program.unravel(gradient)[site])[unused]
            np.testing.assert_allclose(of_site, -z, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", others_slow(LAWS, "normal", "unit interval", "masked already"))
def test_observed_elements_are_standard_normal_on_the_real_space(name):
    """What a mask of the distribution's own hides keeps no law, as in NumPyro, unless observed."""
    require_rest(program_of(LAWS[name]), SEEN)


def in_a_scan(y, seen):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))

    def step(carry, inputs):
        y_t, here = inputs
        numpyro.sample("y", dist.LogNormal(a, 1.0), obs=y_t, obs_mask=here)
        return carry, None

    scan(step, 0.0, (y, seen))


def scaled(y, seen):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", N), numpyro.handlers.scale(scale=10.0):
        numpyro.sample("y", dist.LogNormal(a, 1.0), obs=y, obs_mask=seen)


def under_a_mask(y, seen):
    """Values that are missing are used further on, masked or not."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", N):
        with numpyro.handlers.mask(mask=np.arange(N) % 2 == 0):
            y = numpyro.sample("y", dist.LogNormal(a, 1.0), obs=y, obs_mask=seen)
        numpyro.sample("z", dist.Normal(y, 1.0), obs=np.ones(N))


def in_two_plates(y, seen):
    """A mask that holds for whole rows."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("column", 4), numpyro.plate("row", N):
        numpyro.sample("y", dist.LogNormal(a, 1.0), obs=y[None], obs_mask=seen[:, None])


@pytest.mark.parametrize("model", others_slow([in_a_scan, scaled, under_a_mask, in_two_plates]))
def test_wherever_the_observations_are_made(model):
    y = np.exp(RNG.normal(size=4 if model is in_two_plates else N))
    require_rest(Program(model, (y, SEEN)), SEEN)


def test_slots_that_are_not_there_rest_once():
    """Of a masked plate; observed ones that are there, too."""

    def model(y, seen, k):
        k = numpyro.sample("k", dist.DiscreteUniform(0, N), obs=k)
        with masked_plate("slot", N, k):
            numpyro.sample("y", dist.LogNormal(0.0, 1.0), obs=y, obs_mask=seen)

    require_rest(
        Program(model, (np.exp(RNG.normal(size=N)), SEEN, np.asarray(7))),
        SEEN | (np.arange(N) >= 7),
    )


@pytest.mark.slow
def test_numbers_of_slots_with_missing_observations():
    """By jumps: the posterior of k within 4.5 standard errors of 16 chains."""

    def model(y, seen):
        k = numpyro.sample("k", dist.DiscreteUniform(0, 3))
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        with masked_plate("slot", 3, k):
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=seen)

    y, seen = np.array([0.5, 2.0, 1.0]), np.array([True, False, True])
    kernel = cycle([BirthDeath("slot"), block(RandomWalk(), ["mean", "y_unobserved"])])
    tree = quiet(model, y, seen, method=MCMC(kernel), draws=4000, chains=16, seed=1)
    own = [y[:k][seen[:k]] for k in range(4)]
    evidence = np.array(
        [stats.multivariate_normal.pdf(v, cov=np.eye(len(v)) + 1) if len(v) else 1.0 for v in own]
    )
    k = np.asarray(tree["posterior"]["k"])
    for value, exact in enumerate(evidence / evidence.sum()):
        each = (k == value).mean(1)
        assert abs(each.mean() - exact) < 4.5 * each.std(ddof=1) / 4


@pytest.mark.parametrize(("seen", "expected"), [(True, ("y_unobserved",)), (False, ())])
def test_masks_that_are_python_s(seen, expected):
    """NumPyro leaves masks that are True out."""
    assert Program(line, (X, np.nan_to_num(Y), seen)).imputed == expected


def test_names_alone_mean_nothing():
    """Without ``obs_mask=`` nothing is changed, whatever sites are called."""

    def model():
        numpyro.sample("b_observed", dist.Normal(0.0, 1.0).mask(False), obs=0.3)
        with numpyro.handlers.mask(mask=np.arange(3) > 0), numpyro.plate("row", 3):
            b = numpyro.sample("b_unobserved", dist.Normal(0.0, 1.0))
            numpyro.sample("b", dist.Normal(b, 1.0))

    assert Program(model).imputed == ()


@pytest.mark.parametrize("name", others_slow(LAWS, "unit interval"))
def test_draws_follow_these_laws(name):
    """Kolmogorov and Smirnov on 400 draws of an observed and a missing element, level 1e-4 each."""
    program = program_of(LAWS[name])

    def draw(key):
        position = positions.prior_position(program, key, program.data)
        values = positions.values_at(program, position, program.data)
        fn = LAWS[name](values["a"])
        alone = biject_to(fn.support).inv(fn.sample(jax.random.fold_in(key, 9)))
        z = position["y_unobserved"]
        return z[0], z[4], alone[4] if name == "masked already" else alone

    with program.context():
        keys = jax.random.split(jax.random.key(1), 400)
        observed, missing, own = map(np.asarray, jax.jit(jax.vmap(draw))(keys))
    assert stats.kstest(observed.ravel(), "norm").pvalue > 1e-4
    assert stats.ks_2samp(missing.ravel(), own.ravel()).pvalue > 1e-4


def labels(y, seen):
    p = numpyro.sample("p", dist.Beta(2.0, 3.0))
    with numpyro.plate("row", N):
        numpyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=seen)


def test_missing_labels_are_summed_out_without_a_trace():
    """The density with missing labels summed out is that of the observed ones alone."""
    y = (RNG.random(N) < 0.4).astype(int)
    program = Program(labels, (y, SEEN))
    with program.context():
        found = jax.jit(program.log_density)(np.array([0.3]), program.data)
    p = 1 / (1 + np.exp(-0.3))
    exact = stats.beta.logpdf(p, 2, 3) + np.log(p * (1 - p))
    exact += stats.bernoulli.logpmf(y[SEEN], p).sum()
    np.testing.assert_allclose(found, exact, rtol=1e-12)


X = np.linspace(-1.0, 2.0, N)
Y = np.where(SEEN, 0.8 * X + 0.5 * RNG.normal(size=N), np.nan)
PRECISION = 1 + 4 * np.sum(X[SEEN] ** 2)
MEAN = 4 * np.sum((X * Y)[SEEN]) / PRECISION


def line(x, y, seen):
    """y = b x + noise: conjugate."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(b * x, 0.5), obs=y, obs_mask=seen)


def test_nuts_imputes_the_missing_ones_and_keeps_the_posterior():
    """Means within 4.5 standard errors, deviations within 6%; trees stay short; NaN is allowed."""
    tree = quiet(line, X, Y, SEEN, method=NUTS(), draws=2000, seed=1)
    table = ppl.summary(tree)
    assert tree["sample_stats"]["n_steps"].values.mean() < 10  # 1023 without these laws
    posterior = tree["posterior"]
    b = np.asarray(posterior["b"])
    assert abs(b.mean() - MEAN) < 4.5 * table.loc["b", "mcse_mean"]
    np.testing.assert_allclose(b.std(), PRECISION**-0.5, rtol=0.06)
    y = np.asarray(posterior["y"])
    assert (y[..., SEEN] == Y[SEEN]).all()
    for i in np.flatnonzero(~SEEN):
        sd = np.sqrt(0.25 + X[i] ** 2 / PRECISION)
        assert abs(y[..., i].mean() - MEAN * X[i]) < 4.5 * table.loc[f"y[{i}]", "mcse_mean"]
        np.testing.assert_allclose(y[..., i].std(), sd, rtol=0.06)
    assert table["r_hat"].dropna().max() < 1.01


COV = 0.25 * np.eye(SEEN.sum()) + np.outer(X[SEEN], X[SEEN])
EXACT = stats.multivariate_normal.logpdf(Y[SEEN], cov=COV)


def test_the_evidence_is_that_of_what_is_observed():
    """Laplace's is exact on this model."""
    tree = quiet(line, X, Y, SEEN, method=Laplace(), draws=10)
    np.testing.assert_allclose(tree["sample_stats"]["log_evidence"], EXACT, rtol=1e-9)


def test_missing_labels_alone_are_enumerated():
    """The evidence over all configurations is that of the two labels that are observed."""

    def model(y, seen):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        with numpyro.plate("row", 4):
            numpyro.sample("y", dist.Bernoulli(0.2 + 0.5 * z), obs=y, obs_mask=seen)

    program = Program(model, (np.array([1, 0, 1, 0]), np.array([True, True, False, False])))
    with program.context():
        of_all = jax.jit(jax.vmap(program.log_configuration, (0, None)))
        logs = of_all(np.arange(program.configurations), program.data)
    exact = 0.7 * 0.2 * 0.8 + 0.3 * 0.7 * 0.3
    np.testing.assert_allclose(np.exp(np.asarray(logs)).sum(), exact, rtol=1e-12)


def test_beside_sufficient_statistics():
    """The density with them has the law of what is unused, too."""

    def model(x, w, y, seen):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.sample("w", dist.Normal(b * x, 1.0), obs=w)
        with numpyro.plate("row", N):
            numpyro.sample("y", dist.Normal(b, 1.0), obs=y, obs_mask=seen)

    x = RNG.normal(size=400)
    program = Program(model, (x, x + RNG.normal(size=400), np.nan_to_num(Y), SEEN))
    few = reduced(program)
    position = RNG.normal(size=program.size)
    with program.context():
        data = (*program.data, *few.statistics(program.data))
        found = few.traced(few.traced.consts, position, data)
        np.testing.assert_allclose(found, program.log_density(position, program.data), rtol=1e-12)


@pytest.mark.slow
def test_so_is_that_of_sequential_monte_carlo():
    """Within 4.5 standard errors of 16 runs."""
    tree = quiet(line, X, Y, SEEN, method=SMC(particles=100), chains=16, seed=3)
    ratio = np.exp(np.asarray(tree["sample_stats"]["log_evidence"]).mean(-1) - EXACT)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std(ddof=1) / 4 < 0.5


def test_draws_of_observed_steps_are_standard_normal():
    """Of a scan, which draws its sites itself; Kolmogorov and Smirnov, 400 draws, level 1e-4."""
    program = Program(in_a_scan, (np.exp(RNG.normal(size=N)), SEEN))
    with program.context():
        keys = jax.random.split(jax.random.key(2), 400)
        draw = jax.jit(jax.vmap(lambda key: positions.prior_position(program, key, program.data)))
        position = jax.tree.map(np.asarray, draw(keys))
    assert stats.kstest(position["y_unobserved"][:, SEEN].ravel(), "norm").pvalue > 1e-4
    assert stats.pearsonr(position["y_unobserved"][:, 0], position["a"]).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("way", ["scan", "plate"])
def test_smc_by_random_walks(way):
    """Which feel every term: mean and deviation within 4.5 standard errors of 24 runs."""
    y, seen = 5.0 * RNG.normal(size=8), np.arange(8) % 3 != 1

    def model(y, seen):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        if way == "scan":
            scan(lambda _, inputs: (None, observe(a, *inputs)), None, (y, seen))
        else:
            with numpyro.plate("row", 8):
                observe(a, y, seen)

    def observe(a, y, seen):
        numpyro.sample("y", dist.Normal(5.0 * a, 5.0), obs=y, obs_mask=seen)

    method = SMC(particles=300, kernel=RandomWalk())
    tree = quiet(model, y, seen, method=method, chains=24, seed=5)
    precision = 1.0 + seen.sum()
    draws = np.asarray(tree["posterior"]["a"])
    for each, exact in (
        (draws.mean(1), y[seen].sum() / 5.0 / precision),
        (draws.var(1), 1.0 / precision),
    ):
        assert abs(each.mean() - exact) < 4.5 * each.std(ddof=1) / 24**0.5


@pytest.mark.parametrize("way", ["obs_mask", "mask"])
def test_checks_look_at_what_is_observed_alone(way):
    """Hidden observations are NaN in the result, and no statistic counts them."""

    def constant(y, seen):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", N):
            if way == "obs_mask":
                numpyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=seen)
            else:
                numpyro.sample("y", dist.Normal(mean, 1.0).mask(seen), obs=y)

    y = np.where(SEEN, 0.0, 1000).astype(int)
    tree = quiet(constant, y, SEEN, draws=50, warmup=100, seed=2)
    site = "y_observed" if way == "obs_mask" else "y"
    np.testing.assert_array_equal(tree["observed_data"][site], np.where(SEEN, 0.0, np.nan))
    table = ppl.check_posterior(tree, constant, y, SEEN)
    assert table.loc[(site, "max"), "observed"] == 0.0
    assert ppl.loo(tree, constant, y, SEEN).n == SEEN.sum()


def constant(y, seen):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", N):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=seen)


def test_masks_that_stand_for_many_elements_hide_them_all():
    y = np.where(SEEN, np.arange(4.0)[:, None], np.nan).T
    program = Program(in_two_rows, (y, SEEN))
    np.testing.assert_array_equal(program.observed_elements["y_observed"], np.isfinite(y))


def in_two_rows(y, seen):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("column", 4), numpyro.plate("row", N):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=seen[:, None])


def test_every_data_set_has_its_own_mask():
    masks = np.stack([np.ones(N, bool), SEEN])
    y = np.arange(float(N))
    tree = quietly(
        ppl.infer_batch, constant, y=y, seen=masks, over=["seen"], draws=20, warmup=20, chains=1
    )
    for number, mask in enumerate(masks):
        observed = ppl.one_of(tree, number)["observed_data"]["y_observed"]
        np.testing.assert_array_equal(observed, np.where(mask, y, np.nan))


def test_checks_of_nothing_are_refused():
    y, nothing = np.zeros(N), np.zeros(N, bool)
    tree = quiet(constant, y, nothing, draws=20, warmup=20)
    with pytest.raises(DataError, match="no mask hides"):
        ppl.check_posterior(tree, constant, y, nothing)
    with pytest.raises(DataError, match="Pass the run's data"):
        ppl.check_posterior(tree, constant, y + 1.0, nothing)


@pytest.mark.slow
def test_nuts_is_calibrated_on_missing_observations():
    """Those of the joint law, 300 data sets, level 1e-3 for all quantities together."""
    found = ppl.calibrate(constant, np.zeros(N), SEEN, replications=300, progress=False)
    assert {"y[0]", "y[1]", "y_unobserved[0]"} <= set(found.p_values)
    assert found.passed
