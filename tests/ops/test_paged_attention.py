"""The compiled kernel of paged attention, and matrix products by tiles, against the reference."""

import dataclasses
import math

import pytest
import torch

from headq_ao.ops import paged_attention
from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import cpu_kernel, long_chunk, new_tokens, reference, tiled, tiles
from headq_ao.ops.types import Visible
from tests.ops.frames import some_frame
from tests.ops.paged_cases import Case, make

LIBRARY = cpu_kernel.library()
PATHS = [name for name, i in cpu_kernel.PATHS.items() if LIBRARY is not None and i <= LIBRARY.headq_best_isa()]
needs_kernel = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler: the reference serves")


def side(*pairs):
    return tuple(b for b, n in pairs for _ in range(n))


# a case, query heads per KV head, new tokens, sliding
CASES = {
    "plain": (Case(), 3, 1, 0),
    "fp16 scales": (Case(packed=(2500,), scale_bits=16), 3, 1, 0),
    "fp16 scales, head groups": (
        Case(packed=(1300,), keys=(side((3, 64)), side((2, 64))), heads=(1, 2), values=(2, 3), scale_bits=16,
             shuffled=False),
        2, 2, 0,
    ),
    "fp16 scales, strided": (Case(packed=(1300,), strided=True, scale_bits=16, frame=some_frame(64, 256)), 3, 1, 0),
    "contiguous": (Case(packed=(2500,), shuffled=False), 3, 1, 0),
    "shuffled": (Case(packed=(2500,)), 3, 1, 0),
    "all heads of a page side by side": (Case(packed=(1300,), strided=True), 3, 1, 0),
    "nothing packed": (Case(packed=(0,), window=(20,)), 3, 1, 0),
    "nothing at all but new": (Case(packed=(0,), window=(0,), new=(7,), sinks=4), 2, 7, 0),
    "batch": (Case(packed=(0, 33, 1100), window=(10, 96, 80), new=(2, 1, 0)), 4, 2, 0),
    "page 16": (Case(packed=(1234, 15), window=(20, 20), page=16, new=(7, 3)), 1, 7, 0),
    "page 64": (Case(packed=(1234,), page=64), 2, 1, 0),
    "page 128": (Case(packed=(1234,), page=128, shuffled=False), 2, 2, 0),
    "1 bit": (Case(keys=(side((1, 64)),), values=(1,)), 2, 1, 0),
    "3 bits": (Case(packed=(1500,), keys=(side((3, 64)),), values=(3,)), 8, 1, 0),
    "4 bits": (Case(keys=(side((4, 64)),), values=(4,), key_zero=True, value_zero=True, value_groups=2), 2, 1, 0),
    "5 bits": (Case(keys=(side((5, 64)),), values=(5,)), 5, 1, 0),
    "6 bits": (Case(keys=(side((6, 64)),), values=(6,), page=16), 6, 1, 0),
    "8 bits": (Case(keys=(side((8, 64)),), values=(8,), value_zero=True, value_groups=4), 7, 1, 0),
    "side code": (Case(packed=(1100,), keys=(side((2, 64), (4, 16)),), key_zero=True), 3, 2, 0),
    "bits of coordinates": (Case(keys=(side((4, 10), (3, 20), (2, 30), (1, 4)),)), 3, 1, 0),
    "head groups": (
        Case(
            packed=(1100, 700), window=(30, 40), new=(0, 0), heads=(1, 2, 1), values=(3, 2, 4),
            keys=(side((3, 64)), side((2, 64)), side((4, 64)))), 3, 1, 0,
    ),
    "dim 32": (Case(keys=(side((2, 32)),), key_dim=32, value_dim=32), 1, 1, 0),
    "dim 80": (Case(keys=(side((2, 80)),), key_dim=80, value_dim=80, value_groups=5, value_zero=True), 5, 3, 0),
    "dim 128": (Case(packed=(1100,), keys=(side((4, 128)),), key_dim=128, value_dim=128), 4, 1, 0),
    "dim 256": (Case(keys=(side((2, 256)),), key_dim=256, value_dim=256), 8, 1, 0),
    "dim 512": (Case(packed=(1100,), keys=(side((3, 512)),), values=(2,), key_dim=512, value_dim=512), 2, 1, 0),
    "dim 512, 8 bits, frames": (
        Case(keys=(side((8, 512)),), values=(8,), key_dim=512, value_dim=512, frame=some_frame(512, 256)), 4, 2, 0,
    ),
    "dims that differ": (Case(keys=(side((2, 48)),), key_dim=48, value_dim=32), 2, 1, 0),
    **{
        f"shared rows, {bits} bits": (
            Case(
                packed=(1500, 40), window=(50, 20), new=(0, 0), keys=(side((bits, dim)),), key_dim=dim, value_dim=dim,
                heads=(1,), shared=True, page=page), 16, 1, 0,
        )
        for bits, dim, page in (
            (1, 48, 32), (2, 80, 16), (3, 576, 32), (4, 288, 64), (5, 96, 32), (6, 64, 16), (8, 576, 32)
        )
    },
    "shared rows of heads, chunk": (
        Case(packed=(1100,), window=(80,), new=(40,), keys=(side((3, 64)), side((2, 64))), heads=(1, 2), values=(0, 0),
             shared=True, strided=True), 5, 40, 0),
    "shared rows, sliding": (
        Case(packed=(2000, 99), window=(80,) * 2, new=(0,) * 2, columns=8,
             keys=(side((2, 64)),), shared=True), 3, 1, 250),
    "few tokens": (Case(packed=(1100,), new=(2,)), 3, 2, 0),
    "many tokens": (Case(packed=(1100, 40), window=(80, 12), new=(64, 50)), 3, 64, 0),
    "a prompt": (Case(packed=(0, 0), window=(0, 0), new=(70, 70), heads=(1,)), 3, 70, 0),
    "a padded prompt": (Case(packed=(0, 0), window=(0, 0), new=(70, 3), heads=(1,)), 3, 70, 0),
    "a long chunk, sliding": (Case(packed=(400,), window=(80,), new=(300,), heads=(1,), columns=8), 3, 300, 200),
    "a long chunk": (Case(packed=(1100,), window=(80,), new=(300,), heads=(1,)), 3, 300, 0),
    "drafts in the window": (Case(packed=(1100,), window=(90,)), 3, 7, 0),
    "sliding": (Case(packed=(2000, 100), window=(80, 80), new=(0, 0), columns=8), 3, 1, 250),
    "sliding chunk": (Case(packed=(2000, 100), window=(80, 80), new=(40, 33), columns=8), 3, 40, 200),
    "sliding pages 16": (Case(packed=(3333,), columns=70, page=16, shuffled=False), 3, 1, 1100),
    "segments": (Case(packed=(2000, 90), window=(80, 80), new=(0, 0), segments=2), 3, 1, 0),
    "segments, odd pages": (
        Case(packed=(1500,), page=16, segments=3, heads=(1, 1), keys=(side((3, 64)), side((4, 64))), values=(2, 4)),
        2, 2, 0,
    ),
    "frames": (Case(packed=(2500, 90), window=(80, 20), new=(0, 0), frame=some_frame(64, 256)), 3, 1, 0),
    "frames, few rows": (Case(packed=(2500,), frame=some_frame(64, 128, 5, rotary=32)), 7, 2, 0),
    "frames, neighbours turn, zeros": (
        Case(packed=(1300,), keys=(side((4, 128)),), key_dim=128, value_dim=128, page=64, key_zero=True,
             frame=some_frame(128, 256, paired=False)), 4, 1, 0,
    ),
    "frames and segments": (
        Case(packed=(1500,), page=16, segments=3, heads=(1, 1), keys=(side((3, 64)), side((4, 64))), values=(2, 4),
             frame=some_frame(64, 112)), 2, 2, 0,
    ),
    "frames, side code": (
        Case(packed=(1100,), keys=(side((2, 80), (4, 16)),), key_dim=80, value_dim=80, key_zero=True,
             frame=some_frame(80, 256, rotary=40)), 3, 2, 0,
    ),
    "frames, sliding": (
        Case(packed=(2000, 100), window=(80, 80), new=(40, 33), columns=8, frame=some_frame(64, 128)), 3, 40, 200,
    ),
    "frames, a long chunk": (
        Case(packed=(1100, 700), window=(80, 80), new=(300, 280), heads=(1,), frame=some_frame(64, 512)), 3, 300, 0,
    ),
    "softcap": (Case(packed=(1100, 40), window=(80, 12), new=(2, 1), softcap=1.0), 3, 2, 0),
    "softcap, 3 bits, zeros, groups": (
        Case(packed=(2500,), keys=(side((3, 64)),), values=(4,), key_zero=True, value_zero=True, value_groups=2,
             softcap=2.0), 7, 1, 0,
    ),
    "softcap, head groups, segments": (
        Case(packed=(1500,), page=16, segments=3, heads=(1, 1), keys=(side((3, 64)), side((4, 64))), values=(2, 4),
             softcap=1.0), 2, 2, 0,
    ),
    "softcap, frames, sliding": (
        Case(packed=(2000, 100), window=(80, 80), new=(40, 33), columns=8, frame=some_frame(64, 128), softcap=1.0),
        3, 40, 200,
    ),
    "softcap, a long chunk": (Case(packed=(1100,), window=(80,), new=(300,), heads=(1,), softcap=1.0), 3, 300, 0),
    "softcap, a padded prompt": (
        Case(packed=(0, 0), window=(0, 0), new=(70, 3), heads=(1,), softcap=1.0), 3, 70, 0,
    ),
    "softcap, bf16": (Case(packed=(500,), new=(2,), dtype=torch.bfloat16, softcap=1.0), 3, 2, 0),
    "bf16": (Case(packed=(500,), new=(2,), dtype=torch.bfloat16), 3, 2, 0),
    "fp16": (Case(packed=(500,), dtype=torch.float16), 3, 1, 0),
}  # fmt: skip


def queries(kv, group, tokens, seed=1):
    g = torch.Generator().manual_seed(seed)
    shape = (kv.table.shape[0], kv.window_k.shape[1] * group, tokens, kv.window_k.shape[3])
    return torch.randn(shape, generator=g).to(kv.window_k.dtype)


def expected_of(q, kv, readers, visible=None, sliding=0):
    """In fp64."""
    return reference.paged_attention(q.double(), 0.125, kv, readers, visible, sliding)


def close(found, expected):
    """16-bit queries, 15-bit weights: relative output error below 1e-3, and exact where empty."""
    out, lse = found
    wanted, wanted_lse = (x.float() for x in expected)
    assert out.dtype == lse.dtype == torch.float32
    seen = torch.isfinite(wanted_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert torch.equal(out[~seen], torch.zeros_like(out[~seen]))
    assert (out - wanted).norm() <= 1e-3 * wanted.norm()
    torch.testing.assert_close(lse[seen], wanted_lse[seen], rtol=1e-3, atol=2e-3)


def counted(kv, visible, layout):
    """How many packed tokens, and how many at all, queries see: one by one."""
    total = [0, 0]
    for b in range(len(kv.packed)):
        packed, held, end = (int(x[b]) for x in (kv.packed, kv.held, kv.total))
        first = max(-(-packed // layout.page_tokens) - kv.table.shape[1], 0) * layout.page_tokens
        in_pages = {kv.n_sink + j for j in range(first, packed)}
        ring = kv.window_k.shape[2] - kv.n_sink
        others = {*range(min(kv.n_sink, held)), *range(held, end if kv.new_k is not None else held)}
        others |= {kv.n_sink + j for j in range(max(packed, held - kv.n_sink - ring), held - kv.n_sink)}
        for low, high in zip(visible.low[b].tolist(), visible.high[b].tolist(), strict=True):
            seen = set(range(low, high))
            total[0] += len(seen & in_pages)
            total[1] += len(seen & in_pages) + len(seen & others)
    return total


@needs_kernel
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_reference(name, path, monkeypatch):
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    case, group, tokens, sliding = CASES[name]
    kv, readers = make(case)
    q, reads = queries(kv, group, tokens), torch.tensor([5, 7])
    found = cpu_kernel.launch(q, 0.125, kv, readers, None, sliding, reads)
    close(found, expected_of(q, kv, readers, None, sliding))
    shown = reference.visible_positions(kv.total, tokens, sliding)
    assert (reads - torch.tensor([5, 7])).tolist() == counted(kv, shown, case.layout)


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_tiles_match_reference(name, by_products, monkeypatch):
    monkeypatch.setattr(tiled, "TOKEN_TILE", 256)
    monkeypatch.setattr(tiles, "QUERY_TILE", 48)
    if by_products:  # as on other devices
        monkeypatch.setattr(new_tokens, "TOKEN_TILE", 100)
        monkeypatch.setattr(new_tokens, "masked", new_tokens.by_products)
    case, group, tokens, sliding = CASES[name]
    kv, readers = make(case)
    q, reads = queries(kv, group, tokens), torch.zeros(2, dtype=torch.int64)
    found = tiled.paged_attention(q, 0.125, kv, readers, None, sliding, reads)
    expected = reference.paged_attention(q, 0.125, kv, readers, None, sliding)
    limit = 1e-4 if q.dtype == torch.float32 else 2e-2  # the call's own tokens are read in the queries' dtype
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    assert reads.tolist() == counted(kv, reference.visible_positions(kv.total, tokens, sliding), case.layout)


@pytest.mark.parametrize("tokens", [1, 40])
def test_given_ranges(tokens):
    """Any ranges, some of them empty."""
    kv, readers = make(Case(packed=(1100, 30), window=(80, 96), new=(tokens, 1)))
    q, g = queries(kv, 3, tokens), torch.Generator().manual_seed(3)
    low = torch.randint(-5, 1300, (2, tokens), generator=g)
    high = low + torch.randint(-10, 600, (2, tokens), generator=g)
    low[0, 0], high[0, 0] = 50, 50
    visible, reads = Visible(low, high), torch.zeros(2, dtype=torch.int64)
    expected = expected_of(q, kv, readers, visible)
    close(paged_attention(q, 0.125, kv, readers, visible, reads=reads), expected)
    assert reads.tolist() == counted(kv, visible, PageLayout.parse(kv.layout))
    assert not torch.isfinite(expected[1][0, :, 0]).any()


def test_sequences_share_pages():
    kv, readers = make(Case(packed=(700, 650), window=(40, 90), new=(0, 0)))
    table = kv.table.clone()
    table[1, :20] = table[0, :20]
    kv = dataclasses.replace(kv, table=table)
    q = queries(kv, 3, 1)
    close(paged_attention(q, 0.125, kv, readers), expected_of(q, kv, readers))


@pytest.mark.parametrize("keys", [(), (2,) * 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_side_that_is_not_coded(keys, dtype):
    """Pages of exact tokens on one side: by matrix products."""
    kv, readers = make(
        Case(packed=(500, 33), window=(40, 90), new=(3, 1), keys=(keys,), values=(0 if keys else 2,), dtype=dtype)
    )
    q, reads = queries(kv, 3, 3), torch.zeros(2, dtype=torch.int64)
    found = paged_attention(q, 0.125, kv, readers, reads=reads)
    torch.testing.assert_close(found, reference.paged_attention(q, 0.125, kv, readers), rtol=1e-4, atol=1e-4)
    assert reads.tolist() == counted(kv, reference.visible_positions(kv.total, 3, 0), PageLayout.parse(kv.layout))


def test_float64_queries():
    kv, readers = make(Case(new=(2,)))
    q = queries(kv, 3, 2).double()
    found = paged_attention(q, 0.125, kv, readers)
    torch.testing.assert_close(found, expected_of(q, kv, readers))


def test_readers_of_any_strides():
    kv, readers = make(Case())
    q = queries(kv, 3, 1)
    copied = dataclasses.replace(
        readers,
        read=readers.read.contiguous(),
        query_map=readers.query_map.transpose(3, 4).contiguous().transpose(3, 4),
    )
    found = paged_attention(q, 0.125, kv, copied)
    torch.testing.assert_close(found, paged_attention(q, 0.125, kv, readers), rtol=0, atol=0)


def test_queries_of_any_strides():
    """As a model has them: the heads of a token side by side; and those whose last dimension is not dense."""
    kv, readers = make(Case(new=(3,)))
    q = queries(kv, 3, 3)
    wanted = paged_attention(q, 0.125, kv, readers)
    for x in (q.transpose(1, 2).contiguous().transpose(1, 2), q.transpose(2, 3).contiguous().transpose(2, 3)):
        assert not x.is_contiguous()
        torch.testing.assert_close(paged_attention(x, 0.125, kv, readers), wanted, rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_visible_scale_that_is_no_number_shows(path, side, monkeypatch):
    """In its head, whose output is NaN; a head beside it is as it was."""
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    kv, readers = make(Case(scale_bits=16))
    q = queries(kv, 3, 1)
    clean, _ = paged_attention(q, 0.125, kv, readers)
    group = PageLayout.parse(kv.layout).split(kv.pages)[0]
    getattr(group, side).scale[kv.table[0, 3], 0, 7] = float("nan")
    dirty, _ = paged_attention(q, 0.125, kv, readers)
    assert dirty[:, :3].isnan().all()
    assert torch.equal(dirty[:, 3:], clean[:, 3:])


@needs_kernel
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_query_that_is_no_number_shows(value):
    kv, readers = make(Case(packed=(1100,)))
    q = queries(kv, 3, 1)
    clean, _ = paged_attention(q, 0.125, kv, readers)
    q[0, 1, 0, 5] = value
    dirty, _ = paged_attention(q, 0.125, kv, readers)
    assert dirty[:, 1].isnan().all()
    assert torch.equal(dirty[:, 2:], clean[:, 2:])


@needs_kernel
@pytest.mark.parametrize("path", PATHS)
def test_a_softcap_far_above_the_scores_changes_little_and_a_low_one_much(path, monkeypatch):
    """``s − s³ / 3c² + ..``; under a low one all tokens count nearly alike."""
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    kv, readers = make(Case(packed=(1100,)))
    q = queries(kv, 3, 1)
    plain, plain_lse = paged_attention(q, 0.125, kv, readers)
    far, far_lse = paged_attention(q, 0.125, dataclasses.replace(kv, softcap=1e3), readers)
    torch.testing.assert_close((far, far_lse), (plain, plain_lse), rtol=1e-3, atol=2e-3)
    _, low_lse = paged_attention(q, 0.125, dataclasses.replace(kv, softcap=1e-3), readers)
    torch.testing.assert_close(low_lse, torch.full_like(low_lse, math.log(4 + 1150)), rtol=0, atol=2e-3)
    assert (plain_lse - low_lse).abs().max() > 1


@needs_kernel
@pytest.mark.parametrize("path", PATHS)
def test_many_small_weights_keep_their_sum(path, monkeypatch):
    """One token with nearly all the weight, and 4095 whose weights are below half of an integer each."""
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    kv, readers = make(Case(packed=(4096,), heads=(1,), value_zero=True, scale_bits=16))
    group, first = PageLayout.parse(kv.layout).split(kv.pages)[0], kv.table[0, 0]
    kv.window_k.fill_(-100.0)
    group.keys.scale.zero_()
    group.keys.scale[first, 0, 0] = 1.0
    group.values.scale.fill_(1.0)
    group.values.zero.zero_()
    group.values.planes[0][first, 0, 0, :, :, 0] &= 252  # the first token reads as 0
    query_map = torch.zeros_like(readers.query_map)
    query_map[..., -3] = math.log(1e5) / (0.125 * 64)
    plain, q = dataclasses.replace(readers, query_map=query_map, read=None, mean=None), torch.ones(1, 3, 1, 64)
    wanted, _ = expected_of(q, kv, plain)
    assert 0.04 < wanted.mean() < 0.08
    torch.testing.assert_close(paged_attention(q, 0.125, kv, plain)[0].double(), wanted, rtol=6e-2, atol=0)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize(("packed", "zero"), [((300, 900), False), ((0, 900), True), ((0, 0), False)])
def test_long_chunks_are_dequantized_tile_by_tile(dtype, packed, zero, softcap, monkeypatch):
    """Against the reference in fp32; the tiles end within pages and before the packed tokens do."""
    monkeypatch.setattr(long_chunk, "TILE", 200)
    monkeypatch.setattr(long_chunk, "LEAST_QUERIES", 40)
    case = Case(packed, (50, 9), (40, 40), heads=(2, 1), keys=((2,) * 64, (3,) * 64), values=(2, 3), dtype=dtype)
    case.key_zero, case.value_zero, case.softcap = zero, zero, softcap
    kv, readers = make(case)
    q, reads = queries(kv, 3, 40).to(dtype), torch.zeros(2, dtype=torch.int64)
    assert long_chunk.serves(q, kv, None, 0)
    assert not any(
        long_chunk.serves(*of) for of in ((q.float(), kv, None, 0), (q, kv, None, 100), (q[:, :, :39], kv, None, 0))
    )
    found, lse = cpu_kernel.launch(q, 0.125, kv, readers, None, 0, reads)
    expected, expected_lse = reference.paged_attention(q.float(), 0.125, kv, readers, None, 0)
    assert (found - expected).norm() / expected.norm() < (1e-2 if dtype == torch.bfloat16 else 2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=2e-2)
    assert reads.tolist() == counted(kv, reference.visible_positions(kv.total, 40, 0), case.layout)
