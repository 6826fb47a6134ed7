"""How rows of any size are cut into heads that a codec stores."""

import pytest
import torch

from headq_ao.cache.tiling import Tiling
from headq_ao.layer_shape import LayerShape

ROWS = [
    ((2, 16), (2, 16)), ((3, 20), (3, 20)), ((1, 512), (1, 64)), ((4, 24), (2, 40)), ((2, 192), (2, 128)),
    ((1, 576), (1, 16)),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "values"), ROWS)
def test_rows_are_cut_and_joined(keys, values):
    tiling = Tiling.of(keys, values)
    k, v = (torch.randn(2, heads, 5, dim) for heads, dim in (keys, values))
    cut = tiling.cut(k, v)
    assert [tuple(x.shape) for x in cut] == [(2, tiling.heads, 5, dim) for dim in tiling.dims]
    assert all(dim % 16 == 0 and dim <= 256 for dim in tiling.dims)
    for back, x, pieces in zip(tiling.join(*cut), (k, v), cut, strict=True):
        assert torch.equal(back, x)
        assert pieces.norm() == pytest.approx(x.norm())  # the rest is zeros


def test_heads_stay_apart_where_keys_and_values_have_as_many():
    assert Tiling.of((4, 20), (4, 40)).shape(100) == LayerShape(4, 4, 32, 100, 48)
    assert Tiling.of((4, 24), (2, 40)).shape(None) == LayerShape(1, 1, 96, None, 80)
