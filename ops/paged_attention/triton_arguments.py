"""The arguments of ``paged_attention`` as its Triton kernels take them."""

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from headq_ao.ops.types import PagedKV, Readers, SegmentFrame, Visible

MOST_SPLITS, LEAST_TOKENS = 512, 128  # of a split


def backend() -> str:
    """What a launch compiles for: "cuda", "hip" or Triton's "interpreter"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return str(triton.runtime.driver.active.get_current_target().backend)


def dense_indices(kv: PagedKV) -> PagedKV:
    """The cache with lengths, block table and segments as kernels read them: contiguous."""
    names = ("table", "segment", "packed", "held", "total", "new_start", "window_table")
    given = ((n, getattr(kv, n)) for n in names)
    copies = {name: x.contiguous() for name, x in given if x is not None and not x.is_contiguous()}
    return replace(kv, **copies) if copies else kv


def in_full(kv: PagedKV) -> tuple[tuple[Any, ...] | None, int]:
    """Where an engine's pages hold tokens in full precision, as kernels take it (``owned``), None for a ring; and the
    most tokens of the window that a sequence reads."""
    size, table = kv.window_k.shape[2], kv.window_table
    if table is None:
        return None, size - kv.n_sink
    newest = table.shape[1] * size if kv.newest is None else min(kv.newest, table.shape[1] * size)
    sinks = (kv.sink_k, kv.sink_v) if kv.n_sink else (kv.window_k, kv.window_v)  # none: nobody looks there
    return (table, table.stride(0), size, tokens(*sinks)), newest


def split_count(length: int, programs: int, held: int, device: torch.device) -> int:
    """Splits with which the programs just fill the device, all at once: a second round would wait for the first."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(processors * held // max(programs, 1), length // LEAST_TOKENS, MOST_SPLITS))


def strides_of_shared(x: Tensor, dimensions: int) -> tuple[int, ...]:
    """The first strides of a tensor, by which all index a dimension of one."""
    return tuple(0 if n == 1 else stride for stride, n in zip(x.stride()[:dimensions], x.shape, strict=False))


def tokens(k: Tensor | None, v: Tensor | None) -> tuple[Any, ...]:
    """Keys and values ``[B, H, n, D]``, each followed by its strides of batch, head and token."""
    assert k is not None and v is not None
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    return k, k.stride()[:3], v, v.stride()[:3]


def ranges(visible: Visible | None) -> tuple[Tensor | None, Tensor | None]:
    """Which positions queries see, as kernels read them; None where the lengths say it."""
    return (None, None) if visible is None else (visible.low.contiguous(), visible.high.contiguous())


def of_keys(readers: Readers) -> Tensor:
    """The query map with the columns of a row side by side."""
    assert readers.query_map is not None
    return readers.query_map if readers.query_map.stride(4) == 1 else readers.query_map.contiguous()


def of_values(readers: Readers | None, batch: int, kv_heads: int) -> tuple[Any, ...]:
    """How values are read out of their own basis, each with its strides; None where they are in the model's."""
    read = mean = None
    if readers is not None:
        read = None if readers.read is None else readers.read.expand(batch, kv_heads, -1, -1)
        mean = None if readers.mean is None else readers.mean.expand(batch, kv_heads, -1)
    return read, None if read is None else read.stride(), mean, None if mean is None else mean.stride()


def of_frame(frame: SegmentFrame | None) -> tuple[Any, ...] | None:
    """The table of a frame, which coordinates turn together, tokens of a segment, and how many segments there are."""
    return None if frame is None else (frame.table, frame.partner, frame.tokens, len(frame.table))


def padded(size: int) -> int:
    """The least whole power of two that a kernel takes so many coordinates in."""
    return max(16, 1 << (size - 1).bit_length())
