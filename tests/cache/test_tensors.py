"""The tensor that ``update`` returns: shape and form of all tokens, read by attention, refused by name elsewhere."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.cache.streams import HKV, D, relative, softmax_attention, stream
from tests.cache.test_invariants import make

T, NEW = 200, 3
KINDS = ["calibrated", "uncalibrated", "keys only", "values only", "bits by head", "affine"]


def updated(case, new=NEW, total=T):
    """An engine in the midst of a call, the call's q, k, v, and what ``update`` gave."""
    engine, parts = make(case), stream(2, total + new)
    engine.feed(*(x[:, :, :total] for x in parts), [total])
    part = [x[:, :, total:] for x in parts]
    engine.batch.begin(2, new)
    return engine, part, engine.layer.update(*part[1:])


@pytest.mark.parametrize("case", KINDS)
def test_shape_dtype_device(case):
    _, (_, k, v), (keys, values) = updated(case)
    for x, new in ((keys, k), (values, v)):
        assert (tuple(x.shape), x.dtype, x.device.type) == ((2, HKV, T + NEW, D), torch.float32, "cpu")
        assert (x.ndim, x.size(2), len(x)) == (4, T + NEW, 2) and torch.equal(x.new, new)
    assert repr(keys) == f"QuantizedKV(key, shape=(2, 2, {T + NEW}, 32), dtype=torch.float32)"
    assert repr(values).startswith("QuantizedKV(value, ")


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("new", [1, 3, 40])
def test_sdpa_reads_what_dequantize_gives(case, new):
    engine, (q, k, v), (keys, values) = updated(case, new)
    plain = keys.dequantize(), values.dequantize()
    assert all(type(x) is torch.Tensor and x.shape == (2, HKV, T + new, D) for x in plain)
    assert torch.equal(plain[0][:, :, -new:], k) and torch.equal(plain[1][:, :, -new:], v)
    out = scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    assert relative(out, softmax_attention(q, *plain, D**-0.5, T)) < 2e-3
    assert engine.layer.tokens_read[0] > 0, "nothing was read from pages"


@pytest.mark.parametrize("case", ["calibrated", "uncalibrated"])
def test_sdpa_is_the_layers_attention(case):
    (engine, (q, _, _), (keys, values)), (other, part, _) = updated(case), updated(case)
    out = scaled_dot_product_attention(q, keys, values, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.equal(out, other.layer.attend(part[0], 0.3, *part[1:]))
    assert engine.layer.tokens_read == other.layer.tokens_read


def test_without_is_causal_new_tokens_see_each_other():
    _, (q, _, _), (keys, values) = updated("calibrated")
    plain = [x.repeat_interleave(2, 1) for x in (keys.dequantize(), values.dequantize())]
    out = scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    assert relative(out, scaled_dot_product_attention(q, *plain)) < 2e-3


def test_a_mask_speaks_of_all_keys():
    _, (q, _, _), (keys, values) = updated("calibrated")
    mask = torch.ones(2, 1, NEW, T + NEW, dtype=torch.bool).tril(T)
    mask[1, ..., :90] = False
    plain = [x.repeat_interleave(2, 1) for x in (keys.dequantize(), values.dequantize())]
    out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    assert relative(out, scaled_dot_product_attention(q, *plain, attn_mask=mask)) < 2e-3


def test_what_attention_cannot_do_is_refused():
    _, (q, k, v), (keys, values) = updated("calibrated")
    with pytest.raises(ValueError, match=r"dropout of 0.5 cannot be applied"):
        scaled_dot_product_attention(q, keys, values, dropout_p=0.5)
    _, _, (other, _) = updated("calibrated")
    for pair in ((keys, v), (k, values), (other, values)):
        with pytest.raises(ValueError, match="needs the keys and values that one update of it returned"):
            scaled_dot_product_attention(q, *pair)


OPS = {
    "add": lambda x: x + 1,
    "matmul": lambda x: x @ x.mT,
    "slice": lambda x: x[:, :, :8],
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "to": lambda x: x.to(torch.float16),
    "cat": lambda x: torch.cat([x, torch.zeros(2, HKV, 1, D)], 2),
    "transpose": lambda x: x.transpose(1, 2),
    "zero_": lambda x: x.zero_(),
}


@pytest.mark.parametrize("name", OPS)
def test_other_operators_are_refused_by_name_and_the_call_taken_back(name):
    engine, part, (keys, values) = updated("calibrated")
    with pytest.raises(RuntimeError, match=r"packed HeadQ cache, which only the 'headq' attention can read"):
        OPS[name](keys if name != "add" else values)
    assert engine.lengths.totals() == [T, T] and engine.layer.seen == T
    engine.call(*part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dequantize_gives_the_calls_dtype(dtype):
    engine, parts = make("calibrated"), stream(1, T + 1, dtype=dtype)
    engine.feed(*(x[:, :, :T] for x in parts), [T])
    engine.batch.begin(1, 1)
    keys, values = engine.layer.update(*(x[:, :, T:] for x in parts[1:]))
    assert keys.dequantize().dtype == values.dequantize().dtype == keys.dtype == dtype


@pytest.mark.parametrize("case", ["calibrated", "uncalibrated"])
@pytest.mark.parametrize("n", [1, 16, 60])
def test_dequantize_between_calls_gives_every_token(case, n):
    """After a call, whatever its length, packed tokens read as they are packed, and the others as they came."""
    engine, (q, k, v) = make(case, k_bits=8, v_bits=8), stream(1, T + n)
    engine.feed(q, k, v, [T, n])
    keys, values, position = engine.layer.in_order()
    assert position.tolist() == list(range(T + n))
    for found, exact in ((keys, k), (values, v)):
        error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert bool((error.flatten(0, 1).median(1)[0] < 0.5).all()) and error.max() < 1.5
        assert torch.equal(found[:, :, -32:], exact[:, :, -32:]) and torch.equal(found[:, :, :4], exact[:, :, :4])


def test_dequantize_needs_sequences_of_one_length():
    engine, (q, k, v) = make("calibrated"), stream(2, 100)
    from headq_ao.cache.schedule import Span

    engine.batch.begin(2, 100, [Span(0, 100), Span(10, 100)])
    keys, _ = engine.layer.update(k, v)
    with pytest.raises(ValueError, match="sequences differ in length"):
        keys.dequantize()
    engine.layer.attend(q, 0.2, k, v)


def test_flatten_and_unflatten():
    _, (_, k, _), (keys, _) = updated("calibrated")
    names, context = keys.__tensor_flatten__()
    assert names == ["new"]
    again = type(keys).__tensor_unflatten__({"new": keys.new}, context, keys.shape, keys.stride())
    assert again.shape == keys.shape and torch.equal(again.new, k)
