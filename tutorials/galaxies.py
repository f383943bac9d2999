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
# # Galaxies: how many groups?
#
# Galaxies are not spread evenly through space: they form clusters, with voids between them. The
# farther away a galaxy is, the faster it recedes, so that the velocities of galaxies in one
# direction show the clusters as groups. Here are 82 of them, from a survey of the Corona Borealis
# region. How many groups are there?
#
# A mixture of normal distributions has a weight, a centre and a variance for every group. With the
# number of groups unknown, the number of parameters is unknown too. One run can still move between
# all these models (*reversible jumps*); but moves between dimensions are easily got wrong, and
# nothing in their traces would show it. So the run is checked at the end by a method that makes no
# such moves.
#
# On the way: `masked_plate`, splits and merges in a cycle with HMC, a density with bands that
# averages over the number of groups, and `cross_check`, jumps against evidences.
#
# Data: M. Postman, J. P. Huchra, M. J. Geller (1986), *Probes of large-scale structure in the
# Corona Borealis region*, Astronomical Journal 92, as in K. Roeder (1990), JASA 85. Moves: S.
# Richardson, P. J. Green (1997), *On Bayesian analysis of mixtures with an unknown number of
# components*, JRSS B 59.

# %%
import os
import warnings

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from scipy.stats import norm

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics import plots
from ppl_toolkit.errors import InferenceWarning
from ppl_toolkit.inference import (
    HMC,
    MCMC,
    SMC,
    BirthDeath,
    Moves,
    block,
    cycle,
    masked_plate,
    moment_split,
    repeat,
)

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS, WARMUP = (300, 150) if FAST else (3000, 300)
PARTICLES, RUNS = (64, 4) if FAST else (512, 6)

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)
if FAST:
    warnings.simplefilter("ignore", InferenceWarning)  # so few draws have findings

# Velocities in 1000 km/s.
VELOCITY = np.array(
    [9.172, 9.350, 9.483, 9.558, 9.775, 10.227, 10.406, 16.084, 16.170, 18.419, 18.552, 18.600,
     18.927, 19.052, 19.070, 19.330, 19.343, 19.349, 19.440, 19.473, 19.529, 19.541, 19.547,
     19.663, 19.846, 19.856, 19.863, 19.914, 19.918, 19.973, 19.989, 20.166, 20.175, 20.179,
     20.196, 20.215, 20.221, 20.415, 20.629, 20.795, 20.821, 20.846, 20.875, 20.986, 21.137,
     21.492, 21.701, 21.814, 21.921, 21.960, 22.185, 22.209, 22.242, 22.249, 22.314, 22.374,
     22.495, 22.746, 22.747, 22.888, 22.914, 23.206, 23.241, 23.263, 23.484, 23.538, 23.542,
     23.666, 23.706, 23.711, 24.129, 24.285, 24.289, 24.366, 24.717, 24.990, 25.633, 26.960,
     26.995, 32.065, 32.789, 34.279]
)  # fmt: skip
print(f"{len(VELOCITY)} galaxies: {np.sum(VELOCITY < 12)} below 12, "
      f"{np.sum(VELOCITY > 30)} above 30, {np.sum((VELOCITY > 12) & (VELOCITY < 30))} between "
      "(1000 km/s)")  # fmt: skip

# %% [markdown]
# ## The model
#
# Anything from one to five groups, all numbers equally likely before the data. A group's centre is
# N(20, 10^2) and its variance inverse gamma with mean 10; the proportions of the groups are uniform
# on the simplex. Gamma(1, 1) weights divided by their sum have just that law, and are easier to
# divide and to join than proportions.
#
# `masked_plate("group", 5, k)` has five slots, of which the first `k` are there; the others have no
# part in the density. It returns which ones are active. Which group a galaxy belongs to is summed
# out: a galaxy's density is the weighted sum of those of the groups.

# %%
MOST = 5


def galaxies(velocity):
    k = numpyro.sample("k", dist.DiscreteUniform(1, MOST))
    with masked_plate("group", MOST, k) as active:
        weight = numpyro.sample("weight", dist.Gamma(1.0, 1.0))
        centre = numpyro.sample("centre", dist.Normal(20.0, 10.0))
        variance = numpyro.sample("variance", dist.InverseGamma(3.0, 20.0))
    total = jnp.sum(jnp.where(active, weight, 0.0))
    log_share = jnp.log(jnp.where(active, weight / total, 1.0))
    each = dist.Normal(centre, jnp.sqrt(variance)).log_prob(velocity[:, None])
    each = jnp.where(active, each + log_share, -jnp.inf)
    numpyro.factor("velocities", jnp.sum(logsumexp(each, axis=1)))


# %% [markdown]
# ## The sampler
#
# Two kinds of moves change the number of groups. A **split** divides a group in two, so that
# weight, mean and variance of the pair together stay as they were: the new density is much like the
# old one, and has a chance to be accepted. A **merge** joins two neighbours, by the same rule read
# backwards. A **birth** adds a group drawn from the prior, mostly a small one that nobody needs
# yet; a **death** takes one away. The determinant of the map, and the probability of the way back,
# are part of the acceptance ratio without any doing of yours.
#
# Given the number of groups, the rest is a smooth density: work for Hamiltonian Monte Carlo. A draw
# is ten tries to jump, and one trajectory.

# %%
jumps = Moves(
    (
        moment_split("group", "weight", "centre", "variance", variance=True),
        BirthDeath("group"),
    ),
    weights=(2, 1),
)
kernel = cycle([repeat(jumps, 10), block(HMC(steps=16), ["weight", "centre", "variance"])])
posterior = ppl.infer(
    galaxies, VELOCITY, method=MCMC(kernel, warmup=WARMUP), draws=DRAWS, seed=1, progress="lines"
)
print(ppl.report(posterior, var_names=["k"]))

# %% [markdown]
# `k` is there in every draw and can be judged as usual: R-hat compares the chains, and the
# effective sample size says how many independent draws the probabilities below are worth.

# %%
stats = posterior["sample_stats"]
for number, name in enumerate(("split", "merge", "birth", "death")):
    tried = stats["move"].values == number
    print(f"{name:6} accepted {stats['accepted'].values[tried].mean():.0%}")
k = posterior["posterior"]["k"].values
print(f"{np.sum(np.diff(k, axis=1) != 0):,} changes of k in {k.size:,} draws")

# %% [markdown]
# ## How many groups?

# %%
sizes = np.arange(1, MOST + 1)
share = np.array([(k == n).mean(axis=1) for n in sizes])
error = 2 * share.std(axis=1, ddof=1) / np.sqrt(share.shape[1])
figure, (bars, trace) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained",
                                     width_ratios=[1, 1.7])  # fmt: skip
bars.bar(sizes, share.mean(axis=1), yerr=error, color=BLUE, alpha=0.55, ecolor=BLUE)
bars.axhline(1 / MOST, color=GREY, lw=1, ls="--")
bars.text(0.5, 1 / MOST + 0.01, "prior", color=GREY, fontsize=9)
bars.set(xlabel="number of groups", ylabel="probability", xticks=sizes)
shown = k[0, : min(300, k.shape[1])]
trace.step(np.arange(len(shown)), shown, color=BLUE, lw=0.8)
trace.set(xlabel="draw of the first chain", ylabel="number of groups", yticks=sizes)
plt.show()

for n, p in zip(sizes, share.mean(axis=1), strict=True):
    print(f"P({n} group{'' if n == 1 else 's'}) = {p:.3f}")

# %% [markdown]
# One group, or two, will not do. Three, four and five are all well possible: the data do not tell,
# and to report a single number would hide that.
#
# ## The density, whatever the number
#
# Slots have no identity: group 2 of one draw need not be group 2 of the next, and has no
# counterpart in a draw with one group. What is worth summarising does not depend on labels. The
# density of velocities is such a function: one curve per draw, from three groups or from five.

# %%
draws = posterior["posterior"].isel(draw=slice(None, None, max(1, DRAWS // 500)))
there = np.isfinite(draws["centre"].values).reshape(-1, MOST)
weight, centre, variance = (
    np.where(there, draws[name].values.reshape(-1, MOST), fill)
    for name, fill in (("weight", 0.0), ("centre", 0.0), ("variance", 1.0))
)
proportion = weight / weight.sum(axis=1, keepdims=True)
at = np.linspace(5, 40, 351)
by_group = proportion[:, :, None] * norm.pdf(at, centre[:, :, None],
                                             np.sqrt(variance)[:, :, None])  # fmt: skip
density = by_group.sum(axis=1)
low, high = np.quantile(density, [0.055, 0.945], axis=0)

figure, panel = plt.subplots(figsize=(9, 3.4), layout="constrained")
panel.hist(VELOCITY, np.arange(5, 41, 1.0), density=True, color="#d9d9d9", label="82 galaxies")
panel.fill_between(at, low, high, color=BLUE, alpha=0.25, lw=0, label="89% band")
panel.plot(at, density.mean(axis=0), color=BLUE, lw=1.8, label="mean over all models")
drawn = draws["k"].values.ravel()
for n, colour in ((3, RED), (5, GREEN)):
    if np.any(drawn == n):
        panel.plot(at, density[drawn == n].mean(axis=0), color=colour, lw=1, ls="--",
                   label=f"given {n} groups")  # fmt: skip
panel.plot(VELOCITY, np.full(len(VELOCITY), -0.006), "|", color="black", ms=6, mew=0.6)
panel.set(xlabel="velocity (1000 km/s)", ylabel="density", xlim=(5, 40))
panel.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Whether three groups or five: the density is the same. The models differ in how they put it
# together, and not in what they predict.
#
# ## What the groups are
#
# Given the number, groups can be told apart by the order of their centres.

# %%
figure, panels = plt.subplots(3, 1, figsize=(9, 5.4), sharex=True, layout="constrained")
for panel, n in zip(panels, (3, 4, 5), strict=True):
    mine = drawn == n
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.plot(VELOCITY, np.full(len(VELOCITY), 0.0), "|", color="black", ms=7, mew=0.6)
    panel.set_title(f"{n} groups, probability {share[n - 1].mean():.2f}", loc="left", fontsize=10)
    if not np.any(mine):
        continue
    order = np.argsort(np.where(there[mine], centre[mine], np.inf), axis=1)[:, :n]
    curves = np.take_along_axis(by_group[mine], order[:, :, None], axis=1).mean(axis=0)
    for i, curve in enumerate(curves):
        colour = plt.get_cmap("viridis")(0.1 + 0.75 * i / (n - 1))
        panel.fill_between(at, curve, color=colour, alpha=0.45, lw=0)
        panel.plot(at, curve, color=colour, lw=1.2)
    means = np.take_along_axis(centre[mine], order, axis=1).mean(axis=0)
    parts = np.take_along_axis(proportion[mine], order, axis=1).mean(axis=0)
    listed = ", ".join(f"{m:.1f} ({p:.0%})" for m, p in zip(means, parts, strict=True))
    print(f"{n} groups at {listed}")
panels[-1].set(xlabel="velocity (1000 km/s)", xlim=(5, 40))
plt.show()

# %% [markdown]
# The seven slow galaxies and the three fast ones are a group each, in every model. A fourth and a
# fifth group lie on top of the one in the middle: two or three normal distributions draw its shape
# a little better than one does, and no better than they must pay for. So the number of components
# is not the number of clusters. It is the answer to a question about this model, with this prior:
# variances of about 10, or 3,000 km/s, are wide, and narrow groups around 20 and 23, which the
# histogram hints at, would need a prior that expects them.
#
# ## Are the jumps right?
#
# High effective sample sizes say that the chains agree with each other, not that they are right: a
# sampler with a factor missing in its acceptance ratio mixes just as well, and gives other
# probabilities. Here is an independent way to them. The posterior of `k` is proportional to the
# evidence p(k) p(y | k), and sequential Monte Carlo estimates an evidence with `k` held fixed: it
# never jumps. `cross_check` conditions the model on every `k` that has one percent or more, runs
# SMC some times, and compares, with the errors of both.

# %%
found = ppl.cross_check(
    posterior, galaxies, VELOCITY, method=SMC(particles=PARTICLES), chains=RUNS, progress="lines"
)
print(found)
plots.cross_check(found)

# %% [markdown]
# Two methods with nothing in common but the model agree. The log evidences themselves are known:
# adaptive SMC by an independent program gave -232.88, -226.81, -226.65 and -227.01 for two to five
# groups, with errors of 0.03 to 0.08, hence probabilities of 0.336, 0.391 and 0.273 for three, four
# and five.

# %%
for value, row in found.table.iterrows():
    log_evidence = row["log_evidence"] + np.log(MOST)  # without the prior of k, which is 1/5
    print(f"log p(y | {value} groups) = {log_evidence:.2f} +- {row['log_evidence_se']:.2f}")

# %% [markdown]
# `found.attached(posterior)` puts the comparison on the page that `ppl.report` writes. When the two
# disagree, the text says what to look at: the moves, whether the chains have mixed, and whether SMC
# had particles enough.
