"""The attention function that reads packed rows, registered as ``"headq"`` with transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headq_ao.ambient import mode_neutral, neutral_modes
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.lengths import Span
from headq_ao.cache.tensors import QuantizedKV
from headq_ao.calibration.observers import RECORDER
from headq_ao.integrations.transformers import compiled
from headq_ao.integrations.transformers.arguments import HARMLESS, unknown_argument
from headq_ao.ops.types import Visible, visible_positions
from headq_ao.user_warning import warn

NAME = "headq"
NO_GRADIENTS = (
    "a call that reads packed tokens has no gradients to give, and gradients are wanted: call it under "
    "torch.no_grad() or torch.inference_mode(), or pass use_cache=False"
)


def headq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
            among their new tokens, and of the cached ones it may show a contiguous range (:mod:`headq_ao.cache.masks`).
        scaling: of the scores; ``head_dim ** -0.5`` when None.

    Returns:
        ``[B, S, Hq, D]`` and, with ``output_attentions=True``, the weights ``[B, Hq, S, T]`` over all slots, else None.

    Raises:
        ValueError: on an argument that changes the scores in a way HeadQ does not know, on a mask that cannot be
            served, where packed tokens would have to give gradients; the layer then holds what it held before.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = kwargs.pop("output_attentions", False)
    dense = (dropout, is_causal, sliding_window, kwargs)
    if not isinstance(key, QuantizedKV):
        recorder = None if torch.compiler.is_compiling() else RECORDER.get()
        if recorder is not None:
            with neutral_modes():
                recorder.record(module.layer_idx, query, key, value, scale, sliding_window)  # type: ignore[arg-type]
        elif hasattr(module, "headq") and not module.headq.model.refusing:  # type: ignore[union-attr]
            bypassed = "use_cache is False, or the call did not go through the model that quantize_ was given"
            number = module.headq.model.number  # type: ignore[union-attr]
            warn_dense("the model is in train mode and gradients are wanted" if module.training else bypassed, number)
        out = _dense(module, query, key, value, attention_mask, scaling, *dense)
        return out, exact_weights(query, key, attention_mask, scale, is_causal) if weights else None
    assert isinstance(value, QuantizedKV)
    layer: PackedLayer = key.layer
    if torch.compiler.is_compiling():
        return compiled.attention(module, query, key, value, attention_mask, scale, is_causal, weights, kwargs), None
    shown, weights = None, weights or layer.batch.metadata.weights
    try:
        if not HARMLESS.issuperset(kwargs):
            problem = unknown_argument(kwargs, module.headq.call_options)  # type: ignore[union-attr,arg-type]
            if problem is not None:
                raise ValueError(problem)
        if layer.batch.lengths.first:
            out = _dense(module, query, key.new, value.new, attention_mask, scaling, *dense)
            shown = exact_weights(query, key.new, attention_mask, scale, is_causal) if weights else None
            layer.count_first()
            layer.commit(query, scale)
        else:
            if dropout or torch.is_grad_enabled():
                _check_readable(query, key.new, value.new, dropout)
            if weights:
                shown = attention_weights(layer, query, scale, attention_mask, is_causal)
            out = layer.attend(query, scale, key.new, value.new, attention_mask, is_causal)
            out = out.transpose(1, 2).contiguous()
    except BaseException:
        layer.take_back()
        raise
    return out, shown


@mode_neutral
def attention_weights(
    layer: PackedLayer, q: Tensor, scaling: float, mask: Tensor | None, is_causal: bool | None
) -> Tensor:
    """Weights ``[B, Hq, S, T]`` over all T slots, in q's dtype, from dequantized keys.

    Slots of padding, and tokens that a sliding window has let go, have the weight 0.

    Raises:
        ValueError: where sequences differ in length.
    """
    try:
        keys, _, position = layer.in_order()
    except ValueError as error:
        raise ValueError(f"output_attentions=True cannot be served from this cache: {error}") from error
    lengths, view = layer.batch.lengths, layer.view(mask, is_causal)
    total, span = lengths.totals()[0], Span(0, lengths.new) if lengths.spans is None else lengths.spans[0]
    visible = layer.visible(q.shape[2]) if view is None else Visible(view.low, view.high)
    if visible is None:
        visible = visible_positions(layer.counts.total, q.shape[2], layer.sliding_window or 0)
    seen = (position >= visible.low[..., None]) & (position < visible.high[..., None])  # [B, S, held]
    if view is not None:
        seen = seen.clone()
        seen[..., seen.shape[-1] - span.length :] = view.new[..., span.start : span.stop]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = (q.to(wide) * scaling).unflatten(1, (keys.shape[1], -1))
    s = (query @ keys.to(wide).transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
    weights = s.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0).to(q.dtype)
    out = weights.new_zeros((*weights.shape[:-1], lengths.seen))
    out[..., lengths.seen - lengths.trailing_pads()[0] - total + position] = weights
    return out


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


def register() -> None:
    """Make ``"headq"`` known to transformers. The mask entry keeps padding and sliding windows in the first call."""
    AttentionInterface.register(NAME, headq_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.compiler.assume_constant_result  # a traced call warns while it is compiled
def warn_dense(why: str, model: int) -> None:
    """Say, once per model (its :class:`.ModelNumber`) and reason, that a call uses no packed cache."""
    if (model, why) not in _warned:
        _warned.add((model, why))
        warn(f"HeadQ: {why}; this call runs on dense keys and values", again=True)


_warned: set[tuple[int, str]] = set()
