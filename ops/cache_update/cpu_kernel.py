"""The compiled CPU kernel behind ``cache_update``: its calls."""

import ctypes
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headq_ao.ops import cpu_build
from headq_ao.ops.cache_update.check import not_finite
from headq_ao.ops.cache_update.cpu_arguments import Args, Group, arguments, strided, supported
from headq_ao.ops.cache_update.encoders import Encoders, unflatten
from headq_ao.ops.types import PagedKV

if TYPE_CHECKING:
    from headq_ao.ops.requests import Requests

KEPT = 1024  # of :data:`_updates`; no tensor is kept with them


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is no compiler."""
    lib = cpu_build.load(Path(__file__).with_name("cpu_kernel.cpp"))
    if lib is not None:
        same = lib.headq_update_args_size() == ctypes.sizeof(Args)
        same = same and lib.headq_update_group_size() == ctypes.sizeof(Group)
        assert same, "cpu_arguments.py and cpu_kernel.cpp disagree about Args or Group"
    return lib


def launch(
    kv: PagedKV, k: Tensor, v: Tensor, packed: Tensor, most: int, encoders: Sequence[Tensor], spec: str,
    check_finite: bool,
) -> bool:  # fmt: skip
    """:func:`headq_ao.ops.cache_update` with flat encoders; False, and nothing is done, where the kernel does not read
    such tensors, nor for an engine's pages, which :meth:`Update.requests` serves."""
    if kv.window_table is not None:
        return False
    update = _kept_update(kv, packed, most, encoders, spec)
    if update is None:
        return False
    update.args.most, update.args.check_finite = most, check_finite
    update(k, v)
    return True


def plan(
    kv: PagedKV, packed: Tensor, key_encoders: Encoders, value_encoders: Encoders, check_finite: bool
) -> "Update | None":
    """:func:`headq_ao.ops.plan_update`."""
    lib = library()
    if lib is None or not supported(kv, packed, *key_encoders, *value_encoders):
        return None
    return Update(lib, kv, packed, -1, key_encoders, value_encoders, check_finite)


class Update:
    """A layer's :func:`headq_ao.ops.cache_update`, its arguments put together once; call it with ``k`` and ``v``.

    ``k``, ``v`` ``[B, Hkv, S, D]`` of any ``S``. All other tensors are read where they lie at the time of the call.

    Args:
        lib: of :func:`library`.
        kv, packed, most, key_encoders, value_encoders, check_finite: as there; ``most`` −1: what ``packed`` says.
    """

    def __init__(
        self, lib: ctypes.CDLL, kv: PagedKV, packed: Tensor, most: int, key_encoders: Encoders,
        value_encoders: Encoders, check_finite: bool,
    ) -> None:  # fmt: skip
        self.args, self.groups, self.kept = arguments(kv, packed, most, key_encoders, value_encoders, check_finite)
        self.dtype = kv.window_k.dtype
        self.added = self.args.added[0], self.args.added[1]
        self.form: tuple[tuple[int, ...], ...] = ()
        self.places, self.size = [x.data_ptr() for x in kv.pages], kv.window_k.element_size()
        self.call, self.by = lib.headq_cache_update, (ctypes.byref(self.args), self.groups)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """None: a copied cache makes one of its own."""

    def moved(self, pages: Sequence[Tensor], table: Tensor) -> None:
        """See :class:`headq_ao.ops.types.Plan`."""
        now, args = dict(zip(self.places, pages, strict=True)), self.args
        for group in self.groups:
            for side in group.side:
                for held in (*side.plane, side.scale, side.zero, side.exact):
                    if held.data:
                        x = now[held.data]
                        held.data, held.head = x.data_ptr(), x.stride(1) * x.element_size()
        args.table, args.table_row, args.columns = table.data_ptr(), table.stride(0), table.shape[1]
        self.places, self.kept[0] = [x.data_ptr() for x in pages], (pages, table)

    def __call__(self, k: Tensor, v: Tensor) -> None:
        """Append ``k`` and ``v``, and pack what leaves the window.

        Raises:
            ValueError: where they are checked and not finite; nothing is written then.
        """
        form = (k.shape, k.stride(), v.shape, v.stride())
        if form != self.form or k.dtype != self.dtype or v.dtype != self.dtype:
            k, v = self._take(k, v)
        args = self.args
        self.added[0].data, self.added[1].data = k.data_ptr(), v.data_ptr()
        args.threads = torch.get_num_threads()
        failed = self.call(*self.by)
        if failed:
            self._raise(failed)

    def requests(self, k: Tensor, v: Tensor, of: "Requests") -> None:
        """Of sequences with unequally many new tokens: ``k``, ``v`` ``[T, Hkv, D]``."""
        k, v = (x if x.dtype == self.dtype and x.stride(2) == 1 else x.to(self.dtype).contiguous() for x in (k, v))
        args, size = self.args, self.size
        for into, x in zip(self.added, (k, v), strict=True):
            into.data, into.batch, into.head, into.token = x.data_ptr(), 0, size * x.stride(1), size * x.stride(0)
        args.batch, args.slots, args.threads = len(of.table), len(k), torch.get_num_threads()
        args.table, args.table_row, args.columns = of.table.data_ptr(), of.table.stride(0), of.table.shape[1]
        args.window_table, args.window_row = of.window_table.data_ptr(), of.window_table.stride(0)
        args.packed = args.held = of.held.data_ptr()
        args.after = args.total = of.total.data_ptr()
        args.start = of.start.data_ptr()
        if failed := self.call(*self.by):
            self._raise(failed)

    def _take(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``k`` and ``v`` as the kernel reads them, tokens of another form than the last call's."""
        k, v = (x.to(self.dtype) for x in (k, v))
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        batch, heads, (k_dim, v_dim) = self.args.batch, self.args.kv_heads, self.args.dim
        for name, x, dim in (("k", k, k_dim), ("v", v, v_dim)):
            if (*x.shape[:2], x.shape[3]) != (batch, heads, dim) or x.shape[2] != k.shape[2]:
                raise ValueError(f"{name} must be [{batch}, {heads}, {k.shape[2]}, {dim}], got {tuple(x.shape)}")
        self.args.slots, self.form = k.shape[2], (k.shape, k.stride(), v.shape, v.stride())
        for into, x in zip(self.added, (k, v), strict=True):
            made = strided(x)
            into.batch, into.head, into.token = made.batch, made.head, made.token
        return k, v

    def _raise(self, failed: int) -> None:
        if failed == 1:
            raise MemoryError("cache_update had no memory for its working set")
        side, sequence = divmod(self.args.bad, self.args.batch)
        position = ctypes.c_int64.from_address(self.args.held + 8 * sequence).value
        raise not_finite(("keys", "values")[side], sequence, position)


_updates: dict[tuple[object, ...], Update] = {}


def _kept_update(kv: PagedKV, packed: Tensor, most: int, encoders: Sequence[Tensor], spec: str) -> Update | None:
    """An :class:`Update` over tensors that lie where those of an earlier call did, or a new one."""
    lib = library()
    if lib is None:
        return None
    own = (kv.table, kv.packed, kv.held, kv.total, packed, kv.window_k, kv.window_v, *kv.pages, *encoders)
    own = (*own, *(x for x in (kv.new_start, kv.window_table, kv.sink_k, kv.sink_v) if x is not None))
    key = (kv.layout, spec, kv.n_sink, most != 0, *[(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in own])
    found = _updates.get(key)
    if found is not None:
        return found
    keys, values = unflatten(encoders, spec)
    if not supported(kv, packed, *keys, *values):
        return None
    made = Update(lib, kv, packed, most, keys, values, False)
    if all(x.dtype == torch.float32 and x.is_contiguous() for x in encoders) and "side_encode" not in spec:
        if len(_updates) >= KEPT:
            _updates.clear()
        made.kept.clear()  # whoever finds it again holds those tensors
        _updates[key] = made
    return made


class _Rows(ctypes.Structure):
    """``Rows`` of cpu_kernel.cpp: the rows of a tensor, strides in bytes."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "parts", "part", "bytes")))


def move_rows(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> bool:
    """Make the moves of :mod:`headq_ao.ops.cache_update.move` in each tensor; False, and nothing is done, where one of
    them is none that the compiled code reads, or has no such rows."""
    lib, rows, most = library(), [_rows(t) for t in tensors], max(map(max, pairs), default=0)
    found = [x for x, t in zip(rows, tensors, strict=True) if x is not None and most < len(t)]
    if lib is None or len(found) < len(rows):
        return False
    flat = (ctypes.c_int64 * (2 * len(pairs)))(*itertools.chain(*pairs))
    given = (_Rows * len(found))(*found), len(found), flat, ctypes.c_int64(len(pairs)), torch.get_num_threads()
    if lib.headq_move_rows(*given):
        raise MemoryError("moving rows of the cache had no memory for one of them")
    return True


def _rows(t: Tensor) -> _Rows | None:
    """None where the compiled code does not read such a tensor."""
    if type(t) is not Tensor or not t.numel():
        return None
    row = t.stride(0) * t.element_size()
    if t.is_contiguous():
        return _Rows(t.data_ptr(), row, 1, 0, row)
    if t.ndim > 1 and t.transpose(0, 1).is_contiguous():  # pages: those of a head lie side by side
        return _Rows(t.data_ptr(), row, t.shape[1], t.stride(1) * t.element_size(), row)
    return None
