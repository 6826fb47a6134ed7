"""Rows moved in place against indexing."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from headq_ao.ops.cache_update import move
from headq_ao.ops.cache_update.cpu_kernel import library

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int32)


@pytest.fixture(params=["compiled", "PyTorch"], autouse=True)
def route(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(move, "kernels", lambda *_: None)
    elif library() is None:
        pytest.skip("no compiler")
    return request.param


def tensors(rows):
    g = torch.Generator().manual_seed(rows)
    made = [torch.randint(100, (rows, 3, n, 5), generator=g).to(dtype) for n, dtype in enumerate(DTYPES, 1)]
    pages = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in made]  # the heads of one lie apart
    return [*made, *pages, torch.arange(rows)]


@pytest.mark.parametrize("rows", range(1, 6))
def test_any_order_is_selected(rows):
    for order in itertools.product(range(rows), repeat=rows):
        held = tensors(rows)
        expected = [t[list(order)] for t in held]
        move.select_rows(held, order)
        assert all(map(torch.equal, held, expected)), order


@pytest.mark.parametrize("rows", range(1, 6))
def test_a_row_is_written_once_and_put_aside_for_a_cycle_only(rows):
    for order in itertools.product(range(rows), repeat=rows):
        made = move.moves(order)
        written = [to for _, to in made if to != move.BESIDE]
        assert sorted(written) == [to for to, row in enumerate(order) if row != to]
        cycles = len({min(c) for to in range(rows) if len(c := cycle_of(order, to)) > 1})
        left = sum(to == move.BESIDE for _, to in made)
        assert left <= cycles
        if sorted(order) == list(range(rows)):
            assert left == cycles


def cycle_of(order, row):
    """The cycle of rows that row is on, or none."""
    seen, at = [row], order[row]
    while at not in seen:
        seen.append(at)
        at = order[at]
    return seen if at == row else []


def test_strided_tensors_are_moved_too():
    held = torch.arange(24.0).view(4, 6)
    move.select_rows([held[:, ::2]], [1, 0, 3, 3])
    expected = torch.arange(24.0).view(4, 6)
    expected[:, ::2] = expected[[1, 0, 3, 3], ::2]
    assert torch.equal(held, expected)


def test_rows_are_copied_and_others_stay():
    held = tensors(6)
    expected = [t[[0, 1, 2, 3, 0, 2]] for t in held]
    move.copy_rows(held, [(0, 4), (2, 5)])
    assert all(map(torch.equal, held, expected))
    move.copy_rows(held, [])
    assert all(map(torch.equal, held, expected))


def test_threads_share_large_moves(route):
    threads = torch.get_num_threads()
    held = [torch.randn(8, 3, 128, 64) for _ in range(6)]
    expected = [t[[7, 7, 1, 0, 4, 3, 2, 6]] for t in held]
    torch.set_num_threads(2)
    try:
        move.select_rows(held, [7, 7, 1, 0, 4, 3, 2, 6])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, held, expected))


def test_tensors_without_numbers_stay():
    held = [torch.zeros(3, 0, 5), torch.zeros(3, 4, 0, 70000), torch.ones(3, 2)]
    move.select_rows([*held[:2], held[2]], [1, 0, 2])
    move.copy_rows([*held[:2], held[2]], [(0, 2)])
    assert held[2].sum() == 6


def test_rows_that_there_are_not_are_refused():
    beside = torch.zeros(8, 4)
    for t in (beside[:3], beside.T[:3].T[:3]):
        with pytest.raises((IndexError, RuntimeError)):
            move.copy_rows([t], [(0, 5)])
        with pytest.raises((IndexError, RuntimeError)):
            move.select_rows([t], [7, 0, 1])


def test_tensors_without_memory_are_left_to_pytorch():
    with FakeTensorMode():
        move.select_rows([t := torch.zeros(3, 2)], [1, 0, 2])
    move.select_rows([torch.zeros(3, 2, device="meta")], [1, 0, 2])
    assert t.shape == (3, 2)
