"""The paged operators' references against dense attention: any calls, lengths, padding, crops, sliding windows."""

import random

import pytest
import torch

from headq_ao.ops.cache_update.reference import cache_update
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.paged_attention.reference import paged_attention
from headq_ao.ops.types import PagedKV, Readers, Visible

D, HEADS, GROUP, P, SINKS = 32, 3, 2, 32, 4


class Stream:
    """A cache of whole numbers, which codes of enough bits hold exactly, beside dense keys and values."""

    def __init__(self, layout, batch, ring, window, columns, sliding=0, seed=0):
        self.layout, self.batch, self.window, self.sliding = layout, batch, window, sliding
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        device = torch.device("cpu")
        pages = layout.allocate(1 + batch * columns, torch.float32, device)
        for t in pages:  # what was never written may hold anything
            t.fill_(255) if t.dtype == torch.uint8 else t.fill_(float("nan"))
        order = torch.randperm(batch * columns) + 1
        self.kv = PagedKV(
            pages, layout.spec, order.view(batch, columns).int(), None,
            *(torch.zeros(batch, dtype=torch.int64) for _ in range(3)),
            torch.full((batch, HEADS, SINKS + ring, D), float("nan")),
            torch.full((batch, HEADS, SINKS + ring, D), float("nan")), SINKS,
        )  # fmt: skip
        self.dense = [(torch.zeros(HEADS, 0, D), torch.zeros(HEADS, 0, D)) for _ in range(batch)]
        identity = torch.cat([torch.eye(D), -1.5 * torch.ones(D, 1), torch.zeros(D, 2)], 1)
        self.readers = Readers(identity[None, None, None], torch.eye(D)[None, None], None)

    def encode(self, x, part):
        return (x + 1.5).to(torch.uint8), torch.ones(x.shape[:3]), None

    def encode_values(self, x, part):
        group = next(g for g in self.layout.groups if g.part == part)
        centre = (2 ** group.values.bits[0] - 1) / 2
        return (x + centre).to(torch.uint8), torch.ones(*x.shape[:3], 1), None

    def call(self, n):
        """Attend, then append: padded on the left by chance."""
        real = [n if self.random.random() < 0.7 else self.random.randint(0, n) for _ in range(self.batch)]
        q = torch.randn(self.batch, HEADS * GROUP, n, D)
        k, v = (torch.randint(0, 4, (self.batch, HEADS, n, D)) - 1.5 for _ in range(2))
        count = torch.tensor(real)
        start, kv = n - count, self.kv
        call = PagedKV(**(vars(kv) | {"total": kv.held + count, "new_k": k, "new_v": v, "new_start": start}))
        slot = torch.arange(n)
        position = torch.where(slot >= start[:, None], kv.held[:, None] + slot - start[:, None], -1)
        low = (position - self.sliding + 1).clamp(min=0) if self.sliding else torch.zeros_like(position)
        out, _ = paged_attention(q, 0.2, call, self.readers, Visible(low, position + 1))
        for b in range(self.batch):
            self.dense[b] = tuple(
                torch.cat([a, x[b, :, n - real[b] :]], 1) for a, x in zip(self.dense[b], (k, v), strict=True)
            )
            for i in range(n - real[b], n):
                p = int(position[b, i])
                keys, values = (x[:, int(low[b, i]) : p + 1].repeat_interleave(GROUP, 0) for x in self.dense[b])
                w = torch.softmax(torch.einsum("hd,htd->ht", q[b, :, i], keys) * 0.2, -1)
                torch.testing.assert_close(out[b, :, i], torch.einsum("ht,htd->hd", w, values), atol=1e-5, rtol=1e-5)
        packed = torch.maximum(kv.packed, call.total - SINKS - self.window)
        most = int((packed - kv.packed).max())
        cache_update(call, k, v, packed, most + self.random.randint(0, 3), self.encode, self.encode_values)
        self.kv = PagedKV(**(vars(kv) | {"packed": packed, "held": call.total, "total": call.total}))

    def crop(self, n):
        """Forget the last ``n`` tokens of all; packed tokens stay packed, those of the ring full."""
        kv = self.kv
        total = (kv.total - n).clamp(min=0)
        packed = torch.minimum(kv.packed, (total - SINKS).clamp(min=0))
        self.dense = [tuple(x[:, : int(t)] for x in d) for d, t in zip(self.dense, total, strict=True)]
        self.kv = PagedKV(**(vars(kv) | {"packed": packed, "held": total, "total": total}))


def layouts():
    two = Side((2,) * D), Side((2,))
    return {
        "equal": PageLayout(P, D, D, (GroupLayout(0, HEADS, *two),)),
        "exact keys": PageLayout(P, D, D, (GroupLayout(0, HEADS, Side(), two[1]),)),
        "exact values": PageLayout(P, D, D, (GroupLayout(0, HEADS, two[0], Side()),)),
        "mixed": PageLayout(P, D, D, (GroupLayout(0, 1, *two), GroupLayout(1, 2, two[0], Side((3,))))),
    }


@pytest.mark.parametrize("name", list(layouts()))
@pytest.mark.parametrize("sliding", [0, 100])
def test_calls_of_any_length(name, sliding):
    columns = -(-sliding // P) + 3 if sliding else 12
    stream = Stream(layouts()[name], 2, ring=24, window=16, columns=columns, sliding=sliding)
    if name == "exact keys":
        stream.readers = Readers(None, stream.readers.read, None)
    if name == "exact values":
        stream.readers = Readers(stream.readers.query_map, None, None)
    for n in (50, 1, 1, 70, 8, 1, 33, 1, 1, 2, 5):
        stream.call(n)
    if sliding:
        return
    for crop, n in ((3, 1), (40, 1), (20, 30), (1, 1)):
        stream.crop(crop)
        stream.call(n)
