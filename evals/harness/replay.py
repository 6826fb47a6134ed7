"""One exact forward pass, listened to; and a cache layer fed with what was heard."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headq_ao.cache.layer import PackedLayer
from headq_ao.calibration.observers import RECORDER, AttentionObserver
from headq_ao.integrations.transformers.attention import NAME
from headq_ao.integrations.transformers.own_config import OwnConfigs

PROJECTIONS = ("o_proj", "dense", "c_proj", "out_proj")


def check_rows(model: Any, rows: Tensor, prefill: int, chunk: int) -> None:
    """Raise ValueError where :func:`headq_ao.evals.metrics.score_error.score_error` could not start."""
    if not hasattr(model, "_headq"):
        raise ValueError(f"{type(model).__name__} has no HeadQ cache; call quantize_(model, headq_config()) first")
    if model.training:
        raise ValueError("the model is in train mode, where dropout hides the errors; call model.eval() first")
    if rows.ndim != 2 or rows.is_floating_point() or not 0 < prefill < rows.shape[1]:
        raise ValueError(
            f"rows must be token ids [N, T] with T above prefill = {prefill} > 0, got {tuple(rows.shape)}, {rows.dtype}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def each_layer(model: Any, ids: Tensor, receive: Callable[[int, Tensor, Tensor, Tensor], None]) -> None:
    """One exact forward over ``ids [B, T]``; ``receive(layer, q, k, v)`` gets each layer's states as they pass.

    With or without HeadQ on the model, which is left as it was; nothing is kept between layers.
    """
    configs = OwnConfigs(model)
    token = RECORDER.set(_Listener(receive))
    try:
        model.set_attn_implementation(NAME)
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        RECORDER.reset(token)
        configs.put_back(model)


class _Listener(AttentionObserver):
    """What the attention function calls on dense calls."""

    def __init__(self, receive: Callable[[int, Tensor, Tensor, Tensor], None]) -> None:
        self.receive = receive

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *given: Any) -> None:
        """One layer's states."""
        self.receive(layer, q, k, v)


def attention_scaling(module: nn.Module, head_dim: int) -> float:
    """What the module multiplies scores with."""
    scaling = getattr(module, "scaling", None)
    return head_dim**-0.5 if scaling is None else float(scaling)


def output_projection(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """``x → W_O x`` of an attention module, bias left out, whatever its class and however it stores its weight.

    Raises:
        ValueError: where no known name is found.
    """
    for name in PROJECTIONS:
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module):
            dtype = next((p.dtype for p in projection.parameters() if p.is_floating_point()), torch.float32)

            def project(x: Tensor, w: nn.Module = projection, dtype: torch.dtype = dtype) -> Tensor:
                x = x.to(dtype)
                without_bias: Tensor = w(x) - w(torch.zeros_like(x[:1, :1]))
                return without_bias

            return project
    raise ValueError(f"{type(module).__name__} has no output projection named {', '.join(PROJECTIONS)}")


def tokens_as_read(layer: PackedLayer, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Keys and values of all tokens as the call under way attends them, between ``update`` and ``commit`` of a layer.

    Args:
        layer: of equally long sequences.
        k, v: all tokens in full precision, ``[B, Hkv, T, D]``.

    Returns:
        ``k_hat``, ``v_hat`` like ``k``, ``v``, and the range of positions that are read from pages where a query sees
        them. Tokens that a sliding window has let go, which no query sees, are those of ``k``, ``v``.
    """
    *read, position = layer.in_order()
    k_hat, v_hat = (exact.index_copy(2, position, x.to(exact.dtype)) for exact, x in zip((k, v), read, strict=True))
    first = layer.window.n_sink
    return (k_hat, v_hat), (first, first + (int(layer.counts.read[0]) if layer.packs else 0))
