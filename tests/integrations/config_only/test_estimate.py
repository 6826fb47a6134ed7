"""What a cache would take, against caches that take it."""

import dataclasses

import pytest
import torch
import transformers

from headq_ao import HeadQCache, calibrate, estimate_memory, headq_config, quantize_
from headq_ao.integrations.config_only.estimate import assumed_calibration
from headq_ao.integrations.config_only.served import served
from tests.integrations.transformers.calling import OPTIONS, forward


def report_of(model, ids):
    """Of a real cache, without the kinds of its layers, which an estimate does not tell."""
    cache = HeadQCache(model)
    forward(model, ids, cache=cache)
    report = cache.bits_report()
    assert sum(report.bytes.values()) == cache.get_memory_footprint()
    return dataclasses.replace(report, layers={})


@pytest.mark.parametrize(
    ("family", "options", "tokens"),
    [
        ("llama", {}, 3), ("gemma3", {}, 300), ("llama", {"k_bits": 3, "v_bits": None}, 300),
        ("gemma3", {"preset": "headq_paper"}, 300),
    ],
    ids=str,
)  # fmt: skip
def test_an_estimate_is_what_the_cache_takes(tiny, token_ids, family, options, tokens):
    """Byte for byte, part by part, of the model as of its config."""
    model, config = tiny(family), headq_config(**OPTIONS | options)
    found = estimate_memory(model, config, tokens, batch_size=2)
    assert repr(found) == repr(estimate_memory(model.config, config, tokens, 2, dtype=torch.float32))
    quantize_(model, config)
    assert repr(found) == repr(report_of(model, token_ids(2, tokens)))  # by their texts: nan is not nan


def test_the_bits_of_heads_are_those_of_the_calibration(tiny, token_ids):
    model = tiny()
    known = calibrate(model, token_ids(2, 300), progress=False)
    config = headq_config(**OPTIONS, mean_bits=2.5, calibration=known)
    found = estimate_memory(model, config, 300)
    quantize_(model, config)
    assert found == report_of(model, token_ids(1, 300))


def test_an_assumed_calibration_takes_what_a_real_one_does(tiny, token_ids):
    model = tiny()
    real = calibrate(model, token_ids(2, 300), progress=False)
    config = headq_config(**OPTIONS)
    one, other = (
        estimate_memory(model, dataclasses.replace(config, calibration=known), 300)
        for known in (real, assumed_calibration(served(model.config, config).shapes))
    )
    assert one.bytes == other.bytes


@pytest.mark.parametrize(("tokens", "batch"), [(0, 1), (5, 0), (-1, 1)])
def test_counts_below_one_are_refused(tokens, batch):
    with pytest.raises(ValueError, match=f"must be at least 1, got {tokens} and {batch}"):
        estimate_memory(transformers.LlamaConfig(), headq_config(), tokens, batch)


def test_a_model_that_is_not_supported_has_no_estimate():
    with pytest.raises(ValueError, match="encoder-decoder models are not supported"):
        estimate_memory(transformers.T5Config(), headq_config(), 100)


def test_no_data_is_made(monkeypatch):
    """A million tokens of a large model take no memory of their own: all is on the meta device."""
    config = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=8)
    made, real = [], torch.empty

    def noted(*args, **kwargs):
        x = real(*args, **kwargs)
        made.append(0 if x.is_meta else x.numel())
        return x

    monkeypatch.setattr(torch, "empty", noted)
    report = estimate_memory(config, headq_config(), 10**6, 4)
    assert sum(report.bytes.values()) > 4 * 10**6 * 2 * 2 * 8 * 128 * 2 / 8 and max(made) < 10**6
