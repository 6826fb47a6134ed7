"""What the compiled kernel of ``cache_update`` reads: the structures of cpu_kernel.cpp, and the tensors in them."""

import ctypes
import functools
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from headq_ao.ops.cache_update.encoders import Encoders, frame_of
from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.layout import PIECES, granule, plane_columns, plane_pieces
from headq_ao.ops.page_layout import PagedTokens, PageLayout
from headq_ao.ops.page_layout import Side as SideLayout
from headq_ao.ops.types import PagedKV

DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
EXACT, FEEDBACK, NEAREST, AFFINE, SHARED = range(5)
_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_MATRICES = "encode mean unit steps hessian ldl read side_encode side_step"


def _fields(names: str, kind: type) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class _Plane(ctypes.Structure):
    _fields_ = (
        ("data", _P), *_fields("page head", _I64), ("column", _P), *_fields("width granules shift padding", _I32)
    )  # fmt: skip


class _Numbers(ctypes.Structure):
    _fields_ = (("data", _P), *_fields("page head token", _I64))


class _Matrix(ctypes.Structure):
    _fields_ = (("data", _P), *_fields("batch head", _I64))


class _Tokens(ctypes.Structure):
    _fields_ = (("data", _P), *_fields("batch head token", _I64))


class _Side(ctypes.Structure):
    _fields_ = (
        *_fields("form values dim base side bits planes groups unbiased folded", _I32),
        ("step", _F32),
        ("byte_scale", _I32),
        ("coordinate_bits", _P),
        ("plane", _Plane * 3),
        *_fields("scale zero", _Numbers),
        ("exact", _Tokens),
        *_fields(_MATRICES, _Matrix),
    )


class Group(ctypes.Structure):
    _fields_ = (*_fields("first heads", _I32), ("side", _Side * 2))


class Args(ctypes.Structure):
    _fields_ = (
        *_fields("batch kv_heads page_tokens columns n_sink body ring slots dtype threads", _I32),
        *_fields("check_finite groups bad padding", _I32),
        *_fields("most table_row window_row", _I64),
        ("dim", _I32 * 2),
        *_fields("table window_table packed after held total start", _P),
        ("window", _Tokens * 2),
        ("added", _Tokens * 2),
        ("sinks", _Tokens * 2),
        *_fields("frame partner", _P),
        *_fields("frames frame_tokens", _I32),
    )


def arguments(
    kv: PagedKV, packed: Tensor, most: int, key_encoders: Encoders, value_encoders: Encoders, check_finite: bool
) -> tuple[Args, "ctypes.Array[Group]", list[object]]:
    """All but the call's tokens; what the structures point to is in the last, and to be kept: pages and table first."""
    layout = PageLayout.parse(kv.layout)
    batch, heads, slots = len(kv.table), layout.kv_heads, kv.window_k.shape[2]
    owned, window = kv.window_table is not None, kv.window_table
    groups = (Group * len(layout.groups))()
    lengths = kv.packed, packed, kv.held, kv.total, kv.new_start
    kept: list[object] = [(list(kv.pages), kv.table), *lengths, kv.window_k, kv.window_v, key_encoders, value_encoders]
    for into, group, *encoders in zip(groups, layout.split(kv.pages), key_encoders, value_encoders, strict=True):
        into.first, into.heads = group.layout.first, group.layout.heads
        sides = (group.keys, group.layout.keys), (group.values, group.layout.values)
        for i, ((tokens, form), encoder) in enumerate(zip(sides, encoders, strict=True)):
            dim = layout.value_dim if i else layout.key_dim
            into.side[i] = _side(tokens, form, encoder, dim, batch, group.layout.heads, bool(i), most != 0)
    args = Args(
        batch=batch, kv_heads=heads, page_tokens=layout.page_tokens, columns=kv.table.shape[1], n_sink=kv.n_sink,
        body=kv.body_start, ring=slots if owned else slots - kv.n_sink, dtype=DTYPES[kv.window_k.dtype],
        check_finite=check_finite, groups=len(groups),
        most=most, table_row=kv.table.stride(0), dim=(layout.key_dim, layout.value_dim), table=kv.table.data_ptr(),
        packed=kv.packed.data_ptr(), after=packed.data_ptr(), held=kv.held.data_ptr(), total=kv.total.data_ptr(),
        start=None if kv.new_start is None else kv.new_start.data_ptr(),
        window=(strided(kv.window_k), strided(kv.window_v)),
        window_table=None if window is None else window.data_ptr(),
        window_row=0 if window is None else window.stride(0),
    )  # fmt: skip
    if kv.sink_k is not None and kv.sink_v is not None:
        args.sinks[0], args.sinks[1] = strided(kv.sink_k), strided(kv.sink_v)
    if (frame := frame_of(key_encoders)) is not None:
        args.frame, args.partner, args.frames = frame.table.data_ptr(), frame.partner.data_ptr(), len(frame.table)
        args.frame_tokens = frame.tokens
    return args, groups, kept


def supported(kv: PagedKV, packed: Tensor, *encoders: Encoder | None) -> bool:
    """Whether the kernel reads and writes these tensors where they lie."""
    layout, dtype = PageLayout.parse(kv.layout), kv.window_k.dtype
    sides = [side for group in layout.split(kv.pages) for side in (group.keys, group.values)]
    stored, exact = [t for side in sides for t in side.tensors], [s.exact for s in sides if s.exact is not None]
    lengths = [packed, kv.packed, kv.held, kv.total, *([] if kv.new_start is None else [kv.new_start])]
    return (
        dtype in DTYPES
        and kv.window_v.dtype == dtype
        and all(x.dtype == dtype for x in exact)
        and kv.window_k.stride(3) == kv.window_v.stride(3) == kv.table.stride(1) == 1
        and all(x is None or (x.dtype == dtype and x.stride(3) == 1) for x in (kv.sink_k, kv.sink_v))
        and (kv.window_table is None or kv.window_table.stride(1) == 1)
        and all(x.dtype == torch.int64 and x.is_contiguous() for x in lengths)
        and all(x[0, 0].is_contiguous() for x in stored)
        and not any(e is not None and e.encode.dtype == torch.float64 for e in encoders)
    )


def strided(x: Tensor) -> _Tokens:
    """Tokens ``[B, H, n, D]``, strides in bytes."""
    size, stride = x.element_size(), x.stride()
    return _Tokens(x.data_ptr(), *(size * step for step in stride[:3]))


def _side(
    tokens: PagedTokens, form: SideLayout, encoder: Encoder | None, dim: int, batch: int, heads: int, values: bool,
    packs: bool,
) -> _Side:  # fmt: skip
    """One side of one head group."""
    if form.shared:  # nothing is written there
        return _Side(form=SHARED, dim=dim)
    if tokens.exact is not None:
        x = tokens.exact
        size, (page, head, token, _) = x.element_size(), x.stride()
        return _Side(form=EXACT, dim=dim, exact=_Tokens(x.data_ptr(), size * page, size * head, size * token))
    if encoder is None:
        if packs:
            raise ValueError("a side that is coded needs an encoder, got None")
        return _Side(form=EXACT, dim=dim)  # nothing is written there
    side = _Side.from_buffer_copy(_encoder(encoder, batch, heads)[0])
    stored = (encoder.bits[0], encoder.scale_bits) == (form.bits[0], form.scale_bits)
    if not stored or side.base + side.side != (dim if values else len(form.bits)):
        raise ValueError(
            f"an encoder of {encoder.bits} and scales of {encoder.scale_bits} bits does not fit pages of {form.spec}"
        )
    assert tokens.scale is not None
    side.values, side.planes = values, len(tokens.planes)
    shift = 0
    for i, (plane, (width, columns)) in enumerate(zip(tokens.planes, _columns(form.bits, values), strict=True)):
        at = None if columns is None else columns.data_ptr()
        granules = 0 if columns is None else len(columns) // granule(width)
        side.plane[i] = _Plane(plane.data_ptr(), *plane.stride()[:2], at, width, granules, shift)
        shift += width
    side.scale = _numbers(tokens.scale)
    if tokens.zero is not None:
        side.zero = _numbers(tokens.zero)
    return side


def _numbers(x: Tensor) -> _Numbers:
    size, stride = x.element_size(), x.stride()
    return _Numbers(x.data_ptr(), *(size * step for step in stride[:3]))


@functools.cache
def _int32(numbers: tuple[int, ...]) -> Tensor:
    """Never freed: kernels point to it."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int32, device="cpu")


@functools.cache
def _columns(bits: tuple[int, ...], values: bool) -> tuple[tuple[int, Tensor | None], ...]:
    """The width of each plane, and of keys what each column holds: coordinate and shift, −1: padding."""
    if values:
        return tuple((width, None) for width in PIECES[bits[0]])
    made = []
    for width, pieces in plane_pieces(bits).items():
        held = [coordinate | shift << 16 for coordinate, shift in pieces]
        held += [-1] * (plane_columns(width, len(pieces)) - len(pieces))
        made.append((width, _int32(tuple(held))))
    return tuple(made)


_made: WeakKeyDictionary[Encoder, tuple[_Side, list[Tensor]]] = WeakKeyDictionary()


def _encoder(encoder: Encoder, batch: int, heads: int) -> tuple[_Side, list[Tensor]]:
    """``_Side`` without pages, kept with the tensors that it points to."""
    found = _made.get(encoder)
    if found is None:
        found = _made[encoder] = _encoder_form(encoder)
    for t in found[1]:
        if t.shape[0] not in (1, batch) or t.shape[1] not in (1, heads):
            raise ValueError(f"an encoder's tensors must be [{batch} or 1, {heads} or 1, ..], got {tuple(t.shape)}")
    return found


def _encoder_form(encoder: Encoder) -> tuple[_Side, list[Tensor]]:
    (dim, base), number = encoder.encode.shape[-2:], isinstance(encoder.step, float | int)
    form = FEEDBACK if encoder.hessian is not None else AFFINE if encoder.step is None else NEAREST
    total = encoder.coordinates
    bits = _int32(encoder.bits if len(encoder.bits) == total else encoder.bits * total)
    side = _Side(
        form=form, dim=dim, base=base, side=total - base, bits=encoder.bits[0], groups=encoder.groups(base),
        unbiased=encoder.unbiased, folded=number, step=encoder.step if number else 0.0,
        byte_scale=encoder.scale_bits == 8, coordinate_bits=bits.data_ptr(),
    )  # fmt: skip
    given: dict[str, tuple[Tensor | float | None, int]] = {
        "encode": (encoder.encode, 2), "mean": (encoder.mean, 1), "unit": (encoder.unit, 1),
        "steps": (encoder.step, 1), "hessian": (encoder.hessian, 2), "ldl": (encoder.factor, 2),
        "read": (None if encoder.read is None else encoder.read.transpose(-1, -2), 2),
        "side_encode": (encoder.side_encode, 2), "side_step": (encoder.side_step, 1),
    }  # fmt: skip
    kept: list[Tensor] = []
    for name, (x, trailing) in given.items():
        if isinstance(x, Tensor) and (total > base or name != "read"):
            x = x.detach().float()
            x = x[(None,) * (trailing + 2 - x.ndim)].contiguous()
            batch, head = (0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1))
            setattr(side, name, _Matrix(x.data_ptr(), batch, head))
            kept.append(x)
    return side, kept
