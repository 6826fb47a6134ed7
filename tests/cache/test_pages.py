"""Block tables and pools: room, sharing, and what selecting and cropping copies."""

import random

import pytest
import torch

from headq_ao.cache.pages import PagePool, PageTable
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side

P = 16
LAYOUT = PageLayout(P, 32, 32, (GroupLayout(0, 2, Side((2,) * 32), Side((2,))),))


class Pages:
    """A table and the tokens that lie in its physical pages, by hand."""

    def __init__(self, batch, most=None):
        self.table, self.memory, self.packed, self.streams = (
            PageTable(P, most),
            {},
            [0] * batch,
            [[] for _ in range(batch)],
        )

    def pack(self, counts):
        """Write new tokens at the end of each sequence."""
        self.table.reserve(len(counts), max(n + more for n, more in zip(self.packed, counts, strict=True)))
        for b, more in enumerate(counts):
            for _ in range(more):
                j = self.packed[b]
                token = object()
                self.streams[b] = [*self.streams[b][:j], token]
                self.memory.setdefault(self.page(b, j), [None] * P)[j % P] = token
                self.packed[b] += 1

    def page(self, b, j):
        page = int(self.table.host[b, (j // P) % self.table.columns])
        assert 0 < page < self.table.pages, "the null page, or one that there is no room for"
        return page

    def copy(self, pairs):
        assert len({to for _, to in pairs}) == len(pairs)
        found = {to: list(self.memory.get(origin, [None] * P)) for origin, to in pairs}
        self.memory |= found

    def select(self, order):
        pairs = self.table.select(order, self.packed)
        self.copy(pairs)
        self.packed, self.streams = [self.packed[b] for b in order], [list(self.streams[b]) for b in order]
        return pairs

    def crop(self, counts):
        self.packed = [max(n - less, 0) for n, less in zip(self.packed, counts, strict=True)]
        pairs = self.table.part(self.packed)
        self.copy(pairs)
        return pairs

    def check(self):
        host = self.table.host
        assert host.dtype == torch.int32 and int(host.max()) < self.table.pages
        room = self.table.columns * P
        for b, (n, tokens) in enumerate(zip(self.packed, self.streams, strict=True)):
            begin = 0 if self.table.most is None else max((-(-n // P) - self.table.columns) * P, 0)
            assert n <= room or self.table.most is not None
            for j in range(begin, n):
                assert self.memory.get(self.page(b, j), [None] * P)[j % P] is tokens[j], (b, j)
        writable = [
            {int(host[b, i % self.table.columns]) for i in range(n // P, n // P + self.table.columns)}
            if self.table.most is not None
            else set(host[b, n // P :].tolist())
            for b, n in enumerate(self.packed)
        ]
        for b, mine in enumerate(writable):
            others = {page for c, row in enumerate(host.tolist()) if c != b for page in row}
            assert not mine & others, "a page that may be written is another's too"


@pytest.mark.parametrize("seed", range(40))
def test_tokens_stay_where_they_are_found(seed):
    """Packing, selecting, cropping: each sequence finds its own tokens, and writes where nobody else reads."""
    rng = random.Random(seed)
    pages = Pages(rng.randint(1, 3))
    for _ in range(40):
        batch = len(pages.packed)
        what = rng.choice(["pack", "pack", "select", "crop"])
        if what == "pack":
            pages.pack([rng.choice([0, 1, 3, P, 40]) for _ in range(batch)])
        elif what == "select":
            pages.select(rng.choices(range(batch), k=rng.randint(1, 4)))
        else:
            pages.crop([rng.choice([0, 1, P, 37])] * batch)
        if pages.table.columns:
            pages.check()


@pytest.mark.parametrize("seed", range(20))
def test_tokens_of_tables_that_wrap(seed):
    rng = random.Random(seed)
    pages = Pages(rng.randint(1, 3), most=4)
    for _ in range(40):
        batch = len(pages.packed)
        if rng.random() < 0.6:
            pages.pack([rng.choice([0, 1, 3, P, 40]) for _ in range(batch)])
        else:
            pages.select(rng.choices(range(batch), k=rng.randint(1, 4)))
        if pages.table.columns:
            assert pages.table.columns <= 4
            pages.check()


def test_room_is_made_by_eighths():
    table = PageTable(P)
    assert table.reserve(2, 0) and table.columns == 1 and table.pages == 3
    assert not table.reserve(2, P) and table.reserve(2, P + 1) and table.columns == 2
    table.reserve(2, 100 * P)
    assert table.columns == 100 and table.reserve(2, 100 * P + 1) and table.columns == 113
    assert sorted(table.host.flatten().tolist()) == list(range(1, table.pages)), "pages that nobody has"
    before = table.host.clone()
    table.reserve(2, 130 * P)
    assert torch.equal(table.host[:, :113], before), "a page has moved"


def test_wrapped_tables_have_no_more_columns_than_their_own():
    table = PageTable(P, most=5)
    assert table.reserve(1, 1000) and table.columns == 5 and not table.reserve(1, 10_000)


def test_sixteen_repeats_hold_their_pages_once():
    pages = Pages(1)
    pages.pack([4096 + 5])
    before = pages.table.pages
    pairs = pages.select([0] * 16)
    assert len(pairs) == 15 and {a for a, _ in pairs} == {int(pages.table.host[0, 256])}
    assert len({*pages.table.host.flatten().tolist()}) == 256 + 16
    assert pages.table.pages <= before + 16
    pages.pack([3] * 16)
    pages.check()


def test_whole_pages_are_not_copied():
    pages = Pages(2)
    pages.pack([4 * P, 3 * P])
    assert pages.select([1, 0, 1, 0]) == []
    pages.pack([1] * 4)
    pages.check()


def test_reordering_copies_nothing():
    pages = Pages(4)
    pages.pack([70, 71, 72, 73])
    assert pages.select([3, 1, 0, 2]) == [] and pages.select([2, 0]) == []
    pages.check()


@pytest.mark.parametrize("most", [None, 3])
def test_pages_that_were_let_go_are_used_again(most):
    """Beams that are reordered for a long time take no more pages than were ever held at once."""
    pages, rng, held = Pages(4, most), random.Random(0), []
    for _ in range(300):
        pages.pack([3] * len(pages.packed))
        held.append(len({*pages.table.host.flatten().tolist()}))
        pages.select(rng.choices(range(len(pages.packed)), k=rng.choice([2, 4, 4])))
        held.append(len({*pages.table.host.flatten().tolist()}))
        if most is None and pages.packed[0] > 20 * P:
            pages.crop([10 * P] * len(pages.packed))
            held.append(len({*pages.table.host.flatten().tolist()}))
    assert pages.table.pages - 1 == max(held)


def test_a_crop_into_shared_pages_parts_them():
    pages = Pages(1)
    pages.pack([5 * P + 3])
    pages.select([0, 0, 0])
    shared = int(pages.table.host[0, 2])
    assert pages.table.host[:, 2].tolist() == [shared] * 3
    pairs = pages.crop([2 * P + 7] * 3)  # 3 whole pages, and 12 tokens less than 4
    assert pages.packed == [2 * P + 12] * 3
    assert len(pairs) == 2 and {a for a, _ in pairs} == {shared}
    assert len({*pages.table.host[:, 2].tolist()}) == 3 and len({*pages.table.host[:, 1].tolist()}) == 1
    pages.pack([30, 1, 0])
    pages.check()
    assert pages.crop([0] * 3) == [], "parted once"


def test_on_devices_tables_are_copies():
    table = PageTable(P)
    table.reserve(1, 40)
    there = table.on(torch.device("cpu"))
    assert there is table.on(torch.device("cpu")) and there.data_ptr() != table.host.data_ptr()
    assert [x is y for x, y in zip(table.tensors(), [table.host, there], strict=True)] == [True, True]
    table.reserve(1, 400)
    assert table.on(torch.device("cpu")) is not there
    table.clear()
    assert (table.columns, table.pages, len(table.tensors()), table.shared) == (0, 1, 1, False)
    assert table.select([0], [0]) == []


def test_pools_grow_and_copy():
    pool = PagePool(LAYOUT, torch.float32, torch.device("cpu"))
    assert pool.pages == 1 and pool.fit(5) and pool.pages == 5 and not pool.fit(3) and pool.pages == 5
    for i, t in enumerate(pool.tensors):
        t.copy_(torch.arange(t.numel()).view_as(t) % 100 + i)
    tensors, held = pool.tensors, [t.clone() for t in pool.tensors]
    assert pool.fit(9) and pool.tensors is tensors, "operators hold the list"
    for t, old in zip(pool.tensors, held, strict=True):
        assert t.shape[0] == 9 and torch.equal(t[:5], old)
    pool.copy([(1, 6), (2, 7), (1, 8)])
    for t, old in zip(pool.tensors, held, strict=True):
        assert torch.equal(t[[6, 7, 8]], old[[1, 2, 1]]) and torch.equal(t[:5], old)
    pool.copy([])


@pytest.mark.parametrize("fault", ["shared", "not copied"])
def test_planted_faults_are_found(fault, monkeypatch):
    if fault == "shared":
        monkeypatch.setattr(PageTable, "part", lambda self, packed: [])
    else:
        monkeypatch.setattr(Pages, "copy", lambda self, pairs: None)
    with pytest.raises(AssertionError):
        [test_tokens_stay_where_they_are_found(seed) for seed in range(40)]


def test_a_table_of_one_column_is_written_in_place():
    """On a device it has a second column, of the null page, which stays that."""
    table = PageTable(16)
    table.reserve(2, 16)
    device = torch.device("cpu")
    assert table.on(device)[:, 1].tolist() == [0, 0]
    for _ in range(2):
        table.select([1, 0], [10, 10])
        assert table.on(device).tolist() == [[*row, 0] for row in table.host.tolist()]
