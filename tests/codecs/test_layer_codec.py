"""The codecs that a layer has, as buffers of its attention module."""

import dataclasses

import pytest
import torch

from headq_ao import headq_config
from headq_ao.calibration.observers import MomentAccumulator
from headq_ao.codecs.layer_codec import LATER, LayerCodec
from headq_ao.layer_shape import LayerShape
from headq_ao.statistics.moments import SEGMENT_TOKENS
from tests.cache.streams import CPU, HKV, HQ, HeadBits, moments
from tests.codecs.states import some_rotation


@pytest.mark.parametrize(("basis", "one"), [("query_pca", True), ("score_optimal", False)])
def test_a_moved_layer_keeps_one_side_basis(basis, one):
    """A basis that reads as it encodes is one tensor, also after the module went to another device."""
    g = torch.Generator().manual_seed(0)
    accumulator = MomentAccumulator(64)
    q, k, v = (torch.randn(64, 2, 32, generator=g) for _ in range(3))
    accumulator.add(q, k, v, [torch.ones(64, 2)] * 3, torch.rand(64, generator=g))
    config = headq_config(key_codec="affine", value_codec="affine", rank=16, basis=basis)
    layer = LayerCodec(config, LayerShape(2, 2, 32, None), accumulator.moments(), torch.device("cpu"))
    layer._apply(torch.clone)
    assert (layer.calibrated.side_read is layer.calibrated.side_encode) == one


def test_a_prompts_own_statistics_are_taken_under_the_layers_softcap():
    g = torch.Generator().manual_seed(0)
    q, k = 3 * torch.randn(1, 4, 200, 32, generator=g), torch.randn(1, 2, 200, 32, generator=g)
    q[..., 0] *= 8
    made = {
        cap: LayerCodec(headq_config(), LayerShape(4, 2, 32, None, softcap=cap), None, torch.device("cpu"))
        for cap in (None, 1e6, 2.0)
    }
    plain, far, low = (made[cap].from_prompt(q, k, 0.2) for cap in (None, 1e6, 2.0))
    torch.testing.assert_close(far.mean, plain.mean, rtol=1e-3, atol=1e-4)
    assert (low.mean - plain.mean).norm() > 0.1 * plain.mean.norm()


def test_own_statistics_are_those_of_a_whole_segment():
    """Twenty first tokens stand for a segment of 256: mean and variances of the keys, against all turned keys laid out
    one after the other; half of the queries stand in the segment, half some segments later."""
    torch.manual_seed(0)
    rotation = some_rotation()
    codec = LayerCodec(headq_config(), LayerShape(4, 2, 16, None), None, torch.device("cpu"), rotation=rotation)
    q, k, of_q, of_k = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 20, 16), torch.rand(1, 2, 40), torch.rand(1, 2, 20)
    of_k = of_k / of_k.mean(-1, keepdim=True)
    c_q, mean, variance = codec._spread_moments(q, of_q, k, of_k)

    def at(x, shifts):
        return torch.cat([rotation.at(x, torch.tensor([[by]])) for by in shifts], 2)

    own = range(0, SEGMENT_TOKENS - 20 + 1, 20)
    every, weights = at(k, own), of_k.repeat(1, 1, len(own))[..., None]
    torch.testing.assert_close(mean, (weights * every).mean(2))
    torch.testing.assert_close(variance, (weights * (every - mean.unsqueeze(2)).square()).mean(2))
    halves = []
    for shifts in (own, [SEGMENT_TOKENS * far for far in LATER]):
        every = at(q, shifts)
        halves.append(every.mT @ (of_q.repeat(1, 1, len(shifts))[..., None] * every) / every.shape[2])
    torch.testing.assert_close(c_q, sum(halves) / 2)


def layer_of(moments=None, head_dim=32, **options):
    return LayerCodec(headq_config(**options), LayerShape(HQ, HKV, head_dim, None), moments, CPU)


def test_too_few_sampled_keys_are_refused():
    few = dataclasses.replace(moments(), k_rows=moments().k_rows[:15])
    with pytest.raises(ValueError, match="at least 16 sampled keys per layer; calibrate on more text"):
        layer_of(few)


def test_moments_in_a_frame_that_cannot_be_told_are_refused():
    framed = dataclasses.replace(moments(), segment_tokens=256)
    with pytest.raises(ValueError, match="how this layer turns keys with their position cannot be told"):
        layer_of(framed)
    assert layer_of(framed, k_bits=None).frame_tokens == 0, "exact keys are in no frame"


@pytest.mark.parametrize("heads", [slice(0, 1), slice(1, 2)])
def test_a_part_of_the_heads_is_cut_from_the_whole(heads):
    shape, config = LayerShape(HQ, HKV, 32, None), headq_config()
    whole, part = LayerCodec(config, shape, moments(), CPU), LayerCodec(config, shape, moments(), CPU, heads)
    for mine, theirs in ((part.calibrated, whole.calibrated), (part.values, whole.values)):
        for name, x in mine.tensors().items():
            y = theirs.tensors()[name]
            assert torch.equal(x, y[:, heads] if y.shape[1] > 1 else y), name


def test_bits_of_each_head():
    """Each head has the codec that a layer of its bits has."""
    mixed = LayerCodec(
        headq_config(), LayerShape(HQ, HKV, 32, None), moments(), CPU, bits=HeadBits((2, 4), (4, 2))
    ).calibrated
    assert mixed.head_bits == (2, 4)
    for head, bits in enumerate(mixed.head_bits):
        alone = layer_of(moments(), k_bits=bits).calibrated
        mine, theirs = (codec.part(slice(head, head + 1)) for codec in (mixed, alone))
        assert mine.bits == theirs.bits and torch.equal(mine.step.expand_as(theirs.step), theirs.step)
        assert torch.equal(mine.encode, theirs.encode)


def test_a_refined_mean_weighs_the_prior_in_tokens():
    """``μ = (prior·μ_cal + Σ k) / (prior + tokens)``, sinks left out."""
    layer = layer_of(moments(), adapt="prompt", prior_tokens=50)
    k = torch.randn(2, HKV, 4 + 64, 32, generator=torch.Generator().manual_seed(0))
    codec = layer.from_prior(k)
    want = (50 * layer.calibrated.mean + k[:, :, 4:].sum(2)) / 114
    torch.testing.assert_close(codec.mean, want)
    assert codec.own == {"mean"} and codec.encode is layer.calibrated.encode


def test_what_a_sequence_is_said_to_own_must_be_its_own():
    calibrated, own = layer_of(moments()), layer_of()
    codec = calibrated.start(2, torch.float32)
    assert calibrated.restore(codec, {}) is not None and not calibrated.learns and own.learns
    with pytest.raises(ValueError, match=r"a calibrated codec keeps nothing of a sequence, got \['key.mean'\]"):
        calibrated.restore(codec, {"key.mean": torch.zeros(2, HKV, 32)})
    mean, unit = torch.full((2, HKV, 32), 3.0).half(), torch.full((2, HKV, 1), 2.0)
    restored = own.restore(own.start(2, torch.float32), {"key.mean": mean, "value.unit": unit})
    assert restored.keys.mean is mean and restored.keys.own == {"mean"} and restored.values.unit is unit


def test_codecs_are_put_together_once_and_again_where_tensors_moved():
    layer = layer_of(moments())
    codec = layer.start(1, torch.float32)
    assert layer.current(codec) is layer.start(2, torch.float32) is codec
    assert layer.calibrated.mapped is layer.calibrated.query_map(1, torch.float32), "kept from step to step"
    mapping, name, found = layer.watched()
    layer._apply(torch.clone)
    assert mapping[name] is not found and layer.current(codec) is not codec
    assert torch.equal(layer.current(codec).keys.encode, codec.keys.encode)
    assert len(layer.sketch()) > 0 and layer_of().sketch() == []
