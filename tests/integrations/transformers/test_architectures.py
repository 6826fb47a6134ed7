"""Which models take HeadQ: those that do run, restore to the bit, and stay near dense; the others are refused whole."""

import pytest
import torch
import transformers

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.evals.models.tiny import tiny_config
from tests.integrations.transformers.traces import dense_logits, trace
from tests.pages import held

# (family, head_dim, query heads, kv heads): each family, each head size, and MHA, GQA, MQA and groups of 6
MODELS = [
    ("llama", 64, 4, 2),
    ("llama", 80, 2, 2),
    ("llama", 96, 6, 1),
    ("llama", 128, 2, 1),
    ("llama", 256, 1, 1),
    ("qwen3", 64, 12, 2),
    ("mistral", 64, 4, 1),
    ("gpt_neox", 64, 2, 2),
    ("gpt_neox", 96, 2, 2),
    ("gpt2", 64, 2, 2),
    ("gemma3", 256, 2, 1),
    ("gemma3", 128, 4, 2),
    ("phi3", 64, 4, 2),
    ("phi3", 96, 2, 1),
]
NEAR_EXACT = {"rank": 0, "epoch_tokens": 32, "residual_length": 32, "block_size": 16}
STREAM = [40, 30, *[1] * 40, 30, 20]  # chunked prefill, decoding, more chunks: 160 tokens


def logits_through_cache(model, ids, sizes):
    cache = HeadQCache(model)
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache).logits for part in ids.split(sizes, 1)], 1)
    return logits, cache


def relative(difference, reference):
    return (difference.norm() / (reference - reference.mean((0, 1))).norm()).item()


@pytest.mark.parametrize(("family", "head_dim", "heads", "kv_heads"), MODELS)
def test_eight_bits_stay_near_dense(tiny, token_ids, family, head_dim, heads, kv_heads):
    model, ids = tiny(family, head_dim, heads, kv_heads), token_ids(2, 160)
    dense = dense_logits(model, ids)
    errors = {}
    for bits in (8, 2):
        quantize_(model, headq_config(k_bits=bits, v_bits=bits, **NEAR_EXACT))
        logits, cache = logits_through_cache(model, ids, STREAM)
        restore_(model)
        errors[bits] = relative(logits - dense, dense)
        assert cache.packed_fraction > 0.25
        assert cache.get_seq_length() == 160
    assert errors[8] < 0.04
    assert errors[2] > 5 * errors[8], "the logits do not depend on what the cache returns: this test shows nothing"


@pytest.mark.parametrize(("family", "head_dim", "heads", "kv_heads"), MODELS[::2])
def test_chunked_prefill_near_dense_in_larger_chunks(tiny, token_ids, family, head_dim, heads, kv_heads):
    model, ids = tiny(family, head_dim, heads, kv_heads), token_ids(1, 400)
    dense = dense_logits(model, ids)
    quantize_(model, headq_config(k_bits=8, v_bits=8, **NEAR_EXACT))
    logits, cache = logits_through_cache(model, ids, [150, 150, 100])
    assert relative(logits - dense, dense) < 0.04
    assert cache.packed_fraction > 0.1


@pytest.mark.parametrize(("family", "head_dim", "heads", "kv_heads"), MODELS)
def test_generate_then_restore_is_bit_equal(tiny, token_ids, family, head_dim, heads, kv_heads):
    model, ids = tiny(family, head_dim, heads, kv_heads), token_ids(2, 90)
    dense, before = dense_logits(model, ids), trace(model)
    state_before = {name: value.clone() for name, value in model.state_dict().items()}
    quantize_(model, headq_config(**NEAR_EXACT | {"rank": None}))
    assert model.state_dict().keys() == state_before.keys(), "codecs must not enter checkpoints"
    out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 102)
    assert isinstance(out.past_key_values, HeadQCache)
    assert out.past_key_values.packed_fraction > 0
    restore_(model)
    assert trace(model) == before
    assert all(torch.equal(value, state_before[name]) for name, value in model.state_dict().items())
    assert torch.equal(dense_logits(model, ids), dense)


@pytest.mark.parametrize(
    ("sliding_window", "residual_length", "bound"),
    [
        (100, 32, 4 + 32 + 16 + 15 + 160),  # packs: a ring of W + S + G - 1 tokens, and pages that are used again
        (32, 32, 4 + 32 + 32),  # never packs: the sliding window, and W tokens that a crop may take back
        (8, 64, 4 + 8 + 64),
    ],
)
def test_window_layers_keep_bounded_memory(tiny, token_ids, sliding_window, residual_length, bound):
    model = tiny("mistral", sliding_window=sliding_window)
    ids = token_ids(1, 900)
    dense = dense_logits(model, ids)
    options = NEAR_EXACT | {"residual_length": residual_length}
    quantize_(model, headq_config(k_bits=8, v_bits=8, **options))
    cache, logits, sizes = HeadQCache(model), [], []
    for part in ids.split([200, 150, *[50] * 4, *[1] * 150, *[50] * 4], 1):
        with torch.no_grad():
            logits.append(model(part, cache=cache).logits)
        for layer in cache.layers:
            pages = layer.table.columns * layer.batch.page_tokens if layer.packs else 0
            # until a sequence has statistics the ring holds what they are to be taken from
            assert not all(layer.learned) or layer.window.k.shape[2] + pages <= bound
        sizes.append(cache.get_memory_footprint())
    assert relative(torch.cat(logits, 1) - dense, dense) < 0.04
    assert max(sizes[80:]) <= 1.05 * max(sizes[2:80]), "memory grows along the stream"
    layer = cache.layers[0]
    assert all(layer.learned) or not layer.packs
    assert not layer.packs or cache.batch.lengths.packed()[0] - held(layer)[0] < 170 < 700 < held(layer)[0]
    assert (cache.packed_fraction > 0) == (sliding_window > residual_length)


def test_full_layers_beside_window_layers_keep_everything(tiny, token_ids):
    model = tiny("gemma3", layers=4, sliding_window=48)
    quantize_(model, headq_config(**NEAR_EXACT))
    _, cache = logits_through_cache(model, token_ids(1, 500), [250, 250])
    assert [held(layer)[0] > 0 for layer in cache.layers if layer.packs] == [
        layer.is_sliding for layer in cache.layers if layer.packs
    ]
    keys, _, position = cache.layers[1].in_order()
    assert keys.shape[2] == 500 and position.tolist() == list(range(500))
    assert cache.layers[0].in_order()[0].shape[2] < 48 + 4 + 250


SMALL = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 32}


def refused_models():
    t = transformers
    cases = {
        "MLA with an indexer": (lambda: tiny_config("deepseek_v32"), "multi-head latent attention"),
        "state space": (
            lambda: t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1),
            "no KV cache",
        ),
        "encoder-decoder": (
            lambda: t.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2),
            "encoder-decoder",
        ),
        "encoder-decoder Bart": (
            lambda: t.BartConfig(
                vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            ),
            "encoder-decoder",
        ),
        "alibi Bloom": (
            lambda: t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2),
            "AttentionInterface",
        ),
        "alibi MPT": (
            lambda: t.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2, expansion_ratio=1),
            "AttentionInterface",
        ),
        "chunked attention": (
            lambda: t.LlamaConfig(**GROUPED, attention_chunk_size=64), "attention_chunk_size without layer_types",
        ),
        "bidirectional Gemma3": (
            lambda: t.Gemma3TextConfig(**GROUPED, use_bidirectional_attention=True), "not causal",
        ),
        "bidirectional": (lambda: t.BertConfig(**SMALL), "not causal"),
        "head_dim 40": (lambda: t.LlamaConfig(**GROUPED | {"head_dim": 40}), r"of 16 up to 512, got \[40\]"),
        "head_dim 528": (lambda: t.LlamaConfig(**GROUPED | {"head_dim": 528}), r"of 16 up to 512, got \[528\]"),
    }  # fmt: skip
    return [pytest.param(config, match, id=name) for name, (config, match) in cases.items()]


REFUSED = {
    "state space",
    "encoder-decoder",
    "encoder-decoder Bart",
    "bidirectional",
}  # the others: by the fallback
MODEL_CLASSES = {"bert": "BertModel", "t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}


@pytest.mark.parametrize(("make_config", "match"), refused_models())
def test_models_that_read_no_packed_tokens_are_named(make_config, match, request):
    """Refused whole, or served by the fallback with a warning that says why."""
    config = make_config()
    torch.manual_seed(0)
    name = MODEL_CLASSES.get(config.model_type)
    model = getattr(transformers, name)(config) if name else transformers.AutoModelForCausalLM.from_config(config)
    before = trace(model)
    if request.node.callspec.id in REFUSED:
        with pytest.raises(ValueError, match=match) as error:
            quantize_(model, headq_config())
        said = str(error.value)
    else:
        with pytest.warns(UserWarning, match=match) as warned:
            quantize_(model, headq_config())
        said = str(warned[0].message)
        assert "memory is saved, time is not" in said
        assert model._headq.fallback in said
        restore_(model)
    assert any(word in said.lower() for word in f"{config.model_type} {type(model).__name__}".lower().split())
    assert trace(model) == before


@pytest.mark.parametrize("other", [{"layers": 3}, {"head_dim": 64}, {"kv_heads": 4}, {"seed": 1}, {"family": "qwen3"}])
def test_calibration_of_another_model_is_refused(tiny, token_ids, tmp_path, other):
    calibration = calibrate(tiny(**other), [token_ids(3, 200)], progress=False)
    model = tiny()
    before = trace(model)
    with pytest.raises(ValueError, match="made on another model"):
        quantize_(model, headq_config(calibration=calibration))
    calibration.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="made on another model"):
        quantize_(model, headq_config(calibration=str(tmp_path / "other.safetensors")))
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        quantize_(model, headq_config(calibration=str(tmp_path / "missing.safetensors")))
    assert trace(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tiny, token_ids, dtype):
    model, ids = tiny().to(dtype), token_ids(2, 160)
    dense = dense_logits(model, ids).float()
    quantize_(model, headq_config(k_bits=8, v_bits=8, **NEAR_EXACT))
    logits, cache = logits_through_cache(model, ids, STREAM)
    assert logits.dtype == dtype
    assert cache.packed_fraction > 0.25
    assert relative(logits.float() - dense, dense) < (0.08 if dtype == torch.bfloat16 else 0.04)


def test_cast_after_quantizing(tiny, token_ids):
    ids = token_ids(1, 160)
    first, second = tiny(), tiny()
    calibration = calibrate(first, [token_ids(2, 200)], progress=False)
    for model in (first, second):
        quantize_(model, headq_config(calibration=calibration, **NEAR_EXACT))
    restore_(first)
    quantize_(first.bfloat16(), headq_config(calibration=calibration, **NEAR_EXACT))
    second.bfloat16()
    assert {b.dtype for m in second.modules() if hasattr(m, "headq") for b in m.headq.buffers()} == {torch.float32}
    assert torch.equal(logits_through_cache(first, ids, STREAM)[0], logits_through_cache(second, ids, STREAM)[0])
