"""A layer's newest tokens in full precision, as vLLM sees them: a layer of its own, of sliding-window attention."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from headq_ao.integrations.vllm.backend import WINDOW_TOKENS, WindowBackend

SUFFIX = ".newest"


def window_name(layer_name: str) -> str:
    """What the layer that holds another's newest tokens is called."""
    return layer_name + SUFFIX


class WindowLayer(AttentionLayerBase):
    """Allocated, shared by prefix, kept through preemption and let go by vLLM; it never attends.

    Args:
        layer: the attention layer.
        window: newest tokens that it reads in full precision.
    """

    impl: Any = None

    def __init__(self, layer: Any, window: int) -> None:
        self.num_kv_heads, self.head_size, self.window = layer.num_kv_heads, layer.head_size, window
        self.dtype = layer.kv_cache_torch_dtype
        self.kv_cache = torch.empty(0, dtype=self.dtype, device="cpu")

    def get_attn_backend(self) -> type[WindowBackend]:
        """See :class:`AttentionLayerBase`."""
        return WindowBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """See :class:`AttentionLayerBase`."""
        self.kv_cache = kv_cache

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        """See :class:`AttentionLayerBase`."""
        return SlidingWindowSpec(
            block_size=WINDOW_TOKENS,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
            sliding_window=self.window,
        )
