"""A packed layer by the names that transformers calls."""

import pytest
import torch

from headq_ao import HeadQCache
from tests.integrations.transformers.calling import forward


def test_offloading_is_refused(model):
    with pytest.raises(NotImplementedError, match="drop offloading"):
        HeadQCache(model).layers[0].offload()


@pytest.mark.parametrize(("family", "longest"), [("llama", -1), ("mistral", 100)])
def test_lengths_as_transformers_counts_them(quantized, token_ids, family, longest):
    """All slots, padding included; no limit but the sliding window, or the capacity of a cache that has one."""
    model = quantized(family)
    cache, ids = HeadQCache(model), token_ids(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    layer = cache.layers[0]
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(7) == (7, 0)
    forward(model, ids, attention_mask=mask, cache=cache)
    assert (layer.get_seq_length(), layer.get_mask_sizes(3), layer.get_max_length()) == (150, (153, 0), longest)
    if family == "llama":
        assert HeadQCache(model, max_length=64).layers[0].get_max_length() == 64


def test_rows_of_a_layer_are_those_that_attention_reads(model, token_ids):
    cache = HeadQCache(model)
    forward(model, token_ids(1, 90), cache=cache)
    keys, values, position = cache.layers[0].rows_of_model()
    assert keys.shape == values.shape == (1, 2, 90, 32) and position.tolist() == list(range(90))
    again = cache.layers[0].in_order()
    assert torch.equal(keys, again[0]) and torch.equal(values, again[1])


def test_a_layer_that_is_reset_is_empty(model, token_ids):
    cache = HeadQCache(model)
    forward(model, token_ids(1, 90), cache=cache)
    layer = cache.layers[1]
    assert layer.tensors() and layer.is_initialized
    layer.lazy_initialization(torch.ones(1), torch.ones(1))  # room comes with the first update: nothing happens
    layer.reset()
    assert not layer.tensors() and not layer.is_initialized
