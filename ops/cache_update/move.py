"""Moving rows of tensors in place: what sequences of a batch hold, and pages."""

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.cache_update.cpu_kernel import library

BESIDE = -1  # a row that is no row of the tensor: where one is put aside


class _Rows(ctypes.Structure):
    """``Rows`` of cpu_kernel.cpp: the rows of a tensor, strides in bytes."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "parts", "part", "bytes")))


def copy_rows(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy rows ``(from, to)`` of each tensor in place; no row is both.

    Example:
        >>> x = torch.tensor([[1, 2], [3, 4], [5, 6]])
        >>> copy_rows([x], [(0, 2)])
        >>> x.tolist()
        [[1, 2], [3, 4], [1, 2]]
    """
    if not pairs or not tensors or _moved(tensors, pairs):
        return
    source, target = (_index(x, tensors[0].device) for x in zip(*pairs, strict=True))
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
    if not tensors or _moved(tensors, moves(order)):
        return
    index = _index(order, tensors[0].device)
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


def _moved(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether the compiled code has made the moves; on the CPU, of rows that there are."""
    lib, rows, most = library(), [_rows(t) for t in tensors], max(map(max, pairs), default=BESIDE)
    found = [x for x, t in zip(rows, tensors, strict=True) if x is not None and most < len(t)]
    if lib is None or len(found) < len(rows):
        return False
    flat = (ctypes.c_int64 * (2 * len(pairs)))(*itertools.chain(*pairs))
    given = (_Rows * len(found))(*found), len(found), flat, ctypes.c_int64(len(pairs)), torch.get_num_threads()
    if lib.headq_move_rows(*given):
        raise MemoryError("moving rows of the cache had no memory for one of them")
    return True


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Without waiting for the copy."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def _rows(t: Tensor) -> _Rows | None:
    """None where the compiled code does not read such a tensor."""
    if type(t) is not Tensor or t.device.type != "cpu" or not t.numel():
        return None
    row = t.stride(0) * t.element_size()
    if t.is_contiguous():
        return _Rows(t.data_ptr(), row, 1, 0, row)
    if t.ndim > 1 and t.transpose(0, 1).is_contiguous():  # pages: those of a head lie side by side
        return _Rows(t.data_ptr(), row, t.shape[1], t.stride(1) * t.element_size(), row)
    return None
