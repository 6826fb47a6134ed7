"""Compile a C++ kernel once, on first use, and load it with ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-fno-math-errno", "-fno-trapping-math")


def cache_folder() -> Path:
    """``$HEADQ_CACHE_DIR``, or headq_ao in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("HEADQ_CACHE_DIR") or os.path.join(base, "headq_ao"))


def cpu_name() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(line for line in lines[:64] if line.startswith(("model name", "flags")))
    except OSError:
        return platform.processor() + platform.machine()


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The shared library of ``source``, compiled where it is not cached for this source, compiler and CPU.

    Returns None, with one warning, where there is no working compiler; ``HEADQ_CPU_KERNEL=0`` asks for that.
    Two processes that compile at once each write a file of their own and rename it.
    """
    if os.environ.get("HEADQ_CPU_KERNEL") == "0":
        return None
    code = source.read_bytes()
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")
    parts = (code, " ".join([*compiler, *FLAGS]).encode(), cpu_name().encode())
    tag = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    library = cache_folder() / f"{source.parent.name}-{tag}.so"
    try:
        if not library.exists():
            if not compiler:
                raise FileNotFoundError("no C++ compiler found (set CXX)")
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                built = Path(folder) / library.name
                command = [*compiler, *FLAGS, str(source), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                os.replace(built, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"headq_ao: no compiled CPU kernel, the slower PyTorch reference serves: {why.strip().splitlines()[0]}",
            stacklevel=2,
        )
        return None


def direct(x: Tensor) -> bool:
    """Whether to skip the dispatcher, which takes longer than the work on a few rows: plain tensors that no one traces
    or differentiates, on a device that the operators have kernels for."""
    plain = type(x) is Tensor and x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
    return plain and not (x.requires_grad and torch.is_grad_enabled())
