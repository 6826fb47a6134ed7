"""Counting bits and bytes: from the tensors a cache holds, or ahead of time from shapes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from headq_ao.state import storage_bytes

if TYPE_CHECKING:
    from headq_ao.cache_layer import HeadQCacheLayer
    from headq_ao.token_ids import TokenIds

KINDS = ("codes", "scales", "packed_exact_side", "bases", "moments", "exact_rows", "token_ids", "unused")


class NothingPackedError(RuntimeError):
    """No packed row was read: the score would be that of the exact cache."""


@dataclass
class BitsReport:
    """What a cache stores, counted whole: body bits, and bits at T tokens.

    Args:
        key_body_bits, value_body_bits: stored bytes of packed rows of that side × 8 / (tokens · Hkv · head_dim); None
            where the side is exact or nothing is packed yet.
        key_bits_at_t, value_bits_at_t: body bits plus everything kept per sequence (bases, moments) over its tokens.
        packed_bits_per_element, bits_at_t: the mean over the packed sides.
        exact_rows: mean exact rows per sequence and layer (sinks and window).
        packed_rows: mean packed rows per sequence and layer.
        tokens: mean tokens per sequence.
        bytes: by kind: codes, scales, rows of a side that is kept exact, per-sequence bases, moments (with the queries
            kept for them), exact rows, token ids (of the prompt cache's check), unused capacity (with
            the mask of holes after a deep crop). Their sum is ``get_memory_footprint()``.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, layers: "Sequence[HeadQCacheLayer]", ids: "TokenIds | None" = None) -> "BitsReport":
        """Count the tensors of cache layers, and the token ids kept beside them."""
        count = _Counts()
        for layer in layers:
            if layer.is_initialized:
                count.add(layer)
        held = storage_bytes([t for layer in layers for t in layer.tensors()] + ([] if ids is None else ids.tensors()))
        if ids is not None:
            count.kinds["token_ids"] = ids.nbytes(max([layer.seen for layer in layers], default=0))
        return count.report(held)


@dataclass
class _Counts:
    """Sums over layers; elements are tokens × heads × head_dim of one side."""

    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    body: dict[str, int] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("key", "value"), 0))
    packed_elements: int = 0
    elements: int = 0
    tokens: int = 0
    packed: int = 0
    exact: int = 0
    sequences: int = 0

    def add(self, layer: "HeadQCacheLayer") -> None:
        width = layer.shape.n_kv_heads * layer.shape.head_dim
        for row in layer.rows:
            self.packed_elements += row.slots * width
            self.elements += row.tokens * width
            self.tokens += row.tokens
            self.packed += row.packed
            self.exact += row.exact
            self.sequences += 1
        for side, store in (("key", layer.store_k), ("value", layer.store_v)):
            for stored, unit in zip(store.tensors, store.units, strict=True):
                entry = stored[:1, :, :1].numel() * stored.element_size()
                n = sum(row.slots // unit * entry for row in layer.rows)
                if side not in layer.packed_sides:
                    self.kinds["packed_exact_side"] += n
                else:
                    self.kinds["codes" if stored.dtype == torch.uint8 else "scales"] += n
                    self.body[side] = self.body.get(side, 0) + n
        bases, moments, of_values = map(storage_bytes, (layer.own_bases(), layer.moments(), layer.own_of_values()))
        self.kinds["bases"] += bases
        self.kinds["moments"] += moments
        self.own["key"] += bases - of_values + moments
        self.own["value"] += of_values
        if layer.exact.k is not None:
            entry = layer.exact.k[:1, :, :1].numel() * layer.exact.k.element_size()
            self.kinds["exact_rows"] += 2 * entry * sum(row.exact for row in layer.rows)

    def report(self, held: int) -> BitsReport:
        self.kinds["unused"] = held - sum(self.kinds.values())
        body = {side: 8 * n / self.packed_elements for side, n in self.body.items() if self.packed_elements}
        at_t = {side: bits + 8 * self.own[side] / self.elements for side, bits in body.items()}
        n = max(self.sequences, 1)
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
        )


def _mean(bits: dict[str, float]) -> float:
    return sum(bits.values()) / len(bits) if bits else float("nan")
