"""Lengths, counts and schedule, against a simulation that moves single tokens."""

import random

import pytest
import torch

from headq_ao.cache.lengths import Lengths
from headq_ao.cache.schedule import Schedule, Span

CPU = torch.device("cpu")
SCHEDULES = {
    "plain": Schedule(n_sink=4, window=10, slack=6),
    "no sinks": Schedule(n_sink=0, window=5, slack=1),
    "small window": Schedule(n_sink=2, window=1, slack=3),
    "groups": Schedule(n_sink=4, window=8, slack=4, granularity=8),
    "warm-up": Schedule(n_sink=2, window=6, slack=4, granularity=4, warmup=16),
}


class Simulation:
    """Tokens of one sequence, by hand: which body tokens have pages, and what the slots of the ring hold."""

    def __init__(self, plan):
        self.plan, self.total, self.packed, self.before = plan, 0, 0, (0, 0)
        self.ring = {}  # slot: body token
        self.slots, self.pads, self.highest = [], 0, 0

    def call(self, n, span):
        plan = self.plan
        self.before, self.ring_before = (self.total, self.packed), dict(self.ring)
        # attention reads in full precision what is there of the newest `window` tokens, and what is nowhere else
        held = self.total - plan.n_sink
        in_ring = set(self.ring.values())
        self.read = 0
        while self.read < self.packed and (self.read < held - plan.window or self.read not in in_ring):
            self.read += 1
        assert in_ring.issuperset(range(self.read, held)), "a token that attention finds nowhere"
        self.total += span.length
        self.highest = max(self.highest, self.total)
        body = max(self.total - plan.n_sink, 0)
        packable = 0
        while packable + plan.granularity <= body - plan.window:
            packable += plan.granularity
        self.packed = max(self.packed, packable if packable >= plan.warmup or self.packed else 0)
        leaving = range(self.before[1], min(self.packed, held))
        assert in_ring.issuperset(leaving), "a token that is packed, once, without its full-precision copy"
        if self.packed:  # while nothing is, the ring grows
            self.ring = {j % plan.ring: j for j in sorted(self.ring.values()) if j >= body - plan.ring}
        for j in range(max(self.before[0] - plan.n_sink, 0), body):
            if not self.packed or j >= body - plan.ring:
                self.ring[j % plan.ring if self.packed else ("grown", j)] = j
        if n <= plan.slack and not plan.warmup:  # appended before attention reads
            assert set(self.ring.values()).issuperset(range(self.read, body))
        self.pads = n - span.stop if span.length else self.pads + n

    def crop(self, slots):
        removed = min(max(slots - self.pads, 0), self.total)
        self.total, self.pads = self.total - removed, max(self.pads - slots, 0)
        body = max(self.total - self.plan.n_sink, 0)
        self.packed = min(self.packed, body)
        self.ring = {slot: j for slot, j in self.ring.items() if j < body}


def spans_of(rng, n, batch):
    if rng.random() < 0.6:
        return None
    return [Span(*sorted(rng.choices([0, n // 3, n // 2, n], k=2))) for _ in range(batch)]


def check(lengths, counts, sequences):
    assert lengths.totals() == counts.total.tolist() == [x.total for x in sequences]
    assert lengths.packed() == counts.packed.tolist() == [x.packed for x in sequences]
    assert lengths.trailing_pads() == [x.pads for x in sequences]
    assert counts.slots.tolist() == [lengths.seen] * len(sequences)
    assert [a >= x.highest for a, x in zip(lengths.highest(), sequences, strict=True)]
    for x, low, n, packed in zip(sequences, counts.ring_low.tolist(), lengths.totals(), lengths.packed(), strict=True):
        assert low <= packed, "a token that is nowhere"
        assert set(range(low, max(n - lengths.schedule.n_sink, 0))) <= set(x.ring.values())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(12))
def test_counts_are_those_of_a_simulation(name, seed):
    plan, rng = SCHEDULES[name], random.Random(seed)
    lengths, batch = Lengths(plan), rng.randint(1, 3)
    sequences, late = [Simulation(plan) for _ in range(batch)], rng.random() < 0.3
    for _ in range(60):
        what = rng.choice(["call", "call", "call", "step", "crop", "take back", "select", "restore"])
        if what in ("call", "step", "take back") or not lengths.seen:
            n = 1 if what == "step" else rng.choice([1, 2, plan.slack, plan.slack + 1, 30])
            spans = None if what == "step" else spans_of(rng, n, len(sequences))
            saved, pads = [(x.total, x.packed, x.pads) for x in sequences], lengths.trailing_pads()
            first = not lengths.seen
            plain = not first and lengths.tokens is None and plan.granularity == 1
            if what == "step" and plain and rng.random() < 0.5:
                lengths.begin_token()
            else:
                lengths.begin(len(sequences), n, spans)
            assert lengths.first == first and lengths.new == n
            assert lengths.before()[1] == (pads or [0] * len(sequences))
            counts = lengths.counts(CPU)
            for x, span in zip(sequences, spans or [Span(0, n)] * len(sequences), strict=True):
                x.call(n, span)
            assert counts.held.tolist() == lengths.before()[0] == [x[0] for x in saved]
            assert counts.coded.tolist() == lengths.coded == [x[1] for x in saved]
            assert counts.before.tolist() == [lengths.seen - n] * len(sequences)
            if not late:
                assert counts.read.tolist() == [x.read for x in sequences]
            check(lengths, counts, sequences)
            if what == "take back":
                lengths.take_back(ran=False)
                if first:
                    assert lengths.batch == 0 and not lengths.on
                    sequences = [Simulation(plan) for _ in sequences]
                    continue
                assert counts.total.tolist() == lengths.totals() == [x[0] for x in saved]
                assert counts.packed.tolist() == lengths.packed() == [x[1] for x in saved]
                assert lengths.trailing_pads() == [x[2] for x in saved]
                for x, (total, packed, pads) in zip(sequences, saved, strict=True):
                    x.total, x.packed, x.pads, x.ring = total, packed, pads, x.ring_before
                late = True  # of what a failed call might have overwritten nothing is read from the ring
                check(lengths, counts, sequences)
        elif what == "crop" and lengths.seen > 1:
            n = rng.randint(1, min(lengths.seen - 1, rng.choice([plan.slack, 200])))
            expected = lengths.removed(n)
            before = lengths.totals()
            lengths.crop(n)
            for x in sequences:
                x.crop(n)
            assert [a - b for a, b in zip(before, lengths.totals(), strict=True)] == expected
            check(lengths, lengths.counts(CPU), sequences)
        elif what == "select":
            order = [rng.randrange(len(sequences)) for _ in range(rng.randint(1, 4))]
            lengths.select(order)
            sequences = [copy_of(sequences[b]) for b in order]
            check(lengths, lengths.counts(CPU), sequences)
        elif what == "restore":
            low = lengths.counts(CPU).ring_low.tolist()
            made = Lengths(plan)
            made.restore(
                lengths.seen, lengths.totals(), lengths.trailing_pads(), lengths.packed(), low, lengths.highest()
            )
            for field, value in vars(lengths.counts(CPU)).items():
                if field in ("total", "packed", "ring_low", "slots", "none"):
                    assert torch.equal(getattr(made.counts(CPU), field), value), field
            lengths = made


def copy_of(x):
    made = Simulation(x.plan)
    vars(made).update(vars(x) | {"ring": dict(x.ring)})
    return made


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rejected_draft_shrinks_no_window(name):
    """After ``slack`` tokens more and their crop, attention reads as many in full precision as before."""
    plan = SCHEDULES[name]
    plain, drafted = Lengths(plan), Lengths(plan)
    for total in range(1, 80):
        for lengths in (plain, drafted):
            lengths.begin(1, 1)
            assert lengths.counts(CPU).read <= max(total - 1 - plan.n_sink - plan.window, 0)
        if plan.granularity == 1:
            assert torch.equal(plain.counts(CPU).read, drafted.counts(CPU).read), total
        for n in (plan.slack, 1):
            drafted.begin(1, n)
            drafted.counts(CPU)
            drafted.crop(n)
    assert plain.counts(CPU).read > 20


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_call_that_ran_is_taken_back_without_a_hole(name):
    """What a layer's ring may have lost is packed, and nothing more."""
    plan = SCHEDULES[name]
    for n in (1, plan.slack, plan.slack + 1, plan.ring, 3 * plan.ring):
        lengths = Lengths(plan)
        lengths.begin(1, 60)
        counts, before = lengths.counts(CPU), lengths.packed()[0]
        lengths.begin(1, n)
        lengths.take_back(ran=True)
        packed, body = lengths.packed()[0], 60 - plan.n_sink
        assert counts.packed.tolist() == [packed] and lengths.totals() == [60]
        assert counts.ring_low.tolist() == [min(max(body + n - plan.ring, 0), body)]
        assert packed == max(before, min(body + n - plan.ring, body)) <= body
        assert packed == before or n > plan.slack


def test_counts_stay_where_they_are():
    """Kernels and captured graphs find them at the same addresses."""
    lengths = Lengths(SCHEDULES["plain"])
    lengths.begin(2, 40)
    counts = lengths.counts(CPU)
    where = [t.data_ptr() for t in vars(counts).values()]
    assert len(set(where)) == len(where) == 9
    for n in (1, 1, 30):
        lengths.begin(2, n, [Span(0, n), Span(n // 2, n)])
        lengths.crop(1)
    lengths.begin(2, 4)
    lengths.take_back()
    assert lengths.counts(CPU) is counts and [t.data_ptr() for t in vars(counts).values()] == where


def test_a_device_that_comes_late_gets_the_same_counts():
    lengths = Lengths(SCHEDULES["plain"])
    lengths.begin(2, 40, [Span(0, 40), Span(7, 40)])
    first = lengths.counts(CPU)
    meta = lengths.counts(torch.device("meta"))
    assert meta.total.device.type == "meta" and meta.total.shape == first.total.shape


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_traced_function_counts_is_learned(name):
    """A host that saw nothing settles on what one that saw all says."""
    plan = SCHEDULES[name]
    traced, seen = Lengths(plan), Lengths(plan)
    for lengths in (traced, seen):
        lengths.begin(2, 40, [Span(0, 40), Span(10, 40)])
        lengths.counts(CPU)
    for n in (1, 1, 5):
        traced.begin_traced(n, None)
        seen.begin(2, n)
    real = torch.tensor([[False, True, True], [True, True, True]])
    traced.begin_traced(3, real)
    assert traced.start(CPU).tolist() == [1, 0] and not traced.known
    seen.begin(2, 3, [Span(1, 3), Span(0, 3)])
    assert traced.totals() == seen.totals() and traced.packed() == seen.packed() and traced.known
    assert (traced.seen, traced.new, traced.coded) == (seen.seen, 3, seen.coded)
    for x, y in zip(vars(traced.counts(CPU)).values(), vars(seen.counts(CPU)).values(), strict=True):
        assert torch.equal(x, y)
    for lengths in (traced, seen):
        lengths.crop(20)
        lengths.begin(2, 1)
    assert traced.packed() == seen.packed() and torch.equal(traced.counts(CPU).read, seen.counts(CPU).read)


def test_first_slots_of_padded_calls():
    lengths = Lengths(SCHEDULES["plain"])
    lengths.begin(2, 8, [Span(0, 8), Span(3, 8)])
    assert lengths.start(CPU).tolist() == [0, 3] and lengths.tokens is not None
    lengths.begin(2, 4)
    assert lengths.start(CPU) is None and lengths.tokens is not None and lengths.totals() == [12, 9]
    lengths.begin(2, 4, [Span(0, 4), Span(0, 4)])
    assert lengths.start(CPU) is None, "spans that are whole are no padding"
