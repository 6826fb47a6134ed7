"""The kernel of cache_update against the reference: any calls, forms, bits, pages, tables, padding."""

import ctypes
import platform
import shutil
import subprocess

import pytest
import torch

from headq_ao.ops import cpu_build, quantize
from headq_ao.ops.cache_update import cpu_kernel
from tests.ops import codes_96f785c
from tests.ops.cache_update.streams import (
    LAYOUTS,
    MIXED,
    SINKS,
    WINDOW,
    Stream,
    assert_equal,
    fill,
    used,
    with_kernel,
    with_plan,
    with_quantize,
    with_reference,
)
from tests.ops.frames import some_frame

pytestmark = pytest.mark.skipif(cpu_kernel.library() is None, reason="no compiler")
SOURCE = cpu_kernel.__file__.replace(".py", ".cpp")


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
def test_codes_are_those_of_the_whole_stream(dim, bits):
    """In whatever calls its tokens come: those that the quantizer gives all of them at once."""
    codes_96f785c.skip_unless_in_order()
    calls = (50, 1, 1, 7, 1, 2, 1, 3, 17, 1)
    s = fill(Stream([(("feedback", bits), ("feedback", bits), 2)], dim=dim, batch=1), with_kernel, calls, padded=False)
    n, stored = int(s.packed), used(s)
    assert n == sum(calls) - SINKS - WINDOW
    for side, name, encoders in ((0, "k", s.encoders[0]), (1, "v", s.encoders[1])):
        x = torch.cat([s.tokens(m, i)[side] for i, m in enumerate(calls)], 2)[:, :, SINKS : SINKS + n]
        codes, scale, _ = quantize(x.float(), encoders[0])
        assert torch.equal(stored[0, 0, name, "codes"].transpose(0, 1), codes[0])
        assert torch.equal(stored[0, 0, name, "scale"].flatten(1).T, scale[0, ..., 0])


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
