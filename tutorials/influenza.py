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
# # An influenza epidemic in a school: discrete latents
#
# In January 1978 influenza came to an English boarding school with 763 boys. Five days after the
# first three were in bed, 298 were. How many did one boy infect, and for how long? Did it help to
# keep the ill in bed?
#
# Boys are whole numbers. Who was infected on which day is not known: 28 latent integers, far too
# many values to sum over, and without gradients. Particles do not mind.
#
# Data: boys in bed per day, *Influenza in a boarding school*, British Medical Journal, 4 March
# 1978, p. 587. Chain binomial models go back to L. Reed and W. H. Frost; see H. Abbey (1952), *An
# examination of the Reed-Frost theory of epidemics*, Human Biology 24. SMC^2: N. Chopin, P. E.
# Jacob and O. Papaspiliopoulos (2013), Journal of the Royal Statistical Society B 75.

# %%
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit.inference import PMMH, PPG, SMC2

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)

BOYS = 763
in_bed = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])
days = np.arange(1, 15)
print(f"{BOYS} boys; most in bed on day {days[in_bed.argmax()]}: {in_bed.max()}")

# %% [markdown]
# ## The model
#
# A day: every well boy may catch the influenza from those who are ill, every ill boy may recover.
# Both numbers are binomial. `stay` is how many days a boy is ill on average, and `R0` how many he
# infects in that time among boys who are all well. The boys in bed are the ill ones, counted with
# some noise: a boy may be in bed a day longer, or not want to go.
#
# Three arguments are for later. `eased` says whether there is one parameter more: from day 6 on,
# with a third of the school in bed and out of the way, transmission may be down by the share `cut`.
# `immune` is the share of boys who cannot catch it, and `length` the number of days.


# %%
def epidemic(in_bed=None, eased=0.0, immune=0.0, length=14):
    R0 = numpyro.sample("R0", dist.LogNormal(1.0, 0.5))
    stay = numpyro.sample("stay", dist.Uniform(1.0, 7.0))
    noise = numpyro.sample("noise", dist.LogNormal(jnp.log(0.2), 0.3))
    cut = numpyro.sample("cut", dist.Uniform(0.0, 1.0))

    def day(boys, number):
        well, ill = boys
        spread = R0 / stay * (1.0 - eased * cut * (number >= 6)) * ill / BOYS
        chances = jnp.stack([1.0 - jnp.exp(-spread), 1.0 / stay])
        law = dist.Binomial(jnp.stack([well, ill]), jnp.clip(chances, 1e-9, 1.0 - 1e-9))
        infected, recovered = numpyro.sample("moves", law.to_event(1))
        well, ill = well - infected, ill + infected - recovered
        numpyro.sample("in_bed", dist.NegativeBinomial2(ill + 1e-3, noise**-2))
        return (well, ill), None

    first = (jnp.round((1.0 - immune) * (BOYS - 1)).astype(int), jnp.ones((), int))
    with numpyro.handlers.condition(data={} if in_bed is None else {"in_bed": in_bed}):
        scan(day, first, jnp.arange(1, length + 1))


# %% [markdown]
# ## What does not work
#
# NUTS needs gradients. And particle Gibbs with sums (`PPG`) joins paths of different particles in
# the middle, which this model does not allow: the numbers of well and ill boys come from all
# infections so far, so that other infections yesterday change today's boys.

# %%
for method in ("nuts", PPG(functional=lambda boys, latents, t: 1.0 * latents["moves"][0])):
    try:
        ppl.infer(epidemic, in_bed, method=method, progress=False)
    except ppl.errors.MethodError as refusal:
        print(f"{refusal}\n")

# %% [markdown]
# `ParticleGibbs` would do, as the message says: it draws an ancestor by replaying the rest of the
# path from every particle. Here two methods that ask even less of the model: they only ever run it
# forwards.
#
# ## SMC^2
#
# `SMC2` has a cloud of parameters, each with a particle filter inside, and takes in the data day by
# day. Where the cloud has become poor it is moved, by particle marginal Metropolis-Hastings. Four
# chains are four independent runs. The evidence of the model comes with it.

# %%
cloud = SMC2(particles=24 if FAST else 192, inner=24 if FAST else 48, doublings=0)
plain = ppl.infer(epidemic, in_bed, method=cloud, draws=cloud.particles, progress=False)
names = ["R0", "stay", "noise"]
print(ppl.summary(plain, names)[["mean", "sd", "ess_bulk", "r_hat"]].round(3))

# %% [markdown]
# `PMMH` has chains of parameters instead, one filter at every step. It must get the same.

# %%
walk = ppl.infer(
    epidemic, in_bed, method=PMMH(particles=24 if FAST else 80), draws=30 if FAST else 4000,
    warmup=30 if FAST else 1000, progress=False,
)  # fmt: skip
print(ppl.summary(walk, names)[["mean", "sd", "ess_bulk", "r_hat"]].round(3))

figure, panels = plt.subplots(1, 4, figsize=(10, 2.5), layout="constrained")
for panel, name in zip(panels, names, strict=False):
    for run, colour, label in ((plain, BLUE, "SMC$^2$"), (walk, GREEN, "PMMH")):
        panel.hist(run.posterior[name].values.ravel(), 25, density=True, histtype="step",
                   color=colour, lw=1.4, label=label)  # fmt: skip
    panel.set(title=name, yticks=[])
panels[0].legend(frameon=False, fontsize=8)
panels[3].plot(plain.posterior["R0"].values.ravel(), plain.posterior["stay"].values.ravel(), ".",
               color=BLUE, ms=2.5, alpha=0.6)  # fmt: skip
panels[3].set(xlabel="R0", ylabel="stay, days")

# %% [markdown]
# One boy infects about five others, within about two days. Both numbers go together: what grows at
# first is given by their ratio.
#
# ## Who fell ill when
#
# Every draw of the parameters comes with a path of the latents, whole numbers all of them. Bands of
# 90% and 50%.

# %%
moves = plain.posterior["moves"].values.reshape(-1, 14, 2)
ill = 1 + np.cumsum(moves[..., 0] - moves[..., 1], axis=1)
figure, panels = plt.subplots(1, 2, figsize=(10, 3.1), layout="constrained")
for panel, values, label in zip(
    panels, (moves[..., 0], ill), ("boys infected on a day", "boys ill"), strict=True
):
    low, near, median, far, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    panel.fill_between(days, low, high, color=BLUE, alpha=0.16, lw=0)
    panel.fill_between(days, near, far, color=BLUE, alpha=0.24, lw=0)
    panel.plot(days, median, color=BLUE, lw=1.5)
    panel.set(xlabel="day", ylabel=label, ylim=(0, None), xlim=(1, 14))
panels[1].plot(days, in_bed, "o", ms=4, color=RED, label="in bed")
panels[1].legend(frameon=False, fontsize=8)

worst = days[moves[..., 0].argmax(axis=1)]
total = 1 + moves[..., 0].sum(axis=1)
print(
    f"most infections on day {np.median(worst):.0f} (P = {np.mean(worst == np.median(worst)):.2f})"
)
print(f"infected within 14 days: {total.mean():.0f} +- {total.std():.0f} of {BOYS} boys")

# %% [markdown]
# The model has nearly everybody infected, for two days. It knows no boys who are immune, and none
# who are ill without going to bed: with such boys, fewer would have been infected, for longer. A
# model is not true because it fits one series.
#
# ## Did it help to keep them in bed?
#
# Now with a `cut` of the transmission from day 6 on. Nothing is compiled again: `eased` is an
# argument. Evidences with their standard errors, from the four runs.

# %%
eased = ppl.infer(epidemic, in_bed, 1.0, method=cloud, draws=cloud.particles, progress=False)
for label, run in (("no cut", plain), ("a cut on day 6", eased)):
    log_z = run.sample_stats["log_evidence"].values[:, 0]
    print(f"{label:15} log evidence {log_z.mean():7.2f} +- {log_z.std(ddof=1) / 2:.2f}")
low, high = np.quantile(eased.posterior["cut"].values, [0.05, 0.95])
print(f"cut {float(eased.posterior['cut'].mean()):.2f} (90%: {low:.2f} to {high:.2f})")

figure, (evidence, share) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
steps = [run["smc"]["log_evidence_increment"].values[:, 1:] for run in (eased, plain)]
gained = np.cumsum(steps[0].mean(axis=0) - steps[1].mean(axis=0))
error = np.sqrt(sum(np.cumsum(x, axis=1).var(axis=0, ddof=1) / 4 for x in steps))
evidence.axhline(0.0, color="black", lw=0.6)
evidence.errorbar(days, gained, error, color=BLUE, fmt="o-", ms=3.5, lw=1.2)
evidence.set(xlabel="data up to day", ylabel="log Bayes factor for a cut", ylim=(-3, 3))
share.hist(eased.posterior["cut"].values.ravel(), np.linspace(0, 1, 26), density=True, color=BLUE,
           alpha=0.55, label="posterior")  # fmt: skip
share.axhline(1.0, color=GREY, lw=1.2, label="prior")
share.set(xlabel="cut of the transmission from day 6", yticks=[])
share.legend(frameon=False, fontsize=8)

# %% [markdown]
# The posterior of `cut` prefers a quarter or so. But all in all the evidence for a cut is worth
# next to nothing: by day 10 it had grown to a Bayes factor of about six, and the days after took
# most of it back. By the end of day 6 more than half of the boys had been infected, and from then
# on an epidemic that is slowed looks much like one that runs out of boys.
#
# ## What if?
#
# `predict` with other arguments, and `resample="moves"`: the parameters are those of the posterior,
# the epidemic is drawn anew. First the same school again, then with some of the boys immune.

# %%
figure, panel = plt.subplots(figsize=(7, 2.9), layout="constrained")
for immune, colour in ((0.0, GREY), (0.4, BLUE), (0.7, RED)):
    again = ppl.predict(plain, epidemic, None, 0.0, immune, length=60, resample="moves")
    moves = again["predictions"]["moves"].values.reshape(-1, 60, 2)
    total = 1 + moves[..., 0].sum(axis=1)
    most = (1 + np.cumsum(moves[..., 0] - moves[..., 1], axis=1)).max(axis=1)
    large = total >= 50
    print(
        f"immune {immune:.0%}: 50 boys or more infected in {large.mean():.0%} of the epidemics, "
        f"then {total[large].mean():.0f}, and {most[large].mean():.0f} ill at once"
    )
    weights = np.full(len(total), 1 / len(total))
    panel.hist(total, np.arange(0, 781, 20), histtype="step", color=colour, lw=1.4,
               weights=weights, label=f"{immune:.0%} immune")  # fmt: skip
panel.set(xlabel="boys infected", ylabel="share of the epidemics")
panel.legend(frameon=False, fontsize=8)

# %% [markdown]
# Even with no boy immune a few epidemics die out by themselves in the first days: the first boy
# gets well before he infects anybody. With 40% immune the school would still have been swept. With
# 70%, close to the threshold 1 - 1 / R0, most epidemics die out, and the others are small.
#
# ## What to take away
#
# - Discrete latents need nothing special with particles: the model is a `scan` with binomials.
# - A method that does not fit says so, and which one does.
# - `SMC2` gives the posterior, and the evidence day by day; `PMMH` the posterior alone.
# - Arguments of the model serve for rival models and for what-if questions, compiled once.
