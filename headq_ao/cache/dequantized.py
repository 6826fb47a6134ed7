"""A layer for a model that computes attention itself: it stores packed tokens, and gives dequantized rows."""

from typing import Any

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.reading import NO_GRADIENTS
from headq_ao.cache.tiling import Tiling
from headq_ao.codecs.protocol import CodecSource
from headq_ao.layer_shape import LayerShape


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

    def prepare(self) -> None:
        """Nothing: the model attends, so that no step reads packed tokens."""

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
        self.append(*self.tiling.cut(k.detach(), v.detach()))
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
