"""The command line: fit, report, compare, check; a demonstration, and a look at the set-up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ppl_toolkit import __version__

__all__ = ["app", "main"]

_MAIN = ["intercept", "slope", "intercept_sd", "slope_sd", "noise", "birth_weight"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Composable, compiled inference for NumPyro models.",
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show it.")] = False) -> None:
    if version:
        typer.echo(f"ppl_toolkit {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    draws: Annotated[int, typer.Option(help="Draws per chain.", min=100)] = 1000,
) -> None:
    """Fit a hierarchical model to real data, report, and write the files."""
    import warnings

    import arviz

    import ppl_toolkit as ppl
    from ppl_toolkit.demo import DAYS, WEIGHTS, growth
    from ppl_toolkit.errors import InferenceWarning

    out.mkdir(parents=True, exist_ok=True)
    typer.echo("Growth of 30 young rats (Gelfand et al. 1990): a line for every rat.\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)  # the report shows the findings
        posterior = ppl.infer(
            growth,
            DAYS,
            weight=WEIGHTS,
            seed=seed,
            draws=draws,
            coords={"day": DAYS, "rat": range(1, 31)},
        )
    posterior = ppl.log_likelihood(posterior, growth, DAYS, weight=WEIGHTS)
    posterior = ppl.predict(posterior, growth, DAYS, weight=WEIGHTS, seed=seed)
    page, file = out / "demo.html", out / "demo.nc"
    ppl.report(posterior, page)
    ppl.save(posterior, file)
    typer.echo("\n" + ppl.report(posterior, var_names=_MAIN))
    typer.echo(f"\nThe same by arviz.summary:\n{arviz.summary(posterior, var_names=_MAIN)}")
    typer.echo(f"\nWrote {page} (open it in a browser) and {file} (arviz.from_netcdf reads it).")


_Model = Annotated[str, typer.Argument(help="The model: MODULE:NAME or FILE.py:NAME.")]
_Data = Annotated[
    Path | None,
    typer.Option(help="The arguments by name: .json, .npz, or .csv (columns)."),
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A further argument, NAME=VALUE (JSON); may be repeated."),
]
_MethodName = Annotated[str, typer.Option(help="auto, nuts, hmc, enumeration or prior.")]
_Seed = Annotated[int, typer.Option(help="Seed of the draws.", min=0)]


@app.command()
def infer(
    model: _Model,
    data: _Data = None,
    set_: _Set = None,
    method: _MethodName = "auto",
    draws: Annotated[int, typer.Option(help="Draws per chain.", min=1)] = 1000,
    warmup: Annotated[int | None, typer.Option(help="Warm-up iterations.", min=0)] = None,
    chains: Annotated[int, typer.Option(help="Independent chains.", min=1)] = 4,
    seed: _Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result: .nc or .zarr.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    log_likelihood: Annotated[
        bool, typer.Option(help="Add pointwise log likelihoods, for `ppl compare`.")
    ] = False,
) -> None:
    """Fit a model to data, and report. Exits with 1 if the draws should not be used."""
    import warnings

    import ppl_toolkit as ppl
    from ppl_toolkit.errors import InferenceWarning

    function, arguments = _model(model), _arguments(data, set_)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)  # the report shows the findings
        tree = ppl.infer(
            function, method=method, draws=draws, warmup=warmup, chains=chains, seed=seed,
            data=arguments,
        )  # fmt: skip
    if log_likelihood:
        tree = ppl.log_likelihood(tree, function, data=arguments)
    typer.echo(ppl.report(tree, report))
    for what, path in (("the result", out), ("the page", report)):
        if path is not None:
            if path is out:
                ppl.save(tree, path)
            typer.echo(f"Wrote {what}: {path}")
    if any(finding.severity == "error" for finding in ppl.findings(tree)):
        raise typer.Exit(1)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A result: .nc or .zarr, ArviZ's too.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it as a page.")] = None,
    var: Annotated[list[str] | None, typer.Option(help="Sites to show; may be repeated.")] = None,
) -> None:
    """Report on a saved result. Exits with 1 if the draws should not be used."""
    import ppl_toolkit as ppl

    tree = ppl.load(file)
    typer.echo(ppl.report(tree, out, var or None))
    if out is not None:
        typer.echo(f"Wrote {out}")
    if any(finding.severity == "error" for finding in ppl.findings(tree)):
        raise typer.Exit(1)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Results with log likelihoods.")],
    method: Annotated[str, typer.Option(help="How weights are found.")] = "stacking",
) -> None:
    """Compare saved results by leave-one-out cross-validation."""
    import ppl_toolkit as ppl
    from ppl_toolkit.errors import OptionError

    if len(files) < 2:
        raise OptionError(f"name two results or more to compare; got {len(files)}.")
    table = ppl.compare({file.stem: ppl.load(file) for file in files}, method=method)
    typer.echo(table.to_string())


@app.command()
def check(
    model: _Model,
    data: _Data = None,
    set_: _Set = None,
    method: _MethodName = "nuts",
    replications: Annotated[int, typer.Option(help="Simulated data sets.", min=20)] = 1000,
    seed: _Seed = 0,
) -> None:
    """Check by simulation that a method is calibrated on a model. Exits with 1 if it is not."""
    import ppl_toolkit as ppl

    found = ppl.calibrate(
        _model(model), method=method, replications=replications, seed=seed,
        data=_arguments(data, set_),
    )  # fmt: skip
    typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)


def _model(name: str) -> Callable:
    """The function that MODULE:NAME or FILE.py:NAME means."""
    from importlib import import_module, util

    from ppl_toolkit.errors import OptionError

    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise OptionError(f"write the model as MODULE:NAME or FILE.py:NAME; got {name!r}.")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise OptionError(f"there is no file {path}.")
        spec = util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = import_module(place)
        except ModuleNotFoundError as error:
            raise OptionError(f"there is no module {place!r} ({error}).") from None
        finally:
            sys.path.pop(0)
    if not callable(getattr(module, attribute, None)):
        functions = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise OptionError(f"{place} has no function {attribute!r}; it has {functions[:20]}.")
    return getattr(module, attribute)


def _arguments(file: Path | None, settings: Sequence[str] | None) -> dict[str, Any]:
    """The model's arguments, from a file and from NAME=VALUE settings."""
    import json

    import numpy as np

    from ppl_toolkit.errors import DataError, OptionError

    arguments: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise DataError(f"there is no data file {file}.")
        if file.suffix == ".json":
            try:
                content = json.loads(file.read_text())
            except json.JSONDecodeError as error:
                raise DataError(f"{file} is not JSON: {error}.") from None
            if not isinstance(content, dict):
                raise DataError(f"{file} must hold an object of arguments by name.")
            arguments = {k: np.asarray(v) if isinstance(v, list) else v for k, v in content.items()}
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                arguments = {name: arrays[name] for name in arrays.files}
        elif file.suffix == ".csv":
            import pandas

            table = pandas.read_csv(file)
            arguments = {str(name): table[name].to_numpy() for name in table.columns}
        else:
            raise DataError(f"data files end in .json, .npz or .csv; got {file.name!r}.")
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals:
            raise OptionError(f"write --set NAME=VALUE; got {setting!r}.")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        arguments[name] = np.asarray(parsed) if isinstance(parsed, list) else parsed
    return arguments


@app.command()
def doctor() -> None:
    """Show versions, devices and caches, and check that a small run works."""
    import os
    import platform
    import time

    from ppl_toolkit import executables

    typer.echo(f"ppl_toolkit {__version__}, Python {platform.python_version()}")
    try:
        import arviz
        import jax
        import numpyro
    except ImportError as error:
        typer.echo(
            f"not installed as it should be: {error}. Install again: pip install ppl_toolkit"
        )
        raise typer.Exit(1) from None
    typer.echo(f"jax {jax.__version__}, numpyro {numpyro.__version__}, arviz {arviz.__version__}")
    try:
        devices = ", ".join(f"{d.platform} ({d.device_kind})" for d in jax.devices())
    except Exception as error:  # JAX raises errors of several kinds
        asked = os.environ.get("JAX_PLATFORMS")
        typer.echo(f"JAX finds no device{f' (JAX_PLATFORMS={asked})' if asked else ''}: {error}")
        raise typer.Exit(1) from None
    typer.echo(f"devices: {devices}; {os.cpu_count()} cores")
    info = executables.cache_info()
    if info.directory is None:
        typer.echo("cache of compiled programs: off (PPL_CACHE_DIR=off, or JAX has its own)")
    else:
        size = info.bytes / 2**20
        typer.echo(
            f"cache of compiled programs: {info.directory} ({info.files} files, {size:.1f} MiB)"
        )
        if trouble := executables.cache_trouble():
            typer.echo(f"  it cannot be used: {trouble}. Name another one: PPL_CACHE_DIR=...")

    import ppl_toolkit as ppl

    begin = time.perf_counter()
    result = ppl.infer(_standard_normal, init=[0.0, 0.0], seed=1, progress=False)
    r_hat = float(ppl.summary(result)["r_hat"].max())
    healthy = r_hat < 1.02
    typer.echo(
        f"test run: {time.perf_counter() - begin:.1f} s, R-hat {r_hat:.3f}: "
        + ("all is well" if healthy else "something is wrong")
    )
    if not healthy:
        raise typer.Exit(1)


def _standard_normal(x: object) -> object:
    return -0.5 * (x * x).sum()  # type: ignore[operator]


def main() -> None:
    """Run the command line; errors with a remedy, and of files, print one line and exit with 2."""
    from ppl_toolkit.errors import PPLError

    try:
        app()
    except (PPLError, OSError) as error:
        typer.echo(f"ppl: {error}", err=True)
        sys.exit(2)
