"""Methods without gradients through `infer`: the same draws however a run is cut, reports, batches.

Bounds of 4 standard errors fail once in 16,000 numbers; seeds are fixed.
"""

import re

import numpy as np
import pytest
from helpers import compilations, others_slow, quiet, quietly
from models import conjugate

import ppl_toolkit as ppl
from ppl_toolkit.errors import DataError, MethodError, OptionError
from ppl_toolkit.inference import EllipticalSlice, NestedSampling, Slice

Y = np.random.default_rng(0).normal(1.0, 1.0, size=6)
METHODS = {
    "slice": Slice(warmup=60),
    "elliptical": EllipticalSlice(warmup=60),
    "nested": NestedSampling(live=60, max_iterations=400),
}
DRAWS = 60


def run(name, y=Y, **options):
    options = {"method": METHODS[name], "draws": DRAWS, "seed": 3, **options}
    return quiet(conjugate, y, **options)


def assert_same(one, two):
    for group in ("posterior", "sample_stats", "sampler_state"):
        assert set(one[group].data_vars) == set(two[group].data_vars)
        for name, values in one[group].data_vars.items():
            assert np.asarray(values).tobytes() == np.asarray(two[group][name]).tobytes(), name


@pytest.mark.parametrize("name", others_slow(METHODS, "elliptical"))
def test_draws_depend_on_the_seed_alone(name, tmp_path):
    """Not on chunks, threads, stores, and whether the run was cut in two."""
    base = run(name)
    before = len(compilations)
    assert_same(base, run(name, chunk=7))
    assert_same(base, run(name, threads=1, store=tmp_path / "whole.zarr"))
    half = run(name, draws=25, store=tmp_path / "half.zarr")
    assert_same(base, quietly(ppl.extend, half, conjugate, Y, draws=DRAWS - 25))
    assert_same(base, quiet(conjugate, Y, resume=tmp_path / "half.zarr", draws=DRAWS))
    other = run(name, seed=4)
    assert not np.array_equal(other["posterior"]["m"], base["posterior"]["m"])
    new = run(name, Y - 3.0, draws=80)
    assert float(new["posterior"]["m"].mean()) < float(base["posterior"]["m"].mean()) - 2.0
    assert len(compilations) == before, "new data, seeds and numbers of draws compile nothing"


@pytest.mark.parametrize("name", others_slow(METHODS, "nested"))
def test_a_result_is_labelled_reported_and_refitted(name, tmp_path):
    tree = run(name, draws=400)
    assert tree["posterior"]["m"].dims == ("chain", "draw")
    text, page = str(ppl.report(tree)), tmp_path / "page.html"
    assert type(METHODS[name]).__name__ in text
    ppl.report(tree, page)
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|inf)\b", html.split("<main")[1].split("<script")[0])
    assert ("nested-climb" in html) == (name == "nested")
    precision = 6 + 1 / 4
    new = Y + 3.0
    again = run(name, new, init=tree, draws=400, seed=5)
    row = ppl.summary(again, "m").iloc[0]
    assert abs(row["mean"] - new.sum() / precision) < 4 * row["mcse_mean"]
    assert abs(row["sd"] - precision**-0.5) < 4 * row["mcse_sd"]
    file = ppl.save(tree, tmp_path / "run.nc")
    assert ppl.load(file)["posterior"].equals(tree["posterior"])


@pytest.mark.parametrize("name", others_slow(METHODS, "slice"))
def test_many_data_sets(name):
    """The draws of each are those of `infer` on it alone."""
    y = np.stack([Y, Y + 10.0])
    fits = quietly(
        ppl.infer_batch, conjugate, y=y, over="y", method=METHODS[name], draws=DRAWS, seed=[3, 4]
    )
    for number, seed in enumerate((3, 4)):
        alone = quiet(conjugate, y=y[number], method=METHODS[name], draws=DRAWS, seed=seed)
        np.testing.assert_array_equal(
            fits["posterior"]["m"][number], alone["posterior"]["m"], strict=False
        )
    one = ppl.one_of(fits, 1)
    assert float(one["posterior"]["m"].mean()) > 8.0


@pytest.mark.parametrize("name", ["slice", "elliptical"])
def test_runs_end_when_they_are_precise_enough(name):
    tree = run(name, draws=5000, until=ppl.Goal(ess=300))
    assert 50 < tree["posterior"].sizes["draw"] < 2000
    assert float(ppl.summary(tree, "m")["ess_bulk"].iloc[0]) >= 300


@pytest.mark.parametrize("name", METHODS)
def test_bad_data_are_refused_before_anything_compiles(name):
    before = len(compilations)
    for y, pattern in ((np.append(Y, np.nan), "NaN"), (np.zeros(0), "empty|no data")):
        with pytest.raises(DataError, match=pattern):
            run(name, y)
    with pytest.raises((OptionError, MethodError), match=r"until|init"):
        run("nested", until=ppl.Goal(ess=300))
    assert len(compilations) == before


@pytest.mark.parametrize("name", ["slice", "ellipticalslice", "nestedsampling"])
def test_methods_have_names(name):
    from ppl_toolkit.inference import method_named

    assert method_named(name).__name__.lower() == name
