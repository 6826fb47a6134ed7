"""The shape of one attention layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One attention layer: ``n_heads`` query and ``n_kv_heads`` key-value heads, ``sliding_window`` tokens or None."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    sliding_window: int | None
