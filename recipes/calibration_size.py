"""How much text a calibration takes, and of what kind: ``python recipes/calibration_size.py --help``."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headq_ao import HeadQConfig, calibrate, headq_config, quantize_, restore_
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.inputs import DTYPES, SMOLLM2, load
from headq_ao.evals.harness.scoring import exact_logprobs, score
from headq_ao.evals.harness.texts import find_text, token_rows

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "calibration_size" / "calibration_size.json"
PRESETS = ("balanced", "near_lossless")
NATURAL = (16, 32, 64, 128, 256, 320, 512, 640, 1024, 2048, 4096)
PAD = 0


def kinds(text: Tensor, vocabulary: int, seed: int = 0) -> dict[str, Any]:
    """What to calibrate on, by name: arguments of ``calibrate`` from a text ``[T]`` of at least 4096 tokens."""
    g = torch.Generator().manual_seed(seed)

    def padded(width: int, length: int, left: bool) -> tuple[Tensor, Tensor]:
        ids, mask = torch.full((8, width), PAD), torch.zeros(8, width, dtype=torch.long)
        at = slice(width - length, None) if left else slice(length)
        ids[:, at], mask[:, at] = text[: 8 * length].view(8, length), 1
        return ids, mask

    found: dict[str, Any] = {f"natural, {n} tokens": {"token_batches": list(text[:n].split(1024))} for n in NATURAL}
    found["natural, 40 rows of 20"] = {"token_batches": text[:800].view(40, 20)}
    for n in (64, 512, 2048):
        found[f"random ids, {n}"] = {"token_batches": list(torch.randint(vocabulary, (n,), generator=g).split(512))}
    found["one token, 4 x 512"] = {"token_batches": torch.full((4, 512), 5)}
    found["8 tokens again and again, 4 x 512"] = {"token_batches": text[:8].repeat(4, 64)}
    for side in ("left", "right"):
        ids, mask = padded(256, 128, side == "left")
        if side == "left":
            found["left-padded, 8 x 128 in 256"] = {"token_batches": [{"input_ids": ids, "attention_mask": mask}]}
        found[f"{side}-padded, 8 x 128 in 256, no mask"] = {"token_batches": [ids]}
    found["left-padded, 8 x 32 in 512, no mask"] = {"token_batches": [padded(512, 32, True)[0]]}
    return found


def measure(
    model: Any, rows: Tensor, text: Tensor, names: Sequence[str] | None = None, *,
    presets: Sequence[str] = PRESETS, prefill: int = 256, progress: bool = True, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Mean KL without a calibration and with each kind of one.

    Args:
        model: a dense model.
        rows: to score, ``[N, T]``.
        text: to calibrate on, ``[T]``.
        names: of :func:`kinds`; None: all.
        options: of ``headq_config``.

    Returns:
        By preset the KL without, and by kind the effective tokens, whether the calibration is used and, by preset, the
        KL and its ratio to that without; ``doubt`` is the share by which moments are shrunk.
    """
    exact = exact_logprobs(model, rows, prefill, progress=False)

    def kl(config: HeadQConfig) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="HeadQ: the calibration rests on")
            quantize_(model, config)
        try:
            return score(model, rows, exact, prefill=prefill, chunk=64, batch_size=len(rows), progress=False).mean_kl
        finally:
            restore_(model)

    without = {preset: kl(headq_config(preset, **options)) for preset in presets}
    if progress:
        print("without", without, flush=True)
    found = {}
    every = kinds(text, model.config.vocab_size)
    for name in every if names is None else names:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="HeadQ: the calibration rests on")
            made = calibrate(model, **every[name], progress=False)
        counts = {"tokens": made.meta["tokens"], "counted": made.layers[0].tokens, "effective": made.effective_tokens}
        entry: dict[str, Any] = counts | {"used": made.suffices, "doubt": made.layers[0].doubt, "kl": {}}
        for preset in presets:  # what is not used changes nothing: a test compares the logits
            used = made.suffices
            entry["kl"][preset] = kl(headq_config(preset, calibration=made, **options)) if used else without[preset]
        entry["ratio"] = {preset: entry["kl"][preset] / without[preset] for preset in presets}
        found[name] = entry
        if progress:
            print(f"{name:40} {entry}", flush=True)
    return {"without": without, "kinds": found}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Score a packed cache with calibrations on little, degenerate and padded text, and without one.",
        epilog="example: python recipes/calibration_size.py",
    )
    p.add_argument("--model", default=SMOLLM2, help="'smollm2' or what transformers loads (default: %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    p.add_argument("--text", default="bundled", help="'bundled', 'wikitext' or a file (default: %(default)s)")
    p.add_argument("--calibration-text", default="bundled", help="to calibrate on (default: %(default)s)")
    p.add_argument("--rows", type=int, default=2, help="to score (default: %(default)s)")
    p.add_argument("--row-length", type=int, default=512, help="tokens of each (default: %(default)s)")
    p.add_argument("--prefill", type=int, default=256, help="tokens of the first call (default: %(default)s)")
    p.add_argument("--json", type=Path, default=RESULT, help="the result (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    try:
        path, calibrate_path = find_text(args.text, "report"), find_text(args.calibration_text, "calibrate")
        model, tokenizer = load(args.model, None, DTYPES[args.dtype])
        rows = token_rows(tokenizer, path, args.rows, args.row_length)
        text = token_rows(tokenizer, calibrate_path, 1, max(NATURAL))[0]
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = measure(model, rows, text, prefill=args.prefill)
    settings = {"model": Path(args.model).name, "dtype": args.dtype, "text": path.name}
    settings |= {"calibration_text": calibrate_path.name, "rows": args.rows, "row_length": args.row_length}
    write_json(args.json, settings | {"prefill": args.prefill} | found | {"environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
