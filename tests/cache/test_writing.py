"""How a layer takes tokens: what it refuses, what waits for attention or statistics, and what is packed of it."""

import gc
import weakref

import pytest
import torch

from headq_ao.cache.schedule import Span
from tests.cache.streams import D, Engine, chunks, relative, softmax_attention, stream
from tests.cache.test_invariants import assert_same_state, make
from tests.cache.test_state import KINDS


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("n", [1, 10, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_tokens_are_refused(kind, n, bad, name):
    """By sequence and slot, and nothing changes: in a prepared step, in a general one, and in a long chunk."""
    engine, other = make(kind), make(kind)
    q, k, v = stream(3)
    for x in (engine, other):
        x.feed(*(y[:, :, :150] for y in (q, k, v)), [140, *[1] * 10])
    spoilt = {"keys": k.clone(), "values": v.clone()}
    spoilt[name][2, 1, 149 + n, 3] = bad
    keys = spoilt["keys"] if name == "keys" else k
    values = spoilt["values"] if name == "values" else v
    part = slice(150, 150 + n)
    with pytest.raises(ValueError, match=f"{name} must be finite.* in sequence 2"):
        engine.call(q[:, :, part], keys[:, :, part], values[:, :, part])
    assert engine.layer.seen == engine.lengths.seen == 150, "a refused call must not enter the cache"
    for x in (engine, other):
        x.feed(*(y[:, :, 150:] for y in (q, k, v)), [1, 1, 100, 48])
    for b in range(3):
        assert_same_state(engine, other, b, b)


def test_padding_may_hold_anything():
    engine = make("calibrated")
    q, k, v = stream(2, 60)
    k[1, :, :20] = v[1, :, 50:] = float("nan")
    engine.call(q, k, v, [Span(0, 60), Span(20, 50)])
    with pytest.raises(ValueError, match="in sequence 1 from slot 60 on"):
        engine.call(q, k, v, [Span(0, 60), Span(19, 50)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_tokens_whose_sum_is_not_are_taken(dtype):
    engine = make("calibrated")
    q, k, v = (x.to(dtype) for x in stream(2, 60))
    v[:, :, 20:40] = torch.finfo(dtype).max
    engine.call(q, k, v)
    assert engine.lengths.totals() == [60, 60]


def test_unchecked_tokens_are_taken_as_they_are():
    engine = Engine.make({"check_finite": False}, True)
    q, k, v = stream(1, 100)
    k[:, :, 50] = float("inf")
    engine.feed(q, k, v, [90, *[1] * 10])
    assert engine.lengths.totals() == [100]


def test_wrong_shapes_are_refused():
    engine = make("calibrated")
    q, k, v = stream()
    for keys, values in ((k[:, :1], v[:, :1]), (k, v[..., :16]), (k, v[:, :, 1:])):
        with pytest.raises(ValueError, match=r"this layer caches 2 heads of 32, got keys \(1, .*use a cache made for"):
            engine.layer.update(keys, values)
    assert engine.lengths.seen == 0
    engine.call(q, k, v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 9, 60])
def test_calls_that_no_engine_announces(kind, n):
    """A layer begins them by itself."""
    engine, other = make(kind), make(kind)
    q, k, v = stream(1, 260)
    at = 0
    for size in (200, *[n] * (60 // n)):
        part = [x[:, :, at : at + size] for x in (q, k, v)]
        engine.layer.update(part[1], part[2])
        out = engine.layer.attend(part[0], D**-0.5, part[1], part[2])
        (expected,) = other.call(*part)
        assert torch.equal(out, expected)
        at += size
    engine.batch.settle()
    assert_same_state(engine, other)


def test_wider_tokens_widen_the_window():
    """bf16 sinks stay what they were; what comes in fp32 is kept in fp32."""
    engine = make("calibrated")
    q, k, v = stream(1, 220)
    engine.feed(*(x[:, :, :200].bfloat16() for x in (q, k, v)), [199, 1])
    assert engine.layer.window.k.dtype == torch.bfloat16
    (out,) = engine.call(*(x[:, :, 200:210] for x in (q, k, v)))
    assert engine.layer.window.k.dtype == torch.float32 and out.dtype == torch.float32
    assert torch.equal(engine.layer.window.k[:, :, :4], k[:, :, :4].bfloat16().float())
    position = torch.arange(200, 210)[None]
    assert torch.equal(engine.layer.window.at("k", position), k[:, :, 200:210])
    engine.feed(*(x[:, :, 210:].bfloat16() for x in (q, k, v)), [1] * 10)


@pytest.mark.parametrize("warmup", [64, 256])
def test_the_ring_holds_all_until_statistics_are_taken(warmup):
    """Nothing is lost before there is a codec, and the room is given back when there is one."""
    engine = Engine.make({"epoch_tokens": warmup, "k_bits": 8, "v_bits": 8}, False)
    q, k, v = stream(1, 500)
    n = 4 + 32 + warmup - 1
    engine.feed(*(x[:, :, :n] for x in (q, k, v)), chunks(2, n))
    layer = engine.layer
    assert engine.lengths.packed() == [0] and layer.learned == [False] and layer.window.q is not None
    keys, values = layer.dequantize()
    assert torch.equal(keys, k[:, :, :n]) and torch.equal(values, v[:, :, :n])
    assert torch.equal(layer.window.at("q", torch.arange(n)[None]), q[:, :, :n])
    engine.feed(*(x[:, :, n : n + 1] for x in (q, k, v)), [1])
    assert engine.lengths.packed() == [warmup] and layer.learned == [True]
    assert layer.window.q is None and layer.window.ring == layer.ring == 32 + 16 + 15


def test_a_sequence_cropped_below_its_statistics_goes_on():
    """Packed tokens that are left stay packed, and tokens that come after are packed as they leave the window: the ring
    has no room to await statistics once more."""
    engine = Engine.make({"epoch_tokens": 256, "k_bits": 8, "v_bits": 8}, False)
    q, k, v = stream(1, 900)
    engine.feed(*(x[:, :, :500] for x in (q, k, v)), [500])
    engine.crop(440)
    q, k, v = (torch.cat([x[:, :, :60], x[:, :, 500:]], 2) for x in (q, k, v))
    at = 60
    for n in (100, 1, 60, 1, 100):
        (out,) = engine.call(*(x[:, :, at : at + n] for x in (q, k, v)))
        at += n
        want = softmax_attention(q[:, :, at - n : at], k[:, :, :at], v[:, :, :at], D**-0.5, at - n)
        assert relative(out, want) < 0.03, at
    assert engine.lengths.packed() == [(at - 4 - 32) // 16 * 16]


def test_a_sequence_with_nothing_packed_left_warms_up_again():
    """Its statistics are then those of the tokens that it has."""
    engine, other = (Engine.make({"epoch_tokens": 64}, False) for _ in range(2))
    q, k, v = stream(1, 600)
    engine.feed(*(x[:, :, :300] for x in (q, k, v)), [300])
    engine.crop(297)
    assert engine.lengths.packed() == [0] and engine.layer.learned == [False]
    again = [torch.cat([x[:, :, :3], x[:, :, 300:]], 2) for x in (q, k, v)]
    engine.feed(*(x[:, :, 3:] for x in again), chunks(4, 300))
    other.feed(*again, [3, *chunks(5, 300)])
    assert engine.lengths.packed() == other.lengths.packed() == [256]
    assert_same_state(engine, other)


def test_a_chunk_that_was_never_attended_is_packed_before_the_next_call():
    engine, other = make("calibrated"), make("calibrated")
    q, k, v = stream(1, 200)
    engine.batch.begin(1, 150)
    engine.layer.update(k[:, :, :150], v[:, :, :150])
    other.feed(*(x[:, :, :150] for x in (q, k, v)), [150])
    for x in (engine, other):
        x.feed(*(y[:, :, 150:] for y in (q, k, v)), [50])
    assert_same_state(engine, other)


def test_queries_that_statistics_need_must_have_come():
    engine = make("uncalibrated")
    _, k, v = stream(1, 200)
    engine.batch.begin(1, 150)
    engine.layer.update(k[:, :, :150], v[:, :, :150])
    with pytest.raises(RuntimeError, match="keys of an earlier call were never attended"):
        engine.batch.settle()


def test_states_of_a_call_are_released():
    engine = make("calibrated")
    q, k, v = stream(1, 300)
    held = [weakref.ref(x.untyped_storage()) for x in (q, k, v)]
    engine.feed(q, k, v, [300], attend=True)
    del q, k, v
    gc.collect()
    assert not any(r() is not None for r in held)
