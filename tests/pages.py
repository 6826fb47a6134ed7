"""Looking into the pages of a cache layer, for tests."""

import torch

from headq_ao.ops.layout import unpack_keys, unpack_values
from headq_ao.ops.paged_attention.reference import by_sequence


def coded(layer, b=0):
    """Packed body tokens of sequence ``b``: for each head group codes, scales and zeros of keys and of values, or
    tokens that are not coded, each ``[heads, n, ..]``."""
    return held(layer, b)[1]


def held(layer, b=0):
    """The first body token that is still in pages (a sliding window uses them again), and :func:`coded` from there."""
    n = layer.batch.lengths.packed()[b] if layer.packs else 0
    table = layer.table.host[b : b + 1].long() if layer.packs else torch.zeros(1, 1, dtype=torch.int64)
    columns, p = table.shape[1], layer.batch.page_tokens
    pages = torch.arange(max(-(-n // p) - columns, 0), -(-n // p)) % columns
    first = max(-(-n // p) - columns, 0) * p
    found = []
    for group in layer.pool.layout.split(layer.pool.tensors):
        for side, unpack in ((group.keys, unpack_keys), (group.values, lambda x, bits: unpack_values(x, bits[0]))):
            one = side.map(lambda t: by_sequence(t, table[:, pages]).flatten(2, 3)[0])
            parts = [unpack([x[None] for x in one.planes], side.bits)[0].int()] if side.bits else []
            parts += [t for t in (one.scale, one.zero, one.exact) if t is not None]
            found += [t[:, : n - first] for t in parts]
    return first, found


def same_codes(one, other, b=0, c=None):
    """How many tokens two layers both have in pages, of sequences ``b`` and ``c``; all of them must be equal."""
    (begin, x), (start, y) = held(one, b), held(other, b if c is None else c)
    first, last = max(begin, start), min(begin + x[0].shape[1], start + y[0].shape[1])
    for a, d in zip(x, y, strict=True):
        assert torch.equal(a[:, first - begin : last - begin], d[:, first - start : last - start])
    return last - first


def codes_of(layer, b=0):
    """Codes alone: keys ``[Hkv, n, M]`` and values ``[Hkv, n, D]``, of a layer whose heads have the same bits."""
    return [t for t in coded(layer, b) if t.dtype == torch.int32]


def scales_of(layer, b=0):
    """Scales and zeros alone, in fp32."""
    return [t.float() for t in coded(layer, b) if t.dtype == torch.float16]
