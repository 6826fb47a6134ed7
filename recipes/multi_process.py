"""Data-parallel generation: prompts split between processes. ``python recipes/multi_process.py --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.inputs import DTYPES, SMOLLM2, load
from headq_ao.integrations.transformers.models import with_cache

EPILOG = """\
examples:
  torchrun --nproc_per_node 2 recipes/multi_process.py prompts.txt --calibration smollm2.safetensors --json out.json
  accelerate launch --num_processes 4 recipes/multi_process.py prompts.txt --model FOLDER --dtype bfloat16
  python recipes/multi_process.py prompts.txt --max-new-tokens 64           one process

prompts.txt has one prompt a line. Batches are cut before they are split, so that any number of processes gives the same
completions. Each process has its own model and caches; the calibration file is read by all.
"""


def batches_of(prompts: Sequence[str], size: int) -> list[tuple[int, list[str]]]:
    """Batches in order, each with its number."""
    return [(i, list(prompts[at : at + size])) for i, at in enumerate(range(0, len(prompts), size))]


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: list[str], new: int) -> dict[str, Any]:
    """Greedy completions of a left-padded batch, and the bytes of its cache."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    inputs = inputs.to(model.device)
    cache = HeadQCache(model)
    out = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, **with_cache(cache), pad_token_id=tokenizer.pad_token_id
    )
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"texts": texts, "cache_bytes": cache.get_memory_footprint()}


def run(state: PartialState, model: Any, tokenizer: Any, batches: list[Any], new: int) -> dict[int, dict[str, Any]]:
    """Every batch's result on every process, by its number."""
    with state.split_between_processes(batches) as mine:
        work = tqdm(mine, desc="batches of this process", disable=not state.is_main_process)
        done = [(i, complete(model, tokenizer, prompts, new) | {"process": state.process_index}) for i, prompts in work]
    return dict(sorted(gather_object(done)))


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        ValueError: when there are none.
    """
    prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts; it must hold one a line")
    return prompts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Complete prompts in several processes, each with a packed cache of its own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    p.add_argument("--model", default=SMOLLM2, help="'smollm2' or what transformers loads (default: %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    p.add_argument("--calibration", help="a file of calibrate(...).save; default: each prompt's own statistics")
    p.add_argument("--batch-size", type=int, default=4, help="prompts in a batch (default: %(default)s)")
    p.add_argument("--max-new-tokens", type=int, default=32, help="of each completion (default: %(default)s)")
    p.add_argument("--json", type=Path, help="write the completions here; default: print them")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        if args.batch_size < 1 or args.max_new_tokens < 1:
            raise ValueError("batch-size and max-new-tokens must be at least 1")
        batches = batches_of(read_prompts(args.prompts), args.batch_size)
        if args.json is not None and not args.json.parent.is_dir():
            raise FileNotFoundError(f"no folder {str(args.json.parent)!r} to write {args.json.name!r} to")
        model, tokenizer = load(args.model, None, DTYPES[args.dtype], str(state.device))
        quantize_(model, headq_config(calibration=args.calibration))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    results = run(state, model, tokenizer, batches, args.max_new_tokens)
    if state.is_main_process:
        texts = [text for result in results.values() for text in result["texts"]]
        report = {
            "processes": state.num_processes,
            "completions": texts,
            "batches_of_process": [
                sum(r["process"] == i for r in results.values()) for i in range(state.num_processes)
            ],
            "cache_bytes": [r["cache_bytes"] for r in results.values()],
            "environment": environment(state.device),
        }
        if args.json is None:
            print("\n".join(f"{i}: {text}" for i, text in enumerate(texts)))
        else:
            write_json(args.json, report)
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
