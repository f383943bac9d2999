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
# # Infinitely wide networks, and what a law of the scale buys
#
# A random neural network becomes a Gaussian process as its layers grow without bound. Its kernel
# is a recursion over the layers, so that Bayesian regression with a network of infinite width is
# exact: no weights, no training, one Cholesky factorisation. Here we
#
# 1. build kernels by composing layers,
# 2. regress on a real table (442 diabetes patients), with a Gaussian process (NNGP), a Student-t
#    process, a Burr XII law of the scale, and a Gaussian process with its best scale,
# 3. let NUTS draw the kernel's parameters, with the scale integrated out.
#
# The honest summary, before you start: the *mean* of all four predictions is the same for the same
# kernel, so that heavy tails here are no protection against outliers. What a law of the scale does
# is to fit the *width* of the predictions to the data.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
from sklearn.datasets import load_diabetes

import ppl_toolkit as ppl
from ppl_toolkit.models.infinite_width import Dense, LayerNorm, ReLU, Residual, Serial, mlp
from ppl_toolkit.models.scale_mixture import (
    BurrXII,
    fit,
    plot_calibration,
    plot_predictions,
    plot_scale,
    scale_mixture_regression,
)

FAST = os.environ.get("PPL_FAST") == "1"

# %% [markdown]
# ## Networks are built of layers
#
# `Dense(w, b)` has weights of standard deviation w / sqrt(fan in) and biases of b. A network is its
# own kernel: `nngp` is the covariance of the outputs of a random network, `ntk` the tangent kernel
# that describes training by gradient descent.

# %%
plain = mlp(3, weight_std=1.4, bias_std=0.3)  # three times (Dense, ReLU), then a readout
residual = Serial(
    Dense(1.4, 0.3),
    Residual(Serial(ReLU(), Dense(1.0, 0.1))),
    LayerNorm(),
    ReLU(),
    Dense(),
)
line = np.linspace(-1, 1, 5)[:, None]
print(np.round(plain.nngp(line), 3))
print(np.round(residual.ntk(line), 3))

# %% [markdown]
# ## A small example first
#
# Eight noisy values of a sine. `fit` conditions on them; `with_law` changes the law of the scale
# sigma^2 and reuses the factorisation. With eight data, widths differ: the unscaled process
# believes in sigma = 1 whatever it sees.

# %%
rng = np.random.default_rng(1)
x_small = np.sort(rng.uniform(-2, 2, 8))
y_small = 0.4 * np.sin(2 * x_small) + 0.02 * rng.normal(size=8)
small = fit(plain, x_small[:, None], y_small, noise=0.003, law=dist.Delta(1.0))
laws = {
    "NNGP, sigma = 1": dist.Delta(1.0),
    "Student-t": dist.InverseGamma(2.0, 2.0),
    "Burr XII": BurrXII(2.0, 2.0),
}
if FAST:
    del laws["Burr XII"]  # every law has programs of its own
fits = {name: small.with_law(law) for name, law in laws.items()}
plot_predictions(fits, np.linspace(-3, 3, 40 if FAST else 200))
plt.show()

# %%
plot_scale(fits)
plt.show()

# %% [markdown]
# ## A real table
#
# 442 patients, ten measurements each, and the progression of diabetes a year later. 80% of the
# patients are fitted, the others are kept for the comparison.

# %%
features, target = load_diabetes(return_X_y=True)
order = np.random.RandomState(10).permutation(len(target))
if FAST:
    order = order[:120]
cut = int(0.8 * len(order))
train, test = order[:cut], order[cut:]
centre, spread = features[train].mean(0), features[train].std(0)
X = (features - centre) / spread
y = (target - target[train].mean()) / target[train].std()

# %% [markdown]
# The noise and the kernel come from type-II maximum likelihood: the parameters with the largest
# evidence under a fixed law of the scale. (Over the law itself the evidence has no maximum: it
# rises until the law is a point. The library refuses to try.)

# %%
program = scale_mixture_regression(law=dist.InverseGamma(2.0, 2.0))
best = ppl.infer(program, X[train], y[train], method="type2ml", chains=1, progress=False)
chosen = {name: float(v.squeeze()) for name, v in best["maximum"].data_vars.items()}
print(chosen)

# %%
network = mlp(3, weight_std=chosen["weight_std"], bias_std=chosen["bias_std"])
fitted = fit(network, X[train], y[train], noise=chosen["noise"])
laws["NNGP, best scale"] = dist.Delta(fitted.profiled_scale)
fits = {name: fitted.with_law(law) for name, law in laws.items()}
print(fitted.compare(laws).round(3))

# %% [markdown]
# `elpd_loo` is exact: the density of every patient given all others, from the same factorisation.
# On the patients that were kept aside:

# %%
for name, one in fits.items():
    law = one.predict(X[test])
    low, high = law.interval(0.9)
    inside = np.mean((y[test] > low) & (y[test] < high))
    print(
        f"{name:18s} NLL {-law.log_density(y[test]).mean():.4f}   "
        f"CRPS {law.crps(y[test]).mean():.4f}   in the 90% interval {inside:.2f}"
    )
plot_calibration(fits, X[test], y[test])
plt.show()

# %% [markdown]
# With 353 patients a Student-t process has 2 alpha + n = 357 degrees of freedom: its predictions
# are Gaussian for all practical purposes, with a scale that fits the data, and so are those of
# Burr XII. The Gaussian process with its best scale q / n does as well. What remains between the
# rows is the scale, not the tails. (Heavy tails matter where data are few, as in the first
# example.)
#
# ## All of it at once: NUTS over the kernel
#
# The same program without a fixed law: NUTS draws the kernel's parameters, the noise and the tail
# index alpha; the scale is integrated out in every evaluation of the density.

# %%
some = train[: 40 if FAST else 100]
program = scale_mixture_regression(lambda **stds: mlp(1, **stds))
posterior = ppl.infer(
    program, X[some], y[some], draws=100 if FAST else 600, warmup=100 if FAST else 400,
    chains=2, progress=False,
)  # fmt: skip
print(ppl.summary(posterior))
print(ppl.loo(posterior, program, X[some], y[some]))

# %%
tree = ppl.predict(posterior, program, X[some], y[some], X_new=X[test[:20]])
predicted = tree["predictions"]["y_new"]
low, high = (predicted.quantile(q, ("chain", "draw")) for q in (0.05, 0.95))
figure, panel = plt.subplots(figsize=(6, 3.2), layout="constrained")
panel.vlines(np.arange(20), low, high, color="#1f6fb5", lw=4, alpha=0.4, label="90% of the draws")
panel.plot(np.arange(20), y[test[:20]], "k.", label="kept aside")
panel.set_xlabel("patient")
panel.set_xticks(range(0, 20, 5))
panel.set_ylabel("progression, standardised")
panel.legend(frameon=False)
plt.show()
