"""Decoding under torch.compile: the eager path's numbers, one graph, and no recompilation from step to step."""

import copy
import gc

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from headq_ao import HeadQCache, calibrate, headq_config, quantize_

PROMPT, STEPS = 90, 80  # the default's first block closes after 96 tokens, the next ones 32 tokens later


@pytest.fixture(autouse=True)
def clean_dynamo():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def quantized(tiny, family="llama", **options):
    model = tiny(family, **options)
    quantize_(model, headq_config(epoch_tokens=32))
    return model


def decode(call, cache, tokens, begin, **arguments):
    """Logits of one step after the other, from ``begin`` on."""
    at = range(begin, tokens.shape[1])
    return torch.cat([call(tokens[:, i : i + 1], cache=cache, **arguments).logits for i in at], 1)


def compare(model, tokens, backend="eager"):
    """Prefill eagerly, then decode eagerly and compiled."""
    eager, packed = HeadQCache(model), HeadQCache(model)
    for cache in (eager, packed):
        model(tokens[:, :PROMPT], cache=cache)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = decode(model, eager, tokens, PROMPT)
    torch.testing.assert_close(decode(compiled, packed, tokens, PROMPT), expected, rtol=0, atol=1e-5)
    assert graphs() == 1
    assert packed.rows_read == eager.rows_read and packed.packed_fraction > 0
    assert packed.get_seq_length() == tokens.shape[1]


@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3", "gpt_neox", "gpt2"])
def test_families(tiny, token_ids, family):
    compare(quantized(tiny, family), token_ids(2, PROMPT + STEPS))


def test_statistics_of_the_prompt_come_ready_between_steps(tiny, token_ids):
    model = tiny("llama")
    quantize_(model, headq_config(epoch_tokens=96))
    cache = HeadQCache(model)
    model(token_ids(2, PROMPT), cache=cache)
    assert not any(epoch.ready[0] for epoch in cache.layers[0].epochs)
    compare(model, token_ids(2, PROMPT + STEPS), backend="aot_eager")


def test_calibrated_and_each_side_alone(tiny, token_ids):
    model = tiny("llama")
    calibration = calibrate(model, list(token_ids(4, 128, seed=1).split(1)), progress=False)
    quantize_(model, headq_config(calibration=calibration, v_bits=None, mean_bits=2.0))
    compare(model, token_ids(1, PROMPT + STEPS))


def test_left_padding_and_two_caches_in_turn(tiny, token_ids):
    model = quantized(tiny)
    tokens = token_ids(2, PROMPT + 40)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    caches = [HeadQCache(model) for _ in range(3)]
    other = [HeadQCache(model) for _ in range(2)]
    for cache in caches:
        model(tokens[:, :PROMPT], cache=cache, attention_mask=mask[:, :PROMPT], position_ids=position_ids[:, :PROMPT])
    for cache in other:
        model(tokens[:, :20], cache=cache)
    caches.append(copy.deepcopy(caches[0]))
    for i in range(PROMPT, tokens.shape[1]):
        step = {"attention_mask": mask[:, : i + 1], "position_ids": position_ids[:, i : i + 1].clone()}
        expected, *got = [
            call(tokens[:, i : i + 1], cache=cache, **step).logits
            for call, cache in zip([model, compiled, compiled, compiled], caches, strict=True)
        ]
        for logits in got:
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        expected, got = (
            call(tokens[:, i : i + 1], cache=cache, position_ids=torch.full((2, 1), 20 + i - PROMPT)).logits
            for call, cache in zip([model, compiled], other, strict=True)
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert graphs() == 1


def test_prefill_and_steps_in_a_compiled_function(tiny, token_ids):
    model = quantized(tiny, "mistral", layers=1)
    tokens = token_ids(2, 160)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0

    def step(ids, cache, attention_mask):
        return model(ids, cache=cache, attention_mask=attention_mask)

    eager, packed = HeadQCache(model), HeadQCache(model)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    expected = step(tokens[:, :150], eager, mask[:, :150]).logits[mask[:, :150] > 0]
    got = compiled(tokens[:, :150], packed, mask[:, :150]).logits[mask[:, :150] > 0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for i in range(150, 160):
        grown = mask[:, : i + 1].clone()
        torch._dynamo.mark_dynamic(grown, 1)
        with torch._dynamo.config.patch(error_on_recompile=i > 150):  # one token is another shape
            got = compiled(tokens[:, i : i + 1], packed, grown).logits
        torch.testing.assert_close(got, step(tokens[:, i : i + 1], eager, grown).logits, rtol=0, atol=1e-5)
    assert graphs() == 2


def generate_both(model, backend, token_ids, new_tokens):
    """Two prompts, eagerly and compiled; the second is longer and must not add a graph."""
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    for length, seed in ((60, 0), (110, 1)):
        ids = token_ids(2, length, seed)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        arguments = dict(attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        expected = model.generate(ids, **arguments)
        assert graphs() == (seed > 0)  # nothing compiles unasked
        out = model.generate(ids, compile_config=config, return_dict_in_generate=True, **arguments)
        assert torch.equal(out.sequences, expected)
        assert isinstance(out.cache, HeadQCache) and out.cache.packed_fraction > 0
        assert graphs() == 1


def test_generate(tiny, token_ids):
    model = quantized(tiny, "gemma3")
    generate_both(model, "eager", token_ids, 80)
    cache = HeadQCache(model)
    model.generate(token_ids(2, 20), cache=cache, max_new_tokens=4, do_sample=False)
    assert not cache.is_compileable and graphs() == 1


@pytest.mark.slow
def test_generate_with_inductor(tiny, token_ids):
    generate_both(quantized(tiny, layers=1), "inductor", token_ids, 80)


def test_masks_of_the_callers_own(tiny, token_ids):
    """A compiled model takes a 4-D mask in any call, of many tokens or one."""
    model, ids = quantized(tiny, layers=2), token_ids(1, 120)
    tree = torch.ones(1, 1, 9, 109, dtype=torch.bool).tril(100)
    tree[..., 101:104] &= torch.eye(9, dtype=torch.bool)[:, 1:4]
    hidden = torch.ones(1, 1, 1, 110, dtype=torch.bool)
    hidden[..., :50] = False

    def run(forward):
        cache = HeadQCache(model)
        first = forward(ids[:, :100], cache=cache).logits
        second = forward(ids[:, 100:109], attention_mask=tree, cache=cache).logits
        return torch.cat([first, second, forward(ids[:, 109:110], attention_mask=hidden, cache=cache).logits], 1)

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        torch.testing.assert_close(run(torch.compile(model, backend="eager")), run(model))


def test_refusals(tiny, token_ids):
    model, ids = quantized(tiny, layers=1), token_ids(1, 8)

    def refuses(call, match, error=ValueError, **arguments):
        with pytest.raises(error, match=match), torch._dynamo.config.patch(error_on_recompile=False):
            torch.compile(call, fullgraph=True, backend="eager")(ids, **arguments)

    def function(ids, **arguments):
        return model(ids, **arguments)

    custom = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    holes = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]])
    refuses(model, r"a 4-D attention_mask must be", attention_mask=custom[..., 1:])
    once = torch._dynamo.config.patch(error_on_recompile=False)  # transformers needs a graph break there
    with pytest.raises(ValueError, match="returns no attention weights"), once:
        torch.compile(model, backend="eager")(ids, output_attentions=True)
    refuses(model, "softcap=30.0", cache=HeadQCache(model), softcap=30.0)
    refuses(function, "takes a 2-D attention_mask", cache=HeadQCache(model), attention_mask=custom)
    refuses(function, "has a hole", cache=HeadQCache(model), attention_mask=holes)
    refuses(function, "cannot make its cache", torch._dynamo.exc.Unsupported)
    refuses(model.forward, "pre-hook was bypassed", RuntimeError, cache=HeadQCache(model))
    other = quantized(tiny, layers=1, head_dim=64)
    refuses(function, "made for another model", cache=HeadQCache(other))


def test_dense_calls_compile_and_warn(tiny, token_ids):
    model = quantized(tiny, layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="dense keys and values"):
        assert compiled(token_ids(1, 8), use_cache=False).cache is None


def test_operators(tiny, token_ids):
    model = quantized(tiny, layers=1)
    cache, handle = HeadQCache(model), HeadQCache(model).handle
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone"):
        torch.ops.headq.seen(handle)
    # The other checks of opcheck call an operator again and compare: a cache is then one step further.
    once = ("test_schema", "test_faketensor")
    q, k = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 5, 32)
    torch.library.opcheck(torch.ops.headq.seen, (cache.handle,))
    arguments = (cache.handle, model._headq.handle, None, None, 1, 5)
    torch.library.opcheck(torch.ops.headq.announce, arguments)
    for check in once:
        cache.reset()
        torch.ops.headq.announce(*arguments)
        torch.library.opcheck(torch.ops.headq.step, (cache.handle, 0, q, k, k, 0.2, None, None), test_utils=check)
    assert cache.get_seq_length() == 5
