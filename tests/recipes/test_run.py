"""The recipe runner: what it skips, what it repeats, what it refuses."""

import json

import pytest
import yaml

from headq_ao.evals.harness.recipe import Recipe
from tests.conftest import ROOT, load_recipe

runner = load_recipe("run")

RECIPE = {
    "name": "mini",
    "model": "tiny",
    "dtype": "float32",
    "seed": 0,
    "protocol": {"text": "bundled", "rows": 2, "row_length": 160, "prefill": 64, "chunk": 32},
    "calibration": {"text": "bundled", "tokens": 300},
    "settings": [
        {"name": "first", "title": "first", "options": {"warmup_tokens": 32}},
        {"name": "second", "title": "second", "options": {"warmup_tokens": 32, "v_bits": None}, "calibration": False},
        {
            "name": "third",
            "title": "third",
            "method": "kivi",
            "family": "KIVI",
            "options": {"k_bits": 2, "v_bits": 2, "residual_length": 16},
        },
    ],
}


@pytest.fixture
def recipe(tmp_path, tiny, token_ids, monkeypatch):
    """``recipe(**changes)`` runs the recipe on a tiny model and random tokens; returns exit code and names that ran."""
    evaluate, ran = runner.evaluate, []

    def counted(*args, label, **kwargs):
        ran.append(label)
        return evaluate(*args, label=label, **kwargs)

    monkeypatch.setattr(runner.inputs, "load", lambda *_: (tiny(), None))
    monkeypatch.setattr(runner.inputs, "token_rows", lambda _, path, n, length: token_ids(n, length, len(path.name)))
    monkeypatch.setattr(runner, "evaluate", counted)

    def run(*arguments, **changes):
        ran.clear()
        path = tmp_path / "mini.yaml"
        path.write_text(yaml.safe_dump(RECIPE | changes), encoding="utf-8")
        code = runner.main([str(path), "--results", str(tmp_path / "results"), "--no-progress", *arguments])
        return code, list(ran)

    return run


def test_calibrations_of_other_queries(recipe, tmp_path, monkeypatch):
    """One calibration for all settings of the same readers, whose results say which they are."""
    calibrate_on, asked = runner.inputs.calibrate_on, []
    monkeypatch.setattr(runner.inputs, "calibrate_on", lambda *a: asked.append(a[-2:]) or calibrate_on(*a))
    first, *_ = RECIPE["settings"]
    settings = [first, first | {"name": "own", "readers": "own"}, first | {"name": "more", "readers": "own"}]
    assert recipe(settings=settings) == (0, ["first", "own", "more"])
    assert asked == [(None, "all"), (None, "own")]
    told = [json.loads((tmp_path / "results/mini" / f"{s['name']}.json").read_text())["protocol"] for s in settings]
    assert [p.get("calibration_readers") for p in told] == [None, "own", "own"]
    assert recipe(settings=settings) == (0, [])


def test_resumes(recipe, tmp_path, capsys):
    assert recipe("--only", "first") == (0, ["first"])
    assert recipe() == (0, ["second", "third"])
    shown = capsys.readouterr().out
    assert "mini: 2 of 3 settings to run, 1 already there" in shown
    assert all(part in shown for part in ("| first |", "| `warmup_tokens=32` |", "no calibration", "`kivi(k_bits=2"))
    assert recipe() == (0, [])
    assert recipe("--force") == (0, ["first", "second", "third"])
    result = json.loads((tmp_path / "results" / "mini" / "second.json").read_text(encoding="utf-8"))
    assert result["config"]["calibration"] is None and not result["calibrated"] and result["order"] == 1


def test_changes_are_measured_again(recipe, tmp_path):
    recipe()
    changed = [RECIPE["settings"][0] | {"options": {"warmup_tokens": 32, "rank": 0}}, *RECIPE["settings"][1:]]
    assert recipe(settings=changed) == (0, ["first"])
    assert recipe(protocol=RECIPE["protocol"] | {"chunk": 16}) == (0, ["first", "second", "third"])
    (tmp_path / "results" / "mini" / "first.json").write_text("{", encoding="utf-8")
    assert recipe(protocol=RECIPE["protocol"] | {"chunk": 16}) == (0, ["first"])


def test_labels_follow_the_recipe(recipe, tmp_path):
    recipe()
    settings = [RECIPE["settings"][1], RECIPE["settings"][0] | {"title": "now second", "headline": True}]
    assert recipe(settings=settings) == (0, [])
    result = json.loads((tmp_path / "results" / "mini" / "first.json").read_text(encoding="utf-8"))
    assert (result["title"], result["order"], result["headline"]) == ("now second", 1, True)


def test_expected_range(recipe, capsys):
    settings = [RECIPE["settings"][0] | {"expected_kl": [5, 6]}, RECIPE["settings"][1] | {"expected_kl": [0, 100]}]
    assert recipe(settings=settings)[0] == 1
    shown = capsys.readouterr().out
    assert "outside the expected range:\nfirst: mean KL" in shown and "second: mean KL" not in shown


def test_list_runs_nothing(recipe, capsys):
    assert recipe("--list") == (0, [])
    assert capsys.readouterr().out == "to run  first.json\nto run  second.json\nto run  third.json\n"


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ((), {"protocol": RECIPE["protocol"] | {"text": "wikitext"}}, "set HEADQ_WIKITEXT=FOLDER"),
        (("--wikitext", "nowhere"), {"calibration": {"text": "wikitext", "tokens": 9}}, "nowhere has no file"),
        ((), {"settings": [{"name": "a", "title": "a", "options": {"bits": 2}}]}, "setting a: unknown option bits"),
        ((), {"settings": RECIPE["settings"][:1] * 2}, "first is used twice"),
        ((), {"settings": [{"name": "a", "options": {}}]}, "a setting has no title"),
        ((), {"settings": [RECIPE["settings"][0] | {"note": ""}]}, "unknown key note; a setting has name, title"),
        ((), {"speed": 1}, "differs in {'speed'}"),
        (("--only", "fourth"), {}, "no setting fourth; there are first, second, third"),
        ((), {"settings": [RECIPE["settings"][0] | {"method": "kvi"}]}, "no method 'kvi'"),
        ((), {"panel": {"lines": 1}}, "panel must be"),
    ],
)
def test_refuses(recipe, arguments, changes, message, monkeypatch, capsys):
    monkeypatch.delenv("HEADQ_WIKITEXT", raising=False)
    with pytest.raises(SystemExit) as caught:
        recipe(*arguments, **changes)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_again_compares(recipe, tmp_path, capsys):
    recipe()
    folder = tmp_path / "results" / "mini"
    before = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert recipe("--again") == (0, ["first", "second", "third"])
    assert "3 settings measured twice; the KL of a row differs by 0.000 % at most" in capsys.readouterr().out
    changed = json.loads(before["first.json"])
    changed["score"]["kl_by_row"][1] *= 1.5
    (folder / "first.json").write_text(json.dumps(changed), encoding="utf-8")
    assert recipe("--again", "--only", "first") == (1, ["first"])
    assert "worst row differs by 33.333 %" in capsys.readouterr().out
    (folder / "first.json").write_text(before["first.json"], encoding="utf-8")
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == before


def test_several_models_and_layers(recipe, tmp_path):
    settings = [RECIPE["settings"][0] | {"layers": True, "chunk": 16}]
    assert recipe(model=["a", "b"], settings=settings) == (0, ["first", "first"])
    for model in "ab":
        result = json.loads((tmp_path / "results" / "mini" / f"{model}.first.json").read_text(encoding="utf-8"))
        assert result["model"] == model and result["protocol"]["chunk"] == 16
        assert len(result["layers"]["attention_kl"]) == 2 and min(result["layers"]["attention_kl"]) > 0


def test_panel(recipe, tmp_path):
    pytest.importorskip("matplotlib")
    settings = RECIPE["settings"][:1]
    folder = tmp_path / "results" / "mini"
    assert recipe(settings=settings, panel={"rows": 1}) == (0, ["first"])
    panel = json.loads((folder / "panel.json").read_text(encoding="utf-8"))
    assert panel["settings"] == {"rows": 1} and panel["panel"]["null_space"]
    assert (folder / "panel.png").stat().st_size > 10_000
    (folder / "panel.png").unlink()
    assert recipe(settings=settings, panel={"rows": 1}) == (0, [])
    assert not (folder / "panel.png").exists()


OLDER = json.loads((ROOT / "recipes" / "results" / "older.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_and_their_results(path, tmp_path):
    """Every committed result is of a setting that its recipe still has, made with its options, within its range, or
    named as one of an older version."""
    for name in ("wiki.test.raw", "wiki.valid.raw"):
        (tmp_path / name).touch()
    recipe = Recipe.read(path, str(tmp_path))
    assert recipe.name == path.stem
    folder = ROOT / "recipes" / "results" / recipe.name
    expected = {recipe.file(s, model): (s, model) for model in recipe.models for s in recipe.settings}
    found = {p.name for p in folder.glob("*.json")} - {"panel.json"}
    if recipe.name in OLDER["recipes"]:
        stored = [recipe.finished(*expected[name], folder) for name in sorted(found & set(expected))]
        assert stored and None in stored, "these results are not older ones: take them off older.json"
        return
    assert found == set(expected), f"python recipes/run.py recipes/{path.name}"
    results = [recipe.finished(*expected[name], folder) for name in sorted(expected)]
    assert None not in results, f"the recipe, the defaults or the results changed: python recipes/run.py {path.name}"
    assert recipe.outside(results) == []
    assert all(setting.expected_kl is not None for setting in recipe.settings)
    assert recipe.panel is None or (folder / "panel.json").is_file()
