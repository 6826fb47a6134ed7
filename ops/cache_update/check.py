"""New tokens that cannot be packed."""

import torch
from torch import Tensor

from headq_ao.ops.types import PagedKV


def refuse_not_finite(kv: PagedKV, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where a real token of the call holds an inf or a nan; waits for the device."""
    slot, start = torch.arange(k.shape[2], device=k.device), torch.zeros_like(kv.held)
    start = start if kv.new_start is None else kv.new_start
    real = (slot >= start[:, None]) & (slot < (start + kv.total - kv.held)[:, None])  # [B, S]
    for name, x in (("keys", k), ("values", v)):
        bad = (~torch.isfinite(x).all(-1) & real[:, None]).flatten(1).any(1)
        if bool(bad.any()):
            sequence = int(bad.int().argmax())
            raise not_finite(name, sequence, int(kv.held[sequence]))


def not_finite(name: str, sequence: int, position: int) -> ValueError:
    """The error."""
    return ValueError(
        f"{name} must be finite to be packed, got inf or nan in sequence {sequence} from slot {position} on; "
        "run the model in float32 or bfloat16, or pass check_finite=False to cache them as they are"
    )
