"""Reversible jumps against evidences: right ones pass, wrong ones are caught.

Seeds are fixed; the false-alarm rates over seeds are said.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics import plots
from ppl_toolkit.diagnostics.jump_evidence import CrossCheck, compared, cross_checks
from ppl_toolkit.errors import (
    DataError,
    InferenceWarning,
    MethodError,
    ModelError,
    OptionError,
    SiteError,
)
from ppl_toolkit.inference import (
    MCMC,
    NUTS,
    SMC,
    BirthDeath,
    Gibbs,
    Moves,
    SplitMerge,
    Switch,
    Walk,
    block,
    case,
    cycle,
    masked_plate,
    moment_split,
    repeat,
)

X = np.linspace(-1, 1, 30)
Y = 0.5 + 0.8 * X + 0.1 * X**2 + 0.5 * np.sin(17 * X)
LOG_Z = np.array([-29.66528207, -19.18955030, -20.40819047])


def nested(y):
    """Polynomials of degree 0, 1, 2 with N(0, 1) coefficients and noise of variance 1/4."""
    k = numpyro.sample("k", dist.DiscreteUniform(1, 3))
    with masked_plate("term", 3, k, order="index") as active:
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    x = jnp.linspace(-1.0, 1.0, y.shape[0])
    design = jnp.stack([jnp.ones_like(x), x, x * x], axis=1)
    numpyro.sample("y", dist.Normal(design @ jnp.where(active, b, 0.0), 0.5), obs=y)


@dataclasses.dataclass(frozen=True)
class DropsTheNumbers(BirthDeath):
    """A birth and a death whose ratio lacks n / n', the numbers of elements before and after."""

    def log_det(self, position, v, target):
        k = position["k"]
        return jnp.where(v["up"] == 1, jnp.log((k + 1.0) / k), -jnp.log(k / (k - 1.0)))


def run(model, *data, kernel, seed=0, draws=2000):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return ppl.infer(
            model, *data, method=MCMC(kernel, warmup=100), draws=draws, seed=seed, progress=False
        )


def run_nested(jump, seed=0, draws=2000):
    kernel = repeat(Moves((jump("term"), Walk("b", 0.2)), (2, 1)), 10)
    return run(nested, Y, kernel=kernel, seed=seed, draws=draws)


check = functools.partial(ppl.cross_check, progress=False)


# -- the arithmetic --------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_are_those_of_independent_draws():
    """Against simulation: 2000 replications of draws and evidences whose truth is known.

    The rate of false alarms at level 0.05 lies within 0.03 and 0.07 (4 standard errors of the
    simulation, and what Welch's approximation leaves).
    """
    rng = np.random.default_rng(1)
    p, outside = np.array([0.1, 0.6, 0.3]), 0.05
    rejections = []
    for _ in range(2000):
        drawn = rng.choice([1, 2, 3, 9], (4, 250), p=[*(p * (1 - outside)), outside])
        logs = np.log(p)[:, None] + np.array([[0.05], [0.1], [0.2]]) * rng.normal(size=(3, 8))
        table, _ = compared(drawn, [1, 2, 3], logs)
        rejections.append(2 * stats.norm.sf(table["z"].abs().to_numpy()) < 0.05)
        assert table[["jumps", "smc"]].sum().to_numpy() == pytest.approx([1, 1])
    # z has heavier tails than a normal where SMC's error is large (7 degrees of freedom)
    rates = np.mean(rejections, axis=0)
    assert (rates > 0.03).all()
    assert (rates < 0.09).all()


def test_family_level():
    """P-values are corrected: at most 5% of 2000 replications of the truth fail (plus 4 errors)."""
    rng = np.random.default_rng(2)
    p = np.array([0.1, 0.6, 0.3])
    failed = 0
    for _ in range(2000):
        drawn = rng.choice([1, 2, 3], (4, 250), p=p)
        logs = np.log(p)[:, None] + 0.1 * rng.normal(size=(3, 8))
        failed += (compared(drawn, [1, 2, 3], logs)[0]["p"] < 0.05).any()
    assert failed / 2000 < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 2000)


# -- right and wrong moves -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nested_checks():
    """Of right moves, and of wrong ones, with ten seeds each."""
    return {
        jump: [check(run_nested(jump, seed), nested, Y, seed=seed) for seed in range(10)]
        for jump in (BirthDeath, DropsTheNumbers)
    }


@pytest.mark.slow
def test_evidences_are_exact(nested_checks):
    """Log p(k) p(y | k) within its error, two values a seed; the prior mass of k is in.

    Student's distribution with 7 degrees of freedom: of 20 values one is beyond 6 once in 90 runs.
    """
    for found in nested_checks[BirthDeath]:
        wanted = LOG_Z[found.table.index - 1] - np.log(3.0)
        z = (found.table["log_evidence"] - wanted) / found.table["log_evidence_se"]
        assert z.abs().max() < 6
        assert found.table["log_evidence_se"].max() < 0.1


@pytest.mark.slow
def test_right_jumps_pass(nested_checks):
    """Of ten seeds some fail once in a hundred choices of the seeds."""
    assert all(found.ok for found in nested_checks[BirthDeath])
    exact = np.exp(LOG_Z[1:] - np.logaddexp(*LOG_Z[1:]))
    for found in nested_checks[BirthDeath]:
        assert list(found.table.index) == [2, 3]
        assert found.left_out < 0.005
        np.testing.assert_allclose(found.table["smc"], exact, atol=0.04)
        assert found.resolution < 0.05


@pytest.mark.slow
def test_a_dropped_number_of_elements_is_caught(nested_checks):
    """With every seed."""
    assert all(found.failed for found in nested_checks[DropsTheNumbers])


def mixture(y):
    """Up to three components of unknown weight, mean and scale."""
    k = numpyro.sample("k", dist.DiscreteUniform(1, 3))
    with masked_plate("component", 3, k) as active:
        w = numpyro.sample("w", dist.Gamma(1.0, 1.0))
        m = numpyro.sample("m", dist.Normal(0.0, 3.0))
        s = numpyro.sample("s", dist.LogNormal(0.0, 0.5))
    share = jnp.where(active, w, 0.0)
    log_share = jnp.log(jnp.where(active, share / jnp.sum(share), 1.0))
    each = dist.Normal(m, s).log_prob(y[:, None]) + log_share
    each = jnp.where(active, each, -jnp.inf)
    numpyro.factor("y", jnp.sum(jax.scipy.special.logsumexp(each, axis=1)))


@dataclasses.dataclass(frozen=True)
class NoJacobian(SplitMerge):
    """A split without the determinant of its map; and its trial before the run is switched off."""

    tried = False

    def log_det(self, position, v, target):
        return jnp.zeros(())


def split_of(kind):
    good = moment_split("component", "w", "m", "s")
    return kind(**{f.name: getattr(good, f.name) for f in dataclasses.fields(good)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SplitMerge, NoJacobian])
def test_splits_without_a_jacobian_are_caught(kind):
    """Of a mixture; the right ones pass (once in a thousand seeds they do not)."""
    y = np.array([-2.1, -1.8, -1.5, 1.2, 1.9, 2.2])
    walks = [Walk(name, scale) for name, scale in zip("wms", (1.0, 0.7, 0.5), strict=True)]
    kernel = repeat(Moves((split_of(kind), *walks), (3, 1, 1, 1)), 10)
    found = check(run(mixture, y, kernel=kernel), mixture, y, seed=3)
    assert found.ok == (kind is SplitMerge), found


# -- cases, and sites that the user names ----------------------------------------------------------


def curve(x, y):
    """A line or an exponential."""
    shape = numpyro.sample("shape", dist.Categorical(jnp.array([0.3, 0.7])))
    with case(shape, 0):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with case(shape, 1):
        rate = numpyro.sample("rate", dist.HalfNormal(1.0))
    mean = jnp.where(shape == 0, 1 - slope * x, jnp.exp(-rate * x))
    numpyro.sample("y", dist.Normal(mean, 0.3), obs=y)


T = np.linspace(0, 2, 8)
CURVE = T, np.exp(-0.8 * T) + 0.15 * np.cos(9 * T)


@dataclasses.dataclass(frozen=True)
class Eager(Switch):
    """Enters the second case twice as often as it should."""

    def log_det(self, position, v, target):
        return jnp.where(v["to"] == 1, jnp.log(2.0), -jnp.log(2.0))


@pytest.fixture(scope="module")
def curves():
    moves = {kind: Moves((kind("shape"), Walk("slope", 0.2), Walk("rate", 0.3))) for kind in
             (Switch, Eager)}  # fmt: skip
    return {kind: run(curve, *CURVE, kernel=repeat(k, 10)) for kind, k in moves.items()}


@pytest.mark.slow
def test_cases(curves):
    assert check(curves[Switch], curve, *CURVE).ok
    assert check(curves[Eager], curve, *CURVE).failed


@pytest.mark.slow
def test_a_site_that_the_user_names():
    """No context says what depends on it: an indicator in the arithmetic of the model."""

    def either(y):
        which = numpyro.sample("which", dist.Bernoulli(0.3))
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.where(which, m, 0.0), 1.0), obs=y)

    kernel = cycle([block(Gibbs(), ["which"]), block(NUTS(), ["m"])])
    tree = run(either, np.asarray(1.2), kernel=kernel)
    found = check(tree, either, np.asarray(1.2), site="which")
    densities = stats.norm.pdf(1.2, scale=np.sqrt([1.0, 2.0])) * [0.7, 0.3]
    assert found.ok
    np.testing.assert_allclose(found.table["smc"], densities / densities.sum(), atol=0.02)
    with pytest.raises(SiteError, match="has none"):
        check(tree, either, np.asarray(1.2))


# -- what it says ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_picture_and_page(nested_checks, curves, tmp_path):
    good, bad = nested_checks[BirthDeath][0], nested_checks[DropsTheNumbers][0]
    assert "Nothing contradicts the jumps" in str(good)
    assert "disagree about k = " in str(bad)
    assert str(bad).count("\n") == 4
    plots.cross_check(bad).savefig(tmp_path / "picture.png")
    for found, tree in ((bad, run_nested(BirthDeath, draws=100)), (good, curves[Switch])):
        with_check = found.attached(tree)
        ppl.save(with_check, tmp_path / "run.nc")
        loaded = ppl.load(tmp_path / "run.nc")
        (again,) = cross_checks(loaded)
        assert str(again) == str(found)
        ppl.report(loaded, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert "Cross-check of k" in page
        assert found.verdict in page
    assert not cross_checks(curves[Switch])


def test_a_check_without_power_says_so():
    rng = np.random.default_rng(0)
    drawn = rng.choice([1, 2], (4, 250))
    table, resolution = compared(drawn, [1, 2], 2.0 * rng.normal(size=(2, 3)))
    found = CrossCheck(table, "k", 0.0, resolution, 1e-3, 3, "SMC()")
    assert found.ok
    assert "no difference would have counted" in found.verdict
    assert "more particles" in found.verdict


@pytest.mark.slow
def test_one_program_serves_all_values(nested_checks):
    tree = run_nested(BirthDeath)
    compilations.clear()
    check(tree, nested, Y, seed=77)
    assert compilations == []


# -- what is refused -------------------------------------------------------------------------------


def flat(y):
    k = numpyro.sample("k", dist.DiscreteUniform(0, 1))
    m = numpyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(m + k, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore::ppl_toolkit.errors.InferenceWarning")
def test_what_is_refused():
    tree = run_nested(BirthDeath)

    def another(y):
        k = numpyro.sample("k", dist.DiscreteUniform(1, 3))
        with masked_plate("term", 3, k, order="index") as active:
            b = numpyro.sample("b", dist.Normal(0.0, 2.0))
        numpyro.sample("y", dist.Normal(jnp.sum(jnp.where(active, b, 0.0)), 0.5), obs=y)

    for error, message, call in (
        (ModelError, "not that of the result", lambda: check(tree, another, Y)),
        (DataError, "not those of the result", lambda: check(tree, nested, Y + 1)),
        (SiteError, "'b' is none. There are .'k'", lambda: check(tree, nested, Y, site="b")),
        (DataError, "never .7. in the draws", lambda: check(tree, nested, Y, values=[2, 7])),
        (DataError, "two values of k", lambda: check(tree, nested, Y, values=[2])),
        (DataError, "two values of k", lambda: check(tree, nested, Y, threshold=0.5)),
        (OptionError, "threshold", lambda: check(tree, nested, Y, threshold=0.0)),
        (OptionError, "level", lambda: check(tree, nested, Y, level=1.0)),
        (OptionError, "chains", lambda: check(tree, nested, Y, chains=2)),
        (OptionError, "method must be an SMC", lambda: check(tree, nested, Y, method=NUTS())),
        (MethodError, "moves the latent sites", lambda: check(
            tree, nested, Y, method=SMC(kernel=Idle()))),
        (DataError, "expected a result", lambda: check(None, nested, Y)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(SiteError, match="no draws of 'k'"):
        check(ppl.infer(conjugate, Y, draws=10, progress=False), nested, Y)
    kernel = cycle([block(NUTS(), ["m"]), block(Gibbs(), ["k"])])
    improper = run(flat, np.asarray(0.3), kernel=kernel, draws=50)
    with pytest.raises(MethodError, match="improper"):
        check(improper, flat, np.asarray(0.3), site="k")


@dataclasses.dataclass(frozen=True)
class Idle(Walk):
    """Says that it moves nothing."""

    site: str = "b"
    scale: float = 1.0

    def require(self, space):
        pass

    def moves(self, space):
        return frozenset()


def conjugate(y):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)
