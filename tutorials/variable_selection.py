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
# # Which predictors? Variable selection with discrete sites
#
# Ten measurements of 442 diabetes patients, and how far the disease had progressed a year later.
# Which of the ten matter? A model is a choice of predictors: there are 2^10 of them, and a Bayesian
# answer is a probability for each. With Zellner's prior for the coefficients their marginal
# likelihoods are known in closed form, so all that is left to infer is discrete.
#
# On the way: a program with nothing but discrete sites, exact enumeration as a yardstick, kernels
# that need no list of all models, and a proof that they are right.
#
# Sources: B. Efron, T. Hastie, I. Johnstone, R. Tibshirani (2004), *Least angle regression*, Annals
# of Statistics 32, for the data; A. Zellner (1986) for the prior; G. Zanella (2020), *Informed
# proposals for local MCMC in discrete spaces*, JASA 115, for locally balanced proposals.

# %%
import os
import warnings

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist

import ppl_toolkit as ppl
from ppl_toolkit.errors import InferenceWarning
from ppl_toolkit.inference import MCMC, Gibbs, LocallyBalanced, repeat

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS = 1000 if FAST else 5000

BLUE, RED, GREY = "#2a6f97", "#c1440e", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)
# An indicator that is one in every draw has no R-hat: nothing to worry about here.
warnings.simplefilter("ignore", InferenceWarning)

PATIENTS = 442
NAMES = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
# Correlations of age, sex, body mass index, blood pressure, six blood serum measurements and the
# progression, below the diagonal, row by row: all that the model needs of the data.
BELOW = """
0.173737
0.185085 0.088161
0.335428 0.241010 0.395411
0.260061 0.035277 0.249777 0.242464
0.219243 0.142637 0.261170 0.185548 0.896663
-0.075181 -0.379090 -0.366811 -0.178762 0.051519 -0.196455
0.203841 0.332115 0.413807 0.257650 0.542207 0.659817 -0.738493
0.270774 0.149916 0.446157 0.393480 0.515503 0.318357 -0.398577 0.617859
0.301731 0.208133 0.388680 0.390430 0.325717 0.290600 -0.273697 0.417212 0.464669
0.187889 0.043062 0.586450 0.441482 0.212022 0.174054 -0.394789 0.430453 0.565883 0.382483
"""
CORRELATIONS = np.eye(11)
for row, line in enumerate(BELOW.strip().splitlines(), 1):
    CORRELATIONS[row, :row] = CORRELATIONS[:row, row] = [float(value) for value in line.split()]

# %% [markdown]
# ## The program
#
# One Bernoulli site per predictor. Given the predictors that are in, the coefficients are
# integrated out: the log Bayes factor against the model without any depends on their number k and
# on R^2 alone. Predictors that are out are masked, so that shapes stay as they are.


# %%
def selection(correlations, n=PATIENTS, g=PATIENTS):
    p = correlations.shape[0] - 1
    with numpyro.plate("predictor", p):
        inside = numpyro.sample("inside", dist.Bernoulli(0.5))
    both = inside[:, None] * inside[None, :]
    among = correlations[:p, :p] * both + jnp.diag(1.0 - inside)
    with_y = correlations[:p, p] * inside
    r2 = numpyro.deterministic("R2", with_y @ jnp.linalg.solve(among, with_y))
    k = numpyro.deterministic("size", jnp.sum(inside))
    log_bayes_factor = (n - 1 - k) / 2 * jnp.log(1 + g) - (n - 1) / 2 * jnp.log(1 + g * (1 - r2))
    numpyro.factor("evidence", log_bayes_factor)


# %% [markdown]
# ## All of them
#
# A thousand models are few. `infer` sees that all sites are discrete and enumerates: the exact
# posterior, and independent draws from it.

# %%
labels = {"predictor": NAMES}
exact = ppl.infer(selection, CORRELATIONS, coords=labels, draws=DRAWS, progress=False)
print(exact.attrs["method_reason"])
print("log evidence", round(float(exact["sample_stats"]["log_evidence"][0, 0]), 3))

# %% [markdown]
# ## Without a list
#
# With fifty predictors there is no list. Two kernels that only look around: Gibbs visits predictor
# after predictor; a locally balanced proposal looks at all ten neighbours and goes where the
# density gains.

# %%
runs = {"exact": exact}
for name, kernel in {"Gibbs": Gibbs(), "locally balanced": repeat(LocallyBalanced(), 3)}.items():
    runs[name] = ppl.infer(
        selection, CORRELATIONS, method=MCMC(kernel), coords=labels, draws=DRAWS, warmup=200,
        progress=False,
    )  # fmt: skip
shares = {name: run["posterior"]["inside"].mean(("chain", "draw")) for name, run in runs.items()}
print(f"{'':8}" + "".join(f"{name:>18}" for name in shares))
for i, name in enumerate(NAMES):
    print(f"{name:8}" + "".join(f"{float(share[i]):18.3f}" for share in shares.values()))
gaps = {n: float(abs(share - shares["exact"]).max()) for n, share in shares.items() if n != "exact"}
print({name: f"largest difference {gap:.3f}" for name, gap in gaps.items()})

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(8, 3.4), width_ratios=(1.3, 1), layout="constrained"
)
place = np.arange(10)
left.bar(place, shares["exact"], color="#d9d9d9", label="exact draws")
left.plot(place - 0.12, shares["Gibbs"], "o", color=BLUE, ms=5, label="Gibbs")
left.plot(place + 0.12, shares["locally balanced"], "s", color=RED, ms=5, label="locally balanced")
left.set_xticks(place, NAMES)
left.set(ylabel="P(inside)", title="Which predictors?")
left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.02, 0.92))
models = exact["posterior"].dataset.stack(sample=("chain", "draw"))["inside"].values.T
kinds, counts = np.unique(models, axis=0, return_counts=True)
best = np.argsort(-counts)[:8]
right.imshow(kinds[best], cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
right.set_xticks(place, NAMES, fontsize=8)
right.set_yticks(range(8), [f"{counts[b] / counts.sum():.0%}" for b in best], fontsize=8)
right.set(title="The likeliest models")
plt.show()

# %% [markdown]
# Body mass index, blood pressure, sex and s5 are in almost every model. Of s1, s2 and s3 some must
# be in, but they can stand in for each other: no single model has even a third of the probability,
# and picking one would hide that.
#
# ## Are the kernels right?
#
# For a finite model that has an exact answer: `check` enumerates every way a step can go, from the
# code that samples, and compares one step of the exact posterior with the posterior.

# %%
checked = CORRELATIONS[-6:, -6:] if FAST else CORRELATIONS  # the last five predictors
print(ppl.check(selection, checked, method=LocallyBalanced()))
