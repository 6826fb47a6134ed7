"""Bytes of the packed cache against DynamicCache, on a real run: ``python -m headq_ao.evals.benchmarks.memory``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.inputs import DTYPES, SMOLLM2, calibrate_on, call_spans, describe, load
from headq_ao.evals.harness.texts import find_text, token_rows
from headq_ao.integrations.transformers.models import with_cache


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, prefill: int, chunk: int, progress: bool = True) -> dict[str, Any]:
    """Fill a packed cache with ``ids [1, T]`` and count every byte it holds; the dense cache is counted from shapes.

    Args:
        model: with HeadQ.
        ids: tokens of one sequence.
        prefill: tokens of the first call; the rest comes in chunks, so that the cache has grown as in generation.
        chunk: tokens of each later call.

    Returns:
        ``dense_bytes``, ``packed_bytes``, their ratio, bytes of the tensors by kind, and the bits report.
    """
    cache = HeadQCache(model)
    for start, stop in tqdm(list(call_spans(prefill, ids.shape[1], chunk)), disable=not progress):
        model(ids[:, start:stop], **with_cache(cache), logits_to_keep=1)
    dense = sum(
        2 * ids.shape[1] * layer.shape.n_kv_heads * layer.shape.head_dim * model.dtype.itemsize
        for layer in cache.layers
    )
    probe = DynamicCache(config=model.config)  # the formula above, checked on tensors of the real class
    shape = cache.layers[0].shape
    keys, _ = probe.update(*(torch.zeros(1, shape.n_kv_heads, 8, shape.head_dim, dtype=model.dtype) for _ in "kv"), 0)
    assert keys.nbytes == 8 * shape.n_kv_heads * shape.head_dim * model.dtype.itemsize
    packed = cache.get_memory_footprint()
    report = cache.bits_report().to_dict()
    return {"dense_bytes": dense, "packed_bytes": packed, "ratio": packed / dense, "report": report}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.benchmarks.memory",
        description="Fill the packed cache with real text and compare every byte it holds with a DynamicCache.",
        epilog="example: python -m headq_ao.evals.benchmarks.memory --text wikitext --tokens 4096 --json memory.json",
    )
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="'smollm2' or what transformers loads (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of model and full-precision tokens (default: %(default)s)")
    add("--text", default="wikitext", help="'bundled', 'wikitext' (HEADQ_WIKITEXT) or a file (default: %(default)s)")
    add("--tokens", type=int, default=4096, help="length of the sequence (default: %(default)s)")
    add("--prefill", type=int, default=1024, help="tokens of the first call (default: %(default)s)")
    add("--chunk", type=int, default=64, help="tokens of each later call (default: %(default)s)")
    add("--calibration", action="store_true", help="calibrate on the bundled text (default: the prompt's statistics)")
    add("--threads", type=int, help="torch threads")
    add("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.prefill <= args.tokens or args.chunk < 1:
            raise ValueError(
                f"prefill must lie in 1…{args.tokens} and chunk be at least 1, got {args.prefill}, {args.chunk}"
            )
        path = find_text(args.text, "report")
        if args.threads:
            torch.set_num_threads(args.threads)
        model, tokenizer = load(args.model, None, DTYPES[args.dtype])
        ids = token_rows(tokenizer, path, 1, args.tokens)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    calibration = (
        calibrate_on(model, tokenizer, find_text("bundled", "calibrate"), 4096, True) if args.calibration else None
    )
    config = headq_config(calibration=calibration)
    quantize_(model, config)
    result = measure(model, ids, args.prefill, args.chunk)
    print(
        f"{args.tokens} tokens, {args.dtype}: dense {result['dense_bytes']:,} bytes, packed {result['packed_bytes']:,}"
    )
    for kind, n in result["report"]["bytes"].items():
        print(f"  {kind:18s} {n:>12,}")
    print(f"ratio {result['ratio']:.3f}")
    if args.json is not None:
        settings = {"tokens": args.tokens, "prefill": args.prefill, "chunk": args.chunk, "text": path.name}
        result = {**settings, "config": describe(config), **result, "environment": environment()}
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
