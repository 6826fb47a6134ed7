"""A decoding step of one layer on a GPU makes the host wait for nothing: traced with fake CUDA tensors."""

import contextlib
import importlib
import itertools
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from headq_ao.ops import dispatch
from headq_ao.ops.cache_update.reference import cache_update
from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.error_feedback.reference import SPREADS
from headq_ao.ops.paged_attention.reference import paged_attention
from headq_ao.ops.requests import LayerPages, Requests
from headq_ao.ops.types import PagedKV, Readers, SegmentFrame, Visible
from tests.ops.frames import some_frame
from tests.ops.no_sync import HostSyncError, fake_cuda
from tests.ops.paged_triton_cases import Case, make
from tests.ops.test_requests import Engine

WINDOW = 16
CASES = {
    "calibrated": Case(heads=((1, 2, 2), (2, 3, 4)), packed=(150, 40), held=(172, 62), total=(173, 63)),
    "side code": Case(side=16, zero=True, value_groups=2),
    "sliding, given": Case(columns=3, sliding=60, given=True, new=2, total=(172,)),
    "chunk": Case(new=100, total=(270,)),
    "segments": Case(segments=2),
    "frames": Case(frame=some_frame(64, 128)),
}


def fake(x):
    """Tensors of that shape on a GPU, under a fake mode."""
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    if isinstance(x, (list, tuple)):
        return type(x)(map(fake, x))
    if isinstance(x, (PagedKV, Readers, SegmentFrame, Visible)):
        return replace(x, **{key: fake(value) for key, value in vars(x).items()})
    return x


def encoders(case):
    """Nearest codes, as an encoder of a codec returns them."""
    layout = case.layout()

    def encode(x, part):
        group = next(g for g in layout.groups if g.part == part)
        scale = x.abs().amax(-1)
        zero = scale if case.zero else None
        top = torch.full((), 2.0 ** group.keys.bits[0] - 1, device=x.device)
        return torch.minimum((x / scale[..., None]).round().clamp(min=0), top).to(torch.uint8), scale, zero

    def encode_values(x, part):
        codes, scale, zero = encode(x, part)
        grouped = (*scale.shape, case.value_groups)
        return codes, scale[..., None].expand(grouped), None if zero is None else zero[..., None].expand(grouped)

    return encode, encode_values


def step(case, q, k, v, kv, readers, visible, update=cache_update, attend=paged_attention):
    """One layer: the lengths of the call, its packing and its attention."""
    held = kv.total.clone()
    call = replace(kv, held=held, total=held + k.shape[2], new_k=k, new_v=v)
    packed = torch.maximum(call.packed, call.total - call.n_sink - WINDOW)
    update(call, k, v, packed, k.shape[2], *encoders(case))
    call.packed.copy_(packed)
    kv.total.copy_(call.total)
    return attend(q, 0.1, replace(call, held=call.total, new_k=None, new_v=None), readers, visible, case.sliding)


def arguments(case):
    q, kv, readers, visible = make(case, torch.device("cpu"))
    k, v = (torch.zeros(len(q), case.layout().kv_heads, case.new, case.dim) for _ in range(2))
    return q, k, v, kv, readers, visible


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_not_wait(name):
    real = arguments(CASES[name])
    with fake_cuda() as guard:
        out, lse = step(CASES[name], *fake(real))
    assert out.device.type == lse.device.type == "cuda" and out.shape[:3] == lse.shape == real[0].shape[:3]
    assert guard.calls > 50


class Launches:
    """In place of a Triton kernel: what it would be launched with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.fixture
def launches(monkeypatch):
    """The Triton kernels' launches for a GPU that is not here; tables are there from a call before."""
    pytest.importorskip("triton")
    attention, update = (
        importlib.import_module(f"headq_ao.ops.{name}.triton_kernel") for name in ("paged_attention", "cache_update")
    )
    prefill = importlib.import_module("headq_ao.ops.paged_attention.triton_prefill")
    of_attention, of_update = ("map", "split", "join"), ("leaving", "keys", "values", "append")
    of_prefill = ("unpack", "flash")
    made = {name: Launches() for name in of_attention + of_update + of_prefill}
    for module, names in ((attention, of_attention), (update, of_update), (prefill, of_prefill)):
        for name in names:
            monkeypatch.setattr(module, f"{name}_kernel", made[name])
    columns = lambda forms, device: torch.empty(64, dtype=torch.int32, device=device)  # noqa: E731
    for module in (attention, prefill):
        monkeypatch.setattr(module, "all_query_columns", columns)
    monkeypatch.setattr(update, "query_columns", columns)
    table = lambda layout, pages: torch.empty(layout.kv_heads, 19, dtype=torch.int64, device=pages[0].device)  # noqa: E731
    step = update.triton_step
    for name in ("code", "finish"):
        made[name] = Launches()
        monkeypatch.setattr(step, f"{name}_kernel", made[name])
    for module in (attention, prefill, step):
        monkeypatch.setattr(module, "head_table", table)
    monkeypatch.setattr(step, "all_query_columns", columns)
    monkeypatch.setattr(step, "with_ptx", lambda: True)
    monkeypatch.setattr(step.triton_matrices, "matrices", lambda _, tensors, spec: tensors[0].new_empty(1))
    monkeypatch.setattr(attention, "backend", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_of", lambda q: contextlib.nullcontext())
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return update.update, attention.launch, {name: launched.grids for name, launched in made.items()}


@pytest.mark.parametrize("name", sorted(set(CASES) - {"chunk"}))
def test_a_step_with_kernels_does_not_wait(name, launches):
    """Grids come from shapes: three launches to attend, for any mix of bits."""
    case, (update, attend, grids) = CASES[name], launches
    real = arguments(case)
    with fake_cuda():
        out, lse = step(case, *fake(real), update, attend)
    batch, kv_heads = len(case.packed), case.layout().kv_heads
    heads = kv_heads * case.group
    assert out.shape == (batch, heads, case.new, case.dim) and lse.shape == (batch, heads, case.new)
    of_groups = [batch * n for n, *_ in case.heads]
    assert all([grid[0] for grid in grids[name]] == of_groups for name in ("keys", "values"))
    assert grids["leaving"] == grids["append"] == [(batch * kv_heads, case.new)]
    assert all([grid[0] for grid in grids[name]] == [batch * kv_heads] for name in ("map", "split"))
    assert grids["join"] == [(batch * heads * case.new, -(-case.dim // 64))]


CHUNKS = {
    "calibrated": replace(CASES["calibrated"], new=100, total=(272, 162)),
    "given": Case(new=40, total=(210,), given=True),
    "frames": Case(new=40, total=(210,), frame=some_frame(64, 128), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_a_chunk_with_kernels_does_not_wait(name, launches, monkeypatch):
    """Two launches for each tile of unpacked tokens, one for the others; one split is the result."""
    case, (update, attend, grids) = CHUNKS[name], launches
    prefill = importlib.import_module("headq_ao.ops.paged_attention.triton_prefill")
    monkeypatch.setattr(prefill, "ROWS_BYTES", 1)
    real = arguments(case)
    with fake_cuda():
        out, lse = step(case, *fake(real), update, attend)
    batch, kv_heads = len(case.packed), case.layout().kv_heads
    heads, dim, pairs = kv_heads * case.group, case.dim, batch * kv_heads
    tiles = -(-case.columns * case.page // prefill.GRANULE)
    rows = 128 if case.dtype == torch.bfloat16 and case.group * case.new > 64 else 32
    blocks = -(-case.group * case.new // rows)
    assert out.shape == (batch, heads, case.new, dim) and lse.shape == out.shape[:3]
    assert not grids["split"] and not grids["join"]
    assert grids["unpack"] == [(-(-prefill.GRANULE // 64), pairs, 2)] * tiles
    assert grids["flash"] == [(blocks, 1, pairs)] * (tiles + 1)


def engine(monkeypatch, kernels, frame=None):
    """A layer of an engine's pages in CUDA tensors that are not there, and what makes a step of it."""
    if not kernels:
        monkeypatch.setattr(dispatch, "KERNELS", {})
    monkeypatch.setattr(importlib.import_module("headq_ao.ops.paged_attention.op"), "direct", lambda q: True)
    real = Engine("mixed", sinks=4, frame=frame)

    def layer():
        size = real.pages.raw.shape
        raw = torch.empty(size, dtype=torch.uint8, device="cuda")
        window = torch.empty(size[0], real.heads, 8, 2 * real.dim, device="cuda")
        sides = tuple([replace(e, **{n: fake(x) for n, x in vars(e).items() if n in FIELDS}) for e in side]
                      for side in real.encoders)  # fmt: skip
        return LayerPages(raw, window, real.layout, 4, fake(real.readers), sides, real.q_heads)

    def of(new, long=16):
        bounds = [0, *itertools.accumulate(new)]
        few = max(n for n in new if n <= long)
        each = tuple((i, bounds[i], bounds[i + 1]) for i, n in enumerate(new) if n > long)
        start, lengths = (
            torch.empty(len(new) + 1, dtype=torch.int64, device="cuda"),
            torch.empty(3, len(new), dtype=torch.int64, device="cuda"),
        )
        tables = (torch.empty(len(new), n, dtype=torch.int32, device="cuda") for n in (5, 20))
        q = torch.empty(bounds[-1], real.q_heads, real.dim, device="cuda")
        k = torch.empty(bounds[-1], real.heads, real.dim, device="cuda")
        return q, k, Requests(start, *lengths, *tables, max(new), few, each, recent=23)

    return layer, of


FIELDS = {f.name for f in fields(Encoder)} - {"bits", "group_size", "unbiased"}


@pytest.mark.parametrize("frame", [None, some_frame(32, 128)], ids=["no frame", "frame"])
@pytest.mark.parametrize("new", [(1, 1, 1), (1, 3, 2), (1, 40, 2, 50)])
def test_an_engines_step_by_operators_does_not_wait(new, frame, monkeypatch):
    layer, of = engine(monkeypatch, False, frame)
    with fake_cuda() as guard:
        q, k, requests = of(new)
        pages = layer()
        assert not pages.planned
        pages.step(q, k, k, torch.empty_like(q), 0.1, requests)
    assert guard.calls > 50


@pytest.mark.parametrize("frame", [None, some_frame(32, 128)], ids=["no frame", "frame"])
@pytest.mark.parametrize("new", [(1, 1, 1), (1, 3, 2), (1, 40, 2, 16)])
def test_an_engines_step_with_kernels_does_not_wait(new, frame, launches, monkeypatch):
    """Five launches where each request has one token, whatever the lengths; a long chunk by itself, unpacked first."""
    *_, grids = launches
    layer, of = engine(monkeypatch, True, frame)
    with fake_cuda():
        q, k, requests = of(new)
        pages = layer()
        assert pages.planned and pages.update.step is not None
        pages.step(q, k, k, torch.empty_like(q), 0.1, requests)
    few = [(3, max(new))] if max(new) <= 16 else [(1, 16), (2, 16)]
    heads, group = pages.layout.kv_heads, 2
    assert grids["code"] == [(n * heads, 2 * most, len(SPREADS)) for n, most in few]
    assert grids["finish"] == [(n * heads, 2, 1 + most) for n, most in few]
    assert grids["leaving"] == grids["append"] == ([] if max(new) <= 16 else [(heads, 40)])
    tiles = [1 - (-(23 + most) // 16) for _, most in few]
    assert [grid[:2] for grid in grids["split"]] == [(n * heads, 1 + t) for (n, _), t in zip(few, tiles, strict=True)]
    chunks = [n for n in new if n > 16]
    assert grids["unpack"] == [(256 // 64, heads, 2)] * len(chunks)  # five pages, in whole granules
    assert grids["flash"] == [(-(-group * n // 32), splits, heads) for n in chunks for splits in (2, 1)]
    joined = [(1, new[0])] if not chunks else [(1, 16), *((1, n) for n in chunks), (2, 16)]
    assert grids["join"] == [(n * heads * group * most, 1) for n, most in (few if not chunks else joined)]


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.tensor([1, 2, 3], device="cuda"),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.unique(),
    ],
)
def test_the_guard_sees_what_waits(waits):
    with pytest.raises(HostSyncError), fake_cuda():
        waits(torch.empty(3, device="cuda"))
