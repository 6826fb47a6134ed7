"""Reading rows: scores, softmax and readout of one segment, with keys and values packed or exact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.layout import unpack_keys, unpack_values


def scores(
    q: Tensor,
    bias: Tensor,
    zero_query: Tensor,
    gauge: Tensor,
    planes: Sequence[Tensor],
    bits: Sequence[int],
    scale: Tensor,
    zero: Tensor | None,
) -> Tensor:
    """``s_j = σ_j (q̃·c_j + b) + m_j h + q·μ`` for packed keys: ``[B, Hkv, G, S, T]``."""
    codes = unpack_keys(planes, bits).to(q.dtype)  # [B, Hkv, T, M]
    s = (torch.einsum("bhgsm,bhtm->bhgst", q, codes) + bias[..., None]) * scale.to(q.dtype)[:, :, None, None]
    if zero is not None:
        s = s + zero_query[..., None] * zero.to(q.dtype)[:, :, None, None]
    return s + gauge[..., None]


def dequantize_values(
    planes: Sequence[Tensor], bits: int, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``v_hat_j = zero_j + scale_j · c_j`` in the rotated basis: ``[B, Hkv, T, D]``."""
    codes, scale = unpack_values(planes, bits).to(dtype), scale.to(dtype)
    zero = -scale * ((2**bits - 1) / 2) if zero is None else zero.to(dtype)
    groups = codes.unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale[..., None] + zero[..., None]).flatten(-2)


def read_back(out: Tensor, read: Tensor, mean: Tensor | None) -> Tensor:
    """``Σ_j a_j v̂_j`` from ``Σ_j a_j ŷ_j`` ``[B, Hq, S, D]``, the weights of these rows summing to one."""
    heads = read.shape[1] if mean is None else max(read.shape[1], mean.shape[1])
    grouped = out.unflatten(1, (heads, -1)) @ read.to(out.dtype).transpose(-1, -2).unsqueeze(2)
    if mean is not None:
        grouped = grouped + mean.to(out.dtype)[:, :, None, None]
    return grouped.flatten(1, 2)


def softmax_readout(s: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """``lse = log Σ exp s_j`` and ``o = Σ softmax(s)_j v_j`` over visible rows; zero and −inf where none is."""
    s = s.masked_fill(~visible[:, None, None], float("-inf"))
    v = v.masked_fill(~visible.any(1)[:, None, :, None], 0.0)  # unwritten storage may hold NaN, and 0 · NaN is NaN
    lse = torch.logsumexp(s, -1)  # [B, Hkv, G, S]
    a = torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None])
    return torch.einsum("bhgst,bhtd->bhgsd", a, v.to(a.dtype)), lse


def decode_attention(
    q,
    bias,
    zero_query,
    gauge,
    k,
    key_planes,
    key_bits,
    key_scale,
    key_zero,
    v,
    value_planes,
    value_bits,
    value_scale,
    value_zero,
    start,
    stop,
    valid,
):
    s = (
        torch.einsum("bhgsd,bhtd->bhgst", q, k.to(q.dtype))
        if k is not None
        else scores(q, bias, zero_query, gauge, key_planes, key_bits, key_scale, key_zero)
    )
    slot = torch.arange(s.shape[-1], device=s.device)
    visible = (slot >= start[..., None]) & (slot < stop[..., None])  # [B, S, T]
    if valid is not None:
        visible = visible & valid[:, None]
    if v is None:
        v = dequantize_values(value_planes, value_bits, value_scale, value_zero, q.dtype)
    return softmax_readout(s, v, visible)
