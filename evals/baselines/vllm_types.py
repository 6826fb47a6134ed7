"""What vLLM 0.32 offers as types of its KV cache below 8 bits, by its names: ``int4_per_token_head`` and TurboQuant.

Their formats and numbers, not their code; HeadQ's cache, with its sinks and window, takes the place of vLLM's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.codecs.linalg import rotation_matrix
from headq_ao.codecs.registry import LayerContext, register
from headq_ao.codecs.tokenwise import TokenCodec
from headq_ao.evals.baselines.codecs import Affine, Codec, Frame, pack_bits, sphere_levels, unpack_bits
from headq_ao.evals.baselines.methods import Pair
from headq_ao.evals.baselines.trellis import signed_rotation

EXACT_LAYERS = 2  # at each end of a model, which TurboQuant's presets leave in the model's dtype
NORMAL = 4096  # dimensions in which a coordinate of a random direction is all but normal
# bits of keys (8: fp8) and of values, and whether the levels of a key are brought to its norm
PRESETS = {
    "turboquant_k8v4": (8, 4, False),
    "turboquant_4bit_nc": (4, 4, True),
    "turboquant_k3v4_nc": (3, 4, True),
    "turboquant_3bit_nc": (3, 3, True),
}


@dataclass(frozen=True)
class Int4(Codec):
    """Signs and a Hadamard rotation, then 4-bit codes between least and largest coordinate of the token.

    ``x̂ = R (c − z) σ``: the scale is a float32 whose four lowest bits hold the zero ``z``: ``4 + 32 / D`` bits.
    """

    seed: int = 0

    def forms(self, head_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        return {"codes": ((head_dim // 2,), torch.uint8, 1), "scale": ((), torch.float32, 1)}

    def encode(self, x: Tensor, frame: Frame) -> list[Tensor]:
        y = x.float() @ signed_rotation(x.shape[-1], self.seed)[0, 0].to(x.device)
        low, high = y.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-6)
        zero = (-low / scale).round().clamp(0, 15)
        codes = (y / scale + zero).round().clamp(0, 15)
        bits = scale.view(torch.int32) & -16 | zero.to(torch.int32)
        return [pack_bits(codes, 4), bits.view(torch.float32).squeeze(-1)]

    def decode(self, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        codes, stored = packed
        bits = stored.contiguous().view(torch.int32)[..., None]
        y = (unpack_bits(codes, 4).float() - (bits & 15)) * (bits & -16).view(torch.float32)
        rotation = signed_rotation(y.shape[-1], self.seed)[0, 0].to(y.device)
        return y @ rotation.T


@dataclass(frozen=True)
class Levels(Codec):
    """The norm in fp16, a Hadamard rotation and the levels of least squared error of a normal coordinate.

    Args:
        bits: per coordinate.
        renormalize: bring the levels of a token to unit norm before the norm is put back.
    """

    bits: int
    renormalize: bool

    def forms(self, head_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        return {"codes": ((head_dim * self.bits // 8,), torch.uint8, 1), "norm": ((), torch.float16, 1)}

    def _levels(self, like: Tensor) -> Tensor:
        levels: Tensor = sphere_levels(NORMAL, self.bits).to(like.device) * (NORMAL / like.shape[-1]) ** 0.5
        return levels

    def encode(self, x: Tensor, frame: Frame) -> list[Tensor]:
        x = x.float()
        norm = x.norm(dim=-1, keepdim=True)
        y = x / (norm + 1e-8) @ rotation_matrix(x.shape[-1]).to(x.device)
        levels = self._levels(x)
        return [pack_bits(torch.bucketize(y, (levels[1:] + levels[:-1]) / 2), self.bits), norm.squeeze(-1).half()]

    def decode(self, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        codes, norm = packed
        index = unpack_bits(codes, self.bits).long()
        y = self._levels(index)[index]
        if self.renormalize:
            y = y / y.norm(dim=-1, keepdim=True)
        return y * norm.float()[..., None] @ rotation_matrix(y.shape[-1]).to(y.device).T


@dataclass(frozen=True)
class Cast(Codec):
    """Tokens in another dtype, without a scale: fp8 (e4m3), or half precision."""

    dtype: torch.dtype

    def forms(self, head_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        return {"cast": ((head_dim,), self.dtype, 1)}

    def encode(self, x: Tensor, frame: Frame) -> list[Tensor]:
        most = torch.finfo(self.dtype).max
        return [x.clamp(-most, most).to(self.dtype)]

    def decode(self, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        return packed[0].float()


@register("int4_per_token_head")
def int4_per_token_head(layer: LayerContext) -> TokenCodec:
    """vLLM's ``kv_cache_dtype="int4_per_token_head"``."""
    return Pair(layer, Int4(), Int4())


def preset(layer: LayerContext, name: str) -> TokenCodec:
    """A preset of vLLM's TurboQuant; the first and last layers are in half precision."""
    key_bits, value_bits, renormalize = PRESETS[name]
    ends = min(EXACT_LAYERS, layer.layers // 2)
    if not ends <= layer.index < layer.layers - ends:
        return Pair(layer, Cast(torch.float16), Cast(torch.float16))
    keys = Cast(torch.float8_e4m3fn) if key_bits == 8 else Levels(key_bits, renormalize)
    return Pair(layer, keys, Affine(value_bits, layer.shape.head_dim))


@register("turboquant_k8v4")
def turboquant_k8v4(layer: LayerContext) -> TokenCodec:
    """vLLM's preset: fp8 keys, 4-bit values."""
    return preset(layer, "turboquant_k8v4")


@register("turboquant_4bit_nc")
def turboquant_4bit_nc(layer: LayerContext) -> TokenCodec:
    """vLLM's preset: 4-bit keys brought to their norm, 4-bit values."""
    return preset(layer, "turboquant_4bit_nc")


@register("turboquant_k3v4_nc")
def turboquant_k3v4_nc(layer: LayerContext) -> TokenCodec:
    """vLLM's preset: 3-bit keys brought to their norm, 4-bit values."""
    return preset(layer, "turboquant_k3v4_nc")


@register("turboquant_3bit_nc")
def turboquant_3bit_nc(layer: LayerContext) -> TokenCodec:
    """vLLM's preset: 3-bit keys brought to their norm, 3-bit values."""
    return preset(layer, "turboquant_3bit_nc")


TYPES = ("int4_per_token_head", *PRESETS)
