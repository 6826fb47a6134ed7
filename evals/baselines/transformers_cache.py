"""transformers' own quantized caches, run as they are, with what they read and hold counted."""

from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache

from headq_ao.cache.memory_report import BitsReport


class TransformersCache(QuantizedCache):
    """``QuantizedCache`` of a backend; it quantizes all that it holds again whenever its window is full.

    Only the counting is added: ``rows_read`` (rows that came back from codes, and all, over layers and queries) and
    :meth:`bits_report`.

    Args:
        backend: ``"quanto"``, ``"hqq"`` or ``"fp8"``; quanto and hqq are packages of their own.
        config: of the model.
        options: of ``QuantizedCache``: nbits, axis_key, axis_value, q_group_size, residual_length.

    Raises:
        ImportError: when the backend's package is missing.
    """

    def __init__(self, backend: str, config: Any, **options: Any) -> None:
        super().__init__(backend, config, **options)
        self.rows_read = (0, 0)
        self.width = 0  # elements of one side per token of the batch

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """transformers' update; the rows held as codes are counted before it."""
        layer = self.layers[layer_idx]
        before, coded = layer.get_seq_length(), self._coded_rows(layer)
        b, h, s, d = key_states.shape
        self.width = b * h * d
        packed, read = self.rows_read
        self.rows_read = (packed + b * s * coded, read + b * (s * before + s * (s + 1) // 2))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @staticmethod
    def _coded_rows(layer: Any) -> int:
        """Tokens whose rows are codes now."""
        window = layer.keys.shape[-2] if layer.is_initialized and layer.keys.ndim == 4 else 0
        total: int = layer.get_seq_length()
        return total - window

    def bits_report(self) -> BitsReport:
        """Bits of the coded rows: every byte of the quantized tensors over the elements they stand for."""
        tokens = coded = 0
        stored = {"key": 0, "value": 0}
        elements = exact = 0
        for layer in self.layers:
            rows = self._coded_rows(layer)
            tokens, coded = tokens + layer.get_seq_length(), coded + rows
            for side, held in (("key", layer._quantized_keys), ("value", layer._quantized_values)):
                stored[side] += held_bytes(held)
            elements += rows * self.width
            exact += layer.keys.nbytes + layer.values.nbytes
        n = len(self.layers)
        bits = {side: 8 * n_bytes / elements for side, n_bytes in stored.items()}
        mean = (bits["key"] + bits["value"]) / 2
        return BitsReport(
            key_body_bits=bits["key"],
            value_body_bits=bits["value"],
            key_bits_at_t=bits["key"],
            value_bits_at_t=bits["value"],
            packed_bits_per_element=mean,
            bits_at_t=mean,
            exact_rows=(tokens - coded) / n,
            packed_rows=coded / n,
            tokens=tokens / n,
            bytes={"codes": stored["key"] + stored["value"], "exact_rows": exact},
        )


def code_tensors(held: Any) -> list[Tensor]:
    """The plain tensors that a backend holds for one side of one layer."""
    if held is None:
        return []
    if isinstance(held, tuple):
        parts = [x for part in held for x in (part.values() if isinstance(part, dict) else [part])]
        return [x for x in parts if isinstance(x, Tensor)]
    names, _ = held.__tensor_flatten__()
    inner = [getattr(held, name) for name in names]
    return [t._data if hasattr(t, "_data") else t for t in inner]


def held_bytes(held: Any) -> int:
    """Bytes of the codes as stored, and of scales and zeros at 16 bits each, as a half-precision model holds them."""
    half = 2
    return sum(
        t.numel() * (half if t.dtype in (torch.float32, torch.float16, torch.bfloat16) else t.element_size())
        for t in code_tensors(held)
    )
