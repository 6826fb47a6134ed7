"""The Triton kernels against the reference: in Triton's interpreter by test_triton_interpreter.py, and on a GPU.

The interpreter is chosen when Triton is imported, so these run in a process of their own, with TRITON_INTERPRET=1;
``python -m pytest tests/ops/triton_interpreted.py`` without it runs them on the GPU.
"""

import doctest
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headq_ao.ops import ExactRows, MappedQuery, Rows
from headq_ao.ops.decode_attention import triton_kernel as decode
from headq_ao.ops.feedback import reference as feedback_reference
from headq_ao.ops.feedback import triton_kernel as feedback
from headq_ao.ops.feedback.op import PASSES, SPREADS

op = importlib.import_module("headq_ao.ops.decode_attention.op")
spec = importlib.util.spec_from_file_location("cpu_kernel_cases", Path(__file__).with_name("test_cpu_kernel.py"))
cases = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cases
spec.loader.exec_module(cases)

# batch, kv heads, group, new tokens, slots, head_dim, key bits, rank, side bits, key zero, value bits, value group,
# value zero, holes
SHAPES = [
    (1, 2, 3, 1, 320, 64, 2, 16, 2, False, 2, 64, False, False),
    (2, 1, 4, 1, 160, 128, 4, 8, 4, True, 4, 32, True, False),
    (1, 1, 5, 3, 96, 80, 3, 0, 2, False, 3, 80, False, False),
    (1, 1, 1, 20, 160, 96, 1, 24, 2, True, 1, 24, True, True),
    (1, 1, 6, 2, 96, 16, 8, 16, 1, False, 8, 16, True, False),
    (1, 2, 2, 1, 64, 48, 5, 4, 3, False, 6, 8, False, True),
    (1, 1, 4, 1, 64, 32, 6, 0, 2, True, 5, 32, True, True),
    (1, 1, 8, 1, 160, 256, 2, 64, 2, False, 2, 256, False, False),
]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, no interpreter")


def run_of(keys, values, first=0):
    return decode.Run(
        first, keys.planes, list(keys.bits), keys.scale, keys.zero,
        values.planes, values.bits[0], values.scale, values.zero,
    )  # fmt: skip


def arguments(q, keys, values, start, stop, valid):
    """Of the kernels."""
    return q.codes, q.bias, q.zero, q.gauge, run_of(keys, values), start, stop, valid


def operands(q, keys, values, start, stop, valid):
    """Of the operators behind ``torch.library``."""
    return q.codes, q.bias, q.zero, q.gauge, *run_of(keys, values)[1:], start, stop, valid


def moved(x):
    """Tensors, and what holds them, on the device of the kernels."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, (MappedQuery, Rows)):
        return type(x)(**{name: moved(value) for name, value in vars(x).items()})
    if isinstance(x, (list, tuple)):
        parts = [moved(y) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def make(*shape):
    return moved(cases.make(*shape))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(shape, splits):
    """Relative output error below 1e-3 (measured 1e-4 to 3.3e-4), and exact where nothing is visible."""
    case = make(*shape)
    out, lse = decode.decode_attention(*arguments(*case), splits=splits)
    expected, expected_lse = cases.reference(*case)
    assert (out - expected).norm() <= 1e-3 * expected.norm()
    seen = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert torch.equal(out[~seen], torch.zeros_like(out[~seen]))
    torch.testing.assert_close(lse[seen], expected_lse[seen], rtol=1e-3, atol=2e-3)


def test_many_splits_join():
    case = make(1, 1, 2, 1, 1280, 16, 2, 0, 2, False, 2, 16, False, False)
    out, _ = decode.decode_attention(*arguments(*case), splits=20)
    expected, _ = cases.reference(*case)
    assert (out - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend(shape, dtype):
    """Packed and exact rows in two launches; what sees neither is 0."""
    q, keys, values, start, stop, valid = make(*shape)
    batch, heads, new, d = *q.codes.shape[:3], shape[5]
    kv_heads, held = keys.scale.shape[1], 39
    g = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=g).to(DEVICE)  # noqa: E731
    k, v = (draw(batch, kv_heads, held + 3, d).to(dtype)[:, :, :held] for _ in range(2))
    first = torch.randint(0, 8, (batch, new), generator=g).to(DEVICE)
    last = torch.randint(20, held + 1, (batch, new), generator=g).to(DEVICE)
    last[0, 0] = first[0, 0] if new > 1 else last[0, 0]
    read, mean = draw(1, kv_heads, d, d) / d**0.5, draw(1, 1, d) if new == 1 else None
    exact = ExactRows(draw(batch, heads, new, d) / d**0.5, k, v, first, last, read.transpose(-1, -2), mean)
    query = (q.codes, q.bias, q.zero, q.gauge)
    out = decode.attend(*query, [run_of(keys, values)], start, stop, valid, exact, splits=2)
    expected = op._attend_parts(*operands(q, keys, values, start, stop, valid), *exact)
    assert (out - expected).norm() <= 1e-3 * expected.norm()
    if new > 1:
        assert torch.equal(out[0, :, 0], torch.zeros_like(out[0, :, 0]))


@pytest.mark.parametrize("by", [2.0**-20, 2.0**23])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]])
def test_attend_of_rows_of_any_size(shape, by):
    """Exact rows that are so many times as large, packed ones in a unit of each sequence: as large an output."""
    q, keys, values, start, stop, valid = make(*shape)
    batch, heads, new, d = *q.codes.shape[:3], shape[5]
    kv_heads, held = keys.scale.shape[1], 39
    g = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=g).to(DEVICE)  # noqa: E731
    k, v, of_exact = draw(batch, kv_heads, held, d), draw(batch, kv_heads, held, d), draw(batch, heads, new, d) / d**0.5
    read, first = draw(batch, kv_heads, d, d) / d**0.5, torch.zeros(batch, new, dtype=torch.int64, device=DEVICE)
    query, outs = (q.codes, q.bias, q.zero, q.gauge), []
    for size in (1.0, by):
        exact = ExactRows(of_exact / size, k * size, v * size, first, first + held, read * size, None)
        outs.append(decode.attend(*query, [run_of(keys, values)], start, stop, valid, exact, splits=2))
    assert torch.equal(outs[0] * by, outs[1])


def test_attend_runs_of_heads(monkeypatch):
    """Heads of other bits beside each other, and a batch whose queries lie in any order."""
    shapes = [
        (2, 1, 3, 1, 160, 64, 2, 0, 2, False, 3, 64, False, False),
        (2, 2, 3, 1, 160, 64, 4, 0, 2, False, 2, 64, False, False),
    ]
    parts = [make(*shape) for shape in shapes]
    q = MappedQuery(*(torch.cat([getattr(p[0], x) for p in parts], 1) for x in ("codes", "bias", "zero", "gauge")))
    q = MappedQuery(q.codes.transpose(0, 1).contiguous().transpose(0, 1), q.bias, q.zero, q.gauge)
    start, stop, g = *parts[0][3:5], torch.Generator().manual_seed(2)
    draw = lambda *size: torch.randn(*size, generator=g).to(DEVICE)  # noqa: E731
    seen = moved((torch.tensor([[0], [3]]), torch.tensor([[20], [17]])))
    exact = ExactRows(
        draw(2, 9, 1, 64) / 8, draw(2, 3, 20, 64), draw(2, 3, 20, 64), *seen, draw(1, 3, 64, 64) / 8, None
    )
    runs = [run_of(*parts[0][1:3]), run_of(*parts[1][1:3], first=1)]
    out = decode.attend(q.codes, q.bias, q.zero, q.gauge, runs, start, stop, None, exact)
    heads = [(slice(0, 1), *parts[0][1:3]), (slice(1, 3), *parts[1][1:3])]
    expected = []
    for rows, (keys, values) in ((slice(0, 1), parts[0][1:3]), (slice(1, 3), parts[1][1:3])):
        of_q = slice(rows.start * 3, rows.stop * 3)
        own = exact._replace(q=exact.q[:, of_q], k=exact.k[:, rows], v=exact.v[:, rows], read=exact.read[:, rows])
        expected.append(op._attend_parts(*operands(q.of_heads(of_q), keys, values, start, stop, None), *own))
    expected = torch.cat(expected, 1)
    assert (out - expected).norm() <= 1e-3 * expected.norm()
    whole = op.attend_runs(q, start, stop, None, heads, exact)
    assert (whole - expected).norm() <= 1e-3 * expected.norm()
    numbers = iter([3, 2])  # the runs may be split differently
    monkeypatch.setattr(decode, "split_count", lambda *_: next(numbers))
    launched = op.launch_runs(decode, q, start, stop, None, heads, exact)
    assert (launched - expected).norm() <= 1e-3 * expected.norm() and next(numbers, None) is None


@pytest.mark.parametrize("group", [64, 32])
def test_hidden_slots_may_hold_anything(group):
    """Unused capacity is not initialized: scales of NaN and infinity and any bytes change nothing."""
    q, keys, values, start, stop, _ = make(1, 2, 3, 1, 320, 64, 2, 16, 2, False, 2, group, False, False)
    start[:], stop[:] = 32, 240
    clean = decode.decode_attention(*arguments(q, keys, values, start, stop, None))
    for rows in (keys.scale, values.scale):
        rows[:, :, :32], rows[:, :, 240:] = float("nan"), float("inf")
    for planes in (keys.planes, values.planes):
        planes[0][:, :, :2], planes[0][:, :, 15:] = 255, 255
    dirty = decode.decode_attention(*arguments(q, keys, values, start, stop, None))
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


def test_views_of_a_larger_store():
    q, keys, values, start, stop, _ = make(2, 1, 4, 1, 160, 64, 4, 8, 4, True, 4, 32, True, False)
    start[:], stop[:] = 3, 61
    scales = ("scale", "zero")
    cut = Rows(
        planes=[p[:, :, 2:6] for p in keys.planes],
        bits=keys.bits,
        **{name: getattr(keys, name)[:, :, 32:96] for name in scales},
    )
    cut_v = Rows(
        planes=[p[:, :, 4:12] for p in values.planes],
        bits=(4,),
        **{name: getattr(values, name)[:, :, 32:96] for name in scales},
    )
    out, _ = decode.decode_attention(*arguments(q, cut, cut_v, start, stop, None))
    expected, _ = cases.reference(q, cut, cut_v, start, stop, None)
    assert (out - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # NumPy's
def test_a_non_finite_query_stays_visible():
    q, keys, values, start, stop, valid = make(*SHAPES[0])
    q.codes[0, 0, 0, 5] = float("nan")
    out, lse = decode.decode_attention(*arguments(q, keys, values, start, stop, valid))
    assert out[0, 0].isnan().all() and lse[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()


def test_a_long_chunk_keeps_to_the_reference(monkeypatch):
    """What the operator does on a GPU: the kernel for a few queries, matrix products over unpacked tiles for many."""
    q, keys, values, start, stop, valid = make(*SHAPES[2])
    expected = cases.reference(q, keys, values, start, stop, valid)
    rest = operands(q, keys, values, start, stop, valid)
    rest = (*rest[:4], None, *rest[4:8], None, *rest[8:])
    few = op._cuda(*rest)
    assert not torch.equal(few[0], expected[0])
    assert (few[0] - expected[0]).norm() <= 1e-3 * expected[0].norm()
    monkeypatch.setattr(op, "KERNEL_QUERIES", 2)
    assert torch.equal(op._cuda(*rest)[0], expected[0])


@pytest.mark.parametrize(
    ("batch", "heads", "rows", "width", "bits", "own", "unbiased"),
    [
        (1, 2, 40, 16, 2, (1, 2), True),
        (2, 1, 8, 24, 3, (2, 1), False),
        (1, 1, 32, 64, 2, (1, 1), True),
        (2, 2, 33, 96, 1, (1, 2), True),
        (1, 1, 20, 80, 8, (1, 1), True),
        (1, 1, 16, 8, 4, (1, 1), False),
    ],
)
def test_feedback_codes(batch, heads, rows, width, bits, own, unbiased):
    """Codes equal to the reference's (measured: all of them; a tie may fall either way), and as good an error."""
    g = torch.Generator().manual_seed(0)
    seen = torch.randn(*own, width, width // 2, generator=g)
    metric = seen @ seen.mT + 0.2 * torch.eye(width)
    y, step = 3 * torch.randn(batch, heads, rows, width, generator=g), 0.8 + 0.4 * torch.rand(*own, width, generator=g)
    feedback_as_the_reference(y, metric, step, bits, unbiased)


def test_feedback_codes_of_an_ill_conditioned_metric():
    """Eigenvalues over five decades, as queries have them, where errors pull each other the most."""
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(1, 2, 128, 128, dtype=torch.float64, generator=g))
    metric = (basis * torch.logspace(0, -5, 128, dtype=torch.float64)) @ basis.mT
    y, step = torch.randn(1, 2, 50, 128, generator=g), torch.full((1, 1, 128), 0.9)
    feedback_as_the_reference(y, metric.float(), step, 2, unbiased=True)


def test_no_feedback_codes_of_no_rows():
    y, metric, step = moved((torch.empty(1, 2, 0, 24), torch.eye(24).expand(1, 2, 24, 24), torch.ones(1, 2, 24)))
    codes, scale = feedback.feedback_codes(y, metric, metric, step, 2, SPREADS, PASSES, True)
    assert codes.shape == (1, 2, 0, 24) and scale.shape == (1, 2, 0)


def feedback_as_the_reference(y, metric, step, bits, unbiased):
    y, metric, step = moved((y, metric, step))
    arguments = (y, metric, feedback_reference.unit_factor(metric), step, bits, SPREADS, PASSES, unbiased)
    codes, scale = feedback.feedback_codes(*arguments)
    expected, expected_scale = feedback_reference.feedback_codes(*arguments)

    def error(codes, scale):
        e = y - scale.float()[..., None] * step.unsqueeze(-2) * (codes.float() - (2**bits - 1) / 2)
        return ((e @ metric) * e).sum(-1)

    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16
    same = (codes == expected).all(-1) & (scale == expected_scale)
    assert same.float().mean() >= 0.98
    assert error(codes, scale).sum() <= 1.001 * error(expected, expected_scale).sum()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_unpacking_in_ptx(width):
    """The interpreter does not run PTX: its few instructions are followed here, for each byte and bit position."""

    def half(bits):
        return float(np.array(bits & 0xFFFF, dtype=np.uint16).view(np.float16))

    for at in range(0, 8, width):
        body = decode.spread_ptx((2**width - 1) << at)
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
    assert doctest.testmod(decode).failed == 0
