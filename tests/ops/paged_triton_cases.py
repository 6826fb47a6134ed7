"""Paged caches of random codes for the kernels' tests: whatever no query may see is poisoned."""

from dataclasses import dataclass, replace

import torch

from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.types import PagedKV, Readers, SegmentFrame, Visible
from tests.ops.paged_cases import usual_byte_scales


@dataclass(frozen=True)
class Case:
    """``heads``: for each head group its KV heads, key bits and value bits; ``packed``, ``held``, ``total`` of each
    sequence; ``columns`` of the block table; ``shared``: its first columns name the same pages in all sequences."""

    heads: tuple[tuple[int, int, int], ...] = ((1, 2, 2),)
    page: int = 32
    dim: int = 64
    group: int = 2
    new: int = 1
    packed: tuple[int, ...] = (150,)
    held: tuple[int, ...] = (170,)
    total: tuple[int, ...] = (171,)
    columns: int = 6
    shared: int = 0
    sinks: int = 4
    ring: int = 24
    sliding: int = 0
    zero: bool = False
    value_groups: int = 1
    segments: int = 1
    given: bool = False  # visible ranges are arguments
    new_tokens: bool = True
    padding: int = 0  # slots before the first new token
    mean: bool = True
    each: bool = False  # a query map and a read of each sequence
    side: int = 0  # coordinates of a side code of 4 bits beside the key's
    dtype: torch.dtype = torch.float32
    frame: SegmentFrame | None = None
    softcap: float | None = None
    scale_bits: int = 8  # where a token has one scale and no zero

    @property
    def coded(self):
        """Tokens that stand in pages, of each sequence."""
        return self.packed

    def layout(self) -> PageLayout:
        groups, first = [], 0
        for n, k, v in self.heads:
            of_keys, of_values = (16 if self.zero or n > 1 else self.scale_bits for n in (1, self.value_groups))
            keys = Side((k,) * (self.dim - self.side) + (4,) * self.side, self.zero, 1, of_keys)
            groups.append(GroupLayout(first, n, keys, Side((v,), self.zero, self.value_groups, of_values)))
            first += n
        return PageLayout(self.page, self.dim, self.dim, tuple(groups))


def make(case: Case, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, PagedKV, Readers, Visible | None]:
    """Queries and the rest of the operator's arguments."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    layout, batch = case.layout(), len(case.packed)
    kv_heads, m = layout.kv_heads, case.dim
    used = case.columns * batch + 1
    table = (torch.randperm(used - 1, generator=g) + 1).view(batch, case.columns).int()
    table[:, : case.shared] = table[0, : case.shared]
    pages = layout.allocate(used + 2, case.dtype, torch.device("cpu"))
    before = case.held if case.new_tokens else case.total
    packed, held, total = (torch.tensor(x) for x in (case.packed, before, case.total))
    tokens = torch.zeros(used + 2, case.page, dtype=torch.bool)  # that hold something
    for b in range(batch):
        last = (case.coded[b] - 1) // case.page
        for i in range(max(0, last - case.columns + 1), last + 1):
            n = min(case.page, case.coded[b] - i * case.page)
            tokens[table[b, i % case.columns], :n] = True
    for t in pages:
        if t.dtype == torch.uint8:
            t.copy_(torch.randint(0, 256, t.shape, generator=g))
            t[~tokens.any(1)] = 255
        else:
            t.copy_(torch.rand(t.shape, generator=g) + 0.5)
            t.masked_fill_(~tokens.view(-1, 1, case.page, *[1] * (t.ndim - 3)), float("nan"))
    usual_byte_scales(layout, pages, g)
    batch_, heads_ = (batch, kv_heads) if case.each else (1, kv_heads)
    top = max(max(group.keys.bits) for group in layout.groups)
    maps = draw(case.segments, batch_, heads_, case.dim, m + 3) / (case.dim * 2 ** max(top - 2, 0))
    segment = torch.randint(0, case.segments, (used + 2,), generator=g).int() if case.segments > 1 else None
    window = [draw(batch, kv_heads, case.sinks + case.ring, case.dim) for _ in range(2)]
    for b in range(batch):  # the ring's slots of packed tokens are seen by nobody
        live = set(range(min(case.sinks, before[b])))
        body = range(max(case.packed[b], before[b] - case.sinks - case.ring), before[b] - case.sinks)
        live |= {case.sinks + j % case.ring for j in body}
        dead = [i for i in range(case.sinks + case.ring) if i not in live]
        for w in window:
            w[b, :, dead] = float("nan")
    fresh = [draw(batch, case.new + case.padding, kv_heads, case.dim).transpose(1, 2) for _ in range(2)]
    start = torch.full((batch,), case.padding) if case.padding else None
    kv = PagedKV(
        pages, layout.spec, table, segment, packed, held, total, *(w.to(case.dtype) for w in window), case.sinks,
        *((x.to(case.dtype) for x in fresh) if case.new_tokens else (None, None)), start,
        softcap=case.softcap,
    )  # fmt: skip
    readers = Readers(
        maps,
        draw(batch_, heads_, case.dim, case.dim).transpose(-1, -2) / case.dim**0.5,
        draw(1, 1, case.dim) if case.mean else None,
        case.frame,
    )
    visible = None
    if case.given:
        high = total[:, None] - torch.randint(0, 60, (batch, case.new), generator=g)
        low = high - torch.randint(0, 200, (batch, case.new), generator=g)
        low[0, 0] = high[0, 0]  # nothing
        visible = Visible(low.clamp(min=0), high.clamp(min=0))
    q = draw(batch, case.new, kv_heads * case.group, case.dim).transpose(1, 2).to(case.dtype)
    return q, *moved((kv, readers, visible), device)


def moved(x, device):
    """Tensors, and what holds them, on a device."""
    if isinstance(x, torch.Tensor):
        if x.is_contiguous():
            return x.to(device)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
    if isinstance(x, (list, tuple)):
        return type(x)(moved(y, device) for y in x)
    if isinstance(x, (PagedKV, Readers, SegmentFrame, Visible)):
        return replace(x, **{name: moved(value, device) for name, value in vars(x).items()})
    return x
