"""Texts and rows."""

import pytest

from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.texts import WIKITEXT_VARIABLE, find_text, token_rows


def test_wikitext_folder(tmp_path, monkeypatch):
    (tmp_path / "wiki.test.raw").write_text("x", encoding="utf-8")
    monkeypatch.setenv(WIKITEXT_VARIABLE, str(tmp_path))
    assert find_text("wikitext", "report") == tmp_path / "wiki.test.raw"
    with pytest.raises(FileNotFoundError, match=r"has no file wiki\.valid\.raw"):
        find_text("wikitext", "calibrate")
    assert find_text("wikitext", "report", str(tmp_path)) == tmp_path / "wiki.test.raw"


def test_bundled_texts_are_apart():
    report, calibration = (find_text("bundled", p).read_text(encoding="utf-8") for p in ("report", "calibrate"))
    paragraphs = {p for p in report.split("\n") if p.strip()}
    assert paragraphs and not paragraphs & set(calibration.split("\n"))


def test_rows_are_cut_from_one_tokenization(tiny_folder, text_file):
    _, tokenizer = inputs.load(str(tiny_folder), None, inputs.DTYPES["float32"])
    rows = token_rows(tokenizer, text_file(), 3, 100)
    whole = tokenizer(text_file().read_text(encoding="utf-8"))["input_ids"]
    assert rows.shape == (3, 100)
    assert rows.flatten().tolist() == whole[:300]
