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
# # Without gradients: slices, ellipses, nested samples
#
# Between 1851 and 1962 there were 191 explosions in British coal mines that killed ten men or more.
# They became rarer. When?
#
# If the rate fell at a moment, the likelihood of that moment jumps at every explosion: on which
# side of it does this one lie? A gradient says nothing of jumps. This page samples such models with
# methods that evaluate the density alone:
#
# - `Slice`, for any density; nothing has to be tuned;
# - `EllipticalSlice`, for many unknowns with a Gaussian prior, here a rate that varies smoothly;
# - `NestedSampling`, for evidences: did the rate fall at all, and once or twice?
#
# On the way: exact answers to compare with, a look at what NUTS makes of jumps, and how nested
# sampling knows that something is wrong with it.
#
# Data: R. G. Jarrett (1979), *A note on the intervals between coal-mining disasters*, Biometrika
# 66. I. Murray, R. P. Adams and D. J. C. MacKay (2010) used them to show elliptical slice sampling.

# %%
import os
import warnings

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import gammaln, logsumexp

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.evidence import combined
from ppl_toolkit.inference import (
    MCMC,
    SMC,
    EllipticalSlice,
    NestedSampling,
    RandomWalk,
    Slice,
    block,
    cycle,
    repeat,
)

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS = 400 if FAST else 2000

# Thousandths of the year, by year.
FRACTIONS = """
1851:203 632 969 975|1852:314 347 358 385 977|1853:196 229 319 500|1854:135|1856:396 506 539 618
1857:138 404 582|1858:091 154 406 945|1860:125 169 591 851 919 971|1861:185 738 836
1862:138 893 937|1863:178 794 939 986|1865:459 971|1866:064 340 452 833 948 951
1867:635 854 862|1868:749 903 988|1869:251 442 554 809 875|1870:124 515 559 633
1871:027 151 167 736 816|1872:123 240 769|1873:136|1874:285 546 888 981|1875:329 925 931 931
1876:966|1877:064 105 190 779 809|1878:184 195 236 433 696|1879:036 172 501
1880:057 539 689 944|1881:105 968|1882:129 296 299 335 852|1883:797 851|1884:073 856
1885:168 464 979|1886:617 693 754 921|1887:134 405|1888:298|1889:051 198 793|1890:102 190
1891:252 665|1892:654|1893:508|1894:477|1895:318|1896:070 284 331|1899:630|1901:393|1902:671
1905:056 188 524|1906:773|1908:136 270 629|1909:127 825|1910:357 970|1912:520|1913:784|1914:409
1916:615|1918:031|1922:529 677|1923:569|1927:162|1928:114|1930:154 748|1931:077 830 884
1932:065 864 875|1933:883|1934:723|1935:643 695|1936:596|1937:500|1938:354|1939:821|1940:218 424
1941:420 522 574|1942:001 129 483|1946:945|1947:025 619 638 687|1951:405|1957:883|1960:489
1962:220
"""
BEGIN, SPAN = 1851.0, 112.0
entries = [entry.split(":") for entry in FRACTIONS.replace("\n", "|").strip("|").split("|")]
DATES = np.sort([int(y) + int(f) / 1000 - BEGIN for y, fs in entries for f in fs.split()])
assert len(DATES) == 191

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)


# %% [markdown]
# ## A rate that falls at a moment
#
# Explosions are a Poisson process. Its rate is constant but for `steps` moments at which it
# changes: none, one or two. Rates have mean 1.83 per year (1 in 200 days); moments are spread over
# the span so that they do not crowd (Green 1995). One function is the model for all three.


# %%
MEAN_WAIT = 200 / 365.2425  # years


def explosions(dates, steps):
    edges = [jnp.zeros(1), jnp.full(1, SPAN)]
    if steps == 1:
        at = numpyro.sample("at", dist.Beta(2.0, 2.0))
        edges.insert(1, numpyro.deterministic("year", SPAN * at)[None])
    elif steps == 2:  # the second and the fourth of five uniform dates
        share = numpyro.sample("share", dist.Dirichlet(jnp.full(3, 2.0)))
        edges.insert(1, numpyro.deterministic("years", SPAN * jnp.cumsum(share[:2])))
    edges = jnp.concatenate(edges)
    rate = numpyro.sample("rate", dist.Exponential(MEAN_WAIT).expand([steps + 1]).to_event(1))
    count = jnp.diff(jnp.searchsorted(dates, edges, method="scan_unrolled"))
    numpyro.factor("explosions", jnp.sum(count * jnp.log(rate) - rate * jnp.diff(edges)))


# %% [markdown]
# Slice sampling puts a level below the density of the current point, at random, and draws a new
# point uniformly from where the density is above it, along one direction after another. Warm-up
# learns good directions and widths; a wrong width costs time, but is never wrong.

# %%
once = ppl.infer(explosions, DATES, 1, method=Slice(), draws=DRAWS, seed=0, progress=False)
print(ppl.report(once))
print(f"evaluations of the density per draw: "
      f"{float(once['sample_stats']['n_evaluations'].mean()):.1f}")  # fmt: skip

# %% [markdown]
# NUTS follows the slope between two explosions, where the likelihood is smooth, and knows nothing
# of the jumps. It accepts or refuses by the right density, so that its draws are right in the end;
# but every jump on the way is an error of its energy, and it learns that only tiny steps are safe.

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
    by_nuts = ppl.infer(
        explosions, DATES, 1, method="nuts", draws=DRAWS // 4, warmup=DRAWS // 4, seed=0,
        progress=False,
    )  # fmt: skip
for name, run in {"Slice": once, "NUTS": by_nuts}.items():
    row = ppl.summary(run, "year").loc["year"]
    stats = run["sample_stats"]
    cost = stats["n_evaluations"] if name == "Slice" else stats["n_steps"]
    what = "densities" if name == "Slice" else "gradients"
    print(f"{name:5} R-hat {row['r_hat']:.2f}, effective draws {row['ess_bulk']:5.0f}, "
          f"one for {float(cost.sum()) / row['ess_bulk']:6.0f} {what}")  # fmt: skip

# %% [markdown]
# Here the rates can be integrated out by hand, and the posterior of the moment is known exactly:
# it has a jump at every explosion. `log_segment` is used for evidences below as well.


# %%
def log_segment(a, b):
    """Log of the likelihood of the explosions between two moments, their rate integrated out."""
    n = np.searchsorted(DATES, b) - np.searchsorted(DATES, a)
    return np.log(MEAN_WAIT) + gammaln(n + 1.0) - (n + 1.0) * np.log(MEAN_WAIT + b - a)


GRID = (np.arange(22_400) + 0.5) * SPAN / 22_400
width = SPAN / 22_400
log_prior = np.log(6 * GRID * (SPAN - GRID) / SPAN**3)
log_joint = log_prior + log_segment(0.0, GRID) + log_segment(GRID, SPAN)
exact_once = logsumexp(log_joint) + np.log(width)
density = np.exp(log_joint - exact_once)

figure, axes = plt.subplots(figsize=(8.5, 3.1), layout="constrained")
drawn = BEGIN + once["posterior"]["year"].values.ravel()
axes.hist(drawn, np.arange(1880, 1900.1, 0.25), density=True, color=BLUE, alpha=0.45,
          label="slice sampling")  # fmt: skip
axes.plot(BEGIN + GRID, density, color=RED, lw=1.0, label="exact")
axes.plot(BEGIN + DATES, np.full(DATES.size, -0.015), "|", color="black", ms=7)
axes.set(xlim=(1884, 1898), xlabel="year of the fall", ylabel="density", ylim=(-0.03, None))
axes.legend(frameon=False)
mean_exact = BEGIN + np.sum(GRID * density) * width
print(f"mean year: {drawn.mean():.2f} by slices, {mean_exact:.2f} exactly")
after = drawn > 1890
print(f"P(the fall came after 1889): {after.mean():.3f} by slices, "
      f"{np.sum(density[GRID > 39.0]) * width:.3f} exactly")  # fmt: skip

# %% [markdown]
# Ticks are explosions: between two of them the density falls, and at each it jumps up.
#
# ## A rate that varies smoothly
#
# Perhaps there was no moment. Let the logarithm of the rate be a Gaussian process: two years at a
# time, 56 unknowns that depend on each other. `EllipticalSlice` moves all of them at once: it draws
# another function from the prior, and looks for a point on the ellipse through the two whose
# likelihood is above the level. It needs a Gaussian prior, and proves that from the model before it
# runs; the unknown scale and length of the process are moved by `Slice`, given the rest.

# %%
WIDTH = 4.0 if FAST else 2.0
COUNTS, EDGES = np.histogram(DATES, np.arange(0.0, SPAN + 1, WIDTH))
MIDDLES = 0.5 * (EDGES[1:] + EDGES[:-1])


def smooth(middles, counts):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    length = numpyro.sample("length", dist.LogNormal(jnp.log(20.0), 0.7))
    mean = numpyro.sample("mean", dist.Normal(jnp.log(1.8), 1.0))
    with numpyro.plate("period", middles.size):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    gap = jnp.abs(jnp.subtract.outer(middles, middles)) * jnp.sqrt(3.0) / length
    correlation = (1.0 + gap) * jnp.exp(-gap) + 1e-6 * jnp.eye(middles.size)  # Matern, 3/2
    log_rate = mean + scale * jnp.linalg.cholesky(correlation) @ z
    rate = numpyro.deterministic("rate", jnp.exp(log_rate))
    with numpyro.plate("period", middles.size):
        numpyro.sample("count", dist.Poisson(WIDTH * rate), obs=counts)


try:
    ppl.infer(smooth, MIDDLES, COUNTS, method=EllipticalSlice(), progress=False)
except ppl.errors.MethodError as error:
    print(error)

# %% [markdown]
# The message names the site at fault, and the remedy. Likelihoods of two-yearly counts are cheap
# once the Cholesky factor is there, so the function moves thirty times for each move of its scale
# and length:

# %%
function = block(repeat(EllipticalSlice(), 30), ["z", "mean"])
kernel = cycle([function, block(Slice(), ["scale", "length"])])
with warnings.catch_warnings():
    if FAST:  # too few draws
        warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
    process = ppl.infer(
        smooth, MIDDLES, COUNTS, method=MCMC(kernel, warmup=100 if FAST else 1000),
        draws=100 if FAST else 3000, seed=1, progress=False,
    )  # fmt: skip
print(ppl.summary(process, ["scale", "length", "mean"])[["mean", "sd", "ess_bulk", "r_hat"]])

# %%
rates = process["posterior"]["rate"].values.reshape(-1, MIDDLES.size)
low, middle, high = np.quantile(rates, [0.055, 0.5, 0.945], axis=0)
year = once["posterior"]["year"].values.ravel()[:, None]
two = once["posterior"]["rate"].values.reshape(-1, 2)
fine = np.linspace(0.0, SPAN, 561)
stepped = np.where(fine < year, two[:, :1], two[:, 1:])

figure, axes = plt.subplots(figsize=(8.5, 3.4), layout="constrained")
axes.bar(
    BEGIN + MIDDLES, COUNTS / WIDTH, width=0.9 * WIDTH, color=GREY, alpha=0.3, label="observed"
)
axes.fill_between(BEGIN + MIDDLES, low, high, color=BLUE, alpha=0.25, lw=0)
axes.plot(BEGIN + MIDDLES, middle, color=BLUE, lw=2, label="smooth rate, with 89% band")
axes.plot(BEGIN + fine, stepped.mean(0), color=RED, lw=1.6, label="one fall, mean rate")
axes.set(xlabel="year", ylabel="explosions per year", xlim=(1850, 1964))
axes.legend(frameon=False)
for name, there in (("1860", 1860), ("1900", 1900), ("1940", 1940)):
    i = int(np.argmin(np.abs(BEGIN + MIDDLES - there)))
    print(
        f"{name}: {middle[i]:.2f} explosions per year, 89% between {low[i]:.2f} and {high[i]:.2f}"
    )

# %% [markdown]
# The process cannot fall at a moment; it bends early and late to make up for that, and sees the
# rise in the 1930s that one step has no room for.
#
# ## How many falls? Evidences by nested sampling
#
# The evidence of a model is the mean of its likelihood over its prior. Nested sampling begins with
# points from the prior; those with the lowest likelihoods die and are replaced by others above
# them, so that the volume that is left shrinks at a known rate. No gradients, no temperatures, and
# jumps are no obstacle. Every chain is a run of its own, so that the spread of the four says how
# certain the evidence is.
#
# The sampler that starts from the prior as well, `SMC`, gives evidences too. Here with a
# random walk for its moves; and there are exact values, by integrals over the moments.

# %%
exact = {0: log_segment(0.0, SPAN), 1: exact_once}
coarse = np.linspace(0.0, SPAN, 1121)[:-1] + 0.05
first, second = np.meshgrid(coarse, coarse, indexing="ij")
later = second > first
first, second = first[later], second[later]
log_two = np.log(120 * first * (second - first) * (SPAN - second) / SPAN**5)
log_two += log_segment(0.0, first) + log_segment(first, second) + log_segment(second, SPAN)
exact[2] = logsumexp(log_two) + 2 * np.log(0.1)

methods = {
    "nested": NestedSampling(live=100 if FAST else 500),
    "SMC": SMC(particles=256 if FAST else 1024, kernel=RandomWalk()),
}
runs = {}
print(f"no step: exact {exact[0]:.2f}")
for steps in (1,) if FAST else (1, 2):
    for name, method in methods.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
            run = ppl.infer(explosions, DATES, steps, method=method, seed=2, progress=False)
        found = combined(run["sample_stats"]["log_evidence"][:, -1])
        print(
            f"steps {steps}: {name:6} {found.log:.2f} +- {found.se:.2f}, exact {exact[steps]:.2f}"
        )
        runs[name, steps] = run

# %% [markdown]
# One fall is about $e^{30}$ times as probable as none, given the data. A second step makes the
# data three times as probable: they do not settle it. (The tutorial on change points lets the
# number of steps vary, up to 30.)
#
# What happened in a run is kept with the result: its points, their likelihoods, and the volumes at
# which they died. The posterior sits where likelihood times volume is largest.

# %%
figure, (climb, mass) = plt.subplots(1, 2, figsize=(8.8, 3.1), layout="constrained")
nested = {steps: run for (name, steps), run in runs.items() if name == "nested"}
for steps, run in nested.items():
    colour = RED if steps == 1 else GREEN
    points = run["dead_points"]
    for chain in range(4):
        gained = -points["log_volume"].values[chain]
        climb.plot(gained, points["log_likelihood"].values[chain], color=colour, lw=1)
        there = np.isfinite(gained)
        weight = np.exp(points["log_weight"].values[chain][there])
        height, edges = np.histogram(gained[there], np.linspace(0, 20, 41), weights=weight)
        mass.stairs(height, edges, color=colour, lw=1,
                    label=f"steps: {steps}" if chain == 0 else None)  # fmt: skip
climb.set(ylim=(-200, -40), xlim=(0, 20), xlabel="information, -log volume (nats)",
          ylabel="log likelihood")  # fmt: skip
mass.set(xlabel="information, -log volume (nats)", ylabel="posterior mass", xlim=(0, 20))
_ = mass.legend(frameon=False)
for steps, run in nested.items():
    told = run["nested"]
    print(f"steps {steps}: {float(told['information'].mean()):.1f} nats gained, "
          f"{float(told['ess'].mean()):.0f} effective points a run, "
          f"{float(told['n_evaluations'].mean()):,.0f} likelihoods")  # fmt: skip

# %% [markdown]
# ## When nested sampling is wrong
#
# New points must be independent draws from the prior above the bound. Each starts at a point that
# lives and moves by some slices; with too few of them it stays near to its start, points become
# copies of copies, and the evidence is wrong though every run looks certain of itself. The toolkit
# counts how many new points have their start among their nearest neighbours.

# %%


def distant(y):
    m = numpyro.sample("m", dist.Normal(0.0, jnp.full(y.size, 2.0)).to_event(1))
    numpyro.sample("y", dist.Normal(m, 0.3).to_event(1), obs=y)


Y = np.linspace(-2.0, 2.0, 10 if FAST else 20)
truth = float(np.sum(-0.5 * Y**2 / 4.09 - 0.5 * np.log(2 * np.pi * 4.09)))
for steps in (2,) if FAST else (5, None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppl.errors.InferenceWarning)
        run = ppl.infer(distant, Y, method=NestedSampling(live=100 if FAST else 400, steps=steps),
                        seed=0, progress=False)  # fmt: skip
    found = combined(run["sample_stats"]["log_evidence"][:, -1])
    said = [finding.message for finding in ppl.findings(run) if finding.kind == "nested"]
    print(f"slices {steps or '3 per dimension'}: log evidence {found.log:.2f} +- {found.se:.2f}, "
          f"exact {truth:.2f}: {said[0] if said else 'nothing looks wrong'}")  # fmt: skip
