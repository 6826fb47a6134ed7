"""What one attention layer needs to write and read rows: lives on the attention module, so that it moves with it."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from headq_ao.allocate import HeadBits
from headq_ao.calibration import LayerMoments
from headq_ao.codec import (
    KeyCodec,
    ValueCodec,
    affine_codec,
    base_codec,
    by_head,
    centred_moment,
    prompt_visible_codec,
    rotated_value_codec,
    visible_codec,
    visible_value_codec,
    with_side_code,
)
from headq_ao.config import HeadQConfig
from headq_ao.models import LayerShape
from headq_ao.ops.layout import TOKEN_TILE
from headq_ao.rotary import Turns
from headq_ao.seen import mixed, seen_weights
from headq_ao.units import unit_of_rows

AnyCodec = TypeVar("AnyCodec", KeyCodec, ValueCodec)


@dataclass
class Epoch:
    """A range of slots, from ``begin`` on, that share a key codec; ``ready[b]`` once row ``b`` has its statistics."""

    begin: int
    per_sequence: bool
    codec: KeyCodec | None = None
    ready: list[bool] = field(default_factory=list)


class ModelNumber:
    """Tells apart, in this process, the models that HeadQ was put on; a copy of a model gets a number of its own."""

    def __init__(self) -> None:
        self.number = next(_numbers)

    def __reduce__(self) -> tuple[type["ModelNumber"], tuple[()]]:
        return ModelNumber, ()


_numbers = itertools.count()


class LayerCodec(nn.Module):
    """Calibrated key codec and value codec of one layer, as non-persistent buffers in fp32.

    Args:
        config: of the cache.
        shape: of the layer.
        moments: the layer's calibration, or None.
        device: of the attention module.
        heads: the KV heads of the moments that are here, None: all. The codec is made for all and cut.
        bits: of all heads; None: those of the config.
        turns: what a sequence's own statistics are spread over; None: they stay where they were taken.
    """

    turn_cos: Tensor
    turn_sin: Tensor
    turn_partner: Tensor
    call_options: frozenset[str] = frozenset()  # of the model: see headq_ao.arguments

    def __init__(
        self,
        config: HeadQConfig,
        shape: LayerShape,
        moments: LayerMoments | None,
        device: torch.device,
        heads: slice | None = None,
        bits: HeadBits | None = None,
        turns: Turns | None = None,
    ) -> None:
        super().__init__()
        config.check_head_dim(shape.head_dim)
        self.config = config
        self.model = ModelNumber()  # of this layer alone, until quantize_ gives all layers of a model the same
        self.head_dim, self.has_moments = shape.head_dim, moments is not None
        self.frame: KeyCodec | None = None
        self._made: dict[str, KeyCodec | ValueCodec] = {}
        self.value_frame: ValueCodec | None = None
        part = slice(None) if heads is None else heads
        self.bits = bits and HeadBits(bits.k[part], bits.v[part])
        if config.v_bits is not None:
            made = value_codec(config, shape, moments).with_bits(() if bits is None else bits.v)
            self.value_frame = self._keep("value", made.of_heads(part), device)
        if moments is not None and config.k_bits is not None:
            made_keys = key_codec(config, moments, () if bits is None else bits.k)
            self.frame = self._keep("key", made_keys.of_heads(part), device)

        self.turning = turns is not None
        for name, tensor in () if turns is None else vars(turns).items():
            self.register_buffer(f"turn_{name}", tensor.to(device), persistent=False)

    def _keep(self, side: str, codec: AnyCodec, device: torch.device) -> AnyCodec:
        """Register the tensors of a codec as buffers; what is left of it without them."""
        for name, tensor in codec.tensors().items():
            self.register_buffer(f"{side}_{name}", tensor.to(device), persistent=False)
        return codec.replace({name: torch.empty(0, dtype=torch.float32, device="cpu") for name in codec.tensors()})

    def _kept(self, side: str, frame: AnyCodec) -> AnyCodec:
        return frame.replace({name: getattr(self, f"{side}_{name}") for name in frame.tensors()})

    @property
    def values(self) -> ValueCodec | None:
        """How values are coded; None where they are exact."""
        return None if self.value_frame is None else self._current("value", self.value_frame)

    @property
    def own_value_unit(self) -> bool:
        """Whether values are coded in a unit that each sequence brings: there is no calibration to tell it."""
        return self.value_frame is not None and not self.has_moments

    @property
    def calibrated(self) -> KeyCodec | None:
        """The codec of epoch 0 under a calibration, its query map kept from step to step."""
        return None if self.frame is None else self._current("key", self.frame)

    def _current(self, side: str, frame: AnyCodec) -> AnyCodec:
        """A codec over the buffers, put together once; anew where they were moved, or loaded by a hook."""
        codec: Any = self._made.get(side)
        if codec is None or codec.read is not self._buffers[f"{side}_read"]:
            codec = self._kept(side, frame)
            if isinstance(codec, KeyCodec):
                codec = dataclasses.replace(codec, mapped=codec.query_map(self.config.sign, torch.float32))
            self._made[side] = codec
        return codec

    def plan(self, batch: int) -> list[Epoch]:
        """Which slots use which statistics."""
        config, head_dim = self.config, self.head_dim
        if config.k_bits is None:
            return [Epoch(0, per_sequence=False)]
        if self.frame is None:
            return [Epoch(0, per_sequence=True, ready=[False] * batch)]
        shared = Epoch(0, per_sequence=False)
        if config.adapt == "off" or not config.key_gauge:
            return [shared]
        return [shared, Epoch(config.first_epoch(head_dim), per_sequence=True, ready=[False] * batch)]

    def from_prompt(self, q: Tensor, k: Tensor, scaling: float, window: int | None = None) -> KeyCodec:
        """A codec from a sequence's own first ``q [B, Hq, n, D]`` and ``k [B, Hkv, n, D]`` alone, sinks included."""
        config, n_sink = self.config, self.config.n_sink
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        q, k = q.to(dtype), k.to(dtype)
        grouped, rows = q[:, :, n_sink:].unflatten(1, (k.shape[1], -1)).flatten(2, 3), k[:, :, n_sink:]
        unit, of_queries = unit_of_rows(rows), unit_of_rows(grouped)
        rows = rows if unit is None else rows / unit.unsqueeze(-1)
        grouped = grouped if of_queries is None else grouped / of_queries.unsqueeze(-1)
        if config.key_codec == "affine":
            c_q = grouped.transpose(-1, -2) @ grouped / grouped.shape[-2]
            codec = affine_codec(config, c_q, rows.mean(-2), rows)
        else:
            of_q, of_k, _ = seen_weights(q, k, scaling, n_sink=n_sink, window=window)
            of_q = mixed(of_q[..., n_sink:].unflatten(1, (k.shape[1], -1)).flatten(2, 3))
            c_q, mean, variance = self._spread_moments(grouped, of_q, rows, mixed(of_k[..., n_sink:]))
            codec = with_side_code(config, prompt_visible_codec(config, c_q, mean, variance), c_q, rows)
        codec = dataclasses.replace(codec, unit=unit)
        names = {"mean", "side_encode", "side_read", "side_step", "spread", "seen", "unit"}
        return dataclasses.replace(codec, own=frozenset(names & codec.tensors().keys()))

    def _spread_moments(self, q: Tensor, of_q: Tensor, k: Tensor, of_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``C_q``, mean and variances of the keys, weighted, over the turns; :mod:`headq_ao.rotary` says why."""
        found = []
        for turned_q, turned_k in zip(self._turned(q), self._turned(k), strict=True):
            c_q = turned_q.transpose(-1, -2) @ (of_q[..., None] * turned_q) / q.shape[-2]
            mean = (of_k[..., None] * turned_k).mean(-2)
            square = (of_k[..., None] * (turned_k - mean.unsqueeze(-2)).square()).mean(-2)
            found.append((c_q, mean, square))
        c_q, means, squares = (torch.stack(x) for x in zip(*found, strict=True))
        mean = means.mean(0)
        return c_q.mean(0), mean, (squares + (means - mean).square()).mean(0)

    def _turned(self, x: Tensor) -> list[Tensor]:
        return Turns(self.turn_cos, self.turn_sin, self.turn_partner).turned(x) if self.turning else [x]

    def from_prior(self, k_sum: Tensor, tokens: int) -> KeyCodec:
        """The calibrated codec with the key gauge refined: ``μ = (prior·μ_cal + Σ k) / (prior + tokens)``."""
        codec = self.calibrated
        assert codec is not None
        prior = self.config.prior_tokens
        k_sum = k_sum if codec.unit is None else k_sum / codec.unit
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
        # the map that is kept is that of the calibration's mean
        return dataclasses.replace(codec, **own, own=frozenset(own), mapped=None)  # type: ignore[arg-type]

    def sketch(self) -> list[float]:
        """A few numbers that tell calibrated codecs apart: a random projection of each head's unit-norm tensors.

        They agree to 1e-5 between machines whose eigenvectors differ in rounding; without a calibration, none.
        """
        numbers = []
        for tensor in self.buffers() if self.has_moments else ():
            x = tensor[0].detach().cpu().double().flatten(1)
            generator = torch.Generator("cpu").manual_seed(0)
            direction = torch.randn(x.shape[1], generator=generator, dtype=torch.float64, device="cpu")
            numbers += (x @ direction / x.norm(dim=1).clamp(min=1e-30)).tolist()
        return numbers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LayerCodec":
        """Follow the model to its device, but stay fp32 when the model is cast."""
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self._made.clear()
        return self


def key_codec(config: HeadQConfig, moments: LayerMoments, bits: tuple[int, ...] = ()) -> KeyCodec:
    """The key codec of a calibrated layer; ``bits`` of each head, none: those of the config."""
    unit, moments = moments.unit("k"), moments.in_units()
    if bits:
        alike = {b: _key_codec(dataclasses.replace(config, k_bits=b), moments) for b in set(bits)}
        codec = by_head(alike, bits)
    else:
        codec = _key_codec(config, moments)
    return dataclasses.replace(codec, unit=unit)


def _key_codec(config: HeadQConfig, moments: LayerMoments) -> KeyCodec:
    rows = moments.k_rows[: moments.k_rows.shape[0] // TOKEN_TILE * TOKEN_TILE].transpose(0, 1)[None]
    if rows.shape[2] == 0:
        raise ValueError(
            f"the calibration must hold at least {TOKEN_TILE} sampled keys per layer; calibrate on more text"
        )
    if config.key_codec == "affine":
        return affine_codec(config, moments.c_q[None], moments.k_mean[None], rows)
    mean, outer = moments.shrunk("k")
    covariance = centred_moment(mean, outer)
    base = visible_codec(config, moments.shrunk_c_q[None], mean[None], covariance[None])
    return with_side_code(config, base, moments.shrunk_c_q[None], rows)


def value_codec(config: HeadQConfig, shape: LayerShape, moments: LayerMoments | None) -> ValueCodec:
    """The value codec of a layer; without a calibration, sequences bring a unit of their own."""
    if moments is None:
        return rotated_value_codec(config, shape.head_dim)
    unit, moments = moments.unit("v"), moments.in_units()
    if config.value_codec == "affine":
        codec = rotated_value_codec(config, shape.head_dim)
    else:
        codec = visible_value_codec(config, *(x[None] for x in moments.shrunk("v")))
    return codec if unit is None else codec.in_unit(unit)
