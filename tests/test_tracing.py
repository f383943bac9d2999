"""What is said of traced functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy import special

from ppl_toolkit.tracing import Traced, closed_over_arrays, dependents

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


def test_arrays_from_outside_are_told_from_attributes_of_the_same_name():
    inside = np.ones(2)

    def reads():
        return X + inside

    def does_not():
        return lax.X

    start = reads.__code__.co_firstlineno
    assert sorted(closed_over_arrays(reads)) == [
        ("X", start + 1, (3,)),
        ("inside", start + 1, (2,)),
    ]
    assert closed_over_arrays(does_not) == []


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


@pytest.mark.parametrize("function", [special.erf, special.logit, jax.nn.relu, jnp.tanh])
def test_rules_put_around_functions_of_jax_are_told_apart(function):
    def with_slope(slope):
        own = jax.custom_jvp(function)
        own.defjvps(lambda tangent, value, x: slope * tangent)
        return Traced.of(lambda x: own(x), 1.3).text()

    assert with_slope(2.0) != with_slope(3.0)
    assert with_slope(2.0) == with_slope(2.0)


@pytest.mark.parametrize(
    "function",
    [
        special.logit,
        special.log_ndtr,
        jax.nn.relu,
        jax.nn.softplus,
        lambda x: jnp.logaddexp(x, 1.0),
        lambda x: special.xlogy(x, x),
    ],
)
def test_rules_of_jax_itself_need_no_derivative_to_be_traced(function):
    traced = Traced.of(lambda x: function(x), 0.3)
    assert traced.text() == traced.text(differentiable=False)
