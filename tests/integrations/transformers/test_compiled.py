"""Decoding under torch.compile: the eager path's numbers, one graph, and no recompilation from step to step."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from tests.pages import same_codes

PROMPT, STEPS = 120, 80  # 36 body tokens have left the window by then, and a page holds 32


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


def calibrated(tiny, family="llama", **options):
    model = tiny(family, **options)
    generator = torch.Generator().manual_seed(1)
    text = [torch.randint(3, model.config.vocab_size, (1, 128), generator=generator) for _ in range(6)]
    quantize_(model, headq_config(calibration=calibrate(model, text, progress=False)))
    return model


def decode(call, cache, tokens, begin, **arguments):
    """Logits of one step after the other, from ``begin`` on."""
    at = range(begin, tokens.shape[1])
    return torch.cat([call(tokens[:, i : i + 1].clone(), cache=cache, **arguments).logits for i in at], 1)


def compare(model, tokens, backend="eager"):
    """Prefill eagerly, then decode eagerly and compiled."""
    eager, packed = HeadQCache(model), HeadQCache(model)
    for cache in (eager, packed):
        model(tokens[:, :PROMPT], cache=cache)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = decode(model, eager, tokens, PROMPT)
    torch.testing.assert_close(decode(compiled, packed, tokens, PROMPT), expected, rtol=0, atol=1e-5)
    assert graphs() == 1
    assert eager.layers[-1].table is None or eager.layers[-1].table.columns > 1  # pages were added between steps
    assert all(same_codes(*pair, b) for pair in zip(eager.layers, packed.layers, strict=True) if pair[0].packs for b in
               range(len(tokens)))  # fmt: skip
    assert packed.rows_read == eager.rows_read and packed.packed_fraction > 0
    assert packed.get_seq_length() == tokens.shape[1]


@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3", "gpt_neox", "gpt2"])
def test_families(tiny, token_ids, family):
    compare(quantized(tiny, family), token_ids(2, PROMPT + STEPS))


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2"])
def test_calibrated_families(tiny, token_ids, family):
    compare(calibrated(tiny, family), token_ids(2, PROMPT + STEPS), backend="aot_eager")


def test_statistics_of_the_prompt_come_ready_between_steps(tiny, token_ids):
    """One graph keeps queries for them, another one reads packed tokens; other prompts need no more."""
    model = tiny("llama")
    quantize_(model, headq_config(epoch_tokens=32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length, seed in ((90, 0), (101, 3)):
        tokens = token_ids(2, length + 60, seed)
        eager, packed = HeadQCache(model), HeadQCache(model)
        for cache in (eager, packed):
            model(tokens[:, :length], cache=cache)
        assert not any(packed.layers[0].learned)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            got = decode(compiled, packed, tokens, length)
        torch.testing.assert_close(got, decode(model, eager, tokens, length), rtol=0, atol=1e-5)
        assert all(packed.layers[0].learned) and packed.rows_read == eager.rows_read and packed.packed_fraction > 0
        assert graphs() == 2


def test_calibrated_and_each_side_alone(tiny, token_ids):
    model = tiny("llama")
    calibration = calibrate(model, list(token_ids(4, 128, seed=1).split(1)), progress=False)
    quantize_(model, headq_config(calibration=calibration, v_bits=None, mean_bits=2.0))
    compare(model, token_ids(1, PROMPT + STEPS))


def test_no_operator_keeps_cuda_graphs_away(tiny, token_ids):
    """The steps of one and of several tokens: plain operators, none that calls back into Python or is unsafe."""
    model, tokens = calibrated(tiny, layers=1), token_ids(2, PROMPT + 10)
    cache, found = HeadQCache(model), []

    def note(graph, example):
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    model(tokens[:, :PROMPT], cache=cache)
    compiled = torch.compile(model, fullgraph=True, backend=note)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for width in (1, 5):
            compiled(tokens[:, PROMPT : PROMPT + width], cache=cache)
    found = [x.default if isinstance(x, torch._ops.OpOverloadPacket) else x for x in found]
    operators = {x for x in found if isinstance(x, torch._ops.OpOverload)}
    ours = {str(x) for x in operators if x.namespace == "headq"}
    assert ours == {"headq.cache_update.default", "headq.paged_attention.default"}
    assert not any(torch.Tag.cudagraph_unsafe in x.tags for x in operators)


def test_left_padding_and_two_caches_in_turn(tiny, token_ids):
    model = calibrated(tiny)
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


@pytest.mark.parametrize("sizes", [(PROMPT, 5, 1, 1), (PROMPT, 30, 4, 1)])
def test_left_padding_before_several_tokens_without_position_ids(tiny, token_ids, sizes):
    """A model that is told of padding by a mask of all slots alone reads it by the slots' places."""
    model, tokens = calibrated(tiny), token_ids(2, sum(sizes))
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0

    def run(forward):
        cache, at, found = HeadQCache(model), 0, []
        for n in sizes:
            found.append(forward(tokens[:, at : at + n], cache=cache, attention_mask=mask[:, : at + n]).logits)
            at += n
        return torch.cat(found, 1)[mask > 0]

    with torch._dynamo.config.patch(error_on_recompile=False):
        got = run(torch.compile(model, fullgraph=True, backend="eager"))
    torch.testing.assert_close(got, run(model), rtol=0, atol=1e-4)


def test_a_copy_after_padding_in_a_graph_looks_at_its_own_tokens(tiny, token_ids):
    model, tokens = calibrated(tiny), token_ids(2, PROMPT + 6)
    cache = HeadQCache(model, max_length=200, batch_size=2)
    model(tokens[:, :PROMPT], cache=cache)
    model(tokens[:, PROMPT : PROMPT + 1], cache=cache)
    mask = torch.ones_like(tokens[:, : PROMPT + 5])
    mask[0, PROMPT + 1 : PROMPT + 3] = 0
    torch.compile(step_of(model), fullgraph=True, backend="eager")(tokens[:, PROMPT + 1 : -1], cache, mask)
    for layer in (made := copy.deepcopy(cache)).packed:
        assert layer.step is None or layer.step.update.args.start is None
    torch.testing.assert_close(model(tokens[:, -1:], cache=made).logits, model(tokens[:, -1:], cache=cache).logits)


def step_of(model):
    def step(ids, cache, attention_mask=None):
        return model(ids, cache=cache, attention_mask=attention_mask)

    return step


def test_prefill_and_steps_in_a_compiled_function(tiny, token_ids):
    """Of caches made ahead, one after the other: the second prompt adds no graph."""
    model = calibrated(tiny, "mistral", layers=1)
    step = step_of(model)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for seed in range(2):
        tokens = token_ids(2, 160, seed)
        mask = torch.ones_like(tokens)
        mask[1, : 9 + seed] = 0
        eager, packed = HeadQCache(model), HeadQCache(model, max_length=160, batch_size=2)
        expected = step(tokens[:, :150], eager, mask[:, :150]).logits[mask[:, :150] > 0]
        got = compiled(tokens[:, :150], packed, mask[:, :150]).logits[mask[:, :150] > 0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        for i in range(150, 160):
            grown = mask[:, : i + 1].clone()
            torch._dynamo.mark_dynamic(grown, 1)
            with torch._dynamo.config.patch(error_on_recompile=seed > 0 or i > 150):  # one token is another shape
                got = compiled(tokens[:, i : i + 1], packed, grown).logits
            torch.testing.assert_close(got, step(tokens[:, i : i + 1], eager, grown).logits, rtol=0, atol=1e-5)
        assert graphs() == 2
        assert packed.get_seq_length() == 160 and same_codes(eager.layers[0], packed.layers[0], 1)
        with pytest.raises(RuntimeError, match=r"found no room.*max_length"):
            compiled(tokens[:, -1:], packed, torch.cat([mask, mask[:, -1:]], 1))
        assert packed.get_seq_length() == 160


def test_room_that_ends_in_a_compiled_function(tiny, token_ids):
    """A cache that was not made ahead has the pages of its prompt: the step that needs another one is refused."""
    model, tokens = calibrated(tiny, layers=1), token_ids(1, 400)
    cache, eager = HeadQCache(model), HeadQCache(model)
    step = step_of(model)
    for each in (cache, eager):
        step(tokens[:, :110], each)
    assert cache.layers[0].table.columns == 1
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    full = 4 + 80 + 32  # sinks, window and a page
    for i in range(110, full):
        got = compiled(tokens[:, i : i + 1], cache).logits
        torch.testing.assert_close(got, step(tokens[:, i : i + 1], eager).logits, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="found no room"):
        compiled(tokens[:, full : full + 1], cache)
    assert cache.get_seq_length() == full
    i = full
    got = step(tokens[:, i : i + 1], cache).logits  # the host makes room
    torch.testing.assert_close(got, step(tokens[:, i : i + 1], eager).logits, rtol=0, atol=1e-5)
    assert graphs() == 1


def test_an_uncalibrated_model_in_a_compiled_function(tiny, token_ids):
    """It packs between calls, where the host is given one."""
    model, tokens = quantized(tiny, layers=1), token_ids(2, 200)
    cache, eager = HeadQCache(model), HeadQCache(model)
    step = step_of(model)
    for each in (cache, eager):
        step(tokens[:, :130], each)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for i in range(130, 140):
        got = compiled(tokens[:, i : i + 1], cache).logits
        assert cache.get_seq_length() == i + 1
        torch.testing.assert_close(got, step(tokens[:, i : i + 1], eager).logits, rtol=0, atol=1e-5)
    compiled(tokens[:, 140:141], cache)
    once = torch._dynamo.config.patch(error_on_recompile=False)
    with pytest.raises(ValueError, match=r"call cache\.get_seq_length"), once:
        compiled(tokens[:, 141:142], cache)
    assert cache.get_seq_length() == 141 and graphs() == 2


def generate_both(model, backend, token_ids, new_tokens, lengths=(60, 110)):
    """Two prompts, eagerly and compiled; the second is longer and must not add a graph."""
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    for length, seed in zip(lengths, range(2), strict=True):
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
    model = calibrated(tiny, "gemma3")
    generate_both(model, "eager", token_ids, 80)
    cache = HeadQCache(model)
    model.generate(token_ids(2, 20), cache=cache, max_new_tokens=4, do_sample=False)
    assert not cache.is_compileable and graphs() == 1


def test_generate_without_a_calibration(tiny, token_ids):
    generate_both(quantized(tiny, layers=1), "eager", token_ids, 40, lengths=(125, 150))


@pytest.mark.slow
def test_generate_with_inductor(tiny, token_ids):
    generate_both(calibrated(tiny, layers=1), "inductor", token_ids, 80)


def test_masks_of_the_callers_own(tiny, token_ids):
    """A compiled model takes a 4-D mask in any call, of many tokens or one."""
    model, ids = calibrated(tiny, layers=2), token_ids(1, 120)
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
    model, ids = calibrated(tiny, layers=1), token_ids(1, 8)

    def refuses(call, match, error=ValueError, **arguments):
        torch._dynamo.reset()
        with pytest.raises(error, match=match), torch._dynamo.config.patch(error_on_recompile=False):
            torch.compile(call, fullgraph=True, backend="eager")(ids, **arguments)

    def function(ids, **arguments):
        return model(ids, **arguments)

    def room(of=None):
        return HeadQCache(model if of is None else of, max_length=20, batch_size=1)

    custom = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    holes = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]])
    refuses(model, r"a 4-D attention_mask must be", attention_mask=custom[..., 1:])
    once = torch._dynamo.config.patch(error_on_recompile=False)  # transformers needs a graph break there
    with pytest.raises(ValueError, match="returns no attention weights"), once:
        torch.compile(model, backend="eager")(ids, output_attentions=True)
    refuses(model, "softcap=30.0", cache=HeadQCache(model), softcap=30.0)
    refuses(function, "takes a 2-D attention_mask", cache=room(), attention_mask=custom)
    refuses(function, "has a hole", RuntimeError, cache=room(), attention_mask=holes)
    refuses(function, "pad on the left", RuntimeError, cache=room(), attention_mask=holes.sort(descending=True)[0])
    refuses(function, "cannot make its cache")
    refuses(function, "cannot make room", cache=HeadQCache(model))
    refuses(function, "found no room", RuntimeError, cache=HeadQCache(model, max_length=7, batch_size=1))
    refuses(function, "of 2 sequences", cache=HeadQCache(model, max_length=20, batch_size=2))
    refuses(model.forward, "pre-hook was bypassed", cache=room())
    other = calibrated(tiny, layers=1, head_dim=64)
    refuses(function, "made for another model", cache=room(other))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = room()
    refuses(function, "holds torch.bfloat16", cache=narrow)
    model = quantized(tiny, layers=1)
    refuses(function, "cannot be packed by HeadQ without a calibration", cache=room())


def test_a_refused_call_leaves_the_cache_as_it_was(tiny, token_ids):
    model, tokens = calibrated(tiny, layers=2), token_ids(1, 140)
    cache, twin = HeadQCache(model), HeadQCache(model)
    for each in (cache, twin):
        model(tokens[:, :130], cache=each)
    compiled = torch.compile(lambda ids, **options: model(ids, cache=cache, **options), fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="softcap"):
        compiled(tokens[:, 130:133], softcap=30.0)
    assert cache.get_seq_length() == 130
    got, expected = (model(tokens[:, 130:], cache=each).logits for each in (cache, twin))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_dense_calls_compile_and_warn(tiny, token_ids):
    model = quantized(tiny, layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="dense keys and values"):
        assert compiled(token_ids(1, 8), use_cache=False).cache is None


def test_operators(tiny, token_ids):
    """What refuses is sound for every backend; the operators of the cache are checked with themselves."""
    like = torch.randn(2, 3)
    with pytest.raises(ValueError, match="no such thing"):
        torch.ops.headq.refuse(like, "no such thing")
    torch.library.opcheck(torch.ops.headq.without_gradients, (like, like, like, like))
