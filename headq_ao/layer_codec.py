"""What one attention layer needs to write and read rows: lives on the attention module, so that it moves with it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headq_ao.calibration import LayerMoments
from headq_ao.codec import GAUSSIAN_STEP, KeyCodec, affine_codec, base_codec, rotation_matrix
from headq_ao.config import HeadQConfig
from headq_ao.models import LayerShape
from headq_ao.ops.layout import TOKEN_TILE


@dataclass
class Epoch:
    """A range of slots, from ``begin`` on, that share a key codec; ``ready[b]`` once row ``b`` has its statistics."""

    begin: int
    per_sequence: bool
    codec: KeyCodec | None = None
    ready: list[bool] = field(default_factory=list)


class LayerCodec(nn.Module):
    """Calibrated key codec and value rotation of one layer, as non-persistent buffers in fp32.

    Args:
        config: of the cache.
        shape: of the layer.
        moments: the layer's calibration, or None.
        device: of the attention module.
        heads: the KV heads of the moments that are here, None: all. The codec is made for all and cut.
    """

    def __init__(
        self,
        config: HeadQConfig,
        shape: LayerShape,
        moments: LayerMoments | None,
        device: torch.device,
        heads: slice | None = None,
    ) -> None:
        super().__init__()
        config.check_head_dim(shape.head_dim)
        self.config = config
        rotation = rotation_matrix(shape.head_dim, config.rotation)
        self.register_buffer("rotation_v", rotation.to(device), persistent=False)
        self.frame: KeyCodec | None = None
        if moments is not None and config.k_bits is not None:
            rows = moments.k_rows[: moments.k_rows.shape[0] // TOKEN_TILE * TOKEN_TILE].transpose(0, 1)
            if rows.shape[1] == 0:
                raise ValueError(
                    f"the calibration must hold at least {TOKEN_TILE} sampled keys per layer; calibrate on more text"
                )
            codec = affine_codec(config, moments.c_q[None], moments.k_mean[None], rows[None])
            codec = codec if heads is None else codec.of_heads(heads)
            for name, tensor in codec.tensors().items():
                self.register_buffer(f"key_{name}", tensor.to(device), persistent=False)
            self.frame = codec.replace({name: torch.empty(0) for name in codec.tensors()})

    rotation_v: Tensor

    @property
    def value_options(self) -> dict[str, Any]:
        """Arguments of :func:`headq_ao.ops.encode_values` beside the rows and the rotation."""
        bits, group = self.config.v_bits, self.config.v_group_size
        assert bits is not None
        return {
            "bits": bits,
            "group_size": self.rotation_v.shape[0] if group is None else group,
            "step": 0.0 if self.config.v_zero_point else GAUSSIAN_STEP[bits],
            "unbiased": self.config.unbiased_scale,
        }

    @property
    def calibrated(self) -> KeyCodec | None:
        """The codec of epoch 0 under a calibration."""
        if self.frame is None:
            return None
        return self.frame.replace({name: getattr(self, f"key_{name}") for name in self.frame.tensors()})

    def plan(self, batch: int) -> list[Epoch]:
        """Which slots use which statistics."""
        config, head_dim = self.config, self.rotation_v.shape[0]
        if config.k_bits is None:
            return [Epoch(0, per_sequence=False)]
        if self.frame is None:
            return [Epoch(0, per_sequence=True, ready=[False] * batch)]
        shared = Epoch(0, per_sequence=False)
        if config.adapt == "off" or not config.key_gauge:
            return [shared]
        return [shared, Epoch(config.first_epoch(head_dim), per_sequence=True, ready=[False] * batch)]

    def from_prompt(self, q: Tensor, k: Tensor) -> KeyCodec:
        """A codec from a sequence's own ``q [B, Hq, n, D]`` and ``k [B, Hkv, n, D]`` alone."""
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        q, k = q.to(dtype).unflatten(1, (k.shape[1], -1)).flatten(2, 3), k.to(dtype)
        c_q = q.transpose(-1, -2) @ q / q.shape[-2]
        codec = affine_codec(self.config, c_q, k.mean(-2), k)
        own = {"mean"} if codec.side_encode is None else {"mean", "side_encode", "side_read", "side_step"}
        return dataclasses.replace(codec, own=frozenset(own))

    def from_prior(self, k_sum: Tensor, tokens: int) -> KeyCodec:
        """The calibrated codec with the key gauge refined: ``μ = (prior·μ_cal + Σ k) / (prior + tokens)``."""
        codec = self.calibrated
        assert codec is not None
        prior = self.config.prior_tokens
        mean = (codec.mean * prior + k_sum) / (prior + tokens)
        return dataclasses.replace(codec, mean=mean, own=frozenset({"mean"}))

    def with_own(self, own: dict[str, Tensor], dtype: torch.dtype) -> KeyCodec:
        """What :meth:`from_prompt` or :meth:`from_prior` made, from the tensors that belong to its sequences.

        ``side_read`` may be left out where it is ``side_encode``.
        """
        codec = self.calibrated
        if codec is None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            codec = base_codec(self.config, own["mean"].to(wide))
        if "side_encode" in own:
            own = {"side_read": own["side_encode"]} | own
            codec = dataclasses.replace(codec, bits=self.config.key_bits(own["mean"].shape[-1]))
        return dataclasses.replace(codec, **own, own=frozenset(own))  # type: ignore[arg-type]

    def sketch(self) -> list[float]:
        """A few numbers that tell calibrated codecs apart: a random projection of each head's unit-norm tensors.

        They agree to 1e-5 between machines whose eigenvectors differ in rounding; without a calibration, none.
        """
        codec = self.calibrated
        if codec is None:
            return []
        numbers = []
        for name in ("mean", "side_encode", "side_read", "side_step"):
            tensor = getattr(codec, name)
            if tensor is not None:
                x = tensor[0].detach().cpu().double().flatten(1)
                direction = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                numbers += (x @ direction / x.norm(dim=1).clamp(min=1e-30)).tolist()
        return numbers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LayerCodec":
        """Follow the model to its device, but stay fp32 when the model is cast."""
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self
