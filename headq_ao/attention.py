"""The attention function that reads packed rows, registered as ``"headq"`` with transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headq_ao.ambient import neutral_modes
from headq_ao.arguments import unknown_argument
from headq_ao.calibrate import RECORDER
from headq_ao.compiled import PendingRows, step
from headq_ao.layer_codec import LayerCodec
from headq_ao.tensors import HeadQHistory
from headq_ao.user_warning import warn

NAME = "headq"
NO_GRADIENTS = (
    "a call that reads packed tokens has no gradients to give, and gradients are wanted: call it under "
    "torch.no_grad() or torch.inference_mode(), or pass use_cache=False"
)


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
) -> tuple[Tensor, Tensor | None]:
    """Attention over a HeadQ cache; over plain keys and values, transformers' SDPA attention.

    Args:
        module: the attention module; its ``headq`` submodule is the layer's codec.
        query, key, value: ``[B, Hq, S, D]``, and what the cache's ``update`` returned.
        attention_mask: bool or additive. The first call attends exactly under any mask; later ones apply any mask
            among their new tokens, and of the cached ones it may show a contiguous range (:mod:`headq_ao.masks`).
        scaling: of the scores; ``head_dim ** -0.5`` when None.

    Returns:
        ``[B, S, Hq, D]`` and, with ``output_attentions=True``, the weights ``[B, Hq, S, T]`` over all slots, else None.

    Raises:
        ValueError: on an argument that changes the scores in a way HeadQ does not know, on a mask that cannot be
            served, where packed tokens would have to give gradients; the layer then holds what it held before.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, PendingRows):
        assert isinstance(value, PendingRows)
        problem = _unknown(module, kwargs) or _graph_problem(attention_mask, is_causal, kwargs, query)
        # one new token sees all of itself: a mask counts where it speaks of cached tokens
        told = attention_mask is not None and (query.shape[2] > 1 or attention_mask.shape[-1] > 1)
        return step(query, key, value, scale, problem, attention_mask if told else None), None
    assert isinstance(value, Tensor)
    weights = kwargs.pop("output_attentions", False)
    dense = (dropout, is_causal, sliding_window, kwargs)
    if not isinstance(key, HeadQHistory):
        recorder = None if torch.compiler.is_compiling() else RECORDER.get()
        if recorder is not None:
            with neutral_modes():
                recorder.record(module.layer_idx, query, key, value, scale, sliding_window)  # type: ignore[arg-type]
        elif hasattr(module, "headq"):
            bypassed = "use_cache is False, or the call did not go through the model that quantize_ was given"
            number = module.headq.model.number  # type: ignore[union-attr]
            warn_dense("the model is in train mode and gradients are wanted" if module.training else bypassed, number)
        out = _dense(module, query, key, value, attention_mask, scaling, *dense)
        return out, exact_weights(query, key, attention_mask, scale, is_causal) if weights else None
    assert isinstance(value, HeadQHistory)
    codec, layer = module.headq, key.layer
    assert isinstance(codec, LayerCodec)
    shown, weights = None, weights or layer.incoming.weights
    try:
        if (problem := _unknown(module, kwargs)) is not None:
            raise ValueError(problem)
        if layer.first_call:
            out = _dense(module, query, key.new_keys, value.new_values, attention_mask, scaling, *dense)
            shown = exact_weights(query, key.new_keys, attention_mask, scale, is_causal) if weights else None
            layer.count_exact_reads()
        else:
            _check_readable(query, key.new_keys, value.new_values, dropout)
            view = layer.view(attention_mask, is_causal)
            shown = layer.attention_weights(query, scale, codec, view) if weights else None
            out = layer.attend(query, scale, codec, (key.new_keys, value.new_values), view)
            out = out.transpose(1, 2).contiguous()
    except BaseException:
        layer.take_back()
        raise
    layer.commit(query, codec, scale)
    return out, shown


def _dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None,
    dropout: float, is_causal: bool | None, sliding_window: int | None, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and getattr(module, "num_key_value_groups", 1) != groups:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, is_causal=is_causal, sliding_window=sliding_window, **kwargs,
    )  # fmt: skip
    return out


def exact_weights(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float, is_causal: bool | None
) -> Tensor:
    """Attention weights ``[B, Hq, S, T]`` of ``query [B, Hq, S, D]`` over ``key [B, Hkv, T, D]``, in query's dtype."""
    scores = query.unflatten(1, (key.shape[1], -1)) @ key.transpose(-1, -2).unsqueeze(2) * scaling
    scores = scores.flatten(1, 2).float()
    if attention_mask is None and is_causal is not False:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(hidden.triu(scores.shape[-1] - scores.shape[-2] + 1), float("-inf"))
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        scores = scores + attention_mask
    return scores.softmax(-1).nan_to_num(0.0).to(query.dtype)  # a query of padding may see nothing


def _check_readable(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    """Raise ValueError where a call wants of packed tokens what they cannot give: gradients, or dropout."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError(NO_GRADIENTS)
    if dropout:
        raise ValueError(f"attention dropout of {dropout} cannot be applied to a packed cache; call model.eval() first")


def _graph_problem(mask: Tensor | None, is_causal: bool | None, kwargs: dict[str, Any], query: Tensor) -> str | None:
    """Why a compiled call cannot be served, None where it can."""
    if kwargs.get("output_attentions"):
        return "a compiled call returns no attention weights; call the model itself with output_attentions=True"
    if is_causal is False and mask is None and query.shape[2] > 1:
        return "a compiled call on a packed cache is causal, got is_causal=False; call the model itself"
    return None


def _unknown(module: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """Why an attention call cannot be served from packed rows, None where it can."""
    codec = module.headq
    assert isinstance(codec, LayerCodec)
    return unknown_argument(kwargs, codec.call_options)


def register() -> None:
    """Make ``"headq"`` known to transformers. The mask entry keeps padding and sliding windows in the first call."""
    AttentionInterface.register(NAME, headq_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.compiler.assume_constant_result  # a traced call warns while it is compiled
def warn_dense(why: str, model: int) -> None:
    """Say, once per model (:class:`headq_ao.layer_codec.ModelNumber`) and reason, that a call uses no packed cache."""
    if (model, why) not in _warned:
        _warned.add((model, why))
        warn(f"HeadQ: {why}; this call runs on dense keys and values", again=True)


_warned: set[tuple[int, str]] = set()
