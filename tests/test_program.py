"""A Program's scores equal NumPyro's, its data are arguments, and its values invert."""

import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from model_patterns import ENUMERATED, PATTERNS
from numpyro import handlers
from numpyro.infer.util import potential_energy

from ppl_toolkit.errors import DataBakedWarning, MethodError, ModelError, SiteError
from ppl_toolkit.program import Program

pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


def program_of(pattern, args=None, kwargs=None):
    return Program(
        pattern.model,
        pattern.args if args is None else args,
        pattern.kwargs if kwargs is None else kwargs,
    )


def numpyro_log_density(program, args, kwargs):
    """NumPyro's log density, and the data it takes: arrays, floats, and subsample indices."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    changing = [isinstance(leaf, np.ndarray | float) for leaf in leaves]
    fixed = list(program.subsampled)
    given = [leaf for leaf, flag in zip(leaves, changing, strict=True) if flag]
    given += program.data[len(program.arguments.arrays) :]

    def density(position, data):
        data = iter(data)
        rebuilt = [
            next(data) if flag else leaf for leaf, flag in zip(leaves, changing, strict=True)
        ]
        model = handlers.seed(program.model, jax.random.key(0))
        if fixed:
            model = handlers.substitute(model, data=dict(zip(fixed, data, strict=True)))
        args, kwargs = jax.tree.unflatten(tree, rebuilt)
        values = program.unravel(position)
        found = -potential_energy(model, args, kwargs, values)
        if "y_unobserved" in values:  # what is observed there is N(0, 1) with us
            found += dist.Normal(0.0, 1.0).mask(args[1]).log_prob(values["y_unobserved"]).sum()
        return found

    return density, given


def points(program, count=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1.5, 1.5, (count, program.size))


@pattern
def test_log_density_equals_numpyro_under_jit_with_changed_data(pattern):
    """One compiled function, two data sets: values are NumPyro's to 1e-12, gradients to 1e-10."""
    first = program_of(pattern)
    second = program_of(pattern, pattern.new_args, pattern.new_kwargs)
    assert first.size > 0
    found = []
    with first.context():
        ours = jax.jit(jax.value_and_grad(first.log_density))
        ours = ours.lower(points(first)[0], first.data).compile()
        density, given = numpyro_log_density(first, pattern.args, pattern.kwargs)
        theirs = jax.jit(jax.value_and_grad(density))
        _, new = numpyro_log_density(second, pattern.new_args, pattern.new_kwargs)
        for program, data in ((first, given), (second, new)):
            for position in points(program):
                value, gradient = ours(position, program.data)
                expected, slope = theirs(position, data)
                assert np.isfinite(expected)
                np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
                np.testing.assert_allclose(gradient, slope, rtol=1e-10, atol=1e-10)
            found.append(float(value))
    assert found[0] != found[1], "the new data must matter"


@pytest.mark.parametrize(
    "pattern",
    [pytest.param(p, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, p in enumerate(PATTERNS)],
    ids=lambda p: p.name,
)
def test_values_invert_parts_add_up_and_predictions_have_the_sites_shapes(pattern):
    program = program_of(pattern)
    position = points(program)[1]

    @jax.jit
    def everything(u, data):
        values = program.constrain(u, data)
        latent = {site.name: values[site.name] for site in program.latent}
        return {
            "values": values,
            "back": program.unconstrain(values, data),
            "prior": program.log_prior(u, data),
            "likelihood": program.log_likelihood(u, data),
            "terms": program.log_terms(latent, data),
            "joint": program.log_joint(latent, data),
            "drawn": program.predict(jax.random.key(1), latent, data),
        }

    with program.context():
        found = jax.tree.map(np.asarray, everything(position, program.data))
    np.testing.assert_allclose(found["back"], position, rtol=1e-8, atol=1e-8)
    for site in program.latent:
        assert found["values"][site.name].shape == site.shape
    for site in program.observed:
        assert found["drawn"][site.name].shape == site.shape
        assert np.all(np.isfinite(found["drawn"][site.name]))
    assert set(found["prior"]) == {site.name for site in program.latent}
    assert set(found["likelihood"]) == {site.name for site in program.observed}
    factors = {
        name: term for name, term in found["terms"].items() if program.sites[name].kind == "factor"
    }
    parts = [*found["prior"].values(), *found["likelihood"].values(), *factors.values()]
    np.testing.assert_allclose(
        sum(np.sum(part) for part in parts), found["joint"], rtol=1e-9, atol=1e-9
    )


def branching(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]))
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    loc = jax.lax.cond(z == 1, lambda: mu[0], lambda: mu[1])  # a branch has no table of values
    numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_discrete_sites_that_cannot_be_summed_out_are_refused_with_the_remedy():
    with pytest.raises(MethodError, match=r"(?s)\['z'\].*MixtureSameFamily"):
        Program(branching, (np.array(1.0),)).require_gradients("NUTS")


@pytest.mark.parametrize("pattern", ENUMERATED, ids=lambda p: p.name)
def test_summing_out_discrete_sites_equals_the_model_summed_out_by_hand(pattern):
    """Enumeration against the marginal model, under jit, on two data sets of one shape."""
    program = program_of(pattern)
    other = program_of(pattern, pattern.new_args, pattern.new_kwargs)
    by_hand = Program(pattern.marginal, pattern.args, pattern.kwargs)
    by_hand_other = Program(pattern.marginal, pattern.new_args, pattern.new_kwargs)
    assert program.marginalised
    assert [s.name for s in program.continuous] == [s.name for s in by_hand.continuous]
    with program.context():
        ours = jax.jit(jax.value_and_grad(program.log_density))
        theirs = jax.jit(jax.value_and_grad(by_hand.log_density))
        for one, two in ((program, by_hand), (other, by_hand_other)):
            for position in points(program):
                value, gradient = ours(position, one.data)
                expected, slope = theirs(position, two.data)
                np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
                np.testing.assert_allclose(gradient, slope, rtol=1e-9, atol=1e-9)


def regression(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


def test_sites_know_plates_supports_and_offsets():
    def model(x, y=None):
        numpyro.sample("sd", dist.HalfNormal(1.0))
        with numpyro.plate("school", 3):
            numpyro.sample("p", dist.Dirichlet(np.ones(4)))
        with numpyro.plate("row", 2, dim=-1), numpyro.plate("column", 5, dim=-2):
            numpyro.sample("w", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(0, 1).expand([6]).to_event(1), obs=y)

    program = Program(model, (np.ones(2),), {"y": np.zeros(6)}, dims={"y": ["time"]})
    sites = program.sites
    assert program.size == 1 + 3 * 3 + 10
    assert sites["p"].dims == ("school", "p_dim_1")
    assert sites["p"].unconstrained_shape == (3, 3)
    assert sites["w"].dims == ("column", "row")
    assert sites["w"].shape == (5, 2)
    assert sites["y"].dims == ("time",)
    assert [site.offset for site in program.continuous] == [0, 1, 10]
    assert program.coordinates[:3] == ("sd", "p[0, 0]", "p[0, 1]")


class TestStaticAndBakedData:
    """DESIGN 4: arrays are arguments, Python ints and bools are static, the rest falls back."""

    def test_ints_and_bools_reach_the_model_as_they_are(self):
        def model(groups, centred, y):
            assert type(groups) is int
            assert type(centred) is bool
            with numpyro.plate("group", groups):
                m = numpyro.sample("m", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(m.sum() if centred else 0.0, 1), obs=y)

        program = Program(model, (3, True, np.array([1.0])))
        assert program.size == 3
        assert len(program.data) == 1

    def test_python_floats_are_arguments(self):
        def model(scale, y):
            m = numpyro.sample("m", dist.Normal(0, scale))
            numpyro.sample("y", dist.Normal(m, 1), obs=y)

        program = Program(model, (2.0, 1.5))
        with program.context():
            score = jax.jit(program.log_density)
            for scale, y in ((2.0, 1.5), (0.5, -1.0)):
                new = Program(model, (scale, y))
                expected = dist.Normal(0, scale).log_prob(0.3) + dist.Normal(0.3, 1).log_prob(y)
                np.testing.assert_allclose(score(np.array([0.3]), new.data), expected, rtol=1e-12)

    @pytest.mark.parametrize("how", ["unique", "any", "int", "loop"])
    def test_a_model_that_needs_values_runs_with_a_warning_that_names_the_line(self, how):
        def model(group, y):
            if how == "unique":
                count = len(np.unique(group))
            elif how == "any":
                count = 2 if (group > 0).any() else 1
            elif how == "int":
                count = int(group.max()) + 1
            else:
                count = len({int(g) for g in group})
            with numpyro.plate("group", count):
                m = numpyro.sample("m", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(m[group], 1), obs=y)

        group, y = np.array([0, 1, 1]), np.array([0.5, 1.0, -1.0])
        with pytest.warns(DataBakedWarning, match=r"test_program\.py, line \d+"):
            program = Program(model, (group, y))
        assert program.baked
        u = np.array([0.2, -0.3])
        with program.context():
            expected = (
                dist.Normal(0, 1).log_prob(u).sum() + dist.Normal(u[group], 1).log_prob(y).sum()
            )
            np.testing.assert_allclose(program.log_density(u, program.data), expected, rtol=1e-12)

    def test_closed_over_arrays_warn_and_are_read_afresh(self):
        offset = np.arange(3.0)

        def model(y):
            m = numpyro.sample("m", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(m + offset, 1), obs=y)

        y = np.zeros(3)
        with pytest.warns(DataBakedWarning, match=r"line \d+ uses array 'offset' of shape \(3,\)"):
            first = Program(model, (y,))
        one = first.traced("log_density")
        offset = offset + 10.0
        with pytest.warns(DataBakedWarning):
            two = Program(model, (y,)).traced("log_density")
        assert one.text() == two.text()  # the values are not part of the compiled program
        with first.context():
            for traced, values in ((one, offset - 10.0), (two, offset)):
                expected = (
                    dist.Normal(0, 1).log_prob(0.5) + dist.Normal(0.5 + values, 1).log_prob(y).sum()
                )
                np.testing.assert_allclose(
                    traced(traced.consts, np.array([0.5]), (y,)), expected, rtol=1e-12
                )

    def test_data_frames_work_as_constants(self):
        import pandas

        frame = pandas.DataFrame({"x": [1.0, 2.0], "y": [0.5, 1.0]})

        def model(frame):
            m = numpyro.sample("m", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(m * frame["x"].values, 1), obs=frame["y"].values)

        with pytest.warns(DataBakedWarning, match="data frame"):
            program = Program(model, (frame,))
        assert program.size == 1

    def test_plain_models_do_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Program(regression, (np.ones(3),), {"y": np.zeros(3)})


def test_hashes_tell_models_and_data_apart():
    def other(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 2))
        with numpyro.plate("row", x.shape[0]):
            numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)

    x, y = np.arange(3.0), np.zeros(3)
    base = Program(regression, (x,), {"y": y})
    assert Program(regression, (x,), {"y": y}).model_hash == base.model_hash
    assert Program(regression, (x + 1,), {"y": y}).model_hash == base.model_hash
    assert Program(regression, (x + 1,), {"y": y}).data_hash != base.data_hash
    assert Program(other, (x,), {"y": y}).model_hash != base.model_hash
    assert Program(other, (x,), {"y": y}).data_hash == base.data_hash


def test_prior_draws_follow_the_prior():
    """Mean and variance of 20000 draws within 5 standard errors (false alarm below 1e-5)."""

    def model():
        numpyro.sample("a", dist.Normal(2.0, 3.0))
        numpyro.deterministic("twice", numpyro.sample("b", dist.Exponential(0.5)) * 2)

    program = Program(model)
    with program.context():
        keys = jax.random.split(jax.random.key(0), 20_000)
        draws = jax.vmap(lambda k: program.prior(k, program.data))(keys)
    a, twice = np.asarray(draws["a"]), np.asarray(draws["twice"])
    n = len(a)
    assert abs(a.mean() - 2.0) < 5 * 3.0 / np.sqrt(n)
    assert abs(a.var() - 9.0) < 5 * 9.0 * np.sqrt(2 / n)
    assert abs(twice.mean() - 4.0) < 5 * 4.0 / np.sqrt(n)
    np.testing.assert_array_equal(twice, 2 * np.asarray(draws["b"]))


class TestErrors:
    def test_flat_priors_cannot_be_drawn_from(self):
        def model():
            numpyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))

        program = Program(model)
        with pytest.raises(MethodError, match="flat"), program.context():
            program.prior(jax.random.key(0), program.data)

    def test_unconstrain_needs_every_site(self):
        program = Program(regression, (np.ones(2),), {"y": np.zeros(2)})
        with pytest.raises(SiteError, match="slope"), program.context():
            program.unconstrain({}, program.data)

    def test_errors_of_the_model_name_its_line(self):
        def model(x):
            numpyro.sample("a", dist.Normal(0, 1))
            raise RuntimeError("boom")

        with pytest.raises(ModelError, match=r"RuntimeError at .*test_program\.py, line \d+.*boom"):
            Program(model, (np.ones(2),))
