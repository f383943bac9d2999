"""The report page: valid, self-contained, readable, right in its numbers."""

import base64
import csv
import html
import io
import json
import re
import subprocess
import time
from pathlib import Path

import arviz as az
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from helpers import quiet
from models import EFFECTS, ERRORS, eight_schools, eight_schools_centred
from pages import Document, check, made
from scipy import stats

import ppl_toolkit as ppl
from ppl_toolkit import convergence
from ppl_toolkit.diagnostics import drawing, measures, pointwise
from ppl_toolkit.diagnostics.page import html as page_of
from ppl_toolkit.diagnostics.sampler import separation
from ppl_toolkit.diagnostics.style import CHAIN_COLOURS, DARK, LIGHT
from ppl_toolkit.diagnostics.view import view
from ppl_toolkit.errors import SiteError

SCHOOLS = ["Choate", "Deerfield", "Andover", "Hotchkiss", "Lawrenceville", "St. Paul's",
           "Mt. Hermon", "Phillips Exeter"]  # fmt: skip
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def full():
    """Non-centred eight schools with every group a page can show."""
    coords = {"school": SCHOOLS}
    tree = quiet(eight_schools, ERRORS, y=EFFECTS, seed=1, coords=coords)
    tree = ppl.log_likelihood(tree, eight_schools, ERRORS, y=EFFECTS)
    tree = ppl.predict(tree, eight_schools, ERRORS, y=EFFECTS, seed=2)
    prior = quiet(eight_schools, ERRORS, y=EFFECTS, method="prior", coords=coords)
    tree["prior"] = xarray.DataTree(prior["prior"].to_dataset())
    return tree


@pytest.fixture(scope="module")
def page(full):
    return page_of(full)


@pytest.fixture(scope="module")
def centred():
    """A funnel with steps that are far too long: divergences, and chains that disagree."""
    method = ppl.NUTS(target_acceptance=0.1)
    return quiet(eight_schools_centred, ERRORS, y=EFFECTS, seed=1, method=method, warmup=19)


# -- the document -------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_nothing(page):
    document = check(page)
    for section in ("verdict", "run", "parameters", "convergence", "sampler", "posterior",
                    "prediction", "downloads", "reproduce", "r-hat", "effective-size", "worst",
                    "energy", "acceptance", "tree-depth", "divergences", "prior", "loo",
                    "residuals", "sensitivity", "model"):  # fmt: skip
        assert section in document.ids, section
    headings = [tag for tag, _ in document.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count("h1") == 1
    assert set(headings) <= {"h1", "h2", "h3"}


def test_the_same_result_gives_the_same_page(full, page, tmp_path):
    assert page_of(full) == page
    text = ppl.report(full, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "Verdict: " in text
    assert str(full.attrs["created_at"])[:10] not in page


def test_pages_of_files_are_those_of_memory(full, page, tmp_path):
    with ppl.load(ppl.save(full, tmp_path / "run.nc")) as lazy:
        assert page_of(lazy) == page
    # zarr stores do not keep the order of variables
    with ppl.load(ppl.save(full, tmp_path / "run.zarr")) as lazy:
        assert page_of(lazy, list(full["posterior"].data_vars)).count("<svg") == page.count("<svg")


def test_names_that_look_like_html_are_text():
    nasty = '<b>"x"&amp;'
    tree = made({"x": np.random.default_rng(0).normal(size=(2, 50, 2))})
    tree["posterior"] = xarray.DataTree(
        tree["posterior"].to_dataset().rename(x=nasty).assign_coords({"x_dim_0": ["<i>", "'&"]})
    )
    text = page_of(tree)
    check(text)
    assert "<b>&quot;" not in text
    assert "[<i>]" not in text
    assert html.escape(f"{nasty}[<i>]") in text


def test_a_hundred_parameters_are_small_and_quick():
    rng = np.random.default_rng(0)
    draws, size = (4, 1000), 100
    tree = made(
        {"tau": np.exp(rng.normal(size=draws)), "theta": rng.normal(size=(*draws, size - 1))},
        {
            "energy": rng.normal(size=draws),
            "diverging": rng.random(draws) < 0.02,
            "acceptance_rate": rng.random(draws),
            "tree_depth": rng.integers(2, 6, draws),
        },
        log_likelihood={"y": rng.normal(size=(*draws, 200))},
        log_prior={"tau": rng.normal(size=draws), "theta": rng.normal(size=(*draws, size - 1))},
        posterior_predictive={"y": rng.normal(size=(*draws, 200))},
        prior={"tau": np.exp(rng.normal(size=draws)), "theta": rng.normal(size=(*draws, 99))},
        observed_data=xarray.Dataset({"y": ("y_dim_0", rng.normal(size=200))}),
    )
    page_of(tree)  # imports
    before = time.process_time()
    text = page_of(tree)
    assert time.process_time() - before < 5.0
    assert len(text.encode()) < 1_500_000
    check(text)


def test_many_scalars_are_capped_with_a_note():
    x = np.random.default_rng(1).normal(size=(4, 100, 3000))
    x[0, :, 2999] += 5.0  # this one fails, so it is shown
    text = page_of(made({"x": x}))
    check(text)
    assert len(re.findall(r'<tr id="p\d+"', text)) == 500
    assert 'id="p2999"' in text
    assert 'id="p498"' in text
    assert 'id="p499"' not in text
    assert "500 of 3,000 scalars" in text
    assert len(text) < 1_500_000


# -- colours ------------------------------------------------------------------------------------


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_formula():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_of_text_and_lines(theme):
    texts = [(t, b) for t in ("ink", "mute", "link") for b in ("paper", "soft")]
    texts += [(t, f"{k}-back") for k in ("good", "mild", "bad") for t in ("ink", "link", k)]
    texts += [("mild", "bad-back"), ("bad", "mild-back")]  # tags within the verdict
    for text, back in texts:
        assert contrast(theme[text], theme[back]) >= 4.5, (text, back)
    for line in (*(f"c{i}" for i in range(CHAIN_COLOURS)), "plain", "bad", "ink"):
        assert contrast(theme[line], theme["paper"]) >= 3.0, line


def test_the_colours_on_the_page_are_those_tested(page):
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
    light, dark = style.split("@media screen and (prefers-color-scheme:dark)")
    for theme, part in ((LIGHT, light), (DARK, dark[: dark.index("}}")])):
        assert dict(re.findall(r"--([\w-]+):(#\w{6});", part)) == theme
    rest = page.replace(style, "")
    assert not re.search(r"""(?:fill|stroke|color)\s*[=:]\s*["']?(?:#|rgb|[a-z]+\b)""", rest)
    assert not re.findall(r"#[0-9a-f]{6}\b", dark[dark.index("}}") :])


# -- numbers ------------------------------------------------------------------------------------


def cells(text):
    """The parameter table: exact numbers by row label."""
    found = {}
    for row in re.findall(r'<tr id="p\d+">(.*?)</tr>', text):
        label = html.unescape(re.search(r'title="([^"]*)"', row).group(1))
        found[label] = [float(v) for v in re.findall(r'data-v="([^"]*)"', row)]
    return found


def test_the_table_equals_the_summary(full, page):
    table = ppl.summary(full)
    columns = ["mean", "sd", "eti89_lb", "eti89_ub", "mcse_mean", "mcse_sd", "ess_bulk",
               "ess_tail", "r_hat"]  # fmt: skip
    found = cells(page)
    assert list(found) == list(table.index)
    np.testing.assert_array_equal(list(found.values()), table[columns].to_numpy())


def test_cells_that_fail_are_marked_in_words(centred):
    text = page_of(centred)
    table = ppl.summary(centred)
    expected = int((table["r_hat"] > 1.01).sum())
    expected += int((table[["ess_bulk", "ess_tail"]] < 400).sum().sum())
    rows = "".join(re.findall(r'<tr id="p\d+">.*?</tr>', text))
    assert expected > 5
    assert rows.count("class=fails") == expected
    assert rows.count("▲") == rows.count(">fails: <") == expected


def test_downloads_hold_the_summary_and_the_findings(full, page):
    data = dict(re.findall(r'download="([^"]+)" href="data:[^,]*;base64,([^"]*)"', page))
    texts = {name: base64.b64decode(value).decode() for name, value in data.items()}
    rows = list(csv.reader(io.StringIO(texts["summary.csv"])))
    table = ppl.summary(full)
    assert rows[0] == ["parameter", *table.columns]
    np.testing.assert_array_equal(
        np.array([row[1:] for row in rows[1:]], dtype=float), table.to_numpy()
    )
    found = json.loads(texts["findings.json"])
    assert [f["kind"] for f in found] == [f.kind for f in ppl.findings(full)]


def test_findings_lead_to_their_evidence(centred):
    text = page_of(centred)
    check(text)
    verdict = re.search(r'<section id="verdict".*?</section>', text, re.S).group(0)
    assert "Do not use these draws yet" in verdict
    for finding in ppl.findings(centred):
        assert html.escape(finding.message) in verdict
        assert html.escape(finding.remedy) in verdict
    assert '<a href="#divergences">' in verdict
    assert '<a href="#effective-size">' in verdict
    rows = list(ppl.summary(centred).index)
    named = {finding.sites[0] for finding in ppl.findings(centred) if finding.sites}
    assert named
    for worst in named:
        assert f'<a href="#p{rows.index(worst)}">{worst}</a>' in verdict


@pytest.mark.parametrize("kind", ["divergences", "tree_depth", "bfmi", "hot", "r_hat", "ess",
                                  "stuck", "multimodal", "mcse", "khat", "predictive", "conflict",
                                  "weak_data", "precision", "parameters", "subsample",
                                  "few_draws", "not_finite", "a kind of the future"])  # fmt: skip
def test_every_kind_of_finding_has_a_place_on_every_page(kind):
    """Even where the section with the evidence is missing, as in a file without statistics."""
    found = [{"kind": kind, "severity": "warning", "sites": ["x", "gone"], "number": 1.0,
              "message": "Seen.", "remedy": "Do."}]  # fmt: skip
    for x in (normal(*S), np.zeros((4, 0))):
        text = page_of(made({"x": x}, attrs={"findings": json.dumps(found)}))
        check(text)
        assert re.search(r'Seen\. <a href="#[a-z-]+">See the evidence</a>', text)
        assert '<a href="#p0">x</a>' in text


def test_the_settings_are_those_of_the_run(full, page):
    text = html.unescape(page)
    for part in ("method=NUTS(", "target_acceptance=0.8", "seed=1", "draws=1000", "chains=4",
                 "precision='float64'", full.attrs["model_hash"],
                 full.attrs["data_hash"]):  # fmt: skip
        assert part in text, part


# -- computed quantities ------------------------------------------------------------------------


class TestMeasures:
    def test_rank_counts(self):
        """Chain 0 below chain 1: the lower ranks are all of chain 0."""
        x = np.arange(40.0).reshape(2, 20)
        np.testing.assert_array_equal(measures.rank_counts(x, 4), [[10, 10, 0, 0], [0, 0, 10, 10]])
        mixed = np.arange(40.0).reshape(20, 2).T  # the chains take turns
        np.testing.assert_array_equal(measures.rank_counts(mixed, 4), np.full((2, 4), 5))
        ties = np.zeros((2, 20))
        np.testing.assert_array_equal(measures.rank_counts(ties, 4), np.full((2, 4), 5))

    def test_rank_band_holds_all_counts_together(self):
        """400 runs of independent chains: at least 95% stay inside (Bonferroni), by 4 sigma."""
        rng = np.random.default_rng(0)
        low, high = measures.rank_band(4, 250, 20)
        inside = 0
        for _ in range(400):
            counts = measures.rank_counts(rng.normal(size=(4, 250)), 20)
            inside += bool((counts >= low).all() and (counts <= high).all())
        assert inside / 400 > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 400)
        # and the chance of one count to leave them is what it should be, at most
        law = stats.hypergeom(1000, 50, 250)
        outside = law.cdf(low - 1) + law.sf(high)
        assert 0 < outside <= 0.05 / 80

    def test_autocorrelation_of_an_autoregression(self):
        rng = np.random.default_rng(1)
        x = np.zeros((2, 40_000))
        for t in range(1, x.shape[1]):
            x[:, t] = 0.8 * x[:, t - 1] + rng.normal(size=2)
        rho = measures.autocorrelation(x, 5)
        assert rho.shape == (2, 5)
        np.testing.assert_allclose(rho, [0.8 ** np.arange(5)] * 2, atol=0.03)
        assert np.isnan(measures.autocorrelation(np.ones((1, 10)), 3)).all()

    def test_ess_evolution_ends_at_the_whole(self):
        x = np.random.default_rng(2).normal(size=(4, 105, 3))
        counts, bulk, tail = measures.ess_evolution(x)
        assert counts[-1] == 105
        np.testing.assert_array_equal(bulk[-1], convergence.ess(x))
        np.testing.assert_array_equal(tail[-1], convergence.ess(x, "tail"))

    def test_auc(self):
        values = np.array([[1.0, 0.0, 5.0], [2.0, 0.0, 4.0], [3.0, 0.0, 3.0], [4.0, 1.0, 3.0]])
        flags = [False, False, True, True]
        # pairs (flagged, other): all larger; 2 ties and 2 larger; all smaller
        np.testing.assert_allclose(measures.auc(values, flags), [1.0, 0.75, 0.0])
        assert np.isnan(measures.auc(values, [False] * 4)).all()
        assert np.isnan(measures.auc([[np.nan], [1.0]], [True, False])).all()

    def test_the_scalars_that_separate_divergent_draws_come_first(self):
        rng = np.random.default_rng(3)
        diverging = rng.random((4, 250)) < 0.1
        x = rng.normal(size=(4, 250, 5))
        x[diverging, 3] -= 5.0  # below all others: AUC near 0
        x[diverging, 1] += 1.5
        result = view(made({"x": x}, {"diverging": diverging}))
        found = separation(result, diverging)
        assert found.rows[:2] == [3, 1]
        assert found.areas[0] < 0.01
        assert found.areas[1] == pytest.approx(stats.norm.cdf(1.5 / np.sqrt(2)), abs=0.06)
        exact = stats.mannwhitneyu(x[diverging, 1], x[~diverging, 1]).statistic
        pairs = diverging.sum() * (~diverging).sum()
        assert found.areas[1] == pytest.approx(exact / pairs, abs=1e-12)

    def test_contraction(self):
        """Posterior half as wide and moved by one prior deviation: 3/4 and 1."""
        z = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
        prior = np.stack([10 + 2 * z, z], axis=1)
        posterior = np.stack([12 + z, z], axis=1)
        found = measures.contraction(posterior, prior)
        np.testing.assert_allclose(found.contraction, [0.75, 0.0], atol=1e-12)
        np.testing.assert_allclose(found.z, np.array([2.0, 0.0]) / prior.std(0, ddof=1), atol=1e-12)
        assert not found.robust.any()

    def test_contraction_of_heavy_tails_is_by_quartiles(self):
        u = (np.arange(4000) + 0.5) / 4000
        cauchy = stats.cauchy.ppf(u)[:, None]  # quartiles -1, 0, 1
        found = measures.contraction(stats.cauchy.ppf(u)[:, None] / 2 + 1, cauchy)
        assert found.robust.all()
        assert found.contraction[0] == pytest.approx(0.75, abs=1e-2)
        assert found.z[0] == pytest.approx(stats.norm.ppf(0.75), abs=1e-2)

    def test_pit(self):
        predicted = np.array([[1.0, 5.0, 0.0], [2.0, 6.0, 0.0], [3.0, 7.0, 1.0], [4.0, 8.0, 1.0]])
        values = measures.pit([2.5, 9.0, 0.0], predicted)
        np.testing.assert_allclose(values[:2], [0.5, 1.0])
        assert 0.0 < values[2] < 0.5  # a random share of the ties
        np.testing.assert_array_equal(values, measures.pit([2.5, 9.0, 0.0], predicted))
        weights = np.array([[0.7, 0.1, 0.5], [0.1, 0.2, 0.5], [0.1, 0.3, 0.0], [0.1, 0.4, 0.0]])
        weighted = measures.weighted_pit([2.5, 6.5, 0.5], predicted, weights)
        np.testing.assert_allclose(weighted, [0.8, 0.3, 1.0])

    def test_pit_of_a_right_model_of_counts_is_uniform(self):
        rng = np.random.default_rng(4)
        values = measures.pit(rng.poisson(3, 500), rng.poisson(3, (2000, 500)))
        assert stats.kstest(values, "uniform").pvalue > 1e-3

    def test_density_integrates_to_one_and_follows_its_law(self):
        rng = np.random.default_rng(5)
        for law in (stats.norm(3, 2), stats.expon(), stats.uniform()):
            x, d = measures.density(law.rvs(20_000, random_state=rng))
            assert np.trapezoid(d, x) == pytest.approx(1.0, abs=0.02)
            inside = (x > law.ppf(0.02)) & (x < law.ppf(0.98))
            assert np.abs(d - law.pdf(x))[inside].max() < 0.1 * law.pdf(x).max()
        assert measures.density([1.0, 1.0])[0].size == 0

    def test_the_centre_of_heavy_tails(self):
        quantiles = (np.arange(4000) + 0.5) / 4000
        assert measures.central(stats.cauchy.ppf(quantiles)) == pytest.approx((-17, 17), rel=0.01)
        x = stats.norm.ppf(quantiles)
        assert measures.central(x) == (x.min(), x.max())
        assert measures.central([np.nan]) == (0.0, 0.0)

    def test_kinds_of_data(self):
        assert measures.data_kind([0.0, 1.0], [[1, 1]]) == "binary"
        assert measures.data_kind([0, 3], [[1, 12]]) == "count"
        assert measures.data_kind([151.0, 199.0], [[151.2, 198.7]]) == "continuous"

    def test_elpd_equals_arviz(self, full, page):
        theirs = az.loo(full, pointwise=True)
        scores = np.asarray(full["log_likelihood"]["y"]).reshape(4000, 8).T
        r_eff = pointwise.relative_efficiency(full["posterior"].dataset)
        ours = pointwise.scores_of([(0, scores)], 8, 4000, r_eff, keep_weights=True)
        np.testing.assert_allclose(
            [ours.elpd, ours.se, ours.p, ours.good_k],
            [theirs.elpd, theirs.se, theirs.p, theirs.good_k],
            rtol=1e-8,
        )
        np.testing.assert_allclose(ours.elpd_i, theirs.elpd_i, rtol=1e-8)
        np.testing.assert_allclose(ours.k, theirs.pareto_k, rtol=1e-8)
        np.testing.assert_allclose(ours.weights.sum(axis=1), 1.0)
        assert f"<td>{theirs.elpd:.1f}</td>" in page


class TestDrawing:
    def test_ticks_are_round_and_inside(self):
        assert drawing.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        assert drawing.ticks(0.9, 1050.0, log=True) == pytest.approx([1, 10, 100, 1000])
        for low, high in ((-3.7, 12.2), (1e-9, 3e-9), (1e8, 1e8 + 3), (-1e300, 1e300)):
            values = drawing.ticks(low, high)
            assert len(values) >= 2
            assert all(low <= v <= high for v in values)

    def test_points_that_are_not_numbers_break_a_line(self):
        where = drawing.frame((0.0, 4.0), (0.0, 1.0))
        text = drawing.line(where, range(5), [0.0, 1.0, np.nan, 1.0, 0.0])
        assert text.count("M") == 2
        assert "nan" not in text

    def test_marks_outside_stay_at_the_edge(self):
        where = drawing.frame((0.0, 1.0), (0.0, 1.0))
        assert where.across([-5.0, 0.0, 1.0, np.inf]).tolist() == [
            where.left, where.left, where.right, where.right,
        ]  # fmt: skip

    def test_limits(self):
        assert drawing.limits([1.0, np.nan, 2.0], pad=0.1) == pytest.approx((0.9, 2.1))
        assert drawing.limits([]) == (0.0, 1.0)
        low, high = drawing.limits([5.0, 5.0])
        assert low < 5.0 < high


# -- results of all kinds -----------------------------------------------------------------------

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def own_draws():
    """Every test has the same draws, whatever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state


def with_nan():
    x = RNG.normal(size=(4, 200, 3))
    x[1, 5, 1] = np.nan
    x[:, :, 2] = np.nan
    return x


S = (4, 100)


def normal(*shape):
    return RNG.normal(size=shape)


def flags(share):
    return RNG.random(S) < share


ODD = {
    "one chain": lambda: made({"x": normal(1, 300)}),
    "no draws": lambda: made({"x": np.zeros((4, 0)), "y": np.zeros((4, 0, 3))}),
    "one draw": lambda: made({"x": normal(4, 1), "y": normal(4, 1, 2)}),
    "three draws": lambda: made({"x": normal(2, 3)}),
    "five draws": lambda: made({"x": normal(2, 5)}),
    "integers": lambda: made({"k": RNG.integers(0, 4, S), "n": RNG.integers(0, 2, (*S, 3))}),
    "booleans": lambda: made({"b": flags(0.5)}),
    "NaN draws": lambda: made({"x": with_nan()}),
    "infinite draws": lambda: made({"x": np.where(flags(0.01), np.inf, normal(*S))}),
    "constants": lambda: made({"x": np.full(S, 3.0), "y": np.zeros((*S, 2))}),
    "huge and tiny": lambda: made({"x": 1e300 * normal(*S), "y": 1e-300 * normal(*S)}),
    "a stuck chain": lambda: made({"x": np.concatenate([normal(3, 200), np.zeros((1, 200))])}),
    "forty chains": lambda: made({"x": normal(40, 50)}),
    "an empty site": lambda: made({"x": normal(*S), "e": np.zeros((*S, 0))}),
    "a long site": lambda: made({"x": normal(*S, 700)}),
    "a matrix": lambda: made({"x": normal(*S, 3, 4)}),
    "all divergent": lambda: made({"x": normal(*S)}, {"diverging": np.ones(S, bool)}),
    "one scalar and divergences": lambda: made({"x": normal(*S)}, {"diverging": flags(0.1)}),
    "flat statistics": lambda: made(
        {"x": normal(*S)},
        {
            "energy": np.ones(S),
            "acceptance_rate": np.full(S, np.nan),
            "lp": np.full(S, -np.inf),
            "tree_depth": np.ones(S, int),
        },
    ),
    "log likelihoods of NaN": lambda: made(
        {"x": normal(*S)}, log_likelihood={"y": np.full((*S, 3), np.nan)}
    ),
    "prior of another shape": lambda: made({"x": normal(*S, 3)}, prior={"x": normal(1, 50, 2)}),
    "prior of a few draws": lambda: made({"x": normal(*S, 3)}, prior={"x": normal(1, 2, 3)}),
    "one observation": lambda: made(
        {"x": normal(*S)},
        posterior_predictive={"y": normal(*S)},
        log_likelihood={"y": normal(*S)},
        observed_data=xarray.Dataset({"y": 0.3}),
    ),
    "missing observations": lambda: made(
        {"x": normal(*S)},
        posterior_predictive={"y": normal(*S, 3)},
        log_likelihood={"y": normal(*S, 3)},
        observed_data=xarray.Dataset({"y": ("y_dim_0", [0.1, np.nan, 2.0])}),
    ),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("error::RuntimeWarning:ppl_toolkit.diagnostics")
def test_odd_results_have_a_page(kind, tmp_path):
    tree = ODD[kind]()
    check(page_of(tree))
    assert "Verdict" in ppl.report(tree, tmp_path / "page.html")


def predicted(observed, draws):
    """A result with predictions ``draws`` (chain, draw, n) of ``observed`` (n,)."""
    return made(
        {"x": RNG.normal(size=(2, 200))},
        posterior_predictive={"y": draws},
        observed_data=xarray.Dataset({"y": ("y_dim_0", observed)}),
    )


KINDS = {
    "continuous": ("Density", lambda size: RNG.normal(size=size)),
    "count": ("Rootogram", lambda size: RNG.poisson(4, size)),
    "large counts": ("Rootogram", lambda size: RNG.poisson(900, size)),
    "binary": ("Zeros and ones", lambda size: RNG.integers(0, 2, size)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_follow_the_type_of_the_data(kind):
    title, draw = KINDS[kind]
    text = page_of(predicted(draw(30), draw((2, 200, 30))))
    check(text)
    for other in ("Density", "Rootogram", "Zeros and ones"):
        assert (f"<b>{other}</b>" in text) == (other == title)


def test_sections_appear_only_with_their_groups(centred):
    document = Document(page_of(centred))
    assert "sampler" in document.ids
    for absent in ("prediction", "loo", "prior", "residuals", "sensitivity", "evidence",
                   "dimensions"):  # fmt: skip
        assert absent not in document.ids
    prior = quiet(eight_schools, ERRORS, y=EFFECTS, method="prior", draws=200)
    prior = ppl.predict(prior, eight_schools, ERRORS, y=EFFECTS)
    text = page_of(prior)
    check(text)
    assert "Prior prediction" in text
    assert 'id="loo"' not in text


def test_a_discrete_model_has_a_page():
    def model(y):
        k = numpyro.sample("k", dist.Categorical(np.array([0.2, 0.3, 0.5])))
        numpyro.sample("y", dist.Normal(1.0 * k, 1.0), obs=y)

    check(page_of(quiet(model, 1.2, draws=100)))


def test_some_sites_and_unknown_ones(full):
    text = page_of(full, ["tau"])
    check(text)
    assert list(cells(text)) == ["tau"]
    with pytest.raises(SiteError, match="nope"):
        page_of(full, "nope")
    with pytest.raises(SiteError, match="nope"):
        page_of(made({"x": np.zeros((2, 0))}), "nope")


# -- in a browser -------------------------------------------------------------------------------


def browse(folder, name, *arguments, fragment=""):
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
        *arguments, (folder / name).as_uri() + fragment,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs a browser, Chromium: no package")
class TestBrowser:
    def test_the_table_sorts_and_finds(self, full, page, tmp_path):
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        dom = browse(tmp_path, "page.html", "--dump-dom", fragment="#sort=-ess_bulk&find=theta")
        rows = re.findall(r'<tr id="p(\d+)"( hidden="")?', dom)
        table = ppl.summary(full)
        expected = table["ess_bulk"].sort_values(ascending=False, kind="stable")
        assert [table.index[int(i)] for i, _ in rows] == list(expected.index)
        assert 'data-key="ess_bulk" aria-sort="descending"' in dom
        seen = {table.index[int(i)] for i, hidden in rows if not hidden}
        assert seen == {name for name in table.index if "theta" in name}
        assert "8 of 18 rows" in dom

    @pytest.mark.parametrize("width", [360, 1280])
    def test_no_page_is_wider_than_its_window(self, full, centred, width, tmp_path):
        """A frame of that width, since windows of the browser have a least width of their own."""
        long = made({"a_site_with_quite_a_long_name_" * 3: RNG.normal(size=(4, 100, 3))})
        for i, tree in enumerate((full, centred, long)):
            (tmp_path / f"{i}.html").write_text(page_of(tree), encoding="utf-8")
            (tmp_path / "frame.html").write_text(
                f'<!DOCTYPE html><body><iframe style="width:{width}px;height:700px;border:0" '
                f'src="{i}.html"></iframe><output></output><script>onload = function () {{ '
                'var root = document.querySelector("iframe").contentDocument.documentElement; '
                'document.querySelector("output").textContent = '
                'root.clientWidth + " " + root.scrollWidth; }}</script></body>'.replace("}}", "}"),
                encoding="utf-8",
            )
            dom = browse(tmp_path, "frame.html", "--dump-dom", "--window-size=1400,900")
            inner, scroll = map(int, re.search(r"<output>(\d+) (\d+)</output>", dom).groups())
            assert width - 20 <= inner <= width
            assert scroll <= inner
