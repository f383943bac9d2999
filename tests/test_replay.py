"""Runs of a model: alone on the handler stack, strict about names, honest about seeds."""

import functools
import sys
import threading

import helpers
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import EFFECTS, ERRORS, conjugate, eight_schools
from numpyro import handlers, primitives

import ppl_toolkit as ppl
from ppl_toolkit import Program
from ppl_toolkit.errors import DataError, MethodError, ModelError, SiteError

Y = np.array([0.3, -1.2, 0.8])


quiet = functools.partial(helpers.quiet, draws=20, warmup=20)


def bound(model, *args, **kwargs):
    return Program(model, args, kwargs)


# --- names --------------------------------------------------------------------------------------


def plate_named_as_site(y):
    school = numpyro.sample("school", dist.Normal(100, 1))
    with numpyro.plate("school", y.shape[0]):
        numpyro.sample("y", dist.Normal(school, 1), obs=y)


def site_named_as_deterministic(y):
    numpyro.deterministic("m", jnp.zeros(()))
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(m, 1), obs=y)


@pytest.mark.parametrize("model", [plate_named_as_site, site_named_as_deterministic])
def test_a_name_stands_for_one_thing(model):
    with pytest.raises(ModelError, match=r"'school'|'m'"):
        bound(model, Y)


def test_a_plate_may_be_entered_again():
    def model(y):
        with numpyro.plate("row", y.shape[0]):
            m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("row", y.shape[0]):
            numpyro.sample("y", dist.Normal(m, 1), obs=y)

    assert bound(model, Y).size == 3


def named(name):
    def model(y):
        m = numpyro.sample(name, dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(m, 1), obs=y)

    return model


def two_sizes(y):
    with numpyro.plate("row", 3):
        numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("row", 2):
        numpyro.sample("b", dist.Normal(0, 1))


def dimension_named_as_site(y):
    numpyro.sample("a", dist.Normal(0, 1).expand([3]))
    numpyro.sample("a_dim_0", dist.Normal(0, 1))


def both_divided(y):
    numpyro.sample("a/b", dist.Normal(0, 1))
    numpyro.sample("a.b", dist.Normal(0, 1))


LABELS = {
    "chain": (named("chain"), "reserved"),
    "draw": (named("draw"), "reserved"),
    "two sizes": (two_sizes, r"length 3 at site 'a' but 2 at site 'b'"),
    "dimension and site": (dimension_named_as_site, "'a_dim_0' names a site and a dimension"),
    "one name in the result": (both_divided, r"'a\.b'"),
}


@pytest.mark.parametrize("what", LABELS)
def test_names_a_result_cannot_hold_are_refused(what):
    model, message = LABELS[what]
    with pytest.raises(SiteError, match=message):
        bound(model, Y)


def test_a_dimension_twice():
    def model():
        numpyro.sample("a", dist.Normal(0, 1).expand([3, 3]))

    with pytest.raises(SiteError, match="'p' twice"):
        Program(model, dims={"a": ["p", "p"]})


# --- the handler stack --------------------------------------------------------------------------


OUTER = {
    "substitute": handlers.substitute(data={"m": 5.0}),
    "condition": handlers.condition(data={"m": 5.0}),
    "trace": handlers.trace(),
    "mask": handlers.mask(mask=False),
}


@pytest.mark.parametrize("handler", OUTER.values(), ids=OUTER.keys())
def test_handlers_around_the_call_are_refused(handler):
    with pytest.raises(ModelError, match=type(handler).__name__), handler:
        bound(conjugate, Y)
    assert primitives._PYRO_STACK == []


def test_a_seed_around_the_call_is_harmless():
    with handlers.seed(rng_seed=1):
        inside = quiet(conjugate, Y)
        assert len(primitives._PYRO_STACK) == 1
    outside = quiet(conjugate, Y)
    np.testing.assert_array_equal(inside["posterior"]["m"], outside["posterior"]["m"])


def test_threads_do_not_see_each_others_handlers():
    """Two models traced in turns, with the interpreter switching threads as often as it can."""
    expected = {
        f: bound(f, *a).model_hash for f, a in ((conjugate, (Y,)), (eight_schools, (ERRORS,)))
    }
    failures = []

    def work(model, *args):
        try:
            for _ in range(15):
                assert bound(model, *args).model_hash == expected[model]
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=work, args=call)
            for call in ((conjugate, Y), (eight_schools, ERRORS), (conjugate, Y))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert primitives._PYRO_STACK == []


# --- seeds and parameters -----------------------------------------------------------------------


def test_a_model_with_a_seed_of_its_own_cannot_be_drawn_from():
    seeded = handlers.seed(eight_schools, 0)
    with pytest.raises(ModelError, match="seed of its own"):
        ppl.infer(seeded, ERRORS, y=EFFECTS, method="prior", progress=False)
    tree = quiet(seeded, ERRORS, y=EFFECTS)
    with pytest.raises(ModelError, match="seed of its own"):
        ppl.predict(tree, seeded, ERRORS)


def test_parameters_that_are_not_learned_are_a_finding():
    def model(y):
        w = numpyro.param("w", jnp.array(2.0))
        m = numpyro.sample("m", dist.Normal(w, 1))
        numpyro.sample("y", dist.Normal(m, 1), obs=y)

    assert bound(model, Y).parameters == ("w",)
    assert bound(handlers.substitute(model, data={"w": 1.0}), Y).parameters == ()
    with pytest.warns(UserWarning, match=r"numpyro.param sites w were not learned"):
        tree = ppl.infer(model, Y, progress=False)
    (found,) = ppl.findings(tree)
    assert (found.kind, found.sites) == ("parameters", ("w",))


def test_a_latent_delta_is_refused():
    def model(y):
        m = numpyro.sample("m", dist.Delta(1.0))
        numpyro.sample("y", dist.Normal(m, 1), obs=y)

    with pytest.raises(ModelError, match=r"deterministic\('m', value\)"):
        bound(model, Y)


@pytest.mark.parametrize("how", ["if", "numpy", "float"])
def test_concrete_values_of_latent_sites_are_refused_without_a_warning(how):
    def model(y):
        m = numpyro.sample("m", dist.Normal(0, 1))
        if how == "if":
            m = m if m > 0 else -m
        elif how == "numpy":
            m = np.exp(m)
        else:
            m = float(m)
        numpyro.sample("y", dist.Normal(m, 1), obs=y)

    with pytest.raises(ModelError, match=r"(?s)concrete value of a latent.*test_replay.py.*jnp"):
        bound(model, Y)


# --- arguments ----------------------------------------------------------------------------------


def test_labelled_series_are_arrays():
    import pandas
    import xarray

    frame = pandas.DataFrame({"x": [1.0, 2.0, 4.0], "y": Y}, index=list("abc"))
    plain = bound(conjugate, Y)
    for y in (frame["y"], xarray.DataArray(Y, dims="row")):
        program = bound(conjugate, y)
        assert program.arguments.opaque == ()
        assert program.data_hash == plain.data_hash


def test_data_of_a_models_own():
    def model(data):
        numpyro.sample("y", dist.Normal(numpyro.sample("m", dist.Normal(0, 1)), 1), obs=data["y"])

    tree = quiet(model, data={"y": Y})
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    assert "posterior_predictive" in ppl.predict(tree, model, data={"y": Y}).children
    with pytest.raises(ppl.errors.OptionError, match="dictionary"):
        ppl.infer(conjugate, data=Y)


def test_lists_and_closures_are_data_too():
    """What the model takes from elsewhere is in the hash of the data, not of the model."""

    def listed(y):
        m = numpyro.sample("m", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(m, 1), obs=jnp.array(y))

    one, two = bound(listed, [0, 1, 2]), bound(listed, [0, 1, 5])
    assert one.model_hash == two.model_hash
    assert one.data_hash != two.data_hash
    conditioned = [
        bound(handlers.condition(eight_schools, {"y": EFFECTS + i}), ERRORS) for i in (0, 0, 1)
    ]
    assert conditioned[0].data_hash == conditioned[1].data_hash != conditioned[2].data_hash


def test_inside_jit_is_refused():
    import jax

    with pytest.raises(DataError, match="inside jit"):
        jax.jit(lambda y: bound(conjugate, y).size)(Y)


# --- computed observations ----------------------------------------------------------------------


def test_observations_that_the_model_computes_are_in_the_result_and_checked():
    def model(x):
        m = numpyro.sample("m", dist.Normal(0, 1))
        numpyro.sample("double", dist.Normal(m, 1), obs=2 * x)
        numpyro.sample("residual", dist.Normal(0, 1), obs=x - m)

    tree = quiet(model, Y)
    np.testing.assert_allclose(tree["observed_data"]["double"], 2 * Y, rtol=1e-12)
    assert "residual" not in tree["observed_data"]

    def logged(x):
        m = numpyro.sample("m", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(m, 1), obs=jnp.log(x))

    with pytest.raises(DataError, match=r"computed for y.*index \(1,\)"):
        ppl.infer(logged, Y, progress=False)


def test_summed_out_sites_have_no_pointwise_likelihood():
    def mixture(y):
        m = numpyro.sample("m", dist.Normal(0, 5).expand([2]).to_event(1))
        with numpyro.plate("row", y.shape[0]):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("y", dist.Normal(m[z], 1), obs=y)

    tree = quiet(mixture, Y)
    with pytest.raises(MethodError, match="MixtureSameFamily"):
        ppl.log_likelihood(tree, mixture, Y)
