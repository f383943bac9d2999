"""SMC^2: properly weighted exactly, and right on a series whose posterior is known by quadrature.

Seeds are fixed. Where a bound is statistical, its false-alarm rate over seeds is said.
"""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet
from linear_series import exact, series, simulated
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.transitions import enumerated
from ppl_toolkit.errors import InferenceWarning, MethodError, OptionError, SamplingError
from ppl_toolkit.inference import SMC2, LaplaceProposal, smc_squared
from ppl_toolkit.inference.inner_filter import InnerFilter
from ppl_toolkit.inference.particle_filter import Filter
from ppl_toolkit.inference.state_space import state_space
from ppl_toolkit.program import Program


def ratios(tree, log_z):
    """Estimates of the evidence over what it is, by chain."""
    values = tree["sample_stats"]["log_evidence"].values
    assert (values == values[:, :1]).all()
    return np.exp(values[:, 0] - log_z)


def unbiased(tree, log_z, most):
    """The mean ratio is one within 4.5 standard errors, which are small.

    With 16 chains or more, at most one in 2400 seeds fails.
    """
    found = ratios(tree, log_z)
    error = found.std(ddof=1) / np.sqrt(found.size)
    print(f"Zhat / Z {found.mean():.3f} +- {error:.3f} from {found.size} chains")
    assert error < most
    return abs(found.mean() - 1.0) < 4.5 * error


def agrees(tree, wanted, mean=0.15, sd=0.15):
    """Means within 0.15 sd, sds within 15%.

    The standard errors of 16 chains are below 0.03 sd and 3%: less than one in 10^6 seeds fails.
    """
    for name, (exact_mean, exact_sd) in wanted.items():
        x = tree["posterior"][name].values
        x = x.reshape(-1, *x.shape[2:])
        if np.any(np.abs(x.mean(0) - exact_mean) > mean * exact_sd):
            return False
        if np.any(np.abs(x.std(0) / exact_sd - 1.0) > sd):
            return False
    return True


# -- exactly: two parameters, filters of two particles, a hidden chain of two states ---------------

LOG_G = np.log(np.array([[0.9, 0.2], [0.3, 1.1]]))
PAIR = np.array([0.2, 0.7])


def two_states(log_g):
    stay = numpyro.sample("stay", dist.Uniform(0.0, 1.0))

    def step(z, log_g):
        p = jnp.where(z == 0, 1 - stay, stay)
        z = numpyro.sample("z", dist.Categorical(jnp.stack([1 - p, p])))
        numpyro.factor("g", log_g[z])
        return z, None

    scan(step, 0, log_g)


def evidence(stay, steps):
    """p(y_{1:t}) by the forward recursion."""
    law, moves = np.array([1.0, 0.0]), np.array([[stay, 1 - stay], [1 - stay, stay]])
    for g in np.exp(LOG_G[:steps]):
        law = (law @ moves) * g
    return law.sum()


@pytest.fixture(scope="module")
def finite():
    """The filter, the method, the functions of the program, and the cloud of two at the start."""
    program = Program(two_states, (LOG_G,))
    with program.context():
        space = state_space(program)
        inner = InnerFilter(space, Filter(2, resampling="multinomial", ess=1.0))
        method = SMC2(2, 2, 0, resampling="multinomial", space=space)
        functions = (*inner.functions, *method.filters[0].functions)
        target = SimpleNamespace(
            functions={f: lambda given, f=f: f(program, given, program.data) for f in functions},
            prior_position=lambda key: {"stay": jnp.zeros(())},
        )
        first = smc_squared.first_state(method, jax.random.key(0), target)
        position = {"stay": jnp.asarray(np.log(PAIR / (1 - PAIR)))}
        first = first._replace(outer=first.outer._replace(position=position), time=0)
        yield inner, method, target, first


def properly_weighted(run):
    """E[evidence] and E[evidence times the weighted mean of stay] are those of the two."""
    found = enumerated(run)
    log_z, log_weights, position = found.values
    stay = 1 / (1 + np.exp(-position))
    z = np.array([evidence(x, 2) for x in PAIR])
    np.testing.assert_allclose(found.probabilities.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(found.probabilities @ np.exp(log_z), z.mean(), rtol=1e-12)
    estimates = np.exp(log_z) * np.sum(np.exp(log_weights) * stay, 1)
    np.testing.assert_allclose(found.probabilities @ estimates, (z * PAIR).mean(), rtol=1e-12)


def told(state):
    return state.log_evidence, state.log_weights, state.outer.position["stay"]


def test_data_and_resampling_are_properly_weighted_exactly(finite):
    inner, method, target, first = finite

    def run(key):
        state = smc_squared.taken_in(key, inner, first, target)
        state, _ = smc_squared.resampled(method, key, state)
        return told(smc_squared.taken_in(key, inner, state, target))

    properly_weighted(run)


@pytest.mark.parametrize("number", [0, 1])
def test_exchanges_are_properly_weighted_exactly(finite, number):
    """Of one parameter: a datum, new filters, and one more datum."""
    inner, _, target, first = finite
    outer = jax.tree.map(lambda x: x[number : number + 1], first.outer)
    one = first._replace(outer=outer, log_weights=jnp.zeros(1))

    def run(key):
        state = smc_squared.taken_in(key, inner, one, target)
        state = smc_squared.exchanged(key, inner, state, target)
        return smc_squared.taken_in(key, inner, state, target).log_evidence

    found = enumerated(run)
    wanted = evidence(PAIR[number], 2)
    np.testing.assert_allclose(found.probabilities @ np.exp(found.values), wanted, rtol=1e-12)


# -- linear and Gaussian ---------------------------------------------------------------------------

Y = simulated(25)
FEW = {"particles": 256, "inner": 16, "doublings": 1}  # sd of log Zhat about 1


@pytest.fixture(scope="module")
def fixed():
    return quiet(series, Y, method=SMC2(**FEW, exchange=0.0), chains=16, draws=256, seed=1)


@pytest.fixture(scope="module")
def doubled():
    """Every stage asks for larger filters, while there are any."""
    return quiet(series, Y, method=SMC2(**FEW, exchange=0.99), chains=16, draws=256, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed", "doubled"])
def test_evidence_and_posterior_are_those_of_quadrature(name, request):
    tree = request.getfixturevalue(name)
    log_z, wanted = exact(Y)
    assert unbiased(tree, log_z, 0.08)
    assert agrees(tree, wanted)


@pytest.mark.slow
def test_paths_are_those_of_the_stored_estimates(fixed, doubled):
    for tree in (fixed, doubled):
        assert np.abs(tree["sample_stats"]["replay_error"].values).max() < 1e-9


@pytest.mark.slow
def test_what_is_said_of_the_stages(fixed, doubled):
    stages = fixed["smc"].dataset
    last = np.isfinite(stages["reached"].values).sum(1) - 1
    at_end = {k: np.take_along_axis(stages[k].values, last[:, None], 1)[:, 0] for k in stages
              if stages[k].dims[1] == "stage"}  # fmt: skip
    assert (at_end["reached"] == 25).all()
    increments = stages["log_evidence_increment"].values
    assert (increments[:, 0] == 0.0).all()
    logs = fixed["sample_stats"]["log_evidence"].values[:, 0]
    np.testing.assert_allclose(increments.sum(1), logs, rtol=1e-12)
    np.testing.assert_allclose(at_end["log_evidence"], logs, rtol=1e-12)
    assert set(np.unique(stages["inner_particles"].values[:, 0])) == {16}
    sizes = doubled["smc"]["inner_particles"].values
    assert (sizes[:, 0] == 16).all()
    assert (sizes[:, 1] == 32).all()
    # An upper estimate of the spread between runs (1000 of which agree with 4.5 standard errors).
    spread = ratios(fixed, logs.mean()).std(ddof=1)
    assert 0.6 * spread < at_end["log_evidence_sd"].mean() < 5 * spread


@pytest.mark.slow
def test_new_data_and_thresholds_compile_nothing(fixed):
    compilations.clear()
    y = simulated(25, seed=3)
    tree = quiet(series, y, method=SMC2(**FEW, ess=0.3, exchange=0.2), chains=16, draws=256, seed=2)
    assert not compilations
    log_z, wanted = exact(y)
    assert unbiased(tree, log_z, 0.1)
    assert agrees(tree, wanted)


@pytest.mark.slow
def test_further_draws_are_new_and_the_same_however_a_run_is_cut():
    method = SMC2(**FEW)
    one = quiet(series, Y, method=method, draws=600, chains=1)
    two = quiet(series, Y, method=method, draws=300, chains=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        two = ppl.extend(two, series, Y, draws=300, method=method, progress=False)
    x = one["posterior"]["phi"].values
    np.testing.assert_array_equal(x, two["posterior"]["phi"].values)
    assert np.mean(x[0, :256] == x[0, 256:512]) < 0.8


def test_impossible_data_are_named():
    y = Y.copy()
    y[10] = 1e200
    with pytest.raises(SamplingError, match="can explain the data of step 11"):
        quiet(series, y, method=SMC2(**FEW), draws=256)


def test_too_few_stages():
    with pytest.raises(SamplingError, match="after 1 stages"):
        quiet(series, Y, method=SMC2(**FEW), draws=256, warmup=1)


@pytest.mark.slow
def test_moves_at_few_particles_and_initial_sites():
    """Start, memory and observations before the first step; look-ahead proposals; multinomial."""

    def model(y_0, y):
        phi = numpyro.sample("phi", dist.Uniform(-1, 1))
        q = numpyro.sample("q", dist.HalfNormal(1.0))
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("y_0", dist.Normal(x_0, 0.7), obs=y_0)

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(phi * x, q))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, x_0, y)

    method = SMC2(256, 8, 0, proposal=LaplaceProposal(), resampling="multinomial", moves=5)
    log_z, wanted = exact(Y, y_0=0.8)
    tree = quiet(model, 0.8, Y, method=method, chains=24, draws=256, seed=4)
    assert unbiased(tree, log_z, 0.08)
    assert agrees(tree, wanted)
    found = ratios(tree, log_z)
    error = tree["smc"]["log_evidence_sd"].values
    error = np.nanmean(error[:, np.isfinite(error).all(0)][:, -1])
    assert 0.4 * found.std(ddof=1) < error < 2.5 * found.std(ddof=1)


@pytest.mark.slow
def test_without_moves_small_runs_are_unbiased():
    """Nothing is adapted then: the mean over 400 runs is exact for every N; |z| <= 4.5."""
    log_z, _ = exact(Y[:6])
    method = SMC2(32, 4, 0, moves=0, resampling="multinomial")
    tree = quiet(series, Y[:6], method=method, chains=400, draws=1)
    assert unbiased(tree, log_z, 0.1)


@pytest.mark.slow
def test_float32_and_lock_step():
    log_z, wanted = exact(Y)
    tree = quiet(series, Y, method=SMC2(**FEW), chains=16, draws=256, precision="float32")
    assert unbiased(tree, log_z, 0.08)
    assert agrees(tree, wanted)
    alone = quiet(series, Y, method=SMC2(**FEW, exchange=0.25), chains=2, draws=256)
    both = quiet(series, Y, method=SMC2(**FEW, exchange=0.25), chains=2, draws=256, lanes=2)
    for name in ("phi", "q", "x"):
        np.testing.assert_allclose(
            alone["posterior"][name].values, both["posterior"][name].values, rtol=1e-6
        )


# -- what it cannot serve --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"particles": 1}, {"inner": 1}, {"inner": 2.5}, {"doublings": -1}, {"exchange": 1.0},
        {"exchange": -0.1}, {"ess": 0.0}, {"ess": 1.0}, {"moves": -1}, {"max_moves": 0},
        {"warmup": 0}, {"proposal": "laplace"}, {"resampling": "sorted"}, {"particles": True},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        SMC2(**options)


def random_walk(scale, y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, scale))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def no_scan(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal()), 1.0), obs=y)


def discrete(y):
    random_walk(1.0 + numpyro.sample("k", dist.Poisson(1.0)), y)


def flat(y):
    random_walk(numpyro.sample("s", dist.ImproperUniform(dist.constraints.positive, (), ())), y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (no_scan, "no numpyro.contrib.control_flow.scan"),
        (lambda y: random_walk(1.0, y), "no parameters outside its scan; use ParticleFilter"),
        (discrete, r"\['k'\] are discrete.*ParticleGibbs"),
        (flat, r"\['s'\] have flat \(improper\).*PMMH"),
    ],
    ids=["no scan", "no parameters", "discrete", "flat"],
)
def test_models_it_cannot_serve(model, message):
    with pytest.raises(MethodError, match=message):
        ppl.infer(model, Y, method=SMC2())


def test_it_takes_no_start():
    with pytest.raises(OptionError, match="does not start from a given position"):
        ppl.infer(series, Y, method=SMC2(), init={"phi": 0.5})
