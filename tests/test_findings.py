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


def tree(x=None, attrs=None, **stats):
    """A result with draws ``x`` (chain, draw, ...), independent normal ones by default."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(CHAINS, DRAWS)) if x is None else np.asarray(x)
    coords = {"chain": np.arange(CHAINS), "draw": np.arange(x.shape[1])}
    dims = ("chain", "draw", *(f"x_dim_{i}" for i in range(x.ndim - 2)))
    groups = {"posterior": xarray.Dataset({"x": (dims, x)}, coords=coords)}
    if stats:
        groups["sample_stats"] = xarray.Dataset(
            {name: (("chain", "draw"), value) for name, value in stats.items()}, coords=coords
        )
    made = xarray.DataTree.from_dict(groups)
    made.attrs.update(attrs or {})
    return made


def flags(count):
    """(chain, draw) flags, ``count`` of them set."""
    flat = np.zeros(CHAINS * DRAWS, bool)
    flat[:count] = True
    return np.random.default_rng(2).permutation(flat).reshape(CHAINS, DRAWS)


def energies(persistence):
    """Autoregressive energies: E-BFMI is 2 (1 - persistence)."""
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(CHAINS, DRAWS)) * np.sqrt(1 - persistence**2)
    energy = rng.normal(size=(CHAINS, DRAWS))
    for t in range(1, DRAWS):
        energy[:, t] = persistence * energy[:, t - 1] + noise[:, t]
    return energy


def shifted(by, chain=0):
    x = np.random.default_rng(4).normal(size=(CHAINS, DRAWS))
    x[chain] += by
    return x


def stuck(chain):
    x = np.random.default_rng(5).normal(size=(CHAINS, DRAWS))
    x[chain] = 0.3
    return x


def kinds(made):
    return {found.kind: found for found in diagnose(made)}


def test_nothing_is_found_in_good_draws():
    """Independent draws: R-hat passes 1.01, or ESS falls below 400, less than once in 10^4."""
    good = tree(
        diverging=flags(0), reached_max_treedepth=flags(0), energy=energies(0.0), lp=flags(0)
    )
    assert diagnose(good) == []


TRIGGERS = {
    "divergences": (lambda: tree(diverging=flags(1)), lambda: tree(diverging=flags(0))),
    "tree_depth": (
        lambda: tree(reached_max_treedepth=flags(21)),
        lambda: tree(reached_max_treedepth=flags(20)),  # one percent of the draws
    ),
    "bfmi": (lambda: tree(energy=energies(0.93)), lambda: tree(energy=energies(0.7))),
    "r_hat": (lambda: tree(shifted(0.6)), lambda: tree(shifted(0.0))),
    "stuck": (lambda: tree(shifted(8.0)), lambda: tree(shifted(0.6))),
    "ess": (lambda: tree(energies(0.8)), lambda: tree(energies(0.2))),
    "precision": (lambda: tree(attrs={"float32_data": "y"}), tree),
    "subsample": (lambda: tree(attrs={"subsampled_plates": "rows"}), tree),
}


@pytest.mark.parametrize("kind", TRIGGERS)
def test_triggers(kind):
    bad, good = TRIGGERS[kind]
    found = kinds(bad())
    assert kind in found
    assert found[kind].message
    assert found[kind].remedy.endswith(".")
    assert kind not in kinds(good())


def test_divergences_are_errors_above_one_percent():
    assert kinds(tree(diverging=flags(20)))["divergences"].severity == "warning"
    found = kinds(tree(diverging=flags(21)))["divergences"]
    assert (found.severity, found.number) == ("error", 21)
    assert "21 of 2000" in found.message


def test_divergences_say_where_they_lie():
    x = np.random.default_rng(3).normal(size=(CHAINS, DRAWS, 3))
    x[..., 1] = np.where(flags(40), -3 + 0.1 * x[..., 1], x[..., 1])
    found = kinds(tree(x, diverging=flags(40)))["divergences"]
    assert found.sites == ("x[1]",)
    assert "mostly at small x[1]:" in found.message
    nowhere = kinds(tree(diverging=flags(40)))["divergences"]
    assert nowhere.sites == ()
    assert "mostly" not in nowhere.message


def test_chains_in_different_modes_are_told_apart():
    x = np.random.default_rng(4).normal(size=(CHAINS, DRAWS))
    x[[1, 3]] += 40
    found = kinds(tree(x))["stuck"]
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
    found = kinds(tree(stuck(2)))["stuck"]
    assert found.severity == "error"
    assert "chains [2] did not move" in found.message


def test_constants_beside_draws_that_move_are_not_stuck_chains():
    x = np.random.default_rng(5).normal(size=(CHAINS, DRAWS, 2))
    x[..., 1] = 7.0
    assert diagnose(tree(x)) == []


def test_rare_events_are_not_stuck_chains():
    """A chain without a rare event has not moved in it, and nothing is wrong."""
    made = tree()
    rare = np.zeros((CHAINS, DRAWS), int)
    rare[0, 3] = 1
    made["posterior"] = made["posterior"].to_dataset().assign(k=(("chain", "draw"), rare))
    assert "stuck" not in kinds(made)


def test_chains_that_stand_still_are_seen():
    found = kinds(tree(np.full((CHAINS, DRAWS), 7.0)))
    assert found["stuck"].severity == "error"
    assert "[0, 1, 2, 3] did not move" in found["stuck"].message


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
    assert {"r_hat", "stuck"} & set(kinds(walk))


def test_one_chain_that_drifts_is_seen():
    x = np.linspace(0, 9, 400)[None] + 0.1 * np.random.default_rng(9).normal(size=(1, 400))
    found = kinds(xarray_of_one_chain(x))
    assert "two halves" in found["stuck"].message


def test_a_mistake_in_the_diagnosis_does_not_cost_the_draws(monkeypatch):
    from ppl_toolkit import convergence

    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(convergence, "ranked", broken)
    found = kinds(tree(diverging=flags(3)))
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
    found = diagnose(tree(stuck(0), diverging=flags(1), energy=energies(0.95)))
    assert [f.severity for f in found] == sorted((f.severity for f in found), key="error".__ne__)
    assert found[0].severity == "error"


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
    assert {"divergences", "ess"} <= found.keys()
    assert found["divergences"].number == int(result["sample_stats"]["diverging"].sum())
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
