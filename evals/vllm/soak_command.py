"""The command ``soak``: bf16's own differences first, then what headq may differ by."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from headq_ao.evals.vllm.cells import Cell, keep, run_cell
from headq_ao.evals.vllm.measure import add_common, result_path, spec_of

SEQUENCES = 12
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command ``soak``."""
    add_common(parser)
    add = parser.add_argument
    add("--requests", type=int, default=2000, help="(default: %(default)s)")
    add("--longest", type=int, default=1000, help="tokens of a prompt, from 1 (default: %(default)s)")
    add("--recheck", type=int, default=200, help="requests that are run again alone (default: %(default)s)")
    add("--mib", type=float, default=8, help="of pages; small enough to preempt (default: %(default)s)")
    add("--headq-mib", type=float, default=1.5, help="the same for headq (default: %(default)s)")
    add("--dtype", default="float32", help="of the model (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """bf16 first, whose own differences between batched and alone are what headq's are held against."""
    given = {"requests": args.requests, "longest": args.longest, "recheck": args.recheck}
    if args.quick:
        given |= {"requests": 60, "recheck": 20}
    code, gap = 0, 0.0
    for cache in args.caches:
        size = int((args.headq_mib if cache == "headq" else args.mib) * MIB)
        options = {"batched_tokens": 64, "sequences": SEQUENCES, "max_model_len": args.longest + 128}
        spec = spec_of(args, cache, **options, cache_bytes=size, dtype=args.dtype, compiled=False)
        cell = Cell("soak", dataclasses.replace(spec, prefix_caching=True), given, args.threads)
        result = run_cell(cell)
        keep(result_path(args, "soak", cache), cell, result, append=False)
        print(json.dumps({"cache": cache, **result}), flush=True)
        if cache == "bf16":
            gap = result["largest_gap"]
        elif cache == "headq":
            code = verdict(result, 2 * gap)
    return code


def verdict(result: dict[str, Any], allowed: float) -> int:
    """1 where a token differs whose two likeliest choices are further apart than ``allowed`` nats, or pages differ."""
    faults = []
    if result["largest_gap"] > allowed:
        faults.append(f"a token differs at a gap of {result['largest_gap']:.3g} nats, {allowed:.3g} are allowed")
    if result["page_bytes_differing"]:
        faults.append(f"a share of {result['page_bytes_differing']:.2g} of layer 0's page bytes differs")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0
