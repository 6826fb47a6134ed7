"""What one layer of the packed cache holds: exact rows, packed rows, epochs of codecs, and counts."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headq_ao.codec import KeyCodec, Run, ValueCodec, runs_of
from headq_ao.config import HeadQConfig
from headq_ao.layer_codec import Epoch, LayerCodec
from headq_ao.models import LayerShape
from headq_ao.ops import Rows
from headq_ao.ops.decode_attention.cpu_kernel import Step
from headq_ao.state import ExactRows, RowCounts, RowStore, Span
from headq_ao.tensors import HeadQKeyTensor, HeadQValueTensor


@dataclass
class Incoming:
    """What the model's pre-hook found about the next call: slots seen before it, its length, each row's real span."""

    seen: int = 0
    length: int = 0
    spans: list[Span] | None = None
    custom: bool = False  # the caller's own 4-D masks, which may say anything of cached tokens
    hidden: list[int] | None = None  # how many of its oldest cached tokens each sequence's 2-D mask hides
    weights: bool = False  # attention weights are wanted; some models do not tell their attention
    views: dict[Any, Any] = field(default_factory=dict)  # what attention found in the call's masks, for all layers
    cache: Any = None  # a weak reference to the cache whose call it is

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"views": {}, "cache": None}  # which refer to masks, and to the cache that was copied


class LayerState:
    """Plain tensors and per-row counts; :mod:`headq_ao.closing` writes them, :mod:`headq_ao.reading` reads them."""

    dtype: torch.dtype  # of exact rows; set by the first update, like the device
    device: torch.device
    last_spans: list[Span]  # of the last update: real tokens per row, exact rows held before it, slots
    last_counts: list[int]
    last_slots: int
    scaling: float  # of the scores; set by the first commit

    def __init__(self, config: HeadQConfig, shape: LayerShape, incoming: Incoming | None = None) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.incoming = incoming if incoming is not None else Incoming()
        self.is_sliding = shape.sliding_window is not None
        self.sliding_window = shape.sliding_window
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.keys = self.values = None
        self.seen = 0
        self.rows: list[RowCounts] = []
        self.exact = ExactRows()
        self.store_k, self.store_v = RowStore(), RowStore()
        self.valid: Tensor | None = None
        self.epochs: list[Epoch] = []
        self.k_sum: Tensor | None = None
        self.value_codec: ValueCodec | None = None  # with the sequences' own unit, where they need one
        self.rows_read = [0, 0]  # packed, all
        self.pending = False  # an update that no commit has followed
        self.step: Step | None = None  # and the tensors that it was made for
        self.step_of: tuple[Tensor, ...] = ()

    @functools.cached_property
    def packed_sides(self) -> tuple[str, ...]:
        """Which of ``"key"`` and ``"value"`` are coded; the other side's rows are kept as they are."""
        bits = {"key": self.config.k_bits, "value": self.config.v_bits}
        return tuple(side for side, n in bits.items() if n is not None)

    @functools.cached_property
    def exact_capacity(self) -> int:
        """Exact rows to hold in the steady state: sinks, window, and one block in the making."""
        return self.config.n_sink + self._kept + self.config.block_size

    @property
    def _kept(self) -> int:
        """Newest tokens that stay exact; where nothing is packed, also what a crop by that many makes visible again."""
        window = self.sliding_window if self._never_packs else None
        return self.config.residual_length + (window or 0)

    @property
    def _never_packs(self) -> bool:
        """A sliding window that the exact rows cover: older tokens are let go, not packed."""
        return self.sliding_window is not None and self.sliding_window <= self.config.residual_length

    def _codec(self, e: int, codec: LayerCodec, index: Tensor | None = None) -> KeyCodec | None:
        key_codec = self.epochs[e].codec if self.epochs[e].per_sequence else codec.calibrated
        return key_codec if key_codec is None or index is None else key_codec.index(index)

    def _values(self, codec: LayerCodec, index: Tensor | None = None) -> ValueCodec | None:
        if self.value_codec is None:
            return codec.values
        return self.value_codec if index is None else self.value_codec.index(index)

    def _epoch_end(self, e: int) -> int:
        return self.epochs[e + 1].begin if e + 1 < len(self.epochs) else 2**62

    def _epoch_range(self, e: int) -> tuple[int, int]:
        longest = max(r.slots for r in self.rows)
        return min(self.epochs[e].begin, longest), min(self._epoch_end(e), longest)

    def _used_epochs(self) -> list[int]:
        longest = max([r.slots for r in self.rows])
        return [e for e, epoch in enumerate(self.epochs) if epoch.begin < min(self._epoch_end(e), longest)]

    def packed_rows(self, e: int, codec: LayerCodec, end: int | None = None) -> list[tuple[Run, Rows, Rows]]:
        """The rows of epoch ``e`` as :func:`headq_ao.ops.decode_attention` reads them, run by run of heads.

        ``end``: of the slots, where not of those in use.
        """
        begin, in_use = self._epoch_range(e)
        end = in_use if end is None else end
        k, v = (iter(store.view(begin, end)) for store in (self.store_k, self.store_v))
        found = []
        for run in runs_of(self._codec(e, codec), self._values(codec)):
            keys, values = packed(k, run.keys), packed(v, run.values)
            found.append((run, keys, values))
        return found

    def segments(self, e: int, codec: LayerCodec) -> list[tuple[Tensor, Tensor]]:
        """The packed rows of epoch ``e`` as tensors ``[B, Hkv, T, D]``, run by run of heads: subclasses, or plain rows
        on an exact side."""
        found = []
        for run, k, v in self.packed_rows(e, codec):
            keys, values = k.exact, v.exact
            if run.keys is not None:
                assert k.scale is not None
                keys = HeadQKeyTensor.from_planes(k.planes, k.scale, k.zero, run.keys, self.dtype)
            if run.values is not None:
                assert v.scale is not None
                values = HeadQValueTensor.from_planes(v.planes, v.scale, v.zero, run.values, self.dtype)
            assert keys is not None and values is not None
            found.append((keys, values))
        return found

    def dequantize(self, codec: LayerCodec) -> tuple[Tensor, Tensor]:
        """All rows as the model sees them, ``[B, Hkv, T, D]``, for sequences of equal length without holes."""
        if len({r.key() for r in self.rows}) != 1 or self.valid is not None:
            raise ValueError("dequantize needs sequences of equal length and no deep crop")
        n_sink, held = self.config.n_sink, self.rows[0].exact
        parts: list[tuple[Tensor, Tensor]] = []
        assert self.exact.k is not None and self.exact.v is not None
        if self.rows[0].slots:
            for e in self._used_epochs():
                keys, values = zip(*self.segments(e, codec), strict=True)
                k = [x.dequantize(self.config.sign) if isinstance(x, HeadQKeyTensor) else x for x in keys]
                v = [x.dequantize() if isinstance(x, HeadQValueTensor) else x for x in values]
                parts.append((over_heads(k), over_heads(v)))
        ends = [(x[:, :, :n_sink], x[:, :, n_sink:held]) for x in (self.exact.k, self.exact.v)]
        return tuple(  # type: ignore[return-value]
            torch.cat([sink, *(p[i] for p in parts), window], 2) for i, (sink, window) in enumerate(ends)
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor held for the sequences."""
        rest = [] if self.valid is None else [self.valid]
        rows = [t for t in (self.exact.k, self.exact.v) if t is not None]
        return rows + self.store_k.tensors + self.store_v.tensors + self.own_bases() + self.moments() + rest

    def own_bases(self) -> list[Tensor]:
        """Tensors of codecs that belong to the sequences."""
        codecs = [e.codec for e in self.epochs if e.codec is not None]
        of_keys = [t for codec in codecs for name, t in codec.tensors().items() if name in codec.own]
        return of_keys + self.own_of_values()

    def own_of_values(self) -> list[Tensor]:
        """Those of them that serve the values."""
        return [] if self.value_codec is None else self.value_codec.own_tensors()

    def moments(self) -> list[Tensor]:
        """Running sums, and the queries kept while a sequence's own statistics are awaited."""
        return [t for t in (self.k_sum, self.exact.q) if t is not None]


def packed(tensors: Iterator[Tensor], codec: KeyCodec | ValueCodec | None) -> Rows:
    """Rows of one run of heads, from the next of a store's tensors; exact where there is no codec."""
    if codec is None:
        return Rows(exact=next(tensors))
    planes, scale = list(itertools.islice(tensors, codec.planes)), next(tensors)
    return Rows(planes=planes, bits=codec.row_bits, scale=scale, zero=next(tensors) if codec.has_zero else None)


def over_heads(parts: Sequence[Tensor]) -> Tensor:
    """What the runs of a layer give, ``[B, heads of the run, ..]`` each, for all heads."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
