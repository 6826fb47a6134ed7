"""What calls may bring: arguments, caches and masks that are served, run dense with a warning, or are refused."""

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from headq_ao import HeadQCache, headq_config, quantize_, restore_
from tests.integrations.transformers.calling import FINE, forward, greedy


# Dense calls
def test_use_cache_false_is_dense_with_one_warning(tiny, model, token_ids):
    ids = token_ids(1, 80)
    with pytest.warns(UserWarning, match="use_cache is False") as seen:
        logits = forward(model, ids, use_cache=False)
    assert len(seen) == 1
    forward(model, ids, use_cache=False)  # a second warning would be an error
    assert torch.equal(logits, forward(tiny(), ids))


def test_train_mode_is_dense_with_one_warning(tiny, model, token_ids):
    ids = token_ids(1, 80)
    model.train()
    with pytest.warns(UserWarning, match="train mode") as seen:
        out = model(ids, labels=ids)
    assert len(seen) == 1
    model(ids)  # a second warning would be an error
    out.loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    assert torch.equal(out.logits, tiny()(ids).logits)


def test_use_cache_false_in_the_config(model, token_ids):
    model.config.use_cache = False
    with pytest.warns(UserWarning, match="use_cache is False"):
        assert forward(model, token_ids(1, 20)).shape == (1, 20, 128)


def test_a_cache_of_another_class_is_refused(model, token_ids):
    with pytest.raises(ValueError, match="needs a HeadQCache, got a StaticCache"):
        model(token_ids(1, 20), cache=StaticCache(config=model.config, max_cache_len=64))


def test_quantized_cache_is_refused(model, token_ids):
    from transformers.cache_utils import QuantizedCache

    cache = QuantizedCache.__new__(QuantizedCache)  # its backends are optional packages
    cache.layers = []
    with pytest.raises(ValueError, match="needs a HeadQCache, got a QuantizedCache"):
        model(token_ids(1, 20), cache=cache)


def test_dynamic_cache_empty_or_filled(tiny, model, token_ids):
    ids, filled = token_ids(1, 60), DynamicCache()
    tiny()(ids, cache=filled)
    with pytest.raises(ValueError, match="a DynamicCache that already holds tokens"):
        model(ids, cache=filled)
    out = model(ids, cache=DynamicCache(config=model.config))
    assert isinstance(out.cache, HeadQCache)


def test_mask_without_the_pre_hook(model, tiny, token_ids):
    """Calling a part of the model bypasses the hook that reads the mask: attention still hides what the mask hides."""
    ids, mask = token_ids(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :8] = 0
    found = []
    for part, cache in ((tiny().model, DynamicCache()), (model.model, HeadQCache(model))):
        with torch.no_grad():
            part(ids[:, :80], attention_mask=mask[:, :80], cache=cache)
            found.append(part(ids[:, 80:], attention_mask=mask, cache=cache).last_hidden_state)
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)


def test_unknown_attention_argument_is_refused(model, token_ids):
    with pytest.raises(ValueError, match="passes softcap"):
        model(token_ids(1, 20), softcap=30.0)


# Ways to call
def test_positional_arguments(model, token_ids):
    ids, mask = token_ids(2, 80), torch.ones(2, 80, dtype=torch.long)
    mask[0, :30] = 0
    expected, found = HeadQCache(model), HeadQCache(model)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, cache=expected).logits
        assert torch.equal(model(ids, mask, None, found).logits, logits)
    assert found.batch.lengths.totals() == [50, 80]
    with torch.no_grad():
        out = model(ids, mask)
    assert out.cache.batch.lengths.totals() == [50, 80]


def test_positional_arguments_in_another_order(quantized, token_ids):
    """GPT-2's second argument is the cache, not the mask."""
    model, ids = quantized("gpt2", FINE), token_ids(2, 40)
    cache, expected = HeadQCache(model), HeadQCache(model)
    with torch.no_grad():
        assert torch.equal(model(ids, cache).logits, model(ids, cache=expected).logits)
        model(ids[:, :1], cache)
    assert cache.get_seq_length() == 41


def test_base_model(tiny, token_ids):
    base, ids = tiny(model_class=transformers.AutoModel), token_ids(1, 160)
    with torch.no_grad():
        dense = base(ids).last_hidden_state
    quantize_(base, headq_config(**FINE))
    cache = HeadQCache(base)
    with torch.no_grad():
        found = torch.cat([base(part, cache=cache).last_hidden_state for part in ids.split(40, 1)], 1)
    assert cache.packed_fraction > 0
    assert (found - dense).norm() / dense.norm() < 0.05
    restore_(base)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, dense)


def test_base_model_inside_a_causal_lm(tiny, model, token_ids):
    whole = tiny()
    quantize_(whole.model, headq_config(**FINE))
    ids = token_ids(2, 70)
    assert torch.equal(greedy(whole, ids), greedy(model, ids))


def test_part_of_a_quantized_model_warns(model, token_ids):
    """``model.model(...)`` bypasses the pre-hook of ``model``: dense, and it says so."""
    with pytest.warns(UserWarning, match="dense keys and values"), torch.no_grad():
        model.model(token_ids(1, 20))
