"""What an error of a cached row costs the model: gradients by keys and values.

To second order an error ``e`` of a key or a value changes the distribution ``p`` of the next tokens by

    KL ≈ ½ eᵀ F e,   F = Jᵀ (diag(p) − p pᵀ) J = E[g gᵀ],   g = Jᵀ u,   E[u uᵀ] = diag(p) − p pᵀ

with ``J = ∂ logits / ∂k``: the Fisher information, which looks through everything that comes behind: the output
projection, later layers, the vocabulary. ``u = ∂ log p(y) / ∂ logits`` of a drawn token ``y`` is one choice of many.
``g`` is of what a cache would have packed: sinks and the newest keys of a query are read as they are.
"""

import torch
from torch import Tensor

from headq_ao.statistics.importance import attention, score_tiles


def row_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scaling: float, *, n_sink: int, window: int | None,
    sinks: Tensor | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients by packed keys and values, from that by the attention's output.

    With ``o_q = Σ_j a_qj v_j`` and ``s_qj = q·k_j``, over the pairs in which key ``j`` is packed,

        ∂L/∂k_j = Σ_q a_qj (∂L/∂o_q · (v_j − o_q)) q,   ∂L/∂v_j = Σ_q a_qj ∂L/∂o_q.

    Args:
        grad: by the output of each head, ``[B, Hq, T, Dv]``.
        q, k, v: ``[B, Hq, T, D]``, ``[B, Hkv, T, D]``, ``[B, Hkv, T, Dv]``.
        scaling, n_sink, window, sinks, softcap: as in :func:`headq_ao.statistics.importance.importance_weights`.

    Returns:
        ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, fp32.

    Example:
        >>> import torch
        >>> from headq_ao.statistics.fisher import row_gradients
        >>> q, k, v = torch.randn(1, 4, 80, 16), torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 8)
        >>> by_k, by_v = row_gradients(torch.randn(1, 4, 80, 8), q, k, v, 0.25, n_sink=4, window=None)
        >>> by_k.shape, by_v.shape, bool((by_k[:, :, :4] == 0).all())
        (torch.Size([1, 2, 80, 16]), torch.Size([1, 2, 80, 8]), True)
    """
    grad, q, k, v = (x.float() for x in (grad, q, k, v))
    by_k, by_v = torch.zeros_like(k), torch.zeros_like(v)
    grouped = grad.unflatten(1, (k.shape[1], -1))
    for at, query, s, packed in score_tiles(q, k, scaling, n_sink=n_sink, window=window, every=1):
        seen = int(at[-1]) + 1  # later keys are hidden from all of these queries
        s, packed, of_output = s[..., :seen], packed[:, :seen], grouped[:, :, :, at]
        a = attention(s, sinks, softcap)
        by_weight = torch.einsum("bhgsd,bhtd->bhgst", of_output, v[:, :, :seen])
        by_weight = by_weight - (a * by_weight).sum(-1, keepdim=True)
        a = a * packed
        by_score = a * by_weight
        if softcap is not None:
            by_score = by_score * (1 - torch.tanh(s / softcap).square())
        by_k[:, :, :seen] += torch.einsum("bhgst,bhgsd->bhtd", by_score, query)
        by_v[:, :, :seen] += torch.einsum("bhgst,bhgsd->bhtd", a, of_output)
    return by_k, by_v
