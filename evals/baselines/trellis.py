"""Trellis-coded tokens: rotated as they come, or in HeadQ's coordinates and under its metric."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headq_ao import headq_config
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.linalg import rotation_matrix
from headq_ao.codecs.registry import LayerContext, register
from headq_ao.codecs.tokenwise import Form, Held, TokenCodec
from headq_ao.evals.baselines import trellis_code
from headq_ao.evals.baselines.codecs import pack_bits, unpack_bits
from headq_ao.ops.rounding import half, scale_by_gain
from headq_ao.ops.types import SegmentFrame

SPREADS = (0.85, 1.0, 1.2)  # scales that are tried under a metric, in units of the RMS
PLAIN_SPREADS = (1.0,)  # and without one
BITS = (1, 2, 4)  # those that divide the window of eight


@dataclass(frozen=True)
class Basis:
    """Coordinates ``y = (x / unit − mean) encode`` in which tokens are coded: ``x̂ = unit (mean + ŷ readᵀ)``.

    Leading dimensions are ``[1, Hkv or 1]``; ``hessian [.., D, D]``: of the error of the coordinates, or None.
    """

    encode: Tensor
    read: Tensor
    mean: Tensor | None = None
    hessian: Tensor | None = None
    unit: Tensor | None = None

    def tensors(self, side: str) -> dict[str, Tensor]:
        """Those that there are, by ``side_name``."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {f"{side}_{name}": t for name, t in pairs if t is not None}

    def into(self, x: Tensor) -> Tensor:
        """Coordinates of tokens ``[B, Hkv, n, D]``."""
        x = x if self.unit is None else x / self.unit.unsqueeze(-2)
        return (x if self.mean is None else x - self.mean.unsqueeze(-2)) @ self.encode

    def back(self, y: Tensor) -> Tensor:
        """Tokens of coordinates."""
        x = y @ self.read.mT
        x = x if self.mean is None else x + self.mean.unsqueeze(-2)
        return x if self.unit is None else x * self.unit.unsqueeze(-2)


class Trellis(TokenCodec):
    """Tokens over their RMS, in a basis, as circular rows of a bit-shift trellis, with a scale in fp16:
    ``bits + 16 / D`` bits an element.

    Args:
        bits: of a side's coordinates; None keeps it in full precision.
        bases: by side.
        frame: that keys are taken into first, or None.
        unbiased: whether scales make ``⟨y, ŷ⟩ = ‖y‖²`` (as HeadQ's), or give the least error.

    Raises:
        ValueError: on bits that the trellis does not have, or no side to code.
    """

    def __init__(
        self, bits: dict[str, int | None], bases: dict[str, Basis], frame: SegmentFrame | None, unbiased: bool
    ) -> None:
        if all(b is None for b in bits.values()):
            raise ValueError("k_bits and v_bits are both None: nothing would be packed; give at least one of them")
        if wrong := [b for b in bits.values() if b is not None and b not in BITS]:
            raise ValueError(f"a trellis has {', '.join(map(str, BITS))} bits, got {', '.join(map(str, wrong))}")
        self.bits, self.frame, self.unbiased = bits, frame, unbiased
        self.fixed = {name: t for side, basis in bases.items() for name, t in basis.tensors(side).items()}

    def basis(self, side: str) -> Basis:
        """Over the model's tensors as they are now."""
        start = f"{side}_"
        return Basis(**{n.removeprefix(start): t for n, t in self.fixed.items() if n.startswith(start)})

    def forms(self) -> dict[str, Form]:
        """See :class:`TokenCodec`."""
        found, d = {}, self.shape.head_dim
        for side, bits in self.bits.items():
            if bits is None:
                found[f"{side}.exact"] = Form(side, (d,))
            else:
                found[f"{side}.codes"] = Form(side, (d * bits // 8,), torch.uint8)
                found[f"{side}.scale"] = Form(side, (), torch.float16)
        return found

    def encode(self, k: Tensor, v: Tensor, position: Tensor) -> dict[str, Tensor]:
        """See :class:`TokenCodec`."""
        found = {}
        for (side, bits), x in zip(self.bits.items(), (k, v), strict=True):
            if bits is None:
                found[f"{side}.exact"] = x
                continue
            x = self._turned(x.float(), position, False) if side == "key" else x.float()
            codes, scale = self._coded(self.basis(side), x, bits)
            found |= {f"{side}.codes": pack_bits(codes, bits), f"{side}.scale": scale.half()}
        return found

    def _coded(self, basis: Basis, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Symbols ``[B, Hkv, n, D]`` and scales ``[B, Hkv, n]``: of the scales that are tried, those of least error."""
        y, h = basis.into(x), basis.hessian
        rms, whole = y.square().mean(-1, keepdim=True).sqrt(), form(y, h, y)
        best: list[Tensor] = []
        for spread in PLAIN_SPREADS if h is None else SPREADS:
            scale = half(rms * spread)
            symbols = self._symbols(y / scale, h, bits)
            y_hat = scale * trellis_code.decode(symbols, bits)
            along, size = form(y, h, y_hat), form(y_hat, h, y_hat)
            kept = scale_by_gain(scale, whole, along) if self.unbiased else scale_by_gain(scale, along, size)
            gain = kept / scale
            new = [whole - 2 * gain * along + gain.square() * size, kept, symbols]
            best = [torch.where(new[0] < best[0], a, b) for a, b in zip(new, best, strict=True)] if best else new
        return best[2], best[1].squeeze(-1)

    @staticmethod
    def _symbols(rows: Tensor, hessian: Tensor | None, bits: int) -> Tensor:
        """Of ``[B, Hkv, n, D]`` in units of the scale."""
        if hessian is None:
            return trellis_code.encode(rows.flatten(0, -2), bits).view(rows.shape)
        of_heads = (trellis_code.encode(rows[:, i].flatten(0, 1), bits, hessian[0, i]) for i in range(rows.shape[1]))
        return torch.stack([s.view(len(rows), *rows.shape[2:]) for s in of_heads], 1)

    def _turned(self, k: Tensor, position: Tensor, back: bool) -> Tensor:
        """Keys into the frame of their segments, or out of it."""
        if self.frame is None:
            return k
        return self.frame.into(k, self.frame.of(position - self.n_sink)[:, None].expand(k.shape[:-1]), back)

    def _decoded(self, side: str, held: Held) -> Tensor:
        bits = self.bits[side]
        if bits is None:
            return held[f"{side}.exact"].float()
        y = trellis_code.decode(unpack_bits(held[f"{side}.codes"], bits), bits)
        return self.basis(side).back(y * held[f"{side}.scale"].float()[..., None])

    def decode_keys(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        return self._turned(self._decoded("key", held), held.position, True)

    def decode_values(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        return self._decoded("value", held)


def form(x: Tensor, hessian: Tensor | None, y: Tensor) -> Tensor:
    """``xᵀ H y`` of each token, ``[.., 1]``."""
    return ((x if hessian is None else x @ hessian) * y).sum(-1, keepdim=True)


def signed_rotation(head_dim: int, seed: int) -> Tensor:
    """Random signs and a Hadamard rotation, ``[1, 1, D, D]``."""
    signs = torch.randint(2, (head_dim,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return (signs[:, None] * rotation_matrix(head_dim))[None, None]


@register("trellis")
def trellis(
    layer: LayerContext, *, k_bits: int | None, v_bits: int | None, basis: Literal["rotated", "headq"] = "rotated",
    whitening: float = 0.75, error_feedback: bool = True, unbiased: bool = True, seed: int = 0,
) -> TokenCodec:  # fmt: skip
    """``basis="rotated"``: signs and a Hadamard rotation. ``"headq"``: HeadQ's coordinates from a calibration, with
    its ``whitening`` and, with ``error_feedback``, its metric."""
    bits = {"key": k_bits, "value": v_bits}
    if basis not in ("rotated", "headq"):
        raise ValueError(f"basis must be 'rotated' or 'headq', got {basis!r}")
    if basis == "rotated":
        rotation = signed_rotation(layer.shape.head_dim, seed)
        return Trellis(bits, dict.fromkeys(bits, Basis(rotation, rotation)), None, unbiased)
    if layer.framed is None:
        raise ValueError(
            "HeadQ's basis is made of a calibration, and there is none; calibrate, or take basis='rotated'"
        )
    config = headq_config(
        k_bits=None if k_bits is None else 2, v_bits=None if v_bits is None else 2, whitening=whitening,
        error_feedback=error_feedback, seed=seed,
    )  # fmt: skip
    turns = layer.rotation if layer.framed.segment_tokens else None
    made = LayerCodec(config, layer.shape, layer.framed, layer.device, rotation=turns, positions=layer.positions)
    bases = {}
    for side, codec in (("key", made.calibrated), ("value", made.values)):
        if codec is not None:
            unit = None if side == "value" else codec.unit
            bases[side] = Basis(codec.encode, codec.read, codec.mean, codec.hessian, unit)
    return Trellis(bits, bases, made.segment_frame, unbiased)
