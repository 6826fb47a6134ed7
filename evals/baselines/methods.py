"""The quantizers that HeadQ is compared with, registered as codecs: :data:`METHODS`."""

import math

from torch import Tensor

from headq_ao.codecs.registry import LayerContext, register
from headq_ao.codecs.tokenwise import Form, Held, TokenCodec
from headq_ao.evals.baselines.codecs import Affine, Codec, Frame, LloydMax, LowRank, query_span


class Pair(TokenCodec):
    """A codec of keys and one of values; None keeps that side in full precision.

    Args:
        layer: its layer, with moments where a codec takes a mean off.
        keys, values: the codecs.
        query_rank, query_weight: key errors are kept out of that many directions of the prompt's queries (SQuat); 0:
            they are not.

    Raises:
        ValueError: where there is no codec, or one does not fit the layer.
    """

    def __init__(
        self, layer: LayerContext, keys: Codec | None, values: Codec | None, query_rank: int = 0,
        query_weight: float = 0.0,
    ) -> None:  # fmt: skip
        if keys is None and values is None:
            raise ValueError("k_bits and v_bits are both None: nothing would be packed; give at least one of them")
        for codec in (keys, values):
            if codec is not None:
                codec.check_head_dim(layer.shape.head_dim)
        self.sides: dict[str, Codec | None] = {"key": keys, "value": values}
        self.query_rank, self.query_weight = query_rank, query_weight
        self.granularity = math.lcm(*(codec.unit for codec in (keys, values) if codec is not None))
        self.prompt = query_rank > 0
        if layer.moments is not None and getattr(keys, "subtract_mean", False):
            self.fixed = {"key_mean": layer.moments.k_mean[None].float()}

    def forms(self) -> dict[str, Form]:
        """See :class:`TokenCodec`."""
        d, found = self.shape.head_dim, {}
        for side, codec in self.sides.items():
            if codec is None:
                found[f"{side}.exact"] = Form(side, (d,))
            else:
                found |= {f"{side}.{name}": Form(side, *form) for name, form in codec.forms(d).items()}
        return found

    def encode(self, k: Tensor, v: Tensor, position: Tensor) -> dict[str, Tensor]:
        """See :class:`TokenCodec`."""
        found = {}
        for (side, codec), x in zip(self.sides.items(), (k, v), strict=True):
            if codec is None:
                found[f"{side}.exact"] = x
            else:
                names = codec.forms(self.shape.head_dim)
                coded = zip(names, codec.encode(x, self.frame(side)), strict=True)
                found |= {f"{side}.{name}": t for name, t in coded}
        return found

    def frame(self, side: str) -> Frame:
        """What the codec of a side may know."""
        if side == "value":
            return Frame()
        return Frame(self.fixed.get("key_mean"), self.own.get("key.span"), self.query_weight)

    def _side(self, side: str, held: Held) -> list[Tensor]:
        codec = self.sides[side]
        names = ["exact"] if codec is None else list(codec.forms(self.shape.head_dim))
        return [held[f"{side}.{name}"] for name in names]

    def _decoded(self, side: str, held: Held) -> Tensor:
        codec, packed = self.sides[side], self._side(side, held)
        return packed[0].float() if codec is None else codec.decode(packed, self.frame(side))

    def decode_keys(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        return self._decoded("key", held)

    def decode_values(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        return self._decoded("value", held)

    def scores(self, q: Tensor, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        codec = self.sides["key"]
        return super().scores(q, held) if codec is None else codec.scores(q, self._side("key", held), self.frame("key"))

    def see_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, position: Tensor
    ) -> tuple[TokenCodec, Tensor | None]:
        """Take the directions of the prompt's queries, sinks and padding left out."""
        body = (position >= self.n_sink)[:, None, :, None]
        span = query_span(q.masked_fill(~body, 0.0), self.shape.n_kv_heads, self.query_rank)
        return self.with_own(key_span=span), None


@register("kivi")
def kivi(
    layer: LayerContext, *, k_bits: int | None, v_bits: int | None, k_group: int = 32, v_group: int = 32
) -> TokenCodec:
    """Keys per channel over ``k_group`` tokens, values per token over ``v_group`` coordinates (KIVI, 2402.02750)."""
    return Pair(layer, *_kivi(k_bits, v_bits, k_group, v_group))


def _kivi(k_bits: int | None, v_bits: int | None, k_group: int, v_group: int) -> tuple[Affine | None, Affine | None]:
    keys = None if k_bits is None else Affine(k_bits, k_group, per_channel=True)
    return keys, None if v_bits is None else Affine(v_bits, v_group)


@register("per_token")
def per_token(layer: LayerContext, *, k_bits: int | None, v_bits: int | None, group: int = 64) -> TokenCodec:
    """Keys and values per token over ``group`` coordinates."""
    keys, values = (None if bits is None else Affine(bits, group) for bits in (k_bits, v_bits))
    return Pair(layer, keys, values)


@register("hadamard")
def hadamard(
    layer: LayerContext, *, k_bits: int | None, v_bits: int | None, group: int = 64, subtract_mean: bool = False
) -> TokenCodec:
    """Per token in a Hadamard basis (QuaRot, 2404.00456); ``subtract_mean``: keys without the calibrated mean."""
    keys = None if k_bits is None else Affine(k_bits, group, rotate=True, subtract_mean=subtract_mean)
    return Pair(layer, keys, None if v_bits is None else Affine(v_bits, group, rotate=True))


@register("turboquant")
def turboquant(
    layer: LayerContext, *, k_bits: int | None, v_bits: int | None, subtract_mean: bool = False, seed: int = 0
) -> TokenCodec:
    """Norm, random rotation, Lloyd-Max levels (TurboQuant, 2504.19874, without its residual sketch)."""
    keys = None if k_bits is None else LloydMax(k_bits, seed, subtract_mean)
    return Pair(layer, keys, None if v_bits is None else LloydMax(v_bits, seed))


@register("squat")
def squat(
    layer: LayerContext, *, k_bits: int | None, v_bits: int | None, k_group: int = 32, v_group: int = 32,
    rank: int = 16, weight: float = 10.0,
) -> TokenCodec:  # fmt: skip
    """KIVI whose key errors are kept out of the prompt's own query subspace while coding (SQuat, 2503.24358)."""
    return Pair(layer, *_kivi(k_bits, v_bits, k_group, v_group), query_rank=rank, query_weight=weight)


@register("gear")
def gear(
    layer: LayerContext, *, k_bits: int | None, v_bits: int | None, k_group: int = 64, v_group: int = 64,
    rank: int = 2, block: int = 128,
) -> TokenCodec:  # fmt: skip
    """KIVI and a low-rank fp16 factorization of each block's residual (GEAR, 2403.05527, without its outliers)."""
    bases = _kivi(k_bits, v_bits, k_group, v_group)
    keys, values = (None if base is None else LowRank(base, rank, block) for base in bases)
    return Pair(layer, keys, values)


METHODS = ("kivi", "per_token", "hadamard", "turboquant", "squat", "gear")
