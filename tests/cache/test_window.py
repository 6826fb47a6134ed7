"""Sinks and the ring of newest tokens in full precision."""

import pytest
import torch

from headq_ao.cache.window import Window

CPU = torch.device("cpu")
B, H, D, SINKS, RING = 3, 2, 16, 4, 10
TOTALS = (3, 9, 57)


def filled(ring=RING, dtype=torch.float32, names=("k", "v")):
    """A window whose tokens tell their position, of sequences of :data:`TOTALS` tokens."""
    window = Window(SINKS, ring)
    for i, name in enumerate(names):
        t = window.allocate(name, (B, H, D), dtype, CPU)
        t.fill_(float("nan"))
        for b, total in enumerate(TOTALS):
            for p in range(total):
                t[b, :, slot(p, ring)] = 100 * i + p
    return window


def slot(p, ring):
    return p if p < SINKS else SINKS + (p - SINKS) % ring


def expect(window, name, b, positions, offset=0):
    found = window.at(name, torch.tensor(positions).expand(B, -1))[b]
    assert found.shape == (H, len(positions), D)
    assert torch.equal(found.float(), (torch.tensor(positions).float() + offset)[:, None].expand(H, -1, D))


def kept(total, ring):
    return [*range(min(SINKS, total)), *range(max(total - ring, SINKS), total)]


@pytest.mark.parametrize("ring", [RING, 7, 11, 20, 60])
def test_tokens_survive_another_ring(ring):
    """The newest that both rings have room for are where they belong; longer rings get no more than there were."""
    window = filled()
    window.resize(ring, torch.tensor(TOTALS))
    assert window.ring == ring and window.k.shape == window.v.shape == (B, H, SINKS + ring, D)
    for b, total in enumerate(TOTALS):
        for i, name in enumerate("kv"):
            expect(window, name, b, kept(total, min(ring, RING)), 100 * i)


def test_resizing_to_the_same_is_nothing():
    window = filled()
    k = window.k
    window.resize(RING, torch.tensor(TOTALS))
    assert window.k is k


def test_growing_and_shrinking_in_turn():
    window = filled()
    for ring in (33, 12, 64, RING):
        window.resize(ring, torch.tensor(TOTALS))
    for b, total in enumerate(TOTALS):
        expect(window, "k", b, kept(total, RING))


def test_at_gives_positions_of_each_sequence():
    window = filled()
    position = torch.tensor([[0, 2], [1, 8], [3, 56]])
    assert window.at("v", position)[:, 0, :, 0].tolist() == [[100, 102], [101, 108], [103, 156]]


def test_queries_are_resized_and_selected_too():
    window = filled(names=("k", "v", "q"))
    window.resize(30, torch.tensor(TOTALS))
    window.select(torch.tensor([2, 2, 0]))
    assert len(window.tensors()) == 3
    for b, total in enumerate((57, 57, 3)):
        expect(window, "q", b, kept(total, RING), 200)
    window.q = None
    assert len(window.tensors()) == 2


def test_selecting_copies():
    window = filled()
    window.select(torch.tensor([1, 1, 1]))
    window.k[0] = 0
    expect(window, "k", 1, kept(9, RING))


@pytest.mark.parametrize(
    ("held", "new", "then"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_widening_loses_nothing(held, new, then):
    window = filled(dtype=held)
    assert window.widen(new) == (held != then)
    assert window.k.dtype == window.v.dtype == then
    for b, total in enumerate(TOTALS):
        expect(window, "k", b, kept(total, RING))


def test_an_empty_window_has_nothing():
    window = Window(SINKS, RING)
    assert window.tensors() == [] and not window.widen(torch.float64)
    window.select(torch.tensor([0]))
    window.resize(20, torch.zeros(1, dtype=torch.int64))
    assert window.ring == 20 and window.k is None
    assert window.allocate("k", (1, H, D), torch.float16, CPU).shape == (1, H, SINKS + 20, D)


def test_no_sinks():
    window = Window(0, 5)
    t = window.allocate("k", (1, 1, 16), torch.float32, CPU)
    for p in range(12):
        t[:, :, p % 5] = p
    window.resize(3, torch.tensor([12]))
    assert window.at("k", torch.tensor([[9, 10, 11]]))[0, 0, :, 0].tolist() == [9, 10, 11]
