"""Markdown of recipes' results."""

import json

import pytest

from headq_ao.evals.harness import table


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
def folder(tmp_path):
    """Two results that sort against their names."""
    for r in (result("a", 1, 0.5), result("b", 0, 0.25)):
        (tmp_path / f"{r['name']}.json").write_text(json.dumps(r), encoding="utf-8")
    return tmp_path


def test_rows_in_the_order_of_the_recipe(folder):
    lines = table.model_tables(table.read_results(folder)).splitlines()
    assert lines[2] == (
        "| B | 2.75 / exact | 2.90 / 2.80 / 2.76 | 0.2500 ± 0.0020 | 1.012 | 12.50 ± 0.25 | 5.0 % | 96 | 75 % "
        "| `v_bits=None` |"
    )
    assert lines[3].startswith("| A |") and lines[3].endswith("| `v_bits=None, no calibration` |")


def test_other_methods_and_the_exact_cache():
    other = result("a", 0, 0.5) | {"method": {"kind": "baseline", "name": "kivi", "options": {}}}
    assert table.result_row(other)[-1] == "`kivi(v_bits=None)`"
    exact = result("e", 0, 0.0) | {"method": {"kind": "exact", "name": "exact", "options": {}}, "options": {}}
    exact["bits"] = {"key": None, "value": None, "body": None, "at": dict.fromkeys(("1024", "4096", "16384"))}
    assert table.result_row(exact)[1:6] == ["exact / exact", "–", "0", "1", "12.50 ± 0.25"]


def test_one_row_for_key_and_value_is_not_exact():
    latent = result("a", 0, 0.5) | {"config": {"v_bits": 2}}
    assert table.result_row(latent)[1] == "2.75, one row"
    assert table.result_row(latent | {"config": {"v_bits": None}})[1] == "2.75 / exact"


def test_a_table_per_model(folder):
    (folder / "n.c.json").write_text(json.dumps(result("c", 2, 0.1) | {"model": "n"}), encoding="utf-8")
    text = table.model_tables(table.read_results(folder))
    assert text.count("| cache |") == 2
    assert text.index("\nm, float32;") < text.index("| C |") < text.index("\nn, float32;")


def test_panel(folder):
    with pytest.raises(FileNotFoundError, match=r"panel.json; make it with: python recipes/run.py recipes/"):
        table.panel_table(folder)
    predictor = {"spearman": 0.81234, "within_head": 0.9, "within_head_lowest": 0.7}
    names = list(table.PREDICTORS)
    panel = {
        "rows": 1, "row_length": 64, "correlations": {"all": {"perturbations": 9, **dict.fromkeys(names, predictor)}},
        "counterexamples": {"compared": 50, "wrong_order": {name: {"share": 0.25} for name in names}},
        "null_space": [{"name": "one vector", "relative_key_mse": 100.0, "attention_kl": 7e-12}],
    }  # fmt: skip
    (folder / "panel.json").write_text(json.dumps({"model": "m", "panel": panel}), encoding="utf-8")
    text = table.panel_table(folder)
    assert "| Fisher error | 0.812 | 0.900 | 0.700 | 25.0 % |" in text
    assert "One vector: mean square 100 times the keys' variance, attention KL 7e-12 nats." in text
    assert len(table.read_results(folder)) == 2  # the panel is no setting


def test_an_empty_folder_says_what_makes_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make them with: python recipes/run.py"):
        table.read_results(tmp_path)
