"""What each preset costs: bits, time at prefill, quality: ``python recipes/presets.py --help``."""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from headq_ao import HeadQCache, headq_config, quantize_, restore_
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.inputs import DTYPES, SMOLLM2, calibrate_on, load
from headq_ao.evals.harness.texts import find_text, token_rows
from headq_ao.integrations.transformers.models import with_cache

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "presets" / "presets.json"
# name of the row, options, calibrated, result of recipes/frontier.yaml
ROWS: tuple[tuple[str, dict[str, Any], bool, str], ...] = (
    ('`"balanced"`, the default', {}, True, "kv_default"),
    ('`"quality"`', {"preset": "quality"}, True, "kv_quality"),
    ('`"near_lossless"`', {"preset": "near_lossless"}, True, "kv_near_lossless"),
    ("the default, uncalibrated", {}, False, "kv_no_calibration"),
    ('`"headq_paper"`, keys only', {"preset": "headq_paper", "v_bits": None}, True, "k_paper"),
)


@torch.no_grad()
def seconds_of_prefill(model: Any, ids: torch.Tensor, packed: bool) -> tuple[float, float]:
    """Wall and CPU seconds of one prefill of ``ids [1, T]`` into a new cache."""
    cache = HeadQCache(model) if packed else DynamicCache(config=model.config)
    wall, cpu = time.perf_counter(), time.process_time()
    model(ids, **with_cache(cache), logits_to_keep=1)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(model: Any, ids: torch.Tensor, calibration: Any, repeats: int, progress: bool = True) -> dict[str, Any]:
    """Prefill with each row's cache and with the exact one, in turn, in one process.

    Returns:
        Median wall and CPU seconds per row and of the exact cache, and the median of their ratios turn by turn.
    """
    turns: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in ROWS}
    for _ in tqdm(range(repeats), desc="prefill", unit="turn", disable=not progress):
        wall, cpu = seconds_of_prefill(model, ids, packed=False)
        for name, options, calibrated, _ in ROWS:
            quantize_(model, headq_config(**options, calibration=calibration if calibrated else None))
            try:
                own_wall, own_cpu = seconds_of_prefill(model, ids, packed=True)
            finally:
                restore_(model)
            turn = {"seconds": own_wall, "cpu_seconds": own_cpu, "exact_seconds": wall}
            turns[name].append(turn | {"ratio": own_wall / wall, "cpu_ratio": own_cpu / cpu})
    return {
        name: {key: statistics.median(turn[key] for turn in rows) for key in rows[0]} for name, rows in turns.items()
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Time a prefill with each preset against the exact cache, in turn, in one process.",
        epilog="example: python recipes/presets.py --repeats 5",
    )
    p.add_argument("--model", default=SMOLLM2, help="'smollm2' or what transformers loads (default: %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    p.add_argument("--tokens", type=int, default=4096, help="length of the prompt (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="turns; medians count (default: %(default)s)")
    p.add_argument("--text", default="wikitext", help="'bundled', 'wikitext' or a file (default: %(default)s)")
    p.add_argument("--calibration-text", default="wikitext", help="to calibrate on (default: %(default)s)")
    p.add_argument("--json", type=Path, default=RESULT, help="the result (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    try:
        if args.tokens < 1 or args.repeats < 1:
            raise ValueError(f"tokens and repeats must be at least 1, got {args.tokens} and {args.repeats}")
        path, calibrate_path = find_text(args.text, "report"), find_text(args.calibration_text, "calibrate")
        model, tokenizer = load(args.model, None, DTYPES[args.dtype])
        ids = token_rows(tokenizer, path, 1, args.tokens)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    calibration = calibrate_on(model, tokenizer, calibrate_path, 4096, True)
    prefill = measure(model, ids, calibration, args.repeats)
    settings = {"model": Path(args.model).name, "dtype": args.dtype, "text": path.name, "tokens": args.tokens}
    result = settings | {"repeats": args.repeats, "prefill": prefill, "environment": environment()}
    write_json(args.json, result)
    for name, row in prefill.items():
        print(f"{name:28} {row['seconds']:.2f} s, {row['ratio']:.3f} of the exact cache's {row['exact_seconds']:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
