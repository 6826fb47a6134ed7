"""The formulas of the model-visible errors, on tensors.

``q``, ``k``, ``v`` are what attention reads, ``k_hat`` and ``v_hat`` what a cache gives instead. With
``s_j = scaling·q·k_j`` the exact logits are ``s``, the approximate ones ``ŝ = s + δ``,
``δ_j = scaling·q·(k_hat_j − k_j)``, and ``a = softmax(s)``, ``â = softmax(ŝ)``. ``visible`` marks the keys that a query
may see; the last axis is the key axis ``T`` unless said otherwise.
"""

import math

import torch
from torch import Tensor

SERIES_BELOW = 1.0  # largest exponent up to which the KL is summed as a series of non-negative terms


def causal_window(n: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Which of ``tokens`` keys the last ``n`` positions see, at most ``window`` back, ``[n, tokens]`` bool.

    Example:
        >>> import torch
        >>> from headq_ao.evals.metrics.formulas import causal_window
        >>> causal_window(2, 4, 3, torch.device("cpu")).int()
        tensor([[1, 1, 1, 0],
                [0, 1, 1, 1]], dtype=torch.int32)
    """
    back = torch.arange(tokens - n, tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def attention_rows(
    q: Tensor, k: Tensor, k_hat: Tensor, scaling: float, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``s``, their errors ``δ`` (0 on hidden keys) and attention ``a``, each ``[B, Hq, S, T]``.

    Args:
        q: ``[B, Hq, S, D]``.
        k, k_hat: ``[B, Hkv, T, D]``.
        scaling: of the scores.
        visible: ``[S, T]``.
    """
    grouped = q.unflatten(1, (k.shape[1], -1)) * scaling
    s = (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)
    delta = (grouped @ (k_hat - k)[:, :, None].transpose(-1, -2)).flatten(1, 2).masked_fill(~visible, 0)
    return s, delta, s.masked_fill(~visible, -math.inf).softmax(-1)


def key_mse(k_hat: Tensor, k: Tensor) -> Tensor:
    """``1/D Σ_i (k_hat_i − k_i)²`` of each key, ``[.., T, D] → [.., T]``, in squared units of the keys.

    Example:
        >>> import torch
        >>> from headq_ao.evals.metrics.formulas import key_mse
        >>> key_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([2.])
    """
    return (k_hat - k).square().mean(-1)


def score_error_variance(delta: Tensor, visible: Tensor) -> Tensor:
    """``Var_j(δ_j) = 1/n Σ_j (δ_j − mean δ)²`` over the ``n`` visible keys, each counted alike, ``[.., T] → [..]``.

    The mean square of the score error once the best constant is taken off, which softmax does not see; in squared
    units of the logits.
    """
    weight = visible.to(delta.dtype)
    weight = weight / weight.sum(-1, keepdim=True)
    centred = delta - (weight * delta).sum(-1, keepdim=True)
    return (weight * centred.square()).sum(-1)


def fisher_error(a: Tensor, delta: Tensor) -> Tensor:
    """``½ Var_a(δ) = ½ (Σ_j a_j δ_j² − (Σ_j a_j δ_j)²)``, ``[.., T] → [..]``, in nats.

    The second-order term of ``KL(a ‖ softmax(s + δ))`` in ``δ`` (HeadQ, arXiv 2605.03562, withdrawn by its author).
    """
    centred = delta - (a * delta).sum(-1, keepdim=True)
    return 0.5 * (a * centred.square()).sum(-1)


def attention_kl(a: Tensor, delta: Tensor) -> Tensor:
    """``KL(a ‖ â) = log Σ_j a_j exp(δ_j) − Σ_j a_j δ_j`` with ``â = softmax(s + δ)``, ``[.., T] → [..]``, in nats.

    ``delta`` must be finite where ``a`` is 0. Small errors are summed as ``log(1 + Σ_j a_j (exp(x_j) − 1 − x_j))``,
    ``x = δ − Σ_j a_j δ_j``, whose terms are not negative: right in fp32 down to 1e-9 nats and below, where a
    difference of logarithms is mere rounding.
    """
    x = (delta - (a * delta).sum(-1, keepdim=True)).masked_fill(a == 0, 0)
    top = x.amax(-1, keepdim=True).clamp(min=0)
    if bool((top <= SERIES_BELOW).all()):
        return torch.log1p((a * (torch.expm1(x) - x)).sum(-1).clamp(min=0))
    small = torch.log1p((a * (torch.expm1(x.clamp(max=SERIES_BELOW)) - x)).sum(-1).clamp(min=0))
    large = top.squeeze(-1) + (a * (x - top).exp()).sum(-1).clamp(min=torch.finfo(x.dtype).tiny).log()
    return torch.where(top.squeeze(-1) <= SERIES_BELOW, small, large)


def logit_correlation(s: Tensor, s_hat: Tensor, visible: Tensor) -> Tensor:
    """``Σ_j (s_j − m)(ŝ_j − m̂) / sqrt(Σ_j (s_j − m)² Σ_j (ŝ_j − m̂)²)`` over the visible keys, ``[.., T] → [..]``.

    Pearson's correlation of the logits; ``m``, ``m̂`` are their means. 0 where all logits of a row are equal. Logits of
    hidden keys must be finite.
    """
    weight = visible.to(s.dtype)
    weight = weight / weight.sum(-1, keepdim=True)
    x = s - (weight * s).sum(-1, keepdim=True)
    y = s_hat - (weight * s_hat).sum(-1, keepdim=True)
    covariance, x2, y2 = ((weight * product).sum(-1) for product in (x * y, x * x, y * y))
    return covariance / (x2 * y2).sqrt().clamp(min=torch.finfo(s.dtype).tiny)


def relative_entropy(a: Tensor, visible: Tensor) -> Tensor:
    """``−Σ_j a_j log a_j / log n`` of each attention row over its ``n`` visible keys, ``[.., T] → [..]``.

    0: all on one key (also where only one is visible), 1: uniform.
    """
    entropy: Tensor = -torch.special.xlogy(a, a).sum(-1)
    return entropy / visible.sum(-1).clamp(min=2).to(a.dtype).log()


def top1_flips(s: Tensor, s_hat: Tensor, visible: Tensor) -> Tensor:
    """Whether ``argmax_j s_j ≠ argmax_j ŝ_j`` over the visible keys, ``[.., T] → [..]`` bool."""
    hidden = ~visible
    best = s.masked_fill(hidden, -math.inf).argmax(-1)
    return best != s_hat.masked_fill(hidden, -math.inf).argmax(-1)


def value_error(a: Tensor, v_hat: Tensor, v: Tensor) -> Tensor:
    """``Σ_j a_j² ‖v_hat_j − v_j‖² / D`` with ``a [.., S, T]`` and values ``[.., T, D]``, ``→ [.., S]``.

    What an error that is independent between tokens does to each coordinate of ``Σ_j a_j v_j``, in squared units of
    the values.
    """
    return (a.square() @ (v_hat - v).square().mean(-1, keepdim=True)).squeeze(-1)
