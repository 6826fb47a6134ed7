"""``headq calibrate``: the statistics of a model on a text, once, to a file that ``headq_config`` takes."""

import argparse
import time
from pathlib import Path
from typing import Any

from headq_ao.evals.cli import loading
from headq_ao.evals.cli.console import UsageError, add_command, at_least, check_output, note, say

NAME = "calibrate"
DESCRIPTION = """\
Run a model over a few thousand tokens and store what its attention reads: moments of queries, keys and values for each
layer and KV head. With the file, bits are shared between heads by their sensitivity and tokens are packed from the
first call on. It is made once per model, on text of the kind that the model will read."""

EXAMPLES = """\
  headq calibrate smollm2 -o smollm2.safetensors                           on the bundled text
  headq calibrate Qwen/Qwen3-0.6B --text my.txt -o qwen3.safetensors       on a text of your own
  headq calibrate path/to/model --text dataset:Salesforce/wikitext:wikitext-2-raw-v1:validation -o m.safetensors
  headq calibrate path/to/model --context-length 32768 -o m.safetensors    for contexts of up to 32768 tokens

then, in Python: quantize_(model, headq_config(calibration="smollm2.safetensors"))"""

CHARACTERS_PER_TOKEN = 16  # of a dataset that many are read; a token of ordinary text has 3 to 5


def add(commands: Any) -> None:
    """The parser of ``headq calibrate``."""
    parser = add_command(commands, NAME, "make a model's calibration file", DESCRIPTION, EXAMPLES)
    parser.set_defaults(run=run)
    loading.add_model(parser)
    option = parser.add_argument
    option("-o", "--output", type=Path, required=True, metavar="FILE", help="the calibration (.safetensors)")
    option("--text", default="bundled", help=loading.TEXT_HELP)
    option("--column", default="text", help="of a dataset (text)")
    option("--tokens", type=at_least(1), default=4096, help="of the text to run the model over (4096)")
    option("--row-length", type=at_least(8), default=1024, metavar="N", help="tokens per sequence, at most (1024)")
    option("--context-length", type=at_least(1), metavar="N", help="tokens of the contexts to serve (4096)")
    option("--force", action="store_true", help="write over a file that is there")
    option("--no-gradients", action="store_true", help="no backward pass: much less time, more error at equal bits")
    option("--no-progress", action="store_true", help="no progress bar")


def check(args: argparse.Namespace) -> None:
    """Everything that can be refused before a model is loaded.

    Raises:
        UsageError: saying what to do.
    """
    out = args.output
    check_output(out, "-o", [".safetensors"])
    if out.exists() and not args.force:
        raise UsageError(f"{out} is there already; --force writes over it")
    loading.check_text(args.text)


def sequences(tokenizer: Any, text: str, source: str, tokens: int, row_length: int) -> list[Any]:
    """The first tokens of a text, all of them where there are fewer, in rows ``[T]`` of nearly equal length.

    Raises:
        ValueError: when there are none.
    """
    import torch

    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(found[:tokens], dtype=torch.int64)
    if not len(ids):
        raise ValueError(f"{source} has no tokens")
    if len(ids) < tokens:
        note(f"{source} has {len(ids)} tokens, fewer than --tokens {tokens}: all of them are taken")
    return list(ids.tensor_split(-(-len(ids) // row_length)))


def run(args: argparse.Namespace) -> int:
    """Calibrate and save; 1 where the text is too little for a calibration that would be used."""
    check(args)
    from headq_ao import calibrate

    start = time.perf_counter()
    text, source = loading.read_text(args.text, CHARACTERS_PER_TOKEN * args.tokens, args.column)
    config = loading.model_config(args)  # a wrong name or length is told before weights are read
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if args.context_length is not None and most is not None and args.context_length > most:
        raise UsageError(f"--context-length must be at most {most}, the model's positions, got {args.context_length}")
    model, tokenizer = loading.load_model(args)
    rows = sequences(tokenizer, text, source, args.tokens, args.row_length)
    number = "one sequence" if len(rows) == 1 else f"{len(rows)} sequences"
    note(f"{type(model).__name__}: {sum(map(len, rows))} tokens of {source} in {number}")
    made = calibrate(
        model, rows, context_length=args.context_length, progress=not args.no_progress, source=source,
        gradients=not args.no_gradients,
    )  # fmt: skip
    if not made.suffices:
        raise ValueError(f"{made.shortage()}; nothing was written")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    made.save(args.output)
    size, seconds = args.output.stat().st_size / 2**20, time.perf_counter() - start
    say(
        f"{args.output}: {size:.1f} MiB, {len(made.layers)} layers, "
        f"{made.effective_tokens} effective tokens, {seconds:.0f} s"
    )
    say(f'use it with: quantize_(model, headq_config(calibration="{args.output}"))')
    return 0
