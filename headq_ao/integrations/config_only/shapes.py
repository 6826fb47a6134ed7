"""What a transformers config tells of a model's cache: layers, their kinds and shapes, and what is not supported."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from headq_ao.layer_shape import LayerShape

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
WITH_STATES = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
NATIVE = (*PLAIN, *(getattr(cache_utils, name) for name in WITH_STATES if hasattr(cache_utils, name)))
DummyLayer: Any = getattr(cache_utils, "DummyLayer", ())  # newer versions have these
# Decoders whose masks tell in each call which of its tokens see each other in both directions: the value of
# `use_bidirectional_attention` that says so, by model type; of any type where none is named.
TOLD_BY_MASKS: dict[str | None, Any] = {
    None: "vision",
    "paligemma": True,  # a prefix, told by token types; what follows it is causal
}


def dense_layers(config: Any) -> list[Any]:
    """The layers of transformers' own cache for a config; without layer types all are full attention.

    Raises:
        ValueError: where transformers makes no cache from it.
    """
    c = config.get_text_config(decoder=True)
    try:
        return DynamicCache(config=config).layers or [DynamicLayer() for _ in range(c.num_hidden_layers)]
    except (AttributeError, KeyError) as error:
        raise ValueError(f"{c.model_type} is not supported: its config describes no cache ({error})") from error


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
            by_masks = attribute == "use_bidirectional_attention" and told_by_masks(config)
            told = attribute == "num_kv_shared_layers" and bool(shared_places(config))
            if value and not (by_masks or told):
                raise ValueError(f"{name} is not supported: {why} (config.{attribute}={value})")
        if getattr(c, "attention_chunk_size", None) and not getattr(c, "layer_types", None):
            raise ValueError(
                f"{name} is not supported: attention_chunk_size without layer_types says not which attend so"
            )


def told_by_masks(config: Any) -> bool:
    """Whether a decoder says that it is not causal, and its masks tell which tokens of a call see each other."""
    said = {getattr(c, "use_bidirectional_attention", None) for c in layer_configs(config)} - {None, False}
    return bool(said) and said <= {TOLD_BY_MASKS[None], TOLD_BY_MASKS.get(config.model_type)}


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


def layer_configs(config: Any) -> list[Any]:
    """The decoder's config, or one for each of its layers where transformers keeps values that differ between them."""
    c = text_config(config)
    return list(c.per_layer_config) if getattr(c, "is_heterogeneous", False) else [c]


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
            n, *heads, getattr(layer, "sliding_window", None), softcap=softcap, readers=1 + sharing.count(i),
            chunked=i in chunked,
        )
        for i, (n, layer) in enumerate(zip(n_heads, layers, strict=True))
        if type(layer) in NATIVE
    ]  # fmt: skip


def chunked_places(config: Any) -> set[int]:
    """Layers whose queries see no token before the chunk of positions that they are in (Llama 4)."""
    kinds = getattr(text_config(config), "layer_types", None) or []
    return {i for i, kind in enumerate(kinds) if kind == "chunked_attention"}


def packed_places(config: Any) -> list[int]:
    """Which layers of a cache hold keys and values of attention, and are packed."""
    return [i for i, layer in enumerate(dense_layers(config)) if type(layer) in NATIVE]


def query_heads(config: Any, n_layers: int) -> list[int]:
    """Query heads of each layer; some models give layers different numbers of them."""
    c = text_config(config)
    by_layer = getattr(c, "num_attention_heads_per_layer", None) or [
        o.num_attention_heads for o in layer_configs(config)
    ]
    return list(by_layer) if len(by_layer) == n_layers else [by_layer[0]] * n_layers


def latent_rows(config: Any) -> list[LayerShape]:
    """The layers of multi-head latent attention that a config describes, each token one row; none where it describes no
    such attention, or an indexer that chooses among latents.

    Raises:
        ValueError: where a layer is of a kind that HeadQ cannot store, naming it.
    """
    c = text_config(config)
    if getattr(c, "is_heterogeneous", False):
        return []
    rank, rope = (getattr(c, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    if not isinstance(rank, int) or not isinstance(rope, int) or hasattr(c, "index_head_dim"):
        return []
    layers = checked_layers(config, known=True)
    n_heads = query_heads(config, len(layers))
    return [
        LayerShape(n, 1, rank + rope, None, latent=rank)
        for n, layer in zip(n_heads, layers, strict=True)
        if type(layer) in NATIVE
    ]


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


def text_config(config: Any) -> Any:
    """The decoder's part of a transformers config."""
    return config.get_text_config(decoder=True)


def config_fingerprint(config: Any, shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """What a fingerprint of a model tells of its config alone: type, shapes and rope."""
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
