"""``headq eval``: perplexity and KL of a model that reads its history from the packed cache."""

import argparse
from pathlib import Path
from typing import Any

from headq_ao.evals.cli import loading
from headq_ao.evals.cli.console import UsageError, add_command, at_least, check_output, note, say, show_table

NAME = "eval"
DESCRIPTION = """\
Score text through the packed cache: the first --prefill tokens of each row go in at once, the rest in chunks that read
the cache. Reported are perplexity, its ratio to the exact cache's, and the KL divergence of the next-token distribution
to it. The run fails when no packed token was read: it would have scored the exact cache."""
EXAMPLES = """\
  headq eval smollm2                                                       the default, calibrated on a bundled text
  headq eval smollm2 --calibration smollm2.safetensors --preset quality    with a file of headq calibrate
  headq eval path/to/model --text my.txt --rows 4 --row-length 4096 --json out/eval.json
  headq eval smollm2 --set k_bits=3 --set v_bits=none --calibration none   3-bit keys, exact values, uncalibrated
  headq eval smollm2 --method kivi --set k_bits=2 --set v_bits=2           another quantizer in the same cache"""


def add(commands: Any) -> None:
    """The parser of ``headq eval``."""
    parser = add_command(commands, NAME, "perplexity and KL through the packed cache", DESCRIPTION, EXAMPLES)
    parser.set_defaults(run=run)
    add_protocol(parser)
    option = parser.add_argument
    option("--preset", metavar="NAME", help=loading.PRESET_HELP)
    option("--method", default="headq", metavar="NAME", help="headq (default) or another quantizer: see headq compare")
    option(
        "--set", action="append", default=[], dest="options", metavar="NAME=VALUE", help="of headq_config or --method"
    )
    option("--json", type=Path, metavar="OUT", help="write settings, environment and scores there")


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """The model, the text and how it is scored."""
    loading.add_model(parser)
    option = parser.add_argument
    option("--text", default="bundled", help="to report on: 'bundled', 'wikitext', or a UTF-8 text file")
    option("--rows", type=at_least(1), default=2, help="cut from the start of the text (2)")
    option("--row-length", type=at_least(2), default=1024, metavar="N", help="tokens of a row (1024)")
    option("--prefill", type=at_least(1), default=256, metavar="N", help="tokens of a row that go in at once (256)")
    option("--chunk", type=at_least(1), default=64, metavar="N", help="tokens of each later call (64)")
    option("--batch-size", type=at_least(1), default=4, metavar="N", help="rows that are scored together (4)")
    option("--calibration", default="bundled", metavar="WHAT", help="'bundled', 'none', a text file, or a .safetensors")
    option("--calibration-tokens", type=at_least(1), default=4096, metavar="N", help="of a text to calibrate on (4096)")
    option("--no-progress", action="store_true", help="no progress bars")


def checked(args: argparse.Namespace) -> tuple[Path, Path | None, Any]:
    """What :func:`headq_ao.evals.perplexity.check` finds.

    Raises:
        UsageError: on all that can be refused before a model is loaded.
    """
    from headq_ao.evals import perplexity

    try:
        found = perplexity.check(args)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    config = loading.model_config(args)
    if args.calibration.endswith(".safetensors"):
        loading.check_calibration(loading.read_calibration(args.calibration), config)
    return found


def run(args: argparse.Namespace) -> int:
    """Score and print; 1 where no packed token was read."""
    from headq_ao.cache.memory_report import NothingPackedError
    from headq_ao.evals import perplexity
    from headq_ao.evals.harness.environment import write_json

    check_output(args.json, "--json")
    text, calibration, subject = checked(args)
    loaded = loading.load_model(args)
    try:
        result = perplexity.run(args, text, calibration, subject, loaded)
    except NothingPackedError as error:
        raise ValueError(str(error)) from error
    head, table, foot = perplexity.shown(result)
    say(f"{head}\n")
    show_table(*table, mark=1)
    say(f"\n{foot}")
    if args.json is not None:
        write_json(args.json, result)
        note(f"written: {args.json}")
    return 0
