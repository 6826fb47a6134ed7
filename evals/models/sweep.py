"""Every class of transformers' causal-LM and image-text-to-text mappings, tiny, through HeadQ's cache.

    python -m headq_ao.evals.models.sweep --out sweep.json            all, about fifteen minutes on two cores
    python -m headq_ao.evals.models.sweep llama qwen3_next            some
    python -m headq_ao.evals.models.sweep --mapping images llava      with text only
    python -m headq_ao.evals.models.sweep --mapping pixels gemma3     with images

Each class is checked in a process of its own, forked from one that has all imports done, under a time limit.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers

from headq_ao.evals.models import pixels
from headq_ao.evals.models.sweep_checks import check, wrong
from headq_ao.evals.models.tiny import MAPPINGS, classes, tiny_model

TABLES = (*MAPPINGS, "pixels")
LIMIT = 60  # CPU seconds of a class; ten times as many by the clock


def entries(table: str) -> dict[str, tuple[str, str]]:
    """Of a table: each entry's model type to build and class."""
    if table != "pixels":
        return classes(table)
    return {name: classes("images")[pictures.name] for name, pictures in pixels.PICTURES.items()}


def one(mapping: str, name: str) -> dict[str, Any]:
    """What became of one class."""
    model_type, kind = entries(mapping)[name]
    began = time.monotonic()
    entry: dict[str, Any] = {"mapping": mapping, "name": name, "class": kind}
    pictures = pixels.PICTURES[name] if mapping == "pixels" else None
    try:
        model = tiny_model(model_type, kind, None if pictures is None else pictures.config(pixels.SIDE))
    except Exception as error:
        return entry | {"kind": "not built", "why": f"{type(error).__name__}: {error}"[:300]}
    try:
        found = check(model) if pictures is None else pixels.check(model, pictures)
        entry |= found | {"wrong": wrong(found) if pictures is None else pixels.wrong(found)}
    except Exception as error:
        entry |= {
            "kind": "crash",
            "why": f"{type(error).__name__}: {error}"[:600],
            "trace": traceback.format_exc()[-3000:],
        }
    return entry | {"seconds": round(time.monotonic() - began, 1)}


def child(pipe: Connection, mapping: str, name: str, limit: int) -> None:
    """One class in its own process."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    pipe.send(one(mapping, name))
    pipe.close()


def run(tasks: list[tuple[str, str]], jobs: int, limit: int) -> list[dict[str, Any]]:
    """Check classes, ``jobs`` at a time."""
    context, found = multiprocessing.get_context("fork"), list[dict[str, Any]]()
    waiting, running = list(tasks), dict[Any, tuple[Any, tuple[str, str], float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            ours, theirs = context.Pipe(duplex=False)
            task = waiting.pop(0)
            process = context.Process(target=child, args=(theirs, *task, limit))
            process.start()
            theirs.close()
            running[ours] = process, task, time.monotonic() + 10 * limit
        late = [pipe for pipe, (_, _, end) in running.items() if time.monotonic() > end]
        ready: list[Any] = wait([*running], timeout=1.0) or late
        for ours in ready:
            process, (mapping, name), _ = running.pop(ours)
            blank = {"mapping": mapping, "name": name, "class": entries(mapping)[name][1], "kind": "not checked"}
            try:
                entry = ours.recv() if ours.poll(0) else blank | {"why": f"more than {10 * limit} s"}
            except EOFError:
                process.join()
                why = f", more than {limit} s of the CPU" if process.exitcode == -signal.SIGXCPU else ""
                entry = blank | {"why": f"the process ended with {process.exitcode}{why}"}
            if process.is_alive() and entry.get("why", "").startswith("more than"):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            found.append(entry)
            told = entry["kind"] + (f" WRONG {entry['wrong']}" if entry.get("wrong") else "")
            print(f"{mapping} {name}: {told} {entry.get('why', '')[:150]}", flush=True)
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="entries of the mapping; none: all")
    parser.add_argument("--mapping", choices=[*TABLES, "all"], default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=LIMIT, help="CPU seconds of a class")
    parser.add_argument(
        "--out", type=Path, help="store the table as JSON; entries that are there and were not run stay"
    )
    given = parser.parse_args()
    mappings = [*TABLES] if given.mapping in (None, "all") and not given.names else [given.mapping or "causal"]
    tasks = [(m, n) for m in mappings for n in entries(m) if not given.names or n in given.names]
    began = time.monotonic()
    torch.set_num_threads(1)
    found = run(tasks, given.jobs, given.limit)
    order = {task: i for i, task in enumerate(tasks)}
    found.sort(key=lambda entry: order[entry["mapping"], entry["name"]])
    for mapping in mappings:
        counts = Counter(
            entry["kind"] + (" but wrong" if entry.get("wrong") else "")
            for entry in found
            if entry["mapping"] == mapping
        )
        print(mapping, dict(counts))
    if given.out:
        store(given.out, found, round(time.monotonic() - began))


def store(path: Path, found: list[dict[str, Any]], seconds: int) -> None:
    """Write a table; entries of an older one of the same versions stay where they were not run again."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    head = {"torch": torch.__version__, "transformers": transformers.__version__}
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = before.get("classes", []) if {n: before.get(n) for n in head} == head else []
    told = {"commit": git.stdout.strip(), "command": " ".join(["python -m headq_ao.evals.models.sweep", *sys.argv[1:]])}
    stored = {(e["mapping"], e["name"]): e for e in kept} | {(e["mapping"], e["name"]): e | told for e in found}
    order = [(m, n) for m in TABLES for n in entries(m)]
    rows = [stored[task] for task in order if task in stored]
    path.write_text(json.dumps(head | {"seconds": seconds, "classes": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
