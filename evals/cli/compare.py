"""``headq compare``: quantizers of the KV cache at equal bits, on one model and text: a table and a plot."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from headq_ao.evals.cli import loading
from headq_ao.evals.cli.console import UsageError, add_command, check_output, note, say, show_table
from headq_ao.evals.cli.evaluate import add_protocol, checked

NAME = "compare"
DESCRIPTION = """\
Score several quantizers in the same cache (the same sinks, window and text) and put them side by side: bits as stored,
scales included, and KL to the exact cache. Without --method, HeadQ's presets and the quantizers of evals/baselines at
2 and 4 bits are compared. What a model's heads do not allow is left out with a note."""
EXAMPLES = """\
  headq compare smollm2 --plot compare.png
  headq compare path/to/model --text my.txt --rows 4 --calibration model.safetensors
  headq compare smollm2 --method headq --method "kivi k_bits=2 v_bits=2 k_group=64 v_group=64" --method fp8

methods: headq; kivi, per_token, hadamard, turboquant, squat, gear, trellis, kvlinc_base, rdkv, random_eviction;
int4_per_token_head, turboquant_k8v4, turboquant_4bit_nc, turboquant_k3v4_nc, turboquant_3bit_nc (as vLLM defines
them); quanto, hqq, fp8 (of transformers); residual_vq and kvlinc, which are trained for a model first
(python -m headq_ao.evals.baselines.residual_vq --help)"""
DEFAULTS = (
    "headq",
    "headq preset=quality",
    "headq preset=near_lossless",
    "kivi k_bits=2 v_bits=2 k_group=64 v_group=64",
    "kivi k_bits=4 v_bits=4 k_group=64 v_group=64",
    "hadamard k_bits=2 v_bits=2 subtract_mean=true",
    "turboquant k_bits=2 v_bits=2",
    "squat k_bits=2 v_bits=2 k_group=64 v_group=64",
    "trellis k_bits=2 v_bits=2",
    "int4_per_token_head",
    "fp8",
)


def add(commands: Any) -> None:
    """The parser of ``headq compare``."""
    parser = add_command(commands, NAME, "quantizers side by side at equal bits", DESCRIPTION, EXAMPLES)
    parser.set_defaults(run=run)
    add_protocol(parser)
    option = parser.add_argument
    option("--method", action="append", dest="methods", metavar="'NAME OPTION=VALUE …'", help="repeatable")
    option("--plot", type=Path, metavar="OUT.png", help="draw KL against bits")
    option("--json", type=Path, metavar="OUT", help="write all results there")


def subjects(args: argparse.Namespace) -> tuple[Path, Path | None, dict[str, Any]]:
    """The text, the text to calibrate on, and what is to be scored, by name.

    Raises:
        UsageError: on all that can be refused before a model is loaded.
    """
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs the package matplotlib: pip install 'headq_ao[plot]'")
    check_output(args.plot, "--plot", [".png", ".svg", ".pdf"])
    check_output(args.json, "--json")
    found: dict[str, Any] = {}
    text, calibration = Path(), None
    for line in args.methods or DEFAULTS:
        name, *options = line.split() or [""]
        one = argparse.Namespace(**vars(args) | {"method": name, "options": options, "preset": None})
        text, calibration, found[line] = checked(one) if not found else _subject(one)
    return text, calibration, found


def _subject(args: argparse.Namespace) -> tuple[Path, Path | None, Any]:
    from headq_ao.evals import perplexity

    try:
        return perplexity.check(args)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--method '{args.method} …': {error}") from error


def run(args: argparse.Namespace) -> int:
    """Score each, print the table in the order of KL, draw the plot."""
    from headq_ao.cache.memory_report import NothingPackedError
    from headq_ao.evals import perplexity
    from headq_ao.evals.harness import inputs
    from headq_ao.evals.harness.environment import environment, write_json
    from headq_ao.evals.harness.scoring import exact_logprobs

    text, calibration, chosen = subjects(args)
    model, tokenizer = loading.load_model(args)
    rows = inputs.token_rows(tokenizer, text, args.rows, args.row_length)
    progress = not args.no_progress
    made = None
    if calibration is not None:
        made = inputs.calibrate_on(model, tokenizer, calibration, args.calibration_tokens, progress)
    exact = exact_logprobs(model, rows, args.prefill, progress)
    results: dict[str, Any] = {}
    for line, subject in chosen.items():
        if made is not None:
            subject.calibrate(made)
        try:
            results[line] = perplexity.evaluate(
                model, rows, exact, subject,
                prefill=args.prefill, chunk=args.chunk, batch_size=args.batch_size, progress=progress,
                label=line.split()[0],
            )  # fmt: skip
        except (ValueError, ImportError, FileNotFoundError) as error:
            note(f"left out: {line}: {loading.first_line(error)}")
        except NothingPackedError as error:
            raise ValueError(f"{line}: {error}") from error
    if not results:
        raise ValueError("no method could be scored on this model")
    ordered = sorted(results, key=lambda line: results[line]["score"]["mean_kl"])
    number = "one row" if args.rows == 1 else f"{args.rows} rows"
    say(f"{Path(args.model).name}: {number} of {args.row_length} tokens of {text.name}\n")
    cells = [table_row(line, results[line]) for line in ordered]
    best = next((i for i, line in enumerate(ordered) if line.startswith("headq")), None)
    show_table(["method", "bits at 4k", "KL (nats)", "perplexity ratio", "flips"], cells, mark=best)
    if args.plot is not None:
        plot(results, args.plot)
        note(f"written: {args.plot}")
    if args.json is not None:
        write_json(args.json, {"model": Path(args.model).name, "results": results, "environment": environment()})
        note(f"written: {args.json}")
    return 0


def table_row(line: str, result: dict[str, Any]) -> list[str]:
    """The cells of one method."""
    from headq_ao.evals.harness.table import measured, number

    score = result["score"]
    return [
        line,
        number(result["bits"]["at"]["4096"]),
        measured(score["mean_kl"], score["mean_kl_sem"], 4),
        measured(score["ppl_ratio"], score["ppl_ratio_sem"], 3),
        f"{100 * score['flips']:.1f} %",
    ]


def plot(results: dict[str, Any], path: Path) -> None:
    """KL against bits, both logarithmic; HeadQ's own settings joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    points = {line: (r["bits"]["at"]["4096"], max(r["score"]["mean_kl"], 1e-7)) for line, r in results.items()}
    ours = sorted(p for line, p in points.items() if line.startswith("headq"))
    axes.plot(*zip(*ours, strict=True), marker="o", color="#0072B2", label="HeadQ") if ours else None
    for line, (bits, kl) in points.items():
        if not line.startswith("headq"):
            axes.plot([bits], [kl], "s", color="#8C4A12")
            axes.annotate(line.split()[0], (bits, kl), textcoords="offset points", xytext=(7, 3), fontsize=9)
    axes.set(
        xscale="log", yscale="log", xlabel="bits per element at 4096 tokens", ylabel="KL to the exact cache (nats)"
    )
    ticks = (2, 2.5, 3, 4, 5, 6, 8)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)
    if ours:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
