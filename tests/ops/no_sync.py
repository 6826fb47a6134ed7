"""A guard against what makes the host wait for a GPU, for calls traced with fake CUDA tensors."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave.Tensor", "allclose",
}  # fmt: skip


INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
# in a build without CUDA, torch's C++ for these methods asks for the device even of a fake tensor; operators do not
OPERATORS = {
    torch.Tensor.copy_: torch.ops.aten.copy_,
    torch.Tensor.contiguous: torch.ops.aten.contiguous,
    torch.Tensor.__invert__: torch.bitwise_not,
}


class HostSyncError(AssertionError):
    """An operator whose result the host waits for, or a copy between host and device."""


class NoSync(TorchDispatchMode):
    """Refuses operators that read a tensor's content on the host, index with a mask, or copy between host and device:
    a copy from pageable memory waits too, and none of them can be captured in a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        self.calls += 1
        if name in WAITING or f"{name}.{func._overloadname}" in WAITING:
            raise HostSyncError(f"{func} waits for the device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        indices = args[1] if name in INDEXING else ()
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices if x is not None):
            raise HostSyncError(f"{func} with a mask waits for the device")
        out = func(*args, **kwargs)
        devices = {x.device.type for x in (*tensors, *tree_leaves(out)) if isinstance(x, torch.Tensor) and x.ndim}
        if len(devices) > 1:
            raise HostSyncError(f"{func} copies between {' and '.join(sorted(devices))}")
        return out


class Bindings(TorchFunctionMode):
    """``x[...]`` and the methods of :data:`OPERATORS` by operators."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            view, index = self.cut(*args)
            return torch.ops.aten.index(view, index) if index else view
        if func is torch.Tensor.__setitem__:
            (view, index), value = self.cut(*args[:2]), args[2]
            value = value if isinstance(value, torch.Tensor) else torch.full((), value, device=view.device)
            torch.ops.aten.index_put_(view, index, value.to(view.dtype)) if index else torch.ops.aten.copy_(view, value)
            return None
        func = OPERATORS.get(func, func)
        if getattr(func, "__name__", None) in WAITING:
            raise HostSyncError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def cut(x, index):
        """The view that all but the tensors of an index give, and those tensors by dimension."""
        index = index if isinstance(index, tuple) else (index,)
        if any(i is Ellipsis for i in index):
            at = next(n for n, i in enumerate(index) if i is Ellipsis)
            fill = x.ndim - sum(i is not None and i is not Ellipsis for i in index)
            index = (*index[:at], *[slice(None)] * fill, *index[at + 1 :])
        dim, tensors = 0, []
        for i in index:
            if isinstance(i, int):
                x = torch.ops.aten.select(x, dim, i)
                continue
            if i is None:
                x = torch.ops.aten.unsqueeze(x, dim)
            elif isinstance(i, slice) and i != slice(None):
                x = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
            tensors.append(i if isinstance(i, torch.Tensor) else None)
            dim += 1
        return x, tensors if any(t is not None for t in tensors) else []


@contextlib.contextmanager
def fake_cuda():
    """Fake tensors, and the guard; yields the guard."""
    with FakeTensorMode(), NoSync() as guard, Bindings():
        yield guard
