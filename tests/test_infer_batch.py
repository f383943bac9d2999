"""Many data sets by one program: the same draws as one by one, right answers, nothing lost."""

import functools
import os
import pickle
import signal
import warnings

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
from helpers import compilations, others_slow, quiet, quietly
from models import EFFECTS, ERRORS, conjugate, die, eight_schools
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit import convergence, engine, executables, units
from ppl_toolkit.batch import data_set_seeds
from ppl_toolkit.batch_results import Drawn, single
from ppl_toolkit.diagnostics.findings import diagnose
from ppl_toolkit.diagnostics.many import judge, summarised
from ppl_toolkit.errors import (
    DataError,
    InferenceWarning,
    InitializationError,
    MethodError,
    ModelError,
    OptionError,
    PPLError,
    SiteError,
)
from ppl_toolkit.inference import MAP, SGLD, SMC

COUNT, ROWS = 20, 5
# Means far apart: draws that belong to another data set are far off.
MEANS = np.random.default_rng(1).normal(0.0, 20.0, COUNT)
Y = MEANS[:, None] + np.random.default_rng(2).normal(size=(COUNT, ROWS))
Y = Y.astype(np.float32).astype(float)  # JAX's arrays hold these numbers, too
SCHOOLS = EFFECTS + 5.0 * np.random.default_rng(3).normal(size=(6, 8))
BUDGET = {"draws": 60, "warmup": 80}
PASSING = ("created_at", "time_compile", "time_warmup", "time_sampling", "n_threads")

batch = functools.partial(quietly, ppl.infer_batch)


def schools(y=SCHOOLS, **options):
    return batch(eight_schools, ERRORS, y=y, over="y", **{"seed": 7, **BUDGET, **options})


def school(number, **options):
    seed = data_set_seeds(7, len(SCHOOLS))[number]
    return quiet(eight_schools, ERRORS, y=SCHOOLS[number], seed=seed, **{**BUDGET, **options})


@pytest.fixture(scope="module")
def normal():
    """Of a normal mean, by NUTS as it comes."""
    return batch(conjugate, Y, over="y", seed=11)


@pytest.fixture(scope="module")
def reference():
    tree = schools()
    draws = tree["posterior"]["theta"]
    assert draws.dims == ("data_set", "chain", "draw", "school")
    assert draws.shape == (6, 4, BUDGET["draws"], 8)
    assert len({draws.values[i].tobytes() for i in range(6)}) == 6
    return tree


def assert_same(one, other, passing=PASSING):
    """Two results are the same, bit for bit, in all but times."""
    assert set(one.children) == set(other.children)
    for name, group in one.children.items():
        own, theirs = group.to_dataset(), other[name].to_dataset()
        assert set(own.data_vars) == set(theirs.data_vars)
        assert set(own.coords) == set(theirs.coords)
        for key in own.variables:
            a, b = own[key], theirs[key]
            assert (a.dims, a.dtype) == (b.dims, b.dtype), (name, key)
            assert a.values.tobytes() == b.values.tobytes(), (name, key)
    assert set(one.attrs) == set(other.attrs)
    for key in set(one.attrs) - set(passing):
        assert one.attrs[key] == other.attrs[key], key


def draws_of(tree, name="theta"):
    return np.asarray(tree["posterior"][name])


# --- the draws ----------------------------------------------------------------------------------


def test_each_data_set_is_what_infer_gives(reference):
    """All groups, statistics, the sampler's state, the attributes and findings included."""
    for number in range(len(SCHOOLS)):
        assert_same(ppl.one_of(reference, number), school(number))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(threads, reference):
    for group in ("posterior", "sample_stats", "sampler_state", "diagnostics"):
        again = schools(threads=threads)
        for name, values in reference[group].data_vars.items():
            assert values.values.tobytes() == again[group][name].values.tobytes(), (group, name)


def test_draws_depend_on_the_data_set_and_its_seed_alone(reference):
    """Others beside it, their number and their order are nothing to it."""
    seeds = data_set_seeds(7, len(SCHOOLS))
    order = [4, 0, 3]
    some = schools(SCHOOLS[order], seed=[seeds[i] for i in order])
    np.testing.assert_array_equal(draws_of(some), draws_of(reference)[order])
    alone = schools(SCHOOLS[4:5], seed=[seeds[4]])
    assert alone["posterior"]["theta"].dims[0] == alone["observed_data"]["y"].dims[0] == "data_set"
    np.testing.assert_array_equal(draws_of(alone)[0], draws_of(reference)[4])
    first = schools(SCHOOLS[:2])
    np.testing.assert_array_equal(draws_of(first), draws_of(reference)[:2])


@pytest.mark.slow
def test_chains_in_lock_step_as_on_accelerators(monkeypatch):
    """Two lanes for three chains, so that one unit is padded."""
    monkeypatch.setattr("ppl_toolkit.front_door._default_lanes", lambda chains: 2)
    tree = batch(conjugate, Y[:3], over="y", chains=3, **BUDGET)
    own = quiet(conjugate, Y[2], chains=3, lanes=2, seed=data_set_seeds(0, 3)[2], **BUDGET)
    assert_same(ppl.one_of(tree, 2), own)


def test_more_draws_than_one_call_of_the_program_gives(monkeypatch):
    """Blocks of 37 draws are joined to what one block of all gives."""
    whole = schools(SCHOOLS[:2], draws=100)
    init = engine.Engine.__init__

    def small(engine, *args):
        init(engine, *args)
        engine.rows = 37

    monkeypatch.setattr(engine.Engine, "__init__", small)
    executables.clear()  # the length of the buffers is not in the key
    monkeypatch.setenv("PPL_CACHE_DIR", "off")
    parts = schools(SCHOOLS[:2], draws=100)
    executables.clear()
    np.testing.assert_array_equal(draws_of(whole), draws_of(parts))


def test_seeds_are_those_that_are_documented():
    seeds = data_set_seeds(5, 4)
    for number, seed in enumerate(seeds):
        sequence = np.random.SeedSequence(5, spawn_key=(number,))
        assert seed == sequence.generate_state(1, np.uint64)[0] >> 1
    assert seeds[:2] == data_set_seeds(5, 2)
    assert len({*seeds, *data_set_seeds(6, 4)}) == 8


def test_exact_posteriors(normal):
    """Twenty means with known posteriors, by two joint tests: z-scores of means and of standard
    deviations in Monte Carlo errors. Each fails once in 10,000 at right draws (seed fixed).
    """
    precision = ROWS + 0.25
    mean, sd = Y.sum(axis=1) / precision, precision**-0.5
    found = convergence.convergence(np.moveaxis(draws_of(normal, "m"), 0, -1))
    z_mean = (found["mean"] - mean) / found["mcse_mean"]
    z_sd = (found["sd"] - sd) / found["mcse_sd"]
    for z in (z_mean, z_sd):
        assert stats.chi2.sf(np.sum(z**2), COUNT) > 1e-4
        assert stats.chi2.cdf(np.sum(z**2), COUNT) > 1e-4  # errors are not overstated either
    assert found["mcse_mean"].max() < 0.1 * sd


METHODS = {
    "hmc": (conjugate, {"method": "hmc", **BUDGET}),
    "smc": (conjugate, {"method": SMC(particles=64), "chains": 2}),
    "map": (conjugate, {"method": MAP()}),
    "enumeration": (die, {"draws": 30}),
}


@pytest.mark.parametrize("name", others_slow(METHODS, "hmc", "map", "enumeration"))
def test_other_methods(name):
    """As by infer, whose evidences and stages are there too."""
    model, options = METHODS[name]
    data = Y[:3] if model is conjugate else np.array([0.0, 1.5, 2.0])
    tree = batch(model, y=data, over="y", seed=2, **options)
    seeds = data_set_seeds(2, 3)
    for number in range(3):
        own = quiet(model, y=data[number], seed=seeds[number], **options)
        assert_same(ppl.one_of(tree, number), own)
    if name == "smc":
        assert tree["smc"]["temperature"].dims == ("data_set", "chain", "stage")


# --- one program --------------------------------------------------------------------------------


def test_one_compilation(monkeypatch):
    """The start and the loop, each once, for however many data sets; infer shares them."""
    monkeypatch.setenv("PPL_CACHE_DIR", "off")
    executables.clear()
    before = len(compilations)
    batch(conjugate, Y, over="y", **BUDGET)
    assert len(compilations) == before + 2
    more = np.concatenate([Y + 1, Y - 1])
    batch(conjugate, more, over="y", seed=3, draws=90, warmup=70, chains=3)
    quiet(conjugate, Y[0], **BUDGET)
    assert len(compilations) == before + 2


# --- ways to give data --------------------------------------------------------------------------


def regression(x, y, noise=1.0, prior=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, prior["scale"]))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


X = np.linspace(0.0, 1.0, ROWS)
PRIOR = {"scale": np.array(3.0), "kind": "normal"}
WAYS = {
    "a list of arrays": lambda: batch(
        regression, X, list(Y), prior=PRIOR, over=["y"], **BUDGET
    ),
    "by name, as JAX's array": lambda: batch(
        regression, x=X, y=jnp.asarray(Y), prior=PRIOR, over=("y",), **BUDGET
    ),
    "a data frame": lambda: batch(
        regression, X, pandas.DataFrame(Y, index=list("ABCDEFGHIJKLMNOPQRST")), prior=PRIOR,
        over="y", **BUDGET,
    ),
    "through data=": lambda: batch(
        regression, X, data={"y": Y, "prior": PRIOR}, over="y", **BUDGET
    ),
    "x as well": lambda: batch(
        regression, np.tile(X, (COUNT, 1)), Y, prior=PRIOR, over=["x", "y"], **BUDGET
    ),
    "numbers": lambda: batch(
        regression, X, Y, [1.0] * COUNT, prior=PRIOR, over=["y", "noise"], **BUDGET
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def lines():
    return batch(regression, X, Y, prior=PRIOR, over="y", **BUDGET)


@pytest.mark.parametrize("way", others_slow(WAYS, "a data frame", "x as well", "numbers"))
def test_ways_to_give_data(way, lines):
    tree = WAYS[way]()
    np.testing.assert_array_equal(draws_of(tree, "slope"), draws_of(lines, "slope"))
    assert tree["observed_data"]["y"].dims == ("data_set", "row")
    assert tree["constant_data"]["prior__scale"].dims == ()
    x_dims = ("data_set", "row") if "x" in tree.attrs["over"] else ("row",)
    assert tree["constant_data"]["x"].dims == x_dims


def test_parts_of_a_dictionary_vary_together():
    scales = np.geomspace(0.1, 10.0, 3)
    tree = batch(regression, X, Y[0], prior={"scale": scales}, over="prior", **BUDGET)
    assert tree["observed_data"]["y"].dims == ("row",)  # shared
    np.testing.assert_array_equal(tree["constant_data"]["prior__scale"], scales)
    for number, scale in enumerate(scales):
        own = quiet(
            regression, X, Y[0], prior={"scale": scale}, **BUDGET,
            seed=data_set_seeds(0, 3)[number],
        )  # fmt: skip
        assert_same(ppl.one_of(tree, number), own)


# --- bad input ----------------------------------------------------------------------------------

NAN = np.where(np.arange(Y.size).reshape(Y.shape) == 37, np.nan, Y)  # in data set 7
UNEVEN = [*Y[:4], Y[4, :3], Y[5, :2]]


def peeks(y):
    numpyro.sample("m", dist.Normal(0.0, 1.0 if y[0] > 0 else 2.0))
    numpyro.sample("y", dist.Normal(0.0, 1.0).expand([len(y)]), obs=y)


def counted(y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Poisson(rate), obs=y)


def doubled(y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Exponential(rate), obs=2.0 * y)


def plated(y):
    with numpyro.plate("data_set", 3):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m.sum(), 1.0), obs=y)


def subsampled(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", y.shape[0], subsample_size=2) as rows:
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y[rows])


def labelled(labels, y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m + (labels == "a").mean(), 1.0), obs=y)


def tabled(table):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=table["y"].values)


LABELS = [np.array(["a"] * 2000), np.array(["a"] * 900 + ["b"] * 200 + ["a"] * 900)]
TABLES = [pandas.DataFrame({"y": np.r_[np.zeros(50), np.full(50, x)]}) for x in (0.0, 4.0)]
on = functools.partial(ppl.infer_batch, progress=False)
BAD = {
    "nothing varies": (lambda: on(conjugate, Y, over=[]), OptionError, "over= names"),
    "over an array": (lambda: on(conjugate, Y, over=Y), OptionError, "over= names the arguments"),
    "unknown": (lambda: on(conjugate, Y, over="z"), OptionError, r"\['z'\].*\['y'\]"),
    "one number": (
        lambda: on(regression, X, Y, 1.0, over=["y", "noise"]), OptionError, "'noise'.* 1.0",
    ),
    "None": (lambda: on(eight_schools, ERRORS, y=None, over="y"), OptionError, "which is None"),
    "different numbers": (
        lambda: on(regression, np.tile(X, (3, 1)), Y, prior=PRIOR, over=["x", "y"]), DataError,
        r"'x': 3, 'y': 20",
    ),
    "an empty batch": (lambda: on(conjugate, Y[:0], over="y"), DataError, "no data sets"),
    "an empty list": (lambda: on(conjugate, [], over="y"), DataError, "no data sets"),
    "data sets without data": (
        lambda: on(conjugate, Y[:, :0], over="y"), DataError, "data set 0: .*there is no data",
    ),
    "shapes": (
        lambda: on(conjugate, UNEVEN, over="y"), DataError,
        r"data set 4: argument 'y' has shape \(3,\), but \(5,\) in data set 0",
    ),
    "types": (
        lambda: on(conjugate, [Y[0], Y[1], Y[2].astype(int)], over="y"), DataError,
        "data set 2: argument 'y' has type int64, but float64",
    ),
    "structures": (
        lambda: on(conjugate, [Y[0], None], over="y"), DataError, r"set 1: its arrays are \[\]",
    ),
    "settings": (
        lambda: on(
            regression, X, Y[:2], prior=[PRIOR, PRIOR | {"kind": "flat"}], over=["y", "prior"]
        ), DataError, "set 1: its 'flat' differs from the 'normal' of data set 0",
    ),
    "long labels": (
        lambda: on(labelled, LABELS, Y[:2], over=["labels", "y"]), DataError,
        "set 1: its ndarray differs from the ndarray of data set 0.*codes of labels",
    ),
    "tables": (
        lambda: quietly(with_baked, on, tabled, TABLES, over="table"), DataError,
        "set 1: its DataFrame differs.*dictionary of a table's columns",
    ),
    "options of infer": (
        lambda: on(conjugate, Y, over="y", init={"m": 0.0}, until=ppl.Goal(ess=1)), OptionError,
        r"no options \['until', 'init'\]",
    ),
    "NaN": (lambda: on(conjugate, NAN, over="y"), DataError, "data set 7: .*NaN"),
    "NaN first": (lambda: on(conjugate, NAN[7:], over="y"), DataError, "data set 0: .*NaN"),
    "NaN of a covariate": (
        lambda: on(regression, NAN, Y[0], prior=PRIOR, over="x"), DataError,
        "data set 7: argument 'x' has 1 NaN",
    ),
    "outside the support": (
        lambda: on(counted, np.array([1, 2, -1, 4]), over="y"), DataError,
        "data set 2: .*value -1.*outside",
    ),
    "a model that peeks": (
        lambda: quietly(with_baked, on, peeks, Y, over="y"), ModelError, "infer in a loop",
    ),
    "a dimension's name": (lambda: on(plated, Y[:, 0], over="y"), SiteError, "'data_set' of its"),
    "the prior": (lambda: on(conjugate, Y, over="y", method="prior"), MethodError, "no draws from"),
    "minibatches": (
        lambda: on(subsampled, Y, over="y", method=SGLD(0.1)), MethodError, "rows of subsampled",
    ),
    "discrete": (
        lambda: on(die, np.zeros(3), over="y", method="nuts"), MethodError, "discrete",
    ),
    "labels": (
        lambda: on(conjugate, Y, over="y", coords={"data_set": list("abc")}), DataError,
        "3 labels, but the dimension has 20",
    ),
    "labels twice": (
        lambda: on(conjugate, Y[:3], over="y", coords={"data_set": list("aba")}), DataError,
        "several data sets alike",
    ),
    "seeds": (lambda: on(conjugate, Y, over="y", seed=[1, 2]), OptionError, "2 seeds.*20 data"),
    "a seed": (lambda: on(conjugate, Y[:2], over="y", seed=[1, -2]), OptionError, "seed.*-2"),
    "draws": (lambda: on(conjugate, Y, over="y", draws=0), OptionError, "draws"),
}  # fmt: skip


def with_baked(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    before = len(compilations)
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        call()
    assert isinstance(caught.value, PPLError)
    assert len(compilations) == before, "nothing may be compiled for bad input"
    assert 20 < len(str(caught.value)) < 600


def test_what_the_model_computes_from_the_data_is_checked():
    with pytest.raises(DataError, match=r"data set 2: .*outside the support"):
        on(doubled, np.array([1.0, 2.0, -3.0]), over="y")


# --- trouble ------------------------------------------------------------------------------------


def doctored(tree):
    """The result of healthy runs, some of them made ill in one way each; and what in."""
    posterior, sample_stats = (tree[g].to_dataset() for g in ("posterior", "sample_stats"))
    rng, shape = np.random.default_rng(0), posterior["m"].shape
    draws, other = posterior["m"].values.copy(), rng.normal(size=shape)
    statistics = {name: x.values.copy() for name, x in sample_stats.data_vars.items()}
    draws[1], other[1] = 1.0, 2.0  # all chains frozen at one point
    draws[2] = np.nan
    draws[3, 1] += 50.0
    slow = rng.normal(size=shape[1:])
    for t in range(1, slow.shape[1]):
        slow[:, t] += 0.87 * slow[:, t - 1]
    halves = slow.reshape(shape[1], 2, -1)
    draws[4] = (halves - halves.mean(2, keepdims=True)).reshape(slow.shape)  # R-hat is low
    draws[5] = rng.standard_cauchy(shape[1:])
    statistics["diverging"][6, 1, :7] = True
    statistics["reached_max_treedepth"][7, :, :100] = True
    energy = statistics["energy"]
    energy[8] = np.cumsum(energy[8] - energy[8].mean(), axis=1)
    draws[9] = np.nan
    statistics["diverging"][9, 0, 0] = True
    draws[10] = rng.normal(size=shape[1:]) * np.array([0.85, 1.0, 1.0, 1.15])[:, None]
    new, dims = tree.copy(), posterior["m"].dims
    new["posterior"] = posterior.assign(m=(dims, draws), other=(dims, other))
    new["sample_stats"] = sample_stats.assign({n: (dims, x) for n, x in statistics.items()})
    return new, {
        1: "stuck", 2: "not_finite", 3: "multimodal, ess", 4: "ess", 5: "mcse", 6: "divergences",
        7: "tree_depth", 8: "bfmi", 9: "divergences, not_finite", 10: "r_hat",
    }  # fmt: skip


def test_the_table_has_the_findings_of_every_data_set(normal):
    """Those that judging each alone has, in words and numbers; none where nothing is wrong."""
    tree, ill = doctored(normal)
    verdicts = judge(tree, lambda place: single(tree, place), 2)
    for number in range(COUNT):
        alone = diagnose(single(tree, number))
        assert verdicts.found.get(number, []) == alone
        kinds = str(verdicts.table["findings"].values[number])
        assert kinds == ", ".join(finding.kind for finding in alone)
        if number in ill:
            assert set(kinds.split(", ")) == set(ill[number].split(", "))
    joint = {finding.kind: finding for finding in summarised(verdicts.found, COUNT)}
    assert "divergences: 2 of 20 data sets (6, 9). The worst is 6: 7 of" in (
        joint["divergences"].message
    )
    assert joint["ess"].message.startswith("ess: 2 of 20 data sets (3, 4). The worst is 3: the")
    assert joint["mcse"].message.startswith("mcse: 1 of 20 data sets (5): the Monte Carlo error")


@pytest.mark.parametrize("number", [0, 4])
def test_figures_of_the_table(number, reference):
    own = ppl.summary(ppl.one_of(reference, number))
    row = reference["diagnostics"].to_dataset().sel(data_set=number)
    assert float(row["ess"]) == own[["ess_bulk", "ess_tail"]].min(axis=None)
    assert float(row["r_hat"]) == own["r_hat"].max()
    errors = own[["mcse_mean", "mcse_sd"]].max(axis=1) / own["sd"]
    assert float(row["mcse"]) == pytest.approx(errors.max(), rel=1e-12)
    statistics = reference["sample_stats"].to_dataset().sel(data_set=number)
    assert int(row["divergences"]) == int(statistics["diverging"].sum())
    assert float(row["acceptance"]) == pytest.approx(float(statistics["acceptance_rate"].mean()))
    assert float(row["tree_depth"]) == float(statistics["reached_max_treedepth"].mean())
    assert float(row["bfmi"]) == pytest.approx(convergence.bfmi(statistics["energy"]).min())


def test_trouble_is_in_one_warning_that_carries_the_result():
    """Draws too few to be judged: the same finding of all, said once."""
    with pytest.warns(InferenceWarning) as caught:
        on(conjugate, Y[:7], over="y", draws=20, warmup=80)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "few_draws: 7 of 7 data sets (0, 1, 2, 3, 4 and 2 more). The worst is 0: " in text
    assert "Draw more" in text
    tree = caught[0].message.result
    assert ppl.findings(tree)[0].kind == "few_draws"
    assert all("few_draws" in kinds for kinds in tree["diagnostics"]["findings"].values)


def test_healthy_runs_say_nothing(normal):
    healthy = np.flatnonzero(normal["diagnostics"]["findings"].values == "")
    assert len(healthy) >= COUNT - 4
    seeds = data_set_seeds(11, COUNT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on(conjugate, Y[healthy[:3]], over="y", seed=[seeds[i] for i in healthy[:3]])


def fussy(y):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    numpyro.factor("taboo", jnp.where(y[0] > 1000.0, -jnp.inf, 0.0))
    numpyro.sample("y", dist.Normal(m, 1.0).expand(y.shape), obs=y)


def test_data_sets_that_fail_are_left_out_and_named():
    data = Y[:5].copy()
    data[[1, 3], 0] = 2000.0
    with pytest.warns(InferenceWarning, match=r"failed: 2 of 5 data sets \(b, d\)") as caught:
        tree = on(fussy, data, over="y", coords={"data_set": list("abcde")}, **BUDGET)
    assert len(caught) == 1
    assert list(tree["posterior"]["data_set"].values) == list("ace")
    assert list(tree["failed"]["data_set"].values) == list("bd")
    assert "InitializationError: chain 0 found no finite" in str(tree["failed"]["error"].values[0])
    assert "taboo" in str(tree["failed"]["error"].values[1])
    assert ppl.findings(tree)[0].kind == "failed"
    own = quiet(fussy, data[4], seed=data_set_seeds(0, 5)[4], **BUDGET)
    assert_same(ppl.one_of(tree, "e"), own)
    with pytest.raises(InitializationError, match=r"all 2 data sets failed\. Data set 0: chain 0"):
        on(fussy, data[[1, 3]], over="y", **BUDGET)


def test_a_crash_in_one_data_set_does_not_cost_the_others(monkeypatch, reference):
    advance = units.Unit.advance
    seed = data_set_seeds(7, 6)[2]
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)

    def failing(unit, index, count, collect):
        if collect and 1 in unit.chains and np.array_equal(unit.inputs[3], words):
            raise MemoryError("no more")
        return advance(unit, index, count, collect)

    monkeypatch.setattr(units.Unit, "advance", failing)
    tree = schools()
    assert list(tree["failed"]["error"].values) == ["MemoryError: no more"]
    others = [0, 1, 3, 4, 5]
    assert list(tree["runs"]["data_set"].values) == others
    np.testing.assert_array_equal(draws_of(tree), draws_of(reference)[others])


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_returns_the_data_sets_that_are_finished(presses, monkeypatch, reference):
    """Pressed when the third is; a second time at once. Those under way are given up."""
    put = Drawn.put

    def pressing(drawn, number, finished):
        put(drawn, number, finished)
        if len(drawn.numbers) == 3:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Drawn, "put", pressing)
    with pytest.warns(
        InferenceWarning, match="interrupted: [345] of 6 data sets are done"
    ) as caught:
        tree = on(eight_schools, ERRORS, y=SCHOOLS, over="y", seed=7, threads=1, **BUDGET)
    assert len(caught) == 1
    there = tree["posterior"]["data_set"].values
    assert 3 <= len(there) < 6
    assert tree.attrs["interrupted"] == 1
    np.testing.assert_array_equal(draws_of(tree), draws_of(reference)[there])
    np.testing.assert_array_equal(tree["observed_data"]["y"], SCHOOLS[there])
    assert_same(ppl.one_of(tree, there[2]), school(there[2]))
    # The others, with their seeds, complete the run.
    left = np.setdiff1d(np.arange(6), there)
    seeds = data_set_seeds(7, 6)
    monkeypatch.setattr(Drawn, "put", put)
    rest = schools(SCHOOLS[left], seed=[seeds[i] for i in left])
    np.testing.assert_array_equal(draws_of(rest), draws_of(reference)[left])


def test_ctrl_c_before_anything_is_finished(monkeypatch):
    """Pressed once, in the first warm-up: neither its end nor other data sets are waited for."""
    calls, advanced = [], units.advanced

    def pressing(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return advanced(*args)

    monkeypatch.setattr(units, "advanced", pressing)
    with pytest.raises(KeyboardInterrupt):
        schools(threads=1)
    assert 2 <= len(calls) <= 4  # the signal may come a little later


def test_a_mistake_in_judging_does_not_cost_the_draws(monkeypatch, reference):
    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("ppl_toolkit.batch.judge", broken)
    with pytest.warns(InferenceWarning, match="could not be computed .ZeroDivisionError: oh"):
        tree = on(eight_schools, ERRORS, y=SCHOOLS, over="y", seed=7, **BUDGET)
    np.testing.assert_array_equal(draws_of(tree), draws_of(reference))


# --- the result ---------------------------------------------------------------------------------


def test_one_of_goes_on_like_the_run_itself(reference):
    one = ppl.one_of(reference, 2)
    longer, again = (
        quietly(ppl.extend, tree, eight_schools, ERRORS, y=SCHOOLS[2], draws=20)
        for tree in (one, school(2))
    )
    assert_same(longer, again)
    assert longer["posterior"].sizes["draw"] == BUDGET["draws"] + 20
    assert "theta" in str(ppl.report(one))
    assert len(az.summary(one)) == 18


def test_labels_name_the_data_sets():
    names = ["BRCA1", "TP53"]
    tree = schools(SCHOOLS[:2], coords={"data_set": names, "school": list("ABCDEFGH")})
    for group in (
        "posterior",
        "sample_stats",
        "observed_data",
        "sampler_state",
        "diagnostics",
        "runs",
    ):
        assert list(tree[group]["data_set"].values) == names
    np.testing.assert_array_equal(ppl.one_of(tree, "TP53")["observed_data"]["y"], SCHOOLS[1])
    table = ppl.summary(tree, "theta")
    assert list(table.index[[0, 15]]) == ["theta[BRCA1, A]", "theta[TP53, H]"]
    own = ppl.summary(ppl.one_of(tree, "TP53"), "theta")
    np.testing.assert_array_equal(table["mean"].values[8:], own["mean"].values)
    with pytest.raises(DataError, match=r"no data set 1 in this result; there are BRCA1, TP53"):
        ppl.one_of(tree, 1)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_files(suffix, reference, tmp_path):
    ppl.save(reference, tmp_path / f"batch{suffix}")
    loaded = ppl.load(tmp_path / f"batch{suffix}")
    assert_same(ppl.one_of(loaded, 5), school(5))
    assert ppl.findings(loaded) == ppl.findings(reference)


def test_calls_for_one_data_set_say_what_to_do(reference):
    for call in (
        lambda: ppl.report(reference),
        lambda: ppl.extend(reference, eight_schools, ERRORS, y=SCHOOLS[0]),
        lambda: ppl.predict(reference, eight_schools, ERRORS),
        lambda: ppl.loo(reference, eight_schools, ERRORS, y=SCHOOLS[0]),
        lambda: quiet(eight_schools, ERRORS, y=SCHOOLS[0], init=reference),
    ):
        with pytest.raises(DataError, match=r"for many data sets.*ppl\.one_of"):
            call()
    with pytest.raises(DataError, match="for one data set"):
        ppl.one_of(school(0), 0)


def test_progress_counts_data_sets(capfd):
    quietly(ppl.infer_batch, conjugate, Y[:3], over="y", progress="lines", **BUDGET)
    shown = capfd.readouterr().err
    assert "NUTS: all latent sites are continuous (D = 1)." in shown
    assert "NUTS, 4 chains each: 3/3 data sets" in shown


def test_results_can_be_pickled(reference):
    assert_same(ppl.one_of(pickle.loads(pickle.dumps(reference)), 1), school(1))
