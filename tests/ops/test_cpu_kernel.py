"""The compiled kernel against the reference, on every code path that this machine has."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headq_ao.ops import (
    ExactRows,
    MappedQuery,
    Rows,
    attend,
    attend_runs,
    cpu_build,
    decode_attention,
    encode_keys,
    encode_values,
    merge_segments,
)
from headq_ao.ops.decode_attention import cpu_kernel
from headq_ao.ops.decode_attention.op import _tiled
from headq_ao.ops.layout import pack_keys, pack_values

LIBRARY = cpu_kernel.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler: the reference serves")
PATHS = [name for name, i in cpu_kernel.PATHS.items() if LIBRARY is not None and i <= LIBRARY.headq_best_isa()]

# batch, kv heads, group, new tokens, slots, head_dim, key bits, rank, side bits, key zero, value bits, value group,
# value zero, holes
SHAPES = [
    (1, 3, 3, 1, 640, 64, 2, 16, 2, False, 2, 64, False, False),
    (2, 2, 4, 1, 1184, 128, 4, 8, 4, True, 4, 32, True, False),
    (1, 1, 5, 3, 1120, 80, 3, 0, 2, False, 3, 80, False, False),
    (2, 1, 1, 70, 1056, 96, 1, 24, 2, True, 1, 24, True, True),
    (1, 2, 6, 2, 1088, 16, 8, 16, 1, False, 8, 16, True, False),
    (1, 2, 2, 1, 64, 48, 5, 4, 3, False, 6, 8, False, True),
    (1, 1, 8, 1, 512, 256, 2, 64, 2, False, 2, 256, False, False),
    (1, 1, 3, 1, 512, 64, 8, 0, 2, False, 3, 64, False, False),
    (1, 2, 7, 1, 1088, 64, 5, 0, 2, False, 1, 64, False, False),
]


def make(batch, hkv, group, new, slots, d, k_bits, rank, side_bits, k_zero, v_bits, v_group, v_zero, holes, seed=0):
    """Packed rows and queries whose scores spread over a few nats, with visible ranges and, if asked, holes."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, hkv, slots, d, generator=g) for _ in range(2))
    eye, bits = torch.eye(d)[None, None], [k_bits] * d + [side_bits] * rank
    planes, scale, zero = encode_keys(
        k, torch.zeros(1, hkv, d), eye, eye, torch.full((1, 1, d), 1.0 if k_zero else 3.4 / 2**k_bits), bits,
        weight=None if k_zero else torch.ones(1, 1, d),
        side_encode=eye[..., :rank] if rank else None, side_step=torch.full((1, 1, rank), 0.3) if rank else None,
    )  # fmt: skip
    keys = Rows(planes=planes, bits=bits, scale=scale, zero=zero)
    planes, scale, zero = encode_values(v, torch.eye(d), v_bits, group_size=v_group, step=0.0 if v_zero else 0.8)
    values = Rows(planes=planes, bits=(v_bits,), scale=scale, zero=zero)
    codes = torch.randn(batch, hkv * group, new, len(bits), generator=g) / (2.0**k_bits * d**0.5)
    rest = (torch.randn(batch, hkv * group, new, generator=g) for _ in range(3))
    start = torch.randint(0, slots // 2, (batch, new), generator=g)
    stop = torch.randint(slots // 2, slots + 1, (batch, new), generator=g)
    if new > 1:
        start[0, 0] = stop[0, 0] = 5
    valid = torch.rand(batch, slots, generator=g) > 0.1 if holes else None
    return MappedQuery(codes, *rest), keys, values, start, stop, valid


def reference(q, keys, values, start, stop, valid):
    """The tiled reference on the same arguments, whatever kernel is registered."""
    return _tiled(
        q.codes, q.bias, q.zero, q.gauge, None, keys.planes, list(keys.bits), keys.scale, keys.zero,
        None, values.planes, values.bits[0], values.scale, values.zero, start, stop, valid,
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_reference(shape, path, monkeypatch):
    """16-bit queries, 15-bit weights: relative output error below 1e-3, and exact where empty."""
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    case = make(*shape)
    out, lse = decode_attention(*case)
    expected, expected_lse = reference(*case)
    assert (out - expected).norm() <= 1e-3 * expected.norm()
    seen = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert torch.equal(out[~seen], torch.zeros_like(out[~seen]))
    torch.testing.assert_close(lse[seen], expected_lse[seen], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("path", PATHS)
def test_hidden_slots_may_hold_anything(path, monkeypatch):
    """Unused capacity is not initialized: NaN scales and random bytes outside the range change nothing."""
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    q, keys, values, start, stop, _ = make(*SHAPES[0])
    start[:], stop[:] = 32, 576
    clean = decode_attention(q, keys, values, start, stop)
    hidden = torch.ones(640, dtype=torch.bool)
    hidden[32:576] = False
    keys.scale[:, :, hidden] = float("nan")
    values.scale[:, :, hidden] = float("nan")
    for planes in (keys.planes, values.planes):
        planes[0][:, :, :2], planes[0][:, :, 36:] = 255, 255
    dirty = decode_attention(q, keys, values, start, stop)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_visible_scale_that_is_no_number_shows(path, side, at, monkeypatch):
    """Of one head, whose output is NaN; a head beside it is as it was."""
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    q, keys, values, start, stop, _ = make(*SHAPES[0])
    start[:], stop[:] = 0, 576
    clean, _ = decode_attention(q, keys, values, start, stop)
    {"keys": keys, "values": values}[side].scale[0, 0, at] = float("nan")
    out, _ = decode_attention(q, keys, values, start, stop)
    group = out.shape[1] // keys.scale.shape[1]
    assert bool(out[0, :group].isnan().any(-1).all()) and torch.equal(out[0, group:], clean[0, group:])


def test_queries_may_lie_in_any_order():
    """Heads of one token, one after the other: the stride of the token's dimension says nothing."""
    q, keys, values, start, stop, _ = make(*SHAPES[0])
    heads, width = q.codes.shape[1], q.codes.shape[3]
    one = MappedQuery(*(x[:1, :, :1].contiguous() for x in (q.codes, q.bias, q.zero, q.gauge)))
    keys, values = (
        dataclasses.replace(
            x, planes=[p[:1] for p in x.planes], scale=x.scale[:1], zero=None if x.zero is None else x.zero[:1]
        )
        for x in (keys, values)
    )
    turned = dataclasses.replace(one, codes=one.codes.reshape(1, 1, heads, width).transpose(1, 2))
    assert turned.codes.stride(2) != width
    start, stop = torch.tensor([[0]]), torch.tensor([[600]])
    expected, got = (decode_attention(query, keys, values, start, stop) for query in (one, turned))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("path", PATHS)
def test_many_small_weights_keep_their_sum(path, monkeypatch):
    """One row with nearly all the weight, and 511 whose weights are below half of an integer each."""
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    d, tokens = 64, 512
    k_codes = torch.zeros(1, 1, tokens, d, dtype=torch.uint8)
    k_codes[:, :, 7] = 1
    v_codes = torch.full((1, 1, tokens, d), 3, dtype=torch.uint8)
    v_codes[:, :, 7] = 0
    ones = torch.ones(1, 1, tokens, dtype=torch.float16)
    keys = Rows(None, pack_keys(k_codes, [2] * d), [2] * d, ones)
    values = Rows(None, pack_values(v_codes, 2), (2,), ones[..., None])
    nothing = torch.zeros(1, 1, 1)
    q = MappedQuery(torch.full((1, 1, 1, d), 11.2 / d), nothing, nothing, nothing)
    out, _ = decode_attention(q, keys, values, torch.tensor([[0]]), torch.tensor([[tokens]]))
    w = 511 * math.exp(-11.2)
    torch.testing.assert_close(out, torch.full_like(out, (1.5 * w - 1.5) / (1 + w)), rtol=1e-3, atol=0)


def test_threads_and_views_change_nothing():
    """Slices of a larger store and any number of threads give the same sums."""
    q, keys, values, start, stop, _ = make(*SHAPES[1])
    start[:], stop[:] = 0, 64
    cut = Rows(
        planes=[p[:, :, 2:6] for p in keys.planes],
        bits=keys.bits,
        scale=keys.scale[:, :, 32:96],
        zero=keys.zero[:, :, 32:96],
    )
    cut_v = Rows(
        planes=[p[:, :, 4:12] for p in values.planes],
        bits=(4,),
        scale=values.scale[:, :, 32:96],
        zero=values.zero[:, :, 32:96],
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = decode_attention(q, cut, cut_v, start, stop)
        torch.set_num_threads(2)
        two = decode_attention(q, cut, cut_v, start, stop)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], two[0])
    expected, _ = reference(q, cut, cut_v, start, stop, None)
    assert (one[0] - expected).norm() <= 1e-3 * expected.norm()


def test_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("HEADQ_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="HEADQ_CPU_ISA must be one of"):
        decode_attention(*make(*SHAPES[0]))


def test_no_compiler_means_one_warning_and_the_reference(monkeypatch, tmp_path):
    """A compiler that fails leaves no file behind and does not raise."""
    monkeypatch.setenv("HEADQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    source = Path(cpu_kernel.__file__).with_name("cpu_kernel.cpp")
    with pytest.warns(UserWarning, match="no compiled CPU kernel"):
        assert cpu_build.load.__wrapped__(source) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_may_compile_at_once(tmp_path):
    code = "from headq_ao.ops.decode_attention import cpu_kernel; assert cpu_kernel.library() is not None"
    environment = {**os.environ, "HEADQ_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_planes_of_any_strides():
    """A plane whose entries are not packed together is copied, and the copy outlives the call."""
    q, keys, values, start, stop, valid = make(*SHAPES[0])
    expected = decode_attention(q, keys, values, start, stop, valid)
    strided = [p.transpose(-1, -2).contiguous().transpose(-1, -2) for p in (*keys.planes, *values.planes)]
    n = len(keys.planes)
    keys = Rows(planes=strided[:n], bits=keys.bits, scale=keys.scale)
    values = Rows(planes=strided[n:], bits=values.bits, scale=values.scale)
    assert torch.equal(decode_attention(q, keys, values, start, stop, valid)[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"start": c["start"].int()}, "start and stop must be int64"),
        (lambda c: c | {"valid": torch.ones(1, 8, dtype=torch.bool)}, r"valid must be bool \[B, T\]"),
        (lambda c: c | {"keys": Rows(planes=c["keys"].planes, bits=c["keys"].bits)}, "packed keys need their scale"),
        (
            lambda c: c | {"keys": Rows(c["keys"].exact, c["keys"].planes, c["keys"].bits, c["keys"].scale[:, :, :32])},
            "keys scale must be fp16 with",
        ),
        (
            lambda c: c | {"q": MappedQuery(c["q"].codes, c["q"].bias.double(), c["q"].zero, c["q"].gauge)},
            "q.bias must",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    names = ("q", "keys", "values", "start", "stop", "valid")
    case = change(dict(zip(names, make(*SHAPES[0]), strict=True)))
    with pytest.raises(ValueError, match=message):
        decode_attention(*(case[name] for name in names))


def test_a_non_finite_query_stays_visible():
    q, keys, values, start, stop, valid = make(*SHAPES[0])
    q.codes[0, 0, 0, 5] = float("nan")
    out, lse = decode_attention(q, keys, values, start, stop, valid)
    assert out[0, 0].isnan().all() and lse[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()


def test_many_queries_are_cut_into_tiles(monkeypatch):
    case = make(1, 1, 2, 70, 96, 64, 2, 16, 2, False, 2, 64, False, False)
    whole = decode_attention(*case)
    monkeypatch.setattr(sys.modules[_tiled.__module__], "QUERY_TILE", 32)
    torch.testing.assert_close(decode_attention(*case)[0], whole[0], rtol=0, atol=0)


# Packed and exact rows in one call


def exact_rows(case, rows=37, dtype=torch.float32, mean=True):
    """Exact rows beside a packed case, in a store of more rows, with ranges that differ between queries."""
    q, keys, values = case[:3]
    (batch, heads, new), hkv, d = q.codes.shape[:3], keys.scale.shape[1], values.planes[0].shape[3] * 16
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(batch, hkv, rows + 9, d, generator=g).to(dtype)[:, :, :rows] for _ in range(2))
    start, stop = torch.randint(0, 9, (batch, new), generator=g), torch.randint(9, rows + 1, (batch, new), generator=g)
    read = torch.randn(1, hkv, d, d, generator=g) / d**0.5
    return ExactRows(
        torch.randn(batch, heads, new, d, generator=g) / d**0.5, k, v, start, stop, read,
        torch.randn(1, hkv, d, generator=g) if mean else None,
    )  # fmt: skip


def by_parts(case, rows):
    """Float64 attention over each kind of rows, joined."""
    out, lse = reference(*case)
    read = rows.read.expand(out.shape[0], rows.k.shape[1], -1, -1).double()
    out = out.double().unflatten(1, (rows.k.shape[1], -1)) @ read.mT.unsqueeze(2)
    if rows.mean is not None:
        out = out + rows.mean.double()[:, :, None, None]
    exact = MappedQuery.exact(rows.q.double(), 1.0), Rows(exact=rows.k.double()), Rows(exact=rows.v.double())
    return merge_segments([(out.flatten(1, 2), lse.double()), decode_attention(*exact, rows.start, rows.stop)])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_is_its_parts(shape, dtype):
    case = make(*shape)
    rows = exact_rows(case, dtype=dtype, mean=shape[2] != 5)
    expected = by_parts(case, rows)
    assert (attend(*case, rows) - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("mine", ["packed", "exact", "neither"])
def test_attend_where_a_kind_of_rows_is_out_of_sight(mine):
    case = make(*SHAPES[0])
    rows = exact_rows(case)
    case[3][:], case[4][:] = (0, 640) if mine == "packed" else (7, 7)
    rows.start[:], rows.stop[:] = (0, 37) if mine == "exact" else (5, 5)
    rows.k[:, :, -1], rows.v[:, :, -1] = (torch.nan, torch.nan) if mine != "exact" else (1.0, 1.0)
    out, expected = attend(*case, rows), torch.zeros(1)
    if mine == "packed":
        expected = by_parts(case, rows._replace(k=rows.k.nan_to_num(), v=rows.v.nan_to_num()))
    elif mine == "exact":
        expected = decode_attention(MappedQuery.exact(rows.q, 1.0), *(Rows(exact=x) for x in rows[1:3]), *rows[3:5])[0]
    assert (out - expected).norm() <= 1e-3 * expected.norm() + 1e-9


@pytest.mark.parametrize("where", ["mapped", "exact"])
def test_attend_shows_a_non_finite_query(where):
    case = make(*SHAPES[0])
    rows = exact_rows(case)
    (case[0].codes if where == "mapped" else rows.q)[0, 0, 0, 5] = float("nan")
    out = attend(*case, rows)
    assert out[0, 0].isnan().all() and out[0, 1:].isfinite().all()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]])
def test_attend_opcheck(shape):
    case = make(*shape)
    q, k, v = case[:3]
    packed = (
        q.codes, q.bias, q.zero, q.gauge, k.planes, list(k.bits), k.scale, k.zero,
        v.planes, v.bits[0], v.scale, v.zero, *case[3:],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.headq.attend.default, (*packed, *exact_rows(case)))


def test_attend_refuses_rows_that_do_not_fit():
    case = make(*SHAPES[0])
    rows = exact_rows(case)
    for part, message in [
        ({"v": rows.v[:, :, :5]}, "exact rows must share their shape"),
        ({"k": rows.k[:, :, :, :8], "v": rows.v[:, :, :, :8]}, "exact rows must share their shape"),
        ({"q": rows.q[:, :3]}, "the exact rows' queries must be"),
        ({"q": rows.q.double()}, "the exact rows' queries must be"),
        ({"start": rows.start.int()}, "exact start must be int64"),
        ({"stop": rows.stop[:, :0]}, "exact stop must be int64"),
        ({"read": rows.read[..., :8]}, "read must be float32"),
        ({"read": rows.read.double()}, "read must be float32"),
        ({"mean": rows.mean[:, :1, :8]}, "mean must be float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(*case, rows._replace(**part))


def test_attend_runs_is_attend_run_by_run():
    q, keys, values, start, stop, valid = case = make(*SHAPES[0])
    rows = exact_rows(case)
    cut = [
        (part, *(dataclasses.replace(r, planes=[p[:, part] for p in r.planes], scale=r.scale[:, part]) for r in sides))
        for part in (slice(0, 1), slice(1, 3))
        for sides in [(keys, values)]
    ]
    whole = attend(*case, rows)
    torch.testing.assert_close(attend_runs(q, start, stop, valid, cut, rows), whole, rtol=0, atol=1e-6)
    for runs in ([], cut[:1], cut[::-1], [cut[0], (slice(1, 2), *cut[1][1:])]):
        with pytest.raises(ValueError, match="runs must be packed rows of all 3 KV heads in order"):
            attend_runs(q, start, stop, valid, runs, rows)
