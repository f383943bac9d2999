"""Scale mixtures on the published regression tables: what the law of the scale buys.

    python benchmarks/scale_mixture.py [--seeds 3] [--boston path/to/uci/boston] [--parts ...]

Protocol, after the public code of Lee, Yun, Yang, Lee (2022) in its version of June 2021:

- A permutation by RandomState(10); 80% train, 10% validation, 10% test; inputs and targets are
  standardised by the train part; train and validation together are shuffled again by every seed, so
  that the test part stays. Constant columns become zero.
- A grid: depth 1, 4, 16; weight variance 1, 2, 4; bias variance 0, 0.09, 1; ReLU and erf; noise
  10^(-3.5 ... -1.5) in steps of a half; for the unscaled process the readout's variance 1 and 4;
  alpha, beta in 0.5, 1, 1.5, 2, 4, 8; Burr's c, d in 1, 2, 3. The cell with the smallest negative
  log likelihood (NLL) of the validation part is chosen, and its NLL of the test part is reported,
  in units of standardised targets.
- Here, unlike there: one noise convention (scaled with the function, and part of the predictions);
  the law of the scale is integrated by quadrature and not by 1000 draws; and beside them stands the
  Gaussian process with the best scale q / n, which has no tails at all.

A --boston folder with data.txt and the index files of ten splits is served by its own splits: a
tenth of the train part is the validation part.
"""

import argparse
import os
import warnings
from itertools import product
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")

import numpy as np
import numpyro.distributions as dist
from measure import cost_of, machine, show_table
from scipy import stats
from sklearn.datasets import load_diabetes, load_linnerud

from ppl_toolkit.errors import DataError, InferenceWarning
from ppl_toolkit.models.evaluation import in_float64
from ppl_toolkit.models.infinite_width import Erf, ReLU, mlp
from ppl_toolkit.models.scale_mixture import BurrXII, fit
from ppl_toolkit.models.scale_quadrature import atoms_of, posterior_law

DEPTHS, WEIGHTS, BIASES = (1, 4, 16), (1.0, 2.0, 4.0), (0.0, 0.09, 1.0)
NOISES = tuple(10 ** (-6 + e / 2) for e in (5, 6, 7, 8, 9))
GAMMAS = {(a, b): dist.InverseGamma(a, b)
          for a, b in product((0.5, 1.0, 1.5, 2.0, 4.0, 8.0), repeat=2)}  # fmt: skip
BURRS = {(c, d): BurrXII(c, d) for c, d in product((1.0, 2.0, 3.0), repeat=2)}
POINTS = {(s,): dist.Delta(s) for s in (1.0, 4.0)}
PUBLISHED = {
    "synthetic A": ("2.40 +- .01", "1.01 +- .05", "1.66 +- .00"),
    "Boston": ("1.14 +- .06", "1.08 +- .08", "1.06 +- .07"),
}


def synthetic_a():
    """100 points of a Gaussian process with the squared exponential kernel, noise 0.2."""
    rng = np.random.RandomState(829)
    x = np.linspace(-50, 50, 100)
    covariance = np.exp(-((x[:, None] - x) ** 2) / 2)
    f = rng.multivariate_normal(np.zeros(100), covariance)
    return x[:, None], f + 0.2 * rng.normal(size=100)


def bundled():
    """Regression sets that scikit-learn ships."""
    yield "diabetes", load_diabetes(return_X_y=True)
    x, y = load_linnerud(return_X_y=True)
    yield "linnerud (weight)", (x, y[:, 0])


def splits(x, y, seed):
    """Train, validation and test parts, standardised by the original train part."""
    order = np.random.RandomState(10).permutation(len(x))
    x, y = x[order], y[order]
    n_train, n_valid = int(0.8 * len(x)), int(0.1 * len(x))
    x, y = standardised(x, x[:n_train]), standardised(y, y[:n_train])
    again = np.random.RandomState(seed).permutation(n_train + n_valid)
    head = slice(0, n_train + n_valid)
    tail = slice(n_train + n_valid, None)
    x, y = np.r_[x[head][again], x[tail]], np.r_[y[head][again], y[tail]]
    cuts = [n_train, n_train + n_valid]
    return list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))


def standardised(values, by):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num((values - by.mean(0)) / by.std(0))


def boston_splits(folder, split):
    data = np.loadtxt(folder / "data.txt")
    features = np.loadtxt(folder / "index_features.txt").astype(int)
    target = int(np.loadtxt(folder / "index_target.txt"))
    parts = [np.loadtxt(folder / "original" / f"index_{p}_{split}.txt").astype(int)
             for p in ("train", "test")]  # fmt: skip
    train, test = parts
    cut = len(train) - len(train) // 10
    train = np.random.RandomState(split).permutation(train)
    chosen = (train[:cut], train[cut:], test)
    x, y = data[:, features], data[:, target]
    x, y = standardised(x, x[train[:cut]]), standardised(y, y[train[:cut]])
    return [(x[rows], y[rows]) for rows in chosen]


def searched(train, valid, test, depths=DEPTHS):
    """The best cell of every family: {family: (validation NLL, test NLL, cell)}."""
    best = {}
    for depth, w, b, activation, noise in product(depths, WEIGHTS, BIASES, (ReLU(), Erf()), NOISES):
        network = mlp(depth, activation, weight_std=w**0.5, bias_std=b**0.5)
        try:
            one = fit(network, *train, noise=noise)
        except (DataError, InferenceWarning):  # not positive definite
            continue
        q_n = one.profiled_scale
        families = {
            "NNGP": POINTS, "inverse gamma": GAMMAS, "Burr XII": BURRS,
            "NNGP, best scale": {(): dist.Delta(q_n)},
        }  # fmt: skip
        # One prediction for all laws: location and width at sigma = 1.
        unit = one.with_law(dist.Delta(1.0))
        at_valid, at_test = (unit.predict(x).law for x, _ in (valid, test))
        for family, laws in families.items():
            for cell, law in laws.items():
                scores = [nll(one, law, p, y) for p, (_, y) in ((at_valid, valid), (at_test, test))]
                if family not in best or scores[0] < best[family][0]:
                    best[family] = (*scores, (depth, w, b, type(activation).__name__, noise, cell))
    return best


def nll(one, law, unit, y):
    """Mean negative log predictive density, with the location and width of the unit process."""
    n = len(one.conditioned.y)
    q = one.profiled_scale * n
    z, width = y - np.asarray(unit.loc), np.asarray(unit.scale)
    if isinstance(law, dist.InverseGamma):
        a, b = law.concentration + n / 2, law.rate + q / 2
        return -stats.t(2 * a, scale=width * np.sqrt(b / a)).logpdf(z).mean()
    if isinstance(law, dist.Delta):
        return -stats.norm(0, width * np.sqrt(law.v)).logpdf(z).mean()
    values, log_weights = in_float64(posterior_atoms, law, np.float64(q), np.float64(n))
    each = log_weights + stats.norm(0, width[:, None] * np.sqrt(values)).logpdf(z[:, None])
    return -np.logaddexp.reduce(each, axis=1).mean()


def posterior_atoms(law, q, n):
    """The posterior of sigma^2 as a finite mixture."""
    return atoms_of(posterior_law(law, q, n))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--boston", type=Path)
    parser.add_argument("--parts", default="synthetic,bundled,boston")
    options = parser.parse_args()
    parts = options.parts.split(",")
    warnings.simplefilter("error", InferenceWarning)
    print(machine("jax", "numpyro"))
    tasks = {}
    seeds = range(10, 10 + options.seeds)
    if "synthetic" in parts:
        tasks["synthetic A"] = [splits(*synthetic_a(), seed) for seed in seeds]
    if "bundled" in parts:
        for name, data in bundled():
            tasks[name] = [splits(*data, seed) for seed in seeds]
    if "boston" in parts and options.boston:
        tasks["Boston"] = [boston_splits(options.boston, s) for s in range(options.seeds)]
    rows = []
    for name, runs in tasks.items():
        cost, found = cost_of(lambda runs=runs: [searched(*run) for run in runs])
        families = ("NNGP", "NNGP, best scale", "inverse gamma", "Burr XII")
        scores = {f: np.array([run[f][1] for run in found]) for f in families}
        text = [f"{s.mean():.2f} +- {s.std() / len(s) ** 0.5:.2f}" for s in scores.values()]
        rows.append([name, *text, f"{cost.cpu:.0f}"])
        if name in PUBLISHED:
            nngp, gamma, burr = PUBLISHED[name]
            rows.append(["  published", nngp, "", gamma, burr, ""])
        for family in families:
            print(f"{name}, {family}, chosen cells: {[run[family][2] for run in found]}")
    header = ["data", "NNGP", "NNGP, best scale", "inverse gamma", "Burr XII", "CPU s"]
    show_table("Mean negative log predictive density of the test part", header, rows)


if __name__ == "__main__":
    main()
