"""The commands that measure: what is asked, in which engine, and where the result goes."""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from headq_ao.evals.harness.texts import find_text, token_rows
from headq_ao.evals.vllm.cells import Cell, keep, run_cell
from headq_ao.evals.vllm.engine import CACHES, GIB, EngineSpec

OUT = Path("recipes/results/vllm")


def add_common(parser: argparse.ArgumentParser, rounds: int = 1) -> None:
    """What every measurement asks."""
    add = parser.add_argument
    add("model", type=Path, help="checkpoint folder, as convert writes it")
    add("--caches", nargs="+", choices=CACHES, default=list(CACHES), help="which (default: all)")
    add("--calibration", help="of the model, for headq")
    add("--preset", default=None, help="of headq_config, for headq (default: its own)")
    add("--window", type=int, help="full-precision newest tokens, for headq (default: the plug-in's)")
    add("--block-size", type=int, help="tokens of a page (default: 128, for headq the plug-in's)")
    add("--label", default="", help="added to the names of headq's results, as in near_lossless")
    add("--threads", type=int, default=1, help="of OpenMP (default: %(default)s)")
    add("--rounds", type=int, default=rounds, help="each cache's turns (default: %(default)s)")
    add("--gib", type=float, default=1.0, help="of pages (default: %(default)s)")
    add("--eager", action="store_true", help="without torch.compile, which is vLLM's default: a faster start")
    add("--quick", action="store_true", help="small sizes: whether it works, not how well")
    add("--out", type=Path, default=OUT, help="folder of the results (default: %(default)s)")


def spec_of(args: argparse.Namespace, cache: str, **options: Any) -> EngineSpec:
    """The engine that the common options describe.

    Raises:
        ValueError: when headq has no calibration.
    """
    headq: dict[str, Any] = {}
    if cache == "headq":
        if args.calibration is None:
            raise ValueError("headq needs --calibration FILE; convert makes one, or say --caches bf16 fp8")
        headq = {"calibration": str(Path(args.calibration).resolve())}
        headq |= {name: getattr(args, name) for name in ("preset", "window") if getattr(args, name) is not None}
    common = {"cache_bytes": int(args.gib * GIB), "compiled": not args.eager, "block_size": args.block_size}
    options = common | options
    return EngineSpec(str(args.model.resolve()), cache, headq=headq, **options)


def in_turns(args: argparse.Namespace, name: str, cells: dict[str, Cell]) -> int:
    """Run the cells, one for each cache, in turns; a cache whose engine fails is told and left out after that."""
    failed: set[str] = set()
    for number in range(args.rounds):
        for cache, cell in cells.items():
            if cache in failed:
                continue
            print(f"{name}, round {number + 1} of {args.rounds}: {cache}", file=sys.stderr, flush=True)
            try:
                result = run_cell(cell)
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                failed.add(cache)
                continue
            keep(result_path(args, name, cache), cell, result, append=number > 0)
            print(json.dumps({"measurement": name, "cache": cache, "result": result}), flush=True)
    return 1 if failed else 0


def result_path(args: argparse.Namespace, name: str, cache: str) -> Path:
    """Where a cache's result of a measurement lies."""
    label = f"_{args.label}" if args.label and cache == "headq" else ""
    quick = "quick_" if args.quick else ""
    path: Path = args.out / f"{quick}{name}.{args.model.name}.{cache}{label}.json"
    return path


def add_capacity(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--max-model-len", type=int, nargs="+", default=[8192], help="(default: %(default)s)")
    parser.add_argument("--batched-tokens", type=int, nargs="+", default=[64, 2048], help="(default: %(default)s)")


def capacity(args: argparse.Namespace) -> int:
    """Tokens that fit, from vLLM's own numbers, at stated lengths and tokens in flight."""
    code = 0
    for length in args.max_model_len:
        for tokens in args.batched_tokens:
            options = {"max_model_len": length, "batched_tokens": tokens, "sequences": min(tokens, 64)}
            specs = {c: spec_of(args, c, **options | {"dummy": True, "compiled": False}) for c in args.caches}
            cells = {c: Cell("capacity", spec, {}, args.threads) for c, spec in specs.items()}
            code |= in_turns(args, f"capacity_{length}_{tokens}", cells)
    return code


def add_quality(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    add = parser.add_argument
    add("--text", default="wikitext", help="'bundled', 'wikitext' (HEADQ_WIKITEXT) or a file (default: %(default)s)")
    add("--chunk", type=int, nargs="+", default=[64, 1], help="tokens of a step (default: %(default)s)")
    add("--rows", type=int, default=2, help="(default: %(default)s)")
    add("--row-length", type=int, default=1024, help="(default: %(default)s)")
    add("--first", type=int, default=256, help="tokens before the first that is scored (default: %(default)s)")
    add("--adapter", type=Path, help="folder of a LoRA that all requests use; named in the results")
    add("--scratch", type=Path, help="folder for the bf16 log-probabilities, GBs (default: a temporary one)")


def quality(args: argparse.Namespace) -> int:
    """Perplexity and KL at each chunk size, and in the largest with a prefix hit.

    Raises:
        ValueError: without bf16, which the others are compared with.
    """
    if args.caches[0] != "bf16":
        raise ValueError("the KL is to bf16: name it first, as in --caches bf16 headq")
    if args.quick:
        args.rows, args.row_length, args.chunk = 1, args.first + 128, [64]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = token_rows(tokenizer, find_text(args.text, "report"), args.rows, args.row_length).tolist()
    code = 0
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for chunk in args.chunk:
            for hit in (False, True) if chunk == max(args.chunk) else (False,):
                given = {"rows": rows, "first": args.first, "hit": hit, "reference": f"{folder}/{chunk}.pt"}
                cells = {c: Cell("quality", quality_spec(args, c, chunk), given, args.threads) for c in args.caches}
                adapter = "" if args.adapter is None else f"_{args.adapter.name}"
                code |= in_turns(args, f"quality_chunk{chunk}{'_hit' if hit else ''}{adapter}", cells)
    return code


def quality_spec(args: argparse.Namespace, cache: str, chunk: int) -> EngineSpec:
    """An engine that takes ``chunk`` tokens a step, of one request at a time."""
    length = max(8192 if not args.quick else 0, args.row_length + 1)
    options = {"max_model_len": length, "batched_tokens": chunk, "sequences": 1, "prefix_caching": True}
    options["adapter"] = None if args.adapter is None else str(args.adapter.resolve())
    return spec_of(args, cache, **options)


def add_decode(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=2)
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[4096, 8000], help="tokens before the step (default: %(default)s)")
    add("--batches", type=int, nargs="+", default=[1, 8], help="(default: %(default)s)")
    add("--steps", type=int, default=32, help="timed (default: %(default)s)")


def decode(args: argparse.Namespace) -> int:
    """The time of a decode step for each context and batch."""
    if args.quick:
        args.contexts, args.batches, args.steps = [512], [1, 2], 8
    room = max(args.contexts) + args.steps + 16
    need = max(args.batches) * math.ceil(room / 256) * 256 * bf16_bytes(args.model) * 1.02
    size = max(int(args.gib * GIB), int(need))
    if size > args.gib * GIB:
        print(f"bf16 needs {size / GIB:.2f} GiB of pages for the largest cell; every cache gets that", file=sys.stderr)
    options = {"max_model_len": room, "sequences": max(args.batches), "filled": True, "cache_bytes": size}
    given = {"cells": [(c, b) for c in args.contexts for b in args.batches], "steps": args.steps}
    cells = {c: Cell("decode", spec_of(args, c, **options), given, args.threads) for c in args.caches}
    return in_turns(args, "decode", cells)


def bf16_bytes(model: Path) -> int:
    """Bytes of a token's keys and values in all layers in bf16."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    total: int = 4 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim
    return total


def add_requests(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    add = parser.add_argument
    add("--count", type=int, default=64, help="requests (default: %(default)s)")
    add("--length", type=int, default=2048, help="tokens of a prompt (default: %(default)s)")
    add("--tokens", type=int, default=256, help="tokens out (default: %(default)s)")


def requests(args: argparse.Namespace) -> int:
    """All requests at once: decode-phase tokens/s, the whole run, and the share of prefill."""
    if args.quick:
        args.count, args.length, args.tokens = min(args.count, 4), 256, 16
    given = {"count": args.count, "length": args.length, "tokens": args.tokens}
    cells = {c: Cell("requests", spec_of(args, c), given, args.threads) for c in args.caches}
    return in_turns(args, f"requests_{args.count}", cells)


def add_conversations(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    add = parser.add_argument
    add("--count", type=int, default=32, help="conversations (default: %(default)s)")
    add("--turns", type=int, default=4, help="of each (default: %(default)s)")
    add("--prefix", type=int, default=4096, help="tokens that a conversation starts with (default: %(default)s)")
    add("--question", type=int, default=64, help="new tokens of a turn (default: %(default)s)")
    add("--answer", type=int, default=32, help="tokens out of a turn (default: %(default)s)")
    add("--at-once", type=int, default=4, help="turns in flight (default: %(default)s)")


def conversations(args: argparse.Namespace) -> int:
    """Finished turns a second, all and those that return to a prefix."""
    if args.quick:
        args.count, args.turns, args.prefix = 4, 2, 512
    given = {name: getattr(args, name) for name in ("count", "turns", "prefix", "question", "answer", "at_once")}
    cells = {c: Cell("conversations", conversation_spec(args, c), given, args.threads) for c in args.caches}
    return in_turns(args, "conversations", cells)


def conversation_spec(args: argparse.Namespace, cache: str) -> EngineSpec:
    """An engine that finds prefixes again."""
    spec = spec_of(args, cache, prefix_caching=True)
    longest = args.prefix + args.turns * (args.question + args.answer) + 128
    return dataclasses.replace(spec, max_model_len=min(8192, longest))
