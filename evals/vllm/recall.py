"""``lm_eval --model vllm`` on the recall tasks, in chunks that read the pages."""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from headq_ao.evals.vllm.cells import Cell, child_environment, keep
from headq_ao.evals.vllm.measure import add_common, result_path, spec_of

TASKS = Path(__file__).parents[1] / "tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command ``recall``."""
    add_common(parser)
    add = parser.add_argument
    add("--tasks", default="headq_recall_1024", help="lm-eval's names (default: %(default)s)")
    add("--limit", type=int, default=50, help="items of each task (default: %(default)s)")
    add("--chunk", type=int, default=64, help="tokens of a step: what is older is read from pages (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Score each cache; print the command, keep the scores."""
    limit = 2 if args.quick else args.limit
    code = 0
    for cache in args.caches:
        spec = spec_of(args, cache, batched_tokens=args.chunk, sequences=8, compiled=False)
        headq = spec.headq.get("calibration")
        with tempfile.TemporaryDirectory() as folder:
            command = lm_eval_command(spec.arguments(), args.tasks, limit, folder)
            print(f"{f'HEADQ_CALIBRATION={headq} ' if headq else ''}{shlex.join(command)}", file=sys.stderr, flush=True)
            environment = child_environment(args.threads) | ({"HEADQ_CALIBRATION": headq} if headq else {})
            done = subprocess.run([sys.executable, "-m", *command], env=environment, check=False)
            found = sorted(Path(folder).rglob("results_*.json"))
            if done.returncode or not found:
                print(f"error: {cache}: lm_eval ended with {done.returncode}", file=sys.stderr)
                code = 1
                continue
            scores = read_scores(found[-1])
        options = {"tasks": args.tasks, "limit": limit, "chunk": args.chunk}
        keep(result_path(args, "recall", cache), Cell("recall", spec, options, args.threads), scores, append=False)
        print(json.dumps({"cache": cache, **scores}), flush=True)
    return code


def lm_eval_command(arguments: dict[str, Any], tasks: str, limit: int, folder: str) -> list[str]:
    """The command behind ``python -m``; the plug-in's settings come from ``HEADQ_CALIBRATION``, which has no braces."""
    renamed = {"model": "pretrained"}
    given = {renamed.get(name, name): value for name, value in arguments.items() if name != "additional_config"}
    pairs = ",".join(f"{name}={value}" for name, value in given.items())
    return [
        "lm_eval", "run", "--model", "vllm", "--model_args", pairs, "--tasks", tasks, "--include_path", str(TASKS),
        "--limit", str(limit), "--batch_size", "auto", "--output_path", folder,
    ]  # fmt: skip


def read_scores(path: Path) -> dict[str, Any]:
    """Of each task: its metrics with their standard errors, and how many items were scored."""
    data = json.loads(path.read_text(encoding="utf-8"))
    kept = {task: {k: v for k, v in found.items() if isinstance(v, float)} for task, found in data["results"].items()}
    counts = {task: n["effective"] for task, n in data.get("n-samples", {}).items()}
    return {"scores": kept, "items": counts}
