"""Tiles of queries and of tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from headq_ao.ops.types import Visible

TOKEN_TILE = 1024
QUERY_TILE = 256


def tiles(length: int, size: int) -> Iterator[slice]:
    """Neighbouring slices of at most that size."""
    return (slice(a, min(a + size, length)) for a in range(0, length, size))


def query_tiles(q: Tensor, scaling: float, kv_heads: int, shown: Visible) -> Iterator[tuple[Tensor, Visible]]:
    """Scaled queries ``[B, Hkv, G, S, D]`` of a tile, fp32 or fp64, and what they see."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = (q.to(wide) * scaling).unflatten(1, (kv_heads, -1))
    for t in tiles(q.shape[2], QUERY_TILE):
        yield grouped[:, :, :, t], shown.tile(t)


def worth(position: Tensor, shown: Visible) -> bool:
    """Whether a query may see one of these positions ``[B, ..]``; True where knowing would take a synchronisation."""
    if position.device.type != "cpu":
        return True
    last, first = position.flatten(1).amax(1), position.flatten(1).amin(1)
    seen = (shown.low < shown.high) & (shown.high > first[:, None]) & (shown.low <= last[:, None])
    return bool((seen & (last >= 0)[:, None]).any())
