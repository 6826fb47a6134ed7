"""Compile a C++ kernel once, on first use, and load it with ctypes.

A library is kept under a name of three parts: the kernel; a tag of what it was made from (source, flags, CPU), so that
none of another source or CPU is ever loaded; and a checksum of its bytes, so that neither is a damaged one. Which
compiler made it is no part of that: where there is none any more, the library serves still.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("headq_ao")

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("g++", "clang++")
KEPT = 16  # libraries of one kernel, for other CPUs and versions that share the folder
STALE = 24 * 3600  # seconds after which what a killed compilation left is removed
# How /proc/cpuinfo says what -march=native depends on: x86, Arm, RISC-V, Power.
CPU_LINES = (
    "model name", "flags", "Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "isa", "cpu\t",
)  # fmt: skip
_lock = threading.Lock()
_announced: list[Path] = []


def cache_folder() -> Path:
    """``$HEADQ_CACHE_DIR``, or headq_ao in the user's cache folder.

    Raises:
        FileNotFoundError: where neither is known.
    """
    base = os.environ.get("HEADQ_CACHE_DIR")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "headq_ao")
    folder = Path(os.path.expanduser(base))
    if folder.parts[:1] == ("~",):
        raise FileNotFoundError("there is no home folder to keep files in; set HEADQ_CACHE_DIR")
    return folder.absolute()


def cpu_name() -> str:
    """What -march=native depends on; the same for any number of equal cores."""
    lines = set()
    with contextlib.suppress(OSError):
        lines = {x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(CPU_LINES)}
    return "\n".join([platform.machine(), *(sorted(lines) or [platform.processor()])])


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The shared library of ``source``: the one kept for this source and CPU, or compiled now and kept.

    The first compilation of a process is announced through the logger ``"headq_ao"``. Where nothing can be kept, each
    process compiles for itself, with a warning. Processes that compile at once each write a file of their own and
    rename it.

    Args:
        source: a C++ file; what it includes from this package counts as part of it.

    Returns:
        None, with a warning that says why, where there is no library and none can be compiled; None without one where
        ``HEADQ_CPU_KERNEL=0`` asks for that.
    """
    if os.environ.get("HEADQ_CPU_KERNEL") == "0":
        return None
    parts = (*texts(source), " ".join(FLAGS).encode(), cpu_name().encode())
    tag = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    name = f"{source.parent.name}-{tag}"
    folder, problems = None, []
    try:
        folder = cache_folder()
    except FileNotFoundError as error:
        problems.append(str(error))
    with _lock:
        lib = None if folder is None else find(folder, name, problems)
        if lib is not None:
            return lib
        try:
            return build(source, folder, name, problems)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            problems.append(reason(error))
    _warn(f"no compiled CPU kernel, the slower PyTorch reference serves: {'; '.join(problems)}")
    return None


def texts(source: Path) -> list[bytes]:
    """A file, and each that it includes by a path relative to it."""
    text = source.read_bytes()
    included = re.findall(rb'^#include "([^"]+)"', text, re.MULTILINE)
    return [text, *(part for name in included for part in texts(source.parent / os.fsdecode(name)))]


def find(folder: Path, name: str, problems: list[str]) -> ctypes.CDLL | None:
    """The kept library of that name; why one that is there cannot be used is added to ``problems``."""
    try:
        for path in sorted(folder.glob(f"{name}-*.so")):
            try:
                if path.stem != f"{name}-{checksum(path)}":
                    raise OSError(f"{path} is damaged")
                return ctypes.CDLL(str(path))
            except OSError as error:
                problems.append(reason(error))
    except OSError as error:
        problems.append(reason(error))
    return None


def checksum(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def build(source: Path, folder: Path | None, name: str, problems: list[str]) -> ctypes.CDLL:
    """Compile and load ``source``, and keep the library in ``folder``, if that can be written.

    Raises:
        OSError, ValueError, subprocess.CalledProcessError: where that fails.
    """
    command = [*compiler(), *FLAGS, str(source)]
    with workplace(folder, problems) as (place, kept):
        _announce(kept)
        built = place / f"{name}.so"
        run = [*command, "-o", str(built)]
        subprocess.run(run, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        lib = ctypes.CDLL(str(built))
        try:
            if kept is not None:
                os.replace(built, kept / f"{name}-{checksum(built)}.so")
                tidy(kept, source.parent.name)
        except OSError as error:
            kept = None
            problems.append(reason(error))
    if kept is None:
        _warn(
            f"the compiled CPU kernels cannot be kept, so each process compiles them again: {problems[-1]}; "
            "set HEADQ_CACHE_DIR to a folder that can be written"
        )
    return lib


def compiler() -> list[str]:
    """The command of ``$CXX``, or of a compiler on the path.

    Raises:
        FileNotFoundError, ValueError: where there is none.
    """
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise ValueError(f"CXX={os.environ['CXX']!r} is no command: {error}") from error
    if asked and shutil.which(asked[0]) is None:
        raise FileNotFoundError(f"no C++ compiler {asked[0]!r}, which CXX names")
    found = asked or [path for name in COMPILERS if (path := shutil.which(name)) is not None][:1]
    if not found:
        raise FileNotFoundError("no C++ compiler found (set CXX)")
    return found


@contextlib.contextmanager
def workplace(folder: Path | None, problems: list[str]) -> Iterator[tuple[Path, Path | None]]:
    """A folder to compile in, removed at the end, and the folder to keep the library in, None where none can be."""
    made, kept = None, folder
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix="building-", dir=folder)
        except OSError as error:
            kept = None
            problems.append(f"{folder}: {error.strerror}")
    with made or tempfile.TemporaryDirectory(prefix="headq_ao-") as place:
        yield Path(place), kept


def tidy(folder: Path, kernel: str) -> None:
    """Remove all but the newest libraries of a kernel, and what killed compilations left."""
    with contextlib.suppress(OSError):
        made = sorted(folder.glob(f"{kernel}-{'[0-9a-f]' * 16}*.so"), key=lambda path: path.stat().st_mtime)
        for path in made[:-KEPT]:
            path.unlink(missing_ok=True)
        for path in folder.glob("building-*"):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)


def reason(error: Exception) -> str:
    """One line of what went wrong."""
    if isinstance(error, subprocess.CalledProcessError):
        said = [line for line in (error.stderr or "").splitlines() if line.strip()]
        return f"{error.cmd[0]} failed: {said[0].strip() if said else f'exit status {error.returncode}'}"
    return str(error)


def _announce(kept: Path | None) -> None:
    """Say, once per process, why nothing happens for half a minute."""
    if not _announced:
        where = "" if kept is None else f" and keeps them in {kept}"
        logger.warning("headq_ao compiles its CPU kernels%s, which takes up to a minute, once", where)
    _announced.append(kept or Path())


def _warn(text: str) -> None:
    """Warn from here, so that Python shows a text once, whichever kernel it is about."""
    warnings.warn(f"headq_ao: {text}", stacklevel=1)
