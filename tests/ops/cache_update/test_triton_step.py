"""When a decoding step's two launches serve, and what they are given; their results are in ../step_interpreted.py."""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from headq_ao.ops.cache_update import triton_step
from headq_ao.ops.cache_update.encoders import flatten
from headq_ao.ops.cache_update.triton_step import Step, sinks_of, step, tables, with_strides
from headq_ao.ops.error_feedback.reference import SPREADS
from tests.ops.cache_update.streams import LAYOUTS, RING, Stream
from tests.ops.frames import some_frame


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(triton_step, "with_ptx", lambda: False)


def made(s, **changes):
    return step(dataclasses.replace(s.kv, **changes), s.packed, *flatten(*s.encoders))


def test_a_step_is_put_together_for_calibrated_codecs():
    s = Stream(LAYOUTS["mixed bits"], frame=some_frame(32, 32))
    found = made(s)
    assert isinstance(found, Step) and found.rows.shape[0] == 2 * s.heads and found.ring == RING
    assert found.frame[2:] == (32, 40) and found.sinks is None
    assert copy.deepcopy([found]) == [None], "a copied cache makes one of its own"
    scratch, codes, numbers = found.room(7)
    assert scratch.shape == codes.shape == (7 * 2 * len(SPREADS), found.width) and numbers.shape[0] == len(codes)
    assert codes.dtype == torch.uint8


def test_what_it_does_not_serve():
    """Forms that rows do not tell, statistics of sequences, and tensors that do not lie side by side."""
    assert made(Stream(LAYOUTS["affine"])) is None and made(Stream(LAYOUTS["one group"], own=2)) is None
    s = Stream(LAYOUTS["one group"])
    kv = s.kv
    assert made(s) is not None
    for changes in (
        {"window_v": kv.window_v.half()},
        {"window_k": kv.window_k.transpose(2, 3).contiguous().transpose(2, 3)},
        {"table": kv.table.T.contiguous().T},
        {"held": torch.zeros(2, 2, dtype=torch.int64)[:, 0]},
        {"new_start": torch.zeros(2, 2, dtype=torch.int64)[:, 0]},
    ):
        assert made(s, **changes) is None, changes.keys()


def test_an_engines_tables_and_sinks():
    s = Stream(LAYOUTS["one group"])
    assert tables(s.kv) is None
    window, sinks = torch.zeros(2, 5).int()[:, :3], torch.zeros(17, 3, 4, 32)
    owned = dataclasses.replace(s.kv, window_table=window, sink_k=sinks, sink_v=sinks.clone())
    assert tables(owned) == (window, 5, s.kv.table, s.kv.table.stride(0))
    assert sinks_of(owned) == (owned.sink_k, owned.sink_v)
    none = dataclasses.replace(owned, n_sink=0, sink_k=None, sink_v=None)
    assert sinks_of(none) == (s.kv.window_k, s.kv.window_v), "nobody looks there"
    assert with_strides(sinks) == (sinks, (384, 128, 32))
