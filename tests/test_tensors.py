"""The tensor subclasses: packed rows that can be sliced, moved and printed, and the handle that refuses everything."""

import copy
import io

import pytest
import torch

from headq_ao import HeadQConfig, headq_config
from headq_ao.cache_layer import HeadQCacheLayer
from headq_ao.codec import (
    affine_codec,
    prompt_visible_codec,
    rotated_value_codec,
    visible_codec,
    visible_value_codec,
    with_side_code,
)
from headq_ao.models import LayerShape
from headq_ao.ops import MappedQuery, Rows, decode_attention
from headq_ao.tensors import HeadQHistory, HeadQKeyTensor, HeadQValueTensor

B, H, T, D = 3, 2, 64, 32
AFFINE, ROTATED = {"key_codec": "affine"}, {"value_codec": "affine"}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def key_codec(k, prompt=False, **options):
    """The codec of each sequence's own keys, which serve as queries too."""
    config, c_q, mean = headq_config(**options), k.mT @ k / T, k.mean(2)
    if config.key_codec == "affine":
        return affine_codec(config, c_q, mean, k)
    if prompt:
        codec = prompt_visible_codec(config, c_q, mean, k.var(2))
    else:
        codec = visible_codec(config, c_q, mean, c_q - mean[..., None] * mean[..., None, :])
    return with_side_code(config, codec, c_q, k)


def make_keys(dtype=torch.float32, **options):
    k = randn(B, H, T, D)
    return HeadQKeyTensor.from_hp(k.to(dtype), key_codec(k, **options)), k


def make_values(dtype=torch.float32, v_bits=4, **options):
    v, config = randn(B, H, T, D, seed=1) + randn(1, H, 1, D, seed=2), headq_config(v_bits=v_bits, **options)
    if config.value_codec == "affine":
        codec = rotated_value_codec(config, D)
    else:
        flat = v.transpose(0, 1).flatten(1, 2)[None]  # one codec for all sequences
        codec = visible_value_codec(config, flat.mean(2), flat.mT @ flat / flat.shape[2])
    return HeadQValueTensor.from_planes(*codec.encode_rows(v.to(dtype)), codec, dtype), v


KINDS = {
    "keys": lambda: make_keys(k_bits=4),
    "keys, prompt": lambda: make_keys(prompt=True, k_bits=3),
    "keys, visible, 4-bit side": lambda: make_keys(rank=8, side_bits=4),
    "keys, 3 bits, 4-bit side": lambda: make_keys(k_bits=3, side_bits=4, **AFFINE),
    "keys, affine, no side": lambda: make_keys(k_zero_point=True, rank=0, **AFFINE),
    "keys, optimal side": lambda: make_keys(basis="score_optimal", **AFFINE),
    "values": lambda: make_values(),
    "values, zero": lambda: make_values(v_zero_point=True, **ROTATED),
    "values, 3 bits, groups": lambda: make_values(v_bits=3, v_zero_point=True, v_group_size=16, **ROTATED),
    "values, no zero": lambda: make_values(v_bits=2, **ROTATED),
}
KINDS = {name: lambda make=make: make()[0] for name, make in KINDS.items()}
each_kind = pytest.mark.parametrize("packed", [pytest.param(make, id=name) for name, make in KINDS.items()])
key_kinds = pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("keys")])


def assert_equal(a, b):
    assert (type(a), a.shape, a.dtype, a.bits) == (type(b), b.shape, b.dtype, b.bits)
    assert a.inner().keys() == b.inner().keys()
    for name, t in a.inner().items():
        assert torch.equal(t, b.inner()[name]), name
    assert torch.equal(a.dequantize(), b.dequantize())


@each_kind
def test_shape_dtype_device(packed):
    x = packed()
    assert (tuple(x.shape), x.dtype, x.device.type) == ((B, H, T, D), torch.float32, "cpu")
    y = x.dequantize()
    assert type(y) is torch.Tensor and (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda d: make_keys(d, k_bits=6),
        lambda d: make_keys(d, prompt=True, k_bits=6),
        lambda d: make_keys(d, k_bits=6, **AFFINE),
        lambda d: make_values(d, v_bits=6),
        lambda d: make_values(d, v_bits=6, **ROTATED),
    ],
    ids=["k", "k, prompt", "k, affine", "v", "v, affine"],
)
def test_dequantize_is_near(make, dtype):
    packed, exact = make(dtype)
    assert packed.dtype == packed.dequantize().dtype == dtype
    assert float((packed.dequantize().float() - exact).square().mean()) < 2e-3


@each_kind
def test_flatten_and_unflatten(packed):
    x = packed()
    names, attributes = x.__tensor_flatten__()
    inner = {name: getattr(x, name) for name in names}
    assert all(type(t) is torch.Tensor for t in inner.values())
    again = type(x).__tensor_unflatten__(inner, attributes, x.shape, x.stride())
    assert_equal(again, x)
    assert all(getattr(again, name) is t for name, t in inner.items())


@each_kind
def test_detach_and_alias_share_their_memory(packed):
    x = packed()
    for y in (x.detach(), torch.ops.aten.alias(x)):
        assert_equal(y, x)
        assert all(y.inner()[n].data_ptr() == t.data_ptr() for n, t in x.inner().items())


@each_kind
@pytest.mark.parametrize("clone", [torch.clone, copy.deepcopy], ids=["clone", "deepcopy"])
def test_copies_do_not(packed, clone):
    x = packed()
    y = clone(x)
    assert_equal(y, x)
    assert not {t.data_ptr() for t in y.inner().values()} & {t.data_ptr() for t in x.inner().values()}
    y.scale.zero_()
    assert bool((x.scale > 0).all())


@each_kind
def test_contiguous_and_copy(packed):
    x = packed()
    assert_equal(x.contiguous(), x)
    y = x.clone()
    y.scale.zero_()
    y.copy_(x)
    assert_equal(y, x)
    with pytest.raises(ValueError, match="metadata mismatch"):
        y.copy_(x[:2])


@each_kind
def test_to_dtype_changes_what_dequantize_gives(packed):
    x = packed()
    for y in (x.to(torch.bfloat16), x.bfloat16(), x.to("cpu", torch.bfloat16)):
        assert y.dtype == y.dequantize().dtype == torch.bfloat16
        assert all(torch.equal(y.inner()[n], t) and y.inner()[n].dtype == t.dtype for n, t in x.inner().items())
        assert_equal(y.float(), x)
    with pytest.raises(ValueError, match=r"stand for floating-point values, got torch.int8; dequantize\(\) first"):
        x.to(torch.int8)


@each_kind
def test_to_device_moves_every_part(packed):
    x = packed()
    assert x.to("cpu") is x
    y = x.to("meta")
    assert y.device.type == "meta" and {t.device.type for t in y.inner().values()} == {"meta"}
    assert (type(y), y.shape, y.dtype, y.packed_nbytes) == (type(x), x.shape, x.dtype, x.packed_nbytes)
    assert x.to("meta", torch.float16).dtype == torch.float16


@each_kind
def test_save_and_load(packed):
    x = packed()
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert_equal(torch.load(file, weights_only=False), x)


@each_kind
def test_packed_nbytes(packed):
    x = packed()
    assert x.packed_nbytes == sum(t.numel() * t.element_size() for t in x.inner().values())
    planes = sum(p.numel() for p in x.planes)
    assert planes < x.packed_nbytes < planes + 4 * B * H * (4 * D * D + T)


def test_packed_nbytes_of_known_shapes():
    values, _ = make_values(v_bits=2, v_zero_point=True, v_group_size=16, **ROTATED)
    assert values.packed_nbytes == B * H * T * (D * 2 // 8 + 2 * 2 * 2) + 4 * D * D
    keys, _ = make_keys(k_zero_point=True, rank=0, **AFFINE)
    assert keys.packed_nbytes == B * H * T * (D * 2 // 8 + 2 * 2) + 4 * (B * H * D + 2 * D * D + D)
    rows = B * H * T * (D * 2 // 8 + 2)  # the default: 2 bits and one scale
    values, _ = make_values(v_bits=2)
    assert values.packed_nbytes == rows + 4 * H * (D * D + D)  # read, mean
    keys, _ = make_keys()
    assert keys.packed_nbytes == rows + 4 * (B * H * (3 * D * D + D) + 2 * D)  # encode, read, metric; step, weight
    keys, _ = make_keys(prompt=True)
    assert keys.packed_nbytes == rows + 4 * (B * H * (2 * D + 16 * D) + 2 * D * D + 2 * D)  # mean, spread, seen


@each_kind
def test_repr_is_short(packed):
    x = packed()
    name = type(x).__name__
    assert repr(x) == f"{name}(shape=(3, 2, 64, 32), dtype=torch.float32, packed_nbytes={x.packed_nbytes})"
    assert str(x[:1]) == repr(x[:1])


SLICES = {
    "tokens": (slice(None), slice(None), slice(32, 64)),
    "first tokens": (slice(None), slice(None), slice(None, 32)),
    "last tokens": (slice(None), slice(None), slice(-32, None)),
    "past the end": (slice(None), slice(None), slice(32, 1000)),
    "no tokens": (slice(None), slice(None), slice(32, 32)),
    "backwards": (slice(None), slice(None), slice(64, 32)),
    "sequences": (slice(1, 3),),
    "one sequence": (slice(2, 3),),
    "no sequence": (slice(2, 1),),
    "heads": (slice(None), slice(1, 2)),
    "all three": (slice(0, 2), slice(0, 1), slice(32, 64)),
}


@each_kind
@pytest.mark.parametrize("where", [pytest.param(s, id=name) for name, s in SLICES.items()])
def test_slices(packed, where):
    x = packed()
    y = x[where]
    want = x.dequantize()[where]
    assert type(y) is type(x) and y.shape == want.shape
    assert torch.equal(y.dequantize(), want)


@each_kind
def test_slices_are_views(packed):
    x = packed()
    y = x[1:, :, 32:]
    assert y.scale.untyped_storage().data_ptr() == x.scale.untyped_storage().data_ptr()
    assert torch.equal(x.narrow(-2, 0, 32).dequantize(), x.dequantize()[:, :, :32])
    assert torch.equal(x[1:][1:][:, 1:].dequantize(), x.dequantize()[2:, 1:])


@pytest.mark.parametrize(
    ("packed", "span", "message"),
    [
        (KINDS["keys"], (8, 64), "token slices must fall on multiples of 16, got 8:64"),
        (KINDS["keys"], (0, 20), "token slices must fall on multiples of 16, got 0:20"),
        (KINDS["values"], (4, 64), "token slices must fall on multiples of 8, got 4:64"),
        (KINDS["values, 3 bits, groups"], (16, 64), "token slices must fall on multiples of 32, got 16:64"),
    ],
)
def test_unaligned_token_slices(packed, span, message):
    with pytest.raises(ValueError, match=message):
        packed()[:, :, slice(*span)]


def test_values_slice_at_their_own_granule():
    x = KINDS["values"]()
    assert torch.equal(x[:, :, 8:24].dequantize(), x.dequantize()[:, :, 8:24])


@each_kind
def test_slices_that_packed_rows_do_not_have(packed):
    x = packed()
    with pytest.raises(NotImplementedError, match="along batch, head or token, step 1; got dim 3, step 1"):
        x[..., :16]
    with pytest.raises(NotImplementedError, match="along batch, head or token, step 1; got dim 2, step 2"):
        x[:, :, ::2]


@each_kind
@pytest.mark.parametrize("index", [[2, 0], [1, 1, 1, 0], []], ids=str)
def test_index_select(packed, index):
    x, index = packed(), torch.tensor(index, dtype=torch.long)
    y = x.index_select(0, index)
    assert type(y) is type(x)
    assert torch.equal(y.dequantize(), x.dequantize().index_select(0, index))
    assert torch.equal(x.index_select(-4, index).dequantize(), y.dequantize())
    with pytest.raises(NotImplementedError, match="indexed along the batch, dim 0, got dim 1"):
        x.index_select(1, index)


@pytest.mark.parametrize("options", [{}, {"prompt": True}, AFFINE], ids=["visible", "prompt", "affine"])
def test_a_codec_shared_by_a_batch_stays_shared(options):
    """A calibrated codec has one entry for all sequences: it is neither cut nor copied."""
    k = randn(B, H, T, D)
    codec = key_codec(k[:1], rank=16, **options)
    x = HeadQKeyTensor.from_hp(k, codec)
    for y, want in ((x[1:], x.dequantize()[1:]), (x.index_select(0, torch.tensor([2, 2])), x.dequantize()[[2, 2]])):
        assert torch.equal(y.dequantize(), want)
        assert {t.shape[0] for name, t in y.codec.tensors().items()} == {1}
        assert y.side_encode is not None


@key_kinds
def test_rows_of_keys_read_as_their_dequantized_form(name):
    x = KINDS[name]()
    q, v = randn(B, 2 * H, 1, D, seed=4), randn(B, H, T, D, seed=5)
    assert (x.rows().zero is None) == ("affine, no side" not in name)
    span = torch.zeros(B, 1, dtype=torch.int64), torch.full((B, 1), T)
    packed, _ = decode_attention(x.codec.map_query(q, 0.2), x.rows(), Rows(exact=v), *span)
    plain, _ = decode_attention(MappedQuery.exact(q, 0.2), Rows(exact=x.dequantize()), Rows(exact=v), *span)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


@each_kind
@pytest.mark.parametrize(
    "op",
    [lambda x: x + 1, lambda x: x[0], lambda x: x.transpose(1, 2), lambda x: torch.cat([x, x]), lambda x: x.sum()],
    ids=["add", "select", "transpose", "cat", "sum"],
)
def test_other_ops_are_refused_by_name(packed, op):
    x = packed()
    with pytest.raises(NotImplementedError, match=rf"{type(x).__name__} dispatch: .*aten\."):
        op(x)


@pytest.fixture
def history():
    return HeadQHistory(
        HeadQCacheLayer(HeadQConfig(), LayerShape(3, 3, 16, None)), randn(2, 3, 1, 16), torch.zeros(2, 3, 1, 16), 100
    )


def test_history_shows_the_shape_of_all_rows(history):
    assert (tuple(history.shape), history.dtype, history.new_keys.shape[2]) == ((2, 3, 100, 16), torch.float32, 1)
    assert history.new_keys.any() and not history.new_values.any()
    assert repr(history) == "HeadQHistory(shape=(2, 3, 100, 16), dtype=torch.float32)"
    assert (history.ndim, history.size(2), len(history)) == (4, 100, 2)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x + 1,
        lambda x: x @ x.mT,
        lambda x: x[:, :, :8],
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: x.to(torch.float16),
        lambda x: torch.cat([x, torch.zeros(2, 3, 1, 16)], 2),
        lambda x: torch.nn.functional.scaled_dot_product_attention(torch.zeros(2, 3, 1, 16), x, x),
        lambda x: x.transpose(1, 2),
        lambda x: x.zero_(),
    ],
    ids=["add", "matmul", "slice", "clone", "detach", "to", "cat", "sdpa", "transpose", "zero_"],
)
def test_history_refuses_every_op(history, op):
    with pytest.raises(
        RuntimeError, match=r"packed HeadQ cache, which only the 'headq' attention can read; keep attn_"
    ):
        op(history)
