"""The codecs that a layer has, as buffers of its attention module."""

import pytest
import torch

from headq_ao import headq_config
from headq_ao.calibration.observers import MomentAccumulator
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.layer_shape import LayerShape


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
