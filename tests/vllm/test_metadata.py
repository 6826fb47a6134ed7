"""A step's requests, as a layer joins those of its two groups of pages."""

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm installs it")
from headq_ao.integrations.vllm.metadata import HeadQMetadata, window_name


def group(columns):
    start, held, packed, total = (torch.arange(n) for n in (3, 2, 2, 2))
    return HeadQMetadata(40, 39, 1, ((1, 1, 40),), torch.zeros(2, columns).int(), start, held, packed, total, 23)


def test_lengths_are_of_the_packed_group_and_one_table_of_each():
    packed, newest = group(5), group(20)
    of = packed.requests(newest)
    assert of.table is packed.table and of.window_table is newest.table
    assert all(getattr(of, name) is getattr(packed, name) for name in ("start", "held", "packed", "total"))
    assert (of.most, of.few, of.long, of.recent, len(of)) == (39, 1, ((1, 1, 40),), 23, 2)


def test_layers_of_a_step_share_what_was_joined():
    """One for each group of newest tokens; those of another step are others."""
    packed, newest, sliding = group(5), group(20), group(7)
    assert packed.requests(newest) is packed.requests(newest) is not packed.requests(sliding)
    assert packed.requests(sliding).window_table is sliding.table
    assert group(5).requests(newest) is not packed.requests(newest)


def test_names_of_layers():
    assert window_name("model.layers.0.self_attn.attn") == "model.layers.0.self_attn.attn.newest"
