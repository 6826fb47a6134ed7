"""Routes: which experts read a token, counted under caches of more and of less error."""

import json

import pytest
import torch
import yaml
from transformers import DynamicCache, OlmoeConfig, OlmoeForCausalLM

from headq_ao.evals import routing
from headq_ao.evals.harness.recipe import Recipe
from headq_ao.evals.results import tables

RECIPE = {
    "name": "mini",
    "runner": "headq_ao.evals.routing",
    "model": "tiny",
    "dtype": "float32",
    "seed": 0,
    "protocol": {"text": "bundled", "rows": 2, "row_length": 200, "prefill": 130, "chunk": 16},
    "calibration": {"text": "bundled", "tokens": 400},
    "settings": [
        {"name": "near", "title": "near", "options": {"k_bits": 8, "v_bits": 8}, "expected_kl": [0, 1]},
        {"name": "far", "title": "far", "options": {"k_bits": 1, "v_bits": 1}, "expected_kl": [0, 9]},
    ],
}


@pytest.fixture
def mixture():
    config = OlmoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
        initializer_range=0.2, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return OlmoeForCausalLM(config).eval()


@pytest.fixture
def results(tmp_path, mixture, token_ids, monkeypatch):
    monkeypatch.setattr(routing.inputs, "load", lambda *_: (mixture, None))
    monkeypatch.setattr(routing.inputs, "token_rows", lambda _, path, n, t: token_ids(n, t, len(path.name)))
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    assert routing.main([str(tmp_path / "mini.yaml"), "--results", str(tmp_path), "--no-progress"]) == 0
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "mini").glob("*.json")}


def test_what_is_stored(results, tmp_path):
    near, far = results["near"], results["far"]
    assert 0 <= near["changed"]["sets"] < far["changed"]["sets"] < 1
    assert near["mean_kl"] < far["mean_kl"] < 9
    assert far["changed"]["experts"] <= far["changed"]["sets"] <= far["changed"]["tokens"]
    assert far["kl_where_changed"] is not None and len(far["changed"]["sets_by_layer"]) == 2
    assert near["packed_fraction"] > 0.2 and near["bfloat16"]["changed"]["sets"] < far["changed"]["sets"]
    recipe = Recipe.read(tmp_path / "mini.yaml", None)
    assert recipe.outside([near, far]) == [] and recipe.finished(recipe.settings[0], "tiny", tmp_path / "mini") == near
    table = tables.routing(tmp_path / "mini")
    assert all(title in table for title in ("near", "far", "bfloat16", "8 experts"))


def test_routes_are_those_of_the_model(mixture, token_ids):
    """Call by call what one call chooses; the routers are let go afterwards."""
    ids = token_ids(2, 60)
    _, experts = routing.read(mixture, ids, 20, 7, lambda: DynamicCache(config=mixture.config), "", progress=False)
    with routing.watched(mixture) as chosen:
        mixture(ids[:1])
    assert experts.shape == (2, 2, 40, 2)
    assert torch.equal(experts[:, 0].sort(-1).values, torch.stack([x[0][20:] for x in chosen]).sort(-1).values)
    mixture(ids[:1])
    assert all(len(of_layer) == 1 for of_layer in chosen)


def test_a_model_without_experts_is_refused(model):
    with pytest.raises(ValueError, match="no router"), routing.watched(model):
        pass


def test_the_cache_in_bfloat16_rounds(mixture):
    cache = routing.Bfloat16Cache(config=mixture.config)
    k = torch.randn(1, 2, 3, 32)
    kept, _ = cache.update(k, k, 0)
    assert kept.dtype == k.dtype and torch.equal(kept, k.bfloat16().float()) and not torch.equal(kept, k)
