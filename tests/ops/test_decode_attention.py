"""Attention over packed and exact rows against a loop over queries and slots in float64.

Float64 queries are read by the reference; what a compiled kernel may lose in float32 is tests/ops/test_cpu_kernel.py's.
"""

import math
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from headq_ao.ops import MappedQuery, Rows, decode_attention, merge_segments
from headq_ao.ops.layout import pack_keys, pack_values

OP = sys.modules["headq_ao.ops.decode_attention.op"]  # `headq_ao.ops.decode_attention` is the function
FOUR = pytest.mark.parametrize("packed", [(True, True), (True, False), (False, True), (False, False)], ids=str)


class Case:
    """A segment, its plain contents, and the loop over them."""

    def __init__(
        self, randn, packed=(True, True), B=1, Hkv=2, G=2, S=1, T=32, D=16, dtype=torch.float64,
        key_bits=None, key_zero=False, value_bits=2, value_zero=True, value_groups=1,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(T + D)
        self.sizes = B, Hkv, G, S, T, D
        key_bits = [2] * D + [4] * 3 if key_bits is None else key_bits
        width = len(key_bits) if packed[0] else D
        q = [randn(B, Hkv * G, S, *n).to(dtype) for n in ((width,), (), (), ())]
        self.q = MappedQuery(q[0] / width**0.5, *q[1:]) if packed[0] else MappedQuery.exact(q[0], 0.25)
        self.sigma, self.m = torch.ones(B, Hkv, T), torch.zeros(B, Hkv, T)
        if packed[0]:
            codes = torch.stack(
                [torch.randint(2**b, (B, Hkv, T), generator=g, dtype=torch.uint8) for b in key_bits], -1
            )
            self.sigma = (0.1 + randn(B, Hkv, T).abs() / 4).half()
            if key_zero:
                self.m = randn(B, Hkv, T).half()
            self.keys = Rows(
                planes=pack_keys(codes, key_bits), bits=key_bits, scale=self.sigma, zero=self.m if key_zero else None
            )
            self.k = codes
        else:
            self.k = randn(B, Hkv, T, D).to(dtype)
            self.keys = Rows(exact=self.k)
        if packed[1]:
            codes = torch.randint(2**value_bits, (B, Hkv, T, D), generator=g, dtype=torch.uint8)
            scale = (0.1 + randn(B, Hkv, T, value_groups).abs()).half()
            zero = randn(B, Hkv, T, value_groups).half() if value_zero else None
            self.values = Rows(planes=pack_values(codes, value_bits), bits=(value_bits,), scale=scale, zero=zero)
            spread = scale.double().repeat_interleave(D // value_groups, -1)
            low = -spread * (2**value_bits - 1) / 2
            self.v = spread * codes + (low if zero is None else zero.double().repeat_interleave(D // value_groups, -1))
        else:
            self.v = randn(B, Hkv, T, D).to(dtype)
            self.values = Rows(exact=self.v)

    def span(self, start=0, stop=None):
        B, _, _, S, T, _ = self.sizes
        return torch.full((B, S), start), torch.full((B, S), T if stop is None else stop)

    def op(self, *span, valid=None):
        return decode_attention(self.q, self.keys, self.values, *(span or self.span()), valid)

    def loop(self, start, stop, valid=None):
        """s_j = σ_j (q̃·c_j + b) + m_j h + q·μ, softmax, weighted sum; one query and one slot at a time."""
        B, Hkv, G, S, T, D = self.sizes
        out, lse = torch.zeros(B, Hkv * G, S, D, dtype=torch.float64), torch.zeros(B, Hkv * G, S, dtype=torch.float64)
        for b in range(B):
            for head in range(Hkv * G):
                h = head // G
                for i in range(S):
                    q, bias, zero, gauge = (x[b, head, i].double() for x in (*vars(self.q).values(),))
                    seen = [
                        t
                        for t in range(T)
                        if int(start[b, i]) <= t < int(stop[b, i]) and (valid is None or bool(valid[b, t]))
                    ]
                    s = {
                        t: float(self.sigma[b, h, t]) * float(q @ self.k[b, h, t].double() + bias)
                        + float(self.m[b, h, t]) * float(zero)
                        + float(gauge)
                        for t in seen
                    }
                    if not seen:
                        lse[b, head, i] = -math.inf
                        continue
                    highest = max(s.values())
                    total = sum(math.exp(x - highest) for x in s.values())
                    lse[b, head, i] = highest + math.log(total)
                    for t in seen:
                        out[b, head, i] += math.exp(s[t] - highest) / total * self.v[b, h, t].double()
        return out, lse


@pytest.fixture
def make(randn):
    return lambda **options: Case(randn, **options)


@pytest.fixture
def reference_only(monkeypatch):
    """No compiled kernel: the op's float32 body."""
    monkeypatch.setattr(OP.cpu_kernel, "library", lambda: None)


def same(actual, expected, tol=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tol, atol=tol)


@FOUR
@pytest.mark.parametrize("heads", [(2, 1), (1, 3), (2, 6), (1, 4)], ids=lambda x: f"Hkv{x[0]}xG{x[1]}")
def test_against_a_loop(make, packed, heads):
    case = make(packed=packed, Hkv=heads[0], G=heads[1])
    same(case.op(), case.loop(*case.span()))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [32, 96])
def test_head_dims(make, head_dim, tokens):
    case = make(D=head_dim, T=tokens, value_groups=head_dim // 16)
    same(case.op(), case.loop(*case.span()))


@pytest.mark.parametrize("tokens", [1, 5, 16, 33])
def test_exact_rows_of_any_length(make, tokens):
    case = make(packed=(False, False), T=tokens, S=2)
    same(case.op(), case.loop(*case.span()))


@pytest.mark.parametrize("key_zero", [False, True])
@pytest.mark.parametrize("value_zero", [False, True])
@pytest.mark.parametrize(
    ("key_bits", "value_bits"),
    [([1] * 16, 1), ([2] * 16, 2), ([3] * 16 + [2] * 5, 3), ([4] * 16 + [8] * 2, 4), ([6, 5] * 8, 6), ([8] * 16, 8)],
    ids=str,
)
def test_bits_and_zeros(make, key_bits, value_bits, key_zero, value_zero):
    case = make(key_bits=key_bits, value_bits=value_bits, key_zero=key_zero, value_zero=value_zero, value_groups=2)
    same(case.op(), case.loop(*case.span()))


@FOUR
def test_ranges_per_query(make, packed):
    """Each query and each sequence sees its own slots; one sees none."""
    case = make(packed=packed, B=2, S=3, T=32)
    start, stop = torch.tensor([[0, 3, 31], [16, 7, 0]]), torch.tensor([[32, 17, 32], [20, 7, 1]])
    out, lse = case.op(start, stop)
    same((out, lse), case.loop(start, stop))
    assert bool((out[1, :, 1] == 0).all()) and bool((lse[1, :, 1] == -math.inf).all())


@pytest.mark.parametrize("span", [(0, 0), (20, 10), (32, 32), (40, 64)], ids=str)
def test_empty_ranges(make, span):
    case = make()
    out, lse = case.op(*case.span(*span))
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())


@FOUR
def test_no_slots_at_all(make, packed):
    case = make(packed=packed, T=0, S=2)
    out, lse = case.op()
    assert out.shape == (1, 4, 2, 16) and bool((out == 0).all())
    assert lse.shape == (1, 4, 2) and bool((lse == -math.inf).all())


@FOUR
def test_valid_mask(make, packed):
    case = make(packed=packed, B=2, S=2, T=32)
    valid = torch.rand(2, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    valid[1, :20] = False
    start, stop = torch.tensor([[0, 8], [0, 0]]), torch.tensor([[32, 30], [32, 20]])
    out, lse = case.op(start, stop, valid=valid)
    same((out, lse), case.loop(start, stop, valid))
    assert bool((lse[1, :, 1] == -math.inf).all())


@FOUR
def test_small_tiles_equal_one(make, monkeypatch, packed):
    case = make(packed=packed, B=2, S=5, T=96)
    start, stop = torch.tensor([[0, 3, 31, 70, 40]] * 2), torch.tensor([[96, 17, 60, 70, 90]] * 2)
    valid = torch.rand(2, 96, generator=torch.Generator().manual_seed(0)) < 0.8
    whole = case.op(start, stop, valid=valid)
    monkeypatch.setattr(OP, "SLOT_TILE", 32)
    monkeypatch.setattr(OP, "QUERY_TILE", 2)
    same(case.op(start, stop, valid=valid), whole)
    same(whole, case.loop(start, stop, valid))


def test_more_slots_and_queries_than_a_tile(make, monkeypatch):
    slots, queries = OP.SLOT_TILE + 32, OP.QUERY_TILE + 1
    case = make(Hkv=1, G=1, S=queries, T=slots)
    start = torch.arange(queries)[None] * 2
    stop = (start + 900).clamp(max=slots)
    tiled = case.op(start, stop)
    monkeypatch.setattr(OP, "SLOT_TILE", slots)
    monkeypatch.setattr(OP, "QUERY_TILE", queries)
    same(tiled, case.op(start, stop))


def poisoned(x, start, stop, entry=1):
    """A copy whose tokens outside [start, stop) hold what an uninitialized allocation may hold."""
    if x is None:
        return None
    bad = torch.full_like(x, 0xA7) if x.dtype == torch.uint8 else torch.full_like(x, float("nan"))
    if x.dtype == torch.float16:
        bad[:, :, 1::2] = float("inf")
    bad[:, :, start // entry : stop // entry] = x[:, :, start // entry : stop // entry]
    return bad


@FOUR
@pytest.mark.parametrize("zeros", [False, True])
def test_unused_capacity_does_not_leak(make, packed, zeros):
    start, stop = 32, 64
    case = make(packed=packed, B=2, S=2, T=96, key_zero=zeros, value_zero=zeros)
    clean = case.op(*case.span(start, stop))
    keys, values = (
        Rows(
            poisoned(r.exact, start, stop),
            [poisoned(p, start, stop, 16) for p in r.planes],
            r.bits,
            poisoned(r.scale, start, stop),
            poisoned(r.zero, start, stop),
        )
        for r in (case.keys, case.values)
    )
    dirty = decode_attention(case.q, keys, values, *case.span(start, stop))
    assert all(bool(torch.isfinite(x).all()) for x in dirty)
    same(dirty, clean)
    empty = decode_attention(case.q, keys, values, *case.span(0, 0))
    assert bool((empty[0] == 0).all()) and bool((empty[1] == -math.inf).all())


@FOUR
def test_holes_do_not_leak(make, packed):
    case = make(packed=packed, T=32)
    valid = torch.ones(1, 32, dtype=torch.bool)
    valid[0, 7] = False
    clean = case.op(valid=valid)
    for rows in (case.keys, case.values):
        for x in (rows.exact, rows.scale, rows.zero):
            if x is not None:
                x[:, :, 7] = float("nan")
    same(case.op(valid=valid), clean)


@FOUR
def test_scores_past_the_range_of_exp(make, packed):
    case = make(packed=packed, S=2, T=32)
    case.q = MappedQuery(case.q.codes * 1e4, case.q.bias, case.q.zero, case.q.gauge)
    out, lse = case.op()
    assert bool(torch.isfinite(out).all()) and bool((lse.abs() > 1000).any())
    same((out, lse), case.loop(*case.span()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@FOUR
def test_exact_rows_in_model_dtype(make, reference_only, packed, dtype):
    """Rows keep the model's dtype; sums are fp32."""
    case = make(packed=packed, dtype=torch.float32, S=2)
    case.keys, case.values = (
        Rows(exact=r.exact.to(dtype)) if r.exact is not None else r for r in (case.keys, case.values)
    )
    case.k, case.v = (
        x if rows.exact is None else rows.exact for x, rows in ((case.k, case.keys), (case.v, case.values))
    )
    out, lse = case.op()
    assert out.dtype == lse.dtype == torch.float32
    same((out, lse), case.loop(*case.span()), tol=1e-5)


@pytest.mark.parametrize("span", [(0, 64), (3, 40), (0, 0), (20, 10), (63, 64)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"B": 2, "S": 3, "G": 3},
        {"D": 80, "key_bits": [3] * 80 + [2] * 20, "value_bits": 3, "value_groups": 5, "key_zero": True},
        {"Hkv": 1, "G": 1, "D": 96, "value_bits": 1, "value_zero": False},
        {"D": 256, "G": 6, "key_bits": [4] * 256 + [8] * 3, "value_bits": 8},
        {"T": 0},
    ],
    ids=["groups", "odd", "narrow", "wide", "nothing"],
)
def test_whatever_serves_float32(make, options, span):
    """By default: the compiled kernel where there is one."""
    case = make(**{"T": 64, "dtype": torch.float32} | options)
    span = case.span(*span)
    out, lse = case.op(*span)
    assert out.dtype == lse.dtype == torch.float32
    want, want_lse = case.loop(*span)
    assert float((out - want).norm()) <= 2e-3 * float(want.norm())
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-3, atol=1e-2)


def test_exact_query(randn):
    q = randn(2, 4, 3, 16, dtype=torch.float16)
    mapped = MappedQuery.exact(q, 0.25)
    assert torch.equal(mapped.codes, q.float() * 0.25)
    assert all(x.dtype == torch.float32 and x.shape == (2, 4, 3) for x in (mapped.bias, mapped.zero, mapped.gauge))
    assert not any(bool(x.any()) for x in (mapped.bias, mapped.zero, mapped.gauge))
    assert MappedQuery.exact(q.double(), 1.0).codes.dtype == torch.float64


def test_merged_segments_are_one_softmax(make):
    case = make(packed=(False, False), S=3, T=40)
    cuts = [(0, 4), (4, 4), (4, 17), (17, 40)]
    parts = [case.op(*case.span(a, b)) for a, b in cuts]
    merged = merge_segments(parts)
    same(merged, case.op())
    same(merge_segments(parts[::-1]), merged)
    k, v = case.k, case.v
    q = case.q.codes
    same((merged[0],), (scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True),))


def test_merge_of_empty_segments(make):
    case = make(S=2)
    empty, full = case.op(*case.span(0, 0)), case.op()
    out, lse = merge_segments([empty, empty])
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    same(merge_segments([empty, full]), full)
    same(merge_segments([full, empty]), full)
    same(merge_segments([full]), full)


def test_merge_of_far_apart_segments():
    out, lse = merge_segments(
        [(torch.ones(1, 2), torch.tensor([1000.0])), (torch.zeros(1, 2), torch.tensor([-1000.0]))]
    )
    assert out.tolist() == [[1.0, 1.0]] and lse.tolist() == [1000.0]


@pytest.mark.parametrize("packed", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 512), (128, 128), (80, 2048)])
def test_fp32_error_is_that_of_fp32_attention(make, reference_only, packed, head_dim, tokens):
    """At most twice the error of PyTorch's fp32 attention over the same rows, dequantized."""
    case = make(packed=packed, D=head_dim, T=tokens, G=3, key_zero=True)
    Hkv, G = case.sizes[1:3]
    ones = [x.double().unflatten(1, (Hkv, G))[..., None] for x in (case.q.bias, case.q.zero, case.q.gauge)]
    exact, _ = case.op()
    narrow = MappedQuery(*(x.float() for x in vars(case.q).values()))
    if packed[0]:
        # s_j = q̂·k̂_j with k̂_j = (σ c, σ, m, 1) and q̂ = (q̃, b, h, q·μ)
        q = torch.cat([case.q.codes.unflatten(1, (Hkv, G)), *ones], -1).flatten(1, 2)
        sigma = case.sigma.double()[..., None]
        k = torch.cat([sigma * case.k, sigma, case.m.double()[..., None], torch.ones_like(sigma)], -1)
    else:
        q, k = case.q.codes, case.k
    want = scaled_dot_product_attention(q, k, case.v, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(exact, want, rtol=1e-12, atol=1e-12)
    plain = scaled_dot_product_attention(q.float(), k.float(), case.v.float(), scale=1.0, enable_gqa=True)
    keys, values = (Rows(exact=r.exact.float()) if r.exact is not None else r for r in (case.keys, case.values))
    ours, _ = decode_attention(narrow, keys, values, *case.span())
    rms = lambda x: float((x.double() - want).square().mean().sqrt())  # noqa: E731
    assert rms(ours) <= 2 * rms(plain) + 1e-9


def op_arguments(case, start, stop, valid=None):
    q, k, v = case.q, case.keys, case.values
    return (
        q.codes, q.bias, q.zero, q.gauge, k.exact, k.planes, list(k.bits), k.scale, k.zero,
        v.exact, v.planes, v.bits[0] if v.bits else 0, v.scale, v.zero, start, stop, valid,
    )  # fmt: skip


@FOUR
@pytest.mark.parametrize("options", [{}, {"B": 2, "S": 3, "G": 3, "T": 64, "D": 32, "key_zero": True}], ids=str)
def test_opcheck(make, packed, options):
    case = make(packed=packed, dtype=torch.float32, **options)
    valid = torch.ones(case.sizes[0], case.sizes[4], dtype=torch.bool) if options else None
    torch.library.opcheck(torch.ops.headq.decode_attention.default, op_arguments(case, *case.span(3, 20), valid))


def test_opcheck_float64_and_views(make):
    """Views into a store of larger capacity, as the cache passes them."""
    case = make(B=2, T=64, value_bits=4)
    case.keys, case.values = (
        Rows(None, [p[:, :, : p.shape[2] // 2] for p in r.planes], r.bits, *(x[:, :, :32] for x in (r.scale,)), z)
        for r, z in ((case.keys, None), (case.values, case.values.zero[:, :, :32]))
    )
    torch.library.opcheck(torch.ops.headq.decode_attention.default, op_arguments(case, *case.span(0, 32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"q": MappedQuery.exact(torch.ones(1, 3, 1, 19), 1.0)}, "multiple of the 2 KV heads, got 3"),
        (
            lambda c: {"q": MappedQuery(*(x.half() for x in vars(c.q).values()))},
            "float32 or float64, got torch.float16",
        ),
        (
            lambda c: {"q": MappedQuery.exact(torch.ones(1, 4, 1, 16), 1.0)},
            "one coordinate per key coordinate, 19, got 16",
        ),
        (lambda c: {"values": Rows(exact=torch.ones(1, 2, 31, 16))}, "must hold the same slots, got 32 and 31"),
        (
            lambda c: {"start": torch.tensor([0])},
            r"start and stop must be \[B, S\] = \(1, 1\), got \(1,\) and \(1, 1\)",
        ),
        (lambda c: {"stop": torch.tensor([[1, 2]])}, r"got \(1, 1\) and \(1, 2\)"),
    ],
    ids=["heads", "dtype", "width", "slots", "start", "stop"],
)
def test_errors(make, change, message):
    case = make()
    start, stop = case.span()
    arguments = {"q": case.q, "keys": case.keys, "values": case.values, "start": start, "stop": stop} | change(case)
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)
