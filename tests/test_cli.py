"""The command line: what it prints, what it writes, how it fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pytest

import ppl_toolkit as ppl

PPL = str(Path(sys.executable).with_name("ppl"))


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [PPL, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
        env=os.environ | environment,
    )  # fmt: skip


def test_version():
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"ppl_toolkit {ppl.__version__}\n"


def test_help_names_the_commands():
    done = run("--help")
    assert done.returncode == 0
    assert re.search(r"\bdemo\b", done.stdout)
    assert re.search(r"\bdoctor\b", done.stdout)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "not" / "there" / "yet"
    return folder, run("demo", "--out", folder, "--draws", 200)


class TestDemo:
    def test_succeeds_and_reports(self, demo):
        folder, done = demo
        assert done.returncode == 0, done.stderr
        assert "4 chains of 200 draws" in done.stdout
        assert "Verdict: " in done.stdout
        assert "arviz.summary" in done.stdout
        assert str(folder / "demo.html") in done.stdout
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr

    def test_writes_two_files_and_no_more(self, demo):
        folder, _ = demo
        assert sorted(path.name for path in folder.iterdir()) == ["demo.html", "demo.nc"]

    def test_page_is_self_contained(self, demo):
        folder, _ = demo
        page = (folder / "demo.html").read_text(encoding="utf-8")
        assert page.startswith("<!DOCTYPE html>")
        assert page.rstrip().endswith("</html>")
        assert len(page) < 2_000_000
        fetched = r"""(?ix) <(link|img|iframe|object|embed|audio|video|source|base)\b
                            | \bsrc\s*= | @import | url\(\s*["']?+(?!\#)
                            | \bhref\s*=\s*["']?+(?!\#|data:) | \bfetch\( | XMLHttpRequest """
        assert re.search(fetched, page) is None
        # what is left are the names of XML name spaces, which nothing fetches
        addresses = set(re.findall(r"""https?://[^\s"'<>]+""", page))
        assert all(address.startswith("http://www.w3.org/") for address in addresses)

    def test_page_shows_pictures_that_can_be_read_aloud(self, demo):
        folder, _ = demo
        page = (folder / "demo.html").read_text(encoding="utf-8")
        assert '<html lang="en">' in page
        pictures = re.findall(r"<svg[^>]*>", page)
        assert len(pictures) >= 10
        assert all('role="img"' in tag and "aria-label=" in tag for tag in pictures)

    @pytest.mark.filterwarnings("ignore:Estimated shape parameter")
    def test_file_opens_in_arviz(self, demo):
        folder, _ = demo
        tree = az.from_netcdf(folder / "demo.nc")
        groups = {"posterior", "sample_stats", "observed_data", "constant_data", "log_likelihood",
                  "log_prior", "posterior_predictive", "sampler_state"}  # fmt: skip
        assert groups <= set(tree.children)
        assert dict(tree["posterior"].sizes) == {"chain": 4, "draw": 200, "rat": 30}
        assert tree["observed_data"]["weight"].dims == ("day", "rat")
        assert list(tree["posterior_predictive"].data_vars) == ["weight"]
        # the published posterior means (BUGS examples, volume I): slope 6.19, birth weight 106.6
        mean = tree["posterior"].mean(("chain", "draw"))
        assert float(mean["slope"]) == pytest.approx(6.19, abs=0.1)
        assert float(mean["birth_weight"]) == pytest.approx(106.6, abs=3.0)
        assert np.isfinite(float(az.loo(tree).elpd))


def test_doctor_finds_all_well():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert f"ppl_toolkit {ppl.__version__}" in done.stdout
    for what in ("jax", "numpyro", "arviz", "devices:", "cache of compiled programs:"):
        assert what in done.stdout
    assert done.stdout.rstrip().endswith("all is well")


def test_doctor_says_what_cannot_be_used(tmp_path):
    taken = tmp_path / "file"
    taken.touch()
    done = run("doctor", PPL_CACHE_DIR=str(taken))
    assert "it cannot be used: " in done.stdout
    assert "PPL_CACHE_DIR=" in done.stdout
    done = run("doctor", JAX_PLATFORMS="no_such_device")
    assert done.returncode == 1
    assert "JAX finds no device (JAX_PLATFORMS=no_such_device)" in done.stdout
    assert "Traceback" not in done.stderr


class TestErrors:
    def test_a_known_error_is_one_line(self, tmp_path):
        done = run("demo", "--out", tmp_path / "out", "--seed", "-1")
        assert done.returncode == 2
        assert done.stderr.startswith("ppl: seed must be ")
        assert len(done.stderr.splitlines()) == 1

    def test_a_folder_that_cannot_be_made_is_said_before_the_fit(self, tmp_path):
        (tmp_path / "file").write_text("")
        done = run("demo", "--out", tmp_path / "file")
        assert done.returncode == 2
        assert done.stderr.startswith("ppl: ")
        assert "file" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "Growth" not in done.stdout

    @pytest.mark.parametrize("arguments", [("demo", "--draws", "5"), ("nothing",), ("demo", "-x")])
    def test_a_wrong_call_explains_itself(self, arguments, tmp_path):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "Usage: ppl" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []
