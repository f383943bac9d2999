"""NUTS on real posteriors: ours beside NumPyro and a hand-written blackjax loop.

    python benchmarks/mcmc.py DATA [--models a,b] [--rounds 5] [--draws 1000] [--peers a,b]
                              [--nutpie-python PATH] [--posteriordb CLONE]

DATA is the folder of posteriors that `posteriordb.load` reads. All engines run in this one
process (nutpie, for the posteriors that have a PyMC form, in one beside it): first each makes its
first call on a model (cold: nothing compiled, no caches on disk), then they take turns for some
rounds, each round with a new seed and new data of the same shape (every number scaled by a few
millionths; counts and labels stay). Medians over rounds are shown. An engine that fails on a
posterior is left out from there on, and what the others did is shown; the exit code tells.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

os.environ["PPL_CACHE_DIR"] = "off"

import jax
import numpy as np
import nutpie_peer
from measure import cost_inside, cost_of, counted_compilations, geometric_mean, machine, show_table
from peers import DEFAULTS, ENGINES, TUNED, Data, Engine, Sample, Sampler
from posteriordb import NAMES, Posterior, load
from posteriordb_clone import load_clone

from ppl_toolkit import convergence, executables, runner

SLOW = ("lotka_volterra",)  # an ordinary differential equation: minutes with every engine
BROKEN = ("eight_schools_centered",)  # no sampler here draws from it rightly
BAR = (  # posteriors on which the bar for sampling time is set
    "eight_schools_noncentered", "kidscore_momhsiq", "arK", "garch11", "hmm_example",
    "low_dim_gauss_mix", "gp_regr",
)  # fmt: skip
MOST_SIGMAS = 4.5  # means further than this from the reference disqualify a run


class Call(NamedTuple):
    """One call of a sampler, its draws boiled down to numbers."""

    cpu: float
    sampling: float  # CPU seconds within the sampling loop (ours only, else those of the call)
    gradients: int | None
    kept_gradients: int
    ess: float
    sigmas: float


class Calls(NamedTuple):
    """What an engine did on a posterior."""

    cold: float
    calls: list[Call]
    compilations: int

    def median(self, field: str) -> float:
        return median(getattr(call, field) for call in self.calls)

    @property
    def right(self) -> bool:
        return max(call.sigmas for call in self.calls) < MOST_SIGMAS


def judged(posterior: Posterior, sample: Sample) -> tuple[float, float]:
    """The least bulk ESS of the scalars, and the largest distance of a mean in standard errors."""
    scalars = posterior.scalars(sample.values)
    reference = [posterior.reference[name] for name in scalars]
    draws = np.stack(list(scalars.values()), axis=-1).astype(float)
    numbers = convergence.convergence(draws)
    mean, mcse = (np.array([row[key] for row in reference]) for key in ("mean", "mcse"))
    sigmas = np.abs(numbers["mean"] - mean) / np.hypot(numbers["mcse_mean"], mcse)
    return float(np.min(numbers["ess_bulk"])), float(np.max(sigmas))


def moved(data: Data, amount: float) -> Data:
    """New data of the same shape, with practically the same posterior."""
    return data.with_arrays(
        [np.asarray(x * (1.0 + amount)) if x.dtype.kind == "f" else x for x in data.arrays()]
    )


def one_call(posterior: Posterior, sampler: Sampler, seed: int, data: Data) -> Call:
    with cost_inside(runner.Run, "chunks") as inside:
        cost, sample = cost_of(lambda: sampler(seed, data))
    ess, sigmas = judged(posterior, sample)
    warmup = sample.warmup_gradients
    return Call(
        cpu=cost.cpu if sample.cpu is None else sample.cpu,
        sampling=sum(part.cpu for part in inside) or cost.cpu,
        gradients=None if warmup is None else warmup + sample.gradients,
        kept_gradients=sample.gradients,
        ess=ess,
        sigmas=sigmas,
    )


@contextlib.contextmanager
def surviving(what: str, failed: list[str]) -> Iterator[None]:
    """A block whose failure is told at once and noted in ``failed``; what follows goes on."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        print(f"{what} failed", file=sys.stderr)
        failed.append(what)


def compare(
    posterior: Posterior,
    engines: Mapping[str, Engine],
    rounds: int,
    draws: int,
    failed: list[str],
) -> dict[str, Calls]:
    """Every engine on one posterior: its first call, then ``rounds`` calls in turn.

    An engine that fails is noted in ``failed`` and called no more.
    """
    label = {engine: f"{posterior.name} {engine}" for engine in engines}
    data = Data(posterior.args, posterior.kwargs)
    samplers: dict[str, Sampler] = {}
    cold: dict[str, float] = {}

    def first(name: str) -> Callable[[], Sample]:
        def work() -> Sample:
            samplers[name] = engines[name](posterior.model, data, draws, draws)
            return samplers[name](0, data)

        return work

    for name in reversed(engines):
        with surviving(label[name], failed):
            jax.clear_caches()
            executables.clear()
            cost, sample = cost_of(first(name))
            cold[name] = cost.cpu if sample.cpu is None else sample.cpu
    calls: dict[str, list[Call]] = {engine: [] for engine in engines}
    compilations = dict.fromkeys(engines, 0)
    for turn in range(rounds):
        for engine in engines:
            if label[engine] in failed:
                continue
            with surviving(label[engine], failed):
                with counted_compilations() as compiled:
                    call = one_call(posterior, samplers[engine], turn + 1, moved(data, 1e-6 * turn))
                calls[engine].append(call)
                compilations[engine] += len(compiled)
    return {e: Calls(cold[e], calls[e], compilations[e]) for e in engines if calls[e]}


def engine_row(name: str, engine: str, run: Calls) -> list[Any]:
    gradients = [call.gradients for call in run.calls]
    kept = run.median("kept_gradients") / 1e3
    warmup = None if None in gradients else run.median("gradients") / 1e3 - kept
    return [
        f"{name} {engine}",
        run.cold,
        run.median("cpu"),
        run.median("sampling") if engine == "ours" else None,
        run.compilations,
        f"{'?' if warmup is None else f'{warmup:.0f}'} + {kept:.0f}",
        run.median("ess"),
        median(call.ess / call.cpu for call in run.calls),
        f"{max(call.sigmas for call in run.calls):.1f}" + ("" if run.right else " WRONG"),
    ]


HEADER = (
    "posterior, engine", "cold CPU s", "call CPU s", "of it sampling", "compilations",
    "1000 gradients", "ESS", "ESS / CPU s", "max z",
)  # fmt: skip
RATIOS = (
    "posterior", "cold", "call", "sampling", "call per gradient", "sampling per gradient",
    "ESS / CPU s",
)  # fmt: skip


def ratios(own: Calls, peer: Calls) -> list[float | None]:
    """Ours over the peer's, round by round, as medians: the columns of `RATIOS`."""
    pairs = list(zip(own.calls, peer.calls, strict=False))  # one that failed has fewer rounds

    def ratio(field: str) -> float:
        return median(getattr(a, field) / b.cpu for a, b in pairs)

    def per_gradient(field: str) -> float | None:
        if any(b.gradients is None for _, b in pairs):
            return None
        return median(getattr(a, field) / a.gradients / (b.cpu / b.gradients) for a, b in pairs)

    return [
        own.cold / peer.cold,
        ratio("cpu"),
        ratio("sampling"),
        per_gradient("cpu"),
        per_gradient("sampling"),
        median((a.ess / a.cpu) / (b.ess / b.cpu) for a, b in pairs),
    ]


def show_ratios(peer: str, found: dict[str, dict[str, Calls]]) -> None:
    rows = {name: ratios(runs["ours"], runs[peer]) for name, runs in found.items()}
    table = [[name, *row] for name, row in rows.items()]
    for label, names in (("the bar's", [n for n in rows if n in BAR]), ("all", list(rows))):
        if names:
            columns = zip(*(rows[name] for name in names), strict=True)
            means = [None if None in column else geometric_mean(column) for column in columns]
            table.append([f"geometric mean of {label} {len(names)}", *means])
    show_table(f"Ours / {peer} (medians over rounds of the ratio in a round)", RATIOS, table)


STANDING = (
    "posterior", "ours: ESS / CPU s", "best default", "ours / it", "best tuned", "ours / it",
    "gradients / ESS: ours / NumPyro", "warm-up gradients: ours / nutpie", "cold: ours / fastest",
)  # fmt: skip


def speed(run: Calls, field: str = "cpu") -> float:
    """Median effective draws per CPU second of warm-up and draws; none for wrong ones."""
    return median(call.ess / getattr(call, field) for call in run.calls) if run.right else 0.0


def gradients_per_draw(run: Calls) -> float:
    return median(call.gradients / call.ess for call in run.calls)


def warmup_gradients(run: Calls) -> float:
    return median(call.gradients - call.kept_gradients for call in run.calls)


def standing(runs: dict[str, Calls]) -> list[Any]:
    """Ours beside the best of the peers with their defaults, and of those tuned by hand."""
    own = runs["ours"]
    row: list[Any] = [speed(own, "sampling")]
    for group in (DEFAULTS, TUNED):
        speeds = {name: speed(runs[name]) for name in group if name in runs}
        best = max(speeds, key=lambda name: speeds[name], default=None)
        row += [best, row[0] / speeds[best] if best and speeds[best] else None]
    row.append(
        gradients_per_draw(own) / gradients_per_draw(runs["numpyro"]) if "numpyro" in runs else None
    )
    other = runs.get("nutpie")
    row.append(warmup_gradients(own) / warmup_gradients(other) if other else None)
    others = [run.cold for name, run in runs.items() if name != "ours"]
    row.append(own.cold / min(others) if others else None)
    return row


def show_standing(found: dict[str, dict[str, Calls]]) -> None:
    rows = [[name, *standing(runs)] for name, runs in found.items()]
    means: list[Any] = ["geometric mean"]
    for column in list(zip(*rows, strict=True))[1:]:
        numbers = [x for x in column if isinstance(x, float)]
        means.append(geometric_mean(numbers) if numbers else None)
    show_table(
        "Ours with default settings beside the best peers (our CPU time within the sampling loop, "
        "warm-up included; theirs of the call)",
        STANDING,
        [*rows, means],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="folder of the posteriors")
    parser.add_argument("--models", help="comma-separated; all but the slow and the broken ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1000, help="of warm-up, and as many to keep")
    parser.add_argument("--peers", default="numpyro,blackjax")
    parser.add_argument("--nutpie-python", help="a Python that has nutpie and PyMC")
    parser.add_argument("--posteriordb", help="a clone of stan-dev/posteriordb: four more")
    options = parser.parse_args()
    posteriors = load(options.data)
    peers = {name: ENGINES[name] for name in options.peers.split(",")}
    names = [name for name in NAMES if name not in SLOW + BROKEN]
    if options.posteriordb:
        more = load_clone(options.posteriordb)
        posteriors, names = {**posteriors, **more}, [*names, *more]
    if options.models:
        names = options.models.split(",")
    print(machine("ppl_toolkit", "jax", "numpyro", "blackjax"))
    found: dict[str, dict[str, Calls]] = {}
    rows: list[list[Any]] = []
    failed: list[str] = []
    for name in names:
        engines = {"ours": ENGINES["ours"], **peers}
        with surviving(name, failed), contextlib.ExitStack() as stack:
            posterior = posteriors[name]
            if options.nutpie_python and posterior.model.__name__ in nutpie_peer.MODELS:
                python = options.nutpie_python
                engines["nutpie"] = nutpie_peer.engine(python, stack)
                engines["nutpie low rank"] = nutpie_peer.engine(python, stack, low_rank=True)
            runs = compare(posterior, engines, options.rounds, options.draws, failed)
            new = [engine_row(name, engine, run) for engine, run in runs.items()]
            found[name], rows = runs, [*rows, *new]
            with contextlib.redirect_stdout(sys.stderr):
                show_table(f"{name} done", HEADER, new)
    size = f"4 chains x ({options.draws} + {options.draws}), medians of {options.rounds} rounds"
    show_table(f"Calls ({size})", HEADER, rows)
    compared = {name: runs for name, runs in found.items() if "ours" in runs}
    if compared:
        show_standing(compared)
    for peer in (*peers, "nutpie", "nutpie low rank"):
        both = {name: runs for name, runs in compared.items() if peer in runs}
        if both:
            show_ratios(peer, both)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
