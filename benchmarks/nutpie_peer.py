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


def diamonds(pm: Any, data: Mapping[str, Any]) -> None:
    b = pm.Normal("b", 0.0, 1.0, shape=24)
    intercept = pm.StudentT("Intercept", 3.0, mu=8.0, sigma=10.0)
    sigma = pm.HalfStudentT("sigma", 3.0, sigma=10.0)
    pm.Normal("paid", intercept + data["design"] @ b, sigma, observed=data["price"])


def gp_poisson(pm: Any, data: Mapping[str, Any]) -> None:
    x = data["x"]
    rho = pm.Gamma("rho", 25.0, 4.0)
    alpha = pm.HalfNormal("alpha", 2.0)
    white = pm.Normal("f_tilde", 0.0, 1.0, shape=11)
    covariance = alpha**2 * pm.math.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
    root = pm.math.cholesky(covariance + 1e-10 * np.eye(11))
    pm.Poisson("count", pm.math.exp(root @ white), observed=data["k"])


def low_dim_gauss_mix(pm: Any, data: Mapping[str, Any]) -> None:
    ordered = pm.distributions.transforms.ordered
    mu = pm.Normal("mu", 0.0, 2.0, shape=2, transform=ordered, initval=[-1.0, 1.0])
    sigma = pm.HalfNormal("sigma", 2.0, shape=2)
    theta = pm.Beta("theta", 5.0, 5.0)
    weights = (theta, 1.0 - theta)
    # By hand: half the time of pm.NormalMixture.
    joint = (
        pm.math.log(weights[i] / sigma[i]) - 0.5 * ((data["y"] - mu[i]) / sigma[i]) ** 2
        for i in range(2)
    )
    pm.Potential("likelihood", pm.math.logaddexp(*joint).sum())


def discounted_sums(pm: Any, x: Any, factor: Any) -> Any:
    """h[t] = x[t] + factor h[t - 1], with ``x`` in rows of equal length; a sixth of a scan's time.

    In closed form, products with triangular matrices of powers: within the rows, then of their
    ends.
    """

    def powers(base: Any, size: int) -> Any:
        lags = np.subtract.outer(np.arange(size), np.arange(size)).clip(0).astype(float)
        return base**lags * np.tri(size)

    rows, columns = x.type.shape
    within = x @ powers(factor, columns).T
    ends = powers(factor**columns, rows) @ within[:, -1]
    before = pm.math.concatenate([np.zeros(1), ends[:-1]])
    return (within + before[:, None] * factor ** np.arange(1.0, columns + 1.0)).ravel()


def garch11(pm: Any, data: Mapping[str, Any]) -> None:
    y = data["y"]
    mu, alpha0 = pm.Flat("mu"), pm.HalfFlat("alpha0")
    alpha1 = pm.Uniform("alpha1", 0.0, 1.0)
    fraction = pm.Uniform("fraction", 0.0, 1.0)
    beta1 = pm.Deterministic("beta1", fraction * (1.0 - alpha1))
    pm.Potential("flat_on_triangle", pm.math.log1p(-alpha1))
    first = data["sigma1"].reshape((1,)) ** 2
    shocks = pm.math.concatenate([first, alpha0 + alpha1 * (y[:-1] - mu) ** 2])
    variance = discounted_sums(pm, shocks.reshape((20, 10)), beta1)  # 200 values
    pm.Normal("value", mu, pm.math.sqrt(variance), observed=y)


def hmm_example(pm: Any, data: Mapping[str, Any]) -> None:
    import pytensor

    transforms = pm.distributions.transforms
    theta1, theta2 = (pm.Dirichlet(f"theta{i}", np.ones(2)) for i in (1, 2))
    increasing = transforms.Chain([transforms.log, transforms.ordered])
    means = np.array([3.0, 10.0])
    mu = pm.Normal("mu", means, 1.0, shape=2, transform=increasing, initval=means)
    exponent = -0.5 * (data["y"][:, None] - mu) ** 2
    most = exponent.max(axis=1)
    weight = pm.math.exp(exponent - most[:, None])

    # A scalar is carried from step to step, the probability of the second state.
    def predicted(filtered: Any, enter: Any, stay: Any) -> Any:
        return enter + (stay - enter) * filtered

    def step(first: Any, second: Any, filtered: Any, enter: Any, stay: Any) -> Any:
        before = predicted(filtered, enter, stay)
        joint = before * second
        return joint / ((1.0 - before) * first + joint)

    start = weight[0, 1] / weight[0].sum()
    transitions = [theta1[1], theta2[1]]
    filtered = pytensor.scan(
        step,
        sequences=[weight[1:-1, 0], weight[1:-1, 1]],
        outputs_info=[start],
        non_sequences=transitions,
        return_updates=False,
        strict=True,
    )
    before = predicted(pm.math.concatenate([start[None], filtered]), *transitions)
    totals = (1.0 - before) * weight[1:, 0] + before * weight[1:, 1]
    likelihood = most.sum() + pm.math.log(weight[0].sum()) + pm.math.log(totals).sum()
    pm.Potential("likelihood", likelihood)


MODELS = {
    f.__name__: f
    for f in (
        eight_schools_noncentered, kidscore_momhsiq, autoregression, wells, radon, diamonds,
        gp_poisson, low_dim_gauss_mix, garch11, hmm_example,
    )
}  # fmt: skip


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
                "data": {k: v.tolist() for k, v in arguments.items() if isinstance(v, np.ndarray)},
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
                    held = {k: pymc.Data(k, v, shape=v.shape) for k, v in data.items()}
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
