"""What a 2-D attention mask and position ids say about the rows of one call."""

from typing import Any

import torch
from torch import Tensor

from headq_ao.state import Span


def real_spans(mask: Any, batch: int, length: int, seen: int) -> list[Span] | None:
    """Which of the ``length`` new slots hold real tokens, per row; None: all.

    Raises:
        ValueError: on a mask that is not 2-D over all slots, or has a hole within a row.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != (batch, seen + length):
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask must be 2-D over all cached and new tokens, ({batch}, {seen + length}), got {what}; "
            "custom 4-D masks are not supported on a packed cache"
        )
    real = mask != 0
    if bool(real.all()):
        return None
    edges = torch.diff(real.int(), dim=1, prepend=real.new_zeros(batch, 1).int()) == 1
    if bool((edges.sum(1) > 1).any()):
        row = int((edges.sum(1) > 1).nonzero()[0])
        raise ValueError(f"attention_mask row {row} has a hole: its real tokens must be contiguous; pad on the left")
    first, count = real.int().argmax(1).tolist(), real.sum(1).tolist()
    clamp = lambda x: min(max(x - seen, 0), length)  # noqa: E731
    return [Span(clamp(f), clamp(f + n)) if n else Span(0, 0) for f, n in zip(first, count, strict=True)]


def check_positions(position_ids: Any, mask: Any) -> None:
    """Raise ValueError where the tokens of a row do not follow each other."""
    if not isinstance(position_ids, Tensor) or mask is not None or position_ids.ndim != 2:
        return
    if not bool((position_ids.diff(dim=1) == 1).all()):
        raise ValueError(
            "position_ids must count up by one within each row (packed sequences are not supported on this cache); "
            "run the sequences as a batch"
        )
