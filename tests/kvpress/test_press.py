"""HeadQPress in kvpress's pipeline. kvpress is no requirement: `make test-kvpress` brings it, without what it pins."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import DynamicCache

from headq_ao import HeadQCache, headq_config, quantize_, restore_
from headq_ao.integrations.transformers.models import with_cache

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*", "ignore::DeprecationWarning")
THERE = importlib.util.find_spec("kvpress") is not None
needs_kvpress = pytest.mark.skipif(not THERE, reason="kvpress is not installed: make test-kvpress")
SMALL = {"warmup_tokens": 32, "residual_length": 16, "block_size": 16}


@pytest.mark.skipif(THERE, reason="kvpress is installed")
def test_without_kvpress_the_error_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", "import headq_ao.integrations.kvpress"], capture_output=True, text=True, check=False
    )
    assert "pip install --no-deps kvpress" in done.stderr.splitlines()[-1]


@pytest.fixture
def press():
    from headq_ao.integrations.kvpress import HeadQPress

    return HeadQPress(headq_config(**SMALL))


@needs_kvpress
@torch.no_grad()
def test_the_pipelines_cache_has_what_attention_would_read(tiny, token_ids, press):
    model, ids, more = tiny(), token_ids(1, 200), token_ids(1, 4, seed=1)
    exact, pressed = DynamicCache(), DynamicCache()
    model.model(input_ids=ids, **with_cache(exact))
    with press(model):
        out = model.model(input_ids=ids, **with_cache(pressed))
    assert out.last_hidden_state.shape[1] == 200 and not hasattr(model, "_headq")
    assert model.config._attn_implementation == "sdpa"
    assert pressed.get_seq_length() == 200 and press.report.packed_rows + press.report.exact_rows == 200
    assert press.report.packed_rows >= 160  # less 4 sinks, a window of 16 and what is left of a block
    for ours, theirs in zip(pressed.layers, exact.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :4], theirs.keys[:, :, :4])  # sinks
        assert torch.equal(ours.values[:, :, -16:], theirs.values[:, :, -16:])  # window
        assert not torch.allclose(ours.keys[:, :, 4:100], theirs.keys[:, :, 4:100], atol=1e-3)
    found = model(more, **with_cache(pressed)).logits
    quantize_(model, headq_config(**SMALL))
    packed = HeadQCache(model)
    model(ids, **with_cache(packed))
    assert torch.allclose(found, model(more, **with_cache(packed)).logits, atol=2e-3)
    restore_(model)


@needs_kvpress
@torch.no_grad()
def test_a_call_of_the_whole_model_fills_the_callers_cache(tiny, token_ids, press):
    model, cache = tiny(), DynamicCache()
    with press(model):
        out = model(token_ids(1, 200), **with_cache(cache))
        made = model(token_ids(1, 120))  # brings none: the packed one is the model's own
    assert next(iter(with_cache(cache))) in out and cache.get_seq_length() == 200
    assert isinstance(made[next(iter(with_cache(cache)))], HeadQCache)


@needs_kvpress
def test_the_pipeline_answers_from_packed_tokens(tiny_folder, press):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder, bos_token="<s>")
    pipe = transformers.pipeline("kv-press-text-generation", model=str(tiny_folder), tokenizer=tokenizer, device="cpu")
    context, questions = " ".join(f"w{i * 7 % 100}" for i in range(300)), ["w1 w2", "w3"]
    given = {"max_new_tokens": 6}
    alone = pipe(context, questions=questions, **given)["answers"]
    answers = pipe(context, questions=questions, press=press, **given)["answers"]
    assert len(answers) == 2 and all(answers)
    assert press.report.packed_rows > 250 and press.report.packed_bits_per_element < 4
    exact = press.__class__(headq_config(k_bits=8, v_bits=8, **SMALL))
    assert pipe(context, questions=questions, press=exact, **given)["answers"] == alone


@needs_kvpress
def test_no_part_of_another_press(tiny, token_ids, press):
    from kvpress import ComposedPress

    model = tiny()
    with pytest.raises(NotImplementedError, match="use it alone"), ComposedPress([press])(model):
        model.model(input_ids=token_ids(1, 60))


@needs_kvpress
def test_a_window_that_has_let_tokens_go_is_refused(tiny, token_ids, press):
    model = tiny("mistral")
    with pytest.raises(ValueError, match="its sliding window"), torch.no_grad(), press(model):
        model.model(input_ids=token_ids(1, 300), **with_cache(DynamicCache()))
    assert not hasattr(model, "_headq")
