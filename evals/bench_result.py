"""What benchmarks share: the refusal, the options for results, and the README's table of a stored one."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headq_ao.evals.table import fill_marks


class CheckFailedError(RuntimeError):
    """What was timed does not compute what it should: its speed means nothing."""


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--plot`` and ``--readme``."""
    add = parser.add_argument
    add("--json", type=Path, help="write the result here, after every cell")
    add("--plot", type=Path, help="write the figure here (PNG; needs matplotlib)")
    add("--readme", type=Path, help="put the result of --json into this README, between its marks, and measure nothing")


def fill_readme(args: argparse.Namespace, name: str, table: Callable[[dict[str, Any]], str]) -> None:
    """Put the table of the stored result between the README's marks.

    Raises:
        ValueError: without ``--json``, without marks, or when the result is not whole.
        OSError: when a file cannot be read or written.
    """
    if args.json is None:
        raise ValueError("--readme needs the result: --json PATH")
    result = json.loads(args.json.read_text(encoding="utf-8"))
    fill_marks(args.readme, name, lambda: table(result))


def check_whole(result: dict[str, Any]) -> None:
    """Raise ValueError when a result was refused or its run interrupted."""
    if result.get("refused") or not result["complete"]:
        raise ValueError(f"the result is not whole: {result.get('refused') or 'the run was interrupted'}")


def each(found: Sequence[Any], show: Callable[[Any], str]) -> str:
    """What each number of threads gave, beside each other; a dash for None."""
    return " / ".join("–" if x is None else show(x) for x in found)
