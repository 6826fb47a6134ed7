"""One class of each family and mechanism through the sweep's checks, and the table that the whole sweep has stored."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from headq_ao import calibrate, headq_config, quantize_
from headq_ao.evals.models.sweep import TABLES, entries, one
from headq_ao.evals.models.tiny import classes, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own, about configs, kernels and padding
TABLE = Path(__file__).parents[3] / "recipes" / "results" / "sweep" / "models.json"
KINDS = {
    "llama": "native", "gpt2": "native", "mixtral": "native", "gemma3_text": "native", "laguna": "native",
    "qwen3_next": "native", "falcon_h1": "native", "lfm2_moe": "native", "nemotron_h": "native",
    "gpt_oss": "native", "mimo_v2_flash": "native", "deepseek_v3": "native", "bailing_hybrid": "native",
    "gemma2": "native", "gemma3n_text": "native", "bloom": "fallback", "gemma4_text": "native",
    "deepseek_v32": "fallback", "deepseek_v4": "fallback", "llama4": "native",
    "dory": "fallback", "zamba2": "fallback", "doge": "fallback",
    "mamba": "refused", "bart": "refused",
}  # fmt: skip
IMAGES = {"llava_onevision": "native", "qwen3_vl": "native", "paligemma": "native", "mllama": "refused"}
REASONS = {
    "bart": "cross-attention", "bigbird_pegasus": "cross-attention", "marian": "cross-attention",
    "mllama": "cross-attention", "whisper": "cross-attention", "minimax": "cache of its own class, MiniMaxCache",
    "cpmant": r"\(1, 4, 34, 16\) for 2 tokens", "mamba": "no KV cache", "falcon_mamba": "no KV cache",
    "rwkv": "no KV cache", "xlstm": "no KV cache", "recurrent_gemma": "no KV cache", "openai-gpt": "no KV cache",
    "blt": "describes no cache",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_causal_models(name):
    found = one("causal", name)
    assert (found["kind"], found["wrong"]) == (KINDS[name], []), found


@pytest.mark.parametrize("name", IMAGES)
def test_models_with_images_given_text(name):
    found = one("images", name)
    assert (found["kind"], found["wrong"]) == (IMAGES[name], []), found


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    model = tiny_model(*classes("causal")[name])
    with pytest.raises(ValueError, match=REASONS[name]) as error:
        quantize_(model, headq_config())
    assert "not supported" in str(error.value)
    with pytest.raises(ValueError, match=REASONS[name]):
        calibrate(model, [torch.arange(5, 60)], progress=False)


def test_the_stored_table_is_of_these_versions_and_whole():
    table = json.loads(TABLE.read_text())
    if table["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {table['transformers']}")
    assert {(e["mapping"], e["name"]) for e in table["classes"]} == {(m, n) for m in TABLES for n in entries(m)}
    assert not [e["name"] for e in table["classes"] if e.get("wrong") or e["kind"] == "crash"]
    right = {
        (m, kind): sum(e["mapping"] == m and e["kind"] == kind for e in table["classes"])
        for m in TABLES
        for kind in ("native", "fallback")
    }
    assert right["causal", "native"] >= 110
    assert right["causal", "native"] + right["causal", "fallback"] >= 150
    assert right["images", "native"] + right["images", "fallback"] >= 75
    assert right["pixels", "native"] + right["pixels", "fallback"] == len(entries("pixels"))
    assert all(len(e["commit"]) == 40 and e["command"] for e in table["classes"])
