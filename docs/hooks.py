"""What MkDocs is told beside mkdocs.yml: formulas as MathML, figures of the results, words of docstrings."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("report", "bench", "controls")  # folders of recipes/results whose PNGs pages show
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
TEST_MARK = re.compile(r"\[✓\]\(\.\./tests/[^)]*\)")
ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|obj):(?=<code>)")


def on_files(files: Any, config: Any) -> Any:
    """The figures that lie beside the results, as figures/results/FOLDER-NAME.png of the site."""
    for folder in FIGURES:
        for path in sorted((ROOT / "recipes" / "results" / folder).glob("*.png")):
            name = f"figures/results/{folder}-{path.name}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Marks that link to tests, which are no pages, as marks alone."""
    return TEST_MARK.sub("✓", markdown)


def on_page_content(content: str, **_: Any) -> str:
    r"""Formulas (``\(..\)`` and ``\[..\]``) as MathML, which browsers draw themselves; no roles of reST."""

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[2]).strip()
        display = "block" if text.startswith("\\[") else "inline"
        return convert(text[2:-2].strip(), display=display)

    return ROLE.sub("", FORMULA.sub(formula, content))
