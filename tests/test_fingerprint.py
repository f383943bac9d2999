"""The digest of a model: blind to names and layout, sensitive to everything that is computed."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ppl_toolkit.fingerprint import fingerprint

X = np.linspace(0.5, 2.0, 4, dtype=np.float32)
ONE = np.float32(1.0)


def of(function, *args):
    return fingerprint(jax.make_jaxpr(function)(*args).jaxpr)


def running(decay, x, *, order=(0, 1), reverse=False, carry=lambda c, d, x: d * c + x):
    """Two running series of x, stacked in either order."""

    def step(c, x_t):
        c = carry(c, decay, x_t)
        both = (jnp.sin(c), jnp.cos(c))
        return c, tuple(both[i] for i in order)

    _, series = lax.scan(step, 0.0, x, reverse=reverse)
    sine, cosine = (series[order.index(i)] for i in (0, 1))
    return (sine / cosine).sum()


SAME = {
    "names": (lambda a, b: a - b, lambda left, right: left - right),
    "a function of its own": (jax.jit(jnp.sin), jnp.sin),
    "unused work": (jnp.sin, lambda x: (jnp.cos(x), jnp.sin(x))[1]),
}
DIFFERENT = {
    "order of arguments": (lambda a, b: a - b, lambda a, b: b - a),
    "a number": (lambda a, b: a - 2.0 * b, lambda a, b: a - 3.0 * b),
    "an operation": (lambda a, b: a + jnp.sin(b), lambda a, b: a + jnp.cos(b)),
    "an axis": (
        lambda a, b: jnp.outer(a, b).sum(axis=0)[0],
        lambda a, b: jnp.outer(a, b).sum(axis=1)[0],
    ),
    "a branch": (
        lambda a, b: lax.cond(a[0] > 0, lambda: b, lambda: 2.0 * b),
        lambda a, b: lax.cond(a[0] > 0, lambda: 2.0 * b, lambda: b),
    ),
    "a loop": (
        lambda a, b: lax.while_loop(lambda c: c[0] < 9, lambda c: c + b, a),
        lambda a, b: lax.while_loop(lambda c: c[0] < 9, lambda c: c + 2 * b, a),
    ),
    "a derivative rule's function": (
        lambda a, b: jax.nn.relu(a) + b,
        lambda a, b: jax.nn.relu6(a) + b,
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_same(what):
    one, two = SAME[what]
    args = (X, X) if what == "names" else (X,)
    assert of(one, *args) == of(two, *args)


@pytest.mark.parametrize("what", DIFFERENT)
def test_different(what):
    one, two = DIFFERENT[what]
    assert of(one, X, X) != of(two, X, X)


def test_shapes_and_types_count():
    found = {of(jnp.sin, x) for x in (X, X[:3], X[None], X.astype(np.float16))}
    assert len(found) == 4


def test_scans_count_by_what_they_compute_not_by_the_order_of_their_outputs():
    usual = of(running, ONE, X)
    assert usual == of(lambda d, x: running(d, x, order=(1, 0)), ONE, X)
    others = (
        lambda d, x: running(d, x, reverse=True),
        lambda d, x: running(d, x, carry=lambda c, d, x: d * x + c),
        lambda d, x: running(x[0], x),
        lambda d, x: running(d, d * x),
    )
    assert len({usual, *(of(other, ONE, X) for other in others)}) == 5


SCAN_MODEL = """
import numpy as np, numpyro, numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from ppl_toolkit import Program

def walk(y):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        numpyro.sample("y", dist.StudentT(4.0, x, noise), obs=y_t)
        return x, None
    scan(step, 0.0, y)

print(Program(walk, (np.arange(5.0),)).model_hash)
"""


def test_a_model_has_the_same_hash_in_every_process():
    """NumPyro orders a distribution's parameters by Python's hash seed; the hash must not."""
    hashes = {
        subprocess.run(
            [sys.executable, "-c", SCAN_MODEL],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(hashes) == 1
