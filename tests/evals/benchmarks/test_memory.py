"""The memory command's counting, on a tiny model."""

import torch

from headq_ao import headq_config, quantize_
from headq_ao.evals.benchmarks import memory


def test_counts_agree_with_the_cache(tiny, token_ids):
    model = tiny(head_dim=64)
    quantize_(model, headq_config(warmup_tokens=32, residual_length=32))
    result = memory.measure(model, token_ids(1, 300), 100, 50, progress=False)
    layers = model.config.num_hidden_layers
    width = model.config.num_key_value_heads * 64 * torch.float32.itemsize
    assert result["dense_bytes"] == 2 * 300 * layers * width
    assert result["packed_bytes"] == sum(result["report"]["bytes"].values())
    assert result["ratio"] < 0.5


def test_bad_arguments_end_before_work(capsys):
    assert memory.main(["--tokens", "10", "--prefill", "20", "--text", "bundled"]) == 2
    assert "prefill must lie in 1…10" in capsys.readouterr().err
