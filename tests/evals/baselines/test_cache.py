"""Baselines in HeadQ's cache: they read what they wrote, count what they hold, and keep the cache's invariants."""

import copy

import pytest
import torch

from headq_ao import calibrate, headq_config, quantize_, restore_
from headq_ao.evals.baselines.cache import BaselineCache
from headq_ao.evals.baselines.methods import build
from headq_ao.evals.subjects import Subject

SIDES = {"k_bits": 2, "v_bits": 2}
CASES = [
    ("kivi", SIDES | {"k_group": 16, "v_group": 16}),
    ("kivi", SIDES | {"v_bits": None, "k_group": 16}),
    ("per_token", SIDES | {"group": 32, "k_bits": 3}),
    ("hadamard", SIDES | {"group": 32, "gauge": True}),
    ("hadamard", SIDES | {"group": 32, "k_bits": None}),
    ("turboquant", SIDES | {"k_bits": 3}),
    ("squat", SIDES | {"k_group": 16, "v_group": 16, "rank": 4}),
    ("gear", SIDES | {"k_group": 16, "v_group": 16, "block": 16}),
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def quantized(tiny, token_ids):
    """``quantized(method, options, **model options)``: a model and what builds its caches."""

    def make(name, options, **model_options):
        model = tiny(**model_options)
        calibration = calibrate(model, [token_ids(3, 200, seed=9)], progress=False)
        quantize_(model, headq_config(block_size=16, residual_length=16))
        method = build(name, options, calibration)
        return model, lambda: BaselineCache(model, method)

    return make


@pytest.mark.parametrize(("name", "options"), CASES)
def test_reads_what_it_wrote(quantized, token_ids, name, options):
    """One layer: the output of the packed read is that of exact attention over the decoded rows."""
    model, make_cache = quantized(name, options, layers=1)
    ids, cache = token_ids(2, 140), make_cache()
    model(ids[:, :120], cache=cache)
    layer, module = cache.layers[0], model.model.layers[0].self_attn
    seen = {}
    attend = layer.attend

    def spy(q, scaling, codec, *view):
        seen["q"], seen["out"] = q, attend(q, scaling, codec, *view)
        return seen["out"]

    layer.attend = spy
    before = copy.deepcopy(layer.store_k.tensors)
    model(ids[:, 120:121], cache=cache)
    k, v = layer.dequantize(module.headq)
    expected = torch.nn.functional.scaled_dot_product_attention(
        seen["q"], k, v, scale=module.scaling, enable_gqa=True
    )  # fmt: skip
    assert layer.rows[0].packed == 96 and layer.store_k.tensors[0].shape == before[0].shape
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_codes_do_not_depend_on_calls(quantized, name, options):
    model, make_cache = quantized(name, options, layers=1)
    codec, shape = model.model.layers[0].self_attn.headq, (2, 2, 150, 32)
    q, k, v = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    q = q.repeat_interleave(2, 1)
    stored = []
    for step in (150, 30, 7):
        layer = make_cache().layers[0]
        calls = [slice(0, 60), *(slice(i, i + step) for i in range(60, 150, step))]  # one prompt: SQuat reads it
        for call in calls:
            layer.update(k[:, :, call], v[:, :, call])
            layer.commit(q[:, :, call], codec)
        slots = layer.rows[0].slots
        assert slots == 128
        stored.append([*layer.store_k.view(0, slots), *layer.store_v.view(0, slots)])
    for other in stored[1:]:
        for a, b in zip(stored[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "mistral"])
def test_many_bits_are_nearly_exact(quantized, token_ids, family):
    model, make_cache = quantized("kivi", {"k_bits": 8, "v_bits": 8, "k_group": 16, "v_group": 16}, family=family)
    ids, cache = token_ids(2, 160), make_cache()
    model(ids[:, :100], cache=cache)
    out = model(ids[:, 100:], cache=cache).logits
    assert cache.packed_fraction > 0.1
    restore_(model)
    torch.testing.assert_close(out, model(ids).logits[:, 100:], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["kivi", "squat"])
def test_padding_and_reordering(quantized, token_ids, name):
    model, make_cache = quantized(name, SIDES | {"k_group": 16, "v_group": 16})
    ids = token_ids(2, 130)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    cache = make_cache()
    out = model(ids, attention_mask=mask, cache=cache)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    grown = torch.cat([mask[[1, 0, 1]], mask.new_ones(3, 1)], 1)
    token = ids[[1, 0, 1], -1:]
    swapped = model(token, attention_mask=grown, cache=cache).logits
    torch.testing.assert_close(swapped[0], swapped[2])
    alone = make_cache()
    assert out.logits.isfinite().all()
    model(ids[1:], cache=alone)
    if name == "kivi":  # SQuat's directions come from the whole call, padding included
        expected = model(ids[1:, -1:], cache=alone).logits
        torch.testing.assert_close(swapped[0], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "key", "value"),
    [
        ("kivi", {"k_group": 16, "v_group": 16}, 2 + 32 / 16, 2 + 32 / 16),
        ("kivi", {"k_group": 16, "v_group": 32, "v_bits": 3}, 4.0, 4.0),
        ("per_token", {"group": 32}, 3.0, 3.0),
        ("turboquant", {}, 2 + 16 / 32, 2 + 16 / 32),
        ("gear", {"k_group": 16, "v_group": 32, "block": 16, "rank": 2}, 4 + 1 + 2, 3 + 1 + 2),
    ],
)
def test_bits_by_hand(quantized, token_ids, name, options, key, value):
    model, make_cache = quantized(name, SIDES | options)
    cache = make_cache()
    model(token_ids(1, 200), cache=cache)
    report = cache.bits_report()
    assert (report.key_body_bits, report.value_body_bits) == (key, value)
    assert sum(report.bytes.values()) == cache.get_memory_footprint()


def test_what_a_sequence_keeps_is_charged(tiny, token_ids):
    subject = Subject("squat", SIDES | {"k_group": 16, "v_group": 32, "rank": 4, "residual_length": 16})
    model = tiny()
    with subject.on(model) as make_cache:
        cache = make_cache()
        model(token_ids(1, 200), cache=cache)
        report = cache.bits_report().to_dict()
    bits = subject.bits(model, report)
    assert report["bytes"]["bases"] == 2 * 2 * 32 * 4 * 2  # layers, heads, head_dim, rank, bytes
    assert bits["body"] == 3.5  # keys 2 + 32/16, values 2 + 32/32
    assert bits["at"]["4096"] == pytest.approx(3.5 + 8 * 1024 / (4096 * 2 * 2 * 32) / 2)
    assert bits["at"]["1024"] > bits["at"]["4096"] > bits["at"]["16384"] > 3.5


def test_memory_is_that_of_the_cache(tiny, token_ids):
    subject = Subject("kivi", SIDES | {"k_group": 32, "v_group": 32})
    model = tiny(seed=1).bfloat16()
    with subject.on(model) as make_cache:
        cache = make_cache()
        model(token_ids(1, 1024), cache=cache)
        report = cache.bits_report()
    held = cache.get_memory_footprint() - report.bytes["unused"]
    counted = subject.memory_bytes(model, subject.bits(model, report.to_dict()), report.to_dict())
    assert counted["1024"] == held


def test_refuses(tiny):
    model = tiny()
    quantize_(model, headq_config(block_size=32))
    with pytest.raises(ValueError, match="block_size must be a multiple of the 64 tokens that this method groups"):
        BaselineCache(model, build("kivi", SIDES | {"k_group": 64, "v_group": 32}))
    with pytest.raises(ValueError, match="must divide head_dim 32, got 64"):
        BaselineCache(model, build("kivi", SIDES | {"k_group": 32, "v_group": 64}))


def test_large_values_have_no_unit_of_headq(quantized, token_ids):
    model, make_cache = quantized("per_token", SIDES | {"group": 32})
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1e4
    cache = make_cache()
    model(token_ids(2, 140), cache=cache)
    assert all(layer.value_codec is None and layer.rows[0].packed for layer in cache.layers)
    assert sum(cache.bits_report().bytes.values()) == cache.get_memory_footprint()
