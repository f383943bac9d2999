"""`ppl infer`, `report`, `compare` and `check` on a person's own files, as real processes."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import arviz as az
import numpy as np
import pytest
from helpers import others_slow

PPL = str(Path(sys.executable).with_name("ppl"))

MODELS = textwrap.dedent(
    """
    import numpy as np, numpyro, numpyro.distributions as dist

    def line(x, y=None, scale=1.0):
        a = numpyro.sample("a", dist.Normal(0, scale))
        b = numpyro.sample("b", dist.Normal(0, scale))
        s = numpyro.sample("s", dist.HalfNormal(1))
        with numpyro.plate("row", x.shape[0]):
            numpyro.sample("y", dist.Normal(a + b * x, s), obs=y)

    def flat(x, y=None):
        a = numpyro.sample("a", dist.Normal(0, 1))
        s = numpyro.sample("s", dist.HalfNormal(1))
        with numpyro.plate("row", x.shape[0]):
            numpyro.sample("y", dist.Normal(a, s), obs=y)

    def torn():
        "Two modes that no chain can travel between."
        modes = dist.Normal(np.array([-20.0, 20.0]), 1.0)
        mixture = dist.MixtureSameFamily(dist.Categorical(np.array([0.5, 0.5])), modes)
        numpyro.sample("x", mixture)

    number = 3
    """
)
RNG = np.random.default_rng(0)
X = np.linspace(-1, 1, 30)
Y = 0.5 + 2 * X + RNG.normal(0, 0.3, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    (place / "models.py").write_text(MODELS)
    (place / "data.json").write_text(json.dumps({"x": X.tolist(), "y": Y.tolist()}))
    lines = ["x,y", *(f"{a},{b}" for a, b in zip(X, Y, strict=True))]
    (place / "data.csv").write_text("\n".join(lines))
    np.savez(place / "data.npz", x=X, y=Y)
    return place


def run(folder, *arguments):
    return subprocess.run(
        [PPL, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def fitted(folder):
    done = [
        run(folder, "infer", f"models.py:{name}", "--data", "data.json", "--draws", 300,
            "--out", f"{name}.nc", "--report", f"{name}.html", "--log-likelihood")
        for name in ("line", "flat")
    ]  # fmt: skip
    for process in done:
        assert process.returncode == 0, process.stderr
    return done


def test_infer_reports_and_writes(folder, fitted):
    assert "Verdict: nothing looks wrong." in fitted[0].stdout
    assert "Wrote the result: line.nc" in fitted[0].stdout
    tree = az.from_netcdf(folder / "line.nc")
    assert abs(float(tree["posterior"]["b"].mean()) - 2) < 0.5
    assert tree["log_likelihood"]["y"].shape == (4, 300, 30)
    assert (folder / "line.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("name", others_slow(["data.csv", "data.npz"], "data.csv"))
def test_data_files(folder, fitted, name):
    done = run(folder, "infer", "models:line", "--data", name, "--draws", 300, "--out", "same.nc")
    assert done.returncode == 0, done.stderr
    one, two = (az.from_netcdf(folder / f) for f in ("line.nc", "same.nc"))
    np.testing.assert_array_equal(one["posterior"]["b"], two["posterior"]["b"])


def test_settings(folder):
    done = run(
        folder, "infer", "models.py:line", "--data", "data.json", "--set", "scale=0.001",
        "--draws", 300, "--out", "tight.nc",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert abs(float(az.from_netcdf(folder / "tight.nc")["posterior"]["b"].mean())) < 0.01


def test_draws_that_should_not_be_used_exit_with_1(folder):
    done = run(folder, "infer", "models.py:torn", "--draws", 300, "--out", "torn.nc")
    assert done.returncode == 1
    assert "Verdict: do not use these draws yet." in done.stdout
    assert run(folder, "report", "torn.nc").returncode == 1


def test_report(folder, fitted):
    done = run(folder, "report", "line.nc", "-o", "page.html", "--var", "b")
    assert done.returncode == 0, done.stderr
    assert "\nb " in done.stdout
    assert "\na " not in done.stdout
    assert (folder / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_compare(folder, fitted):
    done = run(folder, "compare", "line.nc", "flat.nc")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("line", "flat"))]
    assert rows[0].startswith("line")


def test_check(folder):
    done = run(folder, "check", "models.py:flat", "--data", "data.json", "--replications", 40)
    assert done.returncode == 0, done.stderr
    assert "Nothing contradicts calibration" in done.stdout


BAD = {
    "no colon": (["infer", "models.py"], "FILE.py:NAME"),
    "no file": (["infer", "nothing.py:line"], "no file nothing.py"),
    "no module": (["infer", "nothing:line"], "no module 'nothing'"),
    "no function": (["infer", "models.py:curve"], "no function 'curve'.*line"),
    "not a function": (["infer", "models.py:number"], "no function 'number'"),
    "no data": (["infer", "models.py:line", "--data", "no.json"], "no data file"),
    "odd data": (["infer", "models.py:line", "--data", "models.py"], "json, .npz or .csv"),
    "missing argument": (["infer", "models.py:line"], "missing a required argument"),
    "setting": (["infer", "models.py:line", "--set", "scale"], "NAME=VALUE"),
    "method": (["infer", "models.py:torn", "--method", "nutz"], "no method 'nutz'"),
    "no result": (["report", "no.nc"], "no result at no.nc"),
    "one result": (["compare", "line.nc"], "two results or more"),
    "check": (["check", "models.py:torn"], "observes nothing"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_print_one_line_and_exit_with_2(folder, what):
    import re

    arguments, message = BAD[what]
    done = run(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
