"""``recipes/prompt_cache.py`` on a tiny model, and the README's table from its stored result."""

import json

import pytest

from headq_ao import headq_config, quantize_
from headq_ao.evals.harness.table import fill_marks
from tests.conftest import ROOT, load_recipe


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


def test_the_stored_result_meets_its_bounds_and_is_in_the_readme(recipe):
    result = json.loads((recipe.RESULT / "prompt_cache.json").read_text(encoding="utf-8"))
    assert (result["tokens"], result["model"]) == (4096, "smollm2")
    assert result["size_ratio"] <= 0.25 and result["speedup_over_recompute"] >= 5 and result["next_token_bit_equal"]
    assert recipe.readme_table(result) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_without_marks(recipe, tmp_path):
    (tmp_path / "R.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no lines <!-- prompt_cache -->"):
        fill_marks(tmp_path / "R.md", "prompt_cache", lambda: pytest.fail("made a table"))
