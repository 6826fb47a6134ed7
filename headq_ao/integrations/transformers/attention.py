"""Attention on dense keys and values, and attention weights; :mod:`.calls` has the attention function itself."""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from headq_ao.ambient import mode_neutral
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.masks import attend_new, causal_mask, sink_share, visible_slots
from headq_ao.cache.reading import NO_GRADIENTS
from headq_ao.cache.schedule import Span
from headq_ao.ops.paged_attention.reference import capped
from headq_ao.ops.types import visible_positions
from headq_ao.user_warning import warn

NAME = "headq"
LM_EVAL = "lm_eval.models.huggingface"


@mode_neutral
def attention_weights(
    layer: PackedLayer, q: Tensor, scaling: float, mask: Tensor | None, is_causal: bool | None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    visible = layer.visible(q.shape[2]) if view is None else None
    if visible is None:
        visible = visible_positions(layer.counts.total, q.shape[2], layer.sliding_window or 0)
    ranges = [visible] if view is None else view.ranges
    shown = [(position >= one.low[..., None]) & (position < one.high[..., None]) for one in ranges]
    seen = torch.stack(shown).any(0)  # [B, S, held]
    if view is not None:
        seen[..., seen.shape[-1] - span.length :] = view.new[..., span.start : span.stop]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = (q.to(wide) * scaling).unflatten(1, (keys.shape[1], -1))
    s = capped((query @ keys.to(wide).transpose(-1, -2).unsqueeze(2)).flatten(1, 2), layer.shape.softcap)
    weights = weights_of(s.masked_fill(~seen[:, None], float("-inf")), sinks).to(q.dtype)
    out: Tensor = weights.new_zeros((*weights.shape[:-1], lengths.seen))
    out[..., lengths.seen - lengths.trailing_pads()[0] - total + position] = weights
    return out


def dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None,
    dropout: float, is_causal: bool | None, sliding_window: int | None, kwargs: dict[str, Any],
    sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention over plain keys and values, ``[B, S, Hq, D]``: transformers' SDPA function, which knows neither sinks
    nor a softcap."""
    if sinks is not None or softcap is not None:
        if dropout:
            beside = "sink logits" if softcap is None else "a softcap of the scores"
            raise ValueError(f"attention dropout of {dropout} cannot be applied beside {beside}; call model.eval()")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        given = attention_mask, scale, sliding_window, sinks, softcap
        return beyond_sdpa(query, key, value, *given).transpose(1, 2).contiguous()
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and getattr(module, "num_key_value_groups", 1) != groups:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, is_causal=is_causal, sliding_window=sliding_window, **kwargs,
    )[0]  # fmt: skip
    return out


def beyond_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, window: int | None, sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Attention ``[B, Hq, S, D]`` over a call's own keys and values, with sink logits ``[Hq]`` in the denominator and
    under a softcap, of which there may be either."""
    shown = causal_mask(q.shape[2], window, q.device)[None] if mask is None else visible_slots(mask)
    out, lse = attend_new(q, scaling, k, v, shown, softcap)
    return (out if sinks is None else out * sink_share(lse, sinks)).to(q.dtype)


def exact_weights(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float, is_causal: bool | None,
    sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention weights ``[B, Hq, S, T]`` of ``query [B, Hq, S, D]`` over ``key [B, Hkv, T, D]``, in query's dtype."""
    scores: Tensor = query.unflatten(1, (key.shape[1], -1)) @ key.transpose(-1, -2).unsqueeze(2) * scaling
    scores = capped(scores.flatten(1, 2).float(), softcap)
    if attention_mask is None and is_causal is not False:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(hidden.triu(scores.shape[-1] - scores.shape[-2] + 1), float("-inf"))
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        scores = scores + attention_mask
    return weights_of(scores, sinks).to(query.dtype)


def weights_of(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of scores ``[B, Hq, S, T]``, with sink logits where there are any; a query may see nothing."""
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights if sinks is None else weights * sink_share(scores.logsumexp(-1), sinks)


def check_readable(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    """Raise ValueError where a call wants of packed tokens what they cannot give: gradients, or dropout."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError(NO_GRADIENTS)
    if dropout:
        raise ValueError(f"attention dropout of {dropout} cannot be applied to a packed cache; call model.eval() first")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a traced call warns while it is compiled
def warn_dense(why: str, model: int) -> None:
    """Say, once per model (its :class:`.ModelNumber`) and reason, that a call uses no packed cache."""
    if (model, why) not in _warned:
        _warned.add((model, why))
        warn(f"HeadQ: {why}; this call runs on dense keys and values", again=True)


def warn_scored_unread(model: int) -> None:
    """Say, once per model, that lm-eval's own ``hf`` model scores without reading the cache, where it is what calls."""
    if LM_EVAL not in sys.modules or (model, LM_EVAL) in _warned:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_model_call" and frame.f_globals.get("__name__") == LM_EVAL:
            _warned.add((model, LM_EVAL))
            return warn(
                "HeadQ: lm-eval's model 'hf' scores log-likelihoods in one forward pass, which reads no cached token: "
                "its numbers are those of the exact cache; headq-lm-eval --model headq feeds each request through the "
                "cache",
                again=True,
            )
        frame = frame.f_back


_warned: set[tuple[int, str]] = set()
