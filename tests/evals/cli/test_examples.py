"""Commands in README.md, in the documentation and in ``--help`` are commands that the parser takes."""

import re
import shlex
from pathlib import Path

import pytest

from headq_ao.evals.cli.__main__ import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[3]
BASH = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(text):
    """Lines that call ``headq``, each part of a ``&&`` for itself, without remarks."""
    joined = text.replace("\\\n", " ")
    parts = [part for line in joined.splitlines() for part in line.split(" && ")]
    return [part.strip() for part in parts if re.match(r"\s*headq \w", part)]


def in_documents():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        line for page in pages for block in BASH.findall(page.read_text(encoding="utf-8")) for line in commands(block)
    ]


def in_help():
    return [line for command in COMMANDS for line in commands(command.EXAMPLES)]


@pytest.mark.parametrize("line", dict.fromkeys(in_documents() + in_help()))
def test_the_parser_takes_it(line):
    line = re.split(r"\s{3,}(?!-)", line)[0]  # in --help the remark stands behind spaces
    name, *arguments = shlex.split(line, comments=True)
    assert name == "headq" and callable(build_parser().parse_args(arguments).run)


def test_there_are_some_of_both():
    assert len(in_documents()) > 8 and len(in_help()) > 12
