"""What ``model.generate`` asks of a model's cache before it compiles decoding steps."""

import functools
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate as default_masks

from headq_ao.cache import HeadQCache
from headq_ao.masks import check_left_padded, custom, hidden_tokens, real_spans
from headq_ao.state import Span


def attach(model: PreTrainedModel) -> None:
    """Put both functions of this file over the model's own; models that cannot generate have none."""
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = functools.partial(prepare_cache, model)
        model.create_masks_for_generate = functools.partial(masks_for_generate, model)


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`."""
    for name in ("_prepare_cache_for_generation", "create_masks_for_generate"):
        vars(model).pop(name, None)


def prepare_cache(model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
    """Where a ``compile_config`` is given, start with a packed cache that is compileable.

    generate decides before the first call of the model whether to compile the others.

    Raises:
        ValueError: on a prompt that is padded on the right.
    """
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args)
    cache: Any = model_kwargs.get("cache")
    if isinstance(cache, (DynamicCache, HeadQCache)):
        check_left_padded(model_kwargs.get("attention_mask"))  # before the prompt is paid for
    asked = generation_config.compile_config is not None
    if asked and type(cache) is DynamicCache and cache.get_seq_length() == 0:
        cache = model_kwargs["cache"] = HeadQCache(model)
    if isinstance(cache, HeadQCache):
        cache.is_compileable = asked


def masks_for_generate(
    model: PreTrainedModel, config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """The 2-D mask as it is while it tells of padding among the new slots, else None: a packed cache masks by counts.

    Raises:
        ValueError: on a mask that does not fit or has holes.
    """
    if not isinstance(cache, HeadQCache) or custom(attention_mask):
        make = getattr(type(model), "create_masks_for_generate", default_masks)
        return make(config, inputs_embeds, attention_mask, cache=cache, **kwargs)
    batch, length = inputs_embeds.shape[:2]
    seen = cache.get_seq_length()
    spans = real_spans(attention_mask, batch, length, seen)
    whole = spans is None or all(span == Span(0, length) for span in spans)
    return None if whole and hidden_tokens(attention_mask, cache.layers[0].rows, seen) is None else attention_mask
