"""Counting bits and bytes: from the tensors a cache holds, or ahead of time from shapes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from headq_ao.cache.batch import Batch
from headq_ao.cache.state import LayerState
from headq_ao.cache.token_ids import TokenIds

KINDS = (
    "codes",
    "scales",
    "packed_exact_side",
    "bases",
    "moments",
    "exact_rows",
    "states",
    "tables",
    "token_ids",
    "unused",
)


class NothingPackedError(RuntimeError):
    """No packed token was read: the score would be that of the exact cache."""


@dataclass
class BitsReport:
    """What a cache stores, counted whole: body bits, and bits at T tokens.

    Args:
        key_body_bits, value_body_bits: stored bytes of packed tokens of that side × 8 / (tokens · Hkv · head_dim); None
            where the side is exact or nothing is packed yet.
        key_bits_at_t, value_bits_at_t: body bits plus everything kept per sequence (bases, moments) over its tokens.
        key_stored_bits, value_stored_bits: 8 × everything stored of the tokens that have left the window, and kept per
            sequence, over their elements, also of those that a codec has left out; None where nothing is packed.
        packed_bits_per_element, bits_at_t: the mean over the packed sides.
        exact_rows: mean full-precision tokens per sequence and layer (sinks and window) that attention reads.
        packed_rows: mean packed tokens per sequence and layer.
        tokens: mean tokens per sequence.
        sequences: whose bytes these are.
        bytes: by kind: codes, scales, tokens of a side that is kept exact, per-sequence bases, queries kept for
            statistics, full-precision tokens, states of layers that are not packed (recurrent, convolution, an
            indexer's keys), lengths and block tables, token ids (of the prompt cache's check), unused
            capacity: free slots of pages and of the ring. Their sum is ``get_memory_footprint()``.
        layers: how many of the cache's layers are ``"packed"``, and how many of each class stay as transformers has
            them.
        fallback: why the model's attention cannot read packed tokens: rows are dequantized for it at each call, so that
            memory is saved and time is not. None: it reads them.
    """

    key_body_bits: float | None
    value_body_bits: float | None
    key_bits_at_t: float | None
    value_bits_at_t: float | None
    packed_bits_per_element: float
    bits_at_t: float
    exact_rows: float
    packed_rows: float
    tokens: float
    bytes: dict[str, int]
    layers: dict[str, int] = field(default_factory=dict)
    fallback: str | None = None
    key_stored_bits: float | None = None
    value_stored_bits: float | None = None
    sequences: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, batch: Batch, ids: TokenIds | None = None, times: Sequence[int] | None = None) -> "BitsReport":
        """Count the tensors of a cache's layers, and the token ids kept beside them.

        Args:
            batch: of the cache.
            ids: its token ids.
            times: how many layers each of the batch's stands for; None: one.
        """
        batch.settle()
        count = _Counts()
        times = [1] * len(batch.layers) if times is None else times
        shared = batch.tensors() + ([] if ids is None else ids.tensors())
        held = storage_bytes([t for layer in batch.layers for t in layer.tensors()] + shared)
        for layer, n in zip(batch.layers, times, strict=True):
            held += (n - 1) * (storage_bytes(layer.tensors() + shared) - storage_bytes(shared))
            for _ in range(n if layer.is_initialized else 0):
                count.add(layer)
        count.kinds["tables"] = storage_bytes(batch.tensors())
        if ids is not None:
            count.kinds["token_ids"] = ids.nbytes(batch.lengths.seen)
        return count.report(held, max(batch.lengths.batch, 1))


@dataclass
class _Counts:
    """Sums over layers; elements are tokens × heads × head_dim of one side."""

    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    body: dict[str, float] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("key", "value"), 0))
    packed_elements: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("key", "value"), 0))
    elements: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("key", "value"), 0))
    left_window: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("key", "value"), 0))
    tokens: int = 0
    packed: int = 0
    exact: int = 0
    sequences: int = 0
    distinct: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)

    def add(self, layer: LayerState) -> None:
        lengths = layer.batch.lengths
        plan, p = lengths.schedule, layer.batch.page_tokens
        coded = lengths.packed() if layer.packs else [0] * lengths.batch
        if layer.sliding_window is not None:  # of a ring of pages, those that a query can see
            coded = [min(n, layer.sliding_window) for n in coded]
        assert layer.pool is not None
        stored = coded if layer.table is None else layer.table.stored(coded)
        kind = id(layer.table), tuple(stored)  # most layers keep the same tokens in the same pages
        if kind not in self.distinct:
            self.distinct[kind] = layer.distinct(stored)
        shared = self.distinct[kind]
        for total, packed in zip(lengths.totals(), coded, strict=True):
            for side, width in layer.elements.items():
                self.elements[side] += total * width
                self.left_window[side] += packed * width
            self.tokens += total
            self.packed += packed
            self.exact += min(total, layer.sliding_window or total, plan.n_sink + layer.ring) if not packed else (
                min(total - packed, plan.n_sink + plan.window + plan.granularity - 1)
            )  # fmt: skip
            self.sequences += 1
        for side, width in layer.elements.items():
            self.packed_elements[side] += shared * width
        of_sides = layer.codec.tensors_by_side(layer.pool.tensors, layer.pool.layout)
        for side, tensors in of_sides.items():
            for t in tensors:
                n = t[0].numel() * t.element_size() * shared // p
                if side not in layer.packed_sides:
                    self.kinds["packed_exact_side"] += n
                else:
                    self.kinds["codes" if t.dtype == torch.uint8 else "scales"] += n
                    self.body[side] = self.body.get(side, 0) + n
        for name, t in layer.codec.own_tensors().items():
            self.kinds["bases"] += t.nbytes
            self.own[name.split(".")[0]] += t.nbytes
        window = layer.window
        if window.q is not None:
            self.kinds["moments"] += window.q.nbytes
            self.own["key"] += window.q.nbytes
        if window.k is not None:
            slots = min(max(lengths.totals(), default=0), window.k.shape[2])
            entry = sum(getattr(window, name)[:1, :, :1].nbytes for name in window.sides)
            self.kinds["exact_rows"] += entry * sum(min(t, slots) for t in lengths.totals())

    def report(self, held: int, sequences: int) -> BitsReport:
        self.kinds["unused"] = held - sum(self.kinds.values())
        body = {side: 8 * n / packed for side, n in self.body.items() if (packed := self.packed_elements[side])}
        at_t = {side: bits + 8 * self.own[side] / self.elements[side] for side, bits in body.items()}
        n = max(self.sequences, 1)
        stored = {
            side: 8 * (self.body.get(side, 0) + self.own[side]) / elements
            for side, elements in self.left_window.items()
            if elements and (side in self.body or self.own[side])
        }
        return BitsReport(
            key_body_bits=body.get("key"),
            value_body_bits=body.get("value"),
            key_bits_at_t=at_t.get("key"),
            value_bits_at_t=at_t.get("value"),
            packed_bits_per_element=_mean(body),
            bits_at_t=_mean(at_t),
            exact_rows=self.exact / n,
            packed_rows=self.packed / n,
            tokens=self.tokens / n,
            bytes=self.kinds,
            key_stored_bits=stored.get("key"),
            value_stored_bits=stored.get("value"),
            sequences=sequences,
        )


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors (data pointers do not tell them apart on the meta device)."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _mean(bits: dict[str, float]) -> float:
    return sum(bits.values()) / len(bits) if bits else float("nan")
