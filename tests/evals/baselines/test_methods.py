"""Baselines as codecs of HeadQ's cache: they read what they wrote, count what they hold, and keep its invariants."""

import pytest
import torch

from headq_ao import HeadQCache, restore_
from headq_ao.codecs import registry
from headq_ao.codecs.registry import LayerContext
from headq_ao.evals.baselines.codecs import Affine, LowRank
from headq_ao.evals.baselines.methods import METHODS
from headq_ao.evals.harness.subjects import Subject
from headq_ao.layer_shape import LayerShape

SIDES = {"k_bits": 2, "v_bits": 2}
CASES = [
    ("kivi", SIDES | {"k_group": 16, "v_group": 16}),
    ("kivi", SIDES | {"v_bits": None, "k_group": 16}),
    ("per_token", SIDES | {"group": 32, "k_bits": 3}),
    ("hadamard", SIDES | {"group": 32, "subtract_mean": True}),
    ("hadamard", SIDES | {"group": 32, "k_bits": None}),
    ("turboquant", SIDES | {"k_bits": 3}),
    ("squat", SIDES | {"k_group": 16, "v_group": 16, "rank": 4}),
    ("gear", SIDES | {"k_group": 16, "v_group": 16, "block": 16}),
]


def built(name, options, shape=None):
    shape = LayerShape(4, 2, 64, None) if shape is None else shape
    return registry.build(name, options, LayerContext(shape, 4, torch.device("cpu"))).prototype


def test_kivi():
    codec = built("kivi", {"k_bits": 2, "v_bits": 4, "k_group": 64, "v_group": 16})
    assert codec.sides == {"key": Affine(2, 64, per_channel=True), "value": Affine(4, 16)}
    assert codec.granularity == 64 and codec.aligned and not codec.captured


@pytest.mark.parametrize("name", METHODS)
def test_one_side(name):
    assert built(name, {"k_bits": None, "v_bits": 2}).packed_sides == ("value",)
    assert built(name, {"k_bits": 2, "v_bits": None}).packed_sides == ("key",)


def test_gear_is_a_residual_on_kivi():
    codec = built("gear", {"k_bits": 2, "v_bits": 2, "rank": 3, "block": 64})
    assert isinstance(codec.sides["key"], LowRank) and codec.sides["key"].rank == 3 and codec.granularity == 64


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kv", {}, "no codec 'kv' is registered; there are headq, .*kivi, per_token, hadamard"),
        ("kivi", {"k_bits": 2, "v_bits": 2, "bits": 2}, "kivi has no option bits; its options are k_bits, v_bits"),
        ("kivi", {"k_bits": 2}, "kivi needs v_bits"),
        ("hadamard", {"k_bits": 2, "v_bits": 2, "calibration": 1}, "has no option calibration"),
        ("kivi", {"k_bits": None, "v_bits": None}, "k_bits and v_bits are both None"),
        ("gear", {"k_bits": 2, "v_bits": 2, "k_group": 48}, "groups of 48 tokens must divide its blocks of 128"),
        ("kivi", {"k_bits": 2, "v_bits": 2, "v_group": 48}, "must divide head_dim 64, got 48"),
    ],
)
def test_refuses(name, options, message):
    with pytest.raises(ValueError, match=message):
        built(name, options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_reads_what_it_wrote(quantized, token_ids, name, options):
    """One layer: the output of the packed read is that of exact attention over the decoded rows."""
    model = quantized(name, options, layers=1)
    ids, cache = token_ids(2, 140), HeadQCache(model)
    model(ids[:, :120], cache=cache)
    layer, module = cache.layers[0], model.model.layers[0].self_attn
    seen = {}
    attend = layer.attend

    def spy(q, *rest):
        seen["q"], seen["out"] = q, attend(q, *rest)
        return seen["out"]

    layer.attend = spy
    model(ids[:, 120:121], cache=cache)
    packed = cache.batch.lengths.packed()
    k, v = layer.dequantize()
    expected = torch.nn.functional.scaled_dot_product_attention(
        seen["q"], k, v, scale=module.scaling, enable_gqa=True
    )  # fmt: skip
    assert packed == [(121 - 4 - 16) // layer.codec.granularity * layer.codec.granularity] * 2
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=1e-4)


def stored(layer):
    """What the pages of one sequence hold, by form: ``[1, Hkv, n / tokens, ..]`` of its packed tokens."""
    n, p = layer.batch.lengths.packed()[0], layer.batch.page_tokens
    pages = layer.block_table[0, : -(-n // p)].long()
    forms = layer.pool.layout.forms.items()
    return {
        name: t[pages].transpose(0, 1).flatten(1, 2)[None, :, : n // form.tokens]
        for (name, form), t in zip(forms, layer.pool.tensors, strict=True)
    }


@pytest.mark.parametrize(("name", "options"), CASES)
def test_codes_do_not_depend_on_calls(quantized, name, options):
    """They are those of all body tokens coded at once, by the codec of each side alone."""
    model = quantized(name, options, layers=1)
    shape = (1, 2, 150, 32)
    q, k, v = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    q = q.repeat_interleave(2, 1)
    for step in (150, 30, 7, 1):
        layer = HeadQCache(model).layers[0]
        calls = [slice(0, 60), *(slice(i, min(i + step, 150)) for i in range(60, 150, step))]  # SQuat reads the first
        for call in calls:
            layer.update(k[:, :, call], v[:, :, call])
            layer.commit(q[:, :, call])
        n = layer.batch.lengths.packed()[0]
        assert n == 130 // layer.codec.granularity * layer.codec.granularity
        found = stored(layer)
        for side, x in (("key", k), ("value", v)):
            codec = layer.codec.sides[side]
            body = x[:, :, 4 : 4 + n]
            expected = [body] if codec is None else codec.encode(body, layer.codec.frame(side))
            for a, b in zip((t for name, t in found.items() if name.startswith(side)), expected, strict=True):
                torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "mistral"])
def test_many_bits_are_nearly_exact(quantized, token_ids, family):
    model = quantized("kivi", {"k_bits": 8, "v_bits": 8, "k_group": 16, "v_group": 16}, family=family)
    ids, cache = token_ids(2, 160), HeadQCache(model)
    model(ids[:, :100], cache=cache)
    out = model(ids[:, 100:130], cache=cache).logits
    steps = [model(ids[:, i : i + 1], cache=cache).logits for i in range(130, 160)]
    assert cache.packed_fraction > 0.1
    restore_(model)
    torch.testing.assert_close(torch.cat([out, *steps], 1), model(ids).logits[:, 100:], atol=0.05, rtol=0.05)


def test_a_group_in_full_precision(quantized, token_ids):
    """Between W and W + G − 1 of the newest tokens are not packed."""
    model = quantized("kivi", SIDES | {"k_group": 32, "v_group": 16})
    cache, ids = HeadQCache(model), token_ids(1, 200)
    assert cache.batch.page_tokens == 32  # a page is of whole groups
    model(ids[:, :60], cache=cache)
    for i in range(60, 200):
        model(ids[:, i : i + 1], cache=cache)
        tail = i + 1 - 4 - cache.batch.lengths.packed()[0]
        assert 16 <= tail <= 16 + 32 - 1 or i < 52
    with pytest.raises(RuntimeError, match="32 tokens are coded together here, and the crop ends within them"):
        cache.crop(-70)
    cache.crop(-(200 - 4 - 96))
    assert cache.get_seq_length() == 100 and cache.batch.lengths.packed() == [96]


@pytest.mark.parametrize("name", ["kivi", "squat", "turboquant"])
def test_padding_and_reordering(quantized, token_ids, name):
    model = quantized(name, SIDES if name == "turboquant" else SIDES | {"k_group": 16, "v_group": 16})
    ids = token_ids(2, 130)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    cache = HeadQCache(model)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=at, cache=cache)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    grown = torch.cat([mask[[1, 0, 1]], mask.new_ones(3, 1)], 1)
    token = ids[[1, 0, 1], -1:]
    swapped = model(token, attention_mask=grown, position_ids=at[[1, 0, 1], -1:] + 1, cache=cache).logits
    torch.testing.assert_close(swapped[0], swapped[2])
    assert out.logits.isfinite().all()
    for row, prompt in ((0, ids[1:]), (1, ids[:1, 20:])):
        alone = HeadQCache(model)
        model(prompt, cache=alone)
        expected = model(prompt[:, -1:], cache=alone).logits
        torch.testing.assert_close(swapped[row], expected[0], atol=1e-3, rtol=1e-3)


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
    cache = HeadQCache(quantized(name, SIDES | options))
    cache._model()(token_ids(1, 200), cache=cache)
    report = cache.bits_report()
    assert (report.key_body_bits, report.value_body_bits) == (key, value)
    assert sum(report.bytes.values()) == cache.get_memory_footprint()


@pytest.mark.parametrize("batch", [1, 3])
def test_what_a_sequence_keeps_is_charged(tiny, token_ids, batch):
    subject = Subject("squat", SIDES | {"k_group": 16, "v_group": 32, "rank": 4, "residual_length": 16})
    model = tiny()
    with subject.on(model):
        cache = HeadQCache(model)
        model(token_ids(batch, 200), cache=cache)
        report = cache.bits_report().to_dict()
    bits = subject.bits(model, report)
    assert report["bytes"]["bases"] == batch * 2 * 2 * 32 * 4 * 2  # layers, heads, head_dim, rank, bytes
    assert bits["body"] == 3.5  # keys 2 + 32/16, values 2 + 32/32
    assert bits["at"]["4096"] == pytest.approx(3.5 + 8 * 1024 / (4096 * 2 * 2 * 32) / 2)
    assert bits["at"]["1024"] > bits["at"]["4096"] > bits["at"]["16384"] > 3.5


def test_memory_is_that_of_the_cache(tiny, token_ids):
    subject = Subject("kivi", SIDES | {"k_group": 32, "v_group": 32})
    model = tiny(seed=1).bfloat16()
    with subject.on(model):
        cache = HeadQCache(model)
        model(token_ids(1, 1024), cache=cache)
        report = cache.bits_report()
    held = sum(n for kind, n in report.bytes.items() if kind not in ("unused", "tables", "token_ids", "exact_rows"))
    held += 2 * 2 * 2 * 32 * 2 * int(report.exact_rows)  # layers, sides, heads, head_dim, bytes
    counted = subject.memory_bytes(model, subject.bits(model, report.to_dict()), report.to_dict())
    assert counted["1024"] == held


def test_large_values_have_no_unit_of_headq(quantized, token_ids):
    model = quantized("per_token", SIDES | {"group": 32})
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1e4
    cache = HeadQCache(model)
    out = model(token_ids(2, 140), cache=cache).logits
    assert out.isfinite().all() and min(cache.batch.lengths.packed()) > 0
    assert not any(layer.codec.own_tensors() for layer in cache.layers)
    assert sum(cache.bits_report().bytes.values()) == cache.get_memory_footprint()
