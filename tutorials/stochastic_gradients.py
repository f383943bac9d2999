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
# # Minibatches: how wrong, how fast
#
# Exact samplers look at all the data for every step. Stochastic-gradient samplers look at a hundred
# rows, and accept what they get: they are quick, and never quite right. Here you see how wrong they
# are, on a model whose posterior NUTS knows; three ways to be less wrong; how a run tells you; and
# what they are for: a neural network that knows when it does not know.
#
# The data are 1,797 handwritten digits of 8 by 8 pixels, which come with scikit-learn
# (`pip install scikit-learn`). On the way: subsampled plates, `SGLD`, `SGHMC`, `SGNHT`, control
# variates, the temperature of a run, cyclical step sizes.
#
# Sources: M. Welling and Y. W. Teh (2011), *Bayesian learning via stochastic gradient Langevin
# dynamics*, ICML; T. Chen, E. Fox and C. Guestrin (2014), *Stochastic gradient Hamiltonian Monte
# Carlo*, ICML; J. Baker et al. (2019), *Control variates for stochastic gradient MCMC*, Statistics
# and Computing 29; R. Zhang et al. (2020), *Cyclical stochastic gradient MCMC for Bayesian deep
# learning*, ICLR; data: E. Alpaydin and C. Kaynak (1998), UCI machine learning repository.

# %%
import os
import warnings

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.ndimage import rotate
from scipy.special import log_softmax
from sklearn.datasets import load_digits

import ppl_toolkit as ppl
from ppl_toolkit.errors import InferenceWarning
from ppl_toolkit.inference import Cyclical

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS, WARMUP = (300, 100) if FAST else (2000, 500)
KEPT, BURN = (25, 40) if FAST else (250, 500)

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)
warnings.simplefilter("ignore", InferenceWarning)  # findings are printed where they matter

digits = load_digits()
ORDER = np.random.default_rng(0).permutation(len(digits.target))
IMAGES, LABELS = digits.data[ORDER] / 16.0, digits.target[ORDER]

# %% [markdown]
# ## A posterior that is known
#
# Is it an odd digit? A logistic regression on the ink in eight patches of the image. It does not
# predict well; what matters here is that NUTS can say what is right. The plate has a
# `subsample_size`: that is all a model needs to be seen in minibatches.


# %%
SQUARE = IMAGES.reshape(-1, 8, 8)
FEATURES = np.column_stack(
    [SQUARE[:, 2 * i : 2 * i + 2, 4 * j : 4 * j + 4].mean((1, 2)) for i in range(4) for j in (0, 1)]
)
FEATURES = (FEATURES - FEATURES.mean(0)) / FEATURES.std(0)
ODD = LABELS % 2


def odd_or_even(features, odd, batch=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([features.shape[1]]).to_event(1))
    with numpyro.plate("digit", odd.shape[0], subsample_size=batch) as rows:
        numpyro.sample("odd", dist.Bernoulli(logits=features[rows] @ w), obs=odd[rows])


truth = ppl.infer(odd_or_even, FEATURES, ODD, method="nuts", progress=False, draws=DRAWS)
SD = truth["posterior"]["w"].std(("chain", "draw")).values
print(f"posterior standard deviations {SD.min():.3f} to {SD.max():.3f}")

# %% [markdown]
# The same by Langevin dynamics with a hundred digits at a time: a step along the gradient of the
# minibatch, and noise. The step size is a variance; we begin with a tenth of the smallest one, as
# the message says to those who forget to give one. The report says that the run is approximate, and
# that is all it can know.

# %%
first = ppl.infer(
    odd_or_even, FEATURES, ODD, 100, method=ppl.SGLD(0.1 * SD.min() ** 2, steps=10),
    draws=DRAWS, warmup=WARMUP, progress=False,
)  # fmt: skip
print("\n".join(ppl.report(first).splitlines()[:4]))


def inflation(run):
    """Variances of the draws relative to those of NUTS: the mean over the coefficients."""
    return float(np.mean(run["posterior"]["w"].std(("chain", "draw")).values ** 2 / SD**2))


print(f"SGLD: variances {inflation(first):.2f} times those of NUTS")

# %% [markdown]
# ## How wrong, for which step size
#
# Two things make the draws too wide: the noise of the minibatches, and the length of the steps.
# Three remedies: *control variates* take most of the noise away, by a whole gradient at the mean of
# the warm-up (two gradients a step); *momentum* gets as far with smaller steps; a *thermostat*
# learns the noise and takes it back out as friction. All step sizes run in one compiled program.

# %%
STEPS = np.array([0.05, 0.2, 0.8])
LEAPS = np.array([0.05, 0.1, 0.2])
METHODS = {
    "SGLD": lambda s: ppl.SGLD(s * SD.min() ** 2, steps=10),
    "SGLD, control variates": lambda s: ppl.SGLD(
        s * SD.min() ** 2, steps=10, control_variates=True
    ),
    "SGHMC": lambda s: ppl.SGHMC(s * SD.min(), friction=0.1, steps=10),
    "SGNHT": lambda s: ppl.SGNHT(s * SD.min(), friction=0.1, steps=10),
}
found = {}
print(f"{'':24} {'step':>6} {'variances':>10} {'effective draws':>16} {'temperature':>12}")
for name, method in list(METHODS.items())[1:3] if FAST else METHODS.items():
    sizes = STEPS if name.startswith("SGLD") else LEAPS
    for s in sizes[1:2] if FAST else sizes:
        run = ppl.infer(odd_or_even, FEATURES, ODD, 100, method=method(s), draws=DRAWS,
                        warmup=WARMUP, progress=False)  # fmt: skip
        effective = ppl.summary(run)["ess_bulk"].min()
        heat = run["sample_stats"].get("kinetic_temperature")
        told = "" if heat is None else f"{float(heat.mean()):12.2f}"
        found.setdefault(name, []).append((s, inflation(run), effective))
        print(f"{name:24} {s:6.2f} {inflation(run):9.2f}x {effective:16,.0f} {told}")

# %% [markdown]
# The last column is what a run with momentum knows of itself, with no NUTS beside it: the kinetic
# temperature should be 1, and is about the factor by which the variances are wrong. From 1.2 on it
# is a finding of the run. The thermostat holds it at 1 on average over the coefficients: those
# whose gradients are less noisy than others become too narrow. The picture shows the exchange: a
# longer step gives more independent draws for the same work, of a wider and wider law.

# %%
figure, panel = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for (name, points), color in zip(found.items(), (GREY, GREEN, RED, BLUE), strict=False):
    _, wide, effective = np.array(points).T
    work = 4 * (DRAWS + WARMUP) * 10 * (2 if "control" in name else 1)
    panel.plot(1000 * effective / work, wide, "o-", color=color, label=name)
panel.axhline(1.0, color="black", lw=0.8, ls=":")
panel.set(
    xscale="log",
    yscale="log",
    xlabel="effective draws per 1000 minibatch gradients",
    ylabel="variance relative to NUTS",
    title="Right is at the bottom, quick at the right",
)
panel.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
panel.minorticks_off()
panel.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What they are for
#
# A network with 32 hidden units has 2,410 weights, and its posterior has very many modes. Nobody
# will wait for exact draws; what counts is that predictions are averaged over many networks. We
# train on two thirds of the digits, by SGHMC with scales learned from the gradients, and keep the
# rest to see how good the predictions are. The four chains are four different networks.

# %%
TRAIN = 1200
HIDDEN = 32


def network(images, labels, batch=None):
    w1 = numpyro.sample("w1", dist.Normal(0, 1).expand([64, HIDDEN]).to_event(2))
    b1 = numpyro.sample("b1", dist.Normal(0, 1).expand([HIDDEN]).to_event(1))
    w2 = numpyro.sample("w2", dist.Normal(0, 1).expand([HIDDEN, 10]).to_event(2))
    b2 = numpyro.sample("b2", dist.Normal(0, 1).expand([10]).to_event(1))
    with numpyro.plate("image", labels.shape[0], subsample_size=batch) as rows:
        hidden = jnp.tanh(images[rows] @ w1 / 2 + b1)
        numpyro.sample("label", dist.Categorical(logits=hidden @ w2 + b2), obs=labels[rows])


sampler = ppl.SGHMC(0.02, friction=0.1, steps=20, scale_adapted=True)
networks = ppl.infer(
    network, IMAGES[:TRAIN], LABELS[:TRAIN], 100, method=sampler, draws=KEPT, warmup=BURN,
    progress=False,
)  # fmt: skip
print(f"{networks.attrs['n_gradient_evaluations']:,} minibatch gradients in "
      f"{networks.attrs['time_sampling']:.1f} s")  # fmt: skip


def predicted(run, images, some=50):
    """Log probabilities of the ten digits by some networks of every chain, (network, image, 10)."""
    draws = run["posterior"].dataset
    every = max(1, draws.sizes["draw"] // some)
    w1, b1, w2, b2 = (
        np.concatenate(draws[name].values[:, ::every]) for name in ("w1", "b1", "w2", "b2")
    )
    hidden = np.tanh(images @ w1 / 2 + b1[:, None])
    return log_softmax(hidden @ w2 + b2[:, None], axis=-1)


def score(log_p, labels):
    """Share of errors, and the mean log score, of averaged predictions (network, image, 10)."""
    p = np.exp(log_p).mean(0)
    right = p[np.arange(len(labels)), labels]
    return np.mean(p.argmax(1) != labels), -np.log(right).mean()


TEST, NAMES = IMAGES[TRAIN:], LABELS[TRAIN:]
log_p = predicted(networks, TEST)
alone = np.array([score(one[None], NAMES) for one in log_p])
errors, loss = score(log_p, NAMES)
print(f"one network  errors {alone[:, 0].mean():.1%}, log loss {alone[:, 1].mean():.3f}")
print(f"all of them  errors {errors:.1%}, log loss {loss:.3f}")

# %% [markdown]
# Averaging over the posterior pays in the log loss, which punishes misplaced certainty. Here are
# the digits that the average is least sure of, with what it says. Then a digit that turns: no
# network has seen one lying on its side, and they say so, by disagreeing.

# %%
p = np.exp(log_p).mean(0)
doubt = np.argsort(p.max(1))[:6]
figure, panels = plt.subplots(
    2, 6, figsize=(8, 3.1), height_ratios=(2, 1.2), layout="constrained", sharex="row"
)
for i, (top, bottom) in zip(doubt, panels.T, strict=True):
    top.imshow(TEST[i].reshape(8, 8), cmap="gray_r")
    top.set(xticks=[], yticks=[], title=f"a {NAMES[i]}")
    colors = [GREEN if d == NAMES[i] else GREY for d in range(10)]
    bottom.bar(range(10), p[i], color=colors)
    bottom.set(ylim=(0, 1), yticks=[], xticks=range(0, 10, 3))
panels[1, 0].set(ylabel="probability", yticks=[0, 1])
plt.show()

# %%
angles = np.arange(0, 181, 15)
pick = np.flatnonzero((NAMES == 4) & (p[:, 4] > 0.97))[0]
turned = np.stack([rotate(TEST[pick].reshape(8, 8), a, reshape=False, order=1) for a in angles])
log_turned = predicted(networks, np.clip(turned, 0, 1).reshape(len(angles), 64))
each = np.exp(log_turned)
average = each.mean(0)


def entropy(p):
    return -np.sum(p * np.log2(np.maximum(p, 1e-300)), axis=-1)


figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(7.5, 3.8), height_ratios=(1, 3), layout="constrained"
)
top.imshow(np.concatenate(list(turned), axis=1), cmap="gray_r", aspect="equal")
top.axis("off")
bottom.plot(angles, entropy(average), "o-", color=RED, label="of the average")
bottom.plot(angles, entropy(each).mean(0), "o-", color=GREY, label="of one network, on average")
bottom.fill_between(angles, entropy(each).mean(0), entropy(average), color=RED, alpha=0.12,
                    label="disagreement")  # fmt: skip
bottom.set(xlabel="angle, degrees", ylabel="entropy, bits", xticks=angles[::2],
           title="A four that turns")  # fmt: skip
bottom.legend(frameon=False)
plt.show()
print(f"entropy upright {entropy(average)[0]:.2f} bits, on its side {entropy(average)[6]:.2f}")

# %% [markdown]
# ## One chain, many modes
#
# Cyclical step sizes jump from mode to mode: large steps without noise at the beginning of a cycle,
# then smaller and smaller ones that sample. Only the latter become draws. Two peaks 16 standard
# deviations apart show what that does; a constant step never leaves its peak. (The shares of the
# peaks are *not* right: which one is found says how the descent goes, not how probable it is.)


# %%
def peaks():
    x = numpyro.sample("x", dist.Normal(0, 10))
    two = dist.Normal(jnp.array([-4.0, 4.0]), 0.5).log_prob(x)
    numpyro.factor("peaks", jnp.logaddexp(two[0], two[1]))


runs = {
    "constant": ppl.SGLD(0.05, warmup=100),
    "cyclical": ppl.SGLD(Cyclical(1.6, 100, exploration=0.7), warmup=0),
}
figure, panels = plt.subplots(1, 2, figsize=(7.5, 2.6), sharey=True, layout="constrained")
for panel, (name, method) in zip(panels, runs.items(), strict=True):
    x = ppl.infer(peaks, method=method, draws=900, chains=1, progress=False, seed=1)
    x = x["posterior"]["x"].values[0]
    panel.plot(x, ".", ms=2, color=BLUE)
    panel.set(title=f"{name}: {np.mean(x > 0):.0%} in the upper peak", xlabel="draw")
    print(f"{name:9} {np.mean(x > 0):.0%} of the draws in the upper peak")
plt.show()

# %% [markdown]
# ## To remember
#
# - `subsample_size=` in the plate; `SGLD`, `SGHMC` or `SGNHT` as the method; the rest is as ever.
#   Whatever else is in a `cycle` with them (`Gibbs` for scales, `NUTS`) sees all the data.
# - The draws are approximate. Halve the step size and see whether the answer stays; read the
#   temperature; take NUTS or SMC where they can be had.
# - Control variates pay where the posterior is narrow: much data, few parameters.
