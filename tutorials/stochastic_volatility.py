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
# # Stochastic volatility: one model function, every particle method
#
# How much a share index moves in a day changes over time: there are calm years and wild months. The
# size of the moves, the *volatility*, is not observed; the returns tell of it. Here the S&P 500
# from 2007 to 2009, through the crash of October 2008.
#
# The model is an ordinary NumPyro function with a `scan`. The same function is filtered, smoothed,
# compared with another model by its evidence, fitted by particle Gibbs and by NUTS, and followed
# day by day.
#
# Model: S. J. Taylor (1982); S. Kim, N. Shephard and S. Chib (1998), *Stochastic volatility:
# likelihood inference and comparison with ARCH models*, Review of Economic Studies 65. Data: daily
# closing prices, shipped with the package `arch`.

# %%
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from arch.data import sp500
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics import plots
from ppl_toolkit.inference import PPG, OnlineFilter, ParticleFilter, ParticleGibbs

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS, WARMUP, PARTICLES = (20, 20, 100) if FAST else (1000, 500, 2000)

BLUE, RED, GREY = "#2a6f97", "#c1440e", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)

prices = sp500.load()["Adj Close"]
returns = (100 * np.log(prices).diff()).loc["2007-07":"2009-06"]
returns -= returns.mean()
days, y = returns.index, returns.to_numpy()
print(f"{len(y)} days; the largest loss was {-y.min():.1f}% on {days[y.argmin()]:%d %B %Y}")

# %% [markdown]
# ## The model
#
# The logarithm of the variance, `h`, goes back to its mean `mu` with persistence `phi`. A day's
# return is normal with variance exp(h).


# %%
def volatility(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    start = numpyro.sample("h_0", dist.Normal(mu, sigma / jnp.sqrt(1.0 - phi**2)))

    def day(h, y_t):
        h = numpyro.sample("h", dist.Normal(mu + phi * (h - mu), sigma))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)), obs=y_t)
        return h, None

    scan(day, start, y)


# %% [markdown]
# ## Filtering with known parameters
#
# A particle filter follows the series with a cloud of guesses. Its picture shows what is known of
# the volatility of a day from the days before (red), and from all days (blue).

# %%
KNOWN = {"mu": 0.8, "phi": 0.98, "sigma": 0.2}
filtered = ppl.infer(
    volatility, y, method=ParticleFilter(PARTICLES, given=KNOWN), draws=DRAWS // 4, progress=False
)
figure = plots.series(filtered, "h", time=days, data=np.abs(y), transform=lambda h: np.exp(h / 2))
figure.axes[0].set(xlabel="", ylabel="sd of a day's return, %", ylim=(0, 8))
figure

# %% [markdown]
# How did the filter fare? The effective sample size falls on the days that surprise. The last
# particles have few ancestors in early steps, which is why smoothed paths are drawn backwards and
# not along these ancestors.

# %%
plots.filtering(filtered, time=days)

# %% [markdown]
# ## Which model? Evidence from a filter
#
# Bad news makes markets nervous: does a loss today raise tomorrow's volatility? With *leverage* the
# innovation of `h` is correlated with the return of the day before. Both models have the same
# parameters otherwise; the evidence of each comes with its error.


# %%
def leverage(y, rho):
    def day(state, y_t):
        h, shock = state
        middle = KNOWN["mu"] + KNOWN["phi"] * (h - KNOWN["mu"]) + KNOWN["sigma"] * rho * shock
        h = numpyro.sample("h", dist.Normal(middle, KNOWN["sigma"] * jnp.sqrt(1.0 - rho**2)))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)), obs=y_t)
        return (h, y_t * jnp.exp(-h / 2)), None

    scan(day, (KNOWN["mu"], 0.0), y)


for rho in (0.0, -0.4, -0.7):
    run = ppl.infer(leverage, y, rho, method=ParticleFilter(PARTICLES), draws=1, progress=False)
    log_z, error = run.sample_stats["log_evidence"], run["filtering"]["log_evidence_sd"]
    print(f"rho = {rho:+.1f}: log evidence {float(log_z.mean()):8.2f}, "
          f"sd of one run {float(error.mean()):.2f}")  # fmt: skip

# %% [markdown]
# ## Learning the parameters: particle Gibbs, and NUTS
#
# `ParticleGibbs` alternates between a path of the volatility, by a conditional particle filter, and
# the parameters given the path, by NUTS. Nothing has to be said about the model. NUTS alone runs on
# the same function: it must find its way in more than five hundred dimensions at once.

# %%
gibbs = ppl.infer(
    volatility, y, method=ParticleGibbs(particles=64 if FAST else 128), draws=DRAWS, warmup=WARMUP,
    progress=False,
)  # fmt: skip
nuts = ppl.infer(volatility, y, method="nuts", draws=DRAWS, warmup=WARMUP, progress=False)
names = ["mu", "phi", "sigma"]
for label, run in (("particle Gibbs", gibbs), ("NUTS", nuts)):
    table = ppl.summary(run, names)
    print(f"{label}\n{table[['mean', 'sd', 'ess_bulk', 'r_hat']].round(3)}\n")

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
for panel, name in zip(panels, names, strict=True):
    for run, colour, label in ((gibbs, BLUE, "particle Gibbs"), (nuts, RED, "NUTS")):
        panel.hist(run.posterior[name].values.ravel(), 40, density=True, histtype="step",
                   color=colour, lw=1.4, label=label)  # fmt: skip
    panel.set(title=name, yticks=[])
panels[0].legend(frameon=False, fontsize=8)

# %% [markdown]
# The two agree, and both warn that they mix slowly: given a whole path, `sigma` is known so well
# that it can only creep, whichever sampler moves it. More draws mend that, or a method that moves
# the parameters without a path: `PMMH` and `SMC2`, see *Lynx and hares* and
# *An influenza epidemic*.
#
# Does every part of the path move? Near the jumps of volatility few particles fit, but even there a
# good share of the sweeps brings a new path.

# %%
plots.renewal(gibbs, "h", time=days)

# %% [markdown]
# ## Expectations by PaRIS particle Gibbs
#
# Some questions are sums over time: on how many days was the standard deviation above 3%? `PPG`
# carries the sum along the particles of every sweep, which gives a better estimate than the paths
# alone; the path of a sweep only has to be a fair beginning for the next one. `smoothed` reads off
# the result and its error, and leaves out the first sweeps.


# %%
def wild(h_before, latents, t):
    return {"wild days": 1.0 * (latents["h"] > 2 * jnp.log(3.0))}


swept = ppl.infer(
    volatility, y, method=PPG(functional=wild, given=KNOWN, particles=64 if FAST else 128),
    draws=16 if FAST else 64, progress=False,
)  # fmt: skip
found = ppl.smoothed(swept)
drawn = (swept.posterior["h"] > 2 * np.log(3.0)).sum(swept.posterior["h"].dims[-1])
print(
    f"wild days: {float(found['wild days']):.2f} +- {float(found['wild days_se']):.2f} "
    f"(sd of a sweep {float(swept.sample_stats['smoothed.wild days'].std()):.2f}; "
    f"of the number along the paths themselves {float(drawn.std()):.2f})"
)
print(f"correlation from sweep to sweep {found.attrs['lag_1']:.2f}, "
      f"first sweeps left out: {found.attrs['left_out']}")  # fmt: skip

# %% [markdown]
# ## Day by day
#
# `OnlineFilter` goes on when a new day comes; its memory does not grow. Every evening it says how
# wild tomorrow will be. Here the 1% value at risk: a loss that should be exceeded on one day in a
# hundred.

# %%
online = OnlineFilter(volatility, y[:20], method=ParticleFilter(PARTICLES, given=KNOWN))
state = online.start(seed=1)
rng, risk = np.random.default_rng(1), []
for y_t in y[20:60] if FAST else y[20:]:
    h = rng.choice(state.population.particles, 4000, p=np.exp(state.population.log_weights))
    h = KNOWN["mu"] + KNOWN["phi"] * (h - KNOWN["mu"]) + KNOWN["sigma"] * rng.normal(size=4000)
    risk.append(-np.quantile(np.exp(h / 2) * rng.normal(size=4000), 0.01))
    state = online.update(state, y_t)
losses = -y[20 : 20 + len(risk)]
beyond = losses > risk
print(f"losses beyond the value at risk: {beyond.sum()} of {len(risk)} days "
      f"({100 * beyond.mean():.1f}%)")  # fmt: skip

figure, panel = plt.subplots(figsize=(9, 2.8), layout="constrained")
shown = days[20 : 20 + len(risk)]
panel.vlines(shown, 0, losses, color=GREY, lw=0.6)
panel.plot(shown, risk, color=BLUE, lw=1.3, label="1% value at risk, said the evening before")
panel.plot(shown[beyond], losses[beyond], "o", ms=4, color=RED, label="losses beyond")
panel.set(ylabel="loss, %", ylim=(-11, 14))
panel.legend(frameon=False, fontsize=8)

# %% [markdown]
# ## What to take away
#
# - A model with a `scan` is all that particle methods need; `ppl.infer` finds out what is static,
#   what is a latent of each step, and what may be joined.
# - `ParticleFilter` for known parameters, `ParticleGibbs` to learn them, `PPG` for expectations of
#   sums, `OnlineFilter` for data that keep coming.
# - Where NUTS works too, the two agree. Where latents are discrete, only particles are left: see
#   *An influenza epidemic in a school*.
