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
# # Hierarchical regression: which seeds germinate?
#
# Broomrape (*Orobanche*) is a parasite of crops whose seeds wake up when the roots of a host are
# near. In an experiment, seeds of two varieties lay on 21 dishes, each treated with root extract of
# bean or of cucumber, and the seeds that germinated were counted.
#
# Three questions:
#
# - Which extract wakes the seeds, and does that depend on the variety?
# - Do dishes under the same treatment differ more than chance allows?
# - What should we expect of the next dish?
#
# On the way: prior checks, no, complete and partial pooling, model comparison with its own
# diagnostics taken seriously, and predictions for groups that were never observed.
#
# Data: M. J. Crowder (1978), *Beta-binomial Anova for proportions*, Applied Statistics 27, table 3.
# N. E. Breslow and D. G. Clayton (1993) and the BUGS examples (volume I, "Seeds") analyse them too.

# %%
import os
import warnings

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit, logsumexp
from scipy.stats import binom

import ppl_toolkit as ppl

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS = 250 if FAST else 1000

GERMINATED = np.array(
    [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
)
SEEDS = np.array([39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7])
VARIETY = np.repeat(["75", "73"], [11, 10])  # O. aegyptiaca 75 and 73
EXTRACT = np.repeat(["bean", "cucumber", "bean", "cucumber"], [5, 6, 5, 5])

TREATMENTS = [("75", "bean"), ("75", "cucumber"), ("73", "bean"), ("73", "cucumber")]
TREATMENT = np.array([TREATMENTS.index(pair) for pair in zip(VARIETY, EXTRACT, strict=True)])
NAMES = [f"{variety}, {extract}" for variety, extract in TREATMENTS]

for k, name in enumerate(NAMES):
    mine = k == TREATMENT
    print(f"{name:13} {mine.sum()} dishes, {GERMINATED[mine].sum():3} of {SEEDS[mine].sum():3} "
          f"seeds germinated: {GERMINATED[mine].sum() / SEEDS[mine].sum():.1%}")  # fmt: skip

# a guard against slips in typing the table: the totals by treatment
assert [GERMINATED[k == TREATMENT].sum() for k in range(4)] == [99, 201, 49, 75]
assert [SEEDS[k == TREATMENT].sum() for k in range(4)] == [272, 295, 123, 141]

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)


# %% [markdown]
# ## The model
#
# The log-odds of germination are linear in the treatment, plus a deviation of each dish: two
# dishes with the same treatment need not behave alike. The size `sigma` of the deviations is
# unknown. They are written as standardised effects `z` (non-centred), since 21 dishes say little
# about `sigma` and the centred form would diverge, as in *Quick start*.
#
# The scale of the coefficients' prior is an argument, so that we can change it without compiling.


# %%
def partial_pooling(seeds, treatment, scale, germinated=None):
    effects = treatment.shape[1]
    beta = numpyro.sample("beta", dist.Normal(0, scale).expand([effects]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    with numpyro.plate("dish", seeds.shape[0]):
        z = numpyro.sample("z", dist.Normal(0, 1))
        log_odds = numpyro.deterministic("log_odds", treatment @ beta + sigma * z)
        numpyro.sample("germinated", dist.Binomial(seeds, logits=log_odds), obs=germinated)


def design(variety, extract):
    """Columns: 1, variety 73, cucumber, both."""
    new, cucumber = np.asarray(variety) == "73", np.asarray(extract) == "cucumber"
    return np.stack([np.ones(len(new)), new, cucumber, new & cucumber], axis=1).astype(float)


X = design(VARIETY, EXTRACT)
LABELS = {
    "coords": {
        "effect": ["75 on bean", "variety 73", "cucumber", "73 and cucumber"],
        "dish": [f"{t} #{i + 1}" for i, t in enumerate(np.array(NAMES)[TREATMENT])],
    },
    "dims": {"beta": ["effect"]},
}

# %% [markdown]
# ## Is "vague" harmless? Look at the prior
#
# On the log-odds scale a normal prior with a huge standard deviation is not modest. It says that
# almost every dish germinates completely or not at all. With a scale of 1.5 all shares are
# possible.

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 2.5), sharex=True, layout="constrained")
for panel, scale in zip(panels, (1.5, 30.0), strict=True):
    prior = ppl.infer(
        partial_pooling, SEEDS, X, scale, method="prior", draws=DRAWS, seed=1, progress=False
    )
    share = expit(prior["prior"]["log_odds"].values)
    panel.hist(share.ravel(), bins=30, density=True, color=BLUE, alpha=0.5)
    panel.set_title(f"prior scale {scale:g}", loc="left")
    panel.set(xlabel="share of the seeds that germinates", yticks=[], xlim=(0, 1))
    panel.spines["left"].set_visible(False)

# %% [markdown]
# ## Fit and report

# %%
partial = ppl.infer(
    partial_pooling, SEEDS, X, 1.5, germinated=GERMINATED, draws=DRAWS, seed=0, progress="lines",
    **LABELS,
)  # fmt: skip
print(ppl.report(partial, var_names=["beta", "sigma"]))

# %% [markdown]
# The sites carry the labels given above, so the table can be read without the design matrix, and
# results are picked by name: `partial["posterior"]["beta"].sel(effect="cucumber")`.
#
# Can we believe it? These data have a published posterior, found by Gibbs sampling with very vague
# priors. `scale` is data like the rest, so making our prior as vague needs no compilation.

# %%
vague = ppl.infer(
    partial_pooling, SEEDS, X, 1000.0, germinated=GERMINATED, draws=DRAWS, seed=0,
    progress=False, **LABELS,
)  # fmt: skip
PUBLISHED = ["-0.55 (0.19)", " 0.08 (0.31)", " 1.36 (0.27)", "-0.82 (0.43)", " 0.27 (0.14)"]
print(f"{'':22}{'scale 1.5':16}{'scale 1000':16}BUGS, about")
ours, theirs = (ppl.summary(run, ["beta", "sigma"]) for run in (partial, vague))
for label, published in zip(ours.index, PUBLISHED, strict=True):
    cells = [f"{table['mean'][label]:5.2f} ({table['sd'][label]:.2f})" for table in (ours, theirs)]
    print(f"{label:22}{cells[0]:16}{cells[1]:16}{published}")
print(f"prepared in {vague.attrs['time_compile']:.2f} s, after {partial.attrs['time_compile']:.2f}"
      " s for the first run")  # fmt: skip

# %% [markdown]
# The coefficients agree. Our `sigma` is somewhat larger: the published analysis put a
# Gamma(0.001, 0.001) prior on the precision, which favours a `sigma` near zero.
#
# Cucumber wakes seeds of variety 75. Variety 73 answers less: the interaction is negative. As
# probabilities of germination in a typical dish:

# %%
beta = partial["posterior"]["beta"].stack(sample=("chain", "draw")).values
typical = expit(design(*zip(*TREATMENTS, strict=True)) @ beta)  # (treatment, sample)
for name, share in zip(NAMES, typical, strict=True):
    low, high = np.quantile(share, [0.055, 0.945])
    print(f"{name:13} {share.mean():.0%}  (89% interval {low:.0%} to {high:.0%})")
print(f"P(cucumber's effect is smaller for 73): {np.mean(beta[3] < 0):.2f}")

# %% [markdown]
# ## Three ways to pool
#
# - *Complete pooling*: dishes under one treatment are alike; only the treatment matters.
# - *No pooling*: every dish is on its own and learns nothing from the others.
# - *Partial pooling*: the model above; the data decide how alike the dishes are.


# %%
def complete_pooling(seeds, treatment, germinated=None):
    effects = treatment.shape[1]
    beta = numpyro.sample("beta", dist.Normal(0, 1.5).expand([effects]).to_event(1))
    with numpyro.plate("dish", seeds.shape[0]):
        log_odds = numpyro.deterministic("log_odds", treatment @ beta)
        numpyro.sample("germinated", dist.Binomial(seeds, logits=log_odds), obs=germinated)


def no_pooling(seeds, germinated=None):
    with numpyro.plate("dish", seeds.shape[0]):
        log_odds = numpyro.sample("log_odds", dist.Normal(0, 1.5))
        numpyro.sample("germinated", dist.Binomial(seeds, logits=log_odds), obs=germinated)


options = {"draws": DRAWS, "seed": 0, "progress": False, "germinated": GERMINATED}
complete = ppl.infer(complete_pooling, SEEDS, X, **options, **LABELS)
none = ppl.infer(no_pooling, SEEDS, **options, coords={"dish": LABELS["coords"]["dish"]})


# %%
def interval(result):
    """Mean and 89% interval of every dish's probability of germination."""
    share = expit(result["posterior"]["log_odds"].stack(sample=("chain", "draw")).values)
    return share.mean(1), *np.quantile(share, [0.055, 0.945], axis=1)


figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
place = np.arange(21) + 1.2 * TREATMENT  # a gap between the treatments
fits = {"no pooling": (none, GREY, -0.22), "partial pooling": (partial, BLUE, 0.22)}
for name, (result, colour, shift) in fits.items():
    mean, low, high = interval(result)
    axes.vlines(place + shift, low, high, color=colour, lw=2)
    axes.plot(place + shift, mean, "o", color=colour, ms=4, label=name)
axes.scatter(place, GERMINATED / SEEDS, s=SEEDS, facecolor="none", edgecolor=RED, lw=1.2,
             label="observed (area: number of seeds)", zorder=3)  # fmt: skip
for k, name in enumerate(NAMES):
    mine = place[k == TREATMENT]
    level = interval(complete)[0][k == TREATMENT][0]
    axes.hlines(level, mine.min() - 0.5, mine.max() + 0.5, color=GREEN, lw=1.5, ls="--",
                label="complete pooling" if k == 0 else None)  # fmt: skip
    axes.text(mine.mean(), 1.02, name, ha="center")
axes.set(ylim=(-0.03, 1.0), ylabel="probability of germination", xlabel="dish")
axes.set_xticks(place, np.arange(1, 22))
_ = axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, fontsize=9)

# %% [markdown]
# Partial pooling moves the small dishes most. On dish 16 none of 4 seeds germinated; on its own
# that says next to nothing, and the model takes most of its estimate from the other dishes. The
# large dishes keep closer to their own counts, and all intervals are shorter than without pooling.
#
# ## Do dishes differ more than chance allows?
#
# Ask the models to repeat the experiment. As a measure of how much dishes under one treatment
# differ, take Pearson's statistic: squared deviations from the treatment's overall share, in units
# of binomial variance.

# %%
SAME = (TREATMENT[:, None] == np.arange(4)).astype(float)


def spread(counts):
    """Pearson's statistic of counts (..., dish) against equal shares within each treatment."""
    share = ((counts @ SAME) / (SEEDS @ SAME))[..., TREATMENT]
    share = np.clip(share, 1e-9, 1 - 1e-9)
    return ((counts - SEEDS * share) ** 2 / (SEEDS * share * (1 - share))).sum(-1)


complete = ppl.predict(complete, complete_pooling, SEEDS, X, germinated=GERMINATED, seed=4)
partial = ppl.predict(partial, partial_pooling, SEEDS, X, 1.5, germinated=GERMINATED, seed=4)

figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
bins = np.linspace(0, 80, 60)
for result, colour, name in ((complete, GREEN, "complete"), (partial, BLUE, "partial")):
    repeated = spread(result["posterior_predictive"]["germinated"].values).ravel()
    above = np.mean(repeated >= spread(GERMINATED))
    axes.hist(repeated, bins, density=True, color=colour, alpha=0.45,
              label=f"{name} pooling ({above:.1%} at least as large)")  # fmt: skip
axes.axvline(spread(GERMINATED), color=RED, lw=2, label="observed")
axes.set(yticks=[], xlabel="spread of the dishes within treatments (Pearson's statistic)")
axes.spines["left"].set_visible(False)
_ = axes.legend(frameon=False)

# %% [markdown]
# Under complete pooling such differences between dishes would be rare; with dish effects they are
# ordinary. Complete pooling also claims more certainty than it has: its intervals for the
# coefficients are too short.
#
# ## Which model predicts a new dish best?
#
# Leave-one-out cross-validation estimates it. ArviZ approximates it from the pointwise log
# likelihood of one fit, by importance sampling.

# %%
complete = ppl.log_likelihood(complete, complete_pooling, SEEDS, X, germinated=GERMINATED)
partial = ppl.log_likelihood(partial, partial_pooling, SEEDS, X, 1.5, germinated=GERMINATED)
none = ppl.log_likelihood(none, no_pooling, SEEDS, germinated=GERMINATED)
approximate = {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about Pareto's k, which is what comes next
    for name, result in {"partial": partial, "complete": complete, "none": none}.items():
        approximate[name] = az.loo(result, pointwise=True)
    table = az.compare(approximate, round_to="none")
print(table[["rank", "elpd", "se", "elpd_diff", "dse", "p", "weight"]].round(1).to_string())

# %% [markdown]
# Before believing the table, look at the diagnostic of the approximation: Pareto's k of every dish.
# Above 0.7 the importance weights are too uneven. With an effect for each dish, leaving a dish out
# changes its effect a great deal, so this is to be expected.

# %%
figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
for (name, elpd), colour in zip(approximate.items(), (BLUE, GREEN, GREY), strict=True):
    bad = int((elpd.pareto_k.values > 0.7).sum())
    axes.plot(np.arange(1, 22), elpd.pareto_k, "o", color=colour, ms=5,
              label=f"{name} ({bad} above 0.7)")  # fmt: skip
axes.axhline(0.7, color=RED, lw=1)
axes.set(xlabel="dish", ylabel="Pareto's k", xticks=np.arange(1, 22))
_ = axes.legend(frameon=False, ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))

# %% [markdown]
# So do it exactly: fit partial pooling without each dish in turn. A dish with no seeds in it
# contributes nothing, so zeros leave the dish out while all shapes stay the same. Nothing is
# compiled again, and each fit starts from the full one (`init=`), which makes its warm-up short.
# Twenty-one fits take a few seconds. Complete pooling needs no repair; its k are low.

# %%
exact = {name: approximate[name].elpd_i.values.copy() for name in ("partial", "complete")}
left_out = range(5 if FAST else 21)
alarms = 0
for i in left_out:
    kept = np.arange(21) != i
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppl.errors.InferenceWarning)  # counted instead
        without = ppl.infer(
            partial_pooling, SEEDS * kept, X, 1.5, germinated=GERMINATED * kept,
            init=partial, draws=DRAWS, seed=i, progress=False, **LABELS,
        )  # fmt: skip
    alarms += bool(ppl.findings(without))
    log_odds = without["posterior"]["log_odds"].values[..., i].ravel()
    log_p = binom.logpmf(GERMINATED[i], SEEDS[i], expit(log_odds))
    exact["partial"][i] = logsumexp(log_p) - np.log(log_p.size)
# Without pooling the other dishes say nothing: the prediction is that of the prior.
guess = expit(np.random.default_rng(0).normal(0, 1.5, 20_000))
log_p = binom.logpmf(GERMINATED[:, None], SEEDS[:, None], guess)
exact["none"] = logsumexp(log_p, axis=1) - np.log(guess.size)

print(f"{alarms} of {len(left_out)} fits had findings\n\n{'':10}importance sampling    exact")
for name, values in exact.items():
    print(f"{name:10}{float(approximate[name].elpd):12.1f}{values.sum():17.1f}")
ahead = exact["partial"] - exact["complete"]
print(
    f"\npartial ahead of complete by {ahead.sum():.1f}, standard error {21**0.5 * ahead.std():.1f}"
)

# %% [markdown]
# Importance sampling was far too kind to no pooling: a dish on its own cannot predict the next one,
# and the exact value says so. Partial pooling stays ahead of complete pooling, by a margin that is
# small next to its uncertainty with 21 dishes. The check above is the stronger argument for it.
#
# ## Dishes that were never observed
#
# What will happen on the next dish of 50 seeds, for each treatment? A new dish has a new deviation:
# `resample=["z"]` draws it from the model, with the posterior draws of the rest.

# %%
planned = np.full(4, 50)
planned_design = design(*zip(*TREATMENTS, strict=True))
outlook = ppl.predict(
    partial, partial_pooling, planned, planned_design, 1.5,
    resample="z", coords={"dish": NAMES}, seed=5,
)  # fmt: skip
naive = ppl.predict(complete, complete_pooling, planned, planned_design, seed=5)
predictions = outlook["predictions"]["germinated"]

figure, panels = plt.subplots(1, 4, figsize=(9, 2.7), sharey=True, layout="constrained")
edges = np.arange(-0.5, 51, 1)
for k, (panel, name) in enumerate(zip(panels, NAMES, strict=True)):
    counts = predictions.sel(dish=name).values.ravel()
    panel.hist(counts, edges, density=True, color=BLUE, alpha=0.5)
    other = naive["predictions"]["germinated"].values[..., k].ravel()
    panel.hist(other, edges, density=True, histtype="step", color=GREEN, lw=1.2)
    seen = k == TREATMENT
    panel.plot(50 * GERMINATED[seen] / SEEDS[seen], np.full(seen.sum(), -0.004), "|", color=RED,
               ms=10, mew=2, clip_on=False)  # fmt: skip
    panel.set_title(name, loc="left", fontsize=10)
    panel.set(xlabel="of 50 seeds", yticks=[], xlim=(0, 50))
    panel.spines["left"].set_visible(False)
    low, high = np.quantile(counts, [0.055, 0.945])
    print(
        f"{name:13} {counts.mean():4.1f} of 50 expected, 89% of the dishes {low:.0f} to {high:.0f}"
    )

# %% [markdown]
# Blue: partial pooling. Green outline: complete pooling, whose predictions are too sure of
# themselves. Red: the shares of the observed dishes. The extra width is the difference between
# "how well do we know the average dish" and "how different are dishes", which only a hierarchical
# model keeps apart.
