"""``recipes/prompt_cache.py`` on a tiny model."""

import json

import pytest

from headq_ao import headq_config, quantize_
from headq_ao.evals.results import tables
from tests.conftest import load_recipe


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("prompt_cache")


def test_measure(recipe, tiny, token_ids, tmp_path):
    model = tiny(head_dim=64)
    quantize_(model, headq_config(warmup_tokens=64))
    result = recipe.measure(model, token_ids(1, 2001), tmp_path, repeats=1)
    assert result["next_token_bit_equal"]
    assert result["dense_bf16_bytes"] > 2 * 2 * 2 * 2000 * 64 * 2  # layers, sides, KV heads, tokens, head_dim, bytes
    assert result["packed_bytes"] == (tmp_path / "packed.safetensors").stat().st_size
    assert result["size_ratio"] < 0.3
    assert not hasattr(model, "_headq")


def test_the_stored_result_meets_its_bounds(recipe):
    result = json.loads((recipe.RESULT / "prompt_cache.json").read_text(encoding="utf-8"))
    assert (result["tokens"], result["model"]) == (4096, "smollm2")
    assert result["size_ratio"] <= 0.25 and result["speedup_over_recompute"] >= 5 and result["next_token_bit_equal"]
    assert f"read {result['speedup_over_recompute']:.0f} times faster" in tables.prompt_cache(result)
