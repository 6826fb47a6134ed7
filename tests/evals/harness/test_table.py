"""Tables, and README.md's equality with the results."""

import json
from pathlib import Path

import pytest

from headq_ao.evals.harness import table

ROOT = Path(__file__).resolve().parents[3]


def result(name, order, kl):
    score = {
        "report": {"exact_rows": 96.0}, "perplexity": 12.5, "perplexity_sem": 0.25, "ppl_ratio": 1.0123,
        "ppl_ratio_sem": None, "mean_kl": kl, "mean_kl_sem": 0.002, "flips": 0.05, "exact_perplexity": 12.3456,
        "exact_perplexity_sem": None, "packed_fraction": 0.75,
    }  # fmt: skip
    bits = {"key": 2.75, "value": None, "body": 2.75, "at": {"1024": 2.9, "4096": 2.8, "16384": 2.76}}
    protocol = {
        "text": "t.txt", "rows": 3, "row_length": 1024, "prefill": 256, "chunk": 64, "dtype": "float32",
        "calibration": "c.txt", "calibration_tokens": 4096,
    }  # fmt: skip
    return {
        "name": name, "title": name.upper(), "order": order, "headline": name == "b",
        "options": {"v_bits": None}, "calibrated": order == 0,
        "model": "m", "protocol": protocol, "score": score, "bits": bits,
        "method": {"kind": "headq", "name": "headq", "options": {"v_bits": None}},
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
    assert lines[4] == (
        "| B | `v_bits=None` | 2.75 / exact | 2.90 / 2.80 / 2.76 | 96 | 12.50 ± 0.25 | 1.012 | 0.2500 ± 0.0020 "
        "| 5.0 % | 75 % |"
    )
    assert lines[5].startswith("| A | `v_bits=None, no calibration` |")


def test_headline_rows(project, tmp_path):
    (tmp_path / "README.md").write_text("<!-- table:core -->\n<!-- /table -->\n", encoding="utf-8")
    table.main(project)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| B |" in text and "| A |" not in text


def test_other_methods_and_the_exact_cache():
    other = result("a", 0, 0.5) | {"method": {"kind": "baseline", "name": "kivi", "options": {}}}
    assert table.result_row(other)[1] == "`kivi(v_bits=None)`"
    exact = result("e", 0, 0.0) | {"method": {"kind": "exact", "name": "exact", "options": {}}, "options": {}}
    exact["bits"] = {"key": None, "value": None, "body": None, "at": dict.fromkeys(("1024", "4096", "16384"))}
    assert table.result_row(exact)[1:8] == ["`exact()`", "exact / exact", "–", "all", "12.50 ± 0.25", "1", "0"]


def test_a_table_per_model(project, tmp_path):
    second = result("c", 2, 0.1) | {"model": "n"}
    (tmp_path / "results" / "core" / "n.c.json").write_text(json.dumps(second), encoding="utf-8")
    table.main(project)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count("| cache |") == 2 and text.index("\nm, float32;") < text.index("| C |") < text.index(
        "\nn, float32;"
    )


def test_panel(project, tmp_path, capsys):
    (tmp_path / "README.md").write_text("<!-- table:core:panel -->\n<!-- /table -->\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        table.main(project)
    assert "panel.json; make it with: python recipes/run.py recipes/core.yaml" in capsys.readouterr().err
    predictor = {"spearman": 0.81234, "within_head": 0.9, "within_head_lowest": 0.7}
    names = list(table.PREDICTORS)
    panel = {
        "rows": 1, "row_length": 64, "correlations": {"all": {"perturbations": 9, **dict.fromkeys(names, predictor)}},
        "counterexamples": {"compared": 50, "wrong_order": {name: {"share": 0.25} for name in names}},
        "null_space": [{"name": "one vector", "relative_key_mse": 100.0, "attention_kl": 7e-12}],
    }  # fmt: skip
    path = tmp_path / "results" / "core" / "panel.json"
    path.write_text(json.dumps({"model": "m", "panel": panel}), encoding="utf-8")
    assert table.main(project) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| Fisher error | 0.812 | 0.900 | 0.700 | 25.0 % |" in text
    assert "One vector: mean square 100 times the keys' variance, attention KL 7e-12 nats." in text
    assert len(table.read_results(path.parent)) == 2  # the panel is no setting


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
    assert table.updated(readme, ROOT / "recipes" / "results") == readme, "run: python -m headq_ao.evals.harness.table"
