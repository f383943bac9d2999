"""What compiles, and what must not compile again; imports stay light."""

import gc
import subprocess
import sys
import textwrap
import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import compilations, quiet
from models import EFFECTS, ERRORS, eight_schools

import ppl_toolkit as ppl
from ppl_toolkit import engine, executables
from ppl_toolkit.errors import InferenceWarning
from ppl_toolkit.program import Program


def run(*args, **options):
    return quiet(*args, **{"draws": 60, "warmup": 60, "method": "nuts", **options})


@pytest.fixture(scope="module")
def compiled():
    executables.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPL_CACHE_DIR", "off")
        yield first_call()


def first_call():
    before = len(compilations)
    tree = run(eight_schools, ERRORS, y=EFFECTS)
    assert len(compilations) > before, "the first call compiles (and the counter counts)"
    return tree


CALLS = {
    "new data": lambda: run(eight_schools, ERRORS * 2, y=EFFECTS + 1),
    "new seed": lambda: run(eight_schools, ERRORS, y=EFFECTS, seed=99),
    "more draws": lambda: run(eight_schools, ERRORS, y=EFFECTS, draws=700),
    "longer warm-up": lambda: run(eight_schools, ERRORS, y=EFFECTS, warmup=300),
    "more chains": lambda: run(eight_schools, ERRORS, y=EFFECTS, chains=7),
    "other chunks": lambda: run(eight_schools, ERRORS, y=EFFECTS, chunk=13),
    "other acceptance": lambda: run(
        eight_schools, ERRORS, y=EFFECTS, method=ppl.NUTS(target_acceptance=0.95)
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_zero_compilations(what, compiled):
    before = len(compilations)
    tree = CALLS[what]()
    assert compilations[before:] == []
    assert not np.array_equal(
        tree["posterior"]["mu"][:4, :60], compiled["posterior"]["mu"]
    ) or what in ("more draws", "more chains", "other chunks")


def test_extend_compiles_nothing(compiled):
    before = len(compilations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        ppl.extend(compiled, eight_schools, ERRORS, y=EFFECTS, draws=300, progress=False)
    assert compilations[before:] == []


def test_an_equal_model_compiles_nothing(compiled):
    """A second function object with the same computation shares the executable."""

    def same(sigma, y=None):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", sigma.shape[0]):
            z = numpyro.sample("z", dist.Normal(0, 1))
            theta = numpyro.deterministic("theta", mu + tau * z)
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    before = len(compilations)
    run(same, ERRORS, y=EFFECTS)
    assert compilations[before:] == []


def test_closures_are_read_afresh_and_compile_nothing():
    shift = np.array([0.0, 0.0, 0.0])

    def model(y):
        m = numpyro.sample("m", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(m + shift, 0.1).to_event(1), obs=y)

    y = np.array([1.0, 1.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = run(model, y, draws=200, warmup=200)
        before = len(compilations)
        shift = shift + 5.0
        second = run(model, y, draws=200, warmup=200)
    assert compilations[before:] == []
    np.testing.assert_allclose(first["posterior"]["m"].mean(), 1.0, atol=0.05)
    np.testing.assert_allclose(second["posterior"]["m"].mean(), -4.0, atol=0.05)


def test_a_changed_model_of_the_same_name_is_compiled_anew():
    def make(scale):
        def model(y):
            m = numpyro.sample("m", dist.Normal(0, scale))
            numpyro.sample("y", dist.Normal(m, 100.0), obs=y)

        return model

    narrow, wide = (run(make(s), 0.0, draws=500, warmup=300) for s in (1, 20))
    assert float(narrow["posterior"]["m"].std()) < 1.3
    assert float(wide["posterior"]["m"].std()) > 12


def python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_import_is_light_and_changes_nothing():
    """Under 0.3 CPU seconds (the least of three), nothing heavy loaded, nothing printed."""
    code = """
        import sys, time
        begin = time.process_time()
        import ppl_toolkit
        cost = time.process_time() - begin
        heavy = {"jax", "numpyro", "pandas", "matplotlib", "torch", "xarray", "numpy", "scipy"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert "infer" in dir(ppl_toolkit)
        print(cost)
    """
    costs = []
    for _ in range(3):
        done = python(code)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        costs.append(float(done.stdout))
    assert min(costs) < 0.3


def test_a_run_changes_no_jax_setting_and_loads_no_plotting():
    done = python(
        """
        import sys, jax, numpy as np
        before = dict(jax.config.values)
        import ppl_toolkit as ppl
        tree = ppl.infer(lambda x: -0.5 * (x**2).sum(), init=np.zeros(2), draws=300, progress=False)
        changed = {k for k in before if before[k] != jax.config.values[k]}
        assert not changed, changed
        assert jax.numpy.ones(1).dtype == "float32"
        assert not {"matplotlib", "torch", "arviz", "arviz_plots"} & set(sys.modules)
        assert tree["posterior"]["x"].dtype == "float64"
        """
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_loads():
    for name in ppl.__all__:
        assert getattr(ppl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        ppl.nope  # noqa: B018


def test_programs_used_last_are_kept_and_the_others_are_freed(monkeypatch):
    """XLA aborts a process that holds some hundred programs: they must not pile up."""
    monkeypatch.setenv("PPL_CACHE_DIR", "off")
    monkeypatch.setattr(executables, "_MOST_IN_PROCESS", 2)
    executables.clear()
    x = np.ones(3)

    def living():
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    def make(power):
        call = executables.kept(lambda x, unused: x**power, x, x)
        np.testing.assert_array_equal(call(2 * x, x), (2 * x) ** power)

    before = living()
    for power in (2, 3, 2, 4):  # the last two, and 3 is the oldest when 4 comes
        make(power)
    assert living() == before + 2
    assert executables.cache_info().in_process == 2
    count = len(compilations)
    make(2)
    assert len(compilations) == count
    executables.clear()
    assert living() == before


class TestDiskCache:
    def test_unused_arguments_of_another_shape_are_another_program(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PPL_CACHE_DIR", str(tmp_path / "c"))
        executables.clear()
        for size in (3, 5):
            x = np.ones(size)
            assert executables.evaluate(lambda x, unused: x + 1, np.zeros(()), x) == 1.0
            executables.clear()
        assert len(list((tmp_path / "c").iterdir())) == 2

    def test_which_arguments_are_unused_makes_another_program(self, monkeypatch, tmp_path):
        """Once the unused ones are dropped, both functions have the same text."""
        monkeypatch.setenv("PPL_CACHE_DIR", str(tmp_path / "c"))
        for which in (0, 1):
            executables.clear()
            found = executables.evaluate(lambda *xs, i=which: xs[i], *np.float32([1, 2]))
            assert found == 1 + which
        executables.clear()

    def test_a_second_process_runs_programs_that_call_lapack(self, tmp_path):
        """Their addresses are filled in where JAX lowers a call, which a second process need not.

        Without them it is the process that ends, not the test.
        """
        code = """
            import jax.numpy as jnp, numpy as np, ppl_toolkit as ppl
            def density(x, a):
                return -0.5 * jnp.sum(jnp.linalg.solve(jnp.linalg.cholesky(a), x) ** 2)
            tree = ppl.infer(density, np.eye(2), init=np.zeros(2), draws=30, warmup=30,
                             progress=False)
            print(tree["posterior"]["x"].values.tobytes().hex()[:64])
        """
        draws = []
        for _ in range(2):
            done = python(code, PPL_CACHE_DIR=str(tmp_path / "c"))
            assert done.returncode == 0, done.stderr
            draws.append(done.stdout)
        assert draws[0] == draws[1]

    code = """
        import jax, numpy as np, ppl_toolkit as ppl
        count = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda e, d, **_: count.append(e) if "backend_compile" in e else None)
        tree = ppl.infer(lambda x: -0.5 * (x**2).sum(), init=np.zeros(2), draws=300, progress=False)
        print(len(count), tree["posterior"]["x"].values.tobytes().hex()[:64])
    """

    def test_a_second_process_compiles_nothing_and_draws_the_same(self, tmp_path):
        first, second = (python(self.code, PPL_CACHE_DIR=str(tmp_path / "c")) for _ in range(2))
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        (made, draws), (again, same) = first.stdout.split(), second.stdout.split()
        assert int(made) > 0
        assert int(again) == 0
        assert draws == same

    def test_a_damaged_entry_is_made_again(self, tmp_path):
        cache = tmp_path / "c"
        python(self.code, PPL_CACHE_DIR=str(cache))
        for file in cache.glob("*.xla"):
            file.write_bytes(b"nonsense")
        done = python(self.code, PPL_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[0]) > 0

    def test_off_and_others_directories(self, tmp_path):
        done = python(self.code, PPL_CACHE_DIR="off", HOME=str(tmp_path), XDG_CACHE_HOME="")
        assert done.returncode == 0, done.stderr
        assert not list(tmp_path.rglob("*.xla"))
        shared = tmp_path / "shared"
        shared.mkdir()
        shared.chmod(0o777)  # anybody could put code there: it is neither read nor written
        done = python(self.code, PPL_CACHE_DIR=str(shared))
        assert done.returncode == 0, done.stderr
        assert not list(shared.iterdir())


# --- names of programs on disk ------------------------------------------------------------------


def forget():
    """As a new process begins."""
    executables.clear()
    engine._structures.clear()


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """A filled cache, and what the run that filled it gave."""
    monkeypatch.setenv("PPL_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    tree = run(eight_schools, ERRORS, y=EFFECTS)
    forget()
    yield tree, tmp_path / "cache"
    forget()


def refuse(*_, **__):
    raise AssertionError("traced or lowered again")


def test_a_filled_cache_needs_neither_traces_nor_lowering(on_disk, monkeypatch):
    monkeypatch.setattr(engine.Engine, "_traced_once", refuse)
    monkeypatch.setattr(jax, "jit", refuse)
    again = run(eight_schools, ERRORS, y=EFFECTS)
    np.testing.assert_array_equal(again["posterior"]["mu"], on_disk[0]["posterior"]["mu"])


@pytest.mark.parametrize("what", ["_versions", "_configuration"])
def test_other_versions_and_settings_have_other_names(on_disk, monkeypatch, what):
    monkeypatch.setattr(executables, what, lambda: "others")
    monkeypatch.setattr(engine.Engine, "_traced_once", refuse)
    with pytest.raises(AssertionError, match="traced or lowered again"):
        run(eight_schools, ERRORS, y=EFFECTS)


@pytest.mark.parametrize("kind", ["key", "xla"])
def test_damaged_files_are_made_again(on_disk, kind):
    tree, cache = on_disk
    files = list(cache.glob(f"*.{kind}"))
    assert files
    for file in files:
        file.write_bytes(b"not a pickle")
    again = run(eight_schools, ERRORS, y=EFFECTS)
    np.testing.assert_array_equal(again["posterior"]["mu"], tree["posterior"]["mu"])


def test_names_tell_engines_apart():
    program = Program(eight_schools, (ERRORS,), {"y": EFFECTS})

    def name(method, lanes=1):
        return engine.Engine(program, method, lanes, jax.devices()[:1])._name

    names = [name(ppl.NUTS()), name(ppl.NUTS(max_depth=5)), name(ppl.HMC()), name(ppl.NUTS(), 2)]
    assert len(set(names)) == 4
    assert name(ppl.NUTS(target_acceptance=0.9)) == names[0]  # an argument of the program


def test_methods_that_bring_their_own_code_have_no_name():
    class Own(ppl.NUTS):
        pass

    program = Program(eight_schools, (ERRORS,), {"y": EFFECTS})
    assert engine.Engine(program, Own(), 1, jax.devices()[:1])._name == ""
    composed = ppl.MCMC(ppl.NUTS())
    assert engine.Engine(program, composed, 1, jax.devices()[:1])._name == ""


def test_names_do_not_pile_up(monkeypatch, tmp_path):
    monkeypatch.setenv("PPL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(executables, "_MOST_NAMES", 5)
    device = jax.devices()[0]
    for number in range(12):
        executables.remember(str(number), device, number)
    assert len(list((tmp_path / "cache").glob("*.key"))) == 5
    assert executables.recall("11", device) == 11
    assert executables.recall("nothing", device) is None
