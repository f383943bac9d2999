"""Each finding has draws that trigger it, and draws just short of it that do not."""

import warnings

import numpy as np
import pytest
import xarray
from models import EFFECTS, ERRORS, conjugate, eight_schools_centred

import ppl_toolkit as ppl
from ppl_toolkit.diagnostics.findings import Finding, diagnose, findings
from ppl_toolkit.errors import InferenceWarning

CHAINS, DRAWS = 4, 500
SEEDS = 20


def tree(x, attrs=None, **stats):
    """A result with draws ``x`` (chain, draw, ...)."""
    x = np.asarray(x)
    coords = {"chain": np.arange(x.shape[0]), "draw": np.arange(x.shape[1])}
    dims = ("chain", "draw", *(f"x_dim_{i}" for i in range(x.ndim - 2)))
    groups = {"posterior": xarray.Dataset({"x": (dims, x)}, coords=coords)}
    if stats:
        groups["sample_stats"] = xarray.Dataset(
            {name: (("chain", "draw"), value) for name, value in stats.items()}, coords=coords
        )
    made = xarray.DataTree.from_dict(groups)
    made.attrs.update(attrs or {})
    return made


def normal(rng, *shape):
    return rng.normal(size=shape or (CHAINS, DRAWS))


def flags(rng, count):
    """(chain, draw) flags, ``count`` of them set."""
    flat = np.zeros(CHAINS * DRAWS, bool)
    flat[:count] = True
    return rng.permutation(flat).reshape(CHAINS, DRAWS)


def persistent(rng, correlation, draws=DRAWS, chains=CHAINS):
    """Autoregressive draws, sd 1: as energies, E-BFMI is 2 (1 - correlation)."""
    noise = rng.normal(size=(chains, draws)) * np.sqrt(1 - correlation**2)
    x = rng.normal(size=(chains, draws))
    for t in range(1, draws):
        x[:, t] = correlation * x[:, t - 1] + noise[:, t]
    return x


def with_chain_0(rng, change):
    x = normal(rng)
    x[0] = change(x[0])
    return x


def moving(rng, share):
    """Chain 2 repeats its value but for a share of the draws."""
    x = normal(rng)
    moves = rng.random(DRAWS) < share
    x[2] = x[2, np.maximum.accumulate(np.where(moves, np.arange(DRAWS), 0))]
    return x


def superchains(rng, spread):
    """1024 chains of 10 autocorrelated draws in eight superchains, which differ by ``spread``."""
    x = persistent(rng, 0.9, draws=10, chains=1024)
    x += np.repeat(spread * rng.normal(size=8), 128)[:, None]
    return tree(x, {"superchains": 8})


def kinds(made):
    return {found.kind: found for found in diagnose(made)}


# Kind: draws that have it and draws that must not be accused of it, from a random generator. What
# is random in either is far from its threshold: a wrong answer in any of the 20 seeds has a
# probability below 1e-3 per kind (E-BFMI: its standard error of 0.03 to 0.05, against distances
# of 0.16 and 0.3; R-hat and ESS: of independent draws, see below; shares that move: binomial).
TRIGGERS = {
    "divergences": (
        lambda rng: tree(normal(rng), diverging=flags(rng, 1)),
        lambda rng: tree(normal(rng), diverging=flags(rng, 0)),
    ),
    "tree_depth": (  # one percent of the draws
        lambda rng: tree(normal(rng), reached_max_treedepth=flags(rng, 21)),
        lambda rng: tree(normal(rng), reached_max_treedepth=flags(rng, 20)),
    ),
    "bfmi": (
        lambda rng: tree(normal(rng), energy=persistent(rng, 0.93)),
        lambda rng: tree(normal(rng), energy=persistent(rng, 0.7)),
    ),
    "hot": (  # of one coordinate; the mean of 2000 squares has a standard error of 0.03
        lambda rng: tree(normal(rng), kinetic_temperature=1.4 * normal(rng) ** 2),
        lambda rng: tree(normal(rng), kinetic_temperature=normal(rng) ** 2),
    ),
    "r_hat": (
        lambda rng: tree(with_chain_0(rng, lambda x: x + 0.8)),
        lambda rng: tree(with_chain_0(rng, lambda x: x)),
    ),
    "stuck": (lambda rng: tree(moving(rng, 0.001)), lambda rng: tree(moving(rng, 0.05))),
    "multimodal": (
        lambda rng: tree(with_chain_0(rng, lambda x: x + 8)),
        lambda rng: tree(persistent(rng, 0.98)),  # far from mixed, but on their way
    ),
    "ess": (
        lambda rng: tree(persistent(rng, 0.8)),
        lambda rng: tree(persistent(rng, 0.2)),
    ),
    "mcse": (
        lambda rng: tree(rng.standard_cauchy((CHAINS, DRAWS))),
        lambda rng: tree(rng.standard_t(8, (CHAINS, DRAWS))),
    ),
    "few_draws": (lambda rng: tree(normal(rng, 4, 20)), lambda rng: tree(normal(rng, 4, 25))),
    "not_finite": (
        lambda rng: tree(np.log(-np.abs(normal(rng)))),
        lambda rng: tree(np.where(flags(rng, 1999), np.nan, normal(rng))),
    ),
    "precision": (
        lambda rng: tree(normal(rng), {"float32_data": "y"}),
        lambda rng: tree(normal(rng)),
    ),
    "parameters": (
        lambda rng: tree(normal(rng), {"fixed_parameters": "w"}),
        lambda rng: tree(normal(rng)),
    ),
    "subsample": (
        lambda rng: tree(normal(rng), {"subsampled_plates": "rows"}),
        lambda rng: tree(normal(rng)),
    ),
}


@pytest.mark.parametrize("kind", TRIGGERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # logarithms of negative numbers
def test_a_finding_is_made_where_it_belongs_and_only_there(kind):
    has, has_not = TRIGGERS[kind]
    for seed in range(SEEDS):
        found = kinds(has(np.random.default_rng(seed)))
        assert kind in found, seed
        assert found[kind].message
        assert found[kind].remedy.endswith(".")
        assert kind not in kinds(has_not(np.random.default_rng(seed))), seed


def test_chains_that_share_starts_are_judged_by_nested_r_hat():
    """Nested R-hat of stationary superchains is about sqrt(1 + 1 / (128 n)), n the effective draws
    of a chain (above 1): 1.004, and above 1.01 with probability below 1e-4 (eight superchains:
    chi squared with 7 degrees of freedom). Ordinary R-hat compares chains too short for that."""
    for seed in range(SEEDS):
        found = kinds(superchains(np.random.default_rng(seed), 0.5))["r_hat"]
        assert "nested R-hat" in found.message
        good = superchains(np.random.default_rng(seed), 0.0)
        assert not {"r_hat", "multimodal"} & kinds(good).keys(), seed
        alone = xarray.DataTree.from_dict({"posterior": good["posterior"].dataset})
        assert kinds(alone)["r_hat"].severity == "error", seed


def test_divergences_are_errors_above_one_percent():
    rng = np.random.default_rng(2)
    few = tree(normal(rng), diverging=flags(rng, 20))
    assert kinds(few)["divergences"].severity == "warning"
    found = kinds(tree(normal(rng), diverging=flags(rng, 21)))["divergences"]
    assert (found.severity, found.number) == ("error", 21)
    assert "21 of 2000" in found.message


def test_divergences_say_where_they_lie():
    rng = np.random.default_rng(3)
    x, diverging = normal(rng, CHAINS, DRAWS, 3), flags(rng, 40)
    x[..., 1] = np.where(diverging, -3 + 0.1 * x[..., 1], x[..., 1])
    found = kinds(tree(x, diverging=diverging))["divergences"]
    assert found.sites == ("x[1]",)
    assert "mostly at small x[1]:" in found.message
    nowhere = kinds(tree(normal(rng), diverging=diverging))["divergences"]
    assert nowhere.sites == ()
    assert "mostly" not in nowhere.message


def test_chains_in_different_modes_are_told_apart():
    x = np.random.default_rng(4).normal(size=(CHAINS, DRAWS))
    x[[1, 3]] += 40
    found = kinds(tree(x))["multimodal"]
    assert found.severity == "error"
    assert "x is near" in found.message
    assert "in chains [0, 2], near 40 in chains [1, 3]" in found.message


@pytest.mark.parametrize("seed", range(20))
def test_no_false_alarms_in_twenty_seeds(seed):
    """Ten independent normal scalars: R-hat above 1.01 or ESS below 400 with probability below
    1e-3 a set, so that all twenty are silent but for once in fifty."""
    rng = np.random.default_rng(100 + seed)
    made = tree(
        rng.normal(size=(CHAINS, 1000, 10)),
    )
    assert diagnose(made) == []


def test_a_chain_that_never_moved_is_named():
    x = normal(np.random.default_rng(5))
    x[2] = 0.3
    found = kinds(tree(x))["stuck"]
    assert found.severity == "error"
    assert "chains [2] stood still" in found.message


def test_constants_beside_draws_that_move_are_not_stuck_chains():
    x = np.random.default_rng(5).normal(size=(CHAINS, DRAWS, 2))
    x[..., 1] = 7.0
    assert diagnose(tree(x)) == []


def test_rare_events_are_not_stuck_chains():
    """A chain without a rare event has not moved in it, and nothing is wrong."""
    made = tree(normal(np.random.default_rng(1)))
    rare = np.zeros((CHAINS, DRAWS), int)
    rare[0, 3] = 1
    made["posterior"] = made["posterior"].to_dataset().assign(k=(("chain", "draw"), rare))
    assert "stuck" not in kinds(made)


def test_chains_that_stand_still_are_seen():
    found = kinds(tree(np.full((CHAINS, DRAWS), 7.0)))
    assert found["stuck"].severity == "error"
    assert "[0, 1, 2, 3] stood still" in found["stuck"].message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sites_without_a_finite_draw_are_seen(value):
    x = np.random.default_rng(5).normal(size=(CHAINS, DRAWS, 3))
    x[..., 1] = value
    found = kinds(tree(x))
    assert (found["not_finite"].severity, found["not_finite"].sites) == ("error", ("x[1]",))


def test_one_chain_is_compared_with_itself_and_never_declared_fine():
    rng = np.random.default_rng(9)
    good = xarray_of_one_chain(rng.normal(size=(1, 400)))
    assert set(kinds(good)) == {"few_draws"}
    walk = xarray_of_one_chain(rng.normal(size=(1, 400)).cumsum(axis=1))
    assert {"few_draws", "ess"} <= set(kinds(walk))
    assert "r_hat" in kinds(walk)


def test_one_chain_that_drifts_is_seen():
    x = np.linspace(0, 9, 400)[None] + 0.1 * np.random.default_rng(9).normal(size=(1, 400))
    found = kinds(xarray_of_one_chain(x))
    assert found["r_hat"].severity == "error"
    assert "two halves" in found["r_hat"].message


def test_a_mistake_in_the_diagnosis_does_not_cost_the_draws(monkeypatch):
    from ppl_toolkit import convergence

    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(convergence, "convergence", broken)
    rng = np.random.default_rng(2)
    found = kinds(tree(normal(rng), diverging=flags(rng, 3)))
    assert {"unjudged", "divergences"} == set(found)
    assert "ZeroDivisionError: oh" in found["unjudged"].message


def xarray_of_one_chain(x):
    data = xarray.Dataset({"x": (("chain", "draw"), x)})
    return xarray.DataTree.from_dict({"posterior": data})


def test_the_worst_elements_are_named_first():
    x = np.random.default_rng(6).normal(size=(CHAINS, DRAWS, 4))
    x[0, :, 1] += 0.5
    x[0, :, 3] += 0.9
    assert kinds(tree(x))["r_hat"].sites == ("x[3]", "x[1]")


def test_errors_come_first():
    rng = np.random.default_rng(5)
    still = with_chain_0(rng, lambda x: 0 * x)
    found = diagnose(tree(still, diverging=flags(rng, 1), energy=persistent(rng, 0.95)))
    assert [f.severity for f in found] == sorted((f.severity for f in found), key="error".__ne__)
    assert found[0].severity == "error"


def test_slots_that_come_and_go_are_not_judged():
    """Elements of a trans-dimensional plate are NaN while they are not there."""
    rng = np.random.default_rng(7)
    x = np.full((CHAINS, DRAWS, 3), np.nan)
    x[0, :5, 0] = 1.0
    made = tree(x, {"trans_dimensional": '{"x_dim_0": "k"}'})
    assert "not_finite" in kinds(tree(x))
    k = rng.integers(1, 4, (CHAINS, DRAWS))
    made["posterior"] = made["posterior"].to_dataset().assign(k=(("chain", "draw"), k))
    assert diagnose(made) == []


def test_few_draws_do_not_raise_alarms_they_cannot_support():
    assert "ess" not in kinds(tree(np.random.default_rng(7).normal(size=(CHAINS, 150))))
    few = kinds(tree(np.random.default_rng(7).normal(size=(CHAINS, 3))))
    assert set(few) == {"few_draws"}
    assert "3 draws of 4 chains" in few["few_draws"].message


def test_the_centred_eight_schools_are_found_out_in_one_warning_and_in_the_result(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ppl.infer(eight_schools_centred, ERRORS, y=EFFECTS, seed=1, progress=False)
    (warning,) = [w for w in caught if issubclass(w.category, InferenceWarning)]
    assert warning.filename == __file__, "the warning points at the call"
    found = {f.kind: f for f in findings(result)}
    assert {"bfmi", "ess"} <= found.keys()  # and divergences, in nine of ten runs
    diverging = int(result["sample_stats"]["diverging"].sum())
    assert diverging == (found["divergences"].number if "divergences" in found else 0)
    for f in found.values():
        assert f.message in str(warning.message)
        assert f.remedy in str(warning.message)
    again = ppl.load(ppl.save(result, tmp_path / "schools.nc"))
    assert findings(again) == findings(result)
    assert all(isinstance(f, Finding) for f in findings(again))


def test_a_plain_model_raises_no_alarm_in_twenty_seeds():
    """One-parameter Gaussian posterior. R-hat above 1.01, or ESS below 400, of 4 x 1000 draws has
    probability below 1e-3 per run: all twenty seeds are silent but for once in fifty."""
    y = np.random.default_rng(8).normal(size=20)
    for seed in range(20):
        result = ppl.infer(conjugate, y, seed=seed, progress=False)
        assert findings(result) == []
