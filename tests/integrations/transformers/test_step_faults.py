"""What a prepared decoding step remembers is looked at again wherever it may have changed, and a call that fails before
any layer leaves nothing behind."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from headq_ao import HeadQCache, calibrate, headq_config, quantize_

HELD = 155


def steps(model, tokens, cache, first, last):
    """Logits of single steps."""
    with torch.no_grad():
        return torch.stack([model(tokens[:, i : i + 1], cache=cache).logits[:, -1] for i in range(first, last)])


def filled(model, tokens, cache):
    """A cache that holds :data:`HELD` tokens, the last ones by prepared steps."""
    with torch.no_grad():
        model(tokens[:, : HELD - 5], cache=cache)
    steps(model, tokens, cache, HELD - 5, HELD)
    assert not isinstance(cache, HeadQCache) or cache.layers[0].step is not None
    return cache


@pytest.fixture
def quantized(tiny, token_ids):
    """Calibrated: only such a codec has prepared steps."""
    model = tiny()
    calibration = calibrate(model, list(token_ids(8, 256, seed=1).split(1)), progress=False)
    quantize_(model, headq_config(calibration=calibration, k_bits=8, v_bits=8))
    return model


@pytest.mark.parametrize("new", [1, 10, 30])
def test_a_call_that_fails_before_any_layer_is_forgotten(tiny, quantized, token_ids, tmp_path, new):
    tokens, dense = token_ids(2, 300), tiny()
    expected = steps(dense, tokens, filled(dense, tokens, DynamicCache()), HELD, HELD + 40)

    def failed():
        cache = filled(quantized, tokens, HeadQCache(quantized))
        with torch.no_grad(), pytest.raises(IndexError):
            quantized(torch.full((2, new), 9999), cache=cache)
        return cache

    cache = failed()
    assert cache.get_seq_length() == HELD
    torch.testing.assert_close(steps(quantized, tokens, cache, HELD, HELD + 40), expected, rtol=0, atol=0.05)
    cache = failed()
    cache.save(tmp_path / "prompt.safetensors")
    loaded = HeadQCache.load(tmp_path / "prompt.safetensors", quantized)
    assert loaded.get_seq_length() == HELD
    cache = failed()
    cache.crop(-1)  # a token that is held
    assert cache.get_seq_length() == HELD - 1
    found = steps(quantized, tokens, cache, HELD - 1, HELD + 40)[1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_first_prompt_that_fails_does_not_block_the_next(quantized, token_ids):
    cache = HeadQCache(quantized)
    with torch.no_grad(), pytest.raises(IndexError):
        quantized(torch.full((1, 100), 9999), cache=cache)
    with torch.no_grad():
        quantized(token_ids(1, 120), cache=cache)
    assert cache.get_seq_length() == 120


def test_queries_with_heads_innermost(quantized, token_ids, monkeypatch):
    """The same numbers in another order in memory."""
    tokens, rope = token_ids(2, 300), modeling_llama.apply_rotary_pos_emb
    expected = steps(quantized, tokens, filled(quantized, tokens, HeadQCache(quantized)), HELD, HELD + 10)

    def strided(q, k, *args, **options):
        q, k = rope(q, k, *args, **options)
        return q.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", strided)
    found = steps(quantized, tokens, filled(quantized, tokens, HeadQCache(quantized)), HELD, HELD + 10)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_model_whose_memory_moves(quantized, token_ids):
    tokens = token_ids(2, 300)
    expected = steps(quantized, tokens, filled(quantized, tokens, HeadQCache(quantized)), HELD, HELD + 10)
    cache = filled(quantized, tokens, HeadQCache(quantized))
    quantized.share_memory()
    others = [torch.full((n,), 7.0) for n in (64, 256, 1024, 4096) for _ in range(300)]  # where the tensors lay
    assert torch.equal(steps(quantized, tokens, cache, HELD, HELD + 10), expected)
    del others


def test_a_query_of_another_form_is_refused_and_not_read(quantized, token_ids):
    cache = filled(quantized, token_ids(2, 300), HeadQCache(quantized))
    layer = cache.layers[0]
    k = torch.zeros(2, 2, 1, 32)
    with pytest.raises(ValueError, match="q must be"):
        layer.attend(torch.zeros(1, 4, 1, 32), 1.0, k, k)
