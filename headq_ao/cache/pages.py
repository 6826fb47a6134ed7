"""Pages: which physical page holds which tokens of which sequence, and the tensors that they lie in."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headq_ao.ambient import neutral_modes
from headq_ao.config import MOST
from headq_ao.ops.cache_update.move import copy_rows


class PageTable:
    """The block table of all layers of a cache that keep the same tokens.

    Page ``i`` of sequence ``b``, tokens ``i·P`` to ``(i + 1)·P`` of its body, is physical page
    ``table[b, i % columns]``. Sequences that share a beginning share its full pages; where a page is still to be
    written each has its own. Tables change on the host between model calls only.

    Args:
        page_tokens: P.
        most: columns, where older pages are used again (a sliding window); None: as many as there are tokens.
        waits: whether tokens may be left out (:meth:`leave_out`): there are no pages before that is known.
        expected: body tokens, beyond which no spare room is made; None: not known.
    """

    def __init__(
        self, page_tokens: int, most: int | None = None, waits: bool = False, expected: int | None = None
    ) -> None:
        self.page_tokens, self.most, self.waits = page_tokens, most, waits
        self.expected = expected
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.host = torch.zeros(0, 0, dtype=torch.int32, device="cpu")
        self._on: dict[torch.device, Tensor] = {}
        self.pages = 1  # physical ones, the null page among them
        self.shared = False  # whether sequences may have pages in common
        self.left_out: list[int] | None = None if self.waits else []  # tokens of each sequence; []: none

    def leave_out(self, tokens: Sequence[int]) -> None:
        """Note how many packed tokens of each sequence are not stored."""
        self.left_out = list(tokens)

    def stored(self, packed: Sequence[int]) -> list[int]:
        """How many of each sequence's ``packed`` tokens have a place."""
        if self.left_out is None:
            return [0] * len(packed)
        return [n - out for n, out in zip(packed, self.left_out, strict=True)] if self.left_out else list(packed)

    @property
    def columns(self) -> int:
        """Pages of each sequence."""
        return self.host.shape[1]

    @property
    def room(self) -> int:
        """Body tokens that there are pages for; where older pages are used again, any number."""
        if self.left_out is None:
            return 0
        return MOST if self.columns == self.most else self.columns * self.page_tokens + min(self.left_out, default=0)

    def on(self, device: torch.device) -> Tensor:
        """The table ``[B, C]`` int32 on a device. C is at least 2, so that compilers take it for a size like any other;
        a column beyond :attr:`columns` has the null page and is not in use."""
        if device not in self._on:
            with neutral_modes():
                wide = torch.nn.functional.pad(self.host, (0, max(2 - self.columns, 0)))
                self._on[device] = growing(wide.to(device, copy=True), 1)
        return self._on[device]

    def holds(self, tokens: Tensor, device: torch.device) -> Tensor:
        """Whether there are pages for that many body tokens, ``[B]`` bool of ``[B]``, decided on the device."""
        table, last = self.on(device), (tokens - 1).clamp(min=0) // self.page_tokens
        columns = torch.full_like(last, table.shape[1])
        inside = last < columns if self.most is None else (last < columns) | (columns >= self.most)
        return inside & (table.gather(1, (last % columns)[:, None])[:, 0] > 0)

    def tensors(self) -> list[Tensor]:
        """What is held, here and on devices."""
        return [self.host, *self._on.values()]

    def reserve(self, batch: int, tokens: int) -> bool:
        """Give each of ``batch`` sequences room for ``tokens`` body tokens, by eighths once there is some, with none to
        spare beyond ``expected``.

        Returns:
            Whether the table is another one.
        """
        tokens = max(self.stored([tokens] * batch))
        need = -(-tokens // self.page_tokens)
        need, columns = need if self.most is None else min(need, self.most), self.host.shape[1]
        if need <= columns and self.host.shape[0] == batch:
            return False
        if columns:
            spare = columns + -(-columns // 8)
            spare = spare if self.expected is None else min(spare, -(-self.expected // self.page_tokens))
            need = max(need, spare)
            need = need if self.most is None else min(need, self.most)
        more = max(need, 1) - columns
        free = self._unused(self.host.flatten().tolist())
        new = torch.tensor([*itertools.islice(free, batch * more)], dtype=torch.int32, device="cpu")
        self._set(torch.cat([self.host.view(batch, columns), new.view(batch, more)], 1))
        return True

    def select(self, order: Sequence[int], packed: Sequence[int]) -> list[tuple[int, int]]:
        """Keep those sequences, in that order; shared pages are not copied.

        Args:
            order: which.
            packed: body tokens in pages, of each sequence before.

        Returns:
            Physical pages to copy, ``(from, to)``: those in the making, where more than one sequence goes on with it.
        """
        if not len(self.host):
            return []
        packed = self.stored(packed)
        if self.left_out:
            self.left_out = [self.left_out[b] for b in order]
        if self.most is not None:
            return self._select_whole(order)
        old, p = self.host.tolist(), self.page_tokens
        columns = max(-(-(max(packed[b] for b in order) + 1) // p), 1)
        if len(order) == len(old):  # beams: the next pages are wanted anyway
            columns = max(columns, len(old[0]))
        full = [packed[b] // p for b in order]
        kept = [old[b][:n] for b, n in zip(order, full, strict=True)]
        used = {page for row in kept for page in row}
        claimed: set[int] = set()
        for b, n, row in zip(order, full, kept, strict=True):  # the page in the making goes to the first who wants it
            if n < len(old[b]) and old[b][n] not in claimed | used and len(row) < columns:
                claimed.add(old[b][n])
                row.append(old[b][n])
        free = self._unused(claimed | used)
        copies: list[tuple[int, int]] = []
        for b, n, row in zip(order, full, kept, strict=True):
            begins = len(row)
            row += [next(free) for _ in range(columns - begins)]
            if begins == n and packed[b] % p:
                copies.append((old[b][n], row[n]))
        self.shared |= len(set(order)) < len(order)
        self._set(torch.tensor(kept, dtype=torch.int32, device="cpu"))
        return copies

    def _select_whole(self, order: Sequence[int]) -> list[tuple[int, int]]:
        """Pages that are used again cannot be shared: whoever is not the first copies them all."""
        old, rows, copies = self.host.tolist(), list[list[int]](), list[tuple[int, int]]()
        free = self._unused(page for b in order for page in old[b])
        for i, b in enumerate(order):
            if b not in order[:i]:
                rows.append(old[b])
                continue
            rows.append([next(free) for _ in old[b]])
            copies += zip(old[b], rows[-1], strict=True)
        self._set(torch.tensor(rows, dtype=torch.int32, device="cpu"))
        return copies

    def part(self, packed: Sequence[int]) -> list[tuple[int, int]]:
        """Give each sequence pages of its own from token ``packed[b]`` on: a crop has made shared ones writable again.

        Returns:
            As :meth:`select`.
        """
        if not self.shared:
            return []
        packed = self.stored(packed)
        rows, copies = self.host.tolist(), list[tuple[int, int]]()
        holders = Counter(page for row in rows for page in row)
        free = self._unused(holders)
        for row, n in zip(rows, packed, strict=True):
            for i in range(n // self.page_tokens, len(row)):
                if holders[page := row[i]] > 1:
                    holders[page] -= 1
                    row[i] = next(free)
                    copies += [(page, row[i])] if i * self.page_tokens < n else []
        if rows != self.host.tolist():
            self._set(torch.tensor(rows, dtype=torch.int32, device="cpu"))
        return copies

    def _unused(self, used: Iterable[int]) -> Iterator[int]:
        """Physical pages that nobody has: those that were let go, then new ones."""
        return itertools.chain(sorted({*range(1, self.pages)}.difference(used)), itertools.count(self.pages))

    def _set(self, host: Tensor) -> None:
        same, self.pages = self.host.shape == host.shape, max(self.pages, int(host.max()) + 1)
        with neutral_modes():  # a copy that can be written to in any mode
            self.host = host.clone()
            if same:  # prepared steps go on
                for t in self._on.values():
                    t[:, : host.shape[1]].copy_(host)
                return
        self._on.clear()


def growing(t: Tensor, dim: int) -> Tensor:
    """``t``, marked for torch.compile as one whose dimension ``dim`` differs from call to call."""
    torch._dynamo.maybe_mark_dynamic(t, dim)
    return t


class PagePool:
    """The tensors of one layer's pages.

    Args:
        layout: their form.
        dtype: of a side that is not coded.
        device: where they lie.
        segments: codec ids, of which each page has one.
    """

    def __init__(self, layout: Any, dtype: torch.dtype, device: torch.device, segments: int = 1) -> None:
        self.layout, self.spec, self.dtype = layout, layout.spec, dtype
        self.tensors: list[Tensor] = layout.allocate(1, dtype, device)
        self.segment = torch.zeros(1, dtype=torch.int32, device=device) if segments > 1 else None

    @property
    def every(self) -> list[Tensor]:
        """``tensors``, and ``segment`` where there is one."""
        return self.tensors if self.segment is None else [*self.tensors, self.segment]

    @property
    def pages(self) -> int:
        """Physical pages that there is room for."""
        return self.tensors[0].shape[0]

    def fit(self, pages: int) -> bool:
        """Make room for so many pages; whether the tensors are new ones."""
        held = self.tensors[0].shape[0]
        if pages <= held:
            return False
        for i, new in enumerate(self.layout.allocate(pages, self.dtype, self.tensors[0].device)):
            new[:held] = self.tensors[i]
            torch._dynamo.maybe_mark_dynamic(new, 0)
            self.tensors[i] = new
        if self.segment is not None:
            self.segment = torch.nn.functional.pad(self.segment, (0, pages - self.segment.shape[0]))
        return True

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy physical pages ``(from, to)``."""
        copy_rows(self.every, pairs)
