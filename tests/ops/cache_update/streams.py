"""Caches of every form, and calls that fill them, for tests."""

import itertools
import random

import torch

from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.ops import Encoder
from headq_ao.ops.cache_update import op as update_op
from headq_ao.ops.cache_update.op import cache_update, plan_update
from headq_ao.ops.encode import reference as encode_reference
from headq_ao.ops.layout import unpack_keys, unpack_values
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.rounding import scale_of
from headq_ao.ops.types import PagedKV

SINKS, WINDOW, RING = 4, 16, 40
FORMS = ["feedback", "byte", "nearest", "affine", "affine, groups", "exact", "side code"]


def encoder_of(form, keys, heads, dim, bits, own=1, unit=False, frame=None):
    """An encoder as the codecs make them, and its side of the layout."""
    if form == "exact":
        return None, Side()
    mixing = torch.linalg.qr(torch.randn(dim, dim))[0][None, None]
    given = {
        "encode": mixing * (0.5 + torch.rand(own, heads, 1, dim)), "mean": torch.randn(own, heads, dim),
        "bits": (bits,), "step": GAUSSIAN_STEP[bits],
        "unit": 2.0 ** torch.randint(-3, 3, (own, heads, 1)) if unit else None,
    }  # fmt: skip
    groups = 1
    if (keys and form != "affine") or form == "byte":
        given["step"] = torch.full((1, 1, dim), GAUSSIAN_STEP[bits])
    if form in ("feedback", "byte"):
        seen = torch.randn(own, heads, dim, dim // 4)
        given["hessian"] = seen @ seen.mT + 0.2 * torch.eye(dim)
    if form.startswith("affine"):
        given["step"] = None
        if "groups" in form and not keys:
            given["group_size"], groups = 16, dim // 16
    stored = (bits,) * dim if keys else (bits,)
    if form == "side code" and keys:
        rank = 8
        given |= {
            "side_encode": torch.randn(own, heads, dim, rank) / dim**0.5,
            "read": mixing.expand(own, heads, -1, -1),
        }
        given |= {"side_step": torch.full((1, heads, rank), 0.3)}
        stored = given["bits"] = (bits,) * dim + (2,) * rank
    scale_bits = 8 if form == "byte" else 16
    encoder = Encoder(**given, scale_bits=scale_bits, frame=frame if keys else None)
    return encoder, Side(stored, given["step"] is None, groups, scale_bits)


class Stream:
    """A cache, and the calls that fill it."""

    def __init__(self, forms, dim=32, batch=2, page=32, dtype=torch.float32, columns=8, own=1, unit=False, frame=None):
        torch.manual_seed(0)
        groups, self.encoders, first = [], ([], []), 0
        for (key_form, key_bits), (value_form, value_bits), heads in forms:
            keys, key_side = encoder_of(key_form, True, heads, dim, key_bits, own, unit, frame)
            values, value_side = encoder_of(value_form, False, heads, dim, value_bits, own, unit)
            groups.append(GroupLayout(first, heads, key_side, value_side))
            self.encoders[0].append(keys)
            self.encoders[1].append(values)
            first += heads
        self.layout, self.batch, self.heads, self.dim = PageLayout(page, dim, dim, tuple(groups)), batch, first, dim
        pages = self.layout.allocate(1 + batch * columns, dtype, torch.device("cpu"))
        for t in pages:  # what was never written may hold anything
            t.fill_(0xA5) if t.dtype == torch.uint8 else t.fill_(float("nan"))
        order = torch.randperm(batch * columns) + 1
        self.packed = torch.zeros(batch, dtype=torch.int64)
        self.kv = PagedKV(
            pages, self.layout.spec, order.view(batch, columns).int(), None,
            *(torch.zeros(batch, dtype=torch.int64) for _ in range(3)),
            torch.full((batch, first, SINKS + RING, dim), float("nan"), dtype=dtype),
            torch.full((batch, first, SINKS + RING, dim), float("nan"), dtype=dtype), SINKS,
            new_start=torch.zeros(batch, dtype=torch.int64),
        )  # fmt: skip

    def tokens(self, n, seed, dtype=None):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(2, self.batch, self.heads, n, self.dim, generator=g)
        return (2 * x + 0.5).to(dtype or self.kv.window_k.dtype).unbind(0)

    def call(self, run, k, v, real=None, extra=0):
        """One call: lengths in place, as a cache keeps them; padding on the left is NaN."""
        kv, n = self.kv, k.shape[2]
        count = torch.full((self.batch,), n) if real is None else torch.tensor(real)
        kv.new_start.copy_(n - count)
        for b in range(self.batch):
            k[b, :, : n - count[b]] = v[b, :, : n - count[b]] = float("nan")
        kv.held.copy_(kv.total)
        kv.total.add_(count)
        kv.packed.copy_(self.packed)
        self.packed.copy_(torch.maximum(self.packed, kv.total - SINKS - WINDOW))
        run(self, k, v, int((self.packed - kv.packed).max()) + extra)


def with_kernel(s, k, v, most):
    cache_update(s.kv, k, v, s.packed, most, *s.encoders)


def with_plan(s, k, v, most):
    vars(s).setdefault("plan", plan_update(s.kv, s.packed, *s.encoders))(k, v)


def with_quantize(s, k, v, most):
    update_op.by_quantize(s.kv, k, v, s.packed, most, *s.encoders, False)


def with_reference(s, k, v, most):
    update_op.by_quantize(s.kv, k, v, s.packed, most, *s.encoders, False, encode_reference.quantize)


def fill(s, run, calls=(70, 1, 1, 33, 1, 2, 1, 3, 1, 18, 1, 1, 5), seed=0, padded=True):
    rng = random.Random(seed)
    for i, n in enumerate(calls):
        real = [n if rng.random() < 0.7 else rng.randint(0, n) for _ in range(s.batch)] if padded else None
        s.call(run, *(x.clone() for x in s.tokens(n, 100 * seed + i)), real, rng.randint(0, 2))
    return s


def used(s):
    """By sequence: everything stored for its packed tokens, by group and side: codes, scales, zeros, tokens."""
    found = {}
    p = s.layout.page_tokens
    for b, (n, group) in itertools.product(range(s.batch), enumerate(s.layout.split(s.kv.pages))):
        j = torch.arange(int(s.packed[b]))[max(0, int(s.packed[b]) - s.kv.table.shape[1] * p + p) :]
        page, at = s.kv.table[b, (j // p) % s.kv.table.shape[1]].long(), j % p
        for name, side in (("k", group.keys), ("v", group.values)):
            own = {
                key: getattr(side, key)[page, :, at]
                for key in ("scale", "zero", "exact")
                if getattr(side, key) is not None
            }
            if side.planes:
                unpacked = (
                    unpack_keys(side.planes, side.bits) if name == "k" else unpack_values(side.planes, side.bits[0])
                )
                own["codes"] = unpacked[page, :, at]
            found |= {(b, n, name, key): x for key, x in own.items()}
    return found


def assert_equal(a, b, ties=0):
    """Windows and all pages but the null page, bit for bit, so that nothing else was written; or, of packed tokens,
    all but so many codes, and scales but for their rounding."""
    for x, y in ((a.kv.window_k, b.kv.window_k), (a.kv.window_v, b.kv.window_v)):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    if not ties:
        for x, y in zip(a.kv.pages, b.kv.pages, strict=True):
            torch.testing.assert_close(x[1:], y[1:], rtol=0, atol=0, equal_nan=True)
    off = 0
    mine, theirs = used(a), used(b)
    assert mine.keys() == theirs.keys() and any(len(x) for x in mine.values())
    for key, x in mine.items():
        y = theirs[key]
        if key[-1] == "codes" or not ties:
            off += int((x != y).sum())
            assert ties or torch.equal(x, y), key
        else:
            near = 2.0**-5 if x.dtype == torch.uint8 else 2e-3  # the next byte is a 64th to a 32nd away
            torch.testing.assert_close(scale_of(x), scale_of(y), rtol=near, atol=1e-6)
        assert key[-1] == "codes" or bool(torch.isfinite(x).all())
    assert off <= ties


LAYOUTS = {
    "one group": [(("byte", 2), ("byte", 2), 3)],
    "mixed bits": [(("byte", 3), ("byte", 2), 1), (("byte", 1), ("byte", 3), 2)],
    "fp16 scales": [(("feedback", 3), ("feedback", 2), 1), (("feedback", 1), ("byte", 3), 2)],
    "exact keys": [(("exact", 0), ("feedback", 4), 2)],
    "exact values": [(("feedback", 8), ("exact", 0), 2)],
    "nearest": [(("nearest", 2), ("nearest", 3), 2)],
    "affine": [(("affine", 2), ("affine, groups", 4), 2)],
    "side code": [(("side code", 2), ("nearest", 2), 2)],
    "all sorts": [
        (("affine", 4), ("feedback", 2), 1), (("feedback", 5), ("affine, groups", 1), 1),
        (("exact", 0), ("exact", 0), 1),
    ],
}  # fmt: skip
MIXED = LAYOUTS["mixed bits"]
