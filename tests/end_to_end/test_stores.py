"""Runs on disk: what goes on, what is refused, and what names and labels come back."""

import datetime
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
import xarray
from helpers import others_slow, quiet, quietly
from models import EFFECTS, ERRORS, conjugate, eight_schools
from numpyro import handlers

import ppl_toolkit as ppl
from ppl_toolkit import runner
from ppl_toolkit.errors import CheckpointError, DataError, InferenceWarning, OptionError

SCHOOLS = list("ABCDEFGH")


def schools(**options):
    return quiet(eight_schools, ERRORS, y=EFFECTS, **options)


class TestResume:
    @pytest.fixture
    def store(self, tmp_path):
        schools(
            draws=20, warmup=30, chains=2, seed=7, store=tmp_path / "run.zarr",
            coords={"school": SCHOOLS}, dims={"z": ["school"]},
        )  # fmt: skip
        return tmp_path / "run.zarr"

    def test_options_that_are_left_out_are_those_of_the_run(self, store):
        tree = schools(resume=store, draws=30)
        assert dict(tree["posterior"].sizes) == {"chain": 2, "draw": 30, "school": 8}
        assert list(tree["posterior"]["school"].values) == SCHOOLS
        assert tree["posterior"]["school"].dtype.kind == "U"
        assert (tree.attrs["seed"], tree.attrs["warmup"]) == (7, 30)

    def test_an_unfinished_run_goes_on_to_its_own_number_of_draws(self, tmp_path):
        from ppl_toolkit import runner

        path, advance = tmp_path / "run.zarr", runner.Unit.advance

        def failing(unit, index, count, collect):
            if index >= 80:
                raise MemoryError
            return advance(unit, index, count, collect)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner.Unit, "advance", failing)
            with pytest.raises(ppl.errors.SamplingError):
                schools(draws=90, warmup=30, chunk=10, store=path)
        assert schools(resume=path)["posterior"].sizes["draw"] == 90

    @pytest.mark.parametrize(
        "change",
        [
            {"method": ppl.NUTS(target_acceptance=0.99)},
            {"method": "hmc"},
            {"chains": 4},
            {"seed": 0},
            {"warmup": 31},
            {"lanes": 2},
            {"superchains": 2},
            {"precision": "float32"},
        ],
        ids=str,
    )
    def test_changed_options_are_refused(self, store, change):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            schools(resume=store, **change)

    def test_the_same_options_are_welcome(self, store):
        options = {"chains": 2, "seed": 7, "warmup": 30, "method": ppl.NUTS, "draws": 25}
        assert schools(resume=store, **options)["posterior"].sizes["draw"] == 25

    def test_fewer_draws_than_there_are(self, store):
        with pytest.raises(OptionError, match="20 draws already"):
            schools(resume=store, draws=10)

    def test_a_finished_run_comes_back_as_it_is(self, store):
        before = ppl.load(store).load()
        xarray.testing.assert_equal(schools(resume=store)["posterior"].load(), before["posterior"])

    def test_a_store_whose_draws_are_gone_is_refused(self, store):
        import shutil

        shutil.rmtree(store / "posterior" / "mu")
        import zarr

        zarr.open_group(store / "posterior", use_consolidated=False).create_array(
            "mu", shape=(2, 5), dtype=float, dimension_names=["chain", "draw"]
        )
        with pytest.raises(CheckpointError, match=r"damaged.*mu has 5 draws of the 20"):
            schools(resume=store, draws=30)

    def test_places_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot be written"):
            schools(draws=20, warmup=30, store=tmp_path / "file" / "run.zarr")
        with pytest.raises(OptionError, match="path"):
            schools(store=3)


# --- interrupts in the warm-up ------------------------------------------------------------------

SCRIPT = textwrap.dedent(
    """
    import os, signal, sys, warnings
    sys.path.insert(0, {tests!r})
    from models import EFFECTS, ERRORS, eight_schools
    import ppl_toolkit as ppl
    from ppl_toolkit import runner
    warnings.simplefilter("ignore")
    commit = runner.MemorySink.commit if {store!r} == "None" else None
    from ppl_toolkit import store as stores
    sink = runner.MemorySink if commit else stores.ZarrSink
    commit = sink.commit

    def pressing(self, state, iteration, steps):
        commit(self, state, iteration, steps)
        if iteration == 30:  # the end of the second segment
            os.kill(os.getpid(), signal.SIGINT)

    sink.commit = pressing
    place = None if {store!r} == "None" else {store!r}
    options = dict(draws=40, warmup=100, seed=3, progress=False, chunk=20, store=place)
    tree = ppl.infer(eight_schools, ERRORS, y=EFFECTS, **options)
    assert tree["posterior"].sizes["draw"] == 0, tree
    assert tree.attrs["interrupted"] == 1
    ppl.save(tree, {saved!r})
    """
)


@pytest.mark.parametrize("stored", others_slow([False, True], True), ids=["memory", "disk"])
def test_ctrl_c_in_the_warm_up_leaves_something_to_go_on_with(stored, tmp_path):
    store, saved = (str(tmp_path / "run.zarr") if stored else "None"), str(tmp_path / "part.nc")
    tests = str(Path(__file__).parents[1])
    script = SCRIPT.format(tests=tests, store=store, saved=saved)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    whole = schools(draws=40, warmup=100, seed=3)
    part = ppl.load(saved)
    extended = quietly(ppl.extend, part, eight_schools, ERRORS, y=EFFECTS, draws=40)
    parts = [extended, *([schools(resume=store)] if stored else [])]
    for tree in parts:
        assert tree["posterior"].sizes["draw"] == 40
        for name in ("mu", "tau", "theta"):
            np.testing.assert_array_equal(tree["posterior"][name], whole["posterior"][name])


def test_a_warning_turned_into_an_error_carries_the_result():
    with warnings.catch_warnings():
        warnings.simplefilter("error", InferenceWarning)
        with pytest.raises(InferenceWarning) as caught:
            ppl.infer(eight_schools, ERRORS, y=EFFECTS, draws=20, warmup=5, progress=False)
    assert caught.value.result["posterior"].sizes["draw"] == 20


# --- bare log densities -------------------------------------------------------------------------


def log_normal(x, mean):
    return -0.5 * jnp.sum((x - mean) ** 2)


def test_a_log_density_goes_on_and_is_refitted(tmp_path):
    store = tmp_path / "run.zarr"
    mean = np.array([1.0, -1.0])
    first = quiet(log_normal, mean, init=np.zeros(2), draws=30, store=store)
    more = quiet(log_normal, mean, resume=store, draws=60)
    np.testing.assert_array_equal(more["posterior"]["x"][:, :30], first["posterior"]["x"])
    other = quiet(log_normal, mean + 5, init=more, draws=500)
    assert np.abs(other["posterior"]["x"].mean(["chain", "draw"]) - mean - 5).max() < 0.2


def test_a_model_whose_site_is_called_as_a_positions_is_no_log_density():
    def model(y, sd=1.0):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, sd), obs=y)

    tree = quiet(model, np.ones(3), draws=20, warmup=20)
    more = quietly(ppl.extend, tree, model, np.ones(3), draws=20)
    assert more["posterior"].sizes["draw"] == 40


# --- names and labels ---------------------------------------------------------------------------


def radon(county, floor, y=None):
    """An argument, a plate and an index share the name of the county."""
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("county", 3):
        a = numpyro.sample("a", dist.Normal(mean, 1))
    with numpyro.plate("house", county.shape[0]):
        numpyro.sample("y", dist.Normal(a[county] + floor, 1), obs=y)


HOMES = {
    "county": np.array([0, 1, 1, 2, 0]),
    "floor": np.array([0.0, 1, 0, 1, 1]),
    "y": np.array([0.1, 1.2, 0.3, 1.9, 0.8]),
}


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_argument_may_have_the_name_of_a_plate(where, tmp_path):
    store = tmp_path / "run.zarr" if where == "disk" else None
    tree = quiet(radon, **HOMES, draws=20, warmup=20, store=store)
    assert tree["posterior"]["a"].dims == ("chain", "draw", "county")
    np.testing.assert_array_equal(tree["constant_data"]["county"].values, HOMES["county"])
    assert tree["observed_data"]["y"].dims == ("house",)


def parts(y):
    for side in ("left", "right"):
        numpyro.handlers.scope(part, prefix=side)(y)


def part(y):
    m = numpyro.sample("m", dist.Normal(0, 1))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m, 1), obs=y)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_scoped_sites_come_back_with_dots(where, tmp_path):
    y = np.array([0.5, 1.5])
    store = tmp_path / "run.zarr" if where == "disk" else None
    tree = quiet(parts, y, draws=20, warmup=20, store=store)
    assert set(tree["posterior"].data_vars) == {"left.m", "right.m"}
    assert set(tree["observed_data"].data_vars) == {"left.y", "right.y"}
    more = quietly(ppl.extend, tree, parts, y, draws=10)
    drawn = ppl.predict(more, parts, y)
    drawn = ppl.log_likelihood(drawn, parts, y)
    for group in ("posterior_predictive", "log_likelihood"):
        assert set(drawn[group].data_vars) == {"left.y", "right.y"}
    for suffix in (".nc", ".zarr"):
        again = ppl.load(ppl.save(drawn, tmp_path / f"saved{suffix}"))
        assert set(again["posterior"].data_vars) == {"left.m", "right.m"}


LABELS = {
    "days": np.array(["2024-01-01", "2024-01-02", "2024-01-03"], "datetime64[ns]"),
    "dates": [datetime.date(2024, 1, d) for d in (1, 2, 3)],
    "zoned": pandas.date_range("2024-01-01", periods=3, tz="Europe/Berlin"),
    "periods": pandas.period_range("2024-01", periods=3, freq="M"),
    "mixed": ["a", 1, None],
    "words": ("α", "b c", "d/e"),
    "numbers": range(3),
}


@pytest.mark.parametrize("what", others_slow(LABELS, "days", "zoned", "mixed"))
def test_labels_survive_stores_resumption_and_files(what, tmp_path):
    y, store = np.array([0.1, 0.2, 0.3]), tmp_path / "run.zarr"
    quiet(conjugate, y, coords={"row": LABELS[what]}, draws=20, warmup=20, store=store)
    tree = quiet(conjugate, y, resume=store, draws=25)
    labels = tree["observed_data"]["row"].values
    for given, label in zip(LABELS[what], labels, strict=True):
        assert label == given or str(label) == str(given)
    for suffix in (".nc", ".zarr"):
        again = ppl.load(ppl.save(tree, tmp_path / f"saved{suffix}"))
        np.testing.assert_array_equal(again["observed_data"]["row"].values, labels)


def test_subsampled_rows_are_labelled_by_what_they_are():
    def model(y):
        m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("row", 8, subsample_size=3) as rows:
            numpyro.sample("y", dist.Normal(m, 1), obs=y[rows])

    y = np.arange(8.0)
    tree = quiet(model, y, draws=20, warmup=20)
    rows = tree["observed_data"]["row"].values
    np.testing.assert_array_equal(tree["observed_data"]["y"], y[rows])
    named = quiet(model, y, coords={"row": list("abcdefgh")}, draws=20, warmup=20)
    assert list(named["observed_data"]["row"].values) == [list("abcdefgh")[i] for i in rows]


class TestFiles:
    @pytest.fixture
    def tree(self):
        return quiet(conjugate, np.ones(3), draws=20, warmup=20)

    def test_a_stored_result_can_be_replaced_even_by_itself(self, tree, tmp_path):
        path = ppl.save(tree, tmp_path / "run.zarr")
        ppl.save(ppl.load(path), path)
        xarray.testing.assert_equal(ppl.load(path)["posterior"].load(), tree["posterior"])

    def test_a_folder_of_something_else_is_left_alone(self, tree, tmp_path):
        folder = tmp_path / "mine.zarr"
        folder.mkdir()
        (folder / "letter.txt").write_text("dear")
        with pytest.raises(OptionError, match="not a stored result"):
            ppl.save(tree, folder)
        assert (folder / "letter.txt").read_text() == "dear"

    @pytest.mark.parametrize("name", ["no/such/run.nc", "no/such/run.zarr", "run.txt"])
    def test_places(self, tree, name, tmp_path):
        with pytest.raises(OptionError, match=r"no folder|end it in"):
            ppl.save(tree, tmp_path / name)

    @pytest.mark.parametrize("name", ["junk.nc", "junk.zarr"])
    def test_junk(self, name, tmp_path):
        (tmp_path / name).write_text("junk")
        with pytest.raises(CheckpointError, match="cannot be read"):
            ppl.load(tmp_path / name)

    @pytest.mark.parametrize(
        "call",
        [
            lambda t: ppl.save(t, "x.nc"),
            ppl.summary,
            ppl.report,
            lambda t: ppl.predict(t, conjugate, np.ones(3)),
            lambda t: ppl.extend(t, conjugate, np.ones(3)),
        ],
    )
    def test_what_is_not_a_result(self, call):
        with pytest.raises(DataError, match="DataTree"):
            call({"posterior": 1})

    def test_saving_warns_of_nothing(self, tree, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ppl.save(tree, tmp_path / "quiet.zarr")
            ppl.load(tmp_path / "quiet.zarr")


def test_two_models_with_one_program_and_other_names_share_the_disk_cache(tmp_path, monkeypatch):
    """The same compiled program takes dictionaries of other names; neither may get the other's."""
    from ppl_toolkit import executables

    def make(name):
        def model(y):
            m = numpyro.sample(name, dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(m, 1), obs=y)

        return model

    monkeypatch.setenv("PPL_CACHE_DIR", str(tmp_path))
    for name in ("aa", "bb"):
        tree = quiet(make(name), np.ones(2), init={name: 0.1}, draws=20, warmup=20)
        assert list(tree["posterior"].data_vars) == [name]
        executables.clear()


def test_a_closure_and_an_argument_share_the_disk_cache(tmp_path, monkeypatch):
    from ppl_toolkit import executables

    y = np.ones(3)
    monkeypatch.setenv("PPL_CACHE_DIR", str(tmp_path))
    one = quiet(conjugate, y, draws=20, warmup=20)
    executables.clear()
    two = quiet(handlers.condition(unobserved, {"y": y}), 3, draws=20, warmup=20)
    np.testing.assert_array_equal(one["posterior"]["m"], two["posterior"]["m"])


def unobserved(rows):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", rows):
        numpyro.sample("y", dist.Normal(m, 1.0))


def test_a_slow_store_does_not_make_chunks_short(monkeypatch):
    """What a commit costs is spread over more draws, not fewer."""
    counts = []

    def slowly(sink, block):
        counts.append(block.stats["lp"].shape[1])
        time.sleep(0.02)
        sink.blocks.append(block)

    monkeypatch.setattr(runner, "_CHUNK_SECONDS", 0.005)
    monkeypatch.setattr(runner.MemorySink, "append", slowly)
    schools(draws=2000, warmup=30, chains=2)
    assert sum(counts) == 2000
    assert len(counts) < 100  # nearly 2000 if the chunk's length followed the whole time
