"""HeadQ for layers whose queries nobody sees: a model that computes attention itself gives keys and values only."""

import torch
from torch import Tensor

from headq_ao.codecs.base import KeyCodec
from headq_ao.codecs.layer_codec import LayerCodec


def isotropic_queries(k: Tensor) -> Tensor:
    """Queries ``[B, G·Hkv, T, D]`` for keys ``[B, Hkv, T, D]`` with ``E[q qᵀ] = I``: the axes in turn, times ``√D``.

    Example:
        >>> q = isotropic_queries(torch.zeros(1, 1, 32, 16))
        >>> torch.equal(q[0, 0].T @ q[0, 0] / 32, torch.eye(16))
        True
    """
    b, h, t, d = k.shape
    groups = -(-d // max(t, 1))
    axis = torch.arange(groups * t, device=k.device).view(t, groups).t() % d
    q = torch.eye(d, dtype=k.dtype, device=k.device)[axis] * d**0.5  # [G, T, D]
    each: Tensor = q.repeat(h, 1, 1).expand(b, -1, -1, -1)
    return each


class UnseenQueries(LayerCodec):
    """A :class:`LayerCodec` under ``C_q = I`` and even attention."""

    def from_prompt(self, q: Tensor, k: Tensor, scaling: float, window: int | None = None) -> KeyCodec:
        """See :class:`LayerCodec`; ``q`` and ``scaling`` are not read."""
        return super().from_prompt(isotropic_queries(k), k, 0.0, window)
