"""A stored prompt against a dense cache file and against computing it: ``python recipes/prompt_cache.py --help``."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import DynamicCache

from headq_ao import HeadQCache, headq_config, quantize_, restore_
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.inputs import DTYPES, SMOLLM2, calibrate_on, describe, load
from headq_ao.evals.harness.texts import find_text, token_rows
from headq_ao.integrations.transformers.models import with_cache

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "prompt_cache"


def timed(call: Callable[[], Any], times: int) -> tuple[float, Any]:
    """Median seconds of some calls, and what the last returned."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        out = call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), out


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, folder: Path, repeats: int = 5) -> dict[str, Any]:
    """Store the cache of ``ids [1, T]``, packed and dense, and read both back.

    Args:
        model: with HeadQ; taken off in the end.
        ids: the prompt, and one token more that is read from the caches.
        folder: for the two files.
        repeats: of loading; its median counts.

    Returns:
        Bytes of the files, seconds to compute, save and load, and whether the next token's logits are bit-equal.
    """
    prompt, token = ids[:, :-1], ids[:, -1:]

    def compute() -> HeadQCache:
        cache = HeadQCache(model)
        model(prompt, **with_cache(cache), logits_to_keep=1)
        return cache

    recompute, cache = timed(compute, 1)
    packed, small, dense = (folder / f"{name}.safetensors" for name in ("packed", "compressed", "dense"))
    save, _ = timed(lambda: cache.save(packed), 1)
    save_small, _ = timed(lambda: cache.save(small, compress=True), 1)
    load_packed, loaded = timed(lambda: HeadQCache.load(packed, model), repeats)
    load_small, restored = timed(lambda: HeadQCache.load(small, model), repeats)
    logits = [model(token, **with_cache(held)).logits for held in (cache, loaded, restored)]
    equal = torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    restore_(model)
    exact = DynamicCache(config=model.config)
    recompute_dense, _ = timed(lambda: model(prompt, **with_cache(exact), logits_to_keep=1), 1)
    rows = {f"{i}.{n}": getattr(x, n).bfloat16() for i, x in enumerate(exact.layers) for n in ("keys", "values")}
    safetensors.torch.save_file(rows, dense)
    load_dense, _ = timed(lambda: {n: t.clone() for n, t in safetensors.torch.load_file(dense).items()}, repeats)
    files = {"packed_bytes": packed, "compressed_bytes": small, "dense_bf16_bytes": dense}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    seconds = {
        "recompute": recompute,
        "recompute_dense": recompute_dense,
        "save": save,
        "save_compressed": save_small,
        "load": load_packed,
        "load_compressed": load_small,
        "load_dense_bf16": load_dense,
    }
    return {
        **sizes,
        "bits_per_element": {name: 16 * size / sizes["dense_bf16_bytes"] for name, size in sizes.items()},
        "size_ratio": sizes["packed_bytes"] / sizes["dense_bf16_bytes"],
        "seconds": seconds,
        "speedup_over_recompute": recompute / load_packed,
        "next_token_bit_equal": equal,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Store a long prompt's packed cache; compare the file's size and the time to read it.",
        epilog="example: HEADQ_WIKITEXT=path/to/wikitext-2-raw python recipes/prompt_cache.py --json prompt_cache.json",
    )
    p.add_argument("--model", default=SMOLLM2, help="'smollm2' or what transformers loads (default: %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    p.add_argument("--text", default="wikitext", help="'bundled', 'wikitext' or a file (default: %(default)s)")
    p.add_argument("--tokens", type=int, default=4096, help="length of the prompt (default: %(default)s)")
    p.add_argument("--calibration", action="store_true", help="calibrate on the bundled text first")
    p.add_argument("--json", type=Path, default=RESULT / "prompt_cache.json", help="the result (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    try:
        if args.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {args.tokens}")
        path = find_text(args.text, "report")
        model, tokenizer = load(args.model, None, DTYPES[args.dtype])
        ids = token_rows(tokenizer, path, 1, args.tokens + 1)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    calibration = None
    if args.calibration:
        calibration = calibrate_on(model, tokenizer, find_text("bundled", "calibrate"), 4096, True)
    config = headq_config(calibration=calibration)
    quantize_(model, config)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(model, ids, Path(folder))
    settings = {"model": Path(args.model).name, "dtype": args.dtype, "text": path.name, "tokens": args.tokens}
    result = settings | {"config": describe(config)} | result | {"environment": environment()}
    write_json(args.json, result)
    seconds, ratio = result["seconds"], result["size_ratio"]
    print(
        f"{args.tokens} tokens: {result['packed_bytes']:,} bytes, {result['compressed_bytes']:,} compressed; "
        f"{ratio:.3f} of a dense bf16 file; "
        f"read in {seconds['load']:.2f} s, computed in {seconds['recompute']:.2f} s "
        f"({result['speedup_over_recompute']:.0f} times); next token bit-equal: {result['next_token_bit_equal']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
