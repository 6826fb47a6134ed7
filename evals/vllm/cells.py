"""Measurements in child processes: a fresh engine for each, its result kept as soon as it is there."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.vllm.engine import EngineSpec


@dataclass(frozen=True)
class Cell:
    """One measurement with one engine.

    Args:
        kind: a name of :data:`headq_ao.evals.vllm.cell.KINDS`.
        spec: the engine.
        options: of the measurement.
        threads: of OpenMP.
    """

    kind: str
    spec: EngineSpec
    options: dict[str, Any]
    threads: int = 1


def run_cell(cell: Cell) -> Any:
    """The cell's result, from a process of its own; what vLLM says goes to stderr.

    Raises:
        RuntimeError: when the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "headq_ao.evals.vllm.cell", str(out)],
            input=json.dumps(asdict(cell)), text=True, env=child_environment(cell.threads), check=False,
        )  # fmt: skip
        if done.returncode or not out.is_file():
            raise RuntimeError(
                f"{cell.kind} with {cell.spec.cache} ended with {done.returncode}; its messages are above"
            )
        return json.loads(out.read_text(encoding="utf-8"))


def child_environment(threads: int) -> dict[str, str]:
    """Variables of a process that holds an engine: one process, so many threads, nothing asked of a hub."""
    own = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ, **own}


def stored(path: Path) -> dict[str, Any]:
    """A result file, empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def keep(path: Path, cell: Cell, result: Any, append: bool) -> None:
    """Write a cell's result with what it was made with; ``append`` adds a round to those that the file has."""
    rounds = [*stored(path).get("rounds", []), result] if append else [result]
    made = environment()
    made["versions"]["vllm-cpu"] = version("vllm-cpu")
    made["threads"] = cell.threads
    made["cores"] = os.cpu_count()
    made["load"] = os.getloadavg()[1]
    write_json(path, {"kind": cell.kind, "engine": cell.spec.describe(), "rounds": rounds, "environment": made})
