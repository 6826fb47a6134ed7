"""What a model calls: the pre-hook that supplies its cache, and the attention function that reads packed tokens."""

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headq_ao.ambient import neutral_modes
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.reading import NO_GRADIENTS
from headq_ao.cache.tensors import QuantizedKV
from headq_ao.calibration.observers import RECORDER
from headq_ao.integrations.transformers import attention, compiled, latent
from headq_ao.integrations.transformers.arguments import (
    HARMLESS,
    SINKS,
    SOFTCAP,
    TYPES,
    other_softcap,
    unknown_argument,
)
from headq_ao.integrations.transformers.attention import NAME
from headq_ao.integrations.transformers.cache import HeadQCache
from headq_ao.integrations.transformers.model_state import Depth, HeadQState
from headq_ao.integrations.transformers.models import CACHE_NAME, CACHE_NAMES
from headq_ao.user_warning import warn


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile(model) runs hooks outside its graph
def supply_cache(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the root model: give it a packed cache where it would make a dense one.

    A decoding step that goes on as the last call left off takes the short way: what was looked at then is compared.
    """
    cache = kwargs.get(CACHE_NAME)
    asked = torch.is_grad_enabled() or len(args) > 1 or kwargs.get("output_attentions") or RECORDER.get() is not None
    if asked or type(cache) is not HeadQCache:
        return _supply(model, args, kwargs)
    state, mask, positions = model._headq, kwargs.get("attention_mask"), kwargs.get("position_ids")
    for config in state.attention_configs:
        if config._attn_implementation != NAME:
            return _supply(model, args, kwargs)
    depth, tokens = state.depth, kwargs.get("input_ids", args[0] if args else None)
    if (
        depth is None
        or model.base_model.config is not depth.config
        or depth.text.num_hidden_layers != depth.layers
        or not cache.next_token(model, state, tokens, mask, positions)
    ):
        return _supply(model, args, kwargs)
    if positions is not None and mask is not None:
        kwargs["attention_mask"] = None
    return args, kwargs


def _supply(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """:func:`supply_cache` of any call."""
    kwargs = _renamed(kwargs)
    if RECORDER.get() is not None:
        return args, kwargs
    if len(args) > 1:  # their order differs between models
        args, kwargs = (), dict(**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs)
    name, cache, packed = _requested(model, kwargs)
    if not packed:
        return args, kwargs
    native = model._headq.fallback is None
    if native:
        keep_attention(model)
    if cache is None:
        attention.warn_scored_unread(model._headq.codecs[0].model.number)
        cache = HeadQCache(model)
    tokens = _tokens(args, kwargs)
    if tokens is None:
        cache.check_made_for(model._headq)
        return args, {**kwargs, name: cache}
    batch, length = tokens.shape[:2]
    mask = kwargs.get("attention_mask")
    weights, positions = bool(kwargs.get("output_attentions")), kwargs.get("position_ids")
    cache.batch.settle()
    # where a model makes its mask of a whole one or of types of all slots, these are read by the slots' places
    whole = (*TYPES, "attention_mask") if positions is None and cache.batch.lengths.tokens is not None else TYPES
    by_slot = length > 1 and any(_longer(kwargs.get(name), length) for name in whole)
    cache.expect(model._headq, batch, length, mask, positions, layers_run(model), tokens, weights, by_slot)
    if native and not cache.batch.lengths.first and not cache.batch.metadata.custom and positions is not None:
        kwargs["attention_mask"] = None  # the cache knows it, and a mask that grows is a new shape at each step
    return args, {**_all_queries(model, kwargs, tokens), name: cache}


@torch.compiler.substitute_in_graph(supply_cache)
def supply_in_graph(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same where a compiled function calls the model: part of its graph, which cannot make a cache."""
    if len(args) > 1:
        return compiled.refused(model, args, kwargs, "", "a compiled function must pass the model's arguments by name")
    kwargs = _renamed(kwargs)
    name, cache, packed = _requested(model, kwargs)
    if not packed:
        return args, kwargs
    tokens = _tokens(args, kwargs)
    if cache is None or tokens is None:
        problem: str | None = "a compiled function cannot make its cache; pass input ids and cache=HeadQCache(model)"
    else:
        problem = compiled.begin(cache, model, kwargs, tokens)
    if problem is not None:
        return compiled.refused(model, args, kwargs, name, problem)
    new = tokens.shape[1]
    typed = {kind: kwargs[kind][:, -new:] for kind in TYPES if _longer(kwargs.get(kind), new)}
    return args, {**_all_queries(model, kwargs, tokens), **typed, name: cache, "attention_mask": None}


def _all_queries(model: PreTrainedModel, kwargs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A call's arguments, which logits to keep told by their places: where Gemma 4 is told their number, it shows the
    layers that read others' keys that many tokens alone. A cache packs after all readers have shown their queries, and
    attends for the tokens that it has counted."""
    kept, length = kwargs.get("logits_to_keep"), tokens.shape[1]
    if all(shape.readers == 1 for shape in model._headq.shapes) or not isinstance(kept, int) or not 0 < kept < length:
        return kwargs
    return kwargs | {"logits_to_keep": torch.arange(length - kept, length, device=tokens.device)}


def _longer(types: Any, length: int) -> bool:
    """Whether a call's types or mask of tokens ``[B, T]`` are of more slots than its own."""
    return isinstance(types, Tensor) and types.ndim == 2 and types.shape[1] > length


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with ``cache`` under the name that this version of transformers gives it."""
    if CACHE_NAME == "cache" or "cache" not in kwargs:
        return kwargs
    return {CACHE_NAME if name == "cache" else name: value for name, value in kwargs.items()}


def _requested(model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[str, HeadQCache | None, bool]:
    """Of a call: the cache's name, the cache that it brings, and whether it is to use a packed one.

    Raises:
        ValueError: on a request that a packed cache cannot meet.
    """
    name = next((n for n in CACHE_NAMES if kwargs.get(n) is not None), CACHE_NAME)
    cache = kwargs.get(name)
    if cache is None and not _uses_cache(model, kwargs):
        return name, None, False
    if torch.compiler.is_compiling():  # a graph must not depend on counts: attention tells of gradients there
        return name, cache if isinstance(cache, HeadQCache) else None, not (model.training and cache is None)
    if torch.is_grad_enabled() and wants_gradients(model, kwargs):
        if isinstance(cache, HeadQCache) and cache.holds_tokens:
            raise ValueError(NO_GRADIENTS)
        if cache is None and model.training:  # a training step reads no cache: packing one would be for nothing
            return name, None, False
    if cache is None or isinstance(cache, HeadQCache):
        return name, cache, True
    if type(cache) is DynamicCache and cache.get_seq_length() == 0:
        return name, None, True
    filled = " that already holds tokens" if type(cache) is DynamicCache else ""
    raise ValueError(
        f"a model with HeadQ needs a HeadQCache, got a {type(cache).__name__}{filled}; "
        "pass no cache, an empty DynamicCache or HeadQCache(model)"
    )


def wants_gradients(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a call with gradients enabled would record any through attention: for its embeddings, or for a parameter
    that acts before the last layer's attention does.

    Parameters are gone through in the order of modules; one that acts before and is registered behind is found by
    attention itself, as is what was not called through the model.
    """
    embeds = kwargs.get("inputs_embeds")
    if isinstance(embeds, torch.Tensor) and embeds.requires_grad:
        return True
    modules = list(model.base_model.modules())
    last = max((i for i, module in enumerate(modules) if "headq" in module._modules), default=len(modules) - 1)
    acting = itertools.chain(modules[:last], modules[last].modules())
    return any(p.requires_grad for module in acting for p in module._parameters.values() if p is not None)


def layers_run(model: PreTrainedModel) -> int | None:
    """How many of its layers a model runs, None: all; self-speculation (``assistant_early_exit``) drafts with fewer."""
    config = model.base_model.config
    text = config.get_text_config(decoder=True)
    layers: int | None = getattr(text, "num_hidden_layers", None)
    model._headq.depth = None if layers is None else Depth(config, text, layers)
    return layers


def keep_attention(model: PreTrainedModel) -> None:
    """Put ``"headq"`` back where a user has set another attention implementation: packed tokens are read by it alone.

    What was set is what :func:`restore_` leaves behind.
    """
    state: HeadQState = model._headq
    changed = [c._attn_implementation for c in state.attention_configs if c._attn_implementation != NAME]
    if not changed:
        return
    state.chosen_attention = changed[0]
    model.set_attn_implementation(NAME)
    warn(
        f"HeadQ: attn_implementation was set to {changed[0]!r}, and stays 'headq' while the model has a packed cache; "
        "restore_(model) puts the other one in place"
    )


def _uses_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a call that brings no cache makes one."""
    asked = kwargs.get("use_cache")
    return bool(getattr(model.config.get_text_config(decoder=True), "use_cache", True) if asked is None else asked)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if ids is not None else kwargs.get("inputs_embeds")


def headq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a HeadQ cache; over plain keys and values, transformers' SDPA attention.

    Arguments are in the order of SDPA attention, which wrappers of attention (kvpress's) pass on by position.

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
    sinks, softcap = kwargs.pop(SINKS, None), kwargs.pop(SOFTCAP, None)
    if is_causal is None and query.shape[2] > 1 and sinks is None and softcap is None:
        is_causal = getattr(module, "is_causal", None)  # as SDPA; functions that know sinks and softcaps ask for masks
    dense = (dropout, is_causal, sliding_window, kwargs, sinks, softcap)
    if not isinstance(key, QuantizedKV):
        recorder = None if torch.compiler.is_compiling() else RECORDER.get()
        if recorder is not None:
            with neutral_modes():
                more = () if sinks is None and softcap is None else (sinks, softcap)
                states = latent.recorded(module, query, key, value)
                recorder.record(module.layer_idx, *states, scale, sliding_window, *more)  # type: ignore[arg-type]
        elif hasattr(module, "headq") and not module.headq.model.refusing:  # type: ignore[union-attr]
            bypassed = "use_cache is False, or the call did not go through the model that quantize_ was given"
            number = module.headq.model.number  # type: ignore[union-attr]
            attention.warn_dense(
                "the model is in train mode and gradients are wanted" if module.training else bypassed, number
            )
        out = attention.dense(module, query, key, value, attention_mask, scaling, *dense)
        if recorder is not None:
            out = recorder.attended(module.layer_idx, out)  # type: ignore[arg-type]
        given = attention_mask, scale, is_causal, sinks, softcap
        return out, attention.exact_weights(query, key, *given) if weights else None
    assert isinstance(value, QuantizedKV)
    layer: PackedLayer = key.layer
    rows = layer.shape.latent is not None
    if torch.compiler.is_compiling():
        options = attention_mask, scale, is_causal, weights, kwargs, sinks, softcap
        out = compiled.attention(module, latent.absorbed(module, query) if rows else query, key, value, *options)
        return latent.read_out(module, out) if rows else out, None
    shown, weights = None, weights or layer.batch.metadata.weights
    try:
        if not HARMLESS.issuperset(kwargs):
            problem = unknown_argument(kwargs, layer.source.call_options)  # type: ignore[attr-defined]
            if problem is not None:
                raise ValueError(problem)
        if softcap != layer.shape.softcap:
            raise ValueError(other_softcap(softcap, layer.shape.softcap))
        if layer.batch.lengths.first:
            k, v = latent.expanded(module, key.new) if rows else (key.new, value.new)
            out = attention.dense(module, query, k, v, attention_mask, scaling, *dense)
            if weights:
                shown = attention.exact_weights(query, k, attention_mask, scale, is_causal, sinks, softcap)
            layer.count_first()
            layer.commit(latent.absorbed(module, query) if rows and not all(layer.learned) else query, scale)
        else:
            if dropout or torch.is_grad_enabled():
                attention.check_readable(query, key.new, value.new, dropout)
            query = latent.absorbed(module, query) if rows else query
            if weights:
                shown = attention.attention_weights(layer, query, scale, attention_mask, is_causal, sinks)
            out = layer.attend(query, scale, key.new, value.new, attention_mask, is_causal, sinks)
            out = out.transpose(1, 2).contiguous()
            out = latent.read_out(module, out) if rows else out
    except BaseException:
        layer.batch.take_back()
        raise
    return out, shown


def register() -> None:
    """Make ``"headq"`` known to transformers. The mask entry keeps padding and sliding windows in the first call."""
    AttentionInterface.register(NAME, headq_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
