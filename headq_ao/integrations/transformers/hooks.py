"""What HeadQ puts on a model and takes off it: codecs, attention, and the pre-hook that supplies its cache."""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headq_ao.ambient import mode_neutral
from headq_ao.calibration.artifact import Calibration, usable_calibration
from headq_ao.calibration.bit_allocation import head_bits
from headq_ao.calibration.rope import rotation_of
from headq_ao.codecs import registry
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.rotation import in_model_frame
from headq_ao.codecs.source import SourceModule
from headq_ao.codecs.unseen import UnseenQueries
from headq_ao.config import HeadQConfig
from headq_ao.integrations.config_only.estimate import within_budget
from headq_ao.integrations.transformers import attention, calls, generation, hf_quantizer, latent
from headq_ao.integrations.transformers.model_state import HeadQState
from headq_ao.integrations.transformers.models import (
    execution_device,
    fingerprint,
    forward_names,
    input_embedding,
    kv_heads_here,
    positions,
    rotary_embedding,
    tensor_parallel,
)
from headq_ao.integrations.transformers.serving import Serving, serving_of
from headq_ao.layer_shape import LayerShape
from headq_ao.ops.dispatch import WIDEST
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
    serving = serving_of(model, config.codec is not None, config.one_row)
    shapes, options = serving.shapes, forward_names(model)
    print_ = fingerprint(model, shapes)
    config, calibration = usable_calibration(config, print_)
    given, config = config, within_budget(model, config, shapes=shapes)
    if config.codec is None:
        shapes, codecs = headq_sources(model, config, calibration, serving)
    else:
        shapes, codecs = registered_sources(model, config, calibration, serving)
    for source in codecs:
        source.call_options = options
    hf_quantizer.attach(model, given)
    configs: list[Any] = []
    if serving.fallback is None:
        try:
            model.set_attn_implementation(attention.NAME)
        except Exception:
            hf_quantizer.detach(model)
            raise
        of_attention = {id(c): c for m in serving.modules if (c := getattr(m, "config", None)) is not None}
        configs = [*({id(model.config): model.config} | of_attention).values()]
    for codec in codecs:
        codec.model = codecs[0].model
    for module, codec in zip(serving.modules, codecs, strict=False):
        module.headq = codec
    latent.put_on(serving.modules)
    if serving.fallback is not None:
        model.headq = nn.ModuleList(codecs)
        warn(
            f"HeadQ: {serving.fallback}. Its cache is packed in memory, and dequantized for the model's own attention "
            "at each call: memory is saved, time is not"
        )
    elif latent.slow_here(serving.modules):
        warn(
            "HeadQ: latents are read as codes by a kernel on the CPU only; here each step unpacks them for matrix "
            "products: memory is saved, time is not"
        )
    elif config.codec is None:
        warn_wide(shapes, execution_device(serving.modules[0]))
    model._headq = HeadQState(config, shapes, serving, calibration, print_, codecs, configs)
    model.register_forward_pre_hook(calls.supply_cache, with_kwargs=True)
    generation.attach(model)
    quantized: nn.Module = model
    return quantized


def warn_wide(shapes: list[LayerShape], device: torch.device) -> None:
    """Say that a device has no kernels for heads of some layers' size."""
    most = max(dim for shape in shapes for dim in shape.dims)
    if most > WIDEST.get(device.type, most):
        warn(
            f"HeadQ: layers with heads of {most} coordinates are coded and read by PyTorch's matrix products on "
            f"{device.type}, whose kernels take up to {WIDEST[device.type]}: memory is saved, time is not"
        )


def headq_sources(
    model: PreTrainedModel, config: HeadQConfig, calibration: Calibration | None, serving: Serving
) -> tuple[list[LayerShape], list[SourceModule]]:
    """HeadQ's codec of each layer, of the heads that are here."""
    shapes = serving.shapes
    bits = head_bits(config, calibration, shapes)
    shapes, heads = shapes_here(model, shapes, config)
    embedding = rotary_embedding(model) if config.k_bits is not None else None
    sources: list[SourceModule] = []
    if serving.fallback is not None:
        device = execution_device(input_embedding(model))
        for i, shape in enumerate(shapes):
            moments = None if calibration is None else calibration.layers[i]
            sources.append(UnseenQueries(config, shape, moments, device, None, bits[i]))
        return shapes, sources
    for i, (module, shape) in enumerate(zip(serving.modules, shapes, strict=True)):
        moments = None if calibration is None else calibration.layers[i]
        turns = calibration is None or bool(calibration.layers[i].segment_tokens)
        rows = shape.latent is not None
        rotation = rotation_of(embedding, module, shape) if turns and not rows else None
        device, most, readout = execution_device(module), positions(model), latent.readout(module) if rows else None
        sources.append(LayerCodec(config, shape, moments, device, heads, bits[i], rotation, most, readout))
    return shapes, sources


def registered_sources(
    model: PreTrainedModel, config: HeadQConfig, calibration: Calibration | None, serving: Serving
) -> tuple[list[LayerShape], list[SourceModule]]:
    """The codec of that name (:mod:`headq_ao.codecs.registry`) for each layer."""
    assert config.codec is not None
    registry.check(config.codec, config.codec_options or {})
    if serving.fallback is not None:
        raise ValueError(
            f"codec={config.codec!r} needs attention that reads packed tokens: {serving.fallback}; use HeadQ's own"
        )
    shapes, heads = shapes_here(model, serving.shapes, config)
    if heads is not None and calibration is not None:
        raise ValueError(f"codec={config.codec!r} with a calibration cannot be put on a tensor-parallel model")
    embedding, identity = rotary_embedding(model), fingerprint(model, serving.shapes)
    sources = []
    for i, (module, shape) in enumerate(zip(serving.modules, shapes, strict=True)):
        rotation = rotation_of(embedding, module, shape)
        framed = None if calibration is None else calibration.layers[i]
        moments = framed if framed is None or rotation is None else in_model_frame(framed, rotation)
        layer = registry.LayerContext(
            shape, config.n_sink, execution_device(module), moments, rotation, framed, positions(model), i,
            len(shapes), identity,
        )  # fmt: skip
        sources.append(registry.build(config.codec, config.codec_options or {}, layer))
    return shapes, sources


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`; see :func:`headq_ao.restore_`."""
    state = getattr(model, "_headq", None)
    if not isinstance(state, HeadQState) or not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} has no HeadQ cache to take off")
    for module in state.serving.modules or [model]:
        del module.headq
    latent.take_off(state.serving.modules)
    for key in [k for k, hook in model._forward_pre_hooks.items() if hook is calls.supply_cache]:
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
