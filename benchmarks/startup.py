"""What it costs to begin: imports, first calls with empty and filled caches, second calls.

    python benchmarks/startup.py [--repeats 3]

Every figure comes from a fresh process. The job is eight schools, 4 chains x (1000 + 1000).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from statistics import median
from typing import Any

from measure import cost_of, counted_compilations, machine, show_table

IMPORTS = {
    "ppl_toolkit": "import ppl_toolkit",
    "ppl_toolkit, and what infer needs": "import ppl_toolkit; ppl_toolkit.infer; import xarray",
    "numpyro": "import numpyro, numpyro.infer",
    "numpyro and blackjax": "import numpyro, numpyro.infer, blackjax",
}
HEAVY = ("jax", "numpyro", "pandas", "xarray", "matplotlib")
IMPORT_JOB = """
import json, sys, time
begin = time.process_time()
{statement}
seconds = time.process_time() - begin
print(json.dumps([seconds, [m for m in {heavy} if m in sys.modules]]))
"""
WHOLE = """
import json, sys, time, warnings
import jax, numpyro
sys.path.insert(0, {folder!r})
from posteriordb import eight_schools_noncentered as model
warnings.simplefilter("ignore")
begin = time.process_time()
import numpy as np
import ppl_toolkit as ppl
sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ppl.infer(model, sigma, y=y, progress=False)
print(json.dumps(time.process_time() - begin))
"""
MAKERS = {
    "ours": "ours",
    "blackjax, one chain jitted by hand": "blackjax_mapped",
    "NumPyro, whole run jitted by hand": "numpyro_jitted",
    "NumPyro, one MCMC object": "numpyro_object",
}


def fresh_process(arguments: list[str], cache: str | None = None, peer: bool = False) -> Any:
    """The JSON that a fresh Python process prints; ``cache`` is its directory of programs.

    Modules are compiled to bytecode once, as those of installed packages are; ``peer`` says that
    the directory is JAX's.
    """
    own = ("PPL_", "JAX_", "PYTHONDONTWRITEBYTECODE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment["PPL_CACHE_DIR"] = cache or "off"
    if cache and peer:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def job(maker: str) -> list[float]:
    """First and second call: CPU seconds and compilations of each (run in a fresh process)."""
    import peers
    from examples import EXAMPLES, new_data

    model, data = EXAMPLES["eight schools"]
    make = getattr(peers, maker)

    def first() -> Any:
        sampler = make(model, data, 1000, 1000)
        sampler(0, data)
        return sampler

    with counted_compilations() as compiled_first:
        cost, sampler = cost_of(first)
    with counted_compilations() as compiled_second:
        cost_second, _ = cost_of(lambda: sampler(1, new_data(data)))
    return [cost.cpu, len(compiled_first), cost_second.cpu, len(compiled_second)]


def import_rows(repeats: int) -> list[list[Any]]:
    rows = []
    for label, statement in IMPORTS.items():
        code = IMPORT_JOB.format(statement=statement, heavy=HEAVY)
        runs = [fresh_process(["-c", code]) for _ in range(repeats)]
        rows.append([label, median(run[0] for run in runs), ", ".join(runs[0][1]) or "none"])
    return rows


def call_rows(repeats: int) -> list[list[Any]]:
    """Engines in turn: one process with an empty directory, then one that finds it filled."""
    empty: dict[str, list] = {label: [] for label in MAKERS}
    filled: dict[str, list] = {label: [] for label in MAKERS}
    for _ in range(repeats):
        for label, maker in MAKERS.items():
            with tempfile.TemporaryDirectory() as cache:
                arguments = [__file__, "--job", maker]
                peer = maker != "ours"
                empty[label].append(fresh_process(arguments, cache, peer))
                filled[label].append(fresh_process(arguments, cache, peer))

    def middle(runs: list, column: int) -> float:
        return median(run[column] for run in runs)

    return [
        [
            label,
            middle(empty[label], 0),
            int(middle(empty[label], 1)),
            middle(filled[label], 0),
            middle(empty[label] + filled[label], 2),
            int(middle(empty[label] + filled[label], 3)),
        ]
        for label in MAKERS
    ]


def beyond_imports(repeats: int) -> list[list[Any]]:
    """What `infer` costs a new process that has imported jax and numpyro, our imports included."""
    code = WHOLE.format(folder=os.path.dirname(os.path.abspath(__file__)))
    with tempfile.TemporaryDirectory() as cache:
        first = fresh_process(["-c", code], cache)
        filled = [fresh_process(["-c", code], cache) for _ in range(repeats)]
    return [["empty", first], ["filled", median(filled)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes per figure")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(options.job)))
        return
    print(machine("ppl_toolkit", "jax", "numpyro", "blackjax"))
    show_table(
        "Imports",
        ("import", "CPU s", "loaded of " + ", ".join(HEAVY)),
        import_rows(options.repeats),
    )
    show_table(
        "Calls: eight schools, 4 x (1000 + 1000), everything imported before",
        ("engine", "first, empty cache, CPU s", "compilations", "first, filled cache, CPU s",
         "second, new data, CPU s", "compilations "),
        call_rows(options.repeats),
    )  # fmt: skip
    show_table(
        "A new process, beyond importing jax and numpyro: ppl_toolkit, its imports and one run",
        ("cache", "CPU s"),
        beyond_imports(options.repeats),
    )


if __name__ == "__main__":
    main()
