"""What every neighbour of HeadQ keeps as a codec of its cache."""

import pytest
import torch

from headq_ao import HeadQCache
from headq_ao.codecs import registry
from headq_ao.evals.baselines.neighbours import ALL
from headq_ao.evals.harness.subjects import Subject

TWO = {"k_bits": 2, "v_bits": 2}
GROUPS = TWO | {"k_group": 16, "v_group": 16}
CASES = {
    "trellis": ("trellis", TWO),
    "trellis_1bit_values": ("trellis", {"k_bits": None, "v_bits": 1}),
    "trellis_headq": ("trellis", TWO | {"basis": "headq"}),
    "trellis_unbiased": ("trellis", {"k_bits": 4, "v_bits": None, "unbiased": False}),
    "residual_vq": ("residual_vq", {"books": 3}),
    "residual_vq_keys": ("residual_vq", {"books": 4, "values": False}),
    "side_code_on_trellis": ("side_code", {"base": "trellis", "base_options": TWO | {"v_bits": None}, "rank": 8}),
    "side_code_on_groups": ("side_code", {"base": "kivi", "base_options": GROUPS, "rank": 4, "sign": -1}),
    "side_code_matched": ("side_code", {"base": "trellis", "base_options": TWO, "rank": 8, "basis": "matched"}),
    "kvlinc_base": ("kvlinc_base", {}),
    "int4": ("int4_per_token_head", {}),
    "k8v4": ("turboquant_k8v4", {}),
    "3bit_nc": ("turboquant_3bit_nc", {}),
}
EXACT = 16.0


@pytest.fixture(params=CASES)
def case(request, quantized, books):
    """``case(**model options)``: a model with one of :data:`CASES`."""
    name, options = CASES[request.param]

    def make(layers=2, **model_options):
        own = {"codebooks": books(layers, **model_options)} if name == "residual_vq" else {}
        return quantized(name, options | own, layers=layers, **model_options)

    make.name = request.param
    return make


def test_all_are_registered():
    assert set(ALL) <= set(registry.names()) and len(set(ALL)) == len(ALL)


def test_reads_what_it_wrote(case, token_ids):
    """Attention over the packed tokens is exact attention over what they stand for."""
    model = case(layers=1)
    ids, cache = token_ids(2, 320), HeadQCache(model)
    model(ids[:, :300], cache=cache)
    layer, module, seen = cache.layers[0], model.model.layers[0].self_attn, {}
    attend = layer.attend

    def spy(q, *rest):
        seen["q"], seen["out"] = q, attend(q, *rest)
        return seen["out"]

    layer.attend = spy
    model(ids[:, 300:301], cache=cache)
    k, v = layer.dequantize()
    expected = torch.nn.functional.scaled_dot_product_attention(
        seen["q"], k, v, scale=module.scaling, enable_gqa=True
    )  # fmt: skip
    assert min(cache.batch.lengths.packed()) >= 128
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=1e-4)


def test_codes_do_not_depend_on_calls(case):
    model = case(layers=1)
    q, k, v = (torch.randn(1, 2, 300, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    q, found = q.repeat_interleave(2, 1), []
    for step in (300, 30, 1):
        layer = HeadQCache(model).layers[0]
        for i in range(0, 300, step):
            layer.update(k[:, :, i : i + step], v[:, :, i : i + step])
            layer.commit(q[:, :, i : i + step])
        n = layer.batch.lengths.packed()[0] // layer.codec.granularity * layer.codec.granularity
        pages = layer.block_table[0, : n // layer.batch.page_tokens].long()
        found.append([t[pages] for t in layer.pool.tensors])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=0, rtol=0)


def test_files_hold_it_all(case, token_ids, tmp_path):
    model, ids = case(), token_ids(2, 340)
    cache = HeadQCache(model)
    model(ids[:, :300], cache=cache)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = HeadQCache.load(tmp_path / "prompt.safetensors", model)
    assert loaded.bits_report() == cache.bits_report()
    a, b = (model(ids[:, 300:], cache=c).logits for c in (cache, loaded))
    torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_generates(case, token_ids):
    model, ids = case(), token_ids(2, 200)
    out = model.generate(ids, max_new_tokens=150, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 350) and torch.equal(out[:, :200], ids)


def test_padding_and_order_do_not_matter(case, token_ids):
    model, ids = case(), token_ids(2, 300)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    cache = HeadQCache(model)
    model(ids, attention_mask=mask, position_ids=at, cache=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    grown = torch.cat([mask[[1, 0]], mask.new_ones(2, 1)], 1)
    token = ids[[1, 0], -1:]
    out = model(token, attention_mask=grown, position_ids=at[[1, 0], -1:] + 1, cache=cache).logits
    for row, prompt in ((0, ids[1:]), (1, ids[:1, 20:])):
        alone = HeadQCache(model)
        model(prompt, cache=alone)
        torch.testing.assert_close(out[row], model(prompt[:, -1:], cache=alone).logits[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("name", "options", "key", "value"),
    [
        ("trellis", TWO, 2 + 16 / 32, 2 + 16 / 32),
        ("trellis", TWO | {"basis": "headq", "k_bits": 1}, 1 + 16 / 32, 2 + 16 / 32),
        ("residual_vq", {"books": 3}, 24 / 32 + 16 / 32, 24 / 32 + 16 / 32),  # three indices of 6 bits are 3 bytes
        ("side_code", {"base": "kivi", "base_options": GROUPS, "rank": 8}, 2 + 32 / 16 + 16 / 32, 2 + 32 / 16),
        ("kvlinc_base", {}, 2 + 32 / 128, 2 + 32 / 32),
        ("int4_per_token_head", {}, 4 + 32 / 32, 4 + 32 / 32),
        ("turboquant_k8v4", {}, (8 + 4 * EXACT) / 5, (4 + 32 / 32 + 4 * EXACT) / 5),
        ("turboquant_4bit_nc", {}, (4 + 16 / 32 + 4 * EXACT) / 5, (4 + 32 / 32 + 4 * EXACT) / 5),
        ("turboquant_k3v4_nc", {}, (3 + 16 / 32 + 4 * EXACT) / 5, (4 + 32 / 32 + 4 * EXACT) / 5),
        ("turboquant_3bit_nc", {}, (3 + 16 / 32 + 4 * EXACT) / 5, (3 + 32 / 32 + 4 * EXACT) / 5),
    ],
)
def test_bits_by_hand(quantized, books, token_ids, name, options, key, value):
    own = {"codebooks": books(2)} if name == "residual_vq" else {}
    model = quantized(name, options | own, layers=5 if name.startswith("turboquant") else 2)
    cache = HeadQCache(model)
    model(token_ids(1, 300), cache=cache)
    report = cache.bits_report()
    assert (report.key_body_bits, report.value_body_bits) == pytest.approx((key, value))
    own = 8 * report.bytes.get("bases", 0) / (report.packed_rows * 2 * 2 * 32)  # steps of a side code, of keys
    assert (report.key_stored_bits, report.value_stored_bits) == pytest.approx((key + own, value))
    assert sum(report.bytes.values()) == cache.get_memory_footprint()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trellis", {"k_bits": 3, "v_bits": 2}, "a trellis has 1, 2, 4 bits, got 3"),
        ("trellis", {"k_bits": None, "v_bits": None}, "k_bits and v_bits are both None"),
        ("trellis", TWO | {"basis": "whitened"}, "basis must be 'rotated' or 'headq'"),
        ("trellis", TWO | {"basis": "headq"}, "HeadQ's basis is made of a calibration"),
        ("rdkv", {"bits": 0}, "the budget must be above 0"),
        ("rdkv", {"choices": [2, 4]}, "choices must be 0, so that a budget can be kept.*got 2, 4"),
        ("rdkv", {"later_bits": 3}, "bits of a token must be 2, 4, 8, 16, got 3"),
        ("rdkv", {"key_share": 1.0}, "key_share must be between 0 and 1"),
        ("random_eviction", {"kept_bits": 0}, "bits of a token must be"),
        ("residual_vq", {"codebooks": "nowhere.safetensors"}, "no residual vq file at"),
        ("side_code", {"base": "trellis", "base_options": TWO}, "a side code's directions are those of a calibration"),
        ("kvlinc", {"argument": "value"}, "argument must be 'key' or 'residual'"),
        ("kvlinc", {"maps": "nowhere.safetensors"}, "no kvlinc key maps file at"),
    ],
)
def test_refuses(tiny, name, options, message):
    subject, model = Subject(name, options), tiny()
    with pytest.raises((ValueError, FileNotFoundError), match=message), subject.on(model):
        pass
    assert not hasattr(model, "_headq")
