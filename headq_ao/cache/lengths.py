"""How many tokens the sequences of a cache hold: counts on the device that all its layers share, and what the host
knows of them.

A decoding step knows no length on the host. The counts of :class:`Counts`, int64 ``[B]`` each, are written in place
once per model call, so that kernels and captured graphs find them at the same addresses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from headq_ao.cache.schedule import Schedule, Span
from headq_ao.ops.types import on_device


@dataclass(frozen=True)
class Counts:
    """Of each sequence on one device, int64 ``[B]``, of the last model call.

    Attributes:
        total: tokens, those of the call included.
        held: tokens before it.
        coded: body tokens in pages before it.
        packed: body tokens in pages after it. A packed token is never coded again.
        read: body tokens that the call's attention reads from pages; those behind it, in full precision.
        ring_low: body tokens below it are no longer in the ring: they are packed. It falls to what a crop leaves.
        before, slots: slots before and after the call, padding included, as transformers counts.
        none: 0.
    """

    total: Tensor
    held: Tensor
    coded: Tensor
    packed: Tensor
    read: Tensor
    ring_low: Tensor
    before: Tensor
    slots: Tensor
    none: Tensor

    @classmethod
    def zeros(cls, batch: int, device: torch.device) -> "Counts":
        """Of new sequences."""
        return cls(*(torch.zeros(batch, dtype=torch.int64, device=device) for _ in fields(cls)))

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Counts":
        """The counts of other sequences, or elsewhere."""
        return Counts(*(fn(x) for x in vars(self).values()))

    def advance(self, plan: Schedule, slots: int, count: Tensor | int) -> None:
        """A call of ``slots`` new slots, ``count`` tokens."""
        self.before.copy_(self.slots)
        self.slots.add_(slots)
        self.held.copy_(self.total)
        self.coded.copy_(self.packed)
        behind_window = self.held - (plan.n_sink + plan.window)
        torch.maximum(behind_window.minimum(self.coded), self.ring_low, out=self.read)
        self.total.add_(count)
        if plan.granularity == 1 and not plan.warmup:
            behind_window.add_(count)
            torch.maximum(behind_window, self.coded, out=self.packed)
        else:
            self.packed.copy_(plan.packable_on_device(self.total, self.coded))
        # a ring that holds more, before anything is packed, is not counted on
        left = (self.total - (plan.n_sink + plan.ring)).minimum(self.packed)
        torch.maximum(left, self.ring_low, out=self.ring_low)

    def take_back(self, n_sink: int, ran: bool) -> None:
        """Forget the last call; where some layer has run, what its ring has lost stays, or is to be, packed."""
        if not ran:
            self.ring_low.copy_(self.ring_low.minimum(self.coded))
        self.ring_low.copy_(self.ring_low.minimum((self.held - n_sink).clamp_(min=0)))
        self.packed.copy_(self.coded.maximum(self.ring_low.minimum(self.packed)))
        self.total.copy_(self.held)
        self.slots.copy_(self.before)

    def crop(self, n_sink: int, slots: int, tokens: Tensor | int) -> None:
        """Forget the last ``slots`` slots, ``tokens`` tokens: packed ones stay packed."""
        self.total.sub_(tokens)
        body = (self.total - n_sink).clamp_(min=0)
        self.packed.copy_(self.packed.minimum(body))
        self.ring_low.copy_(self.ring_low.minimum(body))
        self.held.copy_(self.total)
        self.coded.copy_(self.packed)
        self.slots.sub_(slots)
        self.before.copy_(self.slots)


class Lengths:
    """Counts of a batch of sequences, on the devices of its layers, and what the host knows without asking them.

    Args:
        schedule: of packing.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.on: dict[torch.device, Counts] = {}
        self.batch = 0
        self.seen = 0  # slots
        self.known = True  # whether ``seen`` is right: a traced function counts on the device alone
        self.empty = self.first = True  # whether nothing was held, now and before the last call
        self.open = False  # whether a call was announced and no layer has seen it yet
        self.calls = 0
        self.new = 0  # slots of the last call
        self.spans: list[Span] | None = None  # of the last call, where not all its slots are real
        self.padded = False  # whether ``starts`` counts
        self.starts: Tensor | None = None  # the first real slot of each sequence in the last call, [B] int64
        self.tokens: list[int] | None = None  # of each sequence at ``_at`` slots, where they are not all the same
        self._pads: list[int] = []  # trailing ones
        self._at = 0
        self._floor: list[int] = []  # packed tokens that a crop has left
        self._before: tuple[list[int], list[int]] = [], []
        self._top: list[int] = []  # tokens before a crop
        self._stored: list[int] | None = None  # ``ring_low`` of a file, until a device has it
        self.coded: list[int] = []  # body tokens in pages before the last call

    def counts(self, device: torch.device) -> Counts:
        """Of the last call, on a device."""
        found = self.on.get(device)
        if found is None:
            if self.on:
                found = next(iter(self.on.values())).map(lambda x: x.to(device, copy=True))
            elif self._stored is not None:
                found = Counts.zeros(self.batch, device)
                found.total.copy_(on_device(self.totals(), device))
                found.packed.copy_(on_device(self.packed(), device))
                found.slots.fill_(self.seen)
                found.ring_low.copy_(on_device(self._stored, device))
                for behind, now in (
                    (found.held, found.total),
                    (found.coded, found.packed),
                    (found.before, found.slots),
                ):
                    behind.copy_(now)
            else:
                found = Counts.zeros(self.batch, device)
                found.advance(self.schedule, self.new, self._count(device))
            self.on[device] = found
        return found

    def start(self, device: torch.device) -> Tensor | None:
        """The first real slot of each sequence in the last call, ``[B]`` int64; None: 0."""
        if not self.padded:
            return None
        if self.starts is None:
            assert self.spans is not None
            self.starts = on_device([span.start for span in self.spans], device)
        return self.starts if self.starts.device == device else self.starts.to(device)

    def _count(self, device: torch.device) -> Tensor | int:
        return self.new if self.spans is None else on_device([span.length for span in self.spans], device)

    def reserve(self, batch: int) -> None:
        """The number of sequences, where it is not known yet."""
        if not self.batch:
            self.batch, self._floor, self._top = batch, [0] * batch, [0] * batch

    def begin(self, batch: int, slots: int, spans: Sequence[Span] | None = None) -> None:
        """Count a call of ``slots`` new slots of ``batch`` sequences, of which those in ``spans`` hold real tokens;
        None: all."""
        self.settle()
        self.reserve(batch)
        before, pads, self.coded = self.totals(), self.trailing_pads(), self.packed()
        self._before = before, pads
        self.first, self.empty, self.calls, self.new = self.empty, False, self.calls + 1, slots
        self.spans, self.padded, self.starts, self.open = None, False, None, True
        if spans is not None and any(span.length != slots for span in spans):
            self.spans, self.padded = list(spans), True
            self.tokens = [n + span.length for n, span in zip(before, spans, strict=True)]
            self._pads = [slots - s.stop if s.length else p + slots for s, p in zip(spans, pads, strict=True)]
            self._at = self.seen + slots
        elif any(pads):
            self.tokens, self._pads, self._at = [n + slots for n in before], [0] * self.batch, self.seen + slots
        self.seen += slots
        for device, counts in self.on.items():
            counts.advance(self.schedule, slots, self._count(device))

    def begin_token(self) -> None:
        """:meth:`begin` of one token for each sequence, where none of them has padding and codecs take single tokens:
        a decoding step."""
        seen, plan = self.seen, self.schedule
        coded = seen - plan.n_sink - plan.window
        self._before, self.coded = ([seen] * self.batch, [0] * self.batch), [max(coded, n) for n in self._floor]
        self.first, self.calls, self.new, self.seen = False, self.calls + 1, 1, seen + 1
        self.spans, self.padded, self.starts, self.open = None, False, None, True
        for counts in self.on.values():
            counts.advance(plan, 1, 1)

    def begin_traced(self, slots: int, real: Tensor | None) -> None:
        """:meth:`begin` in a traced function, of which the host knows nothing.

        Args:
            slots: new ones.
            real: ``[B, S]`` bool, which of them hold tokens, one run in each sequence; None: all.
        """
        self.known, self.open = False, True
        self.first, self.empty = self.empty, False
        self.padded = real is not None
        count: Tensor | int = slots
        if real is not None:
            self.starts, count = real.to(torch.int8).argmax(1), real.sum(1)
        for counts in self.on.values():
            counts.advance(self.schedule, slots, count)

    def take_back(self, ran: bool = True) -> None:
        """Forget the last call; ``ran``: whether it has come through any layer."""
        self.open = False
        for counts in self.on.values():
            counts.take_back(self.schedule.n_sink, ran)
        top, removed = (
            self._top,
            [self.new] * self.batch if self.spans is None else [span.length for span in self.spans],
        )
        lost = [
            min(t - self.schedule.n_sink - self.schedule.ring, t - r - self.schedule.n_sink)
            for t, r in zip(self.totals(), removed, strict=True)
        ]
        after = [max(c, min(x, p), 0) for c, x, p in zip(self.coded, lost, self.packed(), strict=True)]
        self._crop_host(self.new, removed)
        self._pads = self._before[1]
        self._floor, self._top = (after, self._top) if ran else (self.coded, top)
        self.new, self.spans, self.padded = 0, None, False
        if not self.seen:
            calls = self.calls
            self.clear()
            self.calls = calls

    def take_back_traced(self) -> None:
        """:meth:`take_back` in a graph that has begun a call and fails in it."""
        if not self.known:
            for counts in self.on.values():
                counts.take_back(self.schedule.n_sink, True)

    def removed(self, slots: int) -> list[int]:
        """Tokens of each sequence among the last ``slots`` slots."""
        return [min(max(slots - p, 0), n) for p, n in zip(self.trailing_pads(), self.totals(), strict=True)]

    def crop(self, slots: int) -> None:
        """Forget the last ``slots`` slots of each sequence: tokens that are packed stay so, and are read in full
        precision again where the ring still has them."""
        self.settle()
        removed = self.removed(slots)
        for device, counts in self.on.items():
            counts.crop(self.schedule.n_sink, slots, on_device(removed, device))
        self._crop_host(slots, removed)

    def _crop_host(self, slots: int, removed: Sequence[int]) -> None:
        floor, totals = self.packed(), self.totals()
        self._top = self.highest()
        self.seen -= slots
        if self.tokens is not None:
            self.tokens = [n - r for n, r in zip(totals, removed, strict=True)]
            self._pads, self._at = [max(p - slots, 0) for p in self._pads], self.seen
        sink = self.schedule.n_sink
        self._floor = [min(f, max(n - sink, 0)) for f, n in zip(floor, self.totals(), strict=True)]

    def select(self, order: Sequence[int]) -> None:
        """Keep those sequences, in that order."""
        self.settle()
        packed, top, same = self.packed(), self.highest(), len(order) == self.batch
        self._floor, self._top, self.batch = [packed[b] for b in order], [top[b] for b in order], len(order)
        if self.tokens is not None:
            self.tokens, self._pads = [self.tokens[b] for b in order], [self._pads[b] for b in order]
        for device, counts in self.on.items():
            index = on_device(order, device)
            found = counts.map(lambda x, index=index: x.index_select(0, index))  # type: ignore[misc]
            if same:  # in place, for who knows their addresses
                for x, y in zip(vars(counts).values(), vars(found).values(), strict=True):
                    x.copy_(y)
            else:
                self.on[device] = found
        self.spans, self.padded = None, False

    def totals(self) -> list[int]:
        """Tokens of each sequence."""
        self.settle()
        if self.tokens is None:
            return [self.seen] * self.batch
        return [n + self.seen - self._at for n in self.tokens]

    def before(self) -> tuple[list[int], list[int]]:
        """Tokens of each sequence before the last call, and the padding behind the last of them."""
        return self._before

    def trailing_pads(self) -> list[int]:
        """Padding behind the last token of each sequence."""
        return [0] * self.batch if self.tokens is None else self._pads

    def packed(self) -> list[int]:
        """Body tokens of each sequence that are in pages after the last call."""
        return [self.schedule.packable(n, p) for n, p in zip(self.totals(), self._floor, strict=True)]

    def highest(self) -> list[int]:
        """The most tokens that each sequence has had, crops undone."""
        return [max(n, top) for n, top in zip(self.totals(), self._top, strict=True)]

    def restore(
        self, slots: int, tokens: list[int], pads: list[int], packed: list[int], ring_low: list[int], highest: list[int]
    ) -> None:
        """Counts of sequences that were stored, in place of none."""
        self.clear()
        self.reserve(len(tokens))
        self.seen = self._at = slots
        self.empty = self.first = False
        self.calls, self.coded, self._floor, self._top = 1, packed, packed, highest
        if any(pads) or any(n != slots for n in tokens):
            self.tokens, self._pads = tokens, pads
        self._stored = ring_low

    def settle(self) -> None:
        """Learn from the device what a traced function has counted."""
        if self.known:
            return
        self.known, counts = True, next(iter(self.on.values()))
        self.seen, before = int(counts.slots[0]), int(counts.before[0])
        self.new, self.first, self.spans, self.padded = self.seen - before, before == 0, None, False
        totals = counts.total.tolist()
        self.tokens = None if all(n == self.seen for n in totals) else totals
        self._pads, self._at, self._floor = [0] * self.batch, self.seen, counts.packed.tolist()
        self.coded = counts.coded.tolist()
