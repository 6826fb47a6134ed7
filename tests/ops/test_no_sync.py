"""A decoding step of one layer on a GPU makes the host wait for nothing: traced with fake CUDA tensors."""

import contextlib
import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from headq_ao.ops.cache_update.reference import cache_update
from headq_ao.ops.paged_attention.reference import paged_attention
from headq_ao.ops.types import PagedKV, Readers, Visible
from tests.ops.no_sync import HostSyncError, fake_cuda
from tests.ops.paged_triton_cases import Case, make

WINDOW = 16
CASES = {
    "calibrated": Case(heads=((1, 2, 2), (2, 3, 4)), packed=(150, 40), held=(172, 62), total=(173, 63)),
    "side code": Case(side=16, zero=True, value_groups=2),
    "sliding, given": Case(columns=3, sliding=60, given=True, new=2, total=(172,)),
    "chunk": Case(new=100, total=(270,)),
    "segments": Case(segments=2),
}


def fake(x):
    """Tensors of that shape on a GPU, under a fake mode."""
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    if isinstance(x, (list, tuple)):
        return type(x)(map(fake, x))
    if isinstance(x, (PagedKV, Readers, Visible)):
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
    of_attention, of_update = ("map", "split", "join"), ("leaving", "keys", "values", "append")
    made = {name: Launches() for name in of_attention + of_update}
    for module, names in ((attention, of_attention), (update, of_update)):
        for name in names:
            monkeypatch.setattr(module, f"{name}_kernel", made[name])
    columns = lambda forms, device: torch.empty(64, dtype=torch.int32, device=device)  # noqa: E731
    monkeypatch.setattr(attention, "all_query_columns", columns)
    monkeypatch.setattr(update, "query_columns", columns)
    table = lambda layout, pages: torch.empty(layout.kv_heads, 19, dtype=torch.int64, device=pages[0].device)  # noqa: E731
    monkeypatch.setattr(attention, "head_table", table)
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
