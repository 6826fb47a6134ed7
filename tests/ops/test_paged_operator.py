"""The operator of paged attention: plans, tracing, and what it refuses."""

import concurrent.futures
import copy
import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from headq_ao.ops import cpu_build, paged_attention, plan_attention
from headq_ao.ops.paged_attention import cpu_kernel, reference, tiled
from headq_ao.ops.types import PagedKV, Visible
from tests.ops.paged_cases import Case, make
from tests.ops.test_paged_attention import CASES, LIBRARY, counted, needs_kernel, queries

OF_AN_ENGINE = {"window_table", "sink_k", "sink_v", "newest", "recent"}  # which the operator does not take
BEHIND = {"softcap"}  # which it takes last
NAMES = [f.name for f in dataclasses.fields(PagedKV) if f.name not in OF_AN_ENGINE | BEHIND]


def flat(q, kv, readers, visible=None, sliding=0, reads=None):
    """Arguments of the registered operator."""
    seen = (None, None) if visible is None else (visible.low, visible.high)
    of_kv = [getattr(kv, name) for name in NAMES]
    of_readers, no_frame = (readers.query_map, readers.read, readers.mean), (None, None, 0)
    return (q, 0.125, *of_kv, *of_readers, *seen, sliding, reads, *no_frame, kv.softcap)


@needs_kernel
@pytest.mark.parametrize(
    "name", ["head groups", "sliding", "segments", "bf16", "side code", "drafts in the window", "softcap"]
)
def test_plan_equals_op(name):
    """Also at later lengths, which it reads where they lie."""
    case, group, tokens, sliding = CASES[name]
    kv, readers = make(dataclasses.replace(case, new=(0,) * len(case.packed)))
    q, reads = queries(kv, group, tokens), torch.zeros(2, dtype=torch.int64)
    step = plan_attention(kv, readers, q.shape[1], sliding, reads)
    assert copy.deepcopy(step) is None
    for shorter in (0, 3):
        kv.held.sub_(shorter)
        kv.total.sub_(shorter)
        reads.zero_()
        expected, _ = paged_attention(q, 0.125, kv, readers, None, sliding)
        torch.testing.assert_close(step(q, 0.125), expected, rtol=1e-3, atol=1e-4)
        assert reads.tolist() == counted(kv, reference.visible_positions(kv.total, tokens, sliding), case.layout)


@needs_kernel
def test_a_step_is_one_python_call():
    kv, readers = make(Case())
    q, calls = queries(kv, 3, 1), []
    step = plan_attention(kv, readers, q.shape[1])
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        step(q, 0.125)
    finally:
        sys.setprofile(None)
    assert calls == ["__call__"]


@needs_kernel
def test_threads_do_not_matter():
    kv, readers = make(Case(packed=(5000, 1200), window=(50, 60), new=(0, 0)))
    q, threads = queries(kv, 3, 2), torch.get_num_threads()
    outs = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        outs.append(paged_attention(q, 0.125, kv, readers))
    torch.set_num_threads(threads)
    torch.testing.assert_close(outs[1:], [outs[0]] * 2, rtol=0, atol=0)


def test_no_path_of_that_name(monkeypatch):
    if LIBRARY is None:
        pytest.skip("no C++ compiler: the reference serves")
    monkeypatch.setenv("HEADQ_CPU_ISA", "mmx")
    kv, readers = make(Case())
    with pytest.raises(ValueError, match="HEADQ_CPU_ISA must be one of"):
        paged_attention(queries(kv, 3, 1), 0.125, kv, readers)


def test_reference_serves_where_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr(cpu_kernel, "library", lambda: None)
    kv, readers = make(Case(new=(2,)))
    q = queries(kv, 3, 2)
    assert plan_attention(dataclasses.replace(kv, new_k=None, new_v=None), readers, q.shape[1]) is None
    found = paged_attention(q, 0.125, kv, readers)
    torch.testing.assert_close(found, reference.paged_attention(q, 0.125, kv, readers), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("new", "softcap"), [(0, None), (3, None), (3, 1.0)])
def test_opcheck(new, softcap):
    kv, readers = make(Case(new=(new,), softcap=softcap))
    args = flat(queries(kv, 3, 3), kv, readers, None, 200, torch.zeros(2, dtype=torch.int64))
    torch.library.opcheck(torch.ops.headq.paged_attention.default, args)


def test_compiled_whole_for_any_lengths():
    """One graph, one compilation: lengths are contents of tensors."""
    kv, readers = make(Case(), seed=1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda q: paged_attention(q, 0.125, kv, readers)[0], fullgraph=True, backend=backend)
    q = queries(kv, 3, 1)
    for shorter in (0, 5):
        kv.held.sub_(shorter)
        kv.total.sub_(shorter)
        torch.testing.assert_close(compiled(q), paged_attention(q, 0.125, kv, readers)[0], rtol=0, atol=0)
    assert len(graphs) == 1


def test_no_length_is_read_on_the_host():
    """The operator is traced for a GPU that is not there, and its tiles run on tensors without contents."""
    kv, readers = make(Case(new=(3,)))
    args = list(flat(queries(kv, 3, 3), kv, readers))
    on_meta = tree_map(lambda x: x.to("meta") if torch.is_tensor(x) else x, args)
    with FakeTensorMode() as mode:
        gpu = torch.device("cuda")
        out, lse = torch.ops.headq.paged_attention(
            *tree_map(lambda x: FakeTensor(mode, x, gpu) if torch.is_tensor(x) else x, on_meta)
        )
    without = dataclasses.replace(kv, **dict(zip(NAMES, on_meta[2:15], strict=True)))
    by_tiles = tiled.paged_attention(on_meta[0], 0.125, without, type(readers)(*on_meta[15:18]), None, 0, None)
    assert out.shape == by_tiles[0].shape == (1, 6, 3, 64)
    assert lse.shape == by_tiles[1].shape == (1, 6, 3)
    assert out.device.type == "cuda"


BAD = {
    "query heads": (dict(), "query heads must be a multiple"),
    "table": (dict(table=torch.zeros(1, 10, dtype=torch.int64)), "table must be"),
    "packed": (dict(packed=torch.zeros(2, dtype=torch.int64)), "packed must be"),
    "pages": (dict(pages=[]), "has 4 tensors"),
    "window_k": (dict(window_k=torch.zeros(1, 2, 100, 32)), "window_k must be"),
    "sinks": (dict(n_sink=100), "more slots than"),
    "new": (dict(new_k=torch.zeros(1, 2, 1, 64)), "go together"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name):
    kv, readers = make(Case())
    changes, message = BAD[name]
    q, bad = queries(kv, 3, 1)[:, : 5 if name == "query heads" else 6], dataclasses.replace(kv, **changes)
    with pytest.raises(ValueError, match=message):
        paged_attention(q, 0.125, bad, readers)


def test_what_does_not_fit_a_call():
    kv, readers = make(Case())
    q, ranges = queries(kv, 3, 1), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="q must be"):
        paged_attention(q[..., :32], 0.125, kv, readers)
    with pytest.raises(ValueError, match="sliding must be 0"):
        paged_attention(q, 0.125, kv, readers, Visible(ranges, ranges), 5)
    with pytest.raises(ValueError, match=r"visible\.high must be"):
        paged_attention(q, 0.125, kv, readers, Visible(ranges, ranges.int()))
    with pytest.raises(ValueError, match="packed keys need a query_map"):
        paged_attention(q, 0.125, kv, dataclasses.replace(readers, query_map=None))
    with pytest.raises(ValueError, match="read must be"):
        paged_attention(q, 0.125, kv, dataclasses.replace(readers, read=readers.read[..., :5]))
    with pytest.raises(ValueError, match="reads must be"):
        paged_attention(q, 0.125, kv, readers, reads=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of 32 tokens"):
        paged_attention(q, 0.125, dataclasses.replace(kv, layout=Case(page=16, values=(1,)).layout.spec), readers)
    with pytest.raises(ValueError, match="without new_k and new_v"):
        plan_attention(dataclasses.replace(kv, new_k=kv.window_k, new_v=kv.window_v), readers, 6)
    pages = [x.transpose(2, 3).contiguous().transpose(2, 3) if x.ndim == 6 else x for x in kv.pages]
    with pytest.raises(ValueError, match="a head's part of a page must be contiguous"):
        paged_attention(q, 0.125, dataclasses.replace(kv, pages=pages), readers)


def test_a_compiler_that_fails_means_one_warning_and_the_reference(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu_build, "load", cpu_build.load.__wrapped__)
    monkeypatch.setattr(cpu_kernel, "library", functools.cache(cpu_kernel.library.__wrapped__))
    kv, readers = make(Case())
    q = queries(kv, 3, 1)
    with pytest.warns(UserWarning, match="no compiled CPU kernel"):
        found = paged_attention(q, 0.125, kv, readers)
    torch.testing.assert_close(found, reference.paged_attention(q, 0.125, kv, readers), rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_kernel
def test_two_processes_may_compile_at_once(tmp_path):
    code = "from headq_ao.ops.paged_attention import cpu_kernel; assert cpu_kernel.library() is not None"
    environment = {**os.environ, "HEADQ_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


@needs_kernel
def test_threads_may_share_a_plan():
    """Each call has arguments of its own."""
    kv, readers = make(Case(packed=(2000,)))
    step = plan_attention(kv, readers, 6)
    qs = [queries(kv, 3, 1, seed) for seed in range(8)]
    wanted = [step(q, 0.125) for q in qs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            found = list(pool.map(lambda q: step(q, 0.125), qs))
            assert all(map(torch.equal, found, wanted))
