"""The tutorials run from beginning to end, with few draws, and say what they should."""

import re
import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from helpers import others_slow

TUTORIALS = sorted((Path(__file__).parent.parent / "tutorials").glob("*.py"))

SAYS = {
    "quickstart": [
        r"Verdict: look at the findings before using these draws\.",  # the centred model
        r"warning +bfmi",
        r"errors halved +prepared in +\d\.\d\d s",
        r"elpd_loo +-3\d\.\d+",
        r"the draws came back unchanged: True",
    ],
    "hierarchical_regression": [
        r"75, cucumber +6 dishes, 201 of 295 seeds germinated: 68\.1%",
        r"beta\[73 and cucumber\]",
        r"prepared in \d\.\d\d s, after",
        r"partial +0 +-5\d\.\d",  # the first in the table of the comparison
        r"75, cucumber +3[2-6]\.\d of 50 expected",
    ],
    "unhappy_sampler": [
        r"215 hits of 810: 0\.265",
        r"no data, centred +\d+ +1\.[0-9]\d\d +\d\d ",  # R-hat, and few effective draws
        r"no data: P\(spread < 0\.05\) = 0\.0[01]\d centred, .*\(exactly 0\.040\)",
        r"error: multimodal: ",
        r"ordered +\d +1\.0\d\d",
        r"[1-9]\d% of the trajectories",
        r"years from the middle, scales +\d +1\.0\d\d",
    ],
    "approximations": [
        r"Laplace +-2\.\d+ ± 0\.(1\d|2) +2\d.*0\.[0-6]\d  ",  # as NUTS has it, and a good k-hat
        r"cloglog +log evidence -(19|20)\.\d",
        r"k-hat 0\.\d\d \((good|fair)\); by chain",
        r"Laplace, non-centred +\d.* [01]\.[7-9]?\d+\n",
        r"Laplace, non-centred, error: k-hat is",
        r"NUTS from Laplace, non-centred: tau [345]\.\d",
    ],
    "calibrated": [
        r"Nothing contradicts calibration",  # NUTS
        r"LosesOne.*\nNot calibrated:\n(  .*\n)*  log_likelihood: p = .*, the draws are too low",
        r"shifted by 0\.5 sd +[5-9]\d%",
    ],
    "many_short_chains": [
        r"64 chains of 128 draws, 16 superchains",
        r"Verdict: nothing looks wrong\.\n",
        r"warmed up +R-hat .* 1\.0\d\d\nwarmed up +nested R-hat .* 1\.00\d\n",
        r"hardly +nested R-hat .* [1-9]\.[1-9]\d\d\n",
        r"warmed up: 0 findings\nhardly: [1-9] findings\n  r_hat: nested R-hat",
        r"mams +ESS per 1000 gradients: least +\d+\.\d",
        r"nested R-hat of 4 superchains up to 1\.0",
    ],
    "change_points": [
        r"125 explosions in the first 40 years, 66 in the 72 years after",
        r"birth +accepted (1\d|2\d)%",
        r"\n +3  0\.[23]\d\d +0\.290",
        r"P\(at least one step\) = (1\.0|0\.9)",
        r"1920: 0\.\d\d explosions per year",
    ],
    "variable_selection": [
        r"Enumeration: all latent sites are discrete, with 1,024 joint values",
        r"bmi +1\.000 +1\.000 +1\.000",
        r"exact, 32 states: the posterior is invariant to a relative \de-1\d",
    ],
    "galaxies": [
        r"82 galaxies: 7 below 12, 3 above 30, 72 between",
        r"split +accepted [12]?\d%",
        r"P\(1 group\) = 0\.000",
        r"P\(4 groups\) = 0\.[2-5]",
        r"Nothing contradicts the jumps",
        r"log p\(y \| 4 groups\) = -22[678]\.\d",
    ],
    "stochastic_gradients": [
        r"Approximate: stochastic gradients, nothing rejected",
        r"SGLD: variances 1\.[1-9]\d times those of NUTS",
        r"SGLD, control variates +0\.20 +(0\.[89]|1\.[0-4])\d?x",
        r"SGHMC +0\.10 .* (1\.[3-9]|2\.)\d*\n",  # the temperature
        r"all of them +errors \d",
        r"constant +0% of the draws",
        r"cyclical +[2-7]\d% of the draws",
    ],
    "digits": [
        r"images to learn from, 60 others",
        r"Student-t process: sigma\^2 = \d+\.\d \(",
        r"Gaussian, sigma\^2 = 1 +bound on the log evidence +-\d+",
        r"Student-t process +as trained +[5-9]\d\.\d%",
        r"50 labels: sigma\^2 = .*, degrees of freedom \d+",
    ],
    "many_data_sets": [
        r"\{'data_set': 30, 'chain': 4, 'draw': \d+\}",
        r"heaviest tails: area error",
        r"all men: -1[0-4]\.\d sit-ups per inch\nwithout man 13, 46 inches round: -1[5-9]\.\d",
        r"holds the truth in [89]\d% of the experiments",
        r"experiment 17 alone: the same draws: True\n.*beside another one: the same draws: True",
    ],
    "stochastic_volatility": [
        r"504 days; the largest loss was 9\.4% on 15 October 2008",
        r"rho = -0\.7: log evidence +-\d+\.\d+",
        r"wild days: +\d+\.\d+ \+- \d\.\d+",
        r"losses beyond the value at risk: \d+ of 40 days",
    ],
    "lynx_hare": [
        r"21 years; hares from 7\.6 to 77\.4 thousand",
        r"birth +.* 0\.[56]\d\d \+- 0\.0\d\d\n",  # particle Gibbs, last in the table
        r"particle Gibbs +100 draws a chain: ESS +\d+ \(\S+\) in +\d+\.\d CPU s",
        r"by the sums of PPG: +6\.[345]\d\d \+- 0\.\d+ years",
        r"most lynx, of 1921 to 1930: 192[456]",
        r"process 0\.13, error 0\.1\d: log evidence +-12[0-4]\.\d",
        r"process 0\.02, error 0\.25: log evidence +-1(2[6-9]|3\d)\.\d",
    ],
    "influenza": [
        r"763 boys; most in bed on day 6: 298",
        r"NUTS cannot serve this model: sites \['moves'\] are discrete",
        r"Use ParticleGibbs, whose ancestor sampling replays",
        r"R0 +[45]\.\d+ +0\.\d+",
        r"most infections on day 6",
        r"no cut +log evidence +-6[0-5]\.\d",
        r"immune 70%: 50 boys or more infected in [2-5]\d% of the epidemics",
    ],
    "without_gradients": [
        r"Verdict: nothing looks wrong\.",
        r"NUTS +R-hat [1-9]\.\d\d, effective draws +\d+, one for +\d{4,} gradients",
        r"mean year: 189[01]\.\d\d by slices, 1890\.81 exactly",
        r"site 'scale' has the prior HalfNormal.*block\(EllipticalSlice",
        r"1860: [23]\.\d\d explosions per year",
        r"steps 1: nested -6[12]\.\d\d \+- 0\.\d\d, exact -61\.70",
        r"steps 1: SMC +-6[12]\.\d\d \+- 0\.\d\d, exact -61\.70",
        r"slices 2: log evidence .*\d\d% of the new points stayed near",
    ],
    "wide_networks": [
        r"\[\[1\.074 0\.606 0\.248 0\.346 0\.565\]",  # the kernel of a line
        r"NNGP, best scale .*\nNNGP, sigma = 1 ",  # no law has a larger evidence
        r"Student-t +NLL 1\.\d+ +CRPS 0\.\d+ +in the 90% interval 0\.\d\d",
        r"Leave-one-out cross-validation of 'y': \d+ observations",
    ],
    "compose": [
        r"moves the latent sites \['centre'",  # a block that was forgotten
        r"- stretch_centre_spread: .*tests agree",
        r"exact, 27 states: the posterior is invariant to a relative \de-1\d",
        r"log_det is not that of the involution",
        r"stretch_centre_spread: .*these change, in standard errors",
    ],
}


LONG = {
    "galaxies", "influenza", "lynx_hare",
    "stochastic_volatility", "wide_networks", "without_gradients",
}  # fmt: skip
"""What the compiler needs most time for, however short the run: slow tests."""


def test_there_are_tutorials():
    assert set(SAYS) | LONG <= {path.stem for path in TUTORIALS}


@pytest.mark.parametrize(
    "path",
    others_slow(TUTORIALS, *(path for path in TUTORIALS if path.stem not in LONG)),
    ids=lambda path: path.stem,
)
@pytest.mark.filterwarnings("default::ppl_toolkit.errors.InferenceWarning")
def test_runs_from_beginning_to_end(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PPL_FAST", "1")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    runpy.run_path(str(path), run_name="__main__")
    plt.close("all")
    said = capsys.readouterr().out
    for pattern in SAYS.get(path.stem, ()):
        assert re.search(pattern, said), f"{pattern} is not in:\n{said}"
    assert not re.search(r"\b(nan|inf)\b", said), said
    assert list(tmp_path.iterdir()) == []  # a tutorial leaves nothing behind


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_has_the_form_that_the_documentation_is_built_from(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ---\n# jupyter:")
    first = text.index("# %%")
    assert text[first:].startswith("# %% [markdown]\n# # ")
    assert 'os.environ.get("PPL_FAST") == "1"' in text
