"""Where tokens lie and who sees them, by hand; attention is in test_paged_reference.py and test_paged_loop.py."""

import dataclasses

import torch

from headq_ao.ops.paged_attention import reference
from headq_ao.ops.paged_attention.reference import (
    body_tokens,
    by_sequence,
    dense_part,
    new_positions,
    numbers,
    read_back,
    seen_in_full,
    visible_at,
    window_columns,
    window_positions,
    window_tokens,
)
from headq_ao.ops.types import PagedKV, Readers, Visible

NONE = float("-inf")


def cache(packed, held, total, columns=3, sinks=2, ring=4, **more):
    lengths = [torch.tensor(x) for x in (packed, held, total)]
    window = torch.arange(len(packed) * (sinks + ring)).float().view(len(packed), 1, -1, 1)
    table = torch.zeros(len(packed), columns, dtype=torch.int32)
    return PagedKV([], "", table, None, *lengths, window, -window, sinks, **more)


def test_columns_hold_the_last_pages_in_use():
    """Pages of four tokens: column ``c`` has the last logical page ``i ≡ c``, which may be begun; below 0: none."""
    found = body_tokens(cache((0, 1, 9, 21), (0,) * 4, (0,) * 4), 4)
    assert found[:, :, 0].clamp(min=-1).tolist() == [[-1, -1, -1], [0, -1, -1], [0, 4, 8], [12, 16, 20]]
    assert found[3, 0].tolist() == [12, 13, 14, 15]


def test_slots_of_the_window():
    """Two sinks and a ring of four: the last body token of each slot, and which of them are not packed."""
    position, here = window_positions(cache((0, 3, 8), (1, 7, 12), (0,) * 3))
    assert position.clamp(min=-1).tolist() == [[0, 1, -1, -1, -1, -1], [0, 1, 6, 3, 4, 5], [0, 1, 10, 11, 8, 9]]
    assert here[0].tolist() == [True, False] + [False] * 4
    assert here[1].tolist() == [True, True, True, False, False, True], "body tokens 3 and 4 are not packed"
    assert here[2].tolist() == [True, True, True, True, False, False]


def test_pages_of_an_engines_window():
    """As many columns as the newest tokens lie in, from that of the first token that is not packed on."""
    kv = cache((5, 0), (11, 3), (11, 3), window_table=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]).int())
    kv = dataclasses.replace(
        kv, window_k=torch.arange(36.0).view(9, 1, 4, 1), window_v=torch.zeros(9, 1, 4, 1),
        sink_k=torch.full((9, 1, 2, 1), 100.0), sink_v=torch.zeros(9, 1, 2, 1),
    )  # fmt: skip
    assert window_columns(kv).tolist() == [[0, 1, 2, 3]] * 2
    few = dataclasses.replace(kv, newest=6)
    assert window_columns(few).tolist() == [[1, 2, 3], [0, 1, 2]]
    position, here = window_positions(few)
    assert position[0].tolist() == [0, 1, *range(4, 16)]
    assert [p for p, h in zip(position[0].tolist(), here[0].tolist(), strict=True) if h] == [0, 1, *range(5, 11)]
    assert [p for p, h in zip(position[1].tolist(), here[1].tolist(), strict=True) if h] == [0, 1, 2]
    keys, _ = window_tokens(few)
    assert keys[0, 0, :, 0].tolist() == [100.0, 100.0, *range(8, 20)], "pages 2, 3 and 4 of four numbers each"
    assert keys[1, 0, 2:, 0].tolist() == [*range(20, 32)]


def test_new_tokens_behind_padding():
    kv = cache((0, 0), (7, 2), (10, 3), new_k=torch.zeros(2, 1, 3, 1), new_start=torch.tensor([0, 2]))
    position, here = new_positions(kv)
    assert position.tolist() == [[7, 8, 9], [0, 1, 2]]
    assert here.tolist() == [[True] * 3, [False, False, True]]


def test_who_sees_what():
    position, here = torch.tensor([[0, 3, 5, 9]]), torch.tensor([[True, True, True, False]])
    shown = Visible(torch.tensor([[0, 3, 4]]), torch.tensor([[4, 10, 4]]))
    assert visible_at(position, here, shown).tolist() == [
        [[True, True, False, False], [False, True, True, False], [False] * 4]
    ]
    kv = cache((2,), (8,), (10,))  # codes end at position 4, sinks are two
    shown = Visible(torch.tensor([[0, 0]]), torch.tensor([[10, 5]]))
    at = torch.arange(10)[None]
    full = seen_in_full(at, torch.ones(1, 10, dtype=torch.bool), shown, kv)
    assert full[0, 0].tolist() == [True, True, False, False] + [True] * 6
    assert full[0, 1].tolist() == [True, True, False, False, True] + [False] * 5
    recent = dataclasses.replace(kv, window_table=torch.zeros(1, 1).int(), recent=3)
    full = seen_in_full(at, torch.ones(1, 10, dtype=torch.bool), shown, recent)
    assert full[0, 0].tolist() == [True, True] + [False] * 4 + [True] * 4, "from position 9 − 3 on"
    assert full[0, 1].tolist() == [True, True, True, True, True] + [False] * 5, "packed ones are the first two"


def test_what_nobody_sees_weighs_nothing():
    weights, lse = reference.softmax(torch.tensor([[1.0, 1.0, NONE], [NONE, NONE, NONE]]))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    assert float(lse[1]) == NONE
    out = read_back(torch.zeros(2, 4), lse, Readers(None, None, None))
    assert not bool(out.any())


def test_a_readout_has_the_mean_once_and_nothing_where_nothing_was_seen():
    out, lse = torch.ones(1, 2, 1, 2, 3), torch.tensor([0.0, NONE]).expand(1, 2, 1, 2)
    read, mean = torch.diag(torch.tensor([2.0, 3.0, 4.0]))[None, None], torch.tensor([[[10.0, 20.0, 30.0]]])
    found = read_back(out, lse, Readers(None, read, mean))
    assert found[0, 1, 0].tolist() == [[12.0, 23.0, 34.0], [0.0, 0.0, 0.0]]


def test_slots_without_a_token_may_hold_anything():
    q, here = torch.ones(1, 1, 1, 1, 2), torch.tensor([[True, False]])
    k = torch.tensor([[[[1.0, 1.0], [torch.nan, torch.inf]]]])
    out, lse = dense_part(q, k, k, here, here[:, None])
    assert out.tolist() == [[[[[1.0, 1.0]]]]] and lse.tolist() == [[[[2.0]]]]


def test_pages_by_sequence():
    pages = torch.arange(24.0).view(4, 2, 3)
    table = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(by_sequence(pages, table)[1, :, 0], pages[1])
    found = numbers(pages, table, torch.float64)
    assert found.dtype == torch.float64 and found[0, 1].tolist() == [21.0, 22.0, 23.0, 3.0, 4.0, 5.0]
