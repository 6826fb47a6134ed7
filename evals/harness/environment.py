"""Where and how a result was made: versions, machine, commit, command."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import headq_ao
from headq_ao.files import atomic_path

PACKAGES = ("torch", "torchao", "transformers")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What belongs beside every result, as plain data for JSON.

    Versions, device, CPU, threads, git commit with a dirty flag (None outside a checkout), date and command line.

    Args:
        device: where the model ran.

    Example:
        >>> from headq_ao.evals.harness.environment import environment
        >>> sorted(environment()["versions"])
        ['headq_ao', 'python', 'torch', 'torchao', 'transformers']
    """
    device = torch.device(device)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), "headq_ao": headq_ao.__version__, **versions},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "git": git_state(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
    }


def write_json(path: Path, result: Any) -> None:
    """Write a result, whole or not at all; its folder is made when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether anything but results differs from it."""
    package = Path(headq_ao.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None  # installed inside somebody else's checkout
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--", ".", ":!recipes/results", ":!README.md", ":!docs"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def command_line(arguments: list[str] | None = None) -> str:
    """The command that runs now, without paths that only this machine has."""
    arguments = sys.orig_argv if arguments is None else arguments
    return shlex.join(["python", *(portable(a) for a in arguments[1:])])


def portable(argument: str) -> str:
    """An argument with its absolute path made relative to the working directory, or cut to the last name outside it.

    Example:
        >>> from headq_ao.evals.harness.environment import portable
        >>> portable("--text=/nowhere/near/wiki.test.raw"), portable("k_bits=3")
        ('--text=wiki.test.raw', 'k_bits=3')
    """
    name, equals, value = argument.partition("=")
    if equals:
        return f"{name}={portable(value)}"
    if not os.path.isabs(argument):
        return argument
    path = Path(argument)
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name
