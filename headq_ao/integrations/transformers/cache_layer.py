"""A layer of the packed cache, as transformers drives it."""

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from headq_ao.cache.layer import PackedLayer


class HeadQCacheLayer(PackedLayer, CacheLayerMixin):
    """:class:`headq_ao.cache.layer.PackedLayer` by the names that transformers calls."""

    is_compileable = False
    is_croppable = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room comes with the first update."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All slots seen and the new ones; attention over packed tokens masks by counts, not by this mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Slots that have come through this layer, padding included, as transformers counts."""
        self.batch.settle()
        return self.seen

    def get_max_length(self) -> int:
        """The sliding window, or the capacity of a cache that has one, or -1: no limit."""
        capacity = self.batch.capacity
        return self.sliding_window if self.sliding_window is not None else -1 if capacity is None else capacity

    def offload(self) -> None:
        raise NotImplementedError("a HeadQ cache stays on its device; it is small: drop offloading=True")

    prefetch = offload

    def reset(self) -> None:
        """Forget everything; :meth:`HeadQCache.reset` forgets what layers share."""
        self.clear()

    def rows_of_model(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[B, Hkv, T, D]`` as attention reads them, and their positions ``[T]``."""
        return self.in_order()
