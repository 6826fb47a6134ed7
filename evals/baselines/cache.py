"""Other quantizers in HeadQ's own cache: the same sinks, window, blocks, batches and counts, another row format."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headq_ao import HeadQCache, HeadQConfig
from headq_ao.ambient import mode_neutral
from headq_ao.cache_layer import HeadQCacheLayer
from headq_ao.closing import select
from headq_ao.evals.baselines.codecs import query_span
from headq_ao.evals.baselines.methods import Method
from headq_ao.layer_codec import Epoch, LayerCodec
from headq_ao.layer_state import Incoming
from headq_ao.models import LayerShape
from headq_ao.reading import Ranges


class BaselineLayer(HeadQCacheLayer):
    """A cache layer whose packed blocks are in the format of a :class:`Method`."""

    def __init__(self, config: HeadQConfig, shape: LayerShape, incoming: Incoming, method: Method, index: int) -> None:
        self.method = method
        self.index = index
        super().__init__(config, shape, incoming)

    def _clear(self) -> None:
        super()._clear()
        self.key_frame, self.value_frame = self.method.frames(self.index)

    @property
    def packed_sides(self) -> tuple[str, ...]:
        sides = {"key": self.method.keys, "value": self.method.values}
        return tuple(side for side, codec in sides.items() if codec is not None)

    @mode_neutral
    def commit(self, q: Tensor | None, codec: LayerCodec, scaling: float | None = None) -> None:
        if not self.epochs:
            self.epochs = [Epoch(0, per_sequence=False)]
            if self.method.query_rank:
                assert q is not None
                span = query_span(q[:, :, self.config.n_sink :], self.shape.n_kv_heads, self.method.query_rank)
                self.key_frame = replace(self.key_frame, span=span, span_weight=self.method.query_weight)
        super().commit(q, codec, scaling)

    def _write(
        self, index: Tensor | None, slot: int, n: int, k: Tensor, v: Tensor, key_codec: Any, codec: LayerCodec
    ) -> None:
        for store, method, rows, frame in (
            (self.store_k, self.method.keys, k, self.key_frame),
            (self.store_v, self.method.values, v, self.value_frame),
        ):
            if frame.span is not None:
                frame = replace(frame, span=select(frame.span, index))
            store.write(index, slot, len(self.rows), [rows] if method is None else method.encode(rows, frame), n)

    def _take_value_unit(self, v: Tensor, index: Tensor | None, codec: LayerCodec) -> None:
        """None: HeadQ's codec of values is not used."""

    def _attend_token(self, q: Tensor, scaling: float, codec: LayerCodec) -> None:
        return None

    def _attend_rows(self, q: Tensor, scaling: float, codec: LayerCodec, ranges: Ranges) -> Tensor:
        return self._attend_parts(q, scaling, codec, ranges)

    def _attend_packed(self, q: Tensor, scaling: float, codec: LayerCodec, ranges: Ranges) -> tuple[Tensor, Tensor]:
        end = max(r.slots for r in self.rows)
        start, stop = self._visible_slots(0, end, ranges)
        keys, values = self.store_k.view(0, end), self.store_v.view(0, end)
        grouped = q.float().unflatten(1, (self.shape.n_kv_heads, -1)) * scaling
        if self.method.keys is None:
            s = grouped @ keys[0].float()[:, :, None].transpose(-1, -2)
        else:
            s = self.method.keys.scores(grouped, keys, self.key_frame)
        slot = torch.arange(end, device=q.device)
        first, last = (torch.tensor(x, device=q.device)[..., None] for x in (start, stop))
        visible = (slot >= first) & (slot < last)
        if self.valid is not None:
            visible &= self.valid[:, None, :end]
        s = s.masked_fill(~visible[:, None, None], float("-inf"))
        lse = torch.logsumexp(s, -1)
        a = torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None])
        if self.method.values is None:
            out = a @ values[0].float()[:, :, None]
        else:
            out = self.method.values.readout(a, values, self.value_frame)
        return out.flatten(1, 2), lse.flatten(1, 2)

    def segments(self, e: int, codec: LayerCodec) -> list[tuple[Tensor, Tensor]]:
        """The rows that attention stands for, rebuilt: for measuring, not for attending."""
        end = max(r.slots for r in self.rows)
        k, v = self.store_k.view(0, end), self.store_v.view(0, end)
        keys = k[0] if self.method.keys is None else self.method.keys.decode(k, self.key_frame).to(self.dtype)
        values = v[0] if self.method.values is None else self.method.values.decode(v, self.value_frame).to(self.dtype)
        return [(keys, values)]

    def own_bases(self) -> list[Tensor]:
        """The prompt's query directions: they serve writing alone, and are counted."""
        return [] if self.key_frame.span is None else [self.key_frame.span]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.key_frame.span is not None:
            self.key_frame = replace(self.key_frame, span=self.key_frame.span[indices])


class BaselineCache(HeadQCache):
    """A cache of another quantizer for a model that :func:`headq_ao.quantize_` has prepared.

    Args:
        model: quantized with a config whose ``n_sink``, ``residual_length`` and ``block_size`` are used here too.
        method: how rows are coded.

    Raises:
        ValueError: when the block size is no multiple of what the method groups.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import headq_config, quantize_
        >>> from headq_ao.evals.baselines.cache import BaselineCache
        >>> from headq_ao.evals.baselines.methods import kivi
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... ).eval()
        >>> quantize_(model, headq_config(block_size=64))
        >>> cache = BaselineCache(model, kivi(k_bits=2, v_bits=2, k_group=64, v_group=32))
        >>> _ = model(torch.arange(200)[None] % 64, cache=cache)
        >>> cache.bits_report().key_body_bits, cache.bits_report().value_body_bits
        (2.5, 3.0)
    """

    keeps_ids = False  # it is never saved

    def __init__(self, model: PreTrainedModel, method: Method) -> None:
        self.method = method
        super().__init__(model)
        if self.config.block_size % method.unit:
            raise ValueError(
                f"block_size must be a multiple of the {method.unit} tokens that this method groups, "
                f"got {self.config.block_size}"
            )
        for layer in self.layers:
            method.check_head_dim(layer.shape.head_dim)

    def _new_layer(self, index: int, shape: LayerShape) -> HeadQCacheLayer:
        return BaselineLayer(self.config, shape, self.incoming, self.method, index)
