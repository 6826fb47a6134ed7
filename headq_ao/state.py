"""Storage of the cache layer: packed rows that grow geometrically, exact rows of a fixed few, and per-row counts."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.ops.gpu_build import numbers_on

ROOM = 4096  # exact rows that are made room for at once, where a config has more


@dataclass
class RowCounts:
    """Counts of one batch row: ``tokens`` seen (pads not counted), ``slots`` of closed blocks in storage,
    ``packed`` valid tokens in them, ``dropped`` tokens that a sliding window has let go (part of neither),
    ``pads`` behind the last token, ``folded`` tokens in the running sum of keys."""

    tokens: int = 0
    slots: int = 0
    packed: int = 0
    dropped: int = 0
    pads: int = 0
    folded: int = 0

    @property
    def exact(self) -> int:
        """Exact rows held: sinks, then the window."""
        return self.tokens - self.packed - self.dropped

    def key(self) -> tuple[int, ...]:
        """Equal where all counts are."""
        return self.tokens, self.slots, self.packed, self.dropped, self.pads, self.folded

    def copy(self) -> "RowCounts":
        return dataclasses.replace(self)


@dataclass
class Span:
    """New slots ``start:stop`` of one call that hold real tokens of a row; the others are padding."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class RowStore:
    """Tensors ``[B, Hkv, capacity / unit, ...]`` over packed slots.

    ``units[i]`` is the number of tokens that one entry of tensor ``i`` covers. Capacity grows by an eighth at least,
    so appending copies each byte about eight times over a sequence's life and at most 1/8 lies unused.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.units: list[int] = []
        self.capacity = 0

    def write(self, rows: Tensor | None, slot: int, batch: int, new: Sequence[Tensor], tokens: int) -> None:
        """Put ``new`` (``tokens`` tokens) at ``slot`` of batch rows ``rows`` (None: all)."""
        if not self.tensors:
            self.units = [tokens // t.shape[2] for t in new]
            self.tensors = [t.new_empty((batch, t.shape[1], 0, *t.shape[3:])) for t in new]
        self._reserve(slot + tokens)
        self.tensors = [widened(stored, part.dtype) for stored, part in zip(self.tensors, new, strict=True)]
        for stored, unit, part in zip(self.tensors, self.units, new, strict=True):
            at = slice(slot // unit, (slot + tokens) // unit)
            if rows is None:
                stored[:, :, at] = part
            else:
                stored[rows, :, at] = part.to(stored.dtype)

    def _reserve(self, slots: int) -> None:
        if slots <= self.capacity:
            return
        step = max(32, *self.units)
        grown = slots if self.capacity == 0 else max(slots, self.capacity + self.capacity // 8)
        self.capacity = -(-grown // step) * step
        for i, (stored, unit) in enumerate(zip(self.tensors, self.units, strict=True)):
            larger = stored.new_zeros((*stored.shape[:2], self.capacity // unit, *stored.shape[3:]))
            larger[:, :, : stored.shape[2]] = stored
            self.tensors[i] = larger

    def drop(self, slots: int) -> None:
        """Forget the first ``slots`` slots of every row."""
        for i, (stored, unit) in enumerate(zip(self.tensors, self.units, strict=True)):
            self.tensors[i] = stored[:, :, slots // unit :].clone()
        self.capacity -= slots

    def view(self, begin: int, end: int) -> list[Tensor]:
        """Views of slots ``begin:end``."""
        return [t[:, :, begin // u : end // u] for t, u in zip(self.tensors, self.units, strict=True)]

    def select(self, index: Tensor) -> None:
        """Keep and reorder batch rows."""
        self.tensors = [t.index_select(0, index.to(t.device)) for t in self.tensors]


class ExactRows:
    """The exact rows of a layer, ``k``, ``v`` and, while a sequence's own statistics are awaited, ``q``.

    Row ``b`` holds its first ``counts[b].exact`` entries: up to ``n_sink`` sinks, then the newest tokens.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.q: Tensor | None = None

    def append(self, new: Mapping[str, Tensor], counts: Sequence[int], spans: Sequence[Span], minimum: int) -> None:
        """Write each row's real new tokens, ``new`` by name, behind its ``counts``; grow to at least ``minimum``.

        Beyond :data:`ROOM` rows room grows by eighths: a config may keep more rows exact than there is memory for.
        """
        ends = [c + s.stop - s.start for c, s in zip(counts, spans, strict=True)]
        need, first = max(ends), counts[0]
        for name, rows in new.items():
            stored: Tensor | None = getattr(self, name)
            slots = rows.shape[2]
            if stored is None or stored.shape[2] < need:
                stored = self._grow(name, rows, max(need, min(minimum, max(ROOM, need + need // 8))))
            elif stored.dtype != rows.dtype:
                stored = widened(stored, rows.dtype)
                setattr(self, name, stored)
            if max(counts) == first and min(ends) == first + slots:  # all slots are real, and behind the same count
                stored[:, :, first : first + slots] = rows
                continue
            for b, (c, s) in enumerate(zip(counts, spans, strict=True)):
                stored[b, :, c : c + s.length] = rows[b, :, s.start : s.stop]

    def _grow(self, name: str, new: Tensor, capacity: int) -> Tensor:
        """Room for so many rows, in the form of ``new``."""
        stored: Tensor | None = getattr(self, name)
        dtype = new.dtype if stored is None else torch.promote_types(stored.dtype, new.dtype)
        larger = new.new_zeros((*new.shape[:2], capacity, new.shape[3]), dtype=dtype)
        if stored is not None:
            larger[:, :, : stored.shape[2]] = stored
        setattr(self, name, larger)
        return larger

    def shift(self, rows: Tensor | None, first: int, removed: int, count: int) -> None:
        """Remove ``removed`` entries behind ``first`` from rows that hold ``count``."""
        for stored in self.tensors():
            if rows is None:
                stored[:, :, first : count - removed] = stored[:, :, first + removed : count].clone()
            else:
                stored[rows, :, first : count - removed] = stored[rows, :, first + removed : count]

    def resize(self, capacity: int) -> None:
        """Give back memory that a prefill needed."""
        for name in ("k", "v", "q"):
            stored = getattr(self, name)
            if stored is not None and stored.shape[2] > capacity:
                setattr(self, name, stored[:, :, :capacity].clone())

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.q) if t is not None]

    def select(self, index: Tensor) -> None:
        """Keep and reorder batch rows."""
        for name in ("k", "v", "q"):
            stored = getattr(self, name)
            if stored is not None:
                setattr(self, name, stored.index_select(0, index.to(stored.device)))


def call_spans(first: int, length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each call that feeds ``length`` tokens: ``first`` tokens, then ``chunk`` at a time.

    Example:
        >>> from headq_ao.state import call_spans
        >>> list(call_spans(5, 12, 4)), list(call_spans(0, 3, 4))
        ([(0, 5), (5, 9), (9, 12)], [(0, 3)])
    """
    return itertools.pairwise(sorted({0, *range(first, length, chunk), length}))


def widened(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where rows of ``dtype`` can be written into it without loss, else a copy where they can.

    Calls may bring rows of different dtypes, as with and without autocast.
    """
    return stored.to(torch.promote_types(stored.dtype, dtype))


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors (data pointers do not tell them apart on the meta device)."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def int_tensor(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A small int64 tensor on the device, not to be written to."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return numbers_on(tuple(map(tuple, values)), torch.int64, device)
