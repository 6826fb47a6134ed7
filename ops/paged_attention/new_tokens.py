"""Attention of a chunk of many queries over the call's own tokens, joined to what they read of the cache."""

import torch
from torch import Tensor

from headq_ao.ops.paged_attention import reference
from headq_ao.ops.paged_attention.tiles import QUERY_TILE, TOKEN_TILE, query_tiles, tiles, worth
from headq_ao.ops.types import PagedKV, Visible, visible_positions

Part = tuple[Tensor, Tensor]  # out [B, Hq, S, Dv], lse [B, Hq, S]


def with_new_tokens(
    of_cache: Part | None, q: Tensor, scaling: float, kv: PagedKV, visible: Visible | None, sliding: int
) -> Part:
    """Attention over the cache, and with it over ``new_k`` and ``new_v``, if there are any; None: an empty cache."""
    if kv.new_k is None or kv.new_v is None:
        assert of_cache is not None
        return of_cache
    shown = visible_positions(kv.total, q.shape[2], sliding) if visible is None else visible
    if q.device.type != "cpu" or q.dtype == torch.float64 or kv.new_k.shape[-1] != kv.new_v.shape[-1]:
        parts = by_products(q, scaling, kv, shown)
    elif (
        visible is None
        and kv.recent is None
        and not 0 < sliding < q.shape[2]
        and bool((kv.total - kv.held == q.shape[2]).all())
    ):
        parts = flash(q, kv.new_k, kv.new_v, None, scaling, softcap=kv.softcap)
    else:
        parts = masked(q, scaling, kv, shown)
    return parts if of_cache is None else reference.merge([of_cache, parts])


def flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float = 1.0, causal: bool = True,
    softcap: float | None = None,
) -> Part:  # fmt: skip
    """PyTorch's CPU kernel, which gives the log-sum-exp that ``scaled_dot_product_attention`` keeps to itself; in the
    queries' dtype where keys and values have it, else in fp32.

    Args:
        q, k, v: ``[B, Hq, S, D]``, ``[B, Hkv, n, D]``.
        mask: added to the scores; with None, ``causal`` says whether query ``i`` sees keys up to its own.
        scaling: of the scores.
        causal: see ``mask``.
        softcap: of the scores; that kernel has none, and matrix products serve.
    """
    if softcap is not None:
        return capped_products(q, k, v, mask, scaling, causal, softcap)
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = q.float(), k.float(), v.float()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, mask is None and causal, attn_mask=mask, scale=scaling
    )
    return out.float(), lse.float()


def capped_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, causal: bool, softcap: float
) -> Part:
    """:func:`flash` under a softcap, some queries at a time, in fp32."""
    grouped, k, v = q.float().unflatten(1, (k.shape[1], -1)) * scaling, k.float()[:, :, None], v.float()[:, :, None]
    outs = []
    for t in tiles(q.shape[2], QUERY_TILE):
        end = t.stop if mask is None and causal else k.shape[3]
        s = reference.capped(grouped[:, :, :, t] @ k[:, :, :, :end].transpose(-1, -2), softcap)
        if mask is not None:
            s = s + mask[:, :, None, t]
        elif causal:
            hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(t.start + 1)
            s = s.masked_fill(hidden, float("-inf"))
        a, lse = reference.softmax(s)
        outs.append((a @ v[:, :, :, :end], lse))
    return torch.cat([o for o, _ in outs], 3).flatten(1, 2), torch.cat([lse for _, lse in outs], 3).flatten(1, 2)


def masked(q: Tensor, scaling: float, kv: PagedKV, shown: Visible) -> Part:
    """Under ranges and padding; tokens that no query of a tile reads are left out."""
    assert kv.new_k is not None and kv.new_v is not None
    position, here = reference.new_positions(kv)
    k, v = (x.float().masked_fill(~here[:, None, :, None], 0.0) for x in (kv.new_k, kv.new_v))
    outs = []
    for t in tiles(q.shape[2], QUERY_TILE):
        seen = reference.seen_in_full(position, here, shown.tile(t), kv)
        read = seen.flatten(0, 1).any(0).nonzero()[:, 0]
        if 0 < len(read) < len(position[0]):
            seen, of_tile = seen[..., read], (k[:, :, read], v[:, :, read])
        else:
            of_tile = k, v
        out, lse = flash(q[:, :, t].float() * scaling, *of_tile, hiding(seen), softcap=kv.softcap)
        outs.append((out, lse.masked_fill(~seen.any(-1)[:, None], float("-inf"))))
    return torch.cat([o for o, _ in outs], 2), torch.cat([lse for _, lse in outs], 2)


def hiding(seen: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What is added to scores ``[B, 1, S, n]`` so that only what is ``seen [B, S, n]`` counts."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))[:, None]


def by_products(q: Tensor, scaling: float, kv: PagedKV, shown: Visible) -> Part:
    """By matrix products, tile by tile, on any device and in fp64."""
    assert kv.new_k is not None and kv.new_v is not None
    position, here = reference.new_positions(kv)
    outs = []
    for grouped, of_tile in query_tiles(q, scaling, kv.new_k.shape[1], shown):
        parts = []
        for t in tiles(kv.new_k.shape[2], TOKEN_TILE):
            if worth(position[:, t], of_tile) or not t.start:
                seen = reference.seen_in_full(position[:, t], here[:, t], of_tile, kv)
                of_tokens = kv.new_k[:, :, t], kv.new_v[:, :, t], here[:, t]
                parts.append(reference.dense_part(grouped, *of_tokens, seen, kv.softcap))
        outs.append(reference.merge(parts))
    return torch.cat([o for o, _ in outs], 3).flatten(1, 2), torch.cat([lse for _, lse in outs], 3).flatten(1, 2)
