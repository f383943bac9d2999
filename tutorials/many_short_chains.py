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
# # Many short chains
#
# Four long chains, or sixty-four short ones? Processors compute the gradients of many chains at
# once for less than the price of one by one, and graphics cards for much less. But chains that run
# in lock step wait for each other, and NUTS, whose trajectories differ in length, waits a lot.
# `ChEES` and `MAMS` are made for it: all chains take trajectories of one length, and learn the
# step size, the length and the metric together.
#
# Short chains raise a question: has a chain of a hundred draws converged? R-hat cannot tell well
# from so few. Nested R-hat can, where chains start in groups. Here: a regression on the nuclei of
# 569 breast tumours, by 64 chains.
#
# Methods: M. Hoffman, A. Radul, P. Sountsov (2021), *An adaptive-MCMC scheme for setting trajectory
# lengths in Hamiltonian Monte Carlo*; J. Robnik, R. Cohn-Gordon, U. Seljak (2025), *Metropolis
# adjusted microcanonical Hamiltonian Monte Carlo*; C. Margossian and others (2024), *Nested R-hat*,
# Bayesian Analysis. Data: W. N. Street, W. H. Wolberg, O. L. Mangasarian (1993), *Nuclear feature
# extraction for breast tumor diagnosis*, as in scikit-learn.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from sklearn.datasets import load_breast_cancer

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.errors import InferenceWarning

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
warnings.simplefilter("ignore", InferenceWarning)  # some runs below are bad on purpose

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)

# %% [markdown]
# ## The model
#
# Thirty measurements of a tumour's cells, many of them nearly the same thing (radius, perimeter and
# area), tell whether it is malignant. Their slopes are shrunk together by a scale that is learned.

# %%
tumours = load_breast_cancer()
EVERY, WIDTH = (4, 10) if FAST else (1, 30)
MALIGNANT = (tumours.target == 0).astype(float)[::EVERY]
NUCLEI = ((tumours.data - tumours.data.mean(0)) / tumours.data.std(0))[::EVERY, :WIDTH]
NAMES = [str(name) for name in tumours.feature_names[:WIDTH]]


def regression(nuclei, malignant):
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    level = numpyro.sample("level", dist.Normal(0, 2))
    with numpyro.plate("measurement", nuclei.shape[1]):
        slope = numpyro.sample("slope", dist.Normal(0, scale))
    with numpyro.plate("tumour", nuclei.shape[0]):
        logits = level + nuclei @ slope
        numpyro.sample("malignant", dist.Bernoulli(logits=logits), obs=malignant)


DATA = (NUCLEI, MALIGNANT)
OPTIONS = {"coords": {"measurement": NAMES}, "progress": False}
BUDGET = {"warmup": 150} if FAST else {}

# %% [markdown]
# ## Sixty-four chains
#
# Asked for by name, with what it prefers: 64 chains of 128 draws, in 16 *superchains*: groups of
# four chains that start at the same point.

# %%
many = ppl.infer(regression, *DATA, method="mams", **BUDGET, **OPTIONS)
print(ppl.report(many, var_names=["scale", "level"]))

# %% [markdown]
# All chains share a step size and a trajectory length, and what they cost is told: every draw of
# every chain took so many gradients.

# %%
told = many["sample_stats"]
length, step = (float(told[name][0, 0]) for name in ("trajectory_length", "step_size"))
print(f"trajectories up to {length:.1f} long, by steps of {step:.2f}: "
      f"{float(told['n_steps'].mean()):.1f} gradients a draw")  # fmt: skip
print(f"mean acceptance {float(told['acceptance_rate'].mean()):.2f}")

# %% [markdown]
# ## Have chains of 128 draws converged?
#
# R-hat compares chains with each other. A chain of few draws strays from the others by chance, so
# that R-hat is large where nothing is wrong. Nested R-hat compares superchains: chance averages out
# in a group, but a start that is not yet forgotten does not, since the whole group shares it.
#
# We look at both while draws come in: in the run above, and in one that is bad on purpose, whose
# chains begin far away and hardly warm up.

# %%
bad = ppl.infer(regression, *DATA, method=ppl.inference.MAMS(init_radius=5.0), warmup=12, **OPTIONS)


def scalars(tree):
    """The draws of all scalars, (chain, draw, scalar)."""
    sites = tree["posterior"].dataset[["scale", "level", "slope"]]
    arrays = [site.transpose("chain", "draw", ...).values for site in sites.data_vars.values()]
    return np.concatenate([a.reshape(*a.shape[:2], -1) for a in arrays], axis=-1)


GROUPS = np.repeat(np.arange(16), 4)
COUNTS = np.array([8, 16, 32, 64, 128])
curves = {}
for name, tree in {"warmed up": many, "hardly": bad}.items():
    draws = scalars(tree)
    for kind, number in {
        "R-hat": convergence.rhat,
        "nested R-hat": lambda x: convergence.rhat_nested(x, GROUPS),
    }.items():
        curves[name, kind] = [float(np.max(number(draws[:, :n]))) for n in COUNTS]
        shown = " ".join(f"{value:6.3f}" for value in curves[name, kind])
        print(f"{name:10s} {kind:13s} {shown}")

# %%
figure, axes = plt.subplots(figsize=(7.6, 3.6), layout="constrained")
for (name, kind), values in curves.items():
    colour = BLUE if name == "warmed up" else RED
    style = "-" if kind == "nested R-hat" else "--"
    axes.plot(COUNTS, np.array(values) - 1, style, marker="o", color=colour, ms=4)
    axes.annotate(f"  {kind}, {name}", (COUNTS[-1], values[-1] - 1), va="center", color=colour,
                  fontsize=9)  # fmt: skip
axes.axhline(0.01, color=GREY, lw=0.8)
axes.text(COUNTS[0], 0.0105, "1.01", color=GREY, va="bottom", fontsize=9)
axes.set(xscale="log", yscale="log", xlabel="draws of each chain", ylabel="largest R-hat, minus 1")
axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
axes.set_xlim(COUNTS[0] * 0.93, COUNTS[-1] * 3.4)
axes.minorticks_off()
_ = axes.set_title("What is chance, and what is a start not forgotten", loc="left", fontsize=10)

# %% [markdown]
# In the good run (blue) R-hat stays above its limit of 1.01 for as long as we look, though nothing
# is wrong; nested R-hat is below it early on. In the bad run (red) both are large, and stay so:
# grouping chains forgives chance, not neglect. Reports, summaries and findings use nested R-hat
# wherever a run has superchains, and allow 100 effective draws for every superchain instead of
# every chain.

# %%
for name, tree in {"warmed up": many, "hardly": bad}.items():
    found = ppl.findings(tree)
    print(f"{name}: {len(found)} findings")
    for finding in found:
        print(f"  {finding.kind}: {finding.message[:110]}...")

# %% [markdown]
# ## At equal gradients
#
# Is it worth it? The price of a draw is its gradients. We compare estimates of all 32 posterior
# means and standard deviations with those of a long run, as gradients are spent, for `NUTS` with
# four chains and for `ChEES` and `MAMS` with sixty-four. Seeds change, the compiled programs stay.

# %%
SEEDS = range(1, 2 if FAST else 9)
MANY = 200 if FAST else 10_000
long = scalars(ppl.infer(regression, *DATA, draws=MANY, seed=99, **BUDGET, **OPTIONS))
MEANS, SDS = long.mean((0, 1)), long.std((0, 1))


def errors(draws):
    """Root mean squares, in posterior standard deviations: of the means, and of these."""
    off = (draws.mean((0, 1)) - MEANS) / SDS, draws.std((0, 1)) / SDS - 1
    return [np.sqrt(np.mean(x**2)) for x in off]


spent, missed = {}, {}
for method in ("nuts", "chees", "mams"):
    rows = []
    for seed in SEEDS:
        tree = ppl.infer(regression, *DATA, method=method, seed=seed, **BUDGET, **OPTIONS)
        draws = scalars(tree)
        ends = np.unique(np.geomspace(draws.shape[1] / 16, draws.shape[1], 9).astype(int))
        gradients = tree["sample_stats"]["n_steps"].sum("chain").values.cumsum()[ends - 1]
        spent.setdefault(method, []).append(gradients)
        missed.setdefault(method, []).append([errors(draws[:, :end]) for end in ends])
        numbers = convergence.ranked(draws)
        ess = np.minimum(numbers["ess_bulk"], numbers["ess_tail"]) / gradients[-1]
        warm = tree.attrs["n_gradient_evaluations_warmup"]
        rows.append((*(1000 * np.quantile(ess, [0, 0.5])), gradients[-1] / 1000, warm / 1000))
        slowest = int(np.argmin(ess))  # the scale comes first
    least, middle, kept, warm = np.mean(rows, axis=0)
    print(f"{method:6s} ESS per 1000 gradients: least {least:5.1f} (the "
          f"{'scale' if slowest == 0 else 'slopes'}), median {middle:5.1f}; "
          f"gradients {kept:.0f} thousand, of warm-up {warm:.0f} thousand")  # fmt: skip

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained", sharex=True)
for panel, (axis, what) in enumerate(zip(axes, ("means", "standard deviations"), strict=True)):
    for method, colour in zip(spent, (GREY, BLUE, GREEN), strict=True):
        x, y = np.array(spent[method]), np.array(missed[method])[..., panel]
        axis.plot(x.ravel(), y.ravel(), "o", color=colour, ms=2.5, alpha=0.35, mew=0)
        middle = np.sqrt((y**2).mean(0))
        axis.plot(x.mean(0), middle, color=colour, lw=1.8)
        axis.annotate(f" {method}", (x.mean(0)[-1], middle[-1]), color=colour, va="center")
    axis.set(xscale="log", yscale="log", xlabel="gradients")
    axis.set_xlim(1e3, 2.2e5)
    axis.set_title(f"Errors of the {what}", loc="left", fontsize=10)
_ = axes[0].set_ylabel("in posterior standard deviations")

# %% [markdown]
# Averaged over all scalars, `ChEES` is nearest to the truth for what it costs, by its means as by
# its standard deviations. Its straight flights land on the other side of the posterior as often as
# not, so that errors of means cancel; those of `MAMS` are bent less regularly. The slowest scalar
# tells another story: the scale, on which all slopes depend, is what `MAMS` explores best, and how
# many effective draws there are is told by the slowest.
#
# What ensembles ask for is a longer warm-up, in which sixty-four chains have to come in instead of
# four. It pays where much precision is wanted, and where gradients of many chains at once are cheap
# beside gradients one by one: on graphics cards above all.
#
# ## From a few chains to many
#
# Where a posterior is hard to find, four careful chains can find it first: `init=` takes one value
# per superchain, such as the last draws of four chains of NUTS.

# %%
few = ppl.infer(regression, *DATA, draws=20 if FAST else 200, **BUDGET, **OPTIONS)
last = {name: few["posterior"][name][:, -1].values for name in ("scale", "level", "slope")}
again = ppl.infer(regression, *DATA, method="mams", superchains=4, init=last, warmup=100, **OPTIONS)
print(f"nested R-hat of 4 superchains up to {ppl.summary(again)['r_hat'].max():.3f}")

# %% [markdown]
# Four superchains tell less about convergence than sixteen: between them there are only four means
# to compare.
