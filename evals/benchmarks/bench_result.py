"""What benchmarks share: the refusal, the options for results, and what a whole result is."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class CheckFailedError(RuntimeError):
    """What was timed does not compute what it should: its speed means nothing."""


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--plot``."""
    add = parser.add_argument
    add("--json", type=Path, help="write the result here, after every cell")
    add("--plot", type=Path, help="write the figure here (PNG; needs matplotlib)")


def check_whole(result: dict[str, Any]) -> None:
    """Raise ValueError when a result was refused or its run interrupted."""
    if result.get("refused") or not result["complete"]:
        raise ValueError(f"the result is not whole: {result.get('refused') or 'the run was interrupted'}")


def each(found: Sequence[Any], show: Callable[[Any], str]) -> str:
    """What each number of threads gave, beside each other; a dash for None."""
    return " / ".join("–" if x is None else show(x) for x in found)
