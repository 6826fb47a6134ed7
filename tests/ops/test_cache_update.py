"""The kernel of cache_update against the reference: any calls, forms, bits, pages, tables, padding."""

import ctypes
import functools
import itertools
import platform
import random
import shutil
import subprocess

import pytest
import torch

from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.ops import Encoder, cpu_build
from headq_ao.ops.cache_update import cpu_kernel
from headq_ao.ops.cache_update import op as update_op
from headq_ao.ops.cache_update.encoders import flatten
from headq_ao.ops.cache_update.op import cache_update, plan_update
from headq_ao.ops.encode import reference as encode_reference
from headq_ao.ops.layout import unpack_keys, unpack_values
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.types import PagedKV
from tests.ops import codes_96f785c
from tests.ops.frames import some_frame

pytestmark = pytest.mark.skipif(cpu_kernel.library() is None, reason="no compiler")
SINKS, WINDOW, RING = 4, 16, 40
SOURCE = cpu_kernel.__file__.replace(".py", ".cpp")
FORMS = ["feedback", "nearest", "affine", "affine, groups", "exact", "side code"]


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
    if keys and form != "affine":
        given["step"] = torch.full((1, 1, dim), GAUSSIAN_STEP[bits])
    if form == "feedback":
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
    return Encoder(**given, frame=frame if keys else None), Side(stored, given["step"] is None, groups)


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
            torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-6)
        assert key[-1] == "codes" or bool(torch.isfinite(x).all())
    assert off <= ties


LAYOUTS = {
    "one group": [(("feedback", 2), ("feedback", 2), 3)],
    "mixed bits": [(("feedback", 3), ("feedback", 2), 1), (("feedback", 1), ("feedback", 3), 2)],
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


@pytest.mark.parametrize("run", [with_kernel, with_plan])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_kernel_equals_the_quantizer(name, run):
    """Bit for bit with error feedback, whose sums have one order; the others up to rounding ties."""
    codes_96f785c.skip_unless_in_order()
    ours, theirs = fill(Stream(LAYOUTS[name]), run), fill(Stream(LAYOUTS[name]), with_quantize)
    forms = {form for group in LAYOUTS[name] for form, _ in group[:2]}
    assert_equal(ours, theirs, ties=0 if forms <= {"feedback", "exact"} else 2)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_kernel_against_the_pure_reference(name):
    calls = (40, 1, 1, 9, 1, 2)
    ours, theirs = (fill(Stream(LAYOUTS[name]), run, calls) for run in (with_kernel, with_reference))
    assert_equal(ours, theirs, ties=2)


MIXED = LAYOUTS["mixed bits"]


@pytest.mark.parametrize(
    "options",
    [
        {"page": 16}, {"page": 64}, {"page": 128, "columns": 2}, {"columns": 3}, {"own": 2, "unit": True},
        {"frame": some_frame(32, 32)}, {"frame": some_frame(32, 64, 2), "dtype": torch.bfloat16},
        {"frame": some_frame(80, 32, rotary=40, paired=False), "dim": 80, "own": 2, "unit": True},
        {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"dim": 48}, {"dim": 80}, {"dim": 256}, {"batch": 3},
    ],
    ids=lambda options: ", ".join(options),
)  # fmt: skip
def test_pages_tables_dtypes_and_sizes(options):
    """A table of 3 columns is reused, as under a sliding window."""
    forms = [(("feedback", 2), ("feedback", 4), 1), (("feedback", 6), ("exact", 0), 1)] if "page" in options else MIXED
    calls = (40, 30, 1, 1, 33, 1, 2, 1, 3, 1, 18, 1, 1, 5)  # a call writes into fewer pages than the table has
    options = {"own": options["batch"]} | options if "batch" in options else options
    codes_96f785c.skip_unless_in_order()
    ours, theirs = (fill(Stream(forms, **options), run, calls) for run in (with_plan, with_quantize))
    assert_equal(ours, theirs)
    assert options.get("columns") != 3 or int(ours.packed.max()) > 3 * 32


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 128, 256])
def test_codes_are_those_of_96f785c(dim, bits):
    """Those that its kernels gave a block of tokens, in whatever calls they come."""
    codes_96f785c.skip_unless_in_order()
    calls = (50, 1, 1, 7, 1, 2, 1, 3, 17, 1)
    s = fill(Stream([(("feedback", bits), ("feedback", bits), 2)], dim=dim, batch=1), with_kernel, calls, padded=False)
    n, stored = int(s.packed), used(s)
    assert n == sum(calls) - SINKS - WINDOW
    for side, name, encoders in ((0, "k", s.encoders[0]), (1, "v", s.encoders[1])):
        x = torch.cat([s.tokens(m, i)[side] for i, m in enumerate(calls)], 2)[:, :, SINKS : SINKS + n]
        codes, scale = codes_96f785c.quantize(x, encoders[0])
        assert torch.equal(stored[0, 0, name, "codes"].transpose(0, 1), codes[0])
        assert torch.equal(stored[0, 0, name, "scale"].flatten(1).T, scale[0])


@pytest.mark.parametrize("run", [with_plan, with_quantize])
@pytest.mark.parametrize("name", ["mixed bits", "affine", "nearest", "side code"])
def test_calls_do_not_matter(name, run):
    """The same tokens at once, one by one, or anything between: the same pages, bit for bit."""
    if run is with_quantize:
        codes_96f785c.skip_unless_in_order()
    streams = []
    for calls in ((90,), (1,) * 90, (3, 50, 1, 1, 2, 33)):
        s = Stream(LAYOUTS[name])
        for k, v in zip(*(x.split(calls, 2) for x in s.tokens(90, 0)), strict=True):
            s.call(run, k.clone(), v.clone())
        streams.append(s)
    assert_equal(streams[0], streams[1])
    assert_equal(streams[0], streams[2])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(threads):
    want, before = fill(Stream(MIXED), with_kernel), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = fill(Stream(MIXED), with_kernel)
    finally:
        torch.set_num_threads(before)
    assert_equal(got, want)


@pytest.mark.parametrize("run", [with_kernel, with_plan, with_quantize])
def test_tokens_of_another_form(run):
    """Strided, or of another dtype than the window's: as their contiguous copies in its dtype."""
    streams = [Stream(MIXED, dtype=torch.bfloat16) for _ in range(2)]
    for i, n in enumerate((60, 1, 1, 4)):
        k, v = streams[0].tokens(n, i, torch.float32)
        streams[0].call(run, k.to(torch.bfloat16), v.to(torch.bfloat16))
        streams[1].call(run, k.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([v, v], -1)[..., 0])
    assert_equal(*streams)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_are_not_finite(kernel, dtype):
    """Named by sequence, and nothing is written; padding may hold anything."""

    def checked(s, k, v, most):
        if kernel:
            cache_update(s.kv, k, v, s.packed, most, *s.encoders, check_finite=True)
        else:
            update_op.by_quantize(s.kv, k, v, s.packed, most, *s.encoders, True)

    s = fill(Stream(MIXED, dtype=dtype), checked, (40,), padded=False)
    s.call(checked, *(x.clone() for x in s.tokens(4, 1)), real=[4, 2])
    kept = [x.clone() for x in (*s.kv.pages, s.kv.window_k, s.kv.window_v, s.kv.total, s.packed)]
    for name, bad in (("keys", float("inf")), ("values", float("nan"))):
        k, v = (x.clone() for x in s.tokens(3, 2))
        (k if name == "keys" else v)[1, 2, 2, 5] = bad
        message = f"{name} must be finite to be packed, got inf or nan in sequence 1 from slot 42 on"
        with pytest.raises(ValueError, match=message):
            s.call(checked, k, v)
        s.kv.total.copy_(kept[-2])
        s.packed.copy_(kept[-1])
    for x, y in zip((*s.kv.pages, s.kv.window_k, s.kv.window_v), kept[:-2], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["mixed bits", "all sorts"])
def test_opcheck(name):
    s = fill(Stream(LAYOUTS[name]), with_kernel, (40, 1), padded=False)
    kv, (k, v) = s.kv, s.tokens(2, 9)
    kv.held.copy_(kv.total)
    kv.total.add_(2)
    kv.packed.copy_(s.packed)
    s.packed.add_(2)
    for t in (*kv.pages, kv.window_k, kv.window_v):
        t.nan_to_num_(0.0) if t.is_floating_point() else None
    arguments = (
        kv.pages, kv.layout, kv.table, kv.packed, kv.held, kv.total, kv.window_k, kv.window_v, kv.n_sink, k, v,
        kv.new_start, s.packed, 2, *flatten(*s.encoders), False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.headq.cache_update.default, arguments)


def test_where_calls_are_traced():
    """Compiled in one graph: the same pages, and lengths are read at each call."""
    streams = [Stream(MIXED) for _ in range(2)]

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(k, v):
        cache_update(streams[1].kv, k, v, streams[1].packed, 3, *streams[1].encoders)

    for i, n in enumerate((40, 1, 1, 1)):
        k, v = streams[0].tokens(n, i)
        streams[0].call(with_kernel, k.clone(), v.clone())
        streams[1].call(with_kernel if n > 1 else lambda s, k, v, most: step(k, v), k.clone(), v.clone())
    assert_equal(*streams)


def test_tokens_with_gradients():
    streams = [Stream(MIXED) for _ in range(2)]
    k, v = streams[0].tokens(40, 0)
    streams[0].call(with_kernel, k.clone(), v.clone())
    streams[1].call(lambda s, k, v, most: with_kernel(s, k.requires_grad_(), v.requires_grad_(), most), k, v)
    assert_equal(*streams)
    assert not streams[1].kv.window_k.requires_grad


def test_float64_goes_to_the_reference():
    s, want = Stream(MIXED, dtype=torch.float64), Stream(MIXED, dtype=torch.float64)
    assert plan_update(s.kv, s.packed, *s.encoders) is None
    assert_equal(fill(s, with_kernel, (40, 1, 1)), fill(want, with_reference, (40, 1, 1)))


def test_errors():
    s = Stream(MIXED)
    k, v = s.tokens(3, 0)
    for bad, message in (((k[:, :2], v), "k must"), ((k, v[..., :16]), "v must"), ((k, v[:, :, :2]), "v must")):
        with pytest.raises(ValueError, match=message):
            with_kernel(s, *bad, 0)
    with pytest.raises(ValueError, match="needs an encoder, got None"):
        plan_update(s.kv, s.packed, [None, None], s.encoders[1])
    with pytest.raises(ValueError, match=r"an encoder of \(3,\) does not fit pages of 1\*32"):
        plan_update(s.kv, s.packed, s.encoders[0][:1] * 2, s.encoders[1])
    with pytest.raises(ValueError, match=r"tensors must be \[2 or 1, 1 or 1, ..\], got \(1, 2, 32, 32\)"):
        plan_update(s.kv, s.packed, s.encoders[0][1:] * 2, s.encoders[1])


FUSED = {"x86-64": False, "x86-64-v3": True, "x86-64-v4": True}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another CPU")
@pytest.mark.parametrize("level", list(FUSED))
def test_any_cpu(level, tmp_path, monkeypatch):
    """Compiled for less than this CPU: the same bits where multiply-adds are fused, close where they are not."""
    if "fma" not in cpu_build.cpu_name() or (level == "x86-64-v4" and "avx512vl" not in cpu_build.cpu_name()):
        pytest.skip("this CPU does not run it")
    flags = [f"-march={level}" if flag.startswith("-march") else flag for flag in cpu_build.FLAGS]
    built = str(tmp_path / "built.so")
    subprocess.run([*cpu_build.compiler(), *flags, "-Wno-psabi", SOURCE, "-o", built], check=True)
    library, want = ctypes.CDLL(built), fill(Stream(LAYOUTS["all sorts"]), with_kernel)
    monkeypatch.setattr(cpu_kernel, "library", lambda: library)
    monkeypatch.setattr(cpu_kernel, "_updates", {})
    assert_equal(fill(Stream(LAYOUTS["all sorts"]), with_kernel), want, ties=0 if FUSED[level] else 3)


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no cross compiler")
def test_it_compiles_for_arm(tmp_path):
    flags = [flag for flag in cpu_build.FLAGS if not flag.startswith(("-march", "-O"))]
    command = [
        "aarch64-linux-gnu-g++",
        *flags,
        "-Wall",
        "-Werror",
        "-Wno-psabi",
        SOURCE,
        "-o",
        str(tmp_path / "arm.so"),
    ]
    subprocess.run(command, check=True)
