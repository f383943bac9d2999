"""Bad input gives a typed error that says what was seen and what to do, before any compilation."""

import functools
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import EFFECTS, ERRORS, conjugate, eight_schools

import ppl_toolkit as ppl
from ppl_toolkit.errors import (
    CheckpointError,
    DataError,
    MethodError,
    ModelError,
    OptionError,
    PPLError,
    SiteError,
)

infer = functools.partial(ppl.infer, progress=False)
schools = functools.partial(infer, eight_schools, ERRORS, y=EFFECTS)
NAN = np.where(np.arange(8) == 2, np.nan, EFFECTS)


def flat(y):
    m = numpyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(m, 1), obs=y)


def counts(y):
    rate = numpyro.sample("rate", dist.Gamma(2, 1))
    numpyro.sample("y", dist.Poisson(rate), obs=y)


def chances(y):
    p = numpyro.sample("p", dist.Beta(2, 2))
    numpyro.sample("y", dist.Bernoulli(p), obs=y)


def kinds(y):
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("y", dist.Categorical(p), obs=y)


def waits(y):
    rate = numpyro.sample("rate", dist.Gamma(2, 1))
    numpyro.sample("y", dist.Exponential(rate), obs=y)


def mixed(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(m + k, 1), obs=y)


def unbounded_beside_continuous(y):
    k = numpyro.sample("k", dist.Poisson(3.0))
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(m + k, 1), obs=y)


def unbounded(y):
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(k, 1), obs=y)


def many(y):
    with numpyro.plate("n", 30):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k.sum(), 1), obs=y)


def wrong_plate(x, y):
    m = numpyro.sample("m", dist.Normal(0, 1))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(m * x, 1), obs=y)


def wrong_shapes(x, y):
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(m * (x + y), 1), obs=y)


def twice(y):
    numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def only_data(y):
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def raises(y):
    raise KeyError("a bug of the user's")


def nothing(y):
    return y


def vector_density(x):
    return -0.5 * x**2


def tables():
    frame = np.array([{"a": 1}, None], dtype=object)
    return frame


CASES = {
    # the model
    "model is not a function": (lambda: infer(3.0), ModelError, "must be a function"),
    "arguments missing": (lambda: infer(eight_schools), ModelError, r"sigma.*signature"),
    "argument unknown": (lambda: schools(z=1), ModelError, "unexpected keyword"),
    "no sample site": (lambda: infer(nothing, EFFECTS), ModelError, "no numpyro.sample site"),
    "model raises": (lambda: infer(raises, EFFECTS), ModelError, r"KeyError at .*line \d+"),
    "site named twice": (lambda: infer(twice, EFFECTS), ModelError, "'?m'?"),
    "shapes clash in the model": (
        lambda: infer(wrong_shapes, np.ones(3), np.ones(4)), ModelError, r"wrong_shapes.*line \d+",
    ),
    "nothing latent": (lambda: infer(only_data, EFFECTS), MethodError, "no latent site"),
    # the data
    "NaN observed": (lambda: schools(y=NAN), DataError, r"'y' has 1 NaN of 8.*\(2,\)"),
    "NaN covariate": (lambda: infer(eight_schools, NAN, y=EFFECTS), DataError, "'sigma' has 1 NaN"),
    "infinite observed": (
        lambda: schools(y=np.where(EFFECTS > 20, np.inf, EFFECTS)), DataError, "non-finite",
    ),
    "empty observed": (lambda: infer(conjugate, np.zeros(0)), DataError, r"\['y'\] are empty"),
    "length differs from plate": (
        lambda: infer(wrong_plate, np.ones(3), np.ones(4)), DataError, r"\(4,\).*\(3,\)",
    ),
    "negative counts": (lambda: infer(counts, np.array([1, -2])), DataError, r"-2 at index \(1,\)"),
    "fractional counts": (lambda: infer(counts, np.array([1.0, 0.5])), DataError, "outside"),
    "Bernoulli of 2": (lambda: infer(chances, np.array([0, 1, 2])), DataError, "outside"),
    "a fourth kind of three": (
        lambda: infer(kinds, np.array([0, 3, 2])), DataError, r"3 at index \(1,\).*upper_bound=2",
    ),
    "a kind below the first": (lambda: infer(kinds, np.array([1, -1])), DataError, "value -1"),
    "negative waiting": (lambda: infer(waits, np.array([1.0, -1.0])), DataError, "Exponential"),
    "list observed": (lambda: infer(only_data_and_mean, [1.0, 2.0]), DataError, "np.asarray"),
    "array of objects": (lambda: infer(conjugate, tables()), DataError, "dtype object"),
    "complex data": (lambda: infer(conjugate, np.ones(3) * 1j), DataError, "complex"),
    # options
    "draws 0": (lambda: schools(draws=0), OptionError, "draws must be an integer >= 1; got 0"),
    "draws fractional": (lambda: schools(draws=10.5), OptionError, "draws"),
    "draws boolean": (lambda: schools(draws=True), OptionError, "draws"),
    "chains 0": (lambda: schools(chains=0), OptionError, "chains"),
    "a start for SMC": (
        lambda: schools(method="smc", init={"mu": 0.0}), OptionError, "leave init= out",
    ),
    "superchains 1": (lambda: schools(superchains=1), OptionError, "superchains"),
    "uneven superchains": (
        lambda: schools(chains=10, superchains=4), OptionError, "parts? chains=10 into equal",
    ),
    "superchains of one chain": (
        lambda: schools(chains=4, superchains=4), OptionError, "groups of two or more",
    ),
    "superchains and init of another number": (
        lambda: schools(chains=4, superchains=2, init={"mu": np.zeros(4)}), SiteError,
        "one value per superchain",
    ),
    "warmup negative": (lambda: schools(warmup=-1), OptionError, "warmup"),
    "chunk 0": (lambda: schools(chunk=0), OptionError, "chunk"),
    "threads 0": (lambda: schools(threads=0), OptionError, "threads"),
    "lanes 0": (lambda: schools(lanes=0), OptionError, "lanes"),
    "seed negative": (lambda: schools(seed=-1), OptionError, "seed"),
    "seed a word": (lambda: schools(seed="x"), OptionError, "seed"),
    "precision unknown": (lambda: schools(precision="half"), OptionError, "float64"),
    "progress unknown": (
        lambda: ppl.infer(eight_schools, ERRORS, y=EFFECTS, progress="wheel"), OptionError, "bar",
    ),
    # methods
    "method unknown": (lambda: schools(method="nutz"), MethodError, "no method 'nutz'.*nuts"),
    "method an odd object": (lambda: schools(method=7), MethodError, "got 7"),
    "target acceptance 1.5": (lambda: ppl.NUTS(target_acceptance=1.5), OptionError, "0 and 1"),
    "metric unknown": (lambda: ppl.NUTS(metric="low"), OptionError, "'auto' or one of"),
    "a model for options": (lambda: ppl.NUTS(eight_schools), OptionError, "model goes to infer"),
    "a matrix as metric": (lambda: ppl.NUTS(metric=np.eye(2)), OptionError, "metric must be"),
    "NumPyro's optimiser": (
        lambda: ppl.SVI(optimizer=numpyro.optim.Adam(0.02)), OptionError, "one of optax's",
    ),
    "depth 0": (lambda: ppl.NUTS(max_depth=0), OptionError, "max_depth"),
    "steps 0": (lambda: ppl.HMC(steps=0), OptionError, "steps"),
    "no step size": (lambda: schools(method="sghmc"), OptionError, "a tenth of the smallest"),
    "step size NaN": (lambda: ppl.SGLD(np.nan), OptionError, "step_size must be a positive"),
    "friction 1.5": (lambda: ppl.SGHMC(0.1, friction=1.5), OptionError, r"\(0, 1\]; got 1.5"),
    "stochastic gradients of bits": (
        lambda: infer(mixed, 1.0, method=ppl.SGLD(0.1)), MethodError, r"\['k'\] are discrete",
    ),
    "NUTS on counts": (
        lambda: infer(unbounded_beside_continuous, 1.0, method="nuts"),
        MethodError, r"\['k'\] are discrete",
    ),
    "auto on counts": (lambda: infer(unbounded_beside_continuous, 1.0), MethodError, r"\['k'\]"),
    "enumeration beside continuous": (
        lambda: infer(mixed, 1.0, method="enumeration"), MethodError, r"\['m'\] are continuous",
    ),
    "enumeration on continuous": (
        lambda: schools(method="enumeration"), MethodError, "method='nuts'",
    ),
    "enumeration of the infinite": (lambda: infer(unbounded, 1.0), MethodError, "infinitely many"),
    "enumeration of too much": (lambda: infer(many, 1.0), MethodError, "1,073,741,824"),
    "prior of a flat site": (lambda: infer(flat, 1.0, method="prior"), MethodError, "improper"),
    # labels
    "coords unknown": (lambda: schools(coords={"scool": range(8)}), DataError, "scool.*school"),
    "coords too short": (lambda: schools(coords={"school": list("abc")}), DataError, "3 labels"),
    "coords a word": (lambda: schools(coords={"school": "abc"}), DataError, "a sequence"),
    "coords of pairs": (
        lambda: schools(coords={"school": [(1, 2)] * 8}), DataError, r"one label.*\(8, 2\)",
    ),
    "coords not a dictionary": (lambda: schools(coords=[1, 2]), DataError, "dictionary.*list"),
    "dims of unknown site": (lambda: schools(dims={"w": ["d"]}), SiteError, "'w'"),
    "dims too many": (lambda: schools(dims={"mu": ["d"]}), SiteError, "mu"),
    # starting points
    "init unknown site": (lambda: schools(init={"m": 0.0}), SiteError, r"\['m'\].*mu"),
    "init of wrong shape": (lambda: schools(init={"z": np.zeros(3)}), SiteError, r"\(3,\).*\(8,\)"),
    "init not finite": (lambda: schools(init={"mu": np.nan}), DataError, "non-finite"),
    "init a word": (lambda: schools(init="middle"), OptionError, "'middle'"),
    "init prior of flat": (lambda: infer(flat, 1.0, init="prior"), MethodError, "improper"),
    "density not scalar": (
        lambda: infer(vector_density, init=np.zeros(3)), ModelError, "must return a scalar",
    ),
    # files
    "resume of nothing": (
        lambda: schools(resume="no/such/run.zarr"), CheckpointError, "does not exist",
    ),
    "resume and store": (
        lambda: schools(resume="no/such/run.zarr", store="b.zarr"), OptionError, "neither store",
    ),
    "load of nothing": (lambda: ppl.load("no/such/file.nc"), CheckpointError, "no result"),
}  # fmt: skip


def only_data_and_mean(y):
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(m, 1), obs=y)


class Compilations:
    """Counts XLA compilations through jax.monitoring."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        self.count += "backend_compile" in event


@pytest.fixture(scope="module")
def compilations():
    counter = Compilations()
    jax.jit(lambda x: x * 2 + 1)(jnp.ones(3))
    assert counter.count > 0, "the counter must count"
    return counter


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, compilations):
    call, kind, message = CASES[name]
    before = compilations.count
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        call()
    assert isinstance(caught.value, PPLError)
    assert compilations.count == before, "nothing may be compiled for bad input"
    shown = "".join(traceback.format_exception(caught.value))
    assert "/jax/_src/" not in shown, "no JAX internals in what the user sees"
    assert 20 < len(str(caught.value)) < 600


def test_there_are_at_least_forty_cases():
    assert len(CASES) >= 40
