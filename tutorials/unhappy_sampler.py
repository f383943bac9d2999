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
# # My sampler is unhappy
#
# A run ends with findings: divergences, a low E-BFMI, chains that disagree, trajectories at the
# largest depth. Each of them is a message about the *shape* of the posterior. Here are the three
# shapes behind most of them, what each looks like, and how to get rid of it:
#
# - a *funnel*, from a hierarchical model with little data in each group;
# - *two peaks that mirror each other*, from a mixture whose components have no names;
# - a *long thin ridge*, from predictors that can replace each other.
#
# Every remedy is judged by the same numbers, before and after: divergences, R-hat, and effective
# draws for the work done. *Quick start* meets the first of these shapes; here we look into it.
#
# Data: B. Efron and C. Morris (1975), *Data analysis using Stein's estimator and its
# generalizations*, Journal of the American Statistical Association 70, table 1 (batting);
# J. W. Longley (1967), *An appraisal of least squares programs for the electronic computer from the
# point of view of the user*, in the same journal, 62 (employment).

# %%
import os
import warnings

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import LocScaleReparam
from scipy.stats import halfnorm

import ppl_toolkit as ppl

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS = 200 if FAST else 1000
WARMUP = 300 if FAST else 1000

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)


# %% [markdown]
# The yardstick: the sampler's work is gradients of the log density, so what counts is the smallest
# effective sample size of any quantity for every thousand gradients. Divergences and R-hat say
# whether that number may be believed at all.


# %%
def compare(runs, var_names=None):
    """Print what matters about some runs, a line for each."""
    print(f"{'':30}{'divergences':>12}{'R-hat':>8}{'min ESS':>9}{'per 1000 gradients':>20}")
    for name, run in runs.items():
        stats, table = run["sample_stats"].dataset, ppl.summary(run, var_names)
        least = table[["ess_bulk", "ess_tail"]].to_numpy().min()
        gradients = float(stats["n_steps"].sum())
        print(f"{name:30}{int(stats['diverging'].sum()):12}{table['r_hat'].max():8.3f}"
              f"{least:9.0f}{1000 * least / gradients:20.2f}")  # fmt: skip


def quiet(model, *args, **options):
    """A run whose findings we look at ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
        return ppl.infer(
            model, *args, **{"draws": DRAWS, "warmup": WARMUP, "progress": False, **options}
        )


# %% [markdown]
# ## A funnel
#
# In 1970 eighteen baseball players had each come to bat 45 times, with 7 to 18 hits. How good is
# each of them, and how much do they differ? The abilities, as log-odds of a hit, come from a common
# normal law.

# %%
HITS = np.array([18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7])
AT_BATS = np.full(18, 45)
print(f"{HITS.sum()} hits of {AT_BATS.sum()}: {HITS.sum() / AT_BATS.sum():.3f}")


def batting(at_bats, hits=None):
    mean = numpyro.sample("mean", dist.Normal(-1, 1))
    spread = numpyro.sample("spread", dist.HalfNormal(1))
    with numpyro.plate("player", at_bats.shape[0]):
        ability = numpyro.sample("ability", dist.Normal(mean, spread))
        numpyro.sample("hits", dist.Binomial(at_bats, logits=ability), obs=hits)


centred = ppl.infer(
    batting, AT_BATS, hits=HITS, draws=DRAWS, warmup=WARMUP, seed=0, progress="lines"
)
print(ppl.report(centred, var_names=["mean", "spread"]))

# %% [markdown]
# Several findings, one cause. To see it alone, take the data away. A player who never came to bat
# says nothing, so with zeros for all of them the posterior is the prior, which we know: `spread` is
# half-normal. (Data are arguments of the compiled program, so this needs no compilation.) On the
# left exact draws from the prior, on the right what the sampler made of it.

# %%
NOBODY = np.zeros(18, int)
exact = quiet(batting, NOBODY, method="prior", seed=1)
toy = quiet(batting, NOBODY, hits=NOBODY, seed=0)

figure, panels = plt.subplots(
    1, 2, figsize=(8, 3.6), sharex=True, sharey=True, layout="constrained"
)
for panel, draws, title in (
    (panels[0], exact["prior"], "exact draws"),
    (panels[1], toy["posterior"], "NUTS, centred"),
):
    x = (draws["ability"] - draws["mean"]).values[..., 0].ravel()
    panel.plot(x, np.log(draws["spread"].values.ravel()), ".", color=BLUE, ms=2, alpha=0.4,
               rasterized=True)  # fmt: skip
    panel.set_title(title, loc="left")
    panel.set(xlabel="ability of a player, less the mean", xlim=(-2.5, 2.5), ylim=(-8, 1.6))
bad = toy["sample_stats"]["diverging"].values.ravel()
spread = toy["posterior"]["spread"].values.ravel()
panels[1].plot(x[bad], np.log(spread[bad]), ".", color=RED, ms=4)  # divergences, if any
_ = panels[0].set_ylabel("log spread")

# %% [markdown]
# When `spread` is small all eighteen abilities are squeezed together, and the funnel is narrow in
# eighteen directions at once. A step that is right for the wide part overshoots in the neck: the
# simulated path flies off and is thrown away (a *divergence*). NUTS tries its step size before it
# draws, and shortens it where paths go astray, so that few divergences are left or none; but the
# neck is not reached by that. The volume changes so fast with the height that a fresh momentum
# moves the chain only a little way up or down (*E-BFMI*), so the neck is visited rarely, and by
# some chains in long bouts (*R-hat*, few effective draws).
#
# ### What does not help, and what does
#
# Smaller steps follow the curvature further down, at a price. The cure is to describe the model by
# other coordinates: standardised abilities, whose prior does not depend on `spread`. In these the
# prior is no funnel, and `ability` is still in the result.

# %%
non_centred = numpyro.handlers.reparam(batting, config={"ability": LocScaleReparam(0)})
steps = quiet(batting, AT_BATS, hits=HITS, seed=0, method=ppl.NUTS(target_acceptance=0.99))
cured = quiet(non_centred, AT_BATS, hits=HITS, seed=0)
cured_toy = quiet(non_centred, NOBODY, hits=NOBODY, seed=0)

compare(
    {
        "no data, centred": toy,
        "no data, non-centred": cured_toy,
        "batting, centred": centred,
        "batting, smaller steps": steps,
        "batting, non-centred": cured,
    }
)

# %% [markdown]
# Was it more than a nuisance? Without data we know the answer, so the error can be seen; with data
# the non-centred run tells us.

# %%
small = 0.05
runs = {"no data": (toy, cured_toy), "batting": (centred, cured)}
for name, pair in runs.items():
    shares = [float((run["posterior"]["spread"] < small).mean()) for run in pair]
    known = f" (exactly {halfnorm.cdf(small):.3f})" if name == "no data" else ""
    print(f"{name}: P(spread < {small}) = {shares[0]:.3f} centred, "
          f"{shares[1]:.3f} non-centred{known}")  # fmt: skip

# %% [markdown]
# ### Do not non-centre everything
#
# Suppose the players had come to bat a hundred times as often with the same success. Now the data
# fix each ability, and the funnel's neck is ruled out. In the non-centred form, `mean`, `spread`
# and the standardised abilities must now move together to leave the well-known abilities where they
# are.

# %%
plenty = {"data": {"at_bats": 100 * AT_BATS, "hits": 100 * HITS}, "seed": 0}
compare(
    {
        "100 times the data, centred": quiet(batting, **plenty),
        "100 times the data, non-centred": quiet(non_centred, **plenty),
    }
)

# %% [markdown]
# The other way round. The rule: *little data in each group, non-centre; plenty, centre*.
#
# ## Two peaks that mirror each other
#
# Sixty measurements from two kinds of specimen, and nobody wrote down which is which. The component
# means have the same prior, so the posterior does not change when the components swap names.

# %%
rng = np.random.default_rng(3)
Y = np.concatenate([rng.normal(-2.0, 1.0, 24), rng.normal(2.0, 1.0, 36)])


def two_kinds(y, share, centre, noise):
    """The likelihood of both versions of the model."""
    parts = dist.Categorical(probs=jnp.stack([1 - share, share]))
    with numpyro.plate("specimen", y.shape[0]):
        numpyro.sample("y", dist.MixtureSameFamily(parts, dist.Normal(centre, noise)), obs=y)


def nameless(y):
    share = numpyro.sample("share", dist.Beta(2, 2))  # of the second kind
    centre = numpyro.sample("centre", dist.Normal(0, 5).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(3))
    two_kinds(y, share, centre, noise)


# %% [markdown]
# Four chains that start at random agree by luck once in eight runs, and then nothing looks wrong.
# To be sure to see what there is to see, start two chains on either side:

# %%
START = {"centre": np.array([[-1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, -1.0]])}
swapped = quiet(nameless, Y, init=START, seed=0)
for finding in ppl.findings(swapped):
    print(f"{finding.severity}: {finding.kind}: {finding.message}\n  {finding.remedy}")

# %% [markdown]
# *Stuck*: chains that disagree this much do not need more draws, for they will not meet. Look at
# them one by one. (No label switching *within* a chain: the way from one peak to the other leads
# through values that hardly ever occur.)

# %%
figure, panels = plt.subplots(
    1, 2, figsize=(9, 3), width_ratios=(1.7, 1), layout="constrained", sharey=True
)
first = swapped["posterior"]["centre"].values[..., 0]
for chain, values in enumerate(first):
    panels[0].plot(values, color=(BLUE, GREEN)[chain // 2], lw=0.5, alpha=0.8)
    panels[1].plot(values, swapped["posterior"]["centre"].values[chain, :, 1], ".", ms=2,
                   color=(BLUE, GREEN)[chain // 2])  # fmt: skip
panels[1].axline((0, 0), slope=1, color=GREY, lw=1, ls=":")
panels[0].set(xlabel="draw", ylabel="centre[0]")
panels[0].set_title("four chains, two on each side", loc="left")
panels[1].set(xlabel="centre[0]", ylabel="centre[1]", xlim=(-3.2, 3.2))
_ = panels[1].set_title("mirror images", loc="left")

# %% [markdown]
# Half of the plane says all there is to say: give the names by order, the lower centre first. Two
# independent normal centres are, put in order, the same as a normal middle and a half-normal gap
# between them, so the prior below is exactly the old one, restricted to one half. (For more
# components there is `dist.transforms.OrderedTransform`.)


# %%
def ordered(y):
    share = numpyro.sample("share", dist.Beta(2, 2))
    middle = numpyro.sample("middle", dist.Normal(0, 5 / np.sqrt(2)))
    gap = numpyro.sample("gap", dist.HalfNormal(5 * np.sqrt(2)))
    centre = numpyro.deterministic("centre", jnp.stack([middle - gap / 2, middle + gap / 2]))
    noise = numpyro.sample("noise", dist.HalfNormal(3))
    two_kinds(y, share, centre, noise)


named = quiet(ordered, Y, seed=0)
sites = ["share", "centre", "noise"]
compare({"nameless": swapped, "ordered": named}, sites)
print(ppl.summary(named, sites)[["mean", "sd", "r_hat"]].round(2).to_string())
by_hand = np.sort(swapped["posterior"]["centre"].values, axis=-1).reshape(-1, 2)
print("the nameless draws, put in order: centres", by_hand.mean(0).round(2))

# %% [markdown]
# Here the swapped chains were harmless: put in order, their draws tell the same. What does not
# depend on names, such as the noise or the density of the next measurement, was right all along.
# But *multimodal* can also mean peaks that are *not* mirror images, of which each chain has seen
# one. Then no renaming helps; the proportion between peaks is unknown, and the model needs thought.
#
# ## A long thin ridge
#
# Employment in the United States, in millions, 1947 to 1962: how fast did it grow? The model is a
# straight line, as it is written in a hurry: intercept plus slope times year. And suppose the
# sampler were one that gives every parameter a scale of its own and no more, as most do: a
# *diagonal* metric.

# %%
YEARS = np.arange(1947.0, 1963.0)
EMPLOYED = np.array(
    [60.323, 61.122, 60.171, 61.187, 63.221, 63.639, 64.989, 63.761,
     66.019, 67.857, 68.169, 66.513, 68.655, 69.564, 69.331, 70.551]
)  # fmt: skip


def trend(time, employed=None):
    level = numpyro.sample("level", dist.Normal(0, 2000))
    growth = numpyro.sample("growth", dist.Normal(0, 2))
    noise = numpyro.sample("noise", dist.HalfNormal(2))
    with numpyro.plate("year", time.shape[0]):
        numpyro.sample("employed", dist.Normal(level + growth * time, noise), obs=employed)


scales = ppl.NUTS(metric="diagonal")
hurried = quiet(trend, YEARS, employed=EMPLOYED, seed=0, method=scales)
print(ppl.report(hurried))

# %% [markdown]
# `level` is the employment in the year 0, nearly two millennia before the data. A small turn of the
# line moves it by a hundred million, so that the two are almost perfectly correlated.
# Steps must be as short as the ridge is narrow, and it takes about a thousand of them to walk along
# it, which is all that a trajectory may have: *tree depth*. It is not wrong, but slow.
#
# - Let the sampler learn the correlation. It does so by default, from the draws *and* the gradients
#   of all chains: a dense metric up to 40 parameters, a few directions beyond.
# - Centring the predictor removes the correlation: count the years from the middle of the data.
#   Then `level` is the employment in the middle, and means something. It is the same program with
#   other data, and scales are all that is to be learned.

# %%
learned = quiet(trend, YEARS, employed=EMPLOYED, seed=0)
middle = YEARS.mean()
shifted = quiet(trend, YEARS - middle, employed=EMPLOYED, seed=0, method=scales)

figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for panel, run, origin in ((panels[0], hurried, 0.0), (panels[1], shifted, middle)):
    level, growth = (run["posterior"][name].values.ravel() for name in ("level", "growth"))
    panel.plot(growth, level, ".", color=BLUE, ms=2, alpha=0.4, rasterized=True)
    correlation = np.corrcoef(level, growth)[0, 1]
    panel.set_title(
        f"years from {origin:g}: correlation {correlation:.6f}", loc="left", fontsize=10
    )
    panel.set(xlabel="growth (millions a year)", ylabel="level (millions)")

runs = {
    "years from 0, scales only": hurried,
    "years from 0, as it comes": learned,
    "years from the middle, scales": shifted,
}
compare(runs)
for name, run in runs.items():
    steps = float(run["sample_stats"]["n_steps"].mean())
    growth = run["posterior"]["growth"]
    print(f"{name:30}{steps:6.0f} gradients a draw, "
          f"{run.attrs['n_gradient_evaluations_warmup']:8,} to warm up, growth "
          f"{float(growth.mean()):.3f} +- {float(growth.std()):.3f} million a year")  # fmt: skip

# %% [markdown]
# The metric that was learned makes the ridge as easy as the centred line. It cures a *straight*
# ridge, one shape everywhere; a bent one, or a funnel, looks different in every place, and needs
# other coordinates. With hundreds of correlated predictors replace the columns by orthogonal ones
# (`np.linalg.qr`) and turn the coefficients back afterwards.
#
# ## From the finding to the remedy
#
# | finding | what the posterior looks like | first remedy |
# |---|---|---|
# | divergences, E-BFMI | a funnel; scales near zero | non-centre groups with little data |
# | divergences, a handful | a sharp corner somewhere | smaller steps: `target_acceptance=0.95` |
# | multimodal | several peaks | break the symmetry; rethink the model if there is none |
# | stuck | a start far outside, steps far too long | start elsewhere; warm up for longer |
# | tree depth | a ridge that is bent, or more of them than a metric holds | centre, scale |
# | R-hat, ESS and nothing else | as it should be, but slow | draw more: `ppl.extend` |
#
# The order matters: reparametrise first, tune second, draw more last. And an absence of findings
# says that the chains agree, not that the program is right: *Is my inference calibrated?* tests
# that.
