"""Every method through `infer`, against exact posteriors."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow, quiet
from models import EFFECTS, ERRORS, conjugate, die, eight_schools
from numpyro.infer import MCMC, NUTS
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit.errors import MethodError

Y = np.random.default_rng(0).normal(1.0, 1.0, size=12)
PRECISION = 12 + 1 / 4  # of the conjugate posterior
MEAN, SD = Y.sum() / PRECISION, PRECISION**-0.5


def z_scores(tree, name, mean, sd):
    """Errors of mean and standard deviation in Monte Carlo standard errors."""
    row = ppl.summary(tree, name).iloc[0]
    return (row["mean"] - mean) / row["mcse_mean"], (row["sd"] - sd) / row["mcse_sd"]


# Seeds are fixed: a right sampler fails a bound of 4 standard errors once in 16 000 numbers.

SAMPLERS = {
    "nuts": "nuts",
    "nuts dense": ppl.NUTS(metric="dense"),
    "nuts careful": ppl.NUTS(target_acceptance=0.95, max_depth=6),
    "hmc": "hmc",
    "hmc dense": ppl.HMC(steps=5, metric="dense"),
}


@pytest.mark.parametrize("name", others_slow(SAMPLERS, "nuts", "nuts dense", "hmc"))
def test_samplers_find_the_conjugate_posterior(name):
    tree = quiet(conjugate, Y, method=SAMPLERS[name], seed=1)
    assert max(map(abs, z_scores(tree, "m", MEAN, SD))) < 4
    draws = np.asarray(tree["posterior"]["m"])
    # Every tenth draw is nearly independent; Kolmogorov-Smirnov at level 1e-4.
    assert stats.kstest(draws[:, ::10].ravel(), stats.norm(MEAN, SD).cdf).pvalue > 1e-4


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_a_correlated_gaussian_has_its_covariance(metric):
    """Bare log density of N(0, C) with correlation 0.9 and scales 1 and 10."""
    covariance = np.array([[1.0, 9.0], [9.0, 100.0]])
    inverse = np.linalg.inv(covariance)

    def density(x):
        return -0.5 * x @ inverse @ x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the closed-over matrix
        tree = ppl.infer(
            density, init=np.zeros(2), method=ppl.NUTS(metric=metric), seed=2, progress=False
        )
    x = np.asarray(tree["posterior"]["x"])
    products = np.stack([x[..., 0] ** 2, x[..., 0] * x[..., 1], x[..., 1] ** 2], axis=-1)
    numbers = ppl.convergence.convergence(products)
    z = (numbers["mean"] - np.array([1.0, 9.0, 100.0])) / numbers["mcse_mean"]
    assert np.abs(z).max() < 4


def test_constrained_and_improper_sites_have_their_laws():
    """Gamma and Beta posteriors from flat and conjugate priors on constrained spaces."""
    waits, heads = np.array([0.4, 1.3, 0.2, 2.2]), 7

    def model(waits, heads):
        flat = dist.ImproperUniform(dist.constraints.positive, (), ())
        rate = numpyro.sample("rate", flat)
        p = numpyro.sample("p", dist.Beta(2.0, 3.0))
        numpyro.sample("waits", dist.Exponential(rate), obs=waits)
        numpyro.sample("heads", dist.Binomial(10, p), obs=heads)

    tree = quiet(model, waits, np.asarray(heads), seed=3)
    rate, p = stats.gamma(5, scale=1 / waits.sum()), stats.beta(2 + heads, 3 + 10 - heads)
    for name, law in (("rate", rate), ("p", p)):
        assert max(map(abs, z_scores(tree, name, law.mean(), law.std()))) < 4
        thinned = np.asarray(tree["posterior"][name])[:, ::10].ravel()
        assert stats.kstest(thinned, law.cdf).pvalue > 1e-4


def test_prior_draws_are_independent_and_follow_the_prior():
    tree = quiet(eight_schools, ERRORS, y=EFFECTS, method="prior", draws=2000)
    assert "posterior" not in tree.children
    prior = tree["prior"]
    assert prior["theta"].dims == ("chain", "draw", "school")
    mu, tau = (np.asarray(prior[name]).ravel() for name in ("mu", "tau"))
    assert stats.kstest(mu, stats.norm(0, 5).cdf).pvalue > 1e-4
    assert stats.kstest(tau, stats.halfcauchy(scale=5).cdf).pvalue > 1e-4
    theta = mu[:, None] + tau[:, None] * np.asarray(prior["z"]).reshape(-1, 8)
    np.testing.assert_allclose(np.asarray(prior["theta"]).reshape(-1, 8), theta, rtol=1e-12)
    lagged = np.corrcoef(mu[:-1], mu[1:])[0, 1]
    assert abs(lagged) < 4 / np.sqrt(mu.size)


def test_enumeration_is_exact():
    prior = np.array([0.2, 0.3, 0.5])
    joint = prior * stats.norm.pdf(1.2, loc=np.arange(3))
    tree = quiet(die, np.asarray(1.2), draws=5000)
    assert tree.attrs["method"] == "Enumeration"
    evidence = np.asarray(tree["sample_stats"]["log_evidence"])
    np.testing.assert_allclose(evidence, np.log(joint.sum()), rtol=1e-12)
    k = np.asarray(tree["posterior"]["k"])
    lp = np.asarray(tree["sample_stats"]["lp"])
    np.testing.assert_allclose(lp, np.log(joint)[k], rtol=1e-12)
    counts = np.bincount(k.ravel(), minlength=3)
    expected = joint / joint.sum() * k.size
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_enumeration_of_several_sites_of_different_sizes():
    """Two bits and a die of four faces in a noisy sum: joint posterior by brute force."""

    def model(y):
        bits = numpyro.sample("bits", dist.Bernoulli(jnp.array([0.3, 0.6])).to_event(1))
        face = numpyro.sample("face", dist.Categorical(jnp.array([0.1, 0.2, 0.3, 0.4])))
        total = numpyro.deterministic("total", bits.sum() + face)
        numpyro.sample("y", dist.Normal(total, 0.7), obs=y)

    tree = quiet(model, np.asarray(3.1), draws=4000, seed=5)
    joint = {}
    for a in (0, 1):
        for b in (0, 1):
            for f in range(4):
                prior = (0.3 if a else 0.7) * (0.6 if b else 0.4) * (f + 1) / 10
                joint[a, b, f] = prior * stats.norm.pdf(3.1, a + b + f, 0.7)
    evidence = sum(joint.values())
    np.testing.assert_allclose(
        np.asarray(tree["sample_stats"]["log_evidence"]), np.log(evidence), rtol=1e-12
    )
    posterior = tree["posterior"]
    bits = np.asarray(posterior["bits"]).reshape(-1, 2)
    face = np.asarray(posterior["face"]).ravel()
    np.testing.assert_array_equal(np.asarray(posterior["total"]).ravel(), bits.sum(axis=1) + face)
    counts = [np.sum((bits == key[:2]).all(axis=1) & (face == key[2])) for key in joint]
    expected = np.array(list(joint.values())) / evidence * face.size
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_discrete_sites_beside_continuous_ones_are_summed_out():
    """A normal mixture of two known components: the posterior of the weight is a mixture of
    Betas, here by quadrature."""
    y = np.array([-1.0, 0.5, 2.2, 3.0, 2.6])

    def model(y):
        w = numpyro.sample("w", dist.Beta(2.0, 2.0))
        with numpyro.plate("row", y.shape[0]):
            z = numpyro.sample("z", dist.Bernoulli(w))
            numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)

    tree = quiet(model, y, seed=6)
    assert tree.attrs["method_reason"].startswith("NUTS: continuous latent sites")
    assert set(tree["posterior"].data_vars) == {"w"}
    grid = (np.arange(4000) + 0.5) / 4000
    zero, one = stats.norm.pdf(y), stats.norm.pdf(y, 2.0)
    weight = grid * (1 - grid) * np.prod(
        (1 - grid[:, None]) * zero + grid[:, None] * one, axis=1
    )  # fmt: skip
    mean = np.sum(grid * weight) / weight.sum()
    sd = np.sqrt(np.sum((grid - mean) ** 2 * weight) / weight.sum())
    assert max(map(abs, z_scores(tree, "w", mean, sd))) < 4


AUTO = {
    "continuous": (lambda: quiet(conjugate, Y, draws=10), "NUTS", "D = 1"),
    "discrete": (lambda: quiet(die, np.asarray(1.0), draws=10), "Enumeration", "3 joint values"),
}


@pytest.mark.parametrize("what", AUTO)
def test_auto_says_why(what):
    call, method, why = AUTO[what]
    tree = call()
    assert tree.attrs["method"] == method
    assert why in tree.attrs["method_reason"]


def test_a_method_can_be_a_name_a_class_or_an_object():
    found = [
        quiet(conjugate, Y, method=method, draws=20, warmup=20)
        for method in ("NUTS", "nuts", ppl.NUTS, ppl.NUTS())
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other["posterior"]["m"], found[0]["posterior"]["m"])


def test_plug_ins_are_found_by_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    from ppl_toolkit import inference

    point = EntryPoint("Mine", "ppl_toolkit.inference.hmc:HMC", "ppl_toolkit.methods")
    monkeypatch.setattr(inference, "entry_points", lambda group: [point])
    assert "mine" in inference.method_names()
    assert quiet(conjugate, Y, method="mine", draws=20, warmup=20).attrs["method"] == "HMC"
    with pytest.raises(MethodError, match="mine"):
        inference.method_named("other")


# --- bare log densities -------------------------------------------------------------------------


def log_normal(x, mean, sd):
    return -0.5 * jnp.sum(((x - mean) / sd) ** 2)


def log_normal_of_parts(p, mean, sd):
    return log_normal(p["a"], mean, sd) + log_normal(p["b"], -mean, sd)


def test_a_log_density_takes_arguments_and_keeps_their_place():
    mean, sd = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    tree = quiet(log_normal, mean, sd, init=np.zeros(2), seed=7)
    rows = ppl.summary(tree, "x")
    assert (np.abs(rows["mean"] - mean) < 4 * rows["mcse_mean"]).all()
    assert (np.abs(rows["sd"] - sd) < 4 * rows["mcse_sd"]).all()
    more = ppl.extend(tree, log_normal, mean, sd, draws=50, progress=False)
    assert more["posterior"].sizes["draw"] == 1050


def test_a_log_density_of_a_dictionary():
    init = {"a": np.zeros(2), "b": 0.0}
    tree = quiet(log_normal_of_parts, 1.0, 2.0, init=init, seed=8)
    assert tree["posterior"]["a"].shape == (4, 1000, 2)
    assert tree["posterior"]["b"].shape == (4, 1000)
    for name, mean in (("a", 1.0), ("b", -1.0)):
        assert max(map(abs, z_scores(tree, name, mean, 2.0))) < 4


def test_a_scalar_log_density():
    tree = quiet(functools.partial(log_normal, mean=3.0, sd=0.1), init=0.0, seed=9)
    assert max(map(abs, z_scores(tree, "x", 3.0, 0.1))) < 4


# --- starting points ----------------------------------------------------------------------------


def first_draws(**options):
    return quiet(eight_schools, ERRORS, y=EFFECTS, warmup=0, draws=1, chains=3, **options)


def test_given_starts_are_where_the_chains_start():
    """With a step size that never moves far, the first draw is the start."""
    still = ppl.HMC(steps=1, target_acceptance=0.999)
    values = {"mu": np.array([1.0, 2.0, 3.0]), "tau": 4.0, "z": np.linspace(-1, 1, 8)}
    tree = quiet(
        eight_schools, ERRORS, y=EFFECTS, warmup=0, draws=1, chains=3, init=values, method=still
    )
    start = tree["posterior"].isel(draw=0)
    step = np.asarray(tree["sample_stats"]["step_size"])[:, 0]
    for name, value in values.items():
        shape = start[name].shape
        given = np.broadcast_to(np.reshape(value, (-1, *(1,) * (len(shape) - 1))), shape) \
            if name == "mu" else np.broadcast_to(value, shape)  # fmt: skip
        reach = 8 * step.reshape(-1, *(1,) * (len(shape) - 1)) * (1 + np.abs(given))
        assert (np.abs(np.asarray(start[name]) - given) <= reach).all()


def test_sites_that_are_not_given_start_at_random():
    tree = first_draws(init={"mu": 0.5}, method="hmc")
    assert len({float(t) for t in tree["posterior"]["tau"].values.ravel()}) == 3


def test_starts_from_the_prior():
    tree = first_draws(init="prior", method="hmc")
    assert len({float(t) for t in tree["posterior"]["mu"].values.ravel()}) == 3


def test_a_refit_on_new_data_starts_warm_and_is_right():
    tree = quiet(conjugate, Y, seed=1)
    new = Y + 3.0
    again = quiet(conjugate, new, init=tree, seed=2)
    assert again.attrs["warmup"] == 200
    assert again.attrs["n_gradient_evaluations_warmup"] < 4000
    assert max(map(abs, z_scores(again, "m", new.sum() / PRECISION, SD))) < 4
    # The caches are of the new data: lp is the density at the draws, from the first one on.
    first = float(again["posterior"]["m"][0, 0])
    expected = stats.norm(0, 2).logpdf(first) + stats.norm(first, 1).logpdf(new).sum()
    np.testing.assert_allclose(float(again["sample_stats"]["lp"][0, 0]), expected, rtol=1e-10)


# --- precision ----------------------------------------------------------------------------------


def test_arrays_that_were_part_of_a_float32_program_are_as_good_as_new():
    """JAX remembers arrays that a program closed over, in the precision of that program."""
    y = Y.copy()

    def run(key):
        sampler = MCMC(NUTS(conjugate), num_warmup=5, num_samples=5, progress_bar=False)
        sampler.run(key, y)
        return sampler.get_samples()

    jax.jit(run)(jax.random.PRNGKey(0))
    tree = quiet(conjugate, y, seed=4, draws=50, warmup=50)
    assert tree["posterior"]["m"].dtype == "float64"


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_precision_is_an_argument(precision):
    tree = quiet(conjugate, Y, precision=precision, seed=4)
    assert tree["posterior"]["m"].dtype == precision
    assert tree.attrs["precision"] == precision
    assert max(map(abs, z_scores(tree, "m", MEAN, SD))) < 4


def test_float32_data_in_a_float64_run_are_a_finding():
    tree = quiet(conjugate, Y.astype(np.float32))
    assert [f.kind for f in ppl.findings(tree)] == ["precision"]


def test_lanes_share_a_program_and_are_right():
    """Chains in lock step: another program, the same posterior."""
    tree = quiet(conjugate, Y, lanes=3, chains=4, seed=1)
    assert tree.attrs["lanes"] == 3
    assert max(map(abs, z_scores(tree, "m", MEAN, SD))) < 4
    assert len({tree["posterior"]["m"].values[c].tobytes() for c in range(4)}) == 4
