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
# # Many data sets: a posterior for each
#
# One regression for every gene. A refit without each of the patients. A thousand simulated
# experiments, to learn what a real one could tell. The model is the same every time, the data have
# the same shape, and only the posterior is wanted again and again.
#
# `ppl.infer_batch` takes all the data sets in one call: one compiled program, one progress bar, one
# labelled result, one table of what needs a second look. Every data set gets the draws that `infer`
# would have given it alone, bit for bit.
#
# Three uses: thirty measurements of tumours compared, twenty men of whom one carries the
# conclusion, and two hundred experiments that never took place.
#
# Data: W. N. Street, W. H. Wolberg, O. L. Mangasarian (1993), *Nuclear feature extraction for
# breast tumor diagnosis*; A. C. Linnerud's exercise data, in M. Tenenhaus (1998), *La régression
# PLS*; both as in scikit-learn. Exaggeration: A. Gelman, J. Carlin (2014), *Beyond power
# calculations*, Perspectives on Psychological Science 9.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import mask
from sklearn.datasets import load_breast_cancer, load_linnerud

import ppl_toolkit as ppl
from ppl_toolkit.batch import data_set_seeds
from ppl_toolkit.errors import InferenceWarning

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
BUDGET = {"draws": 60, "warmup": 100} if FAST else {"draws": 1000, "warmup": 1000}
if FAST:
    warnings.simplefilter("ignore", InferenceWarning)  # so few draws are always too few

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)

# %% [markdown]
# ## Thirty measurements
#
# Of 569 breast tumours, 212 turned out to be malignant. From a picture of cells taken by a needle,
# ten properties of the nuclei were measured: their size, their texture, how uneven their outlines
# are. Each of them was summed up in three ways: the mean over the nuclei, its standard error, and
# the mean of the three largest ("worst"). By how much does each of the thirty differ between
# malignant and benign tumours?
#
# Cells are not normal, and some pictures go wrong, so the comparison is by Student's t, whose
# degrees of freedom are learned: few of them mean heavy tails.

# %%
tumours = load_breast_cancer()
EVERY = 8 if FAST else 1
MALIGNANT = (tumours.target == 0).astype(float)[::EVERY]
MEASURED = tumours.data.T[:, ::EVERY]  # a row per measurement
MEASURED = (MEASURED - MEASURED.mean(1, keepdims=True)) / MEASURED.std(1, keepdims=True)
NAMES = [str(name) for name in tumours.feature_names]


def comparison(malignant, y):
    level = numpyro.sample("level", dist.Normal(0, 2))
    difference = numpyro.sample("difference", dist.Normal(0, 2))
    spread = numpyro.sample("spread", dist.HalfNormal(2))
    tails = numpyro.sample("tails", dist.Gamma(2, 0.1))
    with numpyro.plate("tumour", malignant.shape[0]):
        law = dist.StudentT(tails, level + difference * malignant, spread)
        numpyro.sample("y", law, obs=y)


# %% [markdown]
# `over="y"` says which argument varies: `y` has one row per data set, `malignant` is shared. The
# labels of the dimension `data_set` are given like any others.

# %%
fits = ppl.infer_batch(
    comparison, MALIGNANT, y=MEASURED, over="y", seed=1, coords={"data_set": NAMES},
    progress="lines", **BUDGET,
)  # fmt: skip
difference = fits["posterior"]["difference"]
print(dict(difference.sizes))

# %% [markdown]
# The result is a tree like that of `infer`, with one more dimension in front. Sums and quantiles go
# over chains and draws; the data sets stay.

# %%
middle = difference.median(["chain", "draw"])
low, high = (difference.quantile(q, ["chain", "draw"]) for q in (0.055, 0.945))
order = np.argsort(middle.values)
COLOURS = {"worst": RED, "mean": BLUE, "error": GREY}


def kind(name):
    return next(word for word in COLOURS if word in name)


figure, axes = plt.subplots(figsize=(7.5, 6.6), layout="constrained")
for row, i in enumerate(order):
    colour = COLOURS[kind(NAMES[i])]
    axes.plot([low[i], high[i]], [row, row], color=colour, lw=2.2, solid_capstyle="round")
    axes.plot(middle[i], row, "o", color=colour, ms=5, mec="white", mew=0.8)
axes.axvline(0, color=GREY, lw=0.8, zorder=0)
axes.set_yticks(range(30), [NAMES[i] for i in order], fontsize=8)
axes.set(xlabel="malignant minus benign, in standard deviations (89% intervals)", ylim=(-1, 30))
for place, (text, colour) in enumerate(
    {"its standard error": GREY, "their mean": BLUE, "worst of the nuclei": RED}.items()
):
    axes.text(
        0.98, 0.10 + 0.05 * place, text, color=colour, ha="right", weight="bold",
        transform=axes.transAxes,
    )  # fmt: skip
_ = axes.set_title("Thirty posteriors: dents and size tell most", loc="left")

# %% [markdown]
# Large nuclei with deep dents in their outlines are the bad sign, most of all in the worst nuclei
# of a picture. Texture and smoothness of the mean say less, and the errors of some measurements say
# nothing.
#
# Thirty runs could hide thirty problems. The table has a row for each: the least effective sample
# size, the largest R-hat and Monte Carlo error of its scalars, divergences, and the findings; all
# of them computed in one pass. Whatever needs a second look also comes as one warning, however many
# data sets it concerns: here about the few draws of one measurement that diverged.

# %%
table = fits["diagnostics"].to_dataset().to_dataframe()
print(table[["ess", "r_hat", "divergences", "acceptance", "findings"]].sort_values("ess").head(4))
print(f"data sets with findings: {(table['findings'] != '').sum()} of {len(table)}")

# %% [markdown]
# One of them can be taken out. It is an ordinary result then: for a report, a plot of ArviZ, for
# more draws. The tails of the measurement with the fewest degrees of freedom:

# %%
tails = fits["posterior"]["tails"].median(["chain", "draw"])
heaviest = NAMES[int(tails.values.argmin())]
print(f"heaviest tails: {heaviest}")
print(ppl.summary(ppl.one_of(fits, heaviest)).round(2)[["mean", "sd", "ess_bulk", "r_hat"]])

# %% [markdown]
# ## Twenty men, one left out at a time
#
# Twenty middle-aged men in a gymnasium: their waists in inches, and how many sit-ups they can do.
# Stout men do fewer. Does one of the twenty decide by how much?
#
# To leave a man out, the model takes one more argument, that says who is there. It is the one that
# varies: a row of `keep` per refit. (For the predictive densities of leave-one-out
# cross-validation, `ppl.loo` needs no refits as a rule.)

# %%
men = load_linnerud()
WAIST, SITUPS = men.target[:, 1], men.data[:, 1]
MEN = len(WAIST)


def line(waist, situps, keep):
    level = numpyro.sample("level", dist.Normal(150, 100))  # at 35 inches
    slope = numpyro.sample("slope", dist.Normal(0, 20))  # sit-ups per inch
    noise = numpyro.sample("noise", dist.HalfNormal(100))
    with numpyro.plate("man", MEN), mask(mask=keep):
        numpyro.sample("situps", dist.Normal(level + slope * (waist - 35), noise), obs=situps)


ALL = np.ones(MEN, bool)
OPTIONS = {**BUDGET, "method": ppl.NUTS(target_acceptance=0.95), "progress": False}
whole = ppl.infer(line, WAIST, SITUPS, ALL, seed=0, **OPTIONS)
without = ppl.infer_batch(
    line, WAIST, SITUPS, ~np.eye(MEN, dtype=bool), over="keep", seed=0, **OPTIONS
)

# %%
slope, slopes = whole["posterior"]["slope"], without["posterior"]["slope"]
levels = without["posterior"]["level"].mean(["chain", "draw"]).values
means = slopes.mean(["chain", "draw"]).values
furthest = int(np.abs(means - float(slope.mean())).argmax())
print(f"all men: {float(slope.mean()):.1f} sit-ups per inch")
print(f"without man {furthest}, {WAIST[furthest]:.0f} inches round: {means[furthest]:.1f}")

figure, (left, right) = plt.subplots(
    1, 2, figsize=(8.6, 3.6), layout="constrained", width_ratios=[1, 1.1]
)
ends = np.array([30.5, 46.5])
for man in range(MEN):
    special = man == furthest
    colour = RED if special else BLUE
    left.plot(
        ends, levels[man] + means[man] * (ends - 35), color=colour,
        lw=1.8 if special else 0.7, alpha=1 if special else 0.5,
    )  # fmt: skip
    left.plot(WAIST[man], SITUPS[man], "o", color=colour if special else GREY, ms=5)
    middle_89 = np.quantile(slopes.values[man], [0.055, 0.945])
    right.plot(middle_89, [man, man], color=colour, lw=2, solid_capstyle="round")
    right.plot(means[man], man, "o", color=colour, ms=5, mec="white", mew=0.8)
right.axvline(float(slope.mean()), color=GREY, lw=1, zorder=0)
right.axvline(0, color="black", lw=0.6, zorder=0)
left.set(xlabel="waist (inches)", ylabel="sit-ups", ylim=(0, 270))
right.set(xlabel="sit-ups per inch (89% intervals)", ylabel="man left out", yticks=[0, 5, 10, 15])
left.set_title("Lines without each of the men", loc="left", fontsize=10)
_ = right.set_title("One man changes the answer (red)", loc="left", fontsize=10)

# %% [markdown]
# Whoever else is missing, the answer stays. Without the man of 46 inches, who does as many sit-ups
# as one of 37, every inch costs a third more of them: that waists matter does not hang on him, but
# by how much they do.
#
# ## Two hundred experiments that never took place
#
# Twenty men are few. Suppose an inch really costs five sit-ups, with the scatter seen here: what
# would such an experiment find? We simulate two hundred of them, with the same waists, and fit them
# all. `situps` varies now, and everyone is there. The shapes are those of the last call, so that
# nothing is compiled any more.

# %%
TRUE_SLOPE, TRUE_NOISE = -5.0, 55.0
EXPERIMENTS = 40 if FAST else 200
rng = np.random.default_rng(7)
simulated = 145 + TRUE_SLOPE * (WAIST - 35) + TRUE_NOISE * rng.normal(size=(EXPERIMENTS, MEN))

study = ppl.infer_batch(line, WAIST, simulated, ALL, over="situps", seed=3, **OPTIONS)

# %%
draws = study["posterior"]["slope"]
centre = draws.mean(["chain", "draw"]).values
bottom, top = (draws.quantile(q, ["chain", "draw"]).values for q in (0.05, 0.95))
covers = (bottom <= TRUE_SLOPE) & (top >= TRUE_SLOPE)
clear = (top < 0) | (bottom > 0)
print(f"the 90% interval holds the truth in {covers.mean():.0%} of the experiments")
print(f"it excludes zero in {clear.mean():.0%}, whose estimates are "
      f"{np.abs(centre[clear]).mean() / -TRUE_SLOPE:.1f} times the truth on average")  # fmt: skip

figure, axes = plt.subplots(figsize=(8.6, 3.4), layout="constrained")
for place, i in enumerate(np.argsort(centre)):
    colour = RED if clear[i] else BLUE
    axes.plot([place, place], [bottom[i], top[i]], color=colour, lw=1.4, alpha=0.45)
    axes.plot(place, centre[i], "o", color=colour, ms=2.5)
axes.axhline(TRUE_SLOPE, color="black", lw=1)
axes.axhline(0, color=GREY, lw=0.8)
axes.text(1.08 * EXPERIMENTS, TRUE_SLOPE - 0.4, "truth", va="top", ha="right")
axes.text(1.08 * EXPERIMENTS, 0.4, "nothing", va="bottom", ha="right", color=GREY)
axes.set(xlabel="experiments, by their estimate", ylabel="sit-ups per inch", xticks=[])
axes.set_xlim(-2, 1.09 * EXPERIMENTS)
_ = axes.set_title("Experiments that would be published (red) exaggerate", loc="left")

# %% [markdown]
# The intervals are honest: they hold the truth about as often as they say. But the experiments
# whose interval excludes zero, those that would be written up, overstate the effect. A filter on
# significance turns honest intervals into exaggeration, and the fewer men there are the more.
#
# ## What one of them owes to the others: nothing
#
# The seed of a data set follows from the seed of the call and from the data set's number. With it,
# `infer` gives the same draws, on any number of threads, next to any other data sets. And Ctrl-C
# returns the data sets that are finished: the others can be run later, with their seeds.

# %%
seeds = data_set_seeds(3, EXPERIMENTS)
alone = ppl.infer(line, WAIST, simulated[17], ALL, seed=seeds[17], **OPTIONS)
pair = ppl.infer_batch(
    line, WAIST, simulated[[5, 17]], ALL, over="situps", seed=[seeds[5], seeds[17]], **OPTIONS
)
for name, tree in {"alone": alone, "beside another one": ppl.one_of(pair, 1)}.items():
    same = np.array_equal(tree["posterior"]["slope"], draws[17])
    print(f"experiment 17 {name}: the same draws: {same}")
