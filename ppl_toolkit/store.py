"""A run on disk: draws streamed to zarr, and a checkpoint that is replaced atomically.

The draws of chunk k are appended to the zarr arrays first; the checkpoint, which holds the
sampler's state and how many draws count, is renamed into place after that. A killed run has
either the old checkpoint or the new one; draws beyond it are cut off on resumption.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ppl_toolkit.engine import Block
from ppl_toolkit.errors import CheckpointError
from ppl_toolkit.files import CHECKPOINT, load
from ppl_toolkit.labels import label_dimensions
from ppl_toolkit.results import run_attributes, state_arrays, stats_group
from ppl_toolkit.sites import variable_name

if TYPE_CHECKING:
    import xarray

__all__ = ["Checkpoint", "ZarrSink", "read_checkpoint", "require_free"]

_CHUNK_BYTES = 2**20  # a reader holds about ten decoded chunks at a time


class Checkpoint(NamedTuple):
    """The state of a run at its last commit.

    Attributes:
        manifest: iteration, committed draws, seed, chains, warm-up, method, hashes.
        state: the sampler's state as named arrays (chain, ...).
        coords: labels of dimensions.
        shapes: a zero of the shape of every site of the draws.
    """

    manifest: dict[str, Any]
    state: dict[str, np.ndarray]
    coords: dict[str, np.ndarray]
    shapes: dict[str, np.ndarray]


def _checksum(state: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(state[name]).tobytes())
    return sha.hexdigest()


def _write_checkpoint(
    directory: Path, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    buffer = io.BytesIO()
    text = json.dumps({**manifest, "checksum": _checksum(arrays)})
    np.savez(buffer, manifest=np.asarray(text), **dict(arrays))  # type: ignore[arg-type]
    temporary = directory / f"{CHECKPOINT}.{os.getpid()}.part"
    with temporary.open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / CHECKPOINT)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint of a stored run.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    directory = Path(path)
    file = directory / CHECKPOINT
    if not file.is_file():
        what = "is not a stored run" if directory.exists() else "does not exist"
        raise CheckpointError(
            f"cannot resume: {directory} {what}. A run leaves a checkpoint when it is given "
            "store='NAME.zarr'."
        )
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {key: content[key] for key in content.files}
        manifest = json.loads(str(arrays.pop("manifest")))
    except Exception as error:
        raise CheckpointError(f"the checkpoint {file} is damaged: {error}") from error
    if _checksum(arrays) != manifest.pop("checksum"):
        raise CheckpointError(f"the checkpoint {file} is damaged: its checksum does not match.")

    def part(kind: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(kind): v for k, v in arrays.items() if k.startswith(kind)}

    return Checkpoint(manifest, part("state/"), part("coords/"), part("shapes/"))


def require_free(path: str | Path) -> None:
    """Refuse to start a run where something is already.

    Raises:
        CheckpointError: it says how to go on.
    """
    if Path(path).exists():
        raise CheckpointError(
            f"store {path} exists. Give another name, remove it, or go on with it: "
            f"infer(..., resume={str(path)!r})."
        )


class ZarrSink:
    """Streams a run to a zarr directory; memory stays bounded by one chunk.

    Args:
        path: the directory; must not exist unless ``keep`` draws of it are to be kept.
        manifest: what a resumed run needs to know, as JSON values.
        group: name of the draws' group.
        dims: dimension names of every site, without chain and draw.
        coords: labels of dimensions.
        keep: committed draws of an earlier run to keep, None for a new run.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Mapping[str, Any],
        group: str,
        dims: Mapping[str, Sequence[str]],
        coords: Mapping[str, np.ndarray],
        keep: int | None = None,
    ) -> None:
        import zarr

        self.path, self.manifest, self.group, self.dims = Path(path), dict(manifest), group, dims
        self.coords = dict(coords)
        self.stats_group = stats_group(group)
        if keep is None:
            require_free(path)
        self.draws = self._committed = keep or 0
        try:
            self._root: Any = zarr.open_group(
                str(self.path), mode="w" if keep is None else "a", use_consolidated=False
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"store {self.path} cannot be written: {error}") from None
        self._arrays: dict[str, Any] = {}
        if keep is not None:
            self._cut_to(keep)

    def _cut_to(self, draws: int) -> None:
        """Drop draws that were appended but never committed."""
        for name in (self.group, self.stats_group):
            members = self._root[name].arrays() if name in self._root else ()
            for key, array in members:
                names: Any = getattr(array.metadata, "dimension_names", None) or ()
                if tuple(names[:2]) == ("chain", "draw"):
                    if array.shape[1] < draws:
                        raise CheckpointError(
                            f"store {self.path} is damaged: {name}/{key} has {array.shape[1]} "
                            f"draws of the {draws} that were committed."
                        )
                    array.resize((array.shape[0], draws, *array.shape[2:]))
                    self._arrays[f"{name}/{key}"] = array

    def _array(self, group: str, name: str, block: np.ndarray) -> Any:
        key = f"{group}/{variable_name(name)}"
        if key not in self._arrays:
            chains, _, *rest = block.shape
            row = max(int(np.prod(rest)) * block.dtype.itemsize, 1)
            rows = int(np.clip(_CHUNK_BYTES // row, 1, 4096))
            dims = list(self.dims.get(name, ()))
            if len(dims) != len(rest):
                dims = [f"{variable_name(name)}_dim_{i}" for i in range(len(rest))]
            self._arrays[key] = self._root.require_group(group).create_array(
                variable_name(name),
                shape=(chains, 0, *rest),
                chunks=(1, rows, *(max(n, 1) for n in rest)),
                dtype=block.dtype,
                dimension_names=["chain", "draw", *dims],
            )
        return self._arrays[key]

    def open(self, empty: Block) -> None:
        """Make the arrays of a new run, without draws."""
        if not self._arrays:
            self.append(empty)

    def append(self, block: Block) -> None:
        """Add the draws of one chunk (they count once committed)."""
        count = 0
        for group, arrays in (
            (self.group, block.values),
            (self.stats_group, block.stats),
        ):
            for name, value in arrays.items():
                array, count = self._array(group, name, value), value.shape[1]
                if count:
                    array.resize((array.shape[0], self.draws + count, *array.shape[2:]))
                    array[:, self.draws : self.draws + count] = value
        self.draws += count

    def commit(self, state: Callable[[], Any], iteration: int, warmup_steps: int) -> None:
        """Make the draws so far and the state durable, by one atomic rename."""
        manifest = {
            **self.manifest,
            "iteration": iteration,
            "draws": self.draws,
            "warmup_steps": warmup_steps,
        }
        arrays = {f"state/{name}": value for name, value in state_arrays(state()).items()}
        arrays |= {f"coords/{dim}": labels for dim, labels in self.coords.items()}
        for key, array in self._arrays.items():
            group, name = key.split("/")
            if group == self.group:
                arrays[f"shapes/{name}"] = np.zeros(array.shape[2:])
        _write_checkpoint(self.path, manifest, arrays)
        self._committed = self.draws

    def rollback(self) -> None:
        """Cut off draws that were appended but not committed."""
        with contextlib.suppress(OSError):  # on a disk that fails; resume= cuts them off as well
            self._cut_to(self._committed)
        self.draws = self._committed

    def finish(
        self, groups: Mapping[str, xarray.Dataset], attributes: Mapping[str, Any]
    ) -> xarray.DataTree:
        """Write labels, the other groups and the attributes; the result is read lazily.

        Args:
            groups: the groups besides the draws and their statistics.
            attributes: of the root and of the draws' group.
        """
        import xarray
        import zarr

        written = dict(groups)
        for name in (self.group, self.stats_group):
            arrays = [a for key, a in self._arrays.items() if key.startswith(f"{name}/")]
            if not arrays:
                continue
            sizes = {
                dim: size
                for array in arrays
                for dim, size in zip(array.metadata.dimension_names, array.shape, strict=True)
            }
            labels = label_dimensions(sizes, self.coords)
            attrs = {"sample_dims": ["chain", "draw"], **run_attributes(**attributes)}
            written[name] = xarray.Dataset(coords=labels, attrs=attrs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the checkpoint file is not a zarr object
            for name, group in written.items():
                if name not in (self.group, self.stats_group):
                    if name in self._root:
                        del self._root[name]
                    group = group.assign_attrs(run_attributes())
                else:  # labels of an earlier part of the run
                    for dim in set(group.coords) & set(self._root[name].array_keys()):
                        del self._root[name][dim]
                group.to_zarr(self.path, group=name, mode="a", consolidated=False)
            self._root.attrs.update(run_attributes(**attributes))
            zarr.consolidate_metadata(str(self.path))
        return load(self.path)

    def annotate(self, attributes: Mapping[str, Any]) -> xarray.DataTree:
        """Add root attributes that were computed from the finished result."""
        import zarr

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._root.attrs.update(dict(attributes))
            zarr.consolidate_metadata(str(self.path))
        return load(self.path)
