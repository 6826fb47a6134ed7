"""``cache_bytes``: the most bits whose cache of that context and batch fits, chosen before the first token."""

import dataclasses
import itertools
import json

import pytest
import torch
from torchao.core.config import config_from_dict, config_to_dict
from transformers import AutoModelForCausalLM

from headq_ao import HeadQCache, HeadQConfig, calibrate, estimate_memory, headq_config, quantize_, restore_
from headq_ao.integrations.config_only.estimate import within_budget

CONTEXT, BATCH = 700, 2
BETWEEN = (1.7, 3.6)  # bits per element of a budget, full-precision tokens aside


def filled(model, config, ids, sizes):
    """The footprint of a cache that holds those tokens, which is what its report sums to."""
    quantize_(model, config)
    cache = HeadQCache(model)
    with torch.no_grad():
        for part in ids.split(sizes, 1):
            model(part, cache=cache)
    chosen = cache.config
    restore_(model)
    held = sum(cache.bits_report().bytes.values())
    assert held == cache.get_memory_footprint()
    return held, chosen


def richer(chosen, parts):
    """The next setting after ``chosen``."""
    if chosen.mean_bits is not None:
        return dataclasses.replace(chosen, mean_bits=chosen.mean_bits + 1 / parts)
    levels = chosen.levels("v")
    pairs = sorted([(b, b) for b in levels] + [(k, v) for v, k in itertools.pairwise(levels)], key=sum)
    k, v = pairs[pairs.index((chosen.k_bits, chosen.v_bits)) + 1]
    return dataclasses.replace(chosen, k_bits=k, v_bits=v)


def plain_values(options):
    """Whether values cannot have one bit."""
    return options.get("block_size", 32) < 32


@pytest.mark.parametrize("bits", BETWEEN)
@pytest.mark.parametrize(("family", "options"), [
    ("gemma3", {}), ("llama", {"block_size": 16, "residual_length": 32}), ("llama", {"key_codec": "affine", "rank": 5})
], ids=str)  # fmt: skip
@pytest.mark.parametrize("known", [False, True], ids=["uncalibrated", "calibrated"])
def test_as_much_as_fits(tiny, token_ids, family, options, known, bits):
    model, ids = tiny(family), token_ids(BATCH, CONTEXT)
    calibration = calibrate(model, [token_ids(2, 300, seed=9)], progress=False) if known else None
    bits = max(bits, 2.1) if plain_values(options) else bits
    plain = headq_config(**options, v_bits=2, k_bits=2, calibration=calibration)
    base = sum(estimate_memory(model, plain, CONTEXT, BATCH).bytes.values())
    per_bit = BATCH * CONTEXT * 2 * 2 * 2 * 32 / 8  # layers, sides, heads, dim
    budget = int(base + (bits - 2) * per_bit)
    config = headq_config(
        **options, calibration=calibration, cache_bytes=budget, context_length=CONTEXT, batch_size=BATCH
    )
    at_once, chosen = filled(model, config, ids, CONTEXT)
    token_by_token, _ = filled(model, config, ids, [400, 190] + [5] * 22)
    assert at_once <= budget and token_by_token <= budget
    assert chosen == within_budget(model, config) and (chosen.mean_bits is not None) == known
    assert sum(estimate_memory(model, config, CONTEXT, BATCH).bytes.values()) == at_once
    next_one, _ = filled(model, richer(chosen, parts=8), ids, CONTEXT)
    assert next_one > budget


@torch.no_grad()
def test_more_tokens_than_expected_still_go_in(tiny, token_ids):
    model, ids, found = tiny(), token_ids(2, 600), []
    budget = headq_config(cache_bytes="900kB", context_length=400, batch_size=2)
    chosen = within_budget(model, budget)
    for config in (budget, dataclasses.replace(chosen, context_length=None)):
        quantize_(model, config)
        cache = HeadQCache(model)
        found.append(torch.cat([model(part, cache=cache).logits for part in ids.split([380] + [20] * 11, 1)], 1))
        assert cache.get_seq_length() == 600 and cache.packed_fraction > 0
        restore_(model)
    assert torch.equal(*found)


def test_nothing_fits(tiny):
    model = tiny()
    config = headq_config(cache_bytes="20KiB", context_length=4096, batch_size=3)
    with pytest.raises(ValueError, match="no room for 3 sequences of 4,096 tokens") as raised:
        quantize_(model, config)
    assert not hasattr(model, "_headq")
    least = int(str(raised.value).split("its cache takes ")[1].split(" bytes")[0].replace(",", ""))
    with pytest.raises(ValueError, match=f"takes {least:,} bytes"):
        quantize_(model, dataclasses.replace(config, cache_bytes=least - 1))
    quantize_(model, dataclasses.replace(config, cache_bytes=least))
    assert (model._headq.config.k_bits, model._headq.config.v_bits) == (1, 1)


@pytest.mark.parametrize(("options", "message"), [
    ({"cache_bytes": "8GiB"}, "cache_bytes needs context_length"),
    ({"cache_bytes": "8 tons", "context_length": 8}, "cache_bytes must be a size such as 8GiB or 500MB"),
    ({"cache_bytes": 0, "context_length": 8}, "cache_bytes must be a size"),
    ({"cache_bytes": True, "context_length": 8}, "cache_bytes must be a size"),
    ({"cache_bytes": 2.5, "context_length": 8}, "cache_bytes must be a size"),
    ({"cache_bytes": 8, "context_length": 8, "preset": "quality"}, "preset='quality' would too; leave one of them"),
    ({"cache_bytes": 8, "context_length": 8, "k_bits": 2}, "and k_bits would too; leave one of them out"),
    ({"cache_bytes": 8, "context_length": 8, "v_bits": None}, "and v_bits would too"),
    ({"cache_bytes": 8, "context_length": 8, "mean_bits": 2.25}, "and mean_bits would too"),
    ({"cache_bytes": 8, "context_length": 0}, "context_length must be a whole number of at least 1"),
    ({"cache_bytes": 8, "context_length": 8, "batch_size": 1.5}, "batch_size must be a whole number of at least 1"),
    ({"batch_size": 2}, "batch_size says for how many sequences cache_bytes is"),
    ({"cache_bytes": 8, "context_length": 8, "codec": "kivi"}, "cache_bytes shape HeadQ's own codec"),
], ids=str)  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(ValueError) as raised:
        headq_config(**options)
    assert message in str(raised.value)


def test_through_json_and_a_checkpoint(tiny, token_ids, tmp_path):
    config = headq_config(cache_bytes="450 kB", context_length=CONTEXT, batch_size=BATCH)
    assert config.cache_bytes == 450_000 and config == HeadQConfig(
        cache_bytes=450_000, context_length=CONTEXT, batch_size=BATCH
    )
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    model, ids = tiny(), token_ids(BATCH, CONTEXT)
    quantize_(model, config)
    chosen = model._headq.config
    assert chosen.cache_bytes is None and model.config.quantization_config.config == config
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.config == config and again._headq.config == chosen
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
