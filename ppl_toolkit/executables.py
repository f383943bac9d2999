"""Compiled programs, kept in the process and across processes.

In the process the key is the method, the text of the traced model, and the shapes. Across
processes it is the lowered program itself (StableHLO) with the versions and the machine, so that
an entry can never be stale; methods of this package find it by a name made of the first key and of
the package's own source, without tracing and lowering the program again. Entries live in a
directory of the user's own (mode 0700): loading an executable runs code, so a directory owned by
anybody else is refused.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import os
import pickle
import platform
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from ppl_toolkit.cost import operations
from ppl_toolkit.tracing import Traced

__all__ = [
    "CacheInfo",
    "Executable",
    "cache_directory",
    "cache_info",
    "clear",
    "compiled",
    "evaluate",
    "evaluate_once",
    "kept",
    "recall",
    "remember",
]

_FORMAT = 3
_LIMIT_BYTES = 512 * 2**20
_MOST_NAMES = 2000  # files of some hundred bytes
# XLA maps every kernel of a program into memory on its own, and aborts the process where Linux
# grants no further map (vm.max_map_count, 65,530 as a rule).
_MOST_IN_PROCESS = 64


class Executable(NamedTuple):
    """A compiled program and what it cost: seconds of trace + lowering, and of XLA."""

    call: Callable
    seconds: float
    source: str  # "compiled" or "disk"


class CacheInfo(NamedTuple):
    """What `ppl doctor` shows of the caches."""

    in_process: int
    directory: Path | None
    files: int
    bytes: int


# Level 1 makes programs that run as fast as those of XLA's default, in less time.
_BRIEF = 2e7  # numbers that a program made in a hurry may compute: a tenth of a second
_LEVEL = "xla_backend_optimization_level"
_USUAL: dict[str, Any] = {_LEVEL: 1}
_QUICK: dict[str, Any] = {_LEVEL: 0, "xla_llvm_disable_expensive_passes": True}

_memory: collections.OrderedDict[Any, Executable] = collections.OrderedDict()
_locks: dict[Any, threading.Lock] = {}
_guard = threading.Lock()


def compiled(
    key: Any,
    build: Callable[[], jax.stages.Traced],
    device: Any,
    quick: bool = False,
    name: str = "",
) -> tuple[Executable, bool]:
    """The executable for ``key``, built once while it is among those used last in this process.

    Args:
        key: hashable; determines what ``build`` traces.
        build: traces the program (called in the precision context).
        device: where the program runs.
        quick: whether it runs but once, and is made quickly unless it is much work.
        name: a text that determines what ``build`` traces, together with the versions of this
            package and of those it calls: with it a program on disk is found without ``build``.

    Returns:
        The executable, and whether it had to be made (False: it was there).
    """
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        with _guard:
            if key in _memory:
                _memory.move_to_end(key)
                return _memory[key], False
        begin = time.perf_counter()
        found = _load(recall(name, device), device) if name else None
        if found is None:
            traced = build()
            brief = quick and operations(traced.jaxpr) < _BRIEF
            # With unused arguments dropped, else JAX's caches keep it for ever.
            call, source, path = _load_or_compile(traced.lower(), device, brief)
            if name and path is not None:
                remember(name, device, path.name)
        else:
            call, source = found, "disk"
        made = Executable(call, time.perf_counter() - begin, source)
        with _guard:
            _memory[key] = made
            while len(_memory) > _MOST_IN_PROCESS:
                oldest, _ = _memory.popitem(last=False)
                _locks.pop(oldest, None)
        return made, True


def kept(function: Callable, *example: Any, quick: bool = False) -> Callable:
    """``function`` as a kept executable for arguments like ``example``.

    Like jax.jit for one set of shapes, but it survives the process, and a second function with
    the same computation shares it. Made and called in the precision context; closed-over arrays
    are arguments.

    Args:
        function: traced once, here.
        *example: arrays, or `jax.ShapeDtypeStruct` in their place.
        quick: whether it runs but once, and is made quickly unless it is much work.
    """
    traced = Traced.of(function, *example)
    shapes = str(jax.tree.map(lambda x: (np.shape(x), str(jnp.result_type(x))), example))
    device = jax.devices()[0]
    executable, _ = compiled(
        ("kept", traced.text(differentiable=False), shapes, device, quick),
        lambda: jax.jit(traced.__call__).trace(traced.consts, *example),
        device,
        quick,
    )
    return functools.partial(executable.call, traced.consts)


def evaluate(function: Callable, *args: Any) -> Any:
    """``function(*args)`` by a kept executable."""
    return kept(function, *args)(*args)


def evaluate_once(function: Callable, *args: Any) -> Any:
    """``function(*args)`` by a kept executable, made in a third of the time if it is brief."""
    return kept(function, *args, quick=True)(*args)


def clear() -> None:
    """Forget the executables of this process (the files stay)."""
    with _guard:
        _memory.clear()
        _locks.clear()


def cache_directory() -> Path | None:
    """Where executables are kept across processes; None when that is switched off.

    ``PPL_CACHE_DIR`` names a directory, or switches the cache off with ``off``. A compilation
    cache set up through JAX itself takes precedence: then ours stays out of the way.

    Names of files know the source of this package, the versions of the others, and models and
    methods of a user's own; not functions replaced at run time (monkeypatched): work on those with
    ``PPL_CACHE_DIR=off``.
    """
    chosen = os.environ.get("PPL_CACHE_DIR", "")
    if chosen.lower() in ("off", "0", "none") or jax.config.jax_compilation_cache_dir:
        return None
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("ppl_toolkit"))


def cache_info() -> CacheInfo:
    """Numbers about both caches."""
    directory = cache_directory()
    files = list(directory.glob("*.xla")) if directory and directory.is_dir() else []
    return CacheInfo(len(_memory), directory, len(files), sum(f.stat().st_size for f in files))


def cache_trouble() -> str:
    """Why nothing can be kept on disk; "" if it can, or is not meant to."""
    directory = cache_directory()
    if directory is None:
        return ""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        return str(error)
    return "" if _is_own(directory) else "others own it, or may write to it"


def recall(name: str, device: Any) -> Any:
    """What was remembered under a name on this machine, by these versions; None if nothing."""
    directory = cache_directory()
    if directory is None:
        return None
    with contextlib.suppress(Exception):  # a damaged entry is simply made again
        path = directory / f"{_digest(_versions() + _configuration() + name, device)}.key"
        if _is_own(directory) and path.is_file():
            value = pickle.loads(path.read_bytes())
            path.touch()
            return value
    return None


def remember(name: str, device: Any, value: Any) -> None:
    """Keep something small on disk for other processes."""
    directory = cache_directory()
    if directory is not None:
        with contextlib.suppress(Exception):  # a full or read-only disk must not stop a run
            path = directory / f"{_digest(_versions() + _configuration() + name, device)}.key"
            _write(directory, path, pickle.dumps(value))


@functools.cache
def _versions() -> str:
    """This package's source, and the versions of those whose code becomes part of programs."""
    sha = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        sha.update(str(file.relative_to(root)).encode())
        sha.update(file.read_bytes())
    for package in ("numpyro", "blackjax", "optax", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            sha.update(f"{package} {version(package)}".encode())
    return sha.hexdigest()


def _configuration() -> str:
    """JAX's settings, some of which change what is traced and lowered."""
    return repr(sorted(jax.config.values.items()))


def _load(file: str | None, device: Any) -> Callable | None:
    """The executable in a file of the cache, None if it is not there or cannot be used."""
    directory = cache_directory()
    if directory is None or file is None:
        return None
    path = directory / file
    with contextlib.suppress(Exception):  # a damaged or foreign entry is simply made again
        if _is_own(directory) and path.is_file():
            entry = path.read_bytes()
            if b"lapack_" in entry:
                _prepare_lapack()
            payload, in_tree, out_tree = pickle.loads(entry)
            call = serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, execution_devices=[device]
            )
            path.touch()
            return call
    return None


@functools.cache
def _prepare_lapack() -> None:
    """Fill in the addresses of LAPACK's functions, which JAX does when it lowers one of them.

    A program from disk that calls one would crash the process otherwise (jax-ml/jax#28908).
    """
    jax.jit(jnp.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), np.float32))


def _load_or_compile(
    lowered: jax.stages.Lowered, device: Any, quick: bool
) -> tuple[Callable, str, Path | None]:
    """The executable, where it is from, and the file it is kept in."""
    directory = cache_directory()
    text = lowered.as_text()
    options = _options(quick, device)
    used = _used_arguments(lowered)
    if directory is None or "callback" in text or used is None:
        return lowered.compile(compiler_options=options), "compiled", None
    text += str(options or "")
    # The same program may take other dictionaries, and others of its arguments may be unused.
    around = f"{used}{lowered.args_info}{lowered.in_tree}{lowered.out_tree}"
    path = directory / f"{_digest(text + around, device)}.xla"
    if (found := _load(path.name, device)) is not None:
        return found, "disk", path
    call = lowered.compile(compiler_options=options)
    with contextlib.suppress(Exception):  # a full or read-only disk must not stop a run
        _write(directory, path, pickle.dumps(serialize_executable.serialize(call)))
    return call, "compiled", path


def _options(quick: bool, device: Any) -> dict[str, Any] | None:
    """How XLA is to optimise; a level that the user's own flags give stays."""
    if device.platform != "cpu":
        return None
    if quick:
        return _QUICK
    return None if _LEVEL in os.environ.get("XLA_FLAGS", "") else _USUAL


def _used_arguments(lowered: jax.stages.Lowered) -> list[int] | None:
    """The arguments that the program still has; None where JAX does not tell.

    Functions that return their first or their second argument have one text, once the other is
    dropped.
    """
    arguments = getattr(getattr(lowered, "_lowering", None), "compile_args", {})
    used = arguments.get("kept_var_idx")
    return None if used is None else sorted(used)


def _is_own(directory: Path) -> bool:
    info = directory.stat()
    writable_by_others = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not hasattr(os, "getuid") or (info.st_uid == os.getuid() and not writable_by_others)


def _write(directory: Path, path: Path, blob: bytes) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(directory):
        return
    handle, temporary = tempfile.mkstemp(dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    _evict(directory)


def _evict(directory: Path) -> None:
    """Keep the directory below its limits: the entries used least recently go first."""
    total = 0
    for file in _newest_first(directory, "*.xla"):
        total += file.stat().st_size
        if total > _LIMIT_BYTES:
            file.unlink(missing_ok=True)
    for file in _newest_first(directory, "*.key")[_MOST_NAMES:]:
        file.unlink(missing_ok=True)


def _newest_first(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern), key=lambda f: f.stat().st_mtime, reverse=True)


def _digest(text: str, device: Any) -> str:
    return hashlib.sha256((_environment(device) + text).encode()).hexdigest()


@functools.cache
def _environment(device: Any) -> str:
    """Everything besides the program that an executable depends on."""
    parts = [
        str(_FORMAT),
        jax.__version__,
        jaxlib.__version__,
        device.platform,
        device.device_kind,
        str(device.id),
        str(len(jax.devices())),
        getattr(device.client, "platform_version", ""),
        os.environ.get("XLA_FLAGS", ""),
        platform.machine(),
    ]
    with contextlib.suppress(OSError):  # instruction sets the compiler may have used
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features", "model name")):
                parts.append(line)
                if line.startswith(("flags", "Features")):
                    break
    return "\n".join(parts)
