"""The codecs that a layer has, as buffers of its attention module."""

import pytest
import torch

from headq_ao import headq_config
from headq_ao.calibration.observers import MomentAccumulator
from headq_ao.codecs.layer_codec import LATER, LayerCodec
from headq_ao.layer_shape import LayerShape
from headq_ao.statistics.moments import SEGMENT_TOKENS
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
