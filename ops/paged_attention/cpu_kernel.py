"""The compiled CPU kernel behind ``paged_attention``: arguments for the C interface of cpu_kernel.cpp."""

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headq_ao.ops import cpu_build
from headq_ao.ops.layout import PIECES, granule, plane_columns, plane_pieces
from headq_ao.ops.page_layout import PagedGroup, PageLayout
from headq_ao.ops.paged_attention import long_chunk, tiled
from headq_ao.ops.paged_attention.new_tokens import with_new_tokens
from headq_ao.ops.paged_attention.tiled import overlap_in_full
from headq_ao.ops.paged_attention.tiles import tiles
from headq_ao.ops.types import PagedKV, Readers, Visible, in_vectors, visible_positions

if TYPE_CHECKING:
    from headq_ao.ops.requests import Requests

PATHS = {"portable": 0, "avx2": 1, "avx512": 2}
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
PAGE_TOKENS = (16, 32, 64, 128, 256, 512, 1024)  # parts of the kernel's chunk
LARGEST_DIM = 576
MOST_COLUMNS = 2 * LARGEST_DIM  # of a plane of keys
CHUNK = 1024  # tokens of its unit of work
MOST_QUERIES = 256  # new tokens of one call of the kernel
MOST_BYTES = 2**26  # of what it keeps for each chunk
MOST_KEPT = 1024  # calls whose arguments are kept
FEW_TOKENS = 32  # the call's own, attended by the kernel
MAPPED_QUERIES = 16  # per KV head; more are mapped by matrix products, whose sums depend on how many there are
_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Plane(ctypes.Structure):
    _fields_ = (("data", _P), ("page", _I64), ("head", _I64), ("tile", _I64), ("width", _I32), ("columns", _I32))


class _Scale(ctypes.Structure):
    _fields_ = (("data", _P), ("page", _I64), ("head", _I64), ("token", _I64), ("bytes", _I32), ("padding", _I32))


class _Dense(ctypes.Structure):
    _fields_ = (("data", _P), ("batch", _I64), ("head", _I64), ("token", _I64), ("dtype", _I32), ("tokens", _I32))


class _PerHead(ctypes.Structure):
    _fields_ = (("data", _P), ("batch", _I64), ("head", _I64))


_GROUP_INTS = "first heads key_planes value_planes value_bits groups dense same_query shared"


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, _I32) for name in _GROUP_INTS.split()),
        ("k", _Plane * 3),
        ("v", _Plane * 2),
        *((name, _Scale) for name in ("k_scale", "k_zero", "v_scale", "v_zero")),
        ("q_weight", ctypes.c_float * 3),
        ("q_column", _P * 3),
        ("q_factor", _P * 3),
    )


_INTS = (
    "n_groups batch kv_heads queries new_tokens key_dim value_dim coordinates segments page_tokens columns n_sink "
    "body sliding threads frames frame_tokens map_row recent"
)


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, _Dense) for name in ("q", "window_k", "window_v", "new_k", "new_v", "sink_k", "sink_v", "out")),
        *((name, _P) for name in ("table", "segment", "window_table")),
        ("table_row", _I64),
        ("window_row", _I64),
        *((name, _P) for name in ("packed", "held", "total", "new_start", "low", "high", "reads")),
        *((name, _PerHead) for name in ("map", "read", "mean")),
        ("map_segment", _I64),
        *((name, _P) for name in ("mapped", "lse", "query_start", "frame", "partner", "groups")),
        *((name, _I32) for name in _INTS.split()),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is no compiler."""
    lib = cpu_build.load(Path(__file__).with_name("cpu_kernel.cpp"))
    if lib is not None:
        lib.headq_paged_attention.restype = ctypes.c_int
        same = lib.headq_args_size() == ctypes.sizeof(_Args) and lib.headq_group_size() == ctypes.sizeof(_Group)
        assert same, "cpu_kernel.py and cpu_kernel.cpp disagree about Args or Group"
    return lib


def launch(
    q: Tensor, scaling: float, kv: PagedKV, readers: Readers, visible: Visible | None, sliding: int,
    reads: Tensor | None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """:func:`headq_ao.ops.paged_attention` of arguments that were checked; None where the kernel does not serve them.

    Of a chunk of many tokens, the call's own are left to :func:`with_new_tokens`.
    """
    if q.dtype not in DTYPES or library() is None or not serves(kv):
        return None
    if q.shape[2] <= FEW_TOKENS or (kv.new_k is None and q.shape[2] <= _query_tile(q, kv)):
        return _launch(_call(kv, readers, q.shape[1], sliding, reads), q, scaling, readers.query_map, visible)
    shown = visible_positions(kv.total, q.shape[2], sliding) if visible is None else visible
    of_cache = None
    if kv.new_k is not None and long_chunk.serves(q, kv, visible, sliding):
        if reads is not None:
            tiled.count(kv, shown, PageLayout.parse(kv.layout), reads)
        return long_chunk.attention(q, scaling, kv, readers)
    if kv.recent is not None and kv.new_k is not None:  # few others: what a query reads is summed as if it came alone
        return _launch_tiles(kv, q, scaling, readers, shown, reads, FEW_TOKENS)
    if kv.new_k is None or bool(kv.held.any()):
        cached = replace(kv, new_k=None, new_v=None)
        of_cache = _launch_tiles(cached, q, scaling, readers, shown, reads, _query_tile(q, kv))
    if reads is not None and kv.new_k is not None:
        reads[1] += overlap_in_full(shown, kv)
    return with_new_tokens(of_cache, q, scaling, kv, visible, sliding)


def _launch_tiles(
    kv: PagedKV, q: Tensor, scaling: float, readers: Readers, shown: Visible, reads: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    call, outs = _call(kv, readers, q.shape[1], 0, reads), []
    for t in tiles(q.shape[2], size):
        outs.append(_launch(call, q[:, :, t], scaling, readers.query_map, shown.tile(t)))
    return torch.cat([out for out, _ in outs], 2), torch.cat([lse for _, lse in outs], 2)


def _launch(
    call: "_Call", q: Tensor, scaling: float, query_map: Tensor | None, visible: Visible | None
) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
    fields, kept = {"lse": lse.data_ptr()}, [q if q.stride(3) == 1 else q.contiguous()]
    if visible is not None:
        kept += [visible.low.contiguous(), visible.high.contiguous()]
        fields |= {"low": kept[1].data_ptr(), "high": kept[2].data_ptr()}
    many, of = call.heads * q.shape[2] > MAPPED_QUERIES, call.fields
    if many and query_map is not None and not of.frames and of.recent < 0:
        kept.append(_mapped(q, scaling, query_map[: of.segments], of.kv_heads))
        fields["mapped"] = kept[-1].data_ptr()
    out = call(kept[0], scaling, **fields)
    del kept  # what was made contiguous lives until here
    return out, lse


def _query_tile(q: Tensor, kv: PagedKV) -> int:
    """New tokens of one call: what it keeps of them for each chunk of packed tokens is bounded."""
    layout = PageLayout.parse(kv.layout)
    chunks = -(-kv.table.shape[1] * layout.page_tokens // CHUNK)
    of_token = 4 * q.shape[0] * q.shape[1] * chunks * (layout.value_dim + 2)
    return max(min(MOST_QUERIES, MOST_BYTES // of_token), FEW_TOKENS)


def plan(kv: PagedKV, readers: Readers, q_heads: int, sliding: int, reads: Tensor | None) -> "_Call | None":
    """:func:`headq_ao.ops.plan_attention` of arguments that were checked; None where the kernel does not serve them."""
    lib = library()
    if lib is None or not serves(kv):
        return None
    for name, x in (("packed", kv.packed), ("held", kv.held), ("total", kv.total)):
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, its address is kept, got strides {x.stride()}")
    return _arguments(kv, readers, q_heads, sliding, reads)


def serves(kv: PagedKV) -> bool:
    """Whether both sides are coded, in pages that make up chunks, beside vectors of a dtype that the kernel reads."""
    layout = PageLayout.parse(kv.layout)
    dense = [x for x in (kv.window_k, kv.window_v, kv.new_k, kv.new_v, kv.sink_k, kv.sink_v) if x is not None]
    return (
        all(
            g.keys.bits and (g.values.bits or g.values.shared) and _columns(g.keys.bits)[0] <= MOST_COLUMNS
            for g in layout.groups
        )
        and layout.page_tokens in PAGE_TOKENS
        and max(layout.key_dim, layout.value_dim) <= LARGEST_DIM
        and all(x.dtype in DTYPES for x in dense)
    )


class _Call:
    """The kernel with arguments that are put together once; a call passes the queries.

    Lengths are read from where they lie, at each call. Threads may share it.
    """

    def __init__(self, fields: _Args, kept: list[object]) -> None:
        lib = library()
        assert lib is not None
        self.fields, self.kept, self.kernel = fields, kept, lib.headq_paged_attention
        self.heads, self.dim = fields.queries, fields.value_dim

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """None: a copied cache makes one of its own."""

    def moved(self, pages: Sequence[Tensor], table: Tensor) -> None:
        """See :class:`headq_ao.ops.types.Plan`."""
        groups: Any = self.kept[0]
        n = len(pages) + 1
        now = {old.data_ptr(): x for old, x in zip(self.kept[-n:], pages, strict=False)}  # type: ignore[attr-defined]
        for group in groups:
            for held in (*group.k, *group.v, group.k_scale, group.k_zero, group.v_scale, group.v_zero):
                if held.data:
                    x = now[held.data]
                    held.data, held.head = x.data_ptr(), x.stride(1)
        fields = self.fields
        fields.table, fields.table_row, fields.columns = table.data_ptr(), table.stride(0), table.shape[1]
        self.kept[-n:] = [*pages, table]

    def __call__(self, q: Tensor, scaling: float, **more: int) -> Tensor:
        """``[B, Hq, S, Dv]`` fp32 of ``q [B, Hq, S, D]``, whose last dimension is contiguous; ``more`` fields."""
        fields = _Args.from_buffer_copy(self.fields)
        batch, heads, tokens, _ = q.shape
        out = torch.empty((batch, heads, tokens, self.dim), dtype=torch.float32, device="cpu")
        x, y = fields.q, fields.out
        x.data, x.dtype, y.data, y.dtype = q.data_ptr(), DTYPES[q.dtype], out.data_ptr(), DTYPES[torch.float32]
        x.batch, x.head, x.token, _ = q.stride()
        y.batch, y.head, y.token, _ = out.stride()
        fields.scaling, fields.threads = scaling, torch.get_num_threads()
        fields.new_tokens, fields.queries = tokens, self.heads * tokens
        for name in more:
            setattr(fields, name, more[name])
        if code := self.kernel(ctypes.byref(fields)):
            raise _error(code)
        return out

    def requests(self, q: Tensor, scaling: float, out: Tensor, of: "Requests") -> None:
        """Of sequences with unequally many new tokens: ``out`` of ``q``, ``[T, Hq, D]`` both."""
        fields = self.fields
        for held, x in ((fields.q, q), (fields.out, out)):
            if x.stride(2) != 1 or x.dtype not in DTYPES:
                raise ValueError(f"tokens must be fp32, bf16 or fp16 with coordinates side by side, got {x.dtype}")
            held.data, held.dtype = x.data_ptr(), DTYPES[x.dtype]
            held.token, held.head = x.stride(0), x.stride(1)
        fields.batch, fields.new_tokens, fields.queries = len(of.table), 1, self.heads
        fields.recent = recent(of.recent)
        fields.table, fields.table_row, fields.columns = of.table.data_ptr(), of.table.stride(0), of.table.shape[1]
        fields.window_table, fields.window_row = of.window_table.data_ptr(), of.window_table.stride(0)
        fields.packed, fields.held, fields.total = of.packed.data_ptr(), of.total.data_ptr(), of.total.data_ptr()
        fields.query_start, fields.scaling, fields.threads = of.start.data_ptr(), scaling, torch.get_num_threads()
        if code := self.kernel(ctypes.byref(fields)):
            raise _error(code)


_calls: dict[tuple[object, ...], tuple[_Args, object]] = {}


def _call(kv: PagedKV, readers: Readers, q_heads: int, sliding: int, reads: Tensor | None) -> _Call:
    """:func:`_arguments`, kept for the next call with tensors of these forms at these addresses.

    They depend on nothing else. What had to be copied is not kept, nor is any tensor; a ``read`` that does not lie
    transposed is copied, and a map or mean that is not contiguous fp32.
    """
    tensors = (
        *kv.pages, kv.table, kv.segment, kv.packed, kv.held, kv.total, kv.window_k, kv.window_v, kv.new_k, kv.new_v,
        kv.new_start, kv.window_table, kv.sink_k, kv.sink_v, readers.query_map, readers.read, readers.mean, reads,
        *(() if (frame := readers.frame) is None else (frame.table, frame.partner)),
    )  # fmt: skip
    forms = [None if x is None else (x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors]
    key = (kv.layout, kv.n_sink, q_heads, sliding, kv.recent, kv.softcap, frame and frame.tokens, *forms)
    found = _calls.get(key)
    if found is not None:
        return _Call(found[0], [found[1]])
    call = _arguments(kv, readers, q_heads, sliding, reads)
    if all(any(x is y for y in tensors) for x in call.kept[1:]):
        if len(_calls) >= MOST_KEPT:
            _calls.clear()
        _calls[key] = call.fields, call.kept[0]
    return call


def _error(code: int) -> Exception:
    if code == 1:
        return MemoryError("paged_attention had no memory for its partial sums")
    lib = library()
    assert lib is not None
    known = [name for name, i in PATHS.items() if i <= lib.headq_best_isa()]
    return ValueError(f"HEADQ_CPU_ISA must be one of {known}, got {os.environ.get('HEADQ_CPU_ISA')!r}")


def _arguments(kv: PagedKV, readers: Readers, q_heads: int, sliding: int, reads: Tensor | None) -> _Call:
    """All but queries, ranges and results; what they point to is kept."""
    layout = PageLayout.parse(kv.layout)
    assert readers.query_map is not None
    groups = (_Group * len(layout.groups))()
    for i, group in enumerate(layout.split(kv.pages)):
        _set_group(groups[i], group, layout)
    table = kv.table if kv.table.stride(1) == 1 else kv.table.contiguous()
    lengths = [x.contiguous() for x in (kv.packed, kv.held, kv.total)]
    start = None if kv.new_start is None else kv.new_start.contiguous()
    segment = None if kv.segment is None else kv.segment.contiguous()
    mean = None if readers.mean is None else readers.mean.float().contiguous()
    query_map = (
        readers.query_map.float().contiguous() if readers.frame is None else in_vectors(readers.query_map.float())
    )
    read = None if readers.read is None else _transposed(readers.read)
    window = kv.window_table
    window = window if window is None or window.stride(1) == 1 else window.contiguous()
    dense = [
        x if x is None or x.stride(3) == 1 else x.contiguous()
        for x in (kv.window_k, kv.window_v, kv.new_k, kv.new_v, kv.sink_k, kv.sink_v)
    ]
    args = _Args(
        n_groups=len(groups), batch=kv.table.shape[0], kv_heads=layout.kv_heads, queries=q_heads // layout.kv_heads,
        key_dim=layout.key_dim, value_dim=layout.value_dim, coordinates=query_map.shape[-1] - 3,
        segments=1 if segment is None else len(query_map), page_tokens=layout.page_tokens, columns=table.shape[1],
        n_sink=kv.n_sink, body=kv.body_start, sliding=sliding, recent=recent(kv.recent),
        table=table.data_ptr(), table_row=table.stride(0),
        segment=_address(segment), new_start=_address(start), reads=_address(reads), window_table=_address(window),
        window_row=0 if window is None else window.stride(0),
        **dict(zip(("window_k", "window_v", "new_k", "new_v", "sink_k", "sink_v"), map(_dense, dense), strict=True)),
        map=_per_head(query_map[0]), map_segment=query_map.stride(0), read=_per_head(read), mean=_per_head(mean),
        groups=ctypes.addressof(groups), softcap=kv.softcap or 0.0,
    )  # fmt: skip
    args.packed, args.held, args.total = (x.data_ptr() for x in lengths)
    kept = [groups, *lengths, start, segment, query_map, read, mean, reads, window, *dense]
    if (frame := readers.frame) is not None:
        table_of_frames, partner = frame.table.contiguous(), frame.partner.contiguous()
        args.frame, args.partner, args.frames = table_of_frames.data_ptr(), partner.data_ptr(), len(table_of_frames)
        args.frame_tokens, args.map_row = frame.tokens, query_map.stride(3)
        kept += [table_of_frames, partner]
    return _Call(args, [*kept, *kv.pages, table])


def recent(tokens: int | None) -> int:
    """:attr:`PagedKV.recent` as the kernel takes it."""
    return -1 if tokens is None else tokens


def _transposed(read: Tensor) -> Tensor:
    """Of matrices that lie transposed, those tensors."""
    if read.dtype == torch.float32 and read.transpose(-1, -2).is_contiguous():
        return read
    return read.float().transpose(-1, -2).contiguous().transpose(-1, -2)


def _mapped(q: Tensor, scaling: float, query_map: Tensor, kv_heads: int) -> Tensor:
    """Queries times the maps: ``[G, B, Hkv, Hq / Hkv · S, M + 3]``."""
    grouped = (q.float() * scaling).reshape(q.shape[0], kv_heads, -1, q.shape[-1])
    return (grouped @ query_map.float()).contiguous()


def _set_group(to: _Group, group: PagedGroup, layout: PageLayout) -> None:
    """A head group's tensors and form."""
    keys, values = group.keys, group.values
    assert keys.scale is not None and values.scale is not None
    pieces, value_pieces, to.shared = plane_pieces(keys.bits), PIECES[values.bits[0]], values.shared
    to.first, to.heads = group.layout.first, group.layout.heads
    to.key_planes, to.value_planes, to.value_bits = len(pieces), len(value_pieces), values.bits[0]
    to.groups, to.same_query = 1 if values.shared else values.scale.shape[3], same_query(keys.bits)
    for i, (plane, (width, own)) in enumerate(zip(keys.planes, pieces.items(), strict=True)):
        columns = len(keys.bits) if to.same_query else plane_columns(width, len(own))
        to.k[i] = _Plane(plane.data_ptr(), *plane.stride()[:3], width, columns)
        to.q_weight[i] = float(1 << own[0][1]) if to.same_query else 1.0
    for i, width in enumerate(value_pieces):
        at = () if values.shared else (values.planes[i].data_ptr(), *values.planes[i].stride()[:3])
        to.v[i] = _Plane(*(at or (None, 0, 0, 0)), width, layout.value_dim)
    to.k_scale, to.k_zero = _scale(keys.scale), _scale(keys.zero)
    to.v_scale, to.v_zero = _scale(values.scale), _scale(values.zero)
    if not to.same_query:
        for i, (column, factor) in enumerate(_columns(keys.bits)[1]):
            to.q_column[i], to.q_factor[i] = ctypes.addressof(column), ctypes.addressof(factor)
    to.dense = all(x.stride(0) == x.shape[2] * x.stride(2) for x in [*keys.tensors, *values.tensors])


@functools.lru_cache(maxsize=256)
def same_query(bits: tuple[int, ...]) -> bool:
    """Whether all planes read the query as it is: the same bits in whole granules, and a plane for each piece."""
    pieces = PIECES[bits[0]]
    same = len(set(bits)) == 1 and len(set(pieces)) == len(pieces)
    return same and all(len(bits) % granule(w) == 0 for w in pieces)


@functools.cache  # kept for good: plans hold addresses
def _columns(bits: tuple[int, ...]) -> tuple[int, list[tuple[Any, Any]]]:
    """The most columns of a plane; of each plane its columns' coordinates, M for padding, and powers of two."""
    most, planes = 0, []
    for width, pieces in plane_pieces(bits).items():
        n = plane_columns(width, len(pieces))
        most = max(most, n)
        pairs = [*pieces, *([(len(bits), 0)] * (n - len(pieces)))]
        planes.append(((_I32 * n)(*(c for c, _ in pairs)), (ctypes.c_float * n)(*(float(1 << s) for _, s in pairs))))
    return most, planes


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(x: Tensor | None) -> _Dense:
    return _Dense() if x is None else _Dense(x.data_ptr(), *x.stride()[:3], DTYPES[x.dtype], x.shape[2])


def _per_head(x: Tensor | None) -> _PerHead:
    if x is None:
        return _PerHead()
    return _PerHead(x.data_ptr(), *(0 if x.shape[i] == 1 else x.stride(i) for i in range(2)))


def _scale(x: Tensor | None) -> _Scale:
    return _Scale() if x is None else _Scale(x.data_ptr(), *x.stride()[:3], x.element_size())
