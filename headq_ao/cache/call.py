"""What an engine says of a model call beside its tokens."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class CallMetadata:
    """What an engine says of a model call beside its tokens.

    Attributes:
        custom: masks may say anything of cached tokens: the caller's own 4-D ones, or of a call that no engine has
            announced.
        hidden: how many of its oldest cached tokens each sequence's 2-D mask hides, ``[B]`` int64; None: none.
        weights: attention weights are wanted; some models do not tell their attention.
        by_slot: what is told of all slots, by their place among all, says which new tokens see each other: types of
            tokens (blocks of images), a mask of padding.
        views: what attention found in the call's masks, for all layers.
    """

    custom: bool = False
    hidden: Tensor | None = None
    weights: bool = False
    by_slot: bool = False
    views: dict[Any, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallMetadata":
        return CallMetadata(self.custom, self.hidden, self.weights, self.by_slot)  # the views are of this call's masks
