"""``paged_attention``: attention of a call's queries over a paged cache."""

import torch
from torch import Tensor

from headq_ao.ops.dispatch import direct, kernels
from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import tiled
from headq_ao.ops.paged_attention.check import check_cache, check_call
from headq_ao.ops.types import PagedKV, Plan, Readers, SegmentFrame, Visible


def paged_attention(
    q: Tensor,
    scaling: float,
    kv: PagedKV,
    readers: Readers,
    visible: Visible | None = None,
    sliding: int = 0,
    reads: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over packed tokens, the window, and the call's own tokens: one softmax over what each query sees.

    ``o = Σ_j softmax(s)_j v_j`` and ``lse = log Σ_j exp(s_j)``. Packed tokens are read as codes, with ``s_j`` as in
    :class:`Readers`; the others in full precision, ``s_j = scaling · q·k_j``. Accumulation is fp32 (fp64 for fp64
    queries). Scores are capped by :attr:`PagedKV.softcap` before anything is hidden.

    Args:
        q: ``[B, Hq, S, D]``, ``Hq`` a multiple of the layer's KV heads.
        scaling: of the scores.
        kv: the cache; see :class:`PagedKV` for where a token lies.
        readers: how packed tokens are read.
        visible: the positions that each query sees; None: all up to its own, under ``sliding``.
        sliding: positions of a sliding window, 0: none; only with ``visible`` None.
        reads: ``[2]`` int64; how many packed tokens, and how many tokens at all, queries saw is added to it.

    Returns:
        ``o [B, Hq, S, Dv]`` in the model's basis and ``lse [B, Hq, S]``, fp32 (fp64 for fp64 queries); 0 and −inf where
        a query sees nothing.

    Raises:
        ValueError: where shapes, dtypes or devices do not fit each other.
        NotImplementedError: where a cache with a window table is traced or differentiated.
    """
    if direct(q):
        return _run(q, scaling, kv, readers, visible, sliding, reads)
    if kv.window_table is not None:
        raise NotImplementedError(
            "the operator has no window_table in its schema: an engine's cache is read outside traces and autograd"
        )
    low, high = (None, None) if visible is None else (visible.low, visible.high)
    out, lse = _operator(
        q, scaling, kv.pages, kv.layout, kv.table, kv.segment, kv.packed, kv.held, kv.total, kv.window_k, kv.window_v,
        kv.n_sink, kv.new_k, kv.new_v, kv.new_start, readers.query_map, readers.read, readers.mean, low, high, sliding,
        reads, *(_NO_FRAME if (f := readers.frame) is None else (f.table, f.partner, f.tokens)), kv.softcap,
    )  # fmt: skip
    return out, lse


def plan_attention(
    kv: PagedKV, readers: Readers, q_heads: int, sliding: int = 0, reads: Tensor | None = None
) -> Plan | None:
    """:func:`paged_attention` for decoding, with arguments that are checked and put together once.

    The plan reads tensors where they lie now, lengths at each call. Who moves a tensor makes a new plan.

    Args:
        kv: the cache, without ``new_k``: a step's tokens are in the window before it attends.
        readers, sliding, reads: as there.
        q_heads: of the layer.

    Returns:
        A function of ``q [B, Hq, S, D]``, of few tokens and with a contiguous last dimension, and of the scaling, that
        gives ``o``; None where no kernel of the device serves such a cache.

    Raises:
        ValueError: where shapes, dtypes or devices do not fit each other.
    """
    check_cache(kv, readers, q_heads, reads)
    if kv.new_k is not None:
        raise ValueError("a plan is of a cache without new_k and new_v, which change from step to step")
    module = kernels("paged_attention", kv.table.device.type)
    if module is None or not hasattr(module, "plan"):
        return None
    made: Plan | None = module.plan(kv, readers, q_heads, sliding, reads)
    return made


def _run(
    q: Tensor, scaling: float, kv: PagedKV, readers: Readers, visible: Visible | None, sliding: int,
    reads: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """By the device's kernel where it serves, else by matrix products."""
    check_cache(kv, readers, q.shape[1], reads)
    check_call(q, kv, visible, sliding)
    module = kernels("paged_attention", q.device.type)
    made = None if module is None else module.launch(q, scaling, kv, readers, visible, sliding, reads)
    return tiled.paged_attention(q, scaling, kv, readers, visible, sliding, reads) if made is None else made


def _paged_attention(
    q: Tensor, scaling: float, pages: list[Tensor], layout: str, table: Tensor, segment: Tensor | None, packed: Tensor,
    held: Tensor, total: Tensor, window_k: Tensor, window_v: Tensor, n_sink: int, new_k: Tensor | None,
    new_v: Tensor | None, new_start: Tensor | None, query_map: Tensor | None, read: Tensor | None, mean: Tensor | None,
    low: Tensor | None, high: Tensor | None, sliding: int, reads: Tensor | None, frame: Tensor | None = None,
    partner: Tensor | None = None, frame_tokens: int = 0, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kv = PagedKV(
        pages, layout, table, segment, packed, held, total, window_k, window_v, n_sink, new_k, new_v, new_start,
        softcap=softcap,
    )  # fmt: skip
    visible = None if low is None or high is None else Visible(low, high)
    of_keys = None if frame is None or partner is None else SegmentFrame(frame, partner, frame_tokens)
    return _run(q, scaling, kv, Readers(query_map, read, mean, of_keys), visible, sliding, reads)


def _fake(q: Tensor, scaling: float, pages: list[Tensor], layout: str, *rest: object) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((*q.shape[:3], PageLayout.parse(layout).value_dim), dtype=dtype)
    return out, q.new_empty(q.shape[:3], dtype=dtype)


_NO_FRAME = (None, None, 0)

# Not torch.library.custom_op, whose wrappers take longer than a step over a short context: measured, 0.12 ms of 0.19.
NAME = "headq::paged_attention"
torch.library.define(NAME, torch.library.infer_schema(_paged_attention, mutates_args=("reads",)))
torch.library.impl(NAME, "default", _paged_attention)
torch.library.register_fake(NAME, _fake)
_operator = torch.ops.headq.paged_attention.default
