"""Chains that one call takes in turn: which, and that none depends on its neighbours."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import quiet
from models import EFFECTS, ERRORS, conjugate, eight_schools

import ppl_toolkit as ppl
from ppl_toolkit.engine import Engine
from ppl_toolkit.program import Program
from ppl_toolkit.units import grouped

Y = np.array([1.2, -0.3, 0.8, 2.1])


def engine(model, *args, lanes=1):
    return Engine(Program(model, args, {}), ppl.NUTS(), lanes, jax.devices()[:1])


def wide(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([5000]).to_event(1))
    numpyro.sample("y", dist.Normal(x[:4], 1.0).to_event(1), obs=y)


def long(y):
    """Little state, but much work: a product of matrices for every density."""
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    matrix = s * np.ones((300, 300)) + np.eye(300)
    numpyro.factor("f", -1e-9 * (matrix @ matrix).sum())
    numpyro.sample("y", dist.Normal(0.0, s), obs=y)


@pytest.mark.parametrize(("model", "room"), [(conjugate, 4), (wide, 1), (long, 1)])
def test_small_programs_have_room_for_several_chains(model, room):
    assert engine(model, Y).room == room


def test_every_thread_has_chains():
    small, locked = engine(conjugate, Y), engine(conjugate, Y, lanes=3)
    sizes = {
        (4, 1): [4], (4, 2): [2, 2], (4, 4): [1, 1, 1, 1], (6, 1): [4, 2], (6, 2): [3, 3],
        (1, 2): [1], (9, 2): [4, 4, 1],
    }  # fmt: skip
    for (chains, threads), expected in sizes.items():
        assert [len(group) for group in grouped(chains, small, threads)] == expected
    assert [list(g) for g in grouped(4, locked, 2)] == [[0, 1, 2], [3]]


@pytest.mark.parametrize("method", [ppl.NUTS(), ppl.Slice()])
def test_a_chain_is_the_same_alone_and_among_others(method):
    """Bit for bit: beside three others, beside fewer than there is room for, in other threads."""

    def draws(chains, threads):
        tree = quiet(
            eight_schools, ERRORS, y=EFFECTS, warmup=0, draws=20, chains=chains, threads=threads,
            method=method, seed=3,
        )  # fmt: skip
        return np.concatenate(
            [v.values.reshape(chains, 20, -1) for v in tree["posterior"].data_vars.values()], -1
        )

    six = draws(6, 1)
    assert len(np.unique(six[:, -1, 0])) == 6
    for chains, threads in ((1, 1), (3, 1), (4, 2), (5, 2), (6, 2), (6, 3), (6, 6)):
        np.testing.assert_array_equal(draws(chains, threads), six[:chains])
