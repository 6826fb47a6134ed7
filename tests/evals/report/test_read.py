"""Results that cannot be reported are refused before anything is written; sparse ones still give a page."""

import json
import math

import pytest

from headq_ao.evals.report import __main__ as command
from headq_ao.evals.report import write, write_report
from headq_ao.evals.report.panel import panel_tables, single_panels
from headq_ao.evals.report.read import find_folders


def without(key):
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("bits"), "frontier/kv_default.json has no bits: it is of an older format; make it again with: "
         "python recipes/run.py recipes/frontier.yaml --force"),
        (without("memory_bytes"), "lacks memory_bytes"),
        (lambda d: d["score"].update(mean_kl=math.nan), "all numbers must be finite, score.mean_kl is not"),
        (lambda d: d["layers"]["fisher_error"].__setitem__(3, math.inf), "layers.fisher_error[3] is not"),
        (lambda d: d["score"].update(flips=None), "score.flips must be a number"),
        (lambda d: d["bits"]["at"].pop("4096"), "bits.at.4096 must be a number"),
        (lambda d: d["method"].update(kind="magic"), "method.kind must be one of headq, baseline"),
        (lambda d: d.update(protocol=d["protocol"] | {"rows": 9}), "exact and kv_default have rows 8 and 9"),
    ],
)  # fmt: skip
def test_refuses(tmp_path, write_recipe, capsys, spoil, message):
    path = write_recipe(tmp_path, "frontier", ["exact", "kv_default"]) / "kv_default.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    spoil(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    assert command.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refuses_what_is_not_there(tmp_path, write_recipe, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "out")]
    assert command.main(["--results", str(tmp_path), *out]) == 1
    assert "no results under" in capsys.readouterr().err
    folder = write_recipe(tmp_path, "frontier", ["kv_default"])
    assert command.main(["--results", str(tmp_path), "--recipe", "core", "frontier", *out]) == 1
    assert "has no results of core; there are: frontier" in capsys.readouterr().err
    with pytest.raises(ValueError, match="frontier is given twice"):
        write_report([folder, folder], tmp_path / "out")
    (folder / "kv_default.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"frontier/kv_default\.json is not JSON"):
        find_folders(tmp_path)
    monkeypatch.setattr(write.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'headq_ao\[plot\]'"):
        write_report([folder], tmp_path / "out")


def test_one_row_and_no_exact_cache(tmp_path, write_recipe):
    """Without standard errors, layers or an exact cache there is still a page."""
    folder = write_recipe(tmp_path, "frontier", ["kv_default", "turboquant2", "v_default"], layers=None)
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        data["score"] |= {"mean_kl_sem": None, "ppl_ratio_sem": None, "kl_by_row": data["score"]["kl_by_row"][:1]}
        path.write_text(json.dumps(data), encoding="utf-8")
    page = write_report([folder], tmp_path / "out", progress=False).read_text(encoding="utf-8")
    card = page.split('id="bits-2.5">')[1].split("</article>")[0]
    assert "KL is 0.0300 nats" in card and "without a standard error" in card
    assert "The exact cache of this model is not among the results" in page
    assert "bf16 (" not in page.split("<main>")[1]


def test_panels_of_other_shapes(panel):
    assert panel_tables({"correlations": [], "null_space": {"a": 1}, "bases": None, "unknown": 3}) == []
    several = {"panel": {"m1": panel, "m2": panel}, "panel-b": panel}
    assert [name for name, _ in single_panels(several)] == ["m1", "m2", "panel-b"]
    (first, *_) = panel_tables(panel)
    assert first.rows[1] == ["Fisher error ½ Var_a(δ), all (7)", "0.875", "–", "–", "–"]
