"""Layers that give dequantized rows: what they give, and what is held between calls."""

import pytest
import torch

from headq_ao import headq_config
from headq_ao.cache.batch import Batch
from headq_ao.cache.dequantized import DequantizedLayer
from headq_ao.cache.schedule import page_tokens, schedule_of
from headq_ao.cache.tiling import Tiling
from headq_ao.codecs.unseen import UnseenQueries
from tests.cache.test_tiling import ROWS


def layer_of(keys, values, sliding=None, **options):
    config = headq_config(**{"k_bits": 8, "v_bits": 8, "rank": 0, "epoch_tokens": 32, "residual_length": 32} | options)
    tiling = Tiling.of(keys, values)
    shape = tiling.shape(sliding)
    source = UnseenQueries(config, shape, None, torch.device("cpu"))
    schedule = schedule_of(config, [source])
    batch = Batch(schedule, page_tokens(config, schedule))
    layer = DequantizedLayer(tiling, shape, source, batch)
    batch.layers = [layer]
    return layer


@pytest.mark.parametrize(("keys", "values"), ROWS)
@pytest.mark.parametrize("sliding", [None, 48])
def test_rows_come_back(keys, values, sliding):
    """The call's own rows as they came, older ones within what 8 bits leave; as many as transformers' layers give."""
    layer = layer_of(keys, values, sliding)
    k, v = (torch.randn(2, heads, 200, dim) for heads, dim in (keys, values))
    seen = 0
    for n in (90, 1, 1, 40, 20, *[1] * 48):
        got = layer.update(k[:, :, seen : seen + n], v[:, :, seen : seen + n])
        first = 0 if sliding is None else max(seen - sliding + 1, 0)
        seen += n
        for x, rows in zip(got, (k, v), strict=True):
            assert x.shape[2] == seen - first
            assert torch.equal(x[:, :, -n:], rows[:, :, seen - n : seen])
            assert (x - rows[:, :, first:seen]).norm() < 0.02 * rows.norm()
    packed, every = layer.tokens_read
    assert 0 < packed < every


def test_nothing_but_pages_and_window_is_held():
    layer = layer_of((4, 64), (4, 64), k_bits=2, v_bits=2)
    rows = torch.randn(1, 4, 2000, 64)
    layer.update(rows[:, :, :1999], rows[:, :, :1999])
    layer.update(rows[:, :, 1999:], rows[:, :, 1999:])
    held = sum(t.untyped_storage().nbytes() for t in layer.tensors())
    every = sum(x.untyped_storage().nbytes() for x in vars(layer).values() if isinstance(x, torch.Tensor))
    assert held < 2 * rows.nbytes / 6
    assert every <= held
    assert layer.pending is None


def test_what_does_not_fit_is_refused_and_leaves_the_layer():
    layer = layer_of((2, 16), (2, 16))
    rows = torch.randn(1, 2, 60, 16)
    layer.update(rows, rows)
    with pytest.raises(ValueError, match="keys and values of"):
        layer.update(rows[:, :1], rows[:, :1])
    with pytest.raises(ValueError, match="finite"):
        layer.update(rows / 0, rows)
    with pytest.raises(ValueError, match="no gradients"):
        layer.update(rows.requires_grad_(), rows)
    assert layer.seen == layer.batch.lengths.seen == 60
    assert layer.update(rows.detach()[:, :, :1], rows.detach()[:, :, :1])[0].shape[2] == 61
