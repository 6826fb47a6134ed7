"""The Triton kernels over an engine's pages against the reference: in Triton's interpreter by
test_triton_interpreter.py, and on a GPU.

The interpreter is chosen when Triton is imported, so these run in a process of their own, with TRITON_INTERPRET=1;
``python -m pytest tests/ops/engine_interpreted.py`` without it runs them on the GPU.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch

from headq_ao.ops import dispatch
from headq_ao.ops.cache_update import op, triton_kernel
from headq_ao.ops.cache_update.encoders import flatten
from headq_ao.ops.cache_update.reference import cache_update
from headq_ao.ops.encode.reference import quantize
from headq_ao.ops.paged_attention import triton_kernel as attention
from headq_ao.ops.paged_attention.reference import paged_attention
from headq_ao.ops.requests import Requests
from headq_ao.ops.types import visible_positions
from tests.ops import step_interpreted, test_requests
from tests.ops.frames import some_frame
from tests.ops.paged_interpreted import encoders
from tests.ops.paged_triton_cases import Case, make, moved

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, no interpreter")
MIXED = ((1, 2, 2), (2, 4, 3))


@dataclass(frozen=True)
class Owned(Case):
    """``size`` tokens of a window's page; ``bound``: the host knows how many tokens of the window are read;
    ``recent``: see :attr:`headq_ao.ops.types.PagedKV.recent`."""

    size: int = 16
    bound: bool = True
    recent: int | None = None

    @property
    def coded(self):
        if self.recent is None:
            return self.packed
        return tuple(max(p, t - 1 - self.recent) for p, t in zip(self.packed, self.total, strict=True))


CASES = {
    "mixed bits": Owned(heads=MIXED, dim=32, packed=(150, 40), held=(172, 62), total=(173, 63)),
    "no sinks, pages of 8": Owned(sinks=0, size=8, dim=32, new_tokens=False, total=(190,)),
    "pages of 12": Owned(size=12, dim=48, heads=((1, 3, 2),), new_tokens=False, total=(199,), group=3),
    "pages of 32, no bound": Owned(size=32, dim=32, bound=False, new=3, total=(173,)),
    "bfloat16": Owned(heads=MIXED, dim=32, dtype=torch.bfloat16, page=64, columns=3, new_tokens=False),
    "unequal": Owned(packed=(0, 0, 2, 160), held=(0, 3, 20, 190), total=(1, 4, 21, 191), dim=32, new_tokens=False),
    "shared": Owned(shared=2, packed=(150, 64), held=(170, 86), total=(171, 87), dim=32),
    "sliding": Owned(sliding=50, new=3, packed=(150, 40), held=(170, 60), total=(173, 63), dim=32, size=8),
    "given": Owned(given=True, new=2, packed=(150, 40), held=(170, 60), total=(172, 62), dim=32, heads=((1, 4, 4),)),
    "all packed": Owned(packed=(171,), new_tokens=False, dim=32),
    "recent": Owned(
        recent=20, heads=MIXED, new=3, packed=(150, 40, 0), held=(173, 63, 13), total=(173, 63, 13), dim=32,
        new_tokens=False,
    ),
    "recent, sliding, frames": Owned(
        recent=10, sliding=90, new=8, packed=(410,), held=(428,), total=(428,), columns=14, dim=32, size=8,
        frame=some_frame(32, 128), new_tokens=False,
    ),
    "frames": Owned(
        dim=32, frame=some_frame(32, 128), packed=(300, 150), held=(320, 170), total=(321, 171), columns=10,
    ),
    "frames, few rows": Owned(
        dim=48, frame=some_frame(48, 128, 2, rotary=32), packed=(410,), held=(420,), total=(424,), columns=14, new=4,
        heads=MIXED, group=3, size=8,
    ),
    "frames, sliding": Owned(
        columns=7, page=64, dim=32, packed=(390,), held=(412,), total=(412,), sliding=200, new=2, new_tokens=False,
        frame=some_frame(32, 128, paired=False), zero=True,
    ),
    "frames and segments": Owned(dim=32, frame=some_frame(32, 128), segments=2, each=True, dtype=torch.bfloat16),
    "a chunk": Owned(heads=MIXED, dim=32, packed=(150, 40), held=(172, 62), total=(212, 102), new=40),
    "a chunk, recent": Owned(
        recent=20, heads=MIXED, new=40, packed=(150, 40, 0), held=(170, 60, 2), total=(210, 100, 42), dim=32, columns=7
    ),
    "a chunk, recent, all in pages": Owned(
        recent=20, new=40, packed=(150, 40), held=(210, 100), total=(210, 100), dim=32, columns=7, new_tokens=False
    ),
    "a chunk, recent, sliding, frames": Owned(
        recent=10, sliding=90, new=40, packed=(410,), held=(420,), total=(460,), columns=15, dim=32, size=8,
        frame=some_frame(32, 128),
    ),
    "a chunk, no sinks, given": Owned(
        sinks=0, given=True, new=40, packed=(150, 40), held=(170, 60), total=(210, 100), dim=16, size=8, zero=True
    ),
}  # fmt: skip


def owned(case, seed=0):
    """Arguments of :func:`make` with tokens where an engine has them: NaN in all that nobody may read, and in tables
    that name only pages that are read; the same with tables that name the null page instead."""
    q, kv, readers, visible = make(case, torch.device("cpu"), seed)
    g = torch.Generator().manual_seed(seed + 1)
    layout, batch, pages = case.layout(), len(case.packed), kv.pages[0].shape[0]
    first = kv.packed.clamp(min=case.sinks)
    low = visible_positions(kv.total, case.new, case.sliding).low.amin(1) if visible is None else visible.low.amin(1)
    for b, group in ((b, g) for b in range(batch) for g in layout.split(kv.pages)):  # sinks are not read in pages
        for x in (x for s in (group.keys, group.values) for x in (s.scale, s.zero) if x is not None):
            x[int(kv.table[b, 0]), :, : case.sinks] = 255 if x.dtype == torch.uint8 else float("nan")
    columns = -(-int(kv.total.max()) // case.size) + 1
    table = (torch.randperm(batch * columns, generator=g) + 1).view(batch, columns).int()
    window = torch.full((batch * columns + 1, layout.kv_heads, case.size, 2 * case.dim), float("nan"))
    sinks = torch.full((2, layout.kv_heads, pages, case.sinks, case.dim), float("nan")).transpose(1, 2)
    named = torch.zeros(batch, columns, dtype=torch.bool)
    for b in range(batch):
        for p in range(max(int(first[b]), int(low[b])), int(kv.held[b])):
            named[b, p // case.size] = True
            at = int(table[b, p // case.size]), slice(None), p % case.size
            window[at] = torch.randn(layout.kv_heads, 2 * case.dim, generator=g)
        for p in range(int(low[b]), min(case.sinks, int(kv.held[b]))):
            sinks[:, int(kv.table[b, 0]), :, p] = torch.randn(2, layout.kv_heads, case.dim, generator=g)
    kv = replace(kv, recent=case.recent)
    used = torch.arange(case.columns) < ((kv.coded + case.page - 1) // case.page).clamp(min=1)[:, None]
    window, sinks = window.to(case.dtype), sinks.to(case.dtype)
    kv = replace(
        kv, window_table=table, window_k=window[..., : case.dim], window_v=window[..., case.dim :],
        sink_k=sinks[0], sink_v=sinks[1], newest=max(int((kv.held - first).max()), 0) if case.bound else None,
        table=kv.table.masked_fill(~used, 0),
    )  # fmt: skip
    nowhere = {"table": kv.table.masked_fill(~used, 1 << 30), "window_table": table.masked_fill(~named, 1 << 30)}
    found = q, replace(kv, **nowhere), readers, visible
    nan_free = replace(
        kv, newest=None, window_k=kv.window_k.nan_to_num(), window_v=kv.window_v.nan_to_num(),
        sink_k=kv.sink_k.nan_to_num(), sink_v=kv.sink_v.nan_to_num(),
    )  # fmt: skip
    return found, (q, nan_free, readers, visible)


def to_device(arguments):
    return tuple(moved(arguments, DEVICE))


def close(out, lse, expected, expected_lse):
    assert (out - expected).norm() <= 1e-3 * expected.norm()
    seen = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    torch.testing.assert_close(lse[seen], expected_lse[seen], rtol=1e-3, atol=2e-3)


def counts(case, kv, visible):
    """Packed tokens, and all tokens, that queries see: by position, each once."""
    shown = visible_positions(kv.total, case.new, case.sliding) if visible is None else visible
    packed = total = 0
    for b in range(len(kv.packed)):
        for low, high in zip(shown.low[b].tolist(), shown.high[b].tolist(), strict=True):
            seen = set(range(max(low, 0), min(high, int(kv.total[b]))))
            end = int(kv.packed[b]) if case.recent is None else max(int(kv.packed[b]), high - 1 - case.recent)
            packed += len(seen & set(range(case.sinks, end)))
            total += len(seen)
    return [packed, total]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_attention(name, splits):
    """As the reference, whatever lies in what nobody may read."""
    case = CASES[name]
    given, clean = (to_device(x) for x in owned(case))
    q, kv, readers, visible = given
    reads = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    out, lse = attention.launch(q, 0.7, kv, readers, visible, case.sliding, reads, splits=splits)
    close(out, lse, *paged_attention(q, 0.7, *clean[1:], case.sliding))
    assert reads.tolist() == counts(case, kv, visible)


@pytest.mark.parametrize(("sliding", "frame"), [(0, None), (50, None), (0, some_frame(32, 128))])
@pytest.mark.parametrize("new", [(1, 1, 1), (3, 0, 2)])
def test_attention_of_requests(new, sliding, frame):
    """Queries one after the other; a request without any is left alone, and so is a token of no request."""
    total, recent = (172, 0, 62), 19
    case = Owned(
        packed=tuple(max(t - n - recent, 0) for t, n in zip(total, new, strict=True)), held=total, total=total,
        heads=MIXED, dim=32, new=max(new), new_tokens=False, sliding=sliding, frame=frame, recent=recent,
    )  # fmt: skip
    given, clean = (to_device(x) for x in owned(case))
    _, kv, readers, _ = given
    g = torch.Generator().manual_seed(3)
    q = torch.randn(sum(new) + 1, 6, case.dim, generator=g).to(DEVICE)
    start = torch.tensor([0, new[0], new[0] + new[1], sum(new)], device=DEVICE)
    of = Requests(
        start, kv.held, kv.packed, kv.total, kv.table, kv.window_table, max(new), max(new), recent=case.recent
    )
    out = torch.full((*q.shape[:2], case.dim), 7.0, dtype=torch.bfloat16, device=DEVICE)
    attention.OwnedPlan(kv, readers, sliding).requests(q, 0.7, out, of)
    assert (out[sum(new) :] == 7).all()
    for b, n in enumerate(new):
        if n:
            at = slice(int(start[b]), int(start[b]) + n)
            one = clean[1].sequence(b)
            expected, _ = paged_attention(q[at].transpose(0, 1)[None], 0.7, one, readers, None, sliding)
            assert (out[at].float() - expected[0].transpose(0, 1)).norm() <= 6e-3 * expected.norm()


def updates(case, new, seed=0):
    """A cache with arbitrary pages, and tokens: unequally many of each sequence, behind slots of none."""
    (_, kv, _, _), _ = owned(case, seed)
    g = torch.Generator().manual_seed(seed)
    batch, columns = len(case.packed), case.columns
    table = (torch.randperm(batch * columns, generator=g) + 1).view(batch, columns).int()
    table[:, : case.shared] = table[0, : case.shared]
    size = kv.window_table.shape[1] + -(-max(new) // case.size)
    count = batch * size + 1
    windows = (torch.randperm(count - 1, generator=g) + 1).view(batch, size).int()
    kv = replace(kv, table=table, window_table=windows, packed=kv.held, total=kv.held + torch.tensor(new))
    window = torch.randn(count, kv.window_k.shape[1], case.size, 2 * case.dim, generator=g).to(case.dtype)
    sinks = torch.randn(2, *kv.sink_k.shape, generator=g).to(case.dtype)
    for x in kv.pages:
        x.copy_(torch.randint(0, 256, x.shape, generator=g) if x.dtype == torch.uint8 else torch.rand(x.shape))
    tokens = [torch.randn(batch, max(new) + 2, kv.window_k.shape[1], case.dim, generator=g) for _ in range(2)]
    start = torch.arange(batch) % 2 + 1
    kv = moved(replace(kv, new_start=start), DEVICE)

    def fresh():
        own, own_sinks = window.to(DEVICE, copy=True), sinks.to(DEVICE, copy=True)
        return replace(
            kv, pages=[p.clone() for p in kv.pages], window_k=own[..., : case.dim], window_v=own[..., case.dim :],
            sink_k=own_sinks[0], sink_v=own_sinks[1],
        )  # fmt: skip

    return fresh, *(x.transpose(1, 2).to(DEVICE, case.dtype) for x in tokens)


def written(kv):
    """All that is somebody's: the null pages are nobody's."""
    return [*(p.contiguous().view(torch.uint8)[1:] for p in kv.pages), kv.window_k[1:], kv.window_v[1:], kv.sink_k[1:],
            kv.sink_v[1:]]  # fmt: skip


UPDATES = {
    "mixed bits": (Owned(heads=MIXED, dim=32, held=(70, 3), packed=(0, 0), total=(71, 4)), (5, 2)),
    "no sinks, pages of 8": (Owned(sinks=0, size=8, dim=32, held=(0,), packed=(0,), total=(0,)), (70,)),
    "pages of 12, zeros": (
        Owned(size=12, dim=48, heads=((1, 3, 2),), zero=True, value_groups=2, held=(2,), packed=(0,), total=(3,)), (40,)
    ),
    "bfloat16, a token each": (
        Owned(heads=MIXED, dim=32, dtype=torch.bfloat16, size=32, held=(33, 0, 64), packed=(0, 0, 0),
              total=(34, 1, 65)), (1, 1, 0)
    ),
    "shared": (Owned(shared=2, dim=32, held=(64, 64), packed=(0, 0), total=(65, 65)), (9, 20)),
    "frames": (
        Owned(dim=32, frame=some_frame(32, 32, 2), held=(62, 3), packed=(0, 0), total=(63, 4)), (5, 40)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UPDATES)
def test_update(name):
    """Codes, window and sinks bit for bit as the reference leaves them, whether all tokens are new or some are coded
    from the window."""
    case, new = UPDATES[name]
    for back in (0, 3):
        fresh, k, v = updates(case, new)
        found, expected = ((kv := fresh()) and replace(kv, packed=(kv.held - back).clamp(min=0)) for _ in range(2))
        coding, most = (*encoders(case), moved(case.frame, DEVICE)), max(new) + back + 1
        assert triton_kernel.update(found, k, v, found.total, most, *coding)
        cache_update(expected, k, v, expected.total, most, *coding)
        assert all(map(torch.equal, written(found), written(expected)))
        assert not all(map(torch.equal, written(found), written(fresh())))


@pytest.mark.parametrize("frame", [None, some_frame(32, 32)])
def test_update_of_requests(frame):
    """Tokens one after the other, long requests by themselves: bit for bit the same."""
    case, new = UPDATES["mixed bits"][0], (5, 2)
    fresh, k, v = updates(case, new)
    found, expected, coding = fresh(), fresh(), (*encoders(case), moved(frame, DEVICE))
    cache_update(expected, k, v, expected.total, max(new), *coding)
    rows = [
        x[b, :, int(s) : int(s) + n] for x in (k, v) for b, (n, s) in enumerate(zip(new, found.new_start, strict=True))
    ]
    k, v = (torch.cat(x, 1).transpose(0, 1).contiguous() for x in (rows[:2], rows[2:]))
    start = torch.tensor([0, 5, 7], device=DEVICE)
    lengths = found.held, found.held, found.total, found.table, found.window_table
    for long, few in (((), 5), (((0, 0, 5),), 2)):
        for x, y in zip(written(found), written(fresh()), strict=True):
            x.copy_(y)
        triton_kernel.OwnedPlan(found, None, *coding).requests(k, v, Requests(start, *lengths, 5, few, long))
        assert all(map(torch.equal, written(found), written(expected)))


@pytest.mark.parametrize("frame", [None, some_frame(16, 32, rotary=8)])
def test_a_step(frame):
    """Two launches write the bits that they write of the same tokens in a ring, and the reference's, ties aside."""
    dim, dtype = 16, torch.bfloat16
    ring, layout, both = step_interpreted.cache(
        dim, [(3, 1, 1), (1, 4, 1)], dtype, (40, 3), (44, 7), moved(frame, DEVICE)
    )
    k, v = ((2 * torch.randn(2, 2, ring.window_k.shape[1], dim)).transpose(1, 2).to(DEVICE, dtype) for _ in range(2))
    held, total = torch.tensor((40, 3), device=DEVICE), torch.tensor((42, 4), device=DEVICE)
    start = torch.tensor((0, 1), device=DEVICE)
    window = torch.randn(21, ring.window_k.shape[1], 8, 2 * dim).to(DEVICE, dtype)
    sinks = torch.randn(2, len(ring.pages[0]), ring.window_k.shape[1], 4, dim).to(DEVICE, dtype)

    def engine():
        own, of_sinks = window.clone(), sinks.clone()
        return replace(
            ring, pages=[p.clone() for p in ring.pages], held=held, packed=held, total=total, new_start=start,
            window_k=own[..., :dim], window_v=own[..., dim:], sink_k=of_sinks[0], sink_v=of_sinks[1],
            window_table=(torch.arange(20, device=DEVICE) + 1).view(2, 10).int(),
        )  # fmt: skip

    found, expected = engine(), engine()
    assert triton_kernel.launch(found, k, v, total, 2, *flatten(*both), False)
    op.by_quantize(expected, k, v, total, 2, *both, False, quantize)
    assert all(map(torch.equal, written(found)[-4:], written(expected)[-4:]))
    # a ring whose body tokens are those numbers, and whose leaving tokens are the call's own
    same = replace(ring, packed=held, held=held + 4, total=total + 4, new_start=start)
    assert triton_kernel.launch(same, k, v, total, 2, *flatten(*both), False)
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(found.pages, same.pages, strict=True))
    rows = equal = 0
    for (codes, scale), (want, want_scale) in zip(
        step_interpreted.stored(found, layout), step_interpreted.stored(expected, layout), strict=True
    ):
        alike = (codes == want).all(-1) & (scale == want_scale)
        rows, equal = rows + alike[1:].numel(), equal + int(alike[1:].sum())
    assert equal >= rows - 1


@pytest.mark.parametrize(("frame", "first"), [(None, 33), (some_frame(16, 128), 170)])
def test_a_layer(frame, first, monkeypatch):
    """A layer's steps by the kernels: as by the reference, and codes that hardly differ."""
    for operator, module in (("paged_attention", attention), ("cache_update", triton_kernel)):
        monkeypatch.setitem(dispatch.KERNELS[operator], DEVICE.type, module.__name__.removeprefix("headq_ao.ops."))
    monkeypatch.setitem(test_requests.FORMS, "two heads", [(2, 1, 1), (3, 2, 1)])
    planned = test_requests.Engine("two heads", dim=16, dtype=torch.bfloat16, frame=frame)
    assert planned.pages.planned and planned.pages.update.step is not None
    monkeypatch.setitem(dispatch.KERNELS, "paged_attention", {})
    monkeypatch.setitem(dispatch.KERNELS, "cache_update", {})
    plain = test_requests.Engine("two heads", dim=16, dtype=torch.bfloat16, frame=frame)
    assert not plain.pages.planned
    for new in ({"a": first, "b": 17}, {"a": 1, "b": 1}, {"a": 2, "c": 18}):
        one, other = planned.step(new), plain.step(new)
        for name in new:
            scale = other[name].float().abs().max()
            assert (one[name].float() - other[name].float()).abs().max() < 2e-2 * scale, (name, new)
    for name in planned.requests:
        for a, b in zip(planned.bytes_of(name), plain.bytes_of(name), strict=True):
            assert (a == b).float().mean() >= 0.98
