"""The counts of a paged cache against a simulation that keeps every slot of ring and pages by hand."""

import random

import pytest
import torch

from headq_ao.cache.lengths import Counts, Schedule

CPU = torch.device("cpu")


class Sequence:
    """One sequence whose tokens are objects: what lies where, and what was coded."""

    def __init__(self, n_sink, window, ring):
        self.n_sink, self.window, self.size = n_sink, window, ring
        self.tokens, self.sinks, self.ring, self.pages, self.coded = [], {}, {}, {}, set()

    def check_attention(self, counts, held):
        """What lies before position ``held`` is read as it was written, each token once; from a page what the ring
        lost, or is older than the window was at the start of the call."""
        boundary, before = int(counts.read), int(counts.held) - self.n_sink
        assert held == len(self.tokens) and 0 <= boundary <= max(before, 0)
        read = [self.sinks[p] for p in range(min(held, self.n_sink))]
        read += [self.pages[j] for j in range(boundary)]
        read += [self.ring[j % self.size] for j in range(boundary, held - self.n_sink)]
        assert read == self.tokens
        if boundary > max(before - self.window, 0):
            assert self.ring.get((boundary - 1) % self.size) != self.tokens[self.n_sink + boundary - 1]

    def update(self, counts, new):
        """Pack, each from the ring or from the call's own, then append."""
        total, held, coded, packed = map(int, (counts.total, counts.held, counts.coded, counts.packed))
        assert total == held + len(new) and coded <= packed <= max(total - self.n_sink, 0)
        for j in range(coded, packed):
            p = j + self.n_sink
            token = self.ring[j % self.size] if p < held else new[p - held]
            assert token == (self.tokens + new)[p] and token not in self.coded, "coded once, from full precision"
            self.coded.add(token)
            self.pages[j] = token
        for p, token in enumerate(new, held):
            if p < self.n_sink:
                self.sinks[p] = token
            else:
                self.ring[(p - self.n_sink) % self.size] = token
        self.tokens = self.tokens + new

    def crop(self, n):
        self.tokens = self.tokens[: max(len(self.tokens) - n, 0)]


@pytest.mark.parametrize("granularity", [1, 4, 16])
@pytest.mark.parametrize(("n_sink", "window", "slack"), [(4, 16, 8), (0, 5, 1), (2, 1, 3)])
@pytest.mark.parametrize("seed", range(6))
def test_against_a_simulation(n_sink, window, slack, granularity, seed):
    rng, batch, plan = random.Random(seed), 3, Schedule(n_sink, window, slack, granularity)
    counts, sequences = Counts.zeros(batch, CPU), [Sequence(n_sink, window, plan.ring) for _ in range(batch)]
    addresses, name = [x.data_ptr() for x in vars(counts).values()], 0
    for _ in range(150):
        if rng.random() < 0.15:
            n = [min(rng.choice((1, 2, slack, 3 * plan.ring)), len(s.tokens)) for s in sequences]
            counts.crop(n_sink, max(n), torch.tensor(n))
            for s, less in zip(sequences, n, strict=True):
                s.crop(less)
            continue
        long = rng.random() < 0.2
        most = rng.randint(slack + 1, 3 * plan.ring) if long else rng.randint(1, slack)
        count = [rng.choice((most, most, rng.randint(0, most))) for _ in range(batch)]
        counts.advance(plan, most, torch.tensor(count))
        for b, s in enumerate(sequences):
            mine, new, name = counts.map(lambda x, b=b: x[b]), list(range(name, name + count[b])), name + count[b]
            if long:  # attended from the call's own tokens, then appended
                s.check_attention(mine, len(s.tokens))
            s.update(mine, new)
            if not long:  # appended, then attended
                s.check_attention(mine, len(s.tokens))
    assert [x.data_ptr() for x in vars(counts).values()] == addresses and counts.packed.max() > 0


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
