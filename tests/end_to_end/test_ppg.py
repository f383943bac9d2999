"""PaRIS particle Gibbs, and sums along a filter, through `infer`."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from helpers import compilations, quiet
from linear_series import series_from_start as model
from linear_series import simulated_from_start
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.smoothing import smoothed
from ppl_toolkit.errors import DataError, MethodError, OptionError, SiteError
from ppl_toolkit.inference import (
    MCMC,
    NUTS,
    PPG,
    Additive,
    ParticleFilter,
    ParticleGibbs,
    RandomWalk,
    block,
)
from ppl_toolkit.results import build

T = 15


Y = simulated_from_start(T)
KNOWN = {"phi": 0.8, "q": 0.5}


def smoother(y, phi=0.8, q=0.5, r=0.7):
    """Mean and covariance of x_0, ..., x_T given y."""
    size = len(y)
    root = np.zeros((size + 1, size + 1))
    root[0, 0] = 1.0
    for t in range(1, size + 1):
        root[t] = phi * root[t - 1]
        root[t, t] = q
    prior, see = root @ root.T, np.eye(size + 1)[1:]
    gain = prior @ see.T @ np.linalg.inv(see @ prior @ see.T + r**2 * np.eye(size))
    return gain @ y, prior - gain @ see @ prior


def cross_and_parts(carry, latents, t):
    return {
        "cross": carry * latents["x"],
        "each": jnp.zeros(T).at[t].set(latents["x"]),
    }


SUMS = Additive(cross_and_parts, lambda initial: {"cross": initial["x_0"], "each": jnp.zeros(T)})


def truth(y=Y):
    mean, cov = smoother(y)
    cross = sum(mean[t] * mean[t - 1] + cov[t, t - 1] for t in range(1, T + 1))
    return {"cross": cross + mean[0], "each": mean[1:]}


def agrees(found, wanted, least):
    """|z| of all 16 numbers below 4.5 (once in 9000 seeds); errors that say something."""
    for name, value in wanted.items():
        error = found[f"{name}_se"].values
        assert np.all(error < least)
        assert np.all(np.abs(found[name].values - value) < 4.5 * error)


class TestKnownParameters:
    @pytest.mark.slow
    def test_estimates_are_those_of_the_gaussian_smoother(self):
        method = PPG(functional=SUMS, given=KNOWN, particles=8)
        assert method.warmup == 0
        tree = quiet(model, Y, method=method, draws=1000, seed=1)
        found = smoothed(tree)
        agrees(found, truth(), 0.1)
        assert 0.05 < found.attrs["lag_1"] < 0.6
        assert found.attrs["left_out"] + found.attrs["kept"] == 1000
        assert found.attrs["enough"]
        assert set(np.unique(tree["posterior"]["phi"].values).round(12)) == {0.8}
        assert 0.7 < float(tree["sample_stats"]["renewed"].mean()) < 0.95

    @pytest.mark.slow
    def test_paris_along_a_filter(self):
        """Exact sums have the bias of N = 1000 particles only; its square is far below se^2."""
        tree = quiet(
            model, Y, method=ParticleFilter(1000, given=KNOWN, functional=SUMS, moves=4),
            draws=1, chains=8, seed=2,
        )  # fmt: skip
        agrees(smoothed(tree), truth(), 0.3)
        assert tree["smoothing"]["each"].dims[:2] == ("chain", "time")
        steps = tree["smoothing"]["each"].values  # at time t nothing is known of later parts
        for t in range(T):
            assert np.all(steps[:, t, t + 1 :] == 0)
            assert np.all(steps[:, t, t] != 0)
        filtered = tree["filtering"]["x_mean"].values
        np.testing.assert_allclose(np.diagonal(steps, 0, 1, 2), filtered, rtol=1e-10)

    def test_new_data_and_parameters_compile_nothing(self):
        method = PPG(functional=SUMS, given=KNOWN, particles=8)
        quiet(model, Y, method=method, draws=10)
        compilations.clear()
        other = PPG(functional=SUMS, given={"phi": 0.5, "q": 0.6}, particles=8)
        tree = quiet(model, Y + 1, method=other, draws=10)
        assert not compilations
        assert np.allclose(tree["posterior"]["phi"], 0.5)


@pytest.mark.slow
def test_unknown_parameters_agree_with_nuts():
    """The same function, by NUTS: expectations of the same sums over its draws."""
    nuts = quiet(model, Y, method="nuts", draws=4000, seed=3)
    draws = nuts["posterior"]
    x = np.concatenate([draws["x_0"].values[..., None], draws["x"].values], axis=2)
    cross = (x[..., 1:] * x[..., :-1]).sum(2) + x[..., 0]
    tree = quiet(model, Y, method=PPG(functional=SUMS, particles=16), draws=4000, seed=4)
    found = smoothed(tree)
    error = np.hypot(found["cross_se"].item(), ppl.convergence.mcse(cross, "mean"))
    assert abs(found["cross"].item() - cross.mean()) < 4.5 * error < 0.7
    for name in ("phi", "q"):
        one, two = tree["posterior"][name].values, draws[name].values
        error = np.hypot(ppl.convergence.mcse(one, "mean"), ppl.convergence.mcse(two, "mean"))
        assert abs(one.mean() - two.mean()) < 4.5 * error


class TestReadingOff:
    @staticmethod
    def tree(values, warmup=0):
        stats = xarray.Dataset({"smoothed.h.conditional_smc": (("chain", "draw"), values)})
        posterior = xarray.Dataset({"x": (("chain", "draw"), values)})
        return build({"posterior": posterior, "sample_stats": stats}, {"warmup": warmup})

    @staticmethod
    def chains(r, chains, draws, start=0.0):
        rng = np.random.default_rng(5)
        x = [np.full(chains, start)]
        for _ in range(draws - 1):
            x.append(r * x[-1] + np.sqrt(1 - r**2) * rng.normal(size=chains))
        return np.stack(x, 1)

    def test_sweeps_that_remember_the_first_path_are_left_out(self):
        """r = 0.8 needs k_0 = 14; from 2000 sweeps, r is known to 0.01."""
        found = smoothed(self.tree(self.chains(0.8, 4, 2000, 1e3)))
        assert 0.77 < found.attrs["lag_1"] < 0.83
        assert 12 <= found.attrs["left_out"] <= 17
        warm = smoothed(self.tree(self.chains(0.8, 4, 2000), warmup=10))
        assert warm.attrs["left_out"] == pytest.approx(found.attrs["left_out"] - 10, abs=1)

    def test_too_few_sweeps_are_said_to_be(self):
        found = smoothed(self.tree(self.chains(0.9, 500, 12)))
        assert found.attrs["left_out"] == 6
        assert not found.attrs["enough"]

    def test_the_error_of_few_sweeps(self):
        """sd sqrt((1 + r) / ((1 - r) n)), n = 4000 draws of AR(1) with r = 0.5, known to 10%."""
        found = smoothed(self.tree(self.chains(0.5, 200, 40)[:, 20:]))
        kept = found.attrs["kept"] * 200
        assert found["h_se"].item() == pytest.approx(np.sqrt(3.0 / kept), rel=0.1)

    def test_results_without_sums(self):
        tree = self.tree(self.chains(0.5, 2, 10))
        with pytest.raises(DataError, match="too few"):
            smoothed(self.tree(self.chains(0.5, 2, 3)))
        del tree["sample_stats"]["smoothed.h.conditional_smc"]
        with pytest.raises(DataError, match="PPG"):
            smoothed(tree)


def remembers_two(y):
    def step(window, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * window[0] + 0.3 * window[1], 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return (x, window[0]), None

    scan(step, (0.0, 0.0), y)


def refused():
    yield OptionError, "functional to average", lambda: PPG()
    yield OptionError, "must be a function", lambda: PPG(functional=3)
    yield OptionError, "degenerate", lambda: PPG(functional=SUMS, ancestors=1)
    yield OptionError, "ancestor_moves", lambda: PPG(functional=SUMS, ancestor_moves=-1)
    yield OptionError, "degenerate", lambda: ParticleFilter(functional=SUMS, ancestors=1)
    yield SiteError, "given= names", lambda: PPG(functional=SUMS, given={"rho": 1.0})
    yield SiteError, "support", lambda: PPG(functional=SUMS, given={"phi": 2.0})
    yield MethodError, "KeyError", lambda: PPG(functional=lambda c, x, t: x["z"], given=KNOWN)
    yield (
        MethodError,
        "must be the same",
        lambda: PPG(functional=Additive(cross_and_parts, lambda x: x["x_0"]), given=KNOWN),
    )
    yield MethodError, "holds the sites", lambda: MCMC(NUTS(), given={"phi": 0.5})


@pytest.mark.parametrize(("error", "words", "method"), list(refused()))
def test_bad_input_is_refused_before_any_compilation(error, words, method):
    with pytest.raises(error, match=words):
        quiet(model, Y, method=method(), draws=4)


def test_sums_need_a_carry_without_longer_memory():
    for method in (PPG(functional=lambda c, x, t: x["x"]),
                   ParticleFilter(functional=lambda c, x, t: x["x"])):  # fmt: skip
        with pytest.raises(MethodError, match="carry of model 'remembers_two'"):
            quiet(remembers_two, Y, method=method, draws=4)


def test_sites_that_are_given_stay():
    """Any kernel: mu | sigma = 2 is normal with sd 1 / sqrt(1 + n / 4), its mean that over n y."""

    def normal(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        sigma = numpyro.sample("sigma", dist.HalfNormal(3.0))
        numpyro.sample("y", dist.Normal(mu + k, sigma).expand([len(y)]), obs=y)

    y = np.arange(6.0)
    method = MCMC(block(RandomWalk(), ["mu"]), given={"sigma": 2.0, "k": 0})
    draws = quiet(normal, y, method=method, draws=4000, seed=1)["posterior"]
    assert np.allclose(draws["sigma"], 2.0)
    assert (draws["k"] == 0).all()
    mu = draws["mu"].values
    assert abs(mu.mean() - y.sum() / 4 / 2.5) < 4.5 * ppl.convergence.mcse(mu, "mean")
    assert abs(mu.std() - 2.5**-0.5) < 4.5 * ppl.convergence.mcse(mu, "sd")
    with pytest.raises(SiteError, match="integers"):
        quiet(normal, y, method=MCMC(block(NUTS(), ["mu"]), given={"sigma": 2.0, "k": 0.5}))


@pytest.mark.slow
def test_forecasts_continue_the_paths():
    """`predict` with a longer scan: x beyond the data is Gaussian with known moments."""

    def series(y=None, length=T):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7))
            return x, None

        start = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        with numpyro.handlers.condition(data={} if y is None else {"y": y}):
            scan(step, start, None, length=length)

    tree = quiet(series, Y, method=ParticleGibbs(particles=16, warmup=50), draws=2000, seed=1)
    ahead = ppl.predict(tree, series, length=T + 3)["predictions"]
    mean, cov = smoother(Y)
    x, y = ahead["x"].values, ahead["y"].values
    assert np.array_equal(x[..., :T], tree["posterior"]["x"].values)
    m, v = mean[-1], cov[-1, -1]
    for t in range(T, T + 3):
        m, v = 0.8 * m, 0.64 * v + 0.25
        for draws, variance in ((x[..., t], v), (y[..., t], v + 0.49)):
            assert abs(draws.mean() - m) < 4.5 * ppl.convergence.mcse(draws, "mean")
            assert abs(draws.std() - variance**0.5) < 4.5 * ppl.convergence.mcse(draws, "sd")


@pytest.mark.slow
def test_the_first_path_is_that_of_a_filter():
    """With 2000 particles it follows the smoothing law nearly; 300 chains' first positions."""
    import jax

    from ppl_toolkit.inference.begun import Begun
    from ppl_toolkit.inference.particle_filter import Filter
    from ppl_toolkit.inference.state_space import state_space
    from ppl_toolkit.program import Program

    program = Program(model, (Y,))
    with program.context():
        begun = Begun(state_space(program), Filter(2000), ("phi", "q"))
        position = {"phi": np.log(1.8 / 0.2), "q": np.log(0.5), "x_0": 0.0, "x": jnp.zeros(T)}

        def one(key):
            return begun(program, (position, key), program.data)["x"]

        x = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 300)))
    mean, cov = smoother(Y)
    z = (x.mean(0) - mean[1:]) / np.sqrt(np.diag(cov)[1:] / 300)
    assert np.abs(z).max() < 4.5
