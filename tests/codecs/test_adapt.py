"""``adapt="prompt"``: a calibrated key mean that each prompt refines, one more codec id in the pages."""

import pytest
import torch

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.codecs.base import head_groups

WARMUP, SINKS, BLOCK = 64, 4, 16
OPTIONS = {"adapt": "prompt", "prior_tokens": 40, "warmup_tokens": WARMUP, "residual_length": 16, "block_size": BLOCK}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def calibrated(tiny, token_ids):
    """``calibrated(options)``: a model whose keys' mean moves from text to text."""
    model = tiny(layers=1)
    known = calibrate(model, list(token_ids(4, 256, seed=5).split(1)), progress=False)

    def make(options):
        if hasattr(model, "_headq"):
            restore_(model)
        quantize_(model, headq_config(calibration=known, **options))
        return model

    return make


def states(batch=2, tokens=200):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, h, tokens, 32, generator=g) for h in (4, 2, 2))
    return q, k + torch.randn(batch, 2, 1, 32, generator=g), v  # each sequence and head has a mean of its own


def feed(layer, q, k, v, calls):
    outs, at = [], 0
    for n in calls:
        part = slice(at, at + n)
        at += n
        layer.update(k[:, :, part], v[:, :, part])
        if layer.batch.lengths.first:
            layer.commit(q[:, :, part], 1.0)
        else:
            outs.append(layer.attend(q[:, :, part], 1.0, k[:, :, part], v[:, :, part]))
    return torch.cat(outs, 2) if outs else None


@pytest.mark.parametrize("options", [{}, {"k_bits": 3}, {"k_bits": 2, "key_codec": "affine"}, {"v_bits": None}])
def test_pages_behind_the_first_have_a_refined_mean(calibrated, options):
    layer = HeadQCache(calibrated(OPTIONS | options)).layers[0]
    q, k, v = states()
    feed(layer, q, k, v, (200,))
    source, codec = layer.source, layer.codec
    assert layer.batch.lengths.packed() == [176, 176] and codec.name == "HeadQ with adapt='prompt'"
    known = source.calibrated
    unit = 1.0 if known.unit is None else known.unit
    mean = (40 * known.mean + k[:, :, SINKS : SINKS + WARMUP].sum(2) / unit) / (40 + WARMUP)
    torch.testing.assert_close(codec.keys.mean.float(), mean, atol=2e-3, rtol=2e-3)
    assert layer.pool.segment[layer.block_table[0].long()].tolist()[:11] == [0] * 4 + [1] * 7
    body = k[:, :, SINKS : SINKS + 176]
    coded = {c: decoded(c, body) for c in (codec.first, codec.keys)}
    expected = torch.cat([coded[codec.first][:, :, :WARMUP], coded[codec.keys][:, :, WARMUP:]], 2)
    rows, _ = layer.dequantize()
    torch.testing.assert_close(rows[:, :, SINKS : SINKS + 176], expected, atol=1e-5, rtol=1e-5)
    error = [(coded[c] - body)[:, :, WARMUP:].square().mean() for c in (codec.keys, codec.first)]
    assert error[0] < 0.9 * error[1]


def decoded(codec, x):
    """What keys are read as, coded by the codec of each head group alone."""
    parts = []
    for group in head_groups(codec, None):
        codes, scale, zero = group.keys.quantize(x[:, group.heads], True)
        zero = None if zero is None else zero.half()
        parts.append(group.keys.dequantize(codes, scale.half(), zero))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("calls", [(200,), (30, *(1,) * 170), (90, 50, 60), (1, 150, *(1,) * 49)])
def test_codes_and_reads_do_not_depend_on_calls(calibrated, calls):
    model = calibrated(OPTIONS)
    q, k, v = states()
    layers = [HeadQCache(model).layers[0] for _ in range(2)]
    for layer, how in zip(layers, ((200,), calls), strict=True):
        feed(layer, q, k, v, how)
        feed_more(layer, q, k, v)
    one, other = layers
    for a, b in zip(one.pool.every, other.pool.every, strict=True):
        pages = [layer.block_table[:, :11].long() for layer in layers]
        assert torch.equal(a[pages[0]], b[pages[1]])
    assert torch.equal(one.codec.keys.mean, other.codec.keys.mean)


def feed_more(layer, q, k, v):
    """One token more, read from what is packed: the output is that of exact attention over the decoded rows."""
    new_q, new_k, new_v = (x[:, :, :1] for x in (q, k, v))
    layer.update(new_k, new_v)
    out = layer.attend(new_q, 1.0, new_k, new_v)
    rows, values = layer.dequantize()
    expected = torch.nn.functional.scaled_dot_product_attention(new_q, rows, values, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


def test_sequences_keep_their_own(calibrated, token_ids, tmp_path):
    model, ids = calibrated(OPTIONS), token_ids(2, 150)
    cache, alone = HeadQCache(model), HeadQCache(model)
    model(ids, cache=cache)
    model(ids[1:], cache=alone)
    report = cache.bits_report()
    assert report.bytes["bases"] == 2 * 2 * 32 * 2 and report.key_bits_at_t > report.key_body_bits
    cache.reorder_cache(torch.tensor([1, 0]))
    path = tmp_path / "prompt.safetensors"
    cache.save(path)
    again = HeadQCache.load(path, model)
    for i in range(40):
        step = ids[[1, 0], i : i + 1]
        out = model(step, cache=cache).logits
        assert torch.equal(out, model(step, cache=again).logits)
        torch.testing.assert_close(out[:1], model(step[:1], cache=alone).logits, atol=1e-4, rtol=1e-4)
    assert sum(cache.bits_report().bytes.values()) == cache.get_memory_footprint()


def test_short_prompts_are_in_full_precision(calibrated, token_ids):
    model = calibrated(OPTIONS)
    cache, ids = HeadQCache(model), token_ids(1, SINKS + 16 + WARMUP)
    model(ids[:, :-1], cache=cache)
    assert cache.batch.lengths.packed() == [0]
    model(ids[:, -1:], cache=cache)
    cache.batch.settle()
    assert cache.batch.lengths.packed() == [WARMUP] and cache.layers[0].codec.keys.own == {"mean"}


def test_off_is_without(calibrated):
    model = calibrated(OPTIONS | {"subtract_key_mean": False})
    layer = HeadQCache(model).layers[0]  # there is no mean to refine
    feed(layer, *states(), (100,))
    assert layer.codec.segments == 1 and layer.codec.captured and layer.pool.segment is None
