"""Estimates of work: exact where the rules say so, and what the compiler's level follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ppl_toolkit import executables
from ppl_toolkit.cost import operations


def work(function, *args):
    return operations(jax.make_jaxpr(function)(*args))


X = np.ones(100, np.float32)
M = np.ones((20, 30), np.float32)


def summed(x):
    return lax.scan(lambda c, y: (c + jnp.sin(y), None), jnp.zeros((), x.dtype), x)[0]


def halved(x):
    return lax.while_loop(lambda y: y > 1.0, lambda y: y * 0.5, x)


def branched(x):
    return lax.cond(x[0] > 0.0, jnp.sin, lambda y: jnp.sin(jnp.cos(jnp.exp(y))), x)


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (jnp.sin, (X,), 100),
        (lambda x: jnp.sin(x) * x, (X,), 200),
        (jnp.sum, (X,), 100),
        (lambda a: a.T @ a, (M,), 20 * 30 + 0.2 * 30 * 30 * 20),
        (lax.linalg.cholesky, (np.eye(20, dtype=np.float32),), 20**3),
        (summed, (X,), 100 * 2),
        (halved, (np.float32(8.0),), 10 * 2),
        (jax.jit(lambda x: jnp.sin(x)), (X,), 100),
    ],
    ids=["sin", "twice", "sum", "product", "factor", "scan", "while", "jit"],
)
def test_numbers_computed(function, args, expected):
    assert work(function, *args) == pytest.approx(expected, rel=0.5 if expected == 20**3 else 0.02)


def test_the_dearest_branch_counts():
    assert 300 <= work(branched, X) <= 310


def long(x):
    return lax.fori_loop(0, 10_000_000, lambda i, y: y + jnp.sin(y), x)


@pytest.mark.parametrize(("function", "quick"), [(jnp.sin, True), (long, False)])
def test_what_runs_once_is_made_quickly_unless_it_is_long(function, quick, monkeypatch):
    monkeypatch.setenv("PPL_CACHE_DIR", "off")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    levels = []
    options = executables._options

    def noted(chosen, device):
        levels.append(chosen)
        return options(chosen, device)

    monkeypatch.setattr(executables, "_options", noted)
    executables.kept(function, np.float32(1.25), quick=True)
    assert levels == [quick]
