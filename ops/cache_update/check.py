"""New tokens that cannot be packed."""

import torch
from torch import Tensor

from headq_ao.ops.types import PagedKV


def refuse_not_finite(kv: PagedKV, k: Tensor, v: Tensor) -> None:
    """:func:`check_finite` of a call's tokens, as the cache counts them."""
    start = torch.zeros_like(kv.held) if kv.new_start is None else kv.new_start
    check_finite(k, v, start, start + kv.total - kv.held, kv.held)


def check_finite(k: Tensor, v: Tensor, start: Tensor, stop: Tensor, position: Tensor) -> None:
    """Raise ValueError where a real token of a call's ``k``, ``v [B, H, S, D]`` holds an inf or a nan; waits for the
    device.

    Args:
        k, v: the tokens.
        start, stop: ``[B]`` int64, slots of the real ones.
        position: ``[B]`` int64, where the call begins, for the message.
    """
    slot = torch.arange(k.shape[2], device=k.device)
    real = (slot >= start[:, None]) & (slot < stop[:, None])  # [B, S]
    for name, x in (("keys", k), ("values", v)):
        bad = (~torch.isfinite(x).all(-1) & real[:, None]).flatten(1).any(1)
        if bool(bad.any()):
            sequence = int(bad.int().argmax())
            raise not_finite(name, sequence, int(position[sequence]))


def not_finite(name: str, sequence: int, position: int) -> ValueError:
    """The error."""
    return ValueError(
        f"{name} must be finite to be packed, got inf or nan in sequence {sequence} from slot {position} on; "
        "run the model in float32 or bfloat16, or pass check_finite=False to cache them as they are"
    )
