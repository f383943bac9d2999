"""Particle filters and smoothers beside particles and cuthbert.

    python benchmarks/particles.py [--rounds 3] [--parts filter,smoothing,memory,pmmh]

The peers are optional, and come in an environment of their own:

    pip install -e ".[bench,particles]"        # cuthbert, and numba for both
    pip install --no-deps particles==0.4       # it asks for NumPy 1, but runs with NumPy 2

All take turns in one process, round by round; figures are medians over rounds, ratios are taken
within a round first. CPU seconds count all threads. Cold is a first call, compilation included.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ["PPL_CACHE_DIR"] = "off"

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from measure import Cost, Work, cost_of, in_turns, machine, show_table
from numpyro.contrib.control_flow import scan

import ppl_toolkit as ppl
from ppl_toolkit.inference import PMMH, OnlineFilter, ParticleFilter
from ppl_toolkit.inference.paris import expectation, paris
from ppl_toolkit.inference.particle_filter import Filter, advance, first_population, follow
from ppl_toolkit.inference.state_space import Series, state_space
from ppl_toolkit.program import Program

PARTICLES, STEPS = 10_000, 1000  # of the filters
FEW, SHORT = 1000, 100  # of the smoothers
PARIS_STEPS = 5  # of the one smoother that takes minutes for more
MEMORY_PARTICLES, MEMORY_STEPS = 100, (10_000, 100_000, 1_000_000)
CHAINS, ITERATIONS, PMMH_PARTICLES = 4, 200, 100  # a chain: half of them warm-up
MU, RHO, SIGMA = -1.0, 0.95, 0.25
SPREAD = SIGMA / np.sqrt(1 - RHO**2)  # of the stationary law

INSTALL = {
    "cuthbert": "pip install -e '.[bench,particles]'",
    "particles": "pip install -e '.[bench,particles]' && pip install --no-deps particles==0.4",
}


def peer(name: str) -> Any:
    """A module of a peer, None if it is not installed. This file has the name of one of them."""
    here, path = Path(__file__).resolve().parent, sys.path[:]
    sys.path[:] = [p for p in path if Path(p or ".").resolve() != here]
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    finally:
        sys.path[:] = path


def ratios(theirs: list[Cost] | None, ours: list[Cost], scale: float = 1.0) -> list[float | None]:
    """Medians over rounds of theirs / ours in a round: CPU, wall clock."""
    if theirs is None:
        return [None, None]
    pairs = list(zip(theirs, ours, strict=True))
    return [
        scale * median(a.cpu / b.cpu for a, b in pairs),
        scale * median(a.wall / b.wall for a, b in pairs),
    ]


# -- stochastic volatility, three times ----------------------------------------------------------


def volatility(y: Any) -> None:
    """The start is a step before the first observation, and stationary as all states are."""
    start = numpyro.sample("x_0", dist.Normal(MU, SPREAD))

    def step(x: Any, y_t: Any) -> tuple[Any, None]:
        x = numpyro.sample("x", dist.Normal(MU + RHO * (x - MU), SIGMA))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, None

    scan(step, start, y)


def volatility_of(rho: Any, sigma: Any, y: Any) -> None:
    start = numpyro.sample("x_0", dist.Normal(MU, sigma / jnp.sqrt(1 - rho**2)))

    def step(x: Any, y_t: Any) -> tuple[Any, None]:
        x = numpyro.sample("x", dist.Normal(MU + rho * (x - MU), sigma))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, None

    scan(step, start, y)


def volatility_unknown(y: Any) -> None:
    rho = numpyro.sample("rho", dist.Uniform(0.5, 1.0))
    volatility_of(rho, numpyro.sample("sigma", dist.Uniform(0.05, 1.0)), y)


def observations(steps: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    noise, x = rng.standard_normal((2, steps)), MU
    y = np.empty(steps)
    for t in range(steps):
        x = MU + RHO * (x - MU) + SIGMA * noise[0, t]
        y[t] = np.exp(x / 2) * noise[1, t]
    return y


def compiled(y: np.ndarray, precision: str, run: Callable[[Any, Series], Any]) -> Work:
    """``run(key, series)``, compiled for a series with these observations."""
    program = Program(volatility, (y,), precision=precision)
    with program.context():
        space = state_space(program)
        function = jax.jit(lambda key, data: run(key, space.at(program, {}, data)))
        ready = function.lower(random.key(0), program.data).compile()

    def work(turn: int) -> Any:
        with program.context():
            return jax.block_until_ready(ready(random.key(turn), program.data))

    return work


# -- filters -------------------------------------------------------------------------------------


def our_filter(y: np.ndarray, precision: str, particles: int, ess: float, history: bool) -> Work:
    def run(key: Any, series: Series) -> Any:
        def watch(_: Any, own: Any, __: Any) -> Any:
            return own if history else None

        last, _, kept = follow(key, series, Filter(particles, ess=ess), watch)
        return last.log_evidence, kept

    work = compiled(y, precision, run)
    return lambda turn: float(work(turn)[0])


def cuthbert_filter(
    y: np.ndarray, precision: str, particles: int, ess: float, history: bool
) -> Work:
    """Written as its users do; jitted whole."""
    filtering, smc = peer("cuthbert.filtering"), peer("cuthbert.smc.particle_filter")
    resampling = peer("cuthbertlib.resampling")
    resample = resampling.systematic.resampling
    if ess < 1:
        resample = resampling.ess_decorator(resample, ess)

    def log_normal(x: Any, scale: Any) -> Any:
        return -0.5 * (x / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)

    own = smc.build_filter(
        lambda key: MU + SPREAD * random.normal(key),
        lambda key, x, y_t: MU + RHO * (x - MU) + SIGMA * random.normal(key),
        lambda _, x, y_t: log_normal(y_t, jnp.exp(x / 2)),
        particles,
        resample,
    )

    def run(key: Any, y: Any) -> Any:
        key_start, key_steps = random.split(key)
        states = filtering.filter(own, y, own.init_prepare(key=key_start), key=key_steps)
        return states.log_normalizing_constant[-1], states if history else None

    @contextlib.contextmanager
    def precise() -> Iterator[None]:
        """For all threads: its resampling calls back into Python from another one."""
        jax.config.update("jax_enable_x64", precision == "float64")
        try:
            yield
        finally:
            jax.config.update("jax_enable_x64", False)

    with precise():
        data = np.asarray(y, precision)
        ready = jax.jit(run).lower(random.key(0), data).compile()

    def work(turn: int) -> float:
        with precise():
            return float(jax.block_until_ready(ready(random.key(turn), data))[0])

    return work


@functools.cache
def particles_model() -> Any:
    """Stochastic volatility of `particles`, with what its smoothers need."""
    models = peer("particles.state_space_models")

    class Volatility(models.StochVol):
        def upper_bound_log_pt(self, t: int) -> float:
            return -np.log(self.sigma) - 0.5 * np.log(2 * np.pi)

    class Summed(models.Bootstrap):
        def add_func(self, t: int, xp: Any, x: Any) -> Any:
            return x

    return Volatility, Summed


def particles_run(
    y: np.ndarray, particles: int, ess: float, history: bool, *collect: Any
) -> Callable[[int], Any]:
    model, summed = particles_model()
    bound = summed(ssm=model(mu=MU, rho=RHO, sigma=SIGMA), data=y)

    def run(turn: int) -> Any:
        np.random.seed(turn)  # noqa: NPY002 (what it draws with)
        own = peer("particles").SMC(
            fk=bound, N=particles, ESSrmin=ess, store_history=history,
            collect=[one() for one in collect],
        )  # fmt: skip
        own.run()
        return own

    return run


def particles_filter(y: np.ndarray, particles: int, ess: float, history: bool) -> Work:
    run = particles_run(y, particles, ess, history)
    return lambda turn: float(run(turn).logLt)


def filter_engines(there: Mapping[str, bool]) -> dict[str, Callable[..., Work]]:
    engines: dict[str, Callable[..., Work]] = {
        f"ours, {precision}": lambda y, *more, p=precision: our_filter(y, p, *more)
        for precision in ("float64", "float32")
    }
    if there["cuthbert"]:
        engines |= {
            f"cuthbert, {precision}": lambda y, *more, p=precision: cuthbert_filter(y, p, *more)
            for precision in ("float64", "float32")
        }
    if there["particles"]:
        engines["particles"] = particles_filter
    return engines


def filter_rows(rounds: int, there: Mapping[str, bool]) -> list[list[Any]]:
    y, rows = observations(STEPS), []
    for ess, history in ((0.5, False), (0.5, True), (1.0, False), (1.0, True)):
        works, cold = {}, {}
        for name, make in filter_engines(there).items():

            def begin(make: Any = make, ess: float = ess, history: bool = history) -> Work:
                work = make(y, PARTICLES, ess, history)
                work(0)
                return work

            cost, works[name] = cost_of(begin)
            cold[name] = cost.cpu
        costs, given = in_turns(rounds, works)
        title = f"{'always' if ess == 1 else 'ESS .5'}, {'' if history else 'no '}history"
        for name, own in costs.items():
            kin = f"cuthbert, {name[-7:]}" if name != "particles" else "cuthbert, float64"
            rows.append(
                [f"{title}: {name}", cold[name], median(c.cpu for c in own),
                 median(c.wall for c in own), *ratios(costs.get("particles"), own),
                 *ratios(costs.get(kin), own), f"{mean(given[name]):.2f}"]
            )  # fmt: skip
    return rows


# -- smoothers: E[sum_t x_t | y] -----------------------------------------------------------------


def volatility_sum(carry: Any, latents: Mapping[str, Any], t: Any) -> Any:
    return latents["x"]


def no_sum(initial: Mapping[str, Any]) -> Any:
    return jnp.zeros(())


def genealogical(key: Any, series: Series, particles: int) -> Any:
    """Sums along the ancestors of every particle."""
    options = Filter(particles)

    def step(state: Any, t: Any) -> tuple[Any, None]:
        population, sums = state
        new, history, _ = advance(random.fold_in(key, t + 1), series, population, t, options)
        return (new, sums[history.ancestors] + history.latents["x"]), None

    first, _ = first_population(random.fold_in(key, 0), series, particles)
    start = (first, jnp.zeros(particles))
    return expectation(*jax.lax.scan(step, start, jnp.arange(series.length))[0])


def our_smoother(y: np.ndarray, precision: str, kind: str, particles: int = FEW) -> Work:
    draws = {"exact sums, O(N^2)": None, "PaRIS, 2 draws": 2}

    def run(key: Any, series: Series) -> Any:
        if kind == "genealogy":
            return genealogical(key, series, particles)
        return paris(key, series, Filter(particles), volatility_sum, no_sum, draws[kind])[1]

    work = compiled(y, precision, run)
    return lambda turn: float(work(turn))


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """`Paris` of particles 0.4 puts arrays of one number in place of numbers: NumPy refuses."""
    resampling = peer("particles.resampling")
    own = resampling.MultinomialQueue

    class One(own):
        def dequeue(self, k: int) -> Any:
            found = super().dequeue(k)
            return found[0] if k == 1 else found

    resampling.MultinomialQueue = One
    try:
        yield
    finally:
        resampling.MultinomialQueue = own


def particles_smoother(y: np.ndarray, collector: str) -> Work:
    one = getattr(peer("particles.collectors"), collector)
    run = particles_run(y, FEW, 0.5, False, one)

    def work(turn: int) -> float:
        with mended():
            own = run(turn)
        return float(getattr(own.summaries, one().summary_name)[-1])

    return work


THEIRS = {
    "genealogy": "Online_smooth_naive",
    "exact sums, O(N^2)": "Online_smooth_ON2",
    "PaRIS, 2 draws": "Paris",
}


def smoothing_rows(rounds: int, there: Mapping[str, bool]) -> list[list[Any]]:
    y, rows = observations(SHORT), []
    slowest: list[Cost] | None = None
    for kind, collector in THEIRS.items():
        slow = kind.startswith("PaRIS")
        steps, times = (PARIS_STEPS, 1) if slow else (SHORT, rounds)  # of particles
        works, cold = {}, {}
        for precision in ("float64", "float32"):
            name = f"ours, {precision}"

            def begin(precision: str = precision, kind: str = kind) -> Work:
                work = our_smoother(y, precision, kind)
                work(0)
                return work

            cost, works[name] = cost_of(begin)
            cold[name] = cost.cpu
        costs, given = in_turns(rounds, works)
        if there["particles"]:
            theirs, found = in_turns(times, {"particles": particles_smoother(y[:steps], collector)})
            scale = SHORT / steps
            mine = [Cost(c.cpu * scale, c.wall * scale) for c in theirs["particles"]]
            costs["particles"] = mine * (rounds // times)
            given["particles"] = found["particles"]
        peers = costs.get("particles")
        slowest = peers if kind.startswith("exact") else slowest
        for name, own in costs.items():
            part = slow and name == "particles"
            rows.append(
                [f"{kind}: {name}", cold.get(name), median(c.cpu for c in own),
                 median(c.wall for c in own), *ratios(peers, own),
                 ratios(slowest, own)[0], "-" if part else f"{mean(given[name]):.1f}",
                 f"{steps} steps, extrapolated" if part else f"{SHORT} steps"]
            )  # fmt: skip
    return rows


# -- memory --------------------------------------------------------------------------------------


def memory_of(engine: str, steps: int) -> None:
    """Prints the growth of this process's peak memory while the engine runs, and its seconds."""

    def peak() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    y = observations(steps)
    works = {
        "our OnlineFilter": lambda: our_online_filter(y),
        "our filter": lambda: our_filter(y, "float64", MEMORY_PARTICLES, 0.5, False),
        "our PaRIS": lambda: our_smoother(y, "float64", "PaRIS, 2 draws", MEMORY_PARTICLES),
        "cuthbert": lambda: cuthbert_filter(y, "float64", MEMORY_PARTICLES, 0.5, False),
        "particles": lambda: particles_filter(y, MEMORY_PARTICLES, 0.5, False),
    }
    work = works[engine]()
    before = peak()
    cost, _ = cost_of(lambda: work(0))
    print(json.dumps([peak() - before, cost.cpu]))


def our_online_filter(y: np.ndarray) -> Work:
    """In blocks of 1000 steps."""
    method = ParticleFilter(MEMORY_PARTICLES)
    online = OnlineFilter(volatility, y[:1000], method=method)

    def work(turn: int) -> float:
        state = online.start(turn)
        for begin in range(1000, len(y), 1000):
            state = online.update(state, y[begin : begin + 1000])
        return state.log_evidence

    online.update(online.start(0), y[1000:2000])  # compiles
    return work


def memory_rows(rounds: int, there: Mapping[str, bool]) -> list[list[Any]]:
    rows = []
    longest = dict(zip(("particles", "our PaRIS", "our filter"), MEMORY_STEPS, strict=True))
    longest["cuthbert"] = longest["our PaRIS"]
    longest["our OnlineFilter"] = longest["our filter"]
    for engine in [n for n in longest if there.get(n, True)]:
        row: list[Any] = [engine]
        for steps in MEMORY_STEPS:
            if steps > longest[engine]:
                row += [None, None]
                continue
            command = [sys.executable, __file__, "--memory-of", engine, str(steps)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            row += json.loads(output.splitlines()[-1])
        rows.append(row)
    return rows


# -- parameters ----------------------------------------------------------------------------------


def our_pmmh(y: np.ndarray) -> Work:
    def work(turn: int) -> Any:
        half = ITERATIONS // 2
        return ppl.infer(
            volatility_unknown, y, method=PMMH(particles=PMMH_PARTICLES), chains=CHAINS,
            warmup=half, draws=half, seed=turn, progress=False,
        )["posterior"]  # fmt: skip

    return lambda turn: tuple(float(work(turn)[name].mean()) for name in ("rho", "sigma"))


def particles_pmmh(y: np.ndarray) -> Work:
    """One chain after the other."""
    laws, mcmc = peer("particles.distributions"), peer("particles.mcmc")
    models = peer("particles.state_space_models")

    class Centred(models.StochVol):
        default_params = {"mu": MU, "rho": RHO, "sigma": SIGMA}  # noqa: RUF012 (its way)

    class Prior(laws.StructDist):  # mended as `Paris`
        def logpdf(self, theta: Any) -> Any:
            return super().logpdf(theta)[0]

    prior = Prior({"rho": laws.Uniform(0.5, 1.0), "sigma": laws.Uniform(0.05, 1.0)})

    def work(turn: int) -> tuple[float, float]:
        np.random.seed(turn)  # noqa: NPY002
        found = []
        for _ in range(CHAINS):
            own = mcmc.PMMH(
                niter=ITERATIONS, ssm_cls=Centred, prior=prior, data=y, Nx=PMMH_PARTICLES,
                rw_cov=0.01 * np.eye(2),
            )  # fmt: skip
            own.run()
            found.append(own.chain.theta[ITERATIONS // 2 :])
        return tuple(float(np.mean([f[name].mean() for f in found])) for name in ("rho", "sigma"))

    return work


def pmmh_rows(rounds: int, there: Mapping[str, bool]) -> list[list[Any]]:
    y = observations(SHORT)
    works = {"ours, float64": our_pmmh(y)}
    cold = {"ours, float64": cost_of(lambda: works["ours, float64"](0))[0].cpu}
    if there["particles"]:
        works["particles"] = particles_pmmh(y)
    costs, given = in_turns(rounds, works)
    count = CHAINS * ITERATIONS / 1000
    return [
        [name, cold.get(name), median(c.cpu for c in own) / count,
         median(c.wall for c in own) / count, *ratios(costs.get("particles"), own),
         *(f"{mean(x):.2f}" for x in zip(*given[name], strict=True))]
        for name, own in costs.items()
    ]  # fmt: skip


PARTS: dict[str, tuple[str, list[str], Callable[..., list[list[Any]]]]] = {
    "filter": (
        f"Bootstrap filter: stochastic volatility, {PARTICLES:,} particles, {STEPS:,} steps",
        ["resampling, kept: engine", "cold CPU s", "CPU s", "wall s", "particles / this, CPU",
         "wall", "cuthbert / this, CPU", "wall", "log Z"],
        filter_rows,
    ),
    "smoothing": (
        f"Online smoothing of the sum of all states: {FEW:,} particles, {SHORT} steps",
        ["way: engine", "cold CPU s", "CPU s", "wall s", "particles / this, CPU", "wall",
         "particles' O(N^2) / this, CPU", "estimate", "measured"],
        smoothing_rows,
    ),
    "memory": (
        f"Growth of the peak memory in a run: {MEMORY_PARTICLES} particles, a process each",
        ["engine", *(cell for t in MEMORY_STEPS for cell in (f"T = {t:.0e}, MB", "CPU s"))],
        memory_rows,
    ),
    "pmmh": (
        f"PMMH: {CHAINS} chains of {ITERATIONS}, {PMMH_PARTICLES} particles, {SHORT} steps",
        ["engine", "cold CPU s", "CPU ms / iteration of a chain", "wall ms",
         "particles / this, CPU", "wall", "mean of rho", "of sigma"],
        pmmh_rows,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory_of:
        memory_of(options.memory_of[0], int(options.memory_of[1]))
        return
    there = {name: peer(name) is not None for name in ("particles", "cuthbert")}
    print(machine("ppl_toolkit", "jax", "numpyro", "numpy", *(n for n in there if there[n])))
    for name in (name for name, found in there.items() if not found):
        print(f"without {name}, which is not installed: {INSTALL[name]}")
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}; rounds: {options.rounds}")
    for part in options.parts.split(","):
        title, header, rows = PARTS[part]
        show_table(title, header, rows(options.rounds, there))


if __name__ == "__main__":
    main()
