"""nutpie on PyMC models, in a Python environment of its own, asked through a pipe.

As a script (run by the Python that has nutpie and PyMC) it answers one JSON line per request, so
that one process keeps its compiled model between requests. `engine` makes the sampler that asks.
"""

import contextlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MODELS", "engine"]

CHAINS = 4


def eight_schools_noncentered(pm: Any, data: Mapping[str, Any]) -> None:
    mu = pm.Normal("mu", 0.0, 5.0)
    tau = pm.HalfCauchy("tau", 5.0)
    theta_raw = pm.Normal("theta_raw", 0.0, 1.0, shape=8)
    theta = pm.Deterministic("theta", mu + tau * theta_raw)
    pm.Normal("effect", theta, data["sigma"], observed=data["y"])


def kidscore_momhsiq(pm: Any, data: Mapping[str, Any]) -> None:
    beta = pm.Flat("beta", shape=3)
    sigma = pm.HalfCauchy("sigma", 2.5)
    mean = beta[0] + beta[1] * data["mom_hs"] + beta[2] * data["mom_iq"]
    pm.Normal("score", mean, sigma, observed=data["kid_score"])


def autoregression(pm: Any, data: Mapping[str, Any]) -> None:
    alpha = pm.Normal("alpha", 0.0, 10.0)
    beta = pm.Normal("beta", 0.0, 10.0, shape=5)
    sigma = pm.HalfCauchy("sigma", 2.5)
    pm.Normal("value", alpha + data["lags"] @ beta, sigma, observed=data["y"])


def wells(pm: Any, data: Mapping[str, Any]) -> None:
    alpha, beta = pm.Flat("alpha"), pm.Flat("beta")
    logit = alpha + beta * data["distance"]
    pm.Bernoulli("was_switched", logit_p=logit, observed=data["switched"])


def radon(pm: Any, data: Mapping[str, Any]) -> None:
    sigma_alpha = pm.HalfNormal("sigma_alpha", 1.0)
    sigma = pm.HalfNormal("sigma_y", 1.0)
    mu = pm.Normal("mu_alpha", 0.0, 10.0)
    beta = pm.Normal("beta", 0.0, 10.0, shape=2)
    raw = pm.Normal("alpha_raw", 0.0, 1.0, shape=85)
    slopes = data["uranium"] * beta[0] + data["floor"] * beta[1]
    mean = (mu + sigma_alpha * raw)[data["county"].astype("int64")] + slopes
    pm.Normal("measured", mean, sigma, observed=data["level"])


MODELS = {
    f.__name__: f
    for f in (eight_schools_noncentered, kidscore_momhsiq, autoregression, wells, radon)
}


def engine(python: str, stack: contextlib.ExitStack, low_rank: bool = False) -> Callable[..., Any]:
    """An engine like those of `peers`, in the environment of ``python``; ``stack`` ends it."""
    from peers import Data, Sample

    def make(model: Callable, data: Data, warmup: int, draws: int) -> Callable[[int, Data], Sample]:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        caches = {"PYTENSOR_FLAGS": f"base_compiledir={folder}", "NUMBA_CACHE_DIR": folder}
        process = stack.enter_context(
            subprocess.Popen(
                [python, __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **caches},
            )
        )  # fmt: skip
        process.stdout.readline()  # imports are done

        def sample(seed: int, data: Data) -> Sample:
            arguments = inspect.signature(model).bind(*data.args, **data.kwargs).arguments
            file = Path(folder) / "draws.npz"
            request = {
                "model": model.__name__, "warmup": warmup, "draws": draws, "seed": seed,
                "data": {k: np.asarray(v).tolist() for k, v in arguments.items()},
                "file": str(file), "low_rank": low_rank,
            }  # fmt: skip
            print(json.dumps(request), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            with np.load(file) as stored:
                return Sample(dict(stored), *answer["gradients"], answer["cpu"])

        return sample

    return make


def serve() -> None:
    """Answer requests: the first compiles, all sample."""
    import nutpie
    import pymc

    compiled = None
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        data = {name: np.asarray(values) for name, values in request["data"].items()}
        begin = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            if compiled is None:
                with pymc.Model() as model:
                    held = {name: pymc.Data(name, values) for name, values in data.items()}
                    MODELS[request["model"]](pymc, held)
                compiled = nutpie.compile_pymc_model(model)
            tree = nutpie.sample(
                compiled.with_data(**data), draws=request["draws"], tune=request["warmup"],
                chains=CHAINS, seed=request["seed"], target_accept=0.8, progress_bar=False,
                adaptation="low_rank" if request["low_rank"] else "diag",
            )  # fmt: skip
            values = {str(k): v.values for k, v in tree["posterior"].data_vars.items()}
        cpu = time.process_time() - begin
        np.savez(request["file"], **values)
        steps = [int(tree[g]["n_steps"].sum()) for g in ("warmup_sample_stats", "sample_stats")]
        print(json.dumps({"cpu": cpu, "gradients": steps}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
