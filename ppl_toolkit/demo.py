"""The main job on real data: growth of 30 young rats, with a line for every rat.

Data: Gelfand, Hills, Racine-Poon and Smith (1990), Illustration of Bayesian inference in normal
data models using Gibbs sampling, JASA 85, table 3; also 'Rats' of the BUGS examples, volume I.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["DAYS", "WEIGHTS", "growth"]

DAYS = np.array([8.0, 15.0, 22.0, 29.0, 36.0])
"""Age in days at the five weighings, shape (5,)."""

WEIGHTS = np.array(
    [
        [151, 199, 246, 283, 320], [145, 199, 249, 293, 354], [147, 214, 263, 312, 328],
        [155, 200, 237, 272, 297], [135, 188, 230, 280, 323], [159, 210, 252, 298, 331],
        [141, 189, 231, 275, 305], [159, 201, 248, 297, 338], [177, 236, 285, 350, 376],
        [134, 182, 220, 260, 296], [160, 208, 261, 313, 352], [143, 188, 220, 273, 314],
        [154, 200, 244, 289, 325], [171, 221, 270, 326, 358], [163, 216, 242, 281, 312],
        [160, 207, 248, 288, 324], [142, 187, 234, 280, 316], [156, 203, 243, 283, 317],
        [157, 212, 259, 307, 336], [152, 203, 246, 286, 321], [154, 205, 253, 298, 334],
        [139, 190, 225, 267, 302], [146, 191, 229, 272, 302], [157, 211, 250, 285, 323],
        [132, 185, 237, 286, 331], [160, 207, 257, 303, 345], [169, 216, 261, 295, 333],
        [157, 205, 248, 289, 316], [137, 180, 219, 258, 291], [153, 200, 244, 286, 324],
    ],
    dtype=float,
).T  # fmt: skip
"""Weights in grams, shape (5 weighings, 30 rats)."""


def growth(days: Any, weight: Any = None, rats: int = 30) -> None:
    """A straight line for every rat, its coefficients drawn from a common normal law.

    Args:
        days: ages in days, shape (5,).
        weight: weights in grams, shape (5, rats), or None to predict them.
        rats: number of rats.
    """
    import numpyro
    import numpyro.distributions as dist

    intercept = numpyro.sample("intercept", dist.Normal(250.0, 100.0))  # weight on day 22
    slope = numpyro.sample("slope", dist.Normal(0.0, 20.0))  # grams a day
    intercept_sd = numpyro.sample("intercept_sd", dist.HalfNormal(50.0))
    slope_sd = numpyro.sample("slope_sd", dist.HalfNormal(5.0))
    noise = numpyro.sample("noise", dist.HalfNormal(20.0))
    with numpyro.plate("rat", rats, dim=-1):
        a = numpyro.sample("a", dist.Normal(intercept, intercept_sd))
        b = numpyro.sample("b", dist.Normal(slope, slope_sd))
        with numpyro.plate("day", days.shape[0], dim=-2):
            mean = a + b * (days[:, None] - 22.0)
            numpyro.sample("weight", dist.Normal(mean, noise), obs=weight)
    numpyro.deterministic("birth_weight", intercept - 22.0 * slope)
