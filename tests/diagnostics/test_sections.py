"""Sections of the report page that only some results have: their numbers, and when they appear."""

import functools
import html
import json
import re

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from helpers import quiet
from models import EFFECTS, ERRORS, die, eight_schools, eight_schools_centred
from numpyro.contrib.control_flow import scan
from pages import Document, check, made

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.dimensions import sizes, transitions
from ppl_toolkit.diagnostics.evidence import combined
from ppl_toolkit.diagnostics.graph import Node, graph, layers
from ppl_toolkit.diagnostics.model import support_words
from ppl_toolkit.diagnostics.page import html as page_of
from ppl_toolkit.diagnostics.residuals import bins, by_group
from ppl_toolkit.diagnostics.structure import model_sites, model_source
from ppl_toolkit.program import Program

RNG = np.random.default_rng(11)


@pytest.fixture(autouse=True)
def own_draws():
    """Every test has the same draws, whatever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(11).bit_generator.state


S = (4, 200)


def page(tree):
    """The page of a result, checked, and its sections."""
    text = page_of(tree)
    return text, set(check(text).ids)


def section(text, ident):
    return html.unescape(re.search(f'<section id="{ident}".*?</section>', text, re.S).group(0))


def rows(text, table):
    """The cells of a small table, by the heading of the row."""
    body = re.search(f'<table id="{table}">.*?</table>', text, re.S).group(0)
    found = {}
    for row in re.findall("<tr>(.*?)</tr>", body.partition("<tbody>")[2]):
        cells = re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row)
        found[html.unescape(cells[0])] = [re.sub("<[^>]*>", "", c) for c in cells[1:]]
    return found


# -- the model ----------------------------------------------------------------------------------


def parents(model, *args, **kwargs):
    return {s["name"]: s["parents"] for s in model_sites(Program(model, args, kwargs))}


class TestStructure:
    def test_a_hierarchy(self):
        expected = {"mu": [], "tau": [], "theta": ["mu", "tau"], "y": ["theta"]}
        assert parents(eight_schools_centred, ERRORS, y=EFFECTS) == expected

    def test_deterministic_sites_stand_between(self):
        found = parents(eight_schools, ERRORS, y=EFFECTS)
        assert found == {"mu": [], "tau": [], "z": [], "theta": ["mu", "tau", "z"], "y": ["theta"]}

    def test_discrete_sites_and_factors(self):
        def mixture(y):
            w = numpyro.sample("w", dist.Dirichlet(np.ones(2)))
            m = numpyro.sample("m", dist.Normal(0, 1).expand([2]).to_event(1))
            with numpyro.plate("row", y.shape[0]):
                z = numpyro.sample("z", dist.Categorical(w))
                numpyro.sample("y", dist.Normal(m[z], 1), obs=y)
            numpyro.factor("penalty", -(w[0] ** 2))

        sites = {s["name"]: s for s in model_sites(Program(mixture, (np.zeros(5),)))}
        assert {n: s["parents"] for n, s in sites.items()} == {
            "w": [], "m": [], "z": ["w"], "y": ["m", "z"], "penalty": ["w"],
        }  # fmt: skip
        assert [s["kind"] for s in sites.values()] == [*["latent"] * 3, "observed", "factor"]
        assert sites["m"]["plates"] == []
        assert sites["y"]["plates"] == ["row"]
        assert sites["y"]["shape"] == [5]
        assert sites["z"]["distribution"] == "CategoricalProbs"

    def test_a_series(self):
        def walk(y):
            s = numpyro.sample("s", dist.HalfNormal(1))

            def step(x, now):
                x = numpyro.sample("x", dist.Normal(x, s))
                numpyro.sample("y", dist.Normal(x, 1), obs=now)
                return x, None

            scan(step, 0.0, y)

        assert parents(walk, np.zeros(7)) == {"s": [], "x": ["s"], "y": ["x"]}

    def test_what_a_site_does_not_read_is_no_parent(self):
        def model(y):
            a = numpyro.sample("a", dist.Normal(0, 1))
            b = numpyro.sample("b", dist.Normal(0, 1))
            numpyro.sample("c", dist.Normal(0 * np.ones(()), 1))
            numpyro.sample("y", dist.Normal(a, np.exp(1.0)), obs=y)
            numpyro.deterministic("d", b + 1)

        assert parents(model, 1.0) == {"a": [], "b": [], "c": [], "y": ["a"], "d": ["b"]}

    def test_the_source(self):
        assert model_source(eight_schools).startswith("def eight_schools(sigma, y=None):")
        assert model_source(numpyro.handlers.seed(die, 0)).startswith("def die(y):")
        assert model_source(functools.partial(die, 1.2)).startswith("def die(y):")
        assert model_source(Node("x")).startswith("class Node(NamedTuple):")
        assert model_source(len) == ""
        assert model_source(eval("lambda: None")) == ""

    def test_a_run_records_them(self, tmp_path):
        tree = quiet(eight_schools, ERRORS, y=EFFECTS, draws=20, warmup=50)
        with ppl.load(ppl.save(tree, tmp_path / "run.nc")) as again:
            for result in (tree, again):
                sites = json.loads(result.attrs["model_sites"])
                assert [s["name"] for s in sites] == ["mu", "tau", "z", "theta", "y"]
                assert result.attrs["model_source"] == model_source(eight_schools)


@pytest.fixture(scope="module")
def text():
    tree = quiet(eight_schools, ERRORS, y=EFFECTS, draws=100, warmup=100)
    return page(tree)[0]


class TestModelSection:
    def test_it_has_sites_picture_and_source(self, text):
        found = rows(text, "sites")
        assert found["tau"] == ["latent", "HalfCauchy", "&gt; 0", "scalar", "", ""]
        assert found["theta"] == ["deterministic", "", "", "8", "school", "mu, tau, z"]
        part = section(text, "model")
        assert (
            'aria-label="Graph of the model: theta depends on mu, tau, z; y depends on theta.'
            in (part)
        )
        assert part.count('class="head"') == 4  # arrows
        assert 'numpyro.sample("tau", dist.HalfCauchy(5))' in part

    def test_sites_are_listed_once(self, text):
        assert text.count('id="sites"') == 1
        assert "sites" in check(page_of(made({"x": RNG.normal(size=S)}))).ids  # of other makers

    def test_results_that_say_nothing_have_none(self):
        for attrs in ({}, {"model_sites": "[]", "model_source": ""}, {"model_sites": "no JSON"}):
            assert "model" not in page(made({"x": RNG.normal(size=S)}, attrs=attrs))[1]

    def test_source_is_text(self):
        tree = made({"x": RNG.normal(size=S)}, attrs={"model_source": "a < b  # </pre><b>"})
        assert "a &lt; b  # &lt;/pre&gt;&lt;b&gt;" in page(tree)[0]

    def test_supports_in_words(self):
        for text, words in {
            "Real()": "real",
            "Positive(lower_bound=0.0)": "> 0",
            "GreaterThanEq(lower_bound=-2.0)": "≥ −2",
            "Interval(lower_bound=-1, upper_bound=2.5)": "−1 to 2.5",
            "Interval(lower_bound=JitTracer(float64[]), upper_bound=JitTracer(float64[]))":
                "interval",
            "IntegerInterval(lower_bound=0, upper_bound=2)": "0, …, 2",
            "IndependentConstraint(OrderedVector(), 0)": "ordered vector",
            "CorrCholesky()": "corr cholesky",
            "": "",
        }.items():  # fmt: skip
            assert support_words(text) == words


class TestGraph:
    def test_layers(self):
        above = {"c": ["a"], "d": ["c", "b"]}
        assert layers(["a", "b", "c", "d"], above) == {"a": 0, "b": 1, "c": 1, "d": 2}

    def test_a_cycle_has_layers_too(self):
        assert layers(["x", "y"], {"x": ["y"], "y": ["x"]}) == {"x": 0, "y": 1}
        assert layers(["x"], {"x": ["x"]}) == {"x": 0}

    def test_nodes_do_not_overlap(self):
        names = [f"n{i}" for i in range(30)]
        above = {n: [names[j] for j in RNG.choice(i, min(i, 3), replace=False)]
                 for i, n in enumerate(names)}  # fmt: skip
        svg = graph([Node(n, "Normal") for n in names], above, "many")
        found = re.findall(r'<rect [^>]*x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', svg)
        boxes = [tuple(map(float, numbers)) for numbers in found]
        assert len(boxes) == 30
        for i, (x, y, w) in enumerate(boxes):
            assert all(v != y or u >= x + w or x >= u + z for u, v, z in boxes[:i])
        assert svg.count('class="head"') == sum(map(len, above.values()))


# -- evidence -----------------------------------------------------------------------------------


def stages(**arrays):
    return xarray.Dataset(
        {name: (("chain", "stage"), np.asarray(x, float)) for name, x in arrays.items()},
        attrs={"particles": 100},
    )


class TestEvidence:
    def test_evidences_are_averaged_not_their_logarithms(self):
        """Z = 1, 2, 3: mean 2, standard deviation 1."""
        found = combined(np.log([1.0, 2.0, 3.0]))
        assert found.log == pytest.approx(np.log(2.0), abs=1e-14)
        assert found.se == pytest.approx(1 / (2 * np.sqrt(3)), abs=1e-14)

    def test_far_below_what_floats_hold(self):
        found = combined(-5000 + np.log([1.0, 3.0]))
        assert found.log == pytest.approx(-5000 + np.log(2.0), abs=1e-11)
        assert found.se == pytest.approx(0.5, abs=1e-9)

    def test_single_and_lost_chains(self):
        assert combined([-3.0]).log == -3.0
        assert np.isnan(combined([-3.0]).se)
        assert combined([-3.0, np.nan, -3.0]) == (-3.0, 0.0)
        assert np.isnan(combined([]).log)

    def test_the_section(self):
        smc = stages(
            temperature=[[0.1, 0.5, 1.0, np.nan], [0.1, 0.3, 0.6, 1.0]],
            ess=[[50, 20, 60, np.nan], [50, 55, 60, 58]],
            log_evidence=[[-1, -2, -3, np.nan], [-1, -2, -3, -4]],
            acceptance_rate=[[0.6, 0.4, 0.2, np.nan], [0.05] * 4],
            n_moves=[[5, 5, 5, np.nan], [5] * 4],
        )
        tree = made({"x": RNG.normal(size=(2, 100))}, smc=smc)
        text, ids = page(tree)
        for ident in ("evidence", "log-evidence", "smc-temperature", "smc-ess",
                      "smc-acceptance-rate", "smc-n-moves", "smc-log-evidence"):  # fmt: skip
            assert ident in ids, ident
        assert "smc-step-size" not in ids
        z = combined([-3.0, -4.0])
        part = section(text, "evidence")
        assert f"<b>−{-z.log:.2f}</b>" in part
        assert f"<b>{z.se:.2g}</b>" in part
        found = rows(text, "by-chain-smc")
        assert found["chain 0"] == ["−3.00", "3", "▲ fails: 20", "0.4", "15"]
        assert found["chain 1"] == ["−4.00", "4", "50", "▲ fails: 0.05", "20"]

    def test_the_samplers_own_estimate_comes_first(self):
        tree = made({"x": RNG.normal(size=(2, 100))}, smc=stages(temperature=[[0.5, 1.0]] * 2))
        assert "log evidence" not in section(page_of(tree), "evidence")
        tree["sample_stats"] = xarray.DataTree(
            xarray.Dataset({"log_evidence": ("chain", [-7.0, -7.0])})
        )
        text, ids = page(tree)
        assert "<b>−7.000</b>" in section(text, "evidence")
        assert "log-evidence" not in ids  # nothing to see in points of one height
        assert "sampler" not in ids

    def test_one_chain_has_no_error(self):
        tree = made({"x": RNG.normal(size=(1, 100))}, smc=stages(log_evidence=[[-1.0, -2.0]]))
        part = section(page(tree)[0], "evidence")
        assert "its error is not known" in part
        assert "standard error" not in part

    def test_enumeration_is_exact(self):
        tree = quiet(die, 1.2, draws=100)
        exact = np.log(sum(
            w * np.exp(-0.5 * (1.2 - k) ** 2) / np.sqrt(2 * np.pi)
            for k, w in enumerate((0.2, 0.3, 0.5))
        ))  # fmt: skip
        part = section(page(tree)[0], "evidence")
        assert f"<b>−{-exact:.7g}</b>" in part
        assert "exact" in part

    def test_nothing_known_at_any_stage(self):
        empty = {"temperature": np.full((2, 3), np.nan), "ess": np.full((2, 3), np.nan)}
        assert (
            "evidence" not in page(made({"x": RNG.normal(size=(2, 100))}, smc=stages(**empty)))[1]
        )


# -- dimensions ---------------------------------------------------------------------------------


def changing(k, stats=None, moves=None, **groups):
    active = np.arange(6) < k[..., None]
    tree = made(
        {"k": k, "at": np.where(active, RNG.normal(size=active.shape), np.nan),
         "x": RNG.normal(size=k.shape)},
        stats,
        {"trans_dimensional": json.dumps({"change": "k"}), "moves": json.dumps(moves or [])},
        **groups,
    )  # fmt: skip
    tree["posterior"] = xarray.DataTree(tree["posterior"].to_dataset().rename(at_dim_0="change"))
    return tree


class TestDimensions:
    def test_probabilities_and_their_errors(self):
        """Shares of 2: 1/2 and 1, so 3/4 with error sd(1/2, 1) / sqrt(2) = 1/4."""
        found = sizes([[2, 2, 4, 4], [2, 2, 2, 2]])
        np.testing.assert_array_equal(found.values, [2, 3, 4])
        np.testing.assert_allclose(found.probability, [0.75, 0.0, 0.25])
        np.testing.assert_allclose(found.se, [0.25, 0.0, 0.25])
        assert np.isnan(sizes([[1, 2]]).se).all()

    def test_transitions_stay_within_chains(self):
        values, counts = transitions([[1, 1, 2, 1], [3, 3, 3, 2]])
        np.testing.assert_array_equal(values, [1, 2, 3])
        np.testing.assert_array_equal(counts, [[1, 1, 0], [1, 0, 0], [0, 1, 2]])

    @pytest.mark.filterwarnings("error::RuntimeWarning:ppl_toolkit.diagnostics")
    def test_the_section(self):
        k = RNG.integers(0, 4, S)
        move = np.arange(200) % 2 + np.zeros(S, int)
        accepted = np.arange(200) % 4 == np.zeros(S)  # moves 0 only, every other one
        tree = changing(k, {"move": move, "accepted": accepted}, ["birth", "shift"],
                        prior={"k": RNG.integers(0, 4, (1, 50))})  # fmt: skip
        text, ids = page(tree)
        assert {"dimensions", "size-k", "transitions-k", "moves"} <= ids
        part = section(text, "dimensions")
        jumps = (np.diff(k, axis=1) != 0).sum(axis=1)
        assert ", ".join(map(str, jumps)) in part
        assert f"<b>{jumps.sum()}</b>" in part
        assert f"<b>{np.asarray(ppl.summary(tree, 'k')['r_hat'])[0]:.3f}</b>" in part
        assert "dots: the prior" in part
        _, counts = transitions(k)
        assert [[int(c) for c in row] for row in rows(text, "transitions-k").values()] == (
            counts.tolist()
        )
        assert rows(text, "moves") == {
            "birth": ["400", "200", "0.500", "0.500 to 0.500"],
            "shift": ["400", "0", "0.000", "0.000 to 0.000"],
        }

    def test_elements_without_identity_have_no_forest_of_their_own(self):
        text = page_of(changing(RNG.integers(0, 7, S)))
        assert "<b>at</b>" not in section(text, "posterior")
        assert "<b>at</b>" in section(text, "dimensions")
        assert "<b>x</b>" in section(text, "posterior")

    def test_chains_that_hardly_jump(self):
        k = np.ones(S, int)
        k[0, 100:] = 2
        part = section(page(changing(k))[0], "dimensions")
        assert "changed k 0 times only" in part

    @pytest.mark.parametrize("k", [np.ones(S, int), np.ones((1, 1), int), np.full((2, 3), 6)])
    def test_sizes_that_never_change(self, k):
        assert "dimensions" in page(changing(k))[1]

    @pytest.mark.parametrize("attribute", ["{}", "no JSON", '{"change": "gone"}', "[1]"])
    def test_models_of_fixed_dimension_have_none(self, attribute):
        tree = made({"x": RNG.normal(size=S)}, attrs={"trans_dimensional": attribute})
        assert "dimensions" not in page(tree)[1]


# -- residuals ----------------------------------------------------------------------------------


def observed(y, draws, coords=None, dims=("row",), **given):
    tree = made({"x": RNG.normal(size=draws.shape[:2])}, posterior_predictive={"y": draws},
                observed_data=xarray.Dataset({"y": (dims, y)}, coords=coords),
                constant_data=xarray.Dataset(given))  # fmt: skip
    renamed = {f"y_dim_{i}": dim for i, dim in enumerate(dims)}
    group = tree["posterior_predictive"].to_dataset().rename(renamed)
    tree["posterior_predictive"] = xarray.DataTree(group)
    return tree


class TestResiduals:
    def test_means_and_intervals_by_group(self):
        predicted = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])  # means 1, 2, 3
        found = by_group([1.5, 2.5, 0.0], predicted, [0, 0, 1])
        np.testing.assert_allclose(found.mean, [0.5, -3.0])
        np.testing.assert_allclose(found.low, [-0.89, -0.89])  # between -1 and 1
        np.testing.assert_allclose(found.high, [0.89, 0.89])
        np.testing.assert_array_equal(found.size, [2, 1])
        np.testing.assert_array_equal(found.outside, [False, True])

    def test_intervals_know_of_correlation(self):
        """Observations that move as one: their mean is no narrower than each of them."""
        shared = RNG.normal(size=(2000, 1)) + np.zeros((2000, 10))
        one = by_group(np.zeros(10), shared, np.arange(10))
        both = by_group(np.zeros(10), shared, np.zeros(10, int))
        np.testing.assert_allclose(both.high, one.high[:1])
        alone = by_group(np.zeros(10), RNG.normal(size=(2000, 10)), np.zeros(10, int))
        assert alone.high[0] == pytest.approx(1.598 / np.sqrt(10), rel=0.1)

    @pytest.mark.parametrize("kind", ["normal", "poisson", "bernoulli"])
    def test_a_right_model_is_outside_one_time_in_nine(self, kind):
        rng = np.random.default_rng(5)
        draw = {"normal": lambda n: rng.normal(size=n), "poisson": lambda n: rng.poisson(30, n),
                "bernoulli": lambda n: rng.integers(0, 2, n)}[kind]  # fmt: skip
        group = np.repeat(np.arange(400), 100)
        found = by_group(draw(40_000), draw((200, 40_000)), group)
        # binomial error of 400 groups, and that of quantiles of 200 draws
        assert found.outside.mean() == pytest.approx(0.11, abs=4 * np.sqrt(0.11 * 0.89 / 400))

    def test_bins(self):
        at, group = bins([3.0, 1.0, 3.0])
        np.testing.assert_array_equal(at, [1.0, 3.0])
        np.testing.assert_array_equal(group, [1, 0, 1])
        at, group = bins(np.arange(1000.0))
        np.testing.assert_array_equal(np.bincount(group), [50] * 20)
        assert at[0] == 24.5
        heavy = np.concatenate([np.zeros(500), np.arange(100.0)])
        at, group = bins(heavy)
        assert (np.bincount(group) > 0).all()
        assert len(at) == len(np.bincount(group))

    def test_numbers_and_labels_and_given_data(self):
        y = np.array([0.0, 0.0, 0.0, 9.0])
        draws = RNG.normal(size=(2, 200, 4))
        tree = observed(y, draws, {"row": ["d", "b", "a", "c"]}, dose=("row", [1.0, 2.0, 2.0, 3.0]))
        text, ids = page(tree)
        assert "residuals" in ids
        part = section(text, "residuals")
        assert "<b>y by row</b><span>1 of 4 residuals are outside 89%." in part
        assert "<b>y along dose</b><span>1 of 3 means are outside 89%." in part
        assert re.findall(">([abcd])</text>", part) == ["d", "b", "a", "c"]  # in their own order

    def test_a_panel_for_every_dimension(self):
        days = {"day": np.datetime64("2024-02-28") + np.arange(3)}
        draws = RNG.normal(size=(2, 100, 3, 4))
        tree = observed(np.zeros((3, 4)), draws, days, ("day", "place"))
        part = section(page(tree)[0], "residuals")
        assert "<b>y along day</b>" in part
        assert "<b>y along place</b>" in part
        assert "2024-02-29" in part

    def test_a_pattern_shows(self):
        x = np.linspace(-1, 1, 300)
        draws = np.random.default_rng(1).normal(size=(2, 200, 300)) + 1.0
        tree = observed(3 * x**2, draws, {"row": x})
        outside = re.search(r"(\d+) of 20 means are outside", page_of(tree))
        assert int(outside.group(1)) > 11

    def test_zeros_and_ones_are_shown_as_means(self):
        tree = observed(RNG.integers(0, 2, 300), RNG.integers(0, 2, (2, 200, 300)))
        assert "single residuals" not in section(page(tree)[0], "residuals")

    def test_many_labels_are_cut(self):
        labels = [f"place {i}" for i in range(100)]
        tree = observed(np.zeros(100), RNG.normal(size=(2, 50, 100)), {"row": labels})
        part = section(page(tree)[0], "residuals")
        assert "The 30 of 100 that are furthest" in part

    def test_absent_without_predictions_or_an_axis(self):
        assert "residuals" not in page(made({"x": RNG.normal(size=S)}))[1]
        for y, shape in ((0.3, ()), (np.zeros(1), (1,)), (np.full(3, np.nan), (3,))):
            dims = ("row",)[: len(shape)]
            tree = observed(y, RNG.normal(size=(2, 100, *shape)), dims=dims)
            assert "residuals" not in page(tree)[1]


# -- sensitivity --------------------------------------------------------------------------------


def mean_of(y, scale):
    m = numpyro.sample("m", dist.Normal(0.0, scale))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


class TestSensitivity:
    @staticmethod
    def scored(model, *args, **kwargs):
        return ppl.log_likelihood(quiet(model, *args, **kwargs), model, *args, **kwargs)

    def test_conflict(self, capfd):
        tree = self.scored(mean_of, np.full(4, 8.0), 1.0)
        text, ids = page(tree)
        assert {"sensitivity", "prior-likelihood"} <= ids
        table = ppl.sensitivity(tree)
        capfd.readouterr()
        found = rows(page_of(tree), "by-scalar")
        assert found["m"] == [
            f"{table['prior'].iloc[0]:.3f}", f"{table['likelihood'].iloc[0]:.3f}",
            "▲ fails: prior and data may disagree",
        ]  # fmt: skip
        assert "in different directions" in section(text, "sensitivity")
        assert capfd.readouterr() == ("", "")

    def test_agreement(self):
        text = page(self.scored(mean_of, RNG.normal(size=50), 10.0))[0]
        assert rows(text, "by-scalar")["m"][2] == ""
        assert "in different directions" not in text

    def test_learned_priors_are_no_conflict(self):
        tree = self.scored(eight_schools_centred, ERRORS, y=EFFECTS)
        found = rows(page(tree)[0], "by-scalar")
        told = {name: cells[2] for name, cells in found.items() if float(cells[0]) > 0.05}
        assert told
        assert all(("pooled" in words) == name.startswith("theta") for name, words in told.items())

    def test_findings_of_it_lead_there(self):
        tree = self.scored(mean_of, np.full(4, 8.0), 1.0)
        found = [{"kind": "conflict", "severity": "warning", "sites": ["m"], "number": 1.0,
                  "message": "Seen.", "remedy": "Do."}]  # fmt: skip
        tree.attrs["findings"] = json.dumps(found)
        assert 'Seen. <a href="#sensitivity">' in page(tree)[0]

    def test_a_bounded_table(self):
        draws = RNG.normal(size=(*S, 60))
        tree = made({"x": draws}, log_prior={"x": -0.5 * draws**2},
                    log_likelihood={"y": -0.5 * draws[..., :20] ** 2})  # fmt: skip
        text, _ = page(tree)
        found = rows(text, "by-scalar")
        assert len(found) == 40
        prior = [float(cells[0]) for cells in found.values()]
        assert prior == sorted(prior, reverse=True)
        assert "The table has the 40 most sensitive" in text

    @pytest.mark.parametrize("group", ["log_prior", "log_likelihood"])
    def test_absent_without_both_groups(self, group):
        tree = made({"x": RNG.normal(size=S)}, **{group: {"x": RNG.normal(size=S)}})
        assert "sensitivity" not in Document(page_of(tree)).ids
