"""Counting bits and bytes: from the tensors a cache holds, or ahead of time from shapes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headq_ao.state import storage_bytes

if TYPE_CHECKING:
    from headq_ao.cache_layer import HeadQCacheLayer

KINDS = ("codes", "scales", "packed_exact_side", "bases", "moments", "exact_rows", "unused")


@dataclass
class BitsReport:
    """What a cache stores, counted whole (METHOD: body bits, and bits at T tokens).

    Args:
        key_body_bits, value_body_bits: stored bytes of packed rows of that side × 8 / (tokens · Hkv · head_dim); None
            where the side is exact or nothing is packed yet.
        key_bits_at_t, value_bits_at_t: body bits plus everything kept per sequence (bases, moments) over its tokens.
        packed_bits_per_element, bits_at_t: the mean over the packed sides.
        exact_rows: mean exact rows per sequence and layer (sinks and window).
        packed_rows: mean packed rows per sequence and layer.
        tokens: mean tokens per sequence.
        bytes: by kind: codes, scales, rows of a side that is kept exact, per-sequence bases, moments (with the queries
            kept for them), exact rows, unused capacity. Their sum is ``get_memory_footprint()``.
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
    def of(cls, layers: "Sequence[HeadQCacheLayer]") -> "BitsReport":
        """Count the tensors of cache layers."""
        kinds = dict.fromkeys(KINDS, 0)
        elements, tokens, packed, exact, sequences = 0, 0, 0, 0, 0
        body = {"k": 0, "v": 0}
        per_sequence = {"k": 0, "v": 0}
        total_elements = 0
        for layer in layers:
            if not layer.is_initialized:
                continue
            width = layer.shape.n_kv_heads * layer.shape.head_dim
            for row in layer.rows:
                elements += row.slots * width
                total_elements += row.tokens * width
                tokens, packed, exact, sequences = tokens + row.tokens, packed + row.packed, exact + row.exact, sequences + 1
            for side, store, bits in (("k", layer.store_k, layer.config.k_bits), ("v", layer.store_v, layer.config.v_bits)):
                used = [(t.numel() // max(t.shape[0] * t.shape[2], 1) * t.element_size(), u) for t, u in zip(store.tensors, store.units, strict=True)]
                for i, (entry, unit) in enumerate(used):
                    n = sum(row.slots // unit * entry for row in layer.rows)
                    kinds["packed_exact_side" if bits is None else "codes" if store.tensors[i].element_size() == 1 else "scales"] += n
                    body[side] += n
            own = [t for e in layer.epochs if e.codec is not None for name, t in e.codec.tensors().items() if name in e.codec.own]
            moments = [t for t in (layer.k_sum, layer.exact.q) if t is not None]
            kinds["bases"] += storage_bytes(own)
            kinds["moments"] += storage_bytes(moments)
            per_sequence["k"] += storage_bytes(own) + storage_bytes([t for t in (layer.k_sum,) if t is not None])
            if layer.exact.k is not None:
                entry = layer.exact.k[:1, :, :1].numel() * layer.exact.k.element_size()
                kinds["exact_rows"] += 2 * entry * sum(row.exact for row in layer.rows)
        held = storage_bytes([t for layer in layers for t in layer.tensors()])
        kinds["unused"] = held - sum(kinds.values())
        config = layers[0].config if layers else None

        def bits(side: str, extra: bool) -> float | None:
            exact_side = config is None or (config.k_bits if side == "k" else config.v_bits) is None
            if exact_side or not elements:
                return None
            return 8 * body[side] / elements + (8 * per_sequence[side] / total_elements if extra else 0.0)

        at, at_t = ([bits(side, extra) for side in "kv"] for extra in (False, True))

        def mean(x: list[float | None]) -> float:
            packed_sides = [b for b in x if b is not None]
            return sum(packed_sides) / len(packed_sides) if packed_sides else float("nan")

        n = max(sequences, 1)
        return cls(*at, *at_t, mean(at), mean(at_t), exact / n, packed / n, tokens / n, kinds)


def layer_tensors(layer: "HeadQCacheLayer") -> list[Tensor]:
    """Every tensor a layer holds for its sequences."""
    own = [t for e in layer.epochs if e.codec is not None for name, t in e.codec.tensors().items() if name in e.codec.own]
    rest = [t for t in (layer.valid, layer.k_sum) if t is not None]
    return layer.exact.tensors() + layer.store_k.tensors + layer.store_v.tensors + own + rest
