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
# # Compose your own sampler, and prove it right
#
# NUTS is the right default, but not everything is a smooth density: group memberships are discrete,
# scales and what they scale move together, peaks lie apart. Sophisticated samplers are compositions
# of small kernels, each of which leaves the posterior as it is. Here you put three together, try
# the whole and its parts, and see what happens to one with a mistake in it.
#
# The data are velocities of 82 galaxies; the model is a mixture in which every galaxy belongs to a
# component. On the way: blocks and cycles, what is refused before it runs, a proof by enumeration,
# a move of your own, and a test by simulation.
#
# Sources: L. Tierney (1994), *Markov chains for exploring posterior distributions*, Annals of
# Statistics 22; P. Green (1995), *Reversible jump Markov chain Monte Carlo computation*,
# Biometrika 82; data: K. Roeder (1990), *Density estimation with confidence sets exemplified by
# superclusters and voids in the galaxies*, JASA 85.

# %%
import os
import warnings

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist

import ppl_toolkit as ppl
from ppl_toolkit.errors import InferenceWarning, MethodError
from ppl_toolkit.inference import MCMC, NUTS, Gibbs, block, cycle, involutive

FAST = os.environ.get("PPL_FAST") == "1"  # a short run, to check that everything works
DRAWS, WARMUP = (150, 150) if FAST else (1000, 500)
REPLICATIONS = 1000 if FAST else 4000

BLUE, RED, GREEN, GREY = "#2a6f97", "#c1440e", "#4a7c3a", "#8a8a8a"
plt.rcParams.update(
    {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)
warnings.simplefilter("ignore", InferenceWarning)  # findings are printed where they matter

# Velocities in 1000 km/s (Roeder 1990, table 1).
VELOCITY = np.array(
    [9.172, 9.350, 9.483, 9.558, 9.775, 10.227, 10.406, 16.084, 16.170, 18.419, 18.552, 18.600,
     18.927, 19.052, 19.070, 19.330, 19.343, 19.349, 19.440, 19.473, 19.529, 19.541, 19.547,
     19.663, 19.846, 19.856, 19.863, 19.914, 19.918, 19.973, 19.989, 20.166, 20.175, 20.179,
     20.196, 20.215, 20.221, 20.415, 20.629, 20.795, 20.821, 20.846, 20.875, 20.986, 21.137,
     21.492, 21.701, 21.814, 21.921, 21.960, 22.185, 22.209, 22.242, 22.249, 22.314, 22.374,
     22.495, 22.746, 22.747, 22.888, 22.914, 23.206, 23.241, 23.263, 23.484, 23.538, 23.542,
     23.666, 23.706, 23.711, 24.129, 24.285, 24.289, 24.366, 24.717, 24.990, 25.633, 26.960,
     26.995, 32.065, 32.789, 34.279]
)  # fmt: skip

# %% [markdown]
# ## A model with a discrete site
#
# Three components. To tell them apart, each has a prior for its place: low, middle, high.


# %%
def galaxies(velocity, components=3):
    share = numpyro.sample("share", dist.Dirichlet(2.0 * jnp.ones(components)))
    low_to_high = jnp.linspace(10.0, 32.0, components)
    with numpyro.plate("group", components):
        centre = numpyro.sample("centre", dist.Normal(low_to_high, 1.5))
        spread = numpyro.sample("spread", dist.LogNormal(0.5, 0.5))
    with numpyro.plate("galaxy", velocity.shape[0]):
        component = numpyro.sample("component", dist.Categorical(share))
        numpyro.sample("velocity", dist.Normal(centre[component], spread[component]), obs=velocity)


# %% [markdown]
# `ppl.infer(galaxies, VELOCITY)` would sum the components out. We want their draws, so the sites
# are split into blocks: gradients for the real numbers, Gibbs for the memberships, one after the
# other. A cycle of kernels, each of which leaves the posterior as it is, leaves it as it is.

# %%
REAL = ["share", "centre", "spread"]
sampler = cycle([block(NUTS(), REAL), block(Gibbs(), "component")])
run = ppl.infer(
    galaxies, VELOCITY, method=MCMC(sampler), draws=DRAWS, warmup=WARMUP, progress=False,
    init={"centre": [10.0, 21.0, 33.0]},
)  # fmt: skip
print(ppl.summary(run, REAL)[["mean", "sd", "ess_bulk", "r_hat"]].round(2).to_string())

# %% [markdown]
# What no sum gives so directly: to which group each galaxy belongs.

# %%
member = np.stack([(run["posterior"]["component"] == g).mean(("chain", "draw")) for g in range(3)])
draws = run["posterior"].dataset.stack(sample=("chain", "draw"))
grid = np.linspace(7, 37, 300)


def density(places, draw):
    """The mixture's density at some places, by component, of one draw."""
    parts = [draws[name].values[:, draw, None] for name in REAL]
    z = (places - parts[1]) / parts[2]
    return parts[0] * np.exp(-0.5 * z**2) / (parts[2] * np.sqrt(2 * np.pi))


some = np.linspace(0, draws.sizes["sample"] - 1, 60).astype(int)
curves = np.stack([density(grid, i) for i in some])
figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(7.5, 5), sharex=True, height_ratios=(3, 1.2), layout="constrained"
)
top.hist(VELOCITY, 45, density=True, color="#d9d9d9")
for curve in curves:
    top.plot(grid, curve.sum(axis=0), color=GREY, lw=0.4, alpha=0.5)
for g, color in enumerate((BLUE, GREEN, RED)):
    top.plot(grid, curves[:, g].mean(axis=0), color=color, lw=2)
    bottom.plot(VELOCITY, member[g], "o", ms=3, color=color)
top.set(ylabel="density", title="82 galaxies, three groups, and sixty draws of the whole")
bottom.set(xlabel="velocity, 1000 km/s", ylabel="P(group)")
plt.show()

# %% [markdown]
# ## What is refused before it runs
#
# A composition that leaves a site alone would be wrong without a sign of it. It does not start.

# %%
try:
    ppl.infer(galaxies, VELOCITY, method=MCMC(block(Gibbs(), "component")))
except MethodError as error:
    print(error)

# %% [markdown]
# ## Is it right?
#
# On a finite model that can be proved. With the groups' shares, centres and spreads known, three
# galaxies have 27 possible memberships, and the transition probabilities of the very code that
# samples can be enumerated: no Monte Carlo.


# %%
def memberships(velocity):
    centre, spread = jnp.array([10.0, 21.0, 33.0]), jnp.array([1.0, 3.0, 2.0])
    with numpyro.plate("galaxy", velocity.shape[0]):
        component = numpyro.sample("component", dist.Categorical(jnp.array([0.1, 0.8, 0.1])))
        numpyro.sample("velocity", dist.Normal(centre[component], spread[component]), obs=velocity)


print(ppl.check(memberships, np.array([12.0, 16.0, 29.0]), method=Gibbs()))

# %% [markdown]
# ## A move of your own
#
# Group centres move together if all velocities are stretched: let a single factor e^u stretch all
# centres and spreads. Any such idea becomes a kernel if you say what is drawn (u), what it does to
# the position, and what undoes it (-u). The map with the second, (x, u) -> (x e^u, -u), is its own
# inverse: an *involution*. The acceptance probability, its Jacobian included, is worked out for
# you. (Spreads are positive, so the kernel sees their logarithms: there the stretch adds u.)


# %%
def factor(position, target):
    numpyro.sample("u", dist.Normal(0.0, 0.03))


def stretch(position, drawn, target):
    moved = {"centre": position["centre"] * jnp.exp(drawn["u"]),
             "spread": position["spread"] + drawn["u"]}  # fmt: skip
    return {**position, **moved}, {"u": -drawn["u"]}


move = block(involutive(factor, stretch, name="stretch"), ["centre", "spread"])

# %% [markdown]
# With real numbers there is a test by simulation. `check` draws parameters from the prior and data
# given them. Such parameters are exact draws from the posterior of their data, and after some steps
# of a right kernel they must still be. It tests the whole and every part by itself, since the
# mistakes of a part show more clearly there. *Geweke's test* goes on with the whole: new data, more
# steps, in turns, so that small mistakes add up. The values of the data do not matter, only how
# many there are: eleven galaxies will do.

# %%
checked = move if FAST else cycle([move, block(Gibbs(), "component")])  # every part compiles
right = ppl.check(
    galaxies, VELOCITY[::8], method=checked, replications=REPLICATIONS, geweke=not FAST
)
print(right)

# %% [markdown]
# Three centres are stretched, so the Jacobian is e^(3u). Those who derive the ratio by hand forget
# it, or take e^u. Say so, and the run does not start: the determinant is compared with automatic
# differentiation first.

# %%
careless = involutive(factor, stretch, log_det=lambda x, v, target: v["u"], name="stretch")
try:
    richer = cycle([sampler, block(careless, ["centre", "spread"])])
    ppl.infer(galaxies, VELOCITY, method=MCMC(richer))
except MethodError as error:
    print(error)

# %% [markdown]
# Other mistakes cannot be seen in the map. This proposal stretches upwards more often than
# downwards, and its author believes that the difference cancels, so that the density of u is left
# out of the ratio: the determinant he gives takes it out again. We let him have his way past the
# first inspection, by a subclass, to see whether the test finds out.


# %%
class Lopsided(type(careless)):
    """Draws u around +0.01, and does not say so in the ratio."""

    def trials(self, target, position, key):
        return {}


def upwards(position, target):
    numpyro.sample("u", dist.Normal(0.01, 0.03))


def cancelled(position, drawn, target):
    """Three centres' e^(3u), and log q(u) - log q(-u) taken out again."""
    law = dist.Normal(0.01, 0.03)
    return 3 * drawn["u"] + law.log_prob(drawn["u"]) - law.log_prob(-drawn["u"])


wrong = block(Lopsided(upwards, stretch, cancelled, "stretch"), ["centre", "spread"])
found = ppl.check(galaxies, VELOCITY[::8], method=wrong, replications=REPLICATIONS, geweke=not FAST)
print(found)

# %% [markdown]
# In a cycle with NUTS the same mistake is hard to see: NUTS repairs in every sweep what the wrong
# move spoils. That is why parts are tested by themselves, and why hand-written acceptance ratios
# have been wrong for years in libraries that had tests. What was found is drawn by `plot`, each
# shift in standard errors, with the grey range in which those of a right kernel stay:

# %%
found.plot()

# %% [markdown]
# ...and `found.save("check.html")` writes it as a page to send to the author of the move.

# %% [markdown]
# ## To remember
#
# - `block` gives every kernel the sites it can move, `cycle` and `mixture` put kernels together,
#   `repeat`, `tempered` and `ParallelTempering` make more of one.
# - A move of your own is an auxiliary draw and an involution; leave the Jacobian to the machine.
# - `ppl.check(model, *data, method=kernel)` before you trust it; on a finite model it is a proof.
#   Samplers that estimate the evidence, `SMC` say, have that compared with the truth as well.
