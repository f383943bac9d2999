"""The draws of a seed are the same, bit for bit, however the run is carried out."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import EFFECTS, ERRORS, eight_schools

import ppl_toolkit as ppl
from ppl_toolkit.errors import CheckpointError, InferenceWarning, SamplingError

DRAWS, WARMUP = 300, 200


def run(**options):
    options = {"draws": DRAWS, "warmup": WARMUP, "seed": 3, "progress": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return ppl.infer(eight_schools, ERRORS, y=EFFECTS, **options)


def extend(tree, draws):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return ppl.extend(tree, eight_schools, ERRORS, y=EFFECTS, draws=draws, progress=False)


def draws_of(tree):
    return {
        f"{group}/{name}": np.asarray(values)
        for group in ("posterior", "sample_stats", "sampler_state")
        for name, values in tree[group].data_vars.items()
    }


def assert_same(one, two):
    a, b = draws_of(one), draws_of(two)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module")
def reference():
    tree = run()
    draws = np.asarray(tree["posterior"]["theta"])
    assert draws.shape == (4, DRAWS, 8)
    moved = np.any(np.diff(draws, axis=1) != 0, axis=-1).mean(axis=1)
    assert (moved > 0.5).all(), "the chains must have moved"
    assert len({draws[c].tobytes() for c in range(4)}) == 4, "and each its own way"
    return tree


@pytest.mark.parametrize("method", ["nuts", "hmc"])
@pytest.mark.parametrize("chunk", [1, 7, 100, 10_000])
def test_chunks(method, chunk, reference):
    base = reference if method == "nuts" else run(method=method)
    assert_same(base, run(method=method, chunk=chunk))


@pytest.mark.parametrize("progress", ["lines", "bar"])
def test_progress(progress, reference, capfd):
    assert_same(reference, run(progress=progress, chunk=50))
    assert "NUTS" in capfd.readouterr().err


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads(threads, reference):
    assert_same(reference, run(threads=threads))


@pytest.mark.parametrize("chunk", [None, 33])
def test_store(chunk, reference, tmp_path):
    stored = run(store=tmp_path / "run.zarr", chunk=chunk)
    assert_same(reference, stored)
    assert_same(reference, ppl.load(tmp_path / "run.zarr"))


def test_chains_do_not_depend_on_each_other_after_warm_up():
    few, many = run(chains=2, warmup=0), run(chains=4, warmup=0)
    np.testing.assert_array_equal(few["posterior"]["theta"], many["posterior"]["theta"][:2])


def test_another_seed_gives_other_draws(reference):
    other = run(seed=4)
    same = np.isclose(other["posterior"]["mu"], reference["posterior"]["mu"])
    assert same.mean() < 0.01


def test_extend_continues_the_run(reference):
    assert_same(reference, extend(run(draws=DRAWS // 2), DRAWS - DRAWS // 2))


def test_extend_after_saving_and_loading(reference, tmp_path):
    ppl.save(run(draws=100), tmp_path / "half.nc")
    assert_same(reference, extend(ppl.load(tmp_path / "half.nc"), DRAWS - 100))


def test_resume_with_more_draws(reference, tmp_path):
    run(draws=120, store=tmp_path / "run.zarr")
    assert_same(reference, run(seed=None, warmup=None, resume=tmp_path / "run.zarr"))


def test_an_executable_from_disk_gives_the_same_draws(reference, tmp_path, monkeypatch):
    from ppl_toolkit import executables

    monkeypatch.setenv("PPL_CACHE_DIR", str(tmp_path / "cache"))
    executables.clear()
    assert_same(reference, run())
    files = list((tmp_path / "cache").glob("*.xla"))
    assert files
    executables.clear()
    assert_same(reference, run())
    assert sorted(files) == sorted((tmp_path / "cache").glob("*.xla"))


class TestInterrupts:
    def test_ctrl_c_returns_what_was_drawn_and_extend_completes_it(self, reference):
        class StopAfter:
            """A progress form that presses Ctrl-C in the middle of the draws."""

            count = 0

            def __call__(self, block):
                self.count += 1
                if self.count == 4:
                    os.kill(os.getpid(), signal.SIGINT)

        from ppl_toolkit import runner

        press = StopAfter()
        append = runner.MemorySink.append

        def appended(sink, block):
            append(sink, block)
            press(block)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner.MemorySink, "append", appended)
            with pytest.warns(InferenceWarning, match="interrupted after"):
                part = ppl.infer(
                    eight_schools, ERRORS, y=EFFECTS, draws=DRAWS, warmup=WARMUP, seed=3,
                    progress=False, chunk=20,
                )  # fmt: skip
        done = part["posterior"].sizes["draw"]
        assert done == 80
        assert part.attrs["interrupted"] == 1
        assert_same(reference, extend(part, DRAWS - done))

    def test_a_failure_keeps_what_was_drawn(self, reference, tmp_path):
        from ppl_toolkit import runner

        advance, calls = runner.Unit.advance, []

        def failing(unit, index, count, collect):
            calls.append(index)
            if index >= WARMUP + 100:
                raise MemoryError("no more")
            return advance(unit, index, count, collect)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner.Unit, "advance", failing)
            with pytest.raises(SamplingError, match=r"MemoryError: no more.*resume") as caught:
                run(chunk=50, store=tmp_path / "run.zarr")
        part = caught.value.partial
        assert part["posterior"].sizes["draw"] == 100
        assert_same(reference, run(seed=None, warmup=None, resume=tmp_path / "run.zarr"))

    @pytest.mark.parametrize("stored", [False, True], ids=["memory", "disk"])
    @pytest.mark.parametrize("problem", [MemoryError, KeyboardInterrupt])
    def test_a_chunk_that_fails_in_one_chain_only_is_dropped_whole(
        self, problem, stored, reference, tmp_path
    ):
        """The other chains have gone on by then; the state must be that of the last commit."""
        from ppl_toolkit import runner

        advance = runner.Unit.advance

        def failing(unit, index, count, collect):
            if index >= WARMUP + 100 and 1 in unit.chains:
                raise problem
            return advance(unit, index, count, collect)

        options = {"chunk": 50, "store": tmp_path / "run.zarr" if stored else None}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner.Unit, "advance", failing)
            if problem is KeyboardInterrupt:
                part = run(**options)
            else:
                with pytest.raises(SamplingError) as caught:
                    run(**options)
                part = caught.value.partial
        assert part["posterior"].sizes["draw"] == 100
        assert_same(reference, extend(part.load(), DRAWS - 100))

    @pytest.mark.parametrize("stored", [False, True], ids=["memory", "disk"])
    def test_draws_that_could_not_be_committed_are_dropped(self, stored, reference, tmp_path):
        from ppl_toolkit import runner, store

        sink = store.ZarrSink if stored else runner.MemorySink
        commit = sink.commit

        def failing(self, state, iteration, steps):
            if iteration > WARMUP + 100:
                raise OSError("no space left on device")
            commit(self, state, iteration, steps)

        options = {"chunk": 50, "store": tmp_path / "run.zarr" if stored else None}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sink, "commit", failing)
            with pytest.raises(SamplingError, match="no space left") as caught:
                run(**options)
        part = caught.value.partial
        assert part["posterior"].sizes["draw"] == 100
        assert_same(reference, extend(part.load(), DRAWS - 100))


SCRIPT = textwrap.dedent(
    """
    import sys, warnings
    sys.path.insert(0, {tests!r})
    from models import EFFECTS, ERRORS, eight_schools
    import ppl_toolkit as ppl
    warnings.simplefilter("ignore")
    print("started", flush=True)
    options = dict(draws={draws}, warmup={warmup}, seed=3, progress=False, chunk=5)
    ppl.infer(eight_schools, ERRORS, y=EFFECTS, store=sys.argv[1], **options)
    """
)


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_and_resume(rounds, reference, tmp_path):
    """Killed at random moments between the first commit and the end; resumed to the same draws."""
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(tests=str(Path(__file__).parents[1]), draws=DRAWS, warmup=WARMUP)
    )
    rng = random.Random(rounds)
    killed = 0
    for number in range(rounds):
        store = tmp_path / f"run{number}.zarr"
        process = subprocess.Popen(
            [sys.executable, str(script), str(store)], stdout=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while not (store / "checkpoint.npz").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        killed += process.returncode == -signal.SIGKILL
        resumed = run(seed=None, warmup=None, resume=store, draws=DRAWS)
        assert_same(reference, resumed)
        assert_same(reference, ppl.load(store))
    assert killed > rounds // 2, "most of the kills must have come before the end"


class TestRefusals:
    def test_resume_refuses_another_model_other_data_and_changed_options(self, tmp_path):
        store = tmp_path / "run.zarr"
        run(draws=20, store=store)

        with pytest.raises(CheckpointError, match="the data"):
            ppl.infer(eight_schools, ERRORS, y=EFFECTS + 1, resume=store, progress=False)
        with pytest.raises(CheckpointError, match="the model"):
            ppl.infer(eight_schools, ERRORS, resume=store, progress=False)
        with pytest.raises(CheckpointError, match="seed"):
            run(resume=store, seed=5)
        with pytest.raises(CheckpointError, match="method"):
            run(resume=store, method="hmc", warmup=None, seed=None)

    def test_a_damaged_checkpoint_is_refused(self, tmp_path):
        store = tmp_path / "run.zarr"
        run(draws=20, store=store)
        file = store / "checkpoint.npz"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="damaged"):
            run(resume=store, seed=None, warmup=None)

    def test_an_existing_store_is_not_overwritten(self, tmp_path):
        run(draws=20, store=tmp_path / "run.zarr")
        with pytest.raises(CheckpointError, match="exists"):
            run(draws=20, store=tmp_path / "run.zarr")

    def test_extend_refuses_other_data(self):
        with pytest.raises(CheckpointError, match="data"):
            ppl.extend(run(draws=20), eight_schools, ERRORS * 2, y=EFFECTS, progress=False)
