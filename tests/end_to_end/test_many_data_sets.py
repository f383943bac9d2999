"""What many data sets are for: simulation studies, refits without some data, interrupted work."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quietly
from models import EFFECTS, ERRORS
from numpyro.handlers import mask
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit import convergence


def mean(y, keep):
    """Of normal data with known variance 1, its prior N(0, 4); some data may be left out."""
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", y.shape[0]), mask(mask=keep):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


ROWS = 12
WHOLE = np.ones(ROWS, bool)


@pytest.mark.slow  # the tutorial of many data sets has one in short
def test_a_simulation_study_finds_the_method_calibrated():
    """Ranks of 200 true means among their draws are uniform.

    One Kolmogorov-Smirnov test at level 1e-4; the seeds are fixed.
    """
    rng = np.random.default_rng(4)
    truth = 2.0 * rng.normal(size=200)
    y = truth[:, None] + rng.normal(size=(200, ROWS))
    tree = quietly(ppl.infer_batch, mean, y, WHOLE, over="y", seed=5, draws=125, warmup=150)
    draws = tree["posterior"]["m"].values[:, :, ::5].reshape(200, -1)
    ranks = (draws < truth[:, None]).sum(1) + rng.uniform(size=200)
    assert stats.kstest(ranks / 101, "uniform").pvalue > 1e-4


def test_leaving_out_every_row_in_turn():
    """The refits' means are exact, by a joint test that fails once in 10,000; so is their spread.

    The rows differ much, so that leaving out another one would be seen.
    """
    y = np.linspace(-6.0, 6.0, ROWS) ** 3 / 20
    keep = ~np.eye(ROWS, dtype=bool)
    tree = quietly(ppl.infer_batch, mean, y, keep, over="keep", seed=1, draws=500)
    np.testing.assert_array_equal(tree["observed_data"]["y"], np.where(keep, y, np.nan))
    assert tree["constant_data"]["keep"].dims == ("data_set", "row")
    found = convergence.convergence(np.moveaxis(tree["posterior"]["m"].values, 0, -1))
    precision = ROWS - 1 + 0.25
    z = (found["mean"] - (y.sum() - y) / precision) / found["mcse_mean"]
    assert stats.chi2.sf(np.sum(z**2), ROWS) > 1e-4
    z = (found["sd"] - precision**-0.5) / found["mcse_sd"]
    assert stats.chi2.sf(np.sum(z**2), ROWS) > 1e-4


SCRIPT = """
    import sys, warnings
    sys.path.insert(0, {tests!r})
    import numpy as np
    import ppl_toolkit as ppl
    from models import EFFECTS, ERRORS, eight_schools
    from ppl_toolkit.batch_results import Drawn

    put = Drawn.put

    def told(drawn, number, finished):
        put(drawn, number, finished)
        print("finished", number, flush=True)

    Drawn.put = told
    warnings.simplefilter("ignore")
    y = EFFECTS + np.arange(500)[:, None] % 7
    tree = ppl.infer_batch(eight_schools, ERRORS, y=y, over="y", seed=7, progress=False)
    ppl.save(tree, sys.argv[1])
    """


def test_ctrl_c_in_a_process(tmp_path):
    """A signal after three data sets of 500: the process goes on with what it has."""
    tests = str(Path(__file__).parents[1])
    path = tmp_path / "part.nc"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT).format(tests=tests), str(path)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(3):
        assert process.stdout.readline().startswith("finished")
    process.send_signal(signal.SIGINT)
    more = process.stdout.readlines()
    process.stdout.close()
    assert process.wait(120) == 0
    tree = ppl.load(path)
    there = tree["posterior"]["data_set"].values
    assert tree.attrs["interrupted"] == 1
    assert len(there) == 3 + len(more)
    assert 3 <= len(there) < 400
    np.testing.assert_array_equal(tree["observed_data"]["y"], EFFECTS + there[:, None] % 7)
    np.testing.assert_array_equal(tree["constant_data"]["sigma"], ERRORS)
