"""The child's side of a measurement: reads a cell from its input, writes the result to the path it is given."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from headq_ao.evals.vllm import decode, quality, soak, workloads
from headq_ao.evals.vllm.engine import EngineSpec, pages, start


class Progress:
    """Steps and tokens so far, on stderr."""

    def __init__(self, title: str) -> None:
        self.bar = tqdm(desc=title, unit="step", mininterval=2)

    def __call__(self, step: Any) -> None:
        self.bar.update()
        if step is not None:
            self.bar.set_postfix(prompt=step.prompt_tokens, decode=step.decode_tokens, refresh=False)


def run_decode(spec: EngineSpec, options: dict[str, Any], progress: Progress) -> Any:
    return decode.measure(spec, [(context, batch) for context, batch in options["cells"]], options["steps"], progress)


def run_requests(spec: EngineSpec, options: dict[str, Any], progress: Progress) -> Any:
    return workloads.requests(spec, **options, progress=progress)


def run_conversations(spec: EngineSpec, options: dict[str, Any], progress: Progress) -> Any:
    return workloads.conversations(spec, **options, progress=progress)


def run_capacity(spec: EngineSpec, options: dict[str, Any], progress: Progress) -> Any:
    return pages(start(spec))


def run_quality(spec: EngineSpec, options: dict[str, Any], progress: Progress) -> Any:
    return quality.measure(spec, **options, progress=progress)


def run_soak(spec: EngineSpec, options: dict[str, Any], progress: Progress) -> Any:
    return soak.measure(spec, **options, progress=progress)


KINDS: dict[str, Callable[[EngineSpec, dict[str, Any], Progress], Any]] = {
    "decode": run_decode,
    "requests": run_requests,
    "conversations": run_conversations,
    "capacity": run_capacity,
    "quality": run_quality,
    "soak": run_soak,
}


def main() -> int:
    """Run the cell on standard input."""
    cell = json.load(sys.stdin)
    spec = EngineSpec(**cell["spec"])
    result = KINDS[cell["kind"]](spec, cell["options"], Progress(f"{cell['kind']} {spec.cache}"))
    Path(sys.argv[1]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
