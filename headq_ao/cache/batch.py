"""What the layers of a cache share: lengths, block tables, and what is known of the model call that is under way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.cache.call import CallMetadata
from headq_ao.cache.lengths import Lengths
from headq_ao.cache.pages import PageTable
from headq_ao.cache.schedule import Schedule, Span
from headq_ao.cache.window import ROOM
from headq_ao.codecs.protocol import Codec
from headq_ao.config import MOST

NO_ROOM = (
    "a compiled function found no room for its tokens in a cache: make it with HeadQCache(model, max_length=..), or "
    "compile the model alone"
)


class Batch:
    """A batch of sequences in a cache.

    Args:
        schedule: of packing.
        page_tokens: tokens of a page.
        capacity: tokens that a sequence may have; None: room grows.
        expected: tokens that a sequence will have, beyond which no spare room is made; None: not known.
    """

    def __init__(
        self, schedule: Schedule, page_tokens: int, capacity: int | None = None, expected: int | None = None
    ) -> None:
        self.lengths = Lengths(schedule)
        self.page_tokens, self.capacity = page_tokens, capacity
        self.expected = None if expected is None else schedule.packable(expected)
        self.tables: dict[int | str | None, PageTable] = {}
        self.layers: list[Any] = []  # PackedLayers
        self.unsettled = False  # whether a layer has something left to pack
        self.broken = False  # whether a call failed that could not be taken back
        self.room = 0  # tokens of each sequence that a decoding step finds room for
        self.metadata = CallMetadata()
        self.keeps_states = False  # whether layers beside the packed ones hold what cannot step back

    def table_key(self, sliding: int | None, codec: Codec) -> int | str | None:
        """Where in ``tables`` a new layer's is. Layers with the same sliding window share one, None: those that keep
        all tokens; a layer whose codec may leave tokens out has its own.

        Raises:
            ValueError: where the cache cannot hold such a codec.
        """
        plan = self.lengths.schedule
        if codec.drops and (sliding is not None or self.capacity is not None):
            where = "a sliding-window layer" if sliding is not None else "a cache of fixed capacity (max_length)"
            raise ValueError(f"{codec.name} leaves tokens of the prompt out, and {where} cannot hold such a codec")
        key = f"own {len(self.tables)}" if codec.drops else sliding
        if key not in self.tables:
            most = None if sliding is None else -(-(sliding + plan.slack + plan.granularity) // self.page_tokens) + 1
            self.tables[key] = PageTable(self.page_tokens, most, codec.drops, self.expected)
        return key

    def begin(
        self, batch: int, slots: int, spans: Sequence[Span] | None = None, metadata: CallMetadata | None = None
    ) -> None:
        """A call of ``slots`` new slots of ``batch`` sequences; ``spans``: those with real tokens, None: all.

        Raises:
            ValueError: where a cache of fixed capacity has no room for them; nothing is changed.
        """
        lengths, plan = self.lengths, self.lengths.schedule
        self.settle()
        if lengths.batch not in (0, batch):
            raise ValueError(f"the cache holds {lengths.batch} sequences, got a batch of {batch}; start a new cache")
        most = max(lengths.totals(), default=0) + slots if self.capacity is None else self.capacity
        if self.capacity is not None and lengths.seen + slots > self.capacity:
            raise ValueError(
                f"this cache has room for {self.capacity} tokens and holds {lengths.seen}; {slots} more do not fit. "
                "Make one with a larger max_length, or crop() it"
            )
        self.metadata = CallMetadata(custom=True) if metadata is None else metadata
        lengths.begin(batch, slots, spans)
        self._reserve(max(plan.packable(most), *lengths.packed()))
        for layer in self.layers if plan.ring > ROOM else ():
            if layer.is_initialized and layer.window.ring < layer.ring:
                layer.make_room(min(max(lengths.totals()) - plan.n_sink, layer.ring))
        self.measure()

    def _reserve(self, tokens: int) -> None:
        """Pages for so many body tokens of each sequence."""
        grown = [table.reserve(self.lengths.batch, tokens) for table in self.tables.values()]
        for layer in self.layers if any(grown) else ():
            layer.fit()

    def measure(self) -> None:
        """Find out :attr:`room`; 0 where codecs do not take single tokens."""
        plan = self.lengths.schedule
        behind = [table.room + plan.window for table in self.tables.values()]
        behind += [x.window.ring for x in self.layers if plan.ring > ROOM and x.window.ring < x.ring]
        room = plan.n_sink + min(behind, default=MOST)
        room = room if self.capacity is None else min(room, self.capacity)
        self.room = 0 if plan.granularity > 1 or plan.warmup else room

    def grow(self) -> bool:
        """Room for one more token of each sequence, where it is block tables alone that have to grow for it; whether
        there is."""
        lengths = self.lengths
        if not self.room or lengths.seen == self.capacity:
            return False
        self._reserve(lengths.schedule.packable(lengths.seen + 1))
        self.measure()
        return lengths.seen < self.room

    def begin_traced(self, slots: int, real: Tensor | None) -> None:
        """:meth:`begin` in a traced function; see :meth:`Lengths.begin_traced`. What has no room stops the graph."""
        lengths = self.lengths
        count = slots if real is None else real.sum(1)
        for device, counts in lengths.on.items():
            packed = lengths.schedule.packable_on_device(counts.total + count, counts.packed)
            fits = [table.holds(packed, device) for table in self.tables.values()]
            if self.capacity is not None:
                fits.append(counts.slots + slots <= self.capacity)
            for each in fits:
                torch._assert_async(each.all(), NO_ROOM)
        self.unsettled, self.metadata = True, CallMetadata()
        lengths.begin_traced(slots, real)

    def settle(self) -> None:
        """Pack what the last call has left to be packed.

        Raises:
            RuntimeError: after a failure that could not be taken back.
        """
        if self.broken:
            raise RuntimeError("an earlier call failed part-way; call reset() on this cache or start a new one")
        unseen = self.lengths.known and self.lengths.open
        self.lengths.settle()
        if unseen:  # the last call failed before any layer has seen it
            self.take_back()
        if self.unsettled:
            self.unsettled = False
            for layer in self.layers:
                layer.flush()

    def take_back(self) -> None:
        """Forget the call that is under way and has failed, in all layers."""
        lengths = self.lengths
        if not lengths.new:
            return
        done = [layer.call == lengths.calls and layer.pending is None and not layer.due for layer in self.layers]
        self.broken = self._lost(done)
        lengths.take_back(any(done))
        self.unsettled = False
        if not lengths.seen:
            self.clear()
        for layer, ran in zip(self.layers, done, strict=True):
            try:
                layer.undo(ran)
            except Exception:  # what made the call fail is told; this one is told by the next
                self.broken = True

    def _lost(self, done: Sequence[bool]) -> bool:
        """Whether the call under way cannot be taken back: layers in which it is done have let go of tokens that no
        page holds, have coded tokens together that are no more, or have learned a codec that others have not."""
        lengths, plan = self.lengths, self.lengths.schedule
        if not any(done) or lengths.seen == lengths.new:
            return False
        ran = [layer for layer, x in zip(self.layers, done, strict=True) if x]
        begun = any(p and not c for p, c in zip(lengths.packed(), lengths.coded, strict=True))
        gone = lengths.new > plan.slack and any(layer.is_sliding or layer.codec.aligned for layer in ran)
        return gone or (begun and plan.warmup > 0) or self.keeps_states

    def reserve(self, batch: int) -> None:
        """Room for ``batch`` sequences before the first call."""
        self.lengths.reserve(batch)
        tokens = 0 if self.capacity is None else self.lengths.schedule.packable(self.capacity)
        for table in self.tables.values():
            table.reserve(batch, tokens)

    @mode_neutral
    def crop(self, slots: int) -> None:
        """Forget the last ``slots`` slots of each sequence, fewer than there are."""
        self.lengths.crop(slots)
        copies = {key: table.part(self.lengths.packed()) for key, table in self.tables.items()}
        for layer in self.layers:
            layer.cropped(copies[layer.table_key] if layer.packs else ())

    def tensors(self) -> list[Tensor]:
        """Lengths and block tables."""
        counts = [t for found in self.lengths.on.values() for t in vars(found).values()]
        return counts + [t for table in self.tables.values() for t in table.tensors()]

    def clear(self) -> None:
        """Forget all tokens."""
        self.lengths.clear()
        self.unsettled = self.broken = False
        for table in self.tables.values():
            table.clear()
        self.metadata, self.room = CallMetadata(), 0

    @mode_neutral
    def select(self, order: Sequence[int]) -> dict[int | str | None, list[tuple[int, int]]]:
        """Keep those sequences, in that order; which pages the layers of each table have to copy."""
        self.settle()
        packed = self.lengths.packed()
        copies = {key: table.select(order, packed) for key, table in self.tables.items()}
        self.lengths.select(order)
        if self.capacity is not None:
            self.reserve(len(order))
        self.measure()
        return copies
