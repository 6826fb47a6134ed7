"""What a Hugging Face model looks like to the cache: its attention layers, their shapes, and what is not supported."""

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.hub import try_to_load_from_cache

from headq_ao.codecs.rotation import POSITIONS
from headq_ao.integrations.config_only.shapes import (
    DummyLayer,
    config_fingerprint,
    dense_layers,
    layer_shapes,
    shared_places,
    text_config,
    told_by_masks,
)
from headq_ao.layer_shape import LayerShape

CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument
CACHE_NAME = next(n for n in CACHE_NAMES if n in inspect.signature(create_masks_for_generate).parameters)
KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
CROSS = re.compile(r"(^|\.)(encoder_attn|enc_?dec_?attention|cross_?attn|cross_?attention)$", re.IGNORECASE)


def attention_modules(model: nn.Module, places: int | Sequence[int]) -> list[nn.Module]:
    """The self-attention modules of those layers of the cache; a number: of the first so many.

    Raises:
        ValueError: where the model cannot route attention through transformers' attention interface.
    """
    kind, places = type(model).__name__, range(places) if isinstance(places, int) else places
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"HeadQ needs a transformers PreTrainedModel, got {kind}; pass the whole causal LM")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{kind} is not supported: its attention does not go through transformers' AttentionInterface")
    problem = attention_problem(model)
    if problem is not None:
        raise ValueError(f"{kind} is not supported: {problem}")
    found: dict[int, nn.Module] = {}
    for module in self_attentions(model).values():
        found[int(module.layer_idx)] = module  # type: ignore[arg-type]
    dense, sharing = dense_layers(model.config), shared_places(model.config)
    alone = [i for i in found if i < len(dense) and i not in sharing]
    if not {*places} <= {*found} or any(isinstance(dense[i], DummyLayer) for i in alone):
        raise ValueError(
            f"{kind} is not supported: layers {list(places)} of its cache hold keys and values, its attention modules "
            f"are of layers {sorted(found)}; HeadQ needs one module for each"
        )
    return [found[i] for i in places]


def decoder_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by path, without those of its other parts: a vision tower is a model of another type, in
    which no decoder is."""
    modules = dict(model.named_modules())
    if not isinstance(model, PreTrainedModel):
        return modules
    own = {model.config.model_type, text_config(model.config).model_type}
    parts = {f"{name}.": m.config.model_type in own for name, m in modules.items() if isinstance(m, PreTrainedModel)}
    decoders = [name for name, is_own in parts.items() if is_own]
    others = tuple(x for x, is_own in parts.items() if not (is_own or any(name.startswith(x) for name in decoders)))
    return {name: module for name, module in modules.items() if not f"{name}.".startswith(others)}


def self_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model's decoder that compute attention and know their layer, by path."""
    return {
        name: module
        for name, module in decoder_modules(model).items()
        if isinstance(getattr(module, "layer_idx", None), int) and type(module).__name__.endswith(("Attention", "MLA"))
    }


def attention_problem(model: nn.Module) -> str | None:
    """Why a model is no causal LM by itself, as the decoder half of an encoder–decoder is not; None: it is."""
    attentions = self_attentions(model)
    crossing = next((name for name, module in attentions.items() if crosses(name, module)), None)
    if crossing is not None:
        return f"it has cross-attention ({crossing})"
    other = next((name for name, module in attentions.items() if getattr(module, "is_causal", True) is False), None)
    causal = other is None or told_by_masks(model.config)
    return None if causal else f"its attention is not causal ({other})"


def crosses(name: str, module: nn.Module) -> bool:
    """Whether an attention module reads what another part of the model made: an encoder's output, an image."""
    told = getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__
    return bool(told or CROSS.search(name))


def input_embedding(model: PreTrainedModel) -> nn.Module:
    """The one table of token embeddings.

    Raises:
        ValueError: where a model has none, or several.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not (isinstance(embedding, nn.Module) and hasattr(embedding, "weight")):
        raise ValueError(
            f"{type(model).__name__} is not supported: its input embedding is a {type(embedding).__name__}, "
            "not one table of token embeddings"
        )
    return embedding


def with_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The argument that brings a model its cache, by the name that this version of transformers gives it.

    Example:
        >>> from headq_ao.integrations.transformers.models import with_cache
        >>> list(with_cache(None)) in (["cache"], ["past_key_values"])
        True
    """
    return {CACHE_NAME: cache}


def forward_names(model: nn.Module) -> frozenset[str]:
    """Names of arguments that the ``forward`` of a model, or of a model inside it, takes."""
    kinds = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    return frozenset(name for kind in kinds for name in inspect.signature(kind.forward).parameters)


def check_cached(model: PreTrainedModel) -> None:
    """Raise ValueError where neither a model nor a model inside it takes a cache of keys and values."""
    names = forward_names(model)
    if "input_ids" in names and not names & set(CACHE_NAMES):
        raise ValueError(f"{type(model).__name__} is not supported: it has no KV cache that a call could pass on")


def rotary_embedding(model: nn.Module) -> nn.Module | None:
    """The module that makes a decoder's rotary embeddings, the first where there are several; None without any."""
    return next((module for name, module in decoder_modules(model).items() if name.endswith("rotary_emb")), None)


def meta_model(config: Any) -> PreTrainedModel:
    """The text model that a config describes, without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(text_config(config))
    return model


def cached_checkpoint(name: str, revision: str | None) -> Path | None:
    """The folder of a hub's checkpoint on this machine; None where it has not been fetched."""
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def positions(model: nn.Module) -> int:
    """How many positions a model was made for."""
    config: Any = getattr(model, "config", None)
    most = getattr(config and config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else POSITIONS


def tensor_parallel(model: nn.Module) -> tuple[int, int]:
    """Rank and size of the tensor-parallel group of a model; (0, 1) where it is not sharded."""
    manager = getattr(model, "_mesh_manager", None)
    if manager is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return 0, 1
    mesh = manager.get_mesh("tp")
    return mesh.get_local_rank(), mesh.size()


def kv_heads_here(model: PreTrainedModel, shapes: list[LayerShape], rank: int, size: int) -> slice:
    """The KV heads that one rank of a tensor-parallel model attends with.

    Raises:
        ValueError: when the plan shards attention and the heads cannot be divided among the ranks.
    """
    total = shapes[0].n_kv_heads
    plan = model.tp_plan or {}
    if not any(key.rsplit(".", 1)[-1] in KEY_PROJECTIONS and style == "colwise" for key, style in plan.items()):
        return slice(0, total)  # no plan, a gathered output, or experts only
    if total % size:
        fits = [n for n in range(2, total + 1) if total % n == 0]
        raise ValueError(
            f"{model.config.model_type} has {total} KV heads ({shapes[0].n_heads} query heads), "
            f"which cannot be divided among {size} tensor-parallel processes; "
            + (f"use {' or '.join(map(str, fits))}" if fits else "run it on one, or data-parallel")
        )
    held = total // size
    return slice(rank * held, (rank + 1) * held)


def fingerprint(model: PreTrainedModel, shapes: Sequence[LayerShape] | None = None) -> dict[str, Any]:
    """What identifies a model for a calibration: type, shapes, rope, and the RMS of 16 slices of its embedding.

    The RMS values agree to 1e-3 between dtypes of one model; they are left out where the weight is not a plain tensor.
    """
    print_ = config_fingerprint(model.config, layer_shapes(model.config) if shapes is None else shapes)
    weight = input_embedding(model).weight
    if isinstance(weight, DTensor):  # tensor-parallel: all ranks ask at once
        weight = nn.Parameter(weight.full_tensor().detach(), requires_grad=False)
    if type(weight) is nn.Parameter and weight.device.type != "meta":
        slices = weight.detach()[: weight.shape[0] // 16 * 16].unflatten(0, (16, -1))[:, :64]
        print_["weights"] = slices.float().square().mean((1, 2)).sqrt().tolist()
    return print_


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors inside a tensor subclass (torchao's weights, a DTensor's local part), or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):  # a DTensor lists its mesh too
            yield from plain_tensors(part)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are or, where accelerate offloads them, where it brings them."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            found = getattr(one, "execution_device", None)
            if found is not None:
                return torch.device(found)
    return device
