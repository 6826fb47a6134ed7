"""What must hold of the arguments of ``paged_attention``: compiled kernels read them by address."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.layout import TOKEN_TILE
from headq_ao.ops.page_layout import PageLayout, value_granule
from headq_ao.ops.types import PagedKV, Readers, Visible

MOST_KEPT = 1024

_fine: set[tuple[object, ...]] = set()  # forms that were checked


def check_cache(kv: PagedKV, readers: Readers, q_heads: int, reads: Tensor | None) -> None:
    """Raise ValueError where a cache, its readers and that many query heads do not fit each other."""
    tensors = (
        *kv.pages, kv.table, kv.segment, kv.packed, kv.held, kv.total, kv.window_k, kv.window_v, kv.new_k, kv.new_v,
        kv.new_start, kv.window_table, kv.sink_k, kv.sink_v, readers.query_map, readers.read, readers.mean, reads,
        *(() if (frame := readers.frame) is None else (frame.table, frame.partner)),
    )  # fmt: skip
    forms = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]
    key = (kv.layout, kv.n_sink, q_heads, len(kv.pages), frame and frame.tokens, *forms)
    if key in _fine:
        return
    _check_cache(kv, readers, q_heads, reads)
    if len(_fine) >= MOST_KEPT:
        _fine.clear()
    _fine.add(key)


def _check_cache(kv: PagedKV, readers: Readers, q_heads: int, reads: Tensor | None) -> None:
    layout, batch, device = PageLayout.parse(kv.layout), kv.table.shape[0], kv.table.device
    if q_heads % layout.kv_heads:
        raise ValueError(f"query heads must be a multiple of the {layout.kv_heads} KV heads, got {q_heads}")
    _check_pages(kv, layout)
    if kv.table.ndim != 2 or kv.table.shape[1] == 0:
        raise ValueError(f"table must be [B, C] with C at least 1, got {tuple(kv.table.shape)}")
    _fits("table", kv.table, kv.table.shape, device, torch.int32)
    for name in ("packed", "held", "total", "new_start"):
        _fits(name, getattr(kv, name), (batch,), device, torch.int64)
    _fits("segment", kv.segment, (kv.pages[0].shape[0],), device, torch.int32)
    _fits("reads", reads, (2,), device, torch.int64)
    _check_window(kv, layout, batch, device)
    if (kv.new_k is None) != (kv.new_v is None):
        raise ValueError("new_k and new_v go together")
    new = 0 if kv.new_k is None else kv.new_k.shape[2]
    for name, x, tokens, dim in (
        ("new_k", kv.new_k, new, layout.key_dim), ("new_v", kv.new_v, new, layout.value_dim)
    ):  # fmt: skip
        _fits(name, x, (batch, layout.kv_heads, tokens, dim), device)
    _check_readers(readers, layout, batch, device)
    if (frame := readers.frame) is not None:
        if frame.tokens < 1 or frame.tokens % layout.page_tokens:
            raise ValueError(f"a segment must be whole pages of {layout.page_tokens} tokens, got {frame.tokens}")
        _fits("frame.table", frame.table, (len(frame.table), 2, layout.key_dim), device, torch.float32)
        _fits("frame.partner", frame.partner, (layout.key_dim,), device, torch.int32)


def _check_window(kv: PagedKV, layout: PageLayout, batch: int, device: torch.device) -> None:
    """The window: a ring of each sequence, or pages beside their table."""
    slots, dims = kv.window_k.shape[2], (layout.key_dim, layout.value_dim)
    lead = batch
    if kv.window_table is None:
        if not 0 <= kv.n_sink < slots:
            raise ValueError(f"the window must have more slots than the {kv.n_sink} sinks, got {slots}")
        if kv.sink_k is not None or kv.sink_v is not None:
            raise ValueError("sink_k and sink_v go with a window_table")
    else:
        if kv.sink_k is None or kv.sink_v is None or kv.n_sink > layout.page_tokens:
            raise ValueError(f"a window_table needs sink_k and sink_v, and at most {layout.page_tokens} sinks")
        _fits("window_table", kv.window_table, (batch, kv.window_table.shape[-1]), device, torch.int32)
        lead = kv.window_k.shape[0]
        for name, x, dim in (("sink_k", kv.sink_k, dims[0]), ("sink_v", kv.sink_v, dims[1])):
            _fits(name, x, (kv.pages[0].shape[0], layout.kv_heads, kv.n_sink, dim), device, kv.window_k.dtype)
    for name, x, dim in (("window_k", kv.window_k, dims[0]), ("window_v", kv.window_v, dims[1])):
        _fits(name, x, (lead, layout.kv_heads, slots, dim), device)


def check_call(q: Tensor, kv: PagedKV, visible: Visible | None, sliding: int) -> None:
    """Raise ValueError where queries or what they see do not fit a cache that was checked."""
    batch, device = kv.table.shape[0], kv.table.device
    if q.ndim != 4:
        raise ValueError(f"q must be [B, Hq, S, D], got {tuple(q.shape)}")
    _fits("q", q, (batch, *q.shape[1:3], PageLayout.parse(kv.layout).key_dim), device)
    if not q.is_floating_point():
        raise ValueError(f"q must be of a floating dtype, got {q.dtype}")
    if kv.new_k is not None and kv.new_k.shape[2] != q.shape[2]:
        raise ValueError(f"new_k must have the {q.shape[2]} tokens of q, got {kv.new_k.shape[2]}")
    if visible is not None:
        if sliding:
            raise ValueError(f"visible says what queries see, so sliding must be 0, got {sliding}")
        _fits("visible.low", visible.low, (batch, q.shape[2]), device, torch.int64)
        _fits("visible.high", visible.high, (batch, q.shape[2]), device, torch.int64)


def _check_pages(kv: PagedKV, layout: PageLayout) -> None:
    for group in layout.groups:
        values = group.keys if group.values.shared else group.values
        if group.values.shared and (
            len(set(values.bits)) != 1 or values.zero or not len(values.bits) == layout.key_dim == layout.value_dim
        ):
            raise ValueError(f"values that are their keys need keys of one number of bits and no zero, got {kv.layout}")
        for side, tokens in ((group.keys, TOKEN_TILE), (values, value_granule((values.bits or (8,))[0]))):
            if side.bits and layout.page_tokens % tokens:
                raise ValueError(f"pages must have a multiple of {tokens} tokens, got {layout.page_tokens}")
    shapes = layout.page_shapes()
    if len(kv.pages) != len(shapes):
        raise ValueError(f"the layout {kv.layout!r} has {len(shapes)} tensors, got {len(kv.pages)}")
    count, device = kv.pages[0].shape[0], kv.table.device
    for i, (x, (shape, dtype)) in enumerate(zip(kv.pages, shapes, strict=True)):
        _fits(f"pages[{i}]", x, (count, *shape), device, dtype)
        if not x[0, 0].is_contiguous():
            raise ValueError(f"a head's part of a page must be contiguous, pages[{i}] has strides {x.stride()}")


def _check_readers(readers: Readers, layout: PageLayout, batch: int, device: torch.device) -> None:
    coded = {len(g.keys.bits) for g in layout.groups if g.keys.bits}
    if len(coded) > 1:
        raise ValueError(f"key codes of all heads must have as many coordinates, got {sorted(coded)}")
    if coded and readers.query_map is None:
        raise ValueError("packed keys need a query_map")
    dims = {
        "query_map": (layout.key_dim, max(coded, default=0) + 3),
        "read": (layout.value_dim, layout.value_dim),
        "mean": (layout.value_dim,),
    }
    for name, own in dims.items():
        x = getattr(readers, name)
        if x is None or (name == "query_map" and not coded):
            continue
        shape = x.shape[1:] if name == "query_map" else x.shape
        fits = len(shape) == 2 + len(own) and shape[0] in (1, batch) and shape[1] in (1, layout.kv_heads)
        if not fits or tuple(shape[2:]) != own or not x.is_floating_point():
            lead = "G, " if name == "query_map" else ""
            expected = f"[{lead}{batch} or 1, {layout.kv_heads} or 1, {', '.join(map(str, own))}]"
            raise ValueError(f"{name} must be fp32 {expected}, got {x.dtype} {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} must be on {device}, got {x.device}")


def _fits(
    name: str, x: Tensor | None, shape: Sequence[int], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    if x is None:
        return
    if x.shape != tuple(shape) or (dtype is not None and x.dtype != dtype):
        raise ValueError(f"{name} must be {tuple(shape)} {dtype or ''}, got {tuple(x.shape)} {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")
