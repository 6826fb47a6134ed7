"""What HeadQ puts on a model and takes off it: codecs, attention, and the pre-hook that supplies the cache."""

import dataclasses
import inspect
import itertools
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from headq_ao.ambient import mode_neutral
from headq_ao.calibration.artifact import Calibration, usable_calibration
from headq_ao.calibration.bit_allocation import head_bits
from headq_ao.calibration.observers import RECORDER
from headq_ao.calibration.rope import rotary_turns
from headq_ao.codecs import registry
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.rotation import Rotation
from headq_ao.codecs.source import SourceModule
from headq_ao.config import HeadQConfig
from headq_ao.integrations.transformers import attention, compiled, generation, hf_quantizer
from headq_ao.integrations.transformers.cache import HeadQCache
from headq_ao.integrations.transformers.model_state import HeadQState
from headq_ao.integrations.transformers.models import (
    CACHE_NAMES,
    attention_modules,
    execution_device,
    fingerprint,
    forward_names,
    kv_heads_here,
    rotary_embedding,
    tensor_parallel,
)
from headq_ao.integrations.transformers.probe import supported_layers
from headq_ao.layer_shape import LayerShape
from headq_ao.user_warning import warn


@mode_neutral
def attach(model: nn.Module, config: HeadQConfig) -> nn.Module:
    """Put a HeadQ cache on a model, as torchao's handler; everything that can fail comes before the first change."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a HeadQ config applies to a whole transformers model, got a {type(model).__name__}; "
            "call headq_ao.quantize_(model, config) with the whole model"
        )
    if hasattr(model, "_headq"):
        raise ValueError("this model already has a HeadQ cache; call restore_(model) first")
    shapes, modules = supported_layers(model)
    options = forward_names(model)
    print_ = fingerprint(model)
    config, calibration = usable_calibration(config, print_)
    if config.codec is None:
        shapes, codecs = headq_sources(model, config, calibration, shapes, modules)
    else:
        shapes, codecs = registered_sources(model, config, calibration, shapes, modules)
    for source in codecs:
        source.call_options = options
    hf_quantizer.attach(model, config)
    try:
        model.set_attn_implementation(attention.NAME)
    except Exception:
        hf_quantizer.detach(model)
        raise
    of_attention = {id(c): c for module in modules if (c := getattr(module, "config", None)) is not None}
    configs = [*({id(model.config): model.config} | of_attention).values()]
    state = HeadQState(config, shapes, calibration, print_, codecs, configs)
    for module, codec in zip(modules, codecs, strict=True):
        module.headq = codec
        codec.model = codecs[0].model
    model._headq = state
    model.register_forward_pre_hook(supply_cache, with_kwargs=True)
    generation.attach(model)
    return model


def headq_sources(
    model: PreTrainedModel, config: HeadQConfig, calibration: Calibration | None, shapes: list[LayerShape],
    modules: list[nn.Module],
) -> tuple[list[LayerShape], list[SourceModule]]:  # fmt: skip
    """HeadQ's codec of each layer, of the heads that are here."""
    bits = head_bits(config, calibration, shapes)
    shapes, heads = shapes_here(model, shapes, config)
    own_statistics = calibration is None and config.k_bits is not None and config.key_codec == "visible"
    embedding = rotary_embedding(model) if own_statistics else None
    sources: list[SourceModule] = []
    for i, (module, shape) in enumerate(zip(modules, shapes, strict=True)):
        moments = None if calibration is None else calibration.layers[i]
        turns = rotary_turns(embedding, module, shape)
        sources.append(LayerCodec(config, shape, moments, execution_device(module), heads, bits[i], turns))
    return shapes, sources


def registered_sources(
    model: PreTrainedModel, config: HeadQConfig, calibration: Calibration | None, shapes: list[LayerShape],
    modules: list[nn.Module],
) -> tuple[list[LayerShape], list[SourceModule]]:  # fmt: skip
    """The codec of that name (:mod:`headq_ao.codecs.registry`) for each layer."""
    assert config.codec is not None
    registry.check(config.codec, config.codec_options or {})
    shapes, heads = shapes_here(model, shapes, config)
    if heads is not None and calibration is not None:
        raise ValueError(f"codec={config.codec!r} with a calibration cannot be put on a tensor-parallel model")
    embedding = rotary_embedding(model)
    sources = []
    for i, (module, shape) in enumerate(zip(modules, shapes, strict=True)):
        turns = rotary_turns(embedding, module, shape, (0, 1))
        layer = registry.LayerContext(
            shape, config.n_sink, execution_device(module), None if calibration is None else calibration.layers[i],
            None if turns is None else Rotation.of_turn(turns),
        )  # fmt: skip
        sources.append(registry.build(config.codec, config.codec_options or {}, layer))
    return shapes, sources


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`; see :func:`headq_ao.restore_`."""
    state = getattr(model, "_headq", None)
    if not isinstance(state, HeadQState) or not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} has no HeadQ cache to take off")
    for module in attention_modules(model, len(state.shapes)):
        del module.headq
    for key in [k for k, hook in model._forward_pre_hooks.items() if hook is supply_cache]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    del model._headq
    generation.detach(model)
    hf_quantizer.detach(model, state.chosen_attention)


def shapes_here(
    model: PreTrainedModel, shapes: list[LayerShape], config: HeadQConfig
) -> tuple[list[LayerShape], slice | None]:
    """The layers as this process sees them and, on a tensor-parallel model, the KV heads that it owns."""
    rank, size = tensor_parallel(model)
    if size == 1:
        return shapes, None
    if config.basis == "random" and config.calibration is None:
        raise ValueError(
            "basis='random' on a tensor-parallel model needs a calibration; it is drawn for all heads at once"
        )
    heads = kv_heads_here(model, shapes, rank, size)
    held = heads.stop - heads.start
    return [dataclasses.replace(s, n_heads=s.n_heads // s.n_kv_heads * held, n_kv_heads=held) for s in shapes], heads


@torch.compiler.disable  # torch.compile(model) runs hooks outside its graph
def supply_cache(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the root model: give it a packed cache where it would make a dense one."""
    if RECORDER.get() is not None:
        return args, kwargs
    if len(args) > 1:  # their order differs between models
        args, kwargs = (), dict(**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs)
    name, cache, packed = _requested(model, kwargs)
    if not packed:
        return args, kwargs
    keep_attention(model)
    cache = HeadQCache(model) if cache is None else cache
    tokens = _tokens(args, kwargs)
    if tokens is None:
        cache.check_made_for(model._headq)
        return args, {**kwargs, name: cache}
    batch, length = tokens.shape[:2]
    mask = kwargs.get("attention_mask")
    weights, positions = bool(kwargs.get("output_attentions")), kwargs.get("position_ids")
    cache.expect(model._headq, batch, length, mask, positions, layers_run(model), tokens, weights)
    if not cache.batch.lengths.first and not cache.batch.metadata.custom and positions is not None:
        kwargs["attention_mask"] = None  # the cache knows it, and a mask that grows is a new shape at each step
    return args, {**kwargs, name: cache}


@torch.compiler.substitute_in_graph(supply_cache)
def supply_in_graph(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same where a compiled function calls the model: part of its graph, which cannot make a cache."""
    if len(args) > 1:
        return compiled.refused(model, args, kwargs, "", "a compiled function must pass the model's arguments by name")
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
    return args, {**kwargs, name: cache, "attention_mask": None}


def _requested(model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[str, HeadQCache | None, bool]:
    """Of a call: the cache's name, the cache that it brings, and whether it is to use a packed one.

    Raises:
        ValueError: on a request that a packed cache cannot meet.
    """
    name = next((n for n in CACHE_NAMES if kwargs.get(n) is not None), CACHE_NAMES[0])
    cache = kwargs.get(name)
    if cache is None and not _uses_cache(model, kwargs):
        return name, None, False
    if torch.compiler.is_compiling():  # a graph must not depend on counts: attention tells of gradients there
        return name, cache if isinstance(cache, HeadQCache) else None, not (model.training and cache is None)
    if torch.is_grad_enabled() and wants_gradients(model, kwargs):
        if isinstance(cache, HeadQCache) and cache.holds_tokens:
            raise ValueError(attention.NO_GRADIENTS)
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
    return getattr(model.base_model.config.get_text_config(decoder=True), "num_hidden_layers", None)


def keep_attention(model: PreTrainedModel) -> None:
    """Put ``"headq"`` back where a user has set another attention implementation: packed rows are read by it alone.

    What was set is what :func:`restore_` leaves behind.
    """
    state: HeadQState = model._headq
    changed = [c._attn_implementation for c in state.attention_configs if c._attn_implementation != attention.NAME]
    if not changed:
        return
    state.chosen_attention = changed[0]
    model.set_attn_implementation(attention.NAME)
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
