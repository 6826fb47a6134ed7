"""The paged Triton kernels against the reference: in Triton's interpreter by test_triton_interpreter.py, and on a GPU.

The interpreter is chosen when Triton is imported, so these run in a process of their own, with TRITON_INTERPRET=1;
``python -m pytest tests/ops/paged_interpreted.py`` without it runs them on the GPU.
"""

import doctest
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headq_ao.ops import Encoder
from headq_ao.ops.cache_update import triton_kernel as update_kernel
from headq_ao.ops.cache_update.encoders import coders, flatten
from headq_ao.ops.cache_update.reference import cache_update
from headq_ao.ops.paged_attention import triton_codes, triton_kernel, triton_prefill
from headq_ao.ops.paged_attention.reference import paged_attention, window_positions
from headq_ao.ops.rounding import stored_scale
from headq_ao.ops.types import visible_positions
from tests.ops.frames import some_frame

spec = importlib.util.spec_from_file_location("paged_triton_cases", Path(__file__).with_name("paged_triton_cases.py"))
cases = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cases
spec.loader.exec_module(cases)
Case, make = cases.Case, cases.make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, no interpreter")
TWO = {"packed": (150, 40), "held": (172, 62), "total": (173, 63)}

CASES = {
    "2 bits": Case(),
    "2 bits, fp16 scales": Case(scale_bits=16),
    "3 bits, fp16 scales, pages of 16": Case(heads=((1, 3, 2),), page=16, columns=10, scale_bits=16),
    "head groups, fp16 scales": Case(heads=((1, 2, 2), (2, 4, 3)), dim=32, group=3, scale_bits=16, **TWO),
    "2 bits, pages of 64": Case(page=64, columns=3, dim=128),
    "2 bits, pages of 16": Case(page=16, columns=10, dim=80),
    "1 and 8 bits": Case(heads=((1, 1, 8),), dim=32),
    "8 and 1 bits": Case(heads=((1, 8, 1),), dim=32, page=64, columns=3),
    "3 bits": Case(heads=((1, 3, 3),), dim=128),
    "3 bits, whole pages": Case(heads=((1, 3, 3),), page=128, columns=3, packed=(300,), held=(310,), total=(311,)),
    "4 bits, head of 256": Case(heads=((1, 4, 4),), dim=256),
    "4 bits, pages of 16": Case(heads=((1, 4, 4),), dim=48, page=16, columns=10),
    "5 and 6 bits": Case(heads=((1, 5, 6),), dim=48),
    "6 and 5 bits": Case(heads=((1, 6, 5),), dim=80, page=64, columns=3),
    "head groups": Case(heads=((1, 2, 2), (2, 4, 3)), dim=32, group=3, **TWO),
    "groups of values": Case(heads=((1, 2, 2),), dim=64, value_groups=2),
    "groups of values, zeros": Case(heads=((1, 3, 4),), dim=64, value_groups=4, zero=True, page=16, columns=10),
    "groups of values of two planes": Case(heads=((1, 2, 8),), dim=32, value_groups=2, zero=True, page=64, columns=3),
    "zeros": Case(heads=((1, 4, 2),), zero=True, dim=64, page=64, columns=3),
    "side code": Case(heads=((1, 2, 2),), dim=80, side=16),
    "8 queries": Case(new=8, total=(178,), group=4, **{"packed": (150,), "held": (170,)}),
    "8 queries, packed here": Case(new=8, packed=(150,), total=(170,), new_tokens=False),
    "wrapped": Case(columns=3, page=16, dim=32, packed=(150,), sliding=60),
    "wrapped, given": Case(columns=3, page=64, packed=(500, 510), held=(521, 522), total=(523, 524), new=2, given=True),
    "shared pages": Case(shared=2, columns=5, packed=(150, 64), held=(170, 86), total=(171, 87)),
    "unequal lengths": Case(packed=(0, 3, 160), held=(2, 20, 165), total=(3, 21, 166), group=1),
    "empty": Case(packed=(0, 0), held=(0, 1), total=(1, 2), dim=32),
    "cropped": Case(packed=(150,), held=(154,), total=(155,)),
    "sliding": Case(new=3, packed=(150, 40), held=(170, 60), total=(173, 63), sliding=50, given=False),
    "given": Case(new=5, packed=(150, 40), held=(170, 60), total=(175, 65), given=True, group=3),
    "padding": Case(new=4, padding=3, packed=(150, 40), held=(170, 60), total=(174, 64), given=True),
    "segments": Case(segments=2, dim=32, **TWO),
    "segments, whole pages": Case(segments=3, dim=32, page=64, columns=3, group=3, heads=((1, 4, 2), (1, 3, 3)), new=2,
                                  packed=(150,), held=(170,), total=(172,)),
    "frames": Case(dim=32, frame=some_frame(32, 128), packed=(300, 150), held=(320, 170), total=(321, 171), columns=10),
    "frames, few rows": Case(
        dim=48, frame=some_frame(48, 128, 2, rotary=32), packed=(410,), held=(420,), total=(424,), columns=13, new=4,
        heads=((1, 4, 1), (1, 3, 3)), group=3,
    ),
    "frames, wrapped": Case(
        columns=5, page=64, dim=32, packed=(700,), held=(720,), total=(721,), sliding=200,
        frame=some_frame(32, 256, paired=False), zero=True,
    ),
    "frames and segments": Case(
        dim=32, frame=some_frame(32, 128), packed=(300,), held=(320,), total=(321,), columns=10, segments=2, each=True
    ),
    "softcap": Case(softcap=2.0, zero=True, group=3, new=2, total=(172,)),
    "softcap, head groups": Case(heads=((1, 2, 2), (2, 4, 3)), dim=32, softcap=1.0, **TWO),
    "softcap, segments": Case(segments=2, dim=32, softcap=1.0, **TWO),
    "softcap, frames": Case(
        dim=32, frame=some_frame(32, 128), softcap=1.0, packed=(300, 150), held=(320, 170), total=(321, 171), columns=10
    ),
    "softcap, sliding, bfloat16": Case(
        new=3, packed=(150, 40), held=(170, 60), total=(173, 63), sliding=50, softcap=2.0, dtype=torch.bfloat16
    ),
    "bfloat16": Case(dtype=torch.bfloat16, dim=64),
    "of each sequence": Case(each=True, mean=False, dim=32, **TWO),
    "long chunk": Case(new=32, packed=(100,), held=(110,), total=(142,), group=1, dim=32),
}  # fmt: skip


CHUNKS = {
    "mixed bits": Case(
        heads=((1, 2, 2), (2, 4, 3)), dim=32, new=40, packed=(150, 40), held=(172, 62), total=(212, 102)
    ),
    "fp16 scales, side code": Case(dim=80, side=16, scale_bits=16, group=1, new=33, total=(203,)),
    "1 and 8 bits": Case(heads=((1, 1, 8),), dim=16, new=34, total=(204,)),
    "6 and 5 bits": Case(heads=((1, 6, 5),), dim=48, page=64, columns=3, new=40, total=(210,), group=3),
    "zeros": Case(heads=((1, 4, 2),), zero=True, dim=32, page=16, columns=10, new=40, total=(210,)),
    "groups of values": Case(heads=((1, 3, 4),), dim=64, value_groups=4, zero=True, group=1, new=40, total=(210,)),
    "all packed": Case(new=40, dim=32, packed=(180,), total=(200,), columns=7, new_tokens=False),
    "sliding": Case(new=70, packed=(150, 40), held=(170, 60), total=(240, 130), sliding=50, dim=16),
    "wrapped": Case(columns=3, page=64, dim=32, packed=(500,), held=(521,), total=(561,), new=40, sliding=60),
    "given": Case(new=40, packed=(150, 40), held=(170, 60), total=(210, 100), given=True, group=3, dim=32),
    "padding": Case(new=40, padding=3, packed=(150, 40), held=(170, 60), total=(210, 100), given=True, dim=32),
    "shared pages": Case(shared=2, columns=5, packed=(150, 64), held=(170, 86), total=(210, 126), new=40, dim=16),
    "unequal lengths": Case(packed=(0, 3, 160), held=(2, 20, 165), total=(37, 55, 200), new=35, group=1, dim=32),
    "empty": Case(packed=(0, 0), held=(0, 1), total=(40, 41), dim=32, new=40),
    "segments": Case(segments=2, dim=32, each=True, packed=(150, 40), held=(172, 62), total=(212, 102), new=40),
    "frames": Case(
        dim=32, frame=some_frame(32, 128), packed=(300, 150), held=(320, 170), total=(360, 210), columns=10, new=40,
    ),
    "frames, a part of the head": Case(
        dim=48, frame=some_frame(48, 128, 2, rotary=32), packed=(410,), held=(420,), total=(460,), columns=13, new=40,
        heads=((1, 4, 1), (1, 3, 3)), group=3, mean=False,
    ),
    "frames, wrapped": Case(
        columns=5, page=64, dim=32, packed=(700,), held=(720,), total=(760,), sliding=200, new=40,
        frame=some_frame(32, 256, paired=False), zero=True,
    ),
    "softcap": Case(softcap=2.0, zero=True, group=3, new=40, total=(210,), dim=32),
    "bfloat16": Case(dtype=torch.bfloat16, new=40, total=(210,), heads=((1, 2, 2), (1, 3, 4)), dim=32),
    "float16, softcap, sliding": Case(dtype=torch.float16, new=40, total=(210,), dim=32, softcap=2.0, sliding=90),
}  # fmt: skip
ROUNDED = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # as rows of that dtype are


def compare(case, splits, sequence=None, error=1e-3):
    arguments = make(case, DEVICE) if sequence is None else sequence
    q, kv, readers, visible = arguments
    reads = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    unused = replace(kv, table=kv.table.masked_fill(~used_columns(case, kv), 1 << 30))
    out, lse = triton_kernel.launch(q, 0.7, unused, readers, visible, case.sliding, reads, splits=splits)
    expected, expected_lse = paged_attention(q, 0.7, kv, readers, visible, case.sliding)
    assert out.dtype == lse.dtype == torch.float32
    assert (out - expected).norm() <= error * expected.norm()
    seen = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert torch.equal(out[~seen], torch.zeros_like(out[~seen]))
    torch.testing.assert_close(lse[seen], expected_lse[seen], rtol=1e-3, atol=2 * error)
    assert reads.tolist() == counts(case, kv, visible)
    return out, lse


def used_columns(case, kv):
    """Which columns of the block table name pages of tokens, ``[B, C]``."""
    pages = (kv.packed + case.page - 1) // case.page
    return torch.arange(case.columns, device=DEVICE) < pages[:, None]


def counts(case, kv, visible):
    """Packed tokens and all tokens that the queries of all sequences see."""
    shown = visible_positions(kv.total, case.new, case.sliding) if visible is None else visible
    packed = total = 0
    for b in range(len(kv.packed)):
        n, oldest = int(kv.packed[b]), max(0, ((int(kv.packed[b]) - 1) // case.page - case.columns + 1) * case.page)
        held = {p for p in range(int(kv.total[b])) if not kv.n_sink <= p < kv.n_sink + n}
        for low, high in zip(shown.low[b].tolist(), shown.high[b].tolist(), strict=True):
            of_pages = max(min(high - kv.n_sink, n) - max(low - kv.n_sink, oldest), 0)
            packed, total = packed + of_pages, total + of_pages + len(held & set(range(low, high)))
    return [packed, total]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name, splits):
    """Relative error of the output below 1e-3, exact where nothing is visible; all that is hidden is NaN."""
    compare(CASES[name], splits)


@pytest.mark.parametrize(("splits", "rows"), [(1, 1), (3, None)], ids=["tiles", "splits"])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_chunk_as_the_reference(name, splits, rows, monkeypatch):
    """More queries than read codes: tokens are unpacked, all at once or some at a time; error as rows are rounded."""
    if rows is not None:
        monkeypatch.setattr(triton_prefill, "ROWS_BYTES", rows)
    compare(CHUNKS[name], splits, error=ROUNDED[CHUNKS[name].dtype])


def test_a_chunk_with_nothing_to_read_back():
    """No read, no mean: values in their own basis."""
    case = replace(CHUNKS["mixed bits"], mean=False)
    q, kv, readers, visible = make(case, DEVICE)
    compare(case, 2, (q, kv, replace(readers, read=None), visible))


def test_many_splits_join():
    compare(Case(dim=16, columns=24, packed=(750,), held=(770,), total=(771,)), 150)


def test_nothing_to_read_with_or_back():
    """No read, no mean, no new tokens."""
    q, kv, readers, visible = make(Case(new_tokens=False, dim=80, mean=False), DEVICE)
    compare(Case(new_tokens=False, dim=80), 2, (q, kv, replace(readers, read=None), visible))


def test_pages_lie_where_the_table_says():
    """The same tokens in other pages, other strides of pages, table and lengths: the same bits come out."""
    case = Case(heads=((1, 2, 2), (1, 4, 3)), dim=32, **TWO)
    q, kv, readers, _ = make(case, DEVICE)
    first = triton_kernel.launch(q, 0.7, kv, readers, splits=2)
    n = kv.pages[0].shape[0]
    to = torch.randperm(n - 1, generator=torch.Generator().manual_seed(3)).to(DEVICE) + 1
    to = torch.cat([to.new_zeros(1), to])
    pages = []
    for page in kv.pages:
        other = torch.empty(n + 5, *page.shape[1:], dtype=page.dtype, device=DEVICE)  # heads within a page
        other[to] = page
        pages.append(other)
    lengths = torch.stack([kv.packed, kv.held, kv.total], 1).unbind(1)  # strided
    other = replace(kv, pages=pages, table=to[kv.table.long()].int().T.contiguous().T)
    other = replace(other, **dict(zip(("packed", "held", "total"), lengths, strict=True)))
    second = triton_kernel.launch(q, 0.7, other, readers, splits=2)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("case", [Case(group=3), Case(group=3, new=40, total=(210,))], ids=["a token", "a chunk"])
def test_a_non_finite_query_stays_visible(case):
    q, kv, readers, _ = make(case, DEVICE)
    q[0, 0, 0, 5] = float("nan")
    out, lse = triton_kernel.launch(q, 0.7, kv, readers, splits=2)
    assert out[0, 0, 0].isnan().all() and lse[0, 0, 0].isnan().all()
    assert out[0, 1:].isfinite().all() and out[0, 0, 1:].isfinite().all()


def test_what_is_not_served():
    q, kv, readers, _ = make(Case(), DEVICE)
    assert triton_kernel.launch(q.double(), 0.7, kv, readers) is None
    exact = replace(Case().layout().groups[0], values=cases.Side())
    layout = replace(Case().layout(), groups=(exact,))
    pages = layout.allocate(kv.pages[0].shape[0], torch.float32, DEVICE)
    assert triton_kernel.launch(q, 0.7, replace(kv, layout=layout.spec, pages=pages), readers) is None


def test_no_queries():
    q, kv, readers, _ = make(Case(), DEVICE)
    out, lse = triton_kernel.launch(q[:, :, :0], 0.7, kv, readers)
    assert out.shape == (1, 2, 0, 64) and lse.shape == (1, 2, 0)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_unpacking_in_ptx(width):
    """The interpreter does not run PTX: its few instructions are followed here, for each byte and bit position."""

    def half(bits):
        return float(np.array(bits & 0xFFFF, dtype=np.uint16).view(np.float16))

    for at in range(0, 8, width):
        body = triton_codes.spread_ptx((2**width - 1) << at)
        body = getattr(body, "value", body).strip("{} ")
        for byte in range(256):
            word = byte | (255 - byte) << 8 | 170 << 16 | byte << 24
            registers = {"$2": word}
            for line in body.split(";")[1:]:
                if not line.strip():
                    continue
                name, operands = line.split(maxsplit=1)
                target, *sources = (x.strip() for x in operands.split(","))
                a, *rest = (registers[x] if x in registers else int(x, 0) for x in sources)
                if name == "prmt.b32":
                    chosen = [(rest[1] >> 4 * i) & 7 for i in range(4)]
                    both = a.to_bytes(4, "little") + rest[0].to_bytes(4, "little")
                    registers[target] = int.from_bytes(bytes(both[i] for i in chosen), "little")
                else:
                    assert name == "and.b32"
                    registers[target] = a & rest[0]
            found = [half(registers[x] >> s) for x in ("$0", "$1") for s in (0, 16)]
            codes = [(b >> at) & (2**width - 1) for b in word.to_bytes(4, "little")]
            assert found == [c * 2**at * 2.0**-24 for c in codes]


def test_examples():
    assert doctest.testmod(triton_codes).failed == 0


def encoders(case):
    """Codes of few bits from any token, the same for the same token."""

    def encode(x, part):
        group = next(g for g in case.layout().groups if g.part == part)
        scale = stored_scale(x.float().abs().amax(-1).clamp(min=0.1), group.keys.scale_bits)
        top = torch.tensor([2.0**b - 1 for b in group.keys.bits], device=x.device)
        codes = ((x / scale[..., None] + 1) / 2 * top).round().clamp(min=0).minimum(top).to(torch.uint8)
        return codes, scale, scale + 1 if case.zero else None

    def encode_values(x, part):
        group = next(g for g in case.layout().groups if g.part == part)
        scale = x.float().unflatten(-1, (case.value_groups, -1)).abs().amax(-1).clamp(min=0.1)
        scale = stored_scale(scale, group.values.scale_bits)
        whole = scale.repeat_interleave(case.dim // case.value_groups, -1)
        top = 2 ** group.values.bits[0] - 1
        codes = ((x / whole + 1) / 2 * top).round().clamp(0, top).to(torch.uint8)
        return codes, scale, scale + 1 if case.zero else None

    return encode, encode_values


UPDATES = [
    "2 bits", "2 bits, fp16 scales", "head groups, fp16 scales", "2 bits, pages of 16",
    "1 and 8 bits", "3 bits", "5 and 6 bits", "6 and 5 bits", "head groups", "side code",
    "groups of values, zeros", "unequal lengths", "wrapped", "empty", "bfloat16",
]  # fmt: skip


@pytest.mark.parametrize("new", [1, 7, 45])
@pytest.mark.parametrize("name", UPDATES)
def test_update(name, new):
    """Pages and window bit for bit as the reference leaves them, padding on the left, some tokens not to be packed."""
    case = CASES[name]
    _, kv, _, _ = make(case, DEVICE)
    batch, g = len(case.packed), torch.Generator().manual_seed(1)
    for t in kv.pages:  # what NaN and 255 hide is compared too
        t.copy_(torch.randint(0, 256, t.shape, generator=g) if t.dtype == torch.uint8 else torch.rand(t.shape))
    k, v = (torch.randn(batch, new + 2, kv.window_k.shape[1], case.dim, generator=g).transpose(1, 2) for _ in range(2))
    k, v = (x.to(DEVICE, case.dtype) for x in (k, v))
    start = torch.arange(batch, device=DEVICE) % 3
    total = kv.held + new + torch.arange(batch, device=DEVICE) % 2
    packed = torch.maximum(kv.packed, total - case.sinks - 16)
    most = int((packed - kv.packed).max()) + 2
    if (packed - kv.packed).max() > case.page * case.columns:
        pytest.skip("more tokens than pages")
    found, expected = (
        replace(kv, total=total, new_start=start, pages=[p.clone() for p in kv.pages],
                window_k=kv.window_k.clone(), window_v=kv.window_v.clone())
        for _ in range(2)
    )  # fmt: skip
    assert update_kernel.update(found, k, v, packed, most, *encoders(case))
    cache_update(expected, k, v, packed, most, *encoders(case))
    for a, b in zip(found.pages, expected.pages, strict=True):
        assert torch.equal(a[1:].view(torch.uint8), b[1:].view(torch.uint8))
    position, _ = window_positions(replace(expected, held=total))
    held = ((position >= 0) & (position < total[:, None]))[:, None, :, None]
    for a, b in ((found.window_k, expected.window_k), (found.window_v, expected.window_v)):
        assert torch.equal(a.masked_fill(~held, 0).nan_to_num(7), b.masked_fill(~held, 0).nan_to_num(7))
    assert torch.equal(found.pages[0], kv.pages[0]) == torch.equal(packed, kv.packed)


def test_update_by_encoders():
    """As the operator launches it: encoders flat, tokens that are not finite refused before anything is written."""
    _, kv, _, _ = make(Case(), DEVICE)
    g, dim = torch.Generator().manual_seed(1), kv.window_k.shape[-1]
    encode, seen = (torch.randn(1, 1, dim, n, generator=g).to(DEVICE) / dim**0.5 for n in (dim, 8))
    hessian = seen @ seen.mT + 0.2 * torch.eye(dim, device=DEVICE)
    keys = Encoder(encode, (2,), torch.ones(1, 1, dim, device=DEVICE), hessian=hessian)
    values = Encoder(encode, (2,), 0.9957)
    k, v = (torch.randn(1, 1, 20, dim, generator=g).to(DEVICE) for _ in range(2))
    total, packed = kv.held + 20, kv.packed + 19
    found, expected = (
        replace(kv, total=total, pages=[p.clone() for p in kv.pages], window_k=kv.window_k.nan_to_num(),
                window_v=kv.window_v.nan_to_num())
        for _ in range(2)
    )  # fmt: skip
    given = (k, v, packed, 20)
    with pytest.raises(ValueError, match="keys must be finite"):
        update_kernel.launch(found, k / 0, v, packed, 20, *flatten([keys], [values]), True)
    assert all(torch.equal(a, b) for a, b in zip(found.pages, expected.pages, strict=True) if a.dtype == torch.uint8)
    assert update_kernel.launch(found, *given, *flatten([keys], [values]), True)
    cache_update(expected, *given, *coders(Case().layout(), [keys], [values]))
    for a, b in zip(found.pages, expected.pages, strict=True):
        assert torch.equal(a[1:].view(torch.uint8), b[1:].view(torch.uint8))
    assert torch.equal(found.window_k, expected.window_k) and torch.equal(found.window_v, expected.window_v)
    assert not torch.equal(found.pages[0], kv.pages[0])


def test_what_the_update_does_not_serve():
    case = Case()
    _, kv, _, _ = make(case, DEVICE)
    k = torch.zeros(1, 1, 1, 64, dtype=torch.float64, device=DEVICE)
    assert not update_kernel.update(kv, k, k, kv.packed, 0, *encoders(case))
    assert not update_kernel.launch(kv, k, k, kv.packed, 0, *flatten([None], [None]), True)
