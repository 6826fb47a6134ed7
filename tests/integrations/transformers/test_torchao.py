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


def test_other_configs_pass_through(tiny, token_ids):
    ids = token_ids(1, 40)

    def only_keys(module, name):
        return name.endswith("k_proj")

    for arguments in ({}, {"filter_fn": only_keys}, {"filter_fn": None}, {"device": "cpu"}):
        ours, theirs = tiny(), tiny()
        torchao.quantization.quantize_(theirs, Int8WeightOnlyConfig(version=2), **arguments)
        quantize_(ours, Int8WeightOnlyConfig(version=2), **arguments)
        kinds = [[type(m.weight) for m in x.modules() if isinstance(m, torch.nn.Linear)] for x in (ours, theirs)]
        assert kinds[0] == kinds[1]
        assert len(set(kinds[0])) == (2 if arguments.get("filter_fn") else 1)
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert not hasattr(ours, "_headq")


def test_whole_model_filter_of_torchao_reaches_the_handler(tiny, token_ids):
    """torchao's own function, with a filter that matches the root, does what ours does."""
    one, two, ids = tiny(), tiny(), token_ids(1, 90)
    torchao.quantization.quantize_(one, headq_config(**CACHE), filter_fn=lambda module, name: name == "")
    quantize_(two, headq_config(**CACHE))
    assert torch.equal(logits_of(one, ids)[0], logits_of(two, ids)[0])
