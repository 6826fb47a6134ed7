"""Articles of a text file, for perplexity."""

import itertools
import re
from typing import Any, Literal

from datasets import Dataset

from headq_ao.evals.harness.texts import find_text

HEADING = re.compile(r"^ ?= [^=].* = ?$", re.MULTILINE)  # of the first level: "= Title =", not "= = Section = ="


def articles(text: str) -> list[str]:
    """The articles of a text in WikiText's manner, each from its title on.

    Example:
        >>> from headq_ao.evals.tasks.text import articles
        >>> articles(" = A = \\n one \\n = = B = = \\n two \\n = C = \\n three")
        [' = A = \\n one \\n = = B = = \\n two \\n', ' = C = \\n three']
    """
    starts = [match.start() for match in HEADING.finditer(text)]
    return [text[begin:end] for begin, end in itertools.pairwise([*starts, len(text)])]


def dataset(text: Literal["wikitext", "bundled"], wikitext: str | None = None, **_: Any) -> dict[str, Dataset]:
    """What lm-eval's ``custom_dataset`` asks for: one document per article.

    Args:
        text: the raw WikiText test split, or the held-out text of this package.
        wikitext: folder of the former; the environment variable ``HEADQ_WIKITEXT`` when None.

    Raises:
        FileNotFoundError: with what to do about it.
        ValueError: when the file has no article.
    """
    path = find_text(text, "report", wikitext)
    found = articles(path.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{path.name} has no line like '= Title =', with which an article begins; is it the raw file?")
    return {"test": Dataset.from_list([{"page": page} for page in found])}
