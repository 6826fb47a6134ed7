"""Which keyword arguments of an attention call leave its scores as they are, and which cannot be served."""

from collections.abc import Mapping
from typing import Any

import torch

SINKS = "s_aux"  # the argument that brings an attention function sink logits
SOFTCAP = "softcap"  # that which brings it a softcap of the scores
TYPES = ("token_type_ids", "mm_token_type_ids")  # by which models tell tokens of images from text, over all slots
# What models pass along that does not change the scores.
HARMLESS = frozenset(
    {
        "position_ids", "use_cache", "cache_position", "position_embeddings",
        *TYPES, "input_ids",
        "labels", "output_attentions", "logits_to_keep", "num_logits_to_keep", "num_items_in_batch",
    }
)  # fmt: skip


def unknown_argument(kwargs: Mapping[str, Any], options: frozenset[str] = frozenset()) -> str | None:
    """Why an attention call with these keywords cannot be served from packed tokens, None where it can.

    Tensors and numbers of unknown names are taken to change the scores (a bias, say); ``options`` are the names of
    numbers that do not: those that a model's ``forward`` takes. A number of such a name that reaches attention is an
    option of the whole call which was passed on, as ``logits_to_keep`` is; what attention itself computes with has a
    name of the attention module's.
    """
    for name, value in kwargs.items():
        if name in HARMLESS or value is None or isinstance(value, bool):
            continue
        number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
        if isinstance(value, torch.Tensor) or (number and name not in options):
            shown = "a tensor" if isinstance(value, torch.Tensor) else value
            return (
                f"the attention call passes {name}={shown}, which may change the scores unknown to HeadQ; "
                "restore_(model) and use another cache for this model"
            )
    return None


def other_softcap(softcap: float | None, known: float | None) -> str:
    """Why a call under another softcap than a layer's own, with which its cache was made, is refused."""
    return (
        f"the attention call passes softcap={softcap}, and this layer had softcap={known} when quantize_ looked at the "
        "model; restore_(model), and quantize_ it as it is now"
    )
