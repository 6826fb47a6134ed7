"""What one attention layer needs to write and read rows: lives on the attention module, so that it moves with it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from headq_ao.codecs.affine import affine_codec, base_codec, rotated_value_codec
from headq_ao.codecs.base import HeadBits, KeyCodec, ValueCodec, by_head
from headq_ao.codecs.linalg import centred_moment
from headq_ao.codecs.planes import PlaneCodec
from headq_ao.codecs.protocol import Codec
from headq_ao.codecs.rotation import POSITIONS, Rotation, in_model_frame
from headq_ao.codecs.side_code import with_side_code
from headq_ao.codecs.source import SourceModule
from headq_ao.codecs.whitened import (
    Readout,
    joint_metric,
    prompt_whitened_codec,
    readout_metric,
    whitened_codec,
    whitened_value_codec,
)
from headq_ao.config import HeadQConfig
from headq_ao.layer_shape import LayerShape
from headq_ao.ops.layout import TOKEN_TILE
from headq_ao.ops.types import SegmentFrame, in_vectors
from headq_ao.statistics.importance import importance_weights, mixed
from headq_ao.statistics.moments import LayerMoments, segment_tokens
from headq_ao.statistics.units import unit_of_rows

AnyCodec = TypeVar("AnyCodec", KeyCodec, ValueCodec)
WIDEST_ROW = 576  # of a key that is its value; a multiple of 16
LATER = (1, 2, 4, 8, 16)  # segments after its own, where a prompt's first queries stand for those that read a key


class LayerCodec(SourceModule):
    """Calibrated key codec and value codec of one layer, as non-persistent buffers in fp32.

    Args:
        config: of the cache.
        shape: of the layer.
        moments: the layer's calibration, or None.
        device: of the attention module.
        heads: the KV heads of the moments that are here, None: all. The codec is made for all and cut.
        bits: of all heads; None: those of the config.
        rotation: the layer's rotary embedding; None: it has none, or it cannot be told.
        positions: of the model.
        readout: of a layer whose keys are values too (:attr:`LayerShape.latent`).

    Raises:
        ValueError: where the moments are in the frame of segments, and there is no rotation.
    """

    anchor: Tensor
    outer: Tensor  # of :class:`Readout`

    def __init__(
        self,
        config: HeadQConfig,
        shape: LayerShape,
        moments: LayerMoments | None,
        device: torch.device,
        heads: slice | None = None,
        bits: HeadBits | None = None,
        rotation: Rotation | None = None,
        positions: int = POSITIONS,
        readout: Readout | None = None,
    ) -> None:
        super().__init__()
        self.shared = shape.latent is not None
        if self.shared:
            config = dataclasses.replace(config, k_bits=config.row_bits, mean_bits=None)
        for dim in set(shape.dims) if not self.shared else ():
            config.check_head_dim(dim)
        self.config = config
        self.head_dim, self.has_moments = shape.head_dim, moments is not None
        self.form, self.softcap = (shape.n_kv_heads, *shape.dims), shape.softcap
        framed = config.k_bits is not None and config.key_codec == "whitened"
        self.rotation, self.positions = rotation if framed else None, positions
        self.segment_tokens = segment_tokens(positions) if moments is None else moments.segment_tokens
        if moments is not None:
            moments = self._as_coded(moments, rotation)
        self._whole: PlaneCodec | None = None
        self.frame: KeyCodec | None = None
        self._made: dict[str, KeyCodec | ValueCodec] = {}
        self.value_frame: ValueCodec | None = None
        part = slice(None) if heads is None else heads
        self.bits = bits and HeadBits(bits.k[part], bits.v[part])
        if config.v_bits is not None and not self.shared:
            made = value_codec(config, shape, moments).with_bits(() if bits is None else bits.v)
            self.value_frame = self._keep("value", made.of_heads(part), device)
        if moments is not None and config.k_bits is not None:
            made_keys = key_codec(config, moments, () if bits is None else bits.k, readout)
            self.frame = self._keep("key", made_keys.of_heads(part), device)

        if moments is None:  # where a sequence's own codec is to lie
            self.register_buffer("anchor", torch.empty(0, dtype=torch.float32, device=device), persistent=False)
        self.scaling = 0.0 if readout is None else readout.scaling
        if moments is None and readout is not None:
            self.register_buffer("outer", readout.outer.to(device), persistent=False)

    def _as_coded(self, moments: LayerMoments, rotation: Rotation | None) -> LayerMoments:
        """The moments of keys as they are coded: affine ones as the model has them."""
        if not moments.segment_tokens or self.config.k_bits is None or self.rotation is not None:
            return moments
        if rotation is None:
            raise ValueError(
                "the calibration has keys in the frame of their segments, and how this layer turns keys with their "
                "position cannot be told here; calibrate this model"
            )
        return in_model_frame(moments, rotation)

    @property
    def segment_frame(self) -> SegmentFrame | None:
        """What keys are taken into before they are coded; None: they stay as they are."""
        if self.rotation is None or not self.frame_tokens:
            return None
        return self.rotation.frame(self.segment_tokens, self.positions, next(self.buffers()).device)

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
    def calibrated(self) -> KeyCodec | None:
        """The codec of keys under a calibration, its query map kept from step to step."""
        return None if self.frame is None else self._current("key", self.frame)

    def _current(self, side: str, frame: AnyCodec) -> AnyCodec:
        """A codec over the buffers, put together once; again where they were moved, or loaded by a hook."""
        made = self._made.get(side)
        if isinstance(made, type(frame)) and made.read is self._buffers[f"{side}_read"]:
            return made
        codec = self._kept(side, frame)
        if isinstance(codec, KeyCodec):
            mapped = codec.query_map(self.config.sign, torch.float32)
            codec = dataclasses.replace(codec, mapped=in_vectors(mapped) if self.frame_tokens else mapped)
        self._made[side] = codec
        return codec

    def start(self, batch: int, dtype: torch.dtype) -> PlaneCodec:
        """See :class:`headq_ao.codecs.protocol.CodecSource`."""
        if not self.learns:
            return self._shared()
        keys, values = self.calibrated, self.values
        if keys is None and self.config.k_bits is not None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            keys = self._unlearned(wide)
        group = self.config.block_size
        return PlaneCodec(
            keys, values, *self.form, self.config.sign, self.config.unbiased_scale, group,
            self.config.warmup(self.head_dim), self._learn, batch, keys if self.has_moments else None,
            self.segment_frame, self.shared,
        )  # fmt: skip

    @property
    def prototype(self) -> PlaneCodec:
        """See :class:`headq_ao.codecs.protocol.CodecSource`; without tensors, for each new cache asks for it."""
        group, warmup = (self.config.block_size, self.config.warmup(self.head_dim)) if self.learns else (1, 0)
        return PlaneCodec(None, None, *self.form, granularity=group, warmup=warmup, shared=self.shared)

    def current(self, codec: Codec) -> Codec:
        """See :class:`headq_ao.codecs.protocol.CodecSource`."""
        return codec if self.learns else self._shared()

    def watched(self) -> tuple[Mapping[str, Any], str, Any]:
        """See :class:`headq_ao.codecs.protocol.CodecSource`."""
        name = "value_read" if self.value_frame is not None else "key_read"
        return self._buffers, name, self._buffers[name]

    @property
    def learns(self) -> bool:
        """Whether sequences bring statistics of their own."""
        adapts = self.config.adapt == "prompt" and self.config.subtract_key_mean and self.config.k_bits is not None
        return adapts or not self.has_moments

    def restore(self, codec: Codec, own: dict[str, Tensor]) -> Codec:
        """See :class:`headq_ao.codecs.protocol.CodecSource`."""
        assert isinstance(codec, PlaneCodec)
        of_keys = {n.removeprefix("key."): t for n, t in own.items() if n.startswith("key.")}
        unit = own.get("value.unit")
        keys, values = codec.keys, codec.values
        if not self.learns and own:
            raise ValueError(f"a calibrated codec keeps nothing of a sequence, got {sorted(own)}")
        if of_keys:
            assert keys is not None
            if "side_encode" in of_keys:
                of_keys = {"side_read": of_keys["side_encode"]} | of_keys
            given: dict[str, Any] = {**of_keys, "mapped": None, "own": frozenset(of_keys)}
            keys = dataclasses.replace(keys, **given)
        if unit is not None and values is not None:
            values = dataclasses.replace(values, unit=unit)
        return dataclasses.replace(codec, keys=keys, values=values)

    def _shared(self) -> PlaneCodec:
        keys, values, found = self.calibrated, self.values, self._whole
        if found is None or found.keys is not keys or found.values is not values:
            found = PlaneCodec(
                keys, values, *self.form, self.config.sign, self.config.unbiased_scale, frame=self.segment_frame,
                shared=self.shared,
            )  # fmt: skip
            found.put_together()
            self._whole = found
        return found

    def _unlearned(self, dtype: torch.dtype) -> KeyCodec:
        """The form of a sequence's own codec before it has statistics."""
        mean = torch.zeros(1, self.form[0], self.head_dim, dtype=dtype, device=self.anchor.device)
        codec = base_codec(self.config, mean)
        rank = self.config.side_rank(self.head_dim)
        if not rank:
            return codec
        side = codec.mean.new_zeros(1, self.form[0], self.head_dim, rank)
        return dataclasses.replace(
            codec, bits=self.config.key_bits(self.head_dim), side_encode=side, side_read=side, side_step=side[:, :, 0]
        )

    def _learn(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None
    ) -> tuple[KeyCodec | None, ValueCodec | None]:
        """The codecs of sequences from their first tokens."""
        keys, values = None, self.values
        if self.has_moments:
            return self.from_prior(k), None
        if self.config.k_bits is not None:
            keys = self.from_prompt(q, k, scaling, window)
        if values is not None:
            first = v[:, :, self.config.n_sink : self.config.n_sink + self.config.block_size]
            values = dataclasses.replace(values, unit=unit_of_rows(first))
        return keys, values

    def from_prompt(self, q: Tensor, k: Tensor, scaling: float, window: int | None = None) -> KeyCodec:
        """A codec from a sequence's own first ``q [B, Hq, n, D]`` and ``k [B, Hkv, n, D]`` alone, sinks included."""
        config, n_sink = self.config, self.config.n_sink
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        q, k = q.to(dtype), k.to(dtype)
        grouped, rows = self._body(q).unflatten(1, (k.shape[1], -1)).flatten(2, 3), self._body(k)
        unit, of_queries = unit_of_rows(rows), unit_of_rows(grouped)
        rows = rows if unit is None else rows / unit.unsqueeze(-1)
        grouped = grouped if of_queries is None else grouped / of_queries.unsqueeze(-1)
        if config.key_codec == "affine":
            c_q = grouped.transpose(-1, -2) @ grouped / grouped.shape[-2]
            codec = affine_codec(config, c_q, rows.mean(-2), rows)
        else:
            of_q, of_k, _ = importance_weights(q, k, scaling, n_sink=n_sink, window=window, softcap=self.softcap)
            of_q = mixed(of_q[..., n_sink:].unflatten(1, (k.shape[1], -1)).flatten(2, 3))
            c_q, mean, variance = self._spread_moments(grouped, of_q, rows, mixed(of_k[..., n_sink:]))
            if self.shared:
                units = [u for u in (unit, of_queries) if u is not None]
                both = math.prod(units[1:], start=units[0]) if units else None
                c_q = c_q + config.readout_weight * readout_metric(self.outer, self.scaling, variance, both)
            codec = with_side_code(config, prompt_whitened_codec(config, c_q, mean, variance), c_q, rows)
        codec = dataclasses.replace(codec, unit=unit)
        names = {"mean", "side_encode", "side_read", "side_step", "spread", "q_factor", "unit"}
        return dataclasses.replace(codec, own=frozenset(names & codec.tensors().keys()))

    def from_prior(self, k: Tensor) -> KeyCodec:
        """The calibrated codec with the key mean refined by a sequence's own first keys ``[B, Hkv, n, D]``, sinks
        included: ``μ = (prior·μ_cal + Σ k) / (prior + tokens)``, ``prior`` being ``prior_tokens``."""
        codec, prior = self.calibrated, self.config.prior_tokens
        assert codec is not None
        body = self._body(k.to(torch.float64 if k.dtype == torch.float64 else torch.float32))
        total = sum(tile.sum(2) for tile in body.split(self.config.block_size, 2))
        total = total if codec.unit is None else total / codec.unit
        mean = (codec.mean * prior + total) / (prior + body.shape[2])
        return codec.replace({"mean": mean}).owning(frozenset({"mean"}))

    def _body(self, x: Tensor) -> Tensor:
        """A sequence's first tokens without the sinks, each in the frame of its segment."""
        x, frame = x[:, :, self.config.n_sink :], self.segment_frame
        return x if frame is None else frame.into(x, frame.of(torch.arange(x.shape[2], device=x.device)))

    def _spread_moments(self, q: Tensor, of_q: Tensor, k: Tensor, of_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``C_q``, mean and variances of the keys, weighted, in the frame of a segment.

        First tokens that do not fill a segment stand for the rest of it, turned on; and their queries for those that
        read the segment later: ``C_q`` is half of its own queries, half of queries 1, 2, 4, .. segments later.
        """
        tokens = k.shape[2]
        own = range(0, max(self.segment_tokens - tokens, 0) + 1, max(tokens, 1)) if self.frame_tokens else (0,)
        found = []
        for q_at, k_at in ((self._rotated(q, by), self._rotated(k, by)) for by in own):
            mean = (of_k[..., None] * k_at).mean(-2)
            square = (of_k[..., None] * (k_at - mean.unsqueeze(-2)).square()).mean(-2)
            found.append((_outer(q_at, of_q), mean, square))
        c_q, means, squares = (torch.stack(x) for x in zip(*found, strict=True))
        mean, c_q = means.mean(0), c_q.mean(0)
        if self.frame_tokens:
            later = torch.stack([_outer(self._rotated(q, self.segment_tokens * far), of_q) for far in LATER]).mean(0)
            c_q = (c_q + later) / 2
        return c_q, mean, (squares + (means - mean).square()).mean(0)

    @property
    def frame_tokens(self) -> int:  # type: ignore[override]
        """Tokens of a segment whose frame keys are coded in; 0: none."""
        return 0 if self.rotation is None else self.segment_tokens

    def _rotated(self, x: Tensor, by: int) -> Tensor:
        """Rows ``[B, H, n, D]`` as they would be so many positions later."""
        if not by:
            return x
        assert self.rotation is not None
        return self.rotation.at(x, torch.full((1, 1), by, device=x.device))

    def sketch(self) -> list[float]:
        """See :class:`SourceModule`; without a calibration, none."""
        return super().sketch() if self.has_moments else []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LayerCodec":
        """See :class:`SourceModule`."""
        super()._apply(fn)
        self._made.clear()
        self._whole = None
        return self


def _outer(q: Tensor, weight: Tensor) -> Tensor:
    """``E[w q qᵀ]``."""
    return q.transpose(-1, -2) @ (weight[..., None] * q) / q.shape[-2]


def key_codec(
    config: HeadQConfig, moments: LayerMoments, bits: tuple[int, ...] = (), readout: Readout | None = None
) -> KeyCodec:
    """The key codec of a calibrated layer; ``bits`` of each head, none: those of the config; ``readout``: where keys
    are values too."""
    unit = moments.unit("k")
    of_values = None if readout is None else config.readout_weight * joint_metric(moments, readout)
    moments = moments.in_units()
    if bits:
        alike = {b: _key_codec(dataclasses.replace(config, k_bits=b), moments, of_values) for b in set(bits)}
        codec = by_head(alike, bits)
    else:
        codec = _key_codec(config, moments, of_values)
    return dataclasses.replace(codec, unit=unit)


def _key_codec(config: HeadQConfig, moments: LayerMoments, readout: Tensor | None = None) -> KeyCodec:
    rows = moments.k_rows[: moments.k_rows.shape[0] // TOKEN_TILE * TOKEN_TILE].transpose(0, 1)[None]
    if rows.shape[2] == 0:
        raise ValueError(
            f"the calibration must hold at least {TOKEN_TILE} sampled keys per layer; calibrate on more text"
        )
    if config.key_codec == "affine":
        return affine_codec(config, moments.c_q[None], moments.k_mean[None], rows)
    mean, outer = moments.shrunk("k")
    covariance = centred_moment(mean, outer)
    base = whitened_codec(
        config, moments.key_metric[None], mean[None], covariance[None], bool(moments.segment_tokens), readout
    )
    return with_side_code(config, base, moments.shrunk_c_q[None], rows)


def value_codec(config: HeadQConfig, shape: LayerShape, moments: LayerMoments | None) -> ValueCodec:
    """The value codec of a layer; without a calibration, sequences bring a unit of their own."""
    if moments is None:
        return rotated_value_codec(config, shape.dims[1])
    unit, moments = moments.unit("v"), moments.in_units()
    if config.value_codec == "affine":
        codec = rotated_value_codec(config, shape.dims[1])
    else:
        mean, outer = moments.shrunk("v")
        codec = whitened_value_codec(config, mean[None], outer[None], moments.value_metric)
    return codec if unit is None else codec.in_unit(unit)
