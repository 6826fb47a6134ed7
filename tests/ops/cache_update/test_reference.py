"""Appending and packing as the definition reads, against loops over tokens."""

import dataclasses

import pytest
import torch

from headq_ao.ops.cache_update.reference import append, append_to_pages, at, leaving_tokens, write_keys, write_values
from headq_ao.ops.layout import unpack_keys, unpack_values
from headq_ao.ops.page_layout import NULL_PAGE, GroupLayout, PageLayout, Side
from headq_ao.ops.types import PagedKV

SINKS, RING, D = 4, 10, 16


def tokens(batch, first, n):
    """``[B, 1, n, D]``: each tells its number."""
    return (first + torch.arange(n).float())[None, None, :, None].expand(batch, 1, n, D).clone()


def cache(packed, held, total, **more):
    window = torch.full((len(packed), 1, SINKS + RING, D), -1.0)
    for b, n in enumerate(held):
        for p in range(n):
            window[b, 0, p if p < SINKS else SINKS + (p - SINKS) % RING] = p
    lengths = [torch.tensor(x) for x in (packed, held, total)]
    return PagedKV([], "", torch.zeros(len(packed), 4).int(), None, *lengths, window, window.clone(), SINKS, **more)


def test_tokens_by_number():
    x = torch.randn(2, 3, 7, 5)
    index = torch.tensor([[6, 0, 0], [1, 2, 3]])
    assert torch.equal(at(x, index), torch.stack([x[b][:, index[b]] for b in range(2)]))


@pytest.mark.parametrize("new", [1, 3, 10, 25])
@pytest.mark.parametrize("held", [0, 3, 9, 37])
def test_each_slot_gets_the_last_token_that_belongs_there(held, new):
    """Of sequences that bring as many as come, fewer behind padding, and none."""
    counts = (new, max(new - 1, 0), 0)
    kv = cache((0,) * 3, (held,) * 3, [held + n for n in counts])
    start = torch.tensor([new - n for n in counts])
    given = torch.stack([tokens(1, held - int(s), new)[0] for s in start])
    append(kv.window_k, given, kv, start)
    for b, total in enumerate(kv.total.tolist()):
        for p in range(total):
            slot = p if p < SINKS else SINKS + (p - SINKS) % RING
            last = p if p < SINKS else max(j for j in range(SINKS, total) if (j - p) % RING == 0)
            assert bool((kv.window_k[b, 0, slot] == last).all()), (b, p)
        empty = SINKS + RING - min(total, SINKS) - min(max(total - SINKS, 0), RING)
        assert int((kv.window_k[b, 0, :, 0] == -1).sum()) == empty


def test_what_leaves_the_window_comes_from_there_or_from_the_call():
    kv = cache((2, 0), (9, 5), (12, 6))
    new = torch.cat([tokens(1, 9, 3), tokens(1, 3, 3)])  # the second brings one token, behind two of padding
    j = torch.tensor([[2, 3, 4, 5, 6], [0, 1, 1, 1, 1]])
    found = leaving_tokens(kv, kv.window_k, new, j, torch.tensor([0, 2]))
    assert found[:, 0, :, 0].tolist() == [[6, 7, 8, 9, 10], [4, 5, 5, 5, 5]]


def page_of(bits, keys):
    side = Side((bits,) * D if keys else (bits,))
    layout = PageLayout(32, D, D, (GroupLayout(0, 2, side if keys else Side(), Side() if keys else side),))
    pages = layout.allocate(3, torch.float32, torch.device("cpu"))
    for t in pages:
        t.copy_(torch.randint(0, 256, t.shape)) if t.dtype == torch.uint8 else t.fill_(9.0)
    group = layout.split(pages)[0]
    return group.keys if keys else group.values


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
def test_a_written_token_leaves_its_neighbours(keys, bits):
    """Though codes of several tokens share bytes; what goes to the null page changes nothing else."""
    side = page_of(bits, keys)
    unpack = (lambda: unpack_keys(side.planes, side.bits)) if keys else (lambda: unpack_values(side.planes, bits))
    before, scales = unpack().clone(), side.scale.clone()
    page, offset = torch.tensor([[1, 2, NULL_PAGE, 1]]), torch.tensor([[5, 31, 7, 6]])
    codes = torch.randint(0, 2**bits, (1, 2, 4, D), dtype=torch.uint8)
    scale = torch.rand(1, 2, 4) if keys else torch.rand(1, 2, 4, 1)
    (write_keys if keys else write_values)(side, page, offset, (codes, scale, None))
    after = unpack()
    for i, (p, o) in enumerate(zip(page[0].tolist(), offset[0].tolist(), strict=True)):
        if p != NULL_PAGE:
            assert torch.equal(after[p, :, o], codes[0, :, i])
            assert torch.equal(side.scale[p, :, o], scale[0, :, i].half())
            before[p, :, o], scales[p, :, o] = codes[0, :, i], scale[0, :, i].half()
    assert torch.equal(after[1:], before[1:]) and torch.equal(side.scale[1:], scales[1:])


def test_an_engines_tokens_go_where_their_position_says():
    """To pages of the window's table, sinks also to the first page's; padding and what is no token to the null page."""
    window, sinks = torch.full((6, 1, 8, D), -1.0), torch.full((5, 1, SINKS, D), -1.0)
    kv = dataclasses.replace(
        cache((0, 0), (2, 13), (7, 15)), window_k=window, table=torch.tensor([[3, 0], [4, 0]]).int(),
        window_table=torch.tensor([[1, 2], [5, 4]]).int(), sink_k=sinks,
    )  # fmt: skip
    start = torch.tensor([0, 3])
    new = torch.stack([tokens(1, 2, 5)[0], tokens(1, 10, 5)[0]])
    append_to_pages(window, sinks, new, kv, start)
    for b, (held, total) in enumerate(((2, 7), (13, 15))):
        for p in range(held, total):
            assert bool((window[kv.window_table[b, p // 8], 0, p % 8] == p).all())
    assert int((window[1:, 0, :, 0] != -1).sum()) == 7 and bool((window[[2, 5]] == -1).all())
    assert sinks[3, 0, :, 0].tolist() == [-1, -1, 2, 3] and bool((sinks[[1, 2, 4]] == -1).all())
