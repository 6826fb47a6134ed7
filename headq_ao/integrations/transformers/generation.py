"""What ``model.generate`` asks of a model's cache before it compiles decoding steps."""

import functools
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.masking_utils import create_masks_for_generate as default_masks

from headq_ao.cache.masks import check_left_padded, custom, hidden_tokens, real_spans
from headq_ao.cache.schedule import Span
from headq_ao.integrations.transformers.cache import HeadQCache
from headq_ao.integrations.transformers.models import CACHE_NAME


def attach(model: PreTrainedModel) -> None:
    """Put both functions of this file over the model's own; models that cannot generate have none."""
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = functools.partial(prepare_cache, model)
        model.create_masks_for_generate = functools.partial(masks_for_generate, model)


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`."""
    for name in ("_prepare_cache_for_generation", "create_masks_for_generate"):
        vars(model).pop(name, None)


def prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int,
    max_cache_length: int,
) -> None:  # fmt: skip
    """Where static capacity or a ``compile_config`` is asked for, start with a packed cache that has room for all.

    generate decides before the first call of the model whether to compile the others.

    Raises:
        ValueError: on a prompt that is padded on the right.
    """
    static = generation_config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
    if static:
        generation_config.cache_implementation = None  # the rest of generate finds the cache by its own class
    type(model)._prepare_cache_for_generation(
        model, generation_config, model_kwargs, mode, batch_size, max_cache_length
    )  # fmt: skip
    cache: Any = model_kwargs.get(CACHE_NAME)
    if isinstance(cache, (DynamicCache, HeadQCache)):
        check_left_padded(model_kwargs.get("attention_mask"))  # before the prompt is paid for
    asked = generation_config.compile_config is not None
    if (asked or static) and type(cache) is DynamicCache and cache.get_seq_length() == 0:
        room = max(max_cache_length + 1, getattr(generation_config, "max_cache_len", None) or 0)
        cache = model_kwargs[CACHE_NAME] = HeadQCache(model, max_length=room)
    if isinstance(cache, HeadQCache):
        cache.is_compileable = asked and model._headq.fallback is None


def masks_for_generate(
    model: PreTrainedModel, config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The 2-D mask as it is while it tells of padding among the new slots, else None: a packed cache masks by counts.

    Raises:
        ValueError: on a mask that does not fit or has holes.
    """
    cache = kwargs.get(CACHE_NAME)
    if not isinstance(cache, HeadQCache) or custom(attention_mask) or model._headq.fallback is not None:
        make = getattr(type(model), "create_masks_for_generate", default_masks)
        return make(config, inputs_embeds, attention_mask, **kwargs)
    batch, length = inputs_embeds.shape[:2]
    cache.batch.settle()
    lengths = cache.batch.lengths
    spans = real_spans(attention_mask, batch, length, lengths.seen)
    whole = spans is None or all(span == Span(0, length) for span in spans)
    told = hidden_tokens(attention_mask, lengths.totals(), lengths.trailing_pads(), lengths.seen)
    return None if whole and told is None else attention_mask
