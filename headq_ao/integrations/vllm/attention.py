"""Attention of one vLLM layer over packed pages."""

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from headq_ao.codecs.planes import PlaneCodec
from headq_ao.integrations.vllm.metadata import HeadQMetadata, window_name
from headq_ao.ops.cache_update.encoders import Encoders
from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.requests import LayerPages
from headq_ao.ops.types import Readers


class HeadQAttention(AttentionImpl[HeadQMetadata]):
    """Codes a step's tokens into their pages, then reads all that its queries see.

    Raises:
        ValueError: for a layer that HeadQ cannot serve in vLLM, naming why.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None, **extra: Any,
    ) -> None:  # fmt: skip
        problems = {
            "ALiBi": alibi_slopes is not None,
            "a softcap of the scores": bool(logits_soft_cap),
            "keys and values shared between layers": kv_sharing_target_layer_name is not None,
            "learned attention sinks": extra.get("sinks") is not None,
            f"attention of the kind {attn_type!r}": attn_type != AttentionType.DECODER,
            f"--kv-cache-dtype {kv_cache_dtype}": kv_cache_dtype not in ("auto", "float16", "bfloat16"),
        }
        refuse(problems)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.sliding_window = kv_cache_dtype, sliding_window or 0
        self.codec: PlaneCodec | None = None
        self.n_sink = 0
        self.pages: LayerPages | None = None

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: HeadQMetadata | None, output: Tensor, output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``output [T, Hq, D]`` of ``query [T, Hq, D]``, ``key`` and ``value`` ``[T, Hkv, D]``."""
        if attn_metadata is None:  # vLLM measures how much memory the model takes
            return output.zero_()
        context, n = get_forward_context(), attn_metadata.tokens
        name = window_name(layer.layer_name)
        pages = self.pages
        if pages is None or pages.raw is not kv_cache:
            pages = self.pages = self._bound(kv_cache, context.no_compile_layers[name].kv_cache)
        pages.step(
            query[:n], key[:n], value[:n], output[:n], self.scale, attn_metadata.requests(context.attn_metadata[name])
        )
        return output

    def _bound(self, kv_cache: Tensor, window: Tensor) -> LayerPages:
        assert self.codec is not None
        return LayerPages(
            kv_cache, window, self.codec.layout(kv_cache.shape[2]), self.n_sink,
            *on_device(self.codec, kv_cache.device), self.num_heads, self.sliding_window,
        )  # fmt: skip


def on_device(codec: PlaneCodec, device: torch.device) -> tuple[Readers, tuple[Encoders, Encoders]]:
    """How a codec, which is computed on the CPU, is read and written on the device of its pages."""
    readers, encoders = codec.readers, codec.encoders()
    if device.type == "cpu":
        return readers, encoders
    moved = {name: None if x is None else x.to(device) for name, x in vars(readers).items()}
    keys, values = (
        [None if e is None else Encoder.of_flat([t.to(device) for t in e.flat[0]], e.flat[1]) for e in side]
        for side in encoders
    )
    return Readers(**moved), (keys, values)


def refuse(problems: dict[str, bool]) -> None:
    """Raise ValueError where one of these holds."""
    wrong = [what for what, holds in problems.items() if holds]
    if wrong:
        raise ValueError(
            f"HeadQ cannot serve {', '.join(wrong)} in vLLM; leave out --attention-backend CUSTOM for this model, or "
            "the option"
        )
