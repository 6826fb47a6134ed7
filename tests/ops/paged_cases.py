"""Paged caches of random codes for tests, with NaN or arbitrary bytes in all that no operator may look at."""

from dataclasses import dataclass, field

import torch

from headq_ao.ops.page_layout import SHARED, GroupLayout, PageLayout, Side
from headq_ao.ops.rounding import scale_to_byte, stored_scale
from headq_ao.ops.types import PagedKV, Readers, SegmentFrame


@dataclass
class Case:
    """Lengths per sequence: packed tokens, tokens in the window that are not packed, and the call's own (0: none)."""

    packed: tuple[int, ...] = (300,)
    window: tuple[int, ...] = (50,)
    new: tuple[int, ...] = (0,)
    keys: tuple[tuple[int, ...], ...] = ((2,) * 64,)  # of each head group
    values: tuple[int, ...] = (2,)
    heads: tuple[int, ...] = (2,)
    page: int = 32
    key_zero: bool = False
    value_zero: bool = False
    value_groups: int = 1
    key_dim: int = 64
    value_dim: int = 64
    ring: int = 96
    sinks: int = 4
    columns: int = 0  # of the table; 0: as many as needed
    segments: int = 1
    shuffled: bool = True
    dtype: torch.dtype = torch.float32
    strided: bool = False  # physical pages with all heads side by side
    frame: SegmentFrame | None = None
    softcap: float | None = None
    shared: bool = False  # values are their keys
    scale_bits: int = 8  # where a token has one scale and no zero
    extra: dict = field(default_factory=dict)

    @property
    def layout(self) -> PageLayout:
        groups, first = [], 0
        for heads, keys, values in zip(self.heads, self.keys, self.values, strict=True):
            grouped = self.value_zero or self.value_groups > 1
            sides = (
                Side(keys, bool(keys) and self.key_zero, 1, 16 if not keys or self.key_zero else self.scale_bits),
                Side((values,), self.value_zero, self.value_groups, 16 if grouped else self.scale_bits),
            )
            of_values = SHARED if self.shared else sides[1] if values else Side()
            groups.append(GroupLayout(first, heads, sides[0], of_values))
            first += heads
        return PageLayout(self.page, self.key_dim, self.value_dim, tuple(groups))


def fill(layout: PageLayout, count: int, case: Case, g: torch.Generator) -> list[torch.Tensor]:
    """Pages of random codes and scales."""
    pages = layout.allocate(count, case.dtype, torch.device("cpu"))
    if case.strided:
        pages = [x.contiguous() for x in pages]
    for x in pages:
        if x.dtype == torch.uint8:
            x.copy_(torch.randint(0, 256, x.shape, generator=g, dtype=torch.uint8))
        else:
            x.copy_(torch.rand(x.shape, generator=g) + 0.5)
    usual_byte_scales(layout, pages, g)
    return pages


def usual_byte_scales(layout: PageLayout, pages: list[torch.Tensor], g: torch.Generator) -> None:
    """Scales in bytes, of all pages, from 0.5 to 1.5."""
    for group in layout.split(pages):
        for scale in (group.keys.scale, group.values.scale):
            if scale is not None and scale.dtype == torch.uint8:
                scale.copy_(scale_to_byte(stored_scale(torch.rand(scale.shape, generator=g) + 0.5, 8)))


def make(case: Case, seed: int = 0) -> tuple[PagedKV, Readers]:
    """The cache and readers whose scores spread over a few nats."""
    g = torch.Generator().manual_seed(seed)
    layout, batch, p = case.layout, len(case.packed), case.page
    need = [-(-n // p) for n in case.packed]
    columns = case.columns or max(*need, 1)
    count = 2 + batch * columns
    pages = fill(layout, count, case, g)
    order = torch.randperm(count - 1, generator=g) + 1 if case.shuffled else torch.arange(1, count)
    table, used = torch.zeros(batch, columns, dtype=torch.int32), torch.zeros(count, p, dtype=torch.bool)
    taken = iter(order.tolist())
    for b, n in enumerate(case.packed):
        for i in range(max(need[b] - columns, 0), need[b]):
            table[b, i % columns] = page = next(taken)
            used[page, : n - i * p] = True
    for x in pages:
        if x.dtype != torch.uint8:  # scales, zeros, exact tokens
            x.transpose(1, 2)[~used] = float("nan")
    held = torch.tensor([case.sinks + n + w if n + w else 0 for n, w in zip(case.packed, case.window, strict=True)])
    total = held + torch.tensor(case.new)
    window = poisoned_window(case, held, layout.kv_heads, g)
    most = max(case.new)
    new = [None, None, None]
    if most:
        start = most - torch.tensor(case.new)
        new = [torch.randn(batch, layout.kv_heads, most, d, generator=g) for d in (case.key_dim, case.value_dim)]
        for x in new:
            x.transpose(1, 2)[torch.arange(most) < start[:, None]] = float("nan")
        new = [*(x.to(case.dtype) for x in new), start]
    segment = torch.randint(0, case.segments, (count,), generator=g).int() if case.segments > 1 else None
    kv = PagedKV(
        pages, layout.spec, table, segment, torch.tensor(case.packed), held, total, *window, case.sinks, *new,
        softcap=case.softcap,
    )  # fmt: skip
    return kv, readers(case, layout, batch, g)


def poisoned_window(case: Case, held: torch.Tensor, heads: int, g: torch.Generator) -> list[torch.Tensor]:
    """Keys and values; NaN in slots that hold no token."""
    empty = torch.ones(len(held), case.sinks + case.ring, dtype=torch.bool)
    for b, n in enumerate(held.tolist()):
        empty[b, : min(n, case.sinks)] = False
        for j in range(max(n - case.sinks - case.ring, case.packed[b], 0), n - case.sinks):
            empty[b, case.sinks + j % case.ring] = False
    made = []
    for d in (case.key_dim, case.value_dim):
        x = torch.randn(len(held), heads, empty.shape[1], d, generator=g)
        x.transpose(1, 2)[empty] = float("nan")
        made.append(x.to(case.dtype))
    return [made[0], made[0]] if case.shared else made


def readers(case: Case, layout: PageLayout, batch: int, g: torch.Generator) -> Readers:
    """Maps of all heads; the readout's of one sequence for all."""
    read = torch.randn(1, layout.kv_heads, case.value_dim, case.value_dim, generator=g) / case.value_dim**0.5
    read = read.transpose(-1, -2)  # as the kernel reads it
    mean = torch.randn(1, 1, case.value_dim, generator=g)
    if not case.keys[0]:
        return Readers(None, read, mean)
    widest = torch.tensor([max(bits) for bits in zip(*case.keys, strict=True)])
    scale = torch.cat([3.0 / 2.0**widest, torch.ones(3)]) / case.key_dim**0.5
    shape = (case.segments, 1 if case.segments > 1 else batch, layout.kv_heads, case.key_dim, len(widest) + 3)
    return Readers(torch.randn(shape, generator=g) * scale, read, mean, case.frame)
