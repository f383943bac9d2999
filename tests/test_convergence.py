"""The diagnostics equal `arviz_stats` and the published formulae, whatever the draws."""

import subprocess
import sys
import time

import arviz as az
import numpy as np
import pytest
from arviz_stats.base import array_stats
from scipy.special import ndtri

from ppl_toolkit.convergence import bfmi, convergence, ess, mcse, psis, ranked, rhat, rhat_nested
from ppl_toolkit.errors import DataError, OptionError

TAIL = (0.05, 0.95)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # ArviZ divides by zero


def autoregressive(phi, shape, rng):
    draws = rng.normal(size=shape)
    for t in range(1, shape[1]):
        draws[:, t] += phi * draws[:, t - 1]
    return draws


def close(actual, expected, rtol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=0, equal_nan=True)


def kinds_of_draws(chains, draws):
    """A dozen kinds of scalars on the last axis."""
    rng = np.random.default_rng(chains * 1000 + draws)
    shape = (chains, draws)
    iid = rng.normal(size=shape)
    with_nan, with_inf, stuck = iid.copy(), iid.copy(), iid.copy()
    with_nan[0, draws // 2] = np.nan
    with_inf[0, 1] = np.inf
    stuck[0] += 10.0
    return np.stack(
        [
            iid,
            autoregressive(-0.9, shape, rng),  # antithetic
            autoregressive(-0.5, shape, rng),
            autoregressive(0.5, shape, rng),
            autoregressive(0.9, shape, rng),
            np.cumsum(iid, axis=1),
            rng.standard_cauchy(size=shape),
            np.exp(5 * iid),
            1e8 + iid,
            np.full(shape, 0.5),
            (iid > 0).astype(float),  # two values
            (iid > 2).astype(float),
            np.round(iid, 1),
            rng.poisson(3.0, size=shape).astype(float),
            with_nan,
            with_inf,
            stuck,
            np.tile(np.arange(draws) % 2.0, (chains, 1)),
        ],
        axis=-1,
    )


SHAPES = [(4, 500), (4, 101), (4, 64), (1, 100), (2, 37), (3, 8), (4, 7), (2, 6), (4, 5), (4, 4)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def draws(request):
    return kinds_of_draws(*request.param)


def arviz_ess(x, method, **options):
    return array_stats.ess(x, chain_axis=0, draw_axis=1, method=method, **options)


def arviz_mcse(x, method, **options):
    return array_stats.mcse(x, chain_axis=0, draw_axis=1, method=method, **options)


class TestReferenceValues:
    """AR(1) chains; numbers computed once with ArviZ 1.3 and written down."""

    RNG = np.random.default_rng(0)
    X = np.stack(
        [
            autoregressive(0.0, (4, 1000), RNG),
            autoregressive(0.5, (4, 1000), RNG),
            autoregressive(0.9, (4, 1000), RNG),
            autoregressive(-0.5, (4, 1000), RNG),
        ],
        axis=-1,
    )

    BULK = (3926.116904, 1060.151929, 184.416565, 14408.239965)
    TAIL = (4027.693947, 2214.348937, 566.888752, 3767.407689)
    R_HAT = (1.000337843, 1.000744369, 1.013582638, 1.000039095)

    def test_bulk_ess(self):
        np.testing.assert_allclose(ess(self.X), self.BULK, atol=1e-6, rtol=0)

    def test_tail_ess_looks_at_5_and_95_percent(self):
        np.testing.assert_allclose(ess(self.X, "tail"), self.TAIL, atol=1e-6, rtol=0)

    def test_rhat(self):
        np.testing.assert_allclose(rhat(self.X), self.R_HAT, atol=1e-9, rtol=0)

    def test_in_one_pass(self):
        found = convergence(self.X)
        np.testing.assert_allclose(found["ess_bulk"], self.BULK, atol=1e-6, rtol=0)
        np.testing.assert_allclose(found["ess_tail"], self.TAIL, atol=1e-6, rtol=0)
        np.testing.assert_allclose(found["r_hat"], self.R_HAT, atol=1e-9, rtol=0)


class TestByHand:
    def test_ess_of_four_draws_is_the_cap(self):
        # S = 16; half-chains of two draws leave only rho_0, so tau = 1 / log10(S).
        x = np.random.default_rng(0).normal(size=(4, 4))
        close(ess(x, "mean"), 16 * np.log10(16))

    def test_rhat_of_two_split_chains(self):
        # Ranks 1..8 in four half-chains; the folded draws separate them less.
        x = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
        z = ndtri((np.arange(1, 9) - 0.375) / 8.25).reshape(4, 2)
        w, b = z.var(axis=1, ddof=1).mean(), z.mean(axis=1).var(ddof=1)
        close(rhat(x), np.sqrt(0.5 + b / w))

    def test_independent_draws_have_about_as_many_effective_ones(self):
        x = np.random.default_rng(1).normal(size=(4, 1000, 200))
        assert np.mean(ess(x, "mean")) == pytest.approx(4000, rel=0.05)
        assert np.mean(mcse(x)) == pytest.approx(1 / np.sqrt(4000), rel=0.05)
        assert np.mean(mcse(x, "sd")) == pytest.approx(1 / np.sqrt(8000), rel=0.05)

    def test_autoregression_has_its_known_ess(self):
        x = autoregressive(0.5, (4, 2000, 100), np.random.default_rng(2))
        assert np.mean(ess(x, "mean")) == pytest.approx(8000 * (1 - 0.5) / (1 + 0.5), rel=0.05)

    def test_bfmi_of_independent_energies_is_two(self):
        energy = np.random.default_rng(3).normal(size=(2, 50_000))
        close(bfmi(energy), [2.0, 2.0], rtol=0.03)


class TestEqualsArviz:
    def test_rhat(self, draws):
        close(rhat(draws), array_stats.rhat(draws, chain_axis=0, draw_axis=1))

    @pytest.mark.parametrize("method", ["bulk", "mean", "sd"])
    def test_ess(self, draws, method):
        close(ess(draws, method), arviz_ess(draws, method))

    @pytest.mark.parametrize("prob", [TAIL, (0.11, 0.89), (0.5, 0.9)])
    def test_tail_ess(self, draws, prob):
        close(ess(draws, "tail", prob=prob), arviz_ess(draws, "tail", prob=prob))

    @pytest.mark.parametrize("prob", [0.01, 0.1, 0.5, 0.75])
    def test_quantile(self, draws, prob):
        close(ess(draws, "quantile", prob=prob), arviz_ess(draws, "quantile", prob=prob))
        close(mcse(draws, "quantile", prob=prob), arviz_mcse(draws, "quantile", prob=prob))

    @pytest.mark.parametrize("method", ["mean", "sd"])
    def test_mcse(self, draws, method):
        close(mcse(draws, method), arviz_mcse(draws, method))

    def test_bfmi(self, draws):
        one_by_one = np.moveaxis(draws, -1, 0)
        expected = [array_stats.bfmi(x, chain_axis=0, draw_axis=1) for x in one_by_one]
        close(bfmi(draws), np.stack(expected, axis=-1))

    @pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 2, 3]])
    @pytest.mark.parametrize("draws_per_chain", [100, 9, 4])
    def test_nested_rhat(self, labels, draws_per_chain):
        x = kinds_of_draws(4, draws_per_chain)
        expected = array_stats.rhat_nested(x, labels, chain_axis=0, draw_axis=1)
        close(rhat_nested(x, labels), expected)
        close(rhat_nested(x, np.array(list("wxyz"))[labels]), expected)

    def test_summary(self):
        x = np.moveaxis(kinds_of_draws(4, 200), -1, 0)[[0, 2, 3, 4, 10, 12]]
        x = np.moveaxis(x, 0, -1)
        table = az.summary(az.from_dict({"posterior": {"x": x}}), kind="all", round_to="none")
        found = convergence(x, tail_prob=(0.11, 0.89))
        for name, values in found.items():
            close(values, table[name].to_numpy(dtype=float))


class TestOnePass:
    def test_equals_the_single_diagnostics(self, draws):
        found = convergence(draws)
        close(found["r_hat"], rhat(draws), 1e-12)
        close(found["ess_bulk"], ess(draws), 1e-12)
        close(found["ess_tail"], ess(draws, "tail"), 1e-12)
        close(found["mcse_mean"], mcse(draws), 1e-12)
        close(found["mcse_sd"], mcse(draws, "sd"), 1e-12)
        close(found["mean"], draws.mean(axis=(0, 1)), 1e-12)
        close(found["sd"], draws.std(axis=(0, 1), ddof=1), 1e-10)

    def test_the_ranks_alone_give_the_same(self, draws):
        whole = convergence(draws)
        for name, value in ranked(draws).items():
            np.testing.assert_array_equal(value, whole[name])

    def test_block_boundaries_do_not_show(self):
        x = autoregressive(0.7, (2, 40, 600), np.random.default_rng(4))
        whole = convergence(x)
        for i in (0, 255, 256, 257, 599):
            for name, value in convergence(x[..., i]).items():
                close(value, whole[name][i], 1e-12)

    def test_long_memory_needs_every_lag(self):
        # The initial sequence of most of these ends beyond N/4, of the others before it.
        rng = np.random.default_rng(5)
        x = np.stack([autoregressive(p, (2, 300), rng) for p in np.linspace(0, 1, 30)], axis=-1)
        close(ess(x, "mean"), arviz_ess(x, "mean"))
        close(convergence(x)["ess_bulk"], arviz_ess(x, "bulk"))

    def test_many_ties_and_close_values_are_ranked_exactly(self):
        rng = np.random.default_rng(6)
        held = np.repeat(rng.normal(size=(4, 50, 3)), 4, axis=1)  # rejected proposals repeat
        outlier = rng.normal(size=(4, 200, 1)) * 1e-12
        outlier[0, 0] = 1.0  # all others share one cell of a grid over the range
        x = np.concatenate([held, outlier, np.round(held)], axis=-1)
        close(rhat(x), array_stats.rhat(x, chain_axis=0, draw_axis=1))
        close(ess(x), arviz_ess(x, "bulk"))

    def test_is_much_faster_than_a_summary(self):
        x = np.random.default_rng(7).normal(size=(4, 1000, 100))
        data = az.from_dict({"posterior": {"x": x}})

        def cpu_seconds(function, *args, **options):
            start = time.process_time()
            function(*args, **options)
            return time.process_time() - start

        convergence(x)
        ours = min(cpu_seconds(convergence, x) for _ in range(3))
        assert cpu_seconds(az.summary, data, kind="all", round_to="none") > 4 * ours


class TestShapes:
    def test_trailing_shape_is_kept(self):
        x = np.random.default_rng(0).normal(size=(2, 20, 3, 2))
        for value in (rhat(x), ess(x), mcse(x), *convergence(x).values()):
            assert value.shape == (3, 2)
        close(rhat(x)[2, 1], rhat(x[:, :, 2, 1]), 1e-12)
        assert bfmi(x).shape == (2, 3, 2)

    def test_a_scalar_gives_a_number(self):
        x = np.random.default_rng(0).normal(size=(2, 20))
        assert all(isinstance(value, np.float64) for value in convergence(x).values())
        assert isinstance(rhat(x), np.float64)

    def test_no_scalars(self):
        x = np.zeros((4, 100, 0))
        assert rhat(x).shape == ess(x).shape == convergence(x)["mean"].shape == (0,)

    @pytest.mark.parametrize("shape", [(4, 0, 2), (0, 10, 2), (4, 3, 2), (4, 1, 2)])
    def test_too_few_draws_give_nan(self, shape):
        x = np.ones(shape) * np.arange(2)
        found = convergence(x)
        for name in ("r_hat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd"):
            assert np.isnan(found[name]).all()
        assert np.isnan(rhat(x)).all()
        assert np.isnan(ess(x)).all()
        assert np.isnan(mcse(x)).all()
        if x.size:
            close(found["mean"], [0.0, 1.0])

    def test_integers_and_float32_are_read_as_float64(self):
        x = np.random.default_rng(0).normal(size=(2, 30)).astype(np.float32)
        close(ess(x, "mean"), ess(x.astype(np.float64), "mean"), 1e-15)
        assert ess(np.arange(40).reshape(2, 20) % 7) > 0
        assert ess(np.arange(40).reshape(2, 20) % 7 > 3) > 0


class TestEdges:
    def test_nan_stays_in_its_scalar(self):
        x = np.random.default_rng(0).normal(size=(4, 50, 3))
        clean = convergence(x)
        x[1, 7, 1] = np.nan
        for name, value in convergence(x).items():
            assert np.isnan(value[1])
            close(value[[0, 2]], clean[name][[0, 2]], 1e-15)

    @pytest.mark.parametrize("value", [0.0, 0.1, -1e300, 1e-300])
    @pytest.mark.parametrize("size", [100, 7])
    def test_constant_draws(self, value, size):
        found = convergence(np.full((4, size), value))
        assert found["mean"] == value
        assert found["sd"] == found["mcse_mean"] == 0.0
        assert np.isnan(found["mcse_sd"])
        assert np.isnan(found["r_hat"])
        assert found["ess_bulk"] == found["ess_tail"] == 8 * (size // 2)

    def test_infinite_draws_have_ranks_but_no_mean(self):
        x = np.random.default_rng(0).normal(size=(4, 100))
        x[2, 5] = np.inf
        found = convergence(x)
        assert np.isfinite([found["r_hat"], found["ess_bulk"], found["ess_tail"]]).all()
        assert np.isnan([found["sd"], found["mcse_mean"], found["mcse_sd"]]).all()

    def test_chains_stuck_at_different_values_are_alarming(self):
        x = np.repeat([[0.1], [0.2], [0.3], [0.4]], 100, axis=1)
        assert rhat(x) > 1e6
        assert ess(x) < 5


class TestPSIS:
    def weights(self, size):
        rng = np.random.default_rng(size)
        normal = rng.normal(size=(12, size)) * np.linspace(0.1, 4, 12)[:, None]
        heavy = rng.standard_t(2, size=(3, size))
        tied = np.round(rng.normal(size=(2, size)), 1)
        some_zero = normal[:1].copy()
        some_zero[:, ::3] = -np.inf
        return np.concatenate([normal, heavy, tied, some_zero, normal[:1] - 1e4])

    @pytest.mark.parametrize("size", [25, 100, 225, 226, 1000, 4000])
    @pytest.mark.parametrize("r_eff", [1.0, 0.3, 1.5])
    def test_equals_arviz(self, size, r_eff):
        log_weights = self.weights(size)
        expected, k = array_stats.psislw(-log_weights, r_eff=r_eff)
        found, shape = psis(log_weights, r_eff)
        close(shape, k)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)

    def test_weights_sum_to_one_and_leading_axes_are_kept(self):
        found, k = psis(np.random.default_rng(0).normal(size=(3, 2, 200)))
        assert found.shape == (3, 2, 200)
        assert k.shape == (3, 2)
        close(np.exp(found).sum(axis=-1), np.ones((3, 2)))
        assert isinstance(psis(found[0, 0])[1], np.float64)

    def test_recovers_the_tail_of_pareto_weights(self):
        rng = np.random.default_rng(1)
        for k in (0.3, 0.7):
            _, found = psis(-k * np.log(rng.random((50, 4000))))  # k times exponential
            assert found.mean() == pytest.approx(k, abs=0.05)

    def test_rows_that_cannot_be_fitted_do_not_spoil_the_others(self):
        log_weights = np.random.default_rng(2).normal(size=(4, 100))
        log_weights[1] = 3.0
        log_weights[2, 4] = np.nan
        found, k = psis(log_weights)
        close(found[1], np.full(100, -np.log(100)))
        assert np.isnan(k[1])
        assert np.isnan(k[2])
        assert np.isnan(found[2]).all()
        close(found[[0, 3]], psis(log_weights[[0, 3]])[0])


class TestWrongArguments:
    X = np.random.default_rng(0).normal(size=(4, 20))

    def test_draws(self):
        for x in (self.X[0], self.X * 1j, np.float64(3)):
            for function in (rhat, ess, mcse, convergence, bfmi):
                with pytest.raises(DataError, match="chain, draw"):
                    function(x)

    def test_methods(self):
        with pytest.raises(OptionError, match="choose bulk, tail"):
            ess(self.X, "bluk")
        with pytest.raises(OptionError, match="choose mean, sd"):
            mcse(self.X, "median")

    @pytest.mark.parametrize("prob", [None, 0.0, 1.5, "a", (0.1, 0.9)])
    def test_quantile_probabilities(self, prob):
        for function in (ess, mcse):
            with pytest.raises(OptionError, match="probability"):
                function(self.X, "quantile", prob=prob)

    def test_tail_probabilities(self):
        close(ess(self.X, "tail", prob=0.9), ess(self.X, "tail", prob=(0.1, 0.9)), 1e-15)
        for prob in ((0.1,), (0.1, 0.5, 0.9), (0.0, 0.9)):
            with pytest.raises(OptionError, match="prob"):
                ess(self.X, "tail", prob=prob)
            with pytest.raises(OptionError, match="prob"):
                convergence(self.X, tail_prob=prob)
        for function in (ess, mcse):
            with pytest.raises(OptionError, match="takes no prob"):
                function(self.X, "mean", prob=0.5)

    def test_superchains(self):
        with pytest.raises(OptionError, match="one label per chain"):
            rhat_nested(self.X, [0, 1])
        with pytest.raises(OptionError, match="give every superchain as many"):
            rhat_nested(self.X, [0, 0, 0, 1])

    def test_importance_weights(self):
        with pytest.raises(DataError, match="25 draws"):
            psis(np.zeros((3, 24)))
        with pytest.raises(OptionError, match="r_eff"):
            psis(np.zeros((3, 100)), r_eff=0.0)


def test_imports_nothing_heavy():
    heavy = ("scipy.stats", "pandas", "xarray", "arviz", "arviz_stats", "jax")
    code = (
        "import sys, ppl_toolkit.convergence; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("shape", [(4, 1000, 7), (4, 101, 3), (1, 4, 2), (2, 3, 2)])
def test_quantiles_come_with_the_sorting(shape):
    x = np.random.default_rng(3).normal(size=shape)
    x[0, 0, 0] = np.nan
    found = convergence(x, quantiles=[0.055, 0.5, 0.945])
    for i, prob in enumerate((0.055, 0.5, 0.945)):
        wanted = np.quantile(x, prob, axis=(0, 1))
        np.testing.assert_allclose(found[f"quantile_{i}"], wanted, rtol=1e-14, atol=1e-15)
