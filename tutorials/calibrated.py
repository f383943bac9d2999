# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is my inference calibrated?
#
# Chains that agree with each other can agree on the wrong answer. R-hat and effective sample sizes
# say how well the sampler explores *some* distribution; they cannot say that it is the posterior of
# your model. If you write a log density, a sampler, or a speed-up of your own, this is the question
# to ask.
#
# Simulation can answer it, because in a simulation the truth is known. On the way: the picture and
# how to read it, two wrong posteriors that look healthy, what to rank, a second test that is
# cheaper per data set, and how many data sets one needs.
#
# Sources: S. Talts et al. (2018), *Validating Bayesian inference algorithms with simulation-based
# calibration*; M. Modrák et al. (2023), *Simulation-based calibration checking for Bayesian
# computation: the choice of test quantities shapes sensitivity*, Bayesian Analysis; T. Säilynoja
# et al. (2022), *Graphical test for discrete uniformity*, Statistics and Computing; J. Geweke
# (2004), *Getting it right*, Journal of the American Statistical Association 99.

# %%
import dataclasses
import os
import warnings
from types import SimpleNamespace
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.stats import norm

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.ecdf import band, p_value

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DATA_SETS = 150 if FAST else 500
LEARN = 80 if FAST else 300  # warm-up iterations on each data set
DRAWS = 29 if FAST else 99  # draws that the truth is ranked among

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)

# %% [markdown]
# ## The model
#
# A line through the origin and an unknown noise, seen at four points. A small model is not a
# concession: errors show best where the data are few, since plenty of data hide them.


# %%
def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("point", x.shape[0]):
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


X = np.linspace(-1, 1, 4)

# %% [markdown]
# ## The idea: the truth is one more draw
#
# Draw parameters from the prior, then data given the parameters, then draws from the posterior
# given the data. The parameters that made the data and the posterior draws are then equals: nothing
# tells which of them is the truth. So the *rank* of the truth among the draws is equally likely to
# be anything from 0 to the number of draws.
#
# If the sampler is wrong, the ranks lean, and how they lean says how it is wrong. Here is a game
# without any sampler: the truth is normal, and the draws have a law that may be off.

# %%
rng = np.random.default_rng(0)
GAMES = {
    "right": (0.0, 1.0),
    "draws too low": (-0.5, 1.0),
    "draws too narrow": (0.0, 0.6),
    "draws too wide": (0.0, 1.6),
}


def game(shift, scale, size):
    """Ranks of standard normal truths among draws from Normal(shift, scale)."""
    truth = rng.normal(size=size)
    return rng.binomial(DRAWS, norm.cdf(truth, shift, scale))  # how many draws lie below


figure, panels = plt.subplots(1, 4, figsize=(9, 2.2), sharey=True, layout="constrained")
for panel, (name, (shift, scale)) in zip(panels, GAMES.items(), strict=True):
    panel.hist(game(shift, scale, 4000), bins=10, range=(-0.5, DRAWS + 0.5), density=True,
               color=BLUE if name == "right" else RED, alpha=0.5)  # fmt: skip
    panel.axhline(1 / (DRAWS + 1), color=GREY, lw=1)
    panel.set_title(name, loc="left", fontsize=10)
    panel.set(xlabel="rank of the truth", yticks=[], xticks=[0, DRAWS])
    panel.spines["left"].set_visible(False)

# %% [markdown]
# - *Draws too low*: the truth often lies above them, and high ranks pile up. (Too high: the mirror
#   image.)
# - *Draws too narrow*, the overconfident posterior: the truth falls outside, a valley with both
#   ends raised.
# - *Draws too wide*: the truth sits in the middle, a hill.
#
# ## NUTS on the line
#
# `ppl.calibrate` does it all. The observed values do not matter, only their shape: the data are
# simulated. The program is compiled once for all data sets, and runs are thinned so that the draws
# are nearly independent. The verdict is wrong about a right sampler once in a thousand.

# %%
OPTIONS = {
    "replications": DATA_SETS, "warmup": LEARN, "draws": DRAWS, "seed": 2, "progress": False,
}  # fmt: skip
right = ppl.calibrate(line, X, y=np.zeros(4), **OPTIONS)
print(right)

# %% [markdown]
# Besides the parameters it ranked two functions of parameters *and* data: the log likelihood and
# the log joint density. They will matter.
#
# Histograms depend on their bins. The better picture is the empirical distribution function of the
# ranks, less the straight line that it should follow. Around zero lies a band that the *whole*
# curve stays in with 95% probability if the ranks are uniform; `band` computes it exactly.


# %%
def picture(found, title, colour):
    """For every quantity: ECDF of the ranks minus the uniform one, with its simultaneous band."""
    points = np.arange(1, found.draws + 2) / (found.draws + 1)
    size = found.ranks.sizes["replication"]
    limits = band(size, points)
    names = found.ranks["quantity"].values
    figure, panels = plt.subplots(
        1, len(names), figsize=(9, 2.4), sharey=True, layout="constrained"
    )
    for panel, name in zip(panels, names, strict=True):
        ranks = found.ranks.sel(quantity=name).values
        counts = np.cumsum(np.bincount(ranks, minlength=found.draws + 1))
        panel.fill_between(points, limits.low / size - points, limits.high / size - points,
                           step="mid", color=GREY, alpha=0.25, lw=0)  # fmt: skip
        panel.step(points, counts / size - points, where="mid", color=colour, lw=1.4)
        panel.axhline(0, color=GREY, lw=0.6)
        panel.set_title(name, loc="left", fontsize=10)
        panel.set(xlabel="normalised rank", xlim=(0, 1), xticks=[0, 0.5, 1])
    panels[0].set_ylabel("ECDF difference")
    figure.suptitle(title, x=0.01, ha="left")


picture(right, "NUTS on the line", BLUE)

# %% [markdown]
# Each band is for one curve, so of twenty curves of a right sampler one leaves its band; the
# verdict printed above allows for that. How the shapes look here: draws too low give a curve
# *below* zero (few low ranks), draws too high one above; too narrow an S that is first above and
# then below, too wide the reverse.
#
# ## First mistake: a forgotten Jacobian
#
# Samplers move on the whole real line, so a positive `noise` is sampled as `u = log(noise)`, and
# the density of `u` needs the factor `d noise / d u = exp(u)`. Whoever writes the log density by
# hand forgets it once. To make the mistake on purpose, we hand NUTS an altered target: a method is
# a frozen dataclass, and everything that sees the density gets the altered one.


# %%
@dataclasses.dataclass(frozen=True)
class Altered(ppl.NUTS):
    """NUTS on another density than the model's."""

    def altered(self, target):
        """The target that is sampled; the two below say which."""
        return target

    def init(self, key, start, target, settings):
        return super().init(key, start, self.altered(target), settings)

    def refresh(self, state, target, settings):
        return super().refresh(state, self.altered(target), settings)

    def step(self, key, index, state, target, settings):
        return super().step(key, index, state, self.altered(target), settings)


@dataclasses.dataclass(frozen=True)
class ForgetsJacobian(Altered):
    """Leaves out the log Jacobian of noise = exp(u); the position is (slope, u)."""

    def altered(self, target):
        return SimpleNamespace(
            log_density=lambda position: target.log_density(position) - position[1],
            constrain=target.constrain,
        )


# %% [markdown]
# Does anything look wrong in an ordinary run? Here are four plausible points.

# %%
Y = np.array([-1.1, 0.3, 0.6, 0.9])
careful = ppl.NUTS(target_acceptance=0.95)
for method in (careful, ForgetsJacobian(target_acceptance=0.95)):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the findings are printed
        run = ppl.infer(line, X, y=Y, method=method, draws=1000, seed=0, progress=False)
    table = ppl.summary(run)
    print(f"{type(method).__name__:16} noise {table['mean']['noise']:.2f} +- "
          f"{table['sd']['noise']:.2f}, largest R-hat {table['r_hat'].max():.3f}, findings: "
          f"{[finding.kind for finding in ppl.findings(run)] or 'none'}")  # fmt: skip

# %% [markdown]
# The chains agree, and the estimate is merely somewhat smaller. Nobody would notice. Calibration
# does:

# %%
jacobian = ppl.calibrate(line, X, y=np.zeros(4), method=ForgetsJacobian(), **OPTIONS)
print(jacobian)
picture(jacobian, "Forgotten Jacobian: noise is drawn too low", RED)


# %% [markdown]
# ## Second mistake: an observation is lost
#
# An off-by-one in a slice, and the first observation never enters the density.


# %%
@dataclasses.dataclass(frozen=True)
class LosesOne(Altered):
    """Takes the score of the first observation out of the density again."""

    needs: ClassVar[tuple[str, ...]] = ("log_density", "constrain", "log_likelihood")

    def altered(self, target):
        def log_density(position):
            return target.log_density(position) - target.log_likelihood(position)["y"][0]

        return SimpleNamespace(log_density=log_density, constrain=target.constrain)


lost = ppl.calibrate(line, X, y=np.zeros(4), method=LosesOne(), **OPTIONS)
print(lost)
picture(lost, "Lost observation: only functions of the data show it", RED)

# %% [markdown]
# `slope` and `noise` are not on the list: their ranks are as they should be. That is no
# accident. The posterior given three of four observations is a perfectly calibrated posterior,
# only not the one we asked for. No
# function of the parameters alone can ever show the mistake, however many data sets we simulate. By
# the same token, a sampler that ignores the data and draws from the prior passes.
#
# The log likelihood of *all* the data shows it: draws that did not see the first observation fit
# the data worse than they should. This is why `calibrate` always ranks it. Further functions that
# you care about can be added with `quantities=`.
#
# ## Geweke's test
#
# Another way, cheaper for each data set: start at parameters from the prior and data given them,
# and let the sampler and the simulator of the data take turns for a few moves. A right sampler
# leaves the joint law of parameters and data as it was, so that averages at the end equal those at
# the start. There is no warm-up and no thinning for each data set; a handful of moves is enough.

# %%
STARTS = 60 if FAST else 1000
for method in (ppl.NUTS(), ForgetsJacobian()):
    found = ppl.geweke(
        line, X, y=np.zeros(4), method=method, replications=STARTS, warmup=LEARN, seed=1
    )
    print(found)
    print("largest |z|:", f"{max(abs(z) for z in found.z.values()):.1f}\n")

# %% [markdown]
# The test compares means and second powers only, and judges single moves of the sampler, with step
# size and metric learned once. So it says nothing about warm-up or about how fast the chains mix,
# which calibration does include. It is good at errors in a sampler's transition.
#
# ## How many data sets?
#
# The band shrinks like one over the square root of their number. How small an error can be found?
# Back to the game: the share of 200 experiments that raise an alarm, at the level of `calibrate`
# (one false alarm in a thousand; not yet corrected for the number of quantities).

# %%
points = np.arange(1, DRAWS + 2) / (DRAWS + 1)
ERRORS = {
    "none": (0.0, 1.0),
    "shifted by 0.5 sd": (0.5, 1.0),
    "shifted by 0.2 sd": (0.2, 1.0),
    "shifted by 0.1 sd": (0.1, 1.0),
    "half as wide": (0.0, 0.5),
    "20% too narrow": (0.0, 0.8),
}
SIZES = (100, 200) if FAST else (100, 300, 1000)
print(f"{'data sets':20}" + "".join(f"{size:>7}" for size in SIZES))
limits = {size: band(size, points, 0.999) for size in SIZES}
widths = [(limits[size].high - limits[size].low)[DRAWS // 2] / (2 * size) for size in SIZES]
print(f"{'half the band':20}" + "".join(f"{width:7.2f}" for width in widths))
for name, (shift, scale) in ERRORS.items():
    cells = []
    for size in SIZES:
        ranks = game(shift, scale, (200, size))
        counts = np.stack([(ranks <= k).sum(1) for k in range(DRAWS + 1)], axis=1)
        outside = (counts < limits[size].low) | (counts > limits[size].high)
        cells.append(outside.any(1).mean())
    print(f"{name:20}" + "".join(f"{share:7.0%}" for share in cells))

# %% [markdown]
# A gross error shows within a hundred data sets, one of a fifth of a posterior standard deviation
# needs about a thousand, and a tenth needs several thousand. A thousand, the default, finds what
# would change a conclusion. And the two mistakes above? The p-value of the worst quantity, had we
# stopped earlier (not corrected):

# %%
stops = [size for size in (50, 100, 150, 300, 500) if size <= DATA_SETS]
print(f"{'data sets':20}" + "".join(f"{size:>9}" for size in stops))
for name, found in {"right": right, "forgotten Jacobian": jacobian, "lost one": lost}.items():
    cells = []
    for size in stops:
        first = found.ranks.values[:, :size]
        counts = [np.cumsum(np.bincount(row, minlength=DRAWS + 1)) for row in first]
        cells.append(min(p_value(count, size, points) for count in counts))
    print(f"{name:20}" + "".join(f"{p:9.1g}" for p in cells))

# %% [markdown]
# Do not watch such a table and stop when it pleases: with enough looks every sampler fails. Choose
# the number beforehand, and if a p-value is suspicious, run again with another seed.
#
# ## In practice
#
# - Calibrate when you write something of your own: a density, a sampler, a change of variables. For
#   a plain model and NUTS the findings of the run are the thing to read.
# - Use few data and the priors that you will use. Calibration is an average over the prior: a prior
#   that makes absurd data tests the sampler where you will never go.
# - A failure of a right program is possible: too short a warm-up, divergences, chains that do not
#   mix. The cure is that of the run, and *My sampler is unhappy* is about it.
