"""Tensor subclasses: packed key rows, packed value rows, and the handle that ``update()`` returns to attention."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchao.utils import TorchAOBaseTensor

from headq_ao.codec import KeyCodec, ValueCodec, dequantize_value_rows
from headq_ao.ops import Rows
from headq_ao.ops.layout import PIECES, TOKEN_TILE, granule, plane_pieces

if TYPE_CHECKING:
    from headq_ao.cache import HeadQCacheLayer


class _PackedTensor(TorchAOBaseTensor):
    """What packed keys and values share: the outer shape ``[B, Hkv, T, D]`` over plain inner tensors."""

    def dequantize(self) -> Tensor:
        raise NotImplementedError

    def inner(self) -> dict[str, Tensor]:
        """Inner tensors by name."""
        return {name: getattr(self, name) for name in self.__tensor_flatten__()[0]}

    @property
    def packed_nbytes(self) -> int:
        """Bytes of all inner tensors (the outer ``nbytes`` is that of the shape, not of the storage)."""
        return sum(t.nbytes for t in self.inner().values())

    def _map(self, fn: Callable[[str, Tensor], Tensor]) -> "_PackedTensor":
        names, attributes = self.__tensor_flatten__()
        inner = {name: fn(name, getattr(self, name)) for name in names}
        return type(self).__tensor_unflatten__(inner, attributes, None, None)

    def __repr__(self, **_: Any) -> str:
        shape, nbytes = tuple(self.shape), self.packed_nbytes
        return f"{type(self).__name__}(shape={shape}, dtype={self.dtype}, packed_nbytes={nbytes})"

    def _tokens_per_entry(self, name: str) -> int | None:
        """Tokens that one entry of dimension 2 of an inner tensor covers; None where it has no token dimension."""
        raise NotImplementedError


@_PackedTensor.implements(torch.ops.aten.slice.Tensor)
def _slice(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, dim, start, stop, step = (*args, *(0, None, None, 1)[len(args) - 1 :])[:5]
    dim = dim % x.ndim
    if step != 1 or dim not in (0, 1, 2):
        raise NotImplementedError(
            f"packed rows are sliced along batch, head or token, step 1; got dim {dim}, step {step}"
        )
    start, stop, _ = slice(start, stop).indices(x.shape[dim])
    stop = max(start, stop)

    def cut(name: str, t: Tensor) -> Tensor:
        per_entry = x._tokens_per_entry(name)
        if dim == 2:
            if per_entry is None:
                return t
            if start % per_entry or stop % per_entry:
                raise ValueError(f"token slices must fall on multiples of {per_entry}, got {start}:{stop}")
            return t[:, :, start // per_entry : stop // per_entry]
        return t if t.ndim < 3 or t.shape[dim] == 1 != x.shape[dim] else t.narrow(dim, start, stop - start)

    return x._map(cut)


@_PackedTensor.implements(torch.ops.aten.index_select.default)
def _index_select(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, dim, index = args
    if dim % x.ndim != 0:
        raise NotImplementedError(f"packed rows are indexed along the batch, dim 0, got dim {dim}")
    return x._map(lambda _, t: t if t.ndim < 3 or t.shape[0] == 1 != x.shape[0] else t.index_select(0, index))


@_PackedTensor.implements(torch.ops.aten._to_copy.default)
def _to_copy(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, to = args[0], args[0]._get_to_kwargs(*args[1:], **kwargs)
    if not to["dtype"].is_floating_point:
        raise ValueError(f"packed rows stand for floating-point values, got {to['dtype']}; dequantize() first")
    names, attributes = x.__tensor_flatten__()
    inner = {name: getattr(x, name).to(to["device"], non_blocking=to["non_blocking"]) for name in names}
    return type(x).__tensor_unflatten__(inner, attributes | {"dtype": to["dtype"]}, None, None)


class HeadQKeyTensor(_PackedTensor):
    """Packed key rows of one epoch, shape ``[B, Hkv, T, D]``.

    Inner tensors: planes of 4, 2 and 1 bits, ``scale`` and optional ``zero_point`` ``[B, Hkv, T]`` fp16, and the
    codec that reads them (``mean``, ``read``, ``step``, ``side_read``, ``side_step``, …).

    Example:
        >>> import torch
        >>> from headq_ao.codec import affine_codec
        >>> from headq_ao.config import HeadQConfig
        >>> from headq_ao.tensors import HeadQKeyTensor
        >>> k = torch.randn(1, 2, 32, 64)
        >>> codec = affine_codec(HeadQConfig(), torch.eye(64).expand(1, 2, 64, 64), k.mean(2), k)
        >>> packed = HeadQKeyTensor.from_hp(k, codec)
        >>> packed.shape, packed.dequantize().shape
        (torch.Size([1, 2, 32, 64]), torch.Size([1, 2, 32, 64]))
    """

    tensor_data_names: ClassVar = ["scale", "mean", "encode", "read", "step"]
    optional_tensor_data_names: ClassVar = [
        "plane_4bit",
        "plane_2bit",
        "plane_1bit",
        "zero_point",
        "weight",
        "side_encode",
        "side_read",
        "side_step",
        "metric",
        "spread",
        "seen",
        "unit",
    ]
    tensor_attribute_names: ClassVar = ["bits", "dtype"]

    def __new__(cls, scale, mean, encode, read, step, bits, dtype, **optional):
        shape = (*scale.shape, mean.shape[-1])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=scale.device)
        inner = dict(scale=scale, mean=mean, encode=encode, read=read, step=step, bits=tuple(bits))
        for name, value in inner.items():
            setattr(self, name, value)
        for name in cls.optional_tensor_data_names:
            setattr(self, name, optional.get(name))
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def from_hp(cls, k: Tensor, codec: KeyCodec, unbiased: bool = True) -> "HeadQKeyTensor":
        """Pack exact keys ``[B, Hkv, T, D]``, ``T`` a multiple of 16."""
        planes, scale, zero = codec.encode_rows(k, unbiased)
        return cls.from_planes(planes, scale, zero, codec, k.dtype)

    @classmethod
    def from_planes(
        cls, planes: list[Tensor], scale: Tensor, zero: Tensor | None, codec: KeyCodec, dtype: torch.dtype
    ) -> "HeadQKeyTensor":
        """Wrap planes that :func:`headq_ao.ops.encode_keys` made."""
        names = (f"plane_{w}bit" for w in plane_pieces(codec.bits))
        return cls(
            scale,
            bits=codec.bits,
            dtype=dtype,
            zero_point=zero,
            **codec.tensors(),
            **dict(zip(names, planes, strict=True)),
        )

    @property
    def planes(self) -> list[Tensor]:
        """Planes in storage order, widest first."""
        return [getattr(self, f"plane_{w}bit") for w in plane_pieces(self.bits)]

    @property
    def codec(self) -> KeyCodec:
        """The codec over the inner tensors."""
        return KeyCodec(
            self.mean,
            self.encode,
            self.read,
            self.step,
            self.weight,
            self.side_encode,
            self.side_read,
            self.side_step,
            self.bits,
            metric=self.metric,
            spread=self.spread,
            seen=self.seen,
            unit=self.unit,
        )

    def rows(self) -> Rows:
        """The form that :func:`headq_ao.ops.decode_attention` reads."""
        return Rows(planes=self.planes, bits=self.bits, scale=self.scale, zero=self.zero_point)

    def dequantize(self, sign: int = 1) -> Tensor:
        """``k_hat + sign · P z`` in the outer dtype."""
        return self.codec.dequantize(self.planes, self.scale, self.zero_point, sign).to(self.dtype)

    def _tokens_per_entry(self, name: str) -> int | None:
        return TOKEN_TILE if name.startswith("plane") else 1 if name in ("scale", "zero_point") else None


class HeadQValueTensor(_PackedTensor):
    """Packed value rows, shape ``[B, Hkv, T, D]``: planes of the low and the high bits, scale, zero, basis and mean.

    Example:
        >>> import torch
        >>> from headq_ao.tensors import HeadQValueTensor
        >>> from headq_ao.codec import rotated_value_codec
        >>> from headq_ao.config import HeadQConfig
        >>> v, codec = torch.randn(1, 2, 32, 64), rotated_value_codec(HeadQConfig(v_bits=4), 64)
        >>> packed = HeadQValueTensor.from_planes(*codec.encode_rows(v), codec, v.dtype)
        >>> bool((packed.dequantize() - v).square().mean() < 0.02)
        True
    """

    tensor_data_names: ClassVar = ["scale", "read", "plane_low"]
    optional_tensor_data_names: ClassVar = ["plane_high", "zero_point", "mean"]
    tensor_attribute_names: ClassVar = ["bits", "dtype"]

    def __new__(cls, scale, read, plane_low, bits, dtype, plane_high=None, zero_point=None, mean=None):
        shape = (*scale.shape[:3], read.shape[-1])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=scale.device)
        self.scale, self.read, self.plane_low, self.bits = scale, read, plane_low, bits
        self.plane_high, self.zero_point, self.mean = plane_high, zero_point, mean
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def from_planes(
        cls, planes: list[Tensor], scale: Tensor, zero: Tensor | None, codec: ValueCodec, dtype: torch.dtype
    ) -> "HeadQValueTensor":
        """Wrap planes that ``codec`` made."""
        high = planes[1] if len(planes) > 1 else None
        return cls(scale, codec.reader, planes[0], codec.bits, dtype, high, zero, codec.mean)

    @property
    def planes(self) -> list[Tensor]:
        """Planes in storage order, low bits first."""
        return [self.plane_low] if self.plane_high is None else [self.plane_low, self.plane_high]

    def rows(self) -> Rows:
        """The form that :func:`headq_ao.ops.decode_attention` reads."""
        return Rows(planes=self.planes, bits=(self.bits,), scale=self.scale, zero=self.zero_point)

    def dequantize(self) -> Tensor:
        """``v_hat`` in the outer dtype and the model's basis."""
        v_hat = dequantize_value_rows(self.planes, self.bits, self.scale, self.zero_point, self.read, self.mean)
        return v_hat.to(self.dtype)

    def _tokens_per_entry(self, name: str) -> int | None:
        widths = PIECES[self.bits]
        return {"plane_low": granule(widths[0]), "plane_high": granule(widths[-1]), "read": None, "mean": None}.get(
            name, 1
        )


class HeadQHistory(torch.Tensor):
    """What :meth:`HeadQCacheLayer.update` hands to attention, as keys and as values: all cached rows, readable by
    "headq" only.

    ``layer`` is the cache layer, ``new_keys`` and ``new_values`` the exact rows of this call ``[B, Hkv, S, D]``.
    """

    layer: "HeadQCacheLayer"
    new_keys: Tensor
    new_values: Tensor

    @staticmethod
    def __new__(cls, layer: "HeadQCacheLayer", keys: Tensor, values: Tensor, tokens: int) -> "HeadQHistory":
        shape = (*keys.shape[:2], tokens, keys.shape[3])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=keys.dtype, device=keys.device)
        self.layer, self.new_keys, self.new_values = layer, keys, values
        return self

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"HeadQHistory(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        for history in tree_leaves((args, kwargs)):
            if isinstance(history, HeadQHistory):
                history.layer.take_back()
        raise RuntimeError(
            f"{func} was called on the packed HeadQ cache, which only the 'headq' attention can read; "
            "keep attn_implementation='headq' while the cache is in use, or call restore_(model) and start a new "
            "cache; a model whose attention does more with cached keys and values than pass them on cannot be served"
        )
