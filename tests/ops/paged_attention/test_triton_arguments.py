"""How the Triton kernels of ``paged_attention`` take its arguments."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from headq_ao.ops.paged_attention.triton_arguments import (
    LEAST_TOKENS,
    MOST_SPLITS,
    dense_indices,
    in_full,
    of_frame,
    of_keys,
    of_values,
    padded,
    ranges,
    split_count,
    strides_of_shared,
    tokens,
)
from headq_ao.ops.types import Readers, Visible
from tests.ops.frames import some_frame
from tests.ops.paged_cases import Case, make

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("length", "programs", "held", "splits"),
    [
        (10**6, 8, 10, 165),  # 132 processors of 10 programs hold 1320
        (10**6, 1320, 10, 1),
        (10**6, 5000, 10, 1),
        (10**6, 1, 10, MOST_SPLITS),
        (LEAST_TOKENS * 3 + 1, 8, 10, 3),
        (0, 8, 10, 1),
        (10**6, 0, 10, MOST_SPLITS),
    ],
)
def test_splits_just_fill_the_device(length, programs, held, splits, monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert split_count(length, programs, held, CUDA) == splits


def test_lengths_and_tables_are_contiguous_for_kernels():
    kv, _ = make(Case(packed=(40, 20), window=(5, 5), new=(0, 0)))
    assert dense_indices(kv) is kv
    apart = torch.stack([kv.held] * 2, 1)[:, 0]
    found = dense_indices(dataclasses.replace(kv, held=apart, table=kv.table.T.contiguous().T))
    assert torch.equal(found.held, kv.held) and torch.equal(found.table, kv.table)
    assert found.held.is_contiguous() and found.table.is_contiguous() and found.packed is kv.packed


def test_what_is_in_full_precision():
    """A ring's slots; of an engine's pages no more tokens than there are, or than the host knows of."""
    kv, _ = make(Case())
    assert in_full(kv) == (None, kv.window_k.shape[2] - kv.n_sink)
    table = torch.zeros(1, 3, dtype=torch.int32)
    sinks = torch.zeros(1, 2, 4, 64)
    engine = dataclasses.replace(kv, window_table=table, sink_k=sinks, sink_v=sinks)
    (found, stride, size, of_sinks), newest = in_full(engine)
    assert found is table and (stride, size, newest) == (3, kv.window_k.shape[2], 3 * kv.window_k.shape[2])
    assert of_sinks == (sinks, sinks.stride()[:3], sinks, sinks.stride()[:3])
    assert in_full(dataclasses.replace(engine, newest=20))[1] == 20


def test_strides_and_rows():
    """A dimension of one is never stepped over; coordinates lie side by side."""
    x = torch.zeros(2, 1, 4, 8)
    assert strides_of_shared(x, 4) == (32, 0, 8, 1) and strides_of_shared(x, 2) == (32, 0)
    k, k_strides, v, v_strides = tokens(x, x.transpose(2, 3).contiguous().transpose(2, 3))
    assert k is x and k_strides == (32, 32, 8) and v.stride(3) == 1 and v_strides == (32, 32, 8)
    assert [padded(n) for n in (8, 16, 80, 128)] == [16, 16, 128, 128]


def test_readers_and_ranges():
    """As they come where they lie as kernels read them; one head's readout serves all, without a copy."""
    query_map, read, mean = torch.zeros(1, 1, 2, 8, 11), torch.ones(1, 1, 8, 8), torch.ones(1, 2, 8)
    frame = some_frame(8, 32)
    assert of_keys(Readers(query_map, None, None)) is query_map
    turned = of_keys(Readers(query_map.mT.contiguous().mT, None, None))
    assert turned.stride(4) == 1 and torch.equal(turned, query_map)
    found, strides, of_mean, mean_strides = of_values(Readers(query_map, read, mean), 3, 2)
    assert found.shape == (3, 2, 8, 8) and found.data_ptr() == read.data_ptr() and strides == (0, 0, 8, 1)
    assert of_mean.shape == (3, 2, 8) and mean_strides == (0, 8, 1)
    assert of_values(None, 3, 2) == of_values(Readers(query_map, None, None), 3, 2) == (None,) * 4
    assert of_frame(None) is None and of_frame(frame) == (frame.table, frame.partner, frame.tokens, len(frame.table))
    low, high = (torch.arange(8).view(4, 2).T for _ in range(2))
    assert ranges(None) == (None, None)
    assert all(x.is_contiguous() and torch.equal(x, low) for x in ranges(Visible(low, high)))
