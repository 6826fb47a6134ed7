"""Tables, and README.md's equality with the results."""

import json
from pathlib import Path

import pytest

from headq_ao.evals import table

ROOT = Path(__file__).resolve().parents[2]


def result(name, order, kl):
    report = {"key_body_bits": 2.75, "value_body_bits": None, "packed_bits_per_element": 2.75}
    score = {
        "report": report, "ppl_ratio": 1.0123, "ppl_ratio_sem": None, "mean_kl": kl, "mean_kl_sem": 0.002,
        "flips": 0.05, "exact_perplexity": 12.3456, "packed_fraction": 0.75,
    }  # fmt: skip
    protocol = {
        "text": "t.txt", "rows": 3, "row_length": 1024, "prefill": 256, "chunk": 64, "dtype": "float32",
        "calibration": "c.txt", "calibration_tokens": 4096,
    }  # fmt: skip
    return {
        "name": name, "title": name.upper(), "order": order, "headline": name == "b",
        "options": {"v_bits": None}, "calibrated": order == 0,
        "model": "m", "protocol": protocol, "score": score, "bits_at_4096": 2.8,
    }  # fmt: skip


@pytest.fixture
def project(tmp_path):
    """A README with an empty table, and two results that sort against their names."""
    folder = tmp_path / "results" / "core"
    folder.mkdir(parents=True)
    for r in (result("a", 1, 0.5), result("b", 0, 0.25)):
        (folder / f"{r['name']}.json").write_text(json.dumps(r), encoding="utf-8")
    (tmp_path / "README.md").write_text(
        "before\n<!-- table:core:all -->\nold\n<!-- /table -->\nafter\n", encoding="utf-8"
    )
    return ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")]


def test_update_then_check(project, tmp_path, capsys):
    assert table.main([*project, "--check"]) == 1
    assert "is out of date" in capsys.readouterr().err
    assert "old" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert table.main(project) == 0
    assert table.main([*project, "--check"]) == 0
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "before" and lines[-1] == "after"
    assert lines[4] == "| B | `v_bits=None` | 2.75 / exact | 2.75 | 2.80 | 1.012 | 0.2500 ± 0.0020 | 5.0 % | 75 % |"
    assert lines[5].startswith("| A | `v_bits=None, no calibration` |")


def test_headline_rows(project, tmp_path):
    (tmp_path / "README.md").write_text("<!-- table:core -->\n<!-- /table -->\n", encoding="utf-8")
    table.main(project)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| B |" in text and "| A |" not in text


def test_check_sees_a_changed_result(project, tmp_path):
    table.main(project)
    (tmp_path / "results" / "core" / "a.json").write_text(json.dumps(result("a", 1, 0.6)), encoding="utf-8")
    assert table.main([*project, "--check"]) == 1


def test_refuses(project, tmp_path, capsys):
    (tmp_path / "README.md").write_text("no table", encoding="utf-8")
    with pytest.raises(SystemExit):
        table.main(project)
    assert "has no <!-- table:NAME -->" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table.main([*project, "--print", "other"])
    assert "make them with: python recipes/run.py" in capsys.readouterr().err


def test_print(project, capsys):
    assert table.main([*project, "--print", "core"]) == 0
    assert capsys.readouterr().out.startswith("| cache |")


def test_readme_is_up_to_date():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.MARKERS.search(readme)
    assert table.updated(readme, ROOT / "recipes" / "results") == readme, "run: python -m headq_ao.evals.table"
