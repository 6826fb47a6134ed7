"""A layer for a model that computes attention itself: it stores packed tokens, and gives dequantized rows."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from headq_ao.ambient import mode_neutral
from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.reading import NO_GRADIENTS
from headq_ao.codecs.protocol import CodecSource
from headq_ao.layer_shape import LayerShape

WIDEST, STEP = 256, 16  # coordinates of a head that a codec stores: at most, and a multiple of


@dataclass(frozen=True)
class Tiling:
    """How a model's rows are cut into heads that a codec can store: ``heads`` of ``dims``, of keys and of values.

    A head of more than 256 coordinates is cut into several, and what is no multiple of 16 is filled up with zeros.

    Attributes:
        keys, values: heads and coordinates as the model has them.
        heads: what a codec sees.
        dims: coordinates of a key and of a value that a codec sees.

    Example:
        >>> Tiling.of((1, 512), (1, 64))
        Tiling(keys=(1, 512), values=(1, 64), heads=2, dims=(256, 32))
        >>> Tiling.of((4, 20), (4, 20)).dims
        (32, 32)
    """

    keys: tuple[int, int]
    values: tuple[int, int]
    heads: int
    dims: tuple[int, int]

    @classmethod
    def of(cls, keys: tuple[int, int], values: tuple[int, int]) -> Self:
        """The coarsest that serves: heads of the model stay apart where keys and values have as many."""
        base = keys[0] if keys[0] == values[0] else 1
        widths = [heads * dim // base for heads, dim in (keys, values)]
        pieces = max(-(-width // WIDEST) for width in widths)
        key, value = (-(-width // (pieces * STEP)) * STEP for width in widths)
        return cls(keys, values, base * pieces, (key, value))

    def shape(self, sliding_window: int | None) -> LayerShape:
        """What a codec is made for."""
        key, value = self.dims
        return LayerShape(self.heads, self.heads, key, sliding_window, None if value == key else value)

    def cut(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the model ``[B, H, S, D]`` as a codec sees them, ``[B, heads, S, d]``."""
        together = self.keys[0] != self.values[0]
        made = []
        for x, dim in zip((k, v), self.dims, strict=True):
            x = x.transpose(1, 2).flatten(2).unsqueeze(1) if together else x
            pieces = self.heads // x.shape[1]
            x = functional.pad(x, (0, pieces * dim - x.shape[3])).unflatten(3, (pieces, dim))
            made.append(x.transpose(2, 3).flatten(1, 2))
        return made[0], made[1]

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The other way."""
        together = self.keys[0] != self.values[0]
        made = []
        for x, (heads, dim) in zip((k, v), (self.keys, self.values), strict=True):
            base = 1 if together else heads
            x = x.unflatten(1, (base, -1)).transpose(2, 3).flatten(3)[..., : heads * dim // base]
            made.append(x.squeeze(1).unflatten(2, (heads, dim)).transpose(1, 2) if together else x)
        return made[0], made[1]


class DequantizedLayer(PackedLayer):
    """Pages, sinks and window as :class:`PackedLayer` has them; :meth:`update` returns all rows, dequantized, for the
    length of the model's own attention. Slots are its tokens: padding too is stored, and hidden by the model's masks.

    Args:
        tiling: of the model's rows.
        shape, source, batch, check_finite: see :class:`PackedLayer`; the shape is the tiling's.
    """

    def __init__(
        self, tiling: Tiling, shape: LayerShape, source: CodecSource, batch: Batch, check_finite: bool | None = None
    ) -> None:
        self.tiling = tiling
        super().__init__(shape, source, batch, check_finite)

    @property
    def forms(self) -> dict[str, tuple[int, int]]:
        """See :class:`PackedLayer`; of queries, which nobody sees, there is one number."""
        return super().forms | {"q": (1, 1)}

    @property
    def elements(self) -> dict[str, int]:
        """See :class:`PackedLayer`: what fills up is none of the model's."""
        return {
            "key": self.tiling.keys[0] * self.tiling.keys[1],
            "value": self.tiling.values[0] * self.tiling.values[1],
        }

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, H, S, D]`` as the model has them.

        Returns:
            All keys and all values; of a sliding window the last ``W − 1`` before the call, and the call's own.

        Raises:
            ValueError: where they do not fit the cache, are not finite, or have gradients to be kept; the cache then
                holds what it held before.
        """
        lengths = self.batch.lengths
        forms = [(x.shape[1], x.shape[3]) for x in (k, v)]
        if forms != [self.tiling.keys, self.tiling.values]:
            if self.call != lengths.calls:  # an engine has announced it
                self.batch.take_back()
            raise ValueError(
                f"this layer caches keys and values of {self.tiling.keys} and {self.tiling.values} heads and "
                f"coordinates, got {forms}; use a cache made for this model"
            )
        self._append(*self.tiling.cut(k.detach(), v.detach()))
        try:
            if lengths.first:
                self.count_first()
                rows = k, v
            elif torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
                raise ValueError(NO_GRADIENTS)
            else:
                rows = self._rows(k, v)
            self.commit(k.new_zeros(len(k), 1, k.shape[2], 1))
        except BaseException:
            self.batch.take_back()
            raise
        return rows

    def _rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, position = self.rows_of_model()
        n, total = k.shape[2], self.batch.lengths.seen
        packed = self.batch.lengths.packed()[0] if self.packs else 0
        if self.sliding_window is not None:
            first = max(total - n - self.sliding_window + 1, 0)
            skipped = position.numel() - (total - first)  # sinks, and what a crop may want again
            keys, values = keys[:, :, skipped:], values[:, :, skipped:]
            packed = min(packed, max(self.batch.lengths.schedule.n_sink + packed - first, 0))
        assert self.reads is not None
        self.reads += torch.tensor([packed, keys.shape[2]], device=self.reads.device) * (n * len(k))
        return keys.to(k.dtype), values.to(v.dtype)

    @mode_neutral
    def rows_of_model(self) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`in_order`, as the model has its rows."""
        k, v, position = self.in_order()
        return *self.tiling.join(k, v), position
