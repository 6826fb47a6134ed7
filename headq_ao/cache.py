"""``HeadQCache``: the packed cache that a quantized model reads and writes."""

import dataclasses
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headq_ao.cache_layer import HeadQCacheLayer
from headq_ao.config import HeadQConfig
from headq_ao.layer_state import Incoming
from headq_ao.models import LayerShape
from headq_ao.report import BitsReport
from headq_ao.state import Span, storage_bytes


@dataclasses.dataclass
class HeadQState:
    """What ``quantize_`` leaves on a model, as ``model._headq``."""

    config: HeadQConfig
    shapes: list[LayerShape]
    previous_attention: Any


class HeadQCache(Cache):
    """A KV cache of packed rows for one batch of sequences.

    The model makes one by itself; make one to keep it across calls, to inspect it, or to pass it to a compiled model.

    Args:
        model: a model that :func:`headq_ao.quantize_` has prepared.

    Raises:
        ValueError: when the model has not been quantized with a HeadQ config.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import HeadQCache, headq_config, quantize_
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... ).eval()
        >>> quantize_(model, headq_config(epoch_tokens=32))
        >>> cache = HeadQCache(model)
        >>> _ = model(torch.arange(200)[None] % 64, cache=cache)
        >>> cache.get_seq_length(), cache.packed_bits_per_element < 3.3
        (200, True)
    """

    def __init__(self, model: PreTrainedModel) -> None:
        state = getattr(model, "_headq", None)
        if not isinstance(state, HeadQState):
            raise ValueError(f"{type(model).__name__} has no HeadQ config; call quantize_(model, headq_config()) first")
        self.config = state.config
        self.incoming = Incoming()
        super().__init__(layers=[self._new_layer(i, shape) for i, shape in enumerate(state.shapes)])
        self.layers: list[HeadQCacheLayer]

    def _new_layer(self, index: int, shape: LayerShape) -> HeadQCacheLayer:
        return HeadQCacheLayer(self.config, shape, self.incoming)

    def announce(self, length: int, spans: list[Span] | None) -> None:
        """Tell the layers which of the next call's ``length`` slots hold real tokens; None: all."""
        held = sorted({layer.seen for layer in self.layers})
        if len(held) > 1:
            raise RuntimeError(
                f"an earlier call failed part-way: layers hold {held[0]} to {held[-1]} tokens; "
                "call reset() on this cache or start a new one"
            )
        self.incoming.seen, self.incoming.length, self.incoming.spans = self.get_seq_length(), length, spans

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens from every layer, or raise before any has changed."""
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def batch_size(self) -> int | None:
        """Sequences held, None before the first call."""
        return len(self.layers[0].rows) if self.layers and self.layers[0].is_initialized else None

    def get_memory_footprint(self) -> int:
        """Bytes of every tensor held: codes, scales, exact rows, statistics, per-sequence bases, unused capacity."""
        return storage_bytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        """Every tensor held for the sequences."""
        return [t for layer in self.layers for t in layer.tensors()]

    def bits_report(self) -> BitsReport:
        """Body bits per side, bits at the current length, exact rows, bytes by kind; counted from the tensors held."""
        return BitsReport.of(self.layers)

    @property
    def packed_bits_per_element(self) -> float:
        """Mean body bits over the packed sides: stored bytes of packed rows × 8 / (tokens · heads · head_dim)."""
        return self.bits_report().packed_bits_per_element

    @property
    def rows_read(self) -> tuple[int, int]:
        """Rows that attention has read so far: packed ones, and all, summed over layers and queries."""
        return tuple(sum(layer.rows_read[i] for layer in self.layers) for i in (0, 1))  # type: ignore[return-value]

    @property
    def packed_fraction(self) -> float:
        """Packed rows read over all rows read, 0 before any."""
        packed, total = self.rows_read
        return packed / total if total else 0.0
