"""What attention sees: weights of queries, keys and values, for statistics that count what reaches the output."""

from collections.abc import Iterator

import torch
from torch import Tensor

RECENT = 64  # newest keys of each query that do not count: they are exact in the cache
QUERY_TILE = 128
UNIFORM = 0.25  # share of plain averages in statistics weighted by attention


def importance_weights(
    q: Tensor, k: Tensor, scaling: float, *, n_sink: int, window: int | None = None, every: int = 1,
    counted: Tensor | None = None, sinks: Tensor | None = None, segment: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """How much of each row the output shows, from the exact attention ``a`` of a causal sequence.

    A key's error ``e_j`` moves the logits by ``q·e_j``; to second order the attention changes by
    ``KL ≈ ½ Σ_j a_j (1 − a_j) (q·e_j)²`` for errors that are independent between keys. So a query counts by
    ``w = Σ_j a_j (1 − a_j)``, a key by ``Σ_q a_qj (1 − a_qj)``, and a value, whose error reaches the output as
    ``a_qj e_j``, by ``Σ_q a_qj²``. Sums run over keys that a cache would have packed: no sinks, not the newest.
    Under a softcap ``c`` an error of a score ``s`` moves the logit by ``1 − tanh²(s / c)`` of itself: ``a_j (1 − a_j)``
    counts by the square of that.

    Args:
        q: ``[B, Hq, T, D]`` after QK-norm and RoPE.
        k: ``[B, Hkv, T, D]``.
        scaling: of the scores.
        n_sink: first keys that do not count.
        window: of a sliding-window layer.
        every: take every such query only.
        counted: ``[B, T]``, which tokens count, as queries and as keys; None: all.
        sinks: logits ``[Hq]`` in the softmax's denominator, or None.
        segment: ``[T]`` int64, of which segment each key is, from 0 on; None: of one.
        softcap: of the scores, or None.

    Returns:
        Weights of queries ``[B, Hq, T]`` (0 for those not taken), keys ``[B, Hkv, T]`` and values ``[B, Hkv, T]``. With
        ``segment`` the first are ``[B, Hq, T, segments]``, by the segment of the keys: their sum is the same.

    Example:
        >>> import torch
        >>> from headq_ao.statistics.importance import importance_weights
        >>> q, k = torch.randn(1, 4, 80, 16), torch.randn(1, 2, 80, 16)
        >>> of_q, of_k, of_v = importance_weights(q, k, 0.25, n_sink=4)
        >>> of_q.shape, bool((of_k[..., :4] == 0).all())
        (torch.Size([1, 4, 80]), True)
    """
    b, hkv, tokens, _ = k.shape
    places = torch.zeros(tokens, dtype=torch.int64, device=k.device) if segment is None else segment
    segments = 1 if segment is None or not tokens else int(segment.max()) + 1
    of_q = k.new_zeros(b, hkv, q.shape[1] // hkv, tokens, segments)
    of_k, of_v = k.new_zeros(b, hkv, tokens), k.new_zeros(b, hkv, tokens)
    for at, _, s, packed in score_tiles(q, k, scaling, n_sink=n_sink, window=window, every=every):
        a = attention(s, sinks, softcap) * packed
        if counted is not None:
            a = a * (counted[:, at, None] & counted[:, None])[:, None, None]
        slope = a * (1 - a)
        if softcap is not None:
            slope = slope * (1 - torch.tanh(s / softcap).square()).square()
        of_q[..., at, :] = of_q[..., at, :].index_add(-1, places, slope)
        of_k += slope.sum((2, 3))
        of_v += a.square().sum((2, 3))
    of_q = of_q.flatten(1, 2)
    return of_q[..., 0] if segment is None else of_q, of_k, of_v


def attention(s: Tensor, sinks: Tensor | None, softcap: float | None = None) -> Tensor:
    """The softmax of scores ``[B, Hkv, G, S, T]``, hidden ones -inf, under a softcap, with sink logits ``[Hq]`` in its
    denominator."""
    if softcap is not None:
        s = (softcap * torch.tanh(s / softcap)).masked_fill(s == float("-inf"), float("-inf"))
    a = s.softmax(-1)
    if sinks is None:
        return a
    return a * torch.sigmoid(s.logsumexp(-1, keepdim=True) - sinks.to(s).view(s.shape[1], s.shape[2], 1, 1))


def score_tiles(
    q: Tensor, k: Tensor, scaling: float, *, n_sink: int, window: int | None, every: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Causal scores, some queries at a time: of those positions ``at [S]`` the scaled queries ``[B, Hkv, G, S, D]``,
    scores ``[B, Hkv, G, S, T]`` with hidden keys at -inf, and which keys a cache would have packed, ``[S, T]``."""
    tokens = k.shape[2]
    position = torch.arange(tokens, device=k.device)
    recent = min(RECENT, tokens // 4)
    grouped = q.unflatten(1, (k.shape[1], -1)) * scaling
    for at in position[recent::every].split(QUERY_TILE):
        query, age = grouped[:, :, :, at], at[:, None] - position
        hidden = age < 0 if window is None else (age < 0) | (age >= window)
        s = torch.einsum("bhgsd,bhtd->bhgst", query, k).masked_fill(hidden, float("-inf"))
        yield at, query, s, (age >= recent) & (position >= n_sink)


def mixed(weights: Tensor) -> Tensor:
    """Weights ``[.., T]`` of mean 1, a quarter of them uniform; all uniform where no row counts."""
    mean = weights.mean(-1, keepdim=True)
    return torch.where(mean > 0, UNIFORM + (1 - UNIFORM) * weights / mean.clamp(min=1e-30), 1.0)
