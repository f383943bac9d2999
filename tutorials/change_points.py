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
# # Change points: how many, and when?
#
# Between 1851 and 1962 there were 191 explosions in British coal mines that killed ten men or more.
# They became rarer. Did that happen once, or in several steps, and when?
#
# The number of steps is itself unknown, so the number of parameters is: every step has a date and a
# rate of its own. Here one run moves between all these models, and the answer to "how many?" is a
# posterior distribution like any other.
#
# On the way: `masked_plate`, for a variable number of elements; moves that add and remove elements;
# what to look at in a chain whose dimension changes; a check against the exact answer.
#
# Data: R. G. Jarrett (1979), *A note on the intervals between coal-mining disasters*, Biometrika
# 66. Model and moves: P. J. Green (1995), *Reversible jump Markov chain Monte Carlo computation and
# Bayesian model determination*, Biometrika 82.

# %%
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import gammaln

import ppl_toolkit as ppl
from ppl_toolkit.inference import MCMC, Moves, StepSplit, Walk, masked_plate, repeat

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS = 400 if FAST else 8000

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
BEGIN, SPAN, MOST = 1851.0, 112.0, 30
entries = [entry.split(":") for entry in FRACTIONS.replace("\n", "|").strip("|").split("|")]
DATES = np.sort([int(y) + int(f) / 1000 for y, fs in entries for f in fs.split()])
assert len(DATES) == 191
print(f"{np.sum(DATES < 1891)} explosions in the first 40 years, "
      f"{np.sum(DATES >= 1891)} in the 72 years after")  # fmt: skip

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)

# %% [markdown]
# ## The model
#
# Explosions come as a Poisson process whose rate is a step function. The number of steps `k` is
# Poisson(3), cut off at 30. Dates of steps should not crowd: they are the second, fourth, ... of 2
# k + 1 uniform dates. Every segment has a rate with mean 1.83 per year (1 in 200 days).
#
# `masked_plate("step", 30, k)` has 30 slots, of which the first `k` are there; the others have no
# part in the density. `order="at"` says that the steps are kept in the order of their dates, so
# that the model may rely on it. All the rest is plain NumPyro. The model gives the dates a law that
# does not know of the order; the factor turns it into the one wanted (and the likelihood is a
# factor too, since it is that of a process).


# %%
def explosions(dates):
    sizes = jnp.arange(MOST + 1.0)
    k = numpyro.sample("k", dist.Categorical(logits=sizes * jnp.log(3.0) - gammaln(sizes + 1)))
    first = numpyro.sample("first_rate", dist.Gamma(1.0, 200 / 365.2425))
    with masked_plate("step", MOST, k, order="at"):
        at = numpyro.sample("at", dist.Uniform(0.0, SPAN))
        rate = numpyro.sample("rate", dist.Gamma(1.0, 200 / 365.2425))
    segment = jnp.arange(MOST + 1) <= k
    edges = jnp.concatenate([jnp.zeros(1), jnp.where(segment[1:], at, SPAN), jnp.full(1, SPAN)])
    length = jnp.where(segment, jnp.diff(edges), 1.0)
    height = jnp.where(segment, jnp.concatenate([first[None], rate]), 1.0)
    even = gammaln(2 * k + 2.0) - gammaln(k + 1.0) - (k + 1) * jnp.log(SPAN)
    numpyro.factor("even", even + jnp.sum(jnp.log(length)))
    count = jnp.diff(jnp.searchsorted(dates, edges, method="scan_unrolled"))
    each = count * jnp.log(height) - height * length
    numpyro.factor("explosions", jnp.sum(jnp.where(segment, each, 0.0)))


# %% [markdown]
# ## Moves
#
# `StepSplit` proposes a new step at a random date and divides the rate there in two, so that the
# mean of its logarithm stays: the new rates fit about as well as the old one did. Or it proposes to
# take a step away, by the same rule read backwards. (`BirthDeath("step")` would draw the new rate
# from the prior: right as well, but slower.) `Walk` moves one rate or one date at a time.
#
# Every one of them is an involution, checked before the run; the probability of the way back is
# part of the acceptance ratio by construction. 20 moves make a draw.

# %%
kernel = Moves(
    (
        StepSplit("step", at="at", height="rate", base="first_rate"),
        Walk("rate", 0.5),
        Walk("first_rate", 0.3),
        Walk("at", 0.4),
    ),
    weights=(0.5, 0.2, 0.05, 0.25),
)
posterior = ppl.infer(
    explosions, DATES - BEGIN, method=MCMC(repeat(kernel, 20), warmup=200), draws=DRAWS, seed=0,
    progress="lines",
)  # fmt: skip
print(ppl.report(posterior, var_names=["k", "first_rate"]))

# %% [markdown]
# `k` and `first_rate` are there in every draw, and can be judged as usual. `at[2]` is not: it is
# NaN where there are fewer than three steps, and means something else in a model with three steps
# than in one with five. What is worth summarising is `k`, and functions such as the rate in a year.
# `ppl.report(posterior, "page.html")` has a section on this, with the jumps between sizes.
#
# How often were moves accepted?

# %%
stats = posterior["sample_stats"]
moves = ["birth", "death", "walk: rate", "walk: first rate", "walk: date"]
for number, name in enumerate(moves):
    tried = stats["move"].values == number
    print(f"{name:17} accepted {stats['accepted'].values[tried].mean():.0%}")

# %% [markdown]
# ## How many steps?
#
# For this model the rates can be integrated out by hand and the dates one after the other by
# quadrature, so that the posterior of `k` is known to six digits. (It was computed for a span of
# 40,907 days, a third of a day shorter than ours.) A chain that must give the right answer is the
# best check of a model's code and of the moves.

# %%
EXACT = np.array([0.0, 0.05668, 0.24536, 0.29021, 0.22909, 0.11569, 0.04410, 0.01389, 0.00380])
k = posterior["posterior"]["k"].values
size = np.arange(len(EXACT))
share = np.array([(k == n).mean(axis=1) for n in size])
error = 2 * share.std(axis=1, ddof=1) / np.sqrt(share.shape[1])
prior = np.exp(size * np.log(3.0) - 3.0 - np.array(gammaln(size + 1.0)))

figure, (bars, trace) = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained",
                                     width_ratios=[1, 1.5])  # fmt: skip
bars.bar(size, share.mean(axis=1), yerr=error, color=BLUE, alpha=0.55, ecolor=BLUE)
bars.plot(size, EXACT, "D", color=RED, ms=4, label="exact")
bars.plot(size, prior, ".", color=GREY, label="prior")
bars.set(xlabel="number of steps", ylabel="probability", xticks=size, ylim=(0, None))
bars.legend(frameon=False)
shown = k[0, : min(400, k.shape[1])]
trace.step(np.arange(len(shown)), shown, color=BLUE, lw=0.8)
trace.set(xlabel="draw of the first chain", ylabel="number of steps", yticks=range(0, 10, 2))

print("steps  found    exact")
for n in range(1, 7):
    print(f"{n:5}  {share[n].mean():.3f}    {EXACT[n]:.3f}")
print(f"P(at least one step) = {np.mean(k > 0):.4f}")

# %% [markdown]
# At least one step is certain. Two to four are all well possible, so that picking one number would
# be pretending.
#
# ## The rate over time
#
# No need to pick: the rate in a year is a function of every draw, whatever its number of steps.
# Averaging over all draws averages over all models, in proportion to their probabilities.

# %%
draws = posterior["posterior"].isel(draw=slice(None, None, max(1, DRAWS // 1000)))
at = draws["at"].values.reshape(-1, MOST)
rates = np.column_stack(
    [draws["first_rate"].values.ravel(), draws["rate"].values.reshape(-1, MOST)]
)
years = np.linspace(0, SPAN, 449)
segment = (at[:, :, None] <= years).sum(axis=1)  # NaN is never before a year
curves = np.take_along_axis(rates, segment, axis=1)
low, high = np.quantile(curves, [0.055, 0.945], axis=0)

figure, (panel, dates_panel) = plt.subplots(
    2, 1, figsize=(9, 4.8), sharex=True, layout="constrained", height_ratios=[2, 1]
)
for curve in curves[:: max(1, len(curves) // 12)][:12]:
    panel.plot(BEGIN + years, curve, color=GREY, lw=0.5, alpha=0.5)
panel.fill_between(BEGIN + years, low, high, color=BLUE, alpha=0.25, lw=0)
panel.plot(BEGIN + years, curves.mean(axis=0), color=BLUE, lw=1.8)
count, edges = np.histogram(DATES, np.arange(1851, 1964, 7))
panel.plot(0.5 * (edges[1:] + edges[:-1]), count / 7, "o", color=RED, ms=3.5)
panel.plot(DATES, np.full(len(DATES), -0.12), "|", color="black", ms=6, mew=0.6)
panel.set(ylabel="explosions per year", ylim=(-0.25, 4.7))

colours = {1: GREY, 2: GREEN, 3: BLUE, 4: RED}
drawn_k = draws["k"].values.ravel()
for n, colour in colours.items():
    found = at[drawn_k == n, :n].ravel()
    density, edges = np.histogram(found, np.arange(0, SPAN + 1, 1.0))
    dates_panel.plot(BEGIN + 0.5 + edges[:-1], density / max(1, np.sum(drawn_k == n)), color=colour,
                     lw=1.2, label=f"{n} step" + "s" * (n > 1))  # fmt: skip
dates_panel.set(xlabel="year", ylabel="steps per year", xlim=(1851, 1963), ylim=(0, None))
dates_panel.legend(frameon=False, ncols=4)

for year in (1860, 1900, 1920, 1950):
    i = int(np.argmin(np.abs(BEGIN + years - year)))
    mean = curves[:, i].mean()
    print(f"{year}: {mean:.2f} explosions per year (89%: {low[i]:.2f} to {high[i]:.2f})")
main = np.sum((at > 1886 - BEGIN) & (at < 1896 - BEGIN), axis=1)
print(f"P(a step between 1886 and 1896) = {np.mean(main > 0):.2f}")

# %% [markdown]
# Blue: mean and 89% band. Grey: some draws, step functions all of them. Red: raw counts per year,
# in bins of seven years. Ticks: the explosions.
#
# One step is beyond doubt: around 1890 the rate fell to about a third. The Coal Mines Regulation
# Act of 1887 had come shortly before; what caused the fall, dates alone cannot say. Later steps are
# less certain: a rise around 1930, a fall in the 1940s. The lower panel shows where steps lie,
# given how many there are.
