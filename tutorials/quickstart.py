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
# # Quick start: eight schools
#
# Five minutes, one small data set, and every step of an analysis: look at the prior, fit, read
# what the run says about itself, repair the model, compare, predict, save.
#
# Eight American schools each ran a short coaching programme for the SAT-V test. For every school
# we have an estimate of the effect of coaching, in points, and its standard error. The question:
# how much did coaching help in each school, and how much do the schools differ?
#
# Data: D. B. Rubin (1981), *Estimation in parallel randomized experiments*, Journal of
# Educational Statistics 6, table 1; also A. Gelman et al., *Bayesian Data Analysis*, table 5.2.

# %%
import os
import tempfile
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import LocScaleReparam

import ppl_toolkit as ppl

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS = 250 if FAST else 1000

SCHOOLS = list("ABCDEFGH")
EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])  # points
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])  # standard errors, points

BLUE, RED, GREY = "#2a6f97", "#c1440e", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)


# %% [markdown]
# ## The model
#
# A model is a plain NumPyro function. Every school has its own true effect `theta`; the effects
# come from a common normal law with mean `mu` and standard deviation `tau`; each estimate is the
# true effect plus an error of known size. `y=None` lets the same function simulate data.


# %%
def schools(error, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", error.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, error), obs=y)


# %% [markdown]
# ## Before the data: what does the prior expect?
#
# `method="prior"` draws from the prior. Without `y` the estimates are drawn too, so we can ask
# what kind of data the model finds ordinary.

# %%
prior = ppl.infer(
    schools, ERROR, method="prior", draws=DRAWS, seed=1, coords={"school": SCHOOLS}, progress=False
)
simulated = prior["prior"]["y"].values.reshape(-1, len(SCHOOLS))
largest = np.abs(simulated).max(axis=1)
print(f"largest |estimate| among the eight schools, half of the time below {np.median(largest):.0f}"
      f" points, in one of ten cases above {np.quantile(largest, 0.9):.0f}")  # fmt: skip

figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.hist(simulated.ravel(), bins=np.arange(-100, 101, 4), density=True, color=BLUE, alpha=0.5)
axes.plot(EFFECT, np.full(8, -0.0012), "|", color=RED, ms=14, mew=2, clip_on=False)
axes.set(xlabel="estimated effect (points)", yticks=[], xlim=(-100, 100))
axes.spines["left"].set_visible(False)
_ = axes.set_title("Estimates that the prior expects, and the eight observed (red)", loc="left")

# %% [markdown]
# The observed estimates lie well inside. The prior also allows effects of 60 points and more, a
# great deal on a test scored from 200 to 800: it is weak, but it is not absurd.
#
# ## The first fit, and what it says about itself
#
# `ppl.infer` looks at the model and picks a method; all latent sites are continuous here, so it
# takes NUTS. It returns an `xarray.DataTree` in ArviZ's layout. The plate's name became a
# dimension, and `coords` gives it labels.

# %%
first = ppl.infer(
    schools, ERROR, y=EFFECT, draws=DRAWS, seed=0, coords={"school": SCHOOLS}, progress="lines"
)

# %% [markdown]
# The run ended with a warning: the draws are not to be trusted as they are. The report gives the
# verdict, the findings with their remedies, and the numbers.

# %%
print(ppl.report(first))

# %% [markdown]
# The findings are data as well, so a script can act on them:

# %%
for finding in ppl.findings(first):
    print(f"{finding.severity:8} {finding.kind:12} {finding.number:8.3g}  {finding.sites}")

# %% [markdown]
# What do they mean? When `tau` is small, all eight `theta` must lie close to `mu`: the posterior
# is a funnel with a narrow neck. A step that suits the wide mouth is far too long for the neck,
# and the sampler's simulated path flies off: a *divergence*. NUTS tries its steps before it draws,
# and shortens them where that happens, so that few are left or none. But the height in the funnel
# still changes only a little with every draw (*E-BFMI*): chains enter the neck rarely, stay for
# long, and say little about `tau` (*ESS*, *R-hat*). More draws hardly repair that.
#
# ## The repair
#
# The finding names the remedy: describe the same model by standardised effects, whose prior does
# not depend on `tau`. NumPyro can rewrite the model for us; `theta` is still in the result. We
# ask for somewhat smaller steps as well, which costs little here.

# %%
non_centred = numpyro.handlers.reparam(schools, config={"theta": LocScaleReparam(0)})
careful = ppl.NUTS(target_acceptance=0.95)
posterior = ppl.infer(
    non_centred,
    ERROR,
    y=EFFECT,
    method=careful,
    draws=DRAWS,
    seed=0,
    coords={"school": SCHOOLS},
    progress="lines",
)
print(ppl.report(posterior))

# %% [markdown]
# Side by side: the two runs in the plane of one school's effect and log `tau`. On the left few
# draws lie where the funnel narrows, in threads: a chain that got there moved slowly. (Divergences,
# if there are any, are red.) On the right the draws run far down into the neck.

# %%
figure, panels = plt.subplots(
    1, 2, figsize=(8, 3.6), sharex=True, sharey=True, layout="constrained"
)
for panel, result, title in zip(
    panels, (first, posterior), ("centred", "non-centred"), strict=True
):
    draws = result["posterior"]
    theta, log_tau = draws["theta"].sel(school="A").values, np.log(draws["tau"].values)
    bad = result["sample_stats"]["diverging"].values
    panel.plot(theta[~bad], log_tau[~bad], ".", color=BLUE, ms=2, alpha=0.4, rasterized=True)
    panel.plot(theta[bad], log_tau[bad], ".", color=RED, ms=5)
    panel.set_title(f"{title}: {bad.sum()} divergences", loc="left")
    panel.set(xlabel="effect in school A (points)", xlim=(-25, 45), ylim=(-5, 4.5))
_ = panels[0].set_ylabel("log tau")

# %% [markdown]
# ## What coaching did
#
# Each estimate is pulled towards the common mean, and the more so the less certain it was: the
# effects *shrink*. School A's remarkable 28 points become about a quarter of that.

# %%
theta = posterior["posterior"]["theta"].stack(sample=("chain", "draw"))
low, high = np.quantile(theta, [0.055, 0.945], axis=1)
rows = np.arange(len(SCHOOLS))[::-1]
wide = 1.598 * ERROR  # half the width of an 89% interval of a normal law

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.hlines(rows + 0.15, EFFECT - wide, EFFECT + wide, color=GREY, lw=1.5)
axes.plot(EFFECT, rows + 0.15, "o", color=GREY, ms=5, label="the school's own estimate")
axes.hlines(rows - 0.15, low, high, color=BLUE, lw=2.5)
axes.plot(theta.mean("sample"), rows - 0.15, "o", color=BLUE, ms=6, label="all schools together")
axes.axvline(float(posterior["posterior"]["mu"].mean()), color=BLUE, lw=0.8, ls=":")
axes.set_yticks(rows, SCHOOLS)
axes.set(xlabel="effect of coaching (points), with 89% intervals", ylabel="school")
_ = axes.legend(frameon=False, loc="center right")

# %% [markdown]
# Questions about the effects are questions about the draws:

# %%
draws = posterior["posterior"]
print(
    f"P(coaching in school A helped):     {float((draws['theta'].sel(school='A') > 0).mean()):.2f}"
)
best = draws["theta"].idxmax("school")
print(f"P(A gained most of the eight):      {float((best == 'A').mean()):.2f}")
print(f"P(the schools differ by tau > 5):   {float((draws['tau'] > 5).mean()):.2f}")

# %% [markdown]
# ## New data, same program
#
# Data are arguments of the compiled program, not part of it, so data of the same shape need no
# compilation. (A run may also take over the step size and metric of an earlier one: `init=`.)
# Suppose four times as many pupils had given the same estimates: half the errors.

# %%
larger_trial = ppl.infer(
    non_centred, ERROR / 2, y=EFFECT, draws=DRAWS, seed=0, progress=False,
    coords={"school": SCHOOLS},
)  # fmt: skip
for name, run in {"as it was": posterior, "errors halved": larger_trial}.items():
    seconds = sum(run.attrs[f"time_{part}"] for part in ("warmup", "sampling"))
    tau = run["posterior"]["tau"]
    print(f"{name:14} prepared in {run.attrs['time_compile']:5.2f} s, sampled in {seconds:.2f} s; "
          f"tau {float(tau.mean()):.1f} +- {float(tau.std()):.1f}")  # fmt: skip

# %% [markdown]
# With smaller errors the spread of the estimates would have to be real, so `tau` grows.
#
# ## More draws
#
# `ppl.extend` goes on where a run ended. The draws are those that one long run would have given,
# bit for bit. Four times the draws halve the Monte Carlo error.

# %%
longer = ppl.extend(posterior, non_centred, ERROR, y=EFFECT, draws=3 * DRAWS, progress=False)
for run in (posterior, longer):
    row = ppl.summary(run, "tau").loc["tau"]
    print(f"{4 * run['posterior'].sizes['draw']:6} draws: tau = {row['mean']:.2f}, Monte Carlo "
          f"error {row['mcse_mean']:.3f}, effective draws {row['ess_bulk']:.0f}")  # fmt: skip

# %% [markdown]
# ## Does the model predict what was seen?
#
# `ppl.predict` draws the data anew for every posterior draw. Given the arguments of the run this
# is the posterior predictive distribution, in the group of that name.

# %%
longer = ppl.predict(longer, non_centred, ERROR, y=EFFECT, seed=3)
replicated = longer["posterior_predictive"]["y"]
checks = {
    "largest": (replicated.max("school"), EFFECT.max()),
    "smallest": (replicated.min("school"), EFFECT.min()),
    "standard deviation": (replicated.std("school"), EFFECT.std()),
}
figure, panels = plt.subplots(1, 3, figsize=(8, 2.4), layout="constrained")
for panel, (name, (values, observed)) in zip(panels, checks.items(), strict=True):
    panel.hist(values.values.ravel(), bins=40, color=BLUE, alpha=0.5)
    panel.axvline(observed, color=RED, lw=2)
    share = float((values >= observed).mean())
    panel.set_title(f"{name}: {share:.0%} above", loc="left", fontsize=10)
    panel.set(yticks=[], xlabel="points")
    panel.spines["left"].set_visible(False)
_ = figure.suptitle("Replicated data sets (blue) and the one observed (red)", x=0.01, ha="left")

# %% [markdown]
# The observed data look like data from the model. How well would it predict a school's estimate
# that it had not seen? `ppl.log_likelihood` adds the pointwise log likelihood (and the log prior),
# and ArviZ computes leave-one-out cross-validation from it. All of ArviZ works on a result.

# %%
longer = ppl.log_likelihood(longer, non_centred, ERROR, y=EFFECT)
print(az.loo(longer))

# %% [markdown]
# ## Keep it
#
# A result is one file, readable by ArviZ and xarray, with all that is needed to reproduce it or to
# go on with it. `ppl.report` also writes a page to send to a colleague.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = ppl.save(longer, Path(folder) / "schools.nc")
    ppl.report(longer, Path(folder) / "schools.html")
    again = ppl.load(file)
    print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, groups {sorted(again.children)}")
print("the draws came back unchanged:", again["posterior"].equals(longer["posterior"]))
print("seed", again.attrs["seed"], "| method", again.attrs["method"], again.attrs["method_options"])

# %% [markdown]
# Next: *Hierarchical regression* does the same with predictors, compares models, and predicts
# groups that were never observed.
