"""Models with layers of several kinds: attention is packed, states stay as transformers has them."""

import copy

import pytest
import torch
from transformers import DynamicCache

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.evals.models.sweep_checks import OPTIONS, relative, stream
from headq_ao.evals.models.tiny import classes, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is falling back", "ignore:The attention mask")
LAYERS = {
    "qwen3_next": {"LinearAttentionLayer": 1, "packed": 1},
    "falcon_h1": {"packed": 2},
    "lfm2_moe": {"LinearAttentionLayer": 1, "packed": 1},
    "nemotron_h": {"LinearAttentionLayer": 1, "DummyLayer": 2, "packed": 1},
}


@pytest.fixture(params=LAYERS)
def models(request):
    model = tiny_model(*classes("causal")[request.param])
    dense = copy.deepcopy(model)
    quantize_(model, headq_config(**OPTIONS))
    return request.param, model, dense


def ids_of(batch=2, tokens=130):
    return torch.randint(5, 100, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_the_report_says_what_is_packed(models):
    name, model, _ = models
    cache = HeadQCache(model)
    stream(model, ids_of(), cache, [120, *[1] * 10])
    report = cache.bits_report()
    assert report.layers == LAYERS[name]
    assert report.fallback is None
    assert report.bytes["states"] > 0
    assert sum(report.bytes.values()) == cache.get_memory_footprint()


def test_states_cannot_step_back(models):
    _, model, _ = models
    cache = HeadQCache(model)
    stream(model, ids_of(), cache, [60, 1])
    with pytest.raises(RuntimeError, match=r"LinearAttention.*cannot step back"):
        cache.crop(-2)
    assert cache.get_seq_length() == 61
    assert not cache.is_croppable
    cache.crop(-61)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"cache that can be cropped|stateful models"):
        model.generate(ids_of(1, 40), max_new_tokens=8, prompt_lookup_num_tokens=3, do_sample=False)


def test_sequences_follow_beams(models):
    _, model, dense = models
    ids = ids_of()
    cache, plain = HeadQCache(model), DynamicCache(config=dense.config)
    stream(model, ids, cache, [100, 1])
    stream(dense, ids, plain, [100, 1])
    order = torch.tensor([1, 1, 0])
    cache.batch_select_indices(order)
    with torch.no_grad():
        found = model(input_ids=ids[order, 101:102], cache=cache).logits
        expected = dense(input_ids=ids[:, 101:102], cache=plain).logits[order]
    assert relative(found, expected) < 0.05


def test_a_cache_can_be_used_again_and_copied(models):
    _, model, _ = models
    ids, cache = ids_of(), HeadQCache(model)
    first = stream(model, ids, cache, [100, 1])
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        one, other = (model(input_ids=ids[:, 101:102], cache=c).logits for c in (cache, twin))
    assert torch.equal(one, other)
    cache.reset()
    assert torch.equal(stream(model, ids, cache, [100, 1]), first)


def test_a_call_that_fails_part_way_is_not_taken_for_whole(models):
    _, model, _ = models
    ids, cache = ids_of(), HeadQCache(model)
    stream(model, ids, cache, [100])
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(input_ids=ids[:, 100:101], cache=cache)
    handle.remove()
    assert cache.get_seq_length() == 101  # all layers took the token
