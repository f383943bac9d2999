"""Results as files."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ppl_toolkit.errors import CheckpointError, OptionError
from ppl_toolkit.results import require_tree

if TYPE_CHECKING:
    import xarray

__all__ = ["CHECKPOINT", "load", "save"]

CHECKPOINT = "checkpoint.npz"
"""The file of a stored run that holds the sampler's state."""


def save(tree: xarray.DataTree, path: str | Path) -> Path:
    """Write a result to ``path``: netCDF (``.nc``) or zarr (``.zarr``).

    An earlier result of that name is replaced once the new one is complete.

    Raises:
        OptionError: the suffix is neither, the folder is missing, or something else is there.
    """
    require_tree(tree, many=True)
    path = Path(path)
    if path.suffix not in (".nc", ".zarr"):
        raise OptionError(f"cannot tell the format from {path.name!r}: end it in .nc or .zarr.")
    if not path.parent.is_dir():
        raise OptionError(f"cannot write {path}: there is no folder {path.parent}.")
    temporary = path.with_name(path.name + ".part")
    if path.suffix == ".nc":
        if path.is_dir():
            raise OptionError(f"cannot write {path}: it is a folder.")
        tree.to_netcdf(temporary, engine="h5netcdf")
        temporary.replace(path)
        return path
    if path.exists() and not _is_zarr(path):
        raise OptionError(f"{path} exists and is not a stored result; give another name.")
    if (path / CHECKPOINT).exists():
        raise OptionError(
            f"{path} is the store of a run, which could not go on without its checkpoint; give "
            "another name."
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # consolidated metadata are not in zarr's standard yet
        tree.load().to_zarr(temporary, mode="w")
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)
    return path


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def load(path: str | Path) -> xarray.DataTree:
    """Read a result: netCDF into memory, zarr lazily (the files must stay as they are).

    Raises:
        CheckpointError: there is no such file, or it is not a result.
    """
    import xarray

    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no result at {path}.")
    try:
        if path.suffix == ".zarr" or path.is_dir():
            return xarray.open_datatree(path, engine="zarr", chunks=None)
        with xarray.open_datatree(path, engine="h5netcdf") as tree:
            return tree.load()
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a result: {error}") from None
