"""``HeadQCache``: the packed cache that a quantized model reads and writes."""

import dataclasses
import os
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headq_ao import compiled
from headq_ao.cache_layer import HeadQCacheLayer
from headq_ao.calibration import Calibration
from headq_ao.compiled import Handled, PendingRows
from headq_ao.config import HeadQConfig
from headq_ao.layer_codec import LayerCodec
from headq_ao.layer_state import Incoming
from headq_ao.masks import check_positions, real_spans
from headq_ao.models import LayerShape
from headq_ao.prompt_cache import load_cache, save_cache
from headq_ao.report import BitsReport
from headq_ao.state import Span, storage_bytes


@dataclasses.dataclass
class HeadQState(Handled):
    """What ``quantize_`` leaves on a model, as ``model._headq``."""

    config: HeadQConfig
    shapes: list[LayerShape]
    calibration: Calibration | None = None  # what config.calibration is, or names
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
    codecs: list[LayerCodec] = dataclasses.field(default_factory=list)  # the modules' ``headq``

    def __post_init__(self) -> None:
        self.register()


class HeadQCache(Handled, Cache):
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

    is_compileable = False  # only where generate is asked to compile: see headq_ao.generation

    def __init__(self, model: PreTrainedModel) -> None:
        state = getattr(model, "_headq", None)
        if not isinstance(state, HeadQState):
            raise ValueError(f"{type(model).__name__} has no HeadQ config; call quantize_(model, headq_config()) first")
        self.config = state.config
        self._model = weakref.ref(model)
        self.incoming = Incoming()
        super().__init__(layers=[self._new_layer(i, shape) for i, shape in enumerate(state.shapes)])
        self.layers: list[HeadQCacheLayer]
        self.caller = weakref.ref(state)  # of the model that calls
        self.register()

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

    def check_made_for(self, state: HeadQState) -> None:
        """Raise ValueError where the cache does not fit the model that ``state`` stands for."""
        if self.config is not state.config and self.config != state.config:
            raise ValueError("this HeadQCache was made with another config; make a new one with HeadQCache(model)")
        if [layer.shape for layer in self.layers] != state.shapes:
            raise ValueError("this HeadQCache was made for another model; make a new one with HeadQCache(model)")

    def expect(self, state: HeadQState, batch: int, length: int, mask: Any, position_ids: Any) -> None:
        """Note what the next call brings, from the model of ``state``: ``length`` slots of ``batch`` sequences.

        Raises:
            ValueError: when the cache was made for another model, or the mask or positions are not supported.
        """
        self.check_made_for(state)
        check_positions(position_ids, mask)
        self.announce(length, real_spans(mask, batch, length, self.get_seq_length()))
        self.caller = weakref.ref(state)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows to a layer; in a traced model, hand them on to the operator that does when the graph runs."""
        if torch.compiler.is_compiling():
            handle = self.handle
            return PendingRows(handle, layer_idx, key_states), PendingRows(handle, layer_idx, value_states)  # type: ignore[return-value]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots seen; in a traced model a tensor, as from transformers' static caches."""
        if torch.compiler.is_compiling():
            return compiled.seen(self)  # type: ignore[return-value]
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of the mask; in a traced model those of the new tokens, for nothing reads it there."""
        if torch.compiler.is_compiling():
            return query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """First position of the new tokens in the mask."""
        return 0 if torch.compiler.is_compiling() else super().get_query_offset(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens from every layer, or raise before any has changed."""
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what the cache holds to one safetensors file, so that a prompt need not be computed again.

        The file has the packed rows as they are and a JSON head with counts, config and the model's fingerprint; it is
        written whole or not at all, and without unused capacity. On a tensor-parallel model each rank saves a file of
        its own.

        Raises:
            ValueError: when the cache holds no tokens, or HeadQ has been taken off its model.
            OSError: when the file cannot be written; an older one of that name is then unchanged.

        Example:
            >>> import os, tempfile, torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from headq_ao import HeadQCache, headq_config, quantize_
            >>> config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
            >>> model = LlamaForCausalLM(config).eval()
            >>> quantize_(model, headq_config(epoch_tokens=32))
            >>> cache = HeadQCache(model)
            >>> _ = model(torch.arange(200)[None] % 64, cache=cache)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache.save(os.path.join(folder, "prompt.safetensors"))
            ...     HeadQCache.load(os.path.join(folder, "prompt.safetensors"), model).get_seq_length()
            200
        """
        model = self._model()
        state = getattr(model, "_headq", None)
        if model is None or not isinstance(state, HeadQState) or state.config != self.config:
            raise ValueError("the model of this cache is gone or no longer has its HeadQ config; save the cache before")
        save_cache(self, model, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> "HeadQCache":
        """Read :meth:`save`'s file; the next token's logits are bit for bit those of the cache that was saved.

        Args:
            path: of the file.
            model: with the HeadQ config and calibration that the file was made with, and the same weights.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no prompt cache, damaged, of another version, or was made with another model,
                weights, config or calibration. Offloaded weights are not compared.
        """
        cache = cls(model)
        load_cache(cache, model, path)
        return cache

    @property
    def batch_size(self) -> int | None:
        """Sequences held, None before the first call."""
        return len(self.layers[0].rows) if self.layers and self.layers[0].is_initialized else None

    def get_memory_footprint(self) -> int:
        """Bytes of every tensor held: codes, scales, exact rows, statistics, per-sequence bases, unused capacity.

        Not counted: the eight bytes of the handle that compiled code knows the cache by.
        """
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
