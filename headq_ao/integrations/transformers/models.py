"""What a Hugging Face model looks like to the cache: its attention layers, their shapes, and what is not supported."""

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.hub import try_to_load_from_cache

from headq_ao.codecs.rotation import POSITIONS
from headq_ao.integrations.transformers.hybrid import NATIVE, DummyLayer, dense_layers
from headq_ao.layer_shape import LayerShape

CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument
CACHE_NAME = next(n for n in CACHE_NAMES if n in inspect.signature(create_masks_for_generate).parameters)
KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
CROSS = re.compile(r"(^|\.)(encoder_attn|enc_?dec_?attention|cross_?attn|cross_?attention)$", re.IGNORECASE)


def text_config(config: Any) -> Any:
    """The decoder's part of a transformers config."""
    return config.get_text_config(decoder=True)


def layer_configs(config: Any) -> list[Any]:
    """The decoder's config, or one for each of its layers where transformers keeps values that differ between them."""
    c = text_config(config)
    return list(c.per_layer_config) if getattr(c, "is_heterogeneous", False) else [c]


def packed_places(config: Any) -> list[int]:
    """Which layers of a cache hold keys and values of attention, and are packed."""
    return [i for i, layer in enumerate(dense_layers(config)) if type(layer) in NATIVE]


def layer_shapes(config: Any) -> list[LayerShape]:
    """The attention layers that a config describes; those of other kinds, which stay as they are, are left out.

    Raises:
        ValueError: where a layer is of a kind that HeadQ cannot store, naming it.
    """
    layers = checked_layers(config)
    heads = kv_heads_and_size(config)
    n_heads = query_heads(config, len(layers))
    softcap = getattr(layer_configs(config)[0], "attn_logit_softcapping", None)
    sharing, chunked = [*shared_places(config).values()], chunked_places(config)
    return [
        LayerShape(
            n, *heads, getattr(layer, "sliding_window", None), None, softcap, 1 + sharing.count(i), None, i in chunked
        )
        for i, (n, layer) in enumerate(zip(n_heads, layers, strict=True))
        if type(layer) in NATIVE
    ]


def chunked_places(config: Any) -> set[int]:
    """Layers whose queries see no token before the chunk of positions that they are in (Llama 4)."""
    kinds = getattr(text_config(config), "layer_types", None) or []
    return {i for i, kind in enumerate(kinds) if kind == "chunked_attention"}


def shared_places(config: Any) -> dict[int, int]:
    """Layers that read the keys and values of another, and which that is: the last before them of their kind that
    stores them (Gemma 3n, Gemma 4)."""
    c = text_config(config)
    modes, kinds = getattr(c, "kv_sharing_modes", None) or [], getattr(c, "layer_types", None) or []
    stores, found = dict[str, int](), dict[int, int]()
    for i, (mode, kind) in enumerate(zip(modes, kinds, strict=False)):
        if mode == "store":
            stores[kind] = i
        if mode == "reuse" and kind in stores:
            found[i] = stores[kind]
    return found


def checked_layers(config: Any, known: bool = False) -> list[Any]:
    """The layers of transformers' own cache for a config, of kinds that HeadQ serves or leaves alone;
    ``known``: see :func:`check_kind`.

    Raises:
        ValueError: where one is of another kind, naming it.
    """
    name = text_config(config).model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: encoder-decoder models are not supported; HeadQ packs decoder-only causal LMs")
    check_kind(config, known)
    layers = dense_layers(config)
    if all(isinstance(layer, (LinearAttentionLayer, DummyLayer)) and type(layer) not in NATIVE for layer in layers):
        raise ValueError(f"{name} is not supported: it has no KV cache; its layers keep a state of fixed size")
    for i, layer in enumerate(layers):
        if type(layer) not in (*NATIVE, LinearAttentionLayer) and not isinstance(layer, DummyLayer):
            raise ValueError(
                f"{name} is not supported: layer {i} caches a {type(layer).__name__}, not plain keys and values"
            )
    return layers


def check_kind(config: Any, known: bool = False) -> None:
    """Raise ValueError where a config names a kind of attention that HeadQ does not serve, naming it; ``known``: that
    its modules are of latent attention that it does serve."""
    refusals = {
        "kv_lora_rank": "multi-head latent attention (MLA) caches a latent, not keys and values",
        "num_kv_shared_layers": "KV shared between layers in a way that its config does not tell",
        "use_bidirectional_attention": "its attention is not causal",
    }
    if known:
        del refusals["kv_lora_rank"]
    for c in layer_configs(config):
        name = c.model_type
        for attribute, why in refusals.items():
            value = getattr(c, attribute, None)
            text_is_causal = attribute == "use_bidirectional_attention" and value == "vision"
            told = attribute == "num_kv_shared_layers" and bool(shared_places(config))
            if value and not (text_is_causal or told):
                raise ValueError(f"{name} is not supported: {why} (config.{attribute}={value})")
        if getattr(c, "attention_chunk_size", None) and not getattr(c, "layer_types", None):
            raise ValueError(
                f"{name} is not supported: attention_chunk_size without layer_types says not which attend so"
            )


def kv_heads_and_size(config: Any) -> tuple[int, int]:
    """Key-value heads of a layer, and their size; one number each for all layers.

    Raises:
        ValueError: where a config names no attention heads, or numbers that differ between layers.
    """
    found: set[tuple[int, int]] = set()
    name = text_config(config).model_type
    for c in layer_configs(config):
        heads = getattr(c, "num_attention_heads", None)
        if heads is None:
            raise ValueError(f"{name} is not supported: it has no KV cache; its config names no attention heads")
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        head_dim = getattr(c, "head_dim", None)
        if not head_dim and isinstance(heads, int):
            head_dim = getattr(c, "hidden_size", 0) // heads
        if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(head_dim, int)):
            raise ValueError(f"{name} is not supported: its head counts differ between layers")
        found.add((kv_heads, head_dim))
    if len(found) > 1:
        raise ValueError(
            f"{name} is not supported: its config has no one number of attention heads; key-value heads and their "
            f"sizes differ between layers: {sorted(found)}"
        )
    return found.pop()


def query_heads(config: Any, n_layers: int) -> list[int]:
    """Query heads of each layer; some models give layers different numbers of them."""
    c = text_config(config)
    by_layer = getattr(c, "num_attention_heads_per_layer", None) or [
        o.num_attention_heads for o in layer_configs(config)
    ]
    return list(by_layer) if len(by_layer) == n_layers else [by_layer[0]] * n_layers


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
    """The modules of a model by path, without those of its other parts: a vision tower is a model of another type."""
    modules = dict(model.named_modules())
    if not isinstance(model, PreTrainedModel):
        return modules
    own = {model.config.model_type, text_config(model.config).model_type}
    others = tuple(
        f"{name}."
        for name, module in modules.items()
        if isinstance(module, PreTrainedModel) and module.config.model_type not in own
    )
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
    return None if other is None else f"its attention is not causal ({other})"


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


def config_fingerprint(config: Any, shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """What :func:`fingerprint` tells of a config alone: type, shapes and rope."""
    c = text_config(config)
    return {
        "model_type": c.model_type,
        "layers": len(shapes),
        "heads": shapes[0].n_heads,
        "kv_heads": shapes[0].n_kv_heads,
        "head_dim": shapes[0].head_dim,
        "rope": json.dumps(
            getattr(c, "rope_parameters", None), sort_keys=True, default=str
        ),  # order is not kept in files
    }


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
