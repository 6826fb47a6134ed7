"""Decode mode: continuations of the exact cache, read one by one and in chunks, and a cache running free."""

import json

import pytest
import torch
import yaml
from transformers import DynamicCache

from headq_ao.evals import decode_mode
from headq_ao.evals.harness.recipe import Recipe
from tests.conftest import load_recipe

RECIPE = {
    "name": "mini",
    "runner": "headq_ao.evals.decode_mode",
    "model": "tiny",
    "dtype": "float32",
    "seed": 0,
    "protocol": {"text": "bundled", "rows": 3, "row_length": 180, "prefill": 130, "chunk": 16},
    "calibration": {"text": "bundled", "tokens": 400},
    "settings": [
        {"name": "near", "title": "near", "options": {"k_bits": 8, "v_bits": 8}, "expected_kl": [0, 1]},
        {"name": "far", "title": "far", "options": {"k_bits": 1, "v_bits": 1}, "expected_kl": [0, 9]},
    ],
}


@pytest.fixture
def results(tmp_path, tiny, token_ids, monkeypatch):
    """The files of a run on a tiny model."""
    monkeypatch.setattr(decode_mode.inputs, "load", lambda *_: (tiny(), None))
    monkeypatch.setattr(decode_mode.inputs, "token_rows", lambda _, path, n, t: token_ids(n, t, len(path.name)))
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    assert decode_mode.main([str(tmp_path / "mini.yaml"), "--results", str(tmp_path), "--no-progress"]) == 0
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "mini").glob("*.json")}


def test_what_is_stored(results, tmp_path, capsys):
    near, far = results["near"], results["far"]
    for kind in decode_mode.KINDS:
        a, b = near[kind], far[kind]
        assert a["tokens"]["packed_fraction"] > 0 and a["tokens"]["tokens"] == 3 * 50
        assert 0 <= a["tokens"]["mean_kl"] < b["tokens"]["mean_kl"] and a["agreement"] > b["agreement"]
        assert b["tokens"]["kl_quantiles"]["0.5"] < b["tokens"]["kl_quantiles"]["0.999"]
        assert b["ratio"] == b["tokens"]["mean_kl"] / b["chunks"]["mean_kl"] != 1
    assert len(far["free_running"]["steps"]) == 3 and max(near["free_running"]["steps"]) <= 50
    assert near["free_running"]["median"] >= far["free_running"]["median"] < 50
    recipe = Recipe.read(tmp_path / "mini.yaml", None)
    assert recipe.outside([near, far]) == []
    assert recipe.finished(recipe.settings[0], "tiny", tmp_path / "mini") == near
    with pytest.raises(SystemExit):
        load_recipe("run").main([str(tmp_path / "mini.yaml")])
    assert "is run by python -m headq_ao.evals.decode_mode" in capsys.readouterr().err


@torch.no_grad()
def test_continuations_are_the_models(tiny, token_ids):
    model, prompts = tiny(), token_ids(2, 20)
    own = decode_mode.continued(model, prompts, 12, DynamicCache(config=model.config), progress=False)
    assert torch.equal(own, model.generate(prompts, max_new_tokens=12, min_new_tokens=12, do_sample=False))
    drawn = [
        decode_mode.continued(model, prompts, 12, DynamicCache(config=model.config), seed, progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0][:, :20], prompts)


def test_unknown_setting(tmp_path, capsys):
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    with pytest.raises(SystemExit):
        decode_mode.main([str(tmp_path / "mini.yaml"), "--only", "other"])
    assert "there are near, far" in capsys.readouterr().err
