"""README.md and the documentation: generated blocks between their marks, and numbers that stand outside them."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from headq_ao.evals.results.provenance import CHANGED
from headq_ao.files import atomic_path

MARKS = re.compile(
    r"(?P<begin><!-- generated: (?P<name>[\w -]+?) -->\n)(?P<text>.*?)(?P<end><!-- /generated -->)", re.DOTALL
)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
MEASURED = re.compile(r"\d\.\d+(?!\.\d)|\d ?%|\d ± |× ?\d|\d ?×")  # what a measurement looks like in a table


def documents(root: Path) -> list[Path]:
    """README.md and all pages below docs."""
    return [path for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))] if path.is_file()]


def filled(text: str, make: Callable[[str], str]) -> str:
    """A document with each block made again by its name."""
    return MARKS.sub(lambda match: f"{match['begin']}{make(match['name'])}\n{match['end']}", text)


def names(text: str) -> list[str]:
    """The names of a document's blocks."""
    return [match["name"] for match in MARKS.finditer(text)]


def typed(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each table row outside all blocks and code that holds a measurement.

    Example:
        >>> from headq_ao.evals.results.documents import typed
        >>> list(typed("| a | 0.25 |\\n| b | `0.25` |\\n<!-- generated: x -->\\n| c | 0.5 |\\n<!-- /generated -->\\n"))
        [(1, '| a | 0.25 |')]
    """

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    rest = FENCE.sub(blank, MARKS.sub(blank, text))
    for number, line in enumerate(rest.splitlines(), 1):
        if line.lstrip().startswith("|") and MEASURED.search(re.sub(r"`[^`]*`", "", line)):
            yield number, line


def same(one: str, other: str, marks: bool) -> bool:
    """Whether two documents are equal; without ``marks`` but for what only a history of commits can tell."""
    return one == other if marks else one.replace(CHANGED, "") == other.replace(CHANGED, "")


def write(path: Path, text: str) -> None:
    """Write a document, whole or not at all."""
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
