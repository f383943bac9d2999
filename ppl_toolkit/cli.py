"""The command line: ``ppl demo`` and ``ppl doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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
    devices = ", ".join(f"{d.platform} ({d.device_kind})" for d in jax.devices())
    typer.echo(f"devices: {devices}; {os.cpu_count()} cores")
    info = executables.cache_info()
    if info.directory is None:
        typer.echo("cache of compiled programs: off (PPL_CACHE_DIR=off, or JAX has its own)")
    else:
        size = info.bytes / 2**20
        typer.echo(
            f"cache of compiled programs: {info.directory} ({info.files} files, {size:.1f} MiB)"
        )

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
