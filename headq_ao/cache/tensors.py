"""The tensor that a cache layer's ``update`` returns: all keys, or all values, quantized."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchao.utils import TorchAOBaseTensor

from headq_ao.codecs.protocol import Codec
from headq_ao.ops.types import PagedKV

READER = torch.nn.functional.scaled_dot_product_attention


class QuantizedKV(TorchAOBaseTensor):
    """Keys or values ``[B, Hkv, T, D]`` of all tokens that a cache holds, over the plain tensors of its pages.

    Attention reads it: HeadQ's attention function and ``F.scaled_dot_product_attention`` run the paged operator on it,
    :meth:`dequantize` gives plain rows, and whatever else is asked of it is refused by name.

    Attributes:
        new: this call's keys or values as they came, ``[B, Hkv, S, D]``.
        kv: pages, block table, window and lengths.
        codec: what reads them.
        side: ``"key"`` or ``"value"``.
        layer: of the cache.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import HeadQCache, headq_config, quantize_
        >>> config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> quantize_(model, headq_config(warmup_tokens=32))
        >>> cache = HeadQCache(model)
        >>> _ = model(torch.arange(200)[None] % 64, cache=cache)
        >>> keys, values = cache.layers[0].tensors_of(torch.zeros(1, 2, 1, 32))
        >>> keys.shape, keys.dequantize().shape
        (torch.Size([1, 2, 200, 32]), torch.Size([1, 2, 200, 32]))
    """

    kv: PagedKV | None = None
    codec: Codec | None = None
    layer: Any = None
    side = ""
    new: Tensor

    @staticmethod
    def __new__(cls, new: Tensor, tokens: int) -> Self:
        shape = (new.shape[0], new.shape[1], tokens, new.shape[3])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        self.new = new
        return self

    def __repr__(self, **_: Any) -> str:
        return f"QuantizedKV({self.side}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["new"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Self:
        return cls(inner["new"], size[2])

    def inner(self) -> dict[str, Tensor]:
        """The plain tensors that it stands for, by name."""
        assert self.kv is not None
        kv = self.kv
        pages = {f"page_{i}": t for i, t in enumerate(kv.pages)}
        window = kv.window_k if self.side == "key" else kv.window_v
        return pages | {"table": kv.table, "packed": kv.packed, "total": kv.total, "window": window, "new": self.new}

    def dequantize(self) -> Tensor:
        """All rows, ``[B, Hkv, T, D]`` in its dtype.

        Raises:
            ValueError: where sequences differ in length.
        """
        k, v = self.layer.dequantize()
        rows: Tensor = k if self.side == "key" else v
        return rows.to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is READER:
            return attention_of(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for found in tree_leaves((args, kwargs)):
            if isinstance(found, QuantizedKV) and found.layer is not None:
                found.layer.batch.take_back()
        raise RuntimeError(
            f"{func} was called on the packed HeadQ cache, which only the 'headq' attention can read; "
            "keep attn_implementation='headq' while the cache is in use, or call restore_(model) and start a new "
            "cache; a model whose attention does more with cached keys and values than pass them on cannot be served"
        )


def attention_of(
    query: Tensor, key: QuantizedKV, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``F.scaled_dot_product_attention`` over quantized keys and values.

    As in dense attention a mask speaks of all keys; without one and without ``is_causal`` the new queries see all.
    """
    if not isinstance(key, QuantizedKV) or not isinstance(value, QuantizedKV) or key.layer is not value.layer:
        raise ValueError("attention over a HeadQ cache needs the keys and values that one update of it returned")
    if dropout_p:
        raise ValueError(f"dropout of {dropout_p} cannot be applied to a packed cache")
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = key.layer.attend(query, scaling, key.new, value.new, attn_mask, is_causal)
    return found
