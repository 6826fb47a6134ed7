"""Retired words stay out of code, messages and documents: each has the field's word in its place (docs/glossary.md)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("headq_ao", "ops", "evals", "recipes", "docs")
SUFFIXES = {".py", ".md", ".yaml", ".cpp", ".h", ".html"}

RETIRED = {
    r"(prompt_)?visible_(value_)?codec": "whitened_codec",
    r"[\"']visible[\"']": "whitened",
    r"epoch\w*": "segment, warmup_tokens",
    r"(key_)?gauges?": "subtract_key_mean, key-mean subtraction",
    r"seen_(weights|c_q|rank|every)": "importance_weights, weighted_c_q",
    r"error_metric": "error_hessian",
    r"share_bits": "allocate_bits",
    r"rotary_turns|of_turn|turned_\w+|turning": "rope_shift, rotated copies",
    r"exact rows?": "full-precision tokens",
    r"packed rows?": "packed tokens",
    r"RowCounts|RowStore|ExactRows|runs_of|let_go": "Lengths, PagePool, window, HeadGroup, evict",
    r"anew": "again",
    r"(?<!has )so many \w+ (of|at|further)": "that many",
    r"to be had": "missing, available",
    r"shares? bits": "allocate bits",
}

# Where a retired word has to stand: old public names, and files whose names or fields others read.
ALLOWED = {
    "headq_ao/config.py": r"OLD_NAMES|key_gauge|epoch_tokens|visible",
    "CHANGELOG.md": r"key_gauge|epoch_tokens|visible",
}
UNSEARCHED = re.compile(r"texts/|results/")


def lines():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted([*paths, *ROOT.glob("*.md")]):
        name = path.relative_to(ROOT).as_posix()
        if not UNSEARCHED.search(name):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield name, number, line


@pytest.mark.parametrize("word", RETIRED)
def test_no_retired_word(word):
    pattern = re.compile(rf"(?<!\w)(?:{word})(?!\w)", re.IGNORECASE)
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, number, line in lines()
        if pattern.search(line) and not re.search(ALLOWED.get(name, r"(?!)"), line)
    ]
    assert not found, f"use {RETIRED[word]}:\n" + "\n".join(found)


def test_the_search_finds_what_it_is_for():
    assert sum(1 for _ in lines()) > 10_000
    for word, example in {"anew": "made anew.", "exact rows?": "of exact rows,", "epoch\\w*": "epoch_tokens=3"}.items():
        assert re.search(rf"(?<!\w)(?:{word})(?!\w)", example) and word in RETIRED
