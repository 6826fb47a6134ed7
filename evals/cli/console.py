"""What commands print: rich where it is installed and a terminal reads it, plain text otherwise."""

import argparse
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

PROG = "headq"


class UsageError(ValueError):
    """Something that can be refused before any work; the message says what must hold, what came and what to do."""


def rich_console(stream: TextIO | None = None) -> Any:
    """rich's console for a stream (stdout) that is a terminal; None where plain text is right, as under NO_COLOR."""
    stream = sys.stdout if stream is None else stream
    if not stream.isatty() or os.environ.get("NO_COLOR") or importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console(file=stream, highlight=False)


def say(text: str = "") -> None:
    """A line of the result, on stdout, as it is."""
    print(text, flush=True)


def note(text: str) -> None:
    """A line about the run, on stderr, so that what a pipe reads is the result alone."""
    console = rich_console(sys.stderr)
    if console is None:
        print(text, file=sys.stderr, flush=True)
    else:
        console.print(text, style="dim", markup=False)


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], mark: int | None = None, left: int = 1) -> None:
    """A table with its first ``left`` columns to the left and the others to the right.

    Args:
        mark: the row to set off; plain text has no mark.
    """
    console = rich_console()
    if console is None:
        from headq_ao.evals.harness.table import text_table

        return say(text_table(header, rows, left))
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="left" if i < left else "right")
    for i, row in enumerate(rows):
        table.add_row(*map(Text, row), style="bold" if i == mark else None)
    console.print(table)


def complain(text: str) -> None:
    """An error, in one line on stderr."""
    console = rich_console(sys.stderr)
    if console is None:
        print(f"{PROG}: {text}", file=sys.stderr, flush=True)
    else:
        console.print(f"[bold red]{PROG}:[/] ", end="")
        console.print(text, markup=False)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Warnings as lines of their own on stderr, without the place in the code; ours always."""
    with warnings.catch_warnings():

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            note(f"warning: {message}")

        warnings.showwarning = show
        warnings.filterwarnings("always", message="HeadQ", category=UserWarning)
        yield


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples as they are written, options in a column that has room for them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def add_argument(self, action: argparse.Action) -> None:
        """argparse forgets that subcommands are indented once more when it chooses the column."""
        super().add_argument(action)
        if list(self._iter_indented_subactions(action)):
            self._action_max_length += self._indent_increment


def add_command(commands: Any, name: str, title: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A subcommand's parser, its help with examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=title, description=description, epilog=f"examples:\n{examples}", formatter_class=HelpFormatter
    )
    return parser


def check_output(path: Path | None, option: str, suffixes: Sequence[str] = ()) -> None:
    """Raise UsageError where a result could not be written there, before any work; its folder may be missing.

    Args:
        suffixes: one of which the name must have; empty: any.
    """
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} must name a {' or '.join(suffixes)} file, got {str(path)!r}")
    if path.is_dir():
        raise UsageError(f"{option} must name a file, got the folder {str(path)!r}")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not writable(folder):
        raise UsageError(f"{option} {str(path)!r}: nothing can be written in {str(folder)!r}")


def writable(folder: Path) -> bool:
    """Whether a file can be made there; permissions alone do not tell (a full disk, a read-only file system)."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def at_least(least: int, most: int | None = None) -> Any:
    """An argparse type: whole numbers from ``least`` on, to ``most``."""

    def whole(text: str) -> int:
        try:
            value = int(text.replace(",", "").replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, got {value:,}")
        return value

    return whole
