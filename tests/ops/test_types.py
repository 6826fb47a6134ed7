"""What a cache, a query and a frame of segments say of positions."""

import dataclasses

import pytest
import torch

from headq_ao.ops.types import PagedKV, in_vectors, last_in_slots, visible_positions
from tests.ops.frames import some_frame


def cache(packed, held, total, **more):
    """Lengths alone."""
    empty = torch.empty(2, 1, 12, 4)
    return PagedKV(
        [], "", torch.zeros(2, 1).int(), None, *map(torch.tensor, (packed, held, total)), empty, empty, 4, **more
    )


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_the_last_thing_of_each_slot(slots):
    count = torch.arange(20)
    for n, row in zip(count.tolist(), last_in_slots(count, slots).tolist(), strict=True):
        for slot, last in enumerate(row):
            mine = [j for j in range(n) if j % slots == slot]
            assert last == max(mine) if mine else last < 0


@pytest.mark.parametrize("sliding", [0, 1, 4])
def test_what_new_tokens_see(sliding):
    shown = visible_positions(torch.tensor([9, 3]), 3, sliding)
    for b, total in enumerate((9, 3)):
        for s in range(3):
            own = total - 3 + s
            low = max(own - sliding + 1, 0) if sliding else 0
            assert (int(shown.low[b, s]), int(shown.high[b, s])) == (low, own + 1)
    part = shown.tile(slice(1, 3))
    assert torch.equal(part.low, shown.low[:, 1:]) and torch.equal(part.high, shown.high[:, 1:])


def test_codes_end_where_packed_tokens_do():
    """At the same position for all queries; under ``recent`` each query's own tokens count from itself back."""
    shown = visible_positions(torch.tensor([40, 12]), 3, 0)
    plain = cache((30, 5), (38, 12), (40, 12))
    assert plain.coded.tolist() == [30, 5] and plain.body_start == 4
    assert shown.codes_end(plain).tolist() == [[34], [9]]
    assert shown.in_codes(plain).high.tolist() == [[34, 34, 34], [9, 9, 9]]
    window = torch.zeros(2, 1).int()
    recent = cache((30, 5), (38, 12), (40, 12), window_table=window, recent=6)
    assert recent.body_start == 0 and recent.coded.tolist() == [33, 5]
    assert shown.codes_end(recent).tolist() == [[31, 32, 33], [5, 5, 5]]
    assert shown.in_codes(recent).high.tolist() == [[31, 32, 33], [5, 5, 5]]


def test_one_sequence_of_a_cache():
    """Its row of what is of sequences; pages, and the window of an engine, are of all."""
    new = torch.randn(2, 1, 3, 4)
    kv = cache((30, 5), (38, 12), (40, 12), new_k=new, new_v=new, new_start=torch.tensor([1, 3]))
    one = kv.sequence(1)
    assert (one.packed.tolist(), one.held.tolist(), one.total.tolist()) == ([5], [12], [12])
    assert torch.equal(one.new_k, new[1:]) and one.new_start.tolist() == [3]
    assert one.window_k.shape[0] == 1 and one.table.shape == (1, 1)
    owned = dataclasses.replace(kv, window_table=torch.tensor([[7], [8]]).int(), recent=5, newest=9).sequence(1)
    assert owned.window_k is kv.window_k and owned.window_table.tolist() == [[8]]
    assert (owned.recent, owned.newest, owned.n_sink) == (5, 9, 4)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 6, 17), (1, 8, 32)])
def test_rows_begin_at_multiples_of_sixteen(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = in_vectors(x)
    assert torch.equal(made, x) and made.stride(-2) % 16 == 0 and in_vectors(made) is made
    storage = torch.as_strided(made, (made.untyped_storage().nbytes() // 4,), (1,), 0)
    assert float(storage.sum()) == pytest.approx(float(x.sum()), abs=1e-4), "zeros between them"
    turned = x.transpose(-1, -2)
    assert torch.equal(in_vectors(turned), turned)


def test_segments_of_body_tokens():
    frame = some_frame(16, 32, 3)
    assert frame.of(torch.tensor([-4, 0, 31, 32, 95, 96, 10**6])).tolist() == [0, 0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(("rotary", "paired"), [(16, True), (8, True), (16, False)])
def test_frames_turn_queries_and_keys_alike(rotary, paired):
    """``(Rᵀ q)·(Rᵀ k) = q·k``, back again, the first segment as it is, and what does not turn stays."""
    frame = some_frame(16, 64, 5, rotary=rotary, paired=paired)
    q, k = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    segment = torch.tensor([0, 1, 2, 3, 4, 4, 0])
    there = [frame.into(x, segment) for x in (q, k)]
    torch.testing.assert_close((there[0] * there[1]).sum(-1), (q * k).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(frame.into(there[0], segment, back=True), q, rtol=1e-6, atol=1e-6)
    assert torch.equal(there[0][0], q[0]) and torch.equal(there[0][:, rotary:], q[:, rotary:])
    assert not torch.allclose(there[0][1], q[1])
    assert frame.into(q.bfloat16(), segment).dtype == torch.float32 and there[0].dtype == torch.float64
