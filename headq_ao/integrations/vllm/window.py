"""A layer's newest tokens in full precision, as vLLM sees them: a layer of its own, of sliding-window attention.

A page of them takes as many bytes as a packed page of eight times the tokens. So of a long chunk only those are given
pages that a later step reads, or a later request that goes on where a packed page ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from headq_ao.integrations.vllm.backend import WINDOW_TOKENS, WindowBackend
from headq_ao.integrations.vllm.metadata import FEW


class WindowManager(SlidingWindowManager):
    """Gives pages to the tokens that will be read in full precision; all others of a chunk go to the null page."""

    def __init__(self, kv_cache_spec: SlidingWindowSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.looked_at: dict[str, int] = {}  # of each request, blocks that were let go, or need not be

    def kept(self, first: int, tokens: int) -> list[bool]:
        """Which of the blocks from ``first`` on, of a request of ``tokens`` tokens, get pages."""
        size, need = self.block_size, cdiv(self.sliding_window - 1, self.block_size)
        newest = (tokens - (self.sliding_window - 1) - FEW) // size
        every = self.kv_cache_spec.every
        ends = range(cdiv(first * size, every) * every, tokens + 1, every)
        tails = {end // size - i for end in ends for i in range(1, need + 1)}
        return [i >= newest or i in tails for i in range(first, cdiv(tokens, size))]

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], total_computed_tokens: int,
        num_local_computed_tokens: int, num_tokens_main_model: int, apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:  # fmt: skip
        """See :class:`SlidingWindowManager`."""
        all_of_them: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, num_local_computed_tokens,
            num_tokens_main_model, apply_admission_cap, prefill_end,
        )  # fmt: skip
        if apply_admission_cap:
            return all_of_them
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        if request_id not in self.num_cached_block:
            held = max(held, self.get_num_skipped_tokens(total_computed_tokens) // self.block_size)
        return max(all_of_them - self.kept(held, num_tokens).count(False), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """See :class:`SlidingWindowManager`."""
        blocks = self.req_to_blocks[request_id]
        kept = self.kept(len(blocks), num_tokens)
        real = iter(self.block_pool.get_new_blocks(sum(kept)))
        new = [next(real) if keep else self._null_block for keep in kept]
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(b.block_id for b in new if not b.is_null)
        return new

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        """As there, past null pages between others."""
        blocks = self.req_to_blocks.get(request_id, [])
        first, last = max(first_block, self.looked_at.get(request_id, 0)), min(last_block, len(blocks))
        freed = []
        for i in range(last - 1, first - 1, -1):
            if not blocks[i].is_null:
                freed.append(blocks[i])
                blocks[i] = self._null_block
        if last > first:
            self.looked_at[request_id] = last
        if freed:
            self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """See :class:`SlidingWindowManager`."""
        self.looked_at.pop(request_id, None)
        found: list[Any] = super().pop_blocks_for_free(request_id)
        return found


KVCacheSpecRegistry._ensure_registered()  # vLLM's own, which it leaves out where there is one already


@register_kv_cache_spec(manager_class=WindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class NewestTokensSpec(SlidingWindowSpec):
    """Pages of :class:`WindowManager`.

    Attributes:
        every: tokens of a packed page: where one ends, another request may go on.
    """

    every: int

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """See :class:`SlidingWindowSpec`."""
        size, window = self.block_size, self.sliding_window - 1
        tail = cdiv(window, size)
        newest = cdiv(window + FEW, size) + 1
        most = tail + 1 + newest + tail * (1 + cdiv(min(max_in_flight_tokens, max_model_len), self.every))
        all_of_them: int = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return int(min(all_of_them, most))


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
        return NewestTokensSpec(
            block_size=WINDOW_TOKENS,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
            sliding_window=self.window,
            every=vllm_config.cache_config.block_size,
        )
