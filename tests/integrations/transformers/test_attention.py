"""Attention on dense keys and values, weights, and what is said of calls that read no packed token."""

import copy
import warnings

import pytest
import torch

from headq_ao import HeadQCache, headq_config, quantize_, restore_
from tests.cache.test_masks import AMONG_NEW, CACHED, NEAR_EXACT, NEW, masks_of
from tests.conftest import FAST, build_tiny


# The warning about dense calls
def dense_warnings(model, ids):
    with warnings.catch_warnings(record=True) as found, torch.no_grad():
        warnings.simplefilter("default")  # Python's own filter leaves out words that it has shown
        model(ids, use_cache=False)
    return [str(w.message) for w in found if "dense keys and values" in str(w.message)]


def test_dense_calls_are_told_once_per_model_and_reason(model, token_ids):
    ids, other = token_ids(1, 10), build_tiny(seed=1)
    quantize_(other, headq_config(**FAST))
    twin = copy.deepcopy(model)
    for one in (model, other, twin):
        assert len(dense_warnings(one, ids)) == 1
        assert dense_warnings(one, ids) == []
        one.train()
        assert "train mode" in dense_warnings(one, ids)[0]
        assert dense_warnings(one, ids) == []
        one.eval()
    restore_(other)
    quantize_(other, headq_config(**FAST))
    assert len(dense_warnings(other, ids)) == 1


def test_a_traced_dense_call_is_told_once_per_model(token_ids):
    ids = token_ids(1, 10)
    for seed in (0, 1):
        model = build_tiny(seed=seed)
        quantize_(model, headq_config(**FAST))
        compiled = torch.compile(model, backend="eager")
        assert len(dense_warnings(compiled, ids)) == 1
        assert dense_warnings(compiled, ids) == dense_warnings(model, ids) == []


def attentions(model, ids, sizes, cache, **options):
    with torch.no_grad():
        return [model(part, cache=cache, output_attentions=True, **options).attentions for part in ids.split(sizes, 1)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_output_attentions(tiny, token_ids, family):
    """Weights over all slots, in the first call and in later ones; without a cache as on a dense model."""
    model, ids, sizes = tiny(family), token_ids(2, 170), [150, 8, 1, 1, 10]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        exact = model(ids, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    quantize_(model, headq_config(**NEAR_EXACT))
    if family != "gpt2":  # which does not tell its attention: without a cache it returns none, as it does dense
        with torch.no_grad(), pytest.warns(UserWarning, match="use_cache is False"):
            found = model(ids, use_cache=False, output_attentions=True).attentions
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    begin = 0
    for n, weights in zip(sizes, attentions(model, ids, sizes, HeadQCache(model)), strict=True):
        for a, b in zip(weights, exact, strict=True):
            assert a.shape == (2, 4, n, begin + n)
            torch.testing.assert_close(a, b[:, :, begin : begin + n, : begin + n], atol=0.02, rtol=0.1)
            torch.testing.assert_close(a.sum(-1), torch.ones(2, 4, n))
        begin += n
    out = model.generate(ids, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    assert [a[0].shape[-2:] for a in out.attentions] == [(170, 170), (1, 171), (1, 172)]


def test_output_attentions_under_a_mask_and_with_padding(tiny, token_ids):
    model, ids = tiny(), token_ids(2, CACHED + NEW)
    _, new = masks_of(model, AMONG_NEW["tree"])
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :CACHED], cache=cache)
        weights = model(ids[:, CACHED:], attention_mask=new, cache=cache, output_attentions=True).attentions[1]
    assert bool((weights[:, :, ~new[0, 0]] == 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, NEW))
    padded, cache = torch.ones_like(ids), HeadQCache(model)
    padded[0, :20] = 0
    with torch.no_grad():
        model(ids[:, :CACHED], attention_mask=padded[:, :CACHED], cache=cache)
        with pytest.raises(ValueError, match=r"output_attentions=True cannot be served .*differ in length"):
            model(ids[:, CACHED:], attention_mask=padded, cache=cache, output_attentions=True)
        assert cache.get_seq_length() == CACHED
        cache = HeadQCache(model)  # all sequences padded alike
        padded[:, :20] = 0
        model(ids[:, :CACHED], attention_mask=padded[:, :CACHED], cache=cache)
        weights = model(ids[:, CACHED:], attention_mask=padded, cache=cache, output_attentions=True).attentions[0]
    assert weights.shape[-1] == CACHED + NEW
    assert bool((weights[..., :20] == 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, NEW))
