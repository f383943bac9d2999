"""Results taken up again: extended, resumed, refitted, predicted from, in every form they have."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import others_slow, quiet, quietly
from models import EFFECTS, ERRORS, conjugate, die, eight_schools
from numpyro.contrib.control_flow import cond

import ppl_toolkit as ppl
import ppl_toolkit.runner
from ppl_toolkit.errors import (
    CheckpointError,
    DataError,
    InferenceWarning,
    InitializationError,
    OptionError,
    SiteError,
)

Y = np.array([0.3, -1.2, 0.8])

EVERY = {
    "nuts": (conjugate, Y, ppl.NUTS(target_acceptance=np.float32(0.75))),
    "hmc": (conjugate, Y, ppl.HMC(steps=3, jitter=0.1, metric="dense")),
    "prior": (conjugate, Y, "prior"),
    "enumeration": (die, np.asarray(1.0), "enumeration"),
}


@pytest.mark.parametrize("what", others_slow(EVERY, "nuts", "prior", "enumeration"))
def test_every_method_is_extended_and_resumed(what, tmp_path):
    model, data, method = EVERY[what]
    options = {"method": method, "warmup": 20} if what in ("nuts", "hmc") else {"method": method}
    whole = quiet(model, data, draws=40, **options)
    store = tmp_path / "run.zarr"
    part = quiet(model, data, draws=25, store=store, **options)
    saved = ppl.load(ppl.save(part.load(), tmp_path / "part.nc"))
    group = "prior" if what == "prior" else "posterior"
    for again in (
        quietly(ppl.extend, saved, model, data, draws=15),
        quiet(model, data, resume=store, draws=40),
    ):
        for name, values in whole[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name], values)


@pytest.mark.parametrize("init", [None, "prior"])
def test_superchains_share_their_starts_and_nothing_else(init, tmp_path):
    """Chains of a superchain are alike at the first state and differ in the first draw."""
    starts, engine_init = [], ppl_toolkit.runner.Unit.init

    def recorded(unit, *args):
        engine_init(unit, *args)
        starts.append((unit.chains, unit.host_state().point.position))

    options = {"chains": 6, "superchains": 2, "warmup": 10, "threads": 1, "lanes": 3, "init": init}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppl_toolkit.runner.Unit, "init", recorded)
        tree = quiet(conjugate, Y, draws=30, **options)
    first, second = (position for _, position in sorted(starts))
    assert np.unique(first).size == np.unique(second).size == 1
    assert first[0] != second[0]
    draws = tree["posterior"]["m"]
    assert np.unique(draws[:, 0]).size == 6
    assert tree.attrs["superchains"] == 2
    store = tmp_path / "run.zarr"
    part = quiet(conjugate, Y, draws=20, store=store, **options)
    extended = quietly(ppl.extend, part, conjugate, Y, draws=10)
    resumed = quiet(conjugate, Y, draws=30, resume=store)
    for again in (extended, resumed):
        np.testing.assert_array_equal(again["posterior"]["m"], draws)
        assert again.attrs["superchains"] == 2


@dataclasses.dataclass(frozen=True)
class MyNUTS(ppl.NUTS):
    """A method of the user's own."""


def test_methods_of_ones_own_are_passed_again(tmp_path):
    store = tmp_path / "run.zarr"
    first = quiet(conjugate, Y, method=MyNUTS(), draws=20, warmup=20, store=store)
    with pytest.raises(CheckpointError, match="MyNUTS; pass it"):
        ppl.extend(first, conjugate, Y)
    more = quietly(ppl.extend, first.load(), conjugate, Y, draws=10, method=MyNUTS())
    again = quiet(conjugate, Y, resume=store, draws=30, method=MyNUTS())
    np.testing.assert_array_equal(more["posterior"]["m"], again["posterior"]["m"])
    with pytest.raises(CheckpointError, match="it cannot go on"):
        ppl.extend(first, conjugate, Y, method=MyNUTS(max_depth=3))


def test_thinned_results_go_on_after_their_run_and_parts_of_chains_do_not():
    whole = quiet(conjugate, Y, draws=60, warmup=20)
    part = quiet(conjugate, Y, draws=40, warmup=20)
    thinned = part.isel(draw=slice(0, None, 2))
    more = quietly(ppl.extend, thinned, conjugate, Y, draws=20)
    assert more["posterior"].sizes["draw"] == 40
    np.testing.assert_array_equal(more["posterior"]["m"][:, 20:], whole["posterior"]["m"][:, 40:])
    assert int(more["posterior"]["draw"][-1]) == 59
    with pytest.raises(CheckpointError, match="2 of 4 chains"):
        ppl.extend(part.isel(chain=[0, 2]), conjugate, Y)


def test_a_result_of_other_sites_is_no_start():
    def swapped(y):
        b = numpyro.sample("b", dist.Normal(0, 1))
        a = numpyro.sample("a", dist.Normal(0, 100))
        numpyro.sample("y", dist.Normal(a + b, 1), obs=y)

    def straight(y):
        a = numpyro.sample("a", dist.Normal(0, 100))
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(a + b, 1), obs=y)

    tree = quiet(straight, Y, draws=20, warmup=20)
    with pytest.raises(CheckpointError, match=r"\['a', 'b'\].*\['b', 'a'\]"):
        ppl.infer(swapped, Y, init=tree)


def test_models_with_a_branch():
    def branching(flag, y):
        m = numpyro.sample("m", dist.Normal(0, 1))
        shift = cond(
            flag,
            lambda _: numpyro.sample("s", dist.Normal(1.0, 1.0)),
            lambda _: numpyro.sample("s", dist.Normal(-1.0, 1.0)),
            None,
        )
        numpyro.sample("y", dist.Normal(m + shift, 1.0), obs=y)

    flag = np.asarray(True)
    tree = quiet(branching, flag, Y, draws=20, warmup=20)
    assert "posterior_predictive" in ppl.predict(tree, branching, flag, Y).children
    assert "log_likelihood" in ppl.log_likelihood(tree, branching, flag, Y).children


def holes(x, y=None, mask=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y, obs_mask=mask)


def test_what_was_partly_observed_is_predicted():
    x, mask = np.arange(4.0), np.array([True, True, False, True])
    tree = quiet(holes, x, x, mask, draws=50, warmup=100)
    for new in (x + 100, np.arange(6.0)):
        drawn = ppl.predict(tree, holes, new)["predictions"]["y"]
        assert drawn.shape == (4, 50, len(new))
        residual = np.asarray(drawn) - np.asarray(tree["posterior"]["b"])[..., None] * new
        assert 0.8 < residual.std() < 1.2


def test_scalar_data_are_in_the_result(tmp_path):
    def scalar(scale, y):
        m = numpyro.sample("m", dist.Normal(0, scale))
        numpyro.sample("y", dist.Normal(m, 1), obs=y)

    for store in (None, tmp_path / "run.zarr"):
        tree = quiet(scalar, 2.0, 1.5, draws=20, warmup=20, store=store)
        assert float(tree["observed_data"]["y"]) == 1.5
        assert float(tree["constant_data"]["scale"]) == 2.0


def test_labels_of_predictions_stay_with_them():
    tree = quiet(conjugate, Y, coords={"row": list("abc")}, draws=20, warmup=20)
    tree = ppl.predict(tree, conjugate, Y + 1, coords={"row": ["n0", "n1", "n2"]})
    again = ppl.predict(tree, conjugate, Y)
    assert list(again["posterior_predictive"]["row"].values) == list("abc")
    assert list(again["predictions"]["row"].values) == ["n0", "n1", "n2"]
    more = quietly(ppl.extend, tree, conjugate, Y, draws=10)
    assert list(more["observed_data"]["row"].values) == list("abc")


def test_labels_of_subsampled_rows_are_those_of_the_run():
    def model(y):
        m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("row", 8, subsample_size=3) as rows:
            numpyro.sample("y", dist.Normal(m, 1), obs=y[rows])

    y = np.arange(8.0)
    tree = quiet(model, y, coords={"row": list("abcdefgh")}, draws=20, warmup=20)
    drawn = ppl.predict(tree, model, y)
    np.testing.assert_array_equal(
        drawn["posterior_predictive"]["row"], drawn["observed_data"]["row"]
    )


# --- nothing is lost, nothing is left ------------------------------------------------------------


def test_a_closed_stream_does_not_cost_the_draws(monkeypatch):
    class Closed:
        def write(self, text):
            if "iterations" in text:
                raise BrokenPipeError("closed")

        def flush(self):
            pass

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stderr", Closed())
    tree = quiet(conjugate, Y, draws=40, warmup=20, progress="lines")
    assert tree["posterior"].sizes["draw"] == 40


def test_names_that_clash_with_arguments_are_known_before_the_run():
    def model(beta, y):
        b = numpyro.sample("beta", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(b.sum() + beta.sum(), 1), obs=y)

    tree = quiet(
        model, np.ones(3), np.asarray(1.0), dims={"beta": ["side"]},
        coords={"side": ["l", "r"]}, draws=20, warmup=20,
    )  # fmt: skip
    assert tree["constant_data"]["beta"].shape == (3,)
    assert list(tree["posterior"]["side"].values) == ["l", "r"]


def impossible(y):
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.factor("never", jnp.where(m > 1e9, 0.0, -jnp.inf))
    numpyro.sample("y", dist.Normal(m, 1), obs=y)


def test_a_run_that_never_starts_leaves_no_store(tmp_path):
    with pytest.raises(InitializationError):
        ppl.infer(impossible, Y, store=tmp_path / "run.zarr", progress=False)
    assert not (tmp_path / "run.zarr").exists()


def test_the_store_of_a_run_is_not_overwritten_by_save(tmp_path):
    store = tmp_path / "run.zarr"
    tree = quiet(conjugate, Y, draws=20, warmup=20, store=store)
    with pytest.raises(OptionError, match="store of a run"):
        ppl.save(tree, store)
    assert quiet(conjugate, Y, resume=store, draws=30)["posterior"].sizes["draw"] == 30


def test_results_without_draws_say_so():
    from ppl_toolkit import runner

    commit = runner.MemorySink.commit

    def pressing(self, state, iteration, steps):
        commit(self, state, iteration, steps)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.MemorySink, "commit", pressing)
        with pytest.warns(InferenceWarning, match="after 0 draws"):
            tree = ppl.infer(
                eight_schools, ERRORS, y=EFFECTS, draws=20, warmup=20, chunk=10, progress=False
            )
    with pytest.raises(DataError, match="no draws to summarise"):
        ppl.summary(tree)


def test_sites_nobody_knows_are_refused():
    tree = quiet(conjugate, Y, draws=20, warmup=20)
    with pytest.raises(SiteError, match="no site 'mu'"):
        ppl.predict(tree, eight_schools, ERRORS)
