"""One exact forward pass, listened to; and a cache layer fed with what was heard."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headq_ao.attention import NAME
from headq_ao.calibrate import RECORDER
from headq_ao.layer_codec import LayerCodec
from headq_ao.own_config import OwnConfigs

PROJECTIONS = ("o_proj", "dense", "c_proj", "out_proj")


def check_rows(model: Any, rows: Tensor, prefill: int, chunk: int) -> None:
    """Raise ValueError where :func:`headq_ao.evals.score_error.score_error` could not start."""
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
    token = RECORDER.set(_Listener(receive))  # type: ignore[arg-type]
    try:
        model.set_attn_implementation(NAME)
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        RECORDER.reset(token)
        configs.put_back(model)


class _Listener:
    """What the attention function calls on dense calls."""

    def __init__(self, receive: Callable[[int, Tensor, Tensor, Tensor], None]) -> None:
        self.receive = receive

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> None:
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
                return w(x) - w(torch.zeros_like(x[:1, :1]))

            return project
    raise ValueError(f"{type(module).__name__} has no output projection named {', '.join(PROJECTIONS)}")


def rows_as_read(layer: Any, codec: LayerCodec, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """``(k_hat, v_hat)`` at the positions of ``k``, ``v`` as the model reads them now, and the packed positions' range.

    Rows that a sliding window has let go, which no query sees, are given as the exact ones.
    """
    k_hat, v_hat = layer.dequantize(codec)
    first = layer.config.n_sink
    gone = k.shape[2] - k_hat.shape[2]
    if gone:
        k_hat, v_hat = (
            torch.cat([hat[:, :, :first], exact[:, :, first : first + gone], hat[:, :, first:]], 2)
            for hat, exact in ((k_hat, k), (v_hat, v))
        )
    return (k_hat, v_hat), (first + gone, first + gone + layer.rows[0].packed)
