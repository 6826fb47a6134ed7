"""Moving rows of tensors in place: what sequences of a batch hold, and pages."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headq_ao.ops.dispatch import kernels
from headq_ao.ops.types import on_device

BESIDE = -1  # a row that is no row of the tensor: where one is put aside


def copy_rows(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy rows ``(from, to)`` of each tensor in place; no row is both.

    Example:
        >>> x = torch.tensor([[1, 2], [3, 4], [5, 6]])
        >>> copy_rows([x], [(0, 2)])
        >>> x.tolist()
        [[1, 2], [3, 4], [1, 2]]
    """
    if not pairs or not tensors:
        return
    move = _mover(tensors[0].device)
    if move is not None and move(tensors, pairs):
        return
    source, target = (on_device(x, tensors[0].device) for x in zip(*pairs, strict=True))
    for t in tensors:
        t.index_copy_(0, target, t.index_select(0, source))


def select_rows(tensors: Sequence[Tensor], order: Sequence[int]) -> None:
    """``x[order]`` of each tensor, in place: as many rows as it has.

    Only rows that change are written, and each is read once: half of the traffic of a copy of all of them and back.

    Example:
        >>> x = torch.tensor([[1, 2], [3, 4], [5, 6]])
        >>> select_rows([x], [1, 0, 1])
        >>> x.tolist()
        [[3, 4], [1, 2], [3, 4]]
    """
    if not tensors:
        return
    move = _mover(tensors[0].device)
    if move is not None and move(tensors, moves(order)):
        return
    index = on_device(order, tensors[0].device)
    for t in tensors:
        t.copy_(t.index_select(0, index))


def moves(order: Sequence[int]) -> list[tuple[int, int]]:
    """Moves ``(from, to)`` of rows, one after the other, after which row ``i`` is what row ``order[i]`` was.

    A row is written once nothing is to be read from it any more; where only cycles are left, one of their rows is
    put aside, at :data:`BESIDE`.

    Example:
        >>> moves([0, 0, 1])
        [(1, 2), (0, 1)]
        >>> moves([1, 0])
        [(0, -1), (1, 0), (-1, 1)]
    """
    source = {to: row for to, row in enumerate(order) if row != to}
    readers = [0] * len(order)
    for row in source.values():
        readers[row] += 1
    made, ready = list[tuple[int, int]](), [to for to in source if not readers[to]]
    while source:
        if not ready:  # cycles: each of their rows has one reader
            aside = next(iter(source))
            made.append((aside, BESIDE))
            reader = next(to for to, row in source.items() if row == aside)
            source[reader], ready = BESIDE, [aside]
        to = ready.pop()
        row = source.pop(to)
        made.append((row, to))
        if row != BESIDE:
            readers[row] -= 1
            if not readers[row] and row in source:
                ready.append(row)
    return made


def _mover(device: torch.device) -> Callable[[Sequence[Tensor], Sequence[tuple[int, int]]], bool] | None:
    """What makes moves on a device, and says whether it has; None: that device's kernels make none."""
    return getattr(kernels("cache_update", device.type), "move_rows", None)
