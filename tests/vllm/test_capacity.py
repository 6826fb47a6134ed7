"""Tokens that fit, as vLLM itself counts them, in SmolLM2's shape."""

import pytest
import torch

from headq_ao.evals.vllm.engine import pages
from tests.vllm import checkpoints
from tests.vllm.engines import PLAIN, headq_options, start, stop

SHAPE = {"num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
OPTIONS = {"dtype": "bfloat16", "block_size": None, "max_model_len": 8192, "kv_cache_memory_bytes": 256 << 20}


def tokens(folder, **options):
    llm = start(folder, **OPTIONS | options)
    try:
        return pages(llm)["tokens"]
    finally:
        stop(llm)


@pytest.mark.skipif(PLAIN, reason="a ratio to vLLM's own cache")
def test_five_times_as_many_tokens_fit(tmp_path):
    model = checkpoints.llama(**SHAPE, max_position_embeddings=8192, initializer_range=0.03)
    calibration = checkpoints.save_calibration(tmp_path / "c.safetensors", model, tokens=2048)
    folder = checkpoints.save(tmp_path / "model", model.to(torch.bfloat16))
    exact = tokens(folder)
    assert exact == pytest.approx(OPTIONS["kv_cache_memory_bytes"] / (6 * 3 * 64 * 2 * 2), rel=0.01)
    assert tokens(folder, **headq_options(calibration, window=64)) / exact >= 5.0
