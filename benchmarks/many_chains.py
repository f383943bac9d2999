"""Many short chains: ChEES and MAMS beside blackjax's ChEES and NumPyro's NUTS with as many.

    python benchmarks/many_chains.py [--rounds 3]

64 chains of 128 draws on two models, all in float64 in this one process. blackjax is as its
documentation has it, whole run in one jitted program (Adam with a learning rate of 0.02, 400
iterations of warm-up, with and without its diagonal metric); NumPyro's NUTS is vectorised, with 400
iterations of warm-up. Ours is a call of `infer`, labels and findings included, and beside it the
warm-up and the draws alone, as the others are; NUTS with four chains of 1000 draws, as it is by
default, is shown as well. The ways take turns; figures are medians over rounds, calls after the
first one. The least of bulk and tail ESS of the parameters is counted; gradients are those of the
kept draws.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

os.environ["PPL_CACHE_DIR"] = "off"

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from examples import EXAMPLES
from jax import lax, random
from measure import cost_inside, cost_of, machine, show_table
from peers import Data, Sample, Sampler, flattened, jitted, numpyro_jitted, sample_of
from sklearn.datasets import load_breast_cancer

import ppl_toolkit as ppl
from ppl_toolkit import convergence, runner
from ppl_toolkit.inference import MAMS, ChEES

CHAINS, WARMUP, DRAWS = 64, 400, 128


def logistic(x: Any, y: Any = None) -> None:
    """Thirty correlated predictors of a tumour's kind, shrunk together."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    level = numpyro.sample("level", dist.Normal(0.0, 2.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, scale).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=level + x @ slopes), obs=y)


def models() -> dict[str, tuple[Callable, Data, tuple[str, ...]]]:
    """By name: a model, its data and its parameters."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    schools, data = EXAMPLES["eight schools"]
    return {
        "eight schools": (schools, data, ("mu", "tau", "theta")),
        "logistic regression": (logistic, Data((x,), {"y": y}), ("scale", "level", "slopes")),
    }


def ours(method: Any, model: Callable, data: Data, chains: int | None = None) -> Sampler:
    def sample(seed: int, data: Data) -> Sample:
        tree = ppl.infer(
            model, *data.args, method=method, seed=seed, chains=chains, progress=False,
            data=data.kwargs,
        )  # fmt: skip
        return sample_of(tree)

    return sample


def blackjax_chees(model: Callable, data: Data, metric: str | None) -> Sampler:
    """The recipe of its documentation in one jitted program."""
    flat, bind = flattened(model, data)

    def run(seed: Any, arrays: list[Any]) -> Any:
        log_density, values = bind(arrays)
        key_start, key_warmup, key_draws = random.split(random.key(seed), 3)
        starts = random.uniform(key_start, (CHAINS, flat.size), flat.dtype, -2.0, 2.0)
        adaptation = blackjax.chees_adaptation(
            log_density, CHAINS, mass_matrix_estimation=metric,
            adaptation_info_fn=lambda state, info, _: info.num_integration_steps,
        )  # fmt: skip
        (states, tuned), info = adaptation.run(
            key_warmup, starts, 0.1, optax.adam(0.02), WARMUP, max_sampling_steps=DRAWS
        )
        step = blackjax.dhmc(log_density, **tuned).step

        def draw(states: Any, key: Any) -> tuple[Any, tuple]:
            states, info = jax.vmap(step)(random.split(key, CHAINS), states)
            return states, (states.position, info.num_integration_steps)

        _, (positions, steps) = lax.scan(draw, states, random.split(key_draws, DRAWS))
        positions = jnp.swapaxes(positions, 0, 1)
        return jax.vmap(jax.vmap(values))(positions), jnp.sum(info._wrapped_info), jnp.sum(steps)

    return jitted(run, data)


class Call(NamedTuple):
    """One call, boiled down to numbers."""

    cpu: float
    loop: float  # CPU seconds of warm-up and draws (ours only, else those of the call)
    ess: float
    gradients: int
    warmup_gradients: int


def least_ess(values: dict[str, np.ndarray], names: tuple[str, ...]) -> float:
    draws = [values[name].reshape(*values[name].shape[:2], -1) for name in names]
    numbers = convergence.ranked(np.concatenate(draws, -1))
    return float(np.min([numbers["ess_bulk"], numbers["ess_tail"]]))


def compared(name: str, rounds: int) -> list[list[Any]]:
    model, data, names = models()[name]
    ways: dict[str, Sampler] = {
        "ChEES": ours(ChEES(), model, data),
        "MAMS": ours(MAMS(), model, data),
        "NUTS, 4 chains of 1000": ours("nuts", model, data),
        "blackjax ChEES": blackjax_chees(model, data, None),
        "blackjax ChEES, diagonal": blackjax_chees(model, data, "diagonal"),
        "NumPyro NUTS, 64 chains": numpyro_jitted(model, data, WARMUP, DRAWS, CHAINS),
    }
    for sample in ways.values():  # warm
        sample(0, data)
    calls: dict[str, list[Call]] = {way: [] for way in ways}
    for turn in range(1, rounds + 1):
        for way, sample in ways.items():
            with cost_inside(runner.Run, "chunks") as inside:
                cost, drawn = cost_of(lambda sample=sample, turn=turn: sample(turn, data))
            loop = sum(part.cpu for part in inside) or cost.cpu
            ess = least_ess(drawn.values, names)
            calls[way].append(Call(cost.cpu, loop, ess, drawn.gradients, drawn.warmup_gradients))

    def middle(way: str, number: Callable[[Call], float]) -> float:
        return median(number(call) for call in calls[way])

    rates = {way: middle(way, lambda call: call.ess / call.loop) for way in ways}
    return [
        [
            way,
            middle(way, lambda call: call.cpu),
            middle(way, lambda call: call.loop),
            middle(way, lambda call: call.ess),
            rates[way],
            1000 * middle(way, lambda call: call.ess / call.gradients),
            middle(way, lambda call: call.gradients / 1000),
            middle(way, lambda call: call.warmup_gradients / 1000),
            rates[way] / rates["blackjax ChEES"],
        ]
        for way in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("ppl_toolkit", "jax", "numpyro", "blackjax"))
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}; rounds: {options.rounds}")
    for name in models():
        show_table(
            name,
            ["way", "CPU s", "of it in the loop", "least ESS", "ESS / CPU s in the loop",
             "ESS / 1000 gradients", "1000 gradients", "of warm-up", "to blackjax ChEES"],
            compared(name, options.rounds),
        )  # fmt: skip


if __name__ == "__main__":
    main()
