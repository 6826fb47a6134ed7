"""What must hold of the arguments of paged attention: checked once for tensors of a form."""

import dataclasses

import pytest
import torch

from headq_ao.ops.paged_attention import check
from headq_ao.ops.paged_attention.check import check_cache, check_call
from headq_ao.ops.types import Visible
from tests.ops.frames import some_frame
from tests.ops.paged_cases import Case, make


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch):
    monkeypatch.setattr(check, "_fine", set())


def test_a_form_is_checked_once(monkeypatch):
    """The same shapes, strides, dtypes, sinks and heads need no second look; another of them does, and what was
    refused is refused again."""
    calls, real = [], check._check_cache
    monkeypatch.setattr(check, "_check_cache", lambda *args: calls.append(1) or real(*args))
    kv, readers = make(Case())
    again, _ = make(Case(), seed=1)
    check_cache(kv, readers, 6, None)
    check_cache(again, readers, 6, None)
    assert len(calls) == 1
    check_cache(kv, readers, 4, None)
    check_cache(dataclasses.replace(kv, n_sink=3), readers, 6, None)
    check_cache(kv, readers, 6, torch.zeros(2, dtype=torch.int64))
    assert len(calls) == 4
    for _ in range(2):
        with pytest.raises(ValueError, match="query heads must be a multiple of the 2 KV heads, got 5"):
            check_cache(kv, readers, 5, None)
    monkeypatch.setattr(check, "MOST_KEPT", 4)
    check_cache(kv, dataclasses.replace(readers, mean=None), 6, None)
    assert len(check._fine) == 1, "they do not grow without end"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(1, 0).int()}, r"table must be \[B, C\] with C at least 1"),
        ({"segment": torch.zeros(3).int()}, "segment must be"),
        ({"new_start": torch.zeros(1).int()}, "new_start must be"),
        ({"sink_k": torch.zeros(1)}, "sink_k and sink_v go with a window_table"),
        ({"window_table": torch.zeros(1, 2).int()}, "a window_table needs sink_k and sink_v, and at most 32 sinks"),
        ({"held": torch.zeros(1, dtype=torch.int64, device="meta")}, "held must be on cpu, got meta"),
        ({"window_v": torch.zeros(1, 2, 50, 64)}, "window_v must be"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_caches_that_do_not_fit_together(change, message):
    kv, readers = make(Case())
    with pytest.raises(ValueError, match=message):
        check_cache(dataclasses.replace(kv, **change), readers, 6, None)


@pytest.mark.parametrize(("tokens", "fits"), [(32, True), (96, True), (48, False), (0, False)])
def test_a_segment_is_whole_pages(tokens, fits):
    kv, readers = make(Case())
    framed = dataclasses.replace(readers, frame=dataclasses.replace(some_frame(64, 32), tokens=tokens))
    if fits:
        return check_cache(kv, framed, 6, None)
    with pytest.raises(ValueError, match=f"a segment must be whole pages of 32 tokens, got {tokens}"):
        check_cache(kv, framed, 6, None)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("query_map", (1, 1, 3, 64, 67)), ("query_map", (1, 1, 2, 64, 66)), ("mean", (1, 64)), ("read", (3, 2, 64, 64))],
)
def test_readers_that_do_not_fit(name, shape):
    kv, readers = make(Case())
    with pytest.raises(ValueError, match=f"{name} must be fp32"):
        check_cache(kv, dataclasses.replace(readers, **{name: torch.zeros(shape)}), 6, None)


def test_keys_of_all_heads_have_as_many_coordinates():
    kv, readers = make(Case(heads=(1, 1), keys=((2,) * 64, (2,) * 64), values=(2, 2)))
    layout = Case(heads=(1, 1), keys=((2,) * 64, (2,) * 80), values=(2, 2)).layout
    pages = layout.allocate(len(kv.pages[0]), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"as many coordinates, got \[64, 80\]"):
        check_cache(dataclasses.replace(kv, layout=layout.spec, pages=pages), readers, 2, None)


def test_calls_that_do_not_fit():
    kv, _ = make(Case(new=(3,)))
    q, ranges = torch.zeros(1, 6, 3, 64), torch.zeros(1, 3, dtype=torch.int64)
    check_call(q, kv, Visible(ranges, ranges), 0)
    for given, message in (
        ((q[0], kv, None, 0), r"q must be \[B, Hq, S, D\]"),
        ((q.long(), kv, None, 0), "q must be of a floating dtype, got torch.int64"),
        ((q[:, :, :2], kv, None, 0), "new_k must have the 2 tokens of q, got 3"),
        ((q, kv, Visible(ranges[:, :2], ranges), 0), r"visible.low must be \(1, 3\)"),
        ((q, kv, Visible(ranges, ranges), 1), "sliding must be 0, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_call(*given)
