"""What is said of traced functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ppl_toolkit.tracing import dependents

X = np.ones(3, np.float32)


def swapping(a, b):
    """The carry hands a on to its second place after one step."""
    (c, d), series = lax.scan(lambda c, _: ((c[1] * 0, c[0]), c[1]), (a, b), None, length=4)
    return c, d, series


CASES = {
    "plain": (lambda a, b: (a + b, b), [True, False]),
    "inside a function": (lambda a, b: jax.jit(lambda x, y: (x, 2 * y))(a, b), [True, False]),
    "a series beside a carry": (
        lambda a, b: lax.scan(lambda c, x: (c + 1.0, x), a[0], b),
        [True, False],
    ),
    "a series made of the carry": (
        lambda a, b: lax.scan(lambda c, x: (c + x, c), a[0], b),
        [True, True],
    ),
    "by way of the second turn": (swapping, [True, True, True]),
    "a branch": (lambda a, b: (lax.cond(a[0] > 0, lambda: b, lambda: -b), b * 2), [True, False]),
}


@pytest.mark.parametrize("what", CASES)
def test_dependents(what):
    function, expected = CASES[what]
    jaxpr = jax.make_jaxpr(function)(X, X).jaxpr
    assert dependents(jaxpr, 1) == expected
    assert dependents(jaxpr, 0) == [False] * len(expected)
    # What is said not to depend does not: the derivative vanishes.
    jacobian = jax.jacobian(lambda a: function(a, X))(jnp.asarray(X))
    for leaf, flag in zip(jax.tree.leaves(jacobian), expected, strict=True):
        assert flag or not np.any(leaf)
