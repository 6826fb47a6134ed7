"""The attention function that reads packed rows, registered as ``"headq"`` with transformers."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headq_ao.arguments import unknown_argument
from headq_ao.calibrate import RECORDER
from headq_ao.compiled import PendingRows, step
from headq_ao.layer_codec import LayerCodec
from headq_ao.tensors import HeadQHistory

NAME = "headq"


def headq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PendingRows,
    value: Tensor | PendingRows,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a HeadQ cache; over plain keys and values, transformers' SDPA attention.

    Args:
        module: the attention module; its ``headq`` submodule is the layer's codec.
        query, key, value: ``[B, Hq, S, D]``, and what the cache's ``update`` returned.
        attention_mask: used for the first call, which attends exactly; packed history masks by counts.
        scaling: of the scores; ``head_dim ** -0.5`` when None.

    Returns:
        ``[B, S, Hq, D]`` and None.

    Raises:
        ValueError: on an argument that changes the scores in a way HeadQ does not know.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, PendingRows):
        assert isinstance(value, PendingRows)
        return step(query, key, value, scale, _unknown(module, query, attention_mask, is_causal, kwargs)), None
    assert isinstance(value, Tensor)
    if not isinstance(key, HeadQHistory):
        recorder = None if torch.compiler.is_compiling() else RECORDER.get()
        if recorder is not None:
            recorder.record(module.layer_idx, query, key, value, scale, sliding_window)  # type: ignore[arg-type]
        elif hasattr(module, "headq"):
            bypassed = "use_cache is False, or the call did not go through the model that quantize_ was given"
            warn_dense("the model is in train mode" if module.training else bypassed)
        return _dense(module, query, key, value, attention_mask, scaling, dropout, is_causal, sliding_window, kwargs)
    problem = _unknown(module, query, attention_mask, is_causal, kwargs)
    if problem is not None:
        raise ValueError(problem)
    assert isinstance(value, HeadQHistory)
    codec, layer = module.headq, key.layer
    assert isinstance(codec, LayerCodec)
    if layer.first_call:
        out, _ = _dense(
            module,
            query,
            key.new_keys,
            value.new_values,
            attention_mask,
            scaling,
            dropout,
            is_causal,
            sliding_window,
            kwargs,
        )
        layer.count_exact_reads()
    else:
        layer.check_mask(attention_mask)
        out = layer.attend(query, scale, codec).transpose(1, 2).contiguous()
    layer.commit(query, codec, scale)
    return out, None


def _dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None,
    dropout: float, is_causal: bool | None, sliding_window: int | None, kwargs: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and getattr(module, "num_key_value_groups", 1) != groups:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, is_causal=is_causal, sliding_window=sliding_window, **kwargs,
    )  # fmt: skip
    return out, None


def _unknown(
    module: nn.Module, query: Tensor, attention_mask: Tensor | None, is_causal: bool | None, kwargs: dict[str, Any]
) -> str | None:
    """Why an attention call cannot be served from packed rows, None where it can."""
    if is_causal is False and attention_mask is None and query.shape[2] > 1:
        return "the attention call passes is_causal=False; a packed cache serves causal attention only"
    codec = module.headq
    assert isinstance(codec, LayerCodec)
    return unknown_argument(kwargs, codec.call_options)


def register() -> None:
    """Make ``"headq"`` known to transformers. The mask entry keeps padding and sliding windows in the first call."""
    AttentionInterface.register(NAME, headq_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.compiler.assume_constant_result  # a traced call warns while it is compiled
def warn_dense(why: str) -> None:
    """Say, once per reason, that a call does not use the packed cache."""
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"HeadQ: {why}; this call runs on dense keys and values", stacklevel=3)


_warned: set[str] = set()
