"""When tokens are packed, on the host and on the device."""

import torch

from headq_ao.cache.lengths import Counts
from headq_ao.cache.schedule import Schedule
from headq_ao.ops.types import on_device
from tests.cache.test_lengths import CPU, SCHEDULES


def test_schedule_by_hand():
    plan = Schedule(n_sink=4, window=10, slack=6, granularity=8, warmup=16)
    assert plan.ring == 10 + 6 + 7
    assert [plan.packable(n) for n in (0, 14, 21, 22, 29, 30, 37, 38)] == [0, 0, 0, 0, 0, 16, 16, 24]
    assert [plan.packable(n, 3) for n in (7, 21, 22, 29, 30)] == [3, 3, 8, 8, 16]
    total = torch.arange(200)
    for one in SCHEDULES.values():
        for n in (0, 3, 50):
            packed = torch.full((200,), n)
            assert one.packable_on_device(total, packed).tolist() == [one.packable(t, n) for t in total.tolist()]
            assert torch.equal(total, torch.arange(200)) and bool((packed == n).all()), "an argument was written"


def test_counts_of_zero_sequences_map():
    counts = Counts.zeros(3, CPU)
    picked = counts.map(lambda x: x.index_select(0, on_device([2, 0], CPU)))
    assert all(x.tolist() == [0, 0] for x in vars(picked).values())


def test_a_rejected_draft_is_read_in_full_precision():
    counts, plan = Counts.zeros(1, CPU), Schedule(4, 16, 8)
    counts.advance(plan, 104, 104)
    counts.advance(plan, 8, 8)
    assert counts.packed == 112 - 4 - 16
    counts.crop(4, 7, 7)
    counts.advance(plan, 1, 1)
    assert counts.read == 105 - 4 - 16 and counts.coded == counts.packed == 112 - 4 - 16


def test_warmup():
    counts, plan = Counts.zeros(2, CPU), Schedule(4, 16, 48, warmup=20)
    packed = []
    for _ in range(45):
        counts.advance(plan, 2, torch.tensor([1, 2]))
        packed.append(counts.packed.tolist())
    total = torch.arange(1, 46)[:, None] * torch.tensor([1, 2])
    assert packed == torch.where(total >= 40, total - 20, 0).tolist()
    assert packed[-1] == [plan.packable(45), plan.packable(90)]
    assert counts.ring_low.tolist() == [0, 22] and counts.slots.tolist() == [90, 90]


def test_no_token_at_all():
    counts = Counts.zeros(2, CPU)
    counts.advance(Schedule(4, 16, 8), 0, 0)
    counts.crop(4, 0, 0)
    assert not any(x.any() for x in vars(counts).values())
