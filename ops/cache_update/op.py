"""``cache_update``: append a call's tokens to a paged cache and pack those that leave the window."""

import torch
from torch import Tensor

from headq_ao.ops.cache_update import reference
from headq_ao.ops.cache_update.check import refuse_not_finite
from headq_ao.ops.cache_update.encoders import Encoders, Quantize, coders, flatten, frame_of, unflatten
from headq_ao.ops.dispatch import direct, kernels
from headq_ao.ops.encode.op import quantize
from headq_ao.ops.page_layout import PageLayout, values_are_keys
from headq_ao.ops.types import PagedKV, Plan


def cache_update(
    kv: PagedKV, k: Tensor, v: Tensor, packed: Tensor, most: int, key_encoders: Encoders, value_encoders: Encoders,
    check_finite: bool = False,
) -> None:  # fmt: skip
    """Append ``k``, ``v`` ``[B, Hkv, S, D]``, tokens ``held ≤ p < total``, and pack body tokens up to ``packed``.

    Pages and window of ``kv`` are written in place. Each token is coded from its full-precision copy, by itself: codes
    do not depend on which call packs it, nor on what else that call packs.

    Args:
        kv: the cache before the call; ``new_start`` as there, ``new_k`` and ``new_v`` are not looked at.
        k, v: any strides; real slots from ``new_start`` on.
        packed: ``[B]`` int64, body tokens that are packed after it.
        most: an upper bound of ``packed − kv.packed`` that the host knows.
        key_encoders, value_encoders: one for each head group of the layout; None: not coded, or ``most`` is 0.
        check_finite: refuse tokens that are not finite; it waits for the device.

    Raises:
        ValueError: when shapes do not fit each other, or for ``check_finite``; nothing is written then.
    """
    tensors, spec = flatten(key_encoders, value_encoders)
    if kv.window_table is not None:  # the operator has none in its schema
        module = kernels("cache_update", k.device.type)
        if module is None or not module.launch(kv, k, v, packed, most, tensors, spec, check_finite):
            by_quantize(kv, k, v, packed, most, key_encoders, value_encoders, check_finite)
        return
    run = _cache_update
    if not (direct(k) and direct(v)):
        run, k, v = torch.ops.headq.cache_update, k.detach(), v.detach()
    # of one window for both sides an operator cannot say twice that it writes to it
    window_v = kv.window_k.new_empty(0) if values_are_keys(kv.layout) else kv.window_v
    run(
        kv.pages, kv.layout, kv.table, kv.packed, kv.held, kv.total, kv.window_k, window_v, kv.n_sink, k, v,
        kv.new_start, packed, most, tensors, spec, check_finite,
    )  # fmt: skip


def plan_update(
    kv: PagedKV, packed: Tensor, key_encoders: Encoders, value_encoders: Encoders, check_finite: bool = False
) -> Plan | None:
    """:func:`cache_update` with all but ``k`` and ``v`` given once, or None where there is no kernel for it.

    Tensors are read where they lie now: write lengths and the table in place. Who moves another one makes a new plan.
    """
    module = kernels("cache_update", kv.window_k.device.type)
    if module is None or not hasattr(module, "plan"):
        return None
    made: Plan | None = module.plan(kv, packed, key_encoders, value_encoders, check_finite)
    return made


def by_quantize(
    kv: PagedKV, k: Tensor, v: Tensor, packed: Tensor, most: int, key_encoders: Encoders, value_encoders: Encoders,
    check_finite: bool, quantize: Quantize = quantize,
) -> None:  # fmt: skip
    """The reference, with the quantizer that has kernels."""
    if check_finite:
        refuse_not_finite(kv, k, v)
    functions = coders(PageLayout.parse(kv.layout), key_encoders, value_encoders, quantize)
    reference.cache_update(kv, k, v, packed, most, *functions, frame_of(key_encoders))


# As torch.library.custom_op would define it, which at 17 arguments spends 0.2 ms of Python on each call.
torch.library.define(
    "headq::cache_update",
    "(Tensor(a!)[] pages, str layout, Tensor table, Tensor packed_before, Tensor held, Tensor total, "
    "Tensor(b!) window_k, Tensor(c!) window_v, int n_sink, Tensor k, Tensor v, Tensor? new_start, Tensor packed, "
    "SymInt most, Tensor[] encoders, str spec, bool check_finite) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _cache_update(
    pages: list[Tensor], layout: str, table: Tensor, packed_before: Tensor, held: Tensor, total: Tensor,
    window_k: Tensor, window_v: Tensor, n_sink: int, k: Tensor, v: Tensor, new_start: Tensor | None, packed: Tensor,
    most: int, encoders: list[Tensor], spec: str, check_finite: bool,
) -> None:  # fmt: skip
    window_v = window_k if values_are_keys(layout) else window_v
    kv = PagedKV(
        pages, layout, table, None, packed_before, held, total, window_k, window_v, n_sink, new_start=new_start
    )  # fmt: skip
    module = kernels("cache_update", k.device.type)
    if module is None or not module.launch(kv, k, v, packed, most, encoders, spec, check_finite):
        by_quantize(kv, k, v, packed, most, *unflatten(encoders, spec), check_finite)


torch.library.impl("headq::cache_update", "default", _cache_update)
torch.library.register_fake("headq::cache_update", lambda *args: None)
