"""HeadQ's codec over pages: their form, codec ids, what belongs to sequences, and what their tokens stand for."""

import dataclasses

import pytest
import torch

from headq_ao import headq_config
from headq_ao.codecs.affine import base_codec, rotated_value_codec
from headq_ao.codecs.planes import PlaneCodec, with_members
from headq_ao.ops.page_layout import GroupLayout, Side
from tests.cache.streams import Engine, HeadBits, relative, stream
from tests.pages import held

CONFIG = headq_config(rank=0, scale_bits=16)


def codec_of(heads=3, dim=32, k=(), v=(), **more):
    keys = base_codec(CONFIG, torch.zeros(1, heads, dim)).with_bits(k)
    return PlaneCodec(keys, rotated_value_codec(CONFIG, dim).with_bits(v), heads, dim, dim, **more)


def test_pages_have_a_head_group_for_each_form():
    codec = codec_of(k=(2, 2, 3), v=(2, 4, 4))
    layout = codec.layout(32)
    two, three = Side((2,) * 32), Side((3,) * 32)
    assert layout.groups == (
        GroupLayout(0, 1, two, Side((2,))), GroupLayout(1, 1, two, Side((4,))), GroupLayout(2, 1, three, Side((4,))),
    )  # fmt: skip
    assert (layout.page_tokens, layout.key_dim, layout.value_dim) == (32, 32, 32)
    assert [[e.bits[0] for e in side] for side in codec.encoders()] == [[2, 2, 3], [2, 4, 4]]


def test_a_side_without_a_codec_is_exact():
    codec = dataclasses.replace(codec_of(), keys=None)
    assert codec.packed_sides == ("value",) and codec.readers.query_map is None
    assert codec.layout(32).groups[0].keys == Side() and codec.encoders()[0] == [None]


def test_tensors_by_side():
    codec = codec_of(k=(2, 2, 3), v=(2, 2, 2))
    layout = codec.layout(32)
    tensors = layout.allocate(4, torch.float32, torch.device("cpu"))
    found = codec.tensors_by_side(tensors, layout)
    assert sum(len(x) for x in found.values()) == len(tensors)
    of_keys, of_values = (sum(t[0].nbytes for t in found[side]) for side in ("key", "value"))
    # codes of 32 tokens and a scale each; the plane of single bits is padded to 32 coordinates
    assert (of_keys, of_values) == (32 * (3 * (32 * 2 // 8 + 2) + 32 // 8), 32 * 3 * (32 * 2 // 8 + 2))


def test_codec_ids_are_of_the_first_pages_and_the_others():
    codec = codec_of(first=base_codec(CONFIG, torch.ones(1, 3, 32)), warmup=64, learner=lambda *_: (None, None))
    assert codec.segments == 2 and codec.name == "HeadQ with adapt='prompt'"
    assert codec.segment(torch.arange(4), 32).tolist() == [0, 0, 1, 1]
    maps = codec.readers.query_map
    assert torch.equal(maps[0], codec.first.query_map(1, torch.float32))
    assert torch.equal(maps[1], codec.keys.query_map(1, torch.float32))
    shared = codec_of()
    assert (shared.segments, shared.captured, shared.name) == (1, True, "HeadQ")
    assert shared.readers is shared.readers and shared.encoders() is shared.encoders(), "made once"


def test_the_wrong_sign_reads_the_side_code_from_the_other_side():
    """A control: maps differ where the side code is, and nowhere else."""
    side = torch.randn(1, 3, 32, 4)
    keys = dataclasses.replace(
        base_codec(CONFIG, torch.zeros(1, 3, 32)), side_encode=side, side_read=side, side_step=torch.ones(1, 3, 4),
        bits=(2,) * 36,
    )  # fmt: skip
    right, wrong = (PlaneCodec(keys, None, 3, 32, 32, sign=sign).readers.query_map[0] for sign in (1, -1))
    assert torch.equal(right[..., :32], wrong[..., :32]) and torch.equal(right[..., 32:36], -wrong[..., 32:36])


def owning(mean, unit=None):
    """Keys of sequences that have the mean, and the unit, as their own."""
    keys = dataclasses.replace(base_codec(CONFIG, mean), unit=unit)
    return keys.owning(frozenset({"mean"} | (set() if unit is None else {"unit"})))


def test_members_bring_their_own():
    """Kept as fp16 beside those of the others; what has no unit has the unit 1, whoever brings one."""
    whole = base_codec(CONFIG, torch.zeros(1, 2, 16))
    one = with_members(whole, owning(torch.full((1, 2, 16), 0.1)), torch.tensor([1]), 3)
    assert one.own == {"mean"} and one.mean.dtype == torch.float16
    assert one.mean[:, 0, 0].tolist() == [0.0, torch.tensor(0.1).half().item(), 0.0]
    two = with_members(one, owning(torch.ones(1, 2, 16), torch.full((1, 2, 1), 4.0)), torch.tensor([2]), 3)
    assert two.mean[:, 0, 0].tolist() == [0.0, torch.tensor(0.1).half().item(), 1.0]
    assert two.unit[:, 0, 0].tolist() == [1.0, 1.0, 4.0] and two.unit.dtype == torch.float32
    three = with_members(two, owning(torch.full((1, 2, 16), 2.0)), torch.tensor([2]), 3)
    assert three.mean[:, 0, 0].tolist() == [0.0, torch.tensor(0.1).half().item(), 2.0]
    assert three.unit[:, 0, 0].tolist() == [1.0, 1.0, 1.0], "a unit that it does not have any more"
    assert with_members(whole, None, torch.tensor([0]), 3) is whole


def test_tensors_of_sequences_have_their_sides_names():
    keys = owning(torch.zeros(2, 3, 32))
    values = dataclasses.replace(rotated_value_codec(CONFIG, 32), unit=torch.ones(2, 3, 1))
    codec = PlaneCodec(keys, values, 3, 32, 32, learner=lambda *_: (None, None), batch=2)
    assert codec.own_tensors().keys() == {"key.mean", "value.unit"}
    assert codec.index(torch.tensor([1, 0, 0])).own_tensors()["key.mean"].shape[0] == 3
    shared = codec_of()
    assert shared.own_tensors() == {} and shared.index(torch.tensor([0, 0])) is shared


@pytest.mark.parametrize("segment", [0, 64])
def test_packed_tokens_stand_for_keys_and_values(segment):
    """Any part of them, across pages, head groups and segments: what the codecs make of codes, and near what came."""
    engine = Engine.make({"k_bits": 8, "v_bits": 8, "head_bits": HeadBits((8, 6), (6, 8))}, "alike", segment=segment)
    q, k, v = stream(2, 300)
    engine.feed(q, k, v, [300])
    layer, codec = engine.layer, engine.layer.codec
    assert len(codec.layout(engine.batch.page_tokens).groups) == 2
    kv = layer._reading()
    whole = codec.decode(kv, 0, 200)
    for found, exact in zip(whole, (k, v), strict=True):
        assert relative(found, exact[:, :, 4:204]) < 0.05
    for begin, end in ((0, 1), (37, 41), (63, 130), (199, 200)):
        for found, all_of_it in zip(codec.decode(kv, begin, end), whole, strict=True):
            torch.testing.assert_close(found, all_of_it[:, :, begin:end], rtol=0, atol=1e-6)
    first, (codes, scale, *_) = held(layer)
    k_hat = codec.keys.part(slice(0, 1)).dequantize(codes[None, :, :200], scale[None, :, :200], None)
    if segment:
        at = torch.arange(200)
        assert codec.frame.tokens == 64
        k_hat = codec.frame.into(k_hat, codec.frame.of(at), back=True)
    assert first == 0
    torch.testing.assert_close(whole[0][:1, :1], k_hat, rtol=1e-5, atol=1e-5)
