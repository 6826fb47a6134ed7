"""The attention backend: what vLLM is told about pages, and what it hands to each step."""

import dataclasses
import itertools
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from headq_ao.integrations.vllm.attention import HeadQAttention
from headq_ao.integrations.vllm.metadata import FEW, HeadQMetadata
from headq_ao.integrations.vllm.settings import UNIT, settings
from headq_ao.ops.dispatch import kernels

PAGE_TOKENS = 256  # of packed pages, unless --block-size says otherwise: sinks in a page's header are 1/10 of its bytes
WINDOW_TOKENS = 32  # of pages in full precision: about as many as take the bytes of a packed page


class HeadQBackend(AttentionBackend):
    """Packed keys and values, with the newest tokens in full precision in a sliding-window group beside them."""

    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The one name that survives into vLLM's worker processes."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HeadQAttention]:
        """See :class:`AttentionBackend`."""
        return HeadQAttention

    @staticmethod
    def get_builder_cls() -> type["HeadQMetadataBuilder"]:
        """See :class:`AttentionBackend`."""
        return HeadQMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """A page is read as it was allocated."""
        return [PAGE_TOKENS if kv_cache_spec is None else kv_cache_spec.block_size]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Any number of whole tiles."""
        return block_size is None or block_size % UNIT == 0

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages of both groups share blocks: the block is the outermost dimension."""
        return KVCacheLayout.BLHNC, KVCacheLayout.BLNHC

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether a codec is there for it."""
        return head_size % 16 == 0 and head_size <= 256

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders alone."""
        return bool(attn_type == AttentionType.DECODER)


class WindowBackend(HeadQBackend):
    """Of the layers that hold the newest tokens; none of them attends."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """See :data:`WINDOW_TOKENS`."""
        return [WINDOW_TOKENS if kv_cache_spec is None else kv_cache_spec.block_size]


class HeadQMetadataBuilder(AttentionMetadataBuilder[HeadQMetadata]):
    """Takes what vLLM says of a step to where the kernels read it, without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table: bool = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.window = settings(vllm_config).config.residual_length
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        most = max(vllm_config.scheduler_config.max_num_seqs, captured) + 1
        self.lengths = torch.zeros(4, most, dtype=torch.int64, device=device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps of one token a request where there are Triton's kernels, whose grids depend on shapes alone; long
        chunks are told from others on the host."""
        captured = current_platform.is_cuda_alike() and None not in (
            kernels(name, "cuda") for name in ("cache_update", "paged_attention")
        )
        return cls._cudagraph_support if captured else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HeadQMetadata:
        """See :class:`AttentionMetadataBuilder`."""
        m = common_attn_metadata
        n = m.num_reqs
        if n + 1 > self.lengths.shape[1]:
            self.lengths = self.lengths.new_zeros(4, n + 1)
        start, held, packed, total = self.lengths
        start[: n + 1].copy_(m.query_start_loc[: n + 1])
        total[:n].copy_(m.seq_lens[:n])
        torch.sub(total[:n] + start[:n], start[1 : n + 1], out=held[:n])
        torch.clamp(held[:n] - (self.window - 1), min=0, out=packed[:n])
        long: list[tuple[int, int, int]] = []
        few = m.max_query_len
        if few > FEW:
            bounds = m.query_start_loc_cpu[: n + 1].tolist()
            each = [(r, *pair) for r, pair in enumerate(itertools.pairwise(bounds))]
            long = [(r, begin, end) for r, begin, end in each if end - begin > FEW]
            few = max((end - begin for _, begin, end in each if end - begin <= FEW), default=0)
        return HeadQMetadata(
            m.num_actual_tokens, m.max_query_len, few, tuple(long), m.block_table_tensor[:n], start[: n + 1], held[:n],
            packed[:n], total[:n], self.window - 1,
        )  # fmt: skip

    def update_block_table(
        self, metadata: HeadQMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> HeadQMetadata:
        """Of another group of layers in the same step: groups of the newest tokens differ by their tables alone."""
        return dataclasses.replace(metadata, table=blk_table[: len(metadata.held)], joined={})
