"""HeadQ beside torchao's own configs on one model."""

import copy

import pytest
import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup

from headq_ao import HeadQCache, headq_config, quantize_, restore_

CACHE = {"k_bits": 8, "v_bits": 8, "rank": 0, "epoch_tokens": 32, "residual_length": 32, "block_size": 16}


def logits_of(model, ids):
    cache = HeadQCache(model)
    with torch.no_grad():
        return torch.cat([model(part, cache=cache).logits for part in ids.split(40, 1)], 1), cache


@pytest.mark.parametrize("headq_first", [True, False])
def test_int8_weights_and_packed_cache(tiny, token_ids, headq_first):
    ids, weights_only = token_ids(2, 160), tiny(head_dim=64)
    torchao.quantization.quantize_(weights_only, Int8WeightOnlyConfig(version=2))
    with torch.no_grad():
        dense = weights_only(ids).logits
    model = tiny(head_dim=64)
    configs = [headq_config(**CACHE), Int8WeightOnlyConfig(version=2)]
    for config in configs if headq_first else configs[::-1]:
        quantize_(model, config)
    assert type(model.model.layers[0].self_attn.k_proj.weight) is not torch.nn.Parameter
    logits, cache = logits_of(model, ids)
    assert cache.packed_fraction > 0.25
    assert (logits - dense).norm() / dense.norm() < 0.04
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (2, 168)
    restore_(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("headq_first", [True, False])
def test_int4_weights_and_packed_cache(tiny, token_ids, headq_first):
    """torchao's packed int4 formats need a GPU; ``IntxWeightOnlyConfig`` computes the same codes on any device."""
    model, ids = tiny(head_dim=64, heads=8), token_ids(1, 160)
    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    weights_only = copy.deepcopy(model)
    torchao.quantization.quantize_(weights_only, int4)
    with torch.no_grad():
        dense = weights_only(ids).logits
    for config in (headq_config(**CACHE), int4) if headq_first else (int4, headq_config(**CACHE)):
        quantize_(model, config)
    logits, cache = logits_of(model, ids)
    assert cache.packed_fraction > 0.2
    assert (logits - dense).norm() / dense.norm() < 0.04
    restore_(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)


def test_whole_model_filter_of_torchao_reaches_the_handler(tiny, token_ids):
    """torchao's own function, with a filter that matches the root, does what ours does."""
    one, two, ids = tiny(), tiny(), token_ids(1, 90)
    torchao.quantization.quantize_(one, headq_config(**CACHE), filter_fn=lambda module, name: name == "")
    quantize_(two, headq_config(**CACHE))
    assert torch.equal(logits_of(one, ids)[0], logits_of(two, ids)[0])
