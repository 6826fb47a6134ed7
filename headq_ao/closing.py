"""Closing blocks: exact rows that left the window become packed rows, once."""

import dataclasses

import torch
from torch import Tensor, nn

from headq_ao.ambient import mode_neutral
from headq_ao.codec import KeyCodec, runs_of
from headq_ao.layer_codec import Epoch, LayerCodec
from headq_ao.layer_state import LayerState
from headq_ao.state import RowCounts
from headq_ao.units import unit_of_rows

ENCODE_TOKENS = 2048  # tokens encoded at a time: bounds the transient memory of closing blocks after a long prefill


class ClosingLayer(LayerState):
    """The write side of a layer.

    Per layer, one stream of q, k, v gives identical codes whether it comes in one call or in many: blocks close at
    fixed slots, only with tokens older than ``residual_length``, and statistics are taken at fixed slots.
    """

    @mode_neutral
    def commit(self, q: Tensor | None, codec: LayerCodec, scaling: float | None = None) -> None:
        """Close every block whose tokens have all left the window. Called once after each update.

        Args:
            q: the queries of this call ``[B, Hq, S, D]``; kept while a sequence's own query statistics are awaited.
            codec: of this layer.
            scaling: of its scores; ``head_dim ** -0.5`` when None.
        """
        self.pending = False
        self.scaling = self.shape.head_dim**-0.5 if scaling is None else scaling
        if not self.epochs:
            self.epochs = codec.plan(len(self.rows))
        if self._rests():
            return
        self.step, self.step_of = None, ()  # it would keep tensors alive that are about to be replaced
        if q is not None and self._awaits_queries():
            self.exact.append({"q": q.detach()}, self.last_counts, self.last_spans, self.exact_capacity)
        groups: dict[tuple[int, ...], list[int]] = {}
        for b, row in enumerate(self.rows):
            groups.setdefault(row.key(), []).append(b)
        for members in groups.values():
            blocks = self._closable(self.rows[members[0]], members[0])
            index = (
                None if len(members) == len(self.rows) else torch.tensor(members, dtype=torch.int64, device=self.device)
            )
            if blocks and self._never_packs:
                self._let_go(index, members, blocks)
            elif blocks:
                self._close(index, members, blocks, codec)
        if self.exact.q is not None and not self._awaits_queries():
            self.exact.q = None
        if self.k_sum is not None and self._statistics_taken():
            self.k_sum = None
        self.exact.resize(max(self.exact_capacity, max(r.exact for r in self.rows) + 1))
        if self.sliding_window is not None:
            self._drop_old(self.sliding_window)

    def _rests(self) -> bool:
        """Most decoding steps: no block is full, and no statistics are awaited."""
        return (
            self.last_slots == 1
            and self.exact.q is None
            and self.sliding_window is None
            and all(row.exact < self.exact_capacity for row in self.rows)
            and not self._awaits_queries()
        )

    def _awaits_queries(self) -> bool:
        return not self._never_packs and any(e.per_sequence and e.begin == 0 and not all(e.ready) for e in self.epochs)

    def _statistics_taken(self) -> bool:
        return all(all(e.ready) for e in self.epochs if e.per_sequence)

    def _closable(self, row: RowCounts, b: int) -> int:
        block = self.config.block_size
        blocks = max(row.exact - self.config.n_sink - self._kept, 0) // block
        first = self.epochs[0]
        if (
            not self._never_packs
            and first.per_sequence
            and not first.ready[b]
            and blocks * block < self.config.first_epoch(self.shape.head_dim)
        ):
            return 0
        return blocks

    def _let_go(self, index: Tensor | None, members: list[int], blocks: int) -> None:
        """Drop exact rows that lie beyond a short sliding window."""
        n = blocks * self.config.block_size
        self.exact.shift(index, self.config.n_sink, n, self.rows[members[0]].exact)
        for b in members:
            self.rows[b].dropped += n

    def _close(self, index: Tensor | None, members: list[int], blocks: int, codec: LayerCodec) -> None:
        """Pack ``blocks`` blocks of the rows ``members``, which share their counts."""
        row, n_sink, block = self.rows[members[0]], self.config.n_sink, self.config.block_size
        slot, end = row.slots, row.slots + blocks * block
        if self.valid is not None:  # crops have made holes: mark the new slots
            grow = end - self.valid.shape[1]
            self.valid = nn.functional.pad(self.valid, (0, max(grow, 0)))
            self.valid[members, slot:end] = True
        count, taken = row.exact, n_sink

        assert self.exact.k is not None and self.exact.v is not None
        if codec.own_value_unit and slot + row.dropped == 0:
            self._take_value_unit(select(self.exact.v, index)[:, :, n_sink : n_sink + block], index, codec)
        while slot < end:
            e = max(i for i, epoch in enumerate(self.epochs) if epoch.begin <= slot)
            stop = min(end, self._epoch_end(e), slot + ENCODE_TOKENS)
            epoch = self.epochs[e]
            if epoch.per_sequence and not all(epoch.ready[b] for b in members):
                self._derive(epoch, index, members, codec)
            k, v = (select(x, index)[:, :, taken : taken + stop - slot] for x in (self.exact.k, self.exact.v))
            self._fold(k, index, members, e)
            self._write(index, slot, stop - slot, k, v, self._codec(e, codec, index), codec)
            taken += stop - slot
            slot = stop
        self.exact.shift(index, n_sink, taken - n_sink, count)
        for b in members:
            self.rows[b].packed += blocks * block
            self.rows[b].slots = end

    def _write(
        self,
        index: Tensor | None,
        slot: int,
        n: int,
        k: Tensor,
        v: Tensor,
        key_codec: KeyCodec | None,
        codec: LayerCodec,
    ) -> None:
        new_k: list[Tensor] = []
        new_v: list[Tensor] = []
        for run in runs_of(key_codec, self._values(codec, index)):
            of_k, of_v = k[:, run.heads], v[:, run.heads]
            new_k += [of_k] if run.keys is None else flat(*run.keys.encode_rows(of_k, self.config.unbiased_scale))
            new_v += [of_v] if run.values is None else flat(*run.values.encode_rows(of_v))
        self.store_k.write(index, slot, len(self.rows), new_k, n)
        self.store_v.write(index, slot, len(self.rows), new_v, n)

    def _derive(self, epoch: Epoch, index: Tensor | None, members: list[int], codec: LayerCodec) -> None:
        """Take the statistics of the rows ``members`` now, at a fixed slot, and keep their codec in fp16."""
        n, first = self.config.first_epoch(self.shape.head_dim), self.config.n_sink
        if epoch.begin == 0:
            assert self.exact.k is not None and self.exact.q is not None
            q, k = (select(x, index)[:, :, : first + n] for x in (self.exact.q, self.exact.k))
            new = codec.from_prompt(q, k, self.scaling, self.sliding_window)
        else:
            assert self.k_sum is not None
            new = codec.from_prior(select(self.k_sum, index), self.rows[members[0]].folded)
        kept = {n: (t if n == "unit" else t.half()).contiguous() for n, t in new.tensors().items() if n in new.own}
        new = new.replace(kept)
        if index is None:
            epoch.codec = new
        else:
            if epoch.codec is None:
                b = len(self.rows)
                epoch.codec = new.replace({name: t.new_zeros((b, *t.shape[1:])) for name, t in kept.items()})
            epoch.codec = with_own_unit(epoch.codec, kept.get("unit"), index)
            for name, t in kept.items():
                epoch.codec.tensors()[name][index] = t
        for b in members:
            epoch.ready[b] = True

    def _take_value_unit(self, v: Tensor, index: Tensor | None, codec: LayerCodec) -> None:
        """The unit of some rows' values, of their first packed block ``v``; held once one of the batch is not 1."""
        unit, values = unit_of_rows(v), self._values(codec)
        assert values is not None
        if unit is None and values.unit is None:
            return
        ones = v.new_ones(len(self.rows), v.shape[1], 1, dtype=torch.float32)
        whole = ones if values.unit is None else values.unit.clone()
        whole[slice(None) if index is None else index] = 1.0 if unit is None else unit
        self.value_codec = dataclasses.replace(values, unit=whole)

    def _fold(self, k: Tensor, index: Tensor | None, members: list[int], e: int) -> None:
        """Add keys to the moments of a later epoch, block by block: the order of additions never depends on calls."""
        if not any(epoch.per_sequence for epoch in self.epochs[e + 1 :]):
            return
        if self.k_sum is None:
            acc = torch.float64 if k.dtype == torch.float64 else torch.float32
            self.k_sum = torch.zeros(len(self.rows), k.shape[1], k.shape[3], dtype=acc, device=k.device)
        for tile in k.to(self.k_sum.dtype).split(self.config.block_size, dim=2):
            if index is None:
                self.k_sum += tile.sum(2)
            else:
                self.k_sum[index] += tile.sum(2)
        for b in members:
            self.rows[b].folded += k.shape[2]

    def _drop_old(self, window: int) -> None:
        """Let go of blocks that lie beyond the window of any query to come, once they are half of what is stored."""
        block, low = self.config.block_size, 2**62
        for r in self.rows:
            oldest_seen = r.tokens - window + 1 - self.config.residual_length  # a crop may step back that far
            low = min(low, max(oldest_seen - self.config.n_sink - r.dropped, 0) // block * block)
        if low == 0 or low * 2 < max(r.slots for r in self.rows) or not self._statistics_taken():
            return
        low = min(low, min(r.slots for r in self.rows))
        self.store_k.drop(low)
        self.store_v.drop(low)
        for r in self.rows:
            r.slots -= low
            r.packed -= low
            r.dropped += low
        for epoch in self.epochs:
            epoch.begin = max(epoch.begin - low, 0)
        while len(self.epochs) > 1 and self.epochs[1].begin == 0:
            self.epochs.pop(0)


def with_own_unit(codec: KeyCodec, unit: Tensor | None, index: Tensor) -> KeyCodec:
    """``codec`` of all sequences with room for ``unit`` of those of ``index``, who are new to it."""
    if codec.unit is None and unit is not None:
        batch = codec.mean.shape[0]
        ones = unit.new_ones(batch, *unit.shape[1:])
        return dataclasses.replace(codec, unit=ones, own=codec.own | {"unit"})
    if unit is None and "unit" in codec.own:
        assert codec.unit is not None
        codec.unit[index] = 1.0
    return codec


def select(x: Tensor, index: Tensor | None) -> Tensor:
    """Those batch rows; None: all."""
    return x if index is None else x.index_select(0, index)


def flat(planes: list[Tensor], scale: Tensor, zero: Tensor | None) -> list[Tensor]:
    """What an encoder returns, as the list of tensors to store."""
    return [*planes, scale] if zero is None else [*planes, scale, zero]
