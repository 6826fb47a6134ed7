"""``headq estimate``: what a cache would take, from a model's config alone."""

import argparse
import dataclasses
import functools
import math
from typing import Any

from headq_ao.byte_size import byte_size, bytes_text
from headq_ao.evals.cli import loading
from headq_ao.evals.cli.console import UsageError, add_command, at_least, note, show_table

NAME = "estimate"
MOST_TOKENS, MOST_SEQUENCES = 2**26, 2**12  # pages are counted one by one
DESCRIPTION = """\
How many bytes the KV cache of a model takes, exact and with each preset, for a context and a number of sequences. Only
the config is read: no weights. The cache's own code runs on shapes, so the counts are those of the real cache; the
presets are counted as with a calibration. Weights and activations come on top."""
EXAMPLES = """\
  headq estimate smollm2                                              4096 tokens, one sequence
  headq estimate Qwen/Qwen3-8B --context 32768 --batch 8
  headq estimate path/to/model --batch 16 --budget 8GiB               what fits: contexts, and bits at 4096 tokens
  headq estimate path/to/model --set k_bits=3 --set v_bits=2          a row for options of your own"""


def size(text: str) -> int:
    """:func:`headq_ao.byte_size.byte_size` as an argparse type.

    Example:
        >>> from headq_ao.evals.cli.estimate import size
        >>> size("8GiB")
        8589934592
    """
    try:
        return byte_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add(commands: Any) -> None:
    """The parser of ``headq estimate``."""
    parser = add_command(commands, NAME, "bytes of a model's cache, before weights are loaded", DESCRIPTION, EXAMPLES)
    parser.set_defaults(run=run)
    option = parser.add_argument
    option("model", metavar="MODEL", help=loading.MODEL_HELP)
    option("--context", type=at_least(1, MOST_TOKENS), default=4096, metavar="N", help="tokens of a sequence (4096)")
    option("--batch", type=at_least(1, MOST_SEQUENCES), default=1, metavar="N", help="sequences (1)")
    budget_help = "say how long a context fits into it, and which bits do at --context and --batch: 8GiB, 500MB"
    option("--budget", type=size, metavar="SIZE", help=budget_help)
    option(
        "--dtype", choices=loading.DTYPES[1:], default="bfloat16", help="of the exact cache and the window (bfloat16)"
    )
    option("--calibration", metavar="FILE", help="count the bits that this calibration gives the heads")
    option(
        "--set", action="append", default=[], dest="options", metavar="NAME=VALUE", help="of headq_config, repeatable"
    )
    option("--gguf-file", metavar="NAME", help="file within MODEL, for GGUF weights")
    option("--trust-remote-code", action="store_true", help="run code that comes with the model")


def exact_bytes(layers: Any, tokens: int, batch: int, itemsize: int) -> int:
    """Bytes of transformers' own cache of :func:`headq_ao.integrations.config_only.served.served` layers; sliding ones
    keep their window."""
    both = zip(layers.shapes, layers.exact, strict=True)
    kept: int = sum(min(tokens, shape.sliding_window or tokens) * numbers for shape, numbers in both)
    return batch * itemsize * kept


def longest(bytes_at: Any, budget: int, window: int) -> int:
    """The most tokens whose bytes are within the budget, about; 0 where not even one is.

    Args:
        bytes_at: bytes of that many tokens. Beyond all windows they grow evenly, so that few counts are taken.
        window: the largest sliding window of a layer, 0 without.
    """
    near = max(4096, 4 * window)
    held, further = bytes_at(near), bytes_at(2 * near)
    if held <= budget:
        return near + int((budget - held) * near / (further - held)) if further > held else near
    low, high = 0, near
    while high - low > max(low // 256, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_at(middle) <= budget else (low, middle)
    return low


class Layers:
    """The packed layers of a model, found out once for each way that a config has them packed.

    Args:
        model_config: of transformers.
    """

    def __init__(self, model_config: Any) -> None:
        self.model_config = model_config
        self.found: dict[bool, Any] = {}

    def of(self, config: Any) -> Any:
        """:func:`headq_ao.integrations.config_only.served.served` of a config of HeadQ's own codec."""
        from headq_ao.integrations.config_only.served import served

        if config.one_row not in self.found:
            self.found[config.one_row] = served(self.model_config, config)
        return self.found[config.one_row]


def configs(args: argparse.Namespace, layers: Layers, known: Any) -> dict[str, Any]:
    """The rows of the table: name and config, None for the exact cache.

    Raises:
        UsageError: on options that headq_config refuses.
    """
    import torch

    from headq_ao import headq_config
    from headq_ao.config import PRESETS
    from headq_ao.integrations.config_only.estimate import assumed_calibration, within_budget

    def calibrated(made: Any) -> Any:
        return dataclasses.replace(made, calibration=known or assumed_calibration(layers.of(made).shapes))

    try:
        given = None
        if args.options:
            from headq_ao.evals.perplexity import parse_options

            given = headq_config(**parse_options(args.options))
            if given.codec is not None:
                raise ValueError("--set takes options of HeadQ's own codec; headq compare has others")
            given = calibrated(given)
        found: dict[str, Any] = {name: calibrated(headq_config(preset=name)) for name in PRESETS}
        by_bits = sorted(found.items(), key=lambda item: item[1].mean_bits or math.inf)
        rows: dict[str, Any] = {"exact": None, **dict(by_bits)}
        rows["balanced, no calibration"] = headq_config()
        if given is not None:
            rows["--set"] = given
        if args.budget is not None:
            wanted = {"cache_bytes": args.budget, "context_length": args.context, "batch_size": args.batch}
            budget = calibrated(headq_config(**wanted))
            try:
                dtype = getattr(torch, args.dtype)
                budget = within_budget(layers.model_config, budget, dtype, layers.of(budget).shapes)
                rows[f"mean_bits={budget.mean_bits:.3f}, the most that fit"] = budget
            except ValueError as error:
                note(str(error))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return rows


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    import torch

    from headq_ao import estimate_memory, headq_config
    from headq_ao.config import DEFAULT

    known = loading.read_calibration(args.calibration)
    config = loading.model_config(args)
    loading.check_calibration(known, config)
    dtype, layers = getattr(torch, args.dtype), Layers(config)
    try:
        own = layers.of(headq_config())
    except ValueError as error:
        raise UsageError(str(error)) from error
    rows, exact = list[list[str]](), exact_bytes(own, args.context, args.batch, dtype.itemsize)
    window = max(s.sliding_window or 0 for s in own.shapes)
    table = configs(args, layers, known)
    for name, headq in table.items():

        @functools.cache
        def report(tokens: int, headq: Any = headq) -> Any:
            return estimate_memory(config, headq, tokens, args.batch, dtype, layers.of(headq).shapes)

        def bytes_at(tokens: int, headq: Any = headq, report: Any = report) -> int:
            if headq is None:
                return exact_bytes(own, tokens, args.batch, dtype.itemsize)
            return sum(report(tokens).bytes.values())

        bits = 8.0 * dtype.itemsize if headq is None else report(args.context).packed_bits_per_element
        held = bytes_at(args.context)
        cells = [name, f"{bits:.2f}" if bits == bits else "–", bytes_text(held), f"{exact / held:.1f}"]
        rows.append(cells + ([] if args.budget is None else [f"{longest(bytes_at, args.budget, window):,}"]))
    sequences = "one sequence" if args.batch == 1 else f"{args.batch} sequences"
    note(f"{config.model_type}: {len(own.shapes)} layers with a KV cache, {sequences} of {args.context:,} tokens")
    header = ["cache", "bits", "bytes", "times smaller"]
    show_table(
        header + ([] if args.budget is None else [f"tokens that fit {bytes_text(args.budget)}"]),
        rows,
        mark=list(table).index(DEFAULT),
    )
    return 0
