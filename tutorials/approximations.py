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
# # Approximations that say how good they are
#
# Laplace's approximation, Pathfinder and variational inference find a simple law near the posterior
# in a fraction of the time that sampling takes. The price is that the law may be wrong, and a wrong
# law looks just as smooth as a right one. So each of them comes with a test here: *k-hat*, the
# shape of the tail of the importance weights posterior / approximation. Below 0.5 all is well, up
# to 0.7 the weights mend the draws, above that the draws are not to be trusted.
#
# We go from a small regression, where all methods agree, to a hierarchical model, where they do
# not, and end with NUTS started from an approximation.
#
# Data: C. I. Bliss (1935), *The calculation of the dosage-mortality curve*, Annals of Applied
# Biology 22, table 4: beetles killed by five hours of carbon disulphide; and D. B. Rubin (1981),
# *Estimation in parallel randomized experiments*, Journal of Educational Statistics 6, table 1:
# coaching in eight schools.

# %%
import os
import time
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist

import ppl_toolkit as ppl
from ppl_toolkit.errors import SamplingError
from ppl_toolkit.inference import NUTS, SVI, Laplace, Pathfinder

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS = 250 if FAST else 1000

DOSE = np.array([1.6907, 1.7242, 1.7552, 1.7842, 1.8113, 1.8369, 1.8610, 1.8839])  # log10 mg / l
BEETLES = np.array([59, 60, 62, 56, 63, 59, 62, 60])
KILLED = np.array([6, 13, 18, 28, 52, 53, 61, 60])

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4d7c31", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)
warnings.simplefilter("ignore", ppl.errors.InferenceWarning)  # findings are printed below

# %% [markdown]
# ## A regression
#
# The chance that a beetle dies rises with the dose along an S-shaped curve. Which curve? The model
# takes the number of one as data: the logistic one, the normal one (probit), or the one whose
# tolerance has Gumbel's law (complementary log-log), which rises slowly and ends fast. A number
# that is data costs no new program.

# %%
LINKS = ("logit", "probit", "cloglog")


def mortality(dose, beetles, link, killed=None):
    low = numpyro.sample("low", dist.Normal(-2.0, 1.0))  # eta at a dose of 1.7
    slope = numpyro.sample("slope", dist.LogNormal(3.0, 1.0))
    eta = low + slope * (dose - 1.7)
    curves = jnp.stack(
        [jax.nn.sigmoid(eta), jax.scipy.stats.norm.cdf(eta), -jnp.expm1(-jnp.exp(eta))]
    )
    chance = numpyro.deterministic("chance", jnp.clip(curves[link], 1e-9, 1 - 1e-9))
    with numpyro.plate("group", dose.shape[0]):
        numpyro.sample("killed", dist.Binomial(beetles, chance), obs=killed)


METHODS = {
    "NUTS": NUTS(),
    "Laplace": Laplace(),
    "Pathfinder": Pathfinder(),
    "SVI, full": SVI(guide="multivariate_normal"),
    "SVI, independent, unweighted": SVI(guide="normal", resample=False),
}
if FAST:
    METHODS = {name: METHODS[name] for name in ("NUTS", "Laplace")}

fits = {}
print(f"{'':28}{'low':>15}{'slope':>14}   k-hat   seconds: first, again")
for name, method in METHODS.items():
    seconds = []
    for link in (0, 2):  # new data: nothing is compiled
        begin = time.perf_counter()
        fits[name] = ppl.infer(
            mortality, DOSE, BEETLES, np.array(link), killed=KILLED, method=method, draws=DRAWS,
            progress=False,
        )  # fmt: skip
        seconds.append(time.perf_counter() - begin)
    own = fits[name]["posterior"]
    low, slope = (f"{own[s].mean():.3g} ± {own[s].std():.2g}" for s in ("low", "slope"))
    khat = f"{fits[name].attrs['khat']:.2f}" if "khat" in fits[name].attrs else "-"
    print(f"{name:28}{low:>15}{slope:>14}   {khat:>5}   {seconds[0]:.2f}, {seconds[1]:.2f}")

# %% [markdown]
# The table is of the complementary log-log curve. All agree but the last: a law without the
# correlation of the two parameters, whose draws were taken as they are (`resample=False`), is too
# narrow. On a normal posterior theory says by how much: the standard deviation becomes that of each
# parameter *given the others*. Its k-hat is below 0.7, so that resampling by the weights, which all
# do unless told otherwise, would repair it.
#
# In pictures: draws of each method over the draws of NUTS.

# %%
shown = [name for name in fits if name != "NUTS"]
figure, axes = plt.subplots(
    1, len(shown), figsize=(2.7 * max(len(shown), 2), 2.7), sharex=True, sharey=True,
    layout="constrained", squeeze=False,
)  # fmt: skip
reference = fits["NUTS"]["posterior"]
for panel, name in zip(axes[0], shown, strict=True):
    own = fits[name]["posterior"]
    panel.plot(reference["low"].values.ravel(), reference["slope"].values.ravel(), ".",
               color=GREY, ms=1.5, alpha=0.4)  # fmt: skip
    panel.plot(own["low"].values.ravel()[::4], own["slope"].values.ravel()[::4], ".",
               color=BLUE, ms=2)  # fmt: skip
    panel.set_title(f"{name}\nk-hat {fits[name].attrs['khat']:.2f}", loc="left", fontsize=9)
    panel.set_xlabel("low: eta at a dose of 1.7")
axes[0, 0].set_ylabel("slope")
_ = figure.suptitle("The same posterior (grey: NUTS)", x=0.01, ha="left", fontsize=10)

# %% [markdown]
# ## Which curve? Evidences by the weights
#
# The mean importance weight is an unbiased estimate of the evidence, the probability of the data
# under a model; where k-hat is good its error is small, and known. `infer_batch` runs the three
# curves as three data sets of one program.

# %%
three = ppl.infer_batch(
    mortality, DOSE, BEETLES, np.arange(3), killed=KILLED, over="link", method="laplace",
    draws=DRAWS, coords={"data_set": list(LINKS)}, progress=False,
)  # fmt: skip
group = three["approximation"]
logs = group["log_evidence"].mean("chain").values
errors = group["log_evidence_sd"].max("chain").values
share = np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum()
for name, log, error, own in zip(LINKS, logs, errors, share, strict=True):
    print(f"{name:8} log evidence {log:.2f} ± {error:.2f}   probability {own:.3f}")

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for number, colour in enumerate((GREY, GREEN, BLUE)):
    chance = three["posterior"]["chance"].isel(data_set=number)
    low, high = np.quantile(chance, [0.05, 0.95], axis=(0, 1))
    axes.fill_between(DOSE, low, high, color=colour, alpha=0.3, lw=0)
    axes.plot(DOSE, chance.mean(["chain", "draw"]), color=colour, label=LINKS[number])
axes.plot(DOSE, KILLED / BEETLES, "o", color=RED, label="observed", zorder=3)
axes.set(xlabel="dose (log10 mg / l)", ylabel="share killed")
axes.legend(frameon=False)
_ = axes.set_title("Three curves, with 90% bands of the chance", loc="left", fontsize=10)

# %% [markdown]
# The beetles speak for the curve that ends fast. What does the report of an approximation say? No
# effective sample sizes of Markov chains: the draws are independent. It gives k-hat, and says what
# the draws are.

# %%
print(ppl.report(ppl.one_of(three, "cloglog"), var_names=["low", "slope"]))


# %% [markdown]
# ## Where they fail
#
# Eight schools coached for a test; their effects come from a common law of unknown width `tau`. The
# posterior is a funnel: where `tau` is small all effects must agree. Its density has no highest
# point, so that there is nothing for Laplace's approximation to be made at, which is said by name.


# %%
EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])  # points
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])  # standard errors, points


def schools(error, effect=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", error.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)


def non_centred(error, effect=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", error.shape[0]):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)


try:
    if not FAST:
        ppl.infer(schools, ERROR, effect=EFFECT, method="laplace", progress=False)
except SamplingError as error:
    print(f"SamplingError: {error}")

# %% [markdown]
# The other methods, and Laplace's on the non-centred form of the model, give draws. Are they right?

# %%
exact = ppl.infer(
    non_centred, ERROR, effect=EFFECT, method=NUTS(target_acceptance=0.95), progress=False
)["posterior"]
TRIALS = {
    "Pathfinder, centred": (schools, Pathfinder()),
    "SVI independent, centred": (schools, SVI(guide="normal")),
    "Laplace, non-centred": (non_centred, Laplace()),
    "SVI full, non-centred": (non_centred, SVI()),
}
if FAST:
    TRIALS = {name: TRIALS[name] for name in ("Laplace, non-centred",)}
tried = {
    name: ppl.infer(model, ERROR, effect=EFFECT, method=method, progress=False)
    for name, (model, method) in TRIALS.items()
}
probabilities = [0.05, 0.5, 0.95]
q = np.quantile(exact["tau"], probabilities)
print(f"{'tau: quantiles':27}{'5%':>6}{'50%':>6}{'95%':>6}   k-hat")
print(f"{'NUTS, non-centred':27}{q[0]:6.2f}{q[1]:6.2f}{q[2]:6.2f}")
for name, tree in tried.items():
    q = np.quantile(tree["posterior"]["tau"], probabilities)
    print(f"{name:27}{q[0]:6.2f}{q[1]:6.2f}{q[2]:6.2f}   {tree.attrs['khat']:.2f}")

# %% [markdown]
# The laws that miss the funnel have a k-hat above 0.7, and the findings say what to do:

# %%
worst = max(tried, key=lambda name: tried[name].attrs["khat"])
for finding in ppl.findings(tried[worst]):
    print(f"{worst}, {finding.severity}: {finding.message} {finding.remedy}")

figure, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
bins = np.linspace(-4, 4, 60)
axes.hist(np.log(exact["tau"]).values.ravel(), bins, density=True, color=GREY, alpha=0.4,
          label="NUTS, non-centred")  # fmt: skip
for (name, tree), colour in zip(tried.items(), (BLUE, RED, GREEN, "#b8860b"), strict=False):
    heights, edges = np.histogram(np.log(tree["posterior"]["tau"]), bins, density=True)
    axes.stairs(heights, edges, color=colour, label=f"{name}: {tree.attrs['khat']:.2f}")
axes.set(xlabel="log tau", yticks=[])
axes.spines["left"].set_visible(False)
axes.legend(frameon=False, fontsize=8, title="k-hat", title_fontsize=8)
_ = axes.set_title("The width of the law of the schools' effects", loc="left", fontsize=10)

# %% [markdown]
# ## A start for NUTS
#
# An approximation that is not good enough as an answer is good enough as a beginning: chains of
# NUTS start at its draws, instead of anywhere. It pays most where random starts are bad.

# %%
start = tried[worst]
model, _ = TRIALS[worst]
started = ppl.infer(model, ERROR, effect=EFFECT, init=start, draws=DRAWS, progress=False)
print(f"{started.attrs['method']} from {worst}: tau {float(started['posterior']['tau'].mean()):.1f}"
      f" (NUTS alone {float(exact['tau'].mean()):.1f})")  # fmt: skip

# %% [markdown]
# ## What to take
#
# - `Laplace()`: up to a few hundred parameters about which the data say much. Exact on normal
#   posteriors, with an evidence.
# - `Pathfinder()`: quick, needs no mode, sees several; the best start for NUTS.
# - `SVI(guide=...)`: a family of your choice, flows included, and minibatches
#   (`subsample_size=` in the plate) for large data.
# - Each chain is a fit of its own: R-hat above 1.01 says that fits differ.
# - k-hat above 0.7: use NUTS, `init=` the approximation.
